"""How often the majority's gradients dominate a weight: the paper's theorems, by simulation.

    python theory.py                    # half a minute; status 1 where a check fails
    python theory.py --plot assets      # and the pictures of the README

    >>> pi_maj(a=0.9, n=100, mu=1, sigma=5, cos=0)              # (F.7); arrays broadcast
    >>> simulate_pi_maj(90, 10, mu=1, sigma=5, cos=0)           # (estimate, standard error)

Class k sends N_k per-sample gradients to one weight. The majority dominates the update ΔW where
that is nearer to μ_1 than to the minority's mean (μ_2, or μ_K): ΔW·(μ_1 − μ_2) > 0. Π_maj is the
probability of that. The word before the paper's F.1 and F.2 says what they are:

- Assumption F.1: the gradients of class k are Gaussian, g ~ N(μ_k, σ² I), and all ‖μ_k‖ = μ.
- Assumption F.2: with reserved capacity, W = W_g + W_e, the update is
      ΔW = ∇W_g/‖E ∇W_g‖ + α ∇W_e/‖E ∇W_e‖, 0 ≤ α ≤ 1 (the paper's α_r, which grows with the rank).
- Theorems F.1 and F.2: Theorems 2.1 (no reserved capacity) and 3.1 (with it) for K classes.

N counts all samples, s = √((1 − cos)/2) is the sine of half the angle between the first and the
last class's mean, D = N_1 − N_2, Φ the normal CDF. Proofs: experiments/theory/proofs.md.
"""

import argparse
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from scipy.special import ndtr  # Φ, (F.6)

PIECE = 2**22  # Gaussians held at a time by each thread
ROUNDING = 1e-12  # what two equal probabilities may differ by in float64


# --------------------------------------------------------------------------------------------------
# Closed forms, two classes. Arguments broadcast; 0 ≤ a, alpha ≤ 1, cos < 1


def pi_maj(a, n, mu, sigma, cos):
    """Theorem 2.1, (F.7): no reserved capacity. a = N_1 / N is the majority's share of n."""
    return ndtr((2 * a - 1) * mu * np.sqrt(2 * n * (1 - cos)) / (2 * sigma))


def pi_maj_bound(alpha, n, mu, sigma, cos):
    """Theorem 3.1, (F.14), last line: the paper's bound, Φ( (μ/σ) √N s (1 − α) )."""
    return ndtr((1 - alpha) * mu * np.sqrt(2 * n * (1 - cos)) / (2 * sigma))


def pi_maj_middle(alpha, n, n2, mu, sigma, cos):
    """(F.14), the line before the last: Φ( (μ/σ) s (1 − α) / √(1/N + α²/N_2) )."""
    variance = 2 * (1 / n + alpha**2 / n2) * sigma**2 * (1 - cos)
    return ndtr(mu * (1 - alpha) * (1 - cos) / np.sqrt(variance))


def pi_maj_exact(alpha, n1, n2, mu, sigma, cos, kappa=None):
    """Π_maj of Theorem 3.1's own model, without a bound. It isn't in the paper:

        Φ( (μ/σ) s (D − ακ) / √(N + 2ακ + α²κ²/N_2) ),  κ = ‖N_1 μ_1 + N_2 μ_2‖ / μ

    It falls as α grows; at α = 0 it is (F.7). kappa, where given, stands for κ.
    Proof: experiments/theory/proofs.md#pi_maj_exact, (1)-(7)."""
    if kappa is None:
        kappa = np.sqrt(np.maximum(0, n1**2 + n2**2 + 2 * n1 * n2 * cos))
    spread = np.sqrt(n1 + n2 + 2 * alpha * kappa + alpha**2 * kappa**2 / n2)
    return ndtr(mu / sigma * np.sqrt((1 - cos) / 2) * (n1 - n2 - alpha * kappa) / spread)


def pi_maj_tight(alpha, n1, n2, mu, sigma, cos):
    """A bound below both of (F.14)'s: `pi_maj_exact` at κ = D. It isn't in the paper:

        exact ≤ Φ( (μ/σ) s (1 − α) D / √(N + 2αD + α²D²/N_2) ) ≤ (F.14)'s middle ≤ its last line

    It keeps the sample ratio, and at α = 0 it is Theorem 2.1. Raises ValueError unless n1 ≥ n2.
    Proof: experiments/theory/proofs.md#pi_maj_tight, (1)-(5)."""
    if np.any(n1 < n2):
        raise ValueError(f"n1 is {n1}, below n2 = {n2}; class 1 must be the majority")
    return pi_maj_exact(alpha, n1, n2, mu, sigma, cos, kappa=n1 - n2)


