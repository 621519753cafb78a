"""A frequent class above the rare ones from the same noise: real, plain DDPM, CM, CM's θ_g; with
the guidance of cm.py's samples, 1.5.

    python cm.py --steps 6000 --no-cm --out runs/plain
    python cm.py --steps 6000 --out runs/cm
    python -m experiments.picture runs/plain/checkpoint.pt runs/cm/checkpoint.pt  # assets/rare.png
"""

import argparse
import sys
from pathlib import Path

import torch

import cm

ASSETS = Path(__file__).parent.parent / "assets"

def draw(plain_checkpoint, cm_checkpoint, path, columns=8):
    """Write the picture. Raises ValueError unless the runs are of one data set, one with CM."""
    plain_config, plain, plain_counts = cm.load_trained(plain_checkpoint)
    config, unet, counts = cm.load_trained(cm_checkpoint)
    if config.no_cm or not plain_config.no_cm:
        raise ValueError(f"{plain_checkpoint} must be a run with --no-cm, {cm_checkpoint} without")
    if (plain_config.dataset, plain_counts) != (config.dataset, counts):
        raise ValueError("the two runs are of different data")
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


def main(argv=None):
    parser = argparse.ArgumentParser(prog="picture", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cm.fail
    parser.add_argument("plain", type=Path, help="checkpoint.pt of a run with --no-cm")
    parser.add_argument("cm", type=Path, help="checkpoint.pt of the same run with CM")
    parser.add_argument("--out", type=Path, default=ASSETS / "rare.png")
    args = parser.parse_args(argv)
    try:
        draw(args.plain, args.cm, args.out)
        return 0
    except (ValueError, OSError) as e:
        cm.fail(e)


if __name__ == "__main__":
    sys.exit(main())
