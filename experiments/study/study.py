"""The study's arms, settings, stages and claims, fixed before the runs; a run; all runs."""

import contextlib
import fcntl
import multiprocessing
import os
import re
import subprocess
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

import cm
import fid
from experiments import baselines, common
from experiments.baselines import BASELINES, Variation

# ------------------------------------------------------------------------------------------------
# What is compared: fixed before the runs

SHARED = "--dataset fashion16 --base ddpm --dropout 0.1 --lr 3e-3 --warmup 100 --steps 6000"
SETTINGS = {  # is the network large for its data, or small?
    "large": f"{SHARED} --image-size 8 --channels 32 --n-max 200",
    "small": f"{SHARED} --image-size 16 --channels 16 --n-max 1000"}

QUESTION = {
    "DDPM": Variation("--no-cm"),
    "CM": Variation(""),
    "agreement alone": BASELINES["agreement alone"],
    "capacity alone": Variation("--same-masks"),
    "DDPM, two passes": BASELINES["DDPM, two passes"]}
BALANCE = {
    "RS": Variation("--no-cm --resample 0.5"),
    "CM with RS": Variation("--resample 0.5"),
    "capacity alone with RS": Variation("--same-masks --resample 0.5"),
    "uniform w": BASELINES["uniform w"],
    "uniform w, no BA": BASELINES["uniform w, no BA"]}  # R-Drop proper
PARTS = {
    "BA alone": Variation("--lam 0"),
    "only L_Con": Variation("--w-div 0"),
    "as printed": Variation("--w-div 1"),
    "no fuse": Variation("--div-margin inf"),  # the authors' form
    "our earlier CM": Variation("--same-masks --w-div 1 --div-margin 0.003"),
    "OC": Variation("--no-cm --base oc"),
    "CM on OC": Variation("--base oc"),
    "capacity alone on OC": Variation("--same-masks --base oc")}
PAPER = {
    "CBDM": Variation("--no-cm --base cbdm"),
    "CM on CBDM": Variation("--base cbdm"),
    "Focal": Variation("--no-cm --base focal"),
    "ADA": BASELINES["ADA"],
    "Group-Expert LoRA": BASELINES["Group-Expert LoRA"],
    "Overlap": BASELINES["Overlap"],
    "DDPM, dropout 0": Variation("--no-cm --dropout 0"),
    "CM, dropout 0": Variation("--dropout 0"),
    "DDPM, dropout 0.3": Variation("--no-cm --dropout 0.3"),
    "CM, dropout 0.3": Variation("--dropout 0.3")}
ARMS = {arm: Variation(flags, baselines.counted(losses), baselines.with_tally(network))
        for arm, (flags, losses, network) in (QUESTION | BALANCE | PARTS | PAPER).items()}

Run = namedtuple("Run", "setting arm seed")  # one training
Point = namedtuple("Point", "network guidance")  # how it is sampled: θ, or θ_g without BA
Stage = namedtuple("Stage", "setting seeds points")  # points: {arm: [Point]}

BOTH = [Point("θ", 0.0), Point("θ", 1.5)]
MORE = [Point("θ", 0.5), Point("θ", 1.0), Point("θ", 3.0)]
STAGES = {  # in the order in which they are run, each seed by seed
    "question": Stage("large", range(20, 30), dict.fromkeys(QUESTION, BOTH)),
    "balance": Stage("large", range(20, 25), dict.fromkeys(BALANCE, BOTH)),
    "parts": Stage("large", range(20, 25), dict.fromkeys(PARTS, BOTH)),
    "paper": Stage("large", range(20, 23), dict.fromkeys(PAPER, BOTH)),
    "guidance": Stage("large", range(20, 30), {
        "DDPM": MORE, "CM": [Point("θ_g", 0.0), Point("θ_g", 1.5), *MORE]}),
    "small": Stage("small", range(20, 25), dict.fromkeys(
        ("DDPM", "CM", "agreement alone", "capacity alone", "RS", "CM with RS"), BOTH))}

