"""Why Eq. (2) runs off, and what w_div = 0.2 and the fuse do about it.

    python -m experiments.theory.divergence            # what has no row yet
    python -m experiments.theory.divergence --table    # only the table

Where a class's weight w is negative, L_CM has no lower bound in eps_theta_g, and where 1 + lam w is
not positive either, the loss has none in eps_theta. So CM is trained with w_div 1 (Eq. 2 as
printed) and 0.2 (the authors' code), without a fuse (inf, as the authors) and with ours, 0.1. A run
is a row: the first logged step at which d on Few, a mean over the steps since the log's last row,
is above 0.1, some 50 times what dropout makes of it; and the first at which the base loss is twice
the lowest before.
*small* is the default run's network and data, *large* one that is large for its data.
Options that aren't its own go to cm.py. Rows: divergence.csv.
"""

import functools
import itertools

import cm
from experiments import common

FUSES = ("inf", "0.1")
RATES = ("3e-3", "2e-4")
# {name: (images in the largest class, IRs, w_divs, options for cm.py)}; IR 600 would leave large's
# rarest class empty
SETTINGS = {"small": (1000, (100, 600), ("1", "0.2"), []),
            "large": (200, (100,), ("0.2",), ["--image-size", "8", "--channels", "32"])}
KEY = ["setting", "IR", "w_div", "lr", "fuse", "seed"]  # a run's
MEASURED = ("d on Few above 0.1 at step", "base loss doubled at", "last d, Few", "last base loss")
UNUSED = ("n_max", "ir", "image_size", "channels", "w_div", "lr", "div_margin", "no_cm", "seed",
          "run", "sampling")  # options of cm.py, and groups


def measure(runs, flags, **key):
    """A row: train, or go on."""
    directory = runs / "-".join(map(str, key.values()))
    n_max, _, _, own = SETTINGS[key["setting"]]
    own = [*own, "--n-max", n_max, "--ir", key["IR"], "--w-div", key["w_div"], "--lr", key["lr"],
           "--div-margin", key["fuse"], "--seed", key["seed"]]
    end = common.run([*flags, *map(str, own)], directory)
    row = {"n_max": n_max, "end": end or "finished"} | dict.fromkeys(MEASURED, "–")
    log = common.numbers(common.read_rows(directory / "log.csv"), ())
    if len(log):  # else it ran off before there was a row
        events = log["d_Few"] > 0.1, log["base"] > 2 * log["base"].cummin()
        firsts = [next(iter(log["step"][event].astype(int)), "never") for event in events]
        lasts = [f"{log[name].iloc[-1]:.2g}" for name in ("d_Few", "base")]
        row |= zip(MEASURED, firsts + lasts, strict=True)
    return [row]


def curvature(run):
    """1 + lam w of the rarest class, as text."""
    counts = cm.class_counts(int(run["n_max"]), float(run["IR"]), 10)
    return f"{1 + cm.capacity_weights(counts, w_div=float(run['w_div'])).min():.2f}"


def table(rows):
    """As text: of each setting what its seeds did, beside 1 + lam w."""
    rows = rows.assign(**{"1 + λw, rarest": rows.apply(curvature, axis=1)})
    of = rows.groupby([*KEY[:-1], "1 + λw, rarest"], sort=False)
    return common.markdown(of[["seed", *MEASURED, "end"]].agg(", ".join).reset_index())


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=(20, 21, 22))
    args, flags = parser.parse_known_args(argv)
    flags, *_ = common.configured(flags, UNUSED)
    if not args.table:
        keys = [dict(zip(KEY, (setting, *values, seed), strict=True)) for seed in args.seeds
                for setting, (_, irs, w_divs, _) in SETTINGS.items()
                for values in itertools.product(irs, w_divs, RATES, FUSES)]
        common.study(args.rows, common.settings(flags), keys,
                     functools.partial(measure, args.runs, flags))
    print(table(common.read_table(args.rows)))


if __name__ == "__main__":
    main()
