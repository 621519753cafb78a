"""Tests of the classifiers, `python -m experiments.classification` and its downstream."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision

import cm
import fid
from experiments import common
from experiments.classification import __main__ as cls
from experiments.classification import classifiers, downstream

COUNTS = torch.tensor([40.0, 10.0, 5.0, 2.0], dtype=torch.float64)
Y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3])


def tiny():
    """A Network of four classes with A and B, in training mode, and images for Y, in float64."""
    torch.manual_seed(0)
    net = classifiers.Network(*classifiers.SMALL, 1, 4)
    classifiers.reserve(net)
    for layer in cm.reserved_layers(net):
        layer.B.data.add_(0.3 * torch.randn_like(layer.B))
    return net.double(), torch.randn(12, 1, 16, 16, dtype=torch.float64)


def close(ours, theirs, **tolerance):
    return all(torch.allclose(a, b, **tolerance) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("base", ["LDAM", "LA"])
def test_base_losses_and_gradients_as_the_papers_write_them(base):
    torch.manual_seed(0)
    net, h = classifiers.CosineHead(6, 4).double(), torch.randn(12, 6, dtype=torch.float64)
    cosines = F.cosine_similarity(h.requires_grad_()[:, None], net.weight[None], dim=2)
    one_hot = F.one_hot(Y)
    if base == "LA":  # Menon et al., Eq. (10): -log of pi_y e^f_y over the sum of pi_y' e^f_y'
        odds = COUNTS / COUNTS.sum() * torch.exp(30 * cosines)
    else:  # Cao et al., Eq. (13), with C = 0.5 n_min^(1/4) and s = 30
        odds = torch.exp(30 * (cosines - one_hot * 0.5 * COUNTS.min()**0.25 / COUNTS**0.25))
    expected = -torch.log((odds * one_hot).sum(1) / odds.sum(1))

    base_loss, loss_cm = classifiers.losses(net, h, Y, COUNTS, base)
    assert torch.allclose(base_loss, expected, rtol=1e-6) and not loss_cm.any()
    ours, theirs = (torch.autograd.grad(z.mean(), (h, net.weight)) for z in (base_loss, expected))
    assert close(ours, theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("base, w_div", [("LA", 1.0), ("LDAM", 0.2)])
def test_L_CM_is_the_divergence_of_two_plain_networks(base, w_div):
    net, x = tiny()
    plain, parameters = cm.merge(net), dict(net.named_parameters())

    def odds(with_ba):
        """exp(logits / 1.5) in training mode, so by the batch's own statistics."""
        weights = {name: p for name, p in parameters.items() if not name.endswith((".A", ".B"))}
        for name in [name for name in weights if ".layer." in name]:
            path, w_g = name.removesuffix("layer.weight"), weights.pop(name)
            ba = parameters[path + "B"] @ parameters[path + "A"]
            weights[path + "weight"] = w_g + with_ba * ba.view_as(w_g)
        return torch.exp(torch.func.functional_call(plain, weights, (x,)) / 1.5)

    p, q = COUNTS / COUNTS.sum(), 1 / COUNTS / (1 / COUNTS).sum()
    ours = odds(True) * p**(1 / 1.5) if base == "LA" else odds(True)
    ours, general = (o / o.sum(1, keepdim=True) for o in (ours, odds(False)))
    expected = (p - w_div * q)[Y] * (ours * (ours / general).log()).sum(1)
    assert (expected > 0).any() and (expected < 0).any()

    loss_cm = classifiers.losses(net, x, Y, COUNTS, base, w_div)[1]
    assert torch.allclose(loss_cm, expected, rtol=1e-5, atol=1e-9)
    ours, theirs = (torch.autograd.grad(z.mean(), list(parameters.values()))
                    for z in (loss_cm, expected))  # theta and theta_g both get gradient
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item()), name


def test_resnet18_is_torchvisions_with_another_stem_and_head():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=100)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    theirs.fc = torch.nn.Linear(512, 100, bias=False)
    ours = classifiers.Network(*classifiers.RESNET18, 3, 100)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.ndim < 4 or p.std().item() == pytest.approx((2 / p[:, 0].numel())**0.5, rel=0.1)
        p.data.copy_(q)
    x = torch.randn(2, 3, 16, 16)
    logits = theirs(x)
    theirs.fc = torch.nn.Identity()
    lengths = theirs(x).norm(dim=1)[:, None] * ours.head.weight.norm(dim=1)
    assert torch.allclose(ours(x), 30 * logits / lengths, rtol=1e-4, atol=1e-4)


