"""Tests of the study: what is counted and measured, the statistics, a miniature end to end."""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # whatever pytest's import mode
import cm
import fid
from experiments import baselines, common
from experiments.study import __main__ as command
from experiments.study import study, tables

torch.set_num_threads(1)  # results repeat with as many threads
MINIATURE = ["--steps", "20", "--channels", "4", "--multipliers", "1", "2", "--batch-size", "4",
             "--image-size", "8", "--n-max", "40", "--ir", "20", "--checkpoint-every", "5",
             "--log-every", "5"]


# ------------------------------------------------------------------------------------------------
# What is compared


def test_the_stages_are_those_of_the_issue():
    """The first stage whole, seed by seed; every arm somewhere; claims between arms of a stage."""
    stages = study.make_stages()
    runs = study.missing_points([stages["question"]], pd.DataFrame())
    five = ["DDPM", "CM", "agreement alone", "capacity alone", "DDPM, two passes"]
    assert [(r.seed, r.arm) for r, _ in runs] == [(s, a) for s in range(20, 30) for a in five]
    assert all(r.setting == "large" and points == [("θ", 0.0), ("θ", 1.5)] for r, points in runs)
    assert {arm for stage in stages.values() for arm in stage.points} == set(study.ARMS)
    claims = study.PRIMARY | study.SECONDARY
    assert list(claims) == list(range(1, 11)) and len(study.PRIMARY) == 4
    for claim in claims.values():
        seeds = [{seed for stage in stages.values() if stage.setting == claim.setting
                  and ("θ", claim.guidance) in stage.points.get(arm, []) for seed in stage.seeds}
                 for arm in (claim.ours, claim.theirs)]
        assert len(seeds[0] & seeds[1]) >= 5


def test_settings_and_arms_differ_in_what_they_say():
    for arm, (_, losses, network) in study.ARMS.items():
        for setting, passes in (("large", 390), ("small", 77)):
            config = cm.parse(study.options_of(study.Run(setting, arm, 21), []))[0].resolved()
            counts = cm.class_counts(config.n_max, config.ir, 10)
            assert round(config.steps * config.batch_size / sum(counts)) == passes
            assert config.seed == config.subset_seed == 21 and not config.flip
            unet = network(config, 10, 1)
            module = losses.from_config(unet, torch.tensor(counts), config)
            reserved = bool(cm.reserved_layers(unet))
            plain = config.no_cm or arm in ("agreement alone", "uniform w, no BA")
            assert reserved != plain, arm
            assert module.same_masks == arm.startswith(("capacity alone", "our earlier"))


def test_two_passes_cost_what_cm_costs_in_both_networks():
    for setting in study.SETTINGS:
        plain, cms, twice, agreement = (study.flops(setting, arm) for arm in (
            "DDPM", "CM", "DDPM, two passes", "agreement alone"))
        assert twice == agreement == 2 * plain
        config = cm.parse(study.options_of(study.Run(setting, "CM", 0), []))[0].resolved()
        forming = 0  # BA once a step, a product forward and two backward, at 2 FLOPs
        for layer in cm.reserved_layers(cm.make_unet(config, 10, 1)):
            (d, r), (_, k) = layer.B.shape, layer.A.shape
            forming += 3 * 2 * d * r * k
        assert cms - twice == forming and 0 < forming < 0.05 * twice


# ------------------------------------------------------------------------------------------------
# What is counted and measured


class Apart(cm.CapacityManipulation):
    """d is what a test says."""

    def forward(self, x0, y, t, eps, y_in):
        return torch.zeros(()), eps, eps, x0


@pytest.mark.parametrize("margin, fuse", [("0.1", 0.1), ("0.02", 0.02), ("inf", 0.1)])
def test_the_fuses_share_on_hand_made_distances(margin, fuse):
    config = cm.parse(["--steps", "20", "--batch-size", "4", "--div-margin", margin])[0].resolved()
    unet = baselines.with_tally(lambda *args: torch.nn.Linear(1, 1))(config, 4, 1)
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


