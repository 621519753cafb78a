"""Tests of baselines.py: each against a writing of its own, then in runs of cm.py."""

import copy
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm
from experiments import baselines

torch.set_num_threads(1)  # results repeat with as many threads
MINIATURE = ["--channels", "8", "--multipliers", "1", "2",
             "--image-size", "8", "--batch-size", "8", "--rank-ratio", "0.5", "--warmup", "1",
             "--log-every", "2", "--device", "cpu"]
COUNTS = [5, 40, 2, 10]  # Many: 1, Medium: 3, Few: 0 and 2
GROUP = {1: 0, 3: 1, 0: 2, 2: 2}


def configure(*flags):
    return cm.parse([*MINIATURE, *flags])[0].resolved()


def tiny(losses, network, *flags, dtype=torch.float64, dropout="0"):
    """Losses of a small network for COUNTS, all that is trained (B too) off its initial value."""
    config = configure("--dropout", dropout, *flags)
    torch.manual_seed(0)
    unet = network(config, len(COUNTS), 1).to(dtype)
    for p in unet.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    return losses.from_config(unet, torch.tensor(COUNTS), config)


def batch(n=8, dtype=torch.float64):
    """x0, y, t, eps, y_in; each class at two times, once without its label."""
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, n, 1, 8, 8, generator=g, dtype=dtype)
    y = torch.arange(n) % len(COUNTS)
    t = torch.tensor([0, 3, 100, 250, 400, 600, 800, 999])[:n]
    return x0, y, t, eps, torch.where(torch.arange(n) == 5, -1, y)


def noised(x0, t, eps):
    """x_t with the schedule written anew: betas linear from 1e-4 to 0.02."""
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t.numpy()]
    shape = (-1, 1, 1, 1)
    return (torch.tensor(np.sqrt(a)).view(shape) * x0
            + torch.tensor(np.sqrt(1 - a)).view(shape) * eps)


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


def plain_w(w_div=0.2):
    """w of COUNTS by Eq. (3), written anew."""
    n = np.array(COUNTS, float)
    return len(n) * n / n.sum() - w_div * len(n) * (1 / n) / (1 / n).sum()


@pytest.mark.parametrize("losses, weights", [
    (cm.CapacityManipulation, plain_w()),
    (baselines.UniformWeights, np.full(4, np.average(plain_w(), weights=COUNTS)))])
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


def test_without_dropout_a_plain_network_agrees_with_itself():
    module = tiny(cm.CapacityManipulation, baselines.plain_unet)
    total, base, loss_cm, d = module(*batch())
    assert not d.any() and not loss_cm.any() and torch.equal(total, base.mean())


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


def change(x, **values):
    """`x` after one change to all images, and what the network is told of it."""
    changes = torch.zeros(8, len(x))
    for name, value in values.items():
        changes[CHANGES.index(name)] = value
    told = baselines.numbers(changes)
    assert torch.equal(told, told[:1].expand(len(x), 9))
    return baselines.warp(x, changes), told[0]


@pytest.fixture
def images():
    return torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def told_only(told, **expected):
    names = ("flip_x", "flip_y", "scale", "cos_1", "sin", "stretch_cos", "stretch_sin", "right",
             "down")
    values = torch.tensor([float(expected.get(name, 0)) for name in names])
    return torch.equal(told[values == 0], values[values == 0]) and torch.allclose(told, values)


def test_ada_flips_move_pixels_and_keep_their_bits(images):
    for name, dims in (("flip_x", (3,)), ("flip_y", (2,))):
        flipped, told = change(images, **{name: 1})
        assert torch.equal(flipped, images.flip(dims)) and told_only(told, **{name: 1})
    both, told = change(images, flip_x=1, flip_y=1)
    assert torch.equal(both, images.flip(2, 3)) and told_only(told, flip_x=1, flip_y=1)


