"""The theory on a real network: per-sample gradients of the largest and the smallest class, against
Theorem 2.1.

    python -m experiments.theory.gradients
    python -m experiments.theory.gradients --table       # only the tables, and assets/gradients.png

Trains DDPM and CM, a run a seed (options that aren't its own go to cm.py), and stops after 100, 500
and 2,000 steps. There, for three decoder convolutions, `torch.func` gives each sample's gradient of
Eq. (4). A weight is one output filter, a row of W. Samples of a class fall into three parts: A
gives v, the difference of the means' directions, mu_1 / |mu_1| - mu_2 / |mu_2|; B the quantities of
Assumption F.1; C is held out. With N = 100 gradients of C, a share `a` of the largest class, a
weight is dominated where their sum . v > 0: the update's angle to mu_1 is the smaller one. Where
the means are equally long, as F.1 has it, that is theory.py's criterion.

Columns of gradients.csv:
part          what the gradient is of: W (DDPM), W_g, BA (through A and B: g_B A + B g_A), or
              W_g+BA, where W moves
mu_1, mu_2    root mean square over weights of the means' lengths, without the bias
              sigma^2 dim / n (products of two parts); nan where the noise hides the mean
sigma_1, sigma_2, cos
              of Assumption F.1
quality       how much of |mu_1 - mu_2| lies along v, below 1 because v is an estimate
anisotropy    variance along v over the mean variance; median over weights and classes
predicted     (F.7), its argument times the quality
projected     (F.7) without equal means, equal spread and isotropy, from each weight's own mean and
              variance along v
observed      share of weights dominated, mean over batches
"""

import functools

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.special import ndtr, ndtri
from torch.func import functional_call, grad, vmap

import cm
import theory
from experiments import common

STOPS, SAMPLES = (100, 500, 2000), 3000  # steps; per-sample gradients a class
RATIOS, N, BATCHES = (0.5, 0.6, 0.75, 0.9, 0.99), 100, 500
METHODS = {"DDPM": ["--no-cm"], "CM": []}
UNUSED = ("sampling", "seed", "steps", "no_cm", "base", "out", "resume", "overwrite")
WORDS = ("method", "step", "seed", "options", "layer", "part")


def per_sample_gradients(losses, names, x0, y, t, eps, chunk_size=32):
    """{name: gradient of Eq. (4) [n, *shape]} of each sample alone, for the named parameters of a
    CapacityManipulation; labels aren't dropped. Their mean is the batch's gradient; in training
    mode each sample has dropout masks of its own, as in training."""
    selected = {n: p.detach() for n, p in losses.named_parameters() if n in names}

    def loss(selected, *sample):
        x0, y, t, eps = (v[None] for v in sample)
        return functional_call(losses, selected, (x0, y, t, eps, y))[0]

    gradient = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=chunk_size,
                    randomness="different")
    return gradient(selected, x0, y, t, eps)


def parts(gradients, name, layer):
    """{part: [n, rows, columns]}: what the loss makes each weight want."""
    if not isinstance(layer, cm.LowRankReserved):
        return {"W": gradients[f"unet.{name}.weight"].flatten(2)}
    w_g = gradients[f"unet.{name}.layer.weight"]
    g_a, g_b = gradients[f"unet.{name}.A"], gradients[f"unet.{name}.B"]
    ba = (g_b @ layer.A.detach() + layer.B.detach() @ g_a).view_as(w_g)
    return {part: g.flatten(2) for part, g in (("W_g", w_g), ("BA", ba), ("W_g+BA", w_g + ba))}


