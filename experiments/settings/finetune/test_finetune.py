"""Tests of fine-tuning. The pipeline's need diffusers and transformers."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cm
import fid
from experiments.settings import shared
from experiments.settings.finetune import __main__ as ft

torch.set_num_threads(1)  # results repeat with as many threads


def randomised(network, spread=0.1):
    torch.manual_seed(1)
    for p in network.parameters():
        p.data.add_(spread * torch.randn_like(p))
    return network


def plain_unet():
    torch.manual_seed(0)
    return randomised(cm.UNet(4, 1, 8, 8, (1, 2), 1, (), 0.0)).requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# W = W_f + B_g A_g + B_e A_e


@pytest.mark.parametrize("layer, x", [
    (nn.Linear(6, 7, bias=False), torch.randn(2, 3, 6)),
    (nn.Conv2d(6, 8, 3, 2, 1, groups=2, padding_mode="circular"), torch.randn(2, 6, 9, 9))])
def test_a_layer_sums_the_outputs_of_its_three_weights(layer, x):
    d, k, _ = cm.matrix_and_rank(layer, 1)
    net = randomised(nn.Sequential(ft.Reserved(ft.LoRA(copy.deepcopy(layer), d, k, 3), d, k, 2)))
    reserved = net[0]
    lora = reserved.layer
    layer = lora.layer  # W_f, randomised

    def with_weight(weight, x):
        plain = copy.deepcopy(layer)
        plain.weight = nn.Parameter(weight.view_as(plain.weight))
        plain.bias = None
        return plain(x)

    general = layer(x) + with_weight(lora.B @ lora.A, x)
    whole = general + with_weight(reserved.B @ reserved.A, x)
    assert (whole - general).abs().mean() > 1e-2 and (general - layer(x)).abs().mean() > 1e-2
    assert torch.allclose(net(x), whole, atol=1e-5)
    assert torch.allclose(cm.merge(net)(x), whole, atol=1e-5)
    with cm.general_only(net):  # theta_g keeps LoRA
        assert torch.allclose(net(x), general, atol=1e-5)
        merged = cm.merge(net)
    assert torch.allclose(merged(x), general, atol=1e-5)
    assert type(merged[0]) is type(layer) and merged.state_dict().keys() == nn.Sequential(
        layer).state_dict().keys()
    assert torch.allclose(net(x), whole, atol=1e-5)  # untouched, and back to theta


def ranks(network):
    """{layer's name: (r of LoRA, r of B_e A_e)}"""
    named = dict(network.named_modules())
    found = {name: [m.A.shape[0], 0] for name, m in named.items() if isinstance(m, ft.LoRA)}
    for name, m in named.items():
        if isinstance(m, ft.Reserved):
            found[f"{name}.layer"][1] = m.A.shape[0]
    return {name.removesuffix(".layer"): tuple(pair) for name, pair in found.items()}


def test_general_factors_lie_in_every_layer_and_reserved_ones_in_the_decoder():
    # r_g = 4 < min(d, k) everywhere but in the first and the last layer, from and to one channel
    layers = {name: layer for name, layer in plain_unet().named_modules()
              if isinstance(layer, (nn.Conv2d, nn.Linear))
              and name not in ("encoder.0", "decoder.5.2")}
    trained = {}
    for method, inside in (("LoRA r_g", (4, 0)), ("LoRA r_g + r_e", (6, 0)), ("CM", (4, 2))):
        net = plain_unet()
        ft.add_factors(net, net.decoder, method, 4, 2)
        assert ranks(net) == {name: inside if name.startswith("decoder.") else (4, 0)
                              for name in layers}
        trained[method] = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained["CM"] == trained["LoRA r_g + r_e"] > trained["LoRA r_g"]
    wide = plain_unet()
    ft.add_factors(wide, wide.decoder, "CM", 8, 7)
    for name, layer in layers.items():  # r_g < min(d, k), or nothing at all
        side = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else 1
        assert (name in ranks(wide)) == (side * min(layer.weight.shape[:2]) > 8), name
    for r_g, r_e in ((2, 2), (4, 0), (48, 2)):
        with pytest.raises(ValueError, match=f"--ranks are {r_g} {r_e}"):
            ft.add_factors(plain_unet(), plain_unet().decoder, "CM", r_g, r_e)


# ------------------------------------------------------------------------------------------------
# cm.py's network


def setting(**options):
    """ft.Unlabelled, without its training, on 8x8 noise of four classes, and its network before."""
    config = cm.Config(**dict(image_size=8, channels=8, multipliers=(1, 2),
                              batch_size=4, lr=1e-2, steps=4, seed=3) | options).resolved()
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    data = object.__new__(cm.Data)
    vars(data).update(images=torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8), labels=labels,
                      counts=labels.bincount(), names=list("abcd"),
                      starts=torch.tensor([0, 4, 6, 7]))
    made = object.__new__(ft.Unlabelled)
    before = cm.UNet(4, 1, 8, 8, (1, 2), 1, (), 0.0)
    made.config, made.data, made.batches, made.alpha_bar = config, data, data, cm.make_alpha_bar()
    made.state = randomised(before).state_dict()
    return made, before


