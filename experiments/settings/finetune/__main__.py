"""Does CM help where a pre-trained network is fine-tuned in a low rank (Sec. 3.3, Tab. 6)?

    python -m experiments.settings.finetune
    python -m experiments.settings.finetune --table       # only the table, and assets/finetune.png
    python -m experiments.settings.finetune --pretrained PIPELINE --data TREE       # Stable Diffusion

W = W_f + B_g A_g + B_e A_e: W_f is frozen, B_g A_g general, B_e A_e reserved in the decoder. W_f
has seen the balanced set without its labels; fine-tuning is with labels, on a long-tailed part.
Options that aren't its own go to cm.py. Columns of rows.csv: trained, the number of
parameters; FD, recall, accuracy: of `fid.py --features classifier`. "CM, θ_g": without B_e A_e.
--pretrained: a pipeline in diffusers' format, an image tree; no rows, but samples for fid.py.
"""

import copy
import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import cm
import fid
from experiments import common
from experiments.settings.finetune import pretrained

METHODS = {"LoRA r_g": "lora", "LoRA r_g + r_e": "lora-wide", "CM": "cm"}  # name: its directory
THETA_G = "CM, θ_g"
SHOWN = {f"FD {s}": 1 for s in ("overall", "Many", "Medium", "Few")} | {
    "recall Few": 3, "accuracy Few": 3}
WEIGHT_DECAY = 1e-6  # the paper's, as the next two
EPOCHS = 100  # of a Stable Diffusion
SAMPLE_STEPS = 50  # of DDIM
OWN = dict(n_max="1000", steps="3000")  # options for cm.py
PIPELINE = dict(dataset="folder", base="ddpm", lr="3e-4")
UNUSED = "no_cm", "rank_ratio", "seed", "warmup", "compile", "flip", "network", "run", "sampling"


class LoRA(cm.LowRankReserved):
    """W_f + B_g A_g, where `layer` holds W_f: what theta_g has, too."""

    general = property(lambda self: 0, lambda self, entered: None)  # `cm.general_only` leaves it on


class Reserved(cm.LowRankReserved):
    """W_f + B_g A_g + B_e A_e, where `layer` is a LoRA."""

    def forward(self, *args, **kwargs):  # a LoRA's weight can't be replaced, that of its layer can
        return torch.func.functional_call(self.layer.layer, {"weight": self.weight}, args, kwargs)


def add_factors(network, decoder, method, r_g, r_e):
    """Factorise `network` in place: LoRA of rank r_g where r_g < min(d, k), and inside `decoder`
    around it CM's B_e A_e of rank r_e, or LoRA of rank r_g + r_e. Other layers stay as they are.

    d and k are cm.matrix_and_rank's. Raises ValueError unless 0 < r_e < r_g and the decoder has
    such layers. (Sec. 3.3)"""
    inside, layers = matrices(decoder), matrices(network)
    largest = max(map(min, inside.values()))
    if not 0 < r_e < r_g < largest:
        raise ValueError(f"--ranks are {r_g} {r_e}; they must be R_G R_E with 0 < R_E < R_G < "
                         f"{largest}, the decoder's largest full rank")
    wide = inside if method == "LoRA r_g + r_e" else {}
    new = {layer: LoRA(layer, *shape, r_g + r_e if layer in wide else r_g)
           for layer, shape in layers.items() if r_g < min(shape)}
    if method == "CM":
        new |= {layer: Reserved(new[layer], *shape, r_e) for layer, shape in inside.items()
                if layer in new}
    cm.replace_modules(network, new)


def matrices(module):
    """{Conv2d or Linear inside: (d, k)}"""
    return {layer: cm.matrix_and_rank(layer, 1)[:2] for layer in module.modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear))}


