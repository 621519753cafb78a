"""Tests of finetune.py and pretrained.py. They need pandas and tabulate; the pipeline's need
diffusers and transformers."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm
import fid

pytest.importorskip("pandas")
pytest.importorskip("tabulate")
from experiments import common  # noqa: E402
from experiments.settings.finetune import __main__ as ft  # noqa: E402
from experiments.settings.finetune import pretrained  # noqa: E402

torch.set_num_threads(1)  # results repeat with as many threads
SMALL = dict(image_size=8, channels=8, multipliers=(1, 2), batch_size=4, dropout=0.0)
ARGS = ["--n-max", "8", "--ir", "2", "--steps", "3", "--ranks", "4", "2",
        "--pretrain-steps", "2", "--num-images", "100", "--seeds", "5", "--runs", "runs",
        "--rows", "rows.csv", "--assets", "."]


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
    (nn.Linear(6, 7), torch.randn(5, 6)), (nn.Linear(6, 7, bias=False), torch.randn(2, 3, 6)),
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
    with cm.general_only(net):
        assert torch.allclose(net(x), general, atol=1e-5)
        merged = cm.merge(net)
    assert torch.allclose(merged(x), general, atol=1e-5)
    assert type(merged[0]) is type(layer) and merged.state_dict().keys() == nn.Sequential(
        layer).state_dict().keys()
    assert torch.allclose(net(x), whole, atol=1e-5)  # untouched, and back to theta
    assert torch.allclose(cm.merge(nn.Sequential(lora))(x), general, atol=1e-5)


def ranks(network):
    """{layer's name: (r of LoRA, r of B_e A_e)}"""
    named = dict(network.named_modules())
    found = {name: [m.A.shape[0], 0] for name, m in named.items() if isinstance(m, ft.LoRA)}
    for name, m in named.items():
        if isinstance(m, ft.Reserved):
            found[f"{name}.layer"][1] = m.A.shape[0]
    return {name.removesuffix(".layer"): tuple(pair) for name, pair in found.items()}


def test_general_factors_lie_in_every_layer_and_reserved_ones_in_the_decoder():
    networks = {}
    for method in ft.METHODS:
        networks[method] = plain_unet()
        ft.add_factors(networks[method], networks[method].decoder, method, 4, 2)
    # 4 < min(d, k) everywhere but in the first and the last layer, from and to one channel
    layers = {name: layer for name, layer in plain_unet().named_modules()
              if isinstance(layer, (nn.Conv2d, nn.Linear))
              and name not in ("encoder.0", "decoder.5.2")}
    last = plain_unet().decoder[-1][-1]
    assert last.weight.shape[0] == 1 and len(layers) > 20
    for method, inside in (("LoRA r_g", (4, 0)), ("LoRA r_g + r_e", (6, 0)), ("CM", (4, 2))):
        found = ranks(networks[method])
        assert found.keys() == layers.keys()
        for name, pair in found.items():
            assert pair == (inside if name.startswith("decoder.") else (4, 0)), name
    trained = {method: sum(p.numel() for p in net.parameters() if p.requires_grad)
               for method, net in networks.items()}
    assert trained["CM"] == trained["LoRA r_g + r_e"] > trained["LoRA r_g"]
    wide = plain_unet()
    ft.add_factors(wide, wide.decoder, "CM", 8, 7)
    for name, layer in layers.items():  # r_g < min(d, k), or nothing at all
        side = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else 1
        narrow = side * min(layer.weight.shape[:2])
        assert (name in ranks(wide)) == (narrow > 8), name
    assert 0 < len(ranks(wide)) < len(layers)


@pytest.mark.parametrize("r_g, r_e", [(2, 2), (2, 3), (4, 0), (48, 2), (99, 2)])
def test_ranks_that_are_refused(r_g, r_e):
    net = plain_unet()
    with pytest.raises(ValueError, match=f"--ranks are {r_g} {r_e}"):
        ft.add_factors(net, net.decoder, "LoRA r_g", r_g, r_e)
    assert not ranks(net)


# ------------------------------------------------------------------------------------------------
# Training


def setting(**options):
    """As pretrained.Unlabelled, without its training: 8x8 noise of four classes."""
    config = cm.Config(**dict(image_size=8, channels=8, multipliers=(1, 2),
                              batch_size=4, lr=1e-2, steps=4, seed=3) | options).resolved()
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    data = object.__new__(cm.Data)
    vars(data).update(images=torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8), labels=labels,
                      counts=labels.bincount(), names=list("abcd"),
                      starts=torch.tensor([0, 4, 6, 7]))
    made = object.__new__(pretrained.Unlabelled)
    before = cm.UNet(4, 1, 8, 8, (1, 2), 1, (), 0.0)
    made.config, made.data, made.batches, made.alpha_bar = config, data, data, cm.make_alpha_bar()
    made.state = randomised(before).state_dict()
    return made, before


