"""How often the majority's gradients dominate a weight: Theorems 2.1, 3.1, F.1 and F.2, checked by simulation.

    python theory.py                          # every theorem against per-sample gradients; status 1 if one fails
    python theory.py --trials 200000 --seed 1
    python theory.py --plot assets            # and the pictures of the README

    >>> from theory import *
    >>> pi_maj(a=0.9, n=100, mu=1, sigma=5, cos=0)              # (F.7); arrays broadcast
    >>> simulate_pi_maj(90, 10, mu=1, sigma=5, cos=0)           # (estimate, standard error)

Setting (Sec. F.1): class k sends N_k per-sample gradients g ~ N(mu_k, sigma^2 I), all ||mu_k|| = mu, to one weight.
The update is dominated by the majority where it is nearer to mu_1 than to the minority's mean (mu_2, or mu_K),
that is where dW . (mu_1 - mu_2) > 0. Pi_maj is the probability of that. D = N_1 - N_2 and N = N_1 + N_2 below.
"""

import argparse
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from scipy.special import ndtr  # the standard normal CDF, (F.6)

BLOCK = 2**22  # Gaussians held at a time by each thread


def check(**parameters):
    """Raise ValueError that names the first parameter outside its range."""
    ranges = {"mu": (lambda v: (v > 0) & np.isfinite(v), "positive"), "sigma": (lambda v: (v > 0) & np.isfinite(v), "positive"),
              "cos": (lambda v: (v >= -1) & (v < 1), "in [-1, 1)"), "alpha": (lambda v: (v >= 0) & (v <= 1), "in [0, 1]"),
              "a": (lambda v: (v >= 0) & (v <= 1), "in [0, 1]"), "dim": (lambda v: v >= 2, "at least 2"),
              "trials": (lambda v: v >= 1, "at least 1"), "seed": (lambda v: v >= 0, "at least 0")}
    for name, value in parameters.items():
        ok, words = ranges.get(name, (lambda v: (v >= 1) & np.isfinite(v), "at least 1"))  # sample counts
        value = np.asarray(value)
        if value.size == 0 or not np.all(ok(value)):
            raise ValueError(f"{name} is {value}; it must be {words}")


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms, two classes


def pi_maj(a, n, mu, sigma, cos):
    """Theorem 2.1, (F.7): Pi_maj for majority ratio a = N_1 / N, n = N samples, cos of the angle between the means."""
    check(a=a, n=n, mu=mu, sigma=sigma, cos=cos)
    a, n, mu, sigma, cos = map(np.asarray, (a, n, mu, sigma, cos))
    return ndtr((2 * a - 1) * mu * np.sqrt(2 * n * (1 - cos)) / (2 * sigma))


def pi_maj_bound(alpha, n, mu, sigma, cos):
    """Theorem 3.1, (F.14), last line: the paper's bound, with alpha = alpha_r."""
    check(alpha=alpha, n=n, mu=mu, sigma=sigma, cos=cos)
    alpha, n, mu, sigma, cos = map(np.asarray, (alpha, n, mu, sigma, cos))
    return ndtr((1 - alpha) * mu * np.sqrt(2 * n * (1 - cos)) / (2 * sigma))


def pi_maj_middle(alpha, n, n2, mu, sigma, cos):
    """(F.14), the line before: the bound that still knows the minority's count n2."""
    check(alpha=alpha, n=n, n2=n2, mu=mu, sigma=sigma, cos=cos)
    alpha, n, n2, mu, sigma, cos = map(np.asarray, (alpha, n, n2, mu, sigma, cos))
    return ndtr(mu * (1 - alpha) * (1 - cos) / np.sqrt(2 * (1 / n + alpha**2 / n2) * sigma**2 * (1 - cos)))


