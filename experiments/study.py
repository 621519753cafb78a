"""Does CM help? Methods x seeds on Fashion-MNIST-LT, measured on held-out images.

    python -m experiments.study --data /usr/share/datasets/fashion-mnist     # what has no row yet
    python -m experiments.study --data DIR --stage margin     # only the sweep of div_margin
    python -m experiments.study --table                       # tables and pictures of the rows
    python -m experiments.study --table --rows experiments/results/first_study.csv  # [--summary]
    python -m experiments.study --data DIR --rows experiments/results/gpu.csv --preset paper \\
        --steps 100000                                        # a GPU, 32x32

Options that aren't its own go to every run of cm.py. Each run has a process (on a CPU: one thread)
and a directory of its own; a killed one goes on from its checkpoint, a finished one is a row of
results/study.csv and is never run again.

Columns: held-out eps-loss of each class under theta (or theta_g) and d, with the same noise and
times for every run; FD, KD, precision, recall and accuracy of `fid.py --features classifier`; all
overall and for Many / Medium / Few.
"""

import contextlib
import fcntl
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from matplotlib.figure import Figure

import cm
import fid
from experiments import common

# ------------------------------------------------------------------------------------------------
# What is compared

MARGINS = ("0", "0.003", "0.01", "0.03", "0.1", "inf")
CM = f"CM, m = {cm.Config.div_margin:g}"
BASELINES = {"RS": "--no-cm --resample 0.5", "Focal": "--no-cm --base focal",
             "CBDM": "--no-cm --base cbdm", "OC": "--no-cm --base oc"}
COMBINED = {"CM on CBDM": "--base cbdm", "CM on OC": "--base oc"}  # Fig. 4a
WITH_MARGIN = {f"CM, m = {m}": f"--div-margin {m}" for m in MARGINS}
ABLATIONS = {"CM, no L_Con": "--no-con", "CM, no L_Div": "--no-div",  # Tab. 7, right
             "CM, λ = 0": "--lam 0"}  # Eq. (1) without Eq. (2)
SWEEPS = {"CM, λ = 0.5": "--lam 0.5", "CM, λ = 1.5": "--lam 1.5",  # Fig. 4b
          "CM, rank ratio 0.1": "--rank-ratio 0.1",
          "CM, rank ratio 0.5": "--rank-ratio 0.5"}  # Fig. 4c
METHODS = {"DDPM": "--no-cm"} | BASELINES | COMBINED | WITH_MARGIN | ABLATIONS | SWEEPS

STAGES = {  # name: (methods, number of seeds)
    "margin": (["DDPM", *WITH_MARGIN], 3),
    "main": (["DDPM", CM, "OC", "CM on OC", "CBDM", "CM on CBDM", "RS", "Focal"], 3),
    "ablation": (list(ABLATIONS), 3),
    "sweep": (list(SWEEPS), 1)}
CLAIMS = {  # of each stage: (what the paper reports, the better method, the worse one)
    "margin": [],
    "main": [(f"Tab. 2, 3: CM beats {m}", CM, m) for m in ("DDPM", *BASELINES)]
    + [(f"Fig. 4a: CM on {m} beats {m}", f"CM on {m}", m) for m in ("CBDM", "OC")]
    + [("Tab. 7: θ beats θ_g", CM, f"{CM}, θ_g")],
    "ablation": [("Tab. 7: CM beats CM without L_Con", CM, "CM, no L_Con"),
                 ("Tab. 7: CM beats CM without L_Div", CM, "CM, no L_Div"),
                 ("Fig. 4b: λ = 1 beats 0", CM, "CM, λ = 0")],
    "sweep": [(f"Fig. 4b: λ = 1 beats {v}", CM, f"CM, λ = {v}") for v in ("0.5", "1.5")]
    + [(f"Fig. 4c: CM's rank ratio beats {v}", CM, f"CM, rank ratio {v}") for v in ("0.1", "0.5")]}

SPLITS = ("overall", "Many", "Medium", "Few")
SCORES = ("FD", "KD", "precision", "recall", "accuracy")
KEY = ["method", "seed"]
WORDS = ("method", "status", "device", "options")
CAVEATS = {  # of a file of rows: shown with its tables and on its pictures
    "first_study.csv": "First study: its seeds shared all batches, noise and sampling noise, so "
                       "its intervals are over initialisations only.\n"
                       "Its rows are repeated by commit 2134833, not by later ones."}


def base_of(method):
    """What a method is compared with: the plain network of its base loss; of an ablation CM."""
    if method.startswith("CM on "):
        return method.removeprefix("CM on ")
    if method.endswith(", θ_g"):
        return method.removesuffix(", θ_g")
    return CM if method in ABLATIONS | SWEEPS else "DDPM"