def ladder(alpha, counts, means, sigma):
    """Theorem 3.1, an array of four: exact, the tighter bound, (F.14)'s middle and last line."""
    (n1, n2), mu = counts, np.linalg.norm(means[0])
    cos = means[0] @ means[1] / mu**2
    exact = pi_maj_exact(alpha, n1, n2, mu, sigma, cos)
    tight = pi_maj_tight(alpha, n1, n2, mu, sigma, cos)
    middle = pi_maj_middle(alpha, n1 + n2, n2, mu, sigma, cos)
    return np.array([exact, tight, middle, pi_maj_bound(alpha, n1 + n2, mu, sigma, cos)])


# --------------------------------------------------------------------------------------------------
# Closed forms, K classes: `counts` [K] from class 1 to class K, `means` [K, dim]


def pi_maj_multi(counts, means, sigma):
    """Theorem F.1, (F.15): the probability that class K is overwhelmed by class 1."""
    return pi_maj_multi_exact(0.0, counts, means, sigma)


def pi_maj_multi_simple(n1, nk, n, mu, sigma, cos):
    """(F.16): (F.15) without its cross term, right for mutually orthogonal means."""
    return ndtr((n1 - nk) * mu * np.sqrt(1 - cos) / (np.sqrt(2 * n) * sigma))


def pi_maj_multi_bound(alpha, n, mu, sigma, cos):
    """Theorem F.2, (F.17): (F.14)'s last line with N over all classes.

    For any means, as the paper states it, it can be wrong (`counterexample`). For mutually
    orthogonal ones it is right. Proof: experiments/theory/proofs.md#pi_maj_multi_bound, (1)-(3)."""
    return pi_maj_bound(alpha, n, mu, sigma, cos)


def pi_maj_multi_exact(alpha, counts, means, sigma):
    """Π_maj of Theorem F.2's own model, for any means of equal norm. It isn't in the paper:

        Φ( (T·v + ακ μ_K·v) / (σ ‖v‖ √(N + 2ακ + α²κ²/N_K)) ),
        T = Σ_k N_k μ_k,  κ = ‖T‖ / μ,  v = μ_1 − μ_K

    At α = 0 it is (F.15). alpha and sigma broadcast. Raises ValueError where the norms differ.
    Proof: experiments/theory/proofs.md#pi_maj_multi_exact, (1)-(5)."""
    counts, means = np.asarray(counts, float), np.asarray(means, float)
    norms = np.linalg.norm(means, axis=1)
    if np.ptp(norms) > 1e-6 * norms.max():
        raise ValueError(f"means have norms {norms}; Assumption F.1 wants them equal")
    mu, v = norms[0], means[0] - means[-1]
    total = counts @ means  # T
    kappa = np.linalg.norm(total) / mu
    mean = total @ v + alpha * kappa * (means[-1] @ v)
    spread = np.sqrt(counts.sum() + 2 * alpha * kappa + alpha**2 * kappa**2 / counts[-1])
    return ndtr(mean / (sigma * np.linalg.norm(v) * spread))


def pi_maj_multi_any(alpha, n, nk, mu, sigma, cos, kappa=None):
    """Theorem F.2 mended: a bound for any class means of equal norm. It isn't in the paper:

        exact ≤ Φ( (μ/σ) κ (1 − αs) / √(N + 2ακ + α²κ²/N_K) )    κ = ‖Σ_k N_k μ_k‖ / μ
              ≤ Φ( (μ/σ) N (1 − αs) / √(N + 2αN + α²N²/N_K) )    the same at κ = N, the default
              ≤ Φ( (μ/σ) √N (1 − αs) )                           `pi_maj_multi_any_simple`

    n counts all classes, nk the last one. Arguments broadcast.
    Proof: experiments/theory/proofs.md#pi_maj_multi_any, (1)-(6)."""
    kappa = n if kappa is None else kappa
    spread = np.sqrt(n + 2 * alpha * kappa + alpha**2 * kappa**2 / nk)
    return ndtr(mu / sigma * kappa * (1 - alpha * np.sqrt((1 - cos) / 2)) / spread)