@pytest.mark.parametrize("method", ft.METHODS)
def test_fine_tuning_starts_from_the_pre_trained_network_and_moves_factors_and_labels_alone(
        method, tmp_path, monkeypatch):
    made, unlabelled = setting(no_cm=method != "CM")
    net, decoder = made.network()
    ft.add_factors(net.eval(), decoder, method, 4, 2)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, -1])
    assert torch.equal(net(x, t, y), unlabelled(x, t, torch.full_like(y, -1)))

    before, fit, how = copy.deepcopy(net.state_dict()), shared.fit, {}
    monkeypatch.setattr(shared, "fit", lambda *run, **more: (how.update(more), fit(*run, **more)))
    ft.fine_tune(net, made, made.config, tmp_path / "x.pt", "")
    for name, p in net.state_dict().items():
        moves = name.endswith((".A", ".B")) or name == "label_embedding.weight"
        assert torch.equal(p, before[name]) != moves, name
    assert how["weight_decay"] == 1e-6 and not how["fp16"]


ARGS = ["--n-max", "8", "--ir", "2", "--steps", "3", "--ranks", "4", "2", "--num-images", "20",
        "--seeds", "5", "--runs", "runs", "--rows", "rows.csv", "--assets", "."]


def test_a_miniature_stopped_and_resumed_ends_bit_for_bit(
        stopped_and_whole, fewer_images, monkeypatch, capsys):
    small = dict(image_size=8, channels=8, multipliers=(1, 2), batch_size=4)
    monkeypatch.setitem(cm.PRESETS, "small", cm.PRESETS["small"] | small)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    fewer_images(20, 4)
    monkeypatch.setattr(shared, "scores", lambda file, config, device, cache, names: (
        dict.fromkeys(names, float(fid.read_images(file)[0].float().mean()))))
    monkeypatch.setattr(cm, "report", lambda *_: None)  # of the pre-training
    monkeypatch.setattr(ft, "PRETRAIN_STEPS", 2)
    monkeypatch.setattr(ft, "SAMPLE_STEPS", 2)
    losses, factors, update = [], [], cm.update
    monkeypatch.setattr(cm, "update", lambda loss, *rest: (
        losses.append(loss.item()), factors.append([p.detach().clone() for p in rest[0][:8]]),
        update(loss, *rest))[2])
    out = stopped_and_whole(ft.main, ARGS, 2, 10)  # in pre-training; CM's second step
    assert "CM − (LoRA r_g + r_e)" in out
    images = [fid.read_images(path)[0] for path in sorted(Path("runs").glob("*.npz"))]
    assert len(images) == 4 and not any(map(torch.equal, images, images[1:]))
    # after two steps of pre-training, three of each method, with the same weights, batch and noise
    assert losses[5:9:3] == pytest.approx(2 * losses[2:3], 1e-5)
    assert all(map(torch.equal, factors[2], factors[8]))  # LoRA's and CM's, of the encoder
    before, _, counts = cm.load_trained("runs/pretrained/checkpoint.pt")
    assert before.label_drop == 1 and not before.flip and counts == 10 * [20]

    monkeypatch.setattr(cm, "update", None)  # nothing is trained again
    ft.main(ARGS)
    assert capsys.readouterr().out == out
    for other, says in (("--ranks 5 2", "other options"), ("--num-images 30", "other options"),
                        ("--rows new.csv --lr 1", "lora-5.pt is no checkpoint to go on from")):
        with pytest.raises(SystemExit):
            ft.main([*ARGS, *other.split()])
        assert says in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------