def rows_of(method):
    """The names of a run's rows: CM is measured without its reserved part, too."""
    return [method, f"{method}, θ_g"] if method == CM else [method]


# ------------------------------------------------------------------------------------------------
# One run


def measure(method, seed, flags, directory, num_images):
    """Train, or go on training; sample; evaluate. The rows of one run, None where it was stopped.

    In a process of its own; what it prints goes to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with (open(directory / "lock", "w") as lock,
          open(directory / "output.txt", "a", buffering=1) as output,
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)):
        fcntl.flock(lock, fcntl.LOCK_EX)  # a killed study may have left this run's process behind
        own = [*METHODS[method].split(), "--seed", str(seed)]
        try:
            ran_off = common.run([*flags, "--base", "ddpm", *own], directory / "run")
        except SystemExit as e:
            if e.code < 128:  # not a signal
                raise
            return None
        cuda = torch.cuda.is_available()
        shared = dict(seed=seed, status=ran_off or "finished",
                      device=(torch.cuda.get_device_name() if cuda
                              else f"CPU, {torch.get_num_threads()} thread"),
                      options=common.settings(flags))
        if ran_off:
            return [dict(method=name) | shared for name in rows_of(method)]
        checkpoint = directory / "run" / "checkpoint.pt"
        held_out = held_out_columns(checkpoint, "cuda" if cuda else "cpu")
        rows = []
        for name in rows_of(method):
            general = name != method
            samples = directory / ("samples_g.npz" if general else "samples.npz")
            argv = ["--sample", str(checkpoint), "--out", str(samples), "--overwrite",
                    "--num-images", str(num_images), "--seed", str(seed)]
            cm.generate(cm.parse(argv + ["--general-only"] * general)[0])
            scores = score_columns(samples, checkpoint, directory.parent / "fid")
            rows.append(dict(method=name) | shared | held_out[general] | scores)
        return rows


def held_out_columns(checkpoint, device):
    """Columns for theta and for theta_g: held-out loss and d of each class and split."""
    config, ema, counts = cm.load_trained(checkpoint)
    data = cm.Data(config, device)
    loss, loss_g, d = cm.held_out_loss(ema.to(device), data.held_out, data.held_out_labels,
                                       len(counts), per_class=200, times=10)

    def columns(kind, values):
        of_class = {f"{kind} {k}": float(v) for k, v in enumerate(values)}
        return of_class | {f"{kind} {split}": float(values[classes].nanmean())
                           for split, classes in cm.splits(counts).items()}
    return columns("loss", loss) | columns("d", d), columns("loss", loss_g) | columns("d", d)


def score_columns(samples, checkpoint, cache):
    """Columns of the evaluation of generated images, overall and by split."""
    config = cm.load_trained(checkpoint)[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = fid.evaluate(samples, config.dataset, config.data, features="classifier",
                          device=device, cache=cache)
    return {f"{kind} {split}": float(scores[split][kind])
            for kind in SCORES for split in SPLITS if split in scores}


# ------------------------------------------------------------------------------------------------
# All runs


def in_order(rows):
    """Rows by method, as METHODS has them, then by seed."""
    names = [name for method in METHODS for name in (method, f"{method}, θ_g")]
    place = rows["method"].map(names.index)
    return rows.iloc[np.lexsort((rows["seed"].astype(int), place))]


def missing_runs(stages, rows):
    """(method, seed) of what has no rows yet: DDPM and CM first, since everything is compared with
    them, then seed by seed."""
    wanted = [(method, seed) for stage in stages for seed in range(STAGES[stage][1])
              for method in STAGES[stage][0]]
    done = set()
    if len(rows):
        done = set(zip(rows["method"], rows["seed"].astype(int), strict=True))
    missing = [(method, seed) for method, seed in dict.fromkeys(wanted)
               if not all((name, seed) in done for name in rows_of(method))]
    return sorted(missing, key=lambda run: run[0] not in ("DDPM", CM))


def study(stages, path, runs, flags, jobs, num_images):
    """Run what has no row yet, `jobs` at a time. 0, or 1 where runs were stopped. Raises ValueError
    on bad options."""
    flags = common.with_defaults(flags, steps="6000")
    missing = missing_runs(stages, common.read_rows(path, common.settings(flags)))
    print(f"{len(missing_runs(stages, [])) - len(missing)} runs have rows, {len(missing)} to do",
          flush=True)
    if not torch.cuda.is_available():  # for the processes to come:
        os.environ["OMP_NUM_THREADS"] = "1"  # results repeat only with the same number of threads
    stopped = False
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool:
        tasks = {}
        for method, seed in missing:
            directory = runs / (re.sub(r"[^\w.]+", "-", method) + f"-{seed}")
            task = pool.submit(measure, method, seed, flags, directory, num_images)
            tasks[task] = f"{method}, seed {seed}"
        try:
            for task in as_completed(tasks):
                new = task.result()
                if new is None:
                    stopped = True
                    continue
                rows = common.replace_rows(common.read_rows(path), common.text(new), KEY)
                common.write_rows(path, in_order(rows))
                print(f"{time.strftime('%H:%M')}  {tasks[task]}: {new[0]['status']}, "
                      f"FD {new[0].get('FD overall', np.nan):.4g}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return int(stopped)


# ------------------------------------------------------------------------------------------------
# Tables


def column(rows, method, name):
    """One column of a method's runs, a Series by seed; nan where it ran off."""
    mine = rows[rows["method"] == method].set_index("seed")
    return mine[name] if name in mine else pd.Series(np.nan, mine.index)


