"""Capacity Manipulation (CM) for class-imbalanced diffusion models, in one file.

    python cm.py                               # Fashion-MNIST-LT, 16x16, minutes on a CPU
    python cm.py --dataset cifar10 --ir 100    # the paper's setting: a GPU, 300,000 steps
    python cm.py --dataset folder --data TREE  # your own images, TREE/CLASS/*.jpg
    python cm.py --out runs/fashion16 --resume # go on where a run stopped
    python cm.py --sample runs/fashion16/checkpoint.pt --num-images 1000
    torchrun --nproc-per-node 4 cm.py --dataset cifar100   # several GPUs (--nnodes: machines)

The method comes first: Eq. (1) capacity reservation, Eqs. (3) and (2) the loss, the diffusion
process, base losses, Eq. (4) and one training step, sampling. What every diffusion code base has
comes after: UNet, data, training loop, the end of a run, options. Equations, sections and tables
are numbered as in the paper. C is the number of channels in [B, C, H, W], else of classes; labels
are 0..C-1 in the data set's own order; `alpha_bar[t]` is indexed t = 0..T-1, T = 1000.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

T = 1000  # diffusion steps (Sec. G.1)


# --------------------------------------------------------------------------------------------------
# Eq. (1): capacity reservation


class LowRankReserved(nn.Module):
    """A Conv2d or Linear whose weight is W_g + BA, or W_g alone inside `general_only` (Eq. 1).

    `layer` holds W_g (and the bias) and is called with its weight replaced, so that a forward of
    its own and hooks go on working. B [d, r] starts at zero and A [r, k] at random, as in LoRA, so
    training starts from the plain layer; unlike LoRA's, W_g is trained too, and BA has no factor.
    d, k and the rank r are `matrix_and_rank`'s, as in loralib and in the authors' code. `weight`
    and `bias` can be read as on the plain layer."""

    def __init__(self, layer, d, k, rank):
        super().__init__()
        self.layer = layer
        self.general = 0  # how often `general_only` was entered
        self.B = nn.Parameter(layer.weight.new_zeros(d, rank))
        self.A = nn.Parameter(layer.weight.new_empty(rank, k))
        nn.init.normal_(self.A, std=(3 * k) ** -0.5)

    @property
    def weight(self):
        W_g = self.layer.weight
        if self.general:  # theta_g
            return W_g
        with torch.autocast(W_g.device.type, enabled=False):  # bfloat16 would round a small BA away
            dtype = torch.promote_types(W_g.dtype, torch.float32)
            BA = (self.B.to(dtype) @ self.A.to(dtype)).view_as(W_g)
            return (W_g + BA).to(W_g.dtype)  # Eq. (1)

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.layer, {"weight": self.weight}, args, kwargs)


def matrix_and_rank(layer, rank_ratio):
    """(d, k, rank) of a Conv2d or Linear: its weight counts as kh * out x kw * in, in within a
    group, and BA has the rank kh * max(int(rank_ratio * min(out, in)), 1)."""
    out_features, in_features, *kernel = layer.weight.shape
    kh, kw = kernel or (1, 1)
    rank = int(round(rank_ratio * min(out_features, in_features), 6))  # 0.29 * 100 is below 29
    return kh * out_features, kw * in_features, kh * max(rank, 1)


def reserve_capacity(module, rank_ratio=0.1, where=None):
    """Replace Conv2d and Linear layers inside `module`, in place, by LowRankReserved ones (Eq. 1).

    `where(layer)` says which, by default all of them. A layer whose rank (`matrix_and_rank`)
    wouldn't be below min(d, k) stays whole. Returns the module (a bare layer comes back wrapped).
    The paper reserves in the UNet's decoder, since shallow layers capture general knowledge.
    Raises ValueError if rank_ratio is outside (0, 1], if capacity is reserved already, if nothing
    can be reserved, or if a layer's weight or the layer itself is out of reach. (Sec. 3.1, G.1)"""
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank ratio {rank_ratio} is outside (0, 1]")
    if reserved_layers(module):
        raise ValueError("capacity is reserved in this module already; merge it first")
    modules = list(module.modules())
    owners = collections.Counter(p for m in modules for p in m._parameters.values())
    listed = {layer for m in modules for value in vars(m).values() if isinstance(value, list)
              for layer in value if isinstance(layer, nn.Module)}
    reserved = {}
    for layer in modules:
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or (where and not where(layer)):
            continue
        if "weight" not in layer._parameters:
            raise ValueError("a layer's weight is computed from others (weight norm, "
                             "parametrization); capacity is reserved in plain layers only")
        if owners[layer.weight] > 1:
            raise ValueError("two modules share a weight (tied): merged, they would differ; untie "
                             "it, or leave it out by `where`")
        if layer in listed:
            raise ValueError(f"a plain list holds {layer}, which would stay without BA there; use "
                             "nn.ModuleList, or leave it out by `where`")
        d, k, rank = matrix_and_rank(layer, rank_ratio)
        if rank < min(d, k):
            reserved[layer] = LowRankReserved(layer, d, k, rank)
    if not reserved:
        kinds = sorted({type(m).__name__ for m in modules if m._parameters})
        raise ValueError(f"no Conv2d or Linear to reserve a rank below its own in; the layers "
                         f"with weights here are {', '.join(kinds) or 'none'}")
    return replace_modules(module, reserved)


def replace_modules(module, new):
    """`module` with each submodule that is a key of `new` replaced, wherever it is used."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out repeats
            if child in new:
                setattr(parent, name, new[child])
    return new.get(module, module)


def reserved_layers(module):
    """The layers with reserved capacity, [LowRankReserved]."""
    return [m for m in module.modules() if isinstance(m, LowRankReserved)]


@contextlib.contextmanager
def general_only(module):
    """Inside, `module` computes with theta_g, that is W_g alone (Sec. 3.2).

    A plain module is its own theta_g. Entries are counted, so contexts may overlap."""
    layers = reserved_layers(module)
    for layer in layers:
        layer.general += 1
    try:
        yield module
    finally:
        for layer in layers:
            layer.general -= 1


def merge(module):
    """A plain copy of `module` with the weights in force, W_g + BA, folded in (Sec. 3.2).

    It has the names, parameter count and FLOPs of a network that never had reserved capacity.
    Inside `general_only` it is a plain copy of theta_g."""
    plain = copy.deepcopy(module)
    for reserved in reversed(reserved_layers(plain)):  # from the inside out
        weight = reserved.weight.detach().clone()
        reserved.layer.weight = nn.Parameter(weight, reserved.layer.weight.requires_grad)
        plain = replace_modules(plain, {reserved: reserved.layer})
    return plain


# --------------------------------------------------------------------------------------------------
# Eqs. (3) and (2): class weights and the capacity manipulation loss


def class_weights(counts):
    """(omega_con, omega_div), each [C] float32, of training counts N_c > 0; all 1 if balanced."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    if n.ndim != 1 or not (n > 0).all():
        raise ValueError("class weights need one positive count a class")
    omega_con = len(n) * n / n.sum()  # Eq. (3): majority classes agree
    omega_div = len(n) / (n * (1 / n).sum())  # Eq. (3): minority classes differ
    return omega_con.float(), omega_div.float()


def capacity_weights(counts, w_con=1.0, w_div=0.2):
    """w [C], what a class's distance d counts for: w_con * omega_con - w_div * omega_div.

    1 and 0.2 are the authors' code's; 1 and 1 are Eq. (2) as printed; 0 leaves a term out
    (Tab. 7). Where 1 + lam * w <= 0 the loss has no minimum in eps_theta either."""
    omega_con, omega_div = class_weights(counts)
    return w_con * omega_con - w_div * omega_div


def squared_distance(a, b):
    """||a - b||^2 as a *mean* over C x H x W, [B], at least in float32. Raises ValueError."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) - b.to(dtype)).square().flatten(1).mean(1)


def capacity_loss(eps_theta, eps_theta_g, w, div_margin=0.1):
    """L_CM [B], w * d, of predictions [B, C, H, W] and each sample's weight w [B] (Eq. 2).

    Both predictions get gradient. Where w < 0 the loss has no lower bound in eps_theta_g, so there,
    and only there, d counts up to `div_margin`: a fuse, some 50 times what dropout makes of d.
    div_margin = inf is the authors' form, without one."""
    return weigh(squared_distance(eps_theta, eps_theta_g), w, div_margin)


def weigh(d, w, div_margin):
    """`capacity_loss` [B] of distances d [B]."""
    return torch.where(w >= 0, w * d, w * d.clamp(max=div_margin))  # Eq. (2), with the fuse


# --------------------------------------------------------------------------------------------------
# The diffusion process: one schedule for training and sampling


def make_alpha_bar(device="cpu"):
    """alpha_bar [T] float64, betas linear from 1e-4 to 0.02 (Sec. G.1)."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return torch.cumprod(1 - betas, 0).to(device)


def scales(alpha_bar, t, x):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), float32, for t [B], shaped to scale x [B, ...].
    """
    a = alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
    return a.sqrt().float(), (1 - a).sqrt().float()


