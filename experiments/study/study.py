"""What the authors' CM does, where, and by which part of it: arms x seeds in two settings.

    python -m experiments.study                      # every stage, what has no row yet
    python -m experiments.study --stage question     # one stage (make_stages has them)
    python -m experiments.study --table              # verdicts, tables and pictures of the rows

Options that aren't its own go to every run of cm.py. A run has a process of its own, on a CPU of one
thread, and a directory of its own in --runs. A killed run goes on from its last checkpoint; what
has its row is never run again.

A row is a run (setting, arm, seed), sampled with one network (theta, or theta_g without BA) and one
guidance. FD, precision, recall and accuracy are of fid.py's classifier, against the whole balanced
training set; FD2 is of a second classifier, trained with another seed. memorised Few: the share of
generated Few images that lie much nearer to one training image than to any other; memorised real:
the same share of held-out images. loss and d: held out, without dropout. above fuse: of the training
samples with w < 0, the share whose d, with dropout, was above the fuse; of a split: in each tenth
of the training.
"""

import argparse
import contextlib
import fcntl
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

import cm
import fid
from experiments import baselines, common
from experiments.baselines import BASELINES, Variation

HERE = Path(__file__).parent

# ------------------------------------------------------------------------------------------------
# What is compared: fixed before the runs

SHARED = "--dataset fashion16 --base ddpm --dropout 0.1 --lr 3e-3 --warmup 100 --steps 6000"
SETTINGS = {  # is the network large for its data, or small?
    "large": f"{SHARED} --image-size 8 --channels 32 --n-max 200",
    "small": f"{SHARED} --image-size 16 --channels 16 --n-max 1000"}

ARMS = {
    "DDPM": Variation("--no-cm"),
    "CM": Variation(""),
    "agreement alone": BASELINES["agreement alone"],
    "capacity alone": Variation("--same-masks"),
    "DDPM, two passes": BASELINES["DDPM, two passes"],
    "RS": Variation("--no-cm --resample 0.5"),
    "CM with RS": Variation("--resample 0.5"),
    "capacity alone with RS": Variation("--same-masks --resample 0.5"),
    "uniform w": BASELINES["uniform w"],
    "uniform w, no BA": BASELINES["uniform w, no BA"],  # R-Drop proper
    "BA alone": Variation("--lam 0"),
    "only L_Con": Variation("--w-div 0"),
    "as printed": Variation("--w-div 1"),
    "no fuse": Variation("--div-margin inf"),  # the authors' form
    "our earlier CM": Variation("--same-masks --w-div 1 --div-margin 0.003"),
    "OC": Variation("--no-cm --base oc"),
    "CM on OC": Variation("--base oc"),
    "capacity alone on OC": Variation("--same-masks --base oc"),
    "CBDM": Variation("--no-cm --base cbdm"),
    "CM on CBDM": Variation("--base cbdm"),
    "Focal": Variation("--no-cm --base focal"),
    "ADA": BASELINES["ADA"],
    "Group-Expert LoRA": BASELINES["Group-Expert LoRA"],
    "Overlap": BASELINES["Overlap"],
    "DDPM, dropout 0": Variation("--no-cm --dropout 0"),
    "CM, dropout 0": Variation("--dropout 0"),
    "DDPM, dropout 0.3": Variation("--no-cm --dropout 0.3"),
    "CM, dropout 0.3": Variation("--dropout 0.3"),
}


class Run(NamedTuple):
    """One training."""

    setting: str
    arm: str
    seed: int


class Point(NamedTuple):
    """How a run is sampled: network θ, or θ_g without BA."""

    network: str
    guidance: float


class Stage(NamedTuple):
    """Runs of a setting; points: {arm: [Point]}."""

    setting: str
    seeds: range
    points: dict


