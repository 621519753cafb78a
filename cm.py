"""Capacity Manipulation (CM) for class-imbalanced diffusion models, in one file.

    python cm.py                               # Fashion-MNIST-LT, 16x16, minutes on a CPU
    python cm.py --dataset cifar10 --ir 100    # the paper's setting: a GPU, 300,000 steps
    python cm.py --dataset folder --data TREE  # your own images, TREE/CLASS/*.jpg
    python cm.py --out runs/fashion16 --resume # go on where a run stopped
    python cm.py --sample runs/fashion16/checkpoint.pt --num-images 1000
    torchrun --nproc-per-node 4 cm.py --dataset cifar100   # several GPUs (--nnodes: machines)

The method comes first, then network, data, a run, options. Equations, sections and tables are the
paper's. In [B, C, H, W] C is channels, else classes; labels 0..C-1 are the data set's own.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import json
import math
import os
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision import datasets, transforms, utils
from tqdm import tqdm

T = 1000  # diffusion steps (Sec. G.1); t is 0..T-1 here, 1..T in the paper


# ---- Eq. (1): capacity reservation ---------------------------------------------------------------
class LowRankReserved(nn.Module):
    """A Conv2d or Linear whose weight is W_g + BA, or W_g alone inside `general_only` (Eq. 1).
    `layer`, which holds W_g and the bias, is called with its weight replaced: forward and hooks are
    its own. B [d, r] starts at zero, A [r, k] at random, as in LoRA; but W_g is trained, too."""

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
    group, and BA has the rank kh * max(int(rank_ratio * min(out, in)), 1), as in loralib."""
    out_features, in_features, *kernel = layer.weight.shape
    kh, kw = kernel or (1, 1)
    rank = int(round(rank_ratio * min(out_features, in_features), 6))  # 0.29 * 100 is below 29
    return kh * out_features, kw * in_features, kh * max(rank, 1)


def reserve_capacity(module, rank_ratio=0.1, where=None):
    """Replace Conv2d and Linear layers inside `module`, in place, by LowRankReserved ones (Eq. 1).
    `where(layer)` chooses (a slice would be a copy); those whose rank (`matrix_and_rank`) isn't
    below min(d, k) stay plain in any case. Returns the module (a bare layer comes back wrapped).
    Raises ValueError where a layer is out of BA's reach, and if none is left. (Sec. 3.1, G.1)"""
    check(0 < rank_ratio <= 1, "rank_ratio", rank_ratio, "in (0, 1]")
    if reserved_layers(module):
        raise ValueError("capacity is reserved in this module already; merge it first")
    modules = list(module.modules())
    owned = [id(p) for m in modules for p in m._parameters.values()]
    listed = [id(layer) for m in modules for value in vars(m).values() if isinstance(value, list)
              for layer in value]
    reserved = {}
    for layer in modules:
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or (where and not where(layer)):
            continue
        if "weight" not in layer._parameters:
            raise ValueError(f"{layer} has no weight of its own (weight norm, parametrization)")
        if owned.count(id(layer.weight)) > 1:  # merged, the two would differ
            raise ValueError(f"{layer}'s weight is another's, too (tied); leave it out by `where`")
        if id(layer) in listed:  # there it would stay without BA
            raise ValueError(f"a plain list holds {layer}; use nn.ModuleList or omit it by `where`")
        d, k, rank = matrix_and_rank(layer, rank_ratio)
        if rank < min(d, k):
            reserved[layer] = LowRankReserved(layer, d, k, rank)
    if not reserved:
        kinds = sorted({type(m).__name__ for m in modules if m._parameters})
        raise ValueError(f"no Conv2d or Linear whose rank could be lower, but {', '.join(kinds)}")
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
    """Inside, `module` computes with theta_g, W_g alone (Sec. 3.2); contexts may overlap."""
    layers = reserved_layers(module)
    for layer in layers:
        layer.general += 1
    try:
        yield module
    finally:
        for layer in layers:
            layer.general -= 1


def merge(module):
    """A plain copy of `module` with the weights in force, W_g + BA, folded in (Sec. 3.2); inside
    `general_only` theta_g's. Names and FLOPs are those of a network without reserved capacity."""
    plain = copy.deepcopy(module)
    for reserved in reversed(reserved_layers(plain)):  # from the inside out
        weight = reserved.weight.detach().clone()
        reserved.layer.weight = nn.Parameter(weight, reserved.layer.weight.requires_grad)
        plain = replace_modules(plain, {reserved: reserved.layer})
    return plain


# ---- Eqs. (3) and (2): class weights and the capacity manipulation loss --------------------------
def class_weights(counts):
    """(omega_con, omega_div), each [C] float32, of training counts N_c > 0; all 1 if balanced."""
    n = torch.as_tensor(counts, dtype=torch.float64)
    if not (n > 0).all():
        raise ValueError(f"each class needs a positive count, not {n.tolist()}")
    omega_con = len(n) * n / n.sum()  # Eq. (3): majority classes agree
    omega_div = len(n) / (n * (1 / n).sum())  # Eq. (3): minority classes differ
    return omega_con.float(), omega_div.float()


def capacity_weights(counts, w_con=1.0, w_div=0.2):
    """w [C], what a class's distance d counts for. 1 and 0.2 are the authors' code's, 1 and 1
    Eq. (2) as printed; 0 leaves a term out (Tab. 7)."""
    omega_con, omega_div = class_weights(counts)
    return w_con * omega_con - w_div * omega_div


def squared_distance(a, b):
    """||a - b||^2 as a *mean* over C x H x W, [B], at least in float32. Raises ValueError."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) - b.to(dtype)).square().flatten(1).mean(1)


def capacity_loss(eps_theta, eps_theta_g, w, div_margin=0.1):
    """L_CM [B], w * d, of predictions [B, C, H, W] and each sample's weight w [B] (Eq. 2). Where
    w < 0 it has no lower bound in eps_theta_g: there, and only there, d counts up to `div_margin`,
    a fuse far above what dropout makes of d; inf is the authors' form."""
    return weigh(squared_distance(eps_theta, eps_theta_g), w, div_margin)


def weigh(d, w, div_margin):
    """`capacity_loss` [B] of distances d [B]."""
    return torch.where(w >= 0, w * d, w * d.clamp(max=div_margin))  # Eq. (2), with the fuse


# ---- The diffusion process: one schedule for training and sampling -------------------------------
def make_alpha_bar(device="cpu"):
    """alpha_bar [T] float64, betas linear from 1e-4 to 0.02 (Sec. G.1)."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    return torch.cumprod(1 - betas, 0).to(device)


def scales(alpha_bar, t, x):
    """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), float32, for t [B], shaped to scale x [B, ...]."""
    a = alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
    return a.sqrt().float(), (1 - a).sqrt().float()


def add_noise(x0, t, eps, alpha_bar):
    """x_t of x0, eps [B, ...], t [B], in x0's type (Sec. A; Algorithm C.1 lacks the 2nd root)."""
    signal_scale, noise_scale = scales(alpha_bar, t, x0)
    return (signal_scale * x0 + noise_scale * eps).to(x0.dtype)


