"""Are the generated images of use? A classifier trained with them, as in Tab. G.8.

    python -m experiments.classification.downstream            # what has no row yet
    python -m experiments.classification.downstream --table    # the tables; assets/downstream.png

A classifier is trained, for as many steps each, on the long-tailed set alone; with five generated
images for each real one, balanced over classes, of DDPM, RS and CM, without and with guidance; and,
without a generator, on class-balanced batches or by logit adjustment (LA). Generators are trained,
too, and kept in --runs; options that aren't its own go to cm.py. Label accuracy: how often a
classifier that was trained on the whole balanced set sees a generated image's class in it.
"""

import dataclasses
import hashlib
import itertools

import numpy as np
import torch
from matplotlib.figure import Figure

import cm
import fid
from experiments import common
from experiments.classification import classifiers

# without a generator, {setting: (base loss, whether batches are balanced)}
ALONE = {"real images": ("CE", False), "re-sampling": ("CE", True), "LA": ("LA", False)}
GENERATORS = {"DDPM": "--no-cm", "RS": "--no-cm --resample 0.5", "CM": ""}
GUIDANCE = (0, 1.5)  # 1.5: the authors'
PER_REAL = 5  # generated images for each real one; the paper's are 50,000 for 10,847
SAMPLER = "dpm"  # 15 steps; 50-step DDIM takes longer than all else
SHOWN = ("precision", "recall", "recall Many", "recall Medium", "recall Few")
LABELS = ["label accuracy", "label accuracy Few"]
UNUSED = ("subset_seed", "no_cm", "resample", "base", "cbdm_prior", "seed", "amp", "compile", "run",
          "sampling")  # options of cm.py, and groups, that would have no effect
PAPER = {"CM − DDPM": "+2.50, +4.44", "CM − real images": "+5.98, +9.53",  # Tab. G.8, points:
         "DDPM − real images": "+3.48, +5.09"}  # differences in precision and in recall


class Setup:
    """What all runs share: options, for cm.py and of a row; cm.Data."""

    def __init__(self, args, config, flags):
        self.args, self.config, self.flags = args, config, flags
        self.data = classifiers.read(config)
        self.options = (f"{common.settings(flags)} --classifier-steps {args.classifier_steps} "
                        f"--generator-seeds {args.generator_seeds}")

    def samples(self, generator, guidance, seed):
        """The .npz of images of a generator, which is trained and draws them where there is none.
        Raises FloatingPointError where it runs off."""
        made_by = hashlib.sha256(common.settings(self.flags).encode()).hexdigest()[:6]
        out = self.args.runs / f"{generator}-{seed}-{made_by}"
        path = out / f"samples-{SAMPLER}-g{guidance}.npz"
        if not path.is_file():
            flags = f"--base ddpm --seed {seed} {GENERATORS[generator]}".split()
            ran_off = common.run([*self.flags, *flags], out)
            if ran_off:
                raise FloatingPointError(f"{out}: {ran_off}")
            cm.generate(dataclasses.replace(
                self.config, sample=str(out / "checkpoint.pt"), out=str(path), seed=seed,
                num_images=PER_REAL * len(self.data.labels), guidance=guidance, sampler=SAMPLER))
        return path

    def label_accuracy(self, images, labels):
        """{"label accuracy": ...} of generated images, by fid.py's classifier, trained on the whole
        balanced set with another seed than those of FD (0 and, in the study, 1)."""
        config, data = self.config, self.data
        whole = cm.load_dataset(config.dataset, config.data, config.image_size)[:2]
        test = data.held_out.cpu(), data.held_out_labels.cpu()
        judge = common.judge(*cm.on_device(*whole, "cpu"), test, len(data.names),
                             data.images.device, self.args.runs / "judge", seed=2)
        seen = fid.extract(judge, images, "judging")[1].argmax(1).cpu()
        right = (seen == labels).double()
        few = torch.isin(labels, torch.as_tensor(cm.splits(data.counts.cpu())["Few"]))
        return dict(zip(LABELS, (right.mean().item(), right[few].mean().item()), strict=True))

    def measure(self, setting, guidance, seed):
        """A row: train with a setting's images and test. guidance: "" without a generator."""
        training, device, row = self.data, self.data.images.device, {}
        if setting in GENERATORS:
            generators = self.args.generator_seeds
            row["generator seed"] = generators[seed % len(generators)]
            file = self.samples(setting, guidance, row["generator seed"])
            images, labels, _ = fid.read_images(file)
            row |= self.label_accuracy(images, labels)
            training = classifiers.Images(torch.cat([training.images, images.to(device)]),
                                          torch.cat([training.labels, labels.to(device)]))
        base, balanced = ALONE.get(setting, ALONE["real images"])
        path = self.args.runs / f"{setting}-{guidance}-{seed}.pt"
        net = classifiers.fit(self.config.dataset, training, self.data.counts, base, seed,
                              self.args.classifier_steps, path, self.options, balanced=balanced)
        return [row | scores(classifiers.confusion(net, self.data), self.data.counts.cpu())]


