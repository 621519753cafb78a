"""Speed and memory, as ratios of two ways to do a thing within one run: B's time over A's.

    python -m experiments.benchmark                                    # 20 minutes on two cores
    python -m experiments.benchmark --preset small --batch-size 32     # the CPU-sized network

It needs diffusers and torch-fidelity (pip install). Rows: a training step (forward and backward) of
CM's network and of diffusers' UNet against the plain one; sampling merged against plain; on a GPU
mixed precision and torch.compile; theory.py's simulation against bare drawing; fid.py's metrics on
random features of Inception's size, and its Inception with the same random weights, against
torch-fidelity. FLOPs are a step's; memory is what it keeps for its backward pass.
"""

import copy
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import cm
import fid
import theory
from experiments import common

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function):
    if DEVICE == "cuda":  # or what was queued before is counted, too
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name, a, b, repeats):
    """Time a and b by turns. A row: their median seconds, the median and range of b's over a's."""
    a(), b()  # the first calls also allocate and compile
    pairs = np.array([(seconds(a), seconds(b)) for _ in range(repeats)])
    first, second = np.median(pairs, 0)
    ratios = pairs[:, 1] / pairs[:, 0]
    print(f"{name}: {np.median(ratios):.2f}", file=sys.stderr, flush=True)  # minutes go by
    return {"B over A": name, "A, s": f"{first:.3f}", "B, s": f"{second:.3f}",
            "B / A, median [range]":
                f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"}


def kept_for_backward(function):
    """MB of distinct storages that autograd keeps while `function` computes its loss."""
    kept = {}

    def pack(tensor):  # held, so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        function()
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / 2**20


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Network:
    """cm.py's network plain and with reserved capacity, one batch, and the losses to compare."""

    def __init__(self, preset, batch_size):
        options = ["--preset", preset, "--base", "ddpm", "--batch-size", str(batch_size)]
        self.config = cm.parse(options)[0].resolved()
        plain_config = cm.parse([*options, "--no-cm"])[0].resolved()
        self.counts = cm.class_counts(5000, 100, 10)
        self.alpha_bar = cm.make_alpha_bar(DEVICE)
        self.plain = self.to_device(cm.make_unet(plain_config, 10, 3))
        self.reserved = self.to_device(cm.make_unet(self.config, 10, 3))
        make = cm.CapacityManipulation.from_config
        self.plain_losses = make(self.plain, self.counts, plain_config)
        self.cm_losses = make(self.reserved, self.counts, self.config)
        self.plain_losses.to(DEVICE)
        self.cm_losses.to(DEVICE)

        g = torch.Generator().manual_seed(0)
        shape = (batch_size, 3, self.config.image_size, self.config.image_size)
        self.x0, self.eps = torch.randn(2, *shape, generator=g).to(DEVICE)
        self.y = torch.randint(10, (batch_size,), generator=g).to(DEVICE)
        self.t = torch.randint(cm.T, (batch_size,), generator=g).to(DEVICE)

    def to_device(self, network):
        return cm.lay_out(network, torch.device(DEVICE))

    def plain_loss(self):
        return self.plain_losses(self.x0, self.y, self.t, self.eps, self.y)[0]

    def cm_loss(self):
        return self.cm_losses(self.x0, self.y, self.t, self.eps, self.y)[0]

    def loss_of(self, network):
        """The plain loss of a network that is called as diffusers' are."""
        x_t = cm.add_noise(self.x0, self.t, self.eps, self.alpha_bar)
        return cm.squared_distance(network(x_t, self.t, self.y).sample, self.eps).mean()

    def predict(self, network):
        with torch.no_grad():
            network(self.x0, self.t, self.y)


def step(loss):
    """Forward and backward of a loss function, as one function."""
    def run():
        loss().backward()
    return run


def millions(network):
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"


def network_rows(preset, batch_size, repeats):
    """Rows of cm.py's network; prints its size and memory."""
    network = Network(preset, batch_size)
    plain, plain_step = network.plain, step(network.plain_loss)
    cm_step, size = step(network.cm_loss), network.config.image_size
    print(f"{preset} preset, {millions(plain)} parameters, {size} × {size}, batch {batch_size}; "
          f"a CM step has {flops(cm_step) / flops(plain_step):.2f} times a plain one's FLOPs")
    memory = [kept_for_backward(loss) for loss in (network.plain_loss, network.cm_loss)]
    print(f"kept for backward: plain {memory[0]:.0f} MB, CM {memory[1]:.0f} MB "
          f"({memory[1] / memory[0]:.2f} ×)")

    rows = [compare(f"CM step over plain step, batch {batch_size}", plain_step, cm_step, repeats)]
    merged = cm.merge(network.reserved)
    rows.append(compare(f"predicting, merged over plain network, batch {batch_size}",
                        lambda: network.predict(plain), lambda: network.predict(merged),
                        3 * repeats))
    if preset == "paper":
        peer = network.to_device(diffusers_unet())
        rows.append(compare(f"diffusers' UNet2DModel ({millions(peer)}) over plain step, "
                            f"batch {batch_size}",
                            plain_step, step(lambda: network.loss_of(peer)), repeats))
    return rows + (gpu_rows(network, repeats) if DEVICE == "cuda" else [])


def gpu_rows(network, repeats):
    """What a CM step gains by mixed precision and by torch.compile."""
    def mixed_loss():
        with torch.autocast("cuda", torch.bfloat16):
            return network.cm_loss()

    unet = copy.deepcopy(network.reserved)
    unet.compile()
    compiled = cm.CapacityManipulation.from_config(unet, network.counts, network.config).to(DEVICE)

    def compiled_loss():
        return compiled(network.x0, network.y, network.t, network.eps, network.y)[0]

    eager_step = step(network.cm_loss)
    return [compare("CM step in float32 over bfloat16", step(mixed_loss), eager_step, repeats),
            compare("CM step eager over compiled", step(compiled_loss), eager_step, repeats)]


def diffusers_unet():
    """diffusers' UNet of the paper preset's shape."""
    import diffusers
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, dropout=0.1,
        block_out_channels=(128, 256, 256, 256), attention_head_dim=256, num_class_embeds=10,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))