def unit(x):
    """Each row of x at length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def dot(x, y):
    """Inner product of the rows of x and y, mean over rows."""
    return float((x * y).sum(1).mean())


def estimate(g1, g2, seed=0):
    """Rows, one a ratio of RATIOS, of gradients [n, rows, columns] of the majority (g1) and the
    minority (g2): the columns named above from mu_1 on."""
    (a1, b1, c1), (a2, b2, c2) = (np.array_split(g.double().numpy(), 3) for g in (g1, g2))
    mean_a1, mean_b1, mean_a2, mean_b2 = (part.mean(0) for part in (a1, b1, a2, b2))
    mu = np.sqrt([dot(mean_a1, mean_b1), dot(mean_a2, mean_b2)])
    cos = (dot(mean_a1, mean_b2) + dot(mean_b1, mean_a2)) / 2 / (mu[0] * mu[1])
    variance = [b.var(0, ddof=1) for b in (b1, b2)]  # [rows, columns]
    sigma = np.sqrt([v.mean() for v in variance])

    v = unit(unit(mean_a1) - unit(mean_a2))
    quality = dot(v, mean_b1 - mean_b2) / np.sqrt(dot(mean_a1 - mean_a2, mean_b1 - mean_b2))
    along_b1, along_b2, along_c1, along_c2 = (np.einsum("nrc,rc->nr", part, v)
                                              for part in (b1, b2, c1, c2))
    anisotropy = [along.var(0, ddof=1) / of_class.mean(1)
                  for along, of_class in zip((along_b1, along_b2), variance, strict=True)]
    row = {"mu_1": mu[0], "mu_2": mu[1], "sigma_1": sigma[0], "sigma_2": sigma[1], "cos": cos,
           "quality": quality, "anisotropy": np.median(anisotropy)}

    # F.1 has one length and one spread for both classes: their root mean squares
    mean_mu, mean_sigma = np.sqrt((mu**2).mean()), np.sqrt((sigma**2).mean())
    rng = np.random.default_rng(seed)
    rows = []
    for a in RATIOS:
        n1 = round(a * N)
        n2 = N - n1
        predicted = (ndtr(quality * ndtri(theory.pi_maj(a, N, mean_mu, mean_sigma, cos)))
                     if abs(cos) <= 1 else np.nan)  # estimates of small means can leave the range
        mean = n1 * along_b1.mean(0) + n2 * along_b2.mean(0)
        spread = np.sqrt(n1 * along_b1.var(0, ddof=1) + n2 * along_b2.var(0, ddof=1))
        sums = np.array([sum(  # each of a class's gradients at most once
            along[rng.choice(len(along), n, False)].sum(0)
            for along, n in ((along_c1, n1), (along_c2, n2))) for _ in range(BATCHES)])
        rows.append(row | {"a": a, "predicted": predicted, "projected": ndtr(mean / spread).mean(),
                           "observed": (sums > 0).mean()})
    return rows


def measure(runs, flags, method, step, seed):
    """Rows of a run, trained to `step`: layer x part x ratio, from SAMPLES training images (with
    repeats, fresh noise and times, drawn by the seed) each of the largest and the smallest class.
    Raises ValueError, also where the run runs off."""
    out = runs / f"{method}-{seed}"
    ran_off = common.run([*flags, *METHODS[method], "--base", "ddpm", "--seed", str(seed),
                          "--steps", str(step)], out)
    if ran_off:
        raise ValueError(f"{out}: the loss is {ran_off}")
    config, unet, counts = cm.load_trained(out / "checkpoint.pt", "model")
    data = cm.Data(config)
    losses = cm.CapacityManipulation.from_config(unet.train(), data.counts, config)
    blocks = [i for i, m in enumerate(unet.decoder) if isinstance(m, cm.ResBlock)]
    chosen = {f"decoder.{i}.block1.2": unet.decoder[i].block1[2]
              for i in (blocks[0], blocks[len(blocks) // 2], blocks[-1])}
    names = [n for n, _ in losses.named_parameters()
             if n.startswith(tuple(f"unet.{layer}." for layer in chosen)) and "bias" not in n]
    torch.manual_seed(config.seed)
    of_class = []
    for k in (int(np.argmax(counts)), int(np.argmin(counts))):
        x0 = cm.to_float(data.images[data.starts[k] + torch.randint(counts[k], (SAMPLES,))])
        y, t = torch.full((SAMPLES,), k), torch.randint(cm.T, (SAMPLES,))
        eps = torch.randn_like(x0)
        of_class.append(per_sample_gradients(losses, names, x0, y, t, eps))
    rows = []
    for name, layer in chosen.items():
        majority, minority = (parts(gradients, name, layer) for gradients in of_class)
        for part, g1 in majority.items():
            rows += [dict(layer=name, part=part) | row
                     for row in estimate(g1, minority[part], config.seed)]
    return rows


def summary(rows):
    """As text, by part: the range of what was estimated, and how far the predictions are from what
    was observed: the absolute difference, averaged over layers, steps and ratios, mean ± standard
    deviation over seeds."""
    rows = rows.assign(**{f"error of {kind}": (rows[kind] - rows["observed"]).abs()
                          for kind in ("predicted", "projected")})
    of_part = rows.groupby("part", sort=False)
    errors = rows.groupby(["part", "seed"], sort=False)[["error of predicted",
                                                         "error of projected"]].mean()
    return common.markdown(pd.concat([
        of_part["mu_1/mu_2"].agg(lambda x: f"{x.min():.2f} to {x.max():.2f}"),
        of_part["anisotropy"].agg(lambda x: f"{x.min():.0f} to {x.max():.0f}"),
        errors.groupby("part", sort=False).agg(common.spread, digits=3),
        of_part["predicted"].agg(lambda x: f"{x.isna().sum()} of {len(x)}").rename("no estimate")],
        axis=1).reset_index())


def table(rows):
    """As text: what was estimated for each method, step, part and layer, at a = 0.9; mean ±
    standard deviation over seeds."""
    of = rows[rows["a"] == 0.9].groupby(["method", "step", "part", "layer"], sort=False)
    names = ["mu_1/mu_2", "cos", "anisotropy", "predicted", "projected", "observed"]
    return common.markdown(of[names].agg(common.spread, digits=2).reset_index())


def draw(rows, path):
    """Predicted against observed Pi_maj."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"predicted": "(F.7)", "projected": "without F.1's equalities"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for part, mine in rows.groupby("part", sort=False):
            label = "DDPM: W" if part == "W" else f"CM: {part}"
            axis.plot(mine[kind], mine["observed"], "o", ms=3, alpha=0.6, label=label)
        axis.plot([0, 1], [0, 1], "k", lw=0.8)
        axis.set(xlabel=f"Π_maj predicted, {title}")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="observed share of weights")
    axes[0].legend(fontsize=8)
    common.save(figure, path)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=(10, 11, 12))
    args, flags = parser.parse_known_args(argv)
    flags, *_ = common.configured(flags, UNUSED, warmup="100")
    if not args.table:
        keys = [dict(method=method, step=step, seed=seed)
                for seed in args.seeds for method in METHODS for step in STOPS]
        common.study(args.rows, f"{common.settings(flags)} --samples {SAMPLES}", keys,
                     functools.partial(measure, args.runs, flags))
    rows = common.numbers(common.read_table(args.rows), WORDS)
    rows["mu_1/mu_2"] = rows["mu_1"] / rows["mu_2"]
    print(table(rows), summary(rows), sep="\n\n")
    draw(rows, args.assets / "gradients.png")


if __name__ == "__main__":
    main()