# ---- Base losses (Sec. D), Eq. (4) and one training step -----------------------------------------
@torch.no_grad()
def oc_target(x0, x_t, t, y, eps, counts, alpha_bar, generator=None):
    """Oriented Calibration (OC, Zhang et al. 2024): x_ref is drawn from the batch, probability ~
    q(x_t | x_ref); where its class is no rarer than y's, the target [B, C, H, W] points to it, else
    it is eps. (Eqs. D.2-D.4, with the bar on alpha and the division that OC's code has)"""
    signal_scale, noise_scale = scales(alpha_bar, t, x0)
    # without cdist's matrix product: at small t the exponent multiplies rounding by 10^4
    distance = torch.cdist((x_t / signal_scale).flatten(1), x0.flatten(1),
                           compute_mode="donot_use_mm_for_euclid_dist").square()  # [B, B]
    logits = -distance / (2 * (noise_scale / signal_scale).square().flatten(1))  # Eq. (D.4)
    # argmax of p / Exp(1) is a draw from p, like torch.multinomial's, whose check stalls a GPU
    race = torch.empty_like(logits).exponential_(generator=generator)
    ref = (logits.softmax(1) / race).argmax(1)
    transfer = (counts[y[ref]] >= counts[y])[:, None, None, None]
    return torch.where(transfer, (x_t - signal_scale * x0[ref]) / noise_scale, eps)  # Eq. (D.3)


def cbdm_pull(eps_theta, eps_other, t, y_in):
    """What Class-Balancing Diffusion (CBDM, Qin et al. 2023) adds to the base loss [B]: Eq. (D.1)
    with one other class y', tau t = t / T and gamma = 1/4; nothing where y is dropped."""
    pull = squared_distance(eps_theta, eps_other.detach())
    pull = pull + 0.25 * squared_distance(eps_theta.detach(), eps_other)
    return t / T * pull * (y_in >= 0)


def same_masks(x):
    """The pass after this context draws the dropout masks of the pass inside it again."""
    devices = [x.device.index or 0] if x.device.type == "cuda" else []
    return torch.random.fork_rng(devices, device_type="cuda")


class CapacityManipulation(nn.Module):
    """The losses of one batch under a network `unet(x_t, t, y)`; `train` trains its weights only.
    A variation is a subclass. counts [C]: training images; `base`: "ddpm", "oc", "cbdm" or "focal";
    `lam`: lambda; `same_masks`: theta_g has theta's dropout masks; `no_cm`: base loss only."""

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
        """The loss module of a run; a variation may override it."""
        return cls(unet, counts, config.base, config.lam, config.w_con, config.w_div,
                   config.div_margin, config.same_masks, config.cbdm_prior, config.no_cm)

    def forward(self, x0, y, t, eps, y_in):
        """x0, eps [B, C, H, W]; y, t [B]; y_in [B], y with -1 where the label is dropped
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
        if self.base == "focal":  # Lin et al. 2017, gamma = 1; exp(-loss) stands in for p
            base = (1 - torch.exp(-base)) * base
        if self.no_cm:
            return base.mean(), base, torch.zeros_like(base), torch.zeros_like(base)
        d = squared_distance(eps_theta, eps_theta_g)
        loss_cm = weigh(d, self.w[y], self.div_margin)  # by the true class, also where y_in is -1
        total = base.mean() + self.lam * loss_cm.mean()  # Eq. (4)
        return total, base, loss_cm, d.detach()

    def other_classes(self, y):
        """CBDM's y' [B], maybe y: uniform over classes (Eq. D.1), or by "frequency" as its code."""
        q = 1.0 if self.cbdm_prior == "frequency" else 0.0
        return torch.multinomial(self.counts.float() ** q, len(y), replacement=True)


def update(loss, parameters, ema_parameters, optimizer, scaler, decay):
    """One step down the gradient of `loss` [], clipped to norm 1; then the moving average (EMA) of
    W_g, A and B each. -> the norm before clipping, []; 0 where float16's `scaler` skips a step."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    scaler.update()
    get_ema_multi_avg_fn(decay)(ema_parameters, parameters, None)
    return grad_norm.nan_to_num(0, 0, 0) if scaler.is_enabled() else grad_norm


# ---- Sampling; `predict(x, t)` is eps [B, C, H, W] at the time t, an int -------------------------
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


def ddpm(predict, x, alpha_bar, steps, noise):
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
    times = np.linspace(0, T - 1, steps + 1).round().astype(int).tolist()[:0:-1]  # without 0
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
    """Images [B, C, H, W] in [-1, 1] or nan, of an eps-function or UNet in eval mode, f(x, t, y).
    labels [B] (-1: none); image_shape (C, H, W); seeds: one int an image, so that the batch size
    doesn't matter; guidance w: eps_c + w (eps_c - eps_null), classifier-free. Raises ValueError."""
    draw, usual = SAMPLERS[sampler]
    most = T - (sampler == "dpm")  # no time twice
    check(steps is None or 1 <= steps <= most, "sample_steps", steps, f"1 to {most} with {sampler}")
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
    x = draw(predict, noise(), alpha_bar, steps or usual, *more)
    x = torch.where(x.isfinite(), x, torch.nan)  # clamp would make of inf a pixel like any other
    return x.clamp(-1, 1)


