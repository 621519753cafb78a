"""Tests of text_to_image.py. They need diffusers, pandas and tabulate."""

import colorsys
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm
import fid

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("pandas")
pytest.importorskip("tabulate")
from experiments.settings.text_to_image import shapes  # noqa: E402
from experiments.settings.text_to_image import __main__ as t2i  # noqa: E402

torch.set_num_threads(1)  # results repeat with as many threads
COUNTS = [100, 60, 40, 25, 15, 10, 6, 4, 2, 1]
ARGS = ["--n-max", "4", "--ir", "2", "--steps", "3", "--vae-steps", "2", "--num-images", "1",
        "--seeds", "5", "--runs", "runs", "--rows", "rows.csv", "--assets", "."]


# ------------------------------------------------------------------------------------------------
# Data


def masks_at(image):
    """(lit pixels [32, 32], x, y of pixels from their centroid) of a drawn image; unit: half side.
    """
    lit = image.amax(0).numpy() > 127
    grid = (np.arange(32) + 0.5) / 16 - 1
    x, y = np.meshgrid(grid, grid)
    return lit, x - x[lit].mean(), y - y[lit].mean()


@functools.cache
def middle_of(shape):
    x, y = np.meshgrid(*2 * [(np.arange(400) + 0.5) / 200 - 1])
    inside = shapes.signed_distance(shape, x, y) <= 0
    return x[inside].mean(), y[inside].mean()


def recognised(image):
    """(shape, size, turned or not) of an image, by the best overlap with shapes drawn around its
    centroid."""
    lit, dx, dy = masks_at(image)
    best = (0,)
    for shape in shapes.SHAPES:
        for size, radius in (("small", 0.335), ("small", 0.365), ("large", 0.49), ("large", 0.52)):
            for turn in (0, -42, -35, -28, 28, 35, 42):
                a = np.radians(turn + shapes.UPRIGHT.get(shape, 0))
                x = (dx * np.cos(a) + dy * np.sin(a)) / radius + middle_of(shape)[0]
                y = (dy * np.cos(a) - dx * np.sin(a)) / radius + middle_of(shape)[1]
                inside = shapes.signed_distance(shape, x, y) < 0
                overlap = (inside & lit).sum() / (inside | lit).sum()
                best = max(best, (overlap, shape, size, turn != 0))
    return best[1:]


def test_a_drawn_image_has_what_its_caption_says():
    images, captions, labels = shapes.captioned_images(4, seed=7)
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8
    assert [np.bincount(labels).tolist(), len(captions)] == [[4] * 10, 40]
    for image, caption, label in zip(images, captions, labels, strict=True):
        first, place, *turned = caption.split(", ")
        a, size, colour, shape = first.split()
        assert a == "a" and shape == shapes.SHAPES[label] and turned in ([], ["turned"]), caption
        seen, seen_size, seen_turned = recognised(image)
        assert (seen, seen_size) == (shape, size), caption
        assert shape in ("disc", "ring") or seen_turned == bool(turned), caption
        lit, dx, dy = masks_at(image)
        r, g, b = (image.permute(1, 2, 0).numpy()[lit].mean(0) / 255).tolist()
        degrees = 360 * colorsys.rgb_to_hsv(r, g, b)[0]
        named = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}
        assert abs((degrees - named[colour] + 180) % 360 - 180) < 30, caption
        row, column = -dy[0, 0] - 1 + 1 / 32, -dx[0, 0] - 1 + 1 / 32
        word = ("upper", "", "lower")[int(np.digitize(row, [-0.2, 0.2]))], \
            ("left", "", "right")[int(np.digitize(column, [-0.2, 0.2]))]
        assert place == (" ".join(word).strip() or "centre"), caption


def test_a_distance_to_a_shape_changes_by_at_most_the_step_between_points():
    x = np.linspace(-1.5, 1.5, 301)
    for shape in shapes.SHAPES:
        d = shapes.signed_distance(shape, *np.meshgrid(x, x))
        assert d.min() < -0.1 and (d[[0, -1]] > 0).all() and (d[:, [0, -1]] > 0).all(), shape
        assert abs(np.diff(d)).max() < 0.0101, shape


