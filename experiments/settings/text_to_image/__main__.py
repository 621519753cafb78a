"""Text to image (Tab. G.11): latent diffusion from scratch on captions, long-tailed; DDPM and CM.

    python -m experiments.settings.text_to_image           # what has no row yet, and the picture
    python -m experiments.settings.text_to_image --table   # only the tables, and the picture
    python -m experiments.settings.text_to_image --prompt "a small red star, upper left"

Networks keep checkpoints in --runs and go on from them. --prompt: by both methods, of the first
seed, with guidance 1.5, into RUNS/prompt.png; beside images of that caption, black where there are
none. README.md says what it does, and what its rows hold.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import cm
import fid
from experiments import common
from experiments.settings import shared
from experiments.settings.text_to_image import shapes

WIDTH = 64  # of the text encoder
CHANNELS = (32, 64)  # of the UNet's levels
BATCH = 32
LR = 1e-3  # Adam's, after WARMUP steps
WARMUP = 100
DROP = 0.1  # share of captions dropped
VAE_STEPS = 3000  # of the autoencoder's training
SAMPLE_STEPS = 50  # of DDIM
METHODS = "DDPM", "CM"
GUIDANCE = 1.5  # the authors'
POINTS = (("autoencoder", 0), *((method, w) for w in (0, GUIDANCE) for method in METHODS))
SHOWN = {f"FD {name}": 1 for name in ("overall", "Many", "Medium", "Few")} | {
    f"shape {name}": 3 for name in ("overall", "Many", "Medium", "Few")} | {
    f"{kind} {name}": 3 for kind in ("colour", "place") for name in ("overall", "Few")}


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


def draw_batch(latents, labels, ids):
    """x0, y, t, eps and ids, where a dropped caption is all 0; from torch's generator."""
    index = torch.randint(len(latents), (BATCH,), device=latents.device)
    t = torch.randint(cm.T, (BATCH,), device=latents.device)
    eps = torch.randn_like(latents[index])
    dropped = torch.rand(BATCH, 1, device=latents.device) < DROP
    return latents[index], labels[index], t, eps, ids[index].masked_fill(dropped, 0)


class Setting:
    """What all runs share: images, captions, words, and the autoencoder, trained once."""

    def __init__(self, args):
        self.args, self.device = args, cm.pick_device()
        self.images, self.captions, self.labels = shapes.captioned_images(args.n_max, seed=0)
        index = cm.long_tail_indices(self.labels, args.ir, n_max=args.n_max)
        self.counts = np.bincount(self.labels[index])
        self.words = sorted(set(" ".join(self.captions).lower().replace(",", " ").split()))
        self.vae, self.scale = self.autoencoder(), 1
        self.scale = self.latents(self.images[index]).std()  # so that latents have variance 1
        ids = shapes.word_ids([self.captions[i] for i in index], self.words)
        self.data = (self.latents(self.images[index]),
                     torch.from_numpy(self.labels[index]).to(self.device), ids.to(self.device))

    def fit(self, net, loss, name, steps, seed):
        options = f"--n-max {self.args.n_max} --ir {self.args.ir:g}"
        return shared.fit(net, loss, self.args.runs / f"{name}-{seed}.pt", options, steps, seed, LR,
                          WARMUP)

    def autoencoder(self):
        """A small AutoencoderKL, trained on the balanced images. It plays the part of one that
        others trained on everything: trained on the long-tailed images it makes rings of frames,
        whatever their latents say."""
        from diffusers import AutoencoderKL
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=3 * ("DownEncoderBlock2D",), up_block_types=3 * ("UpDecoderBlock2D",),
            block_out_channels=(16, 32, 32), norm_num_groups=1, mid_block_add_attention=False
        ).to(self.device)

        def loss(i):
            index = torch.randint(len(self.images), (BATCH,))
            x = cm.to_float(self.images[index].to(self.device))
            posterior = vae.encode(x).latent_dist
            error = F.mse_loss(vae.decode(posterior.sample()).sample, x)
            # Stable Diffusion's 1e-6, but of a sum beside a mean over 3,072: so a stronger pull
            return error + 1e-6 * posterior.kl().mean()

        return self.fit(vae, loss, "autoencoder", VAE_STEPS, 0)

    def latents(self, images):
        """[N, 4, 8, 8], the posterior's means, of uint8 images [N, 3, 32, 32]."""
        return torch.cat([self.vae.encode(cm.to_float(x.to(self.device))).latent_dist.mode()
                          for x in images.split(250)]) / self.scale

    def decoded(self, latents):
        """uint8 [N, 3, 32, 32]"""
        return torch.cat([cm.to_uint8(self.vae.decode(z * self.scale).sample).cpu()
                          for z in latents.split(250)])

    def trained(self, method, seed):
        """The network after --steps, merged; of its weights the moving average."""
        torch.manual_seed(cm.hashed_seed("weights", seed))
        net = TextToImage(len(self.words), method == "CM").to(self.device)
        losses = cm.CapacityManipulation(net, self.counts, no_cm=method != "CM").to(self.device)
        loss = lambda i: losses(*draw_batch(*self.data))[0]
        return cm.merge(self.fit(net, loss, method, self.args.steps, seed))

    def drawn(self, method, seed, captions, guidance):
        """uint8 images [N, 3, 32, 32] of the captions by DDIM; each method's from the same noise.
        (Not by cm.sample, whose images end in [-1, 1]: latents don't.)"""
        net, ids = self.trained(method, seed), shapes.word_ids(captions, self.words).to(self.device)
        seeds = [cm.hashed_seed("image", seed, i) for i in range(len(captions))]
        noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]

        def predict(x, t):
            eps = net(x, t, ids)
            return eps + guidance * (eps - net(x, t, 0 * ids)) if guidance else eps

        x, alpha_bar = torch.stack(noise).to(self.device), cm.make_alpha_bar().tolist()
        return self.decoded(cm.ddim(predict, x, alpha_bar, SAMPLE_STEPS))


