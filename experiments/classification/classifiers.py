"""Classifiers of long-tailed images, plain and with CM: what classification.py and downstream.py
share. It has no command line.

Batch normalisation needs what cm.py's UNet doesn't: only theta's pass moves the running statistics,
and a theta_g that is reported gets statistics of its own.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

import cm
from experiments import common


class Images(NamedTuple):
    """uint8 images [N, C, H, W] and their labels [N]."""

    images: torch.Tensor
    labels: torch.Tensor


def read(dataset, data, size, n_max, ir, device):
    """(Images for training, the long-tailed ones of cm.py; the test set's Images; class names).

    size: side of the images. Raises ValueError."""
    arrays, labels, names = cm.load_dataset(dataset, data, size)
    judged = cm.load_dataset(dataset, data, size, train=False)[:2]
    if not len(judged[1]):
        raise ValueError(f"{data} holds no test images; put them into {data}/val")
    index = cm.long_tail_indices(labels, ir, n_max=n_max)
    training = Images(*cm.on_device(arrays[index], labels[index], device))
    return training, Images(*cm.on_device(*judged, device)), names


def batch_of(step, size, n, seed):
    """Indices [size] of the batch of step 1, 2, ... through n images, pass after pass, each in an
    order of its own. A function of (seed, step), so that a resumed training sees the same."""
    first = (step - 1) * size
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(common.hashed(seed, p)))
              for p in range(first // n, (first + size - 1) // n + 1)]
    return torch.cat(orders)[first % n:][:size]


# ------------------------------------------------------------------------------------------------
# Network

NETWORKS = {"small": ((16, 32, 64, 128), 1), "resnet18": ((64, 128, 256, 512), 2)}
SCALE = 30  # LDAM's s
RANK_RATIO, HEAD_RANK = 0.15, 4  # the authors' code's (Feng-Hong/ImbDiff-CM, commit 04262d7)


class CosineHead(nn.Module):
    """[B, width] -> logits s cos(h, w_k) [B, K]: LDAM's normalised last layer (Cao et al. 2019),
    which the authors' code has for LA, too. It bounds L_CM, whose weight is negative on rare
    classes."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, width)))

    def forward(self, h):
        return SCALE * F.linear(F.normalize(h), F.normalize(self.weight))


class Network(nn.Module):
    """Four stages of torchvision's BasicBlocks behind a 3x3 stem without max-pooling: images
    [B, C, H, W] in [-1, 1] -> logits [B, K]. Apart from stem and head "resnet18" is torchvision's.
    """

    def __init__(self, name, channels, num_classes):
        super().__init__()
        widths, depth = NETWORKS[name]
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
                                  nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks, before = [], widths[0]
        for width in np.repeat(widths, depth).tolist():
            stride, shortcut = 1, None
            if width > before:
                stride, shortcut = 2, nn.Sequential(
                    nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            blocks.append(BasicBlock(before, width, stride, shortcut))
            before = width
        self.stages = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.head = CosineHead(before, num_classes)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def reserve(net):
    """Reserve capacity in a Network, in place, where the authors' code does: in all convolutions,
    and in the head."""
    cm.reserve_capacity(net, RANK_RATIO, where=lambda layer: isinstance(layer, nn.Conv2d))
    net.head = cm.LowRankReserved(net.head, *net.head.weight.shape, HEAD_RANK)


@contextlib.contextmanager
def statistics_kept(module):
    """Inside, in training mode, batches are normalised by their own statistics, and the running
    ones stay as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.track_running_stats = False  # in training mode: leave the buffers as they are
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


@torch.no_grad()
def general(net, images, batch=128):
    """theta_g as a plain network in eval mode, its running statistics estimated anew: averages over
    one pass through uint8 `images` [N, C, H, W] in random order."""
    with cm.general_only(net):
        net = cm.merge(net)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None  # a plain average over batches
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    net.train()
    for index in order.split(batch):
        net(cm.to_float(images[index.to(images.device)]))
    return net.eval()


# ------------------------------------------------------------------------------------------------
# Losses

BASES = ("CE", "LDAM", "LDAM-DRW", "LA")
TEMPERATURE = 1.5  # of L_CM, as in the authors' code


def shifted(logits, y, counts, base):
    """The logits [B, K] of which a base loss takes the cross-entropy.

    LDAM (Cao et al. 2019): the true class's is lowered by s m_y, m_y = 0.5 (n_min / n_y)^(1/4). LA
    (logit adjustment, Menon et al. 2021): plus the log of each class's share, tau = 1."""
    if base == "LA":
        return logits + (counts / counts.sum()).log()
    if base.startswith("LDAM"):
        margins = 0.5 * (counts.min() / counts) ** 0.25
        return logits - SCALE * margins * F.one_hot(y, len(counts))
    return logits


def weights(counts, base, late):
    """A weight for each class [K], of mean 1: all 1, or in the last fifth (`late`) of LDAM-DRW
    proportional to 1 over the effective number of samples, (1 - beta^n) / (1 - beta), beta = 0.9999
    (Cui et al. 2019)."""
    if base != "LDAM-DRW" or not late:
        return torch.ones_like(counts)
    weight = 1 / (1 - 0.9999**counts.double())
    return (weight * len(counts) / weight.sum()).to(counts.dtype)


def capacity_loss(a, b, w):
    """L_CM [B] of logits a, b [B, K], theta's and theta_g's, and weights w [B], as in the authors'
    code: w KL(softmax(a / 1.5) || softmax(b / 1.5)), without a fuse."""
    log_p, log_q = ((logits / TEMPERATURE).log_softmax(1) for logits in (a, b))
    return w * (log_p.exp() * (log_p - log_q)).sum(1)


def losses(net, x, y, counts, base, late=False):
    """Eq. (4) of a batch, lam = 1: (total [], base loss [B], L_CM [B]); of a network without
    reserved capacity the base loss alone.

    x [B, C, H, W]; y [B]; counts [K] float. As in the authors' code L_CM compares theta's logits
    with LA's prior and theta_g's without; LDAM's margin is in neither. Its weight is p_y - q_y,
    where p_y ~ N_y and q_y ~ 1 / N_y sum to 1."""
    logits = net(x)
    taken = shifted(logits, y, counts, base)
    base_loss = F.cross_entropy(taken, y, reduction="none")
    weight = weights(counts, base, late)[y]
    total = (weight * base_loss).sum() / weight.sum()
    if not cm.reserved_layers(net):
        return total, base_loss, torch.zeros_like(base_loss)
    with statistics_kept(net), cm.general_only(net):
        logits_g = net(x)
    w = cm.capacity_weights(counts, w_div=1.0).to(y.device) / len(counts)  # p - q
    loss_cm = capacity_loss(taken if base == "LA" else logits, logits_g, w[y])
    return total + loss_cm.mean(), base_loss, loss_cm  # Eq. (4)


# ------------------------------------------------------------------------------------------------
# Training and accuracies

BATCH, LR, MOMENTUM, DECAY = 128, 0.1, 0.9, 2e-4  # Cao et al.'s; their rate falls in two steps
AUGMENTED = ("cifar10", "cifar100")


def augmented(x):
    """Images [B, C, H, W] padded by an eighth of the side and cropped at random, half flipped."""
    side, pad = x.shape[3], x.shape[3] // 8
    padded = F.pad(x, (pad, pad, pad, pad), value=-1.0)  # black
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # [B, C, row, column, side, side]
    row, column = torch.randint(2 * pad + 1, (2, len(x)), device=x.device)
    x = windows[torch.arange(len(x), device=x.device), :, row, column]
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def fit(name, training, counts, base, seed, steps, path, options, with_cm=False, balanced=False,
        augment=False):
    """A Network after `steps` of SGD on `training`, in eval mode, A and B still apart; or go on at
    the checkpoint `path`, as common.train does and raises. counts [K]: real images a class.

    balanced: batches are drawn with replacement, all classes alike, instead of in passes. Runs of
    one seed share initial weights (W_g) and, where they train on the same images, batches."""
    device = training.images.device
    counts = torch.as_tensor(counts, dtype=torch.float32, device=device)
    torch.manual_seed(common.hashed(seed))
    net = Network(name, training.images.shape[1], len(counts))
    if with_cm:
        reserve(net)
    net = cm.lay_out(net, device).train()
    sgd = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    n, of_class = len(training.labels), torch.bincount(training.labels)

    def step(i):
        sgd.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * (i - 1) / steps)) / 2
        if balanced:
            weight = 1 / of_class[training.labels].double()
            index = torch.multinomial(weight, BATCH, replacement=True)
        else:
            index = batch_of(i, BATCH, n, seed).to(device)
        x = cm.to_float(training.images[index])
        x = augmented(x) if augment else x
        loss = losses(net, x, training.labels[index], counts, base, i > 0.8 * steps)[0]
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return loss.detach()

    common.train(step, {"net": net, "sgd": sgd}, path, steps, seed, options)
    return net.eval()


