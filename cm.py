"""Capacity Manipulation (CM) for class-imbalanced diffusion models, in one file.

    python cm.py                                          # ten classes of shapes, no download, minutes on a CPU
    python cm.py --dataset fashion --data DIR             # Fashion-MNIST-LT, 16x16, a CPU-sized network
    python cm.py --dataset cifar10 --ir 100               # the paper's setting: a GPU, 300,000 steps
    python cm.py --dataset folder --data TREE             # your own images, TREE/CLASS/*.jpg
    python cm.py --out runs/shapes --resume               # go on where a run stopped
    python cm.py --sample runs/shapes/checkpoint.pt --num-images 1000
    torchrun --nproc-per-node 4 cm.py --dataset cifar100  # several GPUs (add --nnodes for several machines)

The file follows the paper's order: data, network, Eq. (1) capacity reservation, Eq. (3) class weights,
Eq. (2) capacity manipulation loss, base losses, Eq. (4) the total, training, sampling.
Class labels are 0..C-1 in the data set's own order; `alpha_bar[t]` is indexed t = 0..T-1 with T = 1000.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import gzip
import hashlib
import json
import math
import os
import pickle
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

T = 1000  # diffusion steps (Sec. G.1)

# ---------------------------------------------------------------------------------------------------------------------
# Options: one field, one flag. `None` means "the preset's value".

PRESETS = {
    "paper": dict(image_size=32, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1, batch_size=64,
                  steps=300_000, lr=2e-4, warmup=5000, base="oc", rank_ratio=0.1, log_every=500, checkpoint_every=5000),
    "small": dict(image_size=16, channels=16, multipliers=(1, 2, 2), blocks=1, attention=(), dropout=0.0, batch_size=32,
                  steps=4200, lr=3e-3, warmup=None, base="ddpm", rank_ratio=0.3, log_every=50, checkpoint_every=500),
}
DATASETS = {"shapes": "small", "fashion": "small", "cifar10": "paper", "cifar100": "paper", "folder": "paper"}


def option(group, default, help, **extra):
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, **extra))


@dataclass
class Config:
    """Every option of a run. `config.json` in the run directory holds it with the preset's values filled in."""

    dataset: str = option("data", "shapes", "images to train on", choices=list(DATASETS))
    data: str = option("data", None, "where they lie: torchvision's root, four idx files (fashion), or an image tree "
                                     "(folder; held-out images in DIR/val) [default: data]")
    ir: float = option("data", None, "imbalance ratio, most over least frequent class; 1 keeps the set as it is "
                                     "(Sec. 4.1) [default: 100; folder: 1]")
    resample: float = option("data", 1.0, "draw classes with p_c ~ N_c^q: 0.5 square root, 0 class-balanced, 1 off "
                                          "(Sec. 4.1, RS)", metavar="Q")
    flip: bool = option("data", None, "horizontal flips [default: yes, but fashion no: its shoes all point one way]")
    n_max: int = option("data", None, "images in the largest class, the others by --ir [default: all]")

    preset: str = option("network", None, "CPU-sized, or the paper's (Sec. G.1) [default: small for shapes and "
                                          "fashion, else paper]", choices=list(PRESETS))
    image_size: int = option("network", None, "side of the square images, in pixels")
    channels: int = option("network", None, "width of the first level")
    multipliers: tuple = option("network", None, "width multiplier of each level (Fig. 4d)", type=int)
    blocks: int = option("network", None, "residual blocks a level")
    attention: tuple = option("network", None, "resolutions with attention, besides the middle", type=int, nargs="*")
    dropout: float = option("network", None, "dropout rate (Sec. G.1)")
    unconditional: bool = option("network", False, "no labels in the network; the loss still weighs by class")

    no_cm: bool = option("method", False, "the plain network: no reservation, base loss only")
    rank_ratio: float = option("method", None, "rank of BA over full rank (Eq. 1, Sec. G.1)")
    lam: float = option("method", 1.0, "lambda, weight of L_CM (Eq. 4)")
    div_margin: float = option("method", 0.003, "distance up to which divergence is rewarded; inf is Eq. (2) as "
                                                "printed, which has no minimum (README)")
    no_con: bool = option("method", False, "without L_Con (Tab. 7)")
    no_div: bool = option("method", False, "without L_Div (Tab. 7)")
    base: str = option("method", None, "base loss (Sec. 3.2, D)", choices=["oc", "ddpm", "cbdm", "focal"])
    cbdm_prior: str = option("method", "uniform", "classes y' of CBDM: uniform as Eq. (D.1), or by frequency as the "
                                                  "published code", choices=["uniform", "frequency"])

    steps: int = option("training", None, "training steps (Sec. G.1)")
    batch_size: int = option("training", None, "images a step, over all processes (Sec. G.1)")
    lr: float = option("training", None, "Adam's learning rate after warm-up (Sec. G.1)")
    warmup: int = option("training", None, "steps of linear warm-up (Sec. G.1) [default: paper 5000, small steps/60]")
    label_drop: float = option("training", 0.1, "share of samples trained without their label (for guidance)")
    ema: float = option("training", 0.9999, "largest decay of the weights' moving average")
    seed: int = option("training", 0, "seed of weights, batches and sampling")
    amp: str = option("training", "auto", "mixed precision on CUDA: bfloat16 where the GPU has it, else float16",
                      choices=["auto", "bf16", "fp16", "off"])
    compile: bool = option("training", False, "torch.compile the network")
    device: str = option("training", None, "cpu, cuda, cuda:1, ... [default: cuda if there is one]")

    out: str = option("run", None, "run directory, or the .npz that --sample writes [default: runs/DATASET; "
                                   "samples.npz beside the checkpoint]")
    resume: bool = option("run", False, "go on from --out's checkpoint; only --steps may change")
    overwrite: bool = option("run", False, "write into a directory that is in use")
    checkpoint_every: int = option("run", None, "steps between checkpoints")
    log_every: int = option("run", None, "steps between rows of log.csv")

    sample: str = option("sampling", None, "generate images from this checkpoint.pt instead of training",
                         metavar="CHECKPOINT")
    num_images: int = option("sampling", 50_000, "how many (Sec. 4.1)")
    labels: tuple = option("sampling", None, "only these classes, in equal numbers", type=int)
    sampler: str = option("sampling", "ddim", "50-step DDIM (Sec. G.1), 1000-step DDPM (Alg. C.1) or 15-step "
                                              "DPM-Solver++ (Tab. G.10)", choices=["ddim", "ddpm", "dpm"])
    sample_steps: int = option("sampling", None, "sampler steps [default: ddim 50, ddpm 1000, dpm 15]")
    guidance: float = option("sampling", 0.0, "classifier-free guidance w in eps_c + w (eps_c - eps_null)")
    general_only: bool = option("sampling", False, "sample theta_g, without BA (Tab. 7)")
    sample_batch: int = option("sampling", 250, "images at a time")

    def resolved(self):
        """A copy with every preset-dependent field filled in. Raises ValueError on values that make no sense."""
        c = dataclasses.replace(self)
        c.preset = c.preset or DATASETS[c.dataset]
        for name, value in PRESETS[c.preset].items():
            if getattr(c, name) is None:
                setattr(c, name, value)
        if c.ir is None:
            c.ir = 1.0 if c.dataset == "folder" else 100.0
        if c.flip is None:
            c.flip = c.dataset != "fashion"
        if c.warmup is None:  # the paper's 5,000 of 300,000, scaled to the planned length
            c.warmup = max(1, c.steps // 60)
        c.out = c.out or f"runs/{c.dataset}"
        c.multipliers, c.attention = tuple(c.multipliers), tuple(c.attention)
        for name in ("steps", "image_size", "channels", "blocks", "batch_size", "log_every", "checkpoint_every",
                     "num_images", "sample_batch", "ir"):
            check(getattr(c, name) >= 1, name, getattr(c, name), "at least 1")
        for name in ("lam", "resample", "warmup", "seed", "lr"):
            check(0 <= getattr(c, name) < math.inf, name, getattr(c, name), "at least 0")
        check(c.seed < 2**63, "seed", c.seed, "below 2^63")
        for name in ("dropout", "label_drop", "ema"):
            check(0 <= getattr(c, name) < 1, name, getattr(c, name), "in [0, 1)")
        check(c.n_max is None or c.n_max >= 1, "n_max", c.n_max, "at least 1")
        check(0 < c.rank_ratio <= 1, "rank_ratio", c.rank_ratio, "in (0, 1]")
        check(c.div_margin >= 0, "div_margin", c.div_margin, "at least 0")
        check(math.isfinite(c.guidance), "guidance", c.guidance, "a finite number")
        sampler_steps(c.sampler, c.sample_steps)
        check(c.channels % 2 == 0, "channels", c.channels, "even")
        check(min(c.multipliers) >= 1, "multipliers", c.multipliers, "at least 1 a level")
        stride = 2 ** (len(c.multipliers) - 1)
        check(c.image_size % stride == 0, "image_size", c.image_size, f"divisible by the network's stride, {stride}")
        check(not (c.resume and c.overwrite), "resume", True, "given without --overwrite")
        return c


def check(ok, name, value, expected):
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# Data: the long-tailed split everyone uses, and one uint8 tensor on the device


def class_counts(n_max, ir, num_classes):
    """Training images a class, N_c = int(n_max * ir^(-c/(C-1))) (Cao et al. 2019; Sec. 4.1), a list of C ints.

    Raises ValueError if ir < 1, there are fewer than two classes, or a class would be empty."""
    if num_classes < 2:
        raise ValueError(f"a long-tailed split needs at least two classes, not {num_classes}")
    if not ir >= 1:
        raise ValueError(f"the imbalance ratio is {ir}; it must be at least 1")
    counts = [int(n_max * (1 / ir) ** (c / (num_classes - 1.0))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(f"imbalance ratio {ir:g} leaves the smallest class empty; "
                         f"with {int(n_max)} images in the largest, {int(n_max)} is the most")
    return counts


def long_tail_indices(labels, ir, seed=0, n_max=None):
    """Indices of the long-tailed subset of `labels` [N], class by class; ir = 1 without n_max keeps all N.

    As in the code that everyone's figures come from: RandomState(seed), classes in order, each class's indices
    shuffled, the first N_c taken; n_max = N / C, or the smallest class where classes differ. A smaller `n_max` takes
    the first of the same order. Raises ValueError where a class has fewer images than its N_c."""
    labels = np.asarray(labels)
    if ir == 1 and n_max is None:
        return np.arange(len(labels))
    sizes = np.bincount(labels)
    if n_max is None:
        n_max = len(labels) / len(sizes) if sizes.min() == sizes.max() else sizes.min()
    counts = class_counts(n_max, ir, len(sizes))
    rng, chosen = np.random.RandomState(seed), []
    for c, n in enumerate(counts):
        if n > sizes[c]:
            raise ValueError(f"--n-max {n_max} asks for {n} images of class {c}, which has {sizes[c]}")
        index = np.where(labels == c)[0]
        rng.shuffle(index)
        chosen.append(index[:n])
    return np.concatenate(chosen)


def splits(counts):
    """{"Many": classes, "Medium": ..., "Few": ...} by training count, descending (Sec. 4.1; two classes: no Medium)."""
    order, third = np.argsort(-np.asarray(counts), kind="stable"), len(counts) // 3
    if len(counts) == 2:
        return {"Many": order[:1], "Few": order[1:]}
    return {"Many": order[:third], "Medium": order[third:2 * third], "Few": order[2 * third:]}


SHAPES = ("disc", "ring", "cross", "bar", "square", "triangle", "crescent", "heart", "star", "frame")


def signed_distance(shape, x, y):
    """Signed distance (negative inside) from points (x, y), any shape, to a shape of about unit radius."""
    r = np.hypot(x, y)
    box = lambda x, y, a, b: np.maximum(abs(x) - a, abs(y) - b)
    if shape == "disc":
        return r - 0.85
    if shape == "square":
        return box(x, y, 0.75, 0.75)
    if shape == "triangle":  # three half-planes
        return np.max([x * math.cos(a) + y * math.sin(a) for a in np.pi * np.array([0.5, 7 / 6, 11 / 6])], 0) - 0.5
    if shape == "ring":
        return abs(r - 0.7) - 0.22
    if shape == "cross":
        return np.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95))
    if shape == "star":  # five-fold symmetry: fold the angle, then one edge from the tip to the notch
        a = abs((np.arctan2(y, x) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        notch = 0.45 * np.array([math.cos(np.pi / 5), math.sin(np.pi / 5)])
        normal = np.array([notch[1], 1.0 - notch[0]]) / math.hypot(notch[1], 1.0 - notch[0])
        return (r * np.cos(a) - 1.0) * normal[0] + r * np.sin(a) * normal[1]
    if shape == "crescent":
        return np.maximum(r - 0.9, 0.72 - np.hypot(x - 0.42, y))
    if shape == "heart":  # a square with a half-disc on each of two sides
        x, y = x + 0.2, y + 0.2
        return np.min([box(x, y, 0.5, 0.5), np.hypot(x - 0.5, y) - 0.5, np.hypot(x, y - 0.5) - 0.5], 0)
    if shape == "bar":
        return np.hypot(x - np.clip(x, -0.75, 0.75), y) - 0.22
    if shape == "frame":
        return abs(box(x, y, 0.66, 0.66)) - 0.17
    raise ValueError(f"unknown shape {shape!r}")


def draw_shapes(per_class, size, seed):
    """Anti-aliased coloured shapes, uint8 [10 * per_class, size, size, 3] and labels, class by class.

    Position, size, angle and hue vary, so a class has real diversity; the ground is black."""
    rng, images = np.random.RandomState(seed), []
    grid = (np.arange(size) + 0.5) / size * 2 - 1  # pixel centres in [-1, 1]
    for shape in SHAPES:
        radius = rng.uniform(0.7, 0.9, (per_class, 1, 1))
        cx, cy = rng.uniform(-1, 1, (2, per_class, 1, 1)) * (1 - radius)
        angle = rng.uniform(0, 2 * np.pi, (per_class, 1, 1))
        u, v = (grid[None, None, :] - cx) / radius, (grid[None, :, None] - cy) / radius
        x, y = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        cover = np.clip(0.5 - signed_distance(shape, x, y) * radius * size / 2, 0, 1)[..., None]
        hue = rng.uniform(0, 1, (per_class, 1, 1, 1)) + np.array([0, 1 / 3, 2 / 3])
        colour = np.clip(1.5 * np.cos(2 * np.pi * hue) + 0.75, 0.05, 1)
        images.append(np.rint(255 * (cover * colour)).astype(np.uint8))
    return np.concatenate(images), np.repeat(np.arange(len(SHAPES)), per_class)


def read_idx(path):
    """The uint8 array of an idx file (the MNIST format), gzipped or not. Raises ValueError if it is none."""
    try:
        raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        dims = np.frombuffer(raw, ">u4", raw[3], 4) if raw[:3] == b"\0\0\x08" else ()
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile):
        raise ValueError(f"{path} is not a whole idx file of bytes; fetch it again") from None


def read_fashion(root, train):
    """Fashion-MNIST, uint8 [N, 32, 32, 1] (padded) and labels: idx files in `root`, else through torchvision."""
    stem = "train" if train else "t10k"
    names = [f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"]
    found = [next((p for p in (root / n, root / (n + ".gz")) if p.is_file()), None) for n in names]
    if any(found):
        missing = [n for n, path in zip(names, found) if not path]
        if missing:
            raise ValueError(f"{root} lacks {missing[0]}[.gz]")
        images, labels = map(read_idx, found)
    else:
        data = fetch(torchvision.datasets.FashionMNIST, root, train)
        images, labels = data.data.numpy(), data.targets.numpy()
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{root}: {len(images)} images and {len(labels)} labels don't make a Fashion-MNIST set")
    pad = (32 - images.shape[1]) // 2
    return np.pad(images, ((0, 0), (pad, pad), (pad, pad)))[..., None], labels.astype(np.int64)


def fetch(dataset, root, train):
    """A torchvision data set, downloaded if need be. Raises ValueError, leaving no empty folders, where it can't."""
    folders = [root / dataset.__name__ / "raw", root / dataset.__name__, root]
    new = [d for d in folders if not d.exists()]
    try:
        return dataset(root, train=train, download=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as e:
        for d in new:
            if d.is_dir() and not any(d.iterdir()):
                d.rmdir()
        raise ValueError(f"{dataset.__name__} is neither whole in {root} nor could it be fetched "
                         f"({' '.join(str(e).split()) or type(e).__name__}); --data names the directory that holds it") from None


def read_folder(root, size, train):
    """An ImageFolder tree: uint8 [N, size, size, 3] (shorter side resized, centre cropped), labels, class names.

    Classes are the folders of root/train, or of root itself; held-out images lie in root/val. Decoded once, into
    an .npy in `root` whose name tells the size and the files it was made of."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory; --data must name a tree of images, one folder a class")
    tree = root / "train" if (root / "train").is_dir() else root
    names = sorted(d.name for d in tree.iterdir() if d.is_dir() and not (tree == root and d.name == "val"))
    if not names:
        raise ValueError(f"{tree} holds no class folders; it must hold one folder of images a class")
    if len(names) < 2:
        raise ValueError(f"{tree} holds one class only ({names[0]}); class imbalance needs at least two")
    if not train:
        tree = root / "val"
    folder = torchvision.datasets.folder
    try:
        files = folder.make_dataset(str(tree), {n: i for i, n in enumerate(names)}, folder.IMG_EXTENSIONS,
                                    allow_empty=not train)
    except FileNotFoundError as e:
        raise ValueError(" ".join(str(e).split())) from None
    labels = np.array([y for _, y in files], np.int64)
    stamp = [(os.path.relpath(f, tree), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f, _ in files]
    cache = root / f".cm-{tree.name if tree != root else 'all'}-{size}-{hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]}.npy"
    if cache.is_file():
        return np.load(cache, mmap_mode="c"), labels, names

    def decode(file):
        try:
            image = folder.pil_loader(file)
        except OSError as e:
            raise ValueError(f"{file} can't be read as an image ({e})") from None
        scale = size / min(image.size)
        image = image.resize([max(size, round(s * scale)) for s in image.size], 3, reducing_gap=3.0)  # 3: bicubic
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))

    images = np.empty((len(files), size, size, 3), np.uint8)
    with ThreadPool() as pool:  # PIL decodes outside the interpreter's lock
        for i, image in enumerate(tqdm(pool.imap(decode, [f for f, _ in files], 64), "decoding", len(files))):
            images[i] = image
    try:
        write_atomically(cache, lambda path: np.save(path, images))
    except OSError as e:
        print(f"{cache} can't be written ({e.strerror}); the images will be decoded again next time", file=sys.stderr)
    return images, labels, names


def load_dataset(name, data=None, image_size=32, train=True):
    """A data set as it comes (not yet long-tailed): uint8 [N, H, W, C], labels [N] int64, list of class names.

    train=False gives the held-out images, none (N = 0) where there are none. Raises ValueError."""
    root = Path(data or "data")
    if name == "folder":
        if data is None:
            raise ValueError("--dataset folder needs --data DIR, a tree with one folder of images a class")
        if not train and not (root / "val").is_dir():
            return np.empty((0, image_size, image_size, 3), np.uint8), np.empty(0, np.int64), []
        return read_folder(root, image_size, train)
    if name == "shapes":
        images, labels = draw_shapes(1000 if train else 64, image_size, seed=0 if train else 1)
        return images, labels, list(SHAPES)
    if name == "fashion":
        images, labels = read_fashion(root, train)
        names = list(torchvision.datasets.FashionMNIST.classes)
    elif name in ("cifar10", "cifar100"):
        set_ = fetch(getattr(torchvision.datasets, name.upper()), root, train)
        images, labels, names = set_.data, np.asarray(set_.targets, np.int64), list(set_.classes)
    else:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    side = images.shape[1]
    if side % image_size:
        raise ValueError(f"--image-size is {image_size}; for {name} it must divide {side}")
    f, (n, _, _, c) = side // image_size, images.shape
    if f > 1:  # average pooling
        images = np.rint(images.reshape(n, image_size, f, image_size, f, c).mean((2, 4), np.float32)).astype(np.uint8)
    return images, labels, names


class Data:
    """A training set as one uint8 tensor on the device, sorted by class, and its held-out images.

    images [N, C, H, W]; labels [N]; counts [C] int64 tensor; names; held_out, held_out_labels; held_out_name."""

    def __init__(self, c, device="cpu"):
        images, labels, self.names = load_dataset(c.dataset, c.data, c.image_size)
        index = long_tail_indices(labels, c.ir, n_max=c.n_max)
        index = index[np.argsort(labels[index], kind="stable")]
        chw = lambda a: torch.from_numpy(np.ascontiguousarray(a)).permute(0, 3, 1, 2).contiguous().to(device)
        self.images, self.labels = chw(images[index]), torch.from_numpy(labels[index]).to(device)
        self.counts = torch.bincount(self.labels, minlength=len(self.names))
        if self.counts.min() < 1:
            raise ValueError(f"class {self.names[int(self.counts.argmin())]} has no images")
        self.starts = self.counts.cumsum(0) - self.counts
        held, held_labels, _ = load_dataset(c.dataset, c.data, c.image_size, train=False)
        self.held_out_name = "held-out" if len(held) else "TRAINING images"
        self.held_out, self.held_out_labels = ((chw(held), torch.from_numpy(held_labels).to(device)) if len(held)
                                               else (self.images, self.labels))

    def batch(self, size, resample=1.0, flip=True):
        """`size` images in [-1, 1] and their labels, drawn with replacement, classes with p_c ~ N_c^resample."""
        y = torch.multinomial(self.counts.double() ** resample, size, replacement=True)
        index = self.starts[y] + torch.randint(2**62, (size,), device=y.device) % self.counts[y]
        x = to_float(self.images[index])
        if flip:
            x = torch.where(torch.rand(size, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        return x, y


def to_float(images):
    return images.float() / 127.5 - 1


def to_uint8(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Network: the DDPM UNet of the code that the paper builds on, cut between its encoder and its decoder


def conv(cin, cout, kernel=3, stride=1, gain=1.0):
    layer = nn.Conv2d(cin, cout, kernel, stride, kernel // 2)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def linear(cin, cout):
    layer = nn.Linear(cin, cout)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def norm(channels):
    """32 groups as in the base code; one where channels are few: groups of four hide an image's mean from the network."""
    return nn.GroupNorm(32 if channels >= 128 else 1, channels)


class Attention(nn.Module):
    """Self-attention over pixels, one head, residual."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v = (conv(channels, channels, 1) for _ in range(3))
        self.proj = conv(channels, channels, 1, gain=1e-5)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(1, 2).reshape(x.shape))  # [B, C, H, W]


class ResBlock(nn.Module):
    def __init__(self, cin, cout, emb_dim, dropout, attention):
        super().__init__()
        self.block1 = nn.Sequential(norm(cin), nn.SiLU(), conv(cin, cout))
        self.emb_proj = nn.Sequential(nn.SiLU(), linear(emb_dim, cout))
        self.block2 = nn.Sequential(norm(cout), nn.SiLU(), nn.Dropout(dropout), conv(cout, cout, gain=1e-5))
        self.shortcut = conv(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.block1(x) + self.emb_proj(emb)[:, :, None, None]
        return self.attention(self.block2(h) + self.shortcut(x))


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """eps_theta(x_t, t, y), as `decode(*encode(x_t, t, y))`; the decoder is what Eq. (1) factorises.

    num_classes=None makes it unconditional. `image_size` only places the attention; any size divisible by
    2^(levels-1) can be fed. Raises ValueError where widths don't fit GroupNorm or the image's size the stride."""

    def __init__(self, num_classes=10, image_channels=3, image_size=32, channels=128, multipliers=(1, 2, 2, 2),
                 blocks=2, attention=(16,), dropout=0.1):
        super().__init__()
        emb_dim, self.channels, self.stride = 4 * channels, channels, 2 ** (len(multipliers) - 1)
        self.time_embedding = nn.Sequential(linear(channels, emb_dim), nn.SiLU(), linear(emb_dim, emb_dim))
        self.label_embedding = nn.Embedding(num_classes, emb_dim) if num_classes else None
        attends = [image_size >> level in attention for level in range(len(multipliers))]

        self.encoder, width, widths = nn.ModuleList([conv(image_channels, channels)]), channels, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.encoder.append(ResBlock(width, channels * multiplier, emb_dim, dropout, attends[level]))
                width = channels * multiplier
                widths.append(width)
            if level < len(multipliers) - 1:
                self.encoder.append(conv(width, width, stride=2))
                widths.append(width)
        self.middle = nn.ModuleList([ResBlock(width, width, emb_dim, dropout, True),
                                     ResBlock(width, width, emb_dim, dropout, False)])
        self.decoder = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.decoder.append(ResBlock(width + widths.pop(), channels * multiplier, emb_dim, dropout,
                                             attends[level]))
                width = channels * multiplier
            if level > 0:
                self.decoder.append(Up(width))
        self.decoder.append(nn.Sequential(norm(width), nn.SiLU(), conv(width, image_channels, gain=1e-5)))

    def encode(self, x_t, t, y=None, extra_emb=None):
        """x_t [B, C, H, W], t [B], y [B] (-1: label dropped) or None, extra_emb [B, 4 * channels] added to the
        embedding -> (h, skips, emb), what `decode` takes. Raises ValueError if H or W is off the stride."""
        if x_t.shape[2] % self.stride or x_t.shape[3] % self.stride:
            raise ValueError(f"images of {x_t.shape[2]}x{x_t.shape[3]} don't fit the network's stride, {self.stride}")
        half = torch.arange(self.channels // 2, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(10_000.0) / (self.channels // 2) * half)
        emb = torch.cat([angle.sin(), angle.cos()], 1).to(self.time_embedding[0].weight.dtype)
        emb = self.time_embedding(emb)  # [B, 4 * channels]
        if y is not None and self.label_embedding is not None:
            emb = emb + self.label_embedding(y.clamp(min=0)) * (y >= 0)[:, None]  # a dropped label adds nothing
        if extra_emb is not None:
            emb = emb + extra_emb
        h, skips = x_t, []
        for layer in self.encoder:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        return h, skips, emb

    def decode(self, h, skips, emb):
        """-> eps [B, C, H, W]"""
        skips = list(skips)
        for layer in self.decoder:
            h = layer(torch.cat([h, skips.pop()], 1), emb) if isinstance(layer, ResBlock) else layer(h)
        return h

    def forward(self, x_t, t, y=None, extra_emb=None):
        return self.decode(*self.encode(x_t, t, y, extra_emb))


# ---------------------------------------------------------------------------------------------------------------------
# Eq. (1): capacity reservation


class LowRankReserved(nn.Module):
    """A Conv2d or Linear whose weight in force is W_g + BA, or W_g alone inside `general_only` (Eq. 1).

    `layer` holds W_g (and the bias); B [d, r] starts at zero and A [r, k] as in LoRA, so training starts from the
    plain layer. `weight` and `bias` can be read as on the plain layer."""

    def __init__(self, layer, rank):
        super().__init__()
        d, k = layer.weight.flatten(1).shape
        self.layer, self.general = layer, False
        self.B = nn.Parameter(layer.weight.new_zeros(d, rank))
        self.A = nn.Parameter(layer.weight.new_empty(rank, k))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def weight(self):
        w_g = self.layer.weight
        if self.general:
            return w_g
        with torch.autocast(w_g.device.type, enabled=False):  # bfloat16 would round a small BA away
            return w_g + (self.B @ self.A).view_as(w_g)  # Eq. (1); the sum keeps W_g's memory layout, channels-last

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        return self.layer._conv_forward(x, self.weight, self.bias)  # padding mode, stride, dilation, groups


def reserve_capacity(module, rank_ratio=0.1):
    """Replace every Conv2d and Linear inside `module`, in place, by a LowRankReserved of rank
    int(rank_ratio * min(d, k)); where that is 0 the layer stays whole. Returns the module (a bare layer comes back
    wrapped). Raises ValueError if rank_ratio is outside (0, 1], if nothing is large enough to reserve in, or if
    capacity is reserved already. (Eq. 1, Sec. 3.1, G.1)"""
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank ratio {rank_ratio} is outside (0, 1]")
    if any(isinstance(m, LowRankReserved) for m in module.modules()):
        raise ValueError("capacity is reserved in this module already; merge it first")
    reserved, largest = {}, 0
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            full = min(m.weight.flatten(1).shape)
            largest = max(largest, full)
            if int(rank_ratio * full) > 0:
                reserved[m] = LowRankReserved(m, int(rank_ratio * full))
    if not reserved:
        raise ValueError(f"rank ratio {rank_ratio} reserves nothing: the largest full rank here is {largest}")
    return replace_modules(module, reserved)


def replace_modules(module, new):
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child in new and parent is not new[child]:
                setattr(parent, name, new[child])
    return new.get(module, module)


@contextlib.contextmanager
def general_only(module):
    """Inside, `module` computes with theta_g, that is W_g alone (Sec. 3.2). A plain module is its own theta_g."""
    reserved = [m for m in module.modules() if isinstance(m, LowRankReserved)]
    before = [m.general for m in reserved]
    for m in reserved:
        m.general = True
    try:
        yield module
    finally:
        for m, general in zip(reserved, before):
            m.general = general


def merge(module):
    """A plain copy of `module` with the weights in force, W_g + BA, folded in: names, parameter count and FLOPs of a
    network that never had reserved capacity (Sec. 3.2, Inference). Inside `general_only`, a plain copy of theta_g."""
    plain = copy.deepcopy(module)
    merged = {}
    for m in plain.modules():
        if isinstance(m, LowRankReserved):
            m.layer.weight = nn.Parameter(m.weight.detach().clone())
            merged[m] = m.layer
    return replace_modules(plain, merged)


# ---------------------------------------------------------------------------------------------------------------------
# Forward process: one schedule for training and sampling


def make_alpha_bar(device="cpu"):
    """alpha_bar [T] float64, betas linear from 1e-4 to 0.02 (Sec. G.1)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).to(device)


def scales(alpha_bar, t):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each [B, 1, 1, 1] float32, for t [B]."""
    a = alpha_bar[t][:, None, None, None]
    return a.sqrt().float(), (1 - a).sqrt().float()


def add_noise(x0, t, eps, alpha_bar):
    """x_t ~ q(x_t | x_0) for x0 and eps [B, C, H, W] (Sec. A; Algorithm C.1 misprints the second root)."""
    signal_scale, noise_scale = scales(alpha_bar, t)
    return signal_scale * x0 + noise_scale * eps


# ---------------------------------------------------------------------------------------------------------------------
# Eqs. (3) and (2): class weights and the capacity manipulation loss


def class_weights(counts):
    """(omega_con, omega_div), each [C] float32, of training counts N_c > 0; all 1 for balanced data."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    if n.ndim != 1 or not (n > 0).all():
        raise ValueError("class weights need one positive count a class")
    omega_con = len(n) * n / n.sum()  # Eq. (3): majority classes agree
    omega_div = len(n) / (n * (1 / n).sum())  # Eq. (3): minority classes differ
    return omega_con.float(), omega_div.float()


def squared_distance(a, b):
    """||a - b||^2 as a mean over C x H x W, [B], at least in float32."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) - b.to(dtype)).square().flatten(1).mean(1)


def capacity_loss(eps_theta, eps_theta_g, omega_con, omega_div, div_margin):
    """L_CM [B] of predictions [B, C, H, W] and each sample's class weights [B].

    Eq. (2) is (omega_con - omega_div) * d. Where that weight is negative it has no minimum, so there, and only
    there, d counts up to `div_margin`; div_margin = inf gives Eq. (2) as printed."""
    d = squared_distance(eps_theta, eps_theta_g)
    w = omega_con - omega_div
    return torch.where(w >= 0, w * d, w * d.clamp(max=div_margin))  # Eq. (2), bounded


# ---------------------------------------------------------------------------------------------------------------------
# Base losses (Sec. D) and Eq. (4)


@torch.no_grad()
def oc_target(x0, x_t, t, y, eps, counts, alpha_bar, generator=None):
    """OC's target [B, C, H, W] (Eqs. D.2-D.4, their misprints mended: README).

    A reference x_ref is drawn from the batch with probability ~ q(x_t | x_ref), the sample itself included; where
    its class is no rarer than y's the target points to it, else it is eps. counts [C] are training counts."""
    signal_scale, noise_scale = scales(alpha_bar, t)
    # cdist without the matrix-product shortcut: at small t the exponent multiplies its rounding by 10^4
    distance = torch.cdist((x_t / signal_scale).flatten(1), x0.flatten(1),
                           compute_mode="donot_use_mm_for_euclid_dist").square()  # [B, B]
    logits = -distance / (2 * (noise_scale / signal_scale).square().flatten(1))  # Eq. (D.4)
    ref = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    transfer = (counts[y[ref]] >= counts[y])[:, None, None, None]
    return torch.where(transfer, (x_t - signal_scale * x0[ref]) / noise_scale, eps)  # Eq. (D.3)


def same_masks(x):
    """Inside, random numbers are drawn as usual; on leaving, the generator goes back. So the pass that follows draws
    the dropout masks of the pass inside again: otherwise d > 0 even where BA = 0."""
    on_gpu = x.device.type == "cuda"
    return torch.random.fork_rng([x.device.index or 0] if on_gpu else [], device_type="cuda")


class CapacityManipulation(nn.Module):
    """The losses of one batch under a UNet; `forward` draws OC's references, CBDM's classes and the dropout masks."""

    def __init__(self, unet, counts, c):
        super().__init__()
        self.unet, self.c = unet, c
        omega_con, omega_div = class_weights(counts)
        self.register_buffer("omega_con", omega_con * (not c.no_con))
        self.register_buffer("omega_div", omega_div * (not c.no_div))
        self.register_buffer("counts", torch.as_tensor(counts))
        self.register_buffer("alpha_bar", make_alpha_bar())
        self.encode, self.decode = unet.encode, unet.decode
        if c.compile:  # fallback_random: eager's random numbers, so that dropout masks can be drawn again
            self.encode, self.decode = (torch.compile(f, options={"fallback_random": True})
                                        for f in (unet.encode, unet.decode))

    def forward(self, x0, y, t, eps, y_in):
        """x0, eps [B, C, H, W]; y, t [B]; y_in [B], y with -1 where the label is dropped.
        -> total loss (scalar), base loss [B], L_CM [B], d [B]."""
        c = self.c
        x_t = add_noise(x0, t, eps, self.alpha_bar)
        target = oc_target(x0, x_t, t, y, eps, self.counts, self.alpha_bar) if c.base == "oc" else eps
        if c.base == "cbdm":
            prior = torch.ones_like(self.omega_con) if c.cbdm_prior == "uniform" else self.counts.float()
            y_other = torch.multinomial(prior, len(y), replacement=True)
            with same_masks(x_t):
                eps_other = self.decode(*self.encode(x_t, t, y_other))

        h, skips, emb = self.encode(x_t, t, y_in)  # one encoder pass: theta and theta_g share it
        if not c.no_cm:
            with same_masks(x_t), general_only(self.unet):
                eps_theta_g = self.decode(h, skips, emb)
        eps_theta = self.decode(h, skips, emb)

        base = squared_distance(eps_theta, target)  # [B]
        if c.base == "cbdm":  # Eq. (D.1) with tau = 1, gamma = 1/4
            pull = squared_distance(eps_theta, eps_other.detach()) + 0.25 * squared_distance(eps_theta.detach(), eps_other)
            base = base + t / T * pull * (y_in >= 0)
        elif c.base == "focal":  # gamma = 1
            base = (1 - torch.exp(-base)) * base
        if c.no_cm:
            return base.mean(), base, torch.zeros_like(base), torch.zeros_like(base)
        cm = capacity_loss(eps_theta, eps_theta_g, self.omega_con[y], self.omega_div[y], c.div_margin)
        total = base.mean() + c.lam * cm.mean()  # Eq. (4)
        return total, base, cm, squared_distance(eps_theta.detach(), eps_theta_g.detach())


# ---------------------------------------------------------------------------------------------------------------------
# Training


def hashed_seed(purpose, *numbers):
    """One integer for `manual_seed` from a purpose (at most 8 letters) and integers from 0 to 2^63 - 1.

    PyTorch's CPU generators keep only the low 32 bits of a seed: sums and shifts of a run's seed and its step would
    give two runs the same draws. Hashed, different (purpose, seed, step or image, process) are unrelated."""
    words = [int.from_bytes(purpose.encode(), "little"), *numbers]
    words = [half for word in words for half in (word % 2**32, word >> 32)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def make_unet(c, num_classes, image_channels):
    """The UNet of a run, its decoder factorised unless --no-cm."""
    unet = UNet(None if c.unconditional else num_classes, image_channels, c.image_size, c.channels, c.multipliers,
                c.blocks, c.attention, c.dropout)
    if not c.no_cm:
        reserve_capacity(unet.decoder, c.rank_ratio)
    return unet


def draw_batch(data, c, size, step, rank=0):
    """One step's x0, y, t, eps and y_in. Also seeds what `forward` draws, all by (seed, step, rank): so a resumed run
    draws what the uninterrupted one draws, and runs of different methods see the same batches."""
    torch.manual_seed(hashed_seed("batch", c.seed, step, rank))
    x0, y = data.batch(size, c.resample, c.flip)
    t = torch.randint(T, (size,), device=x0.device)
    eps = torch.randn_like(x0)
    y_in = torch.where(torch.rand(size, device=x0.device) < c.label_drop, -1, y)
    return x0, y, t, eps, y_in


def write_atomically(path, write):
    """Call `write` on a temporary name beside `path`, then rename: `path` is whole at every moment."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """The dict that training saved. Raises ValueError where `path` is no such checkpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else "truncated, or not a PyTorch file"
        raise ValueError(f"{path} can't be loaded as a checkpoint: {reason}") from None
    if not isinstance(state, dict) or not {"config", "counts", "names", "step", "model", "ema"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint.pt that cm.py wrote")
    return state


def load_weights(unet, state, path):
    try:
        unet.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"{path} holds another network than its configuration says") from None


def load_trained(path, weights="ema"):
    """(configuration, network in eval mode with W_g, A and B still apart, class counts) of a checkpoint.pt; weights "ema",
    or "model" for those that the next step would train. Raises ValueError."""
    state = load_checkpoint(path)
    try:
        c = Config(**state["config"])
        unet = make_unet(c, len(state["counts"]), state["ema"]["encoder.0.weight"].shape[1])
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path} is not a checkpoint.pt that this cm.py wrote") from None
    load_weights(unet, state[weights], path)
    return c, unet.eval().requires_grad_(False), state["counts"]


def groups(counts):
    """What tables and logs show, {label: classes [n]}: each class by its number, most frequent first (of more than 20
    the five most and five least frequent), then the splits."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    shown = order if len(order) <= 20 else np.concatenate([order[:5], order[-5:]])
    return {str(k): torch.tensor([k]) for k in shown} | {s: torch.as_tensor(k) for s, k in splits(counts).items()}


class Log:
    """log.csv: a row every `log_every` steps, base loss and d of each group as means over the steps since the last row
    (nan: none was drawn). `sums` [3, C] (base, d, samples) goes into checkpoints."""

    def __init__(self, path, counts, device):
        self.path, self.groups = path, groups(counts.cpu())
        self.sums = torch.zeros(3, len(counts), dtype=torch.float64, device=device)

    def start(self, step):
        """Begin the file, or cut off what a run resumed at `step` will write again."""
        rows = [["step", "lr", "loss", "base", "cm", "grad_norm"] + [f"{v}_{g}" for v in ("base", "d") for g in self.groups]]
        if step and self.path.is_file():
            with open(self.path, newline="") as f:
                rows += [r for r in list(csv.reader(f))[1:] if r and int(r[0]) <= step]
        write_atomically(self.path, lambda p: p.write_text("".join(",".join(r) + "\n" for r in rows)))

    def add(self, y, base, d):
        self.sums.index_add_(1, y, torch.stack([base, d, torch.ones_like(d)]).double())

    def write(self, step, values, sums):
        sums = sums.cpu()
        values = values + [float(sums[i, g].sum() / sums[2, g].sum()) for i in (0, 1) for g in self.groups.values()]
        with open(self.path, "a") as f:
            f.write(",".join([str(step)] + [f"{v:.6g}" for v in values]) + "\n")


def precision(c, device):
    """(autocast context, GradScaler) for --amp: bfloat16 or float16 on CUDA, off on the CPU."""
    kind = c.amp
    if kind == "auto":
        kind = "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if kind != "off" and device.type != "cuda":
        raise ValueError(f"--amp {kind} needs a GPU; leave it at auto")
    return (torch.autocast(device.type, torch.float16 if kind == "fp16" else torch.bfloat16, enabled=kind != "off"),
            torch.amp.GradScaler(device.type, enabled=kind == "fp16"))


def pick_device(c):
    try:
        device = torch.device(c.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {c.device} is not to be had here ({str(e).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def stored_options(c):
    """What config.json and checkpoints hold: the options that say how it was trained, as plain JSON values."""
    return {f.name: list(v) if isinstance(v := getattr(c, f.name), tuple) else v for f in dataclasses.fields(c)
            if f.metadata["group"] != "sampling" and f.name not in ("resume", "overwrite")}


def prepare_run(c, typed):
    """The configuration and the checkpoint (or None) that a run starts from; writes nothing. Raises ValueError."""
    out = Path(c.out)
    if not c.resume:
        if any(p.is_file() for p in (out, *out.parents)):
            raise ValueError(f"--out {out} is, or lies beneath, a file")
        if out.is_dir() and any(out.iterdir()) and not c.overwrite:
            raise ValueError(f"{out} is in use; type --resume to go on, --overwrite to begin again, or another --out")
        return c, None
    try:
        saved = json.loads((out / "config.json").read_text())["options"]
        saved = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no run to resume in {out}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{out}/config.json is not a configuration that cm.py wrote") from None
    free = {"steps", "out", "resume", "device"}
    for name in sorted(typed - free):
        if getattr(c, name) != getattr(saved, name):
            raise ValueError(f"{out} was made with --{name.replace('_', '-')} {getattr(saved, name)}, not "
                             f"{getattr(c, name)}; only --steps may change on --resume")
    c = dataclasses.replace(saved, resume=True, out=c.out, device=c.device,
                            steps=c.steps if "steps" in typed else saved.steps)
    if not (out / "checkpoint.pt").exists():
        return c, None  # killed before its first checkpoint: begin again
    state = load_checkpoint(out / "checkpoint.pt")
    for name, value in stored_options(c).items():
        if name not in free and state["config"].get(name) != value:
            raise ValueError(f"{out}/checkpoint.pt was made with another --{name.replace('_', '-')} than config.json says")
    if state["step"] > c.steps:
        raise ValueError(f"{out}/checkpoint.pt is at step {state['step']} already; --steps is {c.steps}")
    return c, state


def train(c, typed=frozenset()):
    """Train as configured, write the run directory, show the result. `typed`: the options that a --resume must match.
    Returns 0, or 128 + the signal that stopped it. Raises ValueError on bad input, before anything is written, and
    FloatingPointError where the loss stops being finite."""
    c, state = prepare_run(c, typed)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(c.batch_size % world == 0, "batch_size", c.batch_size, f"divisible by the {world} processes")
    device = pick_device(c)
    autocast, scaler = precision(c, device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank > 0:
            dist.barrier()  # the first process downloads, or decodes and caches, the data
    data = Data(c, device)
    if world > 1 and rank == 0:
        dist.barrier()

    torch.manual_seed(hashed_seed("weights", c.seed))
    unet = make_unet(c, len(data.names), data.images.shape[1]).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    losses = CapacityManipulation(unet, data.counts, c).to(device)
    model = nn.parallel.DistributedDataParallel(losses) if world > 1 else losses
    parameters, ema_parameters = list(unet.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(parameters, lr=c.lr, betas=(0.9, 0.999), fused=True)
    out, log, first = Path(c.out), Log(Path(c.out) / "log.csv", data.counts, device), 0
    if state:
        if state["counts"] != data.counts.tolist():
            raise ValueError(f"{out}/checkpoint.pt was trained on other class counts than {c.data or c.dataset} has now")
        load_weights(unet, state["model"], out / "checkpoint.pt")
        load_weights(ema, state["ema"], out / "checkpoint.pt")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first = state["step"]
        if rank == 0:
            log.sums.copy_(state["log"])

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not state:
            for name in ("checkpoint.pt", "merged.pt", "samples.png", "curves.png"):  # --overwrite
                (out / name).unlink(missing_ok=True)
        config = dict(options=stored_options(c), classes=data.names, counts=data.counts.tolist())
        write_atomically(out / "config.json", lambda p: p.write_text(json.dumps(config, indent=1)))
        log.start(first)
        print(f"{c.dataset}: {len(data.images)} images, {len(data.names)} classes; "
              f"{sum(p.numel() for p in merge(unet).parameters()) / 1e6:.2f} M parameters; {device}; {out}/")

    def over_processes(tensor, op=dist.ReduceOp.SUM):
        if world > 1:
            dist.all_reduce(tensor, op)
        return tensor

    stop, began = [], time.perf_counter()
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    progress = tqdm(total=c.steps, initial=first, disable=rank > 0, unit="step", mininterval=1.0, dynamic_ncols=True)
    for step in range(first + 1, c.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = c.lr * min(1.0, step / max(1, c.warmup))
        batch = draw_batch(data, c, c.batch_size // world, step, rank)
        with autocast:
            loss, base, cm, d = model(*batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(not_finite("loss", step, batch[1], base.detach(), data.names, out))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (scaler.is_enabled() or torch.isfinite(grad_norm)):  # float16's scaler skips such a step by itself
            raise FloatingPointError(not_finite("gradient", step, batch[1], base.detach(), data.names, out))
        scaler.step(optimizer)
        scaler.update()
        get_ema_multi_avg_fn(min(c.ema, (1 + step) / (10 + step)))(ema_parameters, parameters, None)

        log.add(batch[1], base.detach(), d)
        stopping = int(over_processes(torch.tensor(stop[0] if stop else 0, device=device), dist.ReduceOp.MAX))
        last = stopping or step == c.steps
        if step % c.log_every == 0 or step == c.steps:
            sums = over_processes(log.sums.clone())
            log.sums.zero_()
            if rank == 0:
                log.write(step, [group["lr"], *map(float, (loss, base.mean(), cm.mean(), grad_norm))], sums)
        if step % c.checkpoint_every == 0 or last:
            sums = over_processes(log.sums.clone())
            if rank == 0:
                write_atomically(out / "checkpoint.pt", lambda p: torch.save(dict(
                    config=stored_options(c), counts=data.counts.tolist(), names=data.names, step=step,
                    model=unet.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(), log=sums), p))
        progress.update()
        if step % 20 == 0:
            progress.set_postfix_str(f"base {float(base.mean()):.4f}, cm {float(cm.mean()):+.4f}", refresh=False)
        if step == first + 2 and device.type == "cpu" and rank == 0:
            say_if_long((time.perf_counter() - began) / 2 * (c.steps - step), c, progress)
        if last:
            break
    progress.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    done = first == c.steps or step == c.steps
    if rank == 0 and done:
        write_atomically(out / "merged.pt", lambda p: torch.save(merge(ema).state_dict(), p))
        report(ema, data, c, out)
    elif rank == 0:
        print(f"stopped at step {step}; go on with: python cm.py --out {out} --resume", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()
    return 0 if done else 128 + stopping


def not_finite(what, step, y, base, names, out):
    """The message of a run that ran off: step, class losses, last good checkpoint."""
    losses = ", ".join(f"{names[k]} {float(base[y == k].mean()):.3g}" for k in y.unique().tolist()[:20])
    good = f"the last good checkpoint is {out}/checkpoint.pt" if (out / "checkpoint.pt").is_file() else "there is no checkpoint"
    return f"the {what} is not finite at step {step}; base loss in this batch: {losses}; {good}"


def say_if_long(seconds, c, progress):
    if seconds > 3 * 3600:
        progress.write(f"On this CPU the remaining steps will take about {seconds / 86400:.1f} days. Run this on a GPU, or, for "
                       f"a result in minutes: python cm.py --dataset {c.dataset} --preset small --out {c.out}-small"
                       + (f" --data {c.data}" if c.data else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: three samplers, one update


def sampler_steps(sampler, steps=None):
    """The number of steps, by default ddim 50, ddpm 1000, dpm 15. Raises ValueError where its grid would be none."""
    if sampler not in ("ddim", "ddpm", "dpm"):
        raise ValueError(f"unknown sampler {sampler!r}; choose ddim, ddpm or dpm")
    steps = {"ddim": 50, "ddpm": T, "dpm": 15}[sampler] if steps is None else steps
    if sampler == "dpm" and not 1 <= steps < T:
        raise ValueError(f"--sample-steps is {steps}; dpm takes 1 to {T - 1}")
    if sampler != "dpm" and not (1 <= steps <= T // 2 or steps == T):  # between them the grid would start far below T
        raise ValueError(f"--sample-steps is {steps}; {sampler} takes 1 to {T // 2}, or {T}")
    return steps


@torch.no_grad()
def sample(model, labels, image_shape, sampler="ddim", steps=None, guidance=0.0, seeds=None, alpha_bar=None):
    """Images [B, C, H, W] in [-1, 1] from eps-function or UNet `model(x, t, y)`, in eval mode.

    labels [B] (-1: none); image_shape (C, H, W); seeds: one int an image, so that the batch size doesn't matter;
    guidance w: eps_c + w (eps_c - eps_null). Steps default to ddim 50, ddpm 1000, dpm 15. Raises ValueError.

        sampler   noise added          eps and x_0 used
        ddim      none                 as predicted (Song et al. 2021a, eta = 0)
        ddpm      sqrt(beta)           as predicted (Algorithm C.1, sigma_t^2 = beta_t)
        dpm       none                 x_0 extrapolated from the last two (DPM-Solver++ 2M)
    """
    steps = sampler_steps(sampler, steps)
    alpha_bar = (make_alpha_bar() if alpha_bar is None else alpha_bar).tolist()
    if sampler == "dpm":
        times = np.linspace(0, T - 1, steps + 1).round()[:0:-1].astype(int).tolist()
    else:
        times = [i * (T // steps) for i in reversed(range(steps))]
    was_training = isinstance(model, nn.Module) and model.training
    if was_training:
        model.eval()
    generators = [torch.Generator().manual_seed(int(s)) for s in (range(len(labels)) if seeds is None else seeds)]
    noise = lambda: torch.stack([torch.randn(image_shape, generator=g) for g in generators]).to(labels.device)
    x, x0_last, h_last = noise(), None, None
    for i, time_ in enumerate(times):
        t = torch.full_like(labels, time_)
        eps = model(x, t, labels)
        if guidance:
            eps = eps + guidance * (eps - model(x, t, torch.full_like(labels, -1)))
        a, a_next = alpha_bar[time_], alpha_bar[times[i + 1]] if i + 1 < len(times) else 1.0
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        beta = posterior = 0.0
        if sampler == "dpm" and a_next < 1:
            h = 0.5 * math.log(a_next / (1 - a_next) * (1 - a) / a)  # step in log(signal / noise)
            x0, x0_last, h_last = x0 + (0 if x0_last is None else (x0 - x0_last) * h / (2 * h_last)), x0, h
            eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        elif sampler == "ddpm" and a_next < 1:  # no noise at the last step
            beta = 1 - a / a_next
            posterior = beta * (1 - a_next) / (1 - a)
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - posterior) * eps
        if beta:
            x = x + math.sqrt(beta) * noise()
    if was_training:
        model.train()
    return x.clamp(-1, 1)


def generate(c):
    """--sample: write an .npz in ADM's layout, arr_0 uint8 [N, H, W, C] and arr_1 labels, with `counts` beside."""
    trained, ema, counts = load_trained(c.sample)
    num_images, classes, device = c.num_images, len(counts), pick_device(c)
    if c.general_only and trained.no_cm:
        raise ValueError(f"{c.sample} was trained with --no-cm: there is no theta_g to sample")
    chosen = list(range(classes)) if c.labels is None else list(c.labels)
    for k in chosen:
        if not 0 <= k < classes:
            raise ValueError(f"--labels {k} is out of range; {c.sample} has classes 0 to {classes - 1}")
    if c.labels and trained.unconditional:
        raise ValueError(f"{c.sample} is unconditional: --labels can't be chosen")
    out = Path(c.out or Path(c.sample).parent / "samples.npz")
    if out.suffix != ".npz":
        raise ValueError(f"--out {out} must end in .npz with --sample")
    if out.exists() and not c.overwrite:
        raise ValueError(f"{out} exists; type --overwrite, or another --out FILE.npz")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: {out.parent} is not a directory")
    with general_only(ema) if c.general_only else contextlib.nullcontext():
        unet = merge(ema).to(device)
    shape = (unet.encoder[0].in_channels, trained.image_size, trained.image_size)
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(num_images)])
    images = np.empty((num_images, *shape[1:], shape[0]), np.uint8)
    with tqdm(total=num_images, unit="image") as progress:
        for i in range(0, num_images, c.sample_batch):
            y = labels[i:i + c.sample_batch]
            seeds = [hashed_seed("image", c.seed, i + j) for j in range(len(y))]
            x = sample(unet, y.to(device) if not trained.unconditional else torch.full_like(y, -1).to(device), shape,
                       c.sampler, c.sample_steps, c.guidance, seeds)
            images[i:i + len(y)] = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
            progress.update(len(y))
    arrays = dict(arr_0=images, counts=np.array(counts))
    if not trained.unconditional:  # an unconditional image has no label
        arrays["arr_1"] = labels.numpy()
    write_atomically(out, lambda p: np.savez(p, **arrays))
    print(f"{num_images} images of {'theta_g' if c.general_only else 'theta'} in {out}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run: held-out table and pictures


@torch.no_grad()
def held_out_loss(unet, images, labels, num_classes, per_class=32, times=8):
    """Per-class held-out loss: (eps-loss of theta [C], of theta_g [C], d [C]), float64, nan for classes without images.

    Plain eps target whatever the base loss, the first `per_class` images of each class, a fixed time grid and fixed
    noise: so differences between networks are sharp. images uint8 [N, C, H, W], labels [N]."""
    index = torch.cat([torch.where(labels == k)[0][:per_class] for k in range(num_classes)])
    images, labels = images[index], labels[index]
    alpha_bar, generator = make_alpha_bar(images.device), torch.Generator().manual_seed(0)
    sums = torch.zeros(4, num_classes, dtype=torch.float64)
    was_training = unet.training
    unet.eval()
    for k in range(times):
        for i in range(0, len(images), 250):
            x0, y = to_float(images[i:i + 250]), labels[i:i + 250]
            t = torch.full_like(y, int((k + 0.5) * T / times))
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
            h, skips, emb = unet.encode(add_noise(x0, t, eps, alpha_bar), t, y)
            eps_theta = unet.decode(h, skips, emb)
            with general_only(unet):
                eps_theta_g = unet.decode(h, skips, emb)
            values = torch.stack([squared_distance(eps_theta, eps), squared_distance(eps_theta_g, eps),
                                  squared_distance(eps_theta, eps_theta_g), torch.ones(len(y), device=y.device)])
            sums.index_add_(1, y.cpu(), values.double().cpu())
    unet.train(was_training)
    return tuple(sums[:3] / sums[3])


def report(ema, data, c, out):
    """Print the held-out table, draw samples.png and curves.png."""
    counts = data.counts.cpu()
    omega_con, omega_div = class_weights(counts)
    per_class = max(1, min(32, 2000 // len(counts)))
    loss, loss_g, d = held_out_loss(ema, data.held_out, data.held_out_labels, len(counts), per_class)
    shown = groups(counts)
    labels = [data.names[int(g)] if g.isdigit() else g for g in shown]
    width = max(map(len, labels))
    print(f"\nε-loss on {data.held_out_name}, {per_class} images a class\n{'class':{width}}  {'count':>6} {'ω_Con':>7} {'ω_Div':>7}"
          f" {'loss θ':>8}" + ("" if c.no_cm else f" {'loss θ_g':>8} {'d':>9}"))
    for label, g in zip(labels, shown.values()):
        if label == "Many":
            print("-" * width)
        print(f"{label:{width}}  {int(counts[g].sum()):6d} {float(omega_con[g].mean()):7.3f} {float(omega_div[g].mean()):7.3f}"
              f" {float(loss[g].nanmean()):8.5f}"
              + ("" if c.no_cm else f" {float(loss_g[g].nanmean()):8.5f} {float(d[g].nanmean()):9.2e}"))
    draw_samples(ema, data, c, out / "samples.png")
    draw_curves(out / "log.csv", data, c, out / "curves.png")
    print(f"\npictures, weights and log in {out}/")


def draw_samples(ema, data, c, path, columns=8):
    """A row a class, most frequent first: real images, then theta, then theta_g from the same noise."""
    from matplotlib.figure import Figure
    shown = [int(g) for g in groups(data.counts.cpu()) if g.isdigit()]
    y = torch.tensor(shown, device=data.counts.device).repeat_interleave(columns)
    real = [data.images[int(data.starts[k]) + j % int(data.counts[k])] for k in shown for j in range(columns)]
    panels = [("real (training set)", torch.stack(real))]
    y_in = torch.full_like(y, -1) if c.unconditional else y
    seeds = [hashed_seed("image", c.seed, i) for i in range(len(y))]
    draw = lambda unet: torch.cat([to_uint8(sample(unet, y_in[i:i + 250], data.images.shape[1:], seeds=seeds[i:i + 250]))
                                   for i in range(0, len(y), 250)])
    panels.append(("θ", draw(merge(ema))))
    if not c.no_cm:
        with general_only(ema):
            panels.append(("θ_g, without BA", draw(merge(ema))))
    figure = Figure(figsize=(1.6 + 0.42 * columns * len(panels), 0.42 * len(shown) + 0.5), layout="constrained")
    for axis, (title, images) in zip(figure.subplots(1, len(panels)), panels):
        ch, h, w = images.shape[1:]
        grid = images.cpu().reshape(len(shown), columns, ch, h, w).permute(0, 3, 1, 4, 2).reshape(len(shown) * h, columns * w, ch)
        axis.imshow(grid.squeeze(-1) if ch == 1 else grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
        if images is panels[0][1]:
            axis.set_yticks([(i + 0.5) * h for i in range(len(shown))],
                            ["any" if c.unconditional and i else f"{data.names[k]}  {int(data.counts[k])}"
                             for i, k in enumerate(shown)], fontsize=8)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130))


def draw_curves(log, data, c, path):
    """Per-class d and base loss over steps, coloured from the majority to the minority."""
    import matplotlib
    from matplotlib.figure import Figure
    with open(log, newline="") as f:
        rows = list(csv.DictReader(f))
    steps, shown = [int(r["step"]) for r in rows], [int(g) for g in groups(data.counts.cpu()) if g.isdigit()]
    kinds = [("base", "base loss")] if c.no_cm else [("d", "d = ‖ε_θ − ε_θg‖²"), ("base", "base loss")]
    figure = Figure(figsize=(4.6 * len(kinds) + 1.6, 3.4), layout="constrained")
    for axis, (kind, title) in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds):
        for i, k in enumerate(shown):
            values = [float(r[f"{kind}_{k}"]) for r in rows]
            axis.plot(steps, values, ".-" if len(rows) < 3 else "-", lw=1, label=f"{data.names[k]} ({int(data.counts[k])})",
                      color=matplotlib.colormaps["viridis"](i / max(1, len(shown) - 1)))
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="class (count)", title_fontsize=7)
    if c.div_margin < math.inf and not c.no_cm:
        figure.axes[0].axhline(c.div_margin, color="k", ls=":", lw=1)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130))


