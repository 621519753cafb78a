"""Tests of baselines.py: each against a writing of its own, then in runs of cm.py."""

import copy
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import cm
from experiments import baselines, common

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


def agree(losses, of_sample, ours, theirs=None, rtol=1e-5):
    """A batch's `losses` and their gradients are those of its samples, each alone: of_sample(i) is
    a base loss and what is added. ours, theirs: the parameters of both, in the same order."""
    ours, (total, base, added, _) = list(ours), losses
    each = [of_sample(i) for i in range(len(base))]
    for i, expected in enumerate(each):
        for ours_i, theirs_i in zip((base[i], added[i]), expected, strict=True):
            assert torch.isclose(ours_i.double(), torch.as_tensor(theirs_i).double(), rtol)
    expected = sum(a + b for a, b in each) / len(each)
    assert torch.isclose(total.double(), expected, rtol / 10)
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True)
                 for loss, parameters in ((total, ours), (expected, theirs or ours))]
    assert any(g is not None for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # a key's bias moves no attention: its gradient is 0 but for rounding
            atol = rtol * float(b.abs().max()) + (1e-15 if a.dtype == torch.float64 else 1e-8)
            assert torch.allclose(a.double(), b.double(), rtol, atol)


N = np.array(COUNTS, float)
W = 4 * N / N.sum() - 0.2 * 4 * (1 / N) / (1 / N).sum()  # Eq. (3)


@pytest.mark.parametrize("kind, weights", [
    (cm.CapacityManipulation, W), (baselines.UniformWeights, np.full(4, W @ N / N.sum()))])
def test_agreement_of_a_plain_network_and_its_gradients(kind, weights):
    """Two passes of one network, no BA; d is of the dropout masks alone."""
    module = tiny(kind, baselines.plain_unet, dropout="0.5")
    assert not cm.reserved_layers(module)
    x0, y, t, eps, y_in = batch()
    assert torch.allclose(module.w.double(), torch.tensor(weights))
    torch.manual_seed(3)
    module.div_margin = margin = float(module(x0, y, t, eps, y_in)[3][y == 2].mean())
    torch.manual_seed(3)
    losses = module(x0, y, t, eps, y_in)
    assert (losses[3] > 0).all() and len(set((losses[3][y == 2] > margin).tolist())) == 2

    x_t = noised(x0, t, eps)
    torch.manual_seed(3)
    first, second = module.unet(x_t, t, y_in), module.unet(x_t, t, y_in)

    def of_sample(i):
        weight, apart = weights[y[i]], (first[i] - second[i]).square().mean()
        assert torch.isclose(losses[3][i], apart, 1e-5)
        counted = apart if weight > 0 else apart.clamp(max=margin)
        return (first[i] - eps[i]).square().mean(), weight * counted

    agree(losses, of_sample, module.unet.parameters())


def test_two_passes_and_their_gradients():
    module = tiny(baselines.TwoPasses, cm.make_unet, "--no-cm", dropout="0.5")
    x0, y, t, eps, y_in = batch()
    torch.manual_seed(3)
    losses = module(x0, y, t, eps, y_in)
    torch.manual_seed(3)
    passes = torch.stack([module.unet(noised(x0, t, eps), t, y_in) for _ in range(2)])
    assert (passes[0] != passes[1]).flatten(1).any(1).all() and not losses[3].any()
    agree(losses, lambda i: ((passes[:, i] - eps[i]).square().mean(), 0), module.unet.parameters())


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
    results = losses(x0, y, t, eps, y_in)
    overlap, kl = results[2:]
    x_t = noised(x0, t, eps)

    def of_sample(i):
        one = slice(i, i + 1)
        eps_theta = losses.unet(x_t[one], t[one], y_in[one])
        expected = step_kl(eps_theta, losses.unet(x_t[one], t[one], y_other[one]), t[i])
        assert torch.isclose(kl[i], expected, 1e-5) and not kl.requires_grad
        pushed = gamma * (margin - expected) if expected < margin and i != 5 else 0
        return (eps_theta - eps[one]).square().mean(), pushed

    agree(results, of_sample, losses.unet.parameters())
    pushes = int((overlap > 0).sum())  # the sample without its label is never pushed
    assert pushes == 7 if share == 1 else 0 < pushes < 7 if share else pushes == 0


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
    first, second = losses(*batch()), losses(*batch())
    assert not first[3].any() and (first[1] != second[1]).all()


def test_ada_moves_pixels_as_its_changes_say():
    images = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixel, half = 8 / 9, slice(2, 7)  # a shift of one of nine pixels; of an image at half size
    names = ("flip_x", "flip_y", "scale", "angle", "stretch", "axis", "right", "down")

    def warped(**values):
        changes = torch.tensor([values.get(name, 0.0) for name in names])
        return baselines.warp(images, changes[:, None].expand(8, 3))

    assert torch.equal(warped(flip_x=1), images.flip(3))  # without rounding
    assert torch.equal(warped(flip_y=1), images.flip(2))
    right = warped(right=2 * pixel)
    for ours, expected in (
            (warped(angle=math.pi / 2), images.rot90(-1, (2, 3))),  # clockwise
            (right[..., 2:], images[..., :-2]), (right[..., :2], images[..., [1, 0]]),  # mirrored
            (warped(down=-3 * pixel)[:, :, :-3], images[:, :, 3:]),
            (warped(scale=-5)[..., half, half], images[..., ::2, ::2]),
            (warped(stretch=-5)[..., ::2, half], images[..., half, ::2]),  # half as wide
            (warped(stretch=-5, axis=math.pi / 2)[..., half, ::2], images[..., ::2, half])):
        assert torch.allclose(ours, expected, atol=1e-5)


def test_ada_leaves_images_without_a_change_as_they_are():
    torch.manual_seed(0)
    x, changes = torch.randn(200, 1, 9, 9), baselines.draw_changes(200, True)
    warped, same = baselines.warp(x, changes), ~changes.any(0)
    assert same.any() and torch.equal(warped[same], x[same])
    assert torch.equal((baselines.numbers(changes) != 0).any(1), ~same)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(baselines.warp(x, changes), warped)


def plain_warp(image, flip_x, flip_y, scale, angle, stretch, axis, right, down):
    """`warp` for one float64 image [H, H], in pixels: each change is undone in turn."""
    side = len(image)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2  # from the centre
    x, y = x - right * side / 8, y - down * side / 8
    along = (x * math.cos(axis) + y * math.sin(axis)) / 2 ** (0.2 * stretch)
    across = (y * math.cos(axis) - x * math.sin(axis)) * 2 ** (0.2 * stretch)
    x = along * math.cos(axis) - across * math.sin(axis)
    y = along * math.sin(axis) + across * math.cos(axis)
    x, y = (x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle))
    x, y = x / 2 ** (0.2 * scale), y / 2 ** (0.2 * scale)
    x, y = (-x if flip_x else x), (-y if flip_y else y)

    margin = 4 * side
    pixels = np.arange(-margin, side + margin) - (side - 1) / 2
    mirrored = np.pad(image, margin, "symmetric")

    def weights(place):  # [H, H, pixels]: cubic convolution (Keys 1981), a = -3/4
        d, a = abs(place[..., None] - pixels), -0.75
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        return np.where(d <= 1, near, np.where(d < 2, far, 0))

    return np.einsum("hwr,hwc,rc->hw", weights(y), weights(x), mirrored, optimize=True)