def test_words_vary_and_upright_shapes_stand_as_people_draw_them():
    images, captions, labels = shapes.captioned_images(100, seed=7)
    for word in (*shapes.RADII, *shapes.COLOURS, *shapes.PLACES, "turned"):
        share = np.mean([word in caption for caption in captions])
        expected = {"small": 1 / 2, "large": 1 / 2, "turned": 0.8 / 2}.get(
            word, 1 / 5 if word in shapes.PLACES else 1 / 6)
        assert abs(share - expected) < 0.06, word
    assert not any("turned" in c for c, y in zip(captions, labels, strict=True) if y < 2)
    for shape, above in (("triangle", False), ("heart", True), ("star", True)):
        for i in np.flatnonzero(labels == shapes.SHAPES.index(shape)):
            if "large" in captions[i] and "turned" not in captions[i]:
                lit, _, dy = masks_at(images[i])
                widest = dy[lit.sum(1).argmax(), 0]
                assert (widest < 0) == above, captions[i]
    other = shapes.captioned_images(100, seed=8)
    assert other[1] != captions and not torch.equal(other[0], images)


def test_places_and_hues_lie_around_what_their_words_say():
    images, captions, _ = shapes.captioned_images(60, seed=5)
    x = images.double() / 255
    light = x.amax(1)
    grid = (torch.arange(32) + 0.5) / 16 - 1
    total = light.sum((1, 2))
    at = torch.stack([(light.sum(axis) * grid).sum(1) / total for axis in (1, 2)], 1)
    said = torch.tensor([shapes.PLACES[c.split(", ")[1]] for c in captions])
    assert (at - said).mean(0).abs().max() < 0.006 and (at - said).abs().max() < 0.06
    assert (at - said).std() > 0.015
    hues = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in x.sum((2, 3)).tolist()]
    said = [shapes.COLOURS.index(c.split()[2]) / 6 for c in captions]
    off = (np.subtract(hues, said) + 0.5) % 1 - 0.5
    assert abs(off.mean()) < 0.006 and abs(off).max() < 0.06 and off.std() > 0.01


def test_the_caption_reader_is_right_on_real_images():
    images, captions, _ = shapes.captioned_images(100, seed=3)
    for words in shapes.read(images):
        assert np.mean([word in c for word, c in zip(words, captions, strict=True)]) >= 0.99


def test_the_caption_reader_on_images_by_hand():
    images = torch.full((4, 3, 32, 32), 60, dtype=torch.uint8)  # too dark to count as lit
    images[0, 0, 8:12, 8:12] = 255
    images[1, 1:, 20:24, 8:12] = 255
    images[2, :, 14:18, 14:18] = torch.tensor([255, 0, 255])[:, None, None]
    images[2, 2, 14:18, 14:15] = 200  # pinker on one side: the mean counts
    assert shapes.read(images) == (["red", "cyan", "magenta", "?"],
                                   ["upper left", "lower left", "centre", "?"])


def test_words_are_numbered_and_what_is_unknown_is_refused():
    words = sorted(["a", "small", "red", "star", "upper", "left"])
    ids = shapes.word_ids(["a small RED star, upper left", "red", ""], words)
    assert ids.tolist() == [[1, 4, 3, 5, 6, 2, 0], [3] + 6 * [0], 7 * [0]]
    for caption, wrong in (("a small purple star", "'purple'"), ("red " * 8, "'red'")):
        with pytest.raises(ValueError, match=f"{wrong}; a caption is up to 7 of a, left"):
            shapes.word_ids(["a star", caption], words)


def test_captions_are_dropped_as_often_as_said(monkeypatch):
    monkeypatch.setattr(t2i, "BATCH", 20_000)
    number = torch.arange(1, 11)
    torch.manual_seed(0)
    x0, y, t, eps, ids = t2i.draw_batch(number.view(10, 1, 1, 1).float(), number,
                                        number[:, None].repeat(1, 7))
    dropped = (ids == 0).all(1)
    assert abs(dropped.double().mean() - t2i.DROP) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert t2i.DROP == 0.1 and torch.equal(x0.flatten(), y.float())  # the rest belongs together
    assert torch.equal(ids[~dropped], y[~dropped, None].repeat(1, 7))
    assert set(y.tolist()) == set(range(1, 11)) and (t.min(), t.max()) == (0, 999)
    assert abs(eps.std() - 1) < 0.03 and eps.shape == x0.shape


# ------------------------------------------------------------------------------------------------
# Networks


def network(reserve=True):
    """A network whose BA, if any, is off zero."""
    torch.manual_seed(0)
    net = t2i.TextToImage(20, reserve)
    for layer in cm.reserved_layers(net):
        layer.B.data.normal_(0, 0.3)
    return net


