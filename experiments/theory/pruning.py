"""Which classes live in small weights? Fig. 1b, G.1, G.2.

    python -m experiments.theory.pruning DDPM_RUN/checkpoint.pt CM_RUN/checkpoint.pt
    python -m experiments.theory.pruning --table       # only the table, and assets/pruning.png

Zero the 10 % of individual weights that are smallest in magnitude (of the merged network: all
weights and biases in one ranking) and compare each class's eps-loss on its *training* images,
noise and times the same before and after. The paper's finding: the loss of minority classes
suffers more. Several checkpoints of one method count as its seeds. Rows: pruning.csv.
"""

import copy
from pathlib import Path

import scipy.stats
import torch
from matplotlib.figure import Figure

import cm
from experiments import common

WORDS = ("method", "checkpoint", "name")
SHARE = 0.1  # of the parameters
PER_CLASS, TIMES = 50, 20  # training images of a class, at most; diffusion steps, evenly spaced


def prune(unet, share):
    """A copy whose `share` of individual parameters, those of smallest magnitude, is zero: one
    ranking over all (Sec. 2.2, G.1: "10% of its parameters with the smallest L1-Norm")."""
    pruned = copy.deepcopy(unet)
    parameters = list(pruned.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    smallest = flat.abs().argsort(stable=True)[:int(share * len(flat))]
    flat[smallest] = 0
    torch.nn.utils.vector_to_parameters(flat, parameters)
    return pruned


def measure(checkpoint):
    """Rows of one checkpoint, one a class: training loss, raw and pruned, and the relative change.
    Raises ValueError."""
    config, ema, counts = cm.load_trained(checkpoint)
    data, unet = cm.Data(config), cm.merge(ema)
    raw, pruned = (cm.held_out_loss(network, data.images, data.labels, len(counts), PER_CLASS,
                                    TIMES)[0] for network in (unet, prune(unet, SHARE)))
    method = config.base.upper() if config.no_cm else f"CM on {config.base.upper()}"
    shared = dict(method=f"{method}, {config.steps} steps", checkpoint=checkpoint,
                  seed=config.seed, share=SHARE)
    return [shared | dict(name=data.names[k], count=counts[k], raw=float(raw[k]),
                          pruned=float(pruned[k]), change=float(pruned[k] / raw[k] - 1))
            for k in range(len(counts))]


def changes(rows):
    """The change of the loss in percent, grouped by class and method: a group has a row a seed."""
    percent = rows.assign(percent=100 * rows["change"])
    return percent.groupby(["name", "method"], sort=False)["percent"]


def table(rows):
    """As text: the change a class and method, and its rank correlation with the class's count."""
    counts = rows.groupby("name", sort=False)["count"].first()
    cells = changes(rows).apply(common.spread, digits=2, sign="+").unstack(sort=False)
    cells = cells.add_suffix(": change of the loss, %").rename_axis("class").reset_index()
    cells.insert(1, "count", counts.map("{:.0f}".format).to_numpy())
    lines = [common.markdown(cells), ""]
    for method, means in changes(rows).mean().unstack(sort=False).items():
        rho, p = scipy.stats.spearmanr(counts, means)
        seeds = rows.loc[rows["method"] == method, "seed"].nunique()
        lines.append(f"{method}, {seeds} seed(s): Spearman correlation of count and change "
                     f"{rho:+.2f} (p = {p:.3f}); the paper's finding is a negative one")
    return "\n".join(lines)


def draw(rows, path):
    """Bars a class, a colour a method."""
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    axis = figure.subplots()
    means, deviations = (of_class.unstack(sort=False)
                         for of_class in (changes(rows).mean(), changes(rows).std()))
    means.plot.bar(yerr=deviations, ax=axis, width=0.8, error_kw=dict(lw=1))
    counts = rows.groupby("name", sort=False)["count"].first()
    names = [f"{name} ({n:.0f})" for name, n in counts.items()]
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set(xlabel="", ylabel=f"change of the loss, %, {100 * SHARE:g} % pruned")
    axis.axhline(0, color="k", lw=0.8)
    axis.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    common.save(figure, path)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    args = parser.parse_args(argv)
    if args.table == bool(args.checkpoints):
        raise ValueError("type the checkpoint.pt of one run or more, or --table")
    rows = [row for path in args.checkpoints for row in measure(path)]
    if rows:
        common.write_rows(args.rows, common.text(rows))
    rows = common.numbers(common.read_table(args.rows), WORDS)
    print(table(rows))
    draw(rows, args.assets / "pruning.png")


if __name__ == "__main__":
    main()
