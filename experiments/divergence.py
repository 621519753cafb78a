"""Why Eq. (2) as printed has no minimum: the same run with margin inf and with the default.

    python -m experiments.divergence
    python -m experiments.divergence --table       # only the table, and assets/divergence.png

DDPM and OC bases, each at lr 1e-3 (2,500 steps) and at the paper's 2e-4 (5,000). A class has run
off where the mean of its base loss between two rows of the log is above 1, what predicting no noise
at all would cost, after it had been below 1/2. Where lam * w < -1, with w = omega_Con - omega_Div,
the loss is concave in eps_theta itself; the table says whether those classes go first.
Options that aren't its own go to cm.py. Rows: results/divergence.csv.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure

import cm
from experiments import common

MARGINS = ("inf", f"{cm.Config.div_margin:g}")
KEY = ["base", "lr", "margin"]
WORDS = (*KEY, "end", "counts", "options")


def measure(base, lr, margin, steps, runs, flags):
    """Train, or go on: the rows of the log, as text, the run's own columns in front."""
    out = runs / f"{base}-{lr}-{margin}"
    end = common.run([*flags, "--base", base, "--lr", lr, "--div-margin", margin,
                      "--steps", str(steps)], out)
    counts = json.loads((out / "config.json").read_text())["counts"]
    log = common.read_rows(out / "log.csv")
    own = dict(base=base, lr=lr, margin=margin, end=end, counts=" ".join(map(str, counts)),
               options=common.settings(flags))
    log = log.filter(regex=r"^(step|loss|(base|d)_\w+)$")
    return pd.DataFrame(own, index=log.index, dtype=str).join(log)


def ran_off(log, group, threshold=1.0):
    """The first logged step at which a group's base loss is above the threshold, having been below
    half of it; or None. A group is a class or split, as the log's columns name it; nan: none of its
    images was drawn since the row before."""
    loss = log[f"base_{group}"]
    learned = (loss < threshold / 2).cummax()
    gone = log["step"][learned & (loss > threshold)]
    return None if gone.empty else int(gone.iloc[0])


def condition(log):
    """(net weights w [C], first step above the threshold [C], inf: never) of one run; lam is 1."""
    omega_con, omega_div = cm.class_weights([int(n) for n in log["counts"].iloc[0].split()])
    first = [ran_off(log, k) for k in range(len(omega_con))]
    return ((omega_con - omega_div).numpy(),
            np.array([np.inf if step is None else step for step in first]))


def concave_first(w, first):
    """(how many classes have w < -1, how many of the classes that ran off before all others do):
    as many of these are looked at as there are of those."""
    concave = set(np.flatnonzero(w < -1))
    leaders = np.argsort(first, kind="stable")[:len(concave)]
    return len(concave), len(concave.intersection(k for k in leaders if np.isfinite(first[k])))


def table(rows):
    """As text: when each run went off, its last losses, and whether lam * w < -1 says which classes
    go first."""
    shown = []
    for (base, lr, margin), log in rows.groupby(KEY, sort=False):
        w, first = condition(log)
        concave, led = concave_first(w, first)
        last = log.iloc[-1]
        ordered = len(set(first)) > 1  # else there is no order to correlate with
        shown.append({
            "base": base, "lr": lr, "margin": margin,
            "Few runs off at": ran_off(log, "Few") or "never",
            "Many runs off at": ran_off(log, "Many") or "never",
            "last base loss, Few": f"{last['base_Few']:.3g}",
            "last base loss, Many": f"{last['base_Many']:.3g}",
            "last d, Few": f"{last['d_Few']:.3g}", "last d, Many": f"{last['d_Many']:.3g}",
            "classes with λw < −1": concave,
            "of them off first": f"{led} of {concave}" if np.isfinite(first).any() else "–",
            "Spearman of w and step":
                f"{scipy.stats.spearmanr(w, first)[0]:+.2f}" if ordered else "–",
            "end": last["end"] or "finished"})
    return common.markdown(shown)


def draw(rows, path):
    """Few and Many: d (top) and base loss (bottom) over steps, a column a run's base and lr."""
    columns = list(rows.groupby(["base", "lr"], sort=False).groups)
    figure = Figure(figsize=(2.9 * len(columns) + 1, 5.2), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False, sharey="row")
    for (base, lr, margin), log in rows.groupby(KEY, sort=False):
        of_d, of_loss = axes[:, columns.index((base, lr))]
        bound = "∞" if margin == "inf" else margin
        for split, colour in (("Many", "C0"), ("Few", "C3")):
            for axis, kind in ((of_d, "d"), (of_loss, "base")):
                axis.plot(log["step"], log[f"{kind}_{split}"], "-" if margin == "inf" else "--",
                          color=colour, lw=1, label=f"{split}, m = {bound}")
        of_d.set(title=f"{base}, lr {lr}")
        of_loss.set(xlabel="step")
    axes[0, 0].set(ylabel="d = ‖ε_θ − ε_θg‖²")
    axes[1, 0].set(ylabel="base loss")
    for axis in axes.flat:
        axis.set(yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    common.save(figure, path)


def study(path, runs, bases, rates, flags):
    """Every run that has no rows yet; rates: {learning rate: steps}. Raises ValueError."""
    flags = common.with_defaults(flags, warmup="100")
    rows = common.read_rows(path, common.settings(flags))
    done = set() if rows.empty else set(rows.groupby(KEY).groups)
    for lr, steps in rates.items():
        for base in bases:
            for margin in MARGINS:
                if (base, lr, margin) not in done:
                    new = measure(base, lr, margin, steps, runs, flags)
                    rows = common.replace_rows(rows, new, KEY)
                    common.write_rows(path, rows)


def main(argv=None):
    parser = common.parser("divergence", __doc__)
    parser.add_argument("--bases", nargs="+", default=["ddpm", "oc"],
                        choices=["ddpm", "oc", "cbdm", "focal"])
    parser.add_argument("--lr", nargs="+", default=["1e-3", "2e-4"], help="learning rates")
    parser.add_argument("--steps", type=int, nargs="+", default=[2500, 5000],
                        help="one number a learning rate")
    parser.add_argument("--runs", type=Path, default=Path("runs/divergence"))
    args, flags = parser.parse_known_args(argv)
    try:
        if len(args.steps) != len(args.lr):
            raise ValueError(f"--steps has {len(args.steps)} numbers, --lr {len(args.lr)}; "
                             "type one for each")
        if not args.table:
            rates = dict(zip(args.lr, args.steps, strict=True))
            study(args.rows, args.runs, args.bases, rates, flags)
        rows = common.numbers(common.read_table(args.rows), WORDS)
        print(table(rows))
        draw(rows, args.assets / "divergence.png")
        return 0
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
