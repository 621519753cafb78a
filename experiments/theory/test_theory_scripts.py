"""Tests of the theory's scripts: pruning, divergence, gradients, assumptions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import cm
import theory
from experiments import common
from experiments.theory import assumptions, divergence, gradients, pruning

MINIATURE = ["--channels", "8", "--multipliers", "1", "2", "--image-size", "8",
             "--batch-size", "8", "--warmup", "1", "--log-every", "2"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Options that keep a script's files in tmp_path; runs of cm.py end without pictures."""
    monkeypatch.setattr(cm, "report", lambda *_: None)
    return ["--rows", str(tmp_path / "rows.csv"), "--assets", str(tmp_path)]


def test_pruning_share_is_exact_and_takes_the_smallest():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3))
    before, after = (nn.utils.parameters_to_vector(network.parameters()).detach()
                     for network in (net, pruning.prune(net, 0.1)))
    gone = after == 0
    assert int(gone.sum()) == len(before) // 10 and not (before == 0).any()
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(after[~gone], before[~gone])


def test_pruning_end_to_end(own, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "PER_CLASS", 2)
    monkeypatch.setattr(pruning, "TIMES", 2)
    for name, extra in (("plain", ["--no-cm"]), ("cm", [])):
        assert common.run([*MINIATURE, *extra, "--steps", "4"], tmp_path / name) == ""
    checkpoints = [str(tmp_path / name / "checkpoint.pt") for name in ("plain", "cm")]
    pruning.main([*checkpoints, *own])
    assert (tmp_path / "pruning.png").is_file()
    rows = common.numbers(common.read_rows(tmp_path / "rows.csv"), pruning.WORDS)
    assert rows["method"].tolist() == ["DDPM, 4 steps"] * 10 + ["CM on DDPM, 4 steps"] * 10
    unet = cm.merge(cm.load_trained(checkpoints[1])[1])
    data = cm.Data(cm.Config(image_size=8).resolved())
    for column, network in (("raw", unet), ("pruned", pruning.prune(unet, 0.1))):
        loss = cm.held_out_loss(network, data.images, data.labels, 10, 2, 2)[0]
        assert np.allclose(rows[column][10:], loss, rtol=1e-5)  # training images, merged
    assert np.allclose(rows["change"], rows["pruned"] / rows["raw"] - 1, atol=1e-4)


def test_divergence_trains_what_it_says_and_finds_when_it_runs_off(own, tmp_path, monkeypatch):
    made, ran_off = {}, "not finite between steps 250 and 300"
    name, at_once = "large-100-0.2-3e-3-inf-20", "small-100-1-3e-3-inf-21"
    logs = {name: "50,1,0.1\n100,0.4,nan\n150,0.2,0.11\n200,0.4,0.3\n250,0.41,9\n",
            at_once: None}  # it ran off before there was a row

    def run(flags, out):
        made[out.name] = cm.parse(flags)[0].resolved()
        out.mkdir(parents=True)
        if out.name != at_once:
            (out / "log.csv").write_text("step,base,d_Few\n" + logs.get(out.name, "50,1,nan\n"))
        return ran_off if out.name in logs else ""

    monkeypatch.setattr(common, "run", run)
    divergence.main([*own, "--runs", str(tmp_path / "runs"), "--seeds", "20", "21"])
    rows = {"-".join(row[:6]): row for row in
            common.read_rows(tmp_path / "rows.csv").to_numpy().tolist()}
    assert len(rows) == len(made) == 2 * (2 * 2 * 2 * 2 + 2 * 2)
    assert rows[name][7:12] == [ran_off, "150", "250", "9", "0.41"]
    assert rows[at_once][7:12] == [ran_off, "–", "–", "–", "–"]
    assert rows[name.replace("inf", "0.1")][7:10] == ["finished", "never", "never"]
    for c, expected in ((made[name], (200, 100, 8, 32, 0.2, 3e-3, math.inf, 20)),
                        (made["small-600-1-2e-4-0.1-21"], (1000, 600, 16, 16, 1, 2e-4, 0.1, 21))):
        assert (c.n_max, c.ir, c.image_size, c.channels, c.w_div, c.lr, c.div_margin,
                c.seed) == expected


