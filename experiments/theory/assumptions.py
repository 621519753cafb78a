"""Where the theory's assumptions fail, and what alpha_r is.

    python -m experiments.theory.assumptions             # a minute; assets/alpha_r.png
    python -m experiments.theory.assumptions --table     # only the tables and the picture

First table: theory.py's simulation with one assumption of F.1 broken at a time, against the formula
that assumes it (assumptions.csv). Second: Assumption F.2 posits an alpha_r that grows from
0 at rank 0 to 1 at full rank. Measured here: the share of a random gradient's squared norm that
lies in the tangent space of BA, the directions in which BA can move at all (alpha_r.csv).
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import theory
from experiments import common

N1, N2, SIGMA, DIM = 90, 10, 8.0, 8
SHAPES = ((16, 48), (24, 24))  # of the matrices whose tangent spaces are measured
FACTORS = {"random": "random factors", "start": "LoRA's start, B = 0", "trained": "after training"}

# ------------------------------------------------------------------------------------------------
# Assumption F.1, broken


def student_t(rng, shape, nu=3):
    """Student t noise of variance 1."""
    return (rng.standard_t(nu, shape) / np.sqrt(nu / (nu - 2))).astype(np.float32)


def stretched(direction, factor):
    """Noise of mean variance 1 whose variance along the vector `direction` is `factor` times that
    of the rest."""
    rest = DIM / (DIM - 1 + factor)
    unit = (direction / np.linalg.norm(direction)).astype(np.float32)

    def noise(rng, shape):
        g = theory.gaussian(rng, shape) * np.float32(np.sqrt(rest))
        along = (g @ unit)[..., None] * unit
        return g + along * np.float32(np.sqrt(factor) - 1)
    return noise


def correlated(rho):
    """Noise of variance 1 that any two samples of a class share with correlation rho, as in a batch
    of near-duplicates."""
    def noise(rng, shape):
        shared = theory.gaussian(rng, (shape[0], 1, shape[2]))
        own = theory.gaussian(rng, shape)
        return np.float32(np.sqrt(rho)) * shared + np.float32(np.sqrt(1 - rho)) * own
    return noise


def violations():
    """(name, means, sigma, noise) with one assumption broken each."""
    means = theory.two_means(1.0, 0.0, DIM)
    v = means[0] - means[1]
    gaussian = theory.gaussian
    return [("none broken", means, SIGMA, gaussian),
            ("‖μ_1‖ = 2 ‖μ_2‖", means * [[2 / 1.5], [1 / 1.5]], SIGMA, gaussian),
            ("‖μ_1‖ = ‖μ_2‖ / 2", means * [[1 / 1.5], [2 / 1.5]], SIGMA, gaussian),
            ("σ_1 = 2 σ_2", means, np.array([2, 1]) * SIGMA / 1.5, gaussian),
            ("σ_1 = σ_2 / 2", means, np.array([1, 2]) * SIGMA / 1.5, gaussian),
            ("variance × 4 along μ_1 − μ_2", means, SIGMA, stretched(v, 4.0)),
            ("variance / 4 along μ_1 − μ_2", means, SIGMA, stretched(v, 0.25)),
            ("Student t, ν = 3", means, SIGMA, student_t),
            ("correlation 0.01 within a class", means, SIGMA, correlated(0.01)),
            ("correlation 0.1 within a class", means, SIGMA, correlated(0.1))]


def break_assumptions(trials, seed):
    """Rows of the first table, one a violation and alpha."""
    rows = []
    for alpha in (0.0, 0.5):
        formula = float(theory.pi_maj_exact(alpha, N1, N2, 1.0, SIGMA, 0.0))
        for name, means, sigma, noise in violations():
            estimate = theory.simulate((N1, N2), means, sigma, alpha, trials, seed, noise)
            inside = min(max(estimate, 1 / trials), 1 - 1 / trials)  # else an error may be 0
            error = float(theory.standard_error(inside, trials))
            rows.append({"assumption broken": name, "alpha": str(alpha), "formula": formula,
                         "simulated": estimate, "standard error": error,
                         "difference in s.e.": (estimate - formula) / error})
    return rows


# ------------------------------------------------------------------------------------------------
# Assumption F.2: alpha_r as the share of a gradient that BA can follow


def basis(m, tolerance=1e-8):
    """Orthonormal columns that span the columns of m [n, r], r >= 0."""
    if m.shape[1] == 0:
        return m
    u, s, _ = np.linalg.svd(m, full_matrices=False)
    return u[:, s > tolerance * max(s[0], tolerance)]


def tangent_share(gradient, b, a):
    """Share of ||G||^2 inside {dB A + B dA}. gradient [d, k], b [d, r], a [r, k].

    With the projections P_B on B's columns and P_A on A's rows, what lies outside is
    (1 - P_B) G (1 - P_A)."""
    columns, rows = basis(b), basis(a.T)
    outside = gradient - columns @ (columns.T @ gradient)
    outside = outside - (outside @ rows) @ rows.T
    return 1 - (outside**2).sum() / (gradient**2).sum()


def trained_factors(d, k, rank, rng, steps=2000, lr=0.1):
    """B (from 0) and A (LoRA's) after gradient descent on ||BA - M||^2 / 2 for a random M [d, k] of
    falling spectrum."""
    full = min(d, k)
    left = rng.standard_normal((d, full)) * 0.7 ** np.arange(full)
    target = left @ rng.standard_normal((full, k)) / np.sqrt(k)
    b, a = np.zeros((d, rank)), rng.uniform(-1, 1, (rank, k)) / np.sqrt(k)
    for _ in range(steps):
        residual = b @ a - target
        b, a = b - lr * residual @ a.T, a - lr * b.T @ residual
    return b, a


def rank_effect(d, k, repeats, seed):
    """Rows of the second table for d x k matrices, one a rank: the share at random factors, at
    LoRA's start and after training, mean over `repeats` random gradients; and what random factors
    and the start should give."""
    rng = np.random.default_rng(seed)
    rows = []
    for rank in range(min(d, k) + 1):
        shares = []
        for _ in range(repeats):
            gradient = rng.standard_normal((d, k))
            b, a = rng.standard_normal((d, rank)), rng.standard_normal((rank, k))
            shares.append((tangent_share(gradient, b, a),
                           tangent_share(gradient, np.zeros_like(b), a),
                           tangent_share(gradient, *trained_factors(d, k, rank, rng))))
        random, start, trained = np.mean(shares, 0)
        rows.append({"d": d, "k": k, "rank": rank, "random": random,
                     "random, formula": 1 - (1 - rank / d) * (1 - rank / k),
                     "start": start, "start, formula": rank / k, "trained": trained})
    return rows


def verdict(share):
    """In words, whether Assumption F.2 holds for the shares at ranks 0, 1, ..., full rank."""
    share = np.asarray(share)
    full = len(share) - 1
    starts = "yes" if abs(share[0]) < 1e-5 else "NO"
    grows = "yes" if (np.diff(share) > -0.02).all() else "NO"  # their noise is about 0.01
    ends = "yes" if abs(share[-1] - 1) < 1e-5 else f"NO ({share[-1]:.2f})"
    tenth = np.interp(0.1 * full, range(full + 1), share)
    return (f"0 at rank 0 {starts}, grows {grows}, 1 at full rank {ends}; "
            f"at a tenth of full rank {tenth:.2f}")


# ------------------------------------------------------------------------------------------------
# Tables and the picture


def table(rows):
    """The first table, as text."""
    number = common.numbers(rows, ("assumption broken", "alpha"))
    return common.markdown({
        "assumption broken": rows["assumption broken"], "α": rows["alpha"],
        "formula": number["formula"].map("{:.4f}".format),
        "simulated": number["simulated"].map("{:.4f}".format),
        "difference": (number["simulated"] - number["formula"]).map("{:+.4f}".format),
        "in standard errors": number["difference in s.e."].map("{:.1f}".format)})


def rank_table(rows):
    """The second table, at each eighth of full rank, and the verdicts on all ranks, as text."""
    shown, lines = [], []
    for (d, k), mine in rows.groupby(["d", "k"], sort=False):
        size = f"{d:.0f} × {k:.0f}"
        for _, r in mine[mine["rank"] * 8 % min(d, k) == 0].iterrows():
            shown.append({"matrix": size, "rank": f"{r['rank']:.0f}",
                          "random factors": f"{r['random']:.3f}",
                          "1 − (1 − r/d)(1 − r/k)": f"{r['random, formula']:.3f}",
                          "B = 0": f"{r['start']:.3f}", "r/k": f"{r['start, formula']:.3f}",
                          "after training": f"{r['trained']:.3f}"})
        lines += [f"{size}, {name}: {verdict(mine[column])}" for column, name in FACTORS.items()]
    return "\n".join([common.markdown(shown), "", *lines])


def draw(rows, path):
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots(1, len(SHAPES), sharey=True)
    for axis, ((d, k), mine) in zip(axes, rows.groupby(["d", "k"], sort=False), strict=True):
        x = mine["rank"] / min(d, k)
        axis.plot(x, mine["random"], "o", ms=4, label="random factors")
        axis.plot(x, mine["random, formula"], "C0-", lw=1, label="1 − (1 − r/d)(1 − r/k)")
        axis.plot(x, mine["trained"], "x", color="C2", ms=5, label="after training")
        axis.plot(x, mine["start"], "s", color="C1", ms=4, label="LoRA's start, B = 0")
        axis.plot(x, mine["start, formula"], "C1-", lw=1, label="r / k")
        axis.set(title=f"{d:.0f} × {k:.0f}", xlabel="rank / full rank")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of a gradient that BA can follow")
    axes[0].legend(fontsize=8)
    common.save(figure, path)


def main(argv=None):
    parser = common.parser(__file__, __doc__, rows=False)
    parser.error = theory.fail
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=10, help="random gradients a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=common.HERE.parent,
                        help="where experiments/results/ and assets/ lie")
    parser.add_argument("--table", action="store_true",
                        help="run nothing; show the tables and draw the picture of the rows")
    args = parser.parse_args(argv)
    results = args.out / "experiments" / "results"
    try:
        if min(args.trials, args.repeats) < 1 or args.seed < 0:
            raise ValueError(f"--trials is {args.trials}, --repeats {args.repeats}, --seed "
                             f"{args.seed}; they must be at least 1, 1 and 0")
        if not args.table:
            rows = break_assumptions(args.trials, args.seed)
            common.write_rows(results / "assumptions.csv", common.text(rows))
            ranks = [row for d, k in SHAPES for row in rank_effect(d, k, args.repeats, args.seed)]
            common.write_rows(results / "alpha_r.csv", common.text(ranks))
        broken = common.read_table(results / "assumptions.csv")
        ranks = common.numbers(common.read_table(results / "alpha_r.csv"), ())
        print(f"N_1 = {N1}, N_2 = {N2}, σ/μ = {SIGMA:g}, orthogonal means\n")
        print(table(broken))
        print("\nα_r as the share of a random d × k gradient in the tangent space of BA\n")
        print(rank_table(ranks))
        draw(ranks, args.out / "assets" / "alpha_r.png")
        return 0
    except (ValueError, OSError) as e:
        theory.fail(e)


if __name__ == "__main__":
    sys.exit(main())