def fine_tune(net, setting, config, path, options):
    """Train the parameters of `net` that require gradients, from the checkpoint at `path` on if
    there is one; at the end put their moving averages into `net`. The checkpoint holds them alone,
    without W_f. setting: see pretrained.py. Raises ValueError as common.train does."""
    device, kind = setting.data.images.device, cm.precision(config, setting.data.images.device)
    trained = nn.ParameterList(p for p in net.parameters() if p.requires_grad)
    ema = copy.deepcopy(trained).requires_grad_(False)
    parameters, averages = list(trained), list(ema)
    losses = cm.CapacityManipulation.from_config(net, setting.data.counts, config).to(device)
    losses.alpha_bar.copy_(setting.alpha_bar)
    adam = torch.optim.AdamW(parameters, config.lr, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=kind == "fp16")

    def step(i):
        batch = cm.draw_batch(setting.batches, config, config.batch_size, i)
        with cm.autocast(kind, device):
            loss = losses(*batch)[0]
        cm.update(loss, parameters, averages, adam, scaler, min(config.ema, (1 + i) / (10 + i)))
        return loss.detach()

    state = dict(trained=trained, ema=ema, adam=adam, scaler=scaler)
    common.train(step, state, path, config.steps, config.seed, options)
    trained.load_state_dict(ema.state_dict())
    net.eval()


def npz(args, config, method, seed, kind="samples"):
    """Where samples of a run lie; of kind "general" are those of CM's theta_g."""
    guided = f"-g{config.guidance:g}" if config.guidance else ""
    return args.runs / f"{METHODS[method]}-{seed}" / f"{kind}-{args.num_images}{guided}.npz"


def samples(setting, method, seed, args, options):
    """Train and sample, or go on there: ({row's name: .npz}, number of trained parameters)."""
    directory, device = args.runs / f"{METHODS[method]}-{seed}", setting.data.images.device
    torch.manual_seed(cm.hashed_seed("weights", seed))
    net, decoder = setting.network()
    add_factors(net, decoder, method, *args.ranks)
    net = cm.lay_out(net, device)
    config = dataclasses.replace(setting.config, seed=seed, no_cm=method != "CM")
    path = directory / f"{directory.name}.pt"
    if not path.is_file():  # samples, if there are any, are of another network
        for file in directory.glob("*.npz"):
            file.unlink()
    fine_tune(net, setting, config, path, options)

    merged = {method: cm.merge(net)}
    if method == "CM":
        with cm.general_only(net):
            merged[THETA_G] = cm.merge(net)
    paths = {name: npz(args, config, method, seed, "general" if name == THETA_G else "samples")
             for name in merged}
    labels = torch.arange(args.num_images) % len(setting.data.names)
    seeds = [cm.hashed_seed("image", seed, i) for i in range(args.num_images)]  # for all methods
    for name, path in paths.items():
        if not path.is_file():
            images = []
            for i in tqdm(range(0, args.num_images, setting.sample_batch), f"sampling {path}"):
                y = labels[i:i + setting.sample_batch]
                with torch.no_grad(), cm.autocast(cm.precision(config, device), device):
                    images.append(setting.images(merged[name], y.to(device), SAMPLE_STEPS,
                                                 seeds[i:i + len(y)]))
            common.save_samples(path, np.concatenate(images), labels, setting.data.counts.cpu(),
                                guidance=config.guidance, sampler="ddim",
                                sample_steps=SAMPLE_STEPS)
    if args.pretrained:
        merged[method].unet.save_pretrained(directory / "unet")
    return paths, sum(p.numel() for p in net.parameters() if p.requires_grad)


def study(config, args, options):
    """Every run that has no rows yet. Raises ValueError."""
    kept = f"{options} --num-images {args.num_images}"
    missing = [(seed, method) for seed, method in itertools.product(args.seeds, METHODS)
               if not common.has_row(args.rows, kept, method=method, seed=seed)]
    if missing:
        unet = cm.make_unet(dataclasses.replace(config, no_cm=True), 10, 1)
        add_factors(unet, unet.decoder, "CM", *args.ranks)  # for its checks
        setting = pretrained.Unlabelled(config, args.runs / "pretrained", args.pretrain_steps)
    for seed, method in missing:
        paths, trained = samples(setting, method, seed, args, options)
        new = []
        for name, path in paths.items():
            scores = fid.evaluate(path, config.dataset, config.data, features="classifier",
                                  device=str(setting.data.images.device), cache=args.runs / "fid")
            new.append(dict(method=name, seed=seed, steps=config.steps, trained=trained) | {
                f"{value} {split}": scores.get(split, {}).get(value, math.nan)
                for value, split in map(str.split, SHOWN)})
        common.add_rows(args.rows, kept, new)