def make_stages():
    """{name: Stage}, in the order in which they are run, each seed by seed."""
    both = [Point("θ", 0.0), Point("θ", 1.5)]
    more = [Point("θ", guidance) for guidance in (0.5, 1.0, 3.0)]
    general = [Point("θ_g", 0.0), Point("θ_g", 1.5)]
    names = list(ARMS)
    parts = dict(question=names[:5], balance=names[5:10], parts=names[10:18], paper=names[18:])
    seeds = dict(question=range(20, 30), balance=range(20, 25), parts=range(20, 25),
                 paper=range(20, 23))
    stages = {name: Stage("large", seeds[name], dict.fromkeys(arms, both))
              for name, arms in parts.items()}
    stages["guidance"] = Stage("large", range(20, 30), {"DDPM": more, "CM": general + more})
    stages["small"] = Stage("small", range(20, 25), dict.fromkeys(
        [*names[:4], "RS", "CM with RS"], both))
    return stages


class Claim(NamedTuple):
    """FD Few of `ours` is below that of `theirs`, or, where not `below`, differs from it."""

    ours: str
    theirs: str
    setting: str = "large"
    guidance: float = 0.0
    below: bool = True


PRIMARY = {1: Claim("CM", "DDPM"), 2: Claim("agreement alone", "DDPM"),
           3: Claim("capacity alone", "DDPM"), 4: Claim("capacity alone", "CM", below=False)}
SECONDARY = {5: Claim("CM", "DDPM", guidance=1.5), 6: Claim("CM", "DDPM, two passes"),
             7: Claim("CM", "uniform w"), 8: Claim("CM with RS", "RS"),
             9: Claim("CM", "DDPM", "small"), 10: Claim("CM with RS", "RS", "small")}

KEY = ["setting", "arm", "seed", "network", "guidance"]
SPLITS = ("overall", "Many", "Medium", "Few")
SCORES = ("FD", "precision", "recall", "accuracy", "FD2")
WORDS = ("setting", "arm", "network", "status", "device", "options", "commit",
         *(f"above fuse {split}" for split in SPLITS[1:]))


# ------------------------------------------------------------------------------------------------
# One run: train, sample, score


class Counted:
    """Mixed into a loss module: counts the training's samples, those with w < 0, and those of them
    whose d is above the fuse, or above the default fuse where there is none, in `with_tally`."""

    @classmethod
    def from_config(cls, unet, counts, config):
        module = super().from_config(unet, counts, config)
        module.planned = config.steps * config.batch_size
        module.fuse = min(config.div_margin, 0.1)
        return module

    def forward(self, x0, y, t, eps, y_in):
        losses = super().forward(x0, y, t, eps, y_in)
        tally = self.unet.tally
        tenth = 10 * tally[:, :, 0].sum() // self.planned
        negative = self.w[y] < 0
        above = negative & (losses[3] > self.fuse)
        tally[tenth].index_add_(0, y, torch.stack([torch.ones_like(y), negative, above], 1))
        return losses


def with_tally(network):
    """`network` with Counted's numbers, by tenth of the training and class, as a buffer [10, C, 3],
    so that checkpoints keep them."""
    @functools.wraps(network)
    def made(config, num_classes, image_channels):
        unet = network(config, num_classes, image_channels)
        unet.register_buffer("tally", torch.zeros(10, num_classes, 3, dtype=torch.long))
        return unet

    return made


def measure(run, points, flags, runs, num_images, commit):
    """Train, sample and score a run: a row for each of `points`; None where a signal stopped it.

    In a process of its own; what it prints goes to the run's directory."""
    directory = runs / re.sub(r"\W+", "-", f"{run.setting}-{run.arm}-{run.seed}")
    directory.mkdir(parents=True, exist_ok=True)
    with (locked(directory / "lock"), open(directory / "output.txt", "a", buffering=1) as output,
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)):
        start = time.monotonic()
        try:
            status = train(run, flags, directory)
        except SystemExit as e:
            if e.code < 128:  # not a signal
                raise
            return None
        row = run._asdict() | dict(status=status or "finished", device=device_name(),
                                   options=recorded(run, flags, num_images), commit=commit)
        if status:
            return [row | point._asdict() for point in points]
        marks = [time.monotonic()]
        files = {point: sample(run, point, directory, num_images) for point in points}
        marks.append(time.monotonic())
        rows = score(row, files, directory, runs / "references")
        marks.append(time.monotonic())
        print("seconds to train, sample, score:",
              *(f"{b - a:.0f}" for a, b in zip([start, *marks], marks, strict=False)))
        return rows


