"""Does CM help a consistency model, which draws an image in one or two steps? Tab. G.9.

    python -m experiments.settings.consistency
    python -m experiments.settings.consistency --table   # only the table, and the picture

Consistency training (CT; Song et al. 2023, "Song" below), without and with CM. F is cm.py's UNet,
and f = c_skip x + c_out F(c_in x, 250 ln sigma) maps an image plus noise of any sigma to the image.
Options that aren't its own go to cm.py. README.md says what it does, and what its rows hold.
"""

import contextlib
import copy
import dataclasses
import functools
import math

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import cm
from experiments import common
from experiments.settings import shared

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7  # Karras et al. 2022
S_0, MU_0 = 2, 0.9  # Song, App. C
S_1 = 20  # there 150. theta^- averages over 1 / -ln mu = 4.75 N steps, and what f knows at
# sigma_min crosses N sigmas to sigma_max: some 4.75 N^2 steps, 107,000 with 150, 1,900 with 20
MIDDLE = 0.8  # sigma at which the second step starts
METHODS = "CT", "CM"
FD = "FD overall", "FD Many", "FD Medium", "FD Few"
DIGITS = dict.fromkeys(FD, 1) | {"held-out loss Few": 5, "held-out share": 3}  # of the table
UNUSED = ("no_cm", "base", "cbdm_prior", "seed", "amp", "compile", "run", "sampling")  # of cm.py's


def schedule(k, steps):
    """(N(k), the number of sigmas, and mu(k), theta^-'s decay) at k = 0..steps (Song, App. C)."""
    size = math.ceil(math.sqrt(k / steps * ((S_1 + 1)**2 - S_0**2) + S_0**2) - 1) + 1
    return size, math.exp(S_0 * math.log(MU_0) / size)


def make_grid(size):
    """sigma [size] float64, from SIGMA_MIN up to SIGMA_MAX (Karras et al. 2022, Eq. 5)."""
    low, high = SIGMA_MIN**(1 / RHO), SIGMA_MAX**(1 / RHO)
    grid = torch.linspace(low, high, size, dtype=torch.float64)**RHO
    grid[0], grid[-1] = SIGMA_MIN, SIGMA_MAX  # without rounding: f(x, SIGMA_MIN) is x
    return grid


def scalings(sigma, sigma_data):
    """c_skip, c_out, c_in, each [B, 1, 1, 1] float32, and F's time [B], for sigma [B] float64
    (Song, App. C; the time is 1000 times Karras' c_noise, ln(sigma) / 4)."""
    root = (sigma**2 + sigma_data**2).sqrt()
    c_skip = sigma_data**2 / ((sigma - SIGMA_MIN)**2 + sigma_data**2)
    c_out = sigma_data * (sigma - SIGMA_MIN) / root
    c = [c.float()[:, None, None, None] for c in (c_skip, c_out, 1 / root)]
    return *c, (250 * sigma.log()).float()


def consistency(network, x, sigma, y, sigma_data):
    """f(x, sigma, y) [B, C, H, W]; network(x, t, y) is F. f(x, SIGMA_MIN) = x, whatever F is."""
    c_skip, c_out, c_in, time = scalings(sigma, sigma_data)
    return c_skip * x + c_out * network(c_in * x, time, y)


class ConsistencyTraining(nn.Module):
    """The losses of one batch: f at neighbouring sigmas agrees (Song, Algorithm 3), and Eq. (4).

    L_CM compares F, not f, of theta and theta_g, at the larger sigma: F's target has variance 1 at
    any sigma, as eps has, so the fuse means what it means elsewhere; in f's units c_out -> 0 would
    let F run off at small sigma before the fuse sees it. theta and theta^- share their dropout
    masks, as Song's do; theta_g draws its own, as in cm.py, unless `same_masks`."""

    def __init__(self, unet, counts, config, sigma_data):
        super().__init__()
        self.unet, self.config, self.sigma_data = unet, config, sigma_data
        self.target = copy.deepcopy(unet).requires_grad_(False)  # theta^-, an average of theta
        self.register_buffer("w", cm.capacity_weights(counts, config.w_con, config.w_div))

    def forward(self, x0, y, eps, y_in, n, grid):
        """x0, eps [B, C, H, W]; y, y_in as in cm.py; n [B]: the pair grid[n], grid[n + 1].

        -> total loss (scalar), base loss [B], L_CM [B]."""
        small, large = (sigma[:, None, None, None].float() for sigma in (grid[n], grid[n + 1]))
        with torch.no_grad(), cm.same_masks(x0):
            target = consistency(self.target, x0 + small * eps, grid[n], y_in, self.sigma_data)

        x = x0 + large * eps  # the same noise
        c_skip, c_out, c_in, time = scalings(grid[n + 1], self.sigma_data)
        with cm.same_masks(x) if self.config.same_masks else contextlib.nullcontext():
            F_theta = self.unet(c_in * x, time, y_in)
        base = cm.squared_distance(c_skip * x + c_out * F_theta, target)
        if self.config.no_cm:
            return base.mean(), base, torch.zeros_like(base)
        with cm.general_only(self.unet):
            F_theta_g = self.unet(c_in * x, time, y_in)
        loss_cm = cm.capacity_loss(F_theta, F_theta_g, self.w[y], self.config.div_margin)
        return base.mean() + self.config.lam * loss_cm.mean(), base, loss_cm  # Eq. (4)


