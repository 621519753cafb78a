"""Why Eq. (2) as printed has no minimum: the same run with margin inf and with the default.

    python -m experiments.divergence --data /usr/share/datasets/fashion-mnist    # results/divergence.csv, assets/divergence.png
    python -m experiments.divergence --table                                     # only the table and the picture

DDPM and OC bases, each at lr 1e-3 (2,500 steps) and at the paper's 2e-4 (5,000). A class has run off where the mean of its base
loss between two rows of the log is above 1, what predicting no noise at all would cost, after it had been below 1/2. Where lam * w < -1, with
w = omega_Con - omega_Div, the loss is concave in eps_theta itself; the table says whether those classes go first.
Options that aren't its own go to cm.py.
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import scipy.stats

import cm
from experiments.study import read_rows, settings, with_defaults, write_rows

HERE = Path(__file__).parent
MARGINS = ("inf", f"{cm.Config.div_margin:g}")


def run(base, lr, margin, steps, runs, flags):
    """Train, or go on; the log's rows with the run's own columns in front."""
    out = runs / f"{base}-{lr}-{margin}"
    argv = [*flags, "--base", base, "--lr", lr, "--div-margin", margin, "--steps", str(steps), "--out", str(out)]
    config, typed = cm.parse(argv + ["--resume"] * (out / "config.json").is_file())
    end = ""
    try:
        status = cm.train(config.resolved(), typed)
        if status:
            sys.exit(status)
    except FloatingPointError as e:
        end = re.search(r"not finite at step \d+", str(e))[0]
    counts = json.loads((out / "config.json").read_text())["counts"]
    with open(out / "log.csv", newline="") as f:
        log = list(csv.DictReader(f))
    own = dict(base=base, lr=lr, margin=margin, end=end, counts=" ".join(map(str, counts)), options=settings(flags))
    return [own | {k: r[k] for k in r if re.fullmatch(r"step|loss|(base|d)_(\d+|Many|Medium|Few)", k)} for r in log]


def ran_off(rows, k, threshold=1.0):
    """The first logged step at which group k's base loss is above the threshold, having been below half of it; or None."""
    learned = False
    for r in rows:
        learned |= float(r[f"base_{k}"]) < threshold / 2
        if learned and not float(r[f"base_{k}"]) <= threshold:
            return int(r["step"])


def by_run(rows):
    return {key: [r for r in rows if (r["base"], r["lr"], r["margin"]) == key]
            for key in dict.fromkeys((r["base"], r["lr"], r["margin"]) for r in rows)}


def condition(rows):
    """(net weights w [C], first step above the threshold [C], inf: never) of one run; lam is 1."""
    omega_con, omega_div = cm.class_weights([int(n) for n in rows[0]["counts"].split()])
    first = np.array([ran_off(rows, k) or np.inf for k in range(len(omega_con))])
    return (omega_con - omega_div).numpy(), first


def table(rows):
    """As text: when each run went off, its last losses, and whether lam * w < -1 says which classes go first."""
    lines = ["| base | lr | margin | Few runs off at | Many runs off at | last: base loss Few | Many | d Few | Many | classes with λw < −1 | of them off first | "
             "Spearman of w and step |", "| --- " * 12 + "|"]
    for (base, lr, margin), mine in by_run(rows).items():
        w, first = condition(mine)
        concave, off, last = w < -1, np.isfinite(first), mine[-1]
        rho = "–"
        if len(set(first)) > 1:
            rho = f"{scipy.stats.spearmanr(w, first)[0]:+.2f}"
        leaders = set(np.argsort(first, kind="stable")[:concave.sum()][np.sort(first)[:concave.sum()] < np.inf])
        lines.append(f"| {base} | {lr} | {margin} | " + " | ".join(str(ran_off(mine, s) or "never") for s in ("Few", "Many")) + " | "
                     + " | ".join(f"{float(last[f'{kind}_{s}']):.3g}" for kind in ("base", "d") for s in ("Few", "Many"))
                     + f" | {concave.sum()} | {f'{len(leaders & set(np.where(concave)[0]))} of {concave.sum()}' if off.any() else '–'} | {rho} |")
        if mine[0]["end"]:
            lines[-1] += f" {mine[0]['end']}"
    return "\n".join(lines)


def draw(rows, path):
    """Few and Many: d (top) and base loss (bottom) over steps, a column a run's base and lr."""
    from matplotlib.figure import Figure
    runs = by_run(rows)
    columns = list(dict.fromkeys(k[:2] for k in runs))
    figure = Figure(figsize=(2.9 * len(columns) + 1, 5.2), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False, sharey="row")
    for j, (base, lr) in enumerate(columns):
        for i, (kind, title) in enumerate((("d", "d = ‖ε_θ − ε_θg‖²"), ("base", "base loss"))):
            for margin, style in zip(MARGINS, ("-", "--")):
                mine = runs.get((base, lr, margin), [])
                for split, colour in (("Many", "C0"), ("Few", "C3")):
                    axes[i, j].plot([int(r["step"]) for r in mine], [float(r[f"{kind}_{split}"]) for r in mine], style, color=colour, lw=1,
                                    label=f"{split}, m = {'∞' if margin == 'inf' else margin}")
            axes[i, j].set(yscale="log", title=f"{base}, lr {lr}" if i == 0 else None, xlabel="step" if i else None, ylabel=title if j == 0 else None)
            axes[i, j].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="divergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = cm.fail
    parser.add_argument("--bases", nargs="+", default=["ddpm", "oc"], choices=["ddpm", "oc", "cbdm", "focal"])
    parser.add_argument("--lr", nargs="+", default=["1e-3", "2e-4"], help="learning rates")
    parser.add_argument("--steps", type=int, nargs="+", default=[2500, 5000], help="one number a learning rate")
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "divergence.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/divergence"))
    parser.add_argument("--assets", type=Path, default=HERE.parent / "assets")
    parser.add_argument("--table", action="store_true", help="only the table and the picture of the rows at hand")
    args, flags = parser.parse_known_args(argv)
    try:
        if len(args.steps) != len(args.lr):
            raise ValueError(f"--steps has {len(args.steps)} numbers, --lr {len(args.lr)}; type one for each")
        flags = with_defaults(flags, warmup="100")
        rows = read_rows(args.rows, None if args.table else flags)
        for lr, steps in zip(args.lr, args.steps):
            for base in args.bases:
                for margin in MARGINS:
                    if not args.table and (base, lr, margin) not in by_run(rows):
                        rows = rows + run(base, lr, margin, steps, args.runs, flags)
                        write_rows(args.rows, rows)
        if not rows:
            raise ValueError(f"{args.rows} has no rows; leave --table away")
        print(table(rows))
        draw(rows, args.assets / "divergence.png")
        return 0
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
