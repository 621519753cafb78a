"""Which classes live in small weights? Fig. 1b, G.1, G.2.

    python -m experiments.pruning DDPM_RUN/checkpoint.pt CM_RUN/checkpoint.pt     # results/pruning.csv, assets/pruning.png
    python -m experiments.pruning --table                                         # only the table and the picture

Zero the share of individual weights that are smallest in magnitude (of the merged network: all weights and biases in one
ranking) and compare each class's eps-loss on its *training* images, noise and times the same before and after. The paper's
finding: the loss of minority classes suffers more. Several checkpoints of one method count as its seeds.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import cm
from experiments.study import read_rows, write_rows

HERE = Path(__file__).parent


def prune(unet, share):
    """A copy whose `share` of individual parameters, those of smallest magnitude, is zero: floor(share * number) of them.

    One ranking over all parameters (Sec. 2.2, G.1: "10% of its parameters with the smallest L1-Norm"). Raises ValueError."""
    if not 0 <= share < 1:
        raise ValueError(f"the share to prune is {share}; it must be in [0, 1)")
    pruned = copy.deepcopy(unet)
    parameters = list(pruned.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    flat[flat.abs().argsort(stable=True)[:int(share * len(flat))]] = 0
    for p, values in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.data.copy_(values.view_as(p))
    return pruned


def losses(checkpoint, share, per_class, times):
    """Rows of one checkpoint: a class each, raw and pruned training loss and the relative change."""
    c, ema, counts = cm.load_trained(checkpoint)
    data = cm.Data(c)
    if data.counts.tolist() != counts:
        raise ValueError(f"{checkpoint} was trained on other class counts than {c.data or c.dataset} has now")
    unet = cm.merge(ema)
    raw, after = (cm.held_out_loss(n, data.images, data.labels, len(counts), per_class, times)[0] for n in (unet, prune(unet, share)))
    method = (f"{c.base.upper()}" if c.no_cm else f"CM on {c.base.upper()}") + f", {c.steps} steps"
    return [dict(method=method, checkpoint=str(checkpoint), seed=c.seed, share=share, name=data.names[k], count=counts[k], raw=float(raw[k]),
                 pruned=float(after[k]), change=float(after[k] / raw[k] - 1)) for k in range(len(counts))]


def table(rows):
    """As text: the change a class and method, mean ± std over seeds, and the rank correlation with the class's count."""
    methods, names = (list(dict.fromkeys(r[k] for r in rows)) for k in ("method", "name"))
    of = lambda m, n, k: [float(r[k]) for r in rows if r["method"] == m and r["name"] == n]
    lines = ["| class | count | " + " | ".join(f"{m}: raw loss | change, %" for m in methods) + " |", "| --- " * (2 + 2 * len(methods)) + "|"]
    for n in names:
        cells = []
        for m in methods:
            change = 100 * np.array(of(m, n, "change"))
            cells += [f"{np.mean(of(m, n, 'raw')):.4f}", f"{change.mean():+.2f}" + (f" ± {change.std(ddof=1):.2f}" if len(change) > 1 else "")]
        lines.append(f"| {n} | {int(of(methods[0], n, 'count')[0])} | " + " | ".join(cells) + " |")
    lines.append("")
    for m in methods:
        rho, p = scipy.stats.spearmanr([of(m, n, "count")[0] for n in names], [np.mean(of(m, n, "change")) for n in names])
        lines.append(f"{m} ({len(of(m, names[0], 'raw'))} seed(s)): Spearman correlation of count and change {rho:+.2f} (p = {p:.2f}); the paper's finding, rarer suffers "
                     f"more, is {'reproduced' if rho < 0 and p < 0.05 else 'not reproduced' if rho > 0 and p < 0.05 else 'not decidable at this scale'}")
    return "\n".join(lines)


def draw(rows, path):
    """Bars per class, most frequent first, a colour a method."""
    from matplotlib.figure import Figure
    methods = list(dict.fromkeys(r["method"] for r in rows))
    names = sorted(dict.fromkeys(r["name"] for r in rows), key=lambda n: -max(int(r["count"]) for r in rows if r["name"] == n))
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    axis, width = figure.subplots(), 0.8 / len(methods)
    for i, m in enumerate(methods):
        values = [[100 * float(r["change"]) for r in rows if r["method"] == m and r["name"] == n] for n in names]
        axis.bar(np.arange(len(names)) + width * (i - (len(methods) - 1) / 2), [np.mean(v) for v in values], width, label=m,
                 yerr=[np.std(v, ddof=1) if len(v) > 1 else 0 for v in values], error_kw=dict(lw=1))
    count = {r["name"]: r["count"] for r in rows}
    axis.set_xticks(range(len(names)), [f"{n} ({count[n]})" for n in names], rotation=30, ha="right")
    axis.set(ylabel=f"change of the loss, %, {100 * float(rows[0]['share']):g} % pruned")
    axis.axhline(0, color="k", lw=0.8)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="pruning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cm.fail
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="of the parameters")
    parser.add_argument("--per-class", type=int, default=50, help="training images of a class, at most")
    parser.add_argument("--times", type=int, default=20, help="diffusion steps, evenly spaced")
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "pruning.csv")
    parser.add_argument("--assets", type=Path, default=HERE.parent / "assets")
    parser.add_argument("--table", action="store_true", help="only the table and the picture of the rows at hand")
    args = parser.parse_args(argv)
    try:
        if args.table == bool(args.checkpoints):
            raise ValueError("type the checkpoint.pt of one run or more, or --table")
        if args.table and not read_rows(args.rows):
            raise ValueError(f"{args.rows} has no rows; name checkpoints")
        rows = [r for checkpoint in args.checkpoints for r in losses(checkpoint, args.share, args.per_class, args.times)]
        if rows:
            write_rows(args.rows, rows)
        rows = read_rows(args.rows)
        print(table(rows))
        draw(rows, args.assets / "pruning.png")
        return 0
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