def pi_maj_multi_any_simple(alpha, n, mu, sigma, cos):
    """`pi_maj_multi_any` without the minority's count, its last line: Φ( (μ/σ) √N (1 − αs) )."""
    return ndtr(mu / sigma * np.sqrt(n) * (1 - alpha * np.sqrt((1 - cos) / 2)))


def multi_ladder(alpha, counts, means, sigma):
    """Theorem F.2's model, an array of five: the exact value; the mended bound at its κ, at κ = N,
    and simplified; and, which isn't always above the first, the paper's (F.17)."""
    n, nk, mu = np.sum(counts), counts[-1], np.linalg.norm(means[0])
    cos, kappa = means[0] @ means[-1] / mu**2, np.linalg.norm(counts @ means) / mu
    exact = pi_maj_multi_exact(alpha, counts, means, sigma)
    at_kappa = pi_maj_multi_any(alpha, n, nk, mu, sigma, cos, kappa)
    at_n = pi_maj_multi_any(alpha, n, nk, mu, sigma, cos)
    simple = pi_maj_multi_any_simple(alpha, n, mu, sigma, cos)
    return np.array([exact, at_kappa, at_n, simple, pi_maj_multi_bound(alpha, n, mu, sigma, cos)])


def counterexample(alpha=0.0):
    """Where (F.17) fails, for `multi_ladder` and `simulate`: counts 1000, 999 and 1,
    cos∠(μ_1, μ_3) = 0.9, μ_2 along v = μ_1 − μ_3, σ/μ = 10.

    Class 2's gradients all push for class 1 against class 3; (F.17) doesn't know them. By hand, at
    α = 0: s = √0.05 = 0.2236, and the means' components along v are sμ, μ and −sμ, so
        exact  Φ( (1000 s + 999 − s) / (10 √2000) ) = Φ(1222.4 / 447.2) = Φ(2.73) = 0.997
        (F.17) Φ( √2000 s / 10 ) = Φ(1) = 0.841."""
    first, last = two_means(mu=1.0, cos=0.9, dim=2)
    v = first - last
    means = np.stack([first, v / np.linalg.norm(v), last])
    return dict(alpha=alpha, counts=np.array([1000, 999, 1]), means=means, sigma=10.0)


# --------------------------------------------------------------------------------------------------
# Simulation, from the assumptions


def two_means(mu, cos, dim):
    """Two means [2, dim] of norm mu at the given angle."""
    return mu * np.array([[1, 0], [cos, np.sqrt(1 - cos**2)]]) @ np.eye(2, dim)


def gaussian(rng, shape):
    """Standard normal noise, float32."""
    return rng.standard_normal(shape, np.float32)


