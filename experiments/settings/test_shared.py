"""Tests of what the three settings share, and of what their commands refuse."""

import importlib
from types import SimpleNamespace

import pandas as pd
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
    extra = nn.Linear(1, 1)
    shared.fit(net, lambda i: (net(torch.randn(4, 3)) - i).square().mean(), tmp_path / "x.pt", "",
               5, 0, 0.1, warmup=4, ema=0.15, weight_decay=0.1, extra=extra)
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert torch.allclose(net.weight, average) and torch.equal(net.bias, bias)
    assert not net.training and not net.weight.requires_grad
    saved = torch.load(tmp_path / "x.pt")["state"]
    assert not torch.allclose(saved["trained"]["0"], average)
    assert saved["trained"].keys() == {"0"} and saved["extra"].keys() == {"weight", "bias"}


def test_samples_are_of_classes_in_turn_and_scored_by_split(tmp_path, monkeypatch):
    data = SimpleNamespace(images=torch.zeros(1), names="abc", counts=torch.tensor([5, 3, 2]))
    drawn, file = [], tmp_path / "x.npz"
    shared.sample(file, lambda y, seeds: (
        drawn.extend(zip(y.tolist(), seeds, strict=True)),
        y[:, None, None, None] / 127.5 - torch.ones(1, 1, 4, 2))[1], data, 8, 5, batch=3)
    assert drawn == [(i % 3, cm.hashed_seed("image", 5, i)) for i in range(8)]
    images, labels, counts = fid.read_images(file)
    assert images.shape == (8, 1, 4, 2)
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert list(counts) == [5, 3, 2]
    monkeypatch.setattr(fid, "evaluate", lambda *what, **how: (
        seen.append((*what, how["features"])), {"Few": {"FD": 1, "recall": 2}})[1])
    seen, config = [], cm.Config(dataset="folder", data="x")
    assert shared.scores(file, config, "cpu", tmp_path, ["recall Few"]) == {"recall Few": 2}
    assert seen == [(file, "folder", "x", "classifier")]


def test_compared_by_hand():
    rows = pd.DataFrame([dict(method=method, guidance=w, seed=seed, size=1234.0,
                              FD=(1 if method == "DDPM" else 3) * seed + w)
                         for seed in (1, 2) for method, w in (
                             ("real", 0), ("DDPM", 0), ("CM", 0), ("DDPM", 1.5), ("CM", 1.5))])
    text = shared.compared(rows, {"FD": 1}, ["DDPM"], by=["guidance"], same=["size"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in text.splitlines() if line.startswith("|")]
    assert text.startswith("exploratory: 2 seeds; ")
    assert lines[2:7] == [[w, method, "1,234", "2", value] for w, method, value in (
        ("0", "real", "4.5 ± 2.1"), ("0", "DDPM", "1.5 ± 0.7"), ("0", "CM", "4.5 ± 2.1"),
        ("1.5", "DDPM", "3.0 ± 0.7"), ("1.5", "CM", "6.0 ± 2.1"))]
    # differences 2 and 4: mean 3, t(0.975, 1) = 12.706, standard error 1
    assert lines[9:] == [[w, "CM − (DDPM)", "+3.0 [-9.7, +15.7]"] for w in ("0", "1.5")]


@pytest.mark.parametrize("chapter, arguments, says", [
    ("finetune", "--rank-ratio 0.1", "--rank-ratio has no meaning"),
    ("finetune", "--seed 3", "type --seeds"),
    ("finetune", "--pretrained none --data . --prompt x", "--prompt is x"),
    ("finetune", "--pretrained none --data .", "--pretrained is none"),
    ("consistency", "--base oc", "--base has no meaning"),
    ("consistency", "--data none", "fashion16"),
    ("text_to_image", "--n-max 4", "smallest class empty")])
def test_bad_input_is_one_line_and_status_2(chapter, arguments, says, tmp_path, monkeypatch,
                                            capsys):
    script = importlib.import_module(f"experiments.settings.{chapter}.__main__")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--rows", "rows.csv", "--assets", ".", *arguments.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
