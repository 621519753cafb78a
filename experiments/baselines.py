"""What CM is compared with and cm.py lacks: the paper's Overlap, ADA and Group-Expert LoRA; and the
study's, which take CM apart: agreement alone, uniform weights, two passes averaged.

Each is a loss module, a network, or both, for `cm.train`; `cm.load_trained` and `cm.generate` take
the network. `BASELINES`, at the end, names them with their options. Others need no code: capacity
alone is `--same-masks`, CBDM (theta_g ⊕ theta_e) `--base cbdm --lam 0`, CM with RS `--resample
0.5`.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import cm

# ------------------------------------------------------------------------------------------------
# CM taken apart


def plain_unet(config, num_classes, image_channels):
    """A UNet without reserved capacity, whatever --no-cm says. A plain network is its own theta_g:
    with CM's losses it is *agreement alone*, two passes that differ in their dropout masks."""
    return cm.make_unet(dataclasses.replace(config, no_cm=True), num_classes, image_channels)


class UniformWeights(cm.CapacityManipulation):
    """CM that tells no class from another: each sample's w is the training set's mean, sum N_c w_c
    / sum N_c. With `plain_unet` it is R-Drop (Liang et al. 2021), of noise predictions."""

    def __init__(self, unet, counts, *args, **kwargs):
        super().__init__(unet, counts, *args, **kwargs)
        share = self.counts.double() / self.counts.sum()
        self.w.fill_((share * self.w).sum())


class TwoPasses(cm.CapacityManipulation):
    """DDPM at CM's cost: the base loss is averaged over two passes with masks of their own."""

    def forward(self, x0, y, t, eps, y_in):
        x_t = cm.add_noise(x0, t, eps, self.alpha_bar)
        losses = [cm.squared_distance(self.unet(x_t, t, y_in), eps) for _ in range(2)]
        base, none = sum(losses) / 2, torch.zeros_like(losses[0])
        return base.mean(), base, none, none


class Counted:
    """Mixed into a loss module: counts the training's samples, those with w < 0, and those of them
    whose d is above the fuse, or above the default fuse where there is none, in `with_tally`."""

    @classmethod
    def from_config(cls, unet, counts, config):
        module = super().from_config(unet, counts, config)
        module.planned = config.steps * config.batch_size
        module.fuse = min(config.div_margin, 0.1)
        return module

    def forward(self, x0, y, t, eps, y_in):
        losses = super().forward(x0, y, t, eps, y_in)
        tally = self.unet.tally
        tenth = 10 * tally[:, :, 0].sum() // self.planned
        negative = self.w[y] < 0
        above = negative & (losses[3] > self.fuse)
        tally[tenth].index_add_(0, y, torch.stack([torch.ones_like(y), negative, above], 1))
        return losses


def counted(losses):
    """The loss module `losses` that counts. Its network is `with_tally`."""
    return type(f"Counted{losses.__name__}", (Counted, losses), {})


def with_tally(network):
    """`network` with Counted's numbers, by tenth of the training and class, as a buffer [10, C, 3],
    so that checkpoints keep them."""
    def made(config, num_classes, image_channels):
        unet = network(config, num_classes, image_channels)
        unet.register_buffer("tally", torch.zeros(10, num_classes, 3, dtype=torch.long))
        return unet

    return made


def above_fuse(tally, splits):
    """Of the samples with w < 0 the share above the fuse, from the tally [10, C, 3]: of the whole
    training, and for each split a text with that of each tenth; nan where none was drawn."""
    negative, above = tally[..., 1].double(), tally[..., 2].double()
    row = {"above fuse": float(above.sum() / negative.sum())}
    for split, classes in splits.items():
        shares = above[:, classes].sum(1) / negative[:, classes].sum(1)
        row[f"above fuse {split}"] = " ".join(f"{share:.3g}" for share in shares)
    return row


# ------------------------------------------------------------------------------------------------
# Overlap (Tab. G.12)


