"""Text to image (Tab. G.11): latent diffusion from scratch on captions, long-tailed; DDPM and CM.

    python -m experiments.settings.text_to_image             # what has no row yet, and the picture
    python -m experiments.settings.text_to_image --table     # only the tables, and the picture
    python -m experiments.settings.text_to_image --prompt "a small red star, upper left"   # after the first

Networks keep checkpoints in --runs and go on from them. FD: Fréchet distance from the balanced set
in the features of a classifier trained on it (fid.py's); shape: how often it sees the caption's
shape; colour, place: how often `shapes.read` sees the caption's. "autoencoder": real images
through it, the best to be expected of either method. --prompt: by both methods, of the first seed,
with guidance 1.5, into RUNS/prompt.png; beside images of that caption, black where there are none.
"""

import copy
import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cm
import fid
from experiments import common
from experiments.settings.text_to_image import shapes

WIDTH = 64  # of the text encoder
CHANNELS = (32, 64)  # of the UNet's levels
BATCH = 32
LR = 1e-3  # Adam's, after WARMUP steps
WARMUP = 100
DROP = 0.1  # share of captions dropped
SAMPLE_STEPS = 50  # of DDIM
AUTOENCODER = "autoencoder"
METHODS = ("DDPM", "CM")
GUIDANCE = 1.5  # the authors'
POINTS = ((AUTOENCODER, 0), *((method, w) for w in (0, GUIDANCE) for method in METHODS))
SPLITS = ("overall", "Many", "Medium", "Few")
SHOWN = {f"FD {name}": 1 for name in SPLITS} | {f"shape {name}": 3 for name in SPLITS} | {
    f"{kind} {name}": 3 for kind in ("colour", "place") for name in ("overall", "Few")}


def fit(net, loss, path, steps, seed, options):
    """Adam's `steps` down loss(), resumable; the moving average of `net`, in eval mode."""
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    parameters, averages = list(net.parameters()), list(ema.parameters())
    adam, scaler = torch.optim.Adam(parameters, LR), torch.amp.GradScaler(enabled=False)

    def step(i):
        adam.param_groups[0]["lr"] = LR * min(1, i / WARMUP)
        value = loss()
        cm.update(value, parameters, averages, adam, scaler, min(0.9999, (1 + i) / (10 + i)))
        return value.detach()

    common.train(step, {"net": net, "ema": ema, "adam": adam}, path, steps, seed, options)
    return ema