def scores(setting, judge, images, captions, labels):
    """{"FD Few": ..., "colour overall": ...}, overall and by split, of generated images."""
    real, _ = fid.extract(judge, setting.images, "real images")
    features, logits = fid.extract(judge, images, "generated images")
    right, row = {"shape": logits.argmax(1).cpu().numpy() == labels}, {}
    for kind, words in zip(("colour", "place"), shapes.read(images), strict=True):
        right[kind] = np.array([word in caption for word, caption in
                                zip(words, captions, strict=True)])
    for name, classes in (cm.splits(setting.counts) | {"overall": labels}).items():
        ours, theirs = (np.isin(y, classes) for y in (labels, setting.labels))
        row[f"FD {name}"] = fid.frechet_distance(real[theirs], features[ours])
        row |= {f"{kind} {name}": float(values[ours].mean()) for kind, values in right.items()}
    return row


def measure(setting, method, seed, guidance):
    """A row: train, draw as many images of each class with captions of their own, judge."""
    test, _, test_labels = shapes.captioned_images(100, seed=99)
    judge = common.judge(setting.images, torch.from_numpy(setting.labels),
                         (test, torch.from_numpy(test_labels)), len(setting.counts),
                         setting.device, setting.args.runs / "judge")
    images, captions, labels = shapes.captioned_images(setting.args.num_images, 100 + seed)
    x = (setting.decoded(setting.latents(images)) if method == "autoencoder" else
         setting.drawn(method, seed, captions, guidance))
    return [scores(setting, judge, x, captions, labels)]


def draw(setting, captions, path, columns=6):
    """Beside each caption: images of the balanced set, DDPM's and CM's with guidance."""
    many = [caption for caption in captions for _ in range(columns)]
    real = torch.zeros(len(captions), columns, *setting.images.shape[1:], dtype=torch.uint8)
    for row, caption in zip(real, captions, strict=True):
        alike = setting.images[[other == caption for other in setting.captions]][:columns]
        row[:len(alike)] = alike
    drawn = {method: setting.drawn(method, setting.args.seeds[0], many, GUIDANCE)
             for method in METHODS}
    path.parent.mkdir(parents=True, exist_ok=True)
    cm.draw_panels({"real": real.flatten(0, 1)} | drawn, captions, path)


@common.interruptible
def main(argv=None):
    parser = common.parser(__file__, __doc__, seeds=(10, 11, 12))
    parser.add_argument("--n-max", type=int, default=1000, help="largest class [%(default)s]")
    parser.add_argument("--ir", type=float, default=100, help="imbalance ratio [%(default)s]")
    parser.add_argument("--steps", type=int, default=4000, help="of training [%(default)s]")
    parser.add_argument("--num-images", type=int, default=100, help="a class [%(default)s]")
    parser.add_argument("--prompt", help="draw this into RUNS/prompt.png, and do nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # results repeat only with the same number of threads
    setting = functools.cache(lambda: Setting(args))
    if args.prompt is not None:
        draw(setting(), [args.prompt], args.runs / "prompt.png")
        return
    if not args.table:
        keys = [dict(seed=seed, method=method, guidance=w)
                for seed in args.seeds for method, w in POINTS]
        options = (f"--n-max {args.n_max} --ir {args.ir:g} --steps {args.steps} "
                   f"--num-images {args.num_images}")
        common.study(args.rows, options, keys, lambda **key: measure(setting(), **key))
    rows = common.numbers(common.read_table(args.rows), ("method", "options"))
    print(shared.compared(rows, SHOWN, ["DDPM"], by=["guidance"]))
    if all((args.runs / f"{method}-{args.seeds[0]}.pt").is_file() for method in METHODS):
        firsts = np.unique(setting().labels, return_index=True)[1]  # an image of each shape
        captions = [setting().captions[i] for i in firsts]
        draw(setting(), captions, args.assets / "text_to_image.png")


if __name__ == "__main__":
    main()