def table(rows):
    """As text: mean ± standard deviation, and CM against each other row, paired by seed."""
    runs = {name: run.set_index("seed") for name, run in rows.groupby("method")}
    values, pairs = [], []
    for name, run in ((name, runs[name]) for name in (*METHODS, THETA_G) if name in runs):
        values.append({"method": name, "trained": f"{run['trained'].iloc[0]:,.0f}",
                       "seeds": len(run)} | {
                           column: common.spread(run[column], n) for column, n in SHOWN.items()})
        if name != "CM" and "CM" in runs:
            pairs.append({"difference": f"CM − ({name})"} | {
                column: common.interval(*common.difference(runs["CM"][column], run[column])[:2], n)
                for column, n in SHOWN.items()})
    return "\n\n".join([
        f"exploratory: {rows['seed'].nunique()} seeds; mean ± standard deviation",
        common.markdown(values), "paired differences: mean and 95 % interval over seeds",
        common.markdown(pairs)])


def draw(data, args, config, path, columns=8):
    """A row a rare class: real images, then each method's of one seed, from the same noise."""
    few = cm.splits(data.counts.cpu())["Few"]
    files = {method: npz(args, config, method, args.seeds[0]) for method in METHODS}
    columns = min(columns, args.num_images // len(data.names))
    common.draw_samples(data, files, few, path, columns)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=(10, 11, 12))
    parser.add_argument("--pretrained", type=Path, help="a Stable Diffusion in diffusers' format, "
                        "to fine-tune on the image tree --data")
    parser.add_argument("--prompt",
                        help="with --pretrained: of a class, whose name stands for {} "
                             "[default: a {} painting, as in the paper]")
    parser.add_argument("--ranks", type=int, nargs=2, metavar=("R_G", "R_E"),
                        help="of B_g A_g and B_e A_e [default: 8 2; with --pretrained 128 8]")
    parser.add_argument("--pretrain-steps", type=int, default=6000,
                        help="steps that W_f is trained, without labels [default: 6000]")
    parser.add_argument("--num-images", type=int, default=5000,
                        help="generated images of a run [default: 5000]")
    args, flags = parser.parse_known_args(argv)
    args.ranks = args.ranks or ([128, 8] if args.pretrained else [8, 2])
    torch.set_num_threads(1)  # results repeat only with the same number of threads
    try:
        flags, config, typed = common.configured(flags, UNUSED, ["guidance"],
                                                 **(PIPELINE if args.pretrained else OWN))
        config = dataclasses.replace(config, flip=False)  # latents can't be flipped
        cm.check(args.num_images >= 100, "num_images", args.num_images, "at least 100")
        cm.check(args.pretrain_steps >= 1, "pretrain_steps", args.pretrain_steps, "at least 1")
        flags += ["--ranks", *map(str, args.ranks), "--pretrain-steps", str(args.pretrain_steps)]
        if args.prompt is not None and not args.pretrained:
            raise ValueError("--prompt has no meaning without --pretrained")
        if args.pretrained:
            args.prompt = "a {} painting" if args.prompt is None else args.prompt
            if args.table:
                raise ValueError("--pretrained has no table: it writes samples for fid.py")
            cm.check(config.guidance >= 0, "guidance", config.guidance, "at least 0 for diffusers")
            args.runs /= args.pretrained.resolve().name
            setting = pretrained.StableDiffusion(args.pretrained, config, args.runs, args.prompt)
            options = common.settings([*flags, "--prompt", args.prompt],
                                      ("--data", "--device", "--amp", "--guidance"))
            options += f" on {setting.made_of()}"
            if "steps" not in typed:
                setting.config.steps = setting.steps(EPOCHS)
            for seed, method in itertools.product(args.seeds, METHODS):
                for path in samples(setting, method, seed, args, options)[0].values():
                    pretrained.draw_grid(path)
                    print(f"python fid.py {path} --dataset folder --data {config.data}")
            draw(setting.data, args, config, args.runs / "finetune.png")
            return 0
        if not args.table:
            study(config, args, common.settings(flags))
        rows = common.read_table(args.rows, ["trained", *SHOWN])
        print(table(common.numbers(rows, ("method", "options"))))
        if all(npz(args, config, method, args.seeds[0]).is_file() for method in METHODS):
            draw(cm.Data(config), args, config, args.assets / "finetune.png")
        return 0
    except (ValueError, OSError, ImportError) as e:
        cm.fail(e)
    except FloatingPointError as e:
        sys.exit(f"finetune: {e}")


if __name__ == "__main__":
    sys.exit(main())