def add_noise(x0, t, eps, alpha_bar):
    """x_t ~ q(x_t | x_0) of x0's shape and type (Sec. A; Algorithm C.1 lacks the second root)."""
    signal_scale, noise_scale = scales(alpha_bar, t, x0)
    return (signal_scale * x0 + noise_scale * eps).to(x0.dtype)


# --------------------------------------------------------------------------------------------------
# Base losses (Sec. D). DDPM's is squared_distance(eps_theta, eps); the others change one thing.


@torch.no_grad()
def oc_target(x0, x_t, t, y, eps, counts, alpha_bar, generator=None):
    """Oriented Calibration (OC, Zhang et al. 2024): let rare classes learn from frequent ones.

    A reference x_ref is drawn from the batch with probability ~ q(x_t | x_ref), the sample itself
    included; where its class is no rarer than y's, the target [B, C, H, W] points to it, else it is
    eps. counts [C] are training counts. (Eqs. D.2-D.4, with the bar on alpha and the division that
    Eq. (D.3) misses and OC's published code has)"""
    signal_scale, noise_scale = scales(alpha_bar, t, x0)
    # cdist without its matrix product: at small t the exponent multiplies rounding by 10^4
    distance = torch.cdist((x_t / signal_scale).flatten(1), x0.flatten(1),
                           compute_mode="donot_use_mm_for_euclid_dist").square()  # [B, B]
    logits = -distance / (2 * (noise_scale / signal_scale).square().flatten(1))  # Eq. (D.4)
    # argmax of p / Exp(1) is a draw from p, like torch.multinomial's, whose check stalls a GPU
    race = torch.empty_like(logits).exponential_(generator=generator)
    ref = (logits.softmax(1) / race).argmax(1)
    transfer = (counts[y[ref]] >= counts[y])[:, None, None, None]
    return torch.where(transfer, (x_t - signal_scale * x0[ref]) / noise_scale, eps)  # Eq. (D.3)


def cbdm_pull(eps_theta, eps_other, t, y_in):
    """Class-Balancing Diffusion (CBDM, Qin et al. 2023): predictions for y and for another class y'
    are pulled together, so that rare classes share what frequent ones know.

    What Eq. (D.1) adds to the base loss [B], with one y' and, as in CBDM's code, t / T (tau = 1):
    first eps_other is held fixed, then, with gamma = 1/4, eps_theta; nothing where y is dropped."""
    pull = squared_distance(eps_theta, eps_other.detach())
    pull = pull + 0.25 * squared_distance(eps_theta.detach(), eps_other)
    return t / T * pull * (y_in >= 0)


def focal(base):
    """Focal loss (Lin et al. 2017), gamma = 1: samples [B] with a large loss count for more.

    A classifier's loss is -log p; here exp(-loss) stands in for p (Sec. 4.1's baseline)."""
    return (1 - torch.exp(-base)) * base


# --------------------------------------------------------------------------------------------------
# Eq. (4) and one training step


def same_masks(x):
    """Inside, dropout draws its masks as usual; on leaving, the generator goes back where it was.

    So the pass that follows draws the masks of the pass inside again: then d is capacity alone.
    fork_rng always brings back the CPU's generator; the list adds a GPU's."""
    devices = [x.device.index or 0] if x.device.type == "cuda" else []
    return torch.random.fork_rng(devices, device_type="cuda")


class CapacityManipulation(nn.Module):
    """The losses of one batch under a network `unet(x_t, t, y)`. A variation is a subclass of it.

    counts [C] are training counts; `base` is "ddpm", "oc", "cbdm" or "focal"; `lam` is lambda;
    w_con, w_div, div_margin as in `capacity_weights` and `capacity_loss`; `same_masks`: theta and
    theta_g share their dropout masks; `cbdm_prior`: as in `other_classes`; `no_cm`: base loss only.
    `forward` draws OC's references, CBDM's other classes and the dropout masks."""

    def __init__(self, unet, counts, base="ddpm", lam=1.0, w_con=1.0, w_div=0.2, div_margin=0.1,
                 same_masks=False, cbdm_prior="uniform", no_cm=False):
        super().__init__()
        self.unet, self.base, self.lam, self.div_margin = unet, base, lam, div_margin
        self.same_masks, self.cbdm_prior, self.no_cm = same_masks, cbdm_prior, no_cm
        self.register_buffer("w", capacity_weights(counts, w_con, w_div))
        self.register_buffer("counts", torch.as_tensor(counts))
        self.register_buffer("alpha_bar", make_alpha_bar())

    @classmethod
    def from_config(cls, unet, counts, config):
        """The loss module of a run, called by `train`; a variation may override it."""
        return cls(unet, counts, config.base, config.lam, config.w_con, config.w_div,
                   config.div_margin, config.same_masks, config.cbdm_prior, config.no_cm)

    def forward(self, x0, y, t, eps, y_in):
        """x0, eps [B, C, H, W]; y, t [B]; y_in [B], y with -1 where the label is dropped.

        -> total loss (scalar), base loss [B], L_CM [B], d [B]. (Algorithm C.1)"""
        x_t = add_noise(x0, t, eps, self.alpha_bar)
        target = eps
        if self.base == "oc":
            target = oc_target(x0, x_t, t, y, eps, self.counts, self.alpha_bar)

        # two whole passes, each with dropout masks of its own: d > 0 even where BA = 0
        with same_masks(x_t) if self.same_masks else contextlib.nullcontext():
            eps_theta = self.unet(x_t, t, y_in)
        if not self.no_cm:
            with general_only(self.unet):
                eps_theta_g = self.unet(x_t, t, y_in)

        base = squared_distance(eps_theta, target)  # [B]; theta_g has no base loss
        if self.base == "cbdm":
            eps_other = self.unet(x_t, t, self.other_classes(y))
            base = base + cbdm_pull(eps_theta, eps_other, t, y_in)
        if self.base == "focal":
            base = focal(base)
        if self.no_cm:
            return base.mean(), base, torch.zeros_like(base), torch.zeros_like(base)
        d = squared_distance(eps_theta, eps_theta_g)  # weighed by the true class, also where
        loss_cm = weigh(d, self.w[y], self.div_margin)  # the label is dropped
        total = base.mean() + self.lam * loss_cm.mean()  # Eq. (4)
        return total, base, loss_cm, d.detach()

    def other_classes(self, y):
        """CBDM's y' [B], maybe y: uniform over classes (Eq. D.1), or by "frequency" as its code."""
        prior = self.counts.float()
        if self.cbdm_prior == "uniform":
            prior = torch.ones_like(prior)
        return torch.multinomial(prior, len(y), replacement=True)