def test_ada_and_its_gradients_against_plain_loops():
    module = tiny(baselines.ADA, baselines.told_unet, "--no-cm", "--flip", dtype=torch.float32)
    changes = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    changes[:2] = (changes[:2] > 0).float()
    x0, y, t, eps, y_in = batch(dtype=torch.float32)
    with mock.patch.object(baselines, "draw_changes", return_value=changes) as draw:
        losses = module(x0, y, t, eps, y_in)
    assert draw.call_args.args[:2] == (8, True) and not losses[3].any()

    unet = copy.deepcopy(module.unet).double()
    plain = cm.make_unet(configure("--no-cm", "--dropout", "0"), len(COUNTS), 1).double()
    plain.load_state_dict({k: p for k, p in unet.state_dict().items() if k != "told.weight"})
    assert module.unet.numbers is None  # whoever calls the network next tells it nothing
    for unet.numbers in (None, torch.zeros(8, 9)):
        assert torch.equal(unet(x0.double(), t, y_in), plain(x0.double(), t, y_in))

    def of_sample(i):
        one, values = slice(i, i + 1), changes[:, i].double().tolist()
        flip_x, flip_y, scale, angle, stretch, axis, right, down = values
        told = torch.tensor([flip_x, flip_y, scale, math.cos(angle) - 1, math.sin(angle),
                             stretch * math.cos(axis), stretch * math.sin(axis), right, down])
        extra = unet.told.weight @ told.double()
        plain.embed = lambda t, y: cm.UNet.embed(plain, t, y) + extra
        warped = torch.tensor(plain_warp(x0[i, 0].double().numpy(), *values))[None, None]
        x_t = noised(warped, t[one], eps[one].double())
        return (plain(x_t, t[one], y_in[one]) - eps[one]).square().mean(), 0

    others = dict(plain.named_parameters()) | {"told.weight": unet.told.weight}
    agree(losses, of_sample, module.unet.parameters(),
          [others[name] for name, _ in unet.named_parameters()], 1e-3)


