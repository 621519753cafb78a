"""What a CM step costs beside a plain one, and fid.py's metrics beside torch-fidelity's.

    python -m experiments.benchmark                                 # some ten minutes on two cores
    python -m experiments.benchmark --preset small --batch-size 32  # the CPU-sized network

A row times two ways to do a thing by turns: what counts is their ratio, since the machine's own
speed changes. A step is forward and backward of one batch, memory what it keeps for its backward
pass. The metrics, of random features of Inception's size, need torch-fidelity.
"""

import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import cm
import fid
from experiments import common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, DIM = 10_000, 2048  # features a set
REPEATS = 7


def seconds(function):
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name, a, b):
    """A row: median seconds of a and b, the median and range of b's over a's."""
    pairs = np.array([(seconds(a), seconds(b)) for _ in range(REPEATS + 1)])
    pairs = pairs[1:]  # the first calls also allocate
    first, second = np.median(pairs, 0)
    ratios = pairs[:, 1] / pairs[:, 0]
    return {"B over A": name, "A, s": f"{first:.3f}", "B, s": f"{second:.3f}",
            "B / A, median [range]":
                f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"}


def make_step(preset, batch_size, *flags):
    """A function that makes one step, forward and backward, on a fixed random batch."""
    config = cm.parse(["--preset", preset, "--base", "ddpm", *flags])[0].resolved()
    unet = cm.make_unet(config, 10, 3)
    losses = cm.CapacityManipulation.from_config(unet, cm.class_counts(5000, 100, 10), config)
    losses.to(DEVICE)
    side = config.image_size
    x0, eps = torch.randn(2, batch_size, 3, side, side, device=DEVICE)
    y, t = (torch.randint(n, (batch_size,), device=DEVICE) for n in (10, cm.T))
    return lambda: losses(x0, y, t, eps, y)[0].backward()


def cost(step):
    """FLOPs of a step, and MB of distinct storages that autograd keeps for its backward pass."""
    kept = {}

    def pack(tensor):  # held, so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (FlopCounterMode(display=False) as counter,
          torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)):
        step()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20
    return counter.get_total_flops(), kept


def metric_rows():
    """Rows of fid.py's metrics (A) and torch-fidelity's (B) on the same features."""
    from torch_fidelity import metric_fid, metric_kid, metric_prc
    a, b = torch.arange(1, DIM + 1) ** -0.75 * torch.randn(2, SIZE, DIM)  # Inception's spectrum

    def peer_distance():
        statistics = [metric_fid.fid_features_to_statistics(s.double()) for s in (a, b)]
        return metric_fid.fid_statistics_to_metric(*statistics, False)

    pairs = {
        "Fréchet distance": (lambda: fid.frechet_distance(a, b), peer_distance),
        "KID": (lambda: fid.kernel_distance(a, b, 20, SIZE // 10),
                lambda: metric_kid.kid_features_to_metric(
                    a, b, kid_subsets=20, kid_subset_size=SIZE // 10, verbose=False)),
        "precision and recall": (lambda: fid.precision_recall(a, b),
                                 lambda: metric_prc.prc_features_to_metric(b, a, verbose=False))}
    return [compare(name, *pair) for name, pair in pairs.items()]


def main(argv=None):
    parser = common.parser(__file__, __doc__, rows=False)
    parser.add_argument("--preset", choices=list(cm.PRESETS), default="paper", help="the network")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    print(f"torch-fidelity (B) over ours (A), {SIZE} x {DIM} features a set\n")
    print(common.markdown(metric_rows()))

    plain, ours = (make_step(args.preset, args.batch_size, *flags) for flags in (["--no-cm"], []))
    (flops, memory), (our_flops, our_memory) = cost(plain), cost(ours)
    print(f"\na CM step has {our_flops / flops:.2f} times a plain one's FLOPs and keeps "
          f"{our_memory / memory:.2f} times its {memory:.0f} MB\n")
    print(common.markdown([compare(f"CM step over plain step, batch {args.batch_size}", plain,
                                   ours)]))


if __name__ == "__main__":
    main()