# A Stable Diffusion, tiny and of random weights


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """(the directory of a pipeline of 16x16 images, an image tree of three classes)"""
    diffusers, transformers = map(pytest.importorskip, ("diffusers", "transformers"))
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    levels = dict(norm_num_groups=2, layers_per_block=1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **levels)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=2 * ("DownEncoderBlock2D",),
        up_block_types=2 * ("UpDecoderBlock2D",), scaling_factor=0.2, **levels)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=40)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40, bos_token_id=52, eos_token_id=53))
    scheduler = diffusers.PNDMScheduler(  # Stable Diffusion 1's
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        skip_prk_steps=True)
    diffusers.StableDiffusionPipeline(
        vae=randomised(vae), text_encoder=randomised(text), tokenizer=tokenizer,
        unet=randomised(unet), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).save_pretrained(root / "tiny")
    for name in ("art_nouveau", "realism", "ukiyo_e"):
        (root / "tree" / name).mkdir(parents=True)
        for i in range(8):
            x = np.random.RandomState(i).randint(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(x).save(root / "tree" / name / f"{i}.png")
    return root / "tiny", root / "tree"


def loaded(pipeline, **options):
    config = cm.Config(**dict(dataset="folder", data=str(pipeline[1]), ir=4, batch_size=4, lr=1e-2,
                              base="ddpm", steps=2, seed=3) | options).resolved()
    return ft.StableDiffusion(pipeline[0], config, "the {} style")


def test_labels_stand_for_prompts_and_batches_are_latents(pipeline):
    from diffusers import StableDiffusionPipeline
    made = loaded(pipeline)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline[0], safety_checker=None)
    net, decoder = made.network()
    assert decoder is net.unet.up_blocks and made.data.counts.tolist() == [8, 4, 2]
    for y, prompt in ((0, "the art nouveau style"), (1, "the realism style"), (-1, "")):
        ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
        expected = pipe.unet(x, t, pipe.text_encoder(ids)[0]).sample
        assert torch.allclose(net(x, t, torch.tensor([y])), expected, atol=1e-5), prompt

    means = pipe.vae.encode(made.data.images.float() / 127.5 - 1).latent_dist.mode()
    latents, y = made.batches.batch(64, 1.0, made.config.flip)
    for latent, k in zip(latents, y, strict=True):  # 0.2: the autoencoder's own factor
        of_class = 0.2 * means[made.data.labels == k]
        assert (latent - of_class).abs().amax((1, 2, 3)).min() < 1e-4