def update(loss, parameters, ema_parameters, optimizer, scaler, decay):
    """One step down the gradient of `loss` [], clipped to norm 1; then the moving average (EMA).

    The EMA, of the given decay, averages W_g, A and B each, so that it can still be split into
    theta and theta_g; merging comes after. `scaler` is float16's, else it does nothing.
    -> the gradient's norm before clipping, []."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    scaler.update()
    get_ema_multi_avg_fn(decay)(ema_parameters, parameters, None)
    return grad_norm


# --------------------------------------------------------------------------------------------------
# Sampling. `predict(x, t)` is eps [B, C, H, W] for x [B, C, H, W] at the time t, an int.


def steps_of(alpha_bar, times):
    """(t, alpha_bar at t, alpha_bar at the next time) for each of `times`; the last goes to 1."""
    a = [alpha_bar[t] for t in times] + [1.0]
    return zip(times, a[:-1], a[1:], strict=True)


def ddim(predict, x, alpha_bar, steps=50):
    """Deterministic sampling (Song et al. 2021a, eta = 0) from noise x [B, C, H, W]."""
    times = [i * T // steps for i in reversed(range(steps))]
    for t, a, a_next in steps_of(alpha_bar, times):
        eps = predict(x, t)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * eps
    return x


def ddpm(predict, x, alpha_bar, steps=T, noise=None):
    """Ancestral sampling (Algorithm C.1, sigma_t^2 = beta_t); noise() gives z of x's shape."""
    times = [i * T // steps for i in reversed(range(steps))]
    for t, a, a_next in steps_of(alpha_bar, times):
        beta = 1 - a / a_next
        x = (x - beta / math.sqrt(1 - a) * predict(x, t)) / math.sqrt(1 - beta)
        if a_next < 1:  # no noise at the last step
            x = x + math.sqrt(beta) * noise()
    return x


def dpm(predict, x, alpha_bar, steps=15):
    """DPM-Solver++ 2M (arXiv:2211.01095): x_0 is extrapolated from the last two predictions."""
    times = np.linspace(0, T - 1, steps + 1).round().astype(int).tolist()
    times = list(reversed(times[1:]))  # without 0: the last step goes to alpha_bar = 1
    x0_last = step_last = None
    for t, a, a_next in steps_of(alpha_bar, times):
        x0 = (x - math.sqrt(1 - a) * predict(x, t)) / math.sqrt(a)
        if a_next == 1:
            return x0
        log_snr_step = math.log(a_next / (1 - a_next) * (1 - a) / a)
        x0_ahead = x0
        if x0_last is not None:
            x0_ahead = x0 + (x0 - x0_last) * log_snr_step / (2 * step_last)
        eps = (x - math.sqrt(a) * x0_ahead) / math.sqrt(1 - a)
        x = math.sqrt(a_next) * x0_ahead + math.sqrt(1 - a_next) * eps
        x0_last, step_last = x0, log_snr_step


SAMPLERS = {"ddim": (ddim, 50), "ddpm": (ddpm, T), "dpm": (dpm, 15)}  # with their usual steps


@torch.no_grad()
def sample(model, labels, image_shape, sampler="ddim", steps=None, guidance=0.0, seeds=None):
    """Images [B, C, H, W] in [-1, 1] of an eps-function or UNet in eval mode, `model(x, t, y)`.

    labels [B] (-1: none); image_shape (C, H, W); steps: by default 50, 1000, 15; seeds: one int an
    image, so that the batch size doesn't matter; classifier-free guidance w: eps_c + w (eps_c -
    eps_null). Raises ValueError."""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose {', '.join(SAMPLERS)}")
    draw, usual = SAMPLERS[sampler]
    steps, most = usual if steps is None else steps, T - (sampler == "dpm")  # no time twice
    if not 1 <= steps <= most:
        raise ValueError(f"--sample-steps is {steps}; {sampler} takes 1 to {most}")
    alpha_bar = make_alpha_bar().tolist()
    seeds = range(len(labels)) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def noise():
        images = [torch.randn(image_shape, generator=g) for g in generators]
        return torch.stack(images).to(labels.device)

    def predict(x, t):
        t = torch.full_like(labels, t)
        eps = model(x, t, labels).float()  # the steps are taken in float32, under autocast too
        if guidance:
            eps = eps + guidance * (eps - model(x, t, torch.full_like(labels, -1)).float())
        return eps

    more = [noise] if sampler == "ddpm" else []
    x = draw(predict, noise(), alpha_bar, steps, *more)
    x = torch.where(x.isfinite(), x, torch.nan)  # clamp would make of inf a pixel like any other
    return x.clamp(-1, 1)


# --------------------------------------------------------------------------------------------------
# Network: the DDPM UNet of the code that the paper builds on


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
    """32 groups as in the base code; one where channels are few, since small groups hide an image's
    mean from the network."""
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
        self.block2 = nn.Sequential(norm(cout), nn.SiLU(), nn.Dropout(dropout),
                                    conv(cout, cout, gain=1e-5))
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
    """eps_theta(x_t, t, y); Eq. (1) is for its decoder.

    `image_size` only places the attention; any size divisible by 2^(levels-1) can be fed. Raises
    ValueError where widths don't fit GroupNorm or the image's size the stride."""

    def __init__(self, num_classes=10, image_channels=3, image_size=32, channels=128,
                 multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1):
        super().__init__()
        emb_dim = 4 * channels
        self.channels = channels
        self.stride = 2 ** (len(multipliers) - 1)
        self.time_embedding = nn.Sequential(linear(channels, emb_dim), nn.SiLU(),
                                            linear(emb_dim, emb_dim))
        self.label_embedding = nn.Embedding(num_classes, emb_dim)
        attends = [image_size >> level in attention for level in range(len(multipliers))]

        self.encoder = nn.ModuleList([conv(image_channels, channels)])
        width, widths = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                block = ResBlock(width, channels * multiplier, emb_dim, dropout, attends[level])
                self.encoder.append(block)
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
                block = ResBlock(width + widths.pop(), channels * multiplier, emb_dim, dropout,
                                 attends[level])
                self.decoder.append(block)
                width = channels * multiplier
            if level > 0:
                self.decoder.append(Up(width))
        self.decoder.append(nn.Sequential(norm(width), nn.SiLU(),
                                          conv(width, image_channels, gain=1e-5)))

    def embed(self, t, y):
        """What each residual block is told of the time t [B] and the label y [B] (-1: dropped),
        [B, 4 * channels]."""
        half = torch.arange(self.channels // 2, device=t.device)
        frequency = torch.exp(-math.log(10_000.0) / (self.channels // 2) * half)
        angle = t[:, None].float() * frequency
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        emb = self.time_embedding(emb.to(self.time_embedding[0].weight.dtype))
        label = self.label_embedding(y.clamp(min=0))
        return emb + label * (y >= 0)[:, None]  # a dropped label adds nothing

    def forward(self, x_t, t, y):
        """-> eps [B, C, H, W] for x_t [B, C, H, W], t [B], y [B] (-1: label dropped).

        Raises ValueError if H or W is off the stride."""
        height, width = x_t.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images of {height}x{width} don't fit the network's stride, {self.stride}")
        emb = self.embed(t, y)
        h, skips = x_t, []
        for layer in self.encoder:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.decoder:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = layer(h)
        return h


def make_unet(config, num_classes, image_channels):
    """The UNet of a run, with capacity reserved in its decoder (Eq. 1) unless --no-cm.

    As in the authors' code: in the 3x3 convolutions of the decoder's blocks and upsampling, not in
    the last convolution; with --preset paper these are 27."""
    unet = UNet(num_classes, image_channels, config.image_size, config.channels,
                config.multipliers, config.blocks, config.attention, config.dropout)
    if not config.no_cm:
        last = unet.decoder[-1][-1]
        reserve_capacity(unet.decoder, config.rank_ratio, where=lambda layer: (
            layer is not last and layer.weight.shape[2:] == (3, 3)))
    return unet


# --------------------------------------------------------------------------------------------------
# Data: the long-tailed split everyone uses, and one uint8 tensor on the device


def class_counts(n_max, ir, num_classes):
    """Training images a class, N_c = int(n_max * ir^(-c/(C-1))) (Cao et al. 2019), C ints.

    Raises ValueError if ir < 1, there are fewer than two classes, or a class would be empty."""
    if num_classes < 2:
        raise ValueError(f"a long-tailed split needs at least two classes, not {num_classes}")
    if not ir >= 1:
        raise ValueError(f"the imbalance ratio is {ir}; it must be at least 1")
    counts = [int(n_max * (1 / ir) ** (c / (num_classes - 1.0))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(f"imbalance ratio {ir:g} leaves the smallest class empty; with "
                         f"{int(n_max)} images in the largest, type a smaller --ir")
    return counts


def long_tail_indices(labels, ir, seed=0, n_max=None):
    """Indices of the long-tailed subset of `labels` [N], class by class; ir = 1 alone keeps all N.

    As in the code that everyone's figures come from: RandomState(seed), there 0, classes in order,
    each class's indices shuffled, the first N_c taken; n_max = N / C, or the smallest class where
    classes differ. A smaller `n_max` takes the first of the same order. Raises ValueError where a
    class has fewer images than its N_c."""
    labels = np.asarray(labels)
    if ir == 1 and n_max is None:
        return np.arange(len(labels))
    sizes = np.bincount(labels)
    if n_max is None:
        n_max = len(labels) / len(sizes) if sizes.min() == sizes.max() else sizes.min()
    rng, chosen = np.random.RandomState(seed), []
    for c, n in enumerate(class_counts(n_max, ir, len(sizes))):
        if n > sizes[c]:
            raise ValueError(
                f"--n-max {n_max} asks for {n} images of class {c}, which has {sizes[c]}")
        index = np.where(labels == c)[0]
        rng.shuffle(index)
        chosen.append(index[:n])
    return np.concatenate(chosen)


def splits(counts):
    """{"Many": classes, "Medium": ..., "Few": ...} by training count, descending (Sec. 4.1).

    Two classes make no Medium."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    third = len(counts) // 3
    if len(counts) == 2:
        return {"Many": order[:1], "Few": order[1:]}
    return {"Many": order[:third], "Medium": order[third:2 * third], "Few": order[2 * third:]}


FASHION16 = Path(__file__).with_name("assets") / "fashion16.npz"  # experiments/make_fashion16.py


def fetch(name, root, train):
    """A torchvision data set, downloaded if need be. Raises ValueError."""
    packed = (root / "train-images-idx3-ubyte.gz").is_file()  # as Debian's package has them
    if name == "fashion" and packed and not (root / "FashionMNIST" / "raw").is_dir():
        raw = "data/FashionMNIST/raw"
        raise ValueError(f"{root} holds packed files; type mkdir -p {raw} && cp {root}/*.gz {raw} "
                         f"&& gunzip {raw}/*.gz, then leave --data away")
    kind = "FashionMNIST" if name == "fashion" else name.upper()
    try:
        return getattr(torchvision.datasets, kind)(root, train=train, download=True)
    except Exception as e:  # torchvision, urllib and pickle have many kinds
        raise ValueError(f"{kind} is neither whole in {root} nor could it be fetched "
                         f"({e or type(e).__name__}); --data names the directory that holds "
                         f"it") from None


DECODER = 2  # raised where `read_image` or `square` gives other pixels: old caches go


def read_image(file):
    """An image file as a PIL image of mode RGB: upright by its EXIF, 16 bits rounded to 8, floats
    in [0, 1] times 255, transparency dropped as PIL does (no background). Raises ValueError."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # PIL would clip these at 255
                levels, top = np.asarray(image, np.float64), 1 if image.mode == "F" else 65535
                if not (levels.min() >= 0 and levels.max() <= top):
                    raise ValueError(f"its values aren't in [0, {top}]")
                image = Image.fromarray(np.rint(255 / top * levels).astype(np.uint8))
            return image.convert("RGB")
    except Exception as e:  # PIL has many kinds
        raise ValueError(f"{file} can't be read as an image ({e})") from None


def read_images(files, prepare=np.asarray):
    """uint8 [N, H, W, 3] of image files, made of PIL images by `prepare`. Raises ValueError, which
    names up to five files that can't be read or aren't of the others' size."""
    def decode(file):
        try:
            return prepare(read_image(file))
        except ValueError as e:
            return e

    images, wrong = None, []
    with ThreadPool() as pool:  # PIL decodes outside the interpreter's lock
        for i, image in enumerate(tqdm(pool.imap(decode, files, 64), "decoding", len(files))):
            if isinstance(image, ValueError):
                wrong.append(image)
                continue
            if images is None:
                images = np.empty((len(files), *image.shape), np.uint8)
            if image.shape == images.shape[1:]:
                images[i] = image
            else:
                sides = *image.shape[1::-1], *images.shape[2:0:-1]
                wrong.append("{} is {} x {}, others are {} x {}".format(files[i], *sides))
    if wrong:
        raise ValueError("; ".join(map(str, wrong[:5])) + f" (of {len(wrong)})" * (len(wrong) > 5))
    return images


def visible(folder):
    """The paths in a folder, sorted, without hidden ones and __MACOSX."""
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name != "__MACOSX")


def list_images(tree, names=("",)):
    """The image files beneath tree/NAME of each class (beneath `tree`), and their classes [N].
    Linked folders are followed once; files of other endings are counted on stderr."""
    endings, found = torchvision.datasets.folder.IMG_EXTENSIONS, []
    seen = {(tree / name).resolve() for name in ("", *names)}
    for label, name in enumerate(names):
        folders = [tree / name] if (tree / name).is_dir() else []  # val may lack a class
        while folders:
            for path in visible(folders.pop()):
                if not path.is_dir():
                    found.append((path, label))
                elif path.resolve() not in seen:
                    seen.add(path.resolve())
                    folders.append(path)
    images = [(path, label) for path, label in found if path.suffix.lower() in endings]
    if len(images) < len(found):
        print(f"{tree}: {len(found) - len(images)} files left out, whose names don't end in "
              f"{' '.join(endings)}", file=sys.stderr)
    images.sort(key=lambda image: os.path.split(image[0]))
    return [path for path, _ in images], np.array([label for _, label in images], np.int64)


def class_folders(root):
    """(folder of the classes' folders, their names) of an image tree: root/train, if it holds
    folders, else root; held-out images are apart, in root/val. Raises ValueError."""
    beside = [path.name for path in visible(root) if path.is_dir()]
    tree, names = root, [name for name in beside if name != "val"]
    parts = {"train", "training", "val", "valid", "validation", "test", "testing"}
    odd = {name for name in names if name.lower() in parts} - {"train"}
    inner = [p.name for p in visible(root / "train") if p.is_dir()] if "train" in beside else []
    if inner:
        tree, names, odd = root / "train", inner, set(beside) - {"train", "val"}
        if "val" in beside:
            odd -= parts  # a test set may lie beside both
    if odd:
        raise ValueError(f"{root} holds {', '.join(sorted(odd))}: it must hold one folder a class, "
                         f"or all of them in train, and held-out images in val")
    if len(names) < 2:
        raise ValueError(f"{tree} holds {len(names)} class folder(s); it needs one folder of "
                         f"images a class, and at least two")
    return tree, names


def read_folder(root, size, train):
    """An image tree: uint8 [N, size, size, 3], labels, class names. Raises ValueError.

    Each image's shorter side is resized, then its centre cropped. Decoded once, into an .npy in
    `root` whose name tells the size and the files it was made of."""
    def square(image):
        scale = size / min(image.size)
        sides = [max(size, round(s * scale)) for s in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC, reducing_gap=3.0)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))

    tree, names = class_folders(root)
    tree = tree if train else root / "val"
    files, labels = list_images(tree, names)
    empty = [name for label, name in enumerate(names) if label not in labels]
    if train and empty:
        raise ValueError(f"{tree} holds no valid file for the classes {', '.join(empty)}")
    if not files:
        return np.empty((0, size, size, 3), np.uint8), labels, names
    stats = [(os.path.relpath(file, tree), os.stat(file)) for file in files]
    stamp = [(path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in stats]  # inode: after a mv
    digest = hashlib.sha256(repr((DECODER, stamp)).encode()).hexdigest()[:16]
    kind = f".cm-{'all' if tree == root else tree.name}-{size}"
    cache = root / f"{kind}-{digest}.npy"
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
        return np.lib.format.open_memmap(cache, mode="c"), labels, names
    images = read_images(files, square)
    try:
        write_atomically(cache, lambda path: np.save(path, images))
        for old in set(root.glob(f"{kind}-*.npy")) - {cache}:
            old.unlink()
    except OSError as e:
        print(f"{e}; the images will be decoded again next time", file=sys.stderr)
    return images, labels, names


def load_dataset(name, data=None, image_size=32, train=True):
    """A data set as it comes (not yet long-tailed): uint8 [N, H, W, C], labels [N] int64, list of
    class names. train=False gives the held-out images, N = 0 where there are none.

    Raises ValueError."""
    root = Path(data or "data")
    if name == "folder":
        if data is None:
            raise ValueError("--dataset folder needs --data DIR, a tree with one folder of images "
                             "a class")
        return read_folder(root, image_size, train)
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    check(name != "fashion16" or data is None, "data", data,
          "left away with fashion16, which lies beside cm.py")
    sizes = (8, 16) if name == "fashion16" else (8, 16, 32)
    check(image_size in sizes, "image_size", image_size,
          f"{' or '.join(map(str, sizes))} for {name}")
    if name == "fashion16":
        part, names = "train" if train else "test", torchvision.datasets.FashionMNIST.classes
        with np.load(FASHION16) as file:
            images, labels = file[f"{part}_images"][..., None], file[f"{part}_labels"]
    else:
        whole = fetch(name, root, train)
        images, labels, names = np.asarray(whole.data), np.asarray(whole.targets), whole.classes
        if name == "fashion":
            images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]  # [N, 32, 32, 1]
    return shrink(images, image_size), labels.astype(np.int64), list(names)


def shrink(images, size):
    """uint8 [N, H, H, C] averaged to [N, size, size, C]; size divides H."""
    n, side, _, channels = images.shape
    if side == size:
        return images
    blocks = images.reshape(n, size, side // size, size, side // size, channels)
    return np.rint(blocks.mean((2, 4), np.float32)).astype(np.uint8)


def on_device(images, labels, device):
    """uint8 [N, H, W, C] and labels [N] as tensors [N, C, H, W] and [N]."""
    images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.from_numpy(labels).to(device)


class Data:
    """A training set as one uint8 tensor on the device, sorted by class, and its held-out images.

    images [N, C, H, W]; labels [N]; counts [C] int64 tensor; starts [C]; names; held_out,
    held_out_labels; held_out_name. Raises ValueError."""

    def __init__(self, config, device="cpu"):
        options = config.dataset, config.data, config.image_size
        images, labels, names = load_dataset(*options)
        # printable also where a folder's name isn't UTF-8
        self.names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
        index = long_tail_indices(labels, config.ir, config.subset_seed, config.n_max)
        index = index[np.argsort(labels[index], kind="stable")]
        self.images, self.labels = on_device(images[index], labels[index], device)
        self.counts = torch.bincount(self.labels, minlength=len(self.names))
        if self.counts.min() < 1:
            raise ValueError(f"class {self.names[int(self.counts.argmin())]} has no images")
        self.starts = self.counts.cumsum(0) - self.counts
        held_out, held_out_labels, _ = load_dataset(*options, train=False)
        if len(held_out):
            self.held_out, self.held_out_labels = on_device(held_out, held_out_labels, device)
            self.held_out_name = "held-out"
        else:
            self.held_out, self.held_out_labels = self.images, self.labels
            self.held_out_name = "TRAINING images"

    def batch(self, size, resample=1.0, flip=True):
        """`size` images in [-1, 1] and their labels, drawn with replacement, classes with
        p_c ~ N_c^resample."""
        y = torch.multinomial(self.counts.double() ** resample, size, replacement=True)
        index = self.starts[y] + torch.randint(2**62, (size,), device=y.device) % self.counts[y]
        x = to_float(self.images[index])
        if flip:
            flipped = torch.rand(size, 1, 1, 1, device=x.device) < 0.5
            x = torch.where(flipped, x.flip(3), x)
        return x, y

    def first(self, classes, columns):
        """The first `columns` images of each of the classes, repeated where there are fewer."""
        return torch.stack([self.images[self.starts[k] + i % self.counts[k]]
                            for k in classes for i in range(columns)])


def to_float(images):
    return images.float() / 127.5 - 1


def to_uint8(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# Training loop


def hashed_seed(purpose, *numbers):
    """One integer for `manual_seed`, from a purpose (at most 8 letters) and ints in [0, 2^63).

    PyTorch's CPU generators keep only the low 32 bits of a seed: shifts and sums of a run's seed
    and its step would give two runs the same draws. Hashed, different (purpose, seed, step or
    image, process) meet by chance alone, there one pair in 2^32."""
    # SeedSequence takes words of 32 bits; two halves of each, so that no two lists read alike
    words = [int.from_bytes(purpose.encode(), "little"), *numbers]
    halves = [half for word in words for half in (word % 2**32, word >> 32)]
    return int(np.random.SeedSequence(halves).generate_state(1, np.uint64)[0])


def draw_batch(data, config, size, step, rank=0):
    """One step's x0, y, t, eps and y_in (y, -1 where the label is dropped).

    Also seeds what `forward` draws, all by (seed, step, process): so a resumed run draws what the
    uninterrupted one draws, and runs of different methods see the same batches."""
    torch.manual_seed(hashed_seed("batch", config.seed, step, rank))
    x0, y = data.batch(size, config.resample, config.flip)
    t = torch.randint(T, (size,), device=x0.device)
    eps = torch.randn_like(x0)
    y_in = torch.where(torch.rand(size, device=x0.device) < config.label_drop, -1, y)
    return x0, y, t, eps, y_in


def pick_device(name=None):
    """--device, by default the GPU if there is one, torchrun's LOCAL_RANK. Raises ValueError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    check(re.fullmatch(r"cpu|cuda:\d+", name), "device", name, "cpu, cuda or cuda:N")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} can't be used here ({str(e).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def lay_out(unet, device):
    """The network on its device, on the CPU its convolutions channels-last. Not on CUDA, where
    group norm undoes it; not 1x1 kernels, whose bytes stay: DDP would warn of their strides."""
    unet = unet.to(device)
    for p in unet.parameters():
        if device.type == "cpu" and p.ndim == 4 and p.shape[2:].numel() > 1:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return unet


def precision(config, device):
    """--amp on this device: "off", "bf16" or "fp16". Raises ValueError."""
    # "off" is float32 throughout, without the TF32 that cuDNN would use by default
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if config.amp == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    check(config.amp in ("auto", "off") or device.type == "cuda", "amp", config.amp,
          "left at auto without a GPU")
    return "off" if config.amp == "auto" else config.amp


def autocast(kind, device):
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=kind != "off")


def write_atomically(path, write):
    """Call `write` on a temporary name beside `path`, then rename: `path` is always whole.

    Raises OSError where it can't be written."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save's, on a full disk, is a RuntimeError
        reason = str(e).splitlines()[0]
        raise OSError(f"{path} can't be written ({reason}); it is as it was before") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out):
    """Inside, no other run works in the directory `out`. Raises ValueError where one does."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another run is at work in {out}") from None
    finally:
        os.close(handle)


def load_checkpoint(path):
    """(the dict that training saved, its Config). Raises ValueError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state, Config(**state["config"])
    except Exception as e:  # torch.load raises nearly anything on a broken file
        unread = getattr(e, "filename", None)  # else the system's word on a truncated file misleads
        reason = e.strerror if unread else "truncated, or none that this cm.py wrote"
        raise ValueError(f"{path} can't be loaded as a checkpoint.pt: {reason}") from None


def load_weights(unet, weights, path):
    """Fill a network. Raises ValueError."""
    try:
        unet.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{path} holds another network than its configuration says") from None


def load_trained(path, weights="ema", network=make_unet):
    """(configuration, network in eval mode with W_g, A and B still apart, class counts).

    `path` is a checkpoint.pt; weights "ema", or "model" for those that the next step would train;
    `network` is that of `train`. Raises ValueError."""
    state, config = load_checkpoint(path)
    unet = network(config, len(state["counts"]), state["ema"]["encoder.0.weight"].shape[1])
    load_weights(unet, state[weights], path)
    return config, unet.eval().requires_grad_(False), state["counts"]


def shown_classes(counts):
    """The classes of tables and pictures, most frequent first; of over 20 the first 5, the last 5.
    """
    order = np.argsort(-np.asarray(counts), kind="stable").tolist()
    return order if len(order) <= 20 else order[:5] + order[-5:]


def groups(counts):
    """What tables and logs have a value of, {label: classes [n]}: classes by number, splits."""
    classes = {str(k): torch.tensor([k]) for k in shown_classes(counts)}
    return classes | {name: torch.as_tensor(k) for name, k in splits(counts).items()}


def add_up(sums, y, loss, base, loss_cm, d, grad_norm):
    """Add a step to sums [C + 1, 4]: base loss, L_CM, d and samples of each class; the last row has
    the total loss, the gradient's norm and the steps."""
    values = torch.stack([base.detach(), loss_cm.detach(), d, torch.ones_like(d)], 1)
    sums.index_add_(0, y, values.double())
    one = torch.ones_like(grad_norm)
    sums[-1] += torch.stack([loss.detach(), grad_norm, one, one]).double()


def row_of(sums, step, lr, names, counts, out):
    """A row of log.csv, means since the last one; base loss and d of each group (nan: none drawn).

    Raises FloatingPointError where a step wasn't finite."""
    by_class, (loss, grad_norm, steps, _) = sums[:-1].cpu(), sums[-1].tolist()
    if not sums.isfinite().all():
        odd = [names[k] for k in torch.where(~by_class.isfinite().all(1))[0].tolist()[:20]]
        what = f"the loss of {', '.join(odd)}" if odd else "the gradient"
        since = step - int(steps) // (dist.get_world_size() if dist.is_initialized() else 1)
        raise FloatingPointError(f"{what} is not finite between steps {since} and {step}; the last "
                                 f"good checkpoint is {out}/checkpoint.pt")
    base, loss_cm, d, samples = by_class.T
    row = dict(step=step, lr=lr, loss=loss / steps, base=float(base.sum() / samples.sum()),
               cm=float(loss_cm.sum() / samples.sum()), grad_norm=grad_norm / steps)
    for kind, values in (("base", base), ("d", d)):
        for group, k in groups(counts).items():
            row[f"{kind}_{group}"] = float(values[k].sum() / samples[k].sum())
    return row


def write_log(path, rows):
    """log.csv, whole."""
    lines = [",".join(row if i == 0 else (f"{v:.6g}" for v in row.values()))
             for i, row in enumerate([*rows[:1], *rows])]
    write_atomically(path, lambda p: p.write_text("".join(f"{line}\n" for line in lines)))


def stored_options(config):
    """What config.json and checkpoints hold: how a run is trained."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
            if field.metadata["group"] != "sampling" and field.name not in ("resume", "overwrite")}


def prepare_run(config, typed):
    """The configuration and the checkpoint (or None) that a run starts from; writes nothing.

    Raises ValueError."""
    out = Path(config.out)
    if not config.resume:
        if out.is_dir() and any(out.iterdir()) and not config.overwrite:
            raise ValueError(f"{out} is in use; type --resume to go on, --overwrite to begin "
                             f"again, or another --out")
        return config, None
    state, saved = load_checkpoint(out / "checkpoint.pt")
    for name in sorted(typed - {"steps", "out", "resume", "device"}):
        check(getattr(config, name) == getattr(saved, name), name, getattr(config, name),
              f"{getattr(saved, name)}, as {out} was made; only --steps and --device may change")
    steps = config.steps if "steps" in typed else saved.steps
    check(steps >= state["step"], "steps", steps, f"at least {state['step']}, where {out} is")
    return dataclasses.replace(saved, resume=True, out=config.out, device=config.device,
                               steps=steps), state


def read_data(data, config, device):
    """data(config, device). Of torchrun's processes the first of each machine reads (downloads,
    decodes) first; the others wait, hours if need be."""
    if "WORLD_SIZE" not in os.environ:
        return data(config, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(hours=12))
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        dist.barrier()
    read = data(config, device)
    if first:
        dist.barrier()
    return read


def concave_classes(counts, config):
    """The classes for which 1 + lam * w <= 0: base loss plus lam * w * d has the curvature
    2 (1 + lam * w) in eps_theta."""
    w = capacity_weights(counts.cpu(), config.w_con, config.w_div)
    return [] if config.no_cm else torch.where(1 + config.lam * w <= 0)[0].tolist()


def train(config, typed=frozenset(), losses=CapacityManipulation, network=make_unet, data=Data):
    """Train as configured, write the run directory, show the result.

    `typed`: the options that a --resume must match; `losses`: CapacityManipulation or a subclass of
    it; `network(config, num_classes, image_channels)`: a UNet; `data(config, device)`: `Data` or
    what has its attributes and methods. Raises ValueError on bad input, before anything is written,
    and FloatingPointError where the loss stops being finite."""
    config, state = prepare_run(config, typed)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(config.batch_size % world == 0, "batch_size", config.batch_size,
          f"divisible by the {world} processes")
    device = pick_device(config.device)
    kind = precision(config, device)
    data = read_data(data, config, device)
    names, counts, out = data.names, data.counts.tolist(), Path(config.out)
    if state and (state["names"], state["counts"]) != (names, counts):
        raise ValueError(f"{out} was trained on other classes, or counts of them, than the data "
                         f"have now")

    torch.manual_seed(hashed_seed("weights", config.seed))
    unet = lay_out(network(config, len(names), data.images.shape[1]), device)
    module = losses.from_config(unet, data.counts, config).to(device)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)  # after what the losses set in it
    if config.compile:  # with eager's random numbers, so that --same-masks can draw masks again
        unet.compile(options={"fallback_random": True})
    model = nn.parallel.DistributedDataParallel(module) if dist.is_initialized() else module
    parameters, ema_parameters = list(unet.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")
    sums = torch.zeros(len(names) + 1, 4, dtype=torch.float64, device=device)
    parts = dict(model=unet, ema=ema, optimizer=optimizer, scaler=scaler)
    step, rows = (state["step"], state["rows"]) if state else (0, [])
    if state:
        restore(state, parts, sums if rank == 0 else None, out)
        state = None  # 620 MB for the paper's network

    def save(summed):
        saved = {name: part.state_dict() for name, part in parts.items()}
        saved |= dict(config=stored_options(config), names=names, counts=counts, step=step,
                      rows=rows, sums=summed)
        write_atomically(out / "checkpoint.pt", lambda path: torch.save(saved, path))

    out.mkdir(parents=True, exist_ok=True)
    progress = tqdm(total=config.steps, initial=step, disable=rank > 0, unit="step", mininterval=1)
    with locked(out) if rank == 0 else contextlib.nullcontext(), progress:
        if rank == 0:
            begin(config, out, data, ema, rows)
            save(sums)  # so that there always is a checkpoint to go on from
        while step < config.steps:
            step += 1
            lr = config.lr * min(1.0, step / max(1, config.warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr
            x0, y, t, eps, y_in = draw_batch(data, config, config.batch_size // world, step, rank)
            with autocast(kind, device):
                loss, base, loss_cm, d = model(x0, y, t, eps, y_in)
            decay = min(config.ema, (1 + step) / (10 + step))  # short runs forget their start, too
            grad_norm = update(loss, parameters, ema_parameters, optimizer, scaler, decay)
            if scaler.is_enabled():  # it skips a step whose gradient isn't finite
                grad_norm = grad_norm.nan_to_num(0, 0, 0)
            add_up(sums, y, loss, base, loss_cm, d, grad_norm)

            last = step == config.steps
            logs, saves = (last or step % n == 0 for n in (config.log_every,
                                                           config.checkpoint_every))
            if logs or saves:
                summed = sums.clone()
                if dist.is_initialized():
                    dist.all_reduce(summed)
                row = row_of(summed, step, lr, names, counts, out)
            if logs:
                rows.append(row)
                sums.zero_()
                summed.zero_()
            if logs and rank == 0:
                write_log(out / "log.csv", rows)
            if saves and rank == 0:
                save(summed)
            progress.update()
            if step % 20 == 0 and rank == 0:
                progress.set_postfix_str(f"base {float(base.detach().mean()):.4f}", refresh=False)
        if rank == 0:
            report(ema, data, config, rows, out)
    if dist.is_initialized():
        dist.destroy_process_group()


def restore(state, parts, sums, out):
    """Fill what a run is made of from its checkpoint."""
    for name in ("model", "ema"):
        load_weights(parts[name], state[name], out)
    parts["optimizer"].load_state_dict(state["optimizer"])
    for p, moments in parts["optimizer"].state.items():  # fused Adam wants this device's layout
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(p).copy_(moments[name])
    if state["scaler"] and parts["scaler"].is_enabled():
        parts["scaler"].load_state_dict(state["scaler"])
    if sums is not None:
        sums.copy_(state["sums"])


def begin(config, out, data, ema, rows):
    """Write config.json and say what a run trains; remove what an older run left."""
    for name in () if rows else ("log.csv", "merged.pt", "samples.png", "curves.png"):
        (out / name).unlink(missing_ok=True)
    if rows:
        write_log(out / "log.csv", rows)
    text = json.dumps(dict(options=stored_options(config), classes=data.names,
                           counts=data.counts.tolist()), indent=1)
    write_atomically(out / "config.json", lambda path: path.write_text(text))
    size = sum(p.numel() for p in merge(ema).parameters()) / 1e6
    print(f"{config.dataset}: {len(data.images)} images, {len(data.names)} classes; "
          f"{size:.2f} M parameters; {data.images.device}; {out}/")
    concave = concave_classes(data.counts, config)
    if concave:
        print(f"note: 1 + λw <= 0 for {', '.join(data.names[k] for k in concave[:20])}: there the "
              f"loss has no minimum, in ε_θ either; a smaller --w-div makes it positive")
    if data.images.device.type == "cpu" and config.preset == "paper":
        print("note: this preset is for a GPU; --preset small gives a result in minutes")


# --------------------------------------------------------------------------------------------------
# The end of a run: held-out table and pictures; --sample


@torch.no_grad()
def held_out_loss(unet, images, labels, num_classes, per_class=32, times=8):
    """Per-class held-out loss of a network in eval mode: (eps-loss of theta [C], of theta_g [C],
    d [C]), float64, nan for classes without images.

    Plain eps target whatever the base loss, the first `per_class` images of each class, a fixed
    time grid and fixed noise: so differences between networks are sharp. images uint8
    [N, C, H, W], labels [N]."""
    index = torch.cat([torch.where(labels == k)[0][:per_class] for k in range(num_classes)])
    images, labels = images[index], labels[index]
    alpha_bar, generator = make_alpha_bar(images.device), torch.Generator().manual_seed(0)
    sums = torch.zeros(4, num_classes, dtype=torch.float64)
    for k in range(times):
        for x0, y in zip(to_float(images).split(250), labels.split(250), strict=True):
            t = torch.full_like(y, int((k + 0.5) * T / times))
            eps = torch.randn(x0.shape, generator=generator).to(x0.device)
            x_t = add_noise(x0, t, eps, alpha_bar)
            eps_theta = unet(x_t, t, y)
            with general_only(unet):
                eps_theta_g = unet(x_t, t, y)
            pairs = (eps_theta, eps), (eps_theta_g, eps), (eps_theta, eps_theta_g)
            values = [squared_distance(a, b) for a, b in pairs]
            values = torch.stack([*values, torch.ones_like(values[0])])
            sums.index_add_(1, y.cpu(), values.double().cpu())
    return tuple(sums[:3] / sums[3])


def report(ema, data, config, rows, out):
    """Write merged.pt, print the held-out table, draw samples.png and curves.png."""
    write_atomically(out / "merged.pt", lambda path: torch.save(merge(ema).state_dict(), path))
    counts = data.counts.cpu()
    per_class = max(1, min(32, 2000 // len(counts)))
    losses = held_out_loss(ema, data.held_out, data.held_out_labels, len(counts), per_class)
    columns = dict(zip(("ω_Con", "ω_Div", "loss θ", "loss θ_g", "d (no dropout)"),
                       (*class_weights(counts), *losses), strict=True))
    if config.no_cm:
        del columns["loss θ_g"], columns["d (no dropout)"]
    labels = {g: f"{g} {data.names[int(g)]}" if g.isdigit() else g for g in groups(counts)}
    width = max(map(len, labels.values()))
    header = f"{'class':{width}} {'count':>7}" + "".join(f"{name:>15}" for name in columns)
    header += "" if config.no_cm else f"{'d (training)':>15}"
    print(f"\nε-loss on {data.held_out_name}, {per_class} images a class\n{header}")
    for group, k in groups(counts).items():
        row = f"{labels[group]:{width}} {int(counts[k].sum()):7d}"
        row += "".join(f"{float(values[k].nanmean()):15.4g}" for values in columns.values())
        row += "" if config.no_cm else f"{rows[-1][f'd_{group}']:15.4g}"
        print("-" * len(header) + "\n" + row if group == "Many" else row)
    if not config.no_cm:
        print("d (training) is that of log.csv's last row, under dropout. θ against θ_g shows "
              "where the expertise\nlies, not whether CM helps: for that, train with --no-cm, too.")
    draw_samples(ema, data, config, out / "samples.png")
    draw_curves(rows, data, config, out / "curves.png")
    print(f"\npictures, weights and log in {out}/")


def given(config, y, guidance):
    """What a trained network is given of labels y and a guidance: nothing where it knows none."""
    return (y, guidance) if config.label_drop < 1 else (torch.full_like(y, -1), 0.0)


def draw_samples(ema, data, config, path, columns=8):
    """A row a class, most frequent first: real images, then theta, theta_g from the same noise."""
    shown = shown_classes(data.counts.cpu())
    y = torch.tensor(shown, device=data.counts.device).repeat_interleave(columns)
    y_in, guidance = given(config, y, config.guidance)
    seeds = [hashed_seed("image", config.seed, i) for i in range(len(y))]
    how = f"guidance {guidance:g}" if config.label_drop < 1 else "any class"
    panels = {"real (training set)": data.first(shown, columns)}
    for title, context in (("θ", contextlib.nullcontext()), ("θ_g, without BA", general_only(ema))):
        if title == "θ" or not config.no_cm:
            with context:
                unet = merge(ema)
            panels[f"{title}, {how}"] = to_uint8(sample(unet, y_in, data.images.shape[1:],
                                                        guidance=guidance, seeds=seeds))
    draw_panels(panels, [f"{data.names[k]}  {int(data.counts[k])}" for k in shown], path)


def plain_text(name):
    """A class's name for matplotlib: $ begins no formula, a leading _ hides nothing."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def draw_panels(panels, names, path):
    """{title: uint8 [rows * columns, C, H, W]} side by side; `names` are the rows'."""
    from matplotlib.figure import Figure
    rows = len(names)
    columns = len(next(iter(panels.values()))) // rows
    side = max(1.6, 0.075 * max(map(len, names)))  # inches
    figure = Figure(figsize=(side + 0.42 * columns * len(panels), 0.42 * rows + 0.7),
                    layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        _, channels, height, width = images.shape
        grid = images.cpu().view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
        grid = grid.reshape(rows * height, columns * width, channels).squeeze(-1)
        axis.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    axes[0].set_yticks([(i + 0.5) * height for i in range(rows)], map(plain_text, names),
                       fontsize=8)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130))


def draw_curves(rows, data, config, path):
    """Per-class d and base loss over steps, coloured from the majority to the minority."""
    import matplotlib
    from matplotlib.figure import Figure
    shown = shown_classes(data.counts.cpu())
    kinds = {} if config.no_cm else {"d": "d = ‖ε_θ − ε_θg‖², in training"}
    kinds |= {"base": "base loss"}
    figure = Figure(figsize=(4.6 * len(kinds) + 1.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        for i, k in enumerate(shown):
            axis.plot([row["step"] for row in rows], [row[f"{kind}_{k}"] for row in rows], lw=1,
                      color=matplotlib.colormaps["viridis"](i / max(1, len(shown) - 1)),
                      marker="." if len(rows) < 3 else "",
                      label=plain_text(f"{data.names[k]} ({int(data.counts[k])})"))
        axis.set(title=title, xlabel="step")
        if any(value > 0 for line in axis.lines for value in line.get_ydata()):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5),
                    title="class (count)", title_fontsize=7)
    if config.div_margin < math.inf and not config.no_cm:
        axes[0].axhline(config.div_margin, color="k", ls=":", lw=1)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130))


