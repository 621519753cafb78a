"""When does CM help? Methods x seeds on Fashion-MNIST-LT: less and more data, shorter and longer
training, without and with guidance.

    python -m experiments.study                               # what has no row yet
    python -m experiments.study --stage 1000                  # one stage (make_stages has them)
    python -m experiments.study --table                       # tables and pictures of the rows
    python -m experiments.study --table --summary             # the claims and the map's numbers
    python -m experiments.study --table --rows experiments/results/f7283d9/first_study.csv

Options that aren't its own go to every run of cm.py. Each run has a process (on a CPU: one thread)
and a directory of its own, which keeps checkpoints and samples of every point; a killed run goes on
from its last checkpoint, a point that has its row is never run again, and a measure that was added
later is computed from the samples that are still there.

Columns: FD, precision, recall and accuracy of `fid.py --features classifier`, against the whole
balanced training set; FD2, the same in the features of another classifier; held-out eps-loss under
theta and d; all overall and for Many / Medium / Few. memorised Few: the share of generated Few
images that lie much nearer to one training image than to any other; memorised real: the same share
of held-out real ones.
"""

import contextlib
import fcntl
import functools
import itertools
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import cm
import fid
from experiments import baselines, common

# ------------------------------------------------------------------------------------------------
# What is compared


class Method(NamedTuple):
    """base: the method it is compared with; flags, losses, network: as in baselines.Variation;
    general: theta_g is sampled; tunes: the steps of its base at whose weights it starts; draws:
    the seed draws the long-tailed set, too, instead of cm.py's draw 0."""

    base: str
    flags: str = ""
    losses: type = cm.CapacityManipulation
    network: Callable = cm.make_unet
    general: bool = False
    tunes: int = 0
    draws: bool = False


METHODS = {
    "DDPM": Method("DDPM", "--no-cm"),
    "RS": Method("DDPM", "--no-cm --resample 0.5"),
    "CM": Method("DDPM"),
    "CM with RS": Method("RS", "--resample 0.5"),
    "OC": Method("DDPM", "--no-cm --base oc"),
    "CM on OC": Method("OC", "--base oc"),  # Fig. 4a
    "CBDM": Method("DDPM", "--no-cm --base cbdm"),
    "CM on CBDM": Method("CBDM", "--base cbdm"),
    "Focal": Method("DDPM", "--no-cm --base focal"),
    "CBDM (θ_g ⊕ θ_e)": Method("CBDM", "--base cbdm --lam 0"),  # Tab. E.2
    "CM, θ_g": Method("CM", general=True),  # Tab. 7, left
    "CM, no L_Con": Method("CM", "--no-con"),  # Tab. 7, right
    "CM, no L_Div": Method("CM", "--no-div"),
    "CM, λ = 0": Method("CM", "--lam 0"),  # Eq. (1) without Eq. (2)
    "ADA": Method("DDPM", *baselines.BASELINES["ADA"]),
    "Overlap": Method("DDPM", *baselines.BASELINES["Overlap"]),  # Tab. G.12
    "Group-Expert LoRA": Method("DDPM", *baselines.BASELINES["Group-Expert LoRA"]),  # Tab. E.2
    "CBDM (LoRA)": Method("CBDM", *baselines.BASELINES["CBDM (LoRA)"], tunes=6000),
}
FOUR = ("DDPM", "RS", "CM", "CM with RS")
DRAWN = {f"{name}, drawn images": METHODS[name]._replace(
    base=f"{METHODS[name].base}, drawn images", draws=True) for name in (*FOUR, "CM, λ = 0")}
OVERLAPS = {  # chosen from once: the lowest FD on Few is baselines.py's
    f"Overlap, γ = {gamma}, m = {margin}": METHODS["Overlap"]._replace(
        losses=type("Overlap", (baselines.Overlap,), dict(gamma=gamma, margin=margin)))
    for gamma in (10, 100) for margin in (3e-5, 1e-4, 3e-4)}
NETWORKS = {  # Fig. 4d, and the other imbalance of the paper
    f"{name} {flags}": Method(f"DDPM {flags}", f"{METHODS[name].flags} {flags}")
    for flags in ("--ir 50", "--multipliers 1 2 2 2", "--multipliers 1 2 3 4")
    for name in ("DDPM", "CM")}
METHODS |= DRAWN | OVERLAPS | NETWORKS
METHODS |= {f"CM, m = {m}": Method("DDPM", f"--div-margin {m}")  # the first study's sweep
            for m in ("0", "0.01", "0.03", "0.1", "inf")}


