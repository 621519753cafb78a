"""Where the theory's assumptions fail, and what alpha_r is.

    python -m experiments.theory.assumptions             # a minute; assets/alpha_r.png
    python -m experiments.theory.assumptions --table     # only the table and the picture

The table: theory.py's simulation with one assumption of F.1 broken at a time, against the formula
that assumes it (assumptions.csv). The picture: Assumption F.2 posits an alpha_r that grows from 0
at rank 0 to 1 at full rank. Measured here: the share of a random gradient's squared norm that lies
in the tangent space of BA, the directions in which BA can move at all (alpha_r.csv).
"""

import numpy as np
from matplotlib.figure import Figure

import theory
from experiments import common

N1, N2, SIGMA, DIM = 90, 10, 8.0, 8
TRIALS = 100_000  # a row of the table
SHAPES = ((16, 48), (24, 24))  # of the matrices whose tangent spaces are measured
GRADIENTS = 10  # random ones a rank

# ------------------------------------------------------------------------------------------------
# Assumption F.1, broken


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
    student_t = lambda rng, shape: np.float32(rng.standard_t(3, shape) / np.sqrt(3))  # variance 1
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


def break_assumptions():
    """Rows of the table, one a violation and alpha."""
    rows = []
    for alpha in (0.0, 0.5):
        formula = float(theory.pi_maj_exact(alpha, N1, N2, 1.0, SIGMA, 0.0))
        for name, means, sigma, noise in violations():
            estimate = theory.simulate((N1, N2), means, sigma, alpha, TRIALS, noise=noise)
            error = float(theory.standard_error(estimate, TRIALS))
            rows.append({"assumption broken": name, "alpha": str(alpha), "formula": formula,
                         "simulated": estimate, "standard error": error,
                         "difference in s.e.": (estimate - formula) / error})
    return rows


# ------------------------------------------------------------------------------------------------
# Assumption F.2: alpha_r as the share of a gradient that BA can follow


def tangent_share(gradient, b, a):
    """Share of ||G||^2 inside {dB A + B dA}. gradient [d, k], b [d, r], a [r, k].

    With the projections B B^+ on B's columns and A^+ A on A's rows, what lies outside is
    (1 - B B^+) G (1 - A^+ A)."""
    outside = gradient - b @ (np.linalg.pinv(b, rcond=1e-8) @ gradient)
    outside = outside - (outside @ np.linalg.pinv(a, rcond=1e-8)) @ a
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


def rank_effect(d, k):
    """Rows of the picture for d x k matrices, one a rank: the share at random factors, at
    LoRA's start and after training, mean over random gradients; and what random factors and the
    start should give."""
    rng = np.random.default_rng(0)
    rows = []
    for rank in range(min(d, k) + 1):
        shares = []
        for _ in range(GRADIENTS):
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


# ------------------------------------------------------------------------------------------------
# Table and picture


def table(rows):
    """As text: what was simulated beside what the formula says."""
    number = common.numbers(rows, ("assumption broken", "alpha"))
    return common.markdown({
        "assumption broken": rows["assumption broken"], "α": rows["alpha"],
        "formula": number["formula"].map("{:.4f}".format),
        "simulated": number["simulated"].map("{:.4f}".format),
        "difference": (number["simulated"] - number["formula"]).map("{:+.4f}".format),
        "in standard errors": number["difference in s.e."].map("{:.1f}".format)})


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


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__)
    args = parser.parse_args(argv)
    of_ranks = args.rows.with_name("alpha_r.csv")
    if not args.table:
        common.write_rows(args.rows, common.text(break_assumptions()))
        common.write_rows(of_ranks, common.text([r for d, k in SHAPES for r in rank_effect(d, k)]))
    broken = common.read_table(args.rows)
    print(f"N_1 = {N1}, N_2 = {N2}, σ/μ = {SIGMA:g}, orthogonal means\n")
    print(table(broken))
    draw(common.numbers(common.read_table(of_ranks), ()), args.assets / "alpha_r.png")


if __name__ == "__main__":
    main()
