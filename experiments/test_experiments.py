"""Tests of experiments/. They need pandas and tabulate; the benchmark's also its peers."""

import csv
import functools
import importlib
import inspect
import math
import os
import re
import shutil
import signal
import sys
import types
from concurrent.futures import Executor, Future
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm
import fid
import theory

pd = pytest.importorskip("pandas")
pytest.importorskip("tabulate")

torch.set_num_threads(1)  # pytest -n 2 runs two processes; results repeat with as many threads
ROOT = Path(cm.__file__).parent
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "experiments" / "README.md").read_text()
MINIATURE = ["--channels", "8", "--multipliers", "1", "2",
             "--image-size", "8", "--batch-size", "8", "--rank-ratio", "0.25",
             "--warmup", "1", "--log-every", "2"]


def tiny_losses(reserve):
    """A CapacityManipulation of a small UNet, every weight (B too) off its initial value."""
    torch.manual_seed(0)
    unet = cm.UNet(4, 1, 8, 8, (1, 2), 1, (4,), 0.0)
    if reserve:
        cm.reserve_capacity(unet.decoder, 0.25)
    for p in unet.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return cm.CapacityManipulation(unet.eval(), [40, 10, 5, 2], no_cm=not reserve)


def numbers(rows):
    """A table of numbers as it lies on disk and as a script reads it."""
    from experiments import common
    words = "method", "base", "counts", "end", "sampler", "options"
    return common.numbers(common.text(rows), words)


def shown_cells(text):
    """Tables of Markdown in a text, each a list of rows of cells."""
    tables, last = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            if not last:
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        last = line.startswith("|")
    return tables


# ------------------------------------------------------------------------------------------------
# All scripts


@pytest.mark.parametrize("script, arguments, says", [
    ("study", "--jobs 0", "--jobs is 0"), ("study", "--steps x", "invalid int"),
    ("study", "--table", "has no rows"), ("divergence", "--lr 1e-3", "--lr has no meaning"),
    ("divergence", "--table", "has no rows"), ("gradients", "--samples 10", "--samples is 10"),
    ("gradients", "--table", "has no rows"), ("gradients", "--seed 5", "type --seeds"),
    ("gradients", "--base oc", "--base has no meaning"), ("pruning", "", "--table"),
    ("pruning", "--table", "has no rows"), ("pruning", "none.pt", "can't be loaded"),
    ("benchmark", "--repeats 0", "at least 1"), ("benchmark", "--size x", "invalid int"),
    ("assumptions", "--trials 0", "--trials is 0"), ("assumptions", "--seed x", "invalid int"),
    ("assumptions", "--table", "has no rows")])