class Point(NamedTuple):
    """Where a run is sampled and measured."""

    steps: int
    guidance: int = 0
    sampler: str = "ddim"


class Stage(NamedTuple):
    """Methods that are trained on the same data, with the same seeds, to the same points."""

    n_max: int
    seeds: range
    methods: tuple
    points: tuple


@functools.cache
def equal_compute(steps):
    """The plain network's steps that cost as many FLOPs as `steps` of CM, forward and backward, of
    a whole batch: BA is formed once a step, whatever the number of images."""
    flops = []
    for no_cm in (True, False):
        config = cm.Config(no_cm=no_cm).resolved()
        with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
            unet = cm.make_unet(config, 10, 1)
            x = torch.zeros(config.batch_size, 1, config.image_size, config.image_size)
            t = torch.zeros(config.batch_size, dtype=torch.long)
            losses = cm.CapacityManipulation(unet, [1] * 10, config)
            losses(x, t, t, x, t)[0].backward()
        flops.append(counter.get_total_flops())
    return round(steps * flops[1] / flops[0])


def make_stages():
    """{name: Stage}, in the order in which they are run. Stages that are run together share their
    runs: those for the map train nothing of their own then."""
    end, longer = (Point(6000),), (Point(equal_compute(6000)),)
    return {
        "1000": Stage(1000, range(10, 18), FOUR, end),
        "1000-map": Stage(1000, range(10, 18), FOUR, (Point(1500), Point(6000, 1))),
        "200": Stage(200, range(10, 16), FOUR, (Point(8000),)),
        "200-map": Stage(200, range(10, 16), FOUR, (Point(1500), Point(4000), Point(8000, 1))),
        "6000": Stage(6000, range(10, 15), FOUR, end),
        "images": Stage(1000, range(10, 18), tuple(DRAWN), end),
        "compute": Stage(1000, range(10, 18), ("DDPM", "RS"), longer),
        "images-compute": Stage(1000, range(10, 18), ("DDPM, drawn images", "RS, drawn images"),
                                longer),
        "bases": Stage(1000, range(10, 15), ("OC", "CM on OC", "CBDM", "CM on CBDM"), end),
        "overlap": Stage(1000, range(1), tuple(OVERLAPS), (Point(2000),)),  # a seed of its own
        "general": Stage(1000, range(10, 18), ("CM, θ_g",), end),
        "200-general": Stage(200, range(10, 16), ("CM, θ_g",), (Point(8000),)),
        "controls": Stage(1000, range(10, 13), (
            "ADA", "Overlap", "Focal", "CM, λ = 0", "CM, no L_Con", "CM, no L_Div",
            "CBDM (θ_g ⊕ θ_e)", "Group-Expert LoRA"), end),
        "lora": Stage(1000, range(10, 13), ("CBDM (LoRA)",), (Point(3000),)),
        "sampler": Stage(1000, range(10, 13), ("DDPM", "CM"), (Point(6000, 0, "dpm"),)),  # G.10
        "networks": Stage(1000, range(10, 13), tuple(NETWORKS), end)}


ENDS = {200: 8000, 1000: 6000, 6000: 6000}  # n_max: steps of the claims
KEY = ["method", "n_max", "steps", "seed", "guidance", "sampler"]
WORDS = ("method", "sampler", "status", "device", "options")
SPLITS = ("overall", "Many", "Medium", "Few")
SCORES = ("FD", "precision", "recall", "accuracy")
MEASURES = [f"{kind} {split}" for kind in (*SCORES, "FD2") for split in SPLITS]
MEASURES += [f"{kind} {split}" for kind in ("loss", "d") for split in SPLITS[1:]]
MEASURES += ["memorised Few", "memorised real"]
CAVEATS = {  # of a file of rows: shown with its tables
    "first_study.csv": "First study: its seeds shared all batches, noise and sampling noise, so "
                       "its intervals are over initialisations only.\n"
                       "Its rows are repeated by commit 2134833, not by later ones."}


def spec_of(method):
    """The Method of a name; what else the first study ran is compared with CM, theta_g with theta.
    """
    whole = method.removesuffix(", θ_g")
    return METHODS.get(method, Method(whole if whole != method else "CM"))


# ------------------------------------------------------------------------------------------------
# One run


