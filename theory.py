"""How often the majority's gradients dominate a weight: the paper's theorems, by simulation.

    python theory.py                    # theorems by per-sample gradients; status 1: a check fails
    python theory.py --trials 200000 --seed 1
    python theory.py --plot assets      # and the pictures of the README

    >>> from theory import *
    >>> pi_maj(a=0.9, n=100, mu=1, sigma=5, cos=0)              # (F.7); arrays broadcast
    >>> simulate_pi_maj(90, 10, mu=1, sigma=5, cos=0)           # (estimate, standard error)

The README's section "The theory" says why it matters. The setting (paper, Sec. F.1): class k sends
N_k per-sample gradients g ~ N(μ_k, σ² I) to one weight, all ‖μ_k‖ = μ. The update ΔW is dominated
by the majority where it is nearer to μ_1 than to the minority's mean (μ_2, or μ_K), that is where
ΔW·(μ_1 − μ_2) > 0. Π_maj is the probability of that.

The paper uses the numbers F.1 and F.2 three times over; here the word before them says which.
- Assumption F.1: the gradients are Gaussian, as above.
- Assumption F.2: with reserved capacity, W = W_g + W_e, the update is
      ΔW = ∇W_g/‖E ∇W_g‖ + α ∇W_e/‖E ∇W_e‖, 0 ≤ α ≤ 1 (the paper's α_r, which grows with the rank).
- Theorem F.1: Theorem 2.1 (no reserved capacity) for K classes. It needs Assumption F.1.
- Theorem F.2: Theorem 3.1 (reserved capacity) for K classes. It needs both assumptions, and
  mutually orthogonal means, which the paper doesn't say; `pi_maj_multi_any` does without.
- Equations have brackets: (F.7).

Everywhere below N is the number of all samples and s = √((1 − cos)/2), where cos belongs to the
angle between the first and the last class's mean: s is the sine of half that angle. With two
classes D = N_1 − N_2. Φ is the standard normal CDF.
"""

import argparse
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from scipy.special import ndtr  # Φ, the standard normal CDF, (F.6)

BLOCK = 2**22  # Gaussians held at a time by each thread
ROUNDING = 1e-12  # what two equal probabilities may differ by in float64


def in_range(**parameters):
    """The parameters as a list of float arrays, in the order given.

    Raises ValueError that names the first parameter outside its range."""
    arrays = []
    for name, given in parameters.items():
        value = np.asarray(given, float)
        if name in ("mu", "sigma"):
            ok, words = (value > 0) & np.isfinite(value), "positive"
        elif name == "cos":
            ok, words = (value >= -1) & (value < 1), "in [-1, 1)"
        elif name in ("alpha", "a"):
            ok, words = (value >= 0) & (value <= 1), "in [0, 1]"
        elif name == "dim":
            ok, words = value >= 2, "at least 2"
        elif name == "seed":
            ok, words = value >= 0, "at least 0"
        else:  # the number of trials, and the counts of samples
            ok, words = (value >= 1) & np.isfinite(value), "at least 1"
        if value.size == 0 or not ok.all():
            raise ValueError(f"{name} is {np.asarray(given)}; it must be {words}")
        arrays.append(value)
    return arrays


def half_angle_sine(cos):
    """s = √((1 − cos)/2), so that ‖μ_1 − μ_K‖ = 2sμ."""
    return np.sqrt((1 - cos) / 2)


# --------------------------------------------------------------------------------------------------
# Closed forms, two classes


def pi_maj(a, n, mu, sigma, cos):
    """Theorem 2.1, (F.7): Π_maj without reserved capacity.

    a = N_1 / N is the majority's share of the n samples. Arguments broadcast."""
    a, n, mu, sigma, cos = in_range(a=a, n=n, mu=mu, sigma=sigma, cos=cos)
    return ndtr((2 * a - 1) * mu * np.sqrt(2 * n * (1 - cos)) / (2 * sigma))


def pi_maj_bound(alpha, n, mu, sigma, cos):
    """Theorem 3.1, (F.14), last line: the paper's bound, Φ( (μ/σ) √N s (1 − α) )."""
    alpha, n, mu, sigma, cos = in_range(alpha=alpha, n=n, mu=mu, sigma=sigma, cos=cos)
    return ndtr((1 - alpha) * mu * np.sqrt(2 * n * (1 - cos)) / (2 * sigma))


def pi_maj_middle(alpha, n, n2, mu, sigma, cos):
    """(F.14), the line before the last: the bound that still knows the minority's count n2.

    In this file's letters it is Φ( (μ/σ) s (1 − α) / √(1/N + α²/N_2) )."""
    alpha, n, n2, mu, sigma, cos = in_range(
        alpha=alpha, n=n, n2=n2, mu=mu, sigma=sigma, cos=cos)
    mean = mu * (1 - alpha) * (1 - cos)
    variance = 2 * (1 / n + alpha**2 / n2) * sigma**2 * (1 - cos)
    return ndtr(mean / np.sqrt(variance))


