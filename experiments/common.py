"""What the scripts share: rows on disk, runs of cm.py, statistics, tables, a training loop."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
from tqdm import tqdm

import cm
import fid

ASSETS = Path(__file__).parents[1] / "assets"

# ------------------------------------------------------------------------------------------------
# Rows on disk. A table is text from end to end, so that reading and writing it changes no digit;
# `numbers` is for computing.


def text(rows):
    """A table of text of `rows`, dicts; floats with six digits, "" where a row lacks a column."""
    shown = [{k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in r.items()}
             for r in rows]
    return pd.DataFrame(shown, dtype=str).fillna("")


def read_rows(path):
    """The table of text in a .csv, empty where there is no file."""
    exists = path.exists()
    return pd.read_csv(path, dtype=str, keep_default_na=False) if exists else pd.DataFrame()


def read_table(path):
    """The rows that --table shows: those in `path` or, before there are any, in f7283d9/ beside it,
    which are of our earlier CM. Raises ValueError where there are none."""
    rows = read_rows(path if path.exists() else path.parent / "f7283d9" / path.name)
    if rows.empty:
        raise ValueError(f"{path} has no rows; leave --table away")
    return rows


def study(path, options, keys, measure):
    """Measure what has no row in a .csv yet, in one thread: results repeat only with as many.

    keys: {column: value} of each run; measure(**key): its rows, dicts, to which the key and a
    column `options` (see `settings`) are added. Raises ValueError where there are others' rows."""
    torch.set_num_threads(1)
    for number, key in enumerate(keys, 1):
        rows = read_rows(path)
        for others in set(rows.get("options", ())) - {options}:
            raise ValueError(f"{path} was made with other options ({others}); name another file "
                             "with --rows")
        if rows.empty or not (rows[list(key)] == text([key]).iloc[0]).all(axis=1).any():
            print(f"run {number} of {len(keys)}", file=sys.stderr)
            new = text([key | row for row in measure(**key)]).assign(options=options)
            rows = pd.concat([read_rows(path), new], ignore_index=True)  # others may be here now
            write_rows(path, rows.fillna(""))


def replace_rows(rows, new, key):
    """`rows` without those that agree with a row of `new` in the columns `key`, then `new`."""
    if rows.empty:
        return new
    gone = pd.MultiIndex.from_frame(rows[key]).isin(pd.MultiIndex.from_frame(new[key]))
    return pd.concat([rows[~gone], new], ignore_index=True).fillna("")