def test_counting_changes_no_training(tmp_path):
    states, flags = [], study.options_of(study.Run("large", "CM", 3), MINIATURE)
    for kind in ({}, study.made_of(study.Run("large", "CM", 3))):
        out = tmp_path / str(len(states))
        common.run(flags, out, **kind)
        states.append(torch.load(out / "checkpoint.pt", weights_only=True))
    tally = states[1]["model"].pop("tally")
    assert tally[..., 0].sum() == 80 and tally[:, 5:, 1].sum() > 0
    assert all(torch.equal(p, states[0]["model"][k]) for k, p in states[1]["model"].items())


def frechet(a, b):
    """The Fréchet distance of two feature arrays, by general eigenvalues."""
    covariances = np.cov(a.T), np.cov(b.T)
    root = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0) ** 0.5
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * root.sum()


def check_cells(row, checkpoint, samples):
    """A row's FD, FD2, accuracy, recall, loss, d and memorised of Few, computed by other means."""
    config, unet, counts = cm.load_trained(checkpoint)
    few = cm.splits(counts)["Few"]
    images, labels, _ = cm.load_dataset("fashion16", None, 8, train=False)
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    alpha_bar, generator = cm.make_alpha_bar(), torch.Generator().manual_seed(0)
    losses, apart = [], []
    for t in range(50, 1000, 100):
        for part in range(0, len(images), 250):
            x0, y = images[part:part + 250].float() / 127.5 - 1, labels[part:part + 250]
            eps, a = torch.randn(x0.shape, generator=generator), alpha_bar[t]
            x_t = (a.sqrt() * x0 + (1 - a).sqrt() * eps).float()
            with torch.no_grad():
                theta = unet(x_t, torch.full_like(y, t), y)
                with cm.general_only(unet):
                    theta_g = unet(x_t, torch.full_like(y, t), y)
            kept = np.isin(y, few)  # each class has as many images
            losses.append(((theta - eps) ** 2).mean((1, 2, 3))[kept])
            apart.append(((theta - theta_g) ** 2).mean((1, 2, 3))[kept])
    assert np.isclose(float(row["loss Few"]), float(torch.cat(losses).double().mean()), 1e-4)
    assert np.isclose(float(row["d Few"]), float(torch.cat(apart).double().mean()), 1e-4)

    drawn = np.load(samples)
    kept = np.isin(drawn["arr_1"], few)
    fakes = drawn["arr_0"][kept].reshape(kept.sum(), -1).astype(float)
    train = cm.Data(config).images.permute(0, 2, 3, 1).reshape(sum(counts), -1).double().numpy()
    reals = images[np.isin(labels, few)].permute(0, 2, 3, 1).flatten(1).double().numpy()
    for name, some in (("Few", fakes), ("real", reals)):
        near = [sorted(np.sqrt(((x - train) ** 2).sum(1)))[:2] for x in some]
        assert np.isclose(float(row[f"memorised {name}"]), np.mean([a < b / 3 for a, b in near]),
                          1e-5)

    real, real_labels, _ = cm.load_dataset("fashion16", None, 8)
    sets = [fid.chw(real), torch.from_numpy(real_labels), images, labels, 10]
    for kind, seed in (("FD", 0), ("FD2", 1)):  # hasty ones, as `tiny` has them
        net, _ = fid.train_classifier(*sets, steps=10, seed=seed)
        with torch.no_grad():
            theirs = net(fid.chw(real[np.isin(real_labels, few)]))[0].double().numpy()
            ours, logits = net(fid.chw(drawn["arr_0"][kept]))
        assert np.isclose(float(row[f"{kind} Few"]), frechet(theirs, ours.double().numpy()), 1e-3)
        if kind == "FD":
            right = (logits.argmax(1).numpy() == drawn["arr_1"][kept]).mean()
            assert np.isclose(float(row["accuracy Few"]), right, 1e-5)
            kinds = fid.precision_recall(theirs, ours)
            assert np.allclose([float(row[f"{name} Few"]) for name in ("precision", "recall")],
                               kinds, 1e-5)