# ---------------------------------------------------------------------------------------------------------------------
# Command line, generated from Config


def parse(argv):
    """(Config, set of the options typed)."""
    parser = argparse.ArgumentParser(prog="cm.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    groups = {}
    for field in dataclasses.fields(Config):
        extra = dict(field.metadata)
        group, text = extra.pop("group"), extra.pop("help").replace("%", "%%")
        groups.setdefault(group, parser.add_argument_group(group))
        if field.name in PRESETS["paper"] and "[" not in text:
            text += " [default: " + ", ".join(f"{p} {spell(v[field.name])}" for p, v in PRESETS.items()) + "]"
        elif field.default is not None and field.type is not bool:
            text += f" [default: {field.default}]"
        if field.type is bool:
            extra["action"] = argparse.BooleanOptionalAction if field.default is None else "store_true"
        else:
            extra.setdefault("type", field.type)
            if field.type is tuple:
                extra.setdefault("nargs", "+")
            if "choices" not in extra:
                extra.setdefault("metavar", {int: "N", float: "X", str: "S"}[extra["type"]])
        groups[group].add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **extra)
    typed = vars(parser.parse_args(argv))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in typed.items()}), set(typed)


def spell(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}" if isinstance(value, int) else str(value)


def fail(message):
    """One line on stderr, status 2."""
    print("cm.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    config, typed = parse(argv)
    try:
        if config.sample:
            config.resolved()  # for its checks
            return generate(config)
        return train(config.resolved(), typed)
    except (ValueError, OSError) as e:
        fail(e)
    except FloatingPointError as e:
        sys.exit(f"cm.py: {e}")


if __name__ == "__main__":
    sys.exit(main())