def pi_maj_exact(alpha, n1, n2, mu, sigma, cos):
    """Pi_maj of Theorem 3.1's own model, without a bound (design.md; not in the paper).

    The update (Assumption F.2) times kappa * mu is S_1 + (1 + alpha kappa / N_2) S_2, with the class sums S_k and
    kappa = ||N_1 mu_1 + N_2 mu_2|| / mu: the minority's gradients enter W_g and W_e. Raises ValueError where
    kappa = 0 normalises (opposite means, equal counts)."""
    check(alpha=alpha, n1=n1, n2=n2, mu=mu, sigma=sigma, cos=cos)
    alpha, n1, n2, mu, sigma, cos = map(lambda v: np.asarray(v, float), (alpha, n1, n2, mu, sigma, cos))
    kappa = np.sqrt(np.maximum(0, n1**2 + n2**2 + 2 * n1 * n2 * cos))
    if np.any((kappa == 0) & (alpha > 0)):
        raise ValueError("cos is -1 with n1 = n2: the mean gradient is 0 and can't normalise")
    return _pi_maj_at(kappa, alpha, n1, n2, mu, sigma, cos)


def pi_maj_tight(alpha, n1, n2, mu, sigma, cos):
    """A bound between `pi_maj_exact` and (F.14): the exact value at kappa = D (design.md; not in the paper).

    It keeps the sample ratio and is Theorem 2.1 at alpha = 0. Raises ValueError unless n1 >= n2."""
    check(alpha=alpha, n1=n1, n2=n2, mu=mu, sigma=sigma, cos=cos)
    alpha, n1, n2, mu, sigma, cos = map(lambda v: np.asarray(v, float), (alpha, n1, n2, mu, sigma, cos))
    if np.any(n1 < n2):
        raise ValueError(f"n1 is {n1}, below n2 = {n2}; class 1 must be the majority")
    return _pi_maj_at(n1 - n2, alpha, n1, n2, mu, sigma, cos)


def _pi_maj_at(kappa, alpha, n1, n2, mu, sigma, cos):
    s = mu / sigma * np.sqrt((1 - cos) / 2)
    return ndtr(s * (n1 - n2 - alpha * kappa) / np.sqrt(n1 + n2 + 2 * alpha * kappa + alpha**2 * kappa**2 / n2))


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms, K classes: `counts` [K] from class 1 to class K, `means` [K, dim]


def pi_maj_multi(counts, means, sigma):
    """Theorem F.1, (F.15): the probability that class K is overwhelmed by class 1, any class means of equal norm."""
    return pi_maj_multi_exact(0.0, counts, means, sigma)


def pi_maj_multi_simple(n1, nk, n, mu, sigma, cos):
    """(F.16): F.1 without its cross term, right for mutually orthogonal means. cos is between mu_1 and mu_K."""
    check(n1=n1, nk=nk, n=n, mu=mu, sigma=sigma, cos=cos)
    n1, nk, n, mu, sigma, cos = map(np.asarray, (n1, nk, n, mu, sigma, cos))
    return ndtr((n1 - nk) * mu * np.sqrt(1 - cos) / (np.sqrt(2 * n) * sigma))


def pi_maj_multi_bound(alpha, n, mu, sigma, cos):
    """Theorem F.2, (F.17): (F.14)'s last line with N over all classes. It needs mutually orthogonal means."""
    return pi_maj_bound(alpha, n, mu, sigma, cos)