def test_ada_turns_by_right_angles(images):
    for quarters, cos1, sin in ((1, -1, 1), (2, -2, 0), (3, -1, -1)):
        turned, told = change(images, angle=quarters * math.pi / 2)
        assert close(turned, images.rot90(-quarters, (2, 3)))  # clockwise
        assert torch.allclose(told[3:5], torch.tensor([cos1, sin]).float(), atol=1e-6)
        assert not told[[0, 1, 2, 5, 6, 7, 8]].any()


def test_ada_shifts_by_whole_pixels(images):
    shifted, told = change(images, right=2 * 8 / 9)  # 2 of 9 pixels
    assert close(shifted[..., 2:], images[..., :-2]) and told_only(told, right=16 / 9)
    assert close(shifted[..., :2], images[..., [1, 0]])  # mirrored at the border
    shifted, told = change(images, down=-3 * 8 / 9)
    assert close(shifted[:, :, :-3], images[:, :, 3:]) and told_only(told, down=-24 / 9)
    assert close(shifted[:, :, -3:], images[:, :, [8, 7, 6]])


def test_ada_scales_by_three_and_by_half(images):
    n = math.log2(3) / 0.2
    large, told = change(images, scale=n)  # every third pixel lies on one of the old
    assert close(large[..., 1::3, 1::3], images[..., 3:6, 3:6]) and told_only(told, scale=n)
    small, told = change(images, scale=-5)
    assert close(small[..., 2:7, 2:7], images[..., ::2, ::2]) and told_only(told, scale=-5)


def test_ada_stretches_along_an_axis_and_squeezes_across(images):
    tall, told = change(images, stretch=-5)  # half as wide, twice as high
    assert close(tall[..., ::2, 2:7], images[..., 2:7, ::2]) and told_only(told, stretch_cos=-5)
    wide, told = change(images, stretch=-5, axis=math.pi / 2)
    assert close(wide[..., 2:7, ::2], images[..., ::2, 2:7])
    assert torch.allclose(told[5:7], torch.tensor([0.0, -5]), atol=1e-6)
    slanted, _ = change(images, stretch=-5, axis=math.pi / 4)  # symmetric about its axis
    transposed, _ = change(images.mT, stretch=-5, axis=math.pi / 4)
    assert close(slanted, transposed.mT) and not close(slanted, tall)
    centre = slanted[..., 4, 4]
    assert close(centre, images[..., 4, 4])
    assert close(slanted[..., 5, 5], images[..., 6, 6])  # down the axis: from twice as far


