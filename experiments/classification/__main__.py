"""Does CM help beyond diffusion? Long-tailed classification, as in Tab. G.13.

    python -m experiments.classification            # what has no row yet
    python -m experiments.classification --table    # only the tables and assets/classification.png
    python -m experiments.classification --dataset cifar100 --network resnet18 --epochs 200 \\
        --rows cifar100.csv --assets .              # the paper's setting: 30 trainings on a GPU

Cross-entropy (CE), LDAM and logit adjustment (LA), each plain and with CM, whose loss here is the
authors' code's (see `losses` in classifiers.py). Columns: accuracy, of theta, and general, of
theta_g.
"""

import itertools
import math
import re
import sys

import numpy as np
import torch
from matplotlib.figure import Figure

import cm
from experiments import common
from experiments.classification import classifiers

SIZES = {"small": 16, "resnet18": 32}  # network: side of the images
METHODS = {"plain": "", "CM": " + CM"}  # name: what it adds to a loss's name
SPLITS = ("Many", "Medium", "Few", "overall")
KEY = ["loss", "method", "seed"]  # a run's
WORDS = ("loss", "method", "status", "options")
PAPER = {  # Tab. G.13: IR: accuracy, %, on CIFAR-100
    200: {"CE": (70.03, 42.13, 6.38, 36.56), "LDAM": (62.13, 43.64, 16.64, 38.66),
          "LDAM + CM": (60.20, 46.35, 20.69, 40.50), "LA": (60.46, 45.16, 20.43, 40.11),
          "LA + CM": (63.73, 46.38, 20.16, 41.36)},
    100: {"CE": (70.14, 40.54, 6.73, 40.76), "LDAM": (61.77, 41.57, 19.10, 41.90),
          "LDAM + CM": (62.40, 44.94, 21.77, 44.10), "LA": (57.91, 45.80, 23.53, 43.36),
          "LA + CM": (61.60, 46.94, 23.80, 45.14)}}


def measure(args, key, data, options):
    """A row: train, or go on, and judge. "status" says where a training ran off. key: the columns
    KEY; data: as classifiers.read gives it."""
    training, judged, names = data
    counts = np.bincount(training.labels.cpu(), minlength=len(names))
    steps = math.ceil(args.epochs * len(training.labels) / classifiers.BATCH)
    with_cm = key["method"] == "CM"
    row = key | {"status": "finished"} | {f"accuracy {s}": math.nan for s in SPLITS}
    try:
        net = classifiers.fit(args.network, training, counts, key["loss"], key["seed"], steps,
                              checkpoint_of(args, key), options, with_cm,
                              augment=args.dataset in classifiers.AUGMENTED)
        groups = classifiers.by_shots(counts) if args.dataset == "cifar100" else cm.splits(counts)
        row |= classifiers.accuracies(cm.merge(net), judged, groups, "accuracy")
        if with_cm:
            theta_g = classifiers.general(net, training.images)
            row |= classifiers.accuracies(theta_g, judged, groups, "general")
    except FloatingPointError as e:
        row["status"] = re.search(r"not finite at step \d+", str(e))[0]
    return row


def checkpoint_of(args, key):
    """Where a run's checkpoint lies while it is trained."""
    return args.runs / ("-".join(str(v) for v in key.values()) + ".pt")


def study(args):
    """Every run that has no row yet. Raises ValueError."""
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}"
                       for name in ("dataset", "epochs", "ir", "n_max", "network"))
    common.read_rows(args.rows, options)  # for its checks
    data = classifiers.read(args.dataset, args.data, SIZES[args.network], args.n_max, args.ir,
                            cm.pick_device())
    runs = list(itertools.product(args.seeds, args.bases, METHODS))
    for number, (seed, base, method) in enumerate(runs, 1):
        key = dict(zip(KEY, (base, method, seed), strict=True))
        if not common.has_row(args.rows, options, **key):
            print(f"run {number} of {len(runs)}", file=sys.stderr)
            common.add_rows(args.rows, options, [measure(args, key, data, options)])
            checkpoint_of(args, key).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# Table and picture


def by_method(rows):
    """{"LA": its rows by seed, "LA + CM": ...}, in %, in order."""
    rows = rows.set_index("seed")
    columns = [f"{kind} {s}" for kind in ("accuracy", "general") for s in SPLITS]
    percent = 100 * rows.reindex(columns=columns)
    of_run = {base + end: (rows["loss"] == base) & (rows["method"] == method)
              for base in classifiers.BASES for method, end in METHODS.items()}
    return {name: percent[mine] for name, mine in of_run.items() if mine.any()}