def simulate(counts, means, sigma, alpha=0.0, trials=100_000, seed=0, noise=gaussian):
    """The share of trials that the majority dominates, from per-sample gradients.

    counts [K], means [K, dim], sigma [K] or a number. `noise(rng, [trials, samples, dim])` is the
    deviations of a class's samples, of unit variance. Each block of trials has its own stream of
    random numbers, so threads don't matter. Raises ValueError where a count isn't whole."""
    counts, means = np.asarray(counts), np.asarray(means, float)
    if (counts != np.floor(counts)).any():
        raise ValueError(f"counts are {counts}; a simulation needs whole samples")
    sigmas = np.broadcast_to(sigma, len(counts))
    norm_g, norm_e = np.linalg.norm(counts @ means), counts[-1] * np.linalg.norm(means[-1])

    def dominated(trials, stream):
        rng = np.random.default_rng(stream)
        sums = []  # S_k [trials, dim], the sum of class k's gradients
        for count, mean, spread in zip(counts, means, sigmas, strict=True):
            g = noise(rng, (trials, int(count), len(mean)))
            g *= np.float32(spread)
            g += mean.astype(np.float32)
            sums.append(g.sum(1))
        update = sum(sums)  # of W_g: all classes
        if alpha > 0:  # Assumption F.2: of W_e the minority alone
            update = update / norm_g + alpha * sums[-1] / norm_e
        return int((update @ (means[0] - means[-1]) > 0).sum())

    block = max(1, PIECE // int(counts.max() * means.shape[1]))
    sizes = [min(block, trials - first) for first in range(0, trials, block)]
    streams = np.random.SeedSequence(seed).spawn(len(sizes))
    with ThreadPool(2) as pool:  # numpy draws outside the interpreter's lock
        return sum(pool.starmap(dominated, zip(sizes, streams, strict=True))) / trials


def standard_error(p, trials):
    """Of an estimate of p: the closed form's, so that an estimate of exactly 1 has one too."""
    return np.sqrt(np.maximum(p * (1 - p), 1e-300) / trials)


def two_classes(alpha, n1, n2, mu, sigma, cos, dim=8):
    """`pi_maj_exact`'s setting as `simulate` and `ladder` take it."""
    return dict(alpha=alpha, counts=(n1, n2), means=two_means(mu, cos, dim), sigma=sigma)


def simulate_pi_maj(n1, n2, mu, sigma, cos, alpha=0.0, dim=8, trials=100_000, seed=0):
    """(estimate, standard error) of Π_maj for two classes, Theorem 2.1 (alpha = 0) or 3.1."""
    exact = pi_maj_exact(alpha, n1, n2, mu, sigma, cos)
    setting = two_classes(alpha, n1, n2, mu, sigma, cos, dim)
    return simulate(**setting, trials=trials, seed=seed), float(standard_error(exact, trials))


# --------------------------------------------------------------------------------------------------
# What `python theory.py` checks and draws


class Report:
    """Prints a line a check and remembers whether all held."""

    def __init__(self, trials, seed):
        self.trials, self.seed, self.ok = trials, seed, True

    def say(self, words, ok):
        self.ok &= bool(ok)
        print(f"  {words}  {'ok' if ok else 'FAILS'}")

    def title(self, text, *bounds):
        names = "".join(f" {name:>9}" for name in ("exact", "simulated", "s.e.", "z", *bounds))
        print(f"\n{text}\n  {'setting':38}{names}")

    def line(self, words, rungs, setting, note="", times=1):
        """Does the simulation agree with rungs[0], and do the others, its bounds, rise?"""
        trials = times * self.trials
        seed = [self.seed, *words.encode()]  # each line has its own draws
        estimate = simulate(**setting, trials=trials, seed=seed)
        error = standard_error(rungs[0], trials)
        z = (estimate - rungs[0]) / error
        bounds = "".join(f" {bound:9.5f}" for bound in rungs[1:])
        numbers = f"{rungs[0]:9.5f} {estimate:9.5f} {error:9.1e} {z:9.2f}{bounds}"
        rises = (np.diff(rungs) >= -ROUNDING).all()
        self.say(f"{words:38} {numbers}{note}", abs(z) < 4 and rises)
        return estimate

    def at_random(self, rungs):
        """Do the bounds rise in random settings, and how loose are they? rungs [rungs, settings]"""
        broken = (np.diff(rungs, axis=0) < -ROUNDING).any(axis=0).sum()
        self.say(f"{rungs.shape[1]:,} random settings: {broken} violations", broken == 0)
        gaps = " ".join(f"{gap:9.4f}" for gap in (rungs[1:] - rungs[0]).mean(axis=1))
        print(f"  {'how loose, mean of bound − exact':78} {gaps}")


def random_settings(size, seed, most=6):
    """Settings for both ladders, of 2 to `most` classes whose means have equal norms only."""
    rng = np.random.default_rng(seed)
    for _ in range(size):
        classes, dim = rng.integers(2, most + 1), rng.integers(2, 9)
        counts = -np.sort(-np.floor(10 ** rng.uniform(0, 3, classes)))  # N_1 ≥ ... ≥ N_K
        # what all means share makes their angles narrow; without it they would be wide
        means = rng.standard_normal((classes, dim)) + rng.uniform(0, 2)
        mu = 10 ** rng.uniform(-1, 1)
        means *= mu / np.linalg.norm(means, axis=1, keepdims=True)
        # (μ/σ)√N between 0.1 and 10: further out every Φ is nearly 1/2 or 1
        sigma = mu * np.sqrt(counts.sum()) * 10 ** rng.uniform(-1, 1)
        yield dict(alpha=rng.uniform(), counts=counts, means=means, sigma=sigma)


def check_two_classes(report):
    """Theorems 2.1 (α = 0) and 3.1."""
    report.title("Theorems 2.1, 3.1: exact ≤ a tighter bound ≤ (F.14)", "tighter", "middle", "last")
    for n1, n2, sigma, cos, dim in [
            (50, 50, 5, 0.0, 2), (60, 40, 8, 0.5, 8), (75, 25, 5, 0.5, 8), (90, 10, 8, 0.0, 8),
            (90, 10, 10, 0.9, 3), (99, 1, 20, -0.5, 8), (30, 3, 2, 0.95, 16), (500, 5, 40, -1, 2)]:
        for alpha in (0.0, 0.3, 0.7, 1.0):
            setting = two_classes(alpha, n1, n2, 1, sigma, cos, dim)
            rungs = ladder(**setting)
            if alpha == 0:
                rungs[0] = pi_maj(n1 / (n1 + n2), n1 + n2, 1, sigma, cos)  # (F.7)
            report.line(f"N1={n1} N2={n2} σ/μ={sigma} cos={cos} α={alpha}", rungs, setting)
    settings = random_settings(10_000, report.seed, most=2)
    report.at_random(np.array([ladder(**setting) for setting in settings]).T)


def check_more_classes(report):
    """Theorems F.1 (α = 0) and F.2."""
    general = np.random.default_rng(report.seed).standard_normal((5, 8)) + 0.7
    general /= np.linalg.norm(general, axis=1, keepdims=True)
    three, five = np.array([60, 20, 5]), np.array([50, 30, 20, 10, 5])
    names = ("at κ", "at κ = N", "simple", "(F.17)")
    report.title("Theorem F.1, (F.15); F.2 mended: exact ≤ at κ ≤ at κ = N ≤ simplified", *names)
    rows = []
    for words, counts, means, sigma in [
            ("K=3, orthogonal", three, np.eye(3, 8), 6.0),
            ("K=5, orthogonal", five, np.eye(5, 8), 8.0),
            ("K=5, general means", five, general, 8.0)]:
        cos = means[0] @ means[-1]
        simple = pi_maj_multi_simple(counts[0], counts[-1], counts.sum(), 1, sigma, cos)
        off = simple - pi_maj_multi(counts, means, sigma)
        report.say(f"{words}: (F.16) − (F.15) = {off:.5f}", abs(off) < ROUNDING or means is general)
        for alpha in (0.0, 0.5, 1.0):
            setting = dict(alpha=alpha, counts=counts, means=means, sigma=sigma)
            rows.append((f"{words} α={alpha}", setting))
    rows += [(f"counterexample α={alpha}", counterexample(alpha)) for alpha in (0.0, 0.05, 0.5)]
    for words, setting in rows:
        *rungs, paper = multi_ladder(**setting)
        holds = rungs[0] <= paper + ROUNDING
        report.ok &= holds or "orthogonal" not in words
        report.line(words, rungs, setting, f" {paper:9.5f} {'holds   ' if holds else 'VIOLATED'}")
    settings = random_settings(10_000, report.seed)
    *rungs, paper = np.array([multi_ladder(**setting) for setting in settings]).T
    report.at_random(np.array(rungs))
    excess = rungs[0] - paper  # of the exact value over what should bound it
    failed = (excess > ROUNDING).sum()
    report.say(f"(F.17) fails in {failed} of them, by up to {excess.max():.2f}", failed > 0)
    print("  Theorem F.2 doesn't hold as stated; for mutually orthogonal means it does.")


SWEEPS = {  # of one parameter: axis label, values, the paper's remark
    "a": ("majority ratio a", (0.5, 0.6, 0.7, 0.8, 0.9, 0.98), "rises with imbalance, concave"),
    "angle": ("angle of the means (degrees)", (15, 45, 75, 105, 135, 180), "rises with the angle"),
    "sigma": ("within-class diversity σ/μ", (2, 4, 8, 16, 32, 64), "falls with σ/μ"),
    "n": ("samples N", (10, 20, 50, 100, 200, 400), "rises with N"),
    "alpha": ("rank effect α_r", (0, 0.2, 0.4, 0.6, 0.8, 1), "falls with α_r"),
}
SHARP = 10  # times the trials in a sweep: no point of the pictures seems to miss its curve


def at(name, value):
    """A setting for `pi_maj_exact`: one parameter, or an array of it, off its middle value."""
    middle = dict(alpha=0, n1=90, n2=10, mu=1, sigma=8, cos=0)
    if name == "a":
        return middle | dict(n1=100 * value, n2=100 - 100 * value)
    if name == "n":
        return middle | dict(n1=value - value / 10, n2=value / 10)
    if name == "angle":
        return middle | dict(cos=np.cos(np.radians(value)))
    return middle | {name: value}


def check_remarks(report):
    """The remarks under Theorems 2.1 and 3.1. Returns {what is swept: estimates}."""
    estimates = {}
    for name, (label, values, claim) in SWEEPS.items():
        report.title(f"Remark: Π_maj {claim}")
        settings = [at(name, value) for value in values]
        exact = [pi_maj_exact(**setting) for setting in settings]
        estimates[name] = [
            report.line(f"{label} = {value}", [p], two_classes(**setting, dim=2), times=SHARP)
            for value, p, setting in zip(values, exact, settings, strict=True)]
        slopes = np.diff(exact) / np.diff(values) * (1 if "rises" in claim else -1)
        concave = "concave" not in claim or (np.diff(slopes) < 0).all()
        report.say(f"Π_maj {claim}", (slopes > 0).all() and concave)
    return estimates


def draw_sweep(axis, name, estimates, trials):
    """The exact curve, and the simulation's points with bars of two standard errors."""
    label, values, _ = SWEEPS[name]
    fine = np.linspace(values[0], values[-1], 500)
    errors = [2 * standard_error(pi_maj_exact(**at(name, value)), trials) for value in values]
    curve = "exact (not in the paper)" if name == "alpha" else "(F.7)"
    axis.plot(fine, pi_maj_exact(**at(name, fine)), label=curve)
    axis.errorbar(values, estimates, errors, fmt="o", ms=4, capsize=3, label="simulated, ±2 s.e.")
    axis.set(xlabel=label, ylabel="Π_maj")
    axis.grid(alpha=0.3)


def draw(estimates, trials, directory):
    """pi_maj.png: (F.7) against each of its parameters; bounds.png: Theorem 3.1's bounds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, ("a", "angle", "sigma", "n"), strict=True):
        draw_sweep(axis, name, estimates[name], trials)
        axis.set_ylim(0.48, 1.02)
    figure.axes[0].legend(fontsize=9)
    figure.savefig(directory / "pi_maj.png", dpi=130)

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_sweep(axis, "alpha", estimates["alpha"], trials)
    alpha = np.linspace(0, 1, 500)
    exact, tight, middle, last = ladder(alpha, (90, 10), np.eye(2), 8)
    axis.plot(alpha, tight, "C2", label="tighter bound (not in the paper)")
    axis.plot(alpha, middle, "C4--", label="(F.14), middle line")
    axis.plot(alpha, last, "C3", label="(F.14), last line: the paper's bound")
    axis.fill_between(alpha, exact, last, alpha=0.12, color="C3", label="what it leaves open")
    axis.axhline(0.5, color="k", lw=0.8, ls=":")
    axis.set_title("N_1 = 90, N_2 = 10, σ/μ = 8, orthogonal means")
    axis.legend(fontsize=9)
    figure.savefig(directory / "bounds.png", dpi=130)


def fail(message):
    """One line on stderr, status 2."""
    print("theory.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    """The status: 0 where every check holds, 1 where one doesn't; bad input exits with 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail
    parser.add_argument("--trials", type=int, default=20_000, help="a setting [default: 20,000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the two pictures there")
    args = parser.parse_args(argv)
    if args.trials < 1 or args.seed < 0:
        fail(f"--trials is {args.trials}, --seed {args.seed}; they must be at least 1 and 0")
    try:
        if args.plot:
            args.plot.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(error)
    report = Report(args.trials, args.seed)
    check_two_classes(report)
    check_more_classes(report)
    estimates = check_remarks(report)
    if args.plot:
        draw(estimates, SHARP * args.trials, args.plot)
    print("\nevery check holds" if report.ok else "\nSOMETHING FAILS, see above")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
