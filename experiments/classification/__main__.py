"""Does CM help beyond diffusion? Long-tailed classification, as in Tab. G.13.

    python -m experiments.classification            # what has no row yet
    python -m experiments.classification --table    # only the tables
    python -m experiments.classification --dataset cifar100 --epochs 200 --rows cifar100.csv
                                                    # the paper's setting: 45 trainings on a GPU

Cross-entropy (CE), LDAM and logit adjustment (LA), each plain and with CM, whose loss here is the
authors' code's (see `losses` in classifiers.py) and, beside it, the same with their diffusion
models' w_div. Columns: accuracy, of theta, and general, of theta_g. cm.py's options for data
(--dataset, --ir, --n-max, ...) have their meaning here.
"""

import math
import re

import numpy as np

import cm
from experiments import common
from experiments.classification import classifiers

METHODS = {"plain": None, "CM": 1.0, "CM, w_div 0.2": 0.2}  # name: w_div
SPLITS = ("Many", "Medium", "Few", "overall")
UNUSED = "resample", "flip", "network", "method", "training", "run", "sampling"  # cm.py's options
PAPER = {  # Tab. G.13, CIFAR-100, IR 100: points on Many, Medium, Few and overall
    "LDAM + CM − LDAM": "+0.63 +3.37 +2.67 +2.20", "LA + CM − LA": "+3.69 +1.14 +0.27 +1.78",
    "LDAM − CE": "-8.37 +1.03 +12.37 +1.14", "LA − CE": "-12.23 +5.26 +16.80 +2.60"}


def measure(config, data, args, options, base, method, seed):
    """A row: train, or go on, and test. Its "status" says where a training ran off."""
    w_div, steps = METHODS[method], math.ceil(args.epochs * len(data.labels) / classifiers.BATCH)
    try:
        net = classifiers.fit(config.dataset, data, data.counts, base, seed, steps,
                              args.runs / f"{base}-{method}-{seed}.pt", options, w_div)
    except FloatingPointError as e:
        return [{"status": re.search(r"not finite at step \d+", str(e))[0]}]
    counts = data.counts.cpu()
    groups = by_shots(counts) if config.dataset == "cifar100" else cm.splits(counts)
    row = {"status": "finished"} | accuracies(cm.merge(net), data, groups, "accuracy")
    if w_div is not None:
        row |= accuracies(classifiers.general(net, data.images), data, groups, "general")
    return [row]


def by_shots(counts):
    """Tab. G.13's groups, {"Many": classes of more than 100 training images, "Medium": of 20 to
    100, "Few": of fewer}: weighted by their sizes, its three columns give its overall one."""
    group = np.digitize(counts, [20, 101])
    return {name: np.flatnonzero(group == 2 - i) for i, name in enumerate(SPLITS[:3])}


def accuracies(net, data, groups, kind):
    """{"accuracy Few": ...} of a plain network, of each group of classes, and overall: means over
    the classes. kind: "accuracy" or, of theta_g, "general"."""
    found = classifiers.confusion(net, data)
    recalls = found.diag() / found.sum(1)
    return {f"{kind} {name}": recalls[k].mean().item()
            for name, k in (groups | {"overall": range(len(found))}).items()}


# ------------------------------------------------------------------------------------------------
# Tables


def by_method(rows):
    """{"LA": its rows by seed, "LA + CM": ...}, accuracies in %, in order."""
    if "part" in rows:  # of f7283d9: its others chose the form of L_CM, on validation images
        rows = rows[rows["part"] == "test"].drop(columns=["part", "outputs"])
    rows = common.numbers(rows, ("base", "method", "status", "options")).set_index("seed")
    columns = [f"{kind} {s}" for kind in ("accuracy", "general") for s in SPLITS]
    percent = 100 * rows.reindex(columns=columns)
    names = rows["base"] + rows["method"].map(lambda m: "" if m == "plain" else f" + {m}")
    return {name: percent[names == name] for name in names.unique()}


def table(runs):
    """The tables in Markdown."""
    values = [{"method": name, "seeds": run["accuracy overall"].count()} | {
        s: common.spread(run[f"accuracy {s}"], 2) for s in SPLITS} | {
        f"θ_g {s}": common.spread(run[f"general {s}"], 2) for s in ("Few", "overall")}
        for name, run in runs.items()]
    pairs = [(name, name.split(" + ")[0]) for name in runs if " + " in name]
    differences = []
    for ours, theirs in [*pairs, ("LDAM", "CE"), ("LA", "CE")]:
        if {ours, theirs} <= set(runs):
            name, a, b = f"{ours} − {theirs}", runs[ours], runs[theirs]
            differences.append({"difference": name, "of": "here"} | {
                s: common.difference(a[f"accuracy {s}"], b[f"accuracy {s}"]) for s in SPLITS})
            if name in PAPER:
                differences.append({"difference": "", "of": "the paper, IR 100"} | dict(
                    zip(SPLITS, PAPER[name].split(), strict=True)))
    return "\n\n".join([
        "Accuracy on the test set, %: mean ± standard deviation over seeds",
        common.markdown(values),
        "Differences, points, paired by seed: mean and 95 % interval (the paper: CIFAR-100)",
        common.markdown(differences)])


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=range(10, 15))
    parser.add_argument("--epochs", type=int, default=60, help="[default: 60]")
    args, flags = parser.parse_known_args(argv)
    flags, config, _ = common.configured(flags, UNUSED, used=("image_size", "device"))
    if not args.table:
        options = f"{common.settings(flags)} --epochs {args.epochs}"
        keys = [dict(base=base, method=method, seed=seed) for seed in args.seeds
                for base in classifiers.BASES for method in METHODS]
        data = classifiers.read(config)
        common.study(args.rows, options, keys,
                     lambda **key: measure(config, data, args, options, **key))
    print(table(by_method(common.read_table(args.rows))))


if __name__ == "__main__":
    main()
