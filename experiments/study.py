"""Does CM help? Methods x seeds on Fashion-MNIST-LT, measured on held-out images.

    python -m experiments.study --data /usr/share/datasets/fashion-mnist             # every run that has no row yet
    python -m experiments.study --data DIR --stage margin                            # only the sweep of div_margin
    python -m experiments.study --table                                              # tables, verdicts, pictures of the rows at hand
    python -m experiments.study --data DIR --rows experiments/results/gpu.csv --preset paper --rank-ratio 0.1 --steps 100000   # a GPU, 32x32

Options that aren't its own go to every run of cm.py. Each run has a process (on a CPU: one thread) and a directory of its own;
a killed one goes on from its checkpoint, a finished one is a row of results/study.csv and is never run again.

Columns: held-out eps-loss of each class under theta and theta_g, and d, with the same noise and times for every run; FD, KD,
precision, recall and accuracy of `fid.py --features classifier`, overall and for Many / Medium / Few; steps/s; peak memory.
"""

import argparse
import contextlib
import csv
import fcntl
import multiprocessing
import os
import re
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torchvision

import cm
import fid

HERE = Path(__file__).parent
MARGINS = ("0", "0.003", "0.01", "0.03", "0.1", "inf")
CM = f"CM, m = {cm.Config.div_margin:g}"
METHODS = {"DDPM": "--no-cm", "RS": "--no-cm --resample 0.5", "Focal": "--no-cm --base focal", "CBDM": "--no-cm --base cbdm",
           "OC": "--no-cm --base oc", "CM on CBDM": "--base cbdm", "CM on OC": "--base oc"}
METHODS |= {f"CM, m = {m}": f"--div-margin {m}" for m in MARGINS}
ABLATIONS = {"CM, no L_Con": "--no-con", "CM, no L_Div": "--no-div", "CM, λ = 0": "--lam 0"}  # Tab. 7 right; λ = 0 is Eq. (1) without Eq. (2)
SWEEPS = {"CM, λ = 0.5": "--lam 0.5", "CM, λ = 1.5": "--lam 1.5", "CM, rank ratio 0.1": "--rank-ratio 0.1", "CM, rank ratio 0.5": "--rank-ratio 0.5"}
METHODS |= ABLATIONS | SWEEPS
STAGES = {"margin": (["DDPM"] + [f"CM, m = {m}" for m in MARGINS], 3),
          "main": (["DDPM", CM, "OC", "CM on OC", "CBDM", "CM on CBDM", "RS", "Focal"], 3),  # Tab. 2, 3, 7 left, Fig. 4a
          "ablation": (list(ABLATIONS), 3), "sweep": (list(SWEEPS), 1)}  # Fig. 4b, 4c
SPLITS = ("overall", "Many", "Medium", "Few")
# (what the paper reports, our better method, our worse one): on FD, and on the Few split
CLAIMS = ([(f"Tab. 2, 3: CM beats {m}", CM, m) for m in ("DDPM", "RS", "Focal", "CBDM", "OC")]
          + [(f"Fig. 4a: CM on {m} beats {m}", f"CM on {m}", m) for m in ("CBDM", "OC")]
          + [("Tab. 7: θ beats θ_g", CM, f"{CM}, θ_g"), ("Tab. 7: CM beats CM without L_Con", CM, "CM, no L_Con"),
             ("Tab. 7: CM beats CM without L_Div", CM, "CM, no L_Div")]
          + [(f"Fig. 4b: λ = 1 beats {v}", CM, f"CM, λ = {v}") for v in ("0", "0.5", "1.5")]
          + [(f"Fig. 4c: CM's rank ratio beats {v}", CM, f"CM, rank ratio {v}") for v in ("0.1", "0.5")])


def base_of(method):
    """What a method's difference is taken to: the plain network of its base loss; for ablations the whole method."""
    if method.startswith("CM on "):
        return method[6:]
    if method.endswith(", θ_g"):
        return method[:-5]
    return CM if method in ABLATIONS | SWEEPS else "DDPM"


def rows_of(method):
    return [method, f"{method}, θ_g"] if method == CM else [method]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def with_defaults(flags, **defaults):
    """The options for cm.py that were typed, after them our own where they weren't. Raises ValueError where cm.py would."""
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]  # --name=value too
    defaults = {"dataset": "fashion", "rank_ratio": "0.3"} | defaults  # at 16 channels the paper's 0.1 is rank 1 to 3: README
    for name, value in defaults.items():
        option = "--" + name.replace("_", "-")
        flags = flags if option in flags else [*flags, option, value]
    cm.parse(flags)[0].resolved()
    return flags


