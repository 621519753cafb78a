"""Tests of the study: what is counted and measured, the statistics, a miniature end to end."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

import cm
import fid
from experiments import baselines, common
from experiments.study import __main__ as command
from experiments.study import study, tables

MINIATURE = ["--steps", "20", "--channels", "4", "--multipliers", "1", "2", "--batch-size", "4",
             "--image-size", "8", "--n-max", "40", "--ir", "20", "--checkpoint-every", "5",
             "--log-every", "5"]


def test_the_stages_are_those_of_the_issue():
    """The first stage whole, seed by seed; every arm somewhere."""
    runs = study.missing_points([study.STAGES["question"]], pd.DataFrame())
    five = ["DDPM", "CM", "agreement alone", "capacity alone", "DDPM, two passes"]
    assert runs == [(("large", arm, seed), [("θ", 0.0), ("θ", 1.5)])
                    for seed in range(20, 30) for arm in five]
    assert {arm for stage in study.STAGES.values() for arm in stage.points} == set(study.ARMS)


def test_settings_and_arms_are_what_they_say():
    for arm, (_, losses, network) in study.ARMS.items():
        for setting, passes in (("large", 390), ("small", 77)):
            config = cm.parse(study.options_of(study.Run(setting, arm, 21)))[0].resolved()
            counts = cm.class_counts(config.n_max, config.ir, 10)
            assert round(config.steps * config.batch_size / sum(counts)) == passes
            assert config.seed == config.subset_seed == 21 and not config.flip
            module = losses.from_config(network(config, 10, 1), torch.tensor(counts), config)
            plain = config.no_cm or arm in ("agreement alone", "uniform w, no BA")
            assert bool(cm.reserved_layers(module)) != plain, arm
            assert module.same_masks == arm.startswith(("capacity alone", "our earlier"))


@pytest.mark.parametrize("margin, fuse", [("0.1", 0.1), ("0.02", 0.02), ("inf", 0.1)])
def test_the_fuses_share_on_hand_made_distances(margin, fuse):
    config = cm.parse(["--steps", "20", "--batch-size", "4", "--div-margin", margin])[0].resolved()
    unet = baselines.with_tally(lambda *args: torch.nn.Linear(1, 1))(config, 4, 1)
    Apart = type("Apart", (cm.CapacityManipulation,), {"forward": lambda self, *d: (0, 0, 0, d[0])})
    module = baselines.counted(Apart).from_config(unet, torch.tensor([100, 30, 2, 1]), config)
    assert (module.w < 0).tolist() == [False, False, True, True]
    y = torch.tensor([0, 2, 3, 3])
    for step in range(20):  # two steps a tenth
        d = torch.tensor([9.0, 0.0, 0.99 * fuse, 1.01 * fuse if step >= 10 else 0.0])
        module(d, y, y, y, y)
    splits = {"Many": np.array([0]), "Medium": np.array([1, 2]), "Few": np.array([3])}
    row = baselines.above_fuse(unet.tally, splits)
    assert row.pop("above fuse") == 10 / 60
    assert row == {"above fuse Many": " ".join(["nan"] * 10),
                   "above fuse Medium": " ".join(["0"] * 10),
                   "above fuse Few": " ".join(["0"] * 5 + ["0.5"] * 5)}
    assert unet.tally[..., 0].sum() == 80 and "tally" in unet.state_dict()


def test_memorised_by_hand():
    training, images = (torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
                        for values in ([0, 100, 200], [0, 24, 26, 150]))
    assert study.memorised(images, training) == 2 / 4  # 24 is thrice as near to 0 as to 100


def made(**values):
    """Rows of `large` at guidance 0 whose FD Few is, by seed from 20 on, values of an arm."""
    rows = [dict(setting="large", arm=arm, network="θ", guidance=0.0, seed=20 + i) |
            dict.fromkeys(tables.MEASURES, value) | {"loss Few": 0.1, "d Few": 1e-3,
                                                   "above fuse": np.nan}
            for arm, column in values.items() for i, value in enumerate(column)]
    return pd.DataFrame(rows)


def t3(t):
    """P(T < t) of Student's t with three degrees of freedom, in closed form."""
    x = t / math.sqrt(3)
    return 0.5 + (x / (1 + x * x) + math.atan(x)) / math.pi