def write_rows(path, rows):
    """Write a table as .csv, atomically, and its directory where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cm.write_atomically(path, lambda p: rows.to_csv(p, index=False, lineterminator="\n"))


def numbers(rows, words):
    """A copy of a table of text in which all columns but `words` are floats, "" as nan."""
    names = [name for name in rows if name not in words]
    return rows.replace({name: "" for name in names}, "nan").astype({name: float for name in names})


# ------------------------------------------------------------------------------------------------
# Runs of cm.py


def configured(flags, unused, used=(), **defaults):
    """(options for cm.py, the typed ones before our own defaults; their Config; the names typed).

    unused: options, or groups of them, that mean nothing to the caller, but for those in `used`.
    Raises ValueError where one of them was typed, or cm.py would."""
    typed = cm.parse(flags)[1]
    for name, value in ({"dataset": cm.Config.dataset} | defaults).items():
        if name not in typed:
            flags = [*flags, "--" + name.replace("_", "-"), value]
    config, typed = cm.parse(flags)
    for field in dataclasses.fields(config):
        if {field.name, field.metadata["group"]} & set(unused) and field.name in typed - set(used):
            instead = "; type --seeds" if field.name == "seed" else ""
            raise ValueError(f"--{field.name.replace('_', '-')} has no meaning here{instead}")
    return flags, config.resolved(), typed


def settings(flags, without=("--data", "--device")):
    """Options as text, in order: what all rows of a table share, not where they came about."""
    options = [o.replace("=", " ", 1) for o in re.split(" (?=--)", " ".join(flags))]
    return " ".join(sorted(o for o in options if o.split(" ")[0] not in without))


def run(flags, out, **made_of):
    """Train with cm.py's options `flags` in the directory `out`, or go on there; what is finished
    isn't touched. made_of: cm.train's `losses` and `network`.

    "" where the run was finished, else where it ran off ("not finite between steps 50 and 100").
    Raises ValueError where cm.py would."""
    go_on = "--resume" if (out / "checkpoint.pt").is_file() else "--overwrite"
    config, typed = cm.parse([*flags, "--out", str(out), go_on])
    config, state = cm.prepare_run(config.resolved(), typed)
    if state and state["step"] == config.steps:
        return ""
    try:
        cm.train(config, typed, **made_of)
    except FloatingPointError as e:
        return re.search(r"not finite between steps \d+ and \d+", str(e))[0]
    return ""


# ------------------------------------------------------------------------------------------------
# Statistics, tables, pictures


def holm(p_values):
    """Holm's (1979) adjusted p-values, in order; nan, a test that wasn't made, counts as 1."""
    p = np.nan_to_num(np.asarray(p_values, float), nan=1.0)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(steps, 1)[np.argsort(order)]


def difference(ours, other, digits=2):
    """ours - other, Series by seed, as a table shows it: mean and 95 % t-interval over the seeds of
    both, "-10.71 [-13.03, -8.38]"; of one seed the mean alone; "–" of none, or where one is nan."""
    seeds = ours.index.intersection(other.index)
    values = ours[seeds] - other[seeds]
    mean = values.mean(skipna=False)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.sem(skipna=False)
    if np.isnan(mean):
        return "–"
    shown = f"{mean:+.{digits}f}"
    return shown if len(values) == 1 else (
        f"{shown} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]")


def spread(values, digits, sign=""):
    """Mean ± standard deviation (over n - 1) as a table shows it, nans left out; sign="+" for both
    signs; "–" where there is none."""
    values = pd.Series(values, dtype=float).dropna()
    if values.empty:
        return "–"
    mean = f"{values.mean():{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{digits}f}"


def markdown(table):
    """A DataFrame, or dicts, as a Markdown table, its text as it is; "" without rows."""
    return pd.DataFrame(table).to_markdown(index=False, disable_numparse=True)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cm.write_atomically(path, lambda p: figure.savefig(p, dpi=130))


def draw_samples(data, files, classes, path, columns):
    """A row for each of cm.Data's `classes`: real images, then those of each .npz of `files`,
    {title: path}."""
    panels = {"real": data.first(classes, columns)}
    for title, file in files.items():
        images, labels, _ = fid.read_images(file)
        panels[title] = torch.cat([images[labels == k][:columns] for k in classes])
    path.parent.mkdir(parents=True, exist_ok=True)
    cm.draw_panels(panels, [f"{data.names[k]}  {data.counts[k]}" for k in classes], path)


def judge(images, labels, test, num_classes, device, directory, seed=0):
    """A classifier of fid.py's kind, trained on uint8 images [N, C, H, W] and labels [N] once, then
    kept in `directory`. test: (images, labels), of which it says how many it recognises."""
    def make():
        net, accuracy = fid.train_classifier(images, labels, *test, num_classes, device, seed=seed)
        print(f"the judge recognises {100 * accuracy:.1f} % of test images", file=sys.stderr)
        return net.cpu().state_dict()

    weights = fid.cached(directory, "judge", [images.numpy().tobytes(), seed], make)
    net = fid.Classifier(images.shape[1], num_classes).eval().requires_grad_(False)
    net.load_state_dict(weights)
    return net.to(device)


def interruptible(main):
    """A script's main(argv): Ctrl-C ends it in one line and status 130; bad input and a run that
    runs off, a ValueError, OSError or FloatingPointError, in one line and status 2."""
    def ended(argv=None):
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as e:
            cm.fail(e)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)

    return ended


def parser(file, doc, rows=True, seeds=()):
    """A script's parser, whose errors are one line and status 2. file: the script's; NAME.csv, or a
    folder's rows.csv, lies beside it. rows: with what every script of rows has; seeds: the default
    of --seeds, for scripts that train networks of their own, in --runs."""
    path = Path(file)
    name = path.parent.name if path.stem == "__main__" else path.stem
    new = argparse.ArgumentParser(prog=name, description=doc, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    new.error = cm.fail
    if rows:
        new.add_argument("--rows", type=Path, help="where the rows lie", default=path.with_name(
            "rows.csv" if path.stem == "__main__" else f"{name}.csv"))
        new.add_argument("--assets", type=Path, default=ASSETS, help="where pictures go")
        new.add_argument("--table", action="store_true", help="run nothing; show the table, and "
                         "draw the picture if what it is made of is here")
    if seeds:
        new.add_argument("--seeds", type=int, nargs="+", default=list(seeds),
                         help=f"a run each [default: {' '.join(map(str, seeds))}]")
        new.add_argument("--runs", type=Path, default=Path("runs") / name,
                         help="where checkpoints and samples lie")
    return new


# ------------------------------------------------------------------------------------------------
# A training loop for chapters with a network of their own


def train(step, state, path, steps, seed=0, options="", every=500):
    """Call step(1), ..., step(steps), or go on where the checkpoint at `path` ends.

    step(i): one training step; returns its loss, a scalar. Before it torch's generators are seeded
    by (seed, i): so a resumed training ends, on the CPU bit for bit, where the whole one does.
    state: {name: what has state_dict and load_state_dict}, all that a step changes.
    path: written after each `every` steps and at the end, with the text `options`; a checkpoint
    with other options or another seed is refused.

    Raises ValueError on a checkpoint that doesn't fit, and FloatingPointError where the loss stops
    being finite; the checkpoint is then the last good one."""
    first = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if (saved["seed"], saved["options"]) != (seed, options):
            raise ValueError(f"{path} was made with other options (seed {saved['seed']}, "
                             f"{saved['options']}); name another directory with --runs")
        first = saved["step"]
        for name, part in state.items():
            part.load_state_dict(saved["state"][name])
    if first > steps:
        raise ValueError(f"{path} is at step {first} already; {steps} were asked for")

    for i in tqdm(range(first + 1, steps + 1), path.stem, steps, initial=first, unit="step"):
        torch.manual_seed(cm.hashed_seed("train", seed, i))
        loss = torch.as_tensor(step(i)).item()
        if not np.isfinite(loss):
            raise FloatingPointError(f"{path.stem}: the loss is not finite at step {i}")
        if i % every == 0 or i == steps:
            whole = {"seed": seed, "options": options, "step": i,
                     "state": {name: part.state_dict() for name, part in state.items()}}
            cm.write_atomically(path, lambda p, whole=whole: torch.save(whole, p))