def pi_maj_exact(alpha, n1, n2, mu, sigma, cos):
    """Π_maj of Theorem 3.1's own model, without a bound. It isn't in the paper:

        Φ( (μ/σ) s (D − ακ) / √(N + 2ακ + α²κ²/N_2) ),  κ = ‖N_1 μ_1 + N_2 μ_2‖ / μ

    Derivation. S_k is the sum of class k's gradients. By Assumption F.1 S_k ~ N(N_k μ_k, N_k σ² I),
    and S_1 and S_2 are independent.

    1. Class 2 sends its gradients to W_g and to W_e, class 1 to W_g alone: ∇W_g = S_1 + S_2 and
       ∇W_e = S_2. The lengths of their expectations are κμ, which defines κ, and N_2 μ. Squaring
       N_1 μ_1 + N_2 μ_2 gives κ² = N_1² + N_2² + 2 N_1 N_2 cos.
    2. By Assumption F.2 ΔW = (S_1 + S_2)/(κμ) + α S_2/(N_2 μ). A positive factor doesn't change on
       which side of a plane ΔW lies, so multiply by κμ:
       κμ ΔW = S_1 + w S_2, with w = 1 + ακ/N_2. The same samples' S_2 stands in both terms.
    3. Let v = μ_1 − μ_2. From ‖μ_k‖ = μ and μ_1·μ_2 = μ² cos:
       μ_1·v = μ² (1 − cos) = 2s²μ², μ_2·v = −2s²μ², ‖v‖² = μ_1·v − μ_2·v = 4s²μ².
    4. Z = κμ ΔW·v is a sum of Gaussians, so Gaussian itself. Since w N_2 = N_2 + ακ, its mean is
       N_1 μ_1·v + w N_2 μ_2·v = 2s²μ² (N_1 − N_2 − ακ) = 2s²μ² (D − ακ).
    5. S_k·v has the variance N_k σ² ‖v‖², and w² N_2 = N_2 + 2ακ + α²κ²/N_2. So Z has the variance
       (N_1 + w² N_2) σ² ‖v‖² = (N + 2ακ + α²κ²/N_2) σ² · 4s²μ².
    6. Π_maj = P(Z > 0) = Φ(mean / √variance), and 2s²μ² / (σ · 2sμ) = (μ/σ) s.  ∎

    It depends on α through x = ακ alone, and falls as x grows: the derivative of
    (D − x) / √q with q = N + 2x + x²/N_2 is (−q − (D − x)(1 + x/N_2)) / q^(3/2), which is
    −N_1 (2 + x/N_2) / q^(3/2) < 0 once D = N_1 − N_2 and N = N_1 + N_2 are put in. At α = 0 it is
    (F.7), since D = (2a − 1) N.

    Arguments broadcast. Raises ValueError where κ = 0 normalises (opposite means, equal counts)."""
    alpha, n1, n2, mu, sigma, cos = in_range(
        alpha=alpha, n1=n1, n2=n2, mu=mu, sigma=sigma, cos=cos)
    kappa = np.sqrt(np.maximum(0, n1**2 + n2**2 + 2 * n1 * n2 * cos))
    if np.any((kappa == 0) & (alpha > 0)):
        raise ValueError("cos is -1 with n1 = n2: the mean gradient is 0 and can't normalise")
    return _pi_maj_at(alpha * kappa, n1, n2, mu, sigma, cos)


def pi_maj_tight(alpha, n1, n2, mu, sigma, cos):
    """A bound below both of (F.14)'s: `pi_maj_exact` at κ = D. It isn't in the paper:

        exact ≤ Φ( (μ/σ) s (1 − α) D / √(N + 2αD + α²D²/N_2) ) ≤ (F.14)'s middle ≤ its last line

    It keeps the sample ratio, and at α = 0 it is Theorem 2.1. Proof, for N_1 ≥ N_2; Φ grows, so it
    is enough to compare arguments.

    1. κ ≥ D: κ² = N_1² + N_2² + 2 N_1 N_2 cos ≥ N_1² + N_2² − 2 N_1 N_2 = D².
    2. The bound's numerator is (1 − α) D ≥ 0. The exact one, D − ακ, is at most that by 1, and the
       exact denominator is at least the bound's, since it grows with κ. So where D − ακ > 0 the
       exact argument is the smaller one; where D − ακ ≤ 0 it is ≤ 0, which the bound's isn't below.
    3. Without 2αD ≥ 0 the denominator is smaller, and numerator and α are what they were: the bound
       is at most (μ/σ) s (1 − α) · D / √(N + α²D²/N_2).
    4. For D > 0, D / √(N + α²D²/N_2) = 1 / √(N/D² + α²/N_2). As D ≤ N, N/D² ≥ 1/N, so that is at
       most 1 / √(1/N + α²/N_2); for D = 0 it is 0, which is less. With the factor
       (μ/σ) s (1 − α) ≥ 0 this is (F.14)'s middle line.
    5. Without α²/N_2 ≥ 0 the last becomes √N: (F.14)'s last line.  ∎

    Arguments broadcast. Raises ValueError unless n1 ≥ n2."""
    alpha, n1, n2, mu, sigma, cos = in_range(
        alpha=alpha, n1=n1, n2=n2, mu=mu, sigma=sigma, cos=cos)
    if np.any(n1 < n2):
        raise ValueError(f"n1 is {n1}, below n2 = {n2}; class 1 must be the majority")
    return _pi_maj_at(alpha * (n1 - n2), n1, n2, mu, sigma, cos)


def _pi_maj_at(x, n1, n2, mu, sigma, cos):
    """`pi_maj_exact`'s formula at any x = ακ."""
    spread = np.sqrt(n1 + n2 + 2 * x + x**2 / n2)
    return ndtr(mu / sigma * half_angle_sine(cos) * (n1 - n2 - x) / spread)