def test_memorised_by_hand():
    training = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    training[1], training[2] = 100, 200
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    images[1], images[2], images[3] = 24, 26, 150  # 24 : 76 and 26 : 74 from the nearest two
    assert study.memorised(images, training) == 2 / 4


# ------------------------------------------------------------------------------------------------
# Verdicts


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
    pair = tables.paired(rows, study.PRIMARY[1])
    differences = pair[0]["FD Few"] - pair[1]["FD Few"]
    for margin in (0.2, 1.0, 2.0):
        above, below = t3((0.5 - margin) / error), 1 - t3((0.5 + margin) / error)
        assert np.isclose(tables.same_within(differences, margin), max(above, below))
    row = tables.verdicts(rows)[0]
    assert row["seeds"] == "4 of 10" and row["FD Few"] == "+0.5 [-1.6, +2.6]"  # 3.182 errors
    assert row["recall Few"] == "+0.500 [-1.554, +2.554]" and row["claim"] == "1"
    assert row["verdict"] == "open" and row["p"] == f"{2 * (1 - t3(0.5 / error)):.3f}"
    assert row["p, Holm"] == "1.000"


def test_holm_is_over_the_primary_and_over_the_secondary_claims():
    base = np.array([60.0, 64, 58, 66])
    off = np.array([1.0, 1.3, 0.9, 1.4])
    rows = made(**{"DDPM": base, "CM": base - 10 * off, "agreement alone": base - 9 * off[::-1],
                   "capacity alone": base + 7 * off, "DDPM, two passes": base - off,
                   "uniform w": base[:1]})
    shown = {row["claim"]: row for row in tables.verdicts(rows)}
    assert list(shown) == ["1", "2", "3", "4", "", *map(str, range(5, 11))]
    p = [2 * (1 - t3(abs(t))) for t in (
        d.mean() / (d.std(ddof=1) / 2) for d in (-10 * off, -9 * off, 7 * off, 17 * off))]
    assert np.allclose(p, p[0])  # proportional: so Holm makes four times the least of each
    for number in "1234":
        assert shown[number]["p, Holm"] == f"{4 * p[0]:.3f}"
    sixth = -10 * off + off
    t = sixth.mean() / (sixth.std(ddof=1) / 2)
    assert shown["6"]["p, Holm"] == f"{6 * 2 * (1 - t3(abs(t))):.3f}"  # five weren't run
    assert [shown[number]["verdict"] for number in "123"] == ["holds"] * 2 + ["the reverse holds"]
    assert shown["4"]["verdict"] == "differs: capacity alone above"
    assert shown["5"]["verdict"] == shown["8"]["verdict"] == "not run"
    assert shown["7"]["seeds"] == "1 of 5" and shown["6"]["seeds"] == "4 of 10"
    assert shown[""]["p, Holm"] == "–" and shown[""]["p"] != "–"


@pytest.mark.parametrize("gain, noise, says", [
    (20.0, 0.1, "the same (within ±5.0: p = 0.000)"), (20.0, 4.0, "open (within ±5.0: p = 0."),
    (-20.0, 0.1, "open")])
def test_what_isnt_decided_is_tested_for_being_the_same(gain, noise, says):
    base = np.array([60.0, 64, 58, 66])
    wiggle = noise * np.array([1.0, -1.2, 1.1, -0.8])
    ours = base - gain * np.array([0.9, 1.1, 1.0, 1.0])
    rows = made(**{"DDPM": base, "CM": ours, "capacity alone": ours + wiggle,
                   "agreement alone": ours - wiggle})
    shown = {row["claim"]: row["verdict"] for row in tables.verdicts(rows)}
    for number in ("4", ""):
        assert shown[number].startswith(says) and (gain > 0 or shown[number] == says)


