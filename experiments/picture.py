"""The README's pictures that no run of cm.py draws.

    python -m experiments.picture                 # assets/weights.png: the weights by class
    python cm.py --steps 6000 --no-cm --out runs/plain
    python cm.py --steps 6000 --out runs/cm
    python -m experiments.picture --rare runs/plain/checkpoint.pt runs/cm/checkpoint.pt
"""

from pathlib import Path

import torch
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


def draw_rare(plain_checkpoint, cm_checkpoint, path, columns=8):
    """A frequent class above the rare ones from the same noise: real, plain DDPM, CM, CM's theta_g;
    guided as cm.py's samples. Raises ValueError unless the first run is without CM."""
    plain_config, plain, _ = cm.load_trained(plain_checkpoint)
    config, unet, counts = cm.load_trained(cm_checkpoint)
    if config.no_cm or not plain_config.no_cm:
        raise ValueError(f"{plain_checkpoint} must be a run with --no-cm, {cm_checkpoint} without")
    data, classes = cm.Data(config), cm.splits(counts)
    shown = [int(classes["Many"][0]), *map(int, classes["Few"])]
    y = torch.tensor(shown).repeat_interleave(columns)
    seeds = [cm.hashed_seed("image", config.seed, i) for i in range(len(y))]

    def generated(network):
        shape = data.images.shape[1:]
        return cm.to_uint8(cm.sample(network, y, shape, guidance=config.guidance, seeds=seeds))

    panels = {"real": data.first(shown, columns), "plain DDPM": generated(plain),
              "CM": generated(cm.merge(unet))}
    with cm.general_only(unet):
        panels["CM's θ_g, without BA"] = generated(cm.merge(unet))
    cm.draw_panels(panels, [f"{data.names[k]}  {counts[k]}" for k in shown], path)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, rows=False)
    parser.add_argument("--rare", type=Path, nargs=2, metavar="CHECKPOINT",
                        help="draw rare.png, of a run with --no-cm and of the same run with CM")
    parser.add_argument("--assets", type=Path, default=common.ASSETS, help="where pictures go")
    args = parser.parse_args(argv)
    if args.rare:
        draw_rare(*args.rare, args.assets / "rare.png")
    else:
        draw_weights(args.assets / "weights.png")


if __name__ == "__main__":
    main()