def test_capacity_is_reserved_in_all_convolutions_and_the_head():
    net = classifiers.Network(*classifiers.SMALL, 3, 10)
    classifiers.reserve(net)
    assert len(cm.reserved_layers(net)) == 1 + 4 * 2 + 3 + 1  # stem, blocks, shortcuts, head
    for name, rank in {"stem.0": 3, "stages.0.conv2": 6, "stages.1.downsample.0": 2,
                       "head": 4}.items():  # kh int(0.15 min(in, out)), at least kh
        layer = net.get_submodule(name)
        assert layer.B.shape[1] == layer.A.shape[0] == rank, name


def test_running_statistics_are_moved_by_thetas_pass_alone():
    net, x = tiny()
    plain = cm.merge(net)
    before = [b.clone() for b in net.buffers()]
    classifiers.losses(net, x, Y, COUNTS, "CE", 1.0)
    plain(x)
    assert close(net.buffers(), plain.buffers()) and not close(net.buffers(), before)
    assert torch.allclose(plain.eval()(x), net.eval()(x))  # what is tested is what was trained


def test_theta_g_gets_statistics_of_its_own(monkeypatch):
    monkeypatch.setattr(classifiers, "BATCH", 60)
    net, x = tiny()
    net(x)  # theta's statistics, which don't count
    net = net.float().eval()
    images = torch.randint(256, (90, 1, 16, 16), dtype=torch.uint8)
    found = classifiers.general(net, images)
    assert not cm.reserved_layers(found) and not found.training
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    x = cm.to_float(images[order])
    with torch.no_grad():
        means = [net.stem[0](part).mean((0, 2, 3)) for part in (x[:60], x[60:])]
    assert torch.allclose(found.stem[1].running_mean, sum(means) / 2, atol=1e-5)
    assert torch.equal(found.head.weight, net.head.layer.weight)  # W_g alone


def test_batches_pass_over_all_images_in_orders_of_their_own():
    passes = torch.cat([classifiers.batch_of(i, 4, 10, seed=3) for i in range(1, 11)]).view(4, 10)
    assert all(sorted(order.tolist()) == list(range(10)) for order in passes)
    assert len({tuple(order.tolist()) for order in passes}) == 4
    assert not torch.equal(passes[0][:4], classifiers.batch_of(1, 4, 10, seed=4))
    assert len(classifiers.batch_of(2, 7, 3, seed=3)) == 7  # of more than two passes


def test_augmented_images_are_windows_of_the_padded_one_half_of_them_flipped():
    torch.manual_seed(0)
    x, seen = torch.randn(60, 2, 8, 8), []
    for image, new in zip(x, classifiers.augmented(x), strict=True):
        padded = F.pad(image, (1, 1, 1, 1), value=-1.0)
        fits = [(i, j, flip) for i in range(3) for j in range(3) for flip in (False, True)
                if torch.equal(new.flip(2) if flip else new, padded[:, i:i + 8, j:j + 8])]
        assert len(fits) == 1
        seen += fits
    assert len(set(seen)) > 14 and 20 < sum(flip for *_, flip in seen) < 40


@pytest.mark.parametrize("base, w_div", [("LDAM", None), ("LA", 1.0)])
def test_fit_is_sgd_with_torchs_own_cosine(base, w_div, tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "BATCH", 8)
    torch.manual_seed(1)
    images, labels = torch.randint(256, (20, 1, 16, 16), dtype=torch.uint8), torch.arange(20) // 12
    net = classifiers.fit("fashion16", classifiers.Images(images, labels), [12, 8], base, 3, 5,
                          tmp_path / "x.pt", "", w_div)
    torch.manual_seed(cm.hashed_seed("weights", 3))
    theirs = classifiers.Network(*classifiers.SMALL, 1, 2)
    if w_div is not None:  # drawn last, so that a plain run starts from the same weights
        classifiers.reserve(theirs)
    theirs = cm.lay_out(theirs, torch.device("cpu"))  # another would round otherwise
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 5)
    for i in range(1, 6):
        index = classifiers.batch_of(i, 8, 20, 3)
        parts = classifiers.losses(theirs, images[index] / 127.5 - 1, labels[index],
                                   torch.tensor([12.0, 8.0]), base, w_div)
        sgd.zero_grad()
        sum(parts).mean().backward()
        sgd.step()
        cosine.step()
    assert not net.training and list(net.state_dict()) == list(theirs.state_dict())
    assert close(net.state_dict().values(), theirs.state_dict().values(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dataset, balanced, share", [("fashion", False, 0.1),
                                                      ("cifar10", True, 0.5)])
