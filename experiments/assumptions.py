"""Where the theory's assumptions fail, and what alpha_r is.

    python -m experiments.assumptions                 # two tables, results/assumptions.csv, assets/alpha_r.png; a minute

First table: theory.py's simulation with one assumption of F.1 broken at a time, against the formula that assumes it.
Second: Assumption F.2 posits an alpha_r that grows from 0 at rank 0 to 1 at full rank. Measured here: the share of a
random gradient's squared norm that lies in the tangent space of BA, the directions in which BA can move at all.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

import theory

HERE = Path(__file__).parent
N1, N2, SIGMA, DIM = 90, 10, 8.0, 8


def student_t(rng, shape, nu=3):
    """Unit-variance Student t."""
    return (rng.standard_t(nu, shape) / np.sqrt(nu / (nu - 2))).astype(np.float32)


def stretched(direction, factor):
    """Noise of mean variance 1 whose variance along the unit vector `direction` is `factor` times that of the rest."""
    rest = DIM / (DIM - 1 + factor)
    unit = (direction / np.linalg.norm(direction)).astype(np.float32)

    def noise(rng, shape):
        g = theory.gaussian(rng, shape) * np.float32(np.sqrt(rest))
        return g + (g @ unit)[..., None] * unit * np.float32(np.sqrt(factor) - 1)
    return noise


def correlated(rho):
    """Noise that the samples of a class share with correlation rho (a batch of near-duplicates)."""
    def noise(rng, shape):
        common = theory.gaussian(rng, (shape[0], 1, shape[2]))
        return np.float32(np.sqrt(rho)) * common + np.float32(np.sqrt(1 - rho)) * theory.gaussian(rng, shape)
    return noise


def violations():
    """(name, means, sigma, noise) with one assumption broken each."""
    means = theory.two_means(1.0, 0.0, DIM)
    v = means[0] - means[1]
    return [("none broken", means, SIGMA, theory.gaussian),
            ("‖μ_1‖ = 2 ‖μ_2‖", means * [[2 / 1.5], [1 / 1.5]], SIGMA, theory.gaussian),
            ("‖μ_1‖ = ‖μ_2‖ / 2", means * [[1 / 1.5], [2 / 1.5]], SIGMA, theory.gaussian),
            ("σ_1 = 2 σ_2", means, np.array([2, 1]) * SIGMA / 1.5, theory.gaussian),
            ("σ_1 = σ_2 / 2", means, np.array([1, 2]) * SIGMA / 1.5, theory.gaussian),
            ("variance × 4 along μ_1 − μ_2", means, SIGMA, stretched(v, 4.0)),
            ("variance / 4 along μ_1 − μ_2", means, SIGMA, stretched(v, 0.25)),
            ("Student t, ν = 3", means, SIGMA, student_t),
            ("correlation 0.01 within a class", means, SIGMA, correlated(0.01)),
            ("correlation 0.1 within a class", means, SIGMA, correlated(0.1))]


def break_assumptions(trials, seed):
    """Rows (assumption broken, alpha, formula, simulated, standard error, difference in standard errors)."""
    rows = []
    for alpha in (0.0, 0.5):
        formula = float(theory.pi_maj_exact(alpha, N1, N2, 1.0, SIGMA, 0.0))
        for name, means, sigma, noise in violations():
            estimate = theory.simulate((N1, N2), means, sigma, alpha, trials, seed, noise)
            error = float(theory.standard_error(min(max(estimate, 1 / trials), 1 - 1 / trials), trials))
            rows.append((name, alpha, formula, estimate, error, (estimate - formula) / error))
    return rows


def tangent_share(gradient, b, a, tolerance=1e-8):
    """Share of ||G||^2 inside {dB A + B dA}: its projection is P_B G + G P_A - P_B G P_A. gradient [d, k], b [d, r], a [r, k]."""
    def basis(m):  # orthonormal columns that span m's
        if m.shape[1] == 0:
            return m
        u, s, _ = np.linalg.svd(m, full_matrices=False)
        return u[:, s > tolerance * max(s[0], tolerance)]
    u, v = basis(b), basis(a.T)
    outside = gradient - u @ (u.T @ gradient)
    outside = outside - (outside @ v) @ v.T
    return 1 - (outside**2).sum() / (gradient**2).sum()


def trained_factors(d, k, rank, rng, steps=2000, lr=0.1):
    """B (from 0) and A (LoRA's) after gradient descent on ||BA - M||^2 / 2 for a random M of falling spectrum."""
    target = (rng.standard_normal((d, min(d, k))) * 0.7 ** np.arange(min(d, k))) @ rng.standard_normal((min(d, k), k)) / np.sqrt(k)
    b, a = np.zeros((d, rank)), rng.uniform(-1, 1, (rank, k)) / np.sqrt(k)
    for _ in range(steps):
        residual = b @ a - target
        b, a = b - lr * residual @ a.T, a - lr * b.T @ residual
    return b, a


def rank_effect(d, k, repeats, seed):
    """Rows (d, k, rank, share at random factors, 1 - (1 - r/d)(1 - r/k), share at B = 0, r/k, share after training)."""
    rng, rows = np.random.default_rng(seed), []
    for rank in range(min(d, k) + 1):
        shares = []
        for _ in range(repeats):
            gradient = rng.standard_normal((d, k))
            b, a = rng.standard_normal((d, rank)), rng.standard_normal((rank, k))
            shares.append((tangent_share(gradient, b, a), tangent_share(gradient, 0 * b, a),
                           tangent_share(gradient, *trained_factors(d, k, rank, rng))))
        random, start, trained = np.mean(shares, 0)
        rows.append((d, k, rank, random, 1 - (1 - rank / d) * (1 - rank / k), start, rank / k, trained))
    return rows


def verdict(rows):
    """In words, from the measured columns, whether Assumption F.2 holds for each kind of factors."""
    words = []
    for name, column in (("random factors", 3), ("LoRA's start, B = 0", 5), ("after training", 7)):
        share = np.array([r[column] for r in rows])
        holds = [abs(share[0]) < 1e-9, (np.diff(share) > -0.02).all(), abs(share[-1] - 1) < 1e-6]
        words.append(f"{name}: 0 at rank 0 {'yes' if holds[0] else 'NO'}, grows {'yes' if holds[1] else 'NO'}, 1 at full rank "
                     f"{'yes' if holds[2] else f'NO ({share[-1]:.2f})'}; at a tenth of full rank {np.interp(0.1 * (len(share) - 1), range(len(share)), share):.2f}")
    return words


def draw(shapes, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots(1, len(shapes), sharey=True)
    for axis, rows in zip(axes, shapes):
        (d, k), table = rows[0][:2], np.array(rows)
        x = table[:, 2] / min(d, k)
        axis.plot(x, table[:, 3], "o", ms=4, label="random factors")
        axis.plot(x, table[:, 4], "C0-", lw=1, label="1 − (1 − r/d)(1 − r/k)")
        axis.plot(x, table[:, 7], "x", color="C2", ms=5, label="after training")
        axis.plot(x, table[:, 5], "s", color="C1", ms=4, label="LoRA's start, B = 0")
        axis.plot(x, table[:, 6], "C1-", lw=1, label="r / k")
        axis.set(title=f"{d} × {k}", xlabel="rank / full rank")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of a gradient that BA can follow")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="assumptions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = theory.fail
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=10, help="random gradients a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE.parent, help="where experiments/results/ and assets/ lie")
    args = parser.parse_args(argv)
    if min(args.trials, args.repeats) < 1 or args.seed < 0:
        theory.fail(f"--trials is {args.trials}, --repeats {args.repeats}, --seed {args.seed}; they must be at least 1, 1 and 0")
    results = args.out / "experiments" / "results" / "assumptions.csv"
    results.parent.mkdir(parents=True, exist_ok=True)

    rows = break_assumptions(args.trials, args.seed)
    print(f"N_1 = {N1}, N_2 = {N2}, σ/μ = {SIGMA:g}, orthogonal means, {args.trials:,} trials\n"
          f"{'assumption broken':34} {'α':>4} {'formula':>9} {'simulated':>10} {'difference':>11} {'in s.e.':>8}")
    for name, alpha, formula, estimate, error, z in rows:
        print(f"{name:34} {alpha:4.1f} {formula:9.4f} {estimate:10.4f} {estimate - formula:+11.4f} {z:8.1f}")
    with open(results, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["assumption broken", "alpha", "formula", "simulated", "standard error", "difference in s.e."])
        writer.writerows([r[:2] + tuple(f"{v:.6g}" for v in r[2:]) for r in rows])

    shapes = [rank_effect(d, k, args.repeats, args.seed) for d, k in ((16, 48), (24, 24))]
    for table in shapes:
        d, k = table[0][:2]
        print(f"\nα_r as the share of a random {d} × {k} gradient in the tangent space of BA, {args.repeats} gradients a rank\n"
              f"{'rank':>4} {'random':>8} {'formula':>8} {'B = 0':>8} {'r/k':>8} {'trained':>8}")
        for row in table:
            print(f"{row[2]:4d} " + " ".join(f"{v:8.3f}" for v in row[3:]))
        print("\n".join(verdict(table)))
    draw(shapes, args.out / "assets" / "alpha_r.png")


if __name__ == "__main__":
    main()