def batch():
    torch.manual_seed(1)
    return (torch.randn(10, 4, 8, 8), torch.arange(10), torch.randint(1000, (10,)),
            torch.randn(10, 4, 8, 8), torch.randint(21, (10, 7)))


def test_loss_against_an_independent_writing():
    net, (x0, y, t, eps, ids) = network(), batch()
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
    x_t = a.sqrt()[:, None, None, None] * x0 + (1 - a).sqrt()[:, None, None, None] * eps
    theta = cm.merge(net).train()
    with cm.general_only(net):
        theta_g = cm.merge(net).train()

    def predicted(plain):
        text = plain.text(plain.words(ids) + plain.positions)
        return plain.unet(x_t.float(), t, text).sample.double()

    torch.manual_seed(3)  # of the dropout masks: theta's, then theta_g's own
    with torch.no_grad():
        ours, general = predicted(theta), predicted(theta_g)
        assert not torch.allclose(ours, predicted(theta), atol=1e-3)  # there is dropout
    n = torch.tensor(COUNTS, dtype=torch.float64)
    w = 10 * n / n.sum() - 0.2 * 10 / (n * (1 / n).sum())
    d = (ours - general).square().mean((1, 2, 3))
    capped = (w < 0) & (d > 0.1)
    assert capped.any() and (w > 0).any() and d[w > 0].max() > 0.1
    expected = (ours - eps).square().mean() + torch.where(capped, 0.1 * w, d * w).mean()
    torch.manual_seed(3)
    loss = t2i.loss_of(net, x0, y, t, eps, ids, cm.capacity_weights(COUNTS))
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


def test_while_ba_is_0_a_step_is_the_plain_one():
    def grads(net):
        loss = t2i.loss_of(net.eval(), *batch(), cm.capacity_weights(COUNTS))
        loss.backward()
        return loss.item(), {name.replace(".layer.", "."): p.grad
                             for name, p in net.named_parameters()}

    ours = network()
    for layer in cm.reserved_layers(ours):
        layer.B.data.zero_()
    loss, moved = grads(ours)
    plain = t2i.TextToImage(20, reserve=False)
    plain.load_state_dict(cm.merge(ours).state_dict())
    plain_loss, plain_moved = grads(plain)
    assert loss == plain_loss  # to the bit: without dropout d is 0
    for name, grad in plain_moved.items():
        assert torch.allclose(moved[name], grad, rtol=1e-4, atol=1e-6), name


def test_capacity_is_reserved_in_the_up_blocks_and_merges_into_diffusers_network():
    net, (x, _, t, _, ids) = network(), batch()
    reserved = [name for name, m in net.named_modules() if isinstance(m, cm.LowRankReserved)]
    assert reserved and all(name.startswith("unet.up_blocks.") for name in reserved)
    left = [name for name, m in net.unet.up_blocks.named_modules()
            if isinstance(m, torch.nn.Conv2d | torch.nn.Linear) and not name.endswith(".layer")]
    assert not left
    plain = diffusers.UNet2DConditionModel.from_config(net.unet.config)
    plain.load_state_dict(cm.merge(net).unet.state_dict(), strict=True)
    text = net.text(net.words(ids) + net.positions)
    with torch.no_grad():
        eps = plain.eval()(x, t, text).sample
        assert torch.allclose(eps, net.eval()(x, t, ids), atol=1e-5)
        assert not torch.allclose(eps, net(x, t, 0 * ids), atol=1e-3)  # the caption counts
    assert t2i.TextToImage(20, False).state_dict().keys() == cm.merge(net).state_dict().keys()


# ------------------------------------------------------------------------------------------------
# Runs