def test_ada_leaves_images_without_a_change_as_they_are(images):
    n = 200
    torch.manual_seed(0)
    x = torch.randn(n, 1, 9, 9)
    changes = baselines.draw_changes(n, True)
    warped = baselines.warp(x, changes)
    told = baselines.numbers(changes)
    flip_x, flip_y = (changes[:2] > 0)[:, :, None, None, None]
    flipped = torch.where(flip_y, x.flip(2), x)
    flipped = torch.where(flip_x, flipped.flip(3), flipped)
    moved = (changes[2:] != 0).any(0)
    assert 50 < moved.sum() < 150
    assert torch.equal(warped[~moved], flipped[~moved])
    assert (warped[moved] != flipped[moved]).flatten(1).any(1).all()
    same = ~(changes != 0).any(0)
    assert same.any() and torch.equal(warped[same], x[same])
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
    with mock.patch.object(baselines, "draw_changes", lambda *args: changes):
        total, base, cm_loss, d = losses(x0, y, t, eps, y_in)
    assert torch.equal(total, base.mean()) and not cm_loss.any() and not d.any()

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
    assert changes.shape == (8, n) and set(changes[:2].unique().tolist()) == {0, 1}
    share = lambda x: float((x != 0).float().mean())
    for x, p in ((flip_x, 0.5), (flip_y, 0.06), (scale, 0.12), (angle, 0.12), (stretch, 0.12),
                 (right, 0.12)):
        assert abs(share(x) - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(stretch != 0, axis != 0) and torch.equal(right != 0, down != 0)
    kinds = [flip_x, flip_y, scale, angle, stretch, right]
    for i, a in enumerate(kinds):  # each comes or not by itself
        for b in kinds[:i]:
            p = share(a) * share(b)
            assert abs(share(a * b) - p) < 5 * math.sqrt(p / n)
    drawn = {name: x[x != 0] for name, x in zip(CHANGES, changes, strict=True)}
    for name in ("scale", "stretch", "right", "down"):
        x = drawn[name]
        assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.04
        assert abs(x.pow(4).mean() - 3) < 0.5  # normal
    for name in ("angle", "axis"):
        x = drawn[name]
        assert abs(x.mean()) < 0.1 and 3.1 < x.max() <= math.pi and -3.1 > x.min() >= -math.pi
        assert abs(x.var() - math.pi**2 / 3) < 0.1  # uniform
    values = scale, angle, stretch, axis, right, down
    for i, a in enumerate(values):  # no two from one number
        for b in values[:i]:
            both = (a != 0) & (b != 0)
            correlation = torch.corrcoef(torch.stack([a[both], b[both]]))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(both.sum())
    assert not baselines.draw_changes(1000, False)[0].any()
    assert share(baselines.draw_changes(10_000, True, p=0.5)[2]) > 0.45


def test_ada_flips_sideways_only_where_the_run_does():
    for flag, told in (("--flip", True), ("--no-flip", False)):
        losses = tiny(baselines.ADA, baselines.told_unet, "--no-cm", flag, dtype=torch.float32)
        seen = []
        losses.unet.told.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for seed in range(10):
            torch.manual_seed(seed)
            losses(*batch(dtype=torch.float32))
        seen = torch.cat(seen)
        assert losses.unet.numbers is None  # whoever calls the network next tells it nothing
        assert bool(seen[:, 0].any()) == told and seen[:, 1].any()


def test_without_numbers_adas_network_is_the_plain_one():
    config = configure("--no-cm")
    torch.manual_seed(0)
    told = baselines.told_unet(config, 4, 1)
    torch.manual_seed(0)
    plain = cm.make_unet(config, 4, 1)
    more = dict(told.named_parameters())
    weight = more.pop("told.weight")
    assert weight.shape == (32, 9) and more.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(more[name], p) for name, p in plain.named_parameters())
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, -1])
    nn.init.normal_(told.decoder[-1][-1].weight)
    plain.load_state_dict(more)
    told.eval(), plain.eval()
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


@pytest.mark.parametrize("classes, trained", [([0, 2], [2]), ([1], [0]), ([3, 1], [0, 1]),
                                              ([-1], [])])
def test_experts_learn_from_and_change_their_own_group_alone(classes, trained):
    losses = tiny(baselines.GroupExpertLoRA, baselines.group_expert_unet, "--no-cm")
    unet, (x0, _, t, _, _) = losses.unet, batch()
    y = torch.tensor(classes).repeat(8)[:8]
    unet(x0, t, y).square().sum().backward()
    layers = [m for m in unet.modules() if isinstance(m, baselines.GroupExperts)]
    for m in layers:
        a, b = m.A.weight.grad.flatten(1), m.B.weight.grad.flatten(1)
        learns = [i for i in range(3) if a.view(3, -1)[i].any()]
        assert learns == trained
        assert [i for i in range(3) if b.view(len(b), 3, -1)[:, i].any()] == trained
        assert m.layer.weight.grad.any()
    every = torch.tensor([0, 1, 2, 3, -1, 1, 3, 0])
    with torch.no_grad():
        before = unet(x0, t, every)
        for m in layers:
            for group in trained:
                m.B.weight.view(len(m.B.weight), 3, -1)[:, group] += 1
        changed = (unet(x0, t, every) != before).flatten(1).any(1)
    assert changed.tolist() == [GROUP.get(k) in trained for k in every.tolist()]