def generate(config, network=make_unet):
    """--sample: write an .npz in ADM's layout, arr_0 uint8 [N, H, W, C] and arr_1 labels; beside
    them counts, guidance, sampler, sample_steps; and a picture. `network` as `train`'s.

    Raises ValueError on bad input, FloatingPointError where an image isn't finite."""
    trained, ema, counts = load_trained(config.sample, network=network)
    names = load_checkpoint(config.sample)[0]["names"]
    device = pick_device(config.device)
    kind = precision(config, device)
    chosen = list(config.labels or range(len(counts)))
    out = Path(config.out or Path(config.sample).parent / "samples.npz")
    if config.general_only and trained.no_cm:
        raise ValueError(f"{config.sample} was trained with --no-cm: there is no theta_g to sample")
    check(min(chosen) >= 0 and max(chosen) < len(counts), "labels", config.labels,
          f"from 0 to {len(counts) - 1}")
    check(not config.labels or trained.label_drop < 1, "labels", config.labels,
          f"left away: {config.sample} was trained without labels")
    check(out.suffix == ".npz", "out", out, "a name that ends in .npz, with --sample")
    check(out.parent.is_dir(), "out", out, "in a directory that exists")
    if out.exists() and not config.overwrite:
        raise ValueError(f"{out} exists; type --overwrite, or another --out FILE.npz")

    with general_only(ema) if config.general_only else contextlib.nullcontext():
        unet = lay_out(merge(ema), device)
    shape = (unet.encoder[0].in_channels, trained.image_size, trained.image_size)
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(config.num_images)])
    y_in, guidance = given(trained, labels, config.guidance)
    images = []
    with tqdm(total=len(labels), unit="image") as progress, autocast(kind, device):
        for y in y_in.split(config.sample_batch):
            seeds = [hashed_seed("image", config.seed, progress.n + i) for i in range(len(y))]
            x = sample(unet, y.to(device), shape, config.sampler, config.sample_steps, guidance,
                       seeds)
            if not x.isfinite().all():
                raise FloatingPointError(f"images from {config.sample} are not finite; nothing was "
                                         f"written")
            images.append(to_uint8(x).cpu())
            progress.update(len(y))
    images = torch.cat(images)
    arrays = dict(arr_0=images.permute(0, 2, 3, 1).numpy(), counts=np.array(counts),
                  guidance=guidance, sampler=config.sampler,
                  sample_steps=config.sample_steps or SAMPLERS[config.sampler][1])
    if trained.label_drop < 1:  # an unconditional image has no label
        arrays["arr_1"] = labels.numpy()
    write_atomically(out, lambda p: np.savez(p, **arrays))

    shown = [k for k in shown_classes(counts) if (labels == k).any()]
    columns = min(8, *(int((labels == k).sum()) for k in shown))
    first = torch.cat([images[labels == k][:columns] for k in shown])
    draw_panels({out.name: first}, [f"{k} {names[k]}" for k in shown], out.with_suffix(".png"))
    print(f"{len(labels)} images of {'theta_g' if config.general_only else 'theta'} in {out}, "
          f"the first of each class in {out.with_suffix('.png')}")