def test_scores_by_split_and_the_words_that_are_right():
    setting = t2i.Setting.__new__(t2i.Setting)
    setting.counts = np.array(COUNTS)
    setting.images, setting.captions, setting.labels = shapes.captioned_images(12, seed=0)

    class Net(torch.nn.Linear):  # always says "star" (8); its features are an image's colours
        def forward(self, images):
            logits = torch.zeros(len(images), 10)
            logits[:, 8] = 1
            return images.float().mean((2, 3)), logits

    net = Net(1, 1)
    setting.judge = net, fid.extract(net, setting.images, "")[0]
    row = setting.scores(setting.images, setting.captions, setting.labels)
    for split, shape in (("overall", 0.1), ("Many", 0), ("Medium", 0), ("Few", 0.25)):
        assert row[f"FD {split}"] < 1e-6 and row[f"shape {split}"] == shape
        assert row[f"colour {split}"] == row[f"place {split}"] == 1
    others = np.roll(setting.captions, 1)
    row = setting.scores(setting.images.flip(1), others, setting.labels)
    swapped = {"red": "blue", "blue": "red", "yellow": "cyan", "cyan": "yellow"}
    few = setting.labels >= 6
    pairs = [(a.split(), b.split()) for a, b in zip(setting.captions, others, strict=True)]
    same = np.array([swapped.get(a[2], a[2]) == b[2] for a, b in pairs])
    assert row["colour overall"] == same.mean() and row["colour Few"] == same[few].mean()
    places = np.array([a.split(", ")[1] == b.split(", ")[1]
                       for a, b in zip(setting.captions, others, strict=True)])
    assert row["place Few"] == places[few].mean() != places.mean() == row["place overall"]
    x = setting.images.float().mean((2, 3))
    assert row["FD Few"] == pytest.approx(
        fid.frechet_distance(x[few], x[few].flip(1)), rel=1e-6) and row["FD Few"] > 1


def test_guidance_and_noise_by_seed(monkeypatch):
    """eps = c + w (c - null): here 1 + w, whatever the time; DDIM with it is linear in the noise.
    """
    monkeypatch.setattr(t2i, "SAMPLE_STEPS", 2)
    setting = t2i.Setting.__new__(t2i.Setting)
    setting.words, setting.device = ["star"], torch.device("cpu")
    setting.decoded = lambda latents: latents
    setting.trained = lambda method, seed: lambda x, t, ids: (
        torch.ones_like(x) * (ids > 0).any(1)[:, None, None, None])
    plain, guided = (setting.drawn("CM", 10, ["star"] * 3, w) for w in (0, 2))
    a = cm.make_alpha_bar()[[500, 0]].tolist() + [1]
    shift = 0.0
    for now, after in zip(a, a[1:], strict=False):
        shift = (shift - (1 - now) ** 0.5) * (after / now) ** 0.5 + (1 - after) ** 0.5
    noise = (plain - shift) * a[0] ** 0.5
    assert torch.allclose(guided - plain, torch.full_like(plain, 2 * shift), rtol=1e-4)
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert torch.equal(plain[:2], setting.drawn("DDPM", 10, ["star"] * 2, 0))  # an image's own
    assert not torch.allclose(plain[0], plain[1])
    assert not torch.allclose(plain, setting.drawn("CM", 11, ["star"] * 3, 0))


def test_captions_belong_to_their_images(tmp_path, monkeypatch):
    monkeypatch.setattr(t2i.Setting, "latents", lambda self, images: images)
    seen = []
    monkeypatch.setattr(t2i, "draw_batch", lambda *data: seen.append(data) or data)
    monkeypatch.setattr(t2i, "loss_of", lambda *_: None)
    monkeypatch.setattr(t2i, "fit", lambda net, loss, *_: (loss(), net)[1])
    args = type("Args", (), dict(n_max=6, ir=2, vae_steps=1, steps=1, runs=tmp_path))
    setting = t2i.Setting(args)
    setting.trained("DDPM", 5)
    images, labels, ids = seen[0]
    assert labels.bincount().tolist() == setting.counts.tolist() == cm.class_counts(6, 2, 10)
    for y, row, colour, place in zip(labels, ids, *shapes.read(images), strict=True):
        words = [setting.words[i - 1] for i in row if i]
        assert words[2] == colour and words[3] == shapes.SHAPES[y]
        assert words[4:4 + len(place.split())] == place.split()


@pytest.mark.parametrize("guidance", [0, 1.5])
def test_drawn_as_diffusers_ddim_draws(guidance, monkeypatch):
    setting = t2i.Setting.__new__(t2i.Setting)
    setting.words, setting.device = ["red", "star"], "cpu"
    net = lambda x, t, ids: 0.3 * x + 0.1 * ids.float().mean(1)[:, None, None, None] * t / 1000
    monkeypatch.setattr(setting, "trained", lambda *run: run == ("CM", 7) and net, raising=False)
    monkeypatch.setattr(setting, "decoded", lambda x: x, raising=False)
    x = setting.drawn("CM", 7, ["red star", "star"], guidance)
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02, clip_sample=False)
    scheduler.set_timesteps(50)
    expected = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(
        cm.hashed_seed("image", 7, i))) for i in (0, 1)])
    ids = torch.tensor([[1, 2, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0]])
    for t in scheduler.timesteps:
        eps = net(expected, t, ids)
        eps = eps + guidance * (eps - net(expected, t, 0 * ids))
        expected = scheduler.step(eps, t, expected).prev_sample
    assert torch.allclose(x, expected, atol=1e-4) and x.std() > 0.1