def test_p_values_and_intervals_against_hand_worked_numbers():
    ours, theirs = [10.0, 10.0, 10.0, 10.0], [11.0, 10.0, 9.0, 8.0]  # -1, 0, 1, 2
    rows = made(CM=ours, DDPM=theirs, RS=[5.0])
    error = math.sqrt(5 / 3 / 4)  # of the mean, 0.5
    for margin in (0.2, 1.0, 2.0):
        above, below = t3((0.5 - margin) / error), 1 - t3((0.5 + margin) / error)
        assert np.isclose(tables.same_within(np.subtract(ours, theirs), margin), max(above, below))
    [row] = tables.verdicts(rows, {1: study.PRIMARY[1]})
    assert row["claim"] == "1" and row["seeds"] == "4 of 10" and row["verdict"] == "open"
    assert row["FD Few"] == "+0.5 [-1.6, +2.6]"  # 3.182 errors
    assert row["p"] == f"{2 * (1 - t3(0.5 / error)):.2g}"
    [row] = tables.differences(rows, [study.PRIMARY[1]])
    assert row["recall Few"] == "+0.500 [-1.554, +2.554]"


def test_holm_is_over_the_claims_of_a_family():
    base = np.array([60.0, 64, 58, 66])
    off = np.array([1.0, 1.3, 0.9, 1.4])
    rows = made(**{"DDPM": base, "CM": base - 10 * off, "agreement alone": base - 9 * off[::-1],
                   "capacity alone": base + 7 * off, "DDPM, two passes": base - off,
                   "uniform w": base[:1]})
    first, second = (tables.verdicts(rows, family) for family in (study.PRIMARY, study.SECONDARY))

    def p_of(d):
        return 2 * (1 - t3(abs(d.mean()) / (d.std(ddof=1) / 2)))

    # the four are proportional, so Holm makes four times the least of each; of six five aren't run
    assert {row["p"] for row in first} == {f"{4 * p_of(10 * off):.2g}"}
    assert [row["p"] for row in second] == ["–", f"{6 * p_of(9 * off):.2g}", *["–"] * 4]
    assert [row["verdict"] for row in first] == [
        "holds", "holds", "the reverse holds", "differs: capacity alone above"]
    assert [row["verdict"] for row in second] == [
        "not run", "holds", "open (one seed)", "not run", "not run", "not run"]
    assert [row["seeds"] for row in first] == ["4 of 10"] * 4
    assert [row["seeds"] for row in second] == ["0 of 10", "4 of 10", "1 of 5", *["0 of 5"] * 3]
    rows.loc[rows["arm"] == "CM", "FD Few"] = np.nan
    assert tables.verdicts(rows, study.PRIMARY)[0]["verdict"] == "open (a run ran off)"


@pytest.mark.parametrize("gain, noise, says", [
    (20.0, 0.1, "the same (within ±5.0: p = "), (20.0, 4.0, "open (within ±5.0: p = 0."),
    (-20.0, 0.1, "open")])
def test_what_isnt_decided_is_tested_for_being_the_same(gain, noise, says):
    base = np.array([60.0, 64, 58, 66])
    wiggle = noise * np.array([1.0, -1.2, 1.1, -0.8])
    ours = base - gain * np.array([0.9, 1.1, 1.0, 1.0])
    rows = made(**{"DDPM": base, "CM": ours, "capacity alone": ours + wiggle,
                   "agreement alone": ours - wiggle})
    for family in ({4: study.PRIMARY[4]}, tables.AGREEMENT):
        [row] = tables.verdicts(rows, family)
        assert row["verdict"].startswith(says) and (gain > 0 or row["verdict"] == says)