def test_ada_draws_each_change_with_its_probability():
    n = 100_000
    torch.manual_seed(0)
    changes = baselines.draw_changes(n, True)
    drawn = (changes != 0).float()
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12])
    assert ((drawn.mean(1) - expected).abs() < 5 * (expected / n).sqrt()).all()
    kinds = torch.eye(8)
    kinds[4, 5] = kinds[5, 4] = kinds[6, 7] = kinds[7, 6] = 1  # a stretch has an axis, a shift two
    assert (drawn.corrcoef() - kinds).abs().max() < 5 / math.sqrt(n)
    assert set(changes[:2].unique().tolist()) == {0, 1}
    for x in (changes[i][changes[i] != 0] for i in (2, 4, 6, 7)):  # normal
        assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.04 and abs(x.pow(4).mean() - 3) < 0.5
    for x in (changes[i][changes[i] != 0] for i in (3, 5)):  # uniform
        assert abs(x.mean()) < 0.1 and 3.1 < x.max() <= math.pi and -3.1 > x.min() >= -math.pi
        assert abs(x.var() - math.pi**2 / 3) < 0.1
    for i, j in itertools.combinations(range(2, 8), 2):  # no two from one number
        pairs = changes[[i, j]][:, drawn[[i, j]].all(0)]
        assert abs(pairs.corrcoef()[0, 1]) < 5 / math.sqrt(pairs.shape[1])

    assert not baselines.draw_changes(1000, False)[0].any()
    assert not tiny(baselines.ADA, baselines.told_unet, "--no-cm", "--no-flip").flip


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
    module = tiny(baselines.GroupExpertLoRA, baselines.group_expert_unet, "--no-cm")
    plain = cm.make_unet(configure("--no-cm", "--dropout", "0"), len(COUNTS), 1).double()
    x0, y, t, eps, y_in = batch()
    x_t = noised(x0, t, eps)

    def of_sample(i):
        one = slice(i, i + 1)
        weights = plain_weights(module.unet, None if i == 5 else GROUP[int(y[i])])
        eps_theta = torch.func.functional_call(plain, weights, (x_t[one], t[one], y_in[one]))
        return (eps_theta - eps[one]).square().mean(), 0

    agree(module(x0, y, t, eps, y_in), of_sample, module.unet.parameters())


def test_experts_have_a_third_of_cms_rank_and_start_at_nothing():
    for ratio in ("0.9", "0.07"):
        flags = ["--rank-ratio", ratio, "--channels", "16"]
        reserved = cm.reserved_layers(cm.make_unet(configure(*flags), 4, 1))
        unet = baselines.group_expert_unet(configure("--no-cm", *flags), 4, 1)
        experts = [m for m in unet.modules() if isinstance(m, baselines.GroupExperts)]
        for m, cms in zip(experts, reserved, strict=True):
            assert m.layer.weight.shape == cms.weight.shape
            assert len(m.A.weight) == m.B.weight.shape[1] == 3 * max(1, len(cms.A) // 3)
            assert not m.B.weight.any() and m.A.weight.std() > 0 and m.A.bias is m.B.bias is None


@pytest.mark.parametrize("name", ["agreement alone", "ADA", "Overlap", "Group-Expert LoRA"])
def test_a_variation_resumes_bit_for_bit_and_samples(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cm, "report", lambda *_: None)
    flags, losses, network = baselines.BASELINES[name]
    saved = []
    for out, stops in (("whole", (6,)), ("cut", (3, 6))):
        for steps in stops:
            common.run([*MINIATURE, *flags.split(), "--steps", str(steps)], tmp_path / out,
                       losses=losses, network=network)
        path = tmp_path / out / "checkpoint.pt"
        saved.append(torch.load(path, weights_only=True))
        saved[-1]["adam"] = saved[-1]["optimizer"]["state"]
    for part in ("model", "ema", "adam"):
        torch.testing.assert_close(*(dict(all[part]) for all in saved), rtol=0, atol=0)

    sampling, _ = cm.parse(["--sample", str(path), "--num-images", "4", "--sample-steps", "2",
                            "--device", "cpu", "--out", str(tmp_path / "images.npz")])
    cm.generate(sampling, network)
    assert np.load(tmp_path / "images.npz")["arr_0"].shape == (4, 8, 8, 1)
    if name == "Group-Expert LoRA":  # ten classes, the most frequent first; without a label: none
        of_group = [[1] * 3 + [0] * 8, [0] * 3 + [1] * 3 + [0] * 5, [0] * 6 + [1] * 4 + [0]]
        assert saved[0]["ema"]["router"].T.tolist() == of_group
