"""Tests of text to image. They need diffusers."""

import colorsys
import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cm
import fid
from experiments.settings.text_to_image import __main__ as t2i
from experiments.settings.text_to_image import shapes

diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)  # results repeat with as many threads
COUNTS = [100, 60, 40, 25, 15, 10, 6, 4, 2, 1]


# ------------------------------------------------------------------------------------------------
# Captioned images


def pixels(image):
    """(lit pixels [32, 32], x, y of pixels from their centroid) of a drawn image; unit: half side.
    """
    lit = image.amax(0).numpy() > 127
    x, y = np.meshgrid(*2 * [(np.arange(32) + 0.5) / 16 - 1])
    return lit, x - x[lit].mean(), y - y[lit].mean()


@functools.cache
def middle_of(shape):
    x, y = np.meshgrid(*2 * [(np.arange(400) + 0.5) / 200 - 1])
    inside = shapes.SHAPES[shape](x, y) <= 0
    return x[inside].mean(), y[inside].mean()


def recognised(lit, dx, dy):
    """(shape, size, turned or not), by the best overlap with shapes drawn around the centroid."""
    best = (0,)
    for shape, distance in shapes.SHAPES.items():
        for size, radius in (("small", 0.335), ("small", 0.365), ("large", 0.49), ("large", 0.52)):
            for turn in (0, -42, -35, -28, 28, 35, 42):
                a = np.radians(turn + shapes.UPRIGHT.get(shape, 0))
                x = (dx * np.cos(a) + dy * np.sin(a)) / radius + middle_of(shape)[0]
                y = (dy * np.cos(a) - dx * np.sin(a)) / radius + middle_of(shape)[1]
                inside = distance(x, y) < 0
                overlap = (inside & lit).sum() / (inside | lit).sum()
                best = max(best, (overlap, shape, size, turn != 0))
    return best[1:]


def test_a_drawn_image_has_what_its_caption_says():
    images, captions, labels = shapes.captioned_images(4, seed=7)
    assert images.shape == (40, 3, 32, 32) and np.bincount(labels).tolist() == [4] * 10
    hues = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}
    for image, caption, label in zip(images, captions, labels, strict=True):
        first, place, *turned = caption.split(", ")
        _, size, colour, shape = first.split()
        assert shape == list(shapes.SHAPES)[label] and turned in ([], ["turned"]), caption
        lit, dx, dy = pixels(image)
        *seen, seen_turned = recognised(lit, dx, dy)
        assert seen == [shape, size], caption
        assert shape in ("disc", "ring") or seen_turned == bool(turned), caption
        r, g, b = (image.permute(1, 2, 0).numpy()[lit].mean(0) / 255).tolist()
        degrees = 360 * colorsys.rgb_to_hsv(r, g, b)[0]
        assert abs((degrees - hues[colour] + 180) % 360 - 180) < 30, caption
        row, column = -dy[0, 0] - 1 + 1 / 32, -dx[0, 0] - 1 + 1 / 32
        word = (("upper", "", "lower")[int(np.digitize(row, [-0.2, 0.2]))],
                ("left", "", "right")[int(np.digitize(column, [-0.2, 0.2]))])
        assert place == (" ".join(word).strip() or "centre"), caption


def test_words_vary_and_upright_shapes_stand_as_people_draw_them():
    images, captions, labels = shapes.captioned_images(100, seed=7)
    for words, expected in ((shapes.RADII, 1 / 2), (shapes.COLOURS, 1 / 6), (shapes.PLACES, 1 / 5),
                            (["turned"], 0.8 / 2)):
        for word in words:
            assert abs(np.mean([word in caption for caption in captions]) - expected) < 0.06, word
    for shape, above in (("triangle", False), ("heart", True), ("star", True)):
        for i in np.flatnonzero(labels == list(shapes.SHAPES).index(shape)):
            if "large" in captions[i] and "turned" not in captions[i]:
                lit, _, dy = pixels(images[i])
                assert (dy[lit.sum(1).argmax(), 0] < 0) == above, captions[i]  # where it is widest
    assert shapes.captioned_images(100, seed=8)[1] != captions


def test_the_caption_reader_is_right_on_real_images_and_on_images_by_hand():
    images, captions, _ = shapes.captioned_images(100, seed=3)
    for words in shapes.read(images):
        assert np.mean([word in c for word, c in zip(words, captions, strict=True)]) >= 0.99
    images = torch.full((4, 3, 32, 32), 60, dtype=torch.uint8)  # too dark to count as lit
    images[0, 0, 8:12, 8:12] = 255
    images[1, 1:, 20:24, 8:12] = 255
    images[2, :, 14:18, 14:18] = torch.tensor([255, 0, 255])[:, None, None]
    images[2, 2, 14:18, 14:15] = 200  # pinker on one side: the mean counts
    assert shapes.read(images) == [["red", "cyan", "magenta", "?"],
                                   ["upper left", "lower left", "centre", "?"]]


