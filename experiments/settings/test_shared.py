"""Tests of what the three settings share."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import cm
import fid
from experiments.settings import shared


def test_fit_trains_what_is_not_frozen_and_ends_with_its_averages(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    bias, average, rates = net.bias.clone(), net.weight.detach().clone(), []

    def recorded(loss, parameters, averages, adam, *rest, update=cm.update):
        nonlocal average
        update(loss, parameters, averages, adam, *rest)
        i = len(rates) + 1
        decay = min(0.15, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * net.weight.detach()
        rates.append(adam.param_groups[0]["lr"])
        assert adam.param_groups[0]["weight_decay"] == 0.1

    monkeypatch.setattr(cm, "update", recorded)
    shared.fit(net, lambda i: (net(torch.randn(4, 3)) - i).square().mean(), tmp_path / "x.pt", "",
               5, 0, 0.1, warmup=4, ema=0.15, weight_decay=0.1)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert torch.allclose(net.weight, average) and torch.equal(net.bias, bias)
    assert not net.training and not net.weight.requires_grad
    saved = torch.load(tmp_path / "x.pt")["state"]
    assert not torch.allclose(saved["trained"]["0"], average)
    assert saved["trained"].keys() == {"0"}


def test_samples_are_of_classes_in_turn_scored_by_split_and_drawn_by_class(tmp_path, monkeypatch):
    data = SimpleNamespace(images=torch.zeros(1), names="abc", counts=torch.tensor([5, 3, 2]),
                           first=lambda *of: of)
    drawn, file = [], tmp_path / "x.npz"
    shared.sample(file, lambda y, seeds: (
        drawn.extend(zip(y.tolist(), seeds, strict=True)),
        y[:, None, None, None] / 127.5 - torch.ones(1, 1, 4, 2))[1], data, 8, 5, batch=3)
    assert drawn == [(i % 3, cm.hashed_seed("image", 5, i)) for i in range(8)]
    images, labels, counts = fid.read_images(file)
    assert images.shape == (8, 1, 4, 2)
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert list(counts) == [5, 3, 2]

    evaluate, config = mock.Mock(return_value={"Few": {"FD": 1, "recall": 2}}), cm.Config(data="x")
    monkeypatch.setattr(fid, "evaluate", evaluate)
    assert shared.scores(file, config, "cpu", tmp_path, ["recall Few"]) == {"recall Few": 2}
    evaluate.assert_called_with(file, "fashion16", "x", features="classifier", device="cpu",
                                cache=tmp_path)

    monkeypatch.setattr(cm, "Data", lambda _: data)
    monkeypatch.setattr(cm, "draw_panels", lambda *what: drawn.append(what))
    for split, classes in ((None, [0, 1, 2]), ("Few", [2])):
        args = SimpleNamespace(num_images=6)
        shared.draw(config, {"CM": file}, args, tmp_path / "x.png", split)
        panels, names, _ = drawn[-1]
        assert list(panels["real"][0]) == classes and panels["real"][1] == 2
        assert panels["CM"][:, 0, 0, 0].tolist() == [k for k in classes for _ in range(2)]
        assert names == [("a  5", "b  3", "c  2")[k] for k in classes]
