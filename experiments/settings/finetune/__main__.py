"""Does CM help where a pre-trained network is fine-tuned in a low rank (Sec. 3.3, Tab. 6)?

    python -m experiments.settings.finetune
    python -m experiments.settings.finetune --table       # only the table, and assets/finetune.png
    python -m experiments.settings.finetune --pretrained PIPELINE --data TREE   # Stable Diffusion

W = W_f + B_g A_g + B_e A_e: W_f is frozen, B_g A_g general, B_e A_e reserved in the decoder.
Options that aren't its own go to cm.py. README.md says what it does, and what its rows hold.
"""

import copy
import dataclasses
import functools
import itertools
import math
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import cm
from experiments import common
from experiments.settings import shared

METHODS = "LoRA r_g", "LoRA r_g + r_e", "CM"
THETA_G = "CM, θ_g"  # CM without its B_e A_e
FILES = dict(zip((*METHODS, THETA_G), ("lora", "lora-wide", "cm", "cm-general"), strict=True))
SHOWN = {f"FD {s}": 1 for s in ("overall", "Many", "Medium", "Few")} | {
    "recall Few": 3, "accuracy Few": 3}  # with their digits
PRETRAIN_STEPS = 6000  # of cm.py's network, without labels
WEIGHT_DECAY = 1e-6  # the paper's, as the next two
EPOCHS = 100  # of a Stable Diffusion
SAMPLE_STEPS = 50  # of DDIM
UNUSED = "no_cm", "rank_ratio", "seed", "warmup", "compile", "flip", "network", "run", "sampling"


# ------------------------------------------------------------------------------------------------
# W = W_f + B_g A_g + B_e A_e


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


# ------------------------------------------------------------------------------------------------
# What is fine-tuned, a `setting`:
#     data: cm.Data of pixels; batches: cm.Data of what is trained on, pixels or latents;
#     config: cm.Config; alpha_bar [T] float64; sample_batch: images sampled at a time;
#     network(): (the frozen network, which takes labels y, the part of it that is the decoder);
#     images(net, y, seeds): by DDIM, [B, C, H, W] in [-1, 1], of labels y and a seed each.


class Unlabelled:
    """cm.py's network, which cm.py trains on the whole set without its labels, once, in the
    directory `out`. Raises ValueError where that was done with other options."""

    sample_batch = 250

    def __init__(self, config, out):
        self.config, self.data = config, cm.Data(config, cm.pick_device(config.device))
        self.batches, self.alpha_bar = self.data, cm.make_alpha_bar()
        flags = f"--dataset {config.dataset} --ir 1 --label-drop 1 --no-cm --steps {PRETRAIN_STEPS}"
        where = [f"--{name}={value}" for name in ("data", "device")
                 if (value := getattr(config, name)) is not None]
        failed = common.run([*flags.split(), *where], out)
        if failed:
            raise FloatingPointError(f"the loss before fine-tuning is {failed}")
        self.state = cm.load_trained(out / "checkpoint.pt")[1].state_dict()

    def network(self):
        """The labels' embedding, trained in full, starts at 0: fine-tuning starts from the
        pre-trained network."""
        unet = cm.make_unet(dataclasses.replace(self.config, no_cm=True), len(self.data.names),
                            self.data.images.shape[1]).requires_grad_(False)
        label = unet.label_embedding.requires_grad_(True).weight
        unet.load_state_dict(self.state | {"label_embedding.weight": torch.zeros_like(label)})
        return unet, unet.decoder

    def images(self, net, y, seeds):
        return cm.sample(net, y, self.data.images.shape[1:], "ddim", SAMPLE_STEPS,
                         self.config.guidance, seeds)


class Prompted(nn.Module):
    """diffusers' UNet as cm.py calls a network: a label stands for its prompt, -1 for "".

    prompts: embeddings [C + 1, L, D], the last that of "". Stable Diffusion's UNet has no dropout,
    so what L_CM sees is capacity alone."""

    def __init__(self, unet, prompts):
        super().__init__()
        self.unet = unet
        self.register_buffer("prompts", prompts)

    def forward(self, x_t, t, y):
        return self.unet(x_t, t, self.prompts[y]).sample