@pytest.mark.parametrize("reserve", [False, True])
def test_per_sample_gradients_average_to_the_batch_gradient(reserve):
    torch.manual_seed(0)
    unet = cm.UNet(4, 1, 8, 8, (1, 2), 1, (4,), 0.0)
    if reserve:
        cm.reserve_capacity(unet.decoder, 0.25)
    for p in unet.parameters():  # B, too, leaves its initial value
        p.data.add_(0.1 * torch.randn_like(p))
    losses = cm.CapacityManipulation(unet.eval(), [40, 10, 5, 2], no_cm=not reserve)
    x0, eps = torch.randn(2, 6, 1, 8, 8)
    y, t = torch.arange(6) % 4, torch.randint(1000, (6,))
    parameters = {n: p for n, p in losses.named_parameters() if "decoder" in n}
    each = gradients.per_sample_gradients(losses, list(parameters), x0, y, t, eps, chunk_size=4)
    whole = torch.autograd.grad(losses(x0, y, t, eps, y)[0], list(parameters.values()),
                                allow_unused=True)
    for (n, p), of_batch in zip(parameters.items(), whole, strict=True):
        assert each[n].shape == (6, *p.shape)
        expected = torch.zeros_like(p) if of_batch is None else of_batch
        torch.testing.assert_close(each[n].mean(0), expected, rtol=1e-4, atol=1e-6)


def test_gradients_part_of_ba_is_how_ba_moves():
    torch.manual_seed(0)
    layer = cm.LowRankReserved(nn.Conv2d(4, 6, 3), 18, 12, 2).double()
    layer.B.data.normal_()
    x = torch.randn(3, 4, 8, 8, dtype=torch.double)
    weight = torch.randn(3, 6, 6, 6, dtype=torch.double)
    of_w, g_b, g_a = torch.autograd.grad((layer(x) * weight).sum(),
                                         (layer.layer.weight, layer.B, layer.A))
    parts = gradients.parts({"unet.L.layer.weight": of_w[None], "unet.L.B": g_b[None],
                             "unet.L.A": g_a[None]}, "L", layer)
    h = 1e-8  # one small step of gradient descent on A and B
    moved = (layer.B - h * g_b) @ (layer.A - h * g_a)
    moved = ((layer.B @ layer.A - moved) / h).view_as(of_w).flatten(1)
    assert torch.allclose(moved, parts["BA"][0], atol=1e-3)
    assert torch.equal(parts["W_g"][0], of_w.flatten(1))
    assert torch.equal(parts["W_g+BA"], parts["W_g"] + parts["BA"])


def two_means():
    torch.manual_seed(0)
    m1, m2 = torch.randn(2, 24, 30)
    return F.normalize(m1), F.normalize(m2 + 0.5 * m1)


def test_gradients_estimates_agree_with_the_theory_where_its_assumptions_hold():
    for row in gradients.estimate(*(m + 3 * torch.randn(3000, 24, 30) for m in two_means())):
        assert abs(row["predicted"] - row["observed"]) < 0.05
        assert abs(row["projected"] - row["observed"]) < 0.05


