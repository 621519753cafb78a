"""Class-conditional diffusion of points in the plane, without and with CM; the data, a network,
training, the distance to the truth, the picture, the table. __main__.py has the command line.

Points [N, 2] pass as images [N, 2, 1, 1], so losses, schedule and DDIM are cm.py's own.
"""

import math

import matplotlib
import scipy.stats
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import cm

STEPS, BATCH, LR, DRAWN = 2000, 256, 6e-3, 500  # DRAWN: generated points a class

# Eight Lissajous curves, (sin 2πau, sin 2π(bu + shift)), on a circle, the most frequent class first
CURVES = {"ring": (1, 1, 1 / 4), "wave": (1, 3, 0), "eight": (2, 1, 0), "cup": (1, 2, 3 / 4),
          "oval": (1, 1, 1 / 8), "arch": (1, 2, 1 / 4), "hook": (2, 1, 1 / 8), "slash": (1, 1, 0)}
COUNTS = cm.class_counts(1000, 100, len(CURVES))
ANGLES = 2 * math.pi * torch.arange(8) * 3 / 8  # the order puts rare classes beside frequent ones
PLACES = 1.8 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # [C, 2]

# (capacity reserved?, q of p ~ N^q, options of cm.CapacityManipulation)
ARMS = {"plain": (False, 1, {"no_cm": True}),
        "CM": (True, 1, {}),
        "agreement alone": (False, 1, {}),  # a plain network is its own theta_g: only masks differ
        "capacity alone": (True, 1, {"same_masks": True}),
        "RS": (False, 0.5, {"no_cm": True})}


def draw_points(c, n):
    """n points [n, 2] of class c's true distribution."""
    a, b, shift = list(CURVES.values())[c]
    u = torch.rand(n)
    turns = torch.stack([a * u, b * u + shift], 1)
    return PLACES[c] + torch.sin(2 * math.pi * turns) + 0.05 * torch.randn(n, 2)


def training_points(seed):
    torch.manual_seed(cm.hashed_seed("points", seed))
    return [draw_points(c, n) for c, n in enumerate(COUNTS)]


class MLP(nn.Module):
    """eps_theta(x_t, t, y) [B, 2, 1, 1], of residual blocks."""

    def __init__(self, width=64, blocks=4, dropout=0.1):
        super().__init__()
        self.first = nn.Linear(3 * 13, width)
        self.label = nn.Embedding(len(CURVES), width)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
            nn.Dropout(dropout), nn.Linear(width, width)) for _ in range(blocks))
        self.last = nn.Linear(width, 2)

    def forward(self, x_t, t, y):
        x = torch.cat([x_t.flatten(1) / 3, t[:, None] / cm.T], 1)  # [B, 3]
        angles = torch.cat([math.pi / 2 * 2**k * x for k in range(6)], 1)
        h = self.first(torch.cat([x, angles.sin(), angles.cos()], 1))  # [B, width]
        for block in self.blocks:
            h = h + block(h + self.label(y))
        return self.last(h)[:, :, None, None]


def train(arm, seed):
    """The network, and of all samples y and d, [STEPS, B]. Arms of a seed share training points,
    first weights and, but for RS, batches and noise."""
    reserved, q, options = ARMS[arm]
    points, counts = torch.cat(training_points(seed)), torch.tensor(COUNTS)
    torch.manual_seed(cm.hashed_seed("weights", seed))
    net, seen = MLP(), []
    if reserved:
        cm.reserve_capacity(net.blocks[len(net.blocks) // 2:])
    losses = cm.CapacityManipulation(net, COUNTS, **options)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for step in tqdm(range(STEPS), arm, leave=False):
        torch.manual_seed(cm.hashed_seed("batch", seed, step))
        y = torch.multinomial(counts.double() ** q, BATCH, replacement=True)
        index = counts.cumsum(0)[y] - 1 - torch.randint(2**62, (BATCH,)) % counts[y]
        x0 = points[index][:, :, None, None]  # [B, 2, 1, 1]
        t, eps = torch.randint(cm.T, (BATCH,)), torch.randn_like(x0)
        loss, _, _, d = losses(x0, y, t, eps, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
        seen.append(torch.stack([y, d]))
    return net.eval(), *torch.stack(seen, 1)


@torch.no_grad()
def generate(net, seed):
    """DRAWN points of each class, [C, DRAWN, 2]."""
    torch.manual_seed(cm.hashed_seed("noise", seed))
    y = torch.arange(len(COUNTS)).repeat_interleave(DRAWN)
    x = cm.ddim(lambda x, t: net(x, torch.full_like(y, t), y), torch.randn(len(y), 2, 1, 1),
                cm.make_alpha_bar().tolist())
    return x.view(len(COUNTS), DRAWN, 2)


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'| of points [n, 2] and [m, 2] (Székely & Rizzo 2013).

    a' is never a itself: so draws of one distribution have 0 on average, sometimes less."""
    return 2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean()


def score(points, seed):
    """[on Many, on Few]: classes' mean energy distance to fresh points of them, in thousandths."""
    torch.manual_seed(cm.hashed_seed("fresh", seed))
    d = torch.stack([energy_distance(x, draw_points(c, 2000)) for c, x in enumerate(points)])
    return [1000 * float(d[cm.splits(COUNTS)[split]].mean()) for split in ("Many", "Few")]


def draw(panels, y, d, path):
    """The picture, of {title: points [n, 2] of each class} and a run's y and d, [STEPS, B]."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    axes = figure.subplot_mosaic("0123;dddd", height_ratios=[3, 2])
    for c, name in enumerate(CURVES):
        colour = matplotlib.colormaps["turbo"](0.05 + 0.9 * c / (len(CURVES) - 1))
        for place, (title, points) in zip("0123", panels.items(), strict=True):
            axes[place].plot(*points[c].T, ".", ms=2, color=colour)
            axes[place].set(title=title, xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[],
                            aspect="equal")
            if c in cm.splits(COUNTS)["Few"]:
                axes[place].annotate(name, 1.95 * PLACES[c], ha="center", va="center")
        means = [float(d[i:i + 100][y[i:i + 100] == c].mean()) for i in range(0, STEPS, 100)]
        axes["d"].plot(range(0, STEPS, 100), means, color=colour, label=f"{name} ({COUNTS[c]})")
    axes["d"].set(ylabel="d = ‖ε_θ − ε_θg‖²", xlabel="step", yscale="log")
    axes["d"].legend(loc="center left", bbox_to_anchor=(1, 0.5), title="class (points)")
    cm.write_atomically(path, lambda p: figure.savefig(p, dpi=110))


def table(seeds):
    """Print each arm's mean distances and, with a 95 % t-interval, its differences to plain."""
    print("| arm | Many | − plain | Few | − plain |\n| --- | --- | --- | --- | --- |")
    for arm in ARMS:
        scores = torch.tensor([score(generate(train(arm, seed)[0], seed), seed)
                               for seed in range(seeds)])  # [seeds, 2]
        if arm == "plain":
            plain = scores
        gain = scores - plain
        half = scipy.stats.t.ppf(0.975, seeds - 1) / seeds**0.5 * gain.std(0)
        cells = [f"{mean:.1f} | {change:+.1f} ± {h:.1f}"
                 for mean, change, h in zip(scores.mean(0), gain.mean(0), half, strict=True)]
        print("|", " | ".join([arm, *cells]), "|", flush=True)