class StableDiffusion:
    """A pipeline in diffusers' format, and the images of config.data, an image tree, at its size.
    A class's prompt is `prompt` with its name, _ read as a blank, in place of {}. Raises ValueError
    and OSError."""

    sample_batch = 16

    @torch.no_grad()
    def __init__(self, directory, config, prompt):
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        self.pipe = pipe = StableDiffusionPipeline.from_pretrained(
            directory, local_files_only=True, safety_checker=None)
        noise = pipe.scheduler.config
        if noise.prediction_type != "epsilon" or noise.num_train_timesteps != cm.T:
            raise ValueError(f"{directory} predicts {noise.prediction_type} over "
                             f"{noise.num_train_timesteps} steps; it must be epsilon over {cm.T}")
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.config = dataclasses.replace(config, image_size=size, flip=False)  # latents can't be
        device = cm.pick_device(config.device)
        self.data = cm.Data(self.config, device)

        self.unet = pipe.unet.float()  # stays on the CPU, runs take copies
        pipe.unet = None
        pipe.to(device).set_progress_bar_config(disable=True)
        # DDIMScheduler's own default would clip latents to [-1, 1]
        pipe.scheduler = DDIMScheduler.from_config(noise, clip_sample=False)
        self.alpha_bar = pipe.scheduler.alphas_cumprod.double()
        prompts = [prompt.replace("{}", name.replace("_", " ")) for name in self.data.names]
        self.prompts = pipe.encode_prompt([*prompts, ""], device, 1, False)[0]

        # means of the posterior, stored as 127.5 (z + 1): what cm.draw_batch makes z of again
        parts = tqdm(self.data.images.split(self.sample_batch), "latents", unit="batch")
        z = torch.cat([pipe.vae.encode(cm.to_float(x)).latent_dist.mode() for x in parts])
        self.batches = copy.copy(self.data)
        self.batches.images = 127.5 * (pipe.vae.config.scaling_factor * z + 1)

    def network(self):
        unet = copy.deepcopy(self.unet).requires_grad_(False)
        return Prompted(unet, self.prompts), unet.up_blocks

    def images(self, net, y, seeds):  # from the pipeline itself
        self.pipe.unet = net.unet
        empty = net.prompts[torch.full_like(y, -1)]
        x = self.pipe(prompt_embeds=net.prompts[y], negative_prompt_embeds=empty,
                      num_inference_steps=SAMPLE_STEPS, guidance_scale=1 + self.config.guidance,
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                      output_type="pt").images
        return 2 * x - 1


# ------------------------------------------------------------------------------------------------
# Runs


def fine_tune(net, setting, config, path, options):
    """Train the parameters of `net` that require gradients; see shared.fit. The checkpoint is
    without W_f."""
    device = setting.data.images.device
    autocast = cm.precision(config, device)
    losses = cm.CapacityManipulation.from_config(net, setting.data.counts, config).to(device)
    losses.alpha_bar.copy_(setting.alpha_bar)

    def loss(i):
        batch = cm.draw_batch(setting.batches, config, config.batch_size, i)
        with autocast:
            return losses(*batch)[0]

    shared.fit(net, loss, path, options, config.steps, config.seed, config.lr, ema=config.ema,
               weight_decay=WEIGHT_DECAY, fp16=autocast.fast_dtype == torch.float16)


def npz(args, config, name, seed):
    """Where the samples of a row lie."""
    return args.runs / f"{FILES[name]}-{seed}-{args.num_images}-g{config.guidance:g}.npz"


