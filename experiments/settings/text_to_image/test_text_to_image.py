"""Tests of text to image. They need diffusers."""

import colorsys
import functools
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import cm
import fid
from experiments.settings.text_to_image import __main__ as t2i
from experiments.settings.text_to_image import shapes

diffusers = pytest.importorskip("diffusers")
COUNTS = [100, 60, 40, 25, 15, 10, 6, 4, 2, 1]


def test_a_drawn_image_has_what_its_caption_says():
    images, captions, labels = shapes.captioned_images(100, seed=7)
    assert images.shape == (1000, 3, 32, 32) and np.bincount(labels).tolist() == [100] * 10
    for words, share in ((shapes.RADII, 1 / 2), (shapes.COLOURS, 1 / 6), (shapes.PLACES, 1 / 5),
                         (["turned"], 0.8 / 2)):
        for word in words:
            assert abs(np.mean([word in caption for caption in captions]) - share) < 0.06, word
    hues = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}
    (x, y), areas = np.meshgrid(*2 * [(np.arange(32) + 0.5) / 16 - 1]), defaultdict(list)
    for image, caption, label in zip(images, captions, labels, strict=True):
        first, place, *turned = caption.split(", ")
        _, size, colour, shape = first.split()
        assert shape == list(shapes.SHAPES)[label], caption
        lit = image.amax(0).numpy() > 127
        r, g, b = (image.permute(1, 2, 0).numpy()[lit].mean(0) / 255).tolist()
        degrees = 360 * colorsys.rgb_to_hsv(r, g, b)[0]
        assert abs((degrees - hues[colour] + 180) % 360 - 180) < 30, caption
        word = (("upper", "", "lower")[int(np.digitize(y[lit].mean(), [-0.2, 0.2]))],
                ("left", "", "right")[int(np.digitize(x[lit].mean(), [-0.2, 0.2]))])
        assert place == (" ".join(word).strip() or "centre"), caption
        areas[shape, size].append(lit.sum())
        if shape in ("triangle", "heart", "star") and size == "large" and not turned:
            widest = (y - y[lit].mean())[lit.sum(1).argmax(), 0]  # as people draw them
            assert (widest < 0) == (shape != "triangle"), caption
    for shape in shapes.SHAPES:
        assert min(areas[shape, "large"]) > max(areas[shape, "small"]), shape
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


def test_the_loss_is_eq_4_and_capacity_lies_in_the_up_blocks_of_diffusers_network(
        weighed, monkeypatch):
    x0, eps = torch.randn(2, 10, 4, 8, 8)
    y, t, ids = torch.arange(10), torch.randint(1000, (10,)), torch.randint(21, (10, 7))
    monkeypatch.setattr(t2i, "draw_batch", lambda: (x0, y, t, eps, ids))
    fit = mock.Mock(side_effect=lambda net, *_: net)
    bare(args=SimpleNamespace(steps=3), words=20 * ["x"], counts=np.array(COUNTS), device="cpu",
         data=(), fit=fit).trained("CM", 5)
    net, loss = fit.call_args.args[:2]
    reserved = cm.reserved_layers(net)
    assert {m.layer for m in reserved} == {m for m in net.unet.up_blocks.modules() if isinstance(
        m, torch.nn.Conv2d | torch.nn.Linear)}
    for layer in reserved:
        layer.B.data.normal_(0, 0.3)
    x_t = diffusers.DDPMScheduler(1000, 1e-4, 0.02).add_noise(x0, eps, t)
    theta = diffusers.UNet2DConditionModel.from_config(net.unet.config)
    theta.load_state_dict(cm.merge(net).unet.state_dict(), strict=True)
    with cm.general_only(net):
        theta_g = cm.merge(net).unet

    def predicted(unet):
        text = net.text(net.words(ids) + net.positions)
        return unet.train()(x_t, t, text).sample.double()

    torch.manual_seed(3)  # of the dropout masks: theta's, then theta_g's own
    with torch.no_grad():
        ours, general = predicted(theta), predicted(theta_g)
        assert not torch.allclose(ours, predicted(theta), atol=1e-3)  # there is dropout
    d = (ours - general).square().mean((1, 2, 3))
    loss_cm = weighed(d, y, COUNTS)
    assert d[loss_cm < 0].max() > 0.1 and d[loss_cm > 0].max() > 0.1  # past the fuse, or without
    expected = (ours - eps).square().mean() + loss_cm.mean()
    torch.manual_seed(3)
    assert torch.allclose(loss(1).double(), expected, rtol=1e-5)