class Overlap(cm.CapacityManipulation):
    """Overlap optimization (DiffROP, Yan et al. 2024): the steps of different classes are kept
    apart. This is our reading; its code and constants aren't published.

    Under labels y and y' one step of Algorithm C.1 gives two Gaussians. Between them lie
    KL = beta_t / (2 alpha_t (1 - alpha_bar_t)) ||eps(y) - eps(y')||^2 nats, here a pixel value.
    gamma * max(0, margin - KL) is added to DDPM's base loss, nothing where the label is dropped.
    In log.csv that term is `cm` and KL is `d`."""

    # of six pairs the one with the lowest FD on Few, in one seed, at commit f7283d9
    gamma, margin = 10.0, 1e-4

    def forward(self, x0, y, t, eps, y_in):
        x_t = cm.add_noise(x0, t, eps, self.alpha_bar)
        y_other = self.other_classes(y)
        with cm.same_masks(x_t):
            eps_other = self.unet(x_t, t, y_other)
        eps_theta = self.unet(x_t, t, y_in)

        alpha = self.alpha_bar / F.pad(self.alpha_bar[:-1], (1, 0), value=1.0)
        factor = (1 - alpha) / (2 * alpha * (1 - self.alpha_bar))
        kl = factor[t].float() * cm.squared_distance(eps_theta, eps_other)  # [B]
        overlap = self.gamma * (self.margin - kl).clamp(min=0) * (y_in >= 0)
        base = cm.squared_distance(eps_theta, eps)
        return (base + overlap).mean(), base, overlap, kl.detach()

    def other_classes(self, y):
        """y' [B], uniform over the classes that y isn't."""
        others = torch.randint(1, len(self.counts), y.shape, device=y.device)
        return (y + others) % len(self.counts)


# ------------------------------------------------------------------------------------------------
# ADA (Tab. 2): a GAN's augmentation (Karras et al. 2020), for diffusion as in EDM (Karras et al.
# 2022, augment.py), which CBDM's and OC's code follow: the network is told what was changed


def draw_changes(n, flip, device=None):
    """What is changed on each of n images, [8, n]: horizontal and vertical flip (0 or 1), scale,
    angle, stretch, the stretch's axis, shift to the right and down. 0 changes nothing.

    Angles are uniform in (-pi, pi), the others normal. Each kind of change comes with probability
    0.12, a vertical flip with half of it, a horizontal one with 1/2 where `flip`, else never.
    (EDM's code; its axis is upright half the time, CBDM's code's never)"""
    mirrored = (torch.rand(2, n, device=device) < 0.5).float()
    vertical, scaled, turned, stretched, shifted = torch.rand(5, n, device=device) < 0.12
    normal = torch.randn(4, n, device=device)
    angle, axis = math.pi * (2 * torch.rand(2, n, device=device) - 1)
    return torch.stack([mirrored[0] * flip, mirrored[1] * vertical, normal[0] * scaled,
                        angle * turned, normal[1] * stretched, axis * stretched,
                        normal[2] * shifted, normal[3] * shifted])


def numbers(changes):
    """What the network is told of changes [8, B]: [B, 9], exactly 0 where nothing is changed."""
    flip_x, flip_y, scale, angle, stretch, axis, right, down = changes
    return torch.stack([flip_x, flip_y, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(),
                        stretch * axis.sin(), right, down], 1)


def rotation(angle):
    """[B] -> [B, 2, 2]"""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


def warp(x, changes):
    """Square images [B, C, H, H] after the changes [8, B], in that order, mirrored at the border.

    The scale is 2^(0.2 n), the stretch 2^(0.2 n) along its axis and 2^(-0.2 n) across, the shift
    n / 8 of the side, for the normal n. After the flips, one affine map an image, interpolated
    once. Without a change, or with flips alone, pixels keep their bits: interpolation would round
    them."""
    flip_x, flip_y = changes[:2, :, None, None, None] > 0
    scale, angle, stretch, axis, right, down = changes[2:]
    x = torch.where(flip_x, x.flip(3), x)
    x = torch.where(flip_y, x.flip(2), x)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 can't tell pixels apart
        # grid_sample asks where each pixel comes from, so this is the changes' inverse
        shrink = torch.exp2(-0.2 * scale)[:, None, None]
        squeeze = torch.diag_embed(torch.exp2(torch.stack([-0.2 * stretch, 0.2 * stretch], 1)))
        squeeze = rotation(axis) @ squeeze @ rotation(-axis)
        source = shrink * rotation(-angle) @ squeeze  # [B, 2, 2]
        shift = torch.stack([right, down], 1)[:, :, None] / 4  # the side is 2 long
        grid = F.affine_grid(torch.cat([source, -source @ shift], 2), x.shape, align_corners=False)
        warped = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False)
    return torch.where(changes[2:].any(0)[:, None, None, None], warped, x)