def run(setting, method, seed, args, options):
    """Train and sample, or go on there: ({row's name: .npz}, number of trained parameters)."""
    config = dataclasses.replace(setting.config, seed=seed, no_cm=method != "CM")
    device, path = setting.data.images.device, args.runs / f"{FILES[method]}-{seed}.pt"
    torch.manual_seed(cm.hashed_seed("weights", seed))
    net, decoder = setting.network()
    add_factors(net, decoder, method, *args.ranks)
    net = cm.lay_out(net, device)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    fine_tune(net, setting, config, path, options)

    merged = {method: cm.merge(net)}
    if method == "CM":
        with cm.general_only(net):
            merged[THETA_G] = cm.merge(net)
    if args.pretrained:
        merged[method].unet.save_pretrained(path.with_suffix(""))
    files = {name: npz(args, config, name, seed) for name in merged}
    for name, file in files.items():
        if not file.is_file():
            images = functools.partial(setting.images, merged[name])
            with cm.precision(config, device):
                shared.sample(file, images, setting.data, args.num_images, seed,
                              setting.sample_batch, guidance=config.guidance, sampler="ddim",
                              sample_steps=SAMPLE_STEPS)
    return files, trained


def measure(setting, args, options, method, seed):
    """Rows of a run on an Unlabelled."""
    config = setting.config
    files, trained = run(setting, method, seed, args, options)
    return [dict(method=name, seed=seed, steps=config.steps, trained=trained) | shared.scores(
        file, config, setting.data.images.device, args.runs / "fid", SHOWN)
        for name, file in files.items()]


def tune_pipeline(flags, args):
    """Every run on a Stable Diffusion, and how to score its samples: its configuration, and where
    they lie. Raises ValueError."""
    flags, config, typed = common.configured(flags, UNUSED, ["guidance"], dataset="folder",
                                              base="ddpm", lr="3e-4")
    cm.check("{}" in args.prompt, "prompt", args.prompt, "a text with {} for the class's name")
    cm.check((args.pretrained / "model_index.json").is_file(), "pretrained", args.pretrained,
             "the directory of a Stable Diffusion in diffusers' format")
    options = common.settings(
        [*flags, "--ranks", *map(str, args.ranks), "--prompt", args.prompt, "--pretrained",
         str(args.pretrained)], without=("--device", "--amp", "--guidance"))
    args.runs /= args.pretrained.resolve().name
    setting = StableDiffusion(args.pretrained, config, args.prompt)
    if "steps" not in typed:
        setting.config.steps = math.ceil(EPOCHS * len(setting.data.images) / config.batch_size)
    for seed, method in itertools.product(args.seeds, METHODS):
        for file in run(setting, method, seed, args, options)[0].values():
            print(f"python fid.py {file} --dataset folder --data {config.data}")
    return setting.config, args.runs


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=(10, 11, 12))
    parser.add_argument("--pretrained", type=Path, help="a Stable Diffusion in diffusers' format, "
                        "to fine-tune on the image tree --data")
    parser.add_argument("--prompt", default="a {} painting", help="with --pretrained: of a class, "
                        "whose name stands for {} [default: a {} painting, as in the paper]")
    parser.add_argument("--ranks", type=int, nargs=2, metavar=("R_G", "R_E"),
                        help="of B_g A_g and B_e A_e [default: 8 2; with --pretrained 128 8]")
    parser.add_argument("--num-images", type=int, default=5000,
                        help="generated images of a run [default: 5000]")
    args, flags = parser.parse_known_args(argv)
    args.ranks = args.ranks or ([128, 8] if args.pretrained else [8, 2])
    if args.pretrained and not args.table:
        config, pictures = tune_pipeline(flags, args)
    else:
        flags, config, _ = common.configured(flags, UNUSED, ["guidance"], n_max="1000",
                                             steps="3000")
        if not args.table:
            options = common.settings([*flags, "--ranks", *map(str, args.ranks)])
            keys = [dict(method=method, seed=seed) for seed in args.seeds for method in METHODS]
            setting = functools.cache(lambda: Unlabelled(config, args.runs / "pretrained"))
            common.study(args.rows, f"{options} --num-images {args.num_images}", keys,
                         lambda **key: measure(setting(), args, options, **key))
        rows, pictures = common.read_table(args.rows), args.assets
        print(shared.compared(common.numbers(rows, ("method", "options")), SHOWN,
                              [name for name in FILES if name != "CM"], same=["trained"]))
    files = {method: npz(args, config, method, args.seeds[0]) for method in METHODS}
    shared.draw(config, files, args, pictures / "finetune.png", "Few")


if __name__ == "__main__":
    main()