def test_gradients_estimates_against_an_independent_writing():
    m1, m2 = two_means()
    g1, g2 = m1 + 2 * torch.randn(300, 24, 30), 1.5 * m2 + 3 * torch.randn(306, 24, 30)
    row = gradients.estimate(g1, g2)[2]
    a1, b1, a2, b2 = (g.double().numpy() for g in (g1[:100], g1[100:200], g2[:102], g2[102:204]))
    of_weights, spreads = [], []
    for r in range(24):  # a weight at a time
        mean_a1, mean_b1, mean_a2, mean_b2 = (p[:, r].mean(0) for p in (a1, b1, a2, b2))
        v = mean_a1 / np.linalg.norm(mean_a1) - mean_a2 / np.linalg.norm(mean_a2)
        v /= np.linalg.norm(v)
        along = b1[:, r] @ v, b2[:, r] @ v
        traces = [np.cov(p[:, r].T).trace() / 30 for p in (b1, b2)]
        spreads += [np.var(x, ddof=1) / trace for x, trace in zip(along, traces, strict=True)]
        mean = 75 * along[0].mean() + 25 * along[1].mean()
        variance = 75 * np.var(along[0], ddof=1) + 25 * np.var(along[1], ddof=1)
        of_weights.append((mean_a1 @ mean_b1, mean_a2 @ mean_b2,
                           (mean_a1 @ mean_b2 + mean_a2 @ mean_b1) / 2, *traces,
                           v @ (mean_b1 - mean_b2), (mean_a1 - mean_a2) @ (mean_b1 - mean_b2),
                           stats.norm.cdf(mean / math.sqrt(variance))))
    square_1, square_2, cross, trace_1, trace_2, known, square, share = np.mean(of_weights, 0)
    cos, quality = cross / math.sqrt(square_1 * square_2), known / math.sqrt(square)
    mu, sigma = math.sqrt((square_1 + square_2) / 2), math.sqrt((trace_1 + trace_2) / 2)
    predicted = stats.norm.cdf(quality * 0.5 * mu * math.sqrt(200 * (1 - cos)) / (2 * sigma))
    expected = {"mu_1": math.sqrt(square_1), "mu_2": math.sqrt(square_2), "cos": cos,
                "sigma_1": math.sqrt(trace_1), "sigma_2": math.sqrt(trace_2), "quality": quality,
                "anisotropy": np.median(spreads), "a": 0.75, "predicted": predicted,
                "projected": share}
    for name, value in expected.items():
        assert math.isclose(row[name], value, rel_tol=1e-9), name


@pytest.mark.filterwarnings("ignore:invalid value")
def test_gradients_predict_nothing_from_estimates_that_no_means_have():
    m, _ = two_means()
    # of m in parts A and B, of the majority and of the minority: cos is 1.5 and -1.5, then squared
    # lengths are below 0
    for factors in ((2, 0.76, 0.76, 2), (2, 0.76, -0.76, -2), (1, -1, 1, -1)):
        a1, b1, a2, b2 = (torch.full((100, 1, 1), float(f)) for f in factors)
        g1, g2 = (torch.cat([a, b, 0 * a]) * m + 0.01 * torch.randn(300, 24, 30)
                  for a, b in ((a1, b1), (a2, b2)))
        row = gradients.estimate(g1, g2)[1]
        assert math.isnan(row["predicted"])
        assert abs(row["observed"] - 0.5) < 0.25  # of part C, which has no mean here


def test_gradients_end_to_end_goes_on(own, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "SAMPLES", 300)
    monkeypatch.setattr(gradients, "BATCHES", 20)
    for stops in ((3,), (3, 6)):
        monkeypatch.setattr(gradients, "STOPS", stops)
        gradients.main([*own, "--runs", str(tmp_path / "runs"), "--seeds", "11", *MINIATURE])
        rows = common.read_rows(tmp_path / "rows.csv")
        assert len(rows) == len(stops) * 5 * 3 * (1 + 3) and set(rows["method"]) == {"DDPM", "CM"}
    assert not rows.duplicated(["method", "step", "layer", "part", "a"]).any()
    assert (tmp_path / "gradients.png").is_file()


def test_assumptions_break_one_thing_each():
    rng, named = np.random.default_rng(0), {}
    factor = {"variance × 4 along μ_1 − μ_2": 4, "variance / 4 along μ_1 − μ_2": 0.25}
    shared = {"correlation 0.01 within a class": 0.01, "correlation 0.1 within a class": 0.1}
    ratio = {"‖μ_1‖ = 2 ‖μ_2‖": 2, "‖μ_1‖ = ‖μ_2‖ / 2": 0.5}
    ratio_of_sigma = {"σ_1 = 2 σ_2": 2, "σ_1 = σ_2 / 2": 0.5}
    for name, means, sigma, noise in assumptions.violations():
        named[name] = noise
        g = noise(rng, (4000, 10, 8))
        v = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
        along = (g @ v).var()
        rest = (8 * g.var() - along) / 7
        rough = 0.1 + ("Student" in name)
        assert abs(along / rest / factor.get(name, 1) - 1) < rough and abs(g.var() - 1) < rough
        product = (g[:, 0] * g[:, 1]).mean() / g.var()  # of two samples, over 32,000 pairs
        assert abs(product - shared.get(name, 0)) < 0.03, name
        lengths, sigma = np.linalg.norm(means, axis=1), np.broadcast_to(sigma, 2)
        assert abs(means[0] @ means[1]) < 1e-12 and math.isclose(lengths.mean(), 1), name
        assert math.isclose(lengths[0] / lengths[1], ratio.get(name, 1)), name
        assert math.isclose(sigma[0] / sigma[1], ratio_of_sigma.get(name, 1)), name
        assert math.isclose(sigma.mean(), 8), name
    quartile = np.quantile(named["Student t, ν = 3"](rng, (4000, 500)), 0.75)
    assert abs(quartile - 0.76489 / math.sqrt(3)) < 0.005