def scores(found, counts):
    """{"precision": ...}, macro, means over classes, of a confusion matrix [K, K] with true classes
    in rows and K counts of training images. A class that is never predicted has precision 0."""
    right = found.diag().double()
    precision, recall = right / found.sum(0).clamp(min=1), right / found.sum(1)
    measures = precision, recall, *(recall[k] for k in cm.splits(counts).values())
    return {name: x.mean().item() for name, x in zip(SHOWN, measures, strict=True)}


# ------------------------------------------------------------------------------------------------
# Tables and picture


def by_setting(rows):
    """{"DDPM, guidance 0": its rows by seed, measures in %}, in order; LABELS once a generator."""
    percent = 100 * rows.set_index("seed").reindex(columns=[*LABELS, *SHOWN])
    generators = rows.reindex(columns=["setting", "guidance", "generator seed"])
    percent.loc[generators.duplicated().to_numpy(), LABELS] = np.nan
    names = np.array([name if np.isnan(w) else f"{name}, guidance {w:g}"
                      for name, w in zip(rows["setting"], rows["guidance"], strict=True)])
    return {name: percent[names == name] for name in dict.fromkeys(names)}


def table(runs):
    """The tables in Markdown."""
    values = [{"trained on": name, "seeds": len(run)} | {
        s: common.spread(run[s], 1) for s in (*LABELS, *SHOWN)} for name, run in runs.items()]
    generated = [name for name in runs if name not in ALONE]
    guidances = list(dict.fromkeys(name.split(", ")[1] for name in generated))
    pairs = [(name, "real images") for name in ALONE if name != "real images"]
    pairs += itertools.product(generated, ALONE)
    pairs += [(f"CM, {w}", f"{other}, {w}") for w in guidances for other in ("DDPM", "RS")]
    pairs += [(f"{name}, {w}", f"{name}, {guidances[0]}")
              for name in GENERATORS for w in guidances[1:]]
    differences = [{"difference": f"{ours} − {theirs}"} | {
        s: common.difference(runs[ours][s], runs[theirs][s], 1)
        for s in ("precision", "recall", "recall Few")} | {
        "the paper": PAPER.get(f"{ours.split(',')[0]} − {theirs.split(',')[0]}", "")}
        for ours, theirs in pairs if ours in runs and theirs in runs]
    return "\n\n".join([
        "On the test set, %: mean ± standard deviation over seeds", common.markdown(values),
        "Differences, points, paired by seed: mean and 95 % interval (the paper: precision and "
        "recall, CIFAR-100)", common.markdown(differences)])


def draw(runs, path):
    """Each setting's means and standard deviations, of all classes and of Few."""
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
                        help="of two, even --seeds take the first [default: 11 12]")
    parser.add_argument("--classifier-steps", type=int, default=2000,
                        help="SGD steps of each classifier [default: 2000]")
    args, flags = parser.parse_known_args(argv)
    flags, config, _ = common.configured(flags, UNUSED, steps="6000")
    if not args.table:
        setup = Setup(args, config, flags)
        settings = [*((name, "") for name in ALONE), *itertools.product(GENERATORS, GUIDANCE)]
        keys = [dict(setting=setting, guidance=w, seed=seed)
                for seed in args.seeds for setting, w in settings]
        common.study(args.rows, setup.options, keys, setup.measure)
    runs = by_setting(common.numbers(common.read_table(args.rows), ("setting", "options")))
    print(table(runs))
    draw(runs, args.assets / "downstream.png")


if __name__ == "__main__":
    main()