def test_experts_have_a_third_of_cms_rank_and_start_at_nothing():
    for ratio in ("0.9", "0.07"):
        config = configure("--rank-ratio", ratio, "--channels", "16")
        torch.manual_seed(0)
        reserved = cm.make_unet(config, 4, 1)
        torch.manual_seed(0)
        unet = baselines.group_expert_unet(configure("--no-cm", "--rank-ratio", ratio, "--channels",
                                                     "16"), 4, 1)
        ranks = {name: m.A.shape[0] for name, m in reserved.named_modules()
                 if isinstance(m, cm.LowRankReserved)}
        experts = {name: m for name, m in unet.named_modules()
                   if isinstance(m, baselines.GroupExperts)}
        assert ranks.keys() == experts.keys() and all(name.startswith("decoder") for name in ranks)
        for name, rank in ranks.items():
            m, third = experts[name], max(1, rank // 3)
            assert m.A.weight.shape[0] == m.B.weight.shape[1] == 3 * third
            assert m.A.bias is None and m.B.bias is None
            assert not m.B.weight.any() and m.A.weight.std() > 0
            k = m.layer.weight[0].numel()
            assert m.A.weight.abs().max() <= 1 / math.sqrt(k)  # as CM's A
        plain = {name: p for name, p in unet.state_dict().items() if ".layer." in name}
        assert all(torch.equal(p, reserved.state_dict()[name]) for name, p in plain.items())
    assert not unet.router.any()


def test_without_a_label_there_is_no_expert():
    unet = tiny(baselines.GroupExpertLoRA, baselines.group_expert_unet, "--no-cm").unet
    x0, y, t, _, _ = batch()
    nn.init.zeros_(unet.label_embedding.weight)
    nowhere = torch.full_like(y, -1)
    plain = cm.make_unet(configure("--no-cm", "--dropout", "0"), len(COUNTS), 1).double()
    without = torch.func.functional_call(plain, plain_weights(unet, None), (x0, t, nowhere))
    assert torch.allclose(unet(x0, t, nowhere), without)
    assert (unet(x0, t, y) != without).flatten(1).any(1).all()


def test_two_classes_have_two_experts_and_no_label_is_refused():
    config = configure("--no-cm")
    unet = baselines.group_expert_unet(config, 2, 1)
    baselines.GroupExpertLoRA.from_config(unet, torch.tensor([3, 9]), config)
    assert unet.router.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="no label to choose the expert"):
        baselines.group_expert_unet(configure("--no-cm", "--label-drop", "1"), 2, 1)


# ------------------------------------------------------------------------------------------------
# Runs of cm.py


def options(name, out, *more):
    variation = baselines.BASELINES[name]
    return cm.parse([*MINIATURE, *variation.flags.split(), "--out", str(out), *more])


def train(name, out, *more, network=None, report=False):
    variation = baselines.BASELINES[name]
    config, typed = options(name, out, *more)
    with mock.patch.object(cm, "report", cm.report if report else lambda *args: None):
        cm.train(config.resolved(), typed, variation.losses, network or variation.network)
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def cbdm(tmp_path_factory):
    """The checkpoint of a plain network trained with CBDM's loss."""
    out = tmp_path_factory.mktemp("cbdm") / "run"
    config, typed = cm.parse([*MINIATURE, "--no-cm", "--base", "cbdm", "--steps", "5", "--out",
                              str(out)])
    with mock.patch.object(cm, "report"):
        cm.train(config.resolved(), typed)
    return out / "checkpoint.pt"


@pytest.fixture(scope="module", params=baselines.BASELINES)
def trained(request, cbdm, tmp_path_factory):
    """(name, its network for training, run directory, checkpoint) after 10 steps; a report of
    Group-Expert LoRA's, whose decoder is its own."""
    name, out = request.param, tmp_path_factory.mktemp("run") / "whole"
    network = baselines.BASELINES[name].network
    if name == "CBDM (LoRA)":
        network = baselines.lora_of(cbdm)
    state = train(name, out, "--steps", "10", network=network, report="Expert" in name)
    return name, network, out, state