def train(config, data, sigma_data, path, options):
    """Train, or go on from `path`: the averaged network in eval mode."""
    device = data.images.device
    torch.manual_seed(cm.hashed_seed("weights", config.seed))
    unet = cm.lay_out(cm.make_unet(config, len(data.names), data.images.shape[1]), device)
    losses = ConsistencyTraining(unet, data.counts, config, sigma_data).to(device)
    theta, target = list(unet.parameters()), list(losses.target.parameters())

    def loss(i):
        if i > 1:  # what Song does at the end of the step before
            get_ema_multi_avg_fn(schedule(i - 2, config.steps)[1])(target, theta, None)
        x0, y, _, eps, y_in = cm.draw_batch(data, config, config.batch_size, i)
        size = schedule(i - 1, config.steps)[0]
        n = torch.randint(size - 1, y.shape, device=device)
        return losses(x0, y, eps, y_in, n, make_grid(size).to(device))[0]

    shared.fit(unet, loss, path, options, config.steps, config.seed, config.lr,
               config.warmup, config.ema, losses=losses)  # which holds theta^-
    return unet


@torch.no_grad()
def held_out(unet, data, config, sigma_data, per_class=100, times=5):
    """{measure: value} of the averaged network on held-out images, at the last grid."""
    device = data.images.device
    losses = ConsistencyTraining(unet, data.counts, config, sigma_data).to(device).eval()
    index = torch.cat([torch.where(data.held_out_labels == k)[0][:per_class]
                       for k in range(len(data.names))]).repeat(times)
    x0, y = cm.to_float(data.held_out[index]), data.held_out_labels[index]
    repeat = torch.arange(len(y), device=device) * times // len(y)  # 0..times - 1
    n = (repeat * S_1 + S_1 // 2) // times  # evenly spaced pairs: 2, 6, 10, 14, 18 of 0..19
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    grid = make_grid(S_1 + 1).to(device)
    parts = [losses(*batch, grid)[1:]
             for batch in zip(*(v.split(250) for v in (x0, y, eps, y, n)), strict=True)]
    base, loss_cm = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    few = torch.isin(y.cpu(), torch.as_tensor(cm.splits(data.counts.cpu())["Few"]))
    weighed = config.lam * loss_cm.abs()
    return {"held-out loss Few": base[few].mean().item(),
            "held-out share": (weighed.mean() / (weighed + base).mean()).item()}


@torch.no_grad()
def sample(network, image_shape, steps, sigma_data, y, seeds):
    """Images [B, C, H, W] in [-1, 1] of labels y, in one or two steps (Song, Algorithm 1).
    network: F; seeds: one int an image, so that the batch size doesn't matter."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def f(x, scale, sigma):  # of x plus `scale` times new noise
        z = torch.stack([torch.randn(image_shape, generator=g) for g in generators]).to(y.device)
        sigma = torch.full(y.shape, sigma, dtype=torch.float64, device=y.device)
        return consistency(network, x + scale * z, sigma, y, sigma_data)

    x = f(0, SIGMA_MAX, SIGMA_MAX)
    if steps == 2:
        x = f(x, (MIDDLE**2 - SIGMA_MIN**2)**0.5, MIDDLE)
    return x.clamp(-1, 1)


def measure(config, data, args, options, method, seed):
    """Train, sample, evaluate: rows of one and of two sampler steps."""
    config = dataclasses.replace(config, no_cm=method == "CT", seed=seed)
    sigma_data = cm.to_float(data.images).std().item()
    unet = train(config, data, sigma_data, args.runs / f"{method}-{seed}.pt", options)
    measures = held_out(unet, data, config, sigma_data)
    network, rows = cm.merge(unet), []
    for steps in (1, 2):
        images = functools.partial(sample, network, data.images.shape[1:], steps, sigma_data)
        file = args.runs / f"{method}-{seed}-{steps}.npz"
        shared.sample(file, images, data, args.num_images, seed)
        rows.append({"steps": config.steps, "sampler steps": steps} | measures | shared.scores(
            file, config, data.images.device, args.runs / "fid", FD))
    return rows


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=(10, 11, 12))
    parser.add_argument("--num-images", type=int, default=5000, help="generated images a row")
    args, flags = parser.parse_known_args(argv)
    flags, config, _ = common.configured(flags, UNUSED, n_max="1000", steps="6000", warmup="100")
    if not args.table:
        options, data = common.settings(flags), cm.Data(config, cm.pick_device(config.device))
        keys = [dict(method=method, seed=seed) for seed in args.seeds for method in METHODS]
        common.study(args.rows, f"{options} --num-images {args.num_images}", keys,
                     lambda **key: measure(config, data, args, options, **key))
    rows = common.numbers(common.read_table(args.rows), ("method", "options"))
    print(shared.compared(rows, DIGITS, ["CT"], by=["sampler steps"]))
    files = {f"{method}, one step": args.runs / f"{method}-{args.seeds[0]}-1.npz"
             for method in METHODS}
    shared.draw(config, files, args, args.assets / "consistency.png")


if __name__ == "__main__":
    main()