def test_words_are_numbered_and_what_is_unknown_is_refused():
    words = sorted(["a", "small", "red", "star", "upper", "left"])
    ids = shapes.word_ids(["a small RED star, upper left", "red", ""], words)
    assert ids.tolist() == [[1, 4, 3, 5, 6, 2, 0], [3] + 6 * [0], 7 * [0]]
    for caption, wrong in (("a small purple star", "'purple'"), ("red " * 8, "'red'")):
        with pytest.raises(ValueError, match=f"{wrong}; a caption is up to 7 of a, left"):
            shapes.word_ids(["a star", caption], words)


# ------------------------------------------------------------------------------------------------
# Networks


def test_captions_are_dropped_as_often_as_said(monkeypatch):
    monkeypatch.setattr(t2i, "BATCH", 20_000)
    number = torch.arange(1, 11)
    torch.manual_seed(0)
    x0, y, t, eps, ids = t2i.draw_batch(number.view(10, 1, 1, 1).float(), number,
                                        number[:, None].repeat(1, 7))
    dropped = (ids == 0).all(1)
    assert abs(dropped.double().mean() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert torch.equal(x0.flatten(), y.float())  # the rest belongs together
    assert torch.equal(ids[~dropped], y[~dropped, None].repeat(1, 7))
    assert set(y.tolist()) == set(range(1, 11)) and (t.min(), t.max()) == (0, 999)
    assert abs(eps.std() - 1) < 0.03 and eps.shape == x0.shape


def test_the_loss_is_eq_4_and_capacity_lies_in_the_up_blocks_of_diffusers_network():
    torch.manual_seed(0)
    net = t2i.TextToImage(20, True)
    reserved = cm.reserved_layers(net)
    assert reserved == cm.reserved_layers(net.unet.up_blocks)
    assert {m.layer for m in reserved} == {m for m in net.unet.up_blocks.modules() if isinstance(
        m, torch.nn.Conv2d | torch.nn.Linear)}
    for layer in reserved:
        layer.B.data.normal_(0, 0.3)
    x0, eps = torch.randn(2, 10, 4, 8, 8)
    y, t, ids = torch.arange(10), torch.randint(1000, (10,)), torch.randint(21, (10, 7))
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
    x_t = a.sqrt()[:, None, None, None] * x0 + (1 - a).sqrt()[:, None, None, None] * eps
    theta = cm.merge(net)
    plain = diffusers.UNet2DConditionModel.from_config(net.unet.config)
    plain.load_state_dict(theta.unet.state_dict(), strict=True)
    with cm.general_only(net):
        theta_g = cm.merge(net)

    def predicted(unet):
        text = net.text(net.words(ids) + net.positions)
        return unet.train()(x_t.float(), t, text).sample.double()

    torch.manual_seed(3)  # of the dropout masks: theta's, then theta_g's own
    with torch.no_grad():
        ours, general = predicted(plain), predicted(theta_g.unet)
        assert not torch.allclose(ours, predicted(plain), atol=1e-3)  # there is dropout
    n = torch.tensor(COUNTS, dtype=torch.float64)
    w = 10 * n / n.sum() - 0.2 * 10 / (n * (1 / n).sum())
    d = (ours - general).square().mean((1, 2, 3))
    capped = (w < 0) & (d > 0.1)
    assert capped.any() and (w > 0).any() and d[w > 0].max() > 0.1
    expected = (ours - eps).square().mean() + torch.where(capped, 0.1 * w, d * w).mean()
    torch.manual_seed(3)
    loss = cm.CapacityManipulation(net, COUNTS)(x0, y, t, eps, ids)[0]
    assert torch.allclose(loss.double(), expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------
# Runs


def bare(**attributes):
    setting = object.__new__(t2i.Setting)
    vars(setting).update(attributes)
    return setting


def test_scores_by_split_and_the_words_that_are_right():
    images, captions, labels = shapes.captioned_images(12, seed=0)
    setting = bare(counts=np.array(COUNTS), images=images, labels=labels)

    class Net(torch.nn.Linear):  # always says "star" (8); its features are an image's colours
        def forward(self, images):
            logits = torch.zeros(len(images), 10)
            logits[:, 8] = 1
            return images.float().mean((2, 3)), logits

    row = t2i.scores(setting, Net(1, 1), images, captions, labels)
    for split, shape in (("overall", 0.1), ("Many", 0), ("Medium", 0), ("Few", 0.25)):
        assert row[f"FD {split}"] < 1e-6 and row[f"shape {split}"] == shape
        assert row[f"colour {split}"] == row[f"place {split}"] == 1
    others = np.roll(captions, 1)
    row = t2i.scores(setting, Net(1, 1), images.flip(1), others, labels)
    swapped = {"red": "blue", "blue": "red", "yellow": "cyan", "cyan": "yellow"}
    words = [(a.split(), b.split()) for a, b in zip(captions, others, strict=True)]
    same = np.array([swapped.get(a[2], a[2]) == b[2] for a, b in words])
    few = labels >= 6
    assert row["colour overall"] == same.mean() != same[few].mean() == row["colour Few"]
    places = np.array([a.split(", ")[1] == b.split(", ")[1]
                       for a, b in zip(captions, others, strict=True)])
    assert row["place Few"] == places[few].mean() != places.mean() == row["place overall"]
    x = images.float().mean((2, 3))
    assert row["FD Few"] == pytest.approx(
        fid.frechet_distance(x[few], x[few].flip(1)), rel=1e-6) and row["FD Few"] > 1


@pytest.mark.parametrize("guidance", [0, 1.5])
def test_drawn_as_diffusers_ddim_draws(guidance):
    net = lambda x, t, ids: 0.3 * x + 0.1 * ids.float().mean(1)[:, None, None, None] * t / 1000
    setting = bare(words=["red", "star"], device="cpu", decoded=lambda x: x,
                   trained=lambda *run: run == ("CM", 7) and net)
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


def test_latents_have_unit_variance_come_back_and_keep_their_captions(tmp_path, monkeypatch):
    for name, value in {"BATCH": 8, "WARMUP": 1, "VAE_STEPS": 15}.items():
        monkeypatch.setattr(t2i, name, value)
    seen, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, *a: seen.append(high) or randint(high, *a))
    setting = t2i.Setting(SimpleNamespace(n_max=6, ir=2, runs=tmp_path))
    assert set(seen) == {60} and len(seen) == 15  # the autoencoder sees every class as often
    latents, labels, ids = setting.data
    assert labels.bincount().tolist() == setting.counts.tolist() == cm.class_counts(6, 2, 10)
    assert latents.shape[1:] == (4, 8, 8) and latents.std() == pytest.approx(1, rel=1e-4)
    x = setting.vae.decode(setting.scale * latents).sample.clamp(-1, 1)
    images = ((x + 1) * 127.5).round().byte()
    assert torch.equal(setting.decoded(latents), images)
    index = cm.long_tail_indices(setting.labels, 2, n_max=6)
    real = setting.images[index]
    error = (x - cm.to_float(real)).square().mean()
    assert error < 0.8 * cm.to_float(real).square().mean()  # it learns
    for y, row, colour, place in zip(labels, ids, *shapes.read(real), strict=True):
        words = [setting.words[i - 1] for i in row if i]
        assert words[2:4] == [colour, list(shapes.SHAPES)[y]]
        assert words[4:4 + len(place.split())] == place.split()


ARGS = ["--n-max", "4", "--ir", "2", "--steps", "3", "--num-images", "1",
        "--seeds", "5", "--runs", "runs", "--rows", "rows.csv", "--assets", "."]


def test_a_miniature_stopped_and_resumed_ends_bit_for_bit(kills_at, tmp_path, monkeypatch, capsys):
    small = {"BATCH": 2, "SAMPLE_STEPS": 1, "CHANNELS": (8, 16), "VAE_STEPS": 2}
    for name, value in small.items():
        monkeypatch.setattr(t2i, name, value)
    monkeypatch.setattr(fid, "train_classifier", functools.partial(fid.train_classifier, steps=1))
    drawn, errors, results, captioned_images, distance = (
        [], [], [], shapes.captioned_images, cm.squared_distance)
    monkeypatch.setattr(shapes, "captioned_images", lambda n, seed: (
        drawn.append((n, seed)), captioned_images(n, seed))[1])
    monkeypatch.setattr(cm, "squared_distance", lambda a, b: (
        errors.append(distance(a, b)), errors[-1])[1])
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "stopped":
            with monkeypatch.context() as patch:  # CM's second step
                patch.setattr(cm, "update", kills_at(7, cm.update))
                with pytest.raises(SystemExit) as stopped:
                    t2i.main(ARGS)
            assert stopped.value.code == 130
        capsys.readouterr()
        t2i.main(ARGS)
        results.append((Path("rows.csv").read_bytes(), capsys.readouterr().out,
                        Path("text_to_image.png").read_bytes()))
    assert results[0] == results[1] and len(results[0][0].splitlines()) == 6
    # trained on and compared with images of seed 0, captions of another seed; the judge is tested
    assert drawn[:3] == [(4, 0), (100, 99), (1, 105)]
    # DDPM's first and CM's, three later: weights, batch, noise and theta's masks are the same
    assert torch.equal(errors[0], errors[3])

    monkeypatch.setattr(cm, "update", None)  # nothing is trained any more
    t2i.main([*ARGS, "--table"])
    assert capsys.readouterr().out == results[0][1]
    t2i.main([*ARGS, "--prompt", "a small red star, upper left"])
    assert Path("runs/prompt.png").is_file()
    with pytest.raises(SystemExit):
        t2i.main([*ARGS, "--num-images", "2"])
    assert "other options" in capsys.readouterr().err
