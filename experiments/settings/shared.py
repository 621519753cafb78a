"""What the three settings share: a training with averaged weights, samples, scores, tables."""

import copy

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import cm
import fid
from experiments import common


def fit(net, loss, path, options, steps, seed, lr, warmup=1, ema=0.9999, weight_decay=0.0,
        fp16=False, **more):
    """Adam's steps down loss(1), ..., loss(steps), from the checkpoint at `path` on if there is
    one; then `net` in eval mode, frozen, with its trained parameters' moving averages.

    Only what requires gradients is trained and kept. more: what else a step changes; the rest is
    common.train's and cm.train's. Raises ValueError and FloatingPointError as common.train does."""
    trained = nn.ParameterList(p for p in net.parameters() if p.requires_grad)
    averaged = copy.deepcopy(trained).requires_grad_(False)
    parameters, averages = list(trained), list(averaged)
    adam = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)  # of 0 it is Adam
    scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=fp16)

    def step(i):
        adam.param_groups[0]["lr"] = lr * min(1, i / max(1, warmup))
        value = loss(i)
        cm.update(value, parameters, averages, adam, scaler, min(ema, (1 + i) / (10 + i)))
        return value.detach()

    state = dict(trained=trained, averaged=averaged, adam=adam, scaler=scaler) | more
    common.train(step, state, path, steps, seed, options)
    trained.load_state_dict(averaged.state_dict())
    return net.eval().requires_grad_(False)


def sample(file, images, data, number, seed, batch=250, **how):
    """Write `number` images, as many of each class, as cm.py --sample does, for fid.py.

    images(y, seeds): [B, C, H, W] in [-1, 1] of labels and a seed each, which are the same for all
    methods; how: guidance, sampler and sample_steps."""
    y = torch.arange(number, device=data.images.device) % len(data.names)
    seeds = [cm.hashed_seed("image", seed, i) for i in range(number)]
    parts = [cm.to_uint8(images(y[i:i + batch], seeds[i:i + batch])).cpu()
             for i in tqdm(range(0, number, batch), f"sampling {file.stem}")]
    pixels = torch.cat(parts).permute(0, 2, 3, 1)
    arrays = dict(arr_0=pixels, arr_1=y.cpu(), counts=data.counts.cpu(), **how)
    cm.write_atomically(file, lambda path: np.savez(path, **arrays))


def scores(file, config, device, cache, names):
    """{"FD Few": ..., ...}, of `names`, by fid.py's classifier."""
    found = fid.evaluate(file, config.dataset, config.data, features="classifier",
                         device=str(device), cache=cache)
    return {f"{value} {split}": found[split][value] for value, split in map(str.split, names)}


def draw(config, files, args, path, split=None):
    """A row a class, or a class of a split: real images, then those of each .npz of `files`,
    {title: path}; nothing where one isn't there."""
    if not all(file.is_file() for file in files.values()):
        return
    data = cm.Data(config)
    classes = range(len(data.names)) if split is None else cm.splits(data.counts)[split]
    columns = min(8, args.num_images // len(data.names))
    common.draw_samples(data, files, classes, path, columns)


def compared(rows, digits, others, by=(), same=()):
    """Two tables as text: mean ± standard deviation of columns, {name: digits}, a row a method and
    value of the columns `by`; then CM minus each of `others`, paired by seed. same: columns of
    which a method has one value."""
    rows = rows.sort_values(list(by), kind="stable").set_index("seed")
    runs = dict(list(rows.groupby([*by, "method"], sort=False)))
    values, pairs = [], []
    for (*at, method), run in runs.items():
        first = {name: f"{value:g}" for name, value in zip(by, at, strict=True)}
        values.append(first | {"method": method} | {
            name: f"{run[name].iloc[0]:,.0f}" for name in same} | {"seeds": len(run)} | {
            name: common.spread(run[name], n) for name, n in digits.items()})
        ours = runs.get((*at, "CM"))
        if method in others and ours is not None:
            pairs.append(first | {"difference": f"CM − ({method})"} | {
                name: common.difference(ours[name], run[name], n) for name, n in digits.items()})
    return "\n\n".join([
        f"exploratory: {rows.index.nunique()} seeds; mean ± standard deviation",
        common.markdown(values), "paired differences: mean and 95 % interval over seeds",
        common.markdown(pairs)])
