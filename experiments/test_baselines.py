"""Tests of baselines.py: each against a writing of its own, then in runs of cm.py."""

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import cm
from experiments import baselines

MINIATURE = ["--channels", "8", "--multipliers", "1", "2", "--image-size", "8", "--batch-size", "8",
             "--rank-ratio", "0.5", "--warmup", "1", "--log-every", "2", "--device", "cpu"]
COUNTS = [5, 40, 2, 10]  # Many: 1, Medium: 3, Few: 0 and 2
GROUP = {1: 0, 3: 1, 0: 2, 2: 2}


def configure(*flags):
    return cm.parse([*MINIATURE, *flags])[0].resolved()


def tiny(losses, network, *flags, dtype=torch.float64, dropout="0"):
    """Losses of a small network for COUNTS, all weights (B too) off their initial values."""
    config = configure("--dropout", dropout, *flags)
    torch.manual_seed(0)
    unet = network(config, len(COUNTS), 1).to(dtype)
    for p in unet.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return losses.from_config(unet, torch.tensor(COUNTS), config)


def batch(dtype=torch.float64):
    """x0, y, t, eps, y_in; each class at two times, once without its label."""
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 8, 1, 8, 8, generator=g, dtype=dtype)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    t = torch.tensor([0, 3, 100, 250, 400, 600, 800, 999])
    return x0, y, t, eps, torch.where(torch.arange(8) == 5, -1, y)