@pytest.mark.parametrize("method", ft.METHODS)
def test_fine_tuning_starts_from_the_pre_trained_network_exactly(method):
    made, before = setting()
    net, decoder = made.network()
    ft.add_factors(net.eval(), decoder, method, 4, 2)
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, -1])
    unlabelled = before(x, t, torch.full_like(y, -1))
    assert torch.equal(net(x, t, y), unlabelled)
    net.label_embedding.weight.data.normal_()
    assert not torch.allclose(net(x, t, y)[:2], unlabelled[:2])


@pytest.mark.parametrize("method", ft.METHODS)
def test_only_factors_and_labels_are_trained_and_end_as_their_averages(
        method, tmp_path, monkeypatch):
    made, _ = setting(no_cm=method != "CM")
    net, decoder = made.network()
    ft.add_factors(net, decoder, method, 4, 2)
    before = copy.deepcopy(net.state_dict())
    trainable = [name for name in before if name.endswith((".A", ".B"))] + [
        "label_embedding.weight"]
    values = []

    def recorded(loss, parameters, *rest, update=cm.update):
        update(loss, parameters, *rest)
        for name, p in net.named_parameters():
            assert (p.grad is not None) == (name in trainable), name
        values.append([p.detach().clone() for p in parameters])

    monkeypatch.setattr(cm, "update", recorded)
    ft.fine_tune(net, made, made.config, tmp_path / "x.pt", "")
    assert not net.training and len(values) == 4
    average = [before[name] for name, p in net.named_parameters() if p.requires_grad]
    for i, now in enumerate(values, 1):
        decay = (1 + i) / (10 + i)
        average = [decay * a + (1 - decay) * p for a, p in zip(average, now, strict=True)]
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    assert [name for name, _ in named] == sorted(trainable, key=list(before).index)
    for (name, p), expected in zip(named, average, strict=True):
        assert torch.allclose(p, expected, atol=1e-6) and not torch.equal(p, before[name]), name
    for name, p in net.state_dict().items():
        if name not in trainable:
            assert p.numpy().tobytes() == before[name].numpy().tobytes(), name
    saved = torch.load(tmp_path / "x.pt")["state"]
    size = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(p.numel() for p in saved["trained"].values()) == size  # without W_f


def test_decay_rate_and_weight_decay_reach_the_optimiser(tmp_path, monkeypatch):
    made, _ = setting(no_cm=True)
    net, decoder = made.network()
    ft.add_factors(net, decoder, "LoRA r_g", 4, 2)
    seen = []
    monkeypatch.setattr(cm, "update", lambda *rest: seen.append(rest))
    ft.fine_tune(net, made, made.config, tmp_path / "x.pt", "")
    group = seen[0][3].param_groups[0]
    assert type(seen[0][3]) is torch.optim.AdamW
    assert (group["lr"], group["weight_decay"]) == (made.config.lr, 1e-6)
    assert len({rest[0].item() for rest in seen}) == 4  # another batch a step


