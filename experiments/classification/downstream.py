"""Are the generated images of use? A classifier trained with them, as in Tab. G.8.

    python -m experiments.classification.downstream
    python -m experiments.classification.downstream --samples mine.npz   # your images; beside our rows
    python -m experiments.classification.downstream --table        # only the tables and assets/downstream.png

The classifier of classification.py, for as many steps each: on the long-tailed set alone; with five
generated images for each real one, balanced over classes, of DDPM, RS and CM, without and with
guidance; and with what needs no generator, class-balanced re-sampling and logit adjustment (LA).
Generators are trained, too, and kept in --runs; options that aren't its own go to cm.py. Columns:
macro precision and recall on the test set; label accuracy: how often a classifier that was trained
on the whole balanced set sees a generated image's class in it.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import cm
import fid
from experiments import common
from experiments.classification import classifiers

# without a generator, {setting: (base loss, whether batches are balanced)}
ALONE = {"real images": ("CE", False), "re-sampling": ("CE", True), "LA": ("LA", False)}
REBALANCED = ("re-sampling", "LA")
GENERATORS = {"DDPM": "--no-cm", "RS": "--no-cm --resample 0.5", "CM": ""}
GUIDANCE = (0, 1.5)  # 1.5: the authors'
PER_REAL = 5  # generated images for each real one; the paper's are 50,000 for 10,847
OWN = dict(n_max="1000", steps="6000", warmup="100")  # options for cm.py, on Fashion-MNIST
SHOWN = ("precision", "recall", "recall Many", "recall Medium", "recall Few")
LABELS = ["label accuracy", "label accuracy Few"]
KEY = ["setting", "guidance", "seed"]  # a run's
UNUSED = ("subset_seed", "no_cm", "resample", "base", "cbdm_prior", "seed", "amp", "compile", "run",
          "sampling")  # options of cm.py, and groups, that would have no effect
PAPER = {"CM − DDPM": "+2.50, +4.44", "CM − real images": "+5.98, +9.53",  # Tab. G.8, points:
         "DDPM − real images": "+3.48, +5.09"}  # differences in precision and in recall


class Setup:
    """What all runs share: training and test Images, counts a class, the judge of labels, and the
    files of --samples by the names of their settings, which change with what they hold."""

    def __init__(self, args, config, flags):
        self.args, self.config, self.flags = args, config, flags
        self.device = cm.pick_device(config.device)
        options = config.dataset, config.data, config.image_size
        self.training, self.test, names = classifiers.read(*options, config.n_max, config.ir,
                                                           self.device)
        self.counts = torch.bincount(self.training.labels, minlength=len(names)).tolist()
        self.total = PER_REAL * sum(self.counts)
        self.given = {}
        for path in args.samples:
            digest = hashlib.sha256(self.read(path).images.cpu().numpy().tobytes()).hexdigest()
            self.given[f"{path.stem} ({digest[:6]})"] = path
        self.whole = cm.on_device(*cm.load_dataset(*options)[:2], "cpu")

    def judge(self):
        """A classifier that was trained on the whole balanced set: fid.py's, of another seed than
        those of FD (0 and, in the study, 1)."""
        return common.judge(*self.whole, [x.cpu() for x in self.test], len(self.counts),
                            self.device, self.args.runs / "judge", seed=2)

    def samples(self, generator, guidance, seed):
        """The .npz of images of a generator, which is trained and draws them where there is none.
        Raises FloatingPointError where it runs off."""
        made_by = hashlib.sha256(common.settings(self.flags).encode()).hexdigest()[:6]
        out = self.args.runs / f"{generator}-{seed}-{made_by}"
        path = out / f"samples-{self.args.sampler}-g{guidance}.npz"
        if not path.is_file():
            flags = [*self.flags, *f"--base ddpm --seed {seed} {GENERATORS[generator]}".split()]
            with contextlib.redirect_stdout(sys.stderr):
                ran_off = common.run(flags, out)
                if ran_off:
                    raise FloatingPointError(f"{out}: {ran_off}")
                cm.generate(dataclasses.replace(
                    self.config, sample=str(out / "checkpoint.pt"), out=str(path), seed=seed,
                    num_images=self.total, guidance=guidance, sampler=self.args.sampler))
        return path

    def read(self, path):
        """Images of an .npz, PER_REAL for each real one, classes alike. Raises ValueError."""
        images, labels, _ = fid.read_images(path)
        shape, classes = self.training.images.shape[1:], len(self.counts)
        if labels is None or labels.max() >= classes or images.shape[1:] != shape:
            raise ValueError(f"{path}: arr_0 must be uint8 [N, {shape[1]}, {shape[2]}, {shape[0]}"
                             f"], arr_1 labels from 0 to {classes - 1}")
        taken = []
        for k in range(classes):  # as many as cm.generate draws of a class
            of_class = torch.where(labels == k)[0]
            needed = self.total // classes + (k < self.total % classes)
            if len(of_class) < needed:
                raise ValueError(f"{path} has {len(of_class)} images of class {k}; it needs "
                                 f"{needed}, {self.total} in all")
            taken.append(of_class[:needed])
        taken = torch.cat(taken)
        return classifiers.Images(images[taken].to(self.device), labels[taken].to(self.device))

    def measure(self, setting, guidance, seed, checkpoint, options):
        """A row: train with a setting's images and test. guidance: "" without a generator of ours;
        `checkpoint`: where the classifier's lies while it is trained."""
        training, row = self.training, {}
        if setting not in ALONE:
            file = self.given.get(setting)
            if file is None:
                turn = seed % len(self.args.generator_seeds)
                row["generator seed"] = self.args.generator_seeds[turn]
                file = self.samples(setting, guidance, row["generator seed"])
            new = self.read(file)
            seen = fid.extract(self.judge(), new.images, "judging")[1].argmax(1)
            right = (seen == new.labels).cpu().double()
            few = torch.isin(new.labels.cpu(), torch.as_tensor(cm.splits(self.counts)["Few"]))
            row |= dict(zip(LABELS, (right.mean().item(), right[few].mean().item()), strict=True))
            training = classifiers.Images(torch.cat([training.images, new.images]),
                                          torch.cat([training.labels, new.labels]))
        base, balanced = ALONE.get(setting, ALONE["real images"])
        net = classifiers.fit(self.args.network, training, self.counts, base, seed,
                              self.args.classifier_steps, checkpoint, options, balanced=balanced,
                              augment=self.config.dataset in classifiers.AUGMENTED)
        found = classifiers.confusion(net, self.test, len(self.counts))
        row["precision"], row["recall"] = classifiers.macro(found)
        return row | {f"recall {name}": (found.diag() / found.sum(1))[k].mean().item()
                      for name, k in cm.splits(self.counts).items()}