def test_one_seed_and_runs_that_ran_off_decide_nothing():
    shown = {row["claim"]: row["verdict"] for row in tables.verdicts(made(**{
        "DDPM": [60.0, 61], "CM": [50.0, np.nan], "agreement alone": [50.0]}))}
    assert shown["1"] == "open (a run ran off)" and shown["2"] == "open (one seed)"
    assert shown["3"] == "not run"


def test_a_row_says_where_our_fuse_acts():
    run = pd.DataFrame({"above fuse": [0.0, 0.03]})
    assert tables.name_of("CM", run) == "CM, with our fuse"
    assert tables.name_of("CM", run / 2) == tables.name_of("CM", run[:0]) == "CM"
    assert tables.name_of("no fuse", run) == "no fuse"


def test_all_arms_are_listed_and_the_best_guidance_is_marked(monkeypatch):
    monkeypatch.setattr(tables, "flops", lambda setting, arm: 2.0 if "CM" in arm else 1.0)
    rows = made(DDPM=[60.0, 62], CM=[50.0])
    guided = [made(DDPM=[61.0, 60], CM=[51.0], Focal=[9.0]).assign(guidance=1.5),
              made(RS=[7.0]).assign(setting="small"), made(CM=[80.0]).assign(guidance=3.0),
              made(CM=[70.0]).assign(network="θ_g")]
    rows = pd.concat([rows, *guided], ignore_index=True)
    tablets = {w: {(row["setting"], row["arm"]): row for row in tables.arms(rows, w)}
               for w in (0.0, 1.5, 3.0)}
    assert {key for key in tablets[0.0] if key[0] == "large"} == {
        ("large", arm) for arm in [*study.ARMS, "CM, θ_g"]}
    assert {arm for _, arm in tablets[3.0]} == {"DDPM", "CM"}
    ddpm, ours, general = (tablets[0.0]["large", arm] for arm in ("DDPM", "CM", "CM, θ_g"))
    assert ddpm["FD Few"] == "61.0 ± 1.4" and ddpm["seeds"] == "2 of 10"
    assert ours["FD Few"] == "50.0*" and ours["FLOPs"] == "2.00"
    assert general["FD Few"] == "70.0" and tablets[0.0]["small", "CM"]["seeds"] == "not run"
    assert tablets[1.5]["large", "DDPM"]["FD Few"] == "60.5 ± 0.7*"
    assert tablets[1.5]["large", "CM"]["FD Few"] == "51.0"
    assert tablets[1.5]["large", "Focal"]["seeds"] == "1 of 3"
    assert tablets[0.0]["small", "RS"]["seeds"] == "1 of 5"
    assert tablets[3.0]["large", "CM"]["seeds"] == "1 of 10"


def test_the_fuses_table_is_the_mean_over_seeds():
    rows = made(CM=[1.0, 2.0], DDPM=[1.0]).assign(**{
        "above fuse": [0.02, 0.04, np.nan], "above fuse Few": ["0 0.1", "0.5 0.3", ""],
        "above fuse Medium": ["nan 0", "0 0", ""]})
    assert tables.fuse(rows) == [{
        "setting": "large", "arm": "CM", "d Few": "1.0e-03", "above fuse, %": "3.00",
        "Medium, %, by tenth": "nan 0.0", "Few, %, by tenth": "25.0 20.0"}]


# ------------------------------------------------------------------------------------------------
# Runs