class TextToImage(nn.Module):
    """eps_theta(x_t, t, caption): word embeddings, a transformer encoder, diffusers' UNet."""

    def __init__(self, num_words, reserve):
        from diffusers import UNet2DConditionModel
        super().__init__()
        self.words = nn.Embedding(num_words + 1, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(shapes.LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, 0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=CHANNELS, layers_per_block=1, norm_num_groups=1,
            down_block_types=2 * ("CrossAttnDownBlock2D",),
            up_block_types=2 * ("CrossAttnUpBlock2D",), cross_attention_dim=WIDTH,
            attention_head_dim=4, dropout=0.1)  # diffusers' misnomer: 4 heads
        if reserve:
            cm.reserve_capacity(self.unet.up_blocks)

    def forward(self, x_t, t, ids):
        """x_t [B, 4, 8, 8], t [B] or an int, ids [B, LENGTH]."""
        return self.unet(x_t, t, self.text(self.words(ids) + self.positions)).sample


def loss_of(net, x0, y, t, eps, ids, w):
    """Eq. (4), base DDPM, lam = 1; the base alone where nothing is reserved. x0, eps [B, 4, 8, 8];
    y, t [B]; ids [B, LENGTH]; w [C]: cm.capacity_weights."""
    x_t = cm.add_noise(x0, t, eps, cm.make_alpha_bar(x0.device))
    eps_theta = net(x_t, t, ids)
    base = cm.squared_distance(eps_theta, eps).mean()
    if not cm.reserved_layers(net):
        return base
    with cm.general_only(net):  # the UNet's dropout, 0.1, draws masks of its own; the text has none
        eps_theta_g = net(x_t, t, ids)
    return base + cm.capacity_loss(eps_theta, eps_theta_g, w[y]).mean()


def draw_batch(latents, labels, ids):
    """x0, y, t, eps and ids, where a dropped caption is all 0; from torch's generator."""
    index = torch.randint(len(latents), (BATCH,), device=latents.device)
    t = torch.randint(cm.T, (BATCH,), device=latents.device)
    eps = torch.randn_like(latents[index])
    dropped = torch.rand(BATCH, 1, device=latents.device) < DROP
    return latents[index], labels[index], t, eps, ids[index].masked_fill(dropped, 0)


def latents_of(images, vae, device):
    """[N, 4, H/4, W/4], the posterior's means, of uint8 images [N, 3, H, W]."""
    return torch.cat([vae.encode(cm.to_float(x.to(device))).latent_dist.mode()
                      for x in images.split(250)])


class Setting:
    """What all runs share: data, words and, trained once, autoencoder and classifier."""

    def __init__(self, args):
        self.args, self.device = args, cm.pick_device()
        self.images, self.captions, self.labels = shapes.captioned_images(args.n_max, seed=0)
        self.index = cm.long_tail_indices(self.labels, args.ir, n_max=args.n_max)
        self.counts = np.bincount(self.labels[self.index])
        self.words = sorted({word for caption in self.captions for word in shapes.split(caption)})
        self.data = f"--n-max {args.n_max} --ir {args.ir:g} --vae-steps {args.vae_steps}"

    @functools.cached_property
    def autoencoder(self):
        """A small AutoencoderKL, trained on the balanced images, and the standard deviation of the
        long-tailed ones' latents. It plays the part of one that others trained on everything:
        trained on the long-tailed images it makes rings of frames, whatever their latents say."""
        from diffusers import AutoencoderKL
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=3 * ("DownEncoderBlock2D",), up_block_types=3 * ("UpDecoderBlock2D",),
            block_out_channels=(16, 32, 32), norm_num_groups=1, mid_block_add_attention=False
        ).to(self.device)

        def loss():
            index = torch.randint(len(self.images), (BATCH,))
            x = cm.to_float(self.images[index].to(self.device))
            posterior = vae.encode(x).latent_dist
            error = F.mse_loss(vae.decode(posterior.sample()).sample, x)
            # Stable Diffusion's 1e-6, but of a sum beside a mean over 3,072: so a stronger pull
            return error + 1e-6 * posterior.kl().mean()

        ema = fit(vae, loss, self.path(AUTOENCODER, 0), self.args.vae_steps, 0, self.data)
        return ema, latents_of(self.images[self.index], ema, self.device).std()

    def latents(self, images):
        """[N, 4, 8, 8] of uint8 images, of variance 1 on training images."""
        vae, scale = self.autoencoder
        return latents_of(images, vae, self.device) / scale

    def decoded(self, latents):
        """uint8 [N, 3, 32, 32]"""
        vae, scale = self.autoencoder
        return torch.cat([cm.to_uint8(vae.decode(z * scale).sample).cpu()
                          for z in latents.split(250)])

    def path(self, method, seed):
        return self.args.runs / f"{method}-{seed}.pt"

    def lacking(self):
        """A network that pictures need and that isn't trained to its end, or None."""
        needed = {self.path(AUTOENCODER, 0): self.args.vae_steps} | {
            self.path(method, self.args.seeds[0]): self.args.steps for method in METHODS}
        for path, steps in needed.items():
            if not path.is_file() or common.load_state({}, path, {}) != steps:
                return path
        return None

    def trained(self, method, seed):
        """The network after --steps, merged; of its weights the moving average."""
        torch.manual_seed(cm.hashed_seed("weights", seed))
        net = TextToImage(len(self.words), method == "CM").to(self.device)
        data = [x.to(self.device) for x in (
            self.latents(self.images[self.index]), torch.from_numpy(self.labels[self.index]),
            shapes.word_ids([self.captions[i] for i in self.index], self.words))]
        w = cm.capacity_weights(self.counts).to(self.device)
        loss = lambda: loss_of(net, *draw_batch(*data), w)
        return cm.merge(fit(net, loss, self.path(method, seed), self.args.steps, seed, self.data))

    def drawn(self, method, seed, captions, guidance):
        """uint8 images [N, 3, 32, 32] of the captions by DDIM; each method's from the same noise.
        (Not by cm.sample, whose images end in [-1, 1]: latents don't.)"""
        net, ids = self.trained(method, seed), shapes.word_ids(captions, self.words).to(self.device)
        seeds = [cm.hashed_seed("image", seed, i) for i in range(len(captions))]
        noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
        progress = tqdm(total=SAMPLE_STEPS, desc=f"sampling {method}-{seed}", unit="step")

        @torch.no_grad()
        def predict(x, t):
            progress.update()
            eps = net(x, t, ids)
            return eps + guidance * (eps - net(x, t, 0 * ids)) if guidance else eps

        x, alpha_bar = torch.stack(noise).to(self.device), cm.make_alpha_bar().tolist()
        return self.decoded(cm.ddim(predict, x, alpha_bar, SAMPLE_STEPS))

    @functools.cached_property
    def judge(self):
        """(a classifier trained on the balanced set, its features of that)."""
        test, _, labels = shapes.captioned_images(100, seed=99)
        net = common.judge(self.images, torch.from_numpy(self.labels),
                           (test, torch.from_numpy(labels)), len(self.counts), self.device,
                           self.args.runs / "judge")
        return net, fid.extract(net, self.images, "real images")[0].cpu()

    def scores(self, images, captions, labels):
        """{"FD Few": ..., "colour overall": ...}, overall and by split, of generated images."""
        net, real = self.judge
        features, logits = (x.cpu() for x in fid.extract(net, images, "generated images"))
        right, row = {"shape": logits.argmax(1).numpy() == labels}, {}
        for kind, words in zip(("colour", "place"), shapes.read(images), strict=True):
            right[kind] = np.array([word in caption for word, caption in
                                    zip(words, captions, strict=True)])
        for name, classes in (cm.splits(self.counts) | {"overall": labels}).items():
            ours, theirs = (np.isin(y, classes) for y in (labels, self.labels))
            row[f"FD {name}"] = fid.frechet_distance(real[theirs], features[ours])
            row |= {f"{kind} {name}": float(values[ours].mean()) for kind, values in right.items()}
        return row