@torch.no_grad()
def confusion(net, judged, num_classes, batch=500):
    """[K, K]: how many Images of class i a network in eval mode takes for class j."""
    seen = torch.cat([net(cm.to_float(part)).argmax(1) for part in judged.images.split(batch)])
    pairs = judged.labels * num_classes + seen
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, -1).cpu()


def by_shots(counts):
    """{"Many": classes of more than 100 training images, "Medium": of 20 to 100, "Few": of fewer}:
    Tab. G.13's groups, since its overall accuracies are the means of its other three, weighted by
    35, 35 and 30 classes at IR 100, by 30, 31 and 39 at IR 200."""
    counts = np.asarray(counts)
    return {"Many": np.flatnonzero(counts > 100), "Few": np.flatnonzero(counts < 20),
            "Medium": np.flatnonzero((counts >= 20) & (counts <= 100))}


def accuracies(net, judged, groups, kind):
    """{"accuracy Few": ...} of a plain network on Images, of each group of classes, and overall:
    means over the classes. kind: "accuracy" or, of theta_g, "general"."""
    num_classes = sum(len(k) for k in groups.values())
    found = confusion(net, judged, num_classes)
    recalls = found.diag() / found.sum(1)
    groups = groups | {"overall": np.arange(num_classes)}
    return {f"{kind} {name}": recalls[k].mean().item() for name, k in groups.items()}


def macro(found):
    """(precision, recall), means over the classes, of a confusion matrix [K, K] with true classes
    in rows. A class that is never predicted has precision 0."""
    right = found.diag().double()
    precision = right / found.sum(0).clamp(min=1)  # of those taken for the class
    recall = right / found.sum(1).clamp(min=1)  # of the class's own
    return precision.mean().item(), recall.mean().item()