def difference(rows, method, other, name, relative=False):
    """(mean, half-width of the 95 % interval, seeds) of method - other, paired by seed."""
    return common.difference(column(rows, method, name), column(rows, other, name), relative)


def verdict(mean, half, seeds):
    """Of a difference that the paper has below 0."""
    if seeds == 0:
        return "not run"
    if not np.isfinite(mean):
        return "ran off"
    if np.isnan(half):
        return "not decidable at this scale (one seed)"
    if mean + half < 0:
        return "reproduced"
    return "not reproduced" if mean - half > 0 else "not decidable at this scale"


def verdict_on(rows, ours, other, name):
    """The verdict on a claim; to beat a baseline that is itself behind DDPM shows little, and is
    said as that."""
    word = verdict(*difference(rows, ours, other, name))
    if word == "reproduced" and other in BASELINES:
        mean, half, _ = difference(rows, other, "DDPM", name)
        if mean - half > 0:
            return f"ahead, but {other} is itself behind DDPM"
    return word


def off(rows, method):
    """Did its runs run off, to a held-out loss that is worse than that of predicting no noise?"""
    return not column(rows, method, "loss Few").mean(skipna=False) < 1


def members(rows, stage):
    """The methods of a stage that have rows, after each the same without BA; first what they are
    compared with, where that isn't among them."""
    methods = STAGES[stage][0]
    names = [base_of(m) for m in methods if base_of(m) not in methods]
    for method in methods:
        names += [method, f"{method}, θ_g"]
    return [name for name in dict.fromkeys(names) if name in set(rows["method"])]


def values(rows, stage):
    """The table of what was measured: mean ± standard deviation over seeds."""
    digits = {f"loss {s}": 4 for s in SPLITS[1:]} | {f"FD {s}": 1 for s in SPLITS}
    digits |= {"accuracy Few": 2, "precision Few": 2, "recall Few": 2}
    shown = []
    for method in members(rows, stage):
        cells = {name: common.spread(column(rows, method, name), n) for name, n in digits.items()}
        if off(rows, method):
            cells |= {f"loss {s}": "ran off" for s in SPLITS[1:]}
        shown.append({"method": method, "seeds": len(column(rows, method, "seed"))} | cells)
    return common.markdown(shown)


def differences(rows, stage):
    """The table of paired differences, absolute; the loss's in thousandths."""
    scale = {f"FD {s}": 1 for s in SPLITS} | {f"loss {s}": 1000 for s in SPLITS[1:]}
    shown = []
    names = members(rows, stage)
    for method in names:
        base = base_of(method)
        if method == base or base not in names:
            continue
        ran_off = off(rows, method) or off(rows, base)
        row = {"method − base": f"{method} − {base}"}
        for name, factor in scale.items():
            mean, half, _ = difference(rows, method, base, name)
            title = name if factor == 1 else f"1000 × {name}"
            row[title] = "ran off" if ran_off else common.interval(factor * mean, factor * half)
        shown.append(row)
    return common.markdown(shown)


def verdicts(rows, stage):
    """The table of what the paper reports and what came out, of what was run."""
    measures = {"FD overall": "FD overall", "FD Few": "FD Few", "held-out loss Few": "loss Few"}
    shown = []
    for claim, ours, other in CLAIMS[stage]:
        words = {title: verdict_on(rows, ours, other, name) for title, name in measures.items()}
        if "not run" not in words.values():
            shown.append({"the paper's result": claim} | words)
    return common.markdown(shown)


