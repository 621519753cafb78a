"""Tests of consistency.py. They need pandas and tabulate."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm
import fid

pd = pytest.importorskip("pandas")
pytest.importorskip("tabulate")
from experiments import common  # noqa: E402
from experiments.settings.consistency import __main__ as ct  # noqa: E402

torch.set_num_threads(1)  # results repeat with as many threads
ARGS = ["--n-max", "8", "--ir", "2", "--image-size", "8", "--channels", "8",
        "--multipliers", "1", "2", "--rank-ratio", "0.25", "--batch-size", "4", "--steps", "3",
        "--num-images", "100", "--seeds", "5", "--runs", "runs", "--rows", "rows.csv",
        "--assets", "."]


def configured(**options):
    return cm.Config(image_size=8, channels=8, multipliers=(1, 2), **options).resolved()


def weighed(d, y, margin):
    """L_CM by the authors' weights, with the fuse, for distances d of classes y."""
    n = torch.tensor([40, 10, 5, 2.0])
    w = (4 * n / n.sum() - 0.2 * 4 / (n * (1 / n).sum()))[y]
    return torch.where(w > 0, w * d, w * d.clamp(max=margin))


def tiny(dropout=0.0, b=0.0, **options):
    """ConsistencyTraining of a small UNet, B of spread b, and a batch of 6 with grid(9)."""
    torch.manual_seed(0)
    unet = cm.UNet(4, 1, 8, 8, (1, 2), 1, (), dropout)
    cm.reserve_capacity(unet.decoder, 0.25)
    for name, p in unet.named_parameters():
        p.data.add_((b if name.endswith(".B") else 0.1) * torch.randn_like(p))
    losses = ct.ConsistencyTraining(unet, [40, 10, 5, 2], configured(**options), 0.6)
    y = torch.tensor([0, 1, 2, 3, 3, 0])
    batch = (torch.randn(6, 1, 8, 8), y, torch.randn(6, 1, 8, 8), torch.where(y == 2, -1, y),
             torch.tensor([0, 1, 3, 5, 7, 7]), ct.make_grid(9))
    return losses, batch


def test_schedule_and_grid_at_values_worked_by_hand(monkeypatch):
    # s_1 = 20: ceil(sqrt(437 / 4 + 4) - 1) + 1 = ceil(9.64) + 1, ceil(sqrt(441) - 1) + 1
    assert [ct.schedule(k, 6000)[0] for k in (0, 1500, 6000)] == [2, 11, 21]
    monkeypatch.setattr(ct, "S_1", 150)  # Song's
    # N: 2, ceil(sqrt(22797 / 4 + 4) - 1) + 1 = ceil(74.52) + 1, ceil(sqrt(22801) - 1) + 1
    assert [ct.schedule(k, 6000)[0] for k in (0, 1500, 6000)] == [2, 76, 151]
    assert ct.schedule(0, 6000)[1] == pytest.approx(0.9)
    assert ct.schedule(4, 4)[1] == pytest.approx(math.exp(2 * math.log(0.9) / 151))
    grid = ct.make_grid(3)
    assert grid[0] == 0.002 and grid[2] == 80
    # (0.002^(1/7) + 80^(1/7)) / 2 = (0.411564 + 1.870171) / 2 = 1.140867, to the 7th 2.5153
    assert grid[1].item() == pytest.approx(2.5153, rel=1e-3)