def test_one_step_on_a_pipeline_is_eq_4_with_its_own_noise(pipeline, tmp_path, monkeypatch):
    from diffusers import DDPMScheduler
    made = loaded(pipeline, lam=0.5, w_div=0.8, div_margin=0.01)
    net, decoder = made.network()
    ft.add_factors(net, decoder, "CM", 3, 2)
    assert all(p.requires_grad == name.endswith((".A", ".B"))
               for name, p in net.named_parameters())
    for layer in cm.reserved_layers(net):
        layer.B.data.normal_(0, 0.3)
    seen = []
    monkeypatch.setattr(cm, "update", lambda loss, *_: seen.append(loss))
    ft.fine_tune(copy.deepcopy(net), made, made.config, tmp_path / "x.pt", "")
    scheduler = DDPMScheduler.from_pretrained(pipeline[0], subfolder="scheduler")
    for i, total in enumerate(seen, 1):
        x0, y, t, eps, y_in = cm.draw_batch(made.batches, made.config, 4, i)
        x_t, prompts = scheduler.add_noise(x0, eps, t), made.prompts[y_in]
        theta = net.unet(x_t, t, prompts).sample
        with cm.general_only(net):
            theta_g = net.unet(x_t, t, prompts).sample
        n = torch.tensor([8, 4, 2.0])
        w = (3 * n / 14 - 0.8 * 3 / (n * (1 / n).sum()))[y]
        d = (theta - theta_g).square().mean((1, 2, 3))
        assert d.min() > 1e-4
        expected = F.mse_loss(theta, eps) + 0.5 * torch.where(w > 0, w * d, w * d.clamp(
            max=0.01)).mean()
        assert total.item() == pytest.approx(expected.item(), rel=1e-4)


def tune(arguments, pipeline):
    ft.main(["--pretrained", str(pipeline[0]), "--data", str(pipeline[1]), "--ir", "4",
             "--batch-size", "4", "--ranks", "3", "2", "--num-images", "9", "--seeds", "5",
             "--runs", "runs", *arguments.split()])


def test_a_tiny_pipeline_is_tuned_sampled_and_loaded_again(
        pipeline, kills_at, tmp_path, monkeypatch, capsys):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ft, "SAMPLE_STEPS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(cm, "update", kills_at(5, cm.update))  # CM's first step
        with pytest.raises(SystemExit):
            tune("--steps 2 --guidance 0.5 --lr 0.01", pipeline)
    capsys.readouterr()
    tune("--steps 2 --guidance 0.5 --lr 0.01", pipeline)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"python fid.py runs/tiny/cm-general-5-9-g0.5.npz --dataset folder --data {pipeline[1]}")
    files = [f"runs/tiny/{name}-5-9-g0.5.npz" for name in ("lora", "cm", "cm-general")]
    images, labels, counts = fid.read_images(Path(files[0]))
    assert images.shape == (9, 3, 16, 16) and list(counts) == [8, 4, 2]
    a, b, c = (fid.read_images(Path(file))[0] for file in files)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    assert Path("runs/tiny/finetune.png").is_file()

    # what a user of diffusers does with the result
    pipe = StableDiffusionPipeline.from_pretrained(
        pipeline[0], unet=UNet2DConditionModel.from_pretrained("runs/tiny/cm-5"),
        safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    generators = [torch.Generator().manual_seed(cm.hashed_seed("image", 5, i)) for i in (1, 2)]
    images = pipe(["a realism painting", "a ukiyo e painting"], num_inference_steps=2,
                  guidance_scale=1.5, generator=generators, output_type="np").images
    images = torch.from_numpy(images).permute(0, 3, 1, 2) * 255
    assert (images - b[1:3]).abs().max() < 1.01

    monkeypatch.setattr(cm, "update", None)  # all is there; guidance is for sampling only
    tune("--steps 2 --guidance 0 --lr 0.01", pipeline)
    assert not torch.equal(fid.read_images(Path("runs/tiny/cm-5-9-g0.npz"))[0], b)


def test_without_steps_it_is_a_hundred_epochs_and_other_noise_is_refused(pipeline, monkeypatch):
    seen = []
    monkeypatch.setattr(ft, "run", lambda setting, *_: (seen.append(setting.config), ({}, 0))[1])
    tune("", pipeline)
    assert [(c.steps, c.flip, c.lr) for c in seen] == 3 * [(350, False, 3e-4)]  # of 14 images by 4
    monkeypatch.setattr(cm, "T", 999)
    with pytest.raises(ValueError, match="predicts epsilon over 1000 steps; it must be"):
        loaded(pipeline)