def test_batches_are_balanced_or_not_and_CIFARs_augmented(
        dataset, balanced, share, tmp_path, monkeypatch):
    seen, augmented = [], []
    monkeypatch.setattr(classifiers, "losses", lambda net, x, y, *rest: (
        seen.append(y), net(x).sum(1), torch.zeros(1))[1:])
    monkeypatch.setattr(classifiers, "augmented", lambda x: augmented.append(1) or x)
    monkeypatch.setattr(classifiers, "RESNET18", classifiers.SMALL)
    training = classifiers.Images(torch.zeros(100, 1, 8, 8, dtype=torch.uint8),
                                  torch.arange(100) // 90)
    classifiers.fit(dataset, training, [90, 10], "CE", 0, 5, tmp_path / "x", "", balanced=balanced)
    assert torch.cat(seen).double().mean() == pytest.approx(share, abs=0.06)
    assert len(augmented) == (5 if dataset == "cifar10" else 0)


def test_measures_are_scikit_learns_means_over_classes():
    metrics = pytest.importorskip("sklearn.metrics")
    true, taken = torch.randint(5, (300,)), torch.randint(4, (300,))  # 4 is never predicted
    net = lambda x: F.one_hot(((x + 1) * 127.5).round().long().flatten(), 5)
    data = SimpleNamespace(names="abcde", held_out_labels=true,
                           held_out=taken.byte()[:, None, None, None])
    found = classifiers.confusion(net, data)
    assert found.tolist() == metrics.confusion_matrix(true, taken).tolist()

    precision, recall = metrics.precision_recall_fscore_support(true, taken, zero_division=0)[:2]
    groups = cm.splits([50, 40, 30, 20, 10])  # one, one and three classes
    recalls = [recall[:1].mean(), recall[1:2].mean(), recall[2:].mean()]
    ours = downstream.scores(found, [50, 40, 30, 20, 10])
    assert list(ours.values()) == pytest.approx([precision.mean(), recall.mean(), *recalls])
    assert list(ours) == ["precision", "recall", "recall Many", "recall Medium", "recall Few"]
    ours = cls.accuracies(net, data, groups, "general")
    assert list(ours.values()) == pytest.approx([*recalls, recall.mean()])
    assert list(ours) == [f"general {name}" for name in ("Many", "Medium", "Few", "overall")]
    assert [k.tolist() for k in cls.by_shots([101, 100, 20, 19]).values()] == [[0], [1, 2], [3]]


def test_a_row_is_of_theta_and_theta_g_or_says_where_it_ran_off(monkeypatch):
    net, x = tiny()
    fit, seen = mock.Mock(return_value=net.float().eval()), {}
    monkeypatch.setattr(classifiers, "fit", fit)
    monkeypatch.setattr(cls, "accuracies", lambda plain, data, groups, kind: (
        seen.update({kind: plain.head.weight, "groups": groups}), {})[1])
    data = SimpleNamespace(images=cm.to_uint8(x), labels=Y, counts=torch.tensor([101, 9, 5, 2]))
    args = SimpleNamespace(epochs=11, runs=Path("runs"))
    for dataset, few in (("cifar100", 3), ("cifar10", 2)):
        run = SimpleNamespace(dataset=dataset), data, args, "options", "LA", "CM", 5
        cls.measure(*run)
        fit.assert_called_with(dataset, data, data.counts, "LA", 5, 2, Path("runs/LA-CM-5.pt"),
                               "options", 1.0)
        assert len(seen["groups"]["Few"]) == few
    theta_g = net.head.layer.weight
    assert torch.equal(seen["general"], theta_g) and torch.equal(seen["accuracy"], net.head.weight)
    assert not torch.equal(seen["accuracy"], theta_g)
    fit.side_effect = FloatingPointError("x: the loss is not finite at step 9")
    assert cls.measure(*run) == [{"status": "not finite at step 9"}]


def make_setup(path, *flags):
    args = SimpleNamespace(runs=path, generator_seeds=[5, 6], classifier_steps=3)
    config = cm.Config(ir=6, n_max=12, image_size=8).resolved()
    return downstream.Setup(args, config, ["--n-max", "12", *flags])


def test_generators_differ_in_what_they_say(tmp_path, monkeypatch):
    made, drawn = [], []
    monkeypatch.setattr(common, "run", lambda flags, out: made.append(cm.parse(flags)[0]))
    monkeypatch.setattr(cm, "generate", drawn.append)
    setup = make_setup(tmp_path, "--preset", "paper")  # whose base is OC
    for generator, no_cm, resample in (("DDPM", True, 1), ("RS", True, 0.5), ("CM", False, 1)):
        path = setup.samples(generator, 1.5, 7)
        how, drawn_by = made[-1], drawn[-1]
        assert (how.no_cm, how.resample, how.seed, how.base) == (no_cm, resample, 7, "ddpm")
        assert Path(drawn_by.out) == path and path.parent == Path(drawn_by.sample).parent
        assert (drawn_by.guidance, drawn_by.seed) == (1.5, 7)
        assert drawn_by.num_images == 5 * len(setup.data.labels)
    path.parent.mkdir()
    path.touch()
    assert setup.samples("CM", 1.5, 7) == path and len(drawn) == 3  # not drawn again
    assert make_setup(tmp_path, "--steps", "5").samples("CM", 1.5, 7).parent != path.parent
    monkeypatch.setattr(common, "run", lambda *_: "not finite between steps 0 and 2")
    with pytest.raises(FloatingPointError, match="CM-8-.*: not finite between steps 0 and 2"):
        setup.samples("CM", 0, 8)


def test_classifiers_are_trained_on_what_their_setting_says(tmp_path, monkeypatch):
    setup, fit, samples = make_setup(tmp_path), mock.Mock(), mock.Mock()
    images, labels = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8), torch.arange(50) % 10
    monkeypatch.setattr(setup, "samples", samples)
    monkeypatch.setattr(fid, "read_images", lambda path: (images, labels, None))
    monkeypatch.setattr(setup, "label_accuracy", lambda *_: {})
    monkeypatch.setattr(classifiers, "fit", fit)
    monkeypatch.setattr(classifiers, "confusion", lambda net, data: torch.eye(10))
    for setting, w, seed in (("real images", "", 20), ("re-sampling", "", 20), ("LA", "", 20),
                             ("CM", 1.5, 20), ("RS", 0, 21)):
        [row] = setup.measure(setting, w, seed)
        training = fit.call_args.args[1]
        fit.assert_called_with("fashion16", training, setup.data.counts,
                               "LA" if setting == "LA" else "CE", seed, 3,
                               tmp_path / f"{setting}-{w}-{seed}.pt", setup.options,
                               balanced=setting == "re-sampling")
        n = 50 if setting in ("CM", "RS") else 0  # new images
        assert torch.equal(training.images, torch.cat([setup.data.images, images[:n]]))
        assert torch.equal(training.labels, torch.cat([setup.data.labels, labels[:n]]))
    assert samples.call_args_list == [mock.call("CM", 1.5, 5), mock.call("RS", 0, 6)]
    assert row["generator seed"] == 6