def test_bad_input_is_one_line_and_status_2(script, arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ["--rows", "rows.csv", "--assets", "."]
    own = {"benchmark": [], "assumptions": ["--out", "."]}.get(script, own)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"experiments.{script}").main(own + arguments.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_scripts_import_no_other_script():
    """But for what they share, which has no command line."""
    commandless = {"common", "baselines", "classifiers", "pretrained", "shapes"}
    for path in (ROOT / "experiments").glob("*.py"):
        if not path.name.startswith("test_"):
            for line in re.findall(r"^\s*((?:from|import) experiments.*)$", path.read_text(), re.M):
                names = line.removeprefix("from experiments import ").split(", ")
                assert set(names) <= commandless, path
    for name in commandless:
        assert "__main__" not in (ROOT / "experiments" / f"{name}.py").read_text()


# ------------------------------------------------------------------------------------------------
# common.py


def test_options_that_mean_nothing_are_refused_by_name_and_by_group():
    from experiments import common
    flags, config, typed = common.configured(
        ["--lam", "2", "--guidance", "1"], ["base", "sampling"], ["guidance"], n_max="40")
    assert flags == ["--lam", "2", "--guidance", "1", "--dataset", "fashion16", "--n-max", "40"]
    assert (config.lam, config.guidance, config.n_max, config.image_size) == (2, 1, 40, 16)
    assert typed == {"lam", "guidance", "dataset", "n_max"}
    for wrong in ("--base ddpm", "--sampler dpm"):
        with pytest.raises(ValueError, match=f"{wrong.split()[0]} has no meaning here"):
            common.configured(wrong.split(), ["base", "sampling"], ["guidance"])


def test_samples_are_drawn_a_row_a_class(tmp_path, monkeypatch):
    from experiments import common
    labels = np.arange(30) % 3
    images = np.full((30, 8, 8, 1), 50, np.uint8) * labels[:, None, None, None].astype(np.uint8)
    common.save_samples(tmp_path / "s.npz", images, labels, [40, 20, 5])
    assert np.load(tmp_path / "s.npz")["counts"].tolist() == [40, 20, 5]
    drawn = []
    monkeypatch.setattr(cm, "draw_panels", lambda *args: drawn.append(args))
    data = types.SimpleNamespace(names="abc", counts=[40, 20, 5],
                                 first=lambda classes, columns: (classes, columns))
    path = tmp_path / "new" / "p.png"
    common.draw_samples(data, {"CM": tmp_path / "s.npz"}, [2, 1], path, 4)
    (panels, names, where), = drawn
    assert panels["real"] == ([2, 1], 4) and names == ["c  5", "b  20"] and where == path
    assert panels["CM"][:, 0, 0, 0].tolist() == [100] * 4 + [50] * 4 and path.parent.is_dir()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_committed_rows_are_rewritten_to_the_byte(path, tmp_path):
    from experiments import common
    common.write_rows(tmp_path / "rows.csv", common.read_rows(path))
    assert (tmp_path / "rows.csv").read_bytes() == path.read_bytes()


def test_rows_are_replaced_by_key(tmp_path):
    from experiments import common
    path = tmp_path / "new" / "rows.csv"
    old = common.text([dict(method="A, m = 1", seed=0, x=0.5), dict(method="B", seed=0, x=1 / 3),
                       dict(method="B", seed=1, x=math.nan)])
    common.write_rows(path, common.replace_rows(common.read_rows(path), old, ["method", "seed"]))
    assert path.read_text() == 'method,seed,x\n"A, m = 1",0,0.5\nB,0,0.333333\nB,1,nan\n'
    new = common.text([dict(method="B", seed=0, x=2.0, y="z")])
    rows = common.replace_rows(common.read_rows(path), new, ["method", "seed"])
    common.write_rows(path, rows)
    assert path.read_text() == 'method,seed,x,y\n"A, m = 1",0,0.5,\nB,1,nan,\nB,0,2,z\n'
    assert common.read_rows(path).equals(rows) and not list(path.parent.glob(".*"))
    x = common.numbers(rows, ("method", "y"))
    assert x["x"].tolist()[::2] == [0.5, 2] and math.isnan(x["x"][1]) and x["y"][2] == "z"
    assert x["seed"].dtype == float and math.isnan(common.numbers(rows[:1], ("method",))["y"][0])


def test_options_of_cm_and_of_a_table(tmp_path):
    from experiments import common
    settings, with_defaults = common.settings, common.with_defaults
    steps = ["--steps", "3"]
    assert settings(["--data", "X", *steps]) == settings([*steps, "--data", "Y Z"]) == "--steps 3"
    assert settings([*steps, "--lr", "1"]) == settings(["--lr", "1", *steps]) == "--lr 1 --steps 3"
    for typed in (["--steps", "9"], ["--steps=9"]):
        assert with_defaults(typed, steps="7") == ["--steps", "9", "--dataset", "fashion16"]
    assert with_defaults([], steps="7", rank_ratio="0.5") == [
        "--dataset", "fashion16", "--steps", "7", "--rank-ratio", "0.5"]
    assert with_defaults(["--out=a=b"]) == ["--out", "a=b", "--dataset", "fashion16"]
    with pytest.raises(ValueError, match="rank-ratio"):
        with_defaults(["--rank-ratio", "2"])
    rows = common.text([dict(x=1, options="--lr 1"), dict(x=2, options="--lr 2")])
    common.write_rows(tmp_path / "rows.csv", rows)
    with pytest.raises(ValueError, match="other options \\(--lr 2\\)"):
        common.read_rows(tmp_path / "rows.csv", "--lr 1")
    common.write_rows(tmp_path / "rows.csv", rows[:1])
    assert common.read_rows(tmp_path / "rows.csv", "--lr 1").equals(rows[:1])


def test_rows_are_looked_up_and_added(tmp_path):
    from experiments import common
    path = tmp_path / "rows.csv"
    assert not common.has_row(path, "--lr 1", method="A", seed=1)
    common.add_rows(path, "--lr 1", [dict(method="A", seed=1, x=0.5)])
    common.add_rows(path, "--lr 1", [dict(method="B", seed=2, y=1.0), dict(method="B", seed=3)])
    assert path.read_text() == "method,seed,x,options,y\nA,1,0.5,--lr 1,\nB,2,,--lr 1,1\n" \
                               "B,3,,--lr 1,\n"
    found = [(m, s) for m in "AB" for s in (1, 2, 3) if common.has_row(
        path, "--lr 1", method=m, seed=s)]
    assert found == [("A", 1), ("B", 2), ("B", 3)]
    for call in (lambda: common.has_row(path, "--lr 2", seed=1),
                 lambda: common.add_rows(path, "--lr 2", [dict(seed=1)])):
        with pytest.raises(ValueError, match="other options"):
            call()
    with pytest.raises(ValueError, match="no column 'z'"):
        common.read_table(path, ["x", "z"])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'options'"):
        common.has_row(path, "--lr 1", seed=1)


def test_a_table_shows_our_earlier_rows_until_there_are_new_ones_and_nothing_is_added_to_them(
        tmp_path):
    from experiments import common
    path, earlier = tmp_path / "rows.csv", tmp_path / "f7283d9" / "rows.csv"
    common.write_rows(earlier, common.text([dict(x=1, options="--lr 1")]))
    before = earlier.read_bytes()
    assert common.read_table(path)["x"].tolist() == ["1"]
    assert not common.has_row(path, "--lr 1", x=1)
    common.add_rows(path, "--lr 1", [dict(x=2)])
    assert common.read_table(path)["x"].tolist() == ["2"] and earlier.read_bytes() == before


# ------------------------------------------------------------------------------------------------
# make_fashion16.py


@pytest.mark.parametrize("per_class", [3, 7])
def test_fashion16_is_laid_out_so_that_the_same_images_are_drawn(per_class):
    from experiments import make_fashion16
    labels = np.random.RandomState(5).permutation(np.repeat(np.arange(10, dtype=np.uint8), 9))
    images = np.arange(90, dtype=np.uint8)[:, None, None]  # each knows its number
    stored, kept = make_fashion16.lay_out(images, labels, per_class)
    assert kept.tolist() == np.repeat(range(10), per_class).tolist()
    for ir in (1, 3):
        of_all = images[cm.long_tail_indices(labels, ir, n_max=per_class)]
        of_few = stored[cm.long_tail_indices(kept, ir, n_max=per_class)]
        assert of_few.tolist() == of_all.tolist()
    assert (labels[stored[:, 0, 0]] == kept).all()


def test_fashion16_is_what_debians_files_make(tmp_path):
    """The long-tailed set and the test images are those of the 60,000 and the 10,000."""
    import gzip
    from experiments import make_fashion16
    if not make_fashion16.DEBIAN.is_dir():
        pytest.skip("apt-get install dataset-fashion-mnist")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in make_fashion16.DEBIAN.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    whole = cm.Data(cm.Config(dataset="fashion", data=str(tmp_path), n_max=1000).resolved())
    embedded = cm.Data(cm.Config().resolved())
    assert torch.equal(whole.images, embedded.images)
    assert torch.equal(whole.labels, embedded.labels)
    first = [whole.held_out[whole.held_out_labels == k][:200] for k in range(10)]
    assert torch.equal(torch.cat(first), embedded.held_out)
    for name in ("a", "b"):
        make_fashion16.make(tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as made, np.load(cm.FASHION16) as committed:
        assert made.files == committed.files
        assert all((made[name] == committed[name]).all() for name in made.files)


def test_a_run_goes_on_and_says_where_it_ran_off(tmp_path, monkeypatch):
    from experiments import common
    runs, end = [], 0

    def train(config, typed):
        runs.append((config.resume, config.steps, Path(config.out), "steps" in typed))
        assert config.overwrite != config.resume  # killed before there was a checkpoint: again
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "checkpoint.pt").write_text("")
        if isinstance(end, Exception):
            raise end
        return end
    monkeypatch.setattr(cm, "train", train)
    for steps in ("2", "3"):
        assert common.run([*MINIATURE, "--steps", steps], tmp_path / "run") == ""
    assert runs == [(False, 2, tmp_path / "run", True), (True, 3, tmp_path / "run", True)]
    end = FloatingPointError("the loss is not finite at step 7; base loss in this batch: ...")
    assert common.run(MINIATURE, tmp_path / "run") == "not finite at step 7"
    end = 143
    with pytest.raises(SystemExit) as stopped:
        common.run(MINIATURE, tmp_path / "run")
    assert stopped.value.code == 143
    with pytest.raises(ValueError, match="--steps is 0"):
        common.run(["--steps", "0"], tmp_path / "run")


def test_paired_interval_against_scipy():
    from scipy import stats

    from experiments import common
    a, b = (pd.Series(values, [3, 1, 0, 2]) for values in np.random.RandomState(0).rand(2, 4))
    for ours, other, relative in ((a, b, False), ((a - b) / b, 0 * b, True)):
        mean, half, n = common.difference(a, b, relative)
        low, high = stats.ttest_rel(ours, other).confidence_interval(0.95)
        assert n == 4 and np.allclose([mean - half, mean + half], [low, high])
    mean, half, n = common.difference(a, b[[2, 0]][::-1])  # seeds of one alone don't count
    low, high = stats.ttest_rel(a[[0, 2]], b[[0, 2]]).confidence_interval(0.95)
    assert n == 2 and np.allclose([mean - half, mean + half], [low, high])
    mean, half, n = common.difference(a, b[[1]])
    assert n == 1 and mean == a[1] - b[1] and math.isnan(half)
    mean, half, n = common.difference(a, b[[]])
    assert n == 0 and math.isnan(mean) and math.isnan(half)
    b[1] = math.nan  # a run that ran off makes the whole difference unknown
    mean, half, n = common.difference(a, b)
    assert n == 4 and math.isnan(mean) and math.isnan(half)


def test_table_cells():
    from experiments import common
    assert common.spread([1, 2, 6], 2) == "3.00 ± 2.65"
    assert common.spread([1, math.nan, 2], 1, "+") == "+1.5 ± 0.7"
    assert common.spread([-1.25], 2, "+") == "-1.25"
    assert common.spread([math.nan], 1) == common.spread([], 1) == "–"
    assert common.interval(-1, 0.5) == "-1.00 [-1.50, -0.50]"
    assert common.interval(2, 3, 1) == "+2.0 [-1.0, +5.0]"
    assert common.interval(2, math.nan, 1) == "+2.0"
    assert shown_cells(common.markdown([{"a": "1.50", "b": "x"}, {"a": "-3", "b": 2}])) == [
        [["a", "b"], [":-----", ":----"], ["1.50", "x"], ["-3", "2"]]]
    assert len(common.markdown([{"a": 1}]).splitlines()) == 3 and common.markdown([]) == ""


class Trained:
    """A small network with dropout, trained by common.train; `act` is called after each step."""

    def __init__(self, path, act=None):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.path, self.act, self.seen = path, act, []

    def step(self, i):
        loss = self.net(torch.randn(8, 4)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seen.append(i)
        return self.act(i) if self.act and self.act(i) else loss

    def train(self, steps=20, **kw):
        from experiments import common
        state = {"net": self.net, "optimizer": self.optimizer}
        common.train(self.step, state, self.path, steps, **({"every": 6} | kw))
        return self

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_stops_on_a_signal_and_goes_on_bit_for_bit(number, tmp_path, capsys):
    whole = Trained(tmp_path / "whole.pt").train()
    assert whole.seen == list(range(1, 21))

    def stop(i):
        if i == 9:
            os.kill(os.getpid(), number)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stopped:
        Trained(tmp_path / "cut.pt", stop).train()
    assert stopped.value.code == 128 + number
    assert "stopped at step 9; the same command goes on" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    torch.rand(3)  # what was drawn in between doesn't matter
    cut = Trained(tmp_path / "cut.pt").train()
    assert cut.seen == list(range(10, 21)) and torch.equal(cut.weights(), whole.weights())
    again = Trained(tmp_path / "cut.pt").train()  # nothing is left to do
    assert again.seen == [] and torch.equal(again.weights(), whole.weights())
    longer = Trained(tmp_path / "cut.pt").train(25)
    assert longer.seen == list(range(21, 26))
    assert torch.equal(longer.weights(), Trained(tmp_path / "25.pt").train(25).weights())
    assert {p.name for p in tmp_path.iterdir()} == {"whole.pt", "cut.pt", "25.pt"}


def test_training_stopped_at_its_last_step_is_finished_and_what_follows_is_not_begun(tmp_path):
    def stop(i):
        if i == 7:
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        Trained(tmp_path / "new" / "c.pt", stop).train(7)
    assert Trained(tmp_path / "new" / "c.pt").train(7).seen == []


def test_training_killed_goes_on_from_its_last_checkpoint(tmp_path):
    def die(i):
        if i == 14:
            raise RuntimeError("as if killed")
    whole = Trained(tmp_path / "whole.pt").train()
    with pytest.raises(RuntimeError):
        Trained(tmp_path / "cut.pt", die).train()
    (tmp_path / ".cut.99.tmp.pt").write_text("half")
    cut = Trained(tmp_path / "cut.pt").train()
    assert cut.seen == list(range(13, 21)) and torch.equal(cut.weights(), whole.weights())
    assert not (tmp_path / ".cut.99.tmp.pt").exists()
    other = Trained(tmp_path / "other.pt").train(seed=1)
    assert not torch.equal(other.weights(), whole.weights())


def test_training_that_runs_off_keeps_its_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step 12"):
        Trained(tmp_path / "off.pt", lambda i: math.nan if i == 12 else None).train()
    assert Trained(tmp_path / "off.pt").train(7).seen == [7]


def test_training_refuses_a_checkpoint_that_does_not_fit(tmp_path):
    path = tmp_path / "c.pt"
    Trained(path).train(8, options="--lr 1")
    before = path.read_bytes()
    for steps, kw, says in ((8, {}, "other options"), (6, {"options": "--lr 1"}, "at step 8"),
                            (8, {"options": "--lr 1", "seed": 1}, "seed 0, --lr 1; name")):
        with pytest.raises(ValueError, match=says):
            Trained(path).train(steps, **kw)
    path.write_bytes(before[:len(before) // 2])
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        Trained(path).train(8, options="--lr 1")
    assert path.read_bytes() == before[:len(before) // 2]


# ------------------------------------------------------------------------------------------------
# benchmark.py


def test_benchmark_in_a_miniature(capsys, monkeypatch):
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("diffusers")
    from experiments import benchmark
    monkeypatch.setattr(benchmark, "inception_row",
                        functools.partial(benchmark.inception_row, n=4))
    benchmark.main(["--repeats", "1", "--size", "200", "--dim", "64", "--preset", "small",
                    "--batch-size", "2"])
    out = capsys.readouterr().out
    rows = [row for table in shown_cells(out) for row in table[2:]]
    assert len(rows) >= 8
    a, b = map(float, rows[-1][1:3])  # Inception: long enough for its digits
    assert abs(float(rows[-1][3].split()[0]) - b / a) < 0.02 * b / a
    kept = next(line for line in out.splitlines() if line.startswith("kept for backward"))
    assert 1.7 < float(re.search(r"\(([\d.]+) ×\)", kept)[1]) < 2.3
    assert 2 <= float(re.search(r"a CM step has ([\d.]+) times", out)[1]) < 2.1


# ------------------------------------------------------------------------------------------------
# study.py


def study_stages(**methods_and_points):
    """make_stages of a miniature: {name: (n_max, seeds, methods, points)}."""
    from experiments import study
    stages = {name: study.Stage(*stage) for name, stage in methods_and_points.items()}
    return lambda: stages


def test_study_is_killed_resumed_and_complete(tmp_path, capsys, monkeypatch):
    from experiments import common, study
    monkeypatch.setattr(cm, "report", lambda *args: None)
    flags = [*MINIATURE, "--ir", "8", "--checkpoint-every", "10"]
    own = ["--rows", str(tmp_path / "rows.csv"), "--runs", str(tmp_path / "runs"),
           "--assets", str(tmp_path), "--num-images", "60", "--jobs", "1", "--stage", "a", "b", "d"]
    three = range(3, 4)
    stages = study_stages(
        a=(40, three, ("DDPM",), (study.Point(20), study.Point(60))),
        b=(40, three, ("CM", "CM, θ_g"), (study.Point(60), study.Point(60, 1))),
        c=(40, three, ("DDPM",), (study.Point(30),)),
        d=(40, three, ("DDPM, drawn images",), (study.Point(20),)))
    monkeypatch.setattr(study, "make_stages", stages)
    directory = tmp_path / "runs" / "40-DDPM-3"
    checkpoint = directory / "run" / "checkpoint.pt"

    # killed where a signal can't be caught: the next call goes on from the checkpoint
    with monkeypatch.context() as here, pytest.raises(KeyboardInterrupt):
        here.setattr(cm, "write_atomically", killed_after(4, cm.write_atomically))
        study.measure(("DDPM", 40, 3), [study.Point(60)], [20, 30, 60],
                      common.with_defaults(flags, warmup="100"), directory, 60)
    assert 10 <= torch.load(checkpoint, weights_only=True)["step"] < 60

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as here:  # in this process, with hasty classifiers
        here.setattr(study, "ProcessPoolExecutor", InThisProcess)
        here.setattr(fid, "train_classifier", functools.partial(fid.train_classifier, steps=10))
        assert study.main([*own, *flags]) == 0
    rows = common.read_rows(tmp_path / "rows.csv")
    assert rows["method"].tolist() == [
        *["DDPM"] * 2, *["CM"] * 2, *["CM, θ_g"] * 2, "DDPM, drawn images"]
    assert rows[study.KEY[1:]].iloc[:4].values.tolist() == [
        ["40", "20", "3", "0", "ddim"], ["40", "60", "3", "0", "ddim"],
        ["40", "60", "3", "0", "ddim"], ["40", "60", "3", "1", "ddim"]]
    assert not rows.isin(["", "nan"]).any(axis=None) and {*study.MEASURES} < {*rows.columns}
    assert rows["options"][0].startswith("--batch-size 8 --channels 8 --checkpoint-every 10")
    assert "--num-images 60" in rows["options"][0]
    assert study.recorded(["--lr", "1"], 5000) == "--lr 1"
    assert "| CM − DDPM " in capsys.readouterr().out and (tmp_path / "rows_map.png").is_file()
    assert {p.name for p in directory.glob("*-*")} == {
        "checkpoint-20.pt", "checkpoint-30.pt", "checkpoint-60.pt", "samples-20-ddim-g0.npz",
        "samples-60-ddim-g0.npz"}
    for n in (20, 30, 60):
        assert torch.load(directory / f"checkpoint-{n}.pt", weights_only=True)["step"] == n

    before = (tmp_path / "rows.csv").read_bytes()
    assert study.main(own + flags) == 0
    assert "7 points have rows, 0 to do" in capsys.readouterr().out
    assert (tmp_path / "rows.csv").read_bytes() == before
    for more, says in (("--lr 1e-4", "made with other options"), ("--steps 5", "--steps is set"),
                       ("--subset-seed 5", "--subset-seed is set"), ("--base oc", "--base is set"),
                       ("--no-cm", "--no-cm is set"), ("--resample 0.5", "--resample is set"),
                       ("--table", "has no meaning beside --table"),
                       ("--num-images 50", "made with other options"),
                       (f"--rows {tmp_path / 'more.csv'} --num-images 50", "60 images, not 50")):
        with monkeypatch.context() as here, pytest.raises(SystemExit):
            here.setattr(study, "ProcessPoolExecutor", InThisProcess)
            study.main(own + flags + more.split())
        assert says in capsys.readouterr().err

    drawn, published = (cm.load_trained(tmp_path / "runs" / name / "checkpoint-20.pt")[0]
                        for name in ("40-DDPM-drawn-images-3", "40-DDPM-3"))
    assert (drawn.subset_seed, drawn.seed, published.subset_seed, published.seed) == (3, 3, 0, 3)

    # the resumed run is the uninterrupted one, guidance and theta_g are what was sampled
    whole = tmp_path / "whole"
    for name, more in (("DDPM", ["--no-cm"]), ("CM", [])):
        config, typed = cm.parse([*flags, *more, "--n-max", "40", "--steps", "60", "--seed", "3",
                                  "--warmup", "1", "--base", "ddpm", "--out", str(whole / name)])
        assert cm.train(config.resolved(), typed) == 0
        ours = tmp_path / "runs" / f"40-{name}-3" / "checkpoint-60.pt"
        one, other = (torch.load(p, weights_only=True)["ema"]
                      for p in (whole / name / "checkpoint.pt", ours))
        assert all(torch.equal(one[k], other[k]) for k in one)
    for name, file, more in (("CM", "samples-60-ddim-g1", ["--guidance", "1"]),
                             ("CM", "samples-60-ddim-g0", []),
                             ("CM", "samples-general-60-ddim-g0", ["--general-only"])):
        out = whole / f"{file}.npz"
        cm.main(["--sample", str(whole / name / "checkpoint.pt"), "--num-images", "60", "--seed",
                 "3", "--out", str(out), *more])
        ours = np.load(tmp_path / "runs" / f"40-{name}-3" / f"{file}.npz")
        assert all((np.load(out)[k] == ours[k]).all() for k in ours)

    # a measure that was added later comes from the samples that are there
    less = rows.assign(**{"FD2 Few": ["", *rows["FD2 Few"][1:]]})
    common.write_rows(tmp_path / "rows.csv", less)
    (directory / "checkpoint-30.pt").unlink()
    assert study.main(own + flags) == 0
    assert "6 points have rows, 1 to do in 1 runs" in capsys.readouterr().out
    assert (tmp_path / "rows.csv").read_bytes() == before

    check_cells(rows, whole / "CM" / "checkpoint.pt", whole, tmp_path / "runs" / "fid")


class InThisProcess(Executor):
    """A pool that calls at once."""

    def __init__(self, jobs, context, max_tasks_per_child):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def killed_after(n, write):
    """write_atomically, n times; then what no training loop catches."""
    left = [n]

    def writes(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(*args)
    return writes


def check_cells(rows, checkpoint, samples, cache):
    """Three of a row's cells, computed by other means: loss, FD2, memorised."""
    config, unet, counts = cm.load_trained(checkpoint)
    few = cm.splits(counts)["Few"]
    images, labels, _ = cm.load_dataset("fashion16", None, 8, train=False)
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    alpha_bar, generator, losses = cm.make_alpha_bar(), torch.Generator().manual_seed(0), []
    for k in range(10):
        for part in range(0, len(images), 250):
            x0, y = images[part:part + 250].float() / 127.5 - 1, labels[part:part + 250]
            eps, a = torch.randn(x0.shape, generator=generator), alpha_bar[100 * k + 50]
            t = torch.full_like(y, 100 * k + 50)
            with torch.no_grad():
                predicted = unet((a.sqrt() * x0 + (1 - a).sqrt() * eps).float(), t, y)
            mine = ((predicted - eps) ** 2).mean((1, 2, 3))
            losses.append(mine[np.isin(y, few)])  # each class has as many images
    row = rows[(rows["method"] == "CM") & (rows["steps"] == "60") & (rows["guidance"] == "0")]
    assert abs(float(row["loss Few"].iloc[0]) / float(torch.cat(losses).double().mean()) - 1) < 1e-4

    generated = np.load(samples / "samples-60-ddim-g0.npz")
    chosen = np.isin(generated["arr_1"], few)
    fakes = generated["arr_0"][chosen].reshape(chosen.sum(), -1).astype(float)
    train = cm.Data(config).images.permute(0, 2, 3, 1).reshape(sum(counts), -1).double().numpy()
    near = [sorted(np.sqrt(((x - train) ** 2).sum(1)))[:2] for x in fakes]
    assert abs(float(row["memorised Few"].iloc[0]) - np.mean([a < b / 3 for a, b in near])) < 1e-6

    real, real_labels, _ = cm.load_dataset("fashion16", None, 8)
    (first, *_), second = (
        torch.load(next(cache.glob(f"{kind}-*")), weights_only=True)["result"]
        for kind in ("classifier", "second"))
    second = second["weights"]
    assert not torch.equal(first["head.weight"], second["head.weight"])
    net = fid.Classifier(1, 10).eval()
    net.load_state_dict(second)
    mine = fid.chw(real[np.isin(real_labels, few)])
    with torch.no_grad():
        a, b = (net(x)[0].double().numpy() for x in (mine, fid.chw(generated["arr_0"][chosen])))
    covariances = np.cov(a.T), np.cov(b.T)
    root = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0) ** 0.5
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * root.sum()
    assert abs(float(row["FD2 Few"].iloc[0]) / distance - 1) < 1e-3


def test_a_method_that_tunes_starts_at_its_base_and_is_compared_with_it(tmp_path, monkeypatch):
    from experiments import common, study
    monkeypatch.setattr(cm, "report", lambda *args: None)
    monkeypatch.setattr(study, "measured", lambda *args: {})
    monkeypatch.setitem(study.METHODS, "CBDM (LoRA)",
                        study.METHODS["CBDM (LoRA)"]._replace(tunes=4))
    flags = common.with_defaults([*MINIATURE, "--ir", "8"])
    weights = {}
    for method, steps in (("CBDM", 4), ("CBDM (LoRA)", 3)):
        run = method, 40, 3
        row, = study.measure(run, [study.Point(steps)], [steps], flags,
                             common.directory_of(run, tmp_path), 60)
        assert (row["method"], row["steps"], row["status"]) == (method, steps, "finished")
        path = common.directory_of(run, tmp_path) / f"checkpoint-{steps}.pt"
        weights[method] = torch.load(path, weights_only=True)["ema"]
    tuned = {name.replace(".layer.", "."): p for name, p in weights["CBDM (LoRA)"].items()}
    assert all(torch.equal(tuned[name], p) for name, p in weights["CBDM"].items())
    assert tuned.keys() > weights["CBDM"].keys()
    for method in weights:  # the base has its row, but its network is gone: it is trained again
        shutil.rmtree(common.directory_of((method, 40, 3), tmp_path))
    study.measure(run, [study.Point(3)], [3], flags, path.parent, 60)
    again = torch.load(path, weights_only=True)["ema"]
    assert all(torch.equal(again[name], p) for name, p in weights["CBDM (LoRA)"].items())
    path.unlink()
    with monkeypatch.context() as here:
        here.setattr(common, "checkpoint_at", mock.Mock(
            side_effect=FloatingPointError("runs/40-CBDM-3: not finite at step 2")))
        row, = study.measure(run, [study.Point(3)], [3], flags, path.parent, 60)
    assert row["status"] == "its base was not finite at step 2" and not path.is_file()

    rows = study_rows(CBDM=[(5, 0)], steps=4) + study_rows(CBDM=[(9, 0)], steps=3)
    rows = numbers(rows + study_rows(**{"CBDM (LoRA)": [(7, 0)]}, steps=3))
    (_, group), = study.groups(rows)
    shown, = shown_cells(study.differences(group))
    assert shown[2][:3] == ["CBDM (LoRA) − CBDM", "3", "+2.00"] and len(shown) == 3


def test_memorised_is_1_for_copies_and_0_for_far_images():
    from experiments import study
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(0, 256, (30, 1, 4, 4), generator=generator, dtype=torch.uint8)
    far = torch.randint(0, 256, (600, 1, 4, 4), generator=generator, dtype=torch.uint8)
    assert study.memorised(training, training) == 1 and study.memorised(far, training) == 0
    assert study.memorised(torch.cat([training, far[:10]]), training) == 0.75
    line = torch.tensor([0, 120], dtype=torch.uint8).view(2, 1, 1, 1)  # at 30 the ratio is 1/3
    at = torch.tensor([[29], [30], [31], [91]], dtype=torch.uint8).view(4, 1, 1, 1)
    assert [study.memorised(x[None], line) for x in at] == [1, 0, 0, 1]


def test_study_stages_are_what_was_fixed_beforehand():
    from experiments import study
    stages = study.make_stages()
    seeds = {"1000": range(10, 18), "200": range(10, 16), "6000": range(10, 15)}
    assert {name: stages[name].seeds for name in seeds} == seeds
    assert [stages[name].points for name in seeds] == [
        ((study.ENDS[int(name)], 0, "ddim"),) for name in seeds]
    points = study.missing_points(list(stages), [], Path("none"))
    keys = [study.key_of(run, point) for run, points in points.items() for point in points]
    assert len(set(keys)) == len(keys) and keys[0] == ("DDPM", "1000", "6000", "10", "0", "ddim")
    assert [run[0] for run in list(points)[:5]] == ["DDPM", "RS", "CM", "CM with RS", "DDPM"]
    assert {m for m, _, _ in points} <= set(study.METHODS)
    for method in study.METHODS.values():
        assert method.base in study.METHODS
        cm.parse(method.flags.split())[0].resolved()
    paper = cm.parse(study.options_of(("CM", 1000, 11), ["--preset", "paper"]))[0].resolved()
    assert (paper.base, paper.n_max, paper.seed) == ("ddpm", 1000, 11)  # its preset's base is OC
    assert study.milestones_of(("CM, θ_g", 1000, 11)) == [1500, 6000]
    compute = study.equal_compute(6000)
    assert study.milestones_of(("RS", 1000, 17)) == [1500, 6000, compute]
    assert study.milestones_of(("CM with RS", 200, 15)) == [1500, 4000, 8000]
    assert study.milestones_of(("RS, drawn images", 1000, 10)) == [6000, compute]
    assert study.milestones_of(("Overlap, γ = 100, m = 0.0003", 1000, 0)) == [2000]
    for name in (*study.FOUR, "CM, λ = 0"):
        drawn, published = study.METHODS[f"{name}, drawn images"], study.METHODS[name]
        assert drawn.draws and not published.draws and drawn.flags == published.flags
        assert drawn.base == f"{published.base}, drawn images"


def test_overlaps_constants_have_the_lowest_fd_of_the_committed_rows():
    from experiments import common, study
    tried = {name: method.losses for name, method in study.OVERLAPS.items()}
    assert all(name == f"Overlap, γ = {losses.gamma}, m = {losses.margin}"
               and issubclass(losses, study.baselines.Overlap) for name, losses in tried.items())
    chosen = study.METHODS["Overlap"].losses
    rows = common.read_table(RESULTS / "study.csv").set_index("method")["FD Few"]
    assert len(tried) == 6 == len(rows[list(tried)])
    assert rows[list(tried)].astype(float).idxmin() == (
        f"Overlap, γ = {chosen.gamma:g}, m = {chosen.margin}")


def test_equal_compute_is_the_ratio_of_flops():
    """Of the forward pass alone: the gradients cost in proportion. BA, formed once a step, costs
    less than a hundredth of a batch."""
    from torch.utils.flop_counter import FlopCounterMode
    from experiments import study
    unet = cm.make_unet(cm.Config(no_cm=True).resolved(), 10, 1)
    flops = []
    x, t = torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = unet.encode(x, t, t)
    flops.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        unet.decode(*hidden)
    flops.append(counter.get_total_flops())
    ratio = study.equal_compute(6000) / 6000
    assert 1 < ratio / ((flops[0] + 2 * flops[1]) / sum(flops)) < 1.005
    assert study.equal_compute(600) == round(600 * ratio)


def study_rows(n_max=1000, steps=6000, guidance=0, seed=10, **values):
    """Rows of a study: {method: [(FD Few, loss Few)]}, a value a seed."""
    return [{"method": m, "n_max": n_max, "steps": steps, "seed": seed + i, "guidance": guidance,
             "sampler": "ddim", "FD Few": fd, "FD2 Few": fd, "loss Few": loss,
             "recall Few": 0.5 + 0.001 * i, "memorised Few": 0.0, "options": "--dataset fashion"}
            for m, pairs in values.items() for i, (fd, loss) in enumerate(pairs)]


def test_study_rows_lie_in_order():
    from experiments import common, study
    rows = common.text(study_rows(RS=[(1, 1)]) + study_rows(DDPM=[(1, 1), (1, 1)])
                       + study_rows(DDPM=[(1, 1)], steps=10682) + study_rows(200, CM=[(1, 1)])
                       + study_rows(DDPM=[(1, 1)], guidance=1))
    shown = study.in_order(rows)[["method", "n_max", "seed", "steps", "guidance"]].values.tolist()
    assert shown == [["CM", "200", "10", "6000", "0"], ["DDPM", "1000", "10", "6000", "0"],
                     ["DDPM", "1000", "10", "6000", "1"], ["DDPM", "1000", "10", "10682", "0"],
                     ["DDPM", "1000", "11", "6000", "0"], ["RS", "1000", "10", "6000", "0"]]


def test_study_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    from experiments import common, study
    monkeypatch.setattr(study, "make_stages", study_stages(
        a=(1000, range(10, 12), ("DDPM", "CM"), (study.Point(6000), study.Point(6000, 1)))))
    rows = study_rows(DDPM=[(1, 1), (1, 1)]) + study_rows(CM=[(1, 1)], guidance=1)
    rows = common.text([row | dict.fromkeys(study.MEASURES, 1.0) | {"status": "finished"}
                        for row in rows])
    missing = study.missing_points(["a"], rows, tmp_path)
    assert missing == {("DDPM", 1000, 10): [study.Point(6000, 1)],
                       ("CM", 1000, 10): [study.Point(6000)],
                       ("DDPM", 1000, 11): [study.Point(6000, 1)],
                       ("CM", 1000, 11): [study.Point(6000), study.Point(6000, 1)]}
    lacking = rows.assign(**{"FD2 Few": ["", "1", "1"]})
    assert study.missing_points(["a"], lacking, tmp_path) == missing  # no samples to measure
    samples = tmp_path / "1000-DDPM-10" / "samples-6000-ddim-g0.npz"
    samples.parent.mkdir()
    samples.touch()
    assert study.missing_points(["a"], lacking, tmp_path)[("DDPM", 1000, 10)] == [
        study.Point(6000), study.Point(6000, 1)]
    assert study.missing_points(["a"], rows, tmp_path) == missing  # its samples have told all
    ran_off = lacking.assign(status="not finite at step 5")
    assert study.missing_points(["a"], ran_off, tmp_path) == missing


def test_study_verdicts():
    from experiments import study
    nan = math.nan
    same = (0, 1, 3)

    def says(fd, p=0.01, recall=same, memorised=same):
        return study.verdict(fd, p, recall, memorised)

    assert says((-2, 1, 3)) == "holds" and says((2, 1, 3)) == "refuted"
    assert says((-2, 1, 3), 0.05) == "undecided (gain at most 3.0)"
    assert says((1, 1.5, 3)) == says((0.5, 1, 3)) == "undecided (gain at most 0.5)"
    assert says((2, 2, 3), 0.9) == "undecided (gain at most 0.0)"
    assert says((-2, 1, 3), recall=(-1, 0.9, 3)) == "undecided (gain at most 3.0, recall worse)"
    assert says((-2, 1, 3), recall=(-1, 1.1, 3)) == says((-2, 1, 3), recall=(1, 0.9, 3)) == "holds"
    assert says((-2, 1, 3), memorised=(1, 0.9, 3)) == (
        "undecided (gain at most 3.0, memorisation worse)")
    assert says((-2, 1, 3), memorised=(-1, 0.9, 3)) == "holds"
    assert says((-2, 1, 3), recall=(0, 0, 3), memorised=(0, 0, 3)) == "holds"  # of no seed, any
    assert says((nan, nan, 0)) == "not run" and says((-2, nan, 1)) == "undecided (one seed)"
    assert says((nan, nan, 3)) == "undecided (ran off)"


def test_holm_against_a_hand_worked_example():
    from experiments import common
    assert np.allclose(common.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(common.holm([0.5, math.nan, 0.001]), [1, 1, 0.003])


def test_study_claims_are_eight_and_paired():
    from experiments import study
    equal = study.equal_compute(6000)
    rows = numbers(
        study_rows(DDPM=[(10, 0), (20, 0), (30, 0)], CM=[(8, 0), (17, 0), (28.5, 0)],
                   RS=[(5, 0)] * 3)
        + [row | {"FD2 Few": 99.0} for row in study_rows(DDPM=[(9, 0), (8, 0)], seed=11,
                                                         steps=equal)]
        + study_rows(6000, RS=[(5, 0)], **{"CM with RS": [(4.5, 0)]})
        + study_rows(DDPM=[(1, 0), (1, 0), (1, 0)], CM=[(8, 0), (9, 0), (8, 0)], guidance=1))
    rows.loc[rows["method"] == "CM", "recall Few"] += 0.1
    rows.loc[rows["method"] == "CM", "memorised Few"] = 0.25
    table, = shown_cells(study.claims(rows))
    assert len(table) == 2 + 8 and [row[0] for row in table[2:]] == [
        "CM below DDPM", "CM with RS below RS"] * 4
    assert [row[1] for row in table[2::2]] == ["200", "1,000", "6,000", "1,000"]
    row = dict(zip(table[0], table[4], strict=True))
    d = np.array([-2, -3, -1.5])
    half = 4.302653 * d.std(ddof=1) / math.sqrt(3)
    assert row["difference"] == f"{d.mean():+.1f} [{d.mean() - half:+.1f}, {d.mean() + half:+.1f}]"
    assert row["FD Few, ours"] == "17.8 ± 10.3" and row["FD Few, theirs"] == "20.0 ± 10.0"
    assert dict(zip(table[0], table[8], strict=True))["FD Few, ours"] == "22.8 ± 8.1"  # 17, 28.5
    # t = mean / standard error, two-sided, times eight; the other one that ran has a larger p
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    p = 2 * (0.5 - abs(t) / (2 * math.sqrt(2 + t * t)))  # Student's t with 2 degrees of freedom
    assert row["p, Holm"] == f"{8 * p:.3f}" and row["verdict"].startswith("undecided (gain at most")
    assert table[5][-1] == "not run" and table[2][-1] == "not run"
    later = dict(zip(table[0], table[8], strict=True))
    assert later["seeds"] == "2 of 8" and later["steps"] == f"6,000 and {equal:,}"
    assert [row[3] for row in table[2:8]] == ["0 of 6", "0 of 6", "3 of 8", "0 of 8", "0 of 5",
                                              "1 of 5"]
    assert later["difference"].startswith("+14.2 [")  # 17 - 9 and 28.5 - 8
    assert later["difference"].endswith("] (FD2: sign differs)")  # where theirs is 99
    assert "differs" not in row["difference"] and table[2][6:10] == ["–"] * 4
    assert row["Δ recall Few"] == "+0.100 [+0.100, +0.100]"
    assert row["Δ memorised Few"] == "+0.250 [+0.250, +0.250]"
    one = dict(zip(table[0], table[7], strict=True))
    assert one["difference"] == "-0.5" and one["p, Holm"] == "–"
    d = np.array([17 - 9, 28.5 - 8])
    t = d.mean() / (d.std(ddof=1) / math.sqrt(2))
    p = 1 - 2 * math.atan(t) / math.pi  # with 1 degree of freedom
    assert abs(float(later["p, Holm"]) - min(1, 7 * p)) < 1e-3


def test_study_shows_the_claims_seed_by_seed_and_the_same_on_drawn_images():
    from experiments import study
    equal = study.equal_compute(6000)
    drawn = {"DDPM, drawn images": [(10, 0)], "CM, drawn images": [(7, 0), (1, 0)]}
    rows = [row | {"FD2 Few": 3 * row["FD Few"]} for row in (
        study_rows(DDPM=[(10, 0), (20, 0), (30, 0)], CM=[(8.5, 0), (21, 0)], **drawn)
        + study_rows(DDPM=[(9, 0)], **{"DDPM, drawn images": [(5, 0)]}, seed=11, steps=equal)
        + study_rows(OC=[(8, 0)], **{"CM on OC": [(7.5, 0)], "Group-Expert LoRA": [(6.5, 0)],
                                      "Overlap": [(8.25, 0)]})
        + study_rows(6000, **{"RS": [(5, 0)], "CM with RS": [(4.5, 0)]})
        + study_rows(CM=[(50, 0)], guidance=1))]
    table, = shown_cells(study.by_seed(numbers(rows)))
    assert table[0][3:] == ["seeds", "FD Few", "FD2 Few", "FD Few, mean ± std"]
    assert table[2:] == [
        ["CM − DDPM", "1,000", "6,000", "10, 11", "-1.5, +1.0", "-4.5, +3.0", "-0.2 ± 1.8"],
        ["CM with RS − RS", "6,000", "6,000", "10", "-0.5", "-1.5", "-0.5"],
        ["CM − DDPM", "1,000", f"6,000 and {equal:,}", "11", "+12.0", "+36.0", "+12.0"],
        ["CM, drawn images − DDPM, drawn images", "1,000", "6,000", "10", "-3.0", "-9.0", "-3.0"],
        ["CM, drawn images − DDPM, drawn images", "1,000", f"6,000 and {equal:,}", "11", "-4.0",
         "-12.0", "-4.0"],
        ["CM on OC − OC", "1,000", "6,000", "10", "-0.5", "-1.5", "-0.5"],
        ["Overlap − DDPM", "1,000", "6,000", "10", "-1.8", "-5.2", "-1.8"],
        ["CM − Overlap", "1,000", "6,000", "10", "+0.2", "+0.8", "+0.2"],
        ["CM − Group-Expert LoRA", "1,000", "6,000", "10", "+2.0", "+6.0", "+2.0"]]


def test_study_compares_with_the_base_and_shows_what_ran_off():
    from experiments import study
    assert [study.spec_of(m).base for m in (
        "RS", "CM", "CM with RS", "CM on OC", "CM, θ_g", "CM, λ = 0", "CM, m = 0.01, θ_g",
        "CM, rank ratio 0.5", "CM --ir 50")] == [
        "DDPM", "DDPM", "RS", "OC", "CM", "CM", "CM, m = 0.01", "CM", "DDPM --ir 50"]
    rows = study_rows(**{"DDPM": [(10, 0.1), (20, 0.2)], "CM, m = 0.1": [(9, 0.3), (16, 0.6)],
                         "CM, m = inf": [(50, 7), (60, 8)]})
    rows[2]["FD2 Few"] = 30.0  # of the second classifier, the mean difference is above 0
    (title, group), other = study.groups(numbers(rows + study_rows(DDPM=[(1, 1)], guidance=1)))
    assert title == "n_max 1,000, guidance 0" and other[0] == "n_max 1,000, guidance 1"
    values, = shown_cells(study.values(group))
    values = {row[0]: dict(zip(values[0], row, strict=True)) for row in values[2:]}
    assert values["DDPM"]["FD Few"] == "15.0 ± 7.1" and values["DDPM"]["seeds"] == "2"
    assert values["CM, m = 0.1"]["loss Few"] == "0.4500 ± 0.2121"
    assert values["CM, m = inf"]["loss Few"] == "ran off"
    assert values["CM, m = inf"]["FD Few"] == "55.0 ± 7.1"
    differences, = shown_cells(study.differences(group))
    title, _, bounded, printed = differences
    assert title[1:] == ["steps", "FD Few", "FD2 Few", "recall Few", "memorised Few",
                         "1000 × loss Few"]
    assert bounded[0] == "CM, m = 0.1 − DDPM" and printed[2] == "ran off"
    half = 12.7062 * 3 / 2  # t(0.975, 1 degree of freedom) times the standard error of -1 and -4
    assert bounded[2] == f"-2.50 [{-2.5 - half:.2f}, +{-2.5 + half:.2f}]"
    assert bounded[3].endswith("] (sign differs)") and bounded[-1].startswith("+300.00 [")
    assert "differs" not in printed[3]
    worse, gone, more, lost = (numbers(study_rows(CM=pairs)) for pairs in (
        [(190, 0.05), (190, 1.9)], [(300, 9e3)], [(300, 1.1)], [(1, 0.1), (1, math.nan)]))
    assert [study.off(run) for run in (worse, gone, more, lost)] == [False, *3 * [True]]


def test_study_map_shows_passes_of_all_and_of_few():
    from experiments import study
    counts = np.array([1000, 599, 359, 215, 129, 77, 46, 27, 16, 10])
    assert cm.class_counts(1000, 100, 10) == counts.tolist()
    everything, few = study.passes(1000, 6000, "--dataset fashion", "CM")
    assert abs(everything - 6000 * 32 / counts.sum()) < 1e-9 and abs(few - everything) < 1e-9
    _, few = study.passes(1000, 6000, "--dataset fashion", "CM with RS")
    share = np.sqrt(counts[6:]).sum() / np.sqrt(counts).sum()
    assert abs(few - 6000 * 32 * share / counts[6:].sum()) < 1e-9
    rows = numbers(study_rows(DDPM=[(10, 0), (20, 0)], RS=[(4, 0), (13, 0)])
                   + study_rows(DDPM=[(7, 0)], CM=[(9, 0)], steps=1500))
    table, = shown_cells(study.map_table(rows))
    assert table[2] == ["1,000", "1,500", "0", "19", "–", "–", "+2.0 (1)", "–"]
    assert table[3][:5] == ["1,000", "6,000", "0", "77", f"{few:.0f}"]
    assert table[3][5].startswith("-6.5 [") and table[3][5].endswith("(2)")
    assert study.map_table(numbers(study_rows(CM=[(1, 1)]))) == ""


def test_study_map_names_every_line_where_a_guidance_lacks_some(monkeypatch):
    from experiments import common, study
    drawn = []
    monkeypatch.setattr(common, "save", lambda figure, path: drawn.append(figure))
    rows = study_rows(CM=[(1, 1)], DDPM=[(2, 1)], RS=[(1, 1)])
    rows += study_rows(200, 8000, 1, CM=[(1, 1)], DDPM=[(2, 1)])
    study.draw_map(numbers(rows), None)
    left, right = drawn[0].axes
    assert [axis.get_title() for axis in (left, right)] == ["guidance 0", "guidance 1"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "CM, n_max 1,000", "RS, n_max 1,000", "CM, n_max 200"]
    passes = [32 * 6000 / sum(cm.class_counts(1000, 100, 10)),
              32 * 8000 / sum(cm.class_counts(200, 100, 10))]
    points = [container[0].get_xydata()[0] for axis in (left, right)
              for container in axis.containers]
    np.testing.assert_allclose(points, [(passes[0], -1), (0.95 * passes[0], -1), (passes[1], -1)])


def test_study_heart_shows_the_main_methods_at_the_end():
    from experiments import study
    rows = (study_rows(DDPM=[(10, 0.1), (20, 0.2)], CM=[(8, 0.3), (17, 0.4), (5, 0.1)],
                       **{"CM, θ_g": [(30, 0.5)], "ADA": [(1, 1)], "CM with RS": [(30, 0.5)],
                          "CM, drawn images": [(7, 0.3)], "DDPM, drawn images": [(9, 0.2)]})
            + study_rows(200, RS=[(3, 0.1)], steps=8000)
            + study_rows(200, DDPM=[(1, 1)]) + study_rows(CM=[(1, 1)], guidance=1))
    rows = numbers([row | {"FD overall": 2 * row["FD Few"], "accuracy Few": 0.25,
                           "memorised Few": row["FD Few"] / 100} for row in rows])
    table, = shown_cells(study.heart(rows))
    assert table[0][-1] == "FD Few − DDPM's" and [row[:3] for row in table[2:]] == [
        ["200", "RS", "1"], ["1,000", "DDPM", "2"], ["1,000", "CM", "3"],
        ["1,000", "CM with RS", "1"], ["1,000", "DDPM, drawn images", "1"],
        ["1,000", "CM, drawn images", "1"]]
    assert table[2][3:] == ["6.0", "3.0", "0.50", "0.25", "0.1000", "0.03", ""]  # no DDPM there
    assert table[3][3:] == ["30.0 ± 14.1", "15.0 ± 7.1", "0.50 ± 0.00", "0.25 ± 0.00",
                            "0.1500 ± 0.0707", "0.15 ± 0.07", ""]
    half = 12.7062 * 0.5  # t(0.975, 1 degree of freedom) times the standard error of -2 and -3
    assert table[4][-1] == f"-2.5 [{-2.5 - half:.1f}, {-2.5 + half:+.1f}]"
    assert [row[-1] for row in table[5:]] == ["+20.0", "", "-2.0"]
    older, = shown_cells(study.heart(rows.drop(columns="memorised Few")))  # the first study's rows
    assert [row[:-2] + row[-1:] for row in table] == older


def test_study_shows_the_others_beside_what_each_starts_from():
    from experiments import study
    rows = (study_rows(DDPM=[(10, 0.1), (20, 0.2)], CM=[(8, 0.3)], RS=[(1, 1)], OC=[(4, 0.1)],
                       CBDM=[(5, 0.1)],
                       **{"Focal": [(11, 0.1), (24, 0.2)], "CM, λ = 0": [(9, 0.1)],
                          "CM on OC": [(2, 0.1)], "CM --ir 50": [(6, 0.1)],
                          "DDPM --ir 50": [(9, 0.1)], "CM, drawn images": [(3, 0.1)]})
            + study_rows(200, Focal=[(1, 1)]) + study_rows(OC=[(1, 1)], guidance=1)
            + study_rows(200, 8000, CM=[(1, 1)], **{"CM, θ_g": [(4, 1)]})
            + study_rows(steps=3000, **{"CBDM (LoRA)": [(7.5, 0.1)]})
            + study_rows(steps=2000, seed=0, **{"Overlap, γ = 10, m = 3e-05": [(7, 0.1)]}))
    rows = numbers([row | {"FD overall": 1, "accuracy Few": 0.25, "FD2 Few": 2 * row["FD Few"],
                           "FD Many": 3.21, "d Many": 0.00002, "d Few": 0.00464} for row in rows])
    table, = shown_cells(study.others(rows))
    assert table[2][:-3] == ["1,000", "6,000", "OC", "1", "1.0", "4.0", "0.50", "0.25", "0.1000",
                             "3.2", "0.0000", "0.0046"]
    assert table[0][-3:] == ["base", "FD Few − base's", "FD2 Few − base's"]
    half = 12.7062 * 1.5  # t(0.975, 1 degree of freedom) times the standard error of 1 and 4
    assert [row[:4] + row[-3:] for row in table[2:]] == [
        ["1,000", "6,000", "OC", "1", "DDPM", "-6.0", "-12.0"],
        ["1,000", "6,000", "CM on OC", "1", "OC", "-2.0", "-4.0"],
        ["1,000", "6,000", "CBDM", "1", "DDPM", "-5.0", "-10.0"],
        ["1,000", "2,000", "Overlap, γ = 10, m = 3e-05", "1", "DDPM", "", ""],
        ["200", "8,000", "CM, θ_g", "1", "CM", "+3.0", "+6.0"],
        ["1,000", "6,000", "Focal", "2", "DDPM", f"+2.5 [{2.5 - half:.1f}, {2.5 + half:+.1f}]",
         f"+5.0 [{5 - 2 * half:.1f}, {5 + 2 * half:+.1f}]"],
        ["1,000", "6,000", "CM, λ = 0", "1", "CM", "+1.0", "+2.0"],
        ["1,000", "3,000", "CBDM (LoRA)", "1", "CBDM", "+2.5", "+5.0"],
        ["1,000", "6,000", "DDPM --ir 50", "1", "", "", ""],
        ["1,000", "6,000", "CM --ir 50", "1", "DDPM --ir 50", "-3.0", "-6.0"]]
    assert study.others(numbers(study_rows(CM=[(1, 1)]))) == ""
    alone = numbers([row | {"FD overall": 1} for row in study_rows(OC=[(1, 1)])])
    assert shown_cells(study.others(alone))[0][2][-3:] == ["DDPM", "", ""]


def test_study_draws_few_where_all_samples_are_here(tmp_path, monkeypatch):
    from experiments import common, study
    drawn = []
    config, counts = cm.Config(), [5, 9, 1, 7, 3, 8]
    checkpoint = tmp_path / "200-DDPM-11" / "checkpoint-8000.pt"
    monkeypatch.setattr(cm, "load_trained", {checkpoint: (config, None, counts)}.get)
    monkeypatch.setattr(cm, "Data", lambda config: config)
    monkeypatch.setattr(common, "draw_samples",
                        lambda *args, columns: drawn.append((*args, columns)))
    rows = numbers(study_rows(DDPM=[(1, 1)]) + study_rows(200, steps=8000, DDPM=3 * [(1, 1)]))

    def put(method, seed):
        path = tmp_path / f"200-{method}-{seed}" / "samples-8000-ddim-g0.npz"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return path

    put("DDPM", 10)
    paths = [put(name, 11) for name in ("DDPM", "RS", "CM")]
    study.draw_few(rows, tmp_path, tmp_path / "few.png")
    assert not drawn  # neither seed has all
    paths.append(put("CM-with-RS", 11))
    study.draw_few(rows, tmp_path, tmp_path / "few.png")
    files = dict(zip(study.FOUR, paths, strict=True))
    assert drawn == [(config, files, [4, 2], tmp_path / "few.png", 6)]


def test_study_second_distances_against_scipy(tmp_path, monkeypatch):
    import scipy.linalg
    from experiments import study
    seeds, train_classifier = [], fid.train_classifier

    def hasty(*args, seed):
        seeds.append(seed)
        return train_classifier(*args, steps=2, seed=seed)

    monkeypatch.setattr(fid, "train_classifier", hasty)
    config = cm.parse([*MINIATURE, "--ir", "8"])[0].resolved()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels, counts = torch.arange(600) % 10, [9, 1, 8, 2, 7, 3, 6, 4, 5, 10]
    found = [study.second_distances(images, labels, counts, config, "cpu", tmp_path)
             for _ in range(2)]
    assert found[0] == found[1] and seeds == [1]  # the cache's, the second time
    real, real_labels, _ = cm.load_dataset("fashion16", None, config.image_size)
    state = torch.load(next(tmp_path.glob("second-*")), weights_only=True)["result"]
    net = fid.Classifier(1, 10).eval()
    net.load_state_dict(state["weights"])
    with torch.no_grad():
        features = [net(x)[0].double().numpy() for x in (fid.chw(real), images)]
    splits = {"overall": range(10), "Many": [9, 0, 2], "Medium": [4, 6, 8], "Few": [1, 3, 5, 7]}
    assert found[0].keys() == {f"FD2 {split}" for split in splits}
    for split, classes in splits.items():
        a, b = (x[np.isin(y, list(classes))] for x, y in zip(features, (real_labels, labels),
                                                             strict=True))
        covariances = np.cov(a.T), np.cov(b.T)
        root = scipy.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0) ** 0.5
        expected = (((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances))
                    - 2 * root.sum())
        assert abs(found[0][f"FD2 {split}"] / expected - 1) < 1e-3, split


def test_first_study_is_labelled_and_one_cell_is_written_anew(tmp_path, capsys):
    from experiments import study
    path = RESULTS / "first_study.csv"
    assert study.main(["--rows", str(path), "--assets", str(tmp_path), "--table"]) == 0
    out = capsys.readouterr().out
    assert "over initialisations only" in out and "2134833" in out
    assert not list(tmp_path.iterdir())  # one point makes no map
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    fd = {m: np.array([float(r["FD Few"]) for r in rows if r["method"] == m])
          for m in ("DDPM", "CM")}
    d = fd["CM"] - fd["DDPM"]
    half = 4.302653 * d.std(ddof=1) / math.sqrt(3)  # t(0.975, 2 degrees of freedom)
    assert f"{d.mean():+.2f} [{d.mean() - half:+.2f}, {d.mean() + half:+.2f}]" in out
    assert f"{fd['DDPM'].mean():.1f} ± {fd['DDPM'].std(ddof=1):.1f}" in out


# ------------------------------------------------------------------------------------------------
# pruning.py


def test_pruning_share_is_exact_and_takes_the_smallest():
    from experiments import pruning
    unet = tiny_losses(reserve=False).unet

    def values(network):
        return torch.cat([p.detach().flatten() for p in network.parameters()])
    before, after = values(unet), values(pruning.prune(unet, 0.1))
    gone = (after == 0) & (before != 0)
    assert int(gone.sum()) == len(before) // 10
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(after[~gone], before[~gone]) and torch.equal(values(unet), before)
    assert torch.equal(values(pruning.prune(unet, 0)), before)
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="in \\[0, 1\\)"):
            pruning.prune(unet, share)


def test_pruning_end_to_end(tmp_path, capsys):
    from experiments import common, pruning
    for name, extra in (("plain", ["--no-cm"]), ("cm", [])):
        assert common.run([*MINIATURE, *extra, "--steps", "4"], tmp_path / name) == ""
    checkpoints = [str(tmp_path / name / "checkpoint.pt") for name in ("plain", "cm")]
    own = ["--rows", str(tmp_path / "pruning.csv"), "--assets", str(tmp_path)]
    capsys.readouterr()
    assert pruning.main(checkpoints + own + ["--per-class", "2", "--times", "2"]) == 0
    shown = capsys.readouterr().out
    assert pruning.main(["--table", *own]) == 0 and capsys.readouterr().out == shown
    assert (tmp_path / "pruning.png").is_file()
    rows = common.numbers(common.read_rows(tmp_path / "pruning.csv"), pruning.WORDS)
    assert rows["method"].unique().tolist() == ["DDPM, 4 steps", "CM on DDPM, 4 steps"]
    assert len(rows) == 20 and (rows["raw"] != rows["pruned"]).all()
    assert ((rows["pruned"] / rows["raw"] - 1 - rows["change"]).abs() < 1e-4).all()
    ema = cm.load_trained(checkpoints[1])[1]
    data = cm.Data(cm.Config(image_size=8).resolved())
    raw = cm.held_out_loss(cm.merge(ema), data.images, data.labels, 10, 2, 2)[0]
    assert np.allclose(rows["raw"][10:], raw, rtol=1e-5)  # training images, the merged network


def test_pruning_table_over_seeds_and_its_correlation():
    from experiments import pruning
    change = {"d": (0.01, 0.02), "c": (0.03, 0.03), "b": (0.08, 0.04), "a": (0.2, 0.3)}
    rows = pd.DataFrame([dict(method="M", name=name, seed=seed, count=count, change=v)
                         for (name, pair), count in zip(change.items(), (9, 7, 5, 1), strict=True)
                         for seed, v in enumerate(pair)])
    table, line = pruning.table(rows).split("\n\n")
    assert shown_cells(table)[0][2:] == [["d", "9", "+1.50 ± 0.71"], ["c", "7", "+3.00 ± 0.00"],
                                         ["b", "5", "+6.00 ± 2.83"], ["a", "1", "+25.00 ± 7.07"]]
    assert "M, 2 seed(s)" in line and "-1.00 (p = 0.000)" in line and line.endswith("is reproduced")
    assert pruning.verdict(-0.9, 0.04) == "reproduced"
    assert pruning.verdict(0.9, 0.04) == "not reproduced"
    assert pruning.verdict(-0.9, 0.06) == pruning.verdict(math.nan, math.nan) == (
        "not decidable at this scale")


# ------------------------------------------------------------------------------------------------
# picture.py


def test_picture_is_guided_and_of_one_noise(tmp_path, monkeypatch):
    from experiments import picture
    networks = {}
    for name, options in (("plain", dict(no_cm=True)), ("cm", {})):
        config = cm.Config(image_size=8, channels=8, multipliers=(1, 2), ir=10, n_max=50, seed=3,
                           **options).resolved()
        networks[name] = config, cm.make_unet(config, 10, 1), cm.class_counts(50, 10, 10)
    for layer in cm.reserved_layers(networks["cm"][1]):
        layer.B.data.fill_(0.1)
    monkeypatch.setattr(cm, "load_trained", networks.get)
    seen, panels = [], []
    monkeypatch.setattr(cm, "sample", lambda net, y, shape, **how: (
        seen.append((net.decoder[0].block1[2].weight, y.tolist(), how)),
        torch.zeros(len(y), *shape))[1])
    monkeypatch.setattr(cm, "draw_panels", lambda *drawn: panels.append(drawn))
    picture.draw("plain", "cm", tmp_path / "x.png", columns=2)
    seeds = [cm.hashed_seed("image", 3, i) for i in range(10)]
    for _, y, how in seen:  # the most frequent class and Few
        assert y == [0, 0, 6, 6, 7, 7, 8, 8, 9, 9] and how == dict(guidance=1.5, seeds=seeds)
    plain, theta, theta_g = (weight for weight, _, _ in seen)
    layer = networks["cm"][1].decoder[0].block1[2]
    assert torch.equal(plain, networks["plain"][1].decoder[0].block1[2].weight)
    assert torch.equal(theta, layer.weight) and torch.equal(theta_g, layer.layer.weight)
    assert not torch.equal(theta, theta_g) and len(panels[0][0]) == 4
    for pair in (("cm", "cm"), ("plain", "plain")):
        with pytest.raises(ValueError, match="--no-cm"):
            picture.draw(*pair, tmp_path / "x.png")


# ------------------------------------------------------------------------------------------------
# gradients.py


@pytest.mark.parametrize("reserve", [False, True])
def test_per_sample_gradients_average_to_the_batch_gradient(reserve):
    from experiments import gradients
    losses = tiny_losses(reserve)
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 6, 1, 8, 8, generator=g)
    y, t = torch.arange(6) % 4, torch.randint(1000, (6,), generator=g)
    parameters = {n: p for n, p in losses.named_parameters() if "decoder" in n}
    each = gradients.per_sample_gradients(losses, list(parameters), x0, y, t, eps, chunk_size=4)
    whole = torch.autograd.grad(losses(x0, y, t, eps, y)[0], list(parameters.values()),
                                allow_unused=True)
    for (n, p), of_batch in zip(parameters.items(), whole, strict=True):
        assert each[n].shape == (6, *p.shape)
        expected = torch.zeros_like(p) if of_batch is None else of_batch
        torch.testing.assert_close(each[n].mean(0), expected, rtol=1e-4, atol=1e-6)


def test_per_sample_gradients_have_dropout_masks_of_their_own_in_training():
    from experiments import gradients
    losses = tiny_losses(True)
    for block in losses.unet.decoder:
        if isinstance(block, cm.ResBlock):
            block.block2[2].p = 0.5
    x0, eps = torch.randn(2, 1, 1, 8, 8).expand(2, 2, 1, 8, 8)
    batch = x0, torch.zeros(2).long(), torch.full((2,), 500), eps
    name = "unet.decoder.0.block1.2.layer.weight"
    alike = gradients.per_sample_gradients(losses.eval(), [name], *batch)[name]
    other = gradients.per_sample_gradients(losses.train(), [name], *batch)[name]
    torch.testing.assert_close(alike[0], alike[1])
    assert not torch.allclose(other[0], other[1], rtol=0.1)


def test_gradients_part_of_ba_is_how_ba_moves():
    from experiments import gradients
    torch.manual_seed(0)
    layer = cm.LowRankReserved(nn.Conv2d(4, 6, 3), 2).double()
    layer.B.data.normal_()
    x = torch.randn(3, 4, 8, 8, dtype=torch.double)
    weight = torch.randn(3, 6, 6, 6, dtype=torch.double)
    of_w, g_b, g_a = torch.autograd.grad((layer(x) * weight).sum(),
                                         (layer.layer.weight, layer.B, layer.A))
    parts = gradients.parts({"unet.L.layer.weight": of_w[None], "unet.L.B": g_b[None],
                             "unet.L.A": g_a[None]}, "L", layer)
    h = 1e-8  # one small step of gradient descent on A and B
    moved = (layer.B - h * g_b) @ (layer.A - h * g_a)
    moved = ((layer.B @ layer.A - moved) / h).view_as(of_w).flatten(1)
    assert torch.allclose(moved, parts["BA"][0], atol=1e-3)
    assert torch.equal(parts["W_g"][0], of_w.flatten(1))
    assert torch.equal(parts["W_g+BA"], parts["W_g"] + parts["BA"])
    plain = gradients.parts({"unet.L.weight": of_w[None]}, "L", layer.layer)
    assert list(plain) == ["W"] and torch.equal(plain["W"], of_w.flatten(1)[None])


def two_means():
    torch.manual_seed(0)
    m1, m2 = torch.randn(2, 24, 30)
    m2 = m2 + 0.5 * m1
    return m1 / m1.norm(dim=1, keepdim=True), m2 / m2.norm(dim=1, keepdim=True)


def test_gradients_estimates_agree_with_the_theory_where_its_assumptions_hold():
    from experiments import gradients
    m1, m2 = two_means()
    rows = gradients.estimate(*(m + 3 * torch.randn(3000, 24, 30) for m in (m1, m2)))
    r = rows[0]
    assert abs(r["mu_1"] - 1) < 0.05 and abs(r["mu_2"] - 1) < 0.05
    assert abs(r["cos"] - float((m1 * m2).sum(1).mean())) < 0.05
    assert abs(r["sigma_1"] - 3) < 0.02 and abs(r["sigma_2"] - 3) < 0.02
    assert abs(r["anisotropy"] - 1) < 0.1 and abs(r["kurtosis"]) < 0.3 and 0.8 < r["quality"] <= 1
    assert [r["a"] for r in rows] == list(gradients.RATIOS)
    for r in rows:
        assert abs(r["predicted"] - r["observed"]) < 0.05
        assert abs(r["projected"] - r["observed"]) < 0.05
    # v is far off: the prediction knows
    noisy = gradients.estimate(*(m + 8 * torch.randn(9000, 24, 30) for m in (m1, m2)))
    assert noisy[0]["quality"] < 0.8
    assert all(abs(r["predicted"] - r["observed"]) < 0.05 for r in noisy)
    unequal = gradients.estimate(*(m + 3 * torch.randn(3000, 24, 30) for m in (1.5 * m1, 0.5 * m2)))
    assert abs(unequal[0]["mu_1"] - 1.5) < 0.05 and abs(unequal[0]["mu_2"] - 0.5) < 0.1
    assert abs(unequal[0]["predicted"] - unequal[0]["observed"]) > 0.2  # and disagree otherwise
    assert all(abs(r["projected"] - r["observed"]) < 0.05 for r in unequal)


def test_gradients_estimates_know_spread_direction_and_what_is_no_mean():
    from experiments import gradients
    m1, m2 = two_means()
    g1, g2 = torch.randn(2, 3000, 24, 30)
    v = (m1 - m2) / (m1 - m2).norm(dim=1, keepdim=True)
    stretched = g1 + ((g1 * v).sum(2, keepdim=True)) * v  # twice the deviation along v
    rows = gradients.estimate(m1 + stretched, m2 + 2 * g2)
    assert abs(rows[0]["sigma_2"] - 2) < 0.02
    assert abs(rows[0]["sigma_1"] - math.sqrt(33 / 30)) < 0.02
    assert 2 < rows[0]["anisotropy"] < 2.8  # between 4 · 30/33 of the one and 1 of the other
    assert all(abs(r["projected"] - r["observed"]) < 0.05 for r in rows)
    # parts A and B disagree on the means' direction: no length can be told, no prediction made
    sign = torch.tensor([1.0, -1, 1]).repeat_interleave(100)[:, None, None]
    rows = gradients.estimate(sign * m1 + 0.1 * g1[:300], sign * m2 + 0.1 * g2[:300])
    assert rows[0]["mu_1"] == rows[0]["mu_2"] == rows[0]["quality"] == 0
    assert all(math.isnan(r["predicted"]) and r["projected"] < 0.1 for r in rows[-1:])


def test_gradients_estimates_against_an_independent_writing():
    from scipy import stats

    from experiments import gradients
    m1, m2 = two_means()
    g1, g2 = m1 + 2 * torch.randn(300, 24, 30), 1.5 * m2 + 3 * torch.randn(306, 24, 30)
    rows = gradients.estimate(g1, g2)
    a1, b1, a2, b2 = (g.double().numpy() for g in (g1[:100], g1[100:200], g2[:102], g2[102:204]))
    squares, crosses, spreads, kurtoses, shares = [], [], [], [], []
    for r in range(24):  # a weight at a time
        mean_a1, mean_b1, mean_a2, mean_b2 = (p[:, r].mean(0) for p in (a1, b1, a2, b2))
        squares.append((mean_a1 @ mean_b1, mean_a2 @ mean_b2,
                        (mean_a1 - mean_a2) @ (mean_b1 - mean_b2)))
        crosses.append((mean_a1 @ mean_b2 + mean_a2 @ mean_b1) / 2)
        v = mean_a1 / np.linalg.norm(mean_a1) - mean_a2 / np.linalg.norm(mean_a2)
        v /= np.linalg.norm(v)
        along = b1[:, r] @ v, b2[:, r] @ v
        spreads += [np.var(x, ddof=1) / np.cov(p[:, r].T).trace() * 30
                    for x, p in zip(along, (b1, b2), strict=True)]
        kurtoses += [stats.kurtosis(x) for x in along]
        mean = 75 * along[0].mean() + 25 * along[1].mean()
        variance = 75 * np.var(along[0], ddof=1) + 25 * np.var(along[1], ddof=1)
        shares.append((v @ (mean_b1 - mean_b2), stats.norm.cdf(mean / math.sqrt(variance))))
    square_1, square_2, square = np.mean(squares, 0)
    quality, projected = np.mean(shares, 0)
    sigma_1, sigma_2 = (math.sqrt(np.mean([np.cov(p[:, r].T).trace() / 30 for r in range(24)]))
                        for p in (b1, b2))
    cos = np.mean(crosses) / math.sqrt(square_1 * square_2)
    expected = {"mu_1": math.sqrt(square_1), "mu_2": math.sqrt(square_2), "sigma_1": sigma_1,
                "sigma_2": sigma_2, "cos": cos, "quality": quality / math.sqrt(square),
                "anisotropy": np.median(spreads), "kurtosis": np.median(kurtoses),
                "projected": projected}
    row = next(r for r in rows if r["a"] == 0.75)
    for name, value in expected.items():
        assert math.isclose(row[name], value, rel_tol=1e-9), name
    mu, sigma = math.sqrt((square_1 + square_2) / 2), math.hypot(sigma_1, sigma_2) / math.sqrt(2)
    argument = expected["quality"] * 0.5 * mu * math.sqrt(200 * (1 - cos)) / (2 * sigma)
    assert math.isclose(row["predicted"], stats.norm.cdf(argument), rel_tol=1e-9)

    small = gradients.estimate(g1 / 128, g2 / 128)  # lengths scale, nothing else changes
    for r, of_small in zip(rows, small, strict=True):
        for name in r:
            scale = 1 / 128 if name in ("mu_1", "mu_2", "sigma_1", "sigma_2") else 1
            assert math.isclose(of_small[name], scale * r[name], rel_tol=1e-9), name


@pytest.mark.filterwarnings("ignore:invalid value")
def test_gradients_predict_nothing_from_estimates_that_no_means_have():
    from experiments import gradients
    m, _ = two_means()

    def predicted(*factors):  # of m in parts A and B, of the majority and of the minority
        noise = 0.01 * torch.randn(2, 300, 24, 30)
        a1, b1, a2, b2 = (torch.full((100, 1, 1), f) for f in factors)
        zero = torch.zeros(100, 1, 1)
        g1, g2 = torch.cat([a1, b1, zero]) * m, torch.cat([a2, b2, zero]) * m
        row = gradients.estimate(g1 + noise[0], g2 + noise[1])[1]
        return row["cos"], row["predicted"]
    for factors, cos in (((2, 0.76, 0.76, 2), 1.5), ((2, 0.76, -0.76, -2), -1.5)):
        found, says_nothing = predicted(*factors)
        assert abs(found - cos) < 0.05 and math.isnan(says_nothing)
    assert not math.isnan(predicted(1, 1, -0.9, -0.9)[1])
    of_a, of_b = torch.zeros(300, 24, 30), torch.zeros(300, 24, 30)
    of_a[:100, :, :3], of_b[:100, :, 3:6] = m[:, :3], -m[:, 3:6]
    of_a[100:, :, 6:9], of_b[100:, :, 9:] = torch.randn(200, 24, 3), torch.randn(200, 24, 21)
    nothing = gradients.estimate(of_a, of_b)[1]  # parts in other columns: products are exactly 0
    assert nothing["mu_1"] == nothing["cos"] == 0 and math.isnan(nothing["predicted"])


def test_gradients_summary_counts_and_averages():
    from experiments import gradients
    row = dict(method="DDPM", step=1, seed=10, layer="L", part="W", mu_1=1, mu_2=3, sigma_1=20,
               sigma_2=10, cos=0, quality=1, anisotropy=7, kurtosis=0)
    rows = pd.DataFrame([row | dict(a=a, predicted=p, projected=0.5, observed=0.75)
                         for a, p in zip(gradients.RATIOS, (1, math.nan, 0.5, 1, 1), strict=True)]
                        + [row | dict(a=a, layer="M", anisotropy=20, mu_2=0, predicted=1,
                                      projected=0.7, observed=0.75) for a in gradients.RATIOS])
    assert shown_cells(gradients.summary(rows))[0][2] == [
        "W", "0.33 to 0.33", "7 to 20", "0.250", "0.150", "1 of 10"]
    first, second = shown_cells(gradients.table(rows))[0][2:]
    sigma_over_mu = f"{math.sqrt(250 / 5):.1f}"
    assert first == ["DDPM, 1", "W", "L", "0.33", "2.00", sigma_over_mu, "0.00", "1.00", "7.0",
                     "0.0", "– / 0.50 / 0.75", "0.50 / 0.50 / 0.75", "1.00 / 0.50 / 0.75"]
    assert second[3] == "–"
    of_11 = rows.assign(seed=11, projected=rows["projected"] + 0.1, anisotropy=9)
    both = pd.concat([rows, of_11])
    error = "0.125 ± 0.035"  # layers L and M: 0.25 and 0.05 with seed 10, 0.15 and 0.05 with 11
    assert shown_cells(gradients.summary(both))[0][2] == [
        "W", "0.33 to 0.33", "7 to 20", "0.250 ± 0.000", error, "2 of 20"]
    first = shown_cells(gradients.table(both))[0][2]
    assert first[8] == "8.0 ± 1.4" and first[10] == "– / 0.55 ± 0.07 / 0.75 ± 0.00"


def test_gradients_end_to_end_goes_on(tmp_path, capsys):
    from experiments import common, gradients
    own = ["--rows", str(tmp_path / "g.csv"), "--runs", str(tmp_path / "runs"),
           "--assets", str(tmp_path), "--samples", "300"]
    assert gradients.main([*own, "--at", "3", "--seeds", "11", *MINIATURE]) == 0
    first = common.read_rows(tmp_path / "g.csv")
    assert len(first) == 5 * 3 * (1 + 3) and set(first["method"]) == {"DDPM", "CM"}
    assert gradients.main([*own, "--at", "3", "6", "--seeds", "10", "11", *MINIATURE]) == 0
    rows = common.read_rows(tmp_path / "g.csv")
    assert len(rows) == 4 * len(first) and (tmp_path / "gradients.png").is_file()
    of_11 = rows[(rows["step"] == "3") & (rows["seed"] == "11")]
    of_10 = rows[(rows["step"] == "3") & (rows["seed"] == "10")]
    assert of_11.reset_index(drop=True).equals(first)
    moments = ["mu_1", "sigma_1", "anisotropy"]
    assert (of_10[moments].to_numpy() != of_11[moments].to_numpy()).all()
    observed = rows[["projected", "observed"]].astype(float)
    assert ((observed >= 0) & (observed <= 1)).all(axis=None)
    shown = capsys.readouterr().out
    assert gradients.main([*own, "--table"]) == 0 and capsys.readouterr().out in shown


# ------------------------------------------------------------------------------------------------
# divergence.py


TINY = ["--channels", "8", "--multipliers", "1", "2", "--image-size", "8", "--batch-size", "8"]


def test_divergence_end_to_end_goes_on(tmp_path, capsys, monkeypatch):
    from experiments import common, divergence
    monkeypatch.setattr(divergence, "SETTINGS", {
        "small": (120, (100,), ("1", "0.2"), TINY), "large": (110, (100,), ("0.2",), TINY)})
    monkeypatch.setattr(divergence, "RATES", ("1e-3",))
    own = ["--rows", str(tmp_path / "d.csv"), "--runs", str(tmp_path / "runs"),
           "--assets", str(tmp_path), "--steps", "2"]
    assert divergence.main([*own, "--seeds", "5"]) == 0
    first = common.read_rows(tmp_path / "d.csv")
    assert len(first) == (2 + 1) * 2 and set(first["end"]) == {"finished"}
    assert divergence.main([*own, "--seeds", "5", "6"]) == 0
    rows = common.read_rows(tmp_path / "d.csv")
    assert rows[:6].equals(first) and rows["seed"].tolist() == 6 * ["5"] + 6 * ["6"]
    log = common.read_rows(tmp_path / "runs" / "large-100-0.2-1e-3-inf-6" / "log.csv")
    mine = rows[(rows["setting"] == "large") & (rows["margin"] == "inf") & (rows["seed"] == "6")]
    assert mine[["d Few", "base"]].iloc[0].tolist() == log[["d_Few", "base"]].iloc[-1].tolist()
    assert (tmp_path / "divergence.png").is_file()
    out = capsys.readouterr().out
    assert len(shown_cells(out)[-1]) == 2 + 6
    with pytest.raises(SystemExit):
        divergence.main([*own, "--steps", "3"])
    assert "made with other options" in capsys.readouterr().err


def test_divergence_trains_what_it_says_and_finds_when_it_runs_off(tmp_path, monkeypatch):
    from experiments import common, divergence
    logs, made = {}, {}

    def run(flags, out):
        made[out.name] = cm.parse(flags)[0].resolved()
        out.mkdir()
        (out / "log.csv").write_text("step,base,d_Few\n" + logs.get(out.name, "50,1,nan\n"))
        return "not finite at step 260" if out.name in logs else ""

    monkeypatch.setattr(common, "run", run)
    name = "large-100-0.2-3e-3-inf-20"
    logs[name] = "50,1,0.1\n100,0.4,nan\n150,0.2,0.11\n200,0.39,0.3\n250,0.41,9\n"
    rows = {}
    for key in divergence.keys([20, 21]):
        row = divergence.measure(key, tmp_path, ["--steps", "300"])
        rows[divergence.directory(key, tmp_path).name] = row
    assert len(rows) == len(made) == 2 * (2 * 2 * 2 * 2 + 2 * 2)
    assert [rows[name][k] for k in ("d above 0.1", "base doubled", "d Few", "base", "end")] == [
        150, 250, 9, 0.41, "not finite at step 260"]
    other = rows[name.replace("inf", "0.1")]
    assert (other["d above 0.1"], other["base doubled"], other["end"]) == ("", "", "finished")
    config = made[name]
    assert (config.n_max, config.ir, config.image_size, config.channels) == (200, 100, 8, 32)
    assert (config.w_div, config.lr, config.div_margin, config.seed) == (0.2, 3e-3, math.inf, 20)
    config = made["small-600-1-2e-4-0.1-21"]
    assert (config.n_max, config.ir, config.image_size, config.channels) == (1000, 600, 16, 16)
    assert (config.w_div, config.lr, config.div_margin, config.seed) == (1, 2e-4, 0.1, 21)


def test_divergence_table_by_hand():
    from experiments import common, divergence
    key = dict(setting="small", IR=600, w_div="0.2", lr="3e-3", margin="inf")
    rows = [key | {"seed": 20, "d above 0.1": 1150, "base doubled": "", "d Few": 0.75,
                   "base": 0.0612, "end": "finished"},
            key | {"seed": 21, "d above 0.1": 50, "base doubled": 1550, "d Few": 1e6, "base": 0.82,
                   "end": "not finite at step 1600"},
            key | {"margin": "0.1", "seed": 20, "d above 0.1": "", "base doubled": "",
                   "d Few": 0.1, "base": 0.06, "end": "finished"}]
    text = divergence.table(common.numbers(common.text(rows), divergence.WORDS))
    n = np.array([int(1000 * 600 ** (-c / 9)) for c in range(10)])
    curvature = 1 + 10 * n[-1] / n.sum() - 0.2 * 10 / (n[-1] * (1 / n).sum())
    first, second = shown_cells(text)[0][2:]
    assert first == ["small", "600", "0.2", f"{curvature:.2f}", "3e-3", "inf", "2", "1,150, 50",
                     "never, 1,550", "0.75, 1e+06", "0.061, 0.82", "not finite at step 1600"]
    assert second[5:9] == ["0.1", "1", "never", "never"] and second[-1] == ""


def test_divergence_picture_is_of_the_logs(tmp_path, monkeypatch):
    from experiments import common, divergence
    figures = []
    monkeypatch.setattr(common, "save", lambda figure, path: figures.append(figure))
    keys = [key for key in divergence.keys([20]) if key["IR"] == 100 and key["lr"] == "3e-3"]
    for i, key in enumerate(keys):
        divergence.draw(20, tmp_path, tmp_path / "x.png")
        out = divergence.directory(key, tmp_path)
        out.mkdir()
        (out / "log.csv").write_text(f"step,base,d_Few\n50,{i + 1},{i + 10}\n")
    assert not figures  # a log was lacking each time
    divergence.draw(20, tmp_path, tmp_path / "x.png")
    drawn = [[line.get_ydata().tolist() for line in axis.lines] for axis in figures[0].axes]
    assert drawn == [[[10], [11]], [[12], [13]], [[14], [15]], [[1], [2]], [[3], [4]], [[5], [6]]]
    assert [axis.get_title() for axis in figures[0].axes[:3]] == [
        "small, w_div 1, lr 3e-3", "small, w_div 0.2, lr 3e-3", "large, w_div 0.2, lr 3e-3"]


# ------------------------------------------------------------------------------------------------
# assumptions.py


def test_assumptions_end_to_end(tmp_path, capsys, monkeypatch):
    from experiments import assumptions, common
    monkeypatch.setattr(assumptions, "SHAPES", ((4, 12), (6, 6)))
    own = ["--out", str(tmp_path)]
    assert assumptions.main(["--trials", "4000", "--repeats", "20", *own]) == 0
    out = capsys.readouterr().out
    rows = common.read_rows(tmp_path / "experiments" / "results" / "assumptions.csv")
    assert len(rows) == 2 * len(assumptions.violations())
    assert (tmp_path / "assets" / "alpha_r.png").is_file()
    rows = common.numbers(rows, ("assumption broken",))
    broken = rows["assumption broken"]
    assert (rows.loc[broken == "none broken", "difference in s.e."].abs() < 4).all()
    # one cell written anew: unequal norms have their own closed form
    m1, m2 = 4 / 3, 2 / 3
    p = theory.ndtr((90 * m1**2 - 10 * m2**2) / (8 * math.sqrt(100 * (m1**2 + m2**2))))
    mine = rows[(broken == "‖μ_1‖ = 2 ‖μ_2‖") & (rows["alpha"] == 0)].iloc[0]
    assert abs(mine["simulated"] - p) < 4 * theory.standard_error(p, 4000)
    error = (mine["simulated"] - mine["formula"]) / mine["difference in s.e."]
    assert math.isclose(error, mine["standard error"], rel_tol=1e-3)
    assert re.search(r"4 × 12, LoRA's start, B = 0: 0 at rank 0 yes, .* full rank NO \(0\.3", out)
    assert re.search(r"6 × 6, random factors: 0 at rank 0 yes, .* 1 at full rank yes;", out)
    assert assumptions.main(["--table", *own]) == 0 and capsys.readouterr().out == out


def test_assumptions_noise_has_unit_variance():
    from experiments import assumptions
    rng, v = np.random.default_rng(0), np.eye(8)[0] - np.eye(8)[1]
    for factor in (4.0, 0.25):
        g = assumptions.stretched(v, factor)(rng, (200, 500, 8))
        along = (g @ v / math.sqrt(2)).var()
        assert abs(g.var() - 1) < 0.02
        assert abs(along / ((8 * g.var() - along) / 7) - factor) < 0.05 * factor
    g = assumptions.correlated(0.1)(rng, (4000, 50, 2))
    assert abs(g.var() - 1) < 0.02 and abs((g[:, 0] * g[:, 1]).mean() - 0.1) < 0.03
    assert abs((g[..., 0] * g[..., 1]).mean()) < 0.02  # components stay independent
    t = assumptions.student_t(rng, (4000, 500), nu=10)
    assert abs(t.var() - 1) < 0.02 and abs((t**4).mean() - 4) < 0.2  # 3 + 6 / (nu - 4)
    quartile = np.quantile(assumptions.student_t(rng, (4000, 500)), 0.75)  # nu = 3
    assert abs(quartile - 0.76489 / math.sqrt(3)) < 0.005


def test_assumptions_break_one_thing_each():
    from experiments import assumptions
    rng = np.random.default_rng(0)
    for name, means, sigma, noise in assumptions.violations():
        g = noise(rng, (4000, 10, 8))
        v = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
        along = (g @ v).var()
        rest = (8 * g.var() - along) / 7
        factor = {"variance × 4 along μ_1 − μ_2": 4, "variance / 4 along μ_1 − μ_2": 0.25}
        assert abs(along / rest / factor.get(name, 1) - 1) < 0.1 + ("Student" in name), name
        shared = {"correlation 0.01 within a class": 0.01, "correlation 0.1 within a class": 0.1}
        product = (g[:, 0] * g[:, 1]).mean() / g.var()  # of two samples, over 32,000 pairs
        assert abs(product - shared.get(name, 0)) < 0.03, name
        lengths = np.linalg.norm(means, axis=1)
        assert abs(means[0] @ means[1]) < 1e-12 and math.isclose(lengths.mean(), 1), name
        ratio = {"‖μ_1‖ = 2 ‖μ_2‖": 2, "‖μ_1‖ = ‖μ_2‖ / 2": 0.5}.get(name, 1)
        assert math.isclose(lengths[0] / lengths[1], ratio), name
        ratio = {"σ_1 = 2 σ_2": 2, "σ_1 = σ_2 / 2": 0.5}.get(name, 1)
        sigma = np.broadcast_to(sigma, 2)
        assert math.isclose(sigma[0] / sigma[1], ratio) and math.isclose(sigma.mean(), 8), name


def test_tangent_share_against_a_basis_of_the_tangent_space():
    """The share by least squares on the Jacobian of (B, A) -> BA."""
    from experiments import assumptions
    rng = np.random.default_rng(1)
    for d, k, r in ((4, 6, 2), (5, 3, 1), (4, 4, 4)):
        b, a = rng.standard_normal((d, r)), rng.standard_normal((r, k))
        g = rng.standard_normal((d, k))
        for b_now in (b, 1e-9 * b, 0 * b, np.repeat(b[:, :1], r, 1)):  # full rank, none, one
            columns = [np.outer(np.eye(d)[i], a[j]).ravel() for i in range(d) for j in range(r)]
            scale = max(abs(b_now).max(), 1e-12)  # directions matter, not lengths
            columns += [np.outer(b_now[:, j] / scale, np.eye(k)[i]).ravel()
                        for j in range(r) for i in range(k)]
            jacobian = np.array(columns).T
            inside = jacobian @ np.linalg.lstsq(jacobian, g.ravel(), rcond=None)[0]
            share = assumptions.tangent_share(g, b_now, a)
            assert math.isclose(share, (inside**2).sum() / (g**2).sum(), rel_tol=1e-9)
    assert assumptions.tangent_share(g, np.zeros((4, 0)), np.zeros((0, 4))) == 0


def test_trained_factors_reach_the_best_of_their_rank():
    """After many steps BA is the best approximation of the target, so its factors are whole."""
    from experiments import assumptions
    b, a = assumptions.trained_factors(3, 5, 2, np.random.default_rng(0))
    assert b.shape == (3, 2) and a.shape == (2, 5)
    assert np.linalg.matrix_rank(b) == np.linalg.matrix_rank(a) == 2
    rng = np.random.default_rng(0)
    target = (rng.standard_normal((3, 3)) * [1, 0.7, 0.49]) @ rng.standard_normal((3, 5))
    u, s, v = np.linalg.svd(target / math.sqrt(5))
    assert np.allclose(b @ a, (u[:, :2] * s[:2]) @ v[:2], atol=1e-2)
    b, a = assumptions.trained_factors(60, 400, 50, rng, steps=0)  # LoRA's start
    assert (b == 0).all() and 0.0499 < a.max() < 0.05 and -0.05 < a.min() < -0.0499


def test_verdict_on_assumption_f2():
    from experiments import assumptions
    assert assumptions.verdict(np.linspace(0, 1, 11)) == (
        "0 at rank 0 yes, grows yes, 1 at full rank yes; at a tenth of full rank 0.10")
    assert assumptions.verdict([0.1, 0.5, 0.4]) == (
        "0 at rank 0 NO, grows NO, 1 at full rank NO (0.40); at a tenth of full rank 0.18")
    assert "grows yes" in assumptions.verdict([0, 0.51, 0.5, 1])


# ------------------------------------------------------------------------------------------------
# README.md


def sections():
    """(title, text) of the README's sections, those beneath a section apart."""
    parts = re.split(r"^##+ (.*)$", README, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def commands(text):
    return re.findall(r"python -m experiments\.(\w+)([^\n`#]*)", text)


MEASURED_ANEW = "Speed"  # its numbers are those of the machine that it ran on


@pytest.mark.parametrize("title, text", [(title, text) for title, text in sections()
                                         if "\n|" in text and title != MEASURED_ANEW])
def test_readme_shows_the_tables_as_their_command_prints_them(title, text, tmp_path, monkeypatch,
                                                              capsys):
    monkeypatch.chdir(ROOT)
    (script, arguments), = [c for c in commands(text) if "--table" in c[1]]
    argv = arguments.split()
    if script == "assumptions":  # its --out is where it reads, too
        results = tmp_path / "experiments" / "results"
        results.mkdir(parents=True)
        for path in RESULTS.glob("*.csv"):
            (results / path.name).write_bytes(path.read_bytes())
        argv += ["--out", str(tmp_path)]
    else:
        argv += ["--assets", str(tmp_path)]
    importlib.import_module(f"experiments.{script}").main(argv)
    printed = capsys.readouterr().out
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert blocks
    for block in blocks:
        assert block in printed, block


def test_readme_has_a_command_for_each_table_and_pictures_that_are_there():
    for title, text in sections():
        tables = "\n|" in text and title != MEASURED_ANEW
        assert any("--table" in arguments for _, arguments in commands(text)) == tables, title
    for picture in re.findall(r"\]\((\S+\.png)\)", README):
        assert (ROOT / "experiments" / picture).is_file(), picture


def test_readme_shows_a_variation_in_full():
    from experiments import baselines
    assert f"```python\n{inspect.getsource(baselines.Overlap)}```\n" in README


def test_readme_commands_parse(capsys):
    known = {"--" + name.replace("_", "-") for name in cm.Config.__dataclass_fields__}
    shown = set(commands(README))
    assert len({script for script, _ in shown}) == 11
    for script, arguments in shown:
        with pytest.raises(SystemExit):
            importlib.import_module(f"experiments.{script}").main(["--help"])
        own = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z][a-z-]*", arguments)) <= own | known, (script, arguments)