def measure(run, points, milestones, flags, directory, num_images):
    """Train, or go on training; sample; evaluate. A row for each of `points`, None where the run
    was stopped.

    run: (method, n_max, seed). A checkpoint is kept at each of `milestones` [steps]. In a process
    of its own; what it prints goes to `directory`."""
    method, n_max, seed = run
    spec = METHODS[method]
    directory.mkdir(parents=True, exist_ok=True)
    made_of = dict(losses=spec.losses, network=spec.network)
    with (open(directory / "lock", "w") as lock,
          open(directory / "output.txt", "a", buffering=1) as output,
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)):
        fcntl.flock(lock, fcntl.LOCK_EX)  # a killed study may have left this run's process behind
        last, ran_off, rows = max(point.steps for point in points), "", []
        for steps in sorted(s for s in milestones if s <= last):
            checkpoint = directory / f"checkpoint-{steps}.pt"
            if not checkpoint.is_file() and not ran_off:
                try:
                    if spec.tunes:
                        base = spec.base, n_max, seed
                        made_of["network"] = baselines.lora_of(common.checkpoint_at(
                            spec.tunes, options_of(base, flags),
                            common.directory_of(base, directory.parent), spec.tunes))
                    ran_off = common.run([*options_of(run, flags), "--steps", str(steps)],
                                         directory / "run", **made_of)
                except SystemExit as e:
                    if e.code < 128:  # not a signal
                        raise
                    return None
                except FloatingPointError as e:  # of the base
                    ran_off = f"its base was {str(e).rpartition(': ')[2]}"
                if not ran_off:
                    cm.write_atomically(checkpoint, lambda path: shutil.copy(
                        directory / "run" / "checkpoint.pt", path))
            for point in points:
                if point.steps == steps:
                    row = dict(method=method, n_max=n_max, seed=seed) | point._asdict()
                    if not ran_off:
                        row |= measured(spec, checkpoint, point, seed, num_images)
                    rows.append(row | dict(status=ran_off or "finished", device=device_name(),
                                           options=recorded(flags, num_images)))
        return rows


def options_of(run, flags):
    """A run's options for cm.py: those of all runs, then its method's."""
    method, n_max, seed = run
    spec = METHODS[method]
    return [*flags, "--base", "ddpm", *spec.flags.split(), "--n-max", str(n_max),
            "--seed", str(seed), *["--subset-seed", str(seed)] * spec.draws]


def recorded(flags, num_images):
    """The column options: what all rows of a file share."""
    return common.settings([*flags, *["--num-images", str(num_images)] * (num_images != 5000)])


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread"


def samples_of(spec, directory, point):
    """Where the samples of a point lie."""
    kind = "general-" if spec.general else ""
    return directory / f"samples-{kind}{point.steps}-{point.sampler}-g{point.guidance}.npz"


def measured(spec, checkpoint, point, seed, num_images):
    """The columns MEASURES of one point; draws its samples where there are none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = checkpoint.parents[1] / "fid"
    samples = samples_of(spec, checkpoint.parent, point)
    if not samples.is_file():
        argv = ["--sample", str(checkpoint), "--out", str(samples), "--num-images",
                str(num_images), "--seed", str(seed), "--sampler", point.sampler,
                "--guidance", str(point.guidance)]
        cm.generate(cm.parse(argv + ["--general-only"] * spec.general)[0],
                    losses=spec.losses, network=spec.network)
    config, ema, counts = cm.load_trained(checkpoint, losses=spec.losses, network=spec.network)
    data = cm.Data(config)
    images, labels, _ = fid.read_images(samples)
    if len(images) != num_images:
        raise ValueError(f"{samples} holds {len(images)} images, not {num_images}; name another "
                         "directory with --runs")
    scores = fid.evaluate(samples, config.dataset, config.data, features="classifier",
                          device=device, cache=cache)
    row = {f"{kind} {split}": scores[split][kind] for kind in SCORES for split in SPLITS}
    row |= second_distances(images, labels, counts, config, device, cache)
    held_out = cm.held_out_loss(ema.to(device), data.held_out.to(device),
                                data.held_out_labels.to(device), len(counts), 200, 10)
    few = torch.as_tensor(cm.splits(counts)["Few"])
    for split, classes in cm.splits(counts).items():
        row[f"loss {split}"] = float(held_out[int(spec.general)][classes].nanmean())
        row[f"d {split}"] = float(held_out[2][classes].nanmean())
    row["memorised Few"] = memorised(images[torch.isin(labels, few)], data.images)
    row["memorised real"] = memorised(data.held_out[torch.isin(data.held_out_labels, few)],
                                      data.images)
    return row


def second_distances(images, labels, counts, config, device, cache):
    """FD2: Fréchet distances, overall and by split, in the features of a classifier that was
    trained with another seed than fid.py's."""
    whole = fid.real_set(config.dataset, config.data, None, config.image_size)
    real, real_labels, classes = whole["arr_0"], whole["arr_1"], len(whole["names"])

    def make():
        held = cm.load_dataset(config.dataset, config.data, config.image_size, train=False)
        net, _ = fid.train_classifier(real, real_labels, fid.chw(held[0]),
                                      torch.from_numpy(held[1]), classes, device, seed=1)
        return {"weights": net.cpu().state_dict(),
                "features": fid.extract(net.to(device), real, "real images")[0].cpu()}

    state = fid.cached(cache, "second", [real], make)
    net = fid.Classifier(real.shape[1], classes).eval().requires_grad_(False).to(device)
    net.load_state_dict(state["weights"])
    generated = fid.extract(net, images, "generated images")[0].cpu()
    row = {"FD2 overall": fid.frechet_distance(state["features"], generated)}
    for split, of_split in cm.splits(counts).items():
        r, g = (torch.isin(y, torch.as_tensor(of_split)) for y in (real_labels, labels))
        row[f"FD2 {split}"] = fid.frechet_distance(state["features"][r], generated[g])
    return row