# FD Few of `ours` is below that of `theirs` or, where not `below`, differs from it
Claim = namedtuple("Claim", "ours theirs setting guidance below", defaults=("large", 0.0, True))
PRIMARY = {1: Claim("CM", "DDPM"), 2: Claim("agreement alone", "DDPM"),
           3: Claim("capacity alone", "DDPM"), 4: Claim("capacity alone", "CM", below=False)}
SECONDARY = {5: Claim("CM", "DDPM", guidance=1.5), 6: Claim("CM", "DDPM, two passes"),
             7: Claim("CM", "uniform w"), 8: Claim("CM with RS", "RS"),
             9: Claim("CM", "DDPM", "small"), 10: Claim("CM with RS", "RS", "small")}

KEY = ["setting", "arm", "seed", "network", "guidance"]
WORDS = ("setting", "arm", "network", "status", "device", "options", "commit",
         "above fuse Many", "above fuse Medium", "above fuse Few")


# ------------------------------------------------------------------------------------------------
# One run: train, sample, score


def measure(run, points, flags, runs, num_images, commit):
    """Train, sample and score a run, in a process that prints into its directory: a row a point."""
    directory = runs / re.sub(r"\W+", "-", f"{run.setting}-{run.arm}-{run.seed}")
    directory.mkdir(parents=True, exist_ok=True)
    with (open(directory / "lock", "w") as lock,
          open(directory / "output.txt", "a", buffering=1) as output,
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)):
        fcntl.flock(lock, fcntl.LOCK_EX)  # another stage, or a killed study's process, may be here
        status = common.run(options_of(run, flags), directory / "run",
                            losses=ARMS[run.arm].losses, network=ARMS[run.arm].network)
        device = (torch.cuda.get_device_name() if torch.cuda.is_available() else
                  f"CPU, {torch.get_num_threads()} thread")
        row = run._asdict() | dict(status=status or "finished", device=device, commit=commit,
                                   options=recorded(run, flags, num_images))
        if status:
            return [row | point._asdict() for point in points]
        return score(run, row, points, directory, num_images)


def options_of(run, flags=()):
    """A run's options for cm.py. Each seed draws its own images of the data set, too."""
    seed = str(run.seed)
    return [*SETTINGS[run.setting].split(), *flags, *ARMS[run.arm].flags.split(),
            "--seed", seed, "--subset-seed", seed]


def recorded(run, flags, num_images):
    """The column options: what the runs of an arm share; of one given twice the last counts."""
    options = " ".join([*options_of(run, flags), "--num-images", str(num_images)])
    last = {option.split(" ")[0]: option for option in re.split(" (?=--)", options)}
    return common.settings(last.values(), ("--seed", "--subset-seed", "--data", "--device"))


def sample(run, point, directory, num_images):
    """Path of a trained run's samples. Arms of a seed start from the same noise."""
    path = directory / f"{num_images}-samples-{point.network}-g{point.guidance:g}.npz"
    if not path.is_file():
        how = f"--num-images {num_images} --seed {run.seed} --guidance {point.guidance}".split()
        config, _ = cm.parse(["--sample", str(directory / "run" / "checkpoint.pt"), "--out",
                              str(path), *how, *["--general-only"] * (point.network == "θ_g")])
        cm.generate(config, ARMS[run.arm].network)
    return path