def bare(**attributes):
    setting = object.__new__(t2i.Setting)
    vars(setting).update(attributes)
    return setting


def test_scores_by_split_and_the_words_that_are_right(monkeypatch):
    images, captions, labels = shapes.captioned_images(12, seed=0)
    setting = bare(counts=np.array(COUNTS), images=images, labels=labels)
    stars = torch.eye(10)[8].repeat(120, 1)  # the judge always says "star", and looks at colours
    monkeypatch.setattr(fid, "extract", lambda net, x, what: (x.float().mean((2, 3)), stars))
    row = t2i.scores(setting, None, images.roll(1, 0), captions, labels)
    said = np.array([[c.split()[2], c.split(", ")[1]] for c in captions])
    (colour, place), few = (said == np.roll(said, 1, 0)).T, labels >= 6
    for name, right in (("colour", colour), ("place", place)):
        assert row[f"{name} overall"] == right.mean() and row[f"{name} Few"] == right[few].mean()
    assert [row[f"shape {s}"] for s in ("overall", "Many", "Few")] == [0.1, 0, 0.25]
    x = images.float().mean((2, 3))
    assert row["FD Few"] == pytest.approx(
        fid.frechet_distance(x[few], x.roll(1, 0)[few]), rel=1e-6) and row["FD Few"] > 1e-3


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
    monkeypatch.setattr(torch, "randint", mock.Mock(wraps=torch.randint))
    setting = t2i.Setting(SimpleNamespace(n_max=6, ir=2, runs=tmp_path))
    drawn = torch.randint.call_args_list  # the autoencoder sees every class as often
    assert drawn == 15 * [mock.call(60, (8,))]
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


def test_a_miniature_stopped_and_resumed_ends_bit_for_bit(
        stopped_and_whole, monkeypatch, capsys):
    small = {"BATCH": 2, "SAMPLE_STEPS": 1, "CHANNELS": (8, 16), "VAE_STEPS": 2}
    for name, value in small.items():
        monkeypatch.setattr(t2i, name, value)
    monkeypatch.setattr(fid, "train_classifier", functools.partial(fid.train_classifier, steps=1))
    errors, distance = [], cm.squared_distance
    images = mock.Mock(wraps=shapes.captioned_images)
    monkeypatch.setattr(shapes, "captioned_images", images)
    monkeypatch.setattr(cm, "squared_distance", lambda a, b: (
        errors.append(distance(a, b)), errors[-1])[1])
    out = stopped_and_whole(t2i.main, ARGS, (cm, "update", 7))  # CM's second step
    assert len(Path("rows.csv").read_text().splitlines()) == 6 and "CM − (DDPM)" in out
    assert Path("text_to_image.png").is_file()
    # trained on and compared with images of seed 0, captions of another seed; the judge is tested
    images.assert_has_calls([mock.call(4, seed=0), mock.call(100, seed=99), mock.call(1, 105)])
    # DDPM's first and CM's, three later: weights, batch, noise and theta's masks are the same
    assert torch.equal(errors[0], errors[3])
    t2i.main([*ARGS, "--prompt", "a small red star, upper left"])
    assert Path("runs/prompt.png").is_file()
    with pytest.raises(SystemExit):
        t2i.main([*ARGS, "--num-images", "2"])
    assert "other options" in capsys.readouterr().err