def memorised(images, training):
    """The share of `images` whose distance to the nearest training image is below a third of that
    to the second nearest (Yoon et al. 2023). uint8 [N, C, H, W] and [M, C, H, W]."""
    training = training.flatten(1).double()
    nearest = torch.cat([torch.cdist(part.flatten(1).double(), training)
                        .topk(2, largest=False).values for part in images.split(500)])
    return float((nearest[:, 0] < nearest[:, 1] / 3).double().mean())


# ------------------------------------------------------------------------------------------------
# All runs


def key_of(run, point):
    """The columns KEY of a row, as text."""
    method, n_max, seed = run
    return method, str(n_max), str(point.steps), str(seed), str(point.guidance), point.sampler


def milestones_of(run):
    """All steps at which any stage measures a run: there a checkpoint is kept."""
    method, n_max, seed = run
    alike = {m for m in METHODS if common.directory_of((m, n_max, seed), Path()) ==
             common.directory_of(run, Path())}
    return sorted({p.steps for stage in make_stages().values() for p in stage.points
                   if stage.n_max == n_max and seed in stage.seeds
                   and alike.intersection(stage.methods)})


def missing_points(names, rows, runs):
    """{(method, n_max, seed): [Point]} of the stages `names`: what has no row, or lacks a measure
    that its samples, still there, can give."""
    done, whole = set(), set()
    if len(rows):
        done = set(rows[KEY].itertuples(index=False, name=None))
        measures = rows.reindex(columns=MEASURES, fill_value="")
        whole = (measures != "").all(axis=1) | (rows["status"] != "finished")
        whole = set(rows[whole][KEY].itertuples(index=False, name=None))

    def is_missing(run, point):
        key = key_of(run, point)
        samples = samples_of(METHODS[run[0]], common.directory_of(run, runs), point)
        return key not in done or (key not in whole and samples.is_file())

    missing = {}
    for stage in (make_stages()[name] for name in names):
        for seed in stage.seeds:
            for method in stage.methods:
                run = method, stage.n_max, seed
                points = [p for p in stage.points if is_missing(run, p)]
                if points:
                    missing.setdefault(run, []).extend(points)
    return missing


def in_order(rows):
    """Rows by n_max, then as METHODS has them, then by seed and point."""
    place = rows[["n_max", "seed", "steps", "guidance"]].astype(int)
    place["method"] = rows["method"].map(list(METHODS).index)
    place = place.sort_values(["n_max", "method", "seed", "steps", "guidance"], kind="stable")
    return rows.loc[place.index].reset_index(drop=True)