# --------------------------------------------------------------------------------------------------
# Options: one field, one flag. `None` means "the preset's value", or what [default: ...] says.

PRESETS = {
    "paper": dict(image_size=32, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,),
                  dropout=0.1, rank_ratio=0.1, batch_size=64, steps=300_000, lr=2e-4, warmup=5000,
                  base="oc", log_every=500, checkpoint_every=1000),
    "small": dict(image_size=16, channels=16, multipliers=(1, 2, 2), blocks=1, attention=(),
                  dropout=0.1, rank_ratio=0.1, batch_size=32, steps=4200, lr=3e-3, warmup=None,
                  base="ddpm", log_every=50, checkpoint_every=500),
}
DATASETS = {"fashion16": "small", "fashion": "small", "cifar10": "paper", "cifar100": "paper",
            "folder": "paper"}


def option(group, default, help, **extra):
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, **extra))


@dataclass
class Config:
    """Every option of a run. `config.json` in the run directory holds it, presets filled in."""

    dataset: str = option("data", "fashion16", "images to train on", choices=list(DATASETS))
    data: str = option("data", None, "torchvision's root, or an image tree (folder; held-out "
                       "images in DIR/val) [default: data]")
    ir: float = option("data", None, "imbalance ratio, most over least frequent class; 1 keeps the "
                       "set as it is (Sec. 4.1) [default: 100; folder: 1]")
    n_max: int = option("data", None, "images in the largest class, the others by --ir [default: "
                        "all; where classes differ: as many as the smallest has]")
    subset_seed: int = option("data", 0, "draws a class's images; 0 is the published draw")
    resample: float = option("data", 1.0, "draw classes with p_c ~ N_c^q: 0.5 square root (RS), 0 "
                             "class-balanced, 1 off (Sec. 4.1)", metavar="Q")
    flip: bool = option("data", None, "horizontal flips [default: yes; fashion, fashion16: no, "
                        "their shoes all point one way]")

    preset: str = option("network", None, "the paper's (Sec. G.1), or small, for a CPU [default: "
                         "small for fashion16 and fashion, else paper]", choices=list(PRESETS))
    image_size: int = option("network", None, "side of the square images, in pixels")
    channels: int = option("network", None, "width of the first level")
    multipliers: tuple = option("network", None, "width of each level (Fig. 4d)", type=int)
    blocks: int = option("network", None, "residual blocks a level")
    attention: tuple = option("network", None, "resolutions with attention, besides the middle",
                              type=int, nargs="*")
    dropout: float = option("network", None, "dropout rate (Sec. G.1)")

    no_cm: bool = option("method", False, "the plain network: no reservation, base loss only")
    rank_ratio: float = option("method", None, "rank of BA over full rank (Eq. 1, Sec. G.1)")
    lam: float = option("method", 1.0, "lambda, weight of L_CM (Eq. 4)")
    w_con: float = option("method", 1.0, "weight of omega_con (Eq. 2); 0: no L_Con (Tab. 7)")
    w_div: float = option("method", 0.2, "weight of omega_div; 0.2 is the authors' code's, 1 Eq. "
                          "(2) as printed, 0 without L_Div (Tab. 7)")
    div_margin: float = option("method", 0.1, "fuse: the distance up to which divergence is "
                               "rewarded; inf is none, as in the authors' code (README)")
    same_masks: bool = option("method", False, "theta and theta_g share their dropout masks: L_CM "
                              "sees capacity alone; in the authors' code each draws its own")
    base: str = option("method", None, "base loss (Sec. 3.2, D)",
                       choices=["oc", "ddpm", "cbdm", "focal"])
    cbdm_prior: str = option("method", "uniform", "classes y' of CBDM: uniform as Eq. (D.1), or by "
                             "frequency as its code", choices=["uniform", "frequency"])

    steps: int = option("training", None, "training steps (Sec. G.1)")
    batch_size: int = option("training", None, "images a step, over all processes (Sec. G.1)")
    lr: float = option("training", None, "Adam's learning rate after warm-up (Sec. G.1)")
    warmup: int = option("training", None, "steps of linear warm-up (Sec. G.1) [default: paper "
                         "5000, small steps/60]")
    label_drop: float = option("training", 0.1, "share of samples trained without their label (for "
                               "guidance); 1 is an unconditional network")
    ema: float = option("training", 0.9999, "largest decay of the weights' moving average")
    seed: int = option("training", 0, "seed of weights, batches and sampling, below 2^63")
    amp: str = option("training", "auto", "mixed precision on CUDA: auto is bf16 where the GPU has "
                      "it, else fp16; off is float32 without TF32",
                      choices=["auto", "bf16", "fp16", "off"])
    compile: bool = option("training", False, "torch.compile the network")
    device: str = option("training", None, "cpu, cuda, cuda:1, ... [default: cuda if it is there]")

    out: str = option("run", None, "run directory, or the .npz that --sample writes [default: "
                      "runs/DATASET; samples.npz beside the checkpoint]")
    resume: bool = option("run", False, "go on from --out's checkpoint; --steps and --device may "
                          "change")
    overwrite: bool = option("run", False, "write into a directory that is in use")
    checkpoint_every: int = option("run", None, "steps between checkpoints")
    log_every: int = option("run", None, "steps between rows of log.csv")

    sample: str = option("sampling", None, "generate images from this checkpoint.pt instead of "
                         "training", metavar="CHECKPOINT")
    num_images: int = option("sampling", 50_000, "how many (Sec. 4.1)")
    labels: tuple = option("sampling", None, "only these classes, in equal numbers", type=int)
    sampler: str = option("sampling", "ddim", "50-step DDIM (Sec. G.1), 1000-step DDPM (Alg. C.1) "
                          "or 15-step DPM-Solver++ (Tab. G.10: DPM-Solver)", choices=list(SAMPLERS))
    sample_steps: int = option("sampling", None, "sampler steps [default: the above]")
    guidance: float = option("sampling", 1.5, "classifier-free guidance w in eps_c + w (eps_c - "
                             "eps_null), as in the authors' evaluation; 0 is off")
    general_only: bool = option("sampling", False, "sample theta_g, without BA (Tab. 7)")
    sample_batch: int = option("sampling", 250, "images at a time")

    def __post_init__(self):  # argparse and JSON make lists
        for name, value in vars(self).items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    def resolved(self):
        """A copy with every preset-dependent field filled in. Raises ValueError on nonsense."""
        config = dataclasses.replace(self, preset=self.preset or DATASETS[self.dataset])
        if config.warmup is None and config.preset == "small":
            config.warmup = max(1, (config.steps or PRESETS["small"]["steps"]) // 60)  # as 5,000
        if config.ir is None:  # of 300,000
            config.ir = 1.0 if config.dataset == "folder" else 100.0
        if config.flip is None:
            config.flip = config.dataset not in ("fashion16", "fashion")
        for name, value in PRESETS[config.preset].items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        config.out = config.out or f"runs/{config.dataset}"
        config.check()
        return config

    def check(self):
        """Raises ValueError, one line, on a value that makes no sense."""
        positive = ("steps image_size channels blocks batch_size log_every checkpoint_every "
                    "num_images sample_batch ir n_max sample_steps")
        weights = "lam w_con w_div resample warmup lr guidance"
        below = {"dropout": 1, "ema": 1, "seed": 2**63, "subset_seed": 2**32, "resample": 11}
        for name, value in vars(self).items():
            if name in positive.split() and value is not None:
                check(1 <= value < math.inf, name, value, "at least 1")
            if name in weights.split():
                check(0 <= value < math.inf, name, value, "at least 0")
            if name in below:
                check(0 <= value < below[name], name, value, f"at least 0 and below {below[name]}")
        check(self.div_margin >= 0, "div_margin", self.div_margin, "at least 0")
        check(0 <= self.label_drop <= 1, "label_drop", self.label_drop, "in [0, 1]")
        check(0 < self.rank_ratio <= 1, "rank_ratio", self.rank_ratio, "in (0, 1]")
        check(self.channels % (2 if self.channels < 128 else 32) == 0, "channels", self.channels,
              "even, and from 128 on divisible by 32, GroupNorm's groups")
        check(min(self.multipliers) >= 1, "multipliers", self.multipliers, "at least 1 a level")
        stride = 2 ** (len(self.multipliers) - 1)
        check(self.image_size % stride == 0, "image_size", self.image_size,
              f"divisible by the network's stride, {stride}")
        check(not (self.resume and self.overwrite), "resume", True, "given without --overwrite")


def check(ok, name, value, expected):
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {expected}")


# --------------------------------------------------------------------------------------------------
# Command line, generated from Config


def parse(argv):
    """(Config, set of the options typed)."""
    parser = argparse.ArgumentParser(prog="cm.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    sections = {}
    for field in dataclasses.fields(Config):
        extra = dict(field.metadata)
        title, text = extra.pop("group"), extra.pop("help")
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        if field.name in PRESETS["paper"] and "[" not in text:
            values = [f"{name} {spell(preset[field.name])}" for name, preset in PRESETS.items()]
            text += f" [default: {', '.join(values)}]"
        elif field.default is not None and field.type is not bool:
            text += f" [default: {spell(field.default)}]"
        if field.type is bool:
            both = field.default is None
            extra["action"] = argparse.BooleanOptionalAction if both else "store_true"
        else:
            extra = dict(type=field.type) | extra
            if field.type is tuple:
                extra.setdefault("nargs", "+")
            if "choices" not in extra:
                extra.setdefault("metavar", {int: "N", float: "X", str: "S"}[extra["type"]])
        flag = "--" + field.name.replace("_", "-")
        sections[title].add_argument(flag, default=argparse.SUPPRESS, help=text, **extra)
    typed = vars(parser.parse_args(argv))
    return Config(**typed), set(typed)


def spell(value):
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def check_used(config, typed):
    """Raises ValueError where an option was typed that the command ignores."""
    sampling = {f.name for f in dataclasses.fields(config) if f.metadata["group"] == "sampling"}
    shared, sample = {"seed", "amp", "device", "out", "overwrite"}, config.sample is not None
    ignored = typed - sampling - shared if sample else typed & sampling
    for name in sorted(ignored):
        raise ValueError(f"--{name.replace('_', '-')} has no meaning "
                         f"{'with' if sample else 'without'} --sample")
    of_cm = {"rank_ratio", "lam", "w_con", "w_div", "div_margin", "same_masks"}
    for name in sorted(typed & of_cm if config.no_cm else ()):
        raise ValueError(f"--{name.replace('_', '-')} has no meaning with --no-cm")
    if sample and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--sample is one process's work; type python instead of torchrun")
    check(config.out != "", "out", "empty", "a name")


def fail(message):
    """One line on stderr, status 2."""
    print(f"{Path(sys.argv[0]).name}: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Greek letters shows ?
            stream.reconfigure(errors="replace")
    config, typed = parse(argv)
    try:
        check_used(config, typed)
        if config.sample is not None:
            config.resolved()  # for its checks
            generate(config)
        else:
            train(config.resolved(), typed)
    except (ValueError, OSError) as e:
        fail(e)
    except FloatingPointError as e:
        sys.exit(f"cm.py: {e}")
    except KeyboardInterrupt:
        print("cm.py: interrupted; what is written is whole, and with --resume training goes on "
              "from its last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