def summary(rows):
    """The README's table: the main methods on Few, and FD Few's paired difference to DDPM's."""
    digits = {"FD overall": 1, "FD Few": 1, "accuracy Few": 2, "loss Few": 4}
    shown = []
    for method in ("DDPM", "RS", "OC", "CBDM", CM, f"{CM}, θ_g"):
        cells = {name: common.spread(column(rows, method, name), n) for name, n in digits.items()}
        mean, half, _ = difference(rows, method, "DDPM", "FD Few")
        cells["FD Few − DDPM's"] = "" if method == "DDPM" else common.interval(mean, half, 1)
        shown.append({"method": method} | cells)
    return common.markdown(shown)


def table(rows, stages):
    """The tables of the stages in Markdown, and how much is done, as text."""
    lines = []
    titles = {values: "mean ± standard deviation over seeds",
              differences: "paired differences, mean and 95 % interval over seeds "
                           "(below 0: better)",
              verdicts: "what the paper reports, and what came out"}
    for stage in stages:
        for part, title in titles.items():
            text = part(rows, stage)
            if text:
                lines += [f"{stage}: {title}", "", text, ""]
    runs = set(missing_runs(stages, []))
    done = len(runs) - len(runs.intersection(missing_runs(stages, rows)))
    return "\n".join([*lines, f"{done} of {len(runs)} runs are done."])


# ------------------------------------------------------------------------------------------------
# Pictures


def draw_theta(rows, names, title, path):
    """theta beside theta_g, by class: held-out loss, mean and standard deviation over seeds."""
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    axis = figure.subplots()
    bars = {"DDPM": "DDPM", CM: "CM, θ", f"{CM}, θ_g": "CM, θ_g: without BA"}
    for i, (method, label) in enumerate(bars.items()):
        losses = [column(rows, method, f"loss {k}") for k in range(len(names))]
        axis.bar(np.arange(len(names)) + 0.27 * (i - 1), [v.mean() for v in losses], 0.25,
                 label=label, yerr=[v.std() for v in losses], error_kw=dict(lw=1))
    axis.set(ylabel="held-out ε-loss")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.legend()
    figure.suptitle(title, fontsize=8)
    common.save(figure, path)


def draw_few(rows, title, path):
    """Each method's difference to its base on Few, in percent of the base."""
    methods = dict.fromkeys(m for methods, _ in STAGES.values() for m in methods)
    present = set(rows["method"])
    compared = [(m, base_of(m)) for m in methods
                if m in present and base_of(m) in present - {m}]
    figure = Figure(figsize=(8.4, 0.32 * len(compared) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, ("loss Few", "FD Few"), strict=True):
        for i, (method, base) in enumerate(compared):
            if off(rows, method):
                axis.text(0, i, " ran off", va="center", fontsize=8, color="C3")
                continue
            mean, half, seeds = difference(rows, method, base, name, relative=True)
            several = seeds > 1
            axis.errorbar(100 * mean, i, xerr=100 * half if several else None, capsize=3,
                          fmt="o" if several else "x", color="C0" if several else "C1")
        axis.axvline(0, color="k", lw=0.8)
        axis.set(xlabel="difference to the base (left: better)")
        axis.grid(alpha=0.3)
    axes[0].set(title="held-out ε-loss on Few, %", ylim=(len(compared) - 0.5, -0.5))
    axes[0].set_yticks(range(len(compared)), [f"{m} − {base}" for m, base in compared], fontsize=8)
    axes[1].set(title="FD on Few, %")
    figure.suptitle(title, fontsize=8)
    common.save(figure, path)


def class_names(rows):
    """The names of the classes that the rows have losses of."""
    config = cm.parse(rows["options"].iloc[0].split())[0]
    known = {"fashion": torchvision.datasets.FashionMNIST.classes, "shapes": cm.SHAPES}
    numbers = [name.removeprefix("loss ") for name in rows if re.fullmatch(r"loss \d+", name)]
    return known.get(config.dataset, numbers)


def main(argv=None):
    parser = common.parser("study", __doc__)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument("--stage", choices=list(STAGES), nargs="+", default=list(STAGES))
    parser.add_argument("--summary", action="store_true", help="with --table: the README's table")
    parser.add_argument("--jobs", type=int, default=cores, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"),
                        help="where run directories lie")
    parser.add_argument("--num-images", type=int, default=5000, help="generated images a run")
    args, flags = parser.parse_known_args(argv)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
        status = 0
        if not args.table:
            status = study(args.stage, args.rows, args.runs, flags, args.jobs, args.num_images)
        rows = common.numbers(common.read_table(args.rows), WORDS)
        caveat = CAVEATS.get(args.rows.name, "")
        if caveat:
            print(caveat + "\n")
        print(summary(rows) if args.summary else table(rows, args.stage))
        draw_theta(rows, class_names(rows), caveat, args.assets / f"{args.rows.stem}_theta.png")
        draw_few(rows, caveat, args.assets / f"{args.rows.stem}_few.png")
        return status
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