@contextlib.contextmanager
def locked(path):
    """Inside, no other process is: a killed study may have left a run's process behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_of(run):
    """What `cm.train` and `cm.generate` take besides options."""
    _, losses, network = ARMS[run.arm]
    counted = type(f"Counted{losses.__name__}", (Counted, losses), {})
    return dict(losses=counted, network=with_tally(network))


def options_of(run, flags):
    """A run's options for cm.py: its setting's, those typed, its arm's, its seeds: each seed draws
    its own images of the data set, too."""
    seed = str(run.seed)
    return [*SETTINGS[run.setting].split(), *flags, *ARMS[run.arm].flags.split(),
            "--seed", seed, "--subset-seed", seed]


def recorded(run, flags, num_images):
    """The column options: what the runs of an arm share; of one given twice the last counts."""
    options = " ".join([*options_of(run, flags), "--num-images", str(num_images)])
    last = {option.split(" ")[0]: option for option in re.split(" (?=--)", options)}
    return common.settings(last.values(), ("--seed", "--subset-seed", "--data", "--device"))


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread"


def train(run, flags, directory):
    """Train a run, or go on; "", or at which step it ran off. Raises as `common.run` does."""
    return common.run(options_of(run, flags), directory / "run", **made_of(run))


def sample(run, point, directory, num_images):
    """Path of a trained run's samples; drawn where they are lacking. Arms of a seed start from the
    same noise. Raises ValueError where samples of another number lie there."""
    path = directory / f"samples-{point.network}-g{point.guidance:g}.npz"
    if not path.is_file():
        argv = ["--sample", str(directory / "run" / "checkpoint.pt"), "--out", str(path),
                "--num-images", str(num_images), "--seed", str(run.seed),
                "--guidance", str(point.guidance)]
        config, _ = cm.parse(argv + ["--general-only"] * (point.network == "θ_g"))
        cm.generate(config, **made_of(run))
    return path


def score(row, files, directory, cache):
    """A row for each of the samples `files`, {Point: path}: `row` and all that is measured."""
    run = Run(row["setting"], row["arm"], row["seed"])
    checkpoint = directory / "run" / "checkpoint.pt"
    config, ema, counts = cm.load_trained(checkpoint, **made_of(run))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, ema = cm.Data(config, device), ema.to(device)
    splits = cm.splits(counts)
    losses = cm.held_out_loss(ema, data.held_out, data.held_out_labels, len(counts), 200, 10)
    tally = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]["tally"]
    few = torch.as_tensor(splits["Few"])
    held_out_few = data.held_out[torch.isin(data.held_out_labels.cpu(), few)]
    row = row | {"memorised real": memorised(held_out_few, data.images)}
    row |= {f"d {split}": float(losses[2][k].nanmean()) for split, k in splits.items()}
    row |= {} if config.no_cm else above_fuse(tally, splits)

    rows = []
    for point, path in files.items():
        images, labels, _ = fid.read_images(path)
        drawn = int(re.search(r"--num-images (\d+)", row["options"])[1])
        if len(images) != drawn:
            raise ValueError(f"{path} holds {len(images)} images, not {drawn}; name another "
                             "directory with --runs")
        new = row | point._asdict() | {"steps": config.steps, "images": len(images)}
        new |= scores(images, labels, splits, config, cache, device)
        for split, k in splits.items():
            new[f"loss {split}"] = float(losses[point.network == "θ_g"][k].nanmean())
        new["memorised Few"] = memorised(images[torch.isin(labels, few)].to(device), data.images)
        rows.append(new)
    return rows


def above_fuse(tally, splits):
    """Of the samples with w < 0 the share above the fuse, from `Counted`'s [10, C, 3]: of the whole
    training, and for each split a text with that of each tenth; nan where none was drawn."""
    negative, above = tally[..., 1].double(), tally[..., 2].double()
    row = {"above fuse": float(above.sum() / negative.sum())}
    for split, classes in splits.items():
        shares = above[:, classes].sum(1) / negative[:, classes].sum(1)
        row[f"above fuse {split}"] = " ".join(f"{share:.3g}" for share in shares)
    return row


def scores(images, labels, splits, config, cache, device):
    """FD, precision, recall, accuracy and FD2 of images [N, C, H, W], overall and by split."""
    row, groups = {}, {"overall": np.concatenate(list(splits.values()))} | splits
    net, real, radii = reference(config, groups, 0, cache, device)
    net2, real2, _ = reference(config, groups, 1, cache, device)
    features, logits = fid.extract(net, images, "generated images")
    features2, _ = fid.extract(net2, images, "generated images")
    right = logits.argmax(1).cpu() == labels
    for group, classes in groups.items():
        ours = torch.isin(labels, torch.as_tensor(classes))
        row[f"FD {group}"] = fid.frechet_distance(real[group], features[ours])
        row[f"precision {group}"], row[f"recall {group}"] = fid.precision_recall(
            real[group], features[ours], real_radii=radii[group])
        row[f"accuracy {group}"] = float(right[ours].double().mean())
        row[f"FD2 {group}"] = fid.frechet_distance(real2[group], features2[ours])
    return row


def reference(config, groups, seed, cache, device):
    """A classifier as fid.py trains it (seed 0: the same one), and the balanced training set's
    features and radii under it, each {group: tensor}; made once, then kept in `cache`."""
    real, labels, classes, _ = fid.real_set(config.dataset, config.data, None, config.image_size)

    def make():
        held, held_labels, _ = cm.load_dataset(config.dataset, config.data, config.image_size,
                                               train=False)
        net, accuracy = fid.train_classifier(real, labels, fid.chw(held),
                                             torch.from_numpy(held_labels), classes, device,
                                             seed=seed)
        print(f"classifier {seed} recognises {100 * accuracy:.1f} % of held-out images")
        features = fid.extract(net, real, "real images")[0].cpu()
        of_group = {group: features[torch.isin(labels, torch.as_tensor(k))]
                    for group, k in groups.items()}
        radii = {group: fid.manifold_radii(part) for group, part in of_group.items()}
        return dict(weights=net.cpu().state_dict(), features=of_group, radii=radii)

    key = [real.numpy().tobytes(), tuple(real.shape), seed,
           {group: list(map(int, k)) for group, k in groups.items()}]
    with locked(cache / "lock"):
        state = fid.cached(cache, "reference", key, make)
    net = fid.Classifier(real.shape[1], classes).eval().requires_grad_(False)
    net.load_state_dict(state["weights"])
    return net.to(device), *({group: part.to(device) for group, part in state[name].items()}
                             for name in ("features", "radii"))


def memorised(images, training):
    """The share of `images` whose distance to the nearest training image is below a third of that
    to the second nearest (Yoon et al. 2023). uint8 [N, C, H, W] and [M, C, H, W]."""
    training = training.flatten(1).double()
    nearest = torch.cat([torch.cdist(part.flatten(1).double(), training)
                        .topk(2, largest=False).values for part in images.split(500)])
    return float((nearest[:, 0] < nearest[:, 1] / 3).double().mean())


@functools.cache
def flops(setting, arm):
    """FLOPs of one training step, forward and backward, in the setting's own network."""
    config = cm.parse(options_of(Run(setting, arm, 0), []))[0].resolved()
    counts = cm.class_counts(config.n_max, config.ir, 10)
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        unet = ARMS[arm].network(config, len(counts), 1)
        losses = ARMS[arm].losses.from_config(unet, torch.tensor(counts), config)
        x = torch.zeros(config.batch_size, 1, config.image_size, config.image_size)
        t = torch.zeros(config.batch_size, dtype=torch.long)
        losses(x, t, t, x, t)[0].backward()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------
