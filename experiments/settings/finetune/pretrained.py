"""What finetune.py fine-tunes: a network of cm.py, and a Stable Diffusion in diffusers' format.

Both are a `setting` of finetune.py, with
    data: cm.Data of pixels; batches: cm.Data of what is trained on, pixels or latents;
    config: cm.Config; alpha_bar [T] float64; sample_batch: images sampled at a time;
    network(): (the frozen network, which takes labels y, the part of it that is the decoder);
    images(net, y, steps, seeds): samples, uint8 [B, H, W, C].
It has no command line. StableDiffusion needs diffusers and transformers.
"""

import copy
import dataclasses
import functools
import math

import numpy as np
import torch
import torchvision
from torch import nn
from tqdm import tqdm

import cm
import fid


class Unlabelled:
    """cm.py's network, which cm.py trains on the whole set without its labels, once, in the
    directory `out`. Raises ValueError where that was done with other options."""

    sample_batch = 250

    def __init__(self, config, out, steps):
        self.config, self.data = config, cm.Data(config, cm.pick_device(config.device))
        self.batches, self.alpha_bar = self.data, cm.make_alpha_bar()
        begun = (out / "checkpoint.pt").is_file()
        before = cm.Config(
            dataset=config.dataset, data=config.data, device=config.device, ir=1.0, flip=False,
            label_drop=1.0, no_cm=True, steps=steps, out=str(out), resume=begun,
            overwrite=not begun).resolved()
        cm.train(before, set(cm.stored_options(before)) - {"data"})
        self.state = cm.load_trained(out / "checkpoint.pt")[1].state_dict()

    def network(self):
        """(the frozen network, its decoder). The labels' embedding, trained in full, starts at 0:
        fine-tuning starts from the pre-trained network."""
        unet = cm.make_unet(dataclasses.replace(self.config, no_cm=True), len(self.data.names),
                            self.data.images.shape[1]).requires_grad_(False)
        label = unet.label_embedding.requires_grad_(True).weight
        unet.load_state_dict(self.state | {"label_embedding.weight": torch.zeros_like(label)})
        return unet, unet.decoder

    def images(self, net, y, steps, seeds):
        """uint8 [B, H, W, C] of labels y [B] and a seed each, by DDIM."""
        shape, guidance = self.data.images.shape[1:], self.config.guidance
        x = cm.sample(net, y, shape, "ddim", steps, guidance, seeds)
        return cm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


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
    """A pipeline, and the images of config.data, an image tree, at its size.

    prompt: a class's, whose name, _ read as a blank, stands for {}. The images' latents are
    computed once, into the directory `cache`. Raises ValueError."""

    sample_batch = 16

    def __init__(self, directory, config, cache, prompt):
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        if not (directory / "model_index.json").is_file():
            raise ValueError(f"{directory} has no model_index.json; --pretrained must name the "
                             "directory of a Stable Diffusion in diffusers' format")
        if prompt.count("{}") != 1:
            raise ValueError(f"--prompt is {prompt!r}; it must hold {{}} once, for the class")
        try:
            pipe = StableDiffusionPipeline.from_pretrained(directory, local_files_only=True,
                                                           safety_checker=None)
        except Exception as e:  # diffusers raises nearly anything on broken files
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise ValueError(f"{directory} can't be loaded as a Stable Diffusion ({reason})"
                             ) from None
        self.pipe = pipe
        noise = pipe.scheduler.config
        if noise.prediction_type != "epsilon" or noise.num_train_timesteps != cm.T:
            raise ValueError(f"{directory} predicts {noise.prediction_type} over "
                             f"{noise.num_train_timesteps} steps; it must be epsilon over {cm.T}")
        self.cache = cache
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.config = dataclasses.replace(config, image_size=size)
        device = cm.pick_device(config.device)
        self.data = cm.Data(self.config, device)

        self.unet = pipe.unet.float()  # stays on the CPU, runs take copies
        pipe.unet = None
        pipe.to(device).set_progress_bar_config(disable=True)
        # DDIMScheduler's own default would clip latents to [-1, 1]
        pipe.scheduler = DDIMScheduler.from_config(noise, clip_sample=False)
        self.alpha_bar = pipe.scheduler.alphas_cumprod.double()
        prompts = [prompt.replace("{}", name.replace("_", " ")) for name in self.data.names]
        with torch.no_grad():
            self.prompts = pipe.encode_prompt([*prompts, ""], device, 1, False)[0]

    @functools.cached_property
    def batches(self):
        """cm.Data whose images are latents z [N, 4, h, w], means of the posterior, stored as
        127.5 (z + 1): what cm.draw_batch makes z of, as it maps pixels."""
        vae, images = self.pipe.vae, self.data.images

        @torch.no_grad()
        def encoded():
            parts = tqdm(images.split(self.sample_batch), "latents", unit="batch")
            return torch.cat([vae.encode(cm.to_float(x)).latent_dist.mode().cpu() for x in parts])

        # the key's part for the autoencoder: hashing its 84 M weights would take longer
        weights = sum(p.double().abs().sum().item() for p in vae.parameters())
        key = images.cpu().numpy().tobytes(), tuple(images.shape), weights
        latents = fid.cached(self.cache, "latents", key, encoded).to(images.device)
        batches = copy.copy(self.data)
        batches.images = 127.5 * (vae.config.scaling_factor * latents + 1)
        return batches

    def made_of(self):
        """Sums that change with the pipeline and the images: for a checkpoint's options."""
        weights = sum(p.double().abs().sum().item() for p in self.unet.parameters())
        return f"weights {weights:.9g}, latents {self.batches.images.double().abs().sum():.9g}"

    def steps(self, epochs):
        return math.ceil(epochs * len(self.data.images) / self.config.batch_size)

    def network(self):
        """(the frozen network, its decoder)"""
        unet = copy.deepcopy(self.unet).requires_grad_(False)
        return Prompted(unet, self.prompts), unet.up_blocks

    def images(self, net, y, steps, seeds):
        """uint8 [B, H, W, C] of labels y [B] and a seed each, by DDIM, from the pipeline itself."""
        self.pipe.unet = net.unet
        empty = net.prompts[torch.full_like(y, -1)]
        x = self.pipe(prompt_embeds=net.prompts[y], negative_prompt_embeds=empty,
                      num_inference_steps=steps, guidance_scale=1 + self.config.guidance,
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                      output_type="np").images
        return (255 * x).round().astype(np.uint8)


def draw_grid(path, columns=8):
    """Beside an .npz of samples a .png of them at full size, a row a class."""
    images, labels, _ = fid.read_images(path)
    columns = min(columns, int(labels.bincount().min()))
    rows = torch.cat([images[labels == k][:columns] for k in labels.unique()])
    cm.write_atomically(path.with_suffix(".png"), lambda p: torchvision.utils.save_image(
        rows / 255, p, nrow=columns))