class ADA(cm.CapacityManipulation):
    """The losses of a batch of changed images. Its network is `told_unet`.

    With --flip the data are mirrored already, untold; these flips come on top."""

    @classmethod
    def from_config(cls, unet, counts, config):
        module = super().from_config(unet, counts, config)
        module.flip = config.flip
        return module

    def forward(self, x0, y, t, eps, y_in):
        changes = draw_changes(len(x0), self.flip, x0.device)
        self.unet.numbers = numbers(changes)
        losses = super().forward(warp(x0, changes), y, t, eps, y_in)
        self.unet.numbers = None
        return losses


class ToldUNet(cm.UNet):
    """A UNet that is told ADA's `numbers` [B, 9] in training; None, as when sampling, is as zeros,
    since the layer has no bias."""

    def __init__(self, num_classes, *args):
        super().__init__(num_classes, *args)
        self.told = nn.Linear(9, 4 * self.channels, bias=False)
        self.numbers = None

    def embed(self, t, y):
        emb = super().embed(t, y)
        return emb if self.numbers is None else emb + self.told(self.numbers.to(emb.dtype))


def told_unet(config, num_classes, image_channels):
    return ToldUNet(num_classes, image_channels, config.image_size, config.channels,
                    config.multipliers, config.blocks, config.attention, config.dropout)


# ------------------------------------------------------------------------------------------------
# Group-Expert LoRA (Sec. E.4, Tab. E.2)


class GroupExperts(nn.Module):
    """A Conv2d or Linear with a low-rank expert for each of three groups: W x + B_g A_g x.

    `own` [B, 3] is 1 at each sample's group g, all 0 for the plain layer. The experts lie side by
    side: A has 3 r outputs, of which a sample keeps the r of its group. B starts at zero."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer, self.rank, self.own = layer, rank, None
        if isinstance(layer, nn.Linear):
            self.A = nn.Linear(layer.in_features, 3 * rank, bias=False)
            self.B = nn.Linear(3 * rank, layer.out_features, bias=False)
        else:
            self.A = nn.Conv2d(layer.in_channels, 3 * rank, layer.kernel_size, layer.stride,
                               layer.padding, bias=False)
            self.B = nn.Conv2d(3 * rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        a = self.A(x)  # [B, 3 r, ...]
        own = self.own.repeat_interleave(self.rank, 1)
        return self.layer(x) + self.B(a * own.view(own.shape + (1,) * (a.ndim - 2)))


def group_expert_unet(config, num_classes, image_channels):
    """Experts for Many, Medium and Few wherever CM reserves, with a third of its rank, at least 1.

    They are trained from scratch with the general weights. `router` [C + 1, 3] is 1 where a class
    is in a group; its last row, y = -1, stays 0."""
    with_ba = dataclasses.replace(config, no_cm=False)
    unet = cm.make_unet(with_ba, num_classes, image_channels)
    cm.replace_modules(unet.decoder, {
        reserved: GroupExperts(reserved.layer, max(1, len(reserved.A) // 3))
        for reserved in cm.reserved_layers(unet)})
    unet.register_buffer("router", torch.zeros(num_classes + 1, 3))
    unet.register_forward_pre_hook(route)
    return unet


def route(unet, inputs):
    """Before unet(x_t, t, y), also when sampling: each sample's group is that of its label."""
    for layer in unet.decoder.modules():
        if isinstance(layer, GroupExperts):
            layer.own = unet.router[inputs[2]]


class GroupExpertLoRA(cm.CapacityManipulation):
    """The base loss; tells the network, `group_expert_unet`, which classes are whose."""

    def __init__(self, unet, counts, *args, **kwargs):
        super().__init__(unet, counts, *args, **kwargs)
        for group, classes in enumerate(cm.splits(self.counts.cpu()).values()):
            unet.router[classes, group] = 1


# ------------------------------------------------------------------------------------------------
# All of them


class Variation(NamedTuple):
    """Options of cm.py, and what `cm.train` takes."""

    flags: str
    losses: type = cm.CapacityManipulation
    network: object = cm.make_unet


BASELINES = {
    "agreement alone": Variation("", network=plain_unet),
    "uniform w": Variation("", UniformWeights),
    "uniform w, no BA": Variation("", UniformWeights, plain_unet),
    "DDPM, two passes": Variation("--no-cm --base ddpm", TwoPasses),
    "ADA": Variation("--no-cm --base ddpm", ADA, told_unet),
    "Overlap": Variation("--no-cm --base ddpm", Overlap),
    "Group-Expert LoRA": Variation("--no-cm --base ddpm", GroupExpertLoRA, group_expert_unet)}
