"""Tests of the toy: the distance, the data, the arms, sampling, the command."""

import numpy as np
import pytest
import scipy.stats
import torch

import cm
from experiments.toy import __main__ as command
from experiments.toy import toy


def test_energy_distance_by_double_loops():
    a, b = torch.randn(9, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64) + 1
    apart = np.mean([(p - q).norm() for p in a for q in b])
    within = [np.mean([(p - q).norm() for i, p in enumerate(x) for q in x[:i]]) for x in (a, b)]
    assert np.isclose(float(toy.energy_distance(a, b)), 2 * apart - sum(within), rtol=1e-12)


def test_classes_are_their_curves_with_noise_and_overlap(monkeypatch):
    assert abs((toy.draw_points(0, 4000) - toy.PLACES[0]).norm(dim=1).std() - 0.05) < 0.005
    frequent = torch.cat([toy.draw_points(c, 500) for c in range(4)])
    assert all(torch.cdist(toy.draw_points(c, 500), frequent).min() < 0.1 for c in range(4, 8))

    monkeypatch.setattr(torch, "randn", torch.zeros)
    zeros = [lambda x, y: x**2 + y**2 - 1, lambda x, y: 3 * x - 4 * x**3 - y,
             lambda x, y: 4 * y**2 * (1 - y**2) - x**2, lambda x, y: 2 * x**2 - 1 - y,
             lambda x, y: (y - x / 2**0.5) ** 2 - (1 - x**2) / 2, lambda x, y: 1 - 2 * x**2 - y,
             lambda x, y: 2 * y**2 - 1 - x, lambda x, y: x - y]
    for c, zero in enumerate(zeros):
        x, y = (toy.draw_points(c, 500) - toy.PLACES[c]).double().T
        assert zero(x, y).abs().max() < 1e-5 and x.min() < -0.9 and x.max() > 0.9, c


def test_arms_differ_in_what_they_say_and_share_the_rest(monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 2)
    seen = []

    class Spy(cm.CapacityManipulation):
        def forward(self, *batch):
            seen.append([*batch, *cm.merge(self.unet).parameters()])
            return super().forward(*batch)

    monkeypatch.setattr(cm, "CapacityManipulation", Spy)
    runs = {arm: toy.train(arm, 3) for arm in toy.ARMS}
    plain, *others, rs = seen[::2]  # the first steps
    same = [pair for other in others for pair in zip(plain, other, strict=True)]
    assert all(torch.equal(a, b) for a, b in [*same, *zip(plain[5:], rs[5:], strict=True)])
    points = toy.training_points(3)
    n = np.array([len(x) for x in points])
    for (x0, y, _, _, y_in, *_), p in ((plain, n), (rs, n**0.5)):
        assert torch.equal(y, y_in) and abs((y < 2).float().mean() - p[:2].sum() / p.sum()) < 0.1
        assert all((points[c] == x[:, 0, 0]).all(1).any() for c, x in zip(y, x0, strict=True))

    d = {arm: run[2] for arm, run in runs.items()}
    assert not d["plain"].any() and not d["RS"].any()
    assert not d["capacity alone"][0].any() and d["capacity alone"][1].all()  # BA starts at 0
    assert torch.equal(d["CM"][0], d["agreement alone"][0]) and d["CM"].all()  # masks alone
    for arm, (net, _, _) in runs.items():
        last = 2 if arm in ("CM", "capacity alone") else 0
        assert [len(cm.reserved_layers(block)) for block in net.blocks] == [0, 0, last, last]


def test_sampling_with_the_exact_noise_gives_the_points():
    def exact(x, t, y):
        root, sigma = cm.scales(cm.make_alpha_bar(), t, x)
        return (x - root * toy.PLACES[y][:, :, None, None]) / sigma

    assert torch.allclose(toy.generate(exact, 0), toy.PLACES[:, None], atol=1e-3)


def test_training_helps_and_score_tells_many_from_few(monkeypatch):
    monkeypatch.setattr(toy, "STEPS", 100)
    assert toy.score(toy.generate(toy.train("plain", 0)[0], 0), 0)[0] < 300  # untrained 100,000
    true = [toy.draw_points(c, 1000) for c in range(8)]
    for c, far in ((None, [0, 0]), (1, [1, 0]), (3, [0, 0]), (4, [0, 1]), (7, [0, 1])):
        moved = [x + 100.0 * (k == c) for k, x in enumerate(true)]
        assert [value > 20 for value in toy.score(moved, 0)] == far


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy, "STEPS", 3)
    monkeypatch.setattr(toy, "DRAWN", 20)
    monkeypatch.setattr(command, "PICTURE", tmp_path / "toy.png")
    command.main([])
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    assert [line[:2] for line in capsys.readouterr().out.splitlines()] == ["en", "pl", "CM", "CM"]
    monkeypatch.setattr(toy, "score", lambda points, seed: points.mean((0, 1)).tolist())
    command.main(["--seeds", "3"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == list(toy.ARMS)
    plain, rs = (np.array([toy.generate(toy.train(arm, seed)[0], seed).mean((0, 1)).tolist()
                           for seed in range(3)]) for arm in ("plain", "RS"))
    ends = scipy.stats.ttest_1samp(rs - plain, 0).confidence_interval()
    cells = [f"{values.mean():.1f} | {gain.mean():+.1f} ± {(high - low) / 2:.1f}"
             for values, gain, low, high in zip(rs.T, (rs - plain).T, *ends, strict=True)]
    assert rows[-1] == f"| RS | {cells[0]} | {cells[1]} |"
    with pytest.raises(SystemExit, match="2"):
        command.main(["--seeds", "1"])
    assert capsys.readouterr().err.endswith("--seeds is 1; an interval needs at least 2\n")