def test_f_is_the_identity_at_sigma_min_and_scaled_elsewhere():
    x, y = 5 * torch.randn(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
    seen = []

    def network(x, t, y):
        seen.append((x, t))
        return 1e6 * torch.ones_like(x)

    low = torch.full((3,), 0.002, dtype=torch.float64)
    assert torch.equal(ct.consistency(network, x, low, y, 0.6), x)
    assert torch.equal(ct.consistency(network, x, ct.make_grid(151)[:1].expand(3), y, 0.6), x)
    f = ct.consistency(lambda x, t, y: seen.append((x, t)) or torch.ones_like(x), x,
                       torch.full((3,), 0.802, dtype=torch.float64), y, 0.6)
    # c_skip = 0.36 / (0.64 + 0.36), c_out = 0.6 * 0.8 / sqrt(0.643204 + 0.36)
    assert torch.allclose(f, 0.36 * x + 0.48 / math.sqrt(1.003204), atol=1e-5)
    assert torch.allclose(seen[2][0], x / math.sqrt(1.003204), atol=1e-5)
    assert torch.allclose(seen[2][1], torch.tensor(250 * math.log(0.802)))
    assert torch.allclose(seen[0][1], torch.tensor(250 * math.log(0.002)))


def test_the_unet_takes_negative_times():
    losses, _ = tiny()
    x, times = torch.randn(2, 1, 8, 8), torch.tensor([-1553.65, 1095.5])
    out = losses.unet(x, times, torch.tensor([0, 0]))
    assert out.isfinite().all()
    assert not torch.allclose(out[:1], losses.unet(x[:1], -times[:1], torch.tensor([0])))


def test_without_BA_and_with_shared_masks_loss_and_general_gradients_are_the_plain_steps():
    losses, batch = tiny(dropout=0.3, same_masks=True)
    plain = ct.ConsistencyTraining(cm.merge(losses.unet), [40, 10, 5, 2], configured(no_cm=True),
                                   0.6)
    totals = []
    for module in (losses.train(), plain.train()):
        torch.manual_seed(3)
        totals.append(module(*batch)[0])
        totals[-1].backward()
    assert torch.equal(*totals)
    mine = {n.replace(".layer.", "."): p.grad for n, p in losses.unet.named_parameters()}
    for name, p in plain.unet.named_parameters():
        assert p.grad.abs().sum() > 0 or name.endswith("k.bias"), name
        assert torch.allclose(mine[name], p.grad, rtol=1e-5, atol=1e-7), name


def test_theta_g_draws_masks_of_its_own():
    for same in (False, True):
        losses, batch = tiny(dropout=0.3, same_masks=same)
        loss_cm = losses.train()(*batch)[2]
        assert (loss_cm == 0).all() if same else loss_cm.abs().min() > 0


def test_L_CM_sees_F_at_the_larger_sigma_only_and_the_target_nothing():
    losses, batch = tiny(b=0.3, lam=0.5, div_margin=1e-3)
    x0, y, eps, y_in, n, grid = batch
    total, base, loss_cm = losses(*batch)
    sigma = grid[n + 1].float()[:, None, None, None]
    x = (x0 + sigma * eps) / (sigma**2 + 0.36).sqrt()
    time = 250 * grid[n + 1].log().float()
    F = losses.unet(x, time, y_in)
    with cm.general_only(losses.unet):
        F_g = losses.unet(x, time, y_in)
    d = (F - F_g).square().mean((1, 2, 3))
    expected = weighed(d, y, 1e-3)
    assert d.min() > 1e-3  # so that the fuse matters
    assert torch.allclose(loss_cm, expected, rtol=1e-4, atol=1e-6) and loss_cm.abs().min() > 0
    small = grid[n].float()[:, None, None, None]
    f = ct.consistency(losses.unet, x0 + sigma * eps, grid[n + 1], y_in, 0.6)
    f_target = ct.consistency(losses.target, x0 + small * eps, grid[n], y_in, 0.6)
    assert torch.allclose(base, (f - f_target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert torch.allclose(total, base.mean() + 0.5 * expected.mean(), rtol=1e-4)
    total.backward()
    assert all(p.grad is None for p in losses.target.parameters())
    for p in losses.target.parameters():
        p.data.mul_(2)
    _, other_base, same = losses(*batch)
    assert torch.equal(same, loss_cm) and not torch.allclose(other_base, base)


def test_neighbours_of_one_sigma_agree_under_dropout():
    losses, (x0, y, eps, y_in, n, _) = tiny(dropout=0.5)
    losses.train()
    once = torch.full((9,), 1.5, dtype=torch.float64)
    base = losses(x0, y, eps, y_in, n, once)[1]
    assert torch.equal(base, torch.zeros_like(base))  # theta^- has theta's weights and its masks


def test_held_out_measures_one_by_one():
    losses, _ = tiny(b=0.3)
    labels = torch.arange(4).repeat_interleave(3)
    data = SimpleNamespace(
        images=torch.zeros(1), held_out=torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8),
        held_out_labels=labels, names="abcd", counts=torch.tensor([40, 10, 5, 2]))
    found = ct.held_out(losses.unet, data, configured(lam=0.5), 0.6, 2, 3)
    eps = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    base, few, shares = [], [], []
    with torch.no_grad():
        for i in range(24):  # three times the first two of each class, at pairs 3, 10 and 16
            which, n = [0, 1, 3, 4, 6, 7, 9, 10][i % 8], (3, 10, 16)[i // 8]
            y, x0 = labels[which:which + 1], data.held_out[which:which + 1] / 127.5 - 1
            small, large = ct.make_grid(21)[n:n + 2].split(1)
            f, target = (ct.consistency(losses.unet, x0 + sigma.float() * eps[i], sigma, y, 0.6)
                         for sigma in (large, small))
            base.append((f - target).square().mean().item())
            few += base[-1:] if y.item() in (2, 3) else []
            x = (x0 + large.float() * eps[i]) / (large.float()**2 + 0.36).sqrt()
            F = losses.unet(x, 250 * large.log().float(), y)
            with cm.general_only(losses.unet):
                F_g = losses.unet(x, 250 * large.log().float(), y)
            d = (F - F_g).square().mean((1, 2, 3))
            shares.append(0.5 * weighed(d, y, 0.1).abs().item())
    assert found["held-out loss Few"] == pytest.approx(sum(few) / len(few), rel=1e-4)
    share = sum(shares) / (sum(shares) + sum(base))
    assert len(few) == 12 and found["held-out share"] == pytest.approx(share, rel=1e-4)


def test_table_by_hand():
    columns = [f"FD {s}" for s in ct.SPLITS] + ["held-out loss Few", "held-out share"] + [
        f"share {t}" for t in ct.TENTHS]
    rows = pd.DataFrame([{"method": method, "seed": seed, "sampler steps": steps} | {
        name: (1 if method == "CT" else 3) * seed + steps for name in columns}
        for method in ct.METHODS for seed in (1, 2) for steps in (1, 2)])
    shown = ct.table(rows)
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in shown.splitlines() if line.startswith("|")]
    assert [line[:4] for line in lines[2:6]] == [
        ["1", "CT", "2", "2.5 ± 0.7"], ["1", "CM", "2", "5.5 ± 2.1"],
        ["2", "CT", "2", "3.5 ± 0.7"], ["2", "CM", "2", "6.5 ± 2.1"]]
    # CM - CT is 2 and 4: mean 3, t(0.975, 1) = 12.706, standard error 1
    assert lines[8] == ["1", *4 * ["+3.0 [-9.7, +15.7]"], "+3.00000 [-9.70620, +15.70620]"]
    assert shown.startswith("exploratory: 2 seeds; ")
    assert lines[13] == ["1", "7", "6.500 ± 2.121"] and lines[22][:2] == ["10", "21"]


class Line(nn.Module):
    """F of one number and its time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(),
                                    nn.Linear(32, 1))

    def forward(self, x, t, y):
        return self.layers(torch.cat([x.flatten(1), t[:, None] / 1000], 1))[:, :, None, None]


class Gaussian(SimpleNamespace):
    """Numbers of mean -0.3 and spread 0.5, in place of cm.Data."""

    images, counts, names = torch.zeros(1, 1, 1, 1), torch.tensor([1, 1]), ["a", "b"]

    def batch(self, size, resample, flip):
        return -0.3 + 0.5 * torch.randn(size, 1, 1, 1), torch.zeros(size, dtype=torch.long)


def gaussian_config(**options):
    return dataclasses.replace(cm.Config(no_cm=True).resolved(), **dict(
        steps=1000, batch_size=128, lr=1e-2, warmup=20) | options)


def test_on_a_gaussian_f_becomes_the_closed_form(tmp_path):
    ema, _ = ct.train(gaussian_config(), Gaussian(), 0.5, tmp_path / "x.pt", "",
                      lambda *_: Line())
    torch.manual_seed(1)
    sigma = ct.make_grid(151)[torch.randint(151, (2000,))]
    x = -0.3 + torch.randn(2000) * (0.25 + sigma.float()**2).sqrt()
    f = ct.consistency(ema, x[:, None, None, None], sigma, None, 0.5).flatten()
    exact = -0.3 + (x + 0.3) * ((0.25 + 0.002**2) / (0.25 + sigma.float()**2)).sqrt()
    error = (f - exact).square().mean().sqrt() / 0.5
    assert error < 0.2, error  # a fifth of the data's spread; 1 is the error of the mean alone


def test_the_target_moves_with_mu_and_the_average_with_cms_decay(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ct.common, "train", lambda step, state, *_: [
        (step(i), seen.append([[p.detach().clone() for p in m.parameters()] for m in (
            state["losses"].unet, state["losses"].target, state["ema"])])) for i in (1, 2, 3)])
    ct.train(gaussian_config(steps=3), Gaussian(), 0.5, tmp_path / "x.pt", "", lambda *_: Line())
    for i in (2, 3):
        size = {2: 13, 3: 18}[i]  # ceil(sqrt(437 (i - 1) / 3 + 4) - 1) + 1
        assert ct.schedule(i - 1, 3)[0] == size
        theta, target, ema = seen[i - 1]
        for kind, mine, decay in ((1, target, 0.9**(2 / size)), (2, ema, (1 + i) / (10 + i))):
            for p, q, before in zip(theta, mine, seen[i - 2][kind], strict=True):
                assert torch.allclose(q, decay * before + (1 - decay) * p, atol=1e-6)


def test_one_and_two_steps_from_noise_of_each_image():
    calls = []

    def network(x, t, y):
        calls.append((x, t))
        return torch.zeros_like(x)

    seeds, y = [7, 8], torch.tensor([0, 1])
    both = ct.sample(network, y, (1, 4, 4), 2, 0.5, seeds)
    g = torch.Generator().manual_seed(8)
    first, second = (torch.randn(1, 4, 4, generator=g) for _ in "ab")
    x = 0.25 / ((80 - 0.002)**2 + 0.25) * 80 * first
    assert torch.allclose(ct.sample(network, y, (1, 4, 4), 1, 0.5, seeds)[1], x, atol=1e-6)
    x = 0.25 / (0.798**2 + 0.25) * (x + math.sqrt(0.8**2 - 0.002**2) * second)
    assert torch.allclose(both[1], x.clamp(-1, 1), atol=1e-5)
    assert torch.allclose(calls[1][1], torch.tensor(250 * math.log(0.8)))
    assert torch.equal(ct.sample(network, y[1:], (1, 4, 4), 2, 0.5, seeds[1:])[0], both[1])


def fake_scores(path, dataset, data, features, **_):
    assert (dataset, data, features) == ("fashion16", None, "classifier")
    images, labels, counts = fid.read_images(path)
    assert labels.bincount().tolist() == [10] * 10 and len(counts) == 10
    return {s: {"FD": images.float().mean().item()} for s in ct.SPLITS}


def test_a_miniature_stopped_and_resumed_ends_bit_for_bit(kills_at, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "evaluate", fake_scores)
    results, seen, sampled = {}, {True: [], False: []}, []
    forward, sample = ct.ConsistencyTraining.forward, ct.sample

    def recorded(self, *batch):
        result = forward(self, *batch)
        seen[self.no_cm].append((result[1].mean().item(), result[2].abs().mean().item()))
        return result

    monkeypatch.setattr(ct.ConsistencyTraining, "forward", recorded)
    monkeypatch.setattr(ct, "sample", lambda *a: sampled.append((a[3:], a[1])) or sample(*a))
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(cm, "update", kills_at(5, cm.update))  # CM's second step
                with pytest.raises(SystemExit) as stopped:
                    ct.main(ARGS)
            assert stopped.value.code == 130
            assert len(Path("rows.csv").read_text().splitlines()) == 3
        capsys.readouterr()
        assert ct.main(ARGS) == 0
        results[name] = (Path("rows.csv").read_bytes(), capsys.readouterr().out, torch.load(
            "runs/CM-5/CM-5.pt")["state"]["ema"])
        assert Path("consistency.png").is_file()
    rows, out, weights = results["whole"]
    assert results["stopped"][:2] == (rows, out)
    assert all(torch.equal(p, results["stopped"][2][n]) for n, p in weights.items())
    assert "exploratory: 1 seeds" in out and "CM − CT" in out and len(rows.splitlines()) == 5

    ct_losses, cm_losses = seen[True], seen[False]  # three steps first, then held-out images
    assert ct_losses[0][0] == cm_losses[0][0]  # same weights, batch, noise and masks
    table = common.numbers(common.read_rows(Path("rows.csv")), ("method", "options"))
    shares = table[table["method"] == "CM"].iloc[0]
    for step, tenth in ((1, 1), (2, 4), (3, 7)):
        base, weighed = cm_losses[step - 1]
        assert shares[f"share {tenth}"] == pytest.approx(weighed / (base + weighed), rel=1e-4)
    config = cm.parse([*ARGS[:-10], "--batch-size", "4"])[0].resolved()
    sigma_data = cm.to_float(cm.Data(config).images).std().item()
    seeds = [cm.hashed_seed("image", 5, i) for i in range(100)]
    assert len(sampled) == 8  # one and two steps of CT and CM, whole and stopped
    for (steps, sigma, of_image), y in sampled:
        assert sigma == pytest.approx(sigma_data) and of_image == seeds and steps in (1, 2)
        assert torch.equal(y, torch.arange(100) % 10)
    assert ct.main([*ARGS, "--table"]) == 0 and capsys.readouterr().out == out


@pytest.mark.parametrize("arguments, says", [
    ("--num-images 9", "--num-images"), ("--seeds -1", "--seeds"), ("--seeds x", "invalid int"),
    ("--seeds 5 5", "different numbers"), ("--rows .", "directory"),
    ("--base oc", "--base has no meaning"), ("--sampler dpm", "--sampler has no meaning"),
    ("--rank-ratio 2", "rank-ratio"), ("--data none", "none"), ("--table", "has no rows")])
def test_bad_input_is_one_line_and_status_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ct.main(["--rows", "rows.csv", "--assets", ".", *arguments.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