def pi_maj_multi_exact(alpha, counts, means, sigma):
    """Pi_maj of Theorem F.2's own model for any means [K, dim] of equal norm; class K alone enters W_e.

    At alpha = 0 the argument is (F.15)'s: (sum_k N_k mu_k) . (mu_1 - mu_K) / (sigma ||mu_1 - mu_K|| sqrt(N))."""
    check(alpha=alpha, counts=counts, sigma=sigma)
    counts, means = np.asarray(counts, float), np.asarray(means, float)
    if means.ndim != 2 or len(means) != len(counts) or len(counts) < 2:
        raise ValueError(f"means of shape {means.shape} don't fit counts of {len(counts)}; they must be [K, dim], K at least 2")
    norms = np.linalg.norm(means, axis=1)
    if norms.min() <= 0 or np.ptp(norms) > 1e-6 * norms.max():
        raise ValueError(f"means have norms {norms}; Assumption F.1 wants them equal and positive")
    v, total, alpha = means[0] - means[-1], counts @ means, np.asarray(alpha, float)
    if np.linalg.norm(v) < 1e-12 * norms[0]:
        raise ValueError("means of the first and the last class are the same")
    kappa = np.linalg.norm(total) / norms[0]
    if kappa < 1e-12 * counts.sum() and np.any(alpha > 0):
        raise ValueError("means and counts give a mean gradient of 0, which can't normalise")
    mean = total @ v + alpha * kappa * (means[-1] @ v)
    variance = counts[:-1].sum() + counts[-1] * (1 + alpha * kappa / counts[-1])**2
    return ndtr(mean / (sigma * np.linalg.norm(v) * np.sqrt(variance)))


# ---------------------------------------------------------------------------------------------------------------------
# Simulation, from the assumptions


def two_means(mu, cos, dim):
    """Two means [2, dim] of norm mu at the given angle."""
    check(mu=mu, cos=cos, dim=dim)
    means = np.zeros((2, int(dim)))
    means[0, 0], means[1, :2] = mu, (mu * cos, mu * np.sqrt(1 - cos**2))
    return means


def orthogonal_means(k, mu, dim):
    """k mutually orthogonal means [k, dim] of norm mu. Raises ValueError where dim < k."""
    check(mu=mu, dim=dim)
    if dim < k:
        raise ValueError(f"dim is {dim}; {k} orthogonal means need at least {k}")
    return mu * np.eye(k, dim)


def gaussian(rng, shape):
    return rng.standard_normal(shape, np.float32)