def noised(x0, t, eps):
    """x_t with the schedule written anew: betas linear from 1e-4 to 0.02."""
    a = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.numpy()]).view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def same_gradients(loss, other_loss, parameters, other_parameters=None, rtol=1e-5):
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(other_loss, other_parameters or parameters, allow_unused=True)
    assert any(g is not None for g in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # a key's bias moves no attention: its gradient is 0 but for rounding
            atol = rtol * float(b.abs().max()) + (1e-15 if a.dtype == torch.float64 else 1e-8)
            assert torch.allclose(a.double(), b.double(), rtol, atol)


# ------------------------------------------------------------------------------------------------
# CM taken apart


N = np.array(COUNTS, float)
W = 4 * N / N.sum() - 0.2 * 4 * (1 / N) / (1 / N).sum()  # Eq. (3)


@pytest.mark.parametrize("losses, weights", [
    (cm.CapacityManipulation, W), (baselines.UniformWeights, np.full(4, W @ N / N.sum()))])
def test_agreement_of_a_plain_network_and_its_gradients(losses, weights):
    """Two passes of one network, no BA; d is of the dropout masks alone."""
    module = tiny(losses, baselines.plain_unet, dropout="0.5")
    assert not cm.reserved_layers(module)
    x0, y, t, eps, y_in = batch()
    assert torch.allclose(module.w.double(), torch.tensor(weights))
    torch.manual_seed(3)
    module.div_margin = margin = float(module(x0, y, t, eps, y_in)[3][y == 2].mean())
    torch.manual_seed(3)
    total, base, loss_cm, d = module(x0, y, t, eps, y_in)
    assert (d > 0).all() and {True, False} == set((d[y == 2] > margin).tolist())

    x_t = noised(x0, t, eps)
    torch.manual_seed(3)
    first, second = module.unet(x_t, t, y_in), module.unet(x_t, t, y_in)
    expected = 0
    for i, k in enumerate(y.tolist()):
        loss = (first[i] - eps[i]).square().mean()
        apart = (first[i] - second[i]).square().mean()
        assert torch.isclose(base[i], loss, 1e-5) and torch.isclose(d[i], apart, 1e-5)
        if weights[k] < 0 and apart > margin:
            apart = torch.tensor(margin)
        expected = expected + (loss + weights[k] * apart) / len(y)
    assert torch.isclose(total, expected, 1e-6)
    same_gradients(total, expected, list(module.unet.parameters()))


def test_capacity_alone_sees_nothing_where_ba_is_zero():
    module = tiny(cm.CapacityManipulation, cm.make_unet, "--same-masks", dropout="0.5")
    assert (module(*batch())[3] > 0).all()
    for layer in cm.reserved_layers(module):
        nn.init.zeros_(layer.B)
    first, second = module(*batch()), module(*batch())
    assert not first[3].any() and not second[3].any()
    assert (first[1] != second[1]).all()  # masks are new at each step


def test_two_passes_and_their_gradients():
    module = tiny(baselines.TwoPasses, cm.make_unet, "--no-cm", dropout="0.5")
    x0, y, t, eps, y_in = batch()
    torch.manual_seed(3)
    total, base, loss_cm, d = module(x0, y, t, eps, y_in)
    torch.manual_seed(3)
    passes = torch.stack([module.unet(noised(x0, t, eps), t, y_in) for _ in range(2)])
    expected = (passes - eps).square().mean((0, 2, 3, 4))
    assert torch.allclose(base, expected, 1e-5) and not loss_cm.any() and not d.any()
    assert (passes[0] != passes[1]).flatten(1).any(1).all()
    assert torch.isclose(total, expected.mean(), 1e-6)
    same_gradients(total, expected.mean(), list(module.unet.parameters()))


# ------------------------------------------------------------------------------------------------
# Overlap


def step_kl(eps, eps_other, t):
    """KL of one step of Algorithm C.1 under two predictions of one image, in nats a pixel value."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha, alpha_bar = 1 - betas[t], torch.cumprod(1 - betas, 0)[t]
    steps = [Normal((0 - betas[t] / (1 - alpha_bar).sqrt() * e) / alpha.sqrt(), betas[t].sqrt())
             for e in (eps, eps_other)]
    return kl_divergence(*steps).sum() / eps.numel()


@pytest.mark.parametrize("gamma, share", [(3.0, 1), (0.5, 0.5), (0.5, 0)])
def test_overlap_and_its_gradients_against_plain_loops(gamma, share):
    losses = tiny(baselines.Overlap, cm.make_unet, "--no-cm")
    x0, y, t, eps, y_in = batch()
    y_other = torch.tensor([3, 0, 1, 2, 1, 2, 0, 2])
    losses.other_classes = lambda labels: y_other if torch.equal(labels, y) else None
    margin = 1.01 * float(losses(x0, y, t, eps, y_in)[3].quantile(share)) if share else 0.0
    losses.gamma, losses.margin = gamma, margin
    total, base, overlap, kl = losses(x0, y, t, eps, y_in)

    x_t, expected = noised(x0, t, eps), []
    for i in range(len(y)):
        one = slice(i, i + 1)
        eps_theta = losses.unet(x_t[one], t[one], y_in[one])
        eps_other = losses.unet(x_t[one], t[one], y_other[one])
        expected_kl = step_kl(eps_theta, eps_other, t[i])
        assert torch.isclose(kl[i], expected_kl, 1e-5) and not kl.requires_grad
        loss = (eps_theta - eps[one]).square().mean()
        assert torch.isclose(base[i], loss, 1e-5)
        pushed = gamma * (margin - expected_kl) if expected_kl < margin and i != 5 else 0 * loss
        assert torch.isclose(overlap[i], pushed, 1e-5)
        expected.append(loss + pushed)
    pushes = int((overlap > 0).sum())  # the sample without its label is never pushed
    assert pushes == 7 if share == 1 else 0 < pushes < 7 if share else pushes == 0
    assert torch.isclose(total, sum(expected) / len(y), 1e-6)
    same_gradients(total, sum(expected) / len(y), list(losses.unet.parameters()))


def test_overlaps_other_class_is_uniform_over_the_others():
    losses = tiny(baselines.Overlap, cm.make_unet, "--no-cm")
    torch.manual_seed(0)
    y = torch.arange(40_000) % 4
    drawn = torch.zeros(4, 4).index_put_((y, losses.other_classes(y)), torch.ones(len(y)), True)
    assert not drawn.diagonal().any()
    assert (drawn[~torch.eye(4, dtype=bool)] / 10_000 - 1 / 3).abs().max() < 0.025  # 5 sigma


def test_overlap_draws_the_same_masks_for_both_classes():
    losses = tiny(baselines.Overlap, cm.make_unet, "--no-cm", dropout="0.5")
    nn.init.zeros_(losses.unet.label_embedding.weight)
    torch.manual_seed(0)
    _, first, overlap, kl = losses(*batch())
    second = losses(*batch())[1]
    assert not kl.any() and (first != second).all()
    expected = torch.full((8,), losses.gamma * losses.margin, dtype=overlap.dtype)
    expected[5] = 0  # its label is dropped
    assert torch.allclose(overlap, expected)


# ------------------------------------------------------------------------------------------------
# ADA


CHANGES = ("flip_x", "flip_y", "scale", "angle", "stretch", "axis", "right", "down")
ALL, PIXEL = slice(None), 8 / 9  # a shift of one of nine pixels
HALF = slice(2, 7), slice(None, None, 2)  # of an image at half size, and of the whole one


@pytest.mark.parametrize("values, expected, rows, columns", [
    (dict(flip_x=1), lambda x: x.flip(3), ALL, ALL),
    (dict(flip_y=1), lambda x: x.flip(2), ALL, ALL),
    (dict(angle=math.pi / 2), lambda x: x.rot90(-1, (2, 3)), ALL, ALL),  # clockwise
    (dict(right=2 * PIXEL), lambda x: x[..., :-2], ALL, slice(2, None)),
    (dict(right=2 * PIXEL), lambda x: x[..., [1, 0]], ALL, slice(2)),  # mirrored at the border
    (dict(down=-3 * PIXEL), lambda x: x[:, :, 3:], slice(-3), ALL),
    (dict(scale=-5), lambda x: x[..., ::2, ::2], HALF[0], HALF[0]),
    (dict(stretch=-5), lambda x: x[..., HALF[0], ::2], HALF[1], HALF[0]),  # half as wide
    (dict(stretch=-5, axis=math.pi / 2), lambda x: x[..., ::2, HALF[0]], HALF[0], HALF[1])])
def test_ada_moves_pixels_as_its_changes_say(values, expected, rows, columns):
    images = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changes = torch.zeros(8, 3)
    for name, value in values.items():
        changes[CHANGES.index(name)] = value
    warped = baselines.warp(images, changes)[..., rows, columns]
    exact = values.keys() <= {"flip_x", "flip_y"}
    assert torch.allclose(warped, expected(images), 0, 0 if exact else 1e-5)


def test_ada_leaves_images_without_a_change_as_they_are():
    torch.manual_seed(0)
    x, changes = torch.randn(200, 1, 9, 9), baselines.draw_changes(200, True)
    warped, told = baselines.warp(x, changes), baselines.numbers(changes)
    same, moved = ~changes.any(0), (changes[2:] != 0).any(0)
    assert same.any() and torch.equal(warped[same], x[same])
    assert 50 < moved.sum() < 150
    assert (warped[moved] != x[moved]).flatten(1).any(1).all()
    assert torch.equal((told != 0).any(1), ~same)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(baselines.warp(x, changes), warped)


def plain_warp(image, flip_x, flip_y, scale, angle, stretch, axis, right, down):
    """`warp` for one float64 image [H, H], pixel by pixel, each change undone in turn."""
    side = len(image)

    def weight(distance):  # cubic convolution (Keys 1981), a = -3/4
        x, a = abs(distance), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0

    def mirrored(i):
        while not 0 <= i < side:
            i = -1 - i if i < 0 else 2 * side - 1 - i
        return i

    warped = np.zeros_like(image)
    for row in range(side):
        for column in range(side):
            x, y = column - (side - 1) / 2, row - (side - 1) / 2  # pixels from the centre
            x, y = x - right * side / 8, y - down * side / 8
            along = (x * math.cos(axis) + y * math.sin(axis)) / 2 ** (0.2 * stretch)
            across = (y * math.cos(axis) - x * math.sin(axis)) * 2 ** (0.2 * stretch)
            x = along * math.cos(axis) - across * math.sin(axis)
            y = along * math.sin(axis) + across * math.cos(axis)
            x, y = (x * math.cos(angle) + y * math.sin(angle),
                    y * math.cos(angle) - x * math.sin(angle))
            x, y = x / 2 ** (0.2 * scale), y / 2 ** (0.2 * scale)
            x, y = (-x if flip_x else x), (-y if flip_y else y)
            x, y = x + (side - 1) / 2, y + (side - 1) / 2
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    warped[row, column] += (weight(y - i) * weight(x - j)
                                            * image[mirrored(i), mirrored(j)])
    return warped


def plain_numbers(flip_x, flip_y, scale, angle, stretch, axis, right, down):
    return [flip_x, flip_y, scale, math.cos(angle) - 1, math.sin(angle),
            stretch * math.cos(axis), stretch * math.sin(axis), right, down]


def test_ada_and_its_gradients_against_plain_loops():
    losses = tiny(baselines.ADA, baselines.told_unet, "--no-cm", "--flip", dtype=torch.float32)
    changes = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    changes[:2] = (changes[:2] > 0).float()
    x0, y, t, eps, y_in = batch(dtype=torch.float32)
    with mock.patch.object(baselines, "draw_changes", return_value=changes) as draw:
        total, base, cm_loss, d = losses(x0, y, t, eps, y_in)
    assert torch.equal(total, base.mean()) and not cm_loss.any() and not d.any()
    assert draw.call_args.args[:2] == (8, True)
    assert losses.unet.numbers is None  # whoever calls the network next tells it nothing

    unet = copy.deepcopy(losses.unet).double()
    plain = cm.make_unet(configure("--no-cm", "--dropout", "0"), len(COUNTS), 1).double()
    plain.load_state_dict({k: p for k, p in unet.state_dict().items() if k != "told.weight"})
    expected = 0
    for i in range(len(y)):
        one, values = slice(i, i + 1), changes[:, i].double().tolist()
        warped = torch.tensor(plain_warp(x0[i, 0].double().numpy(), *values))[None, None]
        told = torch.tensor(plain_numbers(*values)).double()
        extra = sum(value * column for value, column in zip(told, unet.told.weight.T, strict=True))
        plain.embed = lambda t, y, extra=extra: cm.UNet.embed(plain, t, y) + extra
        x_t = noised(warped, t[one], eps[one].double())
        loss = (plain(x_t, t[one], y_in[one]) - eps[one]).square().mean()
        assert torch.isclose(base[i].double(), loss, 1e-4)
        expected = expected + loss / len(y)
    others = dict(plain.named_parameters()) | {"told.weight": unet.told.weight}
    same_gradients(total, expected, list(losses.unet.parameters()),
                   [others[name] for name, _ in losses.unet.named_parameters()], 1e-3)


def test_ada_draws_each_change_with_its_probability():
    n = 100_000
    torch.manual_seed(0)
    changes = baselines.draw_changes(n, True)
    flip_x, flip_y, scale, angle, stretch, axis, right, down = changes
    drawn = torch.stack([flip_x, flip_y, scale, angle, stretch, right]) != 0
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12])
    assert ((drawn.float().mean(1) - expected).abs() < 5 * (expected / n).sqrt()).all()
    assert (drawn.float().corrcoef() - torch.eye(6)).abs().max() < 5 / math.sqrt(n)
    assert torch.equal(stretch != 0, axis != 0) and torch.equal(right != 0, down != 0)
    assert set(changes[:2].unique().tolist()) == {0, 1}
    assert not baselines.draw_changes(1000, False)[0].any()
    assert not tiny(baselines.ADA, baselines.told_unet, "--no-cm", "--no-flip").flip
    for x in (x[x != 0] for x in (scale, stretch, right, down)):  # normal
        assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.04 and abs(x.pow(4).mean() - 3) < 0.5
    for x in (angle, axis):  # uniform
        x = x[x != 0]
        assert abs(x.mean()) < 0.1 and 3.1 < x.max() <= math.pi and -3.1 > x.min() >= -math.pi
        assert abs(x.var() - math.pi**2 / 3) < 0.1
    both = (angle != 0) & (stretch != 0) & (right != 0)
    pairs = changes[2:, both].corrcoef() - torch.eye(6)  # no two from one number
    assert pairs.abs().max() < 5 / math.sqrt(both.sum())


def test_without_numbers_adas_network_is_the_plain_one():
    config = configure("--no-cm", "--dropout", "0")
    told, plain = baselines.told_unet(config, 4, 1), cm.make_unet(config, 4, 1)
    nn.init.normal_(told.decoder[-1][-1].weight)
    plain.load_state_dict({k: p for k, p in told.state_dict().items() if k != "told.weight"})
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, -1])
    assert torch.equal(told(x, t, y), plain(x, t, y))
    told.numbers = baselines.numbers(torch.zeros(8, 2))
    assert not told.numbers.any() and torch.equal(told(x, t, y), plain(x, t, y))
    told.numbers = told.numbers + 1
    assert not torch.equal(told(x, t, y), plain(x, t, y))


# ------------------------------------------------------------------------------------------------
# Group-Expert LoRA


def plain_weights(unet, group):
    """The weights of a plain UNet that is `unet` for the samples of one group, None for none."""
    weights = {name: p for name, p in unet.named_parameters()
               if not any(part in name for part in (".A.", ".B.", ".layer."))}
    for name, m in unet.named_modules():
        if isinstance(m, baselines.GroupExperts):
            weight, r = m.layer.weight, m.A.weight.shape[0] // 3
            if group is not None:
                own = slice(group * r, (group + 1) * r)
                BA = m.B.weight.flatten(1)[:, own] @ m.A.weight.flatten(1)[own]
                weight = weight + BA.view_as(weight)
            weights |= {f"{name}.weight": weight, f"{name}.bias": m.layer.bias}
    return weights


def test_group_experts_and_their_gradients_against_plain_networks():
    losses = tiny(baselines.GroupExpertLoRA, baselines.group_expert_unet, "--no-cm")
    plain = cm.make_unet(configure("--no-cm", "--dropout", "0"), len(COUNTS), 1).double()
    x0, y, t, eps, y_in = batch()
    total, base, cm_loss, d = losses(x0, y, t, eps, y_in)
    assert not cm_loss.any() and not d.any()
    x_t, expected = noised(x0, t, eps), 0
    for i in range(len(y)):
        one = slice(i, i + 1)
        weights = plain_weights(losses.unet, None if i == 5 else GROUP[int(y[i])])
        eps_theta = torch.func.functional_call(plain, weights, (x_t[one], t[one], y_in[one]))
        loss = (eps_theta - eps[one]).square().mean()
        assert torch.isclose(base[i], loss, 1e-5)
        expected = expected + loss / len(y)
    assert torch.isclose(total, expected, 1e-6)
    same_gradients(total, expected, list(losses.unet.parameters()))


def test_experts_have_a_third_of_cms_rank_and_start_at_nothing():
    for ratio in ("0.9", "0.07"):
        flags = ["--rank-ratio", ratio, "--channels", "16"]
        reserved = dict(cm.make_unet(configure(*flags), 4, 1).named_modules())
        unet = baselines.group_expert_unet(configure("--no-cm", *flags), 4, 1)
        experts = {name: m for name, m in unet.named_modules()
                   if isinstance(m, baselines.GroupExperts)}
        assert list(experts) == [name for name, m in reserved.items()
                                 if isinstance(m, cm.LowRankReserved)]
        for name, m in experts.items():
            third = max(1, len(reserved[name].A) // 3)
            assert len(m.A.weight) == m.B.weight.shape[1] == 3 * third
            assert not m.B.weight.any() and m.A.weight.std() > 0 and m.A.bias is m.B.bias is None
    with pytest.raises(ValueError, match="no label to choose the expert"):
        baselines.group_expert_unet(configure("--no-cm", "--label-drop", "1"), 2, 1)


# ------------------------------------------------------------------------------------------------
# Runs of cm.py


def train(variation, out, *more):
    config, typed = cm.parse([*MINIATURE, *variation.flags.split(), "--out", str(out), *more])
    with mock.patch.object(cm, "report"):
        cm.train(config.resolved(), typed, variation.losses, variation.network)
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["agreement alone", "ADA", "Overlap", "Group-Expert LoRA"])
def test_a_variation_resumes_bit_for_bit_and_samples(name, tmp_path):
    variation = baselines.BASELINES[name]
    whole = train(variation, tmp_path / "whole", "--steps", "6")
    assert train(variation, tmp_path / "cut", "--steps", "3")["step"] == 3
    cut = train(variation, tmp_path / "cut", "--steps", "6", "--resume")
    same(cut["model"], whole["model"])
    same(cut["ema"], whole["ema"])
    same(cut["optimizer"]["state"], whole["optimizer"]["state"])

    path = str(tmp_path / "whole" / "checkpoint.pt")
    same(cm.load_trained(path, network=variation.network)[1].state_dict(), whole["ema"])
    sampling, _ = cm.parse(["--sample", path, "--num-images", "4", "--sample-steps", "2",
                            "--device", "cpu", "--out", str(tmp_path / "images.npz")])
    cm.generate(sampling, variation.network)
    assert np.load(tmp_path / "images.npz")["arr_0"].shape == (4, 8, 8, 1)
    if variation.network is not cm.make_unet:
        with pytest.raises(ValueError, match="another network"):
            cm.generate(sampling)
    if name == "Group-Expert LoRA":  # ten classes, the most frequent first; without a label: none
        of_group = [[1] * 3 + [0] * 8, [0] * 3 + [1] * 3 + [0] * 5, [0] * 6 + [1] * 4 + [0]]
        assert whole["ema"]["router"].T.tolist() == of_group