def test_a_row_says_where_our_fuse_acts_and_what_ran_off():
    run = pd.DataFrame({"FD Few": [1.0, 2.0], "above fuse": [0.0, 0.03]})
    assert tables.name_of("CM", run) == "CM, with our fuse"
    assert tables.name_of("CM", run / 2) == tables.name_of("CM", run[:0]) == "CM"
    assert tables.name_of("no fuse", run.replace(1.0, np.nan)) == "no fuse, 1 ran off"


def test_the_fuses_table_is_the_mean_over_seeds():
    rows = made(CM=[1.0, 2.0], DDPM=[1.0]).assign(**{
        "above fuse": [0.02, 0.04, np.nan], "above fuse Few": ["0 0.1", "0.5 0.3", ""],
        "above fuse Medium": ["nan 0", "0 0", ""]})
    assert tables.fuse(rows) == [{
        "setting": "large", "arm": "CM", "d Few": "1.0e-03", "above fuse, %": "3.00",
        "Medium, %, by tenth": "nan 0.0", "Few, %, by tenth": "25.0 20.0"}]


@pytest.fixture
def tiny(tmp_path, monkeypatch, fewer_images):
    """study.main with two stages of a seed, in this process, with hasty classifiers."""
    fewer_images(100, 20)
    one, general = range(20, 21), [study.Point("θ_g", 0.0)]
    stages = {"a": study.Stage("large", one, {"DDPM": study.BOTH[:1], "CM": study.BOTH}),
              "b": study.Stage("large", one, {"CM": general, "CM, dropout 0.3": study.BOTH[:1]})}
    for module in (study, tables):
        monkeypatch.setattr(module, "STAGES", stages)
    monkeypatch.setattr(cm, "report", lambda *args: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(tables, "flops", lambda *_: 1.0)
    monkeypatch.setattr(fid, "train_classifier", functools.partial(fid.train_classifier, steps=10))
    own = ["--rows", str(tmp_path / "rows.csv"), "--runs", str(tmp_path / "runs"),
           "--assets", str(tmp_path), "--num-images", "40", "--jobs", "2", *MINIATURE]
    return lambda *more: command.main([*own, *more])


def test_a_miniature_end_to_end(tiny, tmp_path, capsys, monkeypatch):
    # killed: the next call goes on from the checkpoint
    child, effects = mock.Mock(), [*4 * [mock.DEFAULT], KeyboardInterrupt, *99 * [mock.DEFAULT]]
    write = mock.Mock(wraps=cm.write_atomically, side_effect=effects)
    with monkeypatch.context() as here, pytest.raises(SystemExit) as ended:
        here.setattr(cm, "write_atomically", write)
        here.setattr(study.multiprocessing, "active_children", lambda: [child])
        tiny("--stage", "a")
    assert ended.value.code == 130 and child.terminate.called
    cut, ours = (tmp_path / "runs" / f"large-{arm}-20" for arm in ("DDPM", "CM"))
    cut = cut / "run" / "checkpoint.pt"
    assert 5 <= torch.load(cut, weights_only=True)["step"] < 20
    tiny("--stage", "a")
    rows = common.read_rows(tmp_path / "rows.csv")
    assert rows[["arm", "network", "guidance"]].values.tolist() == [
        ["DDPM", "θ", "0"], ["CM", "θ", "0"], ["CM", "θ", "1.5"]]
    assert {p.name for p in tmp_path.glob("*.png")} == {"study.png", "study_arms.png"}
    assert "| 1       | CM − DDPM " in capsys.readouterr().out

    # what has its row isn't run again; a later stage goes on with the runs that are there
    tiny("--stage", "a", "b")
    assert "2 runs to come" in capsys.readouterr().out
    first, rows = rows, common.read_rows(tmp_path / "rows.csv")
    assert rows.iloc[:3].equals(first) and rows["arm"].tolist()[3:] == ["CM", "CM, dropout 0.3"]
    assert set(rows["status"]) == {"finished"} and set(rows["device"]) == {"CPU, 1 thread"}
    for options, dropout in zip(rows["options"], ["0.1"] * 4 + ["0.3"], strict=True):
        flags = options.split(" --")  # of an option given twice the last is recorded, no seed is
        assert {f"dropout {dropout}", "steps 20", "num-images 40"} <= set(flags)
        assert sum("steps" in flag or "seed" in flag for flag in flags) == 1

    # against the plain way: cm.py, fid.py
    for arm, checkpoint in (("DDPM", cut), ("CM", ours / "run" / "checkpoint.pt")):
        common.run(study.options_of(study.Run("large", arm, 20), MINIATURE), tmp_path / arm)
        one, other = (torch.load(path, weights_only=True)["ema"]
                      for path in (tmp_path / arm / "checkpoint.pt", checkpoint))
        assert all(torch.equal(p, other[k]) for k, p in one.items())
    path = tmp_path / "CM" / "checkpoint.pt"
    for name, more in (("θ-g1.5", []), ("θ_g-g0", ["--guidance", "0", "--general-only"])):
        cm.main(["--sample", str(path), "--num-images", "40", "--seed", "20", *more, "--out",
                 str(tmp_path / "plain.npz"), "--overwrite"])
        one, other = (np.load(p) for p in (tmp_path / "plain.npz", ours / f"40-samples-{name}.npz"))
        assert all((one[k] == other[k]).all() for k in other)
    whole = common.numbers(rows[rows["arm"] == "CM"], study.WORDS)
    assert whole.notna().all(axis=None) and (whole["images"] == 40).all()
    check_cells(whole.iloc[1], path, ours / "40-samples-θ-g1.5.npz", tmp_path, monkeypatch)

    with pytest.raises(SystemExit):
        tiny("--stage", "a", "--lr", "1")
    assert "made with other options than" in capsys.readouterr().err.splitlines()[-1]


def check_cells(row, checkpoint, samples, cache, monkeypatch):
    """A row's cells by fid.py's and cm.py's own functions."""
    hasty = fid.train_classifier
    for seed, columns in enumerate((("FD", "precision", "recall", "accuracy"), ("FD2",))):
        monkeypatch.setattr(fid, "train_classifier", functools.partial(hasty, seed=seed))
        found = fid.evaluate(samples, "fashion16", features="classifier", cache=cache / f"{seed}")
        for group in ("overall", "Many", "Medium", "Few"):
            for column in columns:
                value = found[group][column.rstrip("2")]
                assert np.isclose(row[f"{column} {group}"], value, 1e-4), (column, group)
    config, unet, counts = cm.load_trained(checkpoint)
    data, few = cm.Data(config), cm.splits(counts)["Few"]
    loss, _, d = cm.held_out_loss(unet, data.held_out, data.held_out_labels, 10, 200, 10)
    images, labels, _ = fid.read_images(samples)
    copies = study.memorised(images[np.isin(labels, few)], data.images)
    assert np.allclose(row[["loss Few", "d Few", "memorised Few"]].astype(float),
                       [loss[few].mean(), d[few].mean(), copies], 1e-5, 0)


def test_runs_and_samples_that_arent_finite_say_so(tiny, tmp_path, monkeypatch):
    off = "not finite between steps 5 and 10"  # DDPM; CM isn't with guidance
    for module, name, effects in ((common, "run", [off, mock.DEFAULT]),
                                  (cm, "generate", [mock.DEFAULT, FloatingPointError])):
        wrapped = mock.Mock(wraps=getattr(module, name), side_effect=effects)
        monkeypatch.setattr(module, name, wrapped)
    tiny("--stage", "a")
    rows = common.read_rows(tmp_path / "rows.csv")
    assert rows[["arm", "guidance", "status"]].values.tolist() == [
        ["DDPM", "0", off], ["CM", "0", "finished"], ["CM", "1.5", "images not finite"]]
    assert ((rows["FD Few"] != "") == (rows["status"] == "finished")).all()


def test_bars_are_means_over_the_seeds_that_all_arms_have():
    runs = [pd.DataFrame({"FD Few": fd, "above fuse": 0.0}) for fd in ([1, 2, 9.0], [4, 6.0])]
    axis = tables.Figure().subplots()
    tables.draw_arms(axis, runs, ["DDPM", "CM"])
    assert [line.get_xdata()[0] for line in axis.lines if line.get_lw() == 3] == [1.5, 5]
