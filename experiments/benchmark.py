"""Speed and memory, as ratios of two ways to do a thing within one run: B's time over A's.

    pip install diffusers torch-fidelity && python -m experiments.benchmark      # some ten minutes on two cores
    python -m experiments.benchmark --preset small --batch-size 32               # the CPU-sized network

Rows: a training step (forward and backward) of CM's network against the plain one, against CM with two full passes and against
diffusers' UNet; sampling merged against plain; on a GPU mixed precision and torch.compile; fid.py's metrics on random features of
Inception's size and its Inception with the same random weights, against torch-fidelity; theory.py's simulation against bare drawing.
Memory is what a step keeps for its backward pass.
"""

import argparse
import dataclasses
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import cm
import fid
import theory


def seconds(function):
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(name, a, b, repeats):
    """Time both by turns and print the medians, and the median and spread of the paired ratios."""
    a(), b()
    pairs = np.array([(seconds(a), seconds(b)) for _ in range(repeats)])
    (first, second), ratios = np.median(pairs, 0), pairs[:, 1] / pairs[:, 0]
    print(f"{name:64} {first:8.3f} s {second:8.3f} s   {np.median(ratios):5.2f} × [{ratios.min():.2f} to {ratios.max():.2f}]", flush=True)
    return float(np.median(ratios))


def kept_for_backward(function):
    """MB of distinct storages that autograd keeps while `function` computes its loss."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / 2**20


def network_rows(preset, batch_size, repeats):
    """The rows of cm.py's network; returns {name: ratio}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = ["--preset", preset, "--base", "ddpm", "--batch-size", str(batch_size)]
    c, plain_c = (cm.parse(options + extra)[0].resolved() for extra in ([], ["--no-cm"]))
    counts, alpha_bar = cm.class_counts(5000, 100, 10), cm.make_alpha_bar(device)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, batch_size, 3, c.image_size, c.image_size, generator=g).to(device)
    y, t = (torch.randint(n, (batch_size,), generator=g).to(device) for n in (10, cm.T))
    plain, factorised = (cm.make_unet(k, 10, 3).to(device, memory_format=torch.channels_last) for k in (plain_c, c))
    plain_loss, cm_loss = (cm.CapacityManipulation(u, counts, k).to(device) for u, k in ((plain, plain_c), (factorised, c)))
    omega_con, omega_div = cm_loss.omega_con[y], cm_loss.omega_div[y]

    def two_passes():
        x_t = cm.add_noise(x0, t, eps, alpha_bar)
        with cm.same_masks(x_t), cm.general_only(factorised):
            eps_theta_g = factorised(x_t, t, y)
        eps_theta = factorised(x_t, t, y)
        return (cm.squared_distance(eps_theta, eps) + cm.capacity_loss(eps_theta, eps_theta_g, omega_con, omega_div, c.div_margin)).mean()

    losses = {"plain": lambda: plain_loss(x0, y, t, eps, y)[0], "CM": lambda: cm_loss(x0, y, t, eps, y)[0], "CM with two full passes": two_passes}
    step = lambda name: lambda: losses[name]().backward()
    with FlopCounterMode(display=False) as whole:
        h = plain.encode(x0, t, y)
    encoder = whole.get_total_flops()
    with FlopCounterMode(display=False) as whole:
        plain.decode(*h)
    decoder = whole.get_total_flops()
    print(f"\n{preset} preset, {sum(p.numel() for p in plain.parameters()) / 1e6:.2f} M parameters, {c.image_size} × {c.image_size}, batch {batch_size}; "
          f"the decoder has {decoder / (encoder + decoder):.0%} of the FLOPs: a CM step costs at least {1 + decoder / (encoder + decoder):.2f} plain steps")
    ratios = {name: row(f"{name} step over plain step", step("plain"), step(name), repeats) for name in ("CM", "CM with two full passes")}
    memory = {name: kept_for_backward(loss) for name, loss in losses.items()}
    print("kept for backward: " + ", ".join(f"{name} {mb:.0f} MB ({mb / memory['plain']:.2f} ×)" for name, mb in memory.items()))
    merged = cm.merge(factorised)

    def predict(unet):
        with torch.no_grad():
            unet(x0, t, y)
    ratios["merged"] = row("predicting with the merged network over the plain one", lambda: predict(plain), lambda: predict(merged), 3 * repeats)
    if preset == "paper":
        import diffusers
        peer = diffusers.UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256), dropout=0.1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), attention_head_dim=256,
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=10).to(device, memory_format=torch.channels_last)
        ratios["diffusers"] = row(f"diffusers' UNet2DModel ({sum(p.numel() for p in peer.parameters()) / 1e6:.2f} M) over the plain step", step("plain"),
                                  lambda: cm.squared_distance(peer(cm.add_noise(x0, t, eps, alpha_bar), t, y).sample, eps).mean().backward(), repeats)
    if device == "cuda":
        def mixed():
            with torch.autocast("cuda", torch.bfloat16):
                loss = losses["CM"]()
            loss.backward()
        compiled = cm.CapacityManipulation(factorised, counts, dataclasses.replace(c, compile=True)).to(device)
        ratios["bf16"] = row("CM step in float32 over bfloat16", mixed, step("CM"), repeats)
        ratios["compile"] = row("CM step eager over compiled", lambda: compiled(x0, y, t, eps, y)[0].backward(), step("CM"), repeats)
    return ratios


