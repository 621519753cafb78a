"""Classifiers of long-tailed images, without and with CM: what both scripts here train."""

import math
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.models.resnet import BasicBlock

import cm
from experiments import common

CIFAR = ("cifar10", "cifar100")  # for which the network is a ResNet-18, the images are augmented
Images = namedtuple("Images", "images labels")  # uint8 [N, C, H, W], [N]

# ------------------------------------------------------------------------------------------------
# Network

SMALL, RESNET18 = ((16, 32, 64, 128), 1), ((64, 128, 256, 512), 2)  # widths, blocks of each
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
    [B, C, H, W] in [-1, 1] -> logits [B, K]. RESNET18 is torchvision's, apart from stem and head.
    """

    def __init__(self, widths, depth, channels, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
                                  nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks, before = [], widths[0]
        for width in np.repeat(widths, depth).tolist():
            halve = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False),
                                  nn.BatchNorm2d(width)) if width > before else None
            blocks.append(BasicBlock(before, width, 2 if halve else 1, halve))
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


def general(net, images):
    """theta_g as a plain network in eval mode, its running statistics estimated anew: averages over
    one pass through uint8 `images` [N, C, H, W] in random order."""
    with cm.general_only(net):
        net = cm.merge(net).eval()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    update_bn((cm.to_float(images[index]) for index in order.split(BATCH)), net)
    return net


# ------------------------------------------------------------------------------------------------
# Losses

BASES = ("CE", "LDAM", "LA")
TEMPERATURE = 1.5  # of L_CM, as in the authors' code


def losses(net, x, y, counts, base, w_div=None):
    """(base loss [B], L_CM [B]) of x [B, C, H, W], labels y [B] and counts [K] float; L_CM is 0 for
    w_div None, a plain network.

    L_CM is the authors' code's: (p_y - w_div q_y) KL(softmax(a / 1.5) || softmax(b / 1.5)) of
    theta's logits a, with LA's prior, and theta_g's b, without, where p_y ~ N_y and q_y ~ 1 / N_y
    sum to 1. There is no fuse. LDAM's margin is in neither. Theirs has w_div = 1."""
    logits = net(x)
    taken = logits
    if base == "LA":  # logit adjustment, Menon et al. 2021, with tau = 1
        logits = taken = logits + (counts / counts.sum()).log()
    if base == "LDAM":  # Cao et al. 2019
        margins = 0.5 * (counts.min() / counts) ** 0.25
        taken = logits - SCALE * margins * F.one_hot(y, len(counts))
    base_loss = F.cross_entropy(taken, y, reduction="none")
    if w_div is None:
        return base_loss, torch.zeros_like(base_loss)

    with cm.general_only(net):  # on copies: theta's pass alone moves the running statistics
        statistics = {name: b.clone() for name, b in net.named_buffers()}
        logits_g = torch.func.functional_call(net, statistics, (x,))
    log_p, log_q = ((z / TEMPERATURE).log_softmax(1) for z in (logits, logits_g))
    w = cm.capacity_weights(counts, w_div=w_div).to(y.device) / len(counts)
    return base_loss, w[y] * (log_p.exp() * (log_p - log_q)).sum(1)


# ------------------------------------------------------------------------------------------------
# Training and testing

BATCH, LR, MOMENTUM, DECAY = 128, 0.1, 0.9, 2e-4  # Cao et al.'s; their rate falls in two steps


def batch_of(step, size, n, seed):
    """Indices [size] of the batch of step 1, 2, ... through n images, pass after pass, each in an
    order of its own. A function of (seed, step), so that a resumed training sees the same."""
    first = (step - 1) * size
    generators = [torch.Generator().manual_seed(cm.hashed_seed("pass", seed, number))
                  for number in range(first // n, (first + size - 1) // n + 1)]
    return torch.cat([torch.randperm(n, generator=g) for g in generators])[first % n:][:size]


def augmented(x):
    """Images [B, C, H, W] padded by an eighth of the side and cropped at random, half flipped."""
    side, pad = x.shape[3], x.shape[3] // 8
    padded = F.pad(x, (pad, pad, pad, pad), value=-1.0)  # black
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # [B, C, row, column, side, side]
    row, column = torch.randint(2 * pad + 1, (2, len(x)), device=x.device)
    x = windows[torch.arange(len(x), device=x.device), :, row, column]
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def fit(dataset, training, counts, base, seed, steps, path, options, w_div=None, balanced=False):
    """A Network after `steps` of SGD on `training`, in eval mode, A and B still apart; or go on at
    the checkpoint `path`, as common.train does and raises. training: Images, or cm.Data; counts
    [K]: real images a class; w_div: see `losses`.

    balanced: batches are drawn with replacement, all classes alike, instead of in passes. Runs of
    one seed share initial weights (W_g) and, where they train on the same images, batches."""
    images, labels = training.images, training.labels
    counts = torch.as_tensor(counts, dtype=torch.float32, device=images.device)
    torch.manual_seed(cm.hashed_seed("weights", seed))
    net = Network(*(RESNET18 if dataset in CIFAR else SMALL), images.shape[1], len(counts))
    if w_div is not None:
        reserve(net)
    net = cm.lay_out(net, images.device).train()
    sgd = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=DECAY)

    def step(i):
        sgd.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * (i - 1) / steps)) / 2
        if balanced:
            index = torch.multinomial(1 / labels.bincount()[labels].double(), BATCH, True)
        else:
            index = batch_of(i, BATCH, len(labels), seed).to(images.device)
        x = cm.to_float(images[index])
        x = augmented(x) if dataset in CIFAR else x
        base_loss, loss_cm = losses(net, x, labels[index], counts, base, w_div)
        loss = base_loss.mean() + loss_cm.mean()  # Eq. (4), lam = 1
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return loss.detach()

    common.train(step, {"net": net, "sgd": sgd}, path, steps, seed, options)
    return net.eval()


@torch.no_grad()
def confusion(net, data):
    """[K, K]: how many held-out images of class i a network in eval mode takes for class j."""
    seen = torch.cat([net(cm.to_float(part)).argmax(1) for part in data.held_out.split(500)])
    pairs = data.held_out_labels * len(data.names) + seen
    return pairs.bincount(minlength=len(data.names)**2).view(len(data.names), -1).cpu()


# ------------------------------------------------------------------------------------------------
# Runs


def read(config):
    """cm.Data, whose held-out images are the test set. Raises ValueError."""
    data = cm.Data(config, cm.pick_device(config.device))
    if data.held_out is data.images:
        raise ValueError(f"{config.data} holds no test images; put them into {config.data}/val")
    return data