def score(run, row, points, directory, num_images):
    """Sample a trained run at `points`: for each `row` and all that is measured."""
    checkpoint = directory / "run" / "checkpoint.pt"
    config, ema, counts = cm.load_trained(checkpoint, network=ARMS[run.arm].network)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, splits = cm.Data(config, device), cm.splits(counts)
    few = torch.as_tensor(splits["Few"], device=device)
    *losses, d = cm.held_out_loss(ema.to(device), data.held_out, data.held_out_labels, len(counts),
                                  200, 10)
    row = row | {"memorised real": memorised(
        data.held_out[torch.isin(data.held_out_labels, few)], data.images)}
    row |= {f"d {split}": float(d[k].nanmean()) for split, k in splits.items()}
    if not config.no_cm:
        tally = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]["tally"]
        row |= baselines.above_fuse(tally, splits)

    rows = []
    for point in points:
        rows.append(row | point._asdict())
        try:
            path = sample(run, point, directory, num_images)
        except FloatingPointError:
            rows[-1]["status"] = "images not finite"
            continue
        images, labels, _ = fid.read_images(path)
        rows[-1] |= {"steps": config.steps, "images": len(images)}
        rows[-1] |= scores(images, labels, splits, config, directory.parent / "references", device)
        for split, k in splits.items():
            rows[-1][f"loss {split}"] = float(losses[point.network == "θ_g"][k].nanmean())
        rows[-1]["memorised Few"] = memorised(images[torch.isin(labels, few.cpu())].to(device),
                                              data.images)
    return rows


def scores(images, labels, splits, config, cache, device):
    """FD, precision, recall and accuracy of images [N, C, H, W], overall and by split, in the
    features of a classifier as fid.py trains it; FD2 of another."""
    (real, real_labels), held_out = (
        cm.on_device(*cm.load_dataset(config.dataset, config.data, config.image_size, train)[:2],
                     "cpu") for train in (True, False))
    row, everything = {}, np.concatenate(list(splits.values()))
    for seed, kind in enumerate(("FD", "FD2")):
        net = common.judge(real, real_labels, held_out, len(everything), device, cache, seed)
        theirs = fid.extract(net, real, "real images")[0]
        ours, logits = fid.extract(net, images, "generated images")
        for group, classes in {"overall": everything, **splits}.items():
            r, g = (torch.isin(y, torch.as_tensor(classes)) for y in (real_labels, labels))
            row[f"{kind} {group}"] = fid.frechet_distance(theirs[r], ours[g])
            if kind == "FD":
                row[f"precision {group}"], row[f"recall {group}"] = fid.precision_recall(
                    theirs[r], ours[g])
                right = logits[g].argmax(1).cpu() == labels[g]
                row[f"accuracy {group}"] = float(right.double().mean())
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


def missing_points(stages, rows):
    """[(Run, [Point])] of the stages without a row, in order."""
    done = set(rows[KEY].itertuples(index=False, name=None)) if len(rows) else set()
    runs = [(Run(stage.setting, arm, seed), points) for stage in stages for seed in stage.seeds
            for arm, points in stage.points.items()]
    return [(run, left) for run, points in runs if (left := [
        p for p in points if (*map(str, run), p.network, f"{p.guidance:g}") not in done])]


def study(names, path, runs, flags, jobs, num_images):
    """Run what has no row yet, `jobs` at a time. Raises ValueError on bad options."""
    cm.parse(options_of(Run("large", "CM", 0), flags))[0].resolved()  # for its checks
    rows = common.read_rows(path)
    for (setting, arm), part in rows.groupby(["setting", "arm"]) if len(rows) else ():
        options = recorded(Run(setting, arm, 0), flags, num_images)
        if set(part["options"]) != {options}:
            raise ValueError(f"{path} has rows of {arm} that were made with other options than "
                             f"{options}; name another file with --rows")
    missing = missing_points([STAGES[name] for name in names], rows)
    print(f"{len(missing)} runs to come", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # results repeat only with the same number of threads
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    with ProcessPoolExecutor(jobs, max_tasks_per_child=1) as pool:  # spawned, each for one run
        try:
            tasks = [pool.submit(measure, run, points, flags, runs, num_images, commit)
                     for run, points in missing]
            for task in as_completed(tasks):
                new = task.result()
                rows = common.replace_rows(common.read_rows(path), common.text(new), KEY)
                common.write_rows(path, rows)
                print(*(new[0][name] for name in (*KEY[:3], "status")), flush=True)
        except BaseException:
            for process in multiprocessing.active_children():  # they go on from their checkpoints
                process.terminate()
            raise