def same(a, b):
    """Nested dicts and lists of tensors and values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_variation_resumes_bit_for_bit(trained, tmp_path):
    name, network, _, whole = trained
    half = train(name, tmp_path / "cut", "--steps", "5", network=network)
    assert half["step"] == 5 and not same(half["model"], whole["model"])
    cut = train(name, tmp_path / "cut", "--steps", "10", "--resume", network=network)
    for part in ("model", "ema", "optimizer"):
        assert same(cut[part], whole[part]), part
    changed = [k for k, p in whole["model"].items() if not torch.equal(p, half["model"][k])]
    assert changed and all(p.isfinite().all() for p in whole["ema"].values())


def test_a_variation_samples_and_is_refused_as_cms_network(trained, tmp_path):
    name, _, out, state = trained
    reported = {"merged.pt", "samples.png", "curves.png"} if "Expert" in name else set()
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "config.json", "log.csv",
                                               *reported}
    own = baselines.BASELINES[name].network
    path = str(out / "checkpoint.pt")
    sampling, _ = cm.parse(["--sample", path, "--num-images", "4", "--sample-steps", "2",
                            "--labels", "1", "9", "--guidance", "0.5", "--device", "cpu",
                            "--out", str(tmp_path / "images.npz")])
    cm.generate(sampling, own)  # CBDM (LoRA)'s needs no other checkpoint
    images = np.load(tmp_path / "images.npz")
    config, unet, counts = cm.load_trained(path, network=own)
    assert same(dict(unet.state_dict()), dict(state["ema"])) and counts == state["counts"]
    seeds = [cm.hashed_seed("image", 0, i) for i in range(4)]
    y = torch.tensor([1, 9, 1, 9])
    expected = cm.sample(unet, y, (1, 8, 8), "ddim", 2, 0.5, seeds)
    expected = cm.to_uint8(expected).permute(0, 2, 3, 1).int().numpy()
    assert abs(images["arr_0"].astype(int) - expected).max() <= 1  # merged: rounded another way
    assert images["arr_1"].tolist() == y.tolist()
    if own is not cm.make_unet:
        with pytest.raises(ValueError, match="another network"):
            cm.generate(sampling)


def test_what_a_run_trains(trained, cbdm):
    name, _, _, state = trained
    ema, model = state["ema"], state["model"]
    plain = torch.load(cbdm, weights_only=True)["ema"]
    if name == "ADA":
        assert ema.keys() - plain.keys() == {"told.weight"}
        assert not torch.equal(ema["told.weight"], model["told.weight"])
    elif name in ("Overlap", "agreement alone", "uniform w, no BA", "DDPM, two passes"):
        assert ema.keys() == plain.keys()
    elif name == "uniform w":
        assert all(p.any() for key, p in ema.items() if key.endswith(".B"))
        assert any(key.endswith(".B") for key in ema)
    elif name == "Group-Expert LoRA":  # ten classes, the most frequent first
        expected = F.pad(F.one_hot(torch.tensor([0] * 3 + [1] * 3 + [2] * 4)), (0, 0, 0, 1)).float()
        assert torch.equal(ema["router"], expected) and torch.equal(model["router"], expected)
        assert any(p.any() for key, p in ema.items() if key.endswith(".B.weight"))
    else:
        for weights in (ema, model):
            for key, p in plain.items():
                layer, _, last = key.rpartition(".")
                frozen = weights.get(key, weights.get(f"{layer}.layer.{last}"))
                assert torch.equal(frozen, p), key
            added = {k for k in weights if k not in plain and ".layer." not in k}
            assert added and all(key.endswith((".A", ".B")) for key in added)
            assert all(weights[key].any() for key in added)
        assert len(state["optimizer"]["state"]) == len(added)  # Adam has moments of A and B alone


# ------------------------------------------------------------------------------------------------
# CBDM (LoRA)


def test_lora_starts_as_the_frozen_network(cbdm):
    config = configure("--no-cm", "--base", "cbdm")
    unet = baselines.lora_of(cbdm)(config, 10, 1)
    plain = cm.load_trained(cbdm)[1]
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([9, 0, -1])
    assert torch.equal(unet.eval()(x, t, y), plain(x, t, y))
    assert unet.train().training and not plain.training
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    as_cm = cm.make_unet(configure(), 10, 1)
    low_rank = {name: p for name, p in as_cm.named_parameters() if name.endswith((".A", ".B"))}
    assert trainable == low_rank.keys()
    assert all(dict(unet.named_parameters())[k].shape == p.shape for k, p in low_rank.items())
    with cm.general_only(unet):
        assert torch.equal(unet.eval()(x, t, y), plain(x, t, y))


def test_loras_loss_and_gradients_against_plain_loops():
    config = configure("--no-cm", "--base", "cbdm", "--dropout", "0")
    torch.manual_seed(0)
    unet = baselines.lora_of()(config, len(COUNTS), 1).double()
    for p in unet.parameters():
        nn.init.normal_(p, std=0.1)
    losses = cm.CapacityManipulation.from_config(unet, torch.tensor(COUNTS), config)
    x0, y, t, eps, y_in = batch()
    y_other = torch.tensor([3, 0, 1, 2, 1, 2, 0, 2])
    losses.other_classes = lambda labels: y_other
    total = losses(x0, y, t, eps, y_in)[0]

    plain = cm.make_unet(config, len(COUNTS), 1).double()
    weights = {name.replace(".layer.", "."): p for name, p in unet.named_parameters()
               if not name.endswith((".A", ".B"))}
    for name, m in unet.named_modules():
        if isinstance(m, cm.LowRankReserved):
            weights[f"{name}.weight"] = m.layer.weight + (m.B @ m.A).view_as(m.layer.weight)
    x_t, expected = noised(x0, t, eps), 0
    for i in range(len(y)):
        one = slice(i, i + 1)
        call = lambda labels, one=one: torch.func.functional_call(
            plain, weights, (x_t[one], t[one], labels[one]))
        eps_theta, eps_other = call(y_in), call(y_other)
        loss = (eps_theta - eps[one]).square().mean()
        if i != 5:
            loss = loss + t[i] / 1000 * ((eps_theta - eps_other.detach()).square().mean()
                                         + (eps_theta.detach() - eps_other).square().mean() / 4)
        expected = expected + loss / len(y)
    assert torch.isclose(total, expected, 1e-6)
    trainable = [p for p in unet.parameters() if p.requires_grad]
    same_gradients(total, expected, trainable)
    losses(x0, y, t, eps, y_in)[0].backward()
    assert all((p.grad is not None) == name.endswith((".A", ".B"))
               for name, p in unet.named_parameters())


def test_lora_of_another_network_or_of_none_is_refused(cbdm, tmp_path):
    for flags in (["--no-cm", "--channels", "16"], []):
        with pytest.raises(ValueError, match="another network"):
            baselines.lora_of(cbdm)(configure(*flags), 10, 1)
    with pytest.raises(ValueError, match="can't be loaded"):
        baselines.lora_of(tmp_path / "none.pt")(configure("--no-cm"), 10, 1)
    with pytest.raises(FloatingPointError, match="not finite between steps 0 and 2"):
        train("CBDM (LoRA)", tmp_path / "run", "--steps", "2")


def test_variations_name_options_of_cm():
    for name, variation in baselines.BASELINES.items():
        config = configure(*variation.flags.split())
        assert config.no_cm == (name not in ("agreement alone", "uniform w", "uniform w, no BA"))
        assert config.base == ("cbdm" if name == "CBDM (LoRA)" else "ddpm")
    assert config.steps == 3000
    paper = cm.parse(["--preset", "paper", *baselines.BASELINES["Overlap"].flags.split()])[0]
    assert paper.resolved().base == "ddpm"  # whose own is oc
