"""Tests of experiments/. They need pandas and tabulate; the benchmark's also its peers."""

import functools
import importlib
import inspect
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm
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
    ("study.__main__", "--jobs 0", "--jobs is 0"), ("study.__main__", "--steps x", "invalid int"),
    ("study.__main__", "--table", "has no rows"), ("divergence", "--lr 1", "--lr has no meaning"),
    ("study.__main__", "--table --lr 1", "--lr has no meaning beside --table"),
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


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.csv")), ids=lambda path: path.name)
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
    monkeypatch.setattr(cm, "report", lambda *_: None)
    out, train, seen = tmp_path / "run", cm.train, []
    out.mkdir()
    (out / "log.csv").write_text("killed before there was a checkpoint")
    monkeypatch.setattr(cm, "train", lambda *a, **more: (seen.append(more), train(*a, **more)))
    for steps in ("2", "3", "3"):
        assert common.run([*MINIATURE, "--steps", steps], out, network=cm.make_unet) == ""
    assert seen == 2 * [{"network": cm.make_unet}]  # what is finished isn't touched
    rows = common.read_rows(out / "log.csv")
    assert rows["step"].tolist() == ["2", "3"]
    draw, made = cm.draw_batch, [*MINIATURE, "--steps", "9"]

    def runs_off(data, config, size, step, rank):
        x0, *rest = draw(data, config, size, step, rank)
        return (x0 + (math.inf if step == 6 else 0), *rest)

    monkeypatch.setattr(cm, "draw_batch", runs_off)
    for _ in range(2):  # again from its last good checkpoint
        assert common.run(made, out) == "not finite between steps 4 and 6"
    with pytest.raises(ValueError, match="--lr is 1.0"):
        common.run([*made, "--lr", "1"], out)
    with pytest.raises(ValueError, match="--steps is 0"):
        common.run(["--steps", "0"], out)

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    del state["rows"]  # an earlier cm.py's
    torch.save(state, out / "checkpoint.pt")
    with pytest.raises(ValueError, match="begun by an earlier cm.py"):
        common.run(made, out)
    assert common.run([*MINIATURE, "--steps", str(state["step"])], out) == ""


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