def study(args, config, flags):
    """Every setting and seed that has no row yet. Raises ValueError."""
    options = common.settings(flags) + "".join(
        f" --{name.replace('_', '-')} {getattr(args, name)}"
        for name in ("classifier_steps", "generator_seeds", "network", "sampler"))
    common.read_rows(args.rows, options)  # for its checks
    setup = Setup(args, config, flags)
    settings = [(name, "") for name in [*ALONE, *setup.given]]
    if not args.samples:
        settings += itertools.product(GENERATORS, GUIDANCE)
    runs = [(*setting, seed) for seed in args.seeds for setting in settings]
    for number, run in enumerate(runs, 1):
        key = dict(zip(KEY, run, strict=True))
        if not common.has_row(args.rows, options, **key):
            print(f"run {number} of {len(runs)}", file=sys.stderr)
            path = args.runs / (re.sub(r"[^\w]+", "-", "-".join(map(str, run))) + ".pt")
            common.add_rows(args.rows, options, [key | setup.measure(*run, path, options)])
            path.unlink(missing_ok=True)


def by_setting(rows):
    """{"DDPM, guidance 0": its rows by seed, measures in %}, in order; LABELS once a generator."""
    percent = 100 * rows.set_index("seed").reindex(columns=[*LABELS, *SHOWN])
    generators = rows.reindex(columns=["setting", "guidance", "generator seed"])
    percent.loc[generators.duplicated().to_numpy(), LABELS] = np.nan
    names = np.array([name if np.isnan(w) else f"{name}, guidance {w:g}"
                      for name, w in zip(rows["setting"], rows["guidance"], strict=True)])
    return {name: percent[names == name] for name in dict.fromkeys(names)}