def fake_scores(path, dataset, data, features, **_):
    assert (dataset, data, features) == ("fashion16", None, "classifier")
    images, labels, counts = fid.read_images(path)
    assert labels.bincount().tolist() == [10] * 10 and len(counts) == 10
    value = images.float().mean().item()
    return {s: dict(FD=value, recall=value / 255, accuracy=0.5)
            for s in ("overall", "Many", "Medium", "Few")}


@pytest.fixture
def small(monkeypatch, fewer_images):
    monkeypatch.setitem(cm.PRESETS, "small", cm.PRESETS["small"] | SMALL)
    fewer_images(20, 4)
    monkeypatch.setattr(fid, "evaluate", fake_scores)
    monkeypatch.setattr(ft, "SAMPLE_STEPS", 2)
    monkeypatch.setattr(cm, "report", lambda *_: None)  # of the pre-training


def test_a_miniature_stopped_and_resumed_ends_bit_for_bit(
        small, kills_at, tmp_path, monkeypatch, capsys):
    results, seen = {}, []

    def recorded(unet, counts, config, make=cm.CapacityManipulation.from_config):
        seen.append((config.no_cm, config.seed))
        return make(unet, counts, config)

    losses, starts, sampled, update, sample = [], [], [], cm.update, cm.sample
    monkeypatch.setattr(cm, "CapacityManipulation",  # not pre-training's
                        SimpleNamespace(from_config=recorded))
    monkeypatch.setattr(cm, "update", lambda loss, *rest: (
        losses.append(loss.item()), starts.append([p.detach().clone() for p in rest[0][:8]]),
        update(loss, *rest))[2])
    monkeypatch.setattr(cm, "sample", lambda net, y, *how: (
        sampled.append((y.tolist(), *how)), sample(net, y, *how))[1])
    for name, kills in (("whole", ()), ("stopped", (2, 10))):  # in pre-training; CM's second step
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if kills:  # and once more, before there was a checkpoint
            Path("runs/pretrained").mkdir(parents=True)
            Path("runs/pretrained/log.csv").write_text("step")
        for call in kills:
            with monkeypatch.context() as patch:
                patch.setattr(cm, "update", kills_at(call, update))
                with pytest.raises(SystemExit) as stopped:
                    ft.main(ARGS)
            assert stopped.value.code == 130
        assert Path("rows.csv").is_file() == (name == "stopped")
        capsys.readouterr()
        assert ft.main(ARGS) == 0
        out = capsys.readouterr().out
        results[name] = (Path("rows.csv").read_bytes(), out[out.index("exploratory"):],
                         fid.read_images(Path("runs/cm-5/general-100-g1.5.npz"))[0].tolist(),
                         torch.load("runs/cm-5/cm-5.pt")["state"]["ema"])
        assert Path("finetune.png").is_file()
    # two steps of pre-training, then each method's first: weights, batch and noise are the same
    assert losses[5:9:3] == pytest.approx(2 * losses[2:3], 1e-5)
    assert all(map(torch.equal, starts[2], starts[8]))  # LoRA's and CM's factors, of the encoder
    seeds = [cm.hashed_seed("image", 5, i) for i in range(100)]
    how = [i % 10 for i in range(100)], torch.Size([1, 8, 8]), "ddim", 2, 1.5, seeds
    assert sampled[:4] == 4 * [how]  # both LoRAs, CM, its theta_g: labels, steps, noise
    rows, out = results["whole"][:2]
    assert results["stopped"][:3] == results["whole"][:3]
    assert seen[:3] == [(True, 5), (True, 5), (False, 5)]
    before, unet, counts = cm.load_trained("runs/pretrained/checkpoint.pt")
    assert before.label_drop == 1 and not before.flip and counts == 10 * [20]
    weights = results["whole"][3]
    assert all(torch.equal(p, results["stopped"][3][n]) for n, p in weights.items())
    assert "exploratory: 1 seeds" in out and "CM − (LoRA r_g)" in out
    methods = [line.split(",")[0].strip('"') for line in rows.decode().splitlines()]
    assert methods == ["method", "LoRA r_g", "LoRA r_g + r_e", "CM", "CM"]
    images = {file: fid.read_images(Path("runs", file)) for file in (
        "lora-5/samples-100-g1.5.npz", "cm-5/samples-100-g1.5.npz", "cm-5/general-100-g1.5.npz")}
    a, b, c = images.values()
    assert not torch.equal(a[0], b[0]) and not torch.equal(b[0], c[0])

    assert ft.main([*ARGS, "--table"]) == 0 and capsys.readouterr().out == out
    Path("runs/lora-5/lora-5.pt").unlink()  # its samples aren't another network's
    with pytest.raises(SystemExit):  # lora-wide-5 still has its checkpoint
        ft.main([*ARGS, "--rows", "new.csv", "--lr", "0.5"])
    assert "lora-wide-5.pt is no checkpoint" in capsys.readouterr().err.splitlines()[-1]
    assert not torch.equal(fid.read_images(Path("runs/lora-5/samples-100-g1.5.npz"))[0], a[0])
    Path("new.csv").unlink()
    monkeypatch.setattr(cm, "update", None)  # nothing is trained or measured again
    monkeypatch.setattr(fid, "evaluate", None)
    assert ft.main(ARGS) == 0 and capsys.readouterr().out == out
    for other, says in (("--lr 1", "other options"), ("--num-images 200", "other options"),
                        ("--ranks 5 2", "other options"), ("--seeds 6 --lr 1", "other options"),
                        ("--rows new.csv --pretrain-steps 1", "--steps is 1; it must be at least"),
                        ("--rows new.csv --lr 1", "lora-5.pt is no checkpoint to go on from"),
                        ("--seeds 5 5", "different numbers"), ("--rows .", "directory")):
        with pytest.raises(SystemExit) as stopped:
            ft.main([*ARGS, *other.split()])
        err = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and says in err[-1]
        assert len(err) == 1 or "new.csv" in other, err  # the latter has shown progress