class InThisProcess(Executor):
    """A pool that calls at once."""

    def __init__(self, jobs, context, max_tasks_per_child):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except BaseException as e:
            future.set_exception(e)
        return future


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """study.main with two stages of a seed, in this process, with hasty classifiers."""
    both = [study.Point("θ", 0.0), study.Point("θ", 1.5)]
    one, general = range(20, 21), [study.Point("θ_g", 0.0)]
    stages = {"small": study.Stage("small", one, {"DDPM": both, "CM": both}),
              "a": study.Stage("large", one, {"DDPM": both[:1], "CM": both}),
              "b": study.Stage("large", one, {"CM": general, "CM, dropout 0.3": both[:1]})}
    for module in (study, tables):
        monkeypatch.setattr(module, "make_stages", lambda: stages)
    monkeypatch.setattr(cm, "report", lambda *args: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(study, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(fid, "train_classifier", functools.partial(fid.train_classifier, steps=10))
    own = ["--rows", str(tmp_path / "rows.csv"), "--runs", str(tmp_path / "runs"),
           "--assets", str(tmp_path), "--num-images", "40", "--jobs", "2", *MINIATURE]
    return lambda *more: command.main([*own, *more])


def test_a_miniature_end_to_end(tiny, tmp_path, capsys, monkeypatch):
    # killed: the next call goes on from the checkpoint
    writes = []
    def killed(path, write, write_atomically=cm.write_atomically):
        writes.append(path)
        if len(writes) == 5:
            raise KeyboardInterrupt
        write_atomically(path, write)

    with monkeypatch.context() as here, pytest.raises(KeyboardInterrupt):
        here.setattr(cm, "write_atomically", killed)
        study.measure(study.Run("large", "CM", 20), [study.Point("θ", 0.0)], MINIATURE,
                      tmp_path / "runs", 40, "")
    checkpoint = tmp_path / "runs" / "large-CM-20" / "run" / "checkpoint.pt"
    assert 5 <= torch.load(checkpoint, weights_only=True)["step"] < 20
    assert tiny("--stage", "a") == 0
    rows = common.read_rows(tmp_path / "rows.csv")
    assert sorted(rows[["arm", "network", "guidance"]].values.tolist()) == [
        ["CM", "θ", "0"], ["CM", "θ", "1.5"], ["DDPM", "θ", "0"]]
    first = rows.to_csv()
    assert {p.name for p in tmp_path.glob("*.png")} == {"study_arms.png", "study_settings.png"}
    text = capsys.readouterr().out
    assert "| 1       | CM − DDPM " in text and "1 of 1" in text and "not run" in text

    # what has its row isn't run again; a later stage goes on with the runs that are there
    for directory in (tmp_path / "runs").glob("large-*"):
        (directory / "output.txt").unlink()
    assert tiny("--stage", "a", "b") == 0
    assert "2 runs to come" in capsys.readouterr().out
    rows = common.read_rows(tmp_path / "rows.csv")
    assert rows.iloc[:3].to_csv() == first
    assert sorted(rows["arm"]) == ["CM", "CM", "CM", "CM, dropout 0.3", "DDPM"]
    assert {p.parent.name for p in (tmp_path / "runs").glob("*/output.txt")} == {
        "large-CM-20", "large-CM-dropout-0-3-20"}
    assert set(rows["status"]) == {"finished"} and set(rows["device"]) == {"CPU, 1 thread"}
    whole = rows[rows["arm"] == "CM"].drop(columns=list(study.WORDS)).astype(float)
    assert whole.notna().all(axis=None) and (whole["images"] == 40).all()
    assert "--steps 20" in rows["options"][0] and "6000" not in rows["options"][0]

    # each cell against the plain way: cm.py, fid.py, a killed run's twin
    out = tmp_path / "whole"
    flags = study.options_of(study.Run("large", "CM", 20), MINIATURE)
    common.run(flags, out)
    ours = tmp_path / "runs" / "large-CM-20"
    one, other = (torch.load(p / "checkpoint.pt", weights_only=True)["ema"]
                  for p in (out, ours / "run"))
    assert all(torch.equal(p, other[k]) for k, p in one.items())
    for name, more in (("θ-g0", ["--guidance", "0"]), ("θ-g1.5", []),
                       ("θ_g-g0", ["--guidance", "0", "--general-only"])):
        name = f"40-samples-{name}.npz"
        cm.main(["--sample", str(out / "checkpoint.pt"), "--num-images", "40", "--seed", "20",
                 "--out", str(tmp_path / name), *more])
        one, other = np.load(tmp_path / name), np.load(ours / name)
        assert all((one[k] == other[k]).all() for k in other)
    row = rows[(rows["arm"] == "CM") & (rows["guidance"] == "0") & (rows["network"] == "θ")].iloc[0]
    check_cells(row, out / "checkpoint.pt", ours / "40-samples-θ-g0.npz")


def test_a_stopped_run_has_no_row_and_one_that_ran_off_says_so(tiny, tmp_path, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    common.write_rows(tmp_path / "rows.csv", common.text([
        dict(setting="large", arm="RS", seed=20, network="θ", guidance=0.0, options=study.recorded(
            study.Run("large", "RS", 20), MINIATURE, 40)) | dict.fromkeys(tables.MEASURES, 1.0)]))
    with monkeypatch.context() as here:
        here.setattr(common, "run", stopped)
        with pytest.raises(SystemExit) as ended:
            tiny("--stage", "a")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"
    assert len(common.read_rows(tmp_path / "rows.csv")) == 1
    off = "not finite between steps 5 and 10"
    monkeypatch.setattr(common, "run", lambda *args, **kwargs: off)
    assert tiny("--stage", "a") == 0
    rows = common.read_rows(tmp_path / "rows.csv")
    assert rows["status"].tolist() == ["", *[off] * 3]
    assert set(rows["FD Few"]) == {"1", ""}

    with pytest.raises(SystemExit):
        tiny("--stage", "a", "--lr", "1")
    err = capsys.readouterr().err.splitlines()[-1]
    assert "made with other options than" in err and "--lr 1 " in err


def test_samples_that_arent_finite_are_a_row_beside_those_that_are(tmp_path, monkeypatch):
    def sample(run, point, *rest):
        if point.guidance:
            raise FloatingPointError("images aren't finite")
        return "x.npz"

    monkeypatch.setattr(common, "run", lambda *_, **__: "")
    monkeypatch.setattr(study, "sample", sample)
    monkeypatch.setattr(study, "score", lambda run, row, files, *_: [
        row | point._asdict() for point in files])
    points = [study.Point("θ", 1.5), study.Point("θ", 0.0)]
    rows = study.measure(study.Run("large", "no fuse", 20), points, MINIATURE, tmp_path, 40, "")
    assert [(row["guidance"], row["status"]) for row in rows] == [
        (0.0, "finished"), (1.5, "images not finite")]
    assert all(row["arm"] == "no fuse" and row["network"] == "θ" for row in rows)


def test_ctrl_c_is_the_parents_and_ends_all_processes_in_one_line(tmp_path):
    argv = [sys.executable, "-m", "experiments.study", "--stage", "question", "--jobs", "2",
            "--runs", str(tmp_path / "runs"), "--rows", str(tmp_path / "rows.csv"), *MINIATURE,
            "--steps", "100000"]
    process = subprocess.Popen(argv, cwd=Path(cm.__file__).parent, start_new_session=True,
                               stderr=subprocess.PIPE, text=True)
    children = ["pgrep", "-P", str(process.pid), "-f", "spawn_main"]
    try:
        workers = []
        while len(workers) < 2:
            assert process.poll() is None
            workers = subprocess.run(children, capture_output=True, text=True).stdout.split()
        for worker in workers:  # which begin: it mustn't end in a traceback
            os.kill(int(worker), signal.SIGINT)
        while not list(tmp_path.glob("runs/*/run/checkpoint.pt")):
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)  # until the last process has closed it
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and err == "interrupted; the same command goes on\n"


def test_of_an_option_given_twice_the_last_is_recorded():
    for arm, dropout in (("CM", "0.1"), ("CM, dropout 0.3", "0.3")):
        flags = study.recorded(study.Run("small", arm, 20), ["--steps", "9"], 40).split(" --")
        assert {"steps 9", f"dropout {dropout}", "num-images 40"} <= set(flags)
        assert len({flag.split(" ")[0] for flag in flags}) == len(flags)
        assert not any(flag.startswith(("seed", "subset-seed")) for flag in flags)
