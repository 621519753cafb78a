"""Tests of consistency training, CT, and of CM in it."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cm
import fid
from experiments.settings import shared
from experiments.settings.consistency import __main__ as ct


COUNTS = [40, 10, 5, 2]


def configured(**options):
    return cm.Config(image_size=8, channels=8, multipliers=(1, 2), **options).resolved()


def tiny(dropout=0.0, b=0.0, **options):
    """ConsistencyTraining of a small UNet, B of spread b, and a batch of 6 with grid(9)."""
    torch.manual_seed(0)
    unet = cm.UNet(4, 1, 8, 8, (1, 2), 1, (), dropout)
    cm.reserve_capacity(unet.decoder, 0.25)
    for name, p in unet.named_parameters():
        p.data.add_((b if name.endswith(".B") else 0.1) * torch.randn_like(p))
    losses = ct.ConsistencyTraining(unet, COUNTS, configured(**options), 0.6)
    y = torch.tensor([0, 1, 2, 3, 3, 0])
    batch = (torch.randn(6, 1, 8, 8), y, torch.randn(6, 1, 8, 8), torch.where(y == 2, -1, y),
             torch.tensor([0, 1, 3, 5, 7, 7]), ct.make_grid(9))
    return losses, batch


def F_and_general(unet, x, sigma, y):
    """F of theta and of theta_g at a noisy x, written out."""
    x = x / (sigma.float()[:, None, None, None]**2 + 0.36).sqrt()
    time = 250 * sigma.log().float()
    with cm.general_only(unet):
        general = unet(x, time, y)
    return unet(x, time, y), general


def test_schedule_and_grid_at_values_worked_by_hand(monkeypatch):
    # s_1 = 20: ceil(sqrt(437 / 4 + 4) - 1) + 1 = ceil(9.64) + 1, ceil(sqrt(441) - 1) + 1
    assert [ct.schedule(k, 6000)[0] for k in (0, 1500, 6000)] == [2, 11, 21]
    monkeypatch.setattr(ct, "S_1", 150)  # Song's
    # N: 2, ceil(sqrt(22797 / 4 + 4) - 1) + 1 = ceil(74.52) + 1, ceil(sqrt(22801) - 1) + 1
    assert [ct.schedule(k, 6000)[0] for k in (0, 1500, 6000)] == [2, 76, 151]
    assert ct.schedule(0, 6000)[1] == pytest.approx(0.9)
    assert ct.schedule(4, 4)[1] == pytest.approx(math.exp(2 * math.log(0.9) / 151))
    grid = ct.make_grid(3)
    # (0.002^(1/7) + 80^(1/7)) / 2 = (0.411564 + 1.870171) / 2 = 1.140867, to the 7th 2.5153
    assert grid.tolist() == [0.002, pytest.approx(2.5153, rel=1e-3), 80]


def test_f_is_the_identity_at_sigma_min_and_scaled_elsewhere():
    x, y, seen = 5 * torch.randn(3, 1, 8, 8), torch.zeros(3, dtype=torch.long), []
    low = ct.make_grid(151)[:1].expand(3)
    assert torch.equal(ct.consistency(lambda x, t, y: 1e6 * torch.ones_like(x), x, low, y, 0.6), x)
    f = ct.consistency(lambda x, t, y: seen.append((x, t)) or torch.ones_like(x), x,
                       torch.full((3,), 0.802, dtype=torch.float64), y, 0.6)
    # c_skip = 0.36 / (0.64 + 0.36), c_out = 0.6 * 0.8 / sqrt(0.643204 + 0.36)
    assert torch.allclose(f, 0.36 * x + 0.48 / math.sqrt(1.003204), atol=1e-5)
    assert torch.allclose(seen[0][0], x / math.sqrt(1.003204), atol=1e-5)
    assert torch.allclose(seen[0][1], torch.tensor(250 * math.log(0.802)))


def test_L_CM_sees_F_at_the_larger_sigma_only_and_the_target_nothing(weighed):
    losses, batch = tiny(b=0.3, lam=0.5, div_margin=1e-3)
    x0, y, eps, y_in, n, grid = batch
    total, base, loss_cm = losses(*batch)
    small, large = (sigma.float()[:, None, None, None] for sigma in (grid[n], grid[n + 1]))
    F, F_g = F_and_general(losses.unet, x0 + large * eps, grid[n + 1], y_in)
    d = (F - F_g).square().mean((1, 2, 3))
    expected = weighed(d, y, COUNTS, margin=1e-3).float()
    assert d.min() > 1e-3  # so that the fuse matters
    assert torch.allclose(loss_cm, expected, rtol=1e-4, atol=1e-6) and loss_cm.abs().min() > 0
    f = ct.consistency(losses.unet, x0 + large * eps, grid[n + 1], y_in, 0.6)
    f_target = ct.consistency(losses.target, x0 + small * eps, grid[n], y_in, 0.6)
    assert torch.allclose(base, (f - f_target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert torch.allclose(total, base.mean() + 0.5 * expected.mean(), rtol=1e-4)
    total.backward()
    assert all(p.grad is None for p in losses.target.parameters())
    for p in losses.target.parameters():
        p.data.mul_(2)
    _, other_base, same = losses(*batch)
    assert torch.equal(same, loss_cm) and not torch.allclose(other_base, base)
    losses.config.no_cm = True
    total, base, none = losses(*batch)
    assert torch.equal(base, other_base) and total == base.mean() and not none.any()


def test_theta_shares_its_dropout_masks_with_the_target_and_theta_g_its_own_unless_told():
    losses, batch = tiny(dropout=0.5)
    once = torch.full((9,), 1.5, dtype=torch.float64)
    base = losses.train()(*batch[:-1], once)[1]
    assert not base.any()  # of one sigma; theta^- has theta's weights
    assert losses(*batch)[2].abs().min() > 0  # though BA = 0
    losses.config.same_masks = True
    first, second = losses(*batch), losses(*batch)
    assert not first[2].any() and (first[1] != second[1]).all()


def test_held_out_measures_one_by_one(weighed):
    losses, _ = tiny(b=0.3)
    unet = losses.unet.requires_grad_(False)
    labels = torch.arange(4).repeat_interleave(3)
    data = SimpleNamespace(
        images=torch.zeros(1), held_out=torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8),
        held_out_labels=labels, names="abcd", counts=torch.tensor(COUNTS))
    found = ct.held_out(unet, data, configured(lam=0.5), 0.6, 2, 3)
    # three times the first two of each class, at pairs 3, 10 and 16
    eps = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    which = torch.tensor([0, 1, 3, 4, 6, 7, 9, 10]).repeat(3)
    n = torch.tensor([3, 10, 16]).repeat_interleave(8)
    y, x0, sigmas = labels[which], data.held_out[which] / 127.5 - 1, ct.make_grid(21)
    noisy = [x0 + sigmas[k].float()[:, None, None, None] * eps for k in (n, n + 1)]
    target, f = (ct.consistency(unet, x, sigmas[k], y, 0.6)
                 for x, k in zip(noisy, (n, n + 1), strict=True))
    base = (f - target).square().mean((1, 2, 3))
    F, F_g = F_and_general(unet, noisy[1], sigmas[n + 1], y)
    shares = 0.5 * weighed((F - F_g).square().mean((1, 2, 3)), y, COUNTS).abs()
    assert found["held-out loss Few"] == pytest.approx(base[y >= 2].mean().item(), rel=1e-4)
    share = (shares.mean() / (shares + base).mean()).item()
    assert found["held-out share"] == pytest.approx(share, rel=1e-4)


class Line(nn.Sequential):
    """F of one number and its time."""

    def __init__(self):
        super().__init__(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(),
                         nn.Linear(32, 1))

    def forward(self, x, t, y):
        return super().forward(torch.cat([x.flatten(1), t[:, None] / 1000], 1))[..., None, None]


def train_line(steps, path, monkeypatch):
    """Consistency training of a Line on numbers of mean -0.3 and spread 0.5: its average."""
    monkeypatch.setattr(cm, "make_unet", lambda *_: Line())
    data = SimpleNamespace(
        images=torch.zeros(1, 1, 1, 1), counts=torch.tensor([1, 1]), names="ab",
        batch=lambda size, *_: (-0.3 + 0.5 * torch.randn(size, 1, 1, 1),
                                torch.zeros(size, dtype=torch.long)))
    config = dataclasses.replace(cm.Config(no_cm=True).resolved(), steps=steps, batch_size=128,
                                 lr=1e-2, warmup=20)
    return ct.train(config, data, 0.5, path, "")


def test_on_a_gaussian_f_becomes_the_closed_form(tmp_path, monkeypatch):
    net = train_line(1000, tmp_path / "x.pt", monkeypatch)
    torch.manual_seed(1)
    sigma = ct.make_grid(151)[torch.randint(151, (2000,))]
    x = -0.3 + torch.randn(2000) * (0.25 + sigma.float()**2).sqrt()
    f = ct.consistency(net, x[:, None, None, None], sigma, None, 0.5).flatten()
    exact = -0.3 + (x + 0.3) * ((0.25 + 0.002**2) / (0.25 + sigma.float()**2)).sqrt()
    error = (f - exact).square().mean().sqrt() / 0.5
    assert error < 0.2, error  # a fifth of the data's spread; 1 is the error of the mean alone


def test_the_target_moves_with_mu(tmp_path, monkeypatch):
    seen, forward = [], ct.ConsistencyTraining.forward
    monkeypatch.setattr(ct.ConsistencyTraining, "forward", lambda self, *batch: (
        seen.append([[p.detach().clone() for p in m.parameters()]
                     for m in (self.unet, self.target)]), forward(self, *batch))[1])
    train_line(3, tmp_path / "x.pt", monkeypatch)
    assert all(map(torch.equal, *seen[0]))
    # N at k = 0 and 1 of 3: 2, ceil(sqrt(437 / 3 + 4) - 1) + 1 = 13
    for step, decay in ((1, 0.9), (2, 0.9**(2 / 13))):
        for p, q, before in zip(*seen[step], seen[step - 1][1], strict=True):
            assert torch.allclose(q, decay * before + (1 - decay) * p, atol=1e-6)


def test_one_and_two_steps_from_noise_of_each_image():
    times, seeds, y = [], [7, 8], torch.tensor([0, 1])
    network = lambda x, t, y: times.append(t) or torch.zeros_like(x)
    both = ct.sample(network, (1, 4, 4), 2, 0.5, y, seeds)
    g = torch.Generator().manual_seed(8)
    first, second = (torch.randn(1, 4, 4, generator=g) for _ in "ab")
    x = 0.25 / ((80 - 0.002)**2 + 0.25) * 80 * first
    assert torch.allclose(ct.sample(network, (1, 4, 4), 1, 0.5, y, seeds)[1], x, atol=1e-6)
    x = 0.25 / (0.798**2 + 0.25) * (x + math.sqrt(0.8**2 - 0.002**2) * second)
    assert torch.allclose(both[1], x.clamp(-1, 1), atol=1e-5)
    assert torch.allclose(times[1], torch.tensor(250 * math.log(0.8)))
    assert torch.equal(ct.sample(network, (1, 4, 4), 2, 0.5, y[1:], seeds[1:])[0], both[1])


ARGS = ["--n-max", "8", "--ir", "2", "--image-size", "8", "--channels", "8",
        "--multipliers", "1", "2", "--rank-ratio", "0.25", "--batch-size", "4", "--steps", "3",
        "--num-images", "20", "--seeds", "5", "--runs", "runs", "--rows", "rows.csv",
        "--assets", "."]


def test_a_miniature_stopped_and_resumed_ends_bit_for_bit(
        stopped_and_whole, fewer_images, monkeypatch):
    fewer_images(20, 4)
    monkeypatch.setattr(shared, "scores", lambda file, config, device, cache, names: (
        dict.fromkeys(names, float(fid.read_images(file)[0].float().mean()))))
    seen, forward = {True: [], False: []}, ct.ConsistencyTraining.forward

    def recorded(self, *batch):
        result = forward(self, *batch)
        seen[self.config.no_cm].append(result[1].mean().item())
        return result

    monkeypatch.setattr(ct.ConsistencyTraining, "forward", recorded)
    out = stopped_and_whole(ct.main, ARGS, (cm, "update", 5))  # CM's second step
    assert "CM − (CT)" in out and Path("consistency.png").is_file()
    assert len(list(Path("runs").glob("*.npz"))) == 4
    assert "--warmup 100 --num-images 20" in Path("rows.csv").read_text()
    assert seen[True][0] == seen[False][0]  # CT's and CM's first: batch, noise and masks