def theory_row(repeats):
    n1, n2, dim, trials, block = 90, 10, 8, 20_000, 2**22
    rng = np.random.default_rng(0)

    def draw():
        for _ in range(trials * (n1 + n2) * dim // block + 1):
            rng.standard_normal(block, np.float32)

    def simulate():
        theory.simulate((n1, n2), theory.two_means(1.0, 0.0, dim), 8.0, trials=trials)

    return compare("theory.simulate over drawing its Gaussians on one thread", draw, simulate,
                   repeats)


def features(n, dim=2048, seed=0):
    """Two sets of random features [n, dim] of full rank, whose spectrum falls as Inception's does.
    """
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1) ** -0.75

    def gaussian(rows):
        return torch.randn(rows, dim, generator=g)

    def rotated(x):
        return x * spectrum @ torch.linalg.qr(gaussian(dim)).Q

    return rotated(gaussian(n)), rotated(1.1 * gaussian(n) + 0.05)


def metric_rows(size, dim, repeats):
    """Rows of fid.py's metrics (A) and torch-fidelity's (B) on the same features [size, dim]."""
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    def statistics(*sets):
        return [metric_fid.fid_features_to_statistics(s.double()) for s in sets]

    def peer_distance(stats):
        distance = metric_fid.fid_statistics_to_metric(*stats, False)
        return distance["frechet_inception_distance"]

    def distance_row(a, b):
        assert abs(fid.frechet_distance(a, b) / peer_distance(statistics(a, b)) - 1) < 1e-6
        return compare(f"Fréchet distance from {len(a)} × {dim} features",
                       lambda: fid.frechet_distance(a, b),
                       lambda: peer_distance(statistics(a, b)), repeats)

    a, b = features(size, dim)
    subset = min(1000, size)
    return [
        distance_row(*features(dim * 5 // 4, dim)), distance_row(a, b),
        compare(f"KID from {size} × {dim} features",
                lambda: fid.kernel_distance(a, b, 20, subset),
                lambda: metric_kid.kid_features_to_metric(
                    a, b, kid_subsets=20, kid_subset_size=subset, verbose=False), repeats),
        compare(f"precision and recall from {size} × {dim} features",
                lambda: fid.precision_recall(a, b),
                lambda: metric_prc.prc_features_to_metric(b, a, verbose=False), repeats)]


def inception_row(repeats, n=32):
    """fid.py's Inception (A) and torch-fidelity's (B) with the same random weights, n images."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "random.pth"
        torch.save(torchvision.models.inception_v3(
            weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict(),
            weights)
        ours = fid.inception(weights)
        peer = FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"],
                                           feature_extractor_weights_path=str(weights))
        images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
        with torch.inference_mode():
            return compare(f"Inception, {n} images of 32 × 32", lambda: ours(images),
                           lambda: peer(images), repeats)


def main(argv=None):
    parser = common.parser(__file__, __doc__, rows=False)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, default=10_000, help="features a set")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--preset", choices=list(cm.PRESETS), default="paper", help="the network")
    parser.add_argument("--batch-size", type=int, nargs="+",
                        default=[64] if DEVICE == "cuda" else [16, 4, 2])
    args = parser.parse_args(argv)
    if min(args.repeats, args.size, args.dim, *args.batch_size) < 1:
        cm.fail("--repeats, --size, --dim and --batch-size must be at least 1")
    try:  # a missing peer is said before minutes of measuring
        import diffusers  # noqa: F401
        import torch_fidelity
    except ImportError as e:
        cm.fail(f"{e.name} is missing; pip install diffusers torch-fidelity")
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"medians of {args.repeats}, of sampling of {3 * args.repeats}")
    rows = []
    for batch_size in args.batch_size:
        rows += network_rows(args.preset, batch_size, args.repeats)
    rows.append(theory_row(args.repeats))
    print("\n" + common.markdown(rows))
    print(f"\ntorch-fidelity {torch_fidelity.__version__} (B) over ours (A)\n")
    rows = metric_rows(args.size, args.dim, args.repeats)
    rows.append(inception_row(args.repeats))
    print(common.markdown(rows))


if __name__ == "__main__":
    main()
