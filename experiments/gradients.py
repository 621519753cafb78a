"""The theory on a real network: per-sample gradients of the largest and the smallest class, against Theorem 2.1.

    python -m experiments.gradients --data /usr/share/datasets/fashion-mnist     # results/gradients.csv, assets/gradients.png
    python -m experiments.gradients --table                                      # only the table and the picture

Trains DDPM and CM (options that aren't its own go to cm.py) and stops at `--at` steps. There, for three decoder convolutions,
`torch.func` gives each sample's gradient of Eq. (4). A weight is one output filter, a row of W. Samples of a class fall into
three parts: A gives v, the difference of the means' directions, mu_1 / |mu_1| - mu_2 / |mu_2|; B the quantities of Assumption
F.1; C is held out. With N = 100 gradients of C, a share `a` of the largest class, a weight is dominated where their sum . v > 0:
the update's angle to mu_1 is the smaller one. Where the means are equally long, as F.1 has it, that is theory.py's criterion.

Columns: part, what the gradient is of: W (DDPM), W_g, BA (through A and B: g_B A + B g_A) or W_g+BA, where W moves; mu_1, mu_2:
root mean square over weights of the means' lengths, without the bias sigma^2 dim / n (products of two parts); sigma_1, sigma_2;
cos; quality: how much of |mu_1 - mu_2| lies along v, below 1 because v is an estimate; anisotropy: variance along v over the mean variance; kurtosis:
excess along v (median over weights); predicted: (F.7), its argument times the quality; projected: (F.7) without equal means, equal
spread and isotropy, from each weight's own mean and variance along v; observed: share of weights dominated, mean over batches.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import kurtosis
from torch.func import functional_call, grad, vmap

import cm
import theory
from experiments.study import read_rows, settings, with_defaults, write_rows

HERE = Path(__file__).parent
RATIOS, N, BATCHES = (0.5, 0.6, 0.75, 0.9, 0.99), 100, 500


def per_sample_gradients(losses, names, x0, y, t, eps, chunk_size=32):
    """{name: gradient of Eq. (4) [n, *shape]} of each sample alone, for the named parameters of a CapacityManipulation in
    eval mode; labels aren't dropped. Their mean is the batch's gradient."""
    def loss(selected, *sample):
        x0, y, t, eps = (v[None] for v in sample)
        return functional_call(losses, selected, (x0, y, t, eps, y))[0]
    selected = {n: p.detach() for n, p in losses.named_parameters() if n in names}
    return vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk_size)(selected, x0, y, t, eps)


def layers(unet):
    """The first convolution of the decoder's first, middle and last residual block, {name: layer}."""
    blocks = [i for i, m in enumerate(unet.decoder) if isinstance(m, cm.ResBlock)]
    return {f"decoder.{i}.block1.2": unet.decoder[i].block1[2] for i in (blocks[0], blocks[len(blocks) // 2], blocks[-1])}


def parts(gradients, name, layer):
    """{part: [n, rows, columns]}: what the loss makes each weight want."""
    if not isinstance(layer, cm.LowRankReserved):
        return {"W": gradients[f"unet.{name}.weight"].flatten(2)}
    w_g = gradients[f"unet.{name}.layer.weight"].flatten(2)
    ba = gradients[f"unet.{name}.B"] @ layer.A.detach() + layer.B.detach() @ gradients[f"unet.{name}.A"]
    return {"W_g": w_g, "BA": ba, "W_g+BA": w_g + ba}


def estimate(g1, g2, seed=0):
    """Rows (one a ratio) of gradients [n, rows, columns] of the majority and the minority."""
    thirds = [[np.asarray(p) for p in np.array_split(g.double().numpy(), 3)] for g in (g1, g2)]
    (m1a, m1b, _), (m2a, m2b, _) = ([p.mean(0) for p in part] for part in thirds)  # [rows, columns]
    dot = lambda x, y: float((x * y).sum(1).mean())  # a mean over weights
    square = [max(dot(m1a, m1b), 0.0), max(dot(m2a, m2b), 0.0)]
    mu = np.sqrt(square)
    cos = (dot(m1a, m2b) + dot(m1b, m2a)) / 2 / max(mu[0] * mu[1], 1e-300)
    sigma = [float(np.sqrt(p[1].var(0, ddof=1).mean())) for p in thirds]
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    v = unit(unit(m1a) - unit(m2a))
    quality = max(dot(v, m1b - m2b), 0.0) / np.sqrt(max(dot(m1a - m2a, m1b - m2b), 1e-300))
    along = [[np.einsum("nrc,rc->nr", p, v) for p in part[1:]] for part in thirds]  # B and C on v: [n, rows]
    row = {"mu_1": mu[0], "mu_2": mu[1], "sigma_1": sigma[0], "sigma_2": sigma[1], "cos": cos, "quality": quality,
           "anisotropy": np.median([b.var(0, ddof=1) / p[1].var(0, ddof=1).mean(1) for (b, _), p in zip(along, thirds)]),
           "kurtosis": np.median([kurtosis(b) for b, _ in along])}
    (b1, c1), (b2, c2) = along
    rng, rows = np.random.default_rng(seed), []
    for a in RATIOS:
        n1 = round(a * N)
        n2 = N - n1
        common = np.sqrt(np.mean(square)), np.sqrt(np.mean(np.square(sigma)))
        known = common[0] > 0 and -1 <= cos < 1  # estimates of small means can leave the range
        predicted = ndtr(quality * ndtri(theory.pi_maj(a, N, *common, cos))) if known else float("nan")
        projected = ndtr((n1 * b1.mean(0) + n2 * b2.mean(0)) / np.sqrt(n1 * b1.var(0, ddof=1) + n2 * b2.var(0, ddof=1))).mean()
        sums = [c1[rng.choice(len(c1), n1, False)].sum(0) + c2[rng.choice(len(c2), n2, False)].sum(0) for _ in range(BATCHES)]
        shares = (np.array(sums) > 0).mean(1)
        rows.append(row | {"a": a, "predicted": predicted, "projected": projected, "observed": shares.mean()})
    return rows


def measure(checkpoint, samples, seed=0):
    """Rows of one checkpoint, layer x part x ratio, from `samples` training images (with repeats, flips, fresh noise and
    times) each of the largest and of the smallest class. Raises ValueError."""
    c, unet, counts = cm.load_trained(checkpoint, "model")
    data = cm.Data(c)
    losses, chosen = cm.CapacityManipulation(unet, data.counts, c).eval(), layers(unet)
    torch.manual_seed(seed)
    gradients = []
    for k in (int(np.argmax(counts)), int(np.argmin(counts))):
        x0 = cm.to_float(data.images[data.starts[k] + torch.randint(counts[k], (samples,))])
        x0 = torch.where(torch.rand(samples, 1, 1, 1) < 0.5 * c.flip, x0.flip(3), x0)
        names = [n for n, _ in losses.named_parameters() if any(n.startswith(f"unet.{name}.") for name in chosen) and "bias" not in n]
        gradients.append(per_sample_gradients(losses, names, x0, torch.full((samples,), k), torch.randint(cm.T, (samples,)), torch.randn_like(x0)))
    return [dict(layer=name, part=part) | row for name, layer in chosen.items()
            for (part, g1), g2 in zip(parts(gradients[0], name, layer).items(), parts(gradients[1], name, layer).values())
            for row in estimate(g1, g2, seed)]


def study(path, runs, stops, samples, flags):
    """Train both methods from stop to stop and measure at each; what has rows is not measured again. Raises ValueError."""
    flags = with_defaults(flags, warmup="100")
    rows = read_rows(path, flags)
    for method, own in (("DDPM", ["--no-cm"]), ("CM", [])):
        for stop in sorted(stops):
            if any(r["method"] == method and int(r["step"]) == stop for r in rows):
                continue
            out = runs / method
            argv = [*flags, *own, "--base", "ddpm", "--steps", str(stop), "--out", str(out)] + ["--resume"] * (out / "config.json").is_file()
            config, typed = cm.parse(argv)
            status = cm.train(config.resolved(), typed)
            if status:
                sys.exit(status)
            rows = read_rows(path) + [dict(method=method, step=stop, samples=samples, options=settings(flags)) | r
                                      for r in measure(out / "checkpoint.pt", samples)]
            write_rows(path, rows)
    return rows


def table(rows):
    """As text: what was estimated, by layer, and how far the predictions are from what was observed."""
    lines = ["| method, step | gradient of | layer | ‖μ_1‖/‖μ_2‖ | σ_1/σ_2 | σ/μ | cos | quality | anisotropy | kurtosis | "
             + " | ".join(f"Π_maj at a = {a:g}: (F.7) / projected / observed" for a in RATIOS[1:4]) + " |", "| --- " * 13 + "|"]
    rows = [{k: float(v or "nan") if k not in ("method", "layer", "part", "options") else v for k, v in r.items()} for r in rows]
    keys = list(dict.fromkeys((r["method"], r["step"], r["part"], r["layer"]) for r in rows))
    for method, step, part, layer in keys:
        mine = {r["a"]: r for r in rows if (r["method"], r["step"], r["part"], r["layer"]) == (method, step, part, layer)}
        r, ratio = mine[RATIOS[0]], lambda x, y: x / y if y > 0 else float("nan")
        mu, sigma = (((r[f"{n}_1"] ** 2 + r[f"{n}_2"] ** 2) / 2) ** 0.5 for n in ("mu", "sigma"))
        lines.append(f"| {method}, {step:.0f} | {part} | {layer} | {ratio(r['mu_1'], r['mu_2']):.2f} | {ratio(r['sigma_1'], r['sigma_2']):.2f} | "
                     f"{ratio(sigma, mu):.1f} | {r['cos']:.2f} | {r['quality']:.2f} | {r['anisotropy']:.1f} | {r['kurtosis']:.1f} | "
                     + " | ".join(f"{mine[a]['predicted']:.2f} / {mine[a]['projected']:.2f} / {mine[a]['observed']:.2f}" for a in RATIOS[1:4]) + " |")
    lines.append("")
    for part in dict.fromkeys(r["part"] for r in rows):
        mine = [r for r in rows if r["part"] == part]
        off = {k: [abs(r[k] - r["observed"]) for r in mine if r[k] == r[k]] for k in ("predicted", "projected")}
        lines.append(f"{part}: |prediction − observed| on average {np.mean(off['predicted'] or [np.nan]):.3f} by (F.7), "
                     f"{np.mean(off['projected']):.3f} from each weight's own projections; {len(mine) - len(off['predicted'])} of {len(mine)} (F.7) had no estimate")
    return "\n".join(lines)


def draw(rows, path):
    """Predicted against observed Pi_maj, and the observed one over training steps at a = 0.9."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10.4, 3.8), layout="constrained")
    axes, colours = figure.subplots(1, 3), {"W": "C0", "W_g": "C1", "BA": "C2", "W_g+BA": "C3"}
    for axis, kind, title in ((axes[0], "predicted", "(F.7)"), (axes[1], "projected", "without F.1's equalities")):
        for part, colour in colours.items():
            mine = [r for r in rows if r["part"] == part]
            if mine:
                axis.plot([float(r[kind]) for r in mine], [float(r["observed"]) for r in mine], "o", ms=3, alpha=0.6, color=colour,
                          label={"W": "DDPM: W"}.get(part, f"CM: {part}"))
        axis.plot([0, 1], [0, 1], "k", lw=0.8)
        axis.set(xlabel=f"Π_maj predicted, {title}", ylabel="observed share of weights")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    for part, colour in colours.items():
        for layer in dict.fromkeys(r["layer"] for r in rows):
            mine = [r for r in rows if (r["part"], r["layer"]) == (part, layer) and float(r["a"]) == 0.9]
            axes[2].plot([int(r["step"]) for r in mine], [float(r["observed"]) for r in mine], "o-", lw=1, ms=3, color=colour, alpha=0.7)
    axes[2].set(xlabel="step", ylabel="observed share, a = 0.9", xscale="log")
    axes[2].grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="gradients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = cm.fail
    parser.add_argument("--at", type=int, nargs="+", default=[100, 500, 2000], help="steps to measure at")
    parser.add_argument("--samples", type=int, default=3000, help="per-sample gradients a class")
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "gradients.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/gradients"))
    parser.add_argument("--assets", type=Path, default=HERE.parent / "assets")
    parser.add_argument("--table", action="store_true", help="only the table and the picture of the rows at hand")
    args, flags = parser.parse_known_args(argv)
    try:
        if args.samples < 3 * N or min(args.at) < 1:
            raise ValueError(f"--samples is {args.samples}, --at {min(args.at)}; they must be at least {3 * N} and 1")
        rows = read_rows(args.rows) if args.table else study(args.rows, args.runs, args.at, args.samples, flags)
        if not rows:
            raise ValueError(f"{args.rows} has no rows; leave --table away")
        print(table(rows))
        draw(rows, args.assets / "gradients.png")
        return 0
    except (ValueError, OSError, FloatingPointError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
