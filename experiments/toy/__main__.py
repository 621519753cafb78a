"""CM on points in the plane: a minute to train, and one picture shows all that was learned.

    python -m experiments.toy              # plain and CM: their distances, and assets/toy.png
    python -m experiments.toy --seeds 10   # CM taken apart: the table of README.md
"""

import argparse
from pathlib import Path

import torch

import cm
from experiments.toy import toy

PICTURE = Path(__file__).parents[2] / "assets" / "toy.png"


def show(seed=0):
    """Train plain and CM; print their distances and draw the picture."""
    plain, (net, y, d) = toy.train("plain", seed)[0], toy.train("CM", seed)
    panels = {"plain": toy.generate(plain, seed), "CM": toy.generate(net, seed)}
    with cm.general_only(net):
        panels["CM's θ_g, without BA"] = toy.generate(net, seed)
    print("energy distance to the truth, in thousandths")
    for title, points in panels.items():
        many, few = toy.score(points, seed)
        print(f"{title:20}  Many {many:5.1f}  Few {few:5.1f}")
    toy.draw({"training points": toy.training_points(seed)} | panels, y, d, PICTURE)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="toy", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cm.fail
    parser.add_argument("--seeds", type=int, help="print a table of so many, from 2 on")
    seeds = parser.parse_args(argv).seeds
    torch.set_num_threads(1)  # so small a network is slower on several, on busy cores tenfold
    if seeds is None:
        show()
    elif seeds > 1:
        toy.table(seeds)
    else:
        cm.fail(f"--seeds is {seeds}; an interval needs at least 2")


if __name__ == "__main__":
    main()