def test_the_judge_of_labels_is_trained_on_the_whole_balanced_set(
        fewer_images, tmp_path, monkeypatch):
    fewer_images(20, 4)
    train = mock.Mock(return_value=(fid.Classifier(1, 10), 0.5))
    monkeypatch.setattr(fid, "train_classifier", train)
    labels = torch.arange(30) % 10
    monkeypatch.setattr(fid, "extract", lambda net, images, what: (
        None, F.one_hot(torch.where(labels == 9, 0, labels), 10)))  # it takes class 9 for 0
    for _ in range(2):  # then it is kept
        found = make_setup(tmp_path).label_accuracy(torch.zeros(30, 1, 8, 8), labels)
        assert list(found.values()) == pytest.approx([0.9, 0.75])  # of all, of Few
    _, of_training, _, of_test, *_ = train.call_args.args
    assert of_training.bincount().tolist() == [20] * 10 and of_test.bincount().tolist() == [4] * 10
    assert train.call_count == 1 and train.call_args.kwargs == {"seed": 2}  # FD's have 0 and 1


MINIATURE = "--n-max 12 --ir 6 --image-size 8 --seeds 5 --runs runs --rows rows.csv --assets . "
GENERATOR = ("--channels 4 --multipliers 1 2 --batch-size 4 --steps 3 --classifier-steps 3 "
             "--generator-seeds 5")


@pytest.fixture
def small(fewer_images, monkeypatch):
    """20 images a class to train, 4 to test; small batches; one base, one guidance."""
    fewer_images(20, 4)
    monkeypatch.setattr(classifiers, "BATCH", 16)
    monkeypatch.setattr(classifiers, "BASES", ("LA",))
    monkeypatch.setattr(downstream, "GUIDANCE", (1.5,))
    monkeypatch.setattr(cm, "report", lambda *_: None)  # it takes the longest
    train = fid.train_classifier
    monkeypatch.setattr(fid, "train_classifier", lambda *a, **how: train(*a, **how | {"steps": 2}))


@pytest.mark.parametrize("script, flags, kills, rows, options", [
    (cls, "--epochs 2", [(classifiers, "losses", 13)], 3, "--epochs 2"),
    (downstream, GENERATOR, [(classifiers, "losses", 5), (cm, "update", 4)], 6,
     "--classifier-steps 3 --generator-seeds [5]")])
def test_a_miniature_stopped_and_resumed_ends_with_the_same_rows(
        script, flags, kills, rows, options, small, stopped_and_whole):
    stopped_and_whole(script.main, (MINIATURE + flags).split(), *kills)
    written = common.read_rows(Path("rows.csv"))
    assert len(written) == rows and written["options"].str.contains(options, regex=False).all()
    assert Path("downstream.png").is_file() == (script is downstream)
