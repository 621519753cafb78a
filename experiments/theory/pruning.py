"""Which classes live in small weights? Fig. 1b, G.1, G.2.

    python -m experiments.theory.pruning DDPM_RUN/checkpoint.pt CM_RUN/checkpoint.pt
    python -m experiments.theory.pruning --table       # only the table, and assets/pruning.png

Zero the share of individual weights that are smallest in magnitude (of the merged network: all
weights and biases in one ranking) and compare each class's eps-loss on its *training* images,
noise and times the same before and after. The paper's finding: the loss of minority classes
suffers more. Several checkpoints of one method count as its seeds. Rows: pruning.csv.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
from matplotlib.figure import Figure

import cm
from experiments import common

WORDS = ("method", "checkpoint", "name")


def prune(unet, share):
    """A copy whose `share` of individual parameters, those of smallest magnitude, is zero:
    floor(share * number) of them.

    One ranking over all parameters (Sec. 2.2, G.1: "10% of its parameters with the smallest
    L1-Norm"). Raises ValueError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise ValueError(f"the share to prune is {share}; it must be in [0, 1)")
    pruned = copy.deepcopy(unet)
    parameters = list(pruned.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    smallest = flat.abs().argsort(stable=True)[:int(share * len(flat))]
    flat[smallest] = 0
    torch.nn.utils.vector_to_parameters(flat, parameters)
    return pruned


def measure(checkpoint, share, per_class, times):
    """Rows of one checkpoint, one a class: training loss, raw and pruned, and the relative change.

    per_class: training images a class, at most; times: diffusion steps, evenly spaced. Raises
    ValueError where the checkpoint can't be loaded or its data have changed."""
    config, ema, counts = cm.load_trained(checkpoint)
    data = cm.Data(config)
    if data.counts.tolist() != counts:
        raise ValueError(f"{checkpoint} was trained on other class counts than "
                         f"{config.data or config.dataset} has now")
    unet = cm.merge(ema)

    def losses(network):
        return cm.held_out_loss(network, data.images, data.labels, len(counts), per_class, times)[0]

    raw, pruned = losses(unet), losses(prune(unet, share))
    method = config.base.upper() if config.no_cm else f"CM on {config.base.upper()}"
    shared = dict(method=f"{method}, {config.steps} steps", checkpoint=checkpoint,
                  seed=config.seed, share=share)
    return [shared | dict(name=data.names[k], count=counts[k], raw=float(raw[k]),
                          pruned=float(pruned[k]), change=float(pruned[k] / raw[k] - 1))
            for k in range(len(counts))]


def changes(rows, method):
    """The change of the loss in percent, a Series for each class: {name: one value a seed}."""
    mine = rows[rows["method"] == method]
    return {name: 100 * of_class["change"] for name, of_class in mine.groupby("name", sort=False)}


def verdict(rho, p):
    """Of the rank correlation of count and change: the paper's finding is a negative one."""
    if not p < 0.05:
        return "not decidable at this scale"
    return "reproduced" if rho < 0 else "not reproduced"


def table(rows):
    """As text: the change a class and method, and its rank correlation with the class's count."""
    classes = rows.groupby("name", sort=False)["count"].first()
    shown = pd.DataFrame({"class": classes.index, "count": [f"{n:.0f}" for n in classes]})
    lines = []
    for method in rows["method"].unique():
        change = changes(rows, method)
        shown[f"{method}: change of the loss, %"] = [
            common.spread(change[name], 2, "+") for name in classes.index]
        means = [change[name].mean() for name in classes.index]
        rho, p = scipy.stats.spearmanr(classes, means)
        seeds = len(change[classes.index[0]])
        lines.append(f"{method}, {seeds} seed(s): Spearman correlation of count and change "
                     f"{rho:+.2f} (p = {p:.3f}); the paper's finding, rarer suffers more, is "
                     f"{verdict(rho, p)}")
    return "\n".join([common.markdown(shown), "", *lines])


def draw(rows, path):
    """Bars per class, most frequent first, a colour a method."""
    classes = rows.groupby("name")["count"].max().sort_values(ascending=False, kind="stable")
    methods = rows["method"].unique()
    width = 0.8 / len(methods)
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    axis = figure.subplots()
    for i, method in enumerate(methods):
        change = changes(rows, method)
        place = np.arange(len(classes)) + width * (i - (len(methods) - 1) / 2)
        axis.bar(place, [change[name].mean() for name in classes.index], width, label=method,
                 yerr=[change[name].std() for name in classes.index], error_kw=dict(lw=1))
    axis.set_xticks(range(len(classes)), [f"{name} ({n:.0f})" for name, n in classes.items()],
                    rotation=30, ha="right")
    axis.set(ylabel=f"change of the loss, %, {100 * rows['share'].iloc[0]:g} % pruned")
    axis.axhline(0, color="k", lw=0.8)
    axis.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    common.save(figure, path)


def main(argv=None):
    parser = common.parser(__file__, __doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="of the parameters")
    parser.add_argument("--per-class", type=int, default=50,
                        help="training images of a class, at most")
    parser.add_argument("--times", type=int, default=20, help="diffusion steps, evenly spaced")
    args = parser.parse_args(argv)
    try:
        if args.table == bool(args.checkpoints):
            raise ValueError("type the checkpoint.pt of one run or more, or --table")
        rows = []
        for checkpoint in args.checkpoints:
            rows += measure(checkpoint, args.share, args.per_class, args.times)
        if rows:
            common.write_rows(args.rows, common.text(rows))
        rows = common.numbers(common.read_table(args.rows), WORDS)
        print(table(rows))
        draw(rows, args.assets / "pruning.png")
        return 0
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