# --------------------------------------------------------------------------------------------------
# Closed forms, K classes: `counts` [K] from class 1 to class K, `means` [K, dim]


def pi_maj_multi(counts, means, sigma):
    """Theorem F.1, (F.15): the probability that class K is overwhelmed by class 1.

    It holds for any means of equal norm. Raises what `pi_maj_multi_exact` raises."""
    return pi_maj_multi_exact(0.0, counts, means, sigma)


def pi_maj_multi_simple(n1, nk, n, mu, sigma, cos):
    """(F.16): Theorem F.1 without its cross term, right for mutually orthogonal means.

    cos is between μ_1 and μ_K. Arguments broadcast."""
    n1, nk, n, mu, sigma, cos = in_range(n1=n1, nk=nk, n=n, mu=mu, sigma=sigma, cos=cos)
    return ndtr((n1 - nk) * mu * np.sqrt(1 - cos) / (np.sqrt(2 * n) * sigma))


def pi_maj_multi_bound(alpha, n, mu, sigma, cos):
    """Theorem F.2, (F.17): (F.14)'s last line with N over all classes.

    For any means, as the paper states it, it is wrong (`counterexample`). For mutually orthogonal
    ones it is right where N_1 ≥ N_K: μ_k·v = 0 for every class between, so `pi_maj_multi_exact`
    becomes `pi_maj_exact`'s formula with D = N_1 − N_K and N_K for N_2, and `pi_maj_tight`'s proof
    holds from its step 2 on, as κ = √(Σ_k N_k²) ≥ N_1 ≥ D and D ≤ N."""
    return pi_maj_bound(alpha, n, mu, sigma, cos)


def pi_maj_multi_exact(alpha, counts, means, sigma):
    """Π_maj of Theorem F.2's own model, for any means of equal norm. It isn't in the paper:

        Φ( (T·v + ακ μ_K·v) / (σ ‖v‖ √(N + 2ακ + α²κ²/N_K)) ),
        T = Σ_k N_k μ_k,  κ = ‖T‖ / μ,  v = μ_1 − μ_K

    Derivation, as `pi_maj_exact`'s; S_k ~ N(N_k μ_k, N_k σ² I) is the sum of class k's gradients.

    1. All classes send their gradients to W_g, class K alone to W_e: ∇W_g = Σ_k S_k, of expectation
       T and length κμ, and ∇W_e = S_K, of expectation N_K μ_K and length N_K μ.
    2. By Assumption F.2, times κμ > 0: κμ ΔW = Σ_{k<K} S_k + w S_K, with w = 1 + ακ/N_K.
    3. Z = κμ ΔW·v is Gaussian. As w N_K = N_K + ακ, its mean is T·v + ακ μ_K·v.
    4. The S_k are independent, S_k·v has the variance N_k σ² ‖v‖², and
       w² N_K = N_K + 2ακ + α²κ²/N_K: Z has the variance (N + 2ακ + α²κ²/N_K) σ² ‖v‖².
    5. Class K is overwhelmed where Z > 0, with the probability Φ(mean / √variance).  ∎

    At α = 0 it is (F.15). counts [K], means [K, dim]; alpha and sigma broadcast. Raises ValueError
    where the shapes don't fit, the norms differ, μ_1 = μ_K, or T = 0 normalises."""
    alpha, counts, sigma = in_range(alpha=alpha, counts=counts, sigma=sigma)
    means = np.asarray(means, float)
    if means.ndim != 2 or len(means) != len(counts) or len(counts) < 2:
        raise ValueError(f"means of shape {means.shape} don't fit counts of {len(counts)}; "
                         "they must be [K, dim], K at least 2")
    norms = np.linalg.norm(means, axis=1)
    if norms.min() <= 0 or np.ptp(norms) > 1e-6 * norms.max():
        raise ValueError(f"means have norms {norms}; Assumption F.1 wants them equal and positive")
    mu, n, nk = norms[0], counts.sum(), counts[-1]
    v = means[0] - means[-1]
    v_norm = np.linalg.norm(v)
    if v_norm < 1e-12 * mu:
        raise ValueError("means of the first and the last class are the same")
    total = counts @ means  # T
    kappa = np.linalg.norm(total) / mu
    if kappa < 1e-12 * n and np.any(alpha > 0):
        raise ValueError("means and counts give a mean gradient of 0, which can't normalise")
    mean = total @ v + alpha * kappa * (means[-1] @ v)
    spread = np.sqrt(n + 2 * alpha * kappa + alpha**2 * kappa**2 / nk)
    return ndtr(mean / (sigma * v_norm * spread))