def settings(flags):
    """The options that all rows of one table share: their order and where the data lie don't matter."""
    options = re.split(" (?=--)", " ".join(flags))
    return " ".join(sorted(o for o in options if o.split(" ")[0] != "--data"))


def measure(method, seed, flags, directory, num_images):
    """Train, or go on training; sample; evaluate. The rows of one run, None where it was stopped."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock, open(directory / "output.txt", "a", buffering=1) as text, \
            contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        fcntl.flock(lock, fcntl.LOCK_EX)  # a study that was killed may have left this run's process behind
        out, cuda = directory / "run", torch.cuda.is_available()
        argv = [*flags, "--base", "ddpm", *METHODS[method].split(), "--seed", str(seed), "--out", str(out)]
        config, typed = cm.parse(argv + ["--resume"] * (out / "config.json").is_file())
        status, began, fresh = "finished", time.time(), not (out / "checkpoint.pt").is_file()
        try:
            if cm.train(config.resolved(), typed) != 0:
                return None
        except FloatingPointError as e:
            status = re.search(r"not finite at step \d+", str(e))[0]
        row = dict(method=method, seed=seed, status=status, device=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread",
                   options=settings(flags))
        if status != "finished":
            return [row | {"method": m} for m in rows_of(method)]
        c, ema, counts = cm.load_trained(out / "checkpoint.pt")
        seconds = (out / "checkpoint.pt").stat().st_mtime - began
        row |= {"steps/s": c.steps / seconds if fresh else float("nan"),  # a resumed run has no one speed
                "peak MB": torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
        device = "cuda" if cuda else "cpu"
        data = cm.Data(c, device)
        loss, loss_g, d = cm.held_out_loss(ema.to(device), data.held_out, data.held_out_labels, len(counts), per_class=200, times=10)
        rows = []
        for name in rows_of(method):
            general = name != method
            samples = directory / ("samples_g.npz" if general else "samples.npz")
            argv = ["--sample", str(out / "checkpoint.pt"), "--out", str(samples), "--num-images", str(num_images), "--seed", str(seed), "--overwrite"]
            cm.generate(cm.parse(argv + ["--general-only"] * general)[0])
            scores = fid.evaluate(samples, c.dataset, c.data, features="classifier", device=device, cache=directory.parent / "fid")
            rows.append(row | {"method": name}
                        | {f"{kind} {k}": float(v) for kind, values in (("loss", loss_g if general else loss), ("d", d)) for k, v in enumerate(values)}
                        | {f"{kind} {s}": scores[s][kind] for kind in ("FD", "KD", "precision", "recall", "accuracy") for s in SPLITS if s in scores}
                        | {f"loss {s}": float((loss_g if general else loss)[k].nanmean()) for s, k in cm.splits(counts).items()}
                        | {f"d {s}": float(d[k].nanmean()) for s, k in cm.splits(counts).items()})
        return rows


def read_rows(path, flags=None):
    """The rows of a .csv, none where there is no file. Raises ValueError where they were made with other options than `flags`."""
    if not path.is_file():
        return []
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    other = next((r["options"] for r in rows if r["options"] != settings(flags)), None) if flags is not None else None
    if other is not None:
        raise ValueError(f"{path} was made with other options ({other}); name another file with --rows")
    return rows


def write_rows(path, rows):
    """The rows, dicts, as a .csv with a column for each key of any."""
    columns = list(dict.fromkeys(k for r in sorted(rows, key=len, reverse=True) for k in r))

    def write(p):
        with open(p, "w", newline="") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    cm.write_atomically(path, write)


def study(stages, path, runs, flags, jobs, num_images):
    """Run what has no row yet, `jobs` at a time, DDPM and CM first, then seed by seed. Raises ValueError on bad options; 0, or 1 where runs were stopped."""
    flags = with_defaults(flags, steps="6000")
    rows = read_rows(path, flags)
    wanted = [(m, s) for stage in stages for s in range(STAGES[stage][1]) for m in STAGES[stage][0]]
    done = {(r["method"], int(r["seed"])) for r in rows}
    todo = [(m, s) for m, s in dict.fromkeys(wanted) if not all((n, s) in done for n in rows_of(m))]
    todo.sort(key=lambda run: run[0] not in ("DDPM", CM))  # what everything is compared with comes first
    print(f"{len(set(wanted)) - len(todo)} runs have rows, {len(todo)} to do", flush=True)
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come: results repeat only with the same number of threads
    stopped = 0
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        slug = lambda m, s: re.sub(r"[^\w.]+", "-", m) + f"-{s}"
        tasks = {pool.submit(measure, m, s, flags, runs / slug(m, s), num_images): (m, s) for m, s in todo}
        try:
            for task in as_completed(tasks):
                new = task.result()
                stopped += new is None
                if new:
                    rows = [r for r in read_rows(path) if (r["method"], int(r["seed"])) not in {(n["method"], n["seed"]) for n in new}] + new
                    order = [n for m in METHODS for n in (m, f"{m}, θ_g")]
                    write_rows(path, sorted(rows, key=lambda r: (order.index(r["method"]), int(r["seed"]))))
                    print(f"{time.strftime('%H:%M')}  {tasks[task][0]}, seed {tasks[task][1]}: {new[0]['status']}, FD {new[0].get('FD overall', float('nan')):.4g}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return int(stopped > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and verdicts


def column(rows, method, name):
    """{seed: value} of one column for one method; nan where it ran off."""
    return {int(r["seed"]): float(r.get(name) or "nan") for r in rows if r["method"] == method}


def difference(rows, method, other, name, relative=False):
    """(mean, half-width of the 95 % interval, seeds) of method - other, paired by seed; half-width nan with one seed."""
    a, b = column(rows, method, name), column(rows, other, name)
    values = np.array([(a[s] - b[s]) / (b[s] if relative else 1) for s in sorted(a.keys() & b.keys())])
    if len(values) < 2:
        return (values.mean() if len(values) else float("nan")), float("nan"), len(values)
    return values.mean(), scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5, len(values)


def verdict(mean, half, seeds):
    """Of a difference that the paper has below 0."""
    if seeds < 2 or not np.isfinite(half):
        return "not run" if seeds == 0 else "ran off" if np.isnan(mean) else "not decidable at this scale (one seed)"
    return "reproduced" if mean + half < 0 else "not reproduced" if mean - half > 0 else "not decidable at this scale"


def off(rows, method):
    """Did its runs run off, to a held-out loss that is worse than that of predicting no noise?"""
    return not np.mean(list(column(rows, method, "loss Few").values())) < 1


def table(rows):
    """The tables in Markdown and the verdicts, as text."""
    present = [m for m in dict.fromkeys(n for m in METHODS for n in (m, f"{m}, θ_g")) if column(rows, m, "seed")]
    spread = lambda v, digits: "–" if not v else f"{np.mean(v):.{digits}f}" + (f" ± {np.std(v, ddof=1):.{digits}f}" if len(v) > 1 else "")
    shown = [(f"loss {s}", 4) for s in SPLITS[1:]] + [(f"FD {s}", 1) for s in SPLITS] + [
        ("accuracy Few", 2), ("precision Few", 2), ("recall Few", 2), ("steps/s", 1), ("peak MB", 0)]
    lines = ["| method | seeds | " + " | ".join(n for n, _ in shown) + " |", "| --- " * (len(shown) + 2) + "|"]
    for m in present:
        cells = [spread([v for v in column(rows, m, n).values() if v == v], digits) for n, digits in shown]
        lines.append(f"| {m} | {len(column(rows, m, 'seed'))} | " + " | ".join(["ran off"] * 3 + cells[3:] if off(rows, m) else cells) + " |")
    compared = [(m, base_of(m)) for m in present if m != base_of(m) and column(rows, base_of(m), "seed")]
    cell = lambda mean, half, n, scale, unit: f"{scale * mean:+.2f}{unit}" + (f" [{scale * (mean - half):+.2f}, {scale * (mean + half):+.2f}]" if half == half else "")
    lines += ["", "Paired differences, mean and 95 % interval over seeds (below 0: better)", "",
              "| method − base | " + " | ".join([f"loss {s}" for s in SPLITS[1:]] + [f"FD {s}" for s in SPLITS]) + " |", "| --- " * 8 + "|"]
    for m, b in compared:
        cells = [cell(*difference(rows, m, b, f"loss {s}", relative=True), 100, " %") for s in SPLITS[1:]]
        cells += [cell(*difference(rows, m, b, f"FD {s}"), 1, "") for s in SPLITS]
        lines.append(f"| {m} − {b} | " + " | ".join(["ran off"] * 7 if off(rows, m) or off(rows, b) else cells) + " |")
    lines += ["", "| the paper's result | FD overall | FD Few | held-out loss Few |", "| --- | --- | --- | --- |"]
    missing = []
    for claim, ours, other in CLAIMS:
        words = [verdict(*difference(rows, ours, other, n)) for n in ("FD overall", "FD Few", "loss Few")]
        if "not run" in words:
            missing.append(claim)
        else:
            lines.append(f"| {claim} | " + " | ".join(words) + " |")
    runs = {(m, s) for methods, seeds in STAGES.values() for m in methods for s in range(seeds)}
    done = sum(s in column(rows, m, "seed") for m, s in runs)
    lines += ["", f"{done} of {len(runs)} runs are done." + (f" No verdict yet: {'; '.join(missing)}." if missing else "")]
    return "\n".join(lines)


def draw(rows, assets, names):
    """study_theta.png: theta beside theta_g per class; study_few.png: the Few split's gain by method."""
    from matplotlib.figure import Figure
    assets.mkdir(parents=True, exist_ok=True)
    present = [m for m in dict.fromkeys(m for stage in STAGES.values() for m in stage[0]) if column(rows, m, "seed")]
    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, (m, label) in enumerate([("DDPM", "DDPM"), (CM, "CM, θ"), (f"{CM}, θ_g", "CM, θ_g: without BA")]):
        values = [list(column(rows, m, f"loss {k}").values()) for k in range(len(names))]
        if all(values):
            axis.bar(np.arange(len(names)) + 0.27 * (i - 1), [np.mean(v) for v in values], 0.25, label=label,
                     yerr=[np.std(v, ddof=1) if len(v) > 1 else 0 for v in values], error_kw=dict(lw=1))
    axis.set(ylabel="held-out ε-loss")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.legend()
    figure.savefig(assets / "study_theta.png", dpi=130)

    compared = [(m, base_of(m)) for m in present if m != base_of(m) and column(rows, base_of(m), "seed")]
    figure = Figure(figsize=(8.4, 0.32 * len(compared) + 1.2), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, 2, sharey=True), [("loss Few", "held-out ε-loss on Few, %"), ("FD Few", "FD on Few, %")]):
        for i, (m, b) in enumerate(compared):
            mean, half, n = difference(rows, m, b, name, relative=True)
            if off(rows, m):
                axis.text(0, i, " ran off", va="center", fontsize=8, color="C3")
                continue
            axis.errorbar(100 * mean, i, xerr=None if np.isnan(half) else 100 * half, fmt="o" if n > 1 else "x", color="C0" if n > 1 else "C1", capsize=3)
        axis.axvline(0, color="k", lw=0.8)
        axis.set(title=title, xlabel="difference to the base (left: better)")
        axis.set_yticks(range(len(compared)), [f"{m} − {b}" for m, b in compared], fontsize=8)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylim(len(compared) - 0.5, -0.5)
    figure.savefig(assets / "study_few.png", dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = cm.fail
    parser.add_argument("--stage", choices=list(STAGES), nargs="+", default=list(STAGES))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)) if not torch.cuda.is_available() else 1, help="runs at a time")
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "study.csv", help="the table of finished runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where run directories lie")
    parser.add_argument("--assets", type=Path, default=HERE.parent / "assets", help="where pictures go")
    parser.add_argument("--num-images", type=int, default=5000, help="generated images a run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args, flags = parser.parse_known_args(argv)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
        status = 0 if args.table else study(args.stage, args.rows, args.runs, flags, args.jobs, args.num_images)
        rows = read_rows(args.rows)
        if not rows:
            raise ValueError(f"{args.rows} has no rows; leave --table away")
        print(table(rows))
        names = sorted({int(k.split()[1]) for k in rows[0] if re.fullmatch(r"loss \d+", k)})
        c = cm.parse(rows[0]["options"].split())[0].resolved()
        known = {"fashion": torchvision.datasets.FashionMNIST.classes, "shapes": cm.SHAPES}.get(c.dataset)
        draw(rows, args.assets, [known[k] for k in names] if known else [str(k) for k in names])
        return status
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