def test_holm_against_a_hand_worked_example():
    from experiments import common
    assert np.allclose(common.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(common.holm([0.5, math.nan, 0.001]), [1, 1, 0.003])


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


def test_training_killed_goes_on_bit_for_bit(tmp_path):
    def die(i):
        if i == 14:
            raise KeyboardInterrupt
    whole = Trained(tmp_path / "whole.pt").train()
    assert whole.seen == list(range(1, 21))
    cut_at = tmp_path / "new" / "cut.pt"
    with pytest.raises(KeyboardInterrupt):
        Trained(cut_at, die).train()
    (cut_at.parent / ".cut.99.tmp.pt").write_text("half")
    torch.rand(3)  # what was drawn in between doesn't matter
    cut = Trained(cut_at).train()
    assert cut.seen == list(range(13, 21)) and torch.equal(cut.weights(), whole.weights())
    again = Trained(cut_at).train()  # nothing is left to do
    assert again.seen == [] and torch.equal(again.weights(), whole.weights())
    longer = Trained(cut_at).train(25)
    assert longer.seen == list(range(21, 26))
    assert torch.equal(longer.weights(), Trained(tmp_path / "25.pt").train(25).weights())
    assert [p.name for p in cut_at.parent.iterdir()] == ["cut.pt"]
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
# pruning.py


def test_pruning_share_is_exact_and_takes_the_smallest():
    from experiments.theory import pruning
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
    from experiments import common
    from experiments.theory import pruning
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
    from experiments.theory import pruning
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
    from experiments.theory import gradients
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
    from experiments.theory import gradients
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
    from experiments.theory import gradients
    torch.manual_seed(0)
    layer = cm.LowRankReserved(nn.Conv2d(4, 6, 3), 18, 12, 2).double()
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
    from experiments.theory import gradients
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
    from experiments.theory import gradients
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

    from experiments.theory import gradients
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
    from experiments.theory import gradients
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
    from experiments.theory import gradients
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
    from experiments import common
    from experiments.theory import gradients
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
    from experiments import common
    from experiments.theory import divergence
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
    from experiments import common
    from experiments.theory import divergence
    logs, made = {}, {}

    def run(flags, out):
        made[out.name] = cm.parse(flags)[0].resolved()
        out.mkdir()
        if logs.get(out.name) != "":
            (out / "log.csv").write_text("step,base,d_Few\n" + logs.get(out.name, "50,1,nan\n"))
        return "not finite between steps 250 and 300" if out.name in logs else ""

    monkeypatch.setattr(common, "run", run)
    name = "large-100-0.2-3e-3-inf-20"
    logs[name] = "50,1,0.1\n100,0.4,nan\n150,0.2,0.11\n200,0.39,0.3\n250,0.41,9\n"
    at_once = "small-100-1-3e-3-inf-21"
    logs[at_once] = ""  # there was no row yet
    rows = {}
    for key in divergence.keys([20, 21]):
        row = divergence.measure(key, tmp_path, ["--steps", "300"])
        rows[divergence.directory(key, tmp_path).name] = row
    assert len(rows) == len(made) == 2 * (2 * 2 * 2 * 2 + 2 * 2)
    assert [rows[name][k] for k in ("d above 0.1", "base doubled", "d Few", "base", "end")] == [
        150, 250, 9, 0.41, "not finite between steps 250 and 300"]
    assert [rows[at_once].get(k) for k in ("d above 0.1", "base doubled", "d Few", "end")] == [
        "", "", None, "not finite between steps 250 and 300"]
    other = rows[name.replace("inf", "0.1")]
    assert (other["d above 0.1"], other["base doubled"], other["end"]) == ("", "", "finished")
    config = made[name]
    assert (config.n_max, config.ir, config.image_size, config.channels) == (200, 100, 8, 32)
    assert (config.w_div, config.lr, config.div_margin, config.seed) == (0.2, 3e-3, math.inf, 20)
    config = made["small-600-1-2e-4-0.1-21"]
    assert (config.n_max, config.ir, config.image_size, config.channels) == (1000, 600, 16, 16)
    assert (config.w_div, config.lr, config.div_margin, config.seed) == (1, 2e-4, 0.1, 21)


def test_divergence_table_by_hand():
    from experiments import common
    from experiments.theory import divergence
    key = dict(setting="small", IR=600, w_div="0.2", lr="3e-3", margin="inf")
    rows = [key | {"seed": 20, "d above 0.1": 1150, "base doubled": "", "d Few": 0.75,
                   "base": 0.0612, "end": "finished"},
            key | {"seed": 21, "d above 0.1": 50, "base doubled": 1550, "d Few": 1e6, "base": 0.82,
                   "end": "not finite between steps 1550 and 1600"},
            key | {"margin": "0.1", "seed": 20, "d above 0.1": "", "base doubled": "",
                   "d Few": 0.1, "base": 0.06, "end": "finished"}]
    text = divergence.table(common.numbers(common.text(rows), divergence.WORDS))
    n = np.array([int(1000 * 600 ** (-c / 9)) for c in range(10)])
    curvature = 1 + 10 * n[-1] / n.sum() - 0.2 * 10 / (n[-1] * (1 / n).sum())
    first, second = shown_cells(text)[0][2:]
    assert first == ["small", "600", "0.2", f"{curvature:.2f}", "3e-3", "inf", "2", "1,150, 50",
                     "never, 1,550", "0.75, 1e+06", "0.061, 0.82",
                     "not finite between steps 1550 and 1600"]
    assert second[5:9] == ["0.1", "1", "never", "never"] and second[-1] == ""


def test_divergence_picture_is_of_the_logs(tmp_path, monkeypatch):
    from experiments import common
    from experiments.theory import divergence
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
    from experiments import common
    from experiments.theory import assumptions
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
    from experiments.theory import assumptions
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
    from experiments.theory import assumptions
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
    from experiments.theory import assumptions
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
    from experiments.theory import assumptions
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
    from experiments.theory import assumptions
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
EARLIER = "study"  # its sections' commands are those of commit f7283d9


@pytest.mark.parametrize("title, text", [(title, text) for title, text in sections()
                                         if "\n|" in text and title != MEASURED_ANEW
                                         and (EARLIER, "--table") not in {
                                             (c[0], c[1].split()[0]) for c in commands(text)
                                             if c[1].strip()}])
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
    shown = {command for command in commands(README) if command[0] != EARLIER}
    assert len({script for script, _ in shown}) == 10
    for script, arguments in shown:
        with pytest.raises(SystemExit):
            importlib.import_module(f"experiments.{script}").main(["--help"])
        own = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z][a-z-]*", arguments)) <= own | known, (script, arguments)