def pi_maj_multi_any(alpha, n, nk, mu, sigma, cos):
    """Theorem F.2 mended: a bound for any class means of equal norm. It isn't in the paper:

        exact ≤ Φ( (μ/σ) κ (1 − αs) / √(N + 2ακ + α²κ²/N_K) )    κ = ‖Σ_k N_k μ_k‖ / μ
              ≤ Φ( (μ/σ) N (1 − αs) / √(N + 2αN + α²N²/N_K) )    this function: the same at κ = N
              ≤ Φ( (μ/σ) √N (1 − αs) )                           `pi_maj_multi_any_simple`

    The last line beside (F.17), Φ( (μ/σ) √N s (1 − α) ): s has moved into the bracket. So it is
    the weaker bound, as it must be; with more than two classes (F.17) isn't one.

    Proof. T = Σ_k N_k μ_k, so ‖T‖ = κμ; v = μ_1 − μ_K; cos is between μ_1 and μ_K.

    1. As in `pi_maj_exact`, step 3: ‖v‖ = 2sμ and μ_K·v = −2s²μ².
    2. `pi_maj_multi_exact`'s numerator is T·v + ακ μ_K·v. Cauchy and Schwarz: T·v ≤ ‖T‖ ‖v‖ =
       κμ · 2sμ, however the classes between lie. So the numerator is at most
       2sκμ² − 2s²ακμ² = 2sκμ² (1 − αs).
    3. Its denominator is σ · 2sμ · √(N + 2ακ + α²κ²/N_K). Divide: 2sμ cancels, and what is left is
       the first line.
    4. The first line grows with κ: for κ > 0, κ / √(N + 2ακ + α²κ²/N_K) is
       1 / √(N/κ² + 2α/κ + α²/N_K), in which κ stands only below; for κ = 0 it is 0, which is less.
       And 1 − αs ≥ 0, because α ≤ 1 and s ≤ 1.
    5. κ ≤ N by the triangle inequality: ‖Σ_k N_k μ_k‖ ≤ Σ_k N_k ‖μ_k‖ = Nμ. With 4 that is the
       second line.
    6. Without 2αN + α²N²/N_K ≥ 0 the denominator is √N, and N/√N = √N: the third line.  ∎

    n counts all classes, nk the last one. Arguments broadcast. Raises ValueError where nk > n."""
    alpha, n, nk, mu, sigma, cos = in_range(
        alpha=alpha, n=n, nk=nk, mu=mu, sigma=sigma, cos=cos)
    if np.any(nk > n):
        raise ValueError(f"nk is {nk}, above n = {n}; n counts the samples of all classes")
    return _pi_maj_multi_any_at(n, alpha, n, nk, mu, sigma, cos)


def pi_maj_multi_any_simple(alpha, n, mu, sigma, cos):
    """`pi_maj_multi_any` without the minority's count, its last line: Φ( (μ/σ) √N (1 − αs) )."""
    alpha, n, mu, sigma, cos = in_range(alpha=alpha, n=n, mu=mu, sigma=sigma, cos=cos)
    return ndtr(mu / sigma * np.sqrt(n) * (1 - alpha * half_angle_sine(cos)))


def _pi_maj_multi_any_at(kappa, alpha, n, nk, mu, sigma, cos):
    """`pi_maj_multi_any`'s formula at any κ."""
    spread = np.sqrt(n + 2 * alpha * kappa + alpha**2 * kappa**2 / nk)
    return ndtr(mu / sigma * kappa * (1 - alpha * half_angle_sine(cos)) / spread)


# --------------------------------------------------------------------------------------------------
# Simulation, from the assumptions


def two_means(mu, cos, dim):
    """Two means [2, dim] of norm mu at the given angle."""
    in_range(mu=mu, cos=cos, dim=dim)
    means = np.zeros((2, int(dim)))
    means[0, 0] = mu
    means[1, :2] = mu * cos, mu * np.sqrt(1 - cos**2)
    return means


def orthogonal_means(k, mu, dim):
    """k mutually orthogonal means [k, dim] of norm mu. Raises ValueError where dim < k."""
    in_range(mu=mu, dim=dim)
    if dim < k:
        raise ValueError(f"dim is {dim}; {k} orthogonal means need at least {k}")
    return mu * np.eye(k, dim)


def gaussian(rng, shape):
    """Standard normal noise, float32."""
    return rng.standard_normal(shape, np.float32)