def study(setting):
    """Each method, guidance and seed that lacks a row. Raises ValueError."""
    args = setting.args
    options = f"{setting.data} --steps {args.steps} --num-images {args.num_images}"
    for seed in args.seeds:
        # as many images of each class, with captions of their own
        images, captions, labels = shapes.captioned_images(args.num_images, seed=100 + seed)
        for method, guidance in POINTS:
            key = dict(method=method, guidance=guidance, seed=seed)
            if not common.has_row(args.rows, options, **key):
                x = (setting.decoded(setting.latents(images)) if method == AUTOENCODER else
                     setting.drawn(method, seed, captions, guidance))
                scores = setting.scores(x, captions, labels)
                common.add_rows(args.rows, options, [key | scores])


def draw(setting, captions, path, columns=6):
    """Beside each caption: images of the balanced set, DDPM's and CM's with guidance."""
    many = [caption for caption in captions for _ in range(columns)]
    real = torch.zeros(len(many), *setting.images.shape[1:], dtype=torch.uint8)
    for row, caption in enumerate(captions):
        alike = [i for i, other in enumerate(setting.captions) if other == caption][:columns]
        real[row * columns:row * columns + len(alike)] = setting.images[alike]
    drawn = {method: setting.drawn(method, setting.args.seeds[0], many, GUIDANCE)
             for method in METHODS}
    path.parent.mkdir(parents=True, exist_ok=True)
    cm.draw_panels({"real": real} | drawn, captions, path)


def table(rows):
    """The tables in Markdown: mean ± standard deviation, and CM − DDPM paired by seed."""
    runs = dict(list(rows.set_index("seed").groupby(["method", "guidance"], sort=False)))
    measured, differences = [], []
    for (method, w), run in runs.items():
        plain = runs.get(("DDPM", w))
        measured.append({"method": method, "guidance": f"{w:g}", "seeds": len(run)} | {
            name: common.spread(run[name], n) for name, n in SHOWN.items()})
        if method == "CM" and plain is not None:
            differences.append({"difference": "CM − DDPM", "guidance": f"{w:g}"} | {
                name: common.interval(*common.difference(run[name], plain[name])[:2], n)
                for name, n in SHOWN.items()})
    return "\n\n".join([f"exploratory: {rows['seed'].nunique()} seeds; mean ± standard deviation",
                        common.markdown(measured), "paired differences, mean and 95 % interval",
                        common.markdown(differences)])


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=(10, 11, 12))
    for name, default, text in (("n-max", 1000, "images in the largest class"),
                                ("steps", 4000, "training steps of a network"),
                                ("vae-steps", 3000, "training steps of the autoencoder"),
                                ("num-images", 100, "generated images a class"),
                                ("ir", 100.0, "imbalance ratio")):
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{text} [default: {default:g}]")
    parser.add_argument("--prompt", help="draw this into RUNS/prompt.png, and do nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # results repeat only with the same number of threads
    try:
        for name in ("n_max", "steps", "vae_steps", "num_images"):
            cm.check(getattr(args, name) >= 1, name, getattr(args, name), "at least 1")
        rows = common.read_table(args.rows, SHOWN) if args.table else None
        setting = Setting(args)
        if args.prompt is not None:
            shapes.word_ids([args.prompt], setting.words)  # for its checks
            if setting.lacking():
                raise ValueError(f"{setting.lacking()} isn't there, or not trained to its end; "
                                 "leave --prompt away to train it, or type its --steps")
            draw(setting, [args.prompt], args.runs / "prompt.png")
            return 0
        if not args.table:
            study(setting)
            rows = common.read_table(args.rows, SHOWN)
        print(table(common.numbers(rows, ("method", "options"))))
        if not setting.lacking():
            firsts = np.unique(setting.labels, return_index=True)[1]  # an image of each shape
            draw(setting, [setting.captions[i] for i in firsts], args.assets / "text_to_image.png")
        return 0
    except (ValueError, OSError, ImportError) as e:
        cm.fail(e)
    except FloatingPointError as e:
        sys.exit(f"text_to_image: {e}")


if __name__ == "__main__":
    sys.exit(main())
