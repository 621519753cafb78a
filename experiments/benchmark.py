"""Speed against the peers, as ratios within one run: peer's time over ours, above 1 is faster.

    pip install torch-fidelity && python -m experiments.benchmark      # some five minutes on two cores

Rows: fid.py's metrics on random features of Inception's size, and its Inception with the same random weights.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import fid


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def row(name, ours, peer, repeats):
    """Time both by turns and print the medians, their spread and the median of the paired ratios."""
    ours(), peer()
    pairs = np.array([(seconds(ours), seconds(peer)) for _ in range(repeats)])
    (a, b), ratios = np.median(pairs, 0), pairs[:, 1] / pairs[:, 0]
    print(f"{name:46} {a:8.3f} s {b:8.3f} s   {np.median(ratios):5.2f} × [{ratios.min():.2f} to {ratios.max():.2f}]", flush=True)
    return float(np.median(ratios))


def features(n, d=2048, seed=0):
    """Two sets of random features [n, d] of full rank, their spectrum falling as Inception's does."""
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1) ** -0.75
    basis = lambda: torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    return torch.randn(n, d, generator=g) * spectrum @ basis(), (1.1 * torch.randn(n, d, generator=g) + 0.05) * spectrum @ basis()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=10_000, help="features a set")
    parser.add_argument("--dim", type=int, default=2048)
    args = parser.parse_args(argv)
    import torch_fidelity
    from torch_fidelity import metric_fid, metric_kid, metric_prc
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, torch-fidelity {torch_fidelity.__version__}; "
          f"medians of {args.repeats}\n{'':46} {'ours':>10} {'peer':>10}   ratio")

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