def dominated(counts, means, sigma, alpha, trials, rng, noise=gaussian):
    """How many of `trials` updates the majority dominates.

    counts [K], means [K, dim], sigma [K] or a number. `noise(rng, [..., dim])` is one sample's
    deviation, of unit variance."""
    classes, dim = means.shape
    sigmas = np.broadcast_to(sigma, classes)
    sums = np.zeros((classes, trials, dim))  # S_k, the sum of class k's gradients
    at_once = max(1, BLOCK // (trials * dim))
    for k in range(classes):
        count = int(counts[k])
        for first in range(0, count, at_once):
            g = noise(rng, (trials, min(at_once, count - first), dim))
            g *= np.float32(sigmas[k])
            g += means[k].astype(np.float32)
            sums[k] += g.sum(1)
    grad_g, grad_e = sums.sum(0), sums[-1]  # of W_g: all classes; of W_e: the minority alone
    update = grad_g
    if alpha > 0:  # Assumption F.2
        norm_g = np.linalg.norm(counts @ means)
        norm_e = counts[-1] * np.linalg.norm(means[-1])
        update = grad_g / norm_g + alpha * grad_e / norm_e
    return int((update @ (means[0] - means[-1]) > 0).sum())


def simulate(counts, means, sigma, alpha=0.0, trials=100_000, seed=0, noise=gaussian, block=None):
    """The share of trials that the majority dominates, from per-sample gradients.

    Blocks of trials have their own streams of random numbers, so memory is bounded and the result
    doesn't depend on threads. Raises ValueError where a count isn't whole."""
    in_range(counts=counts, sigma=sigma, alpha=alpha, trials=trials, seed=seed)
    counts, means = np.asarray(counts, float), np.asarray(means, float)
    if (counts != np.floor(counts)).any():
        raise ValueError(f"counts are {counts}; a simulation needs whole samples")
    block = block or int(max(1, min(4096, BLOCK // means.shape[1])))
    sizes = [min(block, trials - first) for first in range(0, trials, block)]
    streams = np.random.SeedSequence(seed).spawn(len(sizes))

    def one_block(size, stream):
        rng = np.random.default_rng(stream)
        return dominated(counts, means, sigma, alpha, size, rng, noise)

    with ThreadPool(2) as pool:  # numpy draws outside the interpreter's lock
        hits = pool.starmap(one_block, zip(sizes, streams, strict=True))
    return sum(hits) / trials


def standard_error(p, trials):
    """Of an estimate of p: the closed form's, so that an estimate of exactly 1 has one too."""
    return np.sqrt(np.maximum(p * (1 - p), 1e-300) / trials)


def simulate_pi_maj(n1, n2, mu, sigma, cos, alpha=0.0, dim=8, trials=100_000, seed=0):
    """(estimate, standard error) of Π_maj for two classes, Theorem 2.1 (alpha = 0) or 3.1."""
    in_range(n1=n1, n2=n2, mu=mu, sigma=sigma, cos=cos, alpha=alpha, dim=dim, trials=trials,
             seed=seed)
    exact = pi_maj_exact(alpha, n1, n2, mu, sigma, cos)
    estimate = simulate((n1, n2), two_means(mu, cos, dim), sigma, alpha, trials, seed)
    return estimate, float(standard_error(exact, trials))


# --------------------------------------------------------------------------------------------------
# The checks that `python theory.py` makes


def counterexample(alpha=0.0):
    """Where (F.17) fails, as a setting for `multi_ladder`.

    μ_2 points along μ_1 − μ_3, so every gradient of class 2 pushes for class 1."""
    first, last = two_means(mu=1.0, cos=0.9, dim=2)
    v = first - last
    means = np.stack([first, v / np.linalg.norm(v), last])
    return dict(alpha=alpha, counts=(1000, 999, 1), means=means, sigma=10.0)


class Report:
    """Prints a line a setting and remembers whether all held."""

    def __init__(self, trials, seed):
        self.trials, self.seed = trials, seed
        self.ok = True
        self.simulated = 0  # settings so far
        self.gaussians = 0  # drawn so far

    def verdict(self, ok):
        self.ok &= bool(ok)
        return "ok" if ok else "FAILS"

    def title(self, text):
        columns = f"{'closed form':>11} {'simulated':>10} {'std. error':>10} {'z':>6}"
        print(f"\n{text}\n  {'setting':48} {columns}")

    def line(self, setting, closed_form, counts, means, sigma, alpha=0.0, note="", trials=None):
        """Simulate one setting against its closed form: within four standard errors."""
        trials = trials or self.trials
        self.simulated += 1
        # not seed + simulated: runs with neighbouring seeds would share their draws
        hashed = np.random.SeedSequence([self.seed, self.simulated])
        seed = int(hashed.generate_state(1, np.uint64)[0])
        estimate = simulate(counts, means, sigma, alpha, trials, seed)
        self.gaussians += trials * int(sum(counts)) * np.shape(means)[1]
        error = float(standard_error(closed_form, trials))
        z = (estimate - closed_form) / error if estimate != closed_form else 0.0
        # a rarer event than one in `trials` is seen never or once: allow for that one
        ok = abs(z) < 4 or abs(estimate - closed_form) * trials <= 1
        numbers = f"{closed_form:11.5f} {estimate:10.5f} {error:10.1e} {z:6.2f}"
        print(f"  {setting:48} {numbers}  {self.verdict(ok)}{note}")
        return estimate


def in_words(setting):
    """A two-class setting as a line's first column."""
    return "N1={n1} N2={n2} σ/μ={sigma} cos={cos} α={alpha}".format(**setting)


def simulate_setting(report, words, setting):
    """`Report.line` for a two-class setting (mu = 1) against `pi_maj_exact`; its estimate."""
    counts, means = (setting["n1"], setting["n2"]), two_means(1, setting["cos"], 8)
    exact = float(pi_maj_exact(**setting))
    return report.line(words, exact, counts, means, setting["sigma"], setting["alpha"])


def check_two_classes(report):
    """Theorem 2.1, and Theorem 3.1's model at the settings that are returned."""
    report.title("Theorem 2.1, (F.7): two classes")
    for n1, n2, sigma, cos, dim in [
            (50, 50, 5, 0.0, 2), (60, 40, 5, 0.0, 8), (75, 25, 5, 0.5, 8), (90, 10, 5, -0.5, 8),
            (90, 10, 10, 0.9, 3), (99, 1, 20, 0.0, 8), (30, 3, 3, 0.99, 16), (500, 5, 40, -1.0, 2)]:
        words = f"N1={n1} N2={n2} σ/μ={sigma} cos={cos} dim={dim}"
        n = n1 + n2
        report.line(words, float(pi_maj(n1 / n, n, 1, sigma, cos)), (n1, n2),
                    two_means(1, cos, dim), sigma)
    report.title("Theorem 3.1's model, exact (not in the paper), the minority in W_g and W_e")
    settings = []
    for n1, n2, sigma, cos in [(90, 10, 8, 0.0), (60, 40, 8, 0.5), (99, 1, 20, -0.5),
                               (30, 3, 2, 0.95)]:
        for alpha in (0.0, 0.3, 0.7, 1.0):
            settings.append(dict(n1=n1, n2=n2, mu=1.0, sigma=sigma, cos=cos, alpha=alpha))
    for setting in settings:
        simulate_setting(report, in_words(setting), setting)
    return settings


def ladder(alpha, n1, n2, mu, sigma, cos):
    """Theorem 3.1: exact, the tighter bound, (F.14)'s middle and last line, each an array."""
    exact = pi_maj_exact(alpha, n1, n2, mu, sigma, cos)
    tight = pi_maj_tight(alpha, n1, n2, mu, sigma, cos)
    middle = pi_maj_middle(alpha, n1 + n2, n2, mu, sigma, cos)
    last = pi_maj_bound(alpha, n1 + n2, mu, sigma, cos)
    return exact, tight, middle, last


def ordered(rungs):
    """Where no rung [rungs, ...] lies above the next one, as a boolean array [...]."""
    return (np.diff(rungs, axis=0) >= -ROUNDING).all(axis=0)


def looseness(names, rungs):
    """How far each bound lies above the exact value, in words; rungs [1 + names, settings]."""
    exact, *bounds = rungs
    gaps = [f"{name} {(bound - exact).mean():.4f}"
            for name, bound in zip(names, bounds, strict=True)]
    return "how loose, mean of bound − exact: " + ", ".join(gaps)


def random_settings(size, seed):
    """Two-class settings: a dict of arrays [size] for `ladder`."""
    rng = np.random.default_rng(seed)
    n2 = np.floor(10 ** rng.uniform(0, 3, size))
    alpha = rng.uniform(0, 1, size)
    n1 = n2 + np.floor(10 ** rng.uniform(0, 4, size))
    mu, sigma = 10 ** rng.uniform(-1, 1, size), 10 ** rng.uniform(-1, 3, size)
    return dict(alpha=alpha, n1=n1, n2=n2, mu=mu, sigma=sigma, cos=rng.uniform(-0.999, 0.999, size))


def check_bounds(report, settings):
    print("\nBounds: exact ≤ tighter bound ≤ (F.14) middle line ≤ (F.14) last line")
    print(f"  {'setting':48} {'exact':>8} {'tighter':>8} {'middle':>8} {'last':>8}")
    for setting in settings:
        rungs = ladder(**setting)
        numbers = " ".join(f"{rung:8.5f}" for rung in rungs)
        print(f"  {in_words(setting):48} {numbers}  {report.verdict(ordered(rungs))}")
    rungs = ladder(**random_settings(10_000, report.seed))
    broken = int((~ordered(rungs)).sum())
    print(f"  10,000 random settings: {broken} violations  {report.verdict(broken == 0)}")
    print("  " + looseness(("tighter", "middle", "last"), rungs))


def multi_cases(seed):
    """(name, counts, means, sigma) of three K-class settings, mu = 1."""
    rng = np.random.default_rng(seed)
    general = rng.standard_normal((5, 8)) + 0.7
    general /= np.linalg.norm(general, axis=1, keepdims=True)
    return [("K=3, orthogonal", (60, 20, 5), orthogonal_means(3, 1, 8), 6.0),
            ("K=5, orthogonal", (50, 30, 20, 10, 5), orthogonal_means(5, 1, 8), 8.0),
            ("K=5, general means", (50, 30, 20, 10, 5), general, 8.0)]


def check_multi(report):
    """Theorems F.1 and F.2 by simulation, and the counterexample to Theorem F.2."""
    cases = multi_cases(report.seed)
    report.title("Theorem F.1, (F.15): K classes")
    for name, counts, means, sigma in cases:
        exact = float(pi_maj_multi(counts, means, sigma))
        cos = means[0] @ means[-1]
        simple = float(pi_maj_multi_simple(counts[0], counts[-1], sum(counts), 1, sigma, cos))
        same = "differs"
        if "orthogonal" in name:
            same = report.verdict(abs(simple - exact) < ROUNDING)
        report.line(name, exact, counts, means, sigma, note=f"   (F.16): {simple:.5f} {same}")
    print("  (F.16) leaves the cross term out: right for orthogonal means, not in general")

    report.title("Theorem F.2: K classes, class K in W_g and W_e; its bound (F.17)")
    for name, counts, means, sigma in cases:
        for alpha in (0.0, 0.5, 1.0):
            exact, _, _, _, paper = multi_ladder(alpha, counts, means, sigma)
            holds = exact <= paper + ROUNDING
            note = f"   (F.17): {paper:.5f} {'holds' if holds else 'VIOLATED'}"
            report.line(f"{name} α={alpha}", exact, counts, means, sigma, alpha, note)
            if "orthogonal" in name:
                report.verdict(holds)
    setting = counterexample()
    exact, _, mended, _, paper = multi_ladder(**setting)
    note = f"   (F.17): {paper:.5f} VIOLATED; mended: {mended:.5f} holds"
    report.line("counterexample: N=1000/999/1, μ_2 ∥ μ_1 − μ_3", exact, setting["counts"],
                setting["means"], setting["sigma"], note=note, trials=min(report.trials, 20_000))
    report.verdict(paper < exact <= mended)
    print("  Class 2's gradients all push for class 1 against class 3. (F.17) doesn't know them:")
    print("  Theorem F.2 doesn't hold as stated. As (F.16), it needs mutually orthogonal means.")


def multi_ladder(alpha, counts, means, sigma):
    """Theorem F.2's model, an array of five: the exact value; the mended bound at its κ, at κ = N,
    and simplified; and, which isn't always above the first, the paper's (F.17)."""
    counts = np.asarray(counts, float)
    n, nk = counts.sum(), counts[-1]
    mu = np.linalg.norm(means[0])
    cos = means[0] @ means[-1] / mu**2
    kappa = np.linalg.norm(counts @ means) / mu
    return np.array([pi_maj_multi_exact(alpha, counts, means, sigma),
                     _pi_maj_multi_any_at(kappa, alpha, n, nk, mu, sigma, cos),
                     pi_maj_multi_any(alpha, n, nk, mu, sigma, cos),
                     pi_maj_multi_any_simple(alpha, n, mu, sigma, cos),
                     pi_maj_multi_bound(alpha, n, mu, sigma, cos)])


def random_multi_settings(size, seed):
    """`size` settings for `multi_ladder`, of 2 to 6 classes whose means have equal norms only."""
    rng = np.random.default_rng(seed)
    settings = []
    for _ in range(size):
        classes, dim = rng.integers(2, 7), rng.integers(2, 9)
        counts = -np.sort(-np.floor(10 ** rng.uniform(0, 3, classes)))  # N_1 ≥ ... ≥ N_K
        # what all means share makes their angles narrow; without it they would be wide
        means = rng.standard_normal((classes, dim)) + rng.uniform(0, 2)
        mu = 10 ** rng.uniform(-1, 1)
        means *= mu / np.linalg.norm(means, axis=1, keepdims=True)
        # (μ/σ)√N between 0.1 and 10: further out every Φ is nearly 1/2 or 1
        sigma = mu * np.sqrt(counts.sum()) * 10 ** rng.uniform(-1, 1)
        settings.append(dict(alpha=rng.uniform(), counts=counts, means=means, sigma=sigma))
    return settings


def check_mended(report):
    """`pi_maj_multi_any` where the paper's (F.17) holds and where it doesn't."""
    print("\nTheorem F.2 mended, any means: exact ≤ mended at κ ≤ mended at κ = N ≤ simplified")
    print(f"  {'setting':48} {'exact':>8} {'at κ':>8} {'at N':>8} {'simple':>8} {'(F.17)':>8}")
    name, counts, means, sigma = multi_cases(report.seed)[-1]
    rows = []  # (words, setting, whether (F.17) must be violated there; None: either)
    for alpha in (0.0, 0.5, 1.0):
        setting = dict(alpha=alpha, counts=counts, means=means, sigma=sigma)
        rows.append((f"{name} α={alpha}", setting, None))
    for alpha, known in ((0.0, True), (0.05, True), (0.5, False)):
        rows.append((f"counterexample α={alpha}", counterexample(alpha), known))
    for words, setting, known in rows:
        *rungs, paper = multi_ladder(**setting)
        violated = rungs[0] > paper + ROUNDING
        numbers = " ".join(f"{value:8.5f}" for value in (*rungs, paper))
        verdict = report.verdict(ordered(rungs) and known in (None, violated))
        print(f"  {words:48} {numbers} {'VIOLATED' if violated else 'holds':8}  {verdict}")

    settings = random_multi_settings(10_000, report.seed)
    *rungs, paper = np.array([multi_ladder(**setting) for setting in settings]).T
    broken = int((~ordered(rungs)).sum())
    excess = rungs[0] - paper  # of the exact value over what should bound it
    violated = int((excess > ROUNDING).sum())
    print(f"  10,000 random settings of 2 to 6 classes: {broken} violations of the mended bound, "
          f"{violated} of (F.17), by up to {excess.max():.2f}  "
          f"{report.verdict(broken == 0 and violated > 0)}")
    print("  " + looseness(("at κ", "at N", "simple"), rungs))


def sweep(name):
    """One parameter's range, the others at a middle setting.

    (the axis' label, its values, for each value the setting for `pi_maj_exact`)"""
    base = dict(n1=90, n2=10, mu=1.0, sigma=8.0, cos=0.0, alpha=0.0)
    if name == "a":
        label = "majority ratio a"
        values = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.98])
        changes = [dict(n1=n1, n2=100 - n1) for n1 in np.rint(100 * values).astype(int)]
    elif name == "angle":
        label = "angle between the means (degrees)"
        values = np.array([15, 45, 75, 105, 135, 180])
        changes = [dict(cos=cos) for cos in np.cos(np.radians(values))]
    elif name == "sigma":
        label = "within-class diversity σ/μ"
        values = np.array([2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
        changes = [dict(sigma=sigma) for sigma in values]
    elif name == "n":
        label = "samples N"
        values = np.array([10, 20, 50, 100, 200, 400])
        changes = [dict(n1=n - n // 10, n2=n // 10) for n in values]
    else:
        label = "rank effect α_r"
        values = np.linspace(0, 1, 6)
        changes = [dict(alpha=alpha) for alpha in values]
    return label, values, [base | change for change in changes]


def check_remarks(report):
    """The remarks under Theorem 2.1, and Theorem 3.1's in α_r: both the closed form and the
    simulation must go in the direction that the paper says. Returns {sweep: estimates}."""
    estimates = {}
    for name, claim, sign in [
            ("a", "rises with imbalance, concave", 1), ("angle", "rises with the angle", 1),
            ("sigma", "falls with σ/μ", -1), ("n", "rises with N", 1),
            ("alpha", "falls with α_r", -1)]:
        label, values, settings = sweep(name)
        report.title(f"Remark: Π_maj {claim}")
        estimates[name] = [simulate_setting(report, f"{label} = {value:g}", setting)
                           for value, setting in zip(values, settings, strict=True)]
        exact = np.array([pi_maj_exact(**setting) for setting in settings])
        change = sign * (estimates[name][-1] - estimates[name][0])
        ok = (sign * np.diff(exact) > 0).all() and change > 4 * np.sqrt(2 * 0.25 / report.trials)
        if name == "a":  # concave: its steps, equal up to 0.9, bring less and less
            ok &= (np.diff(exact[:5], 2) < 0).all()
        print(f"  Π_maj {claim}: {report.verdict(ok)}")
    return estimates


def drawing_seconds():
    """What one Gaussian costs, bare, on one thread."""
    rng, few, repeats = np.random.default_rng(0), 2**22, 4
    began = time.perf_counter()
    for _ in range(repeats):
        rng.standard_normal(few, np.float32)
    return (time.perf_counter() - began) / (repeats * few)


def run(trials, seed, plot=None):
    """All checks; True where every one holds."""
    began = time.perf_counter()
    report = Report(trials, seed)
    settings = check_two_classes(report)
    check_bounds(report, settings)
    check_multi(report)
    check_mended(report)
    estimates = check_remarks(report)
    seconds = time.perf_counter() - began
    bare = report.gaussians * drawing_seconds()
    print(f"\n{report.simulated} simulations of {trials:,} trials, {report.gaussians / 1e9:.2f}e9 "
          f"Gaussians in {seconds:.0f} s: {seconds / bare:.2f} × the bare cost of drawing them on "
          "one thread")
    print("every check holds" if report.ok else "SOMETHING FAILS, see above")
    if plot:
        directory = Path(plot)
        directory.mkdir(parents=True, exist_ok=True)
        draw_pi_maj(estimates, trials, directory / "pi_maj.png")
        draw_bounds(estimates["alpha"], trials, directory / "bounds.png")
        print(f"pictures in {directory}/: pi_maj.png, bounds.png")
    return report.ok


# --------------------------------------------------------------------------------------------------
# Pictures


def draw_estimates(axis, values, estimates, settings, trials):
    """The simulation's points with bars of two standard errors."""
    exact = np.array([pi_maj_exact(**setting) for setting in settings])
    axis.errorbar(values, estimates, 2 * standard_error(exact, trials), fmt="o", ms=4, color="C1",
                  capsize=3, label="simulated, ±2 s.e.")


def draw_pi_maj(estimates, trials, path):
    """Π_maj, (F.7), against each of its parameters."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, name in zip(axes, ("a", "angle", "sigma", "n"), strict=True):
        label, values, settings = sweep(name)
        logarithmic = name in ("sigma", "n")
        spaced = np.geomspace if logarithmic else np.linspace
        fine = spaced(values[0], values[-1], 200)
        a, n, sigma, cos = 0.9, 100, 8, 0
        if name == "a":
            a = fine
        elif name == "angle":
            cos = np.cos(np.radians(fine))
        elif name == "sigma":
            sigma = fine
        else:
            n = fine
        axis.plot(fine, pi_maj(a, n, 1, sigma, cos), label="(F.7)")
        draw_estimates(axis, values, estimates[name], settings, trials)
        axis.set(xlabel=label, ylabel="Π_maj", ylim=(0.48, 1.02),
                 xscale="log" if logarithmic else "linear")
        if logarithmic:
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=130)


def draw_bounds(estimates, trials, path):
    """The ladder of Theorem 3.1's bounds against α_r."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    _, values, settings = sweep("alpha")
    alpha = np.linspace(0, 1, 200)
    exact, tight, middle, last = ladder(alpha, n1=90, n2=10, mu=1.0, sigma=8.0, cos=0.0)
    axis.fill_between(alpha, exact, last, alpha=0.12, color="C3",
                      label="what the paper's bound leaves open")
    axis.plot(alpha, last, "C3", label="(F.14), last line: the paper's bound")
    axis.plot(alpha, middle, "C4--", label="(F.14), middle line")
    axis.plot(alpha, tight, "C2", label="tighter bound (not in the paper)")
    axis.plot(alpha, exact, "C0", label="exact (not in the paper)")
    draw_estimates(axis, values, estimates, settings, trials)
    axis.axhline(0.5, color="k", lw=0.8, ls=":")
    axis.set(xlabel="rank effect α_r", ylabel="Π_maj",
             title="N_1 = 90, N_2 = 10, σ/μ = 8, orthogonal means")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


# --------------------------------------------------------------------------------------------------
# Command line


def fail(message):
    """One line on stderr, status 2."""
    print("theory.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    """The status: 0 where every check holds, 1 where one doesn't; bad input exits with 2."""
    parser = argparse.ArgumentParser(prog="theory.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--trials", type=int, default=20_000,
                        help="trials a setting [default: 20,000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="DIR", help="draw pi_maj.png and bounds.png there")
    args = parser.parse_args(argv)
    try:
        in_range(trials=args.trials, seed=args.seed)
        if args.plot:
            plot = Path(args.plot)
            if any(path.is_file() for path in (plot, *plot.parents)):
                raise ValueError(f"--plot {args.plot} is, or lies beneath, a file")
        return 0 if run(args.trials, args.seed, args.plot) else 1
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    sys.exit(main())