def test_readme_says_what_a_step_costs():
    from torch.utils.flop_counter import FlopCounterMode
    flops = []
    for reserve in (False, True):
        net, data = network(reserve), [torch.cat(4 * [v])[:32] for v in batch()]
        with FlopCounterMode(display=False) as counter:
            t2i.loss_of(net, *data, cm.capacity_weights(COUNTS)).backward()
        flops.append(counter.get_total_flops() / 1e9)
    readme = Path(__file__).with_name("README.md").read_text().replace("\n", " ")
    plain, ours = flops
    assert f"{ours:.2f} instead of {plain:.2f} GFLOPs" in readme
    assert f"{ours / plain:.2f} plain steps" in readme


def test_stopped_and_resumed_bit_for_bit(kills_at, tmp_path, monkeypatch, capsys):
    small = {"BATCH": 2, "SAMPLE_STEPS": 1, "CHANNELS": (8, 16)}
    for name, value in small.items():
        monkeypatch.setattr(t2i, name, value)
    monkeypatch.setattr(fid, "train_classifier", functools.partial(fid.train_classifier, steps=1))
    drawn, rates, errors, real = [], [], [], []
    captioned_images, update, extract = shapes.captioned_images, cm.update, fid.extract
    distance = cm.squared_distance
    monkeypatch.setattr(cm, "squared_distance", lambda a, b: (
        errors.append(distance(a, b)), errors[-1])[1])
    monkeypatch.setattr(shapes, "captioned_images", lambda n, seed: (
        drawn.append((n, seed)), captioned_images(n, seed))[1])
    monkeypatch.setattr(cm, "update", lambda loss, *rest: (
        rates.append(rest[2].param_groups[0]["lr"]),
        update(loss, *rest))[1])
    monkeypatch.setattr(fid, "extract", lambda net, images, what, **more: (
        real.append((what, len(images))), extract(net, images, what, **more))[1])
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert t2i.main(ARGS) == 0
    printed = capsys.readouterr().out
    # trained on and compared with images of seed 0, captions of another seed; the judge is tested
    assert drawn == [(4, 0), (1, 105), (100, 99)] and ("real images", 40) in real
    # DDPM's first and CM's, three later: weights, batch, noise and theta's masks are the same
    assert torch.equal(errors[0], errors[3])
    assert rates == pytest.approx([t2i.LR * i / t2i.WARMUP for i in (1, 2, *2 * (1, 2, 3))])

    monkeypatch.chdir(tmp_path / "cut")
    loss_of, calls = t2i.loss_of, []
    monkeypatch.setattr(t2i, "loss_of", kills_at(5, loss_of))  # CM's second step
    with pytest.raises(SystemExit) as stopped:
        t2i.main(ARGS)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on\n")
    assert len(Path("rows.csv").read_text().splitlines()) == 3  # the autoencoder's and DDPM's
    with pytest.raises(SystemExit):
        t2i.main([*ARGS, "--prompt", "a small red star"])  # which would go on training
    assert "CM-5.pt isn't there, or not trained" in capsys.readouterr().err and not calls
    monkeypatch.setattr(t2i, "loss_of", lambda *args: calls.append(2) or loss_of(*args))
    assert t2i.main(ARGS) == 0 and calls == [2, 2]  # two steps were left
    assert capsys.readouterr().out == printed
    files = ["autoencoder-0.pt", "CM-5.pt", "DDPM-5.pt"]
    assert sorted(p.name for p in Path("runs").glob("*.pt")) == sorted(files)
    for path in ("rows.csv", "text_to_image.png"):
        assert Path(path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    for file in files:
        ours, theirs = (torch.load(folder / "runs" / file, weights_only=True)["state"]
                        for folder in (tmp_path / "cut", tmp_path / "whole"))
        for part in ours.keys() - {"adam"}:
            assert all(torch.equal(ours[part][k], v) for k, v in theirs[part].items()), file
    check_training(torch.load("runs/CM-5.pt", weights_only=True)["state"])
    args = type("Args", (), dict(n_max=4, ir=2, vae_steps=2, steps=3, runs=Path("runs")))
    setting = t2i.Setting(args)
    averaged = t2i.TextToImage(len(setting.words), True)
    averaged.load_state_dict(torch.load("runs/CM-5.pt", weights_only=True)["state"]["ema"])
    averaged = cm.merge(averaged).state_dict()
    assert all(torch.equal(p, averaged[name])
               for name, p in setting.trained("CM", 5).state_dict().items())

    monkeypatch.setattr(t2i, "loss_of", None)  # nothing is trained any more
    assert t2i.main([*ARGS, "--table"]) == 0 and capsys.readouterr().out == printed
    with pytest.raises(SystemExit):
        t2i.main([*ARGS, "--num-images", "2"])
    assert "other options" in capsys.readouterr().err
    t2i.main([*ARGS, "--prompt", "a small red star, upper left"])
    assert Path("runs/prompt.png").is_file()


def check_training(state):
    """The moving average lies between start and end: it isn't the network itself."""
    assert state["net"].keys() == state["ema"].keys()
    assert any(not torch.equal(state["net"][k], v) for k, v in state["ema"].items())
    moved = [v for k, v in state["net"].items() if k.endswith(".B")]
    assert moved and all(v.any() for v in moved)


def test_latents_have_unit_variance_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(t2i, "BATCH", 8)
    monkeypatch.setattr(t2i, "WARMUP", 1)
    args = type("Args", (), dict(n_max=6, ir=2, vae_steps=15, runs=tmp_path))
    setting = t2i.Setting(args)
    assert setting.counts.tolist() == cm.class_counts(6, 2, 10)
    images = setting.images[setting.index]
    seen, randint = [], torch.randint
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda high, *a: seen.append(high) or randint(high, *a))
        latents = setting.latents(images)
    assert set(seen) == {60} and len(images) < 60  # the autoencoder sees every class as often
    assert latents.shape == (len(images), 4, 8, 8) and latents.std() == pytest.approx(1, rel=1e-4)
    vae, scale = setting.autoencoder
    x = vae.decode(scale * latents).sample.clamp(-1, 1)
    assert torch.equal(setting.decoded(latents), ((x + 1) * 127.5).round().byte())
    untrained = (torch.zeros_like(x) - cm.to_float(images)).square().mean()
    assert (x - cm.to_float(images)).square().mean() < 0.8 * untrained  # it learns


