"""Tests of what the chapters share, of benchmark, picture and make_fashion16; and of every chapter:
its rows, its table.md, its README, what its script says to bad input."""

import importlib
import inspect
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

import cm
from experiments import baselines, benchmark, common, make_fashion16, picture

HERE = Path(__file__).parent
MINIATURE = ["--channels", "8", "--multipliers", "1", "2", "--image-size", "8",
             "--batch-size", "8", "--warmup", "1", "--log-every", "2"]

WITH_ROWS = sorted(path for path in HERE.rglob("*.py")
                   if "common.parser(__file__, __doc__" in path.read_text()
                   and "rows=False" not in path.read_text() and "test_" not in path.name)
TABLES = {path: path.with_name("table.md" if path.stem == "__main__" else f"{path.stem}.md")
          for path in WITH_ROWS}
READMES = sorted(HERE.rglob("README.md"))


def name_of(path):
    return str(path.relative_to(HERE))


def module(path):
    return importlib.import_module(".".join(path.relative_to(HERE.parent).with_suffix("").parts))


@pytest.mark.parametrize("path", [path for path in WITH_ROWS if TABLES[path].is_file()],
                         ids=name_of)
def test_a_table_is_printed_as_its_file_shows_it(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without runs/
    module(path).main(["--table", "--assets", str(tmp_path)])
    assert capsys.readouterr().out == TABLES[path].read_text()


@pytest.mark.parametrize("script, arguments, says", [
    *[(name_of(path), "--table", "has no rows") for path in WITH_ROWS],
    ("study/__main__.py", "--table --lr 1", "--lr has no meaning beside --table"),
    ("theory/divergence.py", "--lr 1", "--lr has no meaning"),
    ("theory/gradients.py", "--seed 5", "type --seeds"),
    ("theory/pruning.py", "", "type the checkpoint.pt"),
    ("theory/assumptions.py", "--trials 5", "unrecognized arguments"),
    ("picture.py", "--samples none.npz", "can't be loaded"),
    ("settings/finetune/__main__.py", "--rank-ratio 0.1", "--rank-ratio has no meaning"),
    ("settings/finetune/__main__.py", "--pretrained none --data . --prompt x", "--prompt is x"),
    ("settings/finetune/__main__.py", "--pretrained none --data .", "--pretrained is none"),
    ("settings/consistency/__main__.py", "--base oc", "--base has no meaning"),
    ("classification/__main__.py", "--steps 3", "--steps has no meaning"),
    ("classification/downstream.py", "--seed 3", "type --seeds")])
def test_bad_input_is_one_line_and_status_2(script, arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ["--rows", "rows.csv", "--assets", "."] if HERE / script in WITH_ROWS else []
    with pytest.raises(SystemExit) as stopped:
        module(HERE / script).main(own + arguments.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_a_readme_is_short_its_verdict_first_its_links_whole_its_commands_parse(path, capsys):
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines[0].startswith("# ") and lines[1].startswith("**")
    if path.parent.name != "exercises":
        assert len(text.splitlines()) <= (100 if path.parent == HERE else 120)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or (path.parent / link).exists(), link
    for name in re.findall(r"```python\nclass (\w+)\(cm", text):  # a variation, in full
        assert f"```python\n{inspect.getsource(getattr(baselines, name))}```\n" in text, name
    of_cm = {"--" + name.replace("_", "-") for name in cm.Config.__dataclass_fields__}
    for script, arguments in re.findall(r"python -m experiments\.([\w.]+)([^\n`#]*)", text):
        place = HERE.joinpath(*script.split("."))
        place = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        with pytest.raises(SystemExit):
            module(place).main(["--help"])
        own = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z][a-z-]*", arguments)) <= own | of_cm, script


def test_what_has_no_row_is_measured_and_rows_are_replaced(tmp_path):
    path, measured = tmp_path / "new" / "rows.csv", []

    def measure(method, seed):
        measured.append((method, seed))
        return [dict(x=1 / 3), dict(x=2)] if method == "A, m" else [dict(y=math.nan)]

    keys = [dict(method=method, seed=seed) for method, seed in (("A, m", 1), ("B", 2), ("B", 3))]
    for number in (1, 3, 3):
        common.study(path, "--lr 1", keys[:number], measure)
    assert measured == [tuple(key.values()) for key in keys]
    assert path.read_text() == ('method,seed,x,options,y\n"A, m",1,0.333333,--lr 1,\n'
                                '"A, m",1,2,--lr 1,\nB,2,,--lr 1,nan\nB,3,,--lr 1,nan\n')
    with pytest.raises(ValueError, match="other options \\(--lr 1\\)"):
        common.study(path, "--lr 2", keys, measure)

    new = common.text([dict(method="B", seed=2, x=2.0, options="")])
    rows = common.replace_rows(common.read_rows(path), new, ["method", "seed"])
    assert rows[["seed", "x", "y"]].to_numpy().tolist() == [
        ["1", "0.333333", ""], ["1", "2", ""], ["3", "", "nan"], ["2", "2", ""]]
    number = common.numbers(rows, ("method", "options"))
    assert number["x"].tolist()[::3] == [0.333333, 2] and number["y"].isna().all()


def test_options_of_cm_and_of_a_table():
    flags, config, typed = common.configured(
        ["--lam", "2", "--guidance=1"], ["base", "sampling"], ["guidance"], n_max="40", lam="3")
    assert flags == ["--lam", "2", "--guidance=1", "--dataset", "fashion16", "--n-max", "40"]
    assert (config.lam, config.guidance, config.n_max, config.image_size) == (2, 1, 40, 16)
    assert typed == {"lam", "guidance", "dataset", "n_max"}
    settings = common.settings
    assert settings(["--data", "X", "--lam=2"]) == settings(["--lam", "2", "--data=Y Z"])
    assert settings(["--steps", "3", "--lr", "1"]) == "--lr 1 --steps 3"


def test_a_run_goes_on_and_says_where_it_ran_off(tmp_path, monkeypatch):
    monkeypatch.setattr(cm, "report", lambda *_: None)
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.csv").write_text("killed before there was a checkpoint")
    for steps in ("2", "3"):
        assert common.run([*MINIATURE, "--steps", steps], out) == ""
    assert common.read_rows(out / "log.csv")["step"].tolist() == ["2", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(cm, "train", None)  # what is finished isn't touched
        assert common.run([*MINIATURE, "--steps", "3"], out) == ""

    draw, made = cm.draw_batch, [*MINIATURE, "--steps", "9"]

    def runs_off(data, config, size, step, rank):
        x0, *rest = draw(data, config, size, step, rank)
        return (x0 + (math.inf if step == 6 else 0), *rest)

    monkeypatch.setattr(cm, "draw_batch", runs_off)
    for _ in range(2):  # again from its last good checkpoint
        assert common.run(made, out) == "not finite between steps 4 and 6"
    with pytest.raises(ValueError, match="--lr is 1.0"):
        common.run([*made, "--lr", "1"], out)


def test_differences_against_scipys_paired_intervals():
    a, b = (pd.Series(values, [3, 1, 0, 2]) for values in np.random.RandomState(0).rand(2, 4))
    for other in (b, b[[2, 0]]):  # in another order; seeds of one alone don't count
        seeds = other.index
        low, high = scipy.stats.ttest_rel(a[seeds], other).confidence_interval(0.95)
        expected = f"{(low + high) / 2:+.5f} [{low:+.5f}, {high:+.5f}]"
        assert common.difference(a, other[::-1], 5) == expected
    assert common.difference(a, b[[1]]) == f"{a[1] - b[1]:+.2f}"
    b[1] = math.nan  # a run that ran off makes the whole difference unknown
    assert common.difference(a, b) == common.difference(a, b[[]]) == "–"


def test_spread_by_hand():
    assert common.spread([1, math.nan, 2], 1) == "1.5 ± 0.7"  # sqrt(1 / 2)
    assert [common.spread(x, 2, "+") for x in ([3], [])] == ["+3.00", "–"]


def test_holm_against_a_hand_worked_example():
    assert np.allclose(common.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(common.holm([0.6, math.nan, 0.001]), [1, 1, 0.003])


def trained(path, steps=20, act=lambda i: None, **how):
    """What common.train makes of a small network with dropout: (its weights, the steps made). act
    is called after each step; what it returns is the step's loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    adam, seen = torch.optim.Adam(net.parameters()), []

    def step(i):
        loss = net(torch.randn(8, 4)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        seen.append(i)
        return act(i) or loss

    common.train(step, {"net": net, "adam": adam}, path, steps, **{"every": 6} | how)
    return nn.utils.parameters_to_vector(net.parameters()).detach(), seen


def test_training_killed_goes_on_bit_for_bit(tmp_path):
    whole, seen = trained(tmp_path / "whole.pt")
    assert seen == list(range(1, 21))
    path = tmp_path / "new" / "cut.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(path, act=mock.Mock(side_effect=[*13 * [None], KeyboardInterrupt]))
    for left in (list(range(13, 21)), []):  # then nothing is left to do
        torch.rand(3)  # what was drawn in between doesn't matter
        weights, seen = trained(path)
        assert seen == left and torch.equal(weights, whole)
    assert not torch.equal(trained(tmp_path / "other.pt", seed=1)[0], whole)


def test_training_keeps_its_last_good_checkpoint_and_refuses_one_that_does_not_fit(tmp_path):
    path = tmp_path / "c.pt"
    with pytest.raises(FloatingPointError, match="not finite at step 12"):
        trained(path, act=lambda i: math.nan if i == 12 else None, options="--lr 1")
    assert trained(path, 7, options="--lr 1")[1] == [7]
    for steps, how, says in ((8, {}, "other options"), (6, {"options": "--lr 1"}, "at step 7"),
                             (8, {"options": "--lr 1", "seed": 1}, "seed 0, --lr 1")):
        with pytest.raises(ValueError, match=says):
            trained(path, steps, **how)


def test_benchmark_in_a_miniature(capsys, monkeypatch):
    pytest.importorskip("torch_fidelity")
    for name, value in (("SIZE", 200), ("DIM", 64), ("REPEATS", 1)):
        monkeypatch.setattr(benchmark, name, value)
    benchmark.main(["--preset", "small", "--batch-size", "2"])
    out = capsys.readouterr().out
    times, memory = re.search(r"has ([\d.]+) times .* keeps ([\d.]+) times", out).groups()
    assert 2 <= float(times) < 2.1 and 1.7 < float(memory) < 2.3
    *_, step = rows = re.findall(r"\| +([\d.]+) +\| +([\d.]+) +\| +([\d.]+) \[", out)
    a, b, ratio = map(float, step)
    assert len(rows) == 4 and abs(ratio / (b / a) - 1) < 0.1


def test_picture_shows_the_studys_samples_of_the_most_frequent_and_the_rare_classes(
        tmp_path, monkeypatch):
    panels, files = [], []
    monkeypatch.setattr(cm, "draw_panels", lambda *drawn: panels.append(drawn))
    config = cm.Config(image_size=8, ir=10, n_max=50).resolved()
    for value, arm in enumerate(("CM", "agreement-alone")):
        files.append(tmp_path / f"large-{arm}-20" / "samples.npz")
        (files[-1].parent / "run").mkdir(parents=True)
        torch.save(dict(config=vars(config)), files[-1].parent / "run" / "checkpoint.pt")
        np.savez(files[-1], arr_0=np.full((30, 8, 8, 1), value, "u1"), arr_1=np.arange(30) % 10)
    picture.main(["--samples", *map(str, files), "--assets", str(tmp_path)])
    (shown, names, path), = panels
    assert list(shown) == ["real", "CM", "agreement alone"] and path.parent == tmp_path
    assert [name.split()[-1] for name in names] == ["50", "10", "8", "6", "5"]
    assert [panel.unique().tolist() for panel in list(shown.values())[1:]] == [[0], [1]]


def test_fashion16_is_what_debians_files_make(tmp_path):
    if not make_fashion16.DEBIAN.is_dir():
        pytest.skip("apt-get install dataset-fashion-mnist")
    make_fashion16.make(tmp_path / "made.npz")
    with np.load(tmp_path / "made.npz") as made, np.load(cm.FASHION16) as committed:
        assert made.files == committed.files
        assert all((made[name] == committed[name]).all() for name in made.files)