def test_tangent_share_against_a_basis_of_the_tangent_space():
    """The share by least squares on the Jacobian of (B, A) -> BA."""
    rng = np.random.default_rng(1)
    for d, k, r in ((4, 6, 2), (5, 3, 1), (4, 4, 4)):
        b, a = rng.standard_normal((d, r)), rng.standard_normal((r, k))
        g = rng.standard_normal((d, k))
        for b_now in (b, 1e-9 * b, 0 * b, np.repeat(b[:, :1], r, 1)):  # full rank, none, one
            columns = [np.outer(np.eye(d)[i], a[j]).ravel() for i in range(d) for j in range(r)]
            scale = max(abs(b_now).max(), 1e-12)  # directions matter, not lengths
            columns += [np.outer(b_now[:, j] / scale, np.eye(k)[i]).ravel()
                        for j in range(r) for i in range(k)]
            jacobian = np.array(columns).T
            inside = jacobian @ np.linalg.lstsq(jacobian, g.ravel(), rcond=None)[0]
            share = assumptions.tangent_share(g, b_now, a)
            assert math.isclose(share, (inside**2).sum() / (g**2).sum(), rel_tol=1e-9)
    assert assumptions.tangent_share(g, np.zeros((4, 0)), np.zeros((0, 4))) == 0


def test_trained_factors_reach_the_best_of_their_rank():
    """After many steps BA is the best approximation of the target, so its factors are whole."""
    b, a = assumptions.trained_factors(3, 5, 2, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    target = (rng.standard_normal((3, 3)) * [1, 0.7, 0.49]) @ rng.standard_normal((3, 5))
    u, s, v = np.linalg.svd(target / math.sqrt(5))
    assert np.allclose(b @ a, (u[:, :2] * s[:2]) @ v[:2], atol=1e-2)
    b, a = assumptions.trained_factors(60, 400, 50, rng, steps=0)  # LoRA's start
    assert (b == 0).all() and 0.0499 < a.max() < 0.05 and -0.05 < a.min() < -0.0499


def test_assumptions_end_to_end(own, tmp_path, monkeypatch):
    for name, value in (("SHAPES", ((4, 12), (6, 6))), ("TRIALS", 4000), ("GRADIENTS", 20)):
        monkeypatch.setattr(assumptions, name, value)
    assumptions.main(own)
    rows = common.numbers(common.read_rows(tmp_path / "rows.csv"), ("assumption broken",))
    assert len(rows) == 20 and (rows["difference in s.e."][::10].abs() < 4).all()  # none broken
    assert np.allclose(rows["formula"][:10], theory.pi_maj(0.9, 100, 1.0, 8.0, 0.0), rtol=1e-5)
    assert np.allclose(rows["difference in s.e."] * rows["standard error"],
                       rows["simulated"] - rows["formula"], atol=1e-5)
    # unequal norms have their own closed form
    p = stats.norm.cdf((90 * 16 / 9 - 10 * 4 / 9) / (8 * math.sqrt(100 * 20 / 9)))
    assert abs(rows["simulated"][1] - p) < 4 * theory.standard_error(p, 4000)
    ranks = common.numbers(common.read_rows(tmp_path / "alpha_r.csv"), ())
    assert ranks["rank"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    for column in ("random", "start"):
        assert (ranks[column] - ranks[f"{column}, formula"]).abs().max() < 0.1
    assert np.allclose(ranks["trained"][[0, 4, 5, 11]], [0, 1, 0, 1])
    assert (tmp_path / "alpha_r.png").is_file()