def test_table_by_hand():
    import pandas as pd
    rows = pd.DataFrame([dict(method=method, guidance=w, seed=seed) | {
        name: (1 if method == "DDPM" else 3) * seed + w for name in t2i.SHOWN}
        for method, w in t2i.POINTS for seed in (1, 2)])
    shown = t2i.table(rows)
    assert shown.startswith("exploratory: 2 seeds; ")
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in shown.splitlines() if line.startswith("|")]
    assert [line[:4] for line in lines[2:4]] == [["autoencoder", "0", "2", "4.5 ± 2.1"],
                                                 ["DDPM", "0", "2", "1.5 ± 0.7"]]
    assert [line[:2] for line in lines[2:7]] == [[m, f"{w:g}"] for m, w in t2i.POINTS]
    # differences 2 and 4: mean 3, t(0.975, 1) = 12.706, standard error 1
    assert lines[9][:3] == ["CM − DDPM", "0", "+3.0 [-9.7, +15.7]"]
    assert lines[10][:2] == ["CM − DDPM", "1.5"] and len(lines) == 11
    assert lines[9][-1] == "+3.000 [-9.706, +15.706]"
    alone = t2i.table(rows[rows["method"] == "CM"])
    assert alone.rstrip().endswith("interval")


@pytest.mark.parametrize("arguments, says", [
    (["--steps", "0"], "--steps is 0"), (["--steps", "x"], "invalid int"),
    (["--vae-steps", "0"], "--vae-steps is 0"), (["--n-max", "0"], "--n-max is 0"),
    (["--num-images", "0"], "--num-images is 0"), (["--seeds", "-1"], "--seeds must be"),
    (["--seeds", "5", "5"], "different numbers"), (["--rows", "."], "directory"),
    (["--ir", "0.5"], "imbalance ratio is 0.5"), (["--ir", "100"], "smallest class empty"),
    (["--table"], "has no rows"), (["--prompt", "a small purple star"], "unknown word"),
    (["--prompt", "a " * 8], "one too many"),
    (["--prompt", "a star"], "autoencoder-0.pt isn't there")])
def test_bad_input_is_one_line_and_status_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        t2i.main(ARGS + arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