@pytest.mark.parametrize("arguments, says", [
    ("--num-images 9", "--num-images"), ("--seeds -1", "--seeds"), ("--seeds x", "invalid int"),
    ("--pretrain-steps 0", "--pretrain-steps"), ("--ranks 2 8", "--ranks are 2 8"),
    ("--ranks 96 8", "R_G < 96"), ("--ranks 8", "expected 2"), ("--data none", "none"),
    ("--rank-ratio 0.1", "--rank-ratio has no meaning"), ("--warmup 9", "--warmup has no meaning"),
    ("--channels 8", "--channels has no meaning"), ("--no-cm", "--no-cm has no meaning"),
    ("--sampler dpm", "--sampler has no meaning"), ("--table", "has no rows"),
    ("--pretrained none --data .", "none has no model_index.json"),
    ("--pretrained none --table", "has no table"),
    ("--prompt {}", "--prompt has no meaning without")])
def test_bad_input_is_one_line_and_status_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ft.main(["--rows", "rows.csv", "--assets", ".", *arguments.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


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


def loaded(pipeline, cache, **options):
    config = cm.Config(**dict(dataset="folder", data=str(pipeline[1]), ir=4, batch_size=4, lr=1e-2,
                              base="ddpm", flip=False, steps=2, seed=3) | options).resolved()
    return pretrained.StableDiffusion(pipeline[0], config, cache, "the {} style")


def test_labels_stand_for_prompts_and_batches_are_latents(pipeline, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline
    made = loaded(pipeline, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(pipeline[0], safety_checker=None)
    net, decoder = made.network()
    assert decoder is net.unet.up_blocks and made.data.counts.tolist() == [8, 4, 2]
    assert made.config.image_size == 16 and made.steps(100) == 350  # of 14 images by 4
    for y, prompt in ((0, "the art nouveau style"), (1, "the realism style"), (-1, "")):
        ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        expected = pipe.text_encoder(ids)[0]
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
        assert torch.allclose(net(x, t, torch.tensor([y])), pipe.unet(x, t, expected).sample,
                              atol=1e-5), prompt

    means = pipe.vae.encode(made.data.images.float() / 127.5 - 1).latent_dist.mode()
    latents, y = made.batches.batch(64, 1.0, made.config.flip)
    for latent, k in zip(latents, y, strict=True):  # 0.2: the autoencoder's own factor
        of_class = 0.2 * means[made.data.labels == k]
        assert (latent - of_class).abs().amax((1, 2, 3)).min() < 1e-4
    again = loaded(pipeline, tmp_path)
    monkeypatch.setattr(again.pipe.vae, "encode", None)  # it is computed once
    assert torch.equal(again.batches.images, made.batches.images)


def test_one_step_on_a_pipeline_is_eq_4_with_its_own_noise(pipeline, tmp_path, monkeypatch):
    from diffusers import DDPMScheduler
    made = loaded(pipeline, tmp_path, lam=0.5, w_div=0.8, div_margin=0.01)
    net, decoder = made.network()
    ft.add_factors(net, decoder, "CM", 3, 2)
    assert all(p.requires_grad == name.endswith((".A", ".B"))
               for name, p in net.named_parameters())
    for layer in cm.reserved_layers(net):
        layer.B.data.normal_(0, 0.3)
    seen = []
    monkeypatch.setattr(cm, "update", lambda loss, *_: seen.append(loss))
    ft.fine_tune(net, made, made.config, tmp_path / "x.pt", "")
    for i, total in enumerate(seen, 1):
        x0, y, t, eps, y_in = cm.draw_batch(made.batches, made.config, 4, i)
        scheduler = DDPMScheduler.from_pretrained(pipeline[0], subfolder="scheduler")
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


def run(arguments, pipeline):
    return ft.main([
        "--pretrained", str(pipeline[0]), "--data", str(pipeline[1]), "--ir", "4", "--batch-size",
        "4", "--ranks", "3", "2", "--num-images", "100", "--seeds", "5", "--runs", "runs",
        *arguments.split()])


def test_a_tiny_pipeline_is_tuned_sampled_and_loaded_again(
        pipeline, kills_at, tmp_path, monkeypatch, capsys):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ft, "SAMPLE_STEPS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(cm, "update", kills_at(5, cm.update))  # CM's first step
        with pytest.raises(SystemExit) as stopped:
            run("--steps 2 --guidance 0.5 --lr 0.01", pipeline)
    assert stopped.value.code == 130
    assert run("--steps 2 --guidance 0.5 --lr 0.01", pipeline) == 0
    out = capsys.readouterr().out
    directory = Path("runs/tiny")
    assert out.splitlines()[-1] == (f"python fid.py {directory}/cm-5/general-100-g0.5.npz "
                                    f"--dataset folder --data {pipeline[1]}")
    sampled = {name: fid.read_images(directory / name) for name in (
        "lora-5/samples-100-g0.5.npz", "cm-5/samples-100-g0.5.npz", "cm-5/general-100-g0.5.npz")}
    for name, (images, labels, counts) in sampled.items():
        assert images.shape == (100, 3, 16, 16) and list(counts) == [8, 4, 2]
        assert labels.tolist() == [i % 3 for i in range(100)]
        with np.load(directory / name) as file:
            assert [file[k].item() for k in ("guidance", "sampler", "sample_steps")] == [
                0.5, "ddim", 2]
        grid = Image.open((directory / name).with_suffix(".png"))
        assert grid.size == (8 * 18 + 2, 3 * 18 + 2)  # torchvision's borders of 2
    a, b, c = (images for images, _, _ in sampled.values())
    assert not torch.equal(a, b) and not torch.equal(b, c)
    assert (directory / "finetune.png").is_file()

    # what a user of diffusers does with the result
    pipe = StableDiffusionPipeline.from_pretrained(
        pipeline[0], unet=UNet2DConditionModel.from_pretrained(directory / "cm-5" / "unet"),
        safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    generators = [torch.Generator().manual_seed(cm.hashed_seed("image", 5, i)) for i in (1, 2)]
    images = pipe(["a realism painting", "a ukiyo e painting"], num_inference_steps=2,
                  guidance_scale=1.5, generator=generators, output_type="np").images
    images = torch.from_numpy(images).permute(0, 3, 1, 2) * 255
    assert (images - sampled["cm-5/samples-100-g0.5.npz"][0][1:3]).abs().max() < 1.01

    monkeypatch.setattr(cm, "update", None)  # all is there; guidance is for sampling only
    assert run("--steps 2 --guidance 0 --lr 0.01", pipeline) == 0
    plain = fid.read_images(directory / "cm-5/samples-100.npz")[0]
    assert not torch.equal(plain, sampled["cm-5/samples-100-g0.5.npz"][0])
    monkeypatch.setattr(pretrained.StableDiffusion, "images", None)
    assert run("--steps 2 --guidance 0.5 --lr 0.01", pipeline) == 0
    for other, says in (("--lr 0.02", "other options"), ("--lr 0.01 --prompt {}", "other options"),
                        ("--prompt painting", "it must hold {} once")):
        with pytest.raises(SystemExit) as stopped:
            run("--steps 2 --guidance 0.5 " + other, pipeline)
        assert stopped.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


def test_without_steps_it_is_a_hundred_epochs_and_v_prediction_is_refused(
        pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(ft, "samples", lambda setting, *_: (
        seen.append((setting.config.steps, setting.config.flip, setting.config.lr,
                     setting.config.batch_size)), ({}, 0))[1])
    monkeypatch.setattr(ft, "draw", lambda *_: None)
    assert run("", pipeline) == 0
    assert seen == 3 * [(350, False, 3e-4, 4)]
    other = tmp_path / "v"
    other.mkdir()
    for part in pipeline[0].iterdir():
        (other / part.name).symlink_to(part)
    (other / "scheduler").unlink()
    (other / "scheduler").mkdir()
    name = "scheduler/scheduler_config.json"
    options = json.loads((pipeline[0] / name).read_text()) | dict(prediction_type="v_prediction")
    (other / name).write_text(json.dumps(options))
    with pytest.raises(SystemExit) as stopped:
        run("", (other, pipeline[1]))
    assert stopped.value.code == 2 and "predicts v_prediction" in capsys.readouterr().err


def test_the_table_pairs_by_seed():
    rows = [dict(method=m, seed=seed, trained=1234) | {name: value + seed for name in ft.SHOWN}
            for m, value in (("LoRA r_g", 5), ("CM", 3)) for seed in (1, 2)]
    text = ft.table(common.numbers(common.text(rows), ("method",)))
    lines = [line for line in text.splitlines() if line.startswith(("| LoRA", "| CM"))]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:4] == ["LoRA r_g", "1,234", "2", "6.5 ± 0.7"]
    assert cells[2][:2] == ["CM − (LoRA r_g)", "-2.0 [-2.0, -2.0]"]
    assert "exploratory: 2 seeds" in text and len(lines) == 3


def test_readme_counts_stable_diffusions_parameters():
    """The real UNet, built without storage."""
    diffusers = pytest.importorskip("diffusers")
    from torch._subclasses import FakeTensorMode
    readme = Path(__file__).with_name("README.md").read_text()
    for method in ("LoRA r_g", "CM"):
        with FakeTensorMode():
            unet = diffusers.UNet2DConditionModel(
                block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
                attention_head_dim=8).requires_grad_(False)
            frozen = sum(p.numel() for p in unet.parameters())
            ft.add_factors(unet, unet.up_blocks, method, 128, 8)
        trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        assert f"W_f, {frozen / 1e6:.1f} M parameters" in readme
        assert f"{trained / 1e6:.1f} M ({method})" in readme