def study(names, path, runs, flags, jobs, num_images):
    """Run what has no row yet, `jobs` at a time. 0, or 1 where runs were stopped. Raises ValueError
    on bad options."""
    flags = common.with_defaults(flags, warmup="100")
    own = {"--steps", "--n-max", "--seed", "--subset-seed", "--base", "--no-cm", "--resample"}
    if own.intersection(flags):
        raise ValueError(f"{min(own.intersection(flags))} is set by the stages and methods "
                         "(make_stages and METHODS in study.py)")
    missing = missing_points(names, common.read_rows(path, recorded(flags, num_images)), runs)
    total = sum(len(points) for points in missing_points(names, [], runs).values())
    to_do = sum(map(len, missing.values()))
    print(f"{total - to_do} points have rows, {to_do} to do in {len(missing)} runs", flush=True)
    if not torch.cuda.is_available():  # for the processes to come:
        os.environ["OMP_NUM_THREADS"] = "1"  # results repeat only with the same number of threads
    stopped = False
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool:
        tasks = {pool.submit(measure, run, points, milestones_of(run), flags,
                             common.directory_of(run, runs), num_images): run
                 for run, points in missing.items()}
        try:
            for task in as_completed(tasks):
                new = task.result()
                if new is None:
                    stopped = True
                    continue
                rows = common.replace_rows(common.read_rows(path), common.text(new), KEY)
                common.write_rows(path, in_order(rows))
                method, n_max, seed = tasks[task]
                print(f"{time.strftime('%H:%M')}  {method}, n_max {n_max}, seed {seed}: "
                      f"{new[-1]['status']}, FD Few {new[-1].get('FD Few', np.nan):.4g}",
                      flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return int(stopped)


# ------------------------------------------------------------------------------------------------
# Tables


def at(rows, method, n_max, steps, guidance=0, sampler="ddim"):
    """The rows of a method at one point, by seed."""
    here = ((rows["method"] == method) & (rows["n_max"] == n_max) & (rows["steps"] == steps)
            & (rows["guidance"] == guidance) & (rows["sampler"] == sampler))
    return rows[here].set_index("seed")


def groups(rows):
    """[(title, rows)]: what is compared with each other, by data, guidance and sampler."""
    shown = []
    for (n_max, guidance, sampler), part in rows.groupby(["n_max", "guidance", "sampler"]):
        title = f"n_max {n_max:,.0f}, guidance {guidance:g}"
        shown.append((title + f", {sampler}" * (sampler != "ddim"), part))
    return shown


def runs_of(group):
    """[(method, its rows by seed, its base's)] of a group; a base without rows is None."""
    found = []
    for method in METHODS | dict.fromkeys(group["method"]):
        spec = spec_of(method)
        for steps, ours in group[group["method"] == method].groupby("steps"):
            bases = group[group["method"] == spec.base]
            other = bases[bases["steps"] == (spec.tunes or steps)]
            known = len(other) and spec.base != method
            found.append((method, ours.set_index("seed"),
                          other.set_index("seed") if known else None))
    return found


def off(run):
    """Did it run off, to a held-out loss that is worse than that of predicting no noise?"""
    return not run["loss Few"].mean(skipna=False) < 1


def values(group):
    """The table of what was measured: mean ± standard deviation over seeds."""
    digits = {f"FD {s}": 1 for s in SPLITS} | {"FD2 Few": 1, "precision Few": 2, "recall Few": 2,
                                                "accuracy Few": 2, "memorised Few": 3,
                                                "memorised real": 3}
    digits |= {f"loss {s}": 4 for s in SPLITS[1:]}
    shown = []
    for method, run, _ in runs_of(group):
        cells = {name: common.spread(run[name], n) for name, n in digits.items() if name in run}
        if off(run):
            cells |= {name: "ran off" for name in cells if name.startswith("loss")}
        shown.append({"method": method, "steps": f"{run['steps'].iloc[0]:.0f}",
                      "seeds": len(run)} | cells)
    return common.markdown(shown)


def differences(group):
    """The table of paired differences, absolute; the loss's in thousandths."""
    scale = {f"FD {s}": 1 for s in SPLITS} | {"FD2 Few": 1, "recall Few": 1, "memorised Few": 1}
    scale |= {f"loss {s}": 1000 for s in SPLITS[1:]}
    digits = {"recall Few": 3, "memorised Few": 3}
    shown = []
    for method, run, base in runs_of(group):
        if base is None:
            continue
        row = {"method − base": f"{method} − {spec_of(method).base}",
               "steps": f"{run['steps'].iloc[0]:.0f}"}
        for name, factor in scale.items():
            if name in run:
                mean, half, _ = common.difference(run[name], base[name])
                title = name if factor == 1 else f"{factor} × {name}"
                row[title] = "ran off" if off(run) or off(base) else common.interval(
                    factor * mean, factor * half, digits.get(name, 2))
        if "FD2 Few" in row and sign_differs(run, base):
            row["FD2 Few"] += " (sign differs)"
        shown.append(row)
    return common.markdown(shown)


def sign_differs(run, base):
    """Does the second classifier see the difference on Few the other way?"""
    first, second = (common.difference(run[name], base[name])[0] for name in ("FD Few", "FD2 Few"))
    return first * second < 0


# ------------------------------------------------------------------------------------------------
# Claims, fixed before the runs


def make_claims():
    """[(n_max, (method, steps), (method it must be below, steps))], on FD Few at guidance 0."""
    pairs = ("CM", "DDPM"), ("CM with RS", "RS")
    found = [(n_max, (ours, steps), (other, steps))
             for n_max, steps in ENDS.items() for ours, other in pairs]
    return found + [(1000, (ours, 6000), (other, equal_compute(6000))) for ours, other in pairs]


def steps_of(ours, other):
    """The steps of two (method, steps), as the tables show them."""
    return " and ".join(f"{n:,}" for n in sorted({ours[1], other[1]}))


def verdict(fd, p, recall, memorised):
    """Of a claim. fd, recall, memorised: (mean, half-width, seeds) of the paired difference; p:
    adjusted, two-sided."""
    mean, half, seeds = fd
    if seeds == 0:
        return "not run"
    if np.isnan(half):
        return "undecided (one seed)" if seeds == 1 else "undecided (ran off)"
    if mean - half > 0:
        return "refuted"
    worse = [name for name, is_worse in (("recall", recall[0] + recall[1] < 0),
                                         ("memorisation", memorised[0] - memorised[1] > 0))
             if is_worse]
    if mean < 0 and p < 0.05 and not worse:
        return "holds"
    return (f"undecided (gain at most {max(0, half - mean):.1f}"
            + "".join(f", {name} worse" for name in worse) + ")")


def claims(rows):
    """The table of the claims. p: paired t-test, two-sided, Holm over all claims. A verdict is one
    of the seeds at hand; the table says of how many."""
    compared, p_values = [], []  # over the seeds that both have
    for n_max, ours, other in make_claims():
        pair = at(rows, ours[0], n_max, ours[1]), at(rows, other[0], n_max, other[1])
        seeds = pair[0].index.intersection(pair[1].index)
        pair = [run.loc[seeds] for run in pair]
        compared.append(pair)
        p_values.append(scipy.stats.ttest_rel(*(run["FD Few"] for run in pair)).pvalue
                        if len(seeds) > 1 else np.nan)
    shown = []
    for (n_max, ours, other), pair, p in zip(make_claims(), compared, common.holm(p_values),
                                             strict=True):
        fd, recall, memorised = (common.difference(*(run[name] for run in pair)) for name in
                                 ("FD Few", "recall Few", "memorised Few"))
        planned = len(make_stages()[str(n_max)].seeds)
        difference = common.interval(*fd[:2], 1) if fd[2] else "–"
        if sign_differs(*pair):
            difference += " (FD2: sign differs)"
        shown.append({
            "claim": f"{ours[0]} below {other[0]}", "n_max": f"{n_max:,}",
            "steps": steps_of(ours, other), "seeds": f"{fd[2]} of {planned}",
            "FD Few, ours": common.spread(pair[0]["FD Few"], 1),
            "FD Few, theirs": common.spread(pair[1]["FD Few"], 1), "difference": difference,
            "Δ recall Few": common.interval(*recall[:2], 3) if fd[2] else "–",
            "Δ memorised Few": common.interval(*memorised[:2], 3) if fd[2] else "–",
            "p, Holm": f"{p:.3f}" if fd[2] > 1 else "–",
            "verdict": verdict(fd, p, recall, memorised)})
    return common.markdown(shown)


def by_seed(rows):
    """The table of the claims' differences seed by seed, and of others that differ much by seed."""
    drawn = [(n_max, *((f"{method}, drawn images", steps) for method, steps in pair))
             for n_max, *pair in make_claims() if n_max == 1000]
    more = [(1000, (ours, 6000), (other, 6000)) for ours, other in (
        ("CM on OC", "OC"), ("CM on CBDM", "CBDM"), ("Overlap", "DDPM"), ("CM", "Overlap"),
        ("CM", "Group-Expert LoRA"))]
    shown = []
    for n_max, ours, other in make_claims() + drawn + more:
        run, base = (at(rows, method, n_max, steps) for method, steps in (ours, other))
        each = {name: (run[name] - base[name]).dropna() for name in ("FD Few", "FD2 Few")}
        if len(each["FD Few"]):
            shown.append({"difference": f"{ours[0]} − {other[0]}", "n_max": f"{n_max:,}",
                          "steps": steps_of(ours, other),
                          "seeds": ", ".join(f"{seed:.0f}" for seed in each["FD Few"].index)}
                         | {name: ", ".join(f"{x:+.1f}" for x in d) for name, d in each.items()}
                         | {"FD Few, mean ± std": common.spread(each["FD Few"], 1, "+")})
    return common.markdown(shown)


# ------------------------------------------------------------------------------------------------
# The map: difference to DDPM over passes


def passes(n_max, steps, options, method):
    """How often a run drew each training image on average: (of all classes, of Few)."""
    flags = f"{options} {METHODS[method].flags} --n-max {n_max:.0f}"
    config = cm.parse(flags.split())[0].resolved()
    counts = np.array(cm.class_counts(config.n_max, config.ir, 10))
    share = counts**config.resample / (counts**config.resample).sum()
    drawn, few = steps * config.batch_size, cm.splits(counts)["Few"]
    return drawn / counts.sum(), drawn * share[few].sum() / counts[few].sum()


def map_points(rows):
    """A table of (n_max, steps, guidance, method) of FOUR with DDPM's: passes, difference, half."""
    found = []
    for (n_max, steps, guidance), part in rows[rows["sampler"] == "ddim"].groupby(
            ["n_max", "steps", "guidance"]):
        plain = part[part["method"] == "DDPM"].set_index("seed")
        for method in FOUR[1:]:
            run = part[part["method"] == method].set_index("seed")
            mean, half, seeds = common.difference(run["FD Few"], plain["FD Few"])
            if seeds:
                everything, few = passes(n_max, steps, part["options"].iloc[0], method)
                found.append(dict(n_max=n_max, steps=steps, guidance=guidance, method=method,
                                  passes=everything, few=few, mean=mean, half=half, seeds=seeds))
    return pd.DataFrame(found)


def map_table(rows):
    """The map's numbers in Markdown."""
    shown = []
    points = map_points(rows)
    for (n_max, steps, guidance), part in points.groupby(["n_max", "steps", "guidance"]
                                                         ) if len(points) else ():
        row = {"n_max": f"{n_max:,.0f}", "steps": f"{steps:,.0f}", "guidance": f"{guidance:g}",
               "passes": f"{part['passes'].iloc[0]:.0f}"}
        few = part.loc[part["method"].str.endswith("RS"), "few"]
        row["of Few with RS"] = f"{few.iloc[0]:.0f}" if len(few) else "–"
        for method in FOUR[1:]:
            of = part[part["method"] == method]
            row[f"{method} − DDPM"] = (common.interval(of["mean"].iloc[0], of["half"].iloc[0], 1)
                                       + f" ({of['seeds'].iloc[0]})" if len(of) else "–")
        shown.append(row)
    return common.markdown(shown)


def draw_map(rows, path):
    """Difference to DDPM in FD Few over passes; a panel a guidance, a line a method and n_max."""
    points = map_points(rows)
    if points.empty:
        return
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    weights = sorted(set(points["guidance"]))
    axes = np.atleast_1d(figure.subplots(1, len(weights), sharey=True))
    style = dict(zip(sorted(set(points["n_max"])), ("o", "s", "^"), strict=False))
    color = dict(zip(FOUR[1:], ("C1", "C0", "C2"), strict=True))
    aside = dict(zip(FOUR[1:], (0.95, 1, 1.05), strict=True))  # RS would hide CM with RS
    for axis, guidance in zip(axes, weights, strict=True):
        part = points[points["guidance"] == guidance]
        for (n_max, method), line in part.groupby(["n_max", "method"]):
            axis.errorbar(aside[method] * line["passes"], line["mean"], line["half"], capsize=3,
                          marker=style[n_max], color=color[method], lw=1,
                          label=f"{method}, n_max {n_max:,.0f}")
        axis.axhline(0, color="k", lw=0.8)
        axis.set(xscale="log", xlabel="passes over the data", title=f"guidance {guidance:g}")
        axis.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
        axis.minorticks_off()
        axis.set_xlim(points["passes"].min() / 1.5, points["passes"].max() * 1.5)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="FD on Few, difference to DDPM\n(below 0: better)")
    lines = {}  # not every line has a point at every guidance
    for axis in axes:
        lines |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    axes[-1].legend(lines.values(), lines, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    common.save(figure, path)


def draw_few(rows, runs, path):
    """The Few classes at the smallest n_max: the first training images, over and over where there
    are fewer, beside what each of FOUR drew; of the first seed whose samples lie in `runs`."""
    n_max = min(ENDS)
    point = Point(ENDS[n_max])
    for seed in at(rows, "DDPM", n_max, point.steps).index.astype(int):
        directories = {m: common.directory_of((m, n_max, seed), runs) for m in FOUR}
        files = {m: samples_of(METHODS[m], where, point) for m, where in directories.items()}
        if all(file.is_file() for file in files.values()):
            checkpoint = directories["DDPM"] / f"checkpoint-{point.steps}.pt"
            config, _, counts = cm.load_trained(checkpoint)
            few = cm.splits(counts)["Few"].tolist()
            common.draw_samples(cm.Data(config), files, few, path, columns=6)
            return


# ------------------------------------------------------------------------------------------------


def table(rows):
    """All tables in Markdown, as text."""
    lines = []
    for title, group in groups(rows):
        for part, kind in ((values, "mean ± standard deviation over seeds"),
                           (differences, "paired differences, mean and 95 % interval over seeds; "
                                         "FD, memorised, loss: below 0 is better")):
            text = part(group)
            lines += [f"{title}: {kind}", "", text, ""] if text else []
    return "\n".join(lines)


def in_brief(run, more):
    """A summary's cells of a run, by seed: the spread of what matters most, and of `more`,
    {measure: digits}."""
    digits = {"FD overall": 1, "FD Few": 1, "recall Few": 2, "accuracy Few": 2, "loss Few": 4}
    return {"seeds": len(run)} | {name: common.spread(run[name], n)
                                  for name, n in (digits | more).items() if name in run}


def gap(run, base, name):
    """A summary's cell: the paired difference of a measure; empty without a pair."""
    mean, half, pairs = common.difference(run[name], base[name])
    return common.interval(mean, half, 1) if pairs else ""


def heart(rows):
    """The README's table: FOUR at the end of training, without guidance."""
    compared = FOUR, tuple(DRAWN)  # with the first of each
    shown = []
    for (n_max, steps), methods in itertools.product(ENDS.items(), compared):
        plain = at(rows, methods[0], n_max, steps)
        for method in methods:
            run = at(rows, method, n_max, steps)
            if len(run):
                difference = gap(run, plain, "FD Few") if method != methods[0] else ""
                shown.append({"n_max": f"{n_max:,}", "method": method}
                             | in_brief(run, {"memorised Few": 2})
                             | {"FD Few − DDPM's": difference})
    return common.markdown(shown)


def others(rows):
    """The table of all stages' other methods, without guidance, beside what each starts from."""
    shown = []
    for stage in make_stages().values():
        for method in (m for m in stage.methods if m not in (*FOUR, *DRAWN)):
            spec, steps = spec_of(method), stage.points[0].steps
            start = spec.base if spec.base != method else ""
            run = at(rows, method, stage.n_max, steps)
            base = at(rows, start, stage.n_max, spec.tunes or steps)
            if len(run):
                shown.append({"n_max": f"{stage.n_max:,}", "steps": f"{steps:,}", "method": method}
                             | in_brief(run, {"FD Many": 1, "d Many": 4, "d Few": 4})
                             | {"base": start} | {f"{name} − base's": gap(run, base, name)
                                                  for name in ("FD Few", "FD2 Few")})
    return common.markdown(shown)


def main(argv=None):
    parser = common.parser("study", __doc__)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument("--stage", choices=list(make_stages()), nargs="+",
                        default=[name for name in make_stages() if name != "6000"],
                        help="[default: all but 6000: it takes --dataset fashion]")
    parser.add_argument("--summary", action="store_true", help="with --table: the README's tables")
    parser.add_argument("--jobs", type=int, default=cores, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"),
                        help="where run directories lie; outside the work tree they outlive it")
    parser.add_argument("--num-images", type=int, default=5000, help="generated images a point")
    args, flags = parser.parse_known_args(argv)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
        status = 0
        if args.table and flags:
            raise ValueError(f"{flags[0]} has no meaning beside --table")
        if not args.table:
            status = study(args.stage, args.rows, args.runs, flags, args.jobs, args.num_images)
        rows = common.numbers(common.read_table(args.rows), WORDS)
        caveat = CAVEATS.get(args.rows.name, "")
        if caveat:
            print(caveat + "\n")
        else:
            draw_map(rows, args.assets / f"{args.rows.stem}_map.png")
            draw_few(rows, args.runs, args.assets / f"{args.rows.stem}_few.png")
        if not args.summary:
            print(table(rows))
        elif caveat:
            print(heart(rows))  # the claims are the second study's
        else:
            print("\n\n".join([heart(rows), "The claims", claims(rows),
                               "The claims, seed by seed; the same on drawn images; others",
                               by_seed(rows),
                               "The paper's other methods, and controls",
                               others(rows),
                               "The map: difference to DDPM in FD Few (seeds)", map_table(rows)]))
        return status
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