def table(rows):
    """The tables in Markdown, and what follows."""
    runs = by_setting(rows)
    values = [{"trained on": name, "seeds": len(run)} | {
        s: common.spread(run[s], 1) for s in (*LABELS, *SHOWN)} for name, run in runs.items()]
    pairs = [(name, "real images") for name in REBALANCED]
    pairs += itertools.product((name for name in runs if name not in ALONE), ALONE)
    guidances = np.unique(rows["guidance"].dropna())
    for w in guidances:
        pairs += [(f"CM, guidance {w:g}", f"{other}, guidance {w:g}") for other in ("DDPM", "RS")]
    pairs += [(f"{name}, guidance {w:g}", f"{name}, guidance 0")
              for name in GENERATORS for w in guidances if w > 0]
    differences = [{"difference": f"{ours} − {theirs}"} | {
        s: common.interval(*common.difference(runs[ours][s], runs[theirs][s])[:2], 1)
        for s in ("precision", "recall", "recall Few")} | {
        "the paper": PAPER.get(f"{ours.split(',')[0]} − {theirs.split(',')[0]}", "")}
        for ours, theirs in pairs if ours in runs and theirs in runs]
    return "\n\n".join([
        "On the test set, %: mean ± standard deviation over seeds", common.markdown(values),
        "Differences, points, paired by seed: mean and 95 % interval (the paper: precision and "
        "recall, CIFAR-100)", common.markdown(differences), verdict(runs)])


def verdict(runs):
    """Does generating beat re-balancing? The best of each, by recall."""
    sides = [name for name in runs if name not in ALONE], [n for n in REBALANCED if n in runs]
    if not all(sides):
        return "Does generating beat re-balancing? Not run."
    ours, theirs = (max(side, key=lambda name: runs[name]["recall"].mean()) for side in sides)
    mean, half, seeds = common.difference(runs[ours]["recall"], runs[theirs]["recall"])
    answer = "Undecided" if not abs(mean) > half else "Yes" if mean > 0 else "No"
    return (f"Does generating beat re-balancing? {answer}: recall of the best with generated "
            f"images ({ours}) − the best without ({theirs}) = {common.interval(mean, half, 1)}, "
            f"{seeds} seed(s). These very numbers picked each side's best.")


def draw(rows, path):
    """Each setting's means and standard deviations, of all classes and of Few."""
    runs = by_setting(rows)
    figure = Figure(figsize=(9, 0.38 * len(runs) + 1.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, measures in zip(axes, (SHOWN[:2], (SHOWN[-1], LABELS[-1])), strict=True):
        for i, measure in enumerate(measures):
            axis.errorbar([run[measure].mean() for run in runs.values()],
                          np.arange(len(runs)) + 0.2 * (i - 0.5),
                          xerr=[np.nan_to_num(run[measure].std()) for run in runs.values()],
                          fmt="os"[i], label=measure)
        axis.set_xlabel("%")
        axis.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes[0].set_yticks(range(len(runs)), runs)
    axes[0].invert_yaxis()
    common.save(figure, path)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=range(10, 15))
    parser.add_argument("--generator-seeds", type=int, nargs="+", default=[11, 12],
                        help="of the generators, in turn: even --seeds take the first of two, odd "
                             "ones the second [default: 11 12]")
    parser.add_argument("--samples", type=Path, nargs="+", default=[], metavar="NPZ",
                        help="your images: uint8 arr_0 [N, H, W, C], labels arr_1; a setting each")
    parser.add_argument("--sampler", choices=["ddim", "dpm"], default="dpm",
                        help="15-step DPM-Solver++ or 50-step DDIM [default: dpm]")
    parser.add_argument("--network", choices=list(classifiers.NETWORKS), default="small",
                        help="the classifier, see classification.py [default: small]")
    parser.add_argument("--classifier-steps", type=int, default=2000,
                        help="SGD steps of each classifier [default: 2000]")
    args, flags = parser.parse_known_args(argv)
    torch.set_num_threads(1)  # results repeat only with the same number of threads
    try:
        other = re.search(r"--dataset[ =](?!fashion)", " ".join(flags))
        flags, config, _ = common.configured(flags, UNUSED, **({} if other else OWN))
        for name, least in (("classifier_steps", 1), ("generator_seeds", 0)):
            smallest = np.min(getattr(args, name))
            cm.check(smallest >= least, name, smallest, f"at least {least}")
        if not args.table:
            study(args, config, flags)
        rows = common.numbers(common.read_table(args.rows, [*KEY, *SHOWN]), ("setting", "options"))
        print(table(rows))
        draw(rows, args.assets / "downstream.png")
        return 0
    except (ValueError, OSError) as e:
        cm.fail(e)
    except FloatingPointError as e:
        sys.exit(f"downstream: {e}")


if __name__ == "__main__":
    sys.exit(main())