def features(n, d=2048, seed=0):
    """Two sets of random features [n, d] of full rank, their spectrum falling as Inception's does."""
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1) ** -0.75
    basis = lambda: torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    return torch.randn(n, d, generator=g) * spectrum @ basis(), (1.1 * torch.randn(n, d, generator=g) + 0.05) * spectrum @ basis()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cm.fail
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=10_000, help="features a set")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--preset", choices=list(cm.PRESETS), default="paper", help="the network")
    parser.add_argument("--batch-size", type=int, default=64 if torch.cuda.is_available() else 4)
    args = parser.parse_args(argv)
    if min(args.repeats, args.size, args.dim, args.batch_size) < 1:
        cm.fail("--repeats, --size, --dim and --batch-size must be at least 1")
    try:
        import diffusers  # noqa: F401, network_rows' peer; a missing one is said before minutes of measuring
        import torch_fidelity
    except ImportError as e:
        cm.fail(f"{e.name} is missing; pip install diffusers torch-fidelity")
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"medians of {args.repeats}\n{'B over A':64} {'A':>10} {'B':>10}   B / A")
    network_rows(args.preset, args.batch_size, args.repeats)
    n1, n2, trials, rng = 90, 10, 20_000, np.random.default_rng(0)

    def draw():
        for _ in range(trials * (n1 + n2) * 8 // 2**22 + 1):
            rng.standard_normal(2**22, np.float32)
    row("theory.simulate over drawing its Gaussians on one thread", draw,
        lambda: theory.simulate((n1, n2), theory.two_means(1.0, 0.0, 8), 8.0, trials=trials), args.repeats)
    from torch_fidelity import metric_fid, metric_kid, metric_prc
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    print(f"\ntorch-fidelity {torch_fidelity.__version__} (B) over ours (A)")

    def peer_fid(a, b):
        stats = [metric_fid.fid_features_to_statistics(s.double()) for s in (a, b)]
        return metric_fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]

    for n in (args.dim * 5 // 4, args.size):
        a, b = features(n, args.dim)
        assert abs(fid.frechet_distance(a, b) / peer_fid(a, b) - 1) < 1e-6
        row(f"Fréchet distance from {n} × {args.dim} features", lambda: fid.frechet_distance(a, b), lambda: peer_fid(a, b), args.repeats)
    stats = [metric_fid.fid_features_to_statistics(s.double()) for s in (a, b)]
    row(f"its trace, from {args.dim} × {args.dim} covariances", lambda: fid.full_rank_trace(*(s["sigma"] for s in stats)),
        lambda: metric_fid.fid_statistics_to_metric(*stats, False), args.repeats)
    size = min(1000, args.size)
    row(f"KID from {args.size} × {args.dim} features", lambda: fid.kernel_distance(a, b, 20, size),
        lambda: metric_kid.kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=size, verbose=False), args.repeats)
    row(f"precision and recall from {args.size} × {args.dim} features", lambda: fid.precision_recall(a, b),
        lambda: metric_prc.prc_features_to_metric(b, a, verbose=False), args.repeats)
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "random.pth"
        torch.save(fid.Inception().net.state_dict(), weights)
        ours, peer = fid.inception(weights), FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
        images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
        with torch.inference_mode():
            row("Inception, 32 images of 32 × 32", lambda: ours(images), lambda: peer(images), args.repeats)


if __name__ == "__main__":
    main()
