"""The README's pictures that no run of cm.py draws.

    python -m experiments.picture                 # assets/weights.png: the weights by class
    python -m experiments.picture --samples runs/study/large-{DDPM,CM}-21/2500-samples-θ-g0.npz
                                                  # assets/study_samples.png, of runs of the study
"""

from pathlib import Path

from matplotlib.figure import Figure

import cm
from experiments import common


def draw_weights(path, ir=100, lam=1.0):
    """omega_con and omega_div of ten classes over their counts; w as released and as printed."""
    counts = cm.class_counts(1000, ir, 10)
    omega_con, omega_div = cm.class_weights(counts)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(counts, omega_con, "o-", label="ω_Con")
    left.plot(counts, omega_div, "s-", label="ω_Div")
    for w_div, name in ((0.2, "w_div 0.2, as released"), (1.0, "w_div 1, as printed")):
        right.plot(counts, cm.capacity_weights(counts, w_div=w_div), "o-", label=name)
    right.axhline(-1 / lam, color="k", ls=":", label="−1/λ")
    right.axhline(0, color="k", lw=0.8)
    for axis, label in ((left, "weight"), (right, "w = ω_Con − w_div ω_Div")):
        axis.set(xscale="log", xlabel="images in the class", ylabel=label)
        axis.invert_xaxis()  # from the most frequent class to the rarest, as in the tables
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    common.save(figure, path)


def draw_samples(files, path, columns=6):
    """The most frequent class above the rare ones: real images, then those of the study's .npz
    `files`, which start from the same noise where their runs have one seed. Raises ValueError."""
    config = cm.load_checkpoint(files[0].parent / "run" / "checkpoint.pt")[1]
    data = cm.Data(config)
    splits = cm.splits(data.counts)
    titles = (file.parent.name.split("-")[1:-1] for file in files)  # large-agreement-alone-21
    named = {" ".join(title): file for title, file in zip(titles, files, strict=True)}
    common.draw_samples(data, named, [splits["Many"][0], *splits["Few"]], path, columns)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, rows=False)
    parser.add_argument("--samples", type=Path, nargs="+", metavar="NPZ",
                        help="draw study_samples.png of these, in the study's directories")
    parser.add_argument("--assets", type=Path, default=common.ASSETS, help="where pictures go")
    args = parser.parse_args(argv)
    if args.samples:
        draw_samples(args.samples, args.assets / "study_samples.png")
    else:
        draw_weights(args.assets / "weights.png")


if __name__ == "__main__":
    main()