def compared(runs, paper, ir):
    """Rows of the table of differences: ours and, where Tab. G.13 has both, the paper's."""
    shown = []
    pairs = [(name, name.removesuffix(" + CM")) for name in runs if name.endswith("CM")]
    for ours, theirs in pairs + [(base, "CE") for base in runs if base in classifiers.BASES[1:]]:
        if theirs in runs:
            shown.append({"difference": f"{ours} − {theirs}", "of": "here"} | {
                s: common.interval(*change(runs, ours, theirs, s)[:2]) for s in SPLITS})
            if ours in paper and theirs in paper:
                shown.append({"difference": "", "of": f"the paper, IR {ir}"} | {
                    s: f"{a - b:+.2f}"
                    for s, a, b in zip(SPLITS, paper[ours], paper[theirs], strict=True)})
    return shown


def change(runs, ours, theirs, split):
    """(mean, half-width, seeds) of the difference in accuracy."""
    return common.difference(*(runs[name][f"accuracy {split}"] for name in (ours, theirs)))


def papers(rows):
    """(Tab. G.13, its IR): at the IR of the rows, at 100 where it has none."""
    ir = float(re.search(r"--ir (\S+)", rows["options"].iloc[0])[1])
    return PAPER.get(ir, PAPER[100]), int(ir) if ir in PAPER else 100


def table(rows):
    """The tables in Markdown."""
    runs = by_method(rows)
    values = [{"method": name, "seeds": run["accuracy overall"].count()} | {
        s: common.spread(run[f"accuracy {s}"], 2) for s in SPLITS} | {
        f"θ_g {s}": common.spread(run[f"general {s}"], 2) for s in ("Few", "overall")}
        for name, run in runs.items()]
    return "\n\n".join([
        "Accuracy on the test set, %: mean ± standard deviation over seeds",
        common.markdown(values),
        "Differences, points, paired by seed: mean and 95 % interval (the paper: CIFAR-100)",
        common.markdown(compared(runs, *papers(rows)))])


def draw(rows, path):
    """Accuracies, and what CM changes beside what it changes in Tab. G.13."""
    runs, (paper, _) = by_method(rows), papers(rows)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    place = np.arange(len(SPLITS))
    for i, (name, run) in enumerate(runs.items()):
        shown = run[[f"accuracy {s}" for s in SPLITS]]
        colour = f"C{classifiers.BASES.index(name.split(' ')[0])}"
        left.bar(place + 0.8 * ((i + 0.5) / len(runs) - 0.5), shown.mean(), 0.8 / len(runs),
                 yerr=shown.std(), error_kw=dict(lw=1), color=colour, edgecolor="white",
                 hatch="//" if name.endswith("CM") else "", label=name)
    with_cm = [base for base in classifiers.BASES if {base, f"{base} + CM"} <= set(runs)]
    for i, base in enumerate(with_cm):
        at, ours = place + 0.6 * ((i + 0.5) / len(with_cm) - 0.5), f"{base} + CM"
        colour = f"C{classifiers.BASES.index(base)}"
        mean, half, _ = zip(*(change(runs, ours, base, s) for s in SPLITS), strict=True)
        right.errorbar(at, mean, np.nan_to_num(half), fmt="o", color=colour,
                       label=f"{ours} − {base}")
        if ours in paper:
            right.plot(at, np.subtract(paper[ours], paper[base]), "x", color=colour)
    right.plot([], [], "kx", label="the paper's, CIFAR-100")
    right.axhline(0, color="k", lw=0.8)
    left.set(ylabel="accuracy, %", ylim=(0, 118))  # room for the legend
    right.set(ylabel="what CM adds, points (95 %)")
    for axis, columns in ((left, 4), (right, 1)):
        axis.set_xticks(place, SPLITS)
        axis.legend(fontsize=8, ncols=columns)
    common.save(figure, path)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=range(10, 15))
    parser.add_argument("--dataset", choices=[d for d in cm.DATASETS if d != "folder"],
                        default="fashion16", help="[default: fashion16]")
    parser.add_argument("--data", help="where it lies [default: data]")
    parser.add_argument("--ir", type=float, default=100.0, help="imbalance ratio [default: 100]")
    parser.add_argument("--n-max", type=int,
                        help="images in the largest class [default: all; fashion: 1000]")
    parser.add_argument("--network", choices=list(SIZES), default="small",
                        help="four blocks for 16x16 images, ResNet-18 for 32x32 [default: small]")
    parser.add_argument("--epochs", type=int, default=60, help="[default: 60]")
    parser.add_argument("--bases", choices=classifiers.BASES, nargs="+",
                        default=["CE", "LDAM", "LA"],
                        help="DRW: deferred re-weighting [default: CE LDAM LA]")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # results repeat only with the same number of threads
    try:
        if args.n_max is None and args.dataset == "fashion":
            args.n_max = 1000
        cm.check(args.n_max is None or args.n_max >= 1, "n_max", args.n_max, "at least 1")
        cm.check(args.epochs >= 1, "epochs", args.epochs, "at least 1")
        if not args.table:
            study(args)
        rows = common.numbers(common.read_table(args.rows, KEY), WORDS)
        print(table(rows))
        draw(rows, args.assets / "classification.png")
        return 0
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