# All runs


def missing_points(stages, rows):
    """[(Run, [Point])] of the stages without a row, in order."""
    done = set(rows[KEY].itertuples(index=False, name=None)) if len(rows) else set()
    missing = []
    for stage in stages:
        for seed in stage.seeds:
            for arm, points in stage.points.items():
                run = Run(stage.setting, arm, seed)
                left = [p for p in points if key_of(run, p) not in done]
                if left:
                    missing.append((run, left))
    return missing


def key_of(run, point):
    """The columns KEY of a row, as text."""
    return tuple(common.text([run._asdict() | point._asdict()])[KEY].iloc[0])


def check_options(path, rows, flags, num_images):
    """Raises ValueError where rows of a file were made with other options than a run's now."""
    for (setting, arm), part in rows.groupby(["setting", "arm"]) if len(rows) else ():
        options = recorded(Run(setting, arm, 0), flags, num_images)
        others = part.loc[part["options"] != options, "options"]
        if len(others):
            raise ValueError(f"{path} was made with other options ({others.iloc[0]}); name another "
                             "file with --rows")


def commit_here():
    """The commit of the work tree, with "-dirty" where it has been changed; "" without git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def study(names, path, runs, flags, jobs, num_images):
    """Run what has no row yet, `jobs` at a time. 0, or 1 where runs were stopped. Raises ValueError
    on bad options."""
    stages = [make_stages()[name] for name in names]
    cm.parse(options_of(Run("large", "CM", 0), flags))[0].resolved()  # for its checks
    rows = common.read_rows(path)
    check_options(path, rows, flags, num_images)
    missing = missing_points(stages, rows)
    total = sum(len(points) for _, points in missing_points(stages, rows[:0]))
    to_do = sum(len(points) for _, points in missing)
    print(f"{total - to_do} rows are there, {to_do} to come of {len(missing)} runs", flush=True)
    if not torch.cuda.is_available():  # for the processes to come:
        os.environ["OMP_NUM_THREADS"] = "1"  # results repeat only with the same number of threads
    stopped, commit = False, commit_here()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool:
        tasks = {pool.submit(measure, run, points, flags, runs, num_images, commit): run
                 for run, points in missing}
        try:
            for task in as_completed(tasks):
                new = task.result()
                if new is None:
                    stopped = True
                    continue
                with locked(path.with_suffix(".lock")):
                    rows = common.replace_rows(common.read_rows(path), common.text(new), KEY)
                    common.write_rows(path, in_order(rows))
                run, row = tasks[task], new[0]
                print(f"{time.strftime('%H:%M')}  {run.setting}, {run.arm}, seed {run.seed}: "
                      f"{row['status']}, FD Few {row.get('FD Few', np.nan):.4g}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return int(stopped)


def in_order(rows):
    """Rows by setting, then as ARMS has them, then by seed, network and guidance."""
    place = pd.DataFrame({"setting": rows["setting"], "arm": rows["arm"].map(list(ARMS).index),
                          "seed": rows["seed"].astype(int), "network": rows["network"],
                          "guidance": rows["guidance"].astype(float)})
    return rows.loc[place.sort_values(KEY, kind="stable").index].reset_index(drop=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="study", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cm.fail
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument("--stage", choices=list(make_stages()), nargs="+",
                        default=list(make_stages()))
    parser.add_argument("--jobs", type=int, default=cores, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"),
                        help="where run directories lie; outside the work tree they outlive it")
    parser.add_argument("--num-images", type=int, default=2500, help="generated images a row")
    parser.add_argument("--rows", type=Path, default=HERE / "rows.csv", help="where the rows lie")
    args, flags = parser.parse_known_args(argv)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
        return study(args.stage, args.rows, args.runs, flags, args.jobs, args.num_images)
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