def dominated(counts, means, sigma, alpha, trials, rng, noise=gaussian):
    """How many of `trials` updates the majority dominates. `noise(rng, [..., dim])` is one sample's deviation, of unit
    variance; sigma [K] or a number."""
    k, dim = means.shape
    sums = np.zeros((k, trials, dim))  # S_k, the sum of class k's gradients
    for c, n in enumerate(map(int, counts)):
        at_once = max(1, BLOCK // (trials * dim))
        for first in range(0, n, at_once):
            m = min(at_once, n - first)
            g = noise(rng, (trials, m, dim))
            g *= np.float32(np.broadcast_to(sigma, k)[c])
            g += means[c].astype(np.float32)
            sums[c] += g.sum(1)
    grad_g, grad_e = sums.sum(0), sums[-1]  # of W_g: all classes; of W_e: the minority alone
    update = grad_g
    if alpha > 0:  # Assumption F.2
        update = grad_g / np.linalg.norm(counts @ means) + alpha * grad_e / (counts[-1] * np.linalg.norm(means[-1]))
    return int((update @ (means[0] - means[-1]) > 0).sum())


def simulate(counts, means, sigma, alpha=0.0, trials=100_000, seed=0, noise=gaussian, block=None):
    """Share of trials that the majority dominates, from per-sample gradients. Blocks of trials have their own streams
    of random numbers, so memory is bounded and the result doesn't depend on threads."""
    check(counts=counts, sigma=sigma, alpha=alpha, trials=trials, seed=seed)
    counts, means = np.asarray(counts, float), np.asarray(means, float)
    if (counts != np.floor(counts)).any():
        raise ValueError(f"counts are {counts}; a simulation needs whole samples")
    block = block or int(max(1, min(4096, BLOCK // means.shape[1])))
    sizes = [min(block, trials - i) for i in range(0, trials, block)]
    rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(len(sizes))]
    with ThreadPool(2) as pool:  # numpy draws outside the interpreter's lock
        hits = pool.starmap(lambda n, rng: dominated(counts, means, sigma, alpha, n, rng, noise), zip(sizes, rngs))
    return sum(hits) / trials


def standard_error(p, trials):
    """Of an estimate of p: the closed form's, so that an estimate of exactly 1 has one too."""
    return np.sqrt(np.maximum(p * (1 - p), 1e-300) / trials)


def simulate_pi_maj(n1, n2, mu, sigma, cos, alpha=0.0, dim=8, trials=100_000, seed=0):
    """(estimate, standard error) of Pi_maj for two classes, Theorem 2.1 (alpha = 0) or 3.1."""
    check(n1=n1, n2=n2, mu=mu, sigma=sigma, cos=cos, alpha=alpha, dim=dim, trials=trials, seed=seed)
    exact = pi_maj_exact(alpha, n1, n2, mu, sigma, cos)
    return simulate((n1, n2), two_means(mu, cos, dim), sigma, alpha, trials, seed), float(standard_error(exact, trials))


# ---------------------------------------------------------------------------------------------------------------------
# The checks that `python theory.py` makes

COUNTEREXAMPLE = dict(counts=(1000, 999, 1), mu=1.0, sigma=10.0, cos=0.9)


def counterexample_means(mu, cos, dim):
    """mu_2 along mu_1 - mu_3: every gradient of class 2 pushes for class 1. [3, dim]"""
    m1, m3 = two_means(mu, cos, dim)
    return np.stack([m1, mu * (m1 - m3) / np.linalg.norm(m1 - m3), m3])


class Report:
    """Prints a line a setting and remembers whether all held."""

    def __init__(self, trials, seed):
        self.trials, self.seed, self.ok, self.checked, self.gaussians = trials, seed, True, 0, 0

    def verdict(self, ok):
        self.ok &= bool(ok)
        return "ok" if ok else "FAILS"

    def title(self, text):
        print(f"\n{text}\n  {'setting':48} {'closed form':>11} {'simulated':>10} {'std. error':>10} {'z':>6}")

    def line(self, setting, closed, counts, means, sigma, alpha=0.0, note=""):
        """Simulate one setting against its closed form: within four standard errors."""
        self.checked += 1
        estimate = simulate(counts, means, sigma, alpha, self.trials, self.seed + self.checked)
        self.gaussians += self.trials * int(sum(counts)) * np.shape(means)[1]
        error = float(standard_error(closed, self.trials))
        z = (estimate - closed) / error if estimate != closed else 0.0
        # a rarer event than one in `trials` is seen never or once: allow for that one
        ok = abs(z) < 4 or abs(estimate - closed) * self.trials <= 1
        print(f"  {setting:48} {closed:11.5f} {estimate:10.5f} {error:10.1e} {z:6.2f}  {self.verdict(ok)}{note}")
        return estimate


def sweep(name):
    """One parameter's range, the others at a middle setting: (label, values, settings)."""
    base = dict(n1=90, n2=10, mu=1.0, sigma=8.0, cos=0.0, alpha=0.0)
    if name == "a":
        values = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.98])
        return "majority ratio a", values, [base | dict(n1=round(100 * a), n2=100 - round(100 * a)) for a in values]
    if name == "angle":
        values = np.array([15, 45, 75, 105, 135, 180])
        return "angle between the means (degrees)", values, [base | dict(cos=float(np.cos(np.radians(v)))) for v in values]
    if name == "sigma":
        values = np.array([2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
        return "within-class diversity σ/μ", values, [base | dict(sigma=v) for v in values]
    if name == "n":
        values = np.array([10, 20, 50, 100, 200, 400])
        return "samples N", values, [base | dict(n1=int(0.9 * v), n2=int(v) - int(0.9 * v)) for v in values]
    values = np.linspace(0, 1, 6)
    return "rank effect α_r", values, [base | dict(alpha=float(v)) for v in values]


def closed(s):
    return float(pi_maj_exact(s["alpha"], s["n1"], s["n2"], s["mu"], s["sigma"], s["cos"]))


def check_two_classes(report):
    report.title("Theorem 2.1, (F.7): two classes")
    for n1, n2, sigma, cos, dim in [(50, 50, 5, 0.0, 2), (60, 40, 5, 0.0, 8), (75, 25, 5, 0.5, 8), (90, 10, 5, -0.5, 8),
                                    (90, 10, 10, 0.9, 3), (99, 1, 20, 0.0, 8), (30, 3, 3, 0.99, 16), (500, 5, 40, -1.0, 2)]:
        report.line(f"N1={n1} N2={n2} σ/μ={sigma} cos={cos} dim={dim}", float(pi_maj(n1 / (n1 + n2), n1 + n2, 1, sigma, cos)),
                    (n1, n2), two_means(1, cos, dim), sigma)
    report.title("Theorem 3.1's model, exact (design.md), the minority in W_g and W_e")
    settings = [dict(n1=n1, n2=n2, mu=1.0, sigma=sigma, cos=cos, alpha=alpha) for n1, n2, sigma, cos in
                [(90, 10, 8, 0.0), (60, 40, 8, 0.5), (99, 1, 20, -0.5), (30, 3, 2, 0.95)] for alpha in (0.0, 0.3, 0.7, 1.0)]
    for s in settings:
        report.line("N1={n1} N2={n2} σ/μ={sigma} cos={cos} α={alpha}".format(**s), closed(s), (s["n1"], s["n2"]),
                    two_means(1, s["cos"], 8), s["sigma"], s["alpha"])
    return settings


def ladder(alpha, n1, n2, mu, sigma, cos):
    """exact, the tighter bound, (F.14)'s middle and last line, each an array."""
    return (pi_maj_exact(alpha, n1, n2, mu, sigma, cos), pi_maj_tight(alpha, n1, n2, mu, sigma, cos),
            pi_maj_middle(alpha, n1 + n2, n2, mu, sigma, cos), pi_maj_bound(alpha, n1 + n2, mu, sigma, cos))


def random_settings(size, seed):
    rng = np.random.default_rng(seed)
    n2 = np.floor(10 ** rng.uniform(0, 3, size))
    return dict(alpha=rng.uniform(0, 1, size), n1=n2 + np.floor(10 ** rng.uniform(0, 4, size)), n2=n2, mu=10 ** rng.uniform(-1, 1, size),
                sigma=10 ** rng.uniform(-1, 3, size), cos=rng.uniform(-0.999, 0.999, size))


def check_bounds(report, settings):
    print("\nBounds: exact ≤ tighter bound ≤ (F.14) last line, (F.14) middle line ≤ last line")
    print(f"  {'setting':48} {'exact':>8} {'tighter':>8} {'middle':>8} {'last':>8}")
    for s in settings:
        exact, tight, middle, last = ladder(**s)
        ok = exact <= tight + 1e-12 and tight <= last + 1e-12 and middle <= last + 1e-12
        print("  {:48} {:8.5f} {:8.5f} {:8.5f} {:8.5f}  {}".format(
            "N1={n1} N2={n2} σ/μ={sigma} cos={cos} α={alpha}".format(**s), exact, tight, middle, last, report.verdict(ok)))
    exact, tight, middle, last = ladder(**random_settings(10_000, report.seed))
    broken = int(((exact > tight + 1e-12) | (tight > last + 1e-12) | (middle > last + 1e-12)).sum())
    print(f"  10,000 random settings: {broken} violations  {report.verdict(broken == 0)}")
    print("  how loose, mean of bound − exact: " + ", ".join(
        f"{name} {float((b - exact).mean()):.4f}" for name, b in (("tighter", tight), ("middle", middle), ("last", last))))


def check_multi(report):
    report.title("Theorem F.1, (F.15): K classes")
    rng = np.random.default_rng(report.seed)
    general = rng.standard_normal((5, 8)) + 0.7
    general /= np.linalg.norm(general, axis=1, keepdims=True)
    cases = [("K=3, orthogonal", (60, 20, 5), orthogonal_means(3, 1, 8), 6.0),
             ("K=5, orthogonal", (50, 30, 20, 10, 5), orthogonal_means(5, 1, 8), 8.0),
             ("K=5, general means", (50, 30, 20, 10, 5), general, 8.0)]
    for name, counts, means, sigma in cases:
        exact = float(pi_maj_multi(counts, means, sigma))
        simple = float(pi_maj_multi_simple(counts[0], counts[-1], sum(counts), 1, sigma, means[0] @ means[-1]))
        same = report.verdict(abs(simple - exact) < 1e-12) if "orthogonal" in name else "differs"
        report.line(name, exact, counts, means, sigma, note=f"   (F.16): {simple:.5f} {same}")
    print("  (F.16) leaves the cross term out: right for orthogonal means, not in general")
    report.title("Theorem F.2: K classes, class K in W_g and W_e; the bound (F.17)")
    for name, counts, means, sigma in cases:
        for alpha in (0.0, 0.5, 1.0):
            exact = float(pi_maj_multi_exact(alpha, counts, means, sigma))
            bound = float(pi_maj_multi_bound(alpha, sum(counts), 1, sigma, means[0] @ means[-1]))
            held = exact <= bound + 1e-12
            report.line(f"{name} α={alpha}", exact, counts, means, sigma, alpha, note=f"   (F.17): {bound:.5f} {'holds' if held else 'VIOLATED'}")
            if "orthogonal" in name:
                report.verdict(held)
    c = COUNTEREXAMPLE
    means = counterexample_means(c["mu"], c["cos"], 8)
    exact = float(pi_maj_multi_exact(0.0, c["counts"], means, c["sigma"]))
    bound = float(pi_maj_multi_bound(0.0, sum(c["counts"]), c["mu"], c["sigma"], c["cos"]))
    report.trials, trials = min(report.trials, 20_000), report.trials
    report.line("counterexample: N=1000/999/1, μ_2 ∥ μ_1 − μ_3", exact, c["counts"], means[:, :2], c["sigma"], note=f"   (F.17): {bound:.5f} VIOLATED")
    report.trials = trials
    report.verdict(exact > bound)
    print("  Class 2's gradients all push for class 1 against class 3. (F.17) doesn't know them, so F.2 doesn't hold as\n"
          "  stated: it needs mutually orthogonal means, as (F.16) assumes.")


def check_remarks(report):
    """The remarks under Theorem 2.1 and Theorem 3.1's in alpha_r: the closed form's direction and the simulation's."""
    points = {}
    for name, claim, sign in [("a", "rises with imbalance, concave", 1), ("angle", "rises with the angle", 1),
                              ("sigma", "falls with σ/μ", -1), ("n", "rises with N", 1), ("alpha", "falls with α_r", -1)]:
        label, values, settings = sweep(name)
        report.title(f"Remark: Π_maj {claim}")
        points[name] = []
        for v, s in zip(values, settings):
            points[name].append(report.line(f"{label} = {v:g}", closed(s), (s["n1"], s["n2"]), two_means(1, s["cos"], 8), s["sigma"], s["alpha"]))
        exact = np.array([closed(s) for s in settings])
        seen = sign * (points[name][-1] - points[name][0]) > 4 * np.sqrt(2 * 0.25 / report.trials)
        ok = (sign * np.diff(exact) > 0).all() and seen
        if name == "a":  # equal steps up to 0.9
            ok &= (np.diff(exact[:5], 2) < 0).all()
        print(f"  Π_maj {claim}: {report.verdict(ok)}")
    return points


def run(trials, seed, plot=None):
    """All checks; True where every one holds."""
    began, report = time.perf_counter(), Report(trials, seed)
    settings = check_two_classes(report)
    check_bounds(report, settings)
    check_multi(report)
    points = check_remarks(report)
    seconds = time.perf_counter() - began
    rng, few = np.random.default_rng(0), 2**22
    start = time.perf_counter()
    for _ in range(4):
        rng.standard_normal(few, np.float32)
    bare = (time.perf_counter() - start) / (4 * few)
    print(f"\n{report.checked} simulations of {trials:,} trials, {report.gaussians / 1e9:.2f}e9 Gaussians in {seconds:.0f} s: "
          f"{seconds / (report.gaussians * bare):.2f} × the bare cost of drawing them on one thread")
    print("everything holds" if report.ok else "SOMETHING FAILS, see above")
    if plot:
        draw(points, trials, Path(plot))
    return report.ok


def draw(points, trials, directory):
    """pi_maj.png: Pi_maj against each parameter; bounds.png: the ladder of bounds against alpha_r."""
    from matplotlib.figure import Figure
    directory.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, ("a", "angle", "sigma", "n")):
        label, values, settings = sweep(name)
        fine = np.geomspace(values[0], values[-1], 200) if name in ("sigma", "n") else np.linspace(values[0], values[-1], 200)
        line = {"a": lambda: pi_maj(fine, 100, 1, 8, 0), "angle": lambda: pi_maj(0.9, 100, 1, 8, np.cos(np.radians(fine))),
                "sigma": lambda: pi_maj(0.9, 100, 1, fine, 0), "n": lambda: pi_maj(0.9, fine, 1, 8, 0)}[name]()
        axis.plot(fine, line, label="(F.7)")
        axis.errorbar(values, points[name], 2 * standard_error(np.array([closed(s) for s in settings]), trials), fmt="o", ms=4,
                      color="C1", capsize=3, label="simulated, ±2 s.e.")
        axis.set(xlabel=label, ylabel="Π_maj", ylim=(0.48, 1.02), xscale="log" if name in ("sigma", "n") else "linear")
        if name in ("sigma", "n"):
            axis.set_xticks(values, [f"{v:g}" for v in values])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=9)
    figure.savefig(directory / "pi_maj.png", dpi=130)

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis, alpha = figure.subplots(), np.linspace(0, 1, 200)
    _, values, settings = sweep("alpha")
    exact, tight, middle, last = ladder(alpha, 90, 10, 1.0, 8.0, 0.0)
    axis.fill_between(alpha, exact, last, alpha=0.12, color="C3", label="what the paper's bound leaves open")
    axis.plot(alpha, last, "C3", label="(F.14), last line: the paper's bound")
    axis.plot(alpha, middle, "C4--", label="(F.14), middle line")
    axis.plot(alpha, tight, "C2", label="tighter bound (not in the paper)")
    axis.plot(alpha, exact, "C0", label="exact (not in the paper)")
    axis.errorbar(values, points["alpha"], 2 * standard_error(np.array([closed(s) for s in settings]), trials), fmt="o", ms=4,
                  color="C1", capsize=3, label="simulated, ±2 s.e.")
    axis.axhline(0.5, color="k", lw=0.8, ls=":")
    axis.set(xlabel="rank effect α_r", ylabel="Π_maj", title="N_1 = 90, N_2 = 10, σ/μ = 8, orthogonal means")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    figure.savefig(directory / "bounds.png", dpi=130)
    print(f"pictures in {directory}/: pi_maj.png, bounds.png")


def fail(message):
    """One line on stderr, status 2."""
    print("theory.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="theory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--trials", type=int, default=20_000, help="trials a setting [default: 20,000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="DIR", help="draw pi_maj.png and bounds.png there")
    args = parser.parse_args(argv)
    try:
        check(trials=args.trials, seed=args.seed)
        if args.plot and any(p.is_file() for p in (Path(args.plot), *Path(args.plot).parents)):
            raise ValueError(f"--plot {args.plot} is, or lies beneath, a file")
        return 0 if run(args.trials, args.seed, args.plot) else 1
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    sys.exit(main())
