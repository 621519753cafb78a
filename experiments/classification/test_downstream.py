"""Tests of downstream.py. They need pandas, tabulate and scikit-learn."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm
import fid

pd = pytest.importorskip("pandas")
pytest.importorskip("tabulate")
from experiments import common  # noqa: E402
from experiments.classification import classifiers  # noqa: E402
from experiments.classification import downstream as down  # noqa: E402

torch.set_num_threads(1)  # results repeat with as many threads
ARGS = ["--n-max", "12", "--ir", "6", "--image-size", "8", "--channels", "4",
        "--multipliers", "1", "2", "--batch-size", "4", "--steps", "3", "--classifier-steps", "3",
        "--seeds", "20", "--generator-seeds", "5", "--runs", "runs", "--rows", "rows.csv",
        "--assets", "."]
COUNTS = cm.class_counts(12, 6, 10)
TOTAL = 5 * sum(COUNTS)


@pytest.fixture(autouse=True)
def small(monkeypatch, fewer_images):
    """20 images a class to train, 4 to test; small batches."""
    fewer_images(20, 4)
    monkeypatch.setattr(classifiers, "BATCH", 16)
    monkeypatch.setattr(cm, "report", lambda *_: print("reported"))  # it takes the longest
    train = fid.train_classifier
    monkeypatch.setattr(fid, "train_classifier",
                        lambda *a, **options: train(*a, **options | {"steps": 2}))


def write_npz(path, labels, side=8, seed=0, **more):
    images = np.random.RandomState(seed).randint(256, size=(len(labels), side, side, 1))
    np.savez(path, arr_0=images.astype(np.uint8), **more)


@pytest.mark.parametrize("n", [300, 7])  # of 7 some classes are predicted once
def test_macro_precision_and_recall_are_scikit_learns(n):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.RandomState(0)
    true, predicted = rng.randint(5, size=n), rng.randint(4, size=n)  # 4 is never predicted
    found = torch.from_numpy(metrics.confusion_matrix(true, predicted))
    theirs = metrics.precision_recall_fscore_support(true, predicted, average="macro",
                                                     zero_division=0)[:2]
    assert classifiers.macro(found) == pytest.approx(theirs)
    assert theirs[0] != pytest.approx(theirs[1], abs=1e-3)


def trained_on(monkeypatch, arguments, runs):
    """{(setting, guidance): what `fit` was called with} of runs with these arguments."""
    calls = {}

    def fit(name, training, counts, base, seed, steps, path, options, **how):
        assert not path.is_file()
        calls[runs[len(calls)]] = dict(training=training, counts=counts, base=base, steps=steps,
                                       seed=seed, path=path, **how)
        net = classifiers.Network("small", 1, 10)
        return net.eval()

    monkeypatch.setattr(classifiers, "fit", fit)
    assert down.main(arguments) == 0
    assert len(calls) == len(runs)
    return calls


def test_training_sets_are_of_the_right_size_and_balance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def samples(self, generator, guidance, seed):
        drawn.append((generator, guidance, seed))
        path = tmp_path / f"{generator}{guidance}{seed}.npz"
        labels = np.arange(TOTAL + 20) % 10  # more than are needed
        write_npz(path, labels, arr_1=labels)
        return path

    monkeypatch.setattr(down.Setup, "samples", samples)
    settings = [*down.ALONE, *((g, w) for g in ("DDPM", "RS", "CM") for w in (0, 1.5))]
    runs = [(setting, seed) for seed in (20, 21, 22) for setting in settings]
    calls = trained_on(monkeypatch, [*ARGS, "--seeds", "20", "21", "22", "--generator-seeds", "5",
                                     "6"], runs)
    real = cm.Data(cm.Config(ir=6, n_max=12, image_size=8).resolved())
    for (setting, seed), call in calls.items():
        training = call["training"]
        assert call["counts"] == COUNTS and call["steps"] == 3 and call["seed"] == seed
        assert call["base"] == ("LA" if setting == "LA" else "CE") and not call["augment"]
        assert call["balanced"] == (setting == "re-sampling")
        assert torch.equal(training.images[:len(real.images)], real.images)
        assert torch.equal(training.labels[:len(real.images)], real.labels)
        generated = training.labels[len(real.images):].bincount(minlength=10)
        if setting in down.ALONE:
            assert generated.sum() == 0
        else:
            assert generated.sum() == TOTAL and generated.max() - generated.min() <= 1
    assert len({call["path"] for call in calls.values()}) == len(calls)
    assert drawn == [(g, w, s) for s in (5, 6, 5) for g in ("DDPM", "RS", "CM") for w in (0, 1.5)]
    rows = common.read_rows(Path("rows.csv"))
    assert rows["generator seed"].tolist() == 3 * [""] + 6 * ["5"] + 3 * [""] + 6 * ["6"] + \
        3 * [""] + 6 * ["5"]


def test_samples_of_ones_own_take_the_generators_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels = np.arange(TOTAL) % 10
    write_npz("mine.npz", labels, arr_1=labels)
    order = torch.from_numpy(np.sort(labels))  # the order in which they are taken
    seen = torch.where(order == 9, 0, order)  # the judge takes class 9 for 0
    monkeypatch.setattr(down.Setup, "judge", lambda self: None)
    monkeypatch.setattr(fid, "extract", lambda net, images, _: (
        None, torch.nn.functional.one_hot(seen, 10)))
    runs = [*down.ALONE, "mine"]
    calls = trained_on(monkeypatch, [*ARGS, "--samples", "mine.npz"], runs)
    assert len(calls["mine"]["training"].labels) == sum(COUNTS) + TOTAL
    trained_on(monkeypatch, [*ARGS, "--samples", "mine.npz"], [])  # it has its row
    row = common.read_rows(Path("rows.csv")).iloc[-1]
    nines = (labels == 9).sum()
    assert re.fullmatch(r"mine \([0-9a-f]{6}\)", row["setting"])
    assert row["guidance"] == "" and "generator seed" not in row
    assert float(row["label accuracy"]) == pytest.approx(1 - nines / TOTAL, abs=1e-5)
    few = np.isin(labels, cm.splits(COUNTS)["Few"]).sum()
    assert float(row["label accuracy Few"]) == pytest.approx(1 - nines / few, abs=1e-5)
    assert "mine" in capsys.readouterr().out and not list(Path("runs").glob("*/"))
    write_npz("mine.npz", labels, arr_1=labels, seed=9)  # other images: another row
    calls = trained_on(monkeypatch, [*ARGS, "--samples", "mine.npz"], ["mine"])
    assert common.read_rows(Path("rows.csv"))["setting"].nunique() == len(down.ALONE) + 2


def test_the_judge_is_trained_on_the_whole_balanced_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, seeds = [], []
    train = fid.train_classifier
    monkeypatch.setattr(fid, "train_classifier", lambda *a, **more: (
        seen.append(a), seeds.append(more["seed"]), train(*a, **more))[2])
    config = cm.Config(ir=6, n_max=12, image_size=8).resolved()
    args = SimpleNamespace(samples=[], runs=tmp_path)
    setup = down.Setup(args, config, [])
    nets = [setup.judge(), setup.judge()]
    assert len(seen) == 1 and seeds == [2]  # kept; FD's have seeds 0 and 1
    images, labels, *test = seen[0][:4]
    assert labels.bincount().tolist() == [20] * 10 and test[1].bincount().tolist() == [4] * 10
    assert len(images) == 200 and not nets[0].training
    x = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(nets[0](x)[1], nets[1](x)[1])

    calls = []
    monkeypatch.setattr(classifiers, "fit", lambda *a, **how: (
        calls.append(how["augment"]), classifiers.Network("small", 1, 10).eval())[1])
    args.network, args.classifier_steps = "small", 3
    for dataset in ("cifar10", "fashion16"):  # whose shoes all point one way
        setup.config = cm.Config(dataset=dataset)
        setup.measure("LA", "", 5, tmp_path / "x.pt", "")
    assert calls == [True, False]


# ------------------------------------------------------------------------------------------------
# Generators


def test_what_is_trained_and_drawn(tmp_path, monkeypatch):
    made, drawn = [], []
    monkeypatch.setattr(common, "run", lambda flags, out: made.append(
        (cm.parse(flags)[0].resolved(), out)))
    monkeypatch.setattr(cm, "generate", lambda config: drawn.append(config))
    config = cm.Config(ir=6, n_max=12, image_size=8, steps=4).resolved()
    args = SimpleNamespace(samples=[], runs=tmp_path, sampler="ddim")
    setup = down.Setup(args, config, ["--n-max", "12", "--preset", "paper"])  # whose base is OC
    for generator, no_cm, resample in (("DDPM", True, 1), ("RS", True, 0.5), ("CM", False, 1)):
        path = setup.samples(generator, 1.5, 7)
        trained, out = made[-1]
        assert re.fullmatch(f"{generator}-7-[0-9a-f]{{6}}", out.name) and out.parent == tmp_path
        assert (trained.no_cm, trained.resample, trained.seed) == (no_cm, resample, 7)
        assert (trained.base, trained.n_max) == ("ddpm", 12)
        assert Path(drawn[-1].out) == path == out / "samples-ddim-g1.5.npz"
        assert drawn[-1].sample == str(out / "checkpoint.pt")
        assert (drawn[-1].num_images, drawn[-1].seed) == (TOTAL, 7)
        assert (drawn[-1].guidance, drawn[-1].sampler) == (1.5, "ddim")
        out.mkdir()
        path.touch()
        assert setup.samples(generator, 1.5, 7) == path
    assert len(drawn) == len(made) == 3
    setup.flags += ["--steps", "5"]  # another network
    assert setup.samples("CM", 1.5, 7).parent != out and len(drawn) == 4
    monkeypatch.setattr(common, "run", lambda *_: "not finite between steps 0 and 2")
    with pytest.raises(FloatingPointError, match="CM-8-.*: not finite between steps 0 and 2"):
        setup.samples("CM", 0, 8)


def test_images_keep_their_labels_and_the_test_set_judges(tmp_path, monkeypatch):
    metrics = pytest.importorskip("sklearn.metrics")
    monkeypatch.chdir(tmp_path)
    labels = np.random.RandomState(0).permutation(np.arange(TOTAL + 40) % 10)
    grey = np.broadcast_to(20 * labels[:, None, None, None], (len(labels), 8, 8, 1))
    np.savez("grey.npz", arr_0=grey.astype(np.uint8), arr_1=labels)
    torch.manual_seed(0)
    net, seen = classifiers.Network("small", 1, 10).eval(), []
    monkeypatch.setattr(classifiers, "fit", lambda name, training, *_, **__: (
        seen.append(training), net)[1])
    assert down.main([*ARGS, "--samples", "grey.npz"]) == 0
    generated, of = (part[sum(COUNTS):] for part in seen[-1])
    assert len(of) == TOTAL and torch.equal(generated[:, 0, 0, 0].long(), 20 * of)
    row = common.read_rows(Path("rows.csv")).iloc[-1]
    images, truth, _ = cm.load_dataset("fashion16", None, 8, train=False)
    x = cm.to_float(torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        predicted = net(x).argmax(1)
    scores = metrics.precision_recall_fscore_support(truth, predicted, average="macro",
                                                     zero_division=0)
    assert float(row["precision"]) == pytest.approx(scores[0], abs=1e-5)
    assert float(row["recall"]) == pytest.approx(scores[1], abs=1e-5) != scores[0]
    for name, classes in cm.splits(COUNTS).items():
        recall = metrics.recall_score(truth, predicted, average=None, zero_division=0)[classes]
        assert float(row[f"recall {name}"]) == pytest.approx(recall.mean(), abs=1e-5)


def test_a_miniature_stopped_and_resumed_ends_with_the_same_rows(
        kills_at, tmp_path, monkeypatch, capsys):
    results = {}
    monkeypatch.setattr(down, "GUIDANCE", (1.5,))
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "stopped":
            for module, function, call, rows in ((classifiers, "losses", 5, 2),
                                                 (cm, "update", 4, 5)):  # RS's first step
                with monkeypatch.context() as patch:
                    patch.setattr(module, function, kills_at(call, getattr(module, function)))
                    with pytest.raises(SystemExit) as stopped:
                        down.main(ARGS)
                assert stopped.value.code == 130
                assert len(Path("rows.csv").read_text().splitlines()) == rows
        capsys.readouterr()
        assert down.main(ARGS) == 0
        results[name] = Path("rows.csv").read_bytes(), capsys.readouterr().out
        assert Path("downstream.png").is_file() and not list(Path("runs").glob("*.pt"))
    assert results["whole"] == results["stopped"]
    rows, out = results["whole"]
    assert len(rows.splitlines()) == 7 and "Does generating beat re-balancing?" in out
    samples = list(Path("runs").glob("*/samples-dpm-g1.5.npz"))
    assert {path.parent.name[:-7] for path in samples} == {f"{g}-5" for g in down.GENERATORS}
    assert all(len(fid.read_images(path)[0]) == TOTAL for path in samples)
    monkeypatch.setattr(down.Setup, "measure", None)  # nothing is run again
    assert down.main(ARGS) == 0 and capsys.readouterr().out == out
    assert down.main([*ARGS, "--table"]) == 0 and capsys.readouterr().out == out
    for other in ("--generator-seeds 6", "--network resnet18", "--sampler ddim", "--lam 2",
                  "--classifier-steps 4"):
        with pytest.raises(SystemExit):
            down.main([*ARGS, *other.split()])
        assert "made with other options" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Tables


def rows_of(**recalls):
    """Rows of settings "NAME" or "NAME, guidance W", a recall for each seed from 20 on."""
    rows = []
    for name, values in recalls.items():
        setting, _, w = name.partition("_")
        rows += [dict(setting=setting.replace("real", "real images"), guidance=w, seed=20 + i,
                      precision=1 - v, recall=v, options="") for i, v in enumerate(values)]
    return common.numbers(common.text(rows), ("setting", "options"))


def test_tables_at_numbers_worked_by_hand():
    text = down.table(rows_of(real=[0.5, 0.52], LA=[0.6, 0.6], DDPM_0=[0.55, 0.55],
                              CM_0=[0.56, 0.58], CM_1=[0.5, 0.5]))
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in text.splitlines() if line.startswith("|")}
    # 1 and 3 points: 2 ± 12.706
    assert lines["CM, guidance 0 − DDPM, guidance 0"][1] == "+2.0 [-10.7, +14.7]"
    assert lines["CM, guidance 0 − DDPM, guidance 0"][-1] == "+2.50, +4.44"
    assert lines["LA − real images"][1:] == ["+9.0 [-3.7, +21.7]", "–", ""]
    assert lines["DDPM, guidance 0 − real images"][-1] == "+3.48, +5.09"
    assert lines["CM, guidance 1 − real images"][-1] == "+5.98, +9.53"
    assert "CM, guidance 1 − DDPM, guidance 1" not in lines
    assert lines["CM, guidance 1 − CM, guidance 0"][1] == "-7.0 [-19.7, +5.7]"  # -6 and -8
    assert lines["real images"][:1] + lines["real images"][3:5] == ["2", "49.0 ± 1.4", "51.0 ± 1.4"]


def test_label_accuracy_counts_each_generator_once():
    rows = rows_of(DDPM_0=[0.5, 0.6, 0.7], DDPM_1=[0.5] * 3, LA=[0.5] * 3)
    rows["generator seed"] = [11, 12, 11] * 2 + [np.nan] * 3
    values = [0.2, 0.4, 0.2, 0.8, 0.9, 0.8, np.nan, np.nan, np.nan]
    rows["label accuracy"] = rows["label accuracy Few"] = values
    runs = down.by_setting(rows)
    for label in down.LABELS:
        assert runs["DDPM, guidance 0"][label].dropna().tolist() == pytest.approx([20, 40])
        assert runs["DDPM, guidance 1"][label].dropna().tolist() == pytest.approx([80, 90])
    assert runs["DDPM, guidance 0"]["recall"].tolist() == pytest.approx([50, 60, 70])


@pytest.mark.parametrize("generated, answer, says", [
    ([0.5, 0.51, 0.5], "No", "= -9.7 [-11.1, -8.2], 3 seed(s)"),
    ([0.7, 0.71, 0.7], "Yes", "(CM, guidance 1) − the best without (LA)"),
    ([0.5, 0.71, 0.6], "Undecided", "= +0.3"), ([0.7], "Undecided", "= +10.0, 1 seed(s)")])
def test_the_verdict(generated, answer, says):
    others = dict(real=[0.9] * 3, LA=[0.6] * 3, CM_0=[0.502] * 3)
    runs = down.by_setting(rows_of(**others, **{"re-sampling": [0.55] * 3}, CM_1=generated))
    text = down.verdict(runs)
    assert text.startswith(f"Does generating beat re-balancing? {answer}: ") and says in text
    assert "Not run" in down.verdict(down.by_setting(rows_of(LA=[0.5])))


@pytest.mark.parametrize("arguments, says", [
    ("--classifier-steps 0", "--classifier-steps"), ("--seeds -1", "--seeds"),
    ("--generator-seeds -2", "--generator-seeds"), ("--seeds x", "invalid int"),
    ("--base oc", "--base has no meaning"), ("--num-images 3", "--num-images has no meaning"),
    ("--rank-ratio 2", "rank-ratio"), ("--data none", "--data is none"),
    ("--samples none.npz", "none.npz"), ("--samples ../few.npz", "has 0 images of class 2"),
    ("--samples ../unlabelled.npz", "labels from 0 to 9"),
    ("--samples ../wide.npz", "uint8 [N, 8, 8, 1]"),
    ("--samples ../eleven.npz", "labels from 0 to 9"), ("--sampler ddpm", "invalid choice"),
    ("--seeds 5 5", "different numbers"), ("--table", "has no rows"),
    ("--dataset folder --data none", "No such file or directory")])
def test_bad_input_is_one_line_and_status_2(arguments, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    labels = np.arange(TOTAL) % 10
    for name, y, more in (("few", np.where(labels == 2, 3, labels), {}), ("wide", labels, {}),
                          ("eleven", labels + (labels == 9), {})):
        write_npz(tmp_path / f"{name}.npz", labels, 16 if name == "wide" else 8, arr_1=y, **more)
    write_npz(tmp_path / "unlabelled.npz", labels)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as stopped:
        down.main([*ARGS, *arguments.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(Path().iterdir())