# ---- Network: the DDPM UNet of the code that the paper builds on ---------------------------------
def initialised(layer, gain=1.0):
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(cin, cout, kernel=3, stride=1, gain=1.0):
    return initialised(nn.Conv2d(cin, cout, kernel, stride, kernel // 2), gain)


def norm(channels):
    """32 groups as in the base code; one where small groups would hide an image's mean."""
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
    def __init__(self, cin, cout, attention, emb_dim, dropout):
        super().__init__()
        self.block1 = nn.Sequential(norm(cin), nn.SiLU(), conv(cin, cout))
        self.emb_proj = nn.Sequential(nn.SiLU(), initialised(nn.Linear(emb_dim, cout)))
        self.block2 = nn.Sequential(norm(cout), nn.SiLU(), nn.Dropout(dropout),
                                    conv(cout, cout, gain=1e-5))
        self.shortcut = conv(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.block1(x) + self.emb_proj(emb)[:, :, None, None]
        return self.attention(self.block2(h) + self.shortcut(x))


class UNet(nn.Module):
    """eps_theta(x_t, t, y). `image_size` only places the attention: any size that is divisible by
    2^(levels-1) can be fed. Raises ValueError where widths don't fit GroupNorm."""

    def __init__(self, num_classes=10, image_channels=3, image_size=32, channels=128,
                 multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1):
        super().__init__()
        self.channels, emb_dim = channels, 4 * channels
        self.time_embedding = nn.Sequential(initialised(nn.Linear(channels, emb_dim)), nn.SiLU(),
                                            initialised(nn.Linear(emb_dim, emb_dim)))
        self.label_embedding = nn.Embedding(num_classes, emb_dim)

        block = lambda cin, cout, attends: ResBlock(cin, cout, attends, emb_dim, dropout)
        levels = [(channels * m, image_size >> i in attention) for i, m in enumerate(multipliers)]

        self.encoder = nn.ModuleList([conv(image_channels, channels)])
        widths = [channels]  # of the encoder's outputs; the decoder takes them from the last on
        for level, (width, attends) in enumerate(levels):
            if level > 0:
                self.encoder.append(conv(widths[-1], widths[-1], stride=2))
                widths.append(widths[-1])
            for _ in range(blocks):
                self.encoder.append(block(widths[-1], width, attends))
                widths.append(width)
        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])
        self.decoder = nn.ModuleList()
        for level, (out, attends) in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self.decoder.append(block(width + widths.pop(), out, attends))
                width = out
            if level > 0:
                self.decoder.append(nn.Sequential(nn.Upsample(scale_factor=2)))
                self.decoder[-1].add_module("conv", conv(width, width))
        last = conv(width, image_channels, gain=1e-5)
        self.decoder.append(nn.Sequential(norm(width), nn.SiLU(), last))

    def embed(self, t, y):
        """What residual blocks are told of t [B] and y [B] (-1: dropped), [B, 4 * channels]."""
        half = torch.arange(self.channels // 2, device=t.device)
        frequency = torch.exp(-math.log(10_000.0) / (self.channels // 2) * half)
        angle = t[:, None].float() * frequency
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        emb = self.time_embedding(emb.to(self.time_embedding[0].weight.dtype))
        label = self.label_embedding(y.clamp(min=0))
        return emb + label * (y >= 0)[:, None]  # a dropped label adds nothing

    def forward(self, x_t, t, y):
        """-> eps [B, C, H, W] for x_t [B, C, H, W], t [B], y [B] (-1: label dropped)."""
        emb = self.embed(t, y)
        h, skips = x_t, []
        for layer in self.encoder:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.decoder:
            block = isinstance(layer, ResBlock)
            h = layer(torch.cat([h, skips.pop()], 1), emb) if block else layer(h)
        return h


def make_unet(config, num_classes, image_channels):
    """The UNet of a run. Unless --no-cm, capacity is reserved (Eq. 1) where the authors' code has
    it: in the 3x3 convolutions of the decoder's blocks and upsampling, not in the very last one."""
    unet = UNet(num_classes, image_channels, config.image_size, config.channels,
                config.multipliers, config.blocks, config.attention, config.dropout)
    if not config.no_cm:
        blocks = unet.decoder[:-1]  # not the last convolution
        reserve_capacity(blocks, config.rank_ratio, where=lambda m: m.weight.shape[2:] == (3, 3))
    return unet


# ---- Data: the long-tailed split everyone uses, and one uint8 tensor on the device ---------------
FASHION16 = Path(__file__).with_name("assets") / "fashion16.npz"  # experiments/make_fashion16.py


def class_counts(n_max, ir, num_classes):
    """N_c = int(n_max * ir^(-c/(C-1))), C ints (Cao et al. 2019). Raises ValueError if one is 0."""
    counts = [int(n_max * (1 / ir) ** (c / (num_classes - 1.0))) for c in range(num_classes)]
    check(counts[-1] > 0, "ir", ir, "smaller: it leaves the smallest class empty")
    return counts


def long_tail_indices(labels, ir, seed=0, n_max=None):
    """Indices of the long-tailed subset of `labels` [N]; ir = 1 alone keeps all N. As in everyone's
    code: RandomState(seed), there 0, classes in order, each one's indices shuffled, the first N_c
    taken; n_max = N / C (the smallest class where they differ). Raises ValueError."""
    labels = np.asarray(labels)
    if ir == 1 and n_max is None:
        return np.arange(len(labels))
    sizes = np.bincount(labels)
    if n_max is None:
        n_max = len(labels) / len(sizes) if sizes.min() == sizes.max() else sizes.min()
    rng, chosen = np.random.RandomState(seed), []
    for c, n in enumerate(class_counts(n_max, ir, len(sizes))):
        check(n <= sizes[c], "n_max", n_max, f"less: class {c} has {sizes[c]} images, not {n}")
        index = np.where(labels == c)[0]
        rng.shuffle(index)
        chosen.append(index[:n])
    return np.concatenate(chosen)


def splits(counts):
    """{"Many": classes, "Medium": ..., "Few": ...} by count (Sec. 4.1); of two no Medium."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    third = len(counts) // 3
    if len(counts) == 2:
        return {"Many": order[:1], "Few": order[1:]}
    return {"Many": order[:third], "Medium": order[third:2 * third], "Few": order[2 * third:]}


def read_image(file):
    """An image file as a PIL image of mode RGB: upright by its EXIF, 16 bits rounded to 8, floats
    in [0, 1] times 255, transparency dropped as PIL does. Raises as PIL does, and ValueError."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # PIL would clip these at 255
            levels, top = np.asarray(image, np.float64), 1 if image.mode == "F" else 65535
            if not (levels.min() >= 0 and levels.max() <= top):
                raise ValueError(f"its values aren't in [0, {top}]")
            image = Image.fromarray(np.rint(255 / top * levels).astype(np.uint8))
        return image.convert("RGB")


def read_images(files, prepare=np.asarray):
    """uint8 [N, H, W, 3] of image files by `prepare`. Raises ValueError, naming five at most."""
    def decode(file):
        try:
            return prepare(read_image(file))
        except Exception as e:  # PIL has many kinds
            return f"{file} can't be read as an image ({e})"

    with ThreadPool() as pool:  # PIL decodes outside the interpreter's lock
        images = list(tqdm(pool.imap(decode, files, 64), "decoding", len(files)))
    wrong = [image for image in images if isinstance(image, str)]
    if wrong:
        raise ValueError("; ".join(wrong[:5]) + f" (of {len(wrong)})" * (len(wrong) > 5))
    return np.stack(images)


def visible(names):
    """File names, sorted, without hidden ones and __MACOSX."""
    return sorted(name for name in names if name[0] != "." and name != "__MACOSX")


def list_images(tree, names=("",)):
    """The image files beneath tree/NAME of each class (beneath `tree`), and their classes [N].
    Linked folders are followed once; files of other endings are counted on stderr."""
    found, seen = [], {os.path.realpath(tree / name) for name in ("", *names)}
    for label, name in enumerate(names):
        again = lambda e: e.errno == 2 or os.listdir(e.filename)  # raises; val may lack a class
        for folder, inner, files in os.walk(tree / name, onerror=again, followlinks=True):
            found += [(folder, file, label) for file in visible(files)]
            real = {os.path.realpath(Path(folder, name)): name for name in visible(inner)}
            inner[:] = [name for path, name in real.items() if path not in seen]
            seen.update(real)
    images = [image for image in sorted(found) if datasets.folder.is_image_file(image[1])]
    if len(images) < len(found):
        print(f"{tree}: {len(found) - len(images)} files left out, whose endings aren't images'",
              file=sys.stderr)
    return [Path(*image[:2]) for image in images], np.array([i[2] for i in images], np.int64)


def class_folders(root):
    """(folder of the classes' folders, their names) of an image tree: root/train, if it holds
    folders, else root; held-out images are apart, in root/val. Raises ValueError."""
    beside, inner = (visible(path.name for path in folder.glob("*") if path.is_dir())
                     for folder in (root, root / "train"))
    parts = {"train", "training", "val", "valid", "validation", "test", "testing"}
    if inner:  # a test set may lie beside train and val
        tree, names = root / "train", inner
        odd = set(beside) - (parts if "val" in beside else {"train"})
    else:
        tree, names = root, [name for name in beside if name != "val"]
        odd = {name for name in names if name.lower() in parts} - {"train"}
    if odd or len(names) < 2:
        what = ", ".join(sorted(odd)) or "fewer than two folders"
        raise ValueError(f"{root} holds {what}: it must hold a folder a class, or train and val")
    return tree, names


def load_dataset(name, data=None, image_size=32, train=True):
    """A data set as it comes (not yet long-tailed): uint8 [N, H, W, C], labels [N] int64, list of
    class names. train=False: the held-out images, N = 0 where there are none. Raises ValueError."""
    if name == "folder":
        check(data and Path(data).is_dir(), "data", data, "a tree with a folder of images a class")
        resize = transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC)
        square = transforms.Compose([resize, transforms.CenterCrop(image_size), np.asarray])
        tree, names = class_folders(Path(data))
        files, labels = list_images(tree if train else Path(data, "val"), names)
        empty = [name for label, name in enumerate(names) if train and label not in labels]
        check(not empty, "data", data, f"a tree with images of {', '.join(empty)}, too")
        images = np.empty((0, image_size, image_size, 3), np.uint8)
        return read_images(files, square) if files else images, labels, names
    if name == "fashion16":
        check(data is None, "data", data, "left away with fashion16, which lies beside cm.py")
        part, names = "train" if train else "test", datasets.FashionMNIST.classes
        with np.load(FASHION16) as file:
            images, labels = file[f"{part}_images"][..., None], file[f"{part}_labels"]
    else:
        kind = "FashionMNIST" if name == "fashion" else name.upper()
        try:
            whole = getattr(datasets, kind)(data or "data", train, download=True)
        except Exception as e:  # torchvision, urllib and pickle have many kinds
            raise ValueError(f"{kind} isn't whole in {data or 'data'} ({e!r})") from None
        images, labels, names = np.asarray(whole.data), np.asarray(whole.targets), whole.classes
        if name == "fashion":
            images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]  # [N, 32, 32, 1]
    return shrink(images, image_size), labels.astype(np.int64), list(names)


def shrink(images, size):
    """uint8 [N, H, H, C] averaged to [N, size, size, C]. Raises ValueError."""
    n, side, _, channels = images.shape
    check(side % size == 0, "image_size", size, f"a divisor of {side}")
    blocks = images.reshape(n, size, side // size, size, side // size, channels)
    return images if size == side else np.rint(blocks.mean((2, 4), np.float32)).astype(np.uint8)


def on_device(images, labels, device):
    """uint8 [N, H, W, C] and labels [N] as tensors [N, C, H, W] and [N]."""
    images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.from_numpy(labels).to(device)


class Data:
    """A training set on the device, sorted by class: images uint8 [N, C, H, W], labels [N], counts
    [C], starts [C], names; held_out, held_out_labels, held_out_name. Raises ValueError."""

    def __init__(self, config, device="cpu"):
        options = config.dataset, config.data, config.image_size
        images, labels, names = load_dataset(*options)
        # printable also where a folder's name isn't UTF-8
        self.names = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
        index = long_tail_indices(labels, config.ir, config.subset_seed, config.n_max)
        index = index[np.argsort(labels[index], kind="stable")]
        self.images, self.labels = on_device(images[index], labels[index], device)
        self.counts = torch.bincount(self.labels, minlength=len(self.names))
        self.starts = self.counts.cumsum(0) - self.counts
        held_out, held_out_labels, _ = load_dataset(*options, train=False)
        self.held_out, self.held_out_labels = on_device(held_out, held_out_labels, device)
        self.held_out_name = "held-out" if len(held_out) else "TRAINING images"
        if not len(held_out):
            self.held_out, self.held_out_labels = self.images, self.labels

    def batch(self, size, resample=1.0, flip=True):
        """`size` images in [-1, 1], their labels: with replacement, classes p_c ~ N_c^resample."""
        y = torch.multinomial(self.counts.double() ** resample, size, replacement=True)
        index = self.starts[y] + torch.randint(2**62, (size,), device=y.device) % self.counts[y]
        x = to_float(self.images[index])
        if flip:
            x = torch.where(torch.rand(size, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
        return x, y

    def first(self, classes, columns):
        """The first `columns` images of each of the classes, repeated where there are fewer."""
        return torch.stack([self.images[self.starts[k] + i % self.counts[k]]
                            for k in classes for i in range(columns)])


def to_float(images):
    return images.float() / 127.5 - 1


def to_uint8(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- Training loop -------------------------------------------------------------------------------
def hashed_seed(purpose, *numbers):
    """One integer for `manual_seed`, from a purpose (at most 8 letters) and ints in [0, 2^63).
    PyTorch's CPU generators keep its low 32 bits: of seed + step many pairs would share one."""
    # SeedSequence takes words of 32 bits; two halves of each, so that no two lists read alike
    words = [int.from_bytes(purpose.encode(), "little"), *numbers]
    halves = [half for word in words for half in (word % 2**32, word >> 32)]
    return int(np.random.SeedSequence(halves).generate_state(1, np.uint64)[0])


def draw_batch(data, config, size, step, rank=0):
    """One step's x0, y, t, eps and y_in (y, -1 where the label is dropped). All, and what `forward`
    draws next, is by (seed, step, process) alone: resumed runs and other methods see the same."""
    torch.manual_seed(hashed_seed("batch", config.seed, step, rank))
    x0, y = data.batch(size, config.resample, config.flip)
    t = torch.randint(T, (size,), device=x0.device)
    eps = torch.randn_like(x0)
    y_in = torch.where(torch.rand(size, device=x0.device) < config.label_drop, -1, y)
    return x0, y, t, eps, y_in


def pick_device(name=None):
    """--device, by default the GPU if there is one, torchrun's LOCAL_RANK. Raises ValueError."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = {None: gpu if torch.cuda.is_available() else "cpu", "cuda": gpu}.get(name, name)
    check(name.split(":")[0] in ("cpu", "cuda"), "device", name, "cpu, cuda or cuda:N")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} can't be used here ({str(e).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def lay_out(unet, device):
    """The network on its device, on the CPU channels-last, where that makes a difference."""
    unet = unet.to(device)
    for p in unet.parameters():
        if device.type == "cpu" and p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return unet


def precision(config, device):
    """The autocast context of --amp. Sets globally: float32 products are float32, not TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    kind, gpu = config.amp, device.type == "cuda"
    check(gpu or kind in ("auto", "off"), "amp", kind, "left away without a GPU")
    if gpu and kind == "auto" and not torch.cuda.is_bf16_supported(including_emulation=False):
        kind = "fp16"
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=gpu and kind != "off")


def write_atomically(path, write):
    """Call `write` on a temporary name, then rename: `path` is always whole. Raises OSError."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save's, on a full disk, is a RuntimeError
        raise OSError(f"{path} can't be written ({e}); it is as it was before") from None
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
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return state, Config(**state["config"])
    except Exception as e:  # torch.load raises nearly anything on a broken file
        raise ValueError(f"{path} can't be loaded as a checkpoint.pt ({e!r:.90})") from None


def load_trained(path, weights="ema", network=make_unet):
    """(configuration, network in eval mode with W_g, A and B still apart, class counts) of a
    checkpoint.pt, whose weights are "ema" or "model"; `network` as `train`'s. Raises ValueError."""
    state, config = load_checkpoint(path)
    unet = network(config, len(state["counts"]), state["ema"]["encoder.0.weight"].shape[1])
    try:
        unet.load_state_dict(state[weights])
    except RuntimeError:
        raise ValueError(f"{path} holds another network than its configuration says") from None
    return config, unet.eval().requires_grad_(False), state["counts"]


def shown_classes(counts):
    """The classes of tables and pictures, most frequent first; of over 20 the first and last 5."""
    order = np.argsort(-np.asarray(counts), kind="stable").tolist()
    return order if len(order) <= 20 else order[:5] + order[-5:]


def groups(counts):
    """{label: classes [n]} of what tables and logs list: classes by number, then the splits."""
    classes = {str(k): torch.tensor([k]) for k in shown_classes(counts)}
    return classes | {name: torch.as_tensor(k) for name, k in splits(counts).items()}


def row_of(sums, since, step, lr, names, counts, out):
    """A row of log.csv, means of `train`'s sums. Raises FloatingPointError if one isn't finite."""
    by_class, (loss, grad_norm, steps, _) = sums[:-1].cpu(), sums[-1].tolist()
    if not sums.isfinite().all():
        odd = [names[k] for k in torch.where(~by_class.isfinite().all(1))[0].tolist()[:20]]
        what = f"the loss of {', '.join(odd)}" if odd else "the gradient"
        raise FloatingPointError(f"{what} is not finite between steps {since} and {step}; the last "
                                 f"good checkpoint is {out}/checkpoint.pt")
    base, loss_cm, d, samples = by_class.T
    row = dict(step=step, lr=lr, loss=loss / steps, base=float(base.sum() / samples.sum()),
               cm=float(loss_cm.sum() / samples.sum()), grad_norm=grad_norm / steps)
    for kind, values in (("base", base), ("d", d)):
        for group, k in groups(counts).items():
            row[f"{kind}_{group}"] = float(values[k].sum() / samples[k].sum())
    return row


def prepare_run(config, typed):
    """The configuration and the checkpoint (or None) that a run starts from. Raises ValueError."""
    out = Path(config.out)
    if not config.resume:
        if out.is_dir() and any(out.iterdir()) and not config.overwrite:
            raise ValueError(f"{out} is in use; type --resume, --overwrite or another --out")
        return config, None
    state, saved = load_checkpoint(out / "checkpoint.pt")
    may_change = {"out", "resume", "device"} | typed & {"steps", "data"}
    run = dataclasses.replace(saved, **{name: getattr(config, name) for name in may_change})
    for name in sorted(typed):
        check(getattr(config, name) == getattr(run, name), name, getattr(config, name),
              f"{getattr(run, name)}, as {out} was made; only --steps, --data, --device may change")
    check(run.steps >= state["step"], "steps", run.steps, f"at least {state['step']}, as {out} has")
    return run, state


def train(config, typed=frozenset(), losses=CapacityManipulation, network=make_unet, data=Data):
    """Train as a resolved Config says. `typed`: names of the options that a resume compares (or
    takes: steps, data); `losses`: CapacityManipulation or a subclass; `network(config, num_classes,
    image_channels)`: with an `encoder[0]`, like `UNet`; `data(config, device)`: like `Data`, images
    of the config's size. Raises ValueError, FloatingPointError."""
    config, state = prepare_run(config, typed)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(config.batch_size % world == 0, "batch_size", config.batch_size, f"a multiple of {world}")
    device = pick_device(config.device)
    autocast = precision(config, device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=12))
    for first in (True, False):  # each machine's first process reads, and maybe fetches, first
        if first == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
            made = data(config, device)
        if world > 1:
            dist.barrier()
    data, counts, out = made, made.counts.tolist(), Path(config.out)
    data.names = names = [str(name) for name in made.names]  # NumPy's couldn't be loaded again
    check(data.images.shape[3] == config.image_size, "image_size", config.image_size, "the data's")
    if state and (state["names"], state["counts"]) != (names, counts):
        raise ValueError(f"{out} was trained on other classes, or other counts of them")

    torch.manual_seed(hashed_seed("weights", config.seed))
    unet = lay_out(network(config, len(names), data.images.shape[1]), device)
    module = losses.from_config(unet, data.counts, config).to(device)
    ema = copy.deepcopy(unet).eval().requires_grad_(False)  # after what the losses set in it
    if config.compile:  # with eager's random numbers, so that --same-masks can draw masks again
        unet.compile(options={"fallback_random": True})
    model = nn.parallel.DistributedDataParallel(module) if world > 1 else module
    parameters, ema_parameters = list(unet.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast.fast_dtype == torch.float16)
    # of each class base loss, L_CM, d and samples; last the total loss, the gradient's norm, steps
    sums = torch.zeros(len(names) + 1, 4, dtype=torch.float64, device=device)
    parts = dict(model=unet, ema=ema, optimizer=optimizer, scaler=scaler)
    step, rows = (state["step"], state["rows"]) if state else (0, [])
    if state:
        for name, part in parts.items():
            if state[name]:  # without float16 there is no scale
                part.load_state_dict(state[name])
        for p, moments in optimizer.state.items():  # fused Adam wants this device's layout
            moments |= {k: torch.empty_like(p).copy_(v) for k, v in moments.items() if k != "step"}

    def save(checkpoint=True):
        if rows:
            lines = [",".join(rows[0]), *(",".join(f"{v:.6g}" for v in r.values()) for r in rows)]
            write_atomically(out / "log.csv", lambda path: path.write_text("\n".join(lines) + "\n"))
        if checkpoint:
            saved = {name: part.state_dict() for name, part in parts.items()}
            saved |= dict(config=vars(config), names=names, counts=counts, step=step, rows=rows)
            write_atomically(out / "checkpoint.pt", lambda path: torch.save(saved, path))

    out.mkdir(parents=True, exist_ok=True)
    steps = range(step + 1, config.steps + 1)
    progress = tqdm(steps, "steps", config.steps, initial=step, disable=rank > 0, mininterval=1)
    with locked(out) if rank == 0 else contextlib.nullcontext(), progress:
        if rank == 0:
            begin(config, out, data, ema, rows)
            save()  # so that there always is a checkpoint to go on from
        for step in progress:
            lr = config.lr * min(1.0, step / max(1, config.warmup))
            optimizer.param_groups[0]["lr"] = lr
            x0, y, t, eps, y_in = draw_batch(data, config, config.batch_size // world, step, rank)
            with autocast:
                loss, base, loss_cm, d = model(x0, y, t, eps, y_in)
            decay = min(config.ema, (1 + step) / (10 + step))  # short runs forget their start, too
            grad_norm = update(loss, parameters, ema_parameters, optimizer, scaler, decay)
            values = torch.stack([base.detach(), loss_cm.detach(), d, torch.ones_like(d)], 1)
            sums.index_add_(0, y, values.double())
            sums[-1, :3] += torch.stack([loss.detach(), grad_norm, torch.ones_like(grad_norm)])

            if step % config.log_every and step < config.steps:
                continue
            if world > 1:
                dist.all_reduce(sums)
            since = rows[-1]["step"] if rows else 0
            rows.append(row_of(sums, since, step, lr, names, counts, out))
            sums.zero_()
            if rank == 0:  # a checkpoint holds no sums, so it comes with a row
                save(step == config.steps or step % config.checkpoint_every < config.log_every)
        if rank == 0:
            report(ema, data, config, rows, out)
    if world > 1:
        dist.destroy_process_group()


def begin(config, out, data, ema, rows):
    """Write config.json and say what a run trains; remove what an older run left."""
    for name in () if rows else ("log.csv", "merged.pt", "samples.png", "curves.png"):
        (out / name).unlink(missing_ok=True)
    counts, size = data.counts.tolist(), sum(p.numel() for p in merge(ema).parameters()) / 1e6
    text = json.dumps(dict(options=vars(config), classes=data.names, counts=counts), indent=1)
    write_atomically(out / "config.json", lambda path: path.write_text(text))
    print(f"{config.dataset}: {len(data.images)} images, {len(counts)} classes; {size:.2f} M "
          f"parameters; {data.images.device}; {out}/")
    w = capacity_weights(counts, config.w_con, config.w_div)
    concave = [data.names[k] for k in torch.where(1 + config.lam * w <= 0)[0]]
    if concave and not config.no_cm:  # 2 (1 + lam * w): curvature in eps_theta (CBDM: at t = 0)
        print(f"note: 1 + λw <= 0 for {', '.join(concave[:20])}: there the loss has no minimum in "
              f"ε_θ either; type a smaller --w-div")


# ---- The end of a run: held-out table and pictures; --sample -------------------------------------
@torch.no_grad()
def held_out_loss(unet, images, labels, num_classes, per_class=32, times=8):
    """(eps-loss of theta, of theta_g, d), [C] float64, nan without images, of a network in eval
    mode: each class's first `per_class` images (uint8 [N, C, H, W]), fixed times and noise."""
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
            values = [squared_distance(a, b) for a, b in pairs] + [torch.ones_like(t)]
            sums.index_add_(1, y.cpu(), torch.stack(values).double().cpu())
    return tuple(sums[:3] / sums[3])


def report(ema, data, config, rows, out):
    """Write merged.pt, print the held-out table, draw samples.png and curves.png."""
    write_atomically(out / "merged.pt", lambda path: torch.save(merge(ema).state_dict(), path))
    counts = data.counts.cpu()
    per_class = max(1, min(32, 2000 // len(counts)))
    losses = held_out_loss(ema, data.held_out, data.held_out_labels, len(counts), per_class)
    columns = "count", "ω_Con", "ω_Div", "loss θ", "loss θ_g", "d (no dropout)", "d (training)"
    shown, table = 4 if config.no_cm else 7, {"class": columns}
    measures = *class_weights(counts), *losses
    for group, k in groups(counts).items():
        label = f"{group} {data.names[int(group)]}" if group.isdigit() else group
        values = [*(float(v[k].nanmean()) for v in measures), rows[-1][f"d_{group}"]]
        table[label] = int(counts[k].sum()), *(f"{v:.4g}" for v in values)
    print(f"\nε-loss on {data.held_out_name}, at most {per_class} images a class")
    for label, row in table.items():
        print(f"{label:{max(map(len, table))}}" + "".join(f"{v:>15}" for v in row[:shown]))
    print("" if config.no_cm else "θ against θ_g: where expertise lies, not whether CM helps")
    draw_samples(ema, data, config, out / "samples.png")
    draw_curves(rows, data, config, out / "curves.png")


def draw_samples(ema, data, config, path, columns=8):
    """A row a class, most frequent first: real images, then theta, theta_g from the same noise."""
    shown = shown_classes(data.counts.cpu())
    y = torch.tensor(shown, device=data.counts.device).repeat_interleave(columns)
    guidance = config.guidance
    if config.label_drop == 1:  # trained without labels
        y, guidance = torch.full_like(y, -1), 0.0
    seeds = [hashed_seed("image", config.seed, i) for i in range(len(y))]
    networks = {"θ": merge(ema)}
    if not config.no_cm:
        with general_only(ema):
            networks["θ_g, without BA"] = merge(ema)
    panels = {"real (training set)": data.first(shown, columns)}
    for title, unet in networks.items():
        x = sample(unet, y, data.images.shape[1:], guidance=guidance, seeds=seeds)
        panels[title + (f", guidance {guidance:g}" if y[0] >= 0 else ", any class")] = to_uint8(x)
    draw_panels(panels, [f"{data.names[k]}  {int(data.counts[k])}" for k in shown], path)


@matplotlib.rc_context({"text.parse_math": False})  # names may hold $
def draw_panels(panels, names, path):
    """{title: uint8 [rows * columns, C, H, W]} side by side; `names` are the rows'."""
    rows = len(names)
    columns = len(next(iter(panels.values()))) // rows
    side = max(1.6, 0.075 * max(map(len, names)))  # inches
    size = side + 0.42 * columns * len(panels), 0.42 * rows + 0.7
    figure = matplotlib.figure.Figure(size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        grid = utils.make_grid(images.cpu(), columns, padding=0)  # [3, H, W]
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    axes[0].set_yticks([(i + 0.5) * images.shape[2] for i in range(rows)], names, fontsize=8)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130))


def draw_curves(rows, data, config, path):
    """Per-class d and base loss over steps, coloured from the majority to the minority."""
    shown = shown_classes(data.counts.cpu())
    names = [f"{k} {data.names[k]} ({int(data.counts[k])})".replace("$", r"\$") for k in shown]
    kinds = {} if config.no_cm else {"d": "d = ‖ε_θ − ε_θg‖², in training"}
    kinds |= {"base": "base loss"}
    figure = matplotlib.figure.Figure((4.6 * len(kinds) + 1.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        axis.set_prop_cycle(color=matplotlib.colormaps["viridis"](np.linspace(0, 1, len(shown))))
        values = [[row[f"{kind}_{k}"] for k in shown] for row in rows]
        axis.plot([row["step"] for row in rows], values, ".-"[len(rows) > 2:], lw=1, label=names)
        axis.set(title=title, xlabel="step", yscale="log" if np.nanmax(values) > 0 else "linear")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    if config.div_margin < math.inf and not config.no_cm:
        axes[0].axhline(config.div_margin, color="k", ls=":", lw=1)
    write_atomically(path, lambda p: figure.savefig(p, dpi=130))


def generate(config, network=make_unet):
    """--sample: write an .npz in ADM's layout, arr_0 uint8 [N, H, W, C] and arr_1 labels, and a
    picture. `network` as `train`'s. Raises ValueError, FloatingPointError on infinite images."""
    trained, ema, counts = load_trained(config.sample, network=network)
    device = pick_device(config.device)
    autocast = precision(config, device)
    chosen, general = config.labels or range(len(counts)), config.general_only
    out = Path(config.out or Path(config.sample).with_name("samples.npz"))
    check(not (general and trained.no_cm), "general_only", True, "left away: there is no theta_g")
    check(not config.labels or trained.label_drop < 1, "labels", chosen, "left away: it knows none")
    check(max(chosen) < len(counts), "labels", chosen, f"below {len(counts)}")
    check(out.suffix == ".npz" and out.parent.is_dir(), "out", out, "an .npz in a directory")
    check(config.overwrite or not out.exists(), "out", out, "new, without --overwrite")

    with general_only(ema) if general else contextlib.nullcontext():
        unet = lay_out(merge(ema), device)
    shape = (unet.encoder[0].in_channels, trained.image_size, trained.image_size)
    labels = torch.tensor([chosen[i % len(chosen)] for i in range(config.num_images)])
    y_in, guidance, arrays = labels, config.guidance, {"arr_1": labels.numpy()}
    if trained.label_drop == 1:  # trained without labels
        y_in, guidance, arrays = torch.full_like(labels, -1), 0.0, {}
    seeds = [hashed_seed("image", config.seed, i) for i in range(len(labels))]
    images, steps = [], config.sample_steps or SAMPLERS[config.sampler][1]
    for i in tqdm(range(0, len(labels), config.sample_batch), "sampling"):
        batch = slice(i, i + config.sample_batch)
        with autocast:
            x = sample(unet, y_in[batch].to(device), shape, config.sampler, steps, guidance,
                       seeds[batch])
        if not x.isfinite().all():
            raise FloatingPointError("images are not finite; nothing was written")
        images.append(to_uint8(x).cpu())
    images = torch.cat(images)
    arrays |= dict(arr_0=images.permute(0, 2, 3, 1).numpy(), counts=np.array(counts),
                   guidance=guidance, sampler=config.sampler, sample_steps=steps)
    write_atomically(out, lambda p: np.savez(p, **arrays))

    names = load_checkpoint(config.sample)[0]["names"]
    shown = [k for k in shown_classes(counts) if k in labels] or sorted(set(labels.tolist()))[:9]
    columns = max(1, min(8, len(labels) // len(chosen)))
    first = torch.cat([images[labels == k][:columns] for k in shown])
    draw_panels({out.name: first}, [f"{k} {names[k]}" for k in shown], out.with_suffix(".npz.png"))
    print(f"{len(labels)} images of {'theta_g' if general else 'theta'} in {out}, {out.name}.png")


# ---- Options: one field, one flag; None is the preset's value, or what [default: ...] says -------
PRESETS = {
    "paper": dict(image_size=32, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,),
                  batch_size=64, steps=300_000, lr=2e-4, warmup=5000, base="oc", log_every=500),
    "small": dict(image_size=16, channels=16, multipliers=(1, 2, 2), blocks=1, attention=(),
                  batch_size=32, steps=4200, lr=3e-3, base="ddpm", log_every=50)}
DATASETS = "fashion16", "fashion", "cifar10", "cifar100", "folder"


def option(default, help, low=None, high=math.inf, group=None, **extra):
    """A field, low <= value <= high, of `group` or that of the field before; extra: argparse's."""
    option.group = group or option.group
    metadata = dict(help=help, range=(low, high), group=option.group, extra=extra)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Every option of a run. `config.json` in the run directory holds it, presets filled in."""

    dataset: str = option("fashion16", "images to train on", group="data", choices=list(DATASETS))
    data: str = option(None, "torchvision's root [default: data]; a tree, held-out in TREE/val")
    ir: float = option(None, "imbalance ratio, 1: as it comes [default: 100; folder: 1]", 1)
    n_max: int = option(None, "images in the largest class [default: all, or as the smallest]", 1)
    subset_seed: int = option(0, "draws a class's images; 0 is the published draw", 0, 2**32 - 1)
    resample: float = option(1.0, "draw classes with p_c ~ N_c^q: 0.5 is RS (Sec. 4.1)", 0, 10)
    flip: bool = option(None, "horizontal flips [default: off for the fashion data sets]",
                        action=argparse.BooleanOptionalAction)

    preset: str = option(None, "size of network and run [default: small for fashion, else paper]",
                         group="network", choices=list(PRESETS))
    image_size: int = option(None, "side of the square images, in pixels", 1)
    channels: int = option(None, "width of the first level, an even number", 2)
    multipliers: tuple = option(None, "width of each level over --channels (Fig. 4d)", 1)
    blocks: int = option(None, "residual blocks a level", 1)
    attention: tuple = option(None, "resolutions with attention, beside the middle", nargs="*")
    dropout: float = option(0.1, "dropout rate (Sec. G.1)", 0, 1)

    no_cm: bool = option(False, "the plain network: no reservation, base loss only", group="method")
    rank_ratio: float = option(0.1, "rank of BA over full rank (Eq. 1, Sec. G.1)")
    lam: float = option(1.0, "lambda, weight of L_CM (Eq. 4)", 0)
    w_con: float = option(1.0, "weight of omega_con (Eq. 2); 0: no L_Con (Tab. 7)", 0)
    w_div: float = option(0.2, "weight of omega_div; 1: as printed; 0: no L_Div (Tab. 7)", 0)
    div_margin: float = option(0.1, "fuse, the d up to which divergence counts; inf: none", 0)
    same_masks: bool = option(False, "one dropout mask for theta and theta_g: capacity alone")
    base: str = option(None, "base loss (Sec. 3.2, D)", choices=["oc", "ddpm", "cbdm", "focal"])
    cbdm_prior: str = option("uniform", "draws CBDM's y' (D.1)", choices=["uniform", "frequency"])

    steps: int = option(None, "training steps (Sec. G.1)", 1, group="training")
    batch_size: int = option(None, "images a step, over all processes (Sec. G.1)", 1)
    lr: float = option(None, "Adam's learning rate after warm-up (Sec. G.1)", 0)
    warmup: int = option(None, "steps of linear warm-up [default: paper 5000, small steps/60]", 0)
    label_drop: float = option(0.1, "share of samples without label; 1: unconditional", 0, 1)
    ema: float = option(0.9999, "largest decay of the weights' moving average", 0, 1)
    seed: int = option(0, "seed of weights, batches and sampling", 0, 2**63 - 1)
    amp: str = option("auto", "mixed precision on CUDA", choices=["auto", "bf16", "fp16", "off"])
    compile: bool = option(False, "torch.compile the network")
    device: str = option(None, "cpu, cuda, cuda:1, ... [default: cuda if it is there]")

    out: str = option(None, "run directory [default: runs/DATASET], --sample's .npz", group="run")
    resume: bool = option(False, "go on in --out; only --data, --device and --steps may change")
    overwrite: bool = option(False, "write into a directory, or an .npz, that is there")
    checkpoint_every: int = option(500, "a checkpoint with the first row after as many steps", 1)
    log_every: int = option(None, "steps between rows of log.csv", 1)

    sample: str = option(None, "generate images from this checkpoint.pt", group="sampling")
    num_images: int = option(50_000, "how many, in equal numbers of each class (Sec. 4.1)", 1)
    labels: tuple = option(None, "only these classes, by number", 0)
    sampler: str = option("ddim", "DDIM, DDPM or DPM-Solver++ (Tab. G.10)", choices=list(SAMPLERS))
    sample_steps: int = option(None, "sampler steps [default: ddim 50, ddpm 1000, dpm 15]", 1)
    guidance: float = option(1.5, "w in eps_c + w (eps_c - eps_null); 0: off", 0)
    general_only: bool = option(False, "sample theta_g, without BA (Tab. 7)")
    sample_batch: int = option(250, "images at a time", 1)

    def resolved(self):
        """A copy with every preset-dependent field filled in. Raises ValueError on nonsense."""
        fashion = self.dataset in ("fashion16", "fashion")
        preset = self.preset or ("small" if fashion else "paper")
        values = dict(preset=preset, ir=1.0 if self.dataset == "folder" else 100.0,
                      flip=not fashion, out=f"runs/{self.dataset}", **PRESETS.get(preset, {}))
        values |= {name: v for name, v in vars(self).items() if v is not None}
        for field in dataclasses.fields(self):
            name, (low, high), v = field.name, field.metadata["range"], values.get(field.name)
            choices = field.metadata["extra"].get("choices", [v])
            check(v is None or v in choices, name, v, " or ".join(map(str, choices)))
            if v is not None:
                values[name] = field.type(v)  # a NumPy number or a path couldn't be loaded again
            if low is not None and v is not None:
                check(low <= np.min(v) <= np.max(v) <= high, name, v, f"in [{low}, {high}]")
        values.setdefault("warmup", max(1, values["steps"] // 60))  # as 5,000 of 300,000
        c = dataclasses.replace(self, **values)
        check(c.channels % 2 == 0, "channels", c.channels, "even")
        check(not (c.resume and c.overwrite), "overwrite", True, "left away with --resume")
        stride = 2 ** (len(c.multipliers) - 1)
        check(c.image_size % stride == 0, "image_size", c.image_size, f"divisible by {stride}")
        return c


def check(ok, name, value, expected):
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {expected}")


def parse(argv):
    """(Config, set of the options typed). The command line is generated from Config."""
    parser = argparse.ArgumentParser(prog="cm.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    kinds = {bool: dict(action="store_true"), tuple: dict(type=int, nargs="+")}
    groups = dict.fromkeys(field.metadata["group"] for field in dataclasses.fields(Config))
    sections = {group: parser.add_argument_group(group) for group in groups}
    for field in dataclasses.fields(Config):
        name, text = field.name, field.metadata["help"]
        presets = [f"{key} {preset[name]}" for key, preset in PRESETS.items() if name in preset]
        default = ", ".join(presets) or field.default
        if "[" not in text and default is not None and default is not False:
            text += f" [default: {default}]"
        how = kinds.get(field.type, dict(type=field.type)) | field.metadata["extra"]
        how |= dict(default=argparse.SUPPRESS, help=text)
        sections[field.metadata["group"]].add_argument("--" + name.replace("_", "-"), **how)
    args = vars(parser.parse_args(argv))
    return Config(**args), set(args)


def fail(message, status=2):
    """One line on stderr, and the end."""
    print(f"{Path(sys.argv[0]).name}: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Greek letters shows ?
            stream.reconfigure(errors="replace")
    config, typed = parse(argv)
    sampling = {f.name for f in dataclasses.fields(config) if f.metadata["group"] == "sampling"}
    of_cm = {"rank_ratio", "lam", "w_con", "w_div", "div_margin", "same_masks"}
    try:
        resolved = config.resolved()
        unused = typed & (sampling | of_cm if config.no_cm else sampling)
        if config.sample is not None:
            check("WORLD_SIZE" not in os.environ, "sample", config.sample, "without torchrun")
            unused = typed - sampling - {"seed", "amp", "device", "out", "overwrite"}
        for name in sorted(unused):
            check(False, name, getattr(config, name), "left away: it has no meaning here")
        if config.sample is None:
            train(resolved, typed)
        else:
            generate(config)
    except (ValueError, OSError, FloatingPointError) as e:
        fail(e)
    except KeyboardInterrupt:
        fail("interrupted; training goes on from its last checkpoint with --resume", 130)


if __name__ == "__main__":
    main()
