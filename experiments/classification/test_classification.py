"""Tests of classification.py and classifiers.py. They need pandas and tabulate."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm

pd = pytest.importorskip("pandas")
pytest.importorskip("tabulate")
from experiments.classification import __main__ as cls  # noqa: E402
from experiments import common  # noqa: E402
from experiments.classification import classifiers  # noqa: E402

torch.set_num_threads(1)  # results repeat with as many threads
COUNTS = torch.tensor([40.0, 10.0, 5.0, 2.0])
ARGS = ["--n-max", "12", "--ir", "6", "--epochs", "3", "--bases", "LA",
        "--seeds", "5", "--runs", "runs", "--rows", "rows.csv", "--assets", "."]


def tiny(b=0.0):
    """A Network of four classes with A and B, B of spread b, in training mode, and a batch of 12.
    """
    torch.manual_seed(0)
    net = classifiers.Network("small", 1, 4)
    classifiers.reserve(net)
    for layer in cm.reserved_layers(net):
        layer.B.data.add_(b * torch.randn_like(layer.B))
    return net, torch.randn(12, 1, 16, 16), torch.arange(12) % 4


def norms(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def statistics(module):
    return [b.clone() for m in norms(module) for b in m.buffers()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------
# Losses


def written_out(base, h, weight, y, drw):
    """A base loss of features h [B, D], sample by sample, from the papers' own formulas."""
    n, total, norm = COUNTS.double(), 0, 0
    for features, label in zip(h, y.tolist(), strict=True):
        cosines = weight @ features / weight.norm(dim=1) / features.norm()
        if base == "LA":  # Menon et al., Eq. (10): -log of pi_y e^f_y over the sum of pi_y' e^f_y'
            odds = n / n.sum() * torch.exp(30 * cosines)
        else:  # Cao et al., Eq. (13), with C = 0.5 n_min^(1/4) and s = 30
            margin = 0.5 * n.min()**0.25 / n[label]**0.25
            odds = torch.exp(30 * torch.stack([
                c - margin if k == label else c for k, c in enumerate(cosines)]))
        share = (1 - 0.9999) / (1 - 0.9999**n[label]) if drw else 1.0
        total, norm = total - share * torch.log(odds[label] / odds.sum()), norm + share
    return total / norm


@pytest.mark.parametrize("base, late", [("LDAM", True), ("LA", False), ("LDAM-DRW", True),
                                        ("LDAM-DRW", False)])
def test_base_losses_and_gradients_as_the_papers_write_them(base, late):
    net, x, y = tiny()
    net, y = cm.merge(net).double(), y.flip(0) // 2 * 2 // 3 + y % 3  # not as many of each
    h = net.stages(net.stem(x.double())).mean((2, 3)).detach().requires_grad_()
    theirs = h.detach().clone().requires_grad_()
    weight = net.head.weight.detach().clone().requires_grad_()
    expected = written_out(base, theirs, weight, y, base == "LDAM-DRW" and late)
    expected.backward()

    net.stem, net.stages = torch.nn.Identity(), torch.nn.Identity()
    total, _, loss_cm = classifiers.losses(net, h[:, :, None, None], y, COUNTS.double(), base,
                                          late)
    total.backward()
    assert torch.allclose(total, expected, rtol=1e-6) and loss_cm.abs().max() == 0
    assert torch.allclose(h.grad, theirs.grad, rtol=1e-4, atol=1e-9)
    assert torch.allclose(net.head.weight.grad, weight.grad, rtol=1e-4, atol=1e-9)


def test_on_balanced_data_LA_is_cross_entropy_and_L_CM_nothing():
    net, x, y = tiny(b=0.3)
    balanced = torch.full((4,), 7.0)
    la, ce = (classifiers.losses(net, x, y, balanced, base) for base in ("LA", "CE"))
    assert torch.allclose(la[0], ce[0], rtol=1e-6) and torch.allclose(la[1], ce[1], rtol=1e-5)
    assert la[2].abs().max() == ce[2].abs().max() == 0
    other = classifiers.losses(net, x, y, COUNTS, "LA")
    assert not torch.allclose(other[1], ce[1], rtol=0.1) and other[2].abs().min() > 0


@pytest.mark.parametrize("base", ["LA", "LDAM"])
def test_L_CM_is_the_divergence_of_two_plain_networks(base):
    net, x, y = tiny(b=0.3)
    net, x, counts = net.double(), x.double(), COUNTS.double()
    plain, parameters = cm.merge(net), dict(net.named_parameters())
    logits = []
    for with_ba in (False, True):  # in training mode: by its own batch's statistics
        weights = {}
        for name, p in parameters.items():
            if name.endswith(".layer.weight"):
                path = name.removesuffix("layer.weight")
                ba = parameters[path + "B"] @ parameters[path + "A"]
                weights[path + "weight"] = p + with_ba * ba.view_as(p)
            elif not name.endswith((".A", ".B")):
                weights[name] = p
        logits.append(torch.func.functional_call(plain, weights, (x,)))
    p, q = counts / counts.sum(), 1 / counts / (1 / counts).sum()
    odds_g, odds = (torch.exp(z / 1.5) for z in logits)
    if base == "LA":
        odds = odds * p**(1 / 1.5)
    ours, general = (o / o.sum(1, keepdim=True) for o in (odds, odds_g))
    expected = (p - q)[y] * sum(ours[:, k] * (ours[:, k] / general[:, k]).log() for k in range(4))
    assert (expected > 0).any() and (expected < 0).any()
    total, base_loss, loss_cm = classifiers.losses(net, x, y, counts, base)
    assert torch.allclose(loss_cm, expected, rtol=1e-5, atol=1e-9)
    assert torch.allclose(total, base_loss.mean() + loss_cm.mean())
    everything = list(parameters.values())  # theta and theta_g both get gradient
    ours, theirs = (torch.autograd.grad(z.mean(), everything, allow_unused=True)
                    for z in (loss_cm, expected))
    moved = 0
    for (name, _), a, b in zip(parameters.items(), ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item()), name
            moved += name.endswith((".A", ".B", ".layer.weight")) and a.abs().sum() > 0
    assert moved == 3 * len(cm.reserved_layers(net))


def test_without_BA_loss_and_general_gradients_are_the_plain_steps():
    net, x, y = tiny()
    plain = cm.merge(net)
    ours = classifiers.losses(net, x, y, COUNTS, "CE")
    theirs = classifiers.losses(plain, x, y, COUNTS, "CE")
    assert torch.equal(ours[0], theirs[0]) and ours[2].abs().max() == 0
    ours[0].backward()
    theirs[0].backward()
    mine = {n.replace(".layer.", "."): p.grad for n, p in net.named_parameters()}
    for name, p in plain.named_parameters():
        assert p.grad.abs().sum() > 0, name
        assert torch.allclose(mine[name], p.grad, rtol=1e-4, atol=1e-6), name
    assert all(layer.B.grad.abs().sum() > 0 for layer in cm.reserved_layers(net))


# ------------------------------------------------------------------------------------------------
# Network and batch normalisation


def test_resnet18_is_torchvisions_with_another_stem_and_head():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=100)
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = torch.nn.Identity()
    theirs.fc = torch.nn.Linear(512, 100, bias=False)
    ours = classifiers.Network("resnet18", 3, 100)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.ndim < 4 or p.std().item() == pytest.approx((2 / p[:, 0].numel())**0.5, rel=0.1)
        p.data.copy_(q)
    x = torch.randn(2, 3, 16, 16)
    logits = theirs(x)
    theirs.fc = torch.nn.Identity()
    lengths = theirs(x).norm(dim=1)[:, None] * ours.head.weight.norm(dim=1)
    assert torch.allclose(ours(x), 30 * logits / lengths, rtol=1e-4, atol=1e-4)


def test_weights_start_alike_with_and_without_CM(tmp_path, monkeypatch):
    training = classifiers.Images(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.arange(4))
    starts = []
    monkeypatch.setattr(common, "train", lambda step, state, *_: starts.append(
        {name.replace(".layer.", "."): p for name, p in state["net"].named_parameters()}))
    for with_cm in (False, True):
        classifiers.fit("small", training, [1] * 4, "CE", 5, 1, tmp_path, "", with_cm)
    for name, p in starts[0].items():
        assert torch.equal(p, starts[1][name]), name
    assert len(starts[1]) > len(starts[0])


def test_theta_and_theta_g_are_reported_as_what_they_are(tmp_path, monkeypatch):
    net, x, y = tiny(b=0.3)
    monkeypatch.setattr(classifiers, "fit", lambda *_, **__: net.eval())
    seen = {}
    monkeypatch.setattr(classifiers, "accuracies", lambda plain, judged, groups, kind: (
        seen.update({kind: plain}), {})[1])
    images = classifiers.Images(cm.to_uint8(x), y)
    args = SimpleNamespace(epochs=1, dataset="fashion16", network="small", runs=tmp_path)
    key = dict(zip(cls.KEY, ("LA", "CM", 5), strict=True))
    cls.measure(args, key, (images, images, list("abcd")), "options")
    theta = cm.merge(net).state_dict()
    with cm.general_only(net):
        theta_g = cm.merge(net).state_dict()
    for kind, expected in (("accuracy", theta), ("general", theta_g)):
        found = seen[kind].state_dict()
        assert all(torch.equal(found[n], p) for n, p in expected.items() if n.endswith("weight"))
    assert not torch.equal(theta["stages.0.conv1.weight"], theta_g["stages.0.conv1.weight"])


def test_capacity_is_reserved_in_all_convolutions_and_the_head():
    net = classifiers.Network("small", 3, 10)
    classifiers.reserve(net)
    # kh int(0.15 min(in, out)), at least kh
    ranks = {"stem.0": 3, "stages.0.conv2": 6, "stages.1.downsample.0": 2, "stages.3.conv2": 57,
             "head": 4}
    assert len(cm.reserved_layers(net)) == 1 + 4 * 2 + 3 + 1  # stem, blocks, shortcuts, head
    for name, rank in ranks.items():
        layer = net.get_submodule(name)
        assert layer.B.shape[1] == layer.A.shape[0] == rank, name


def test_running_statistics_are_moved_by_thetas_pass_alone():
    net, x, y = tiny(b=0.3)
    plain = cm.merge(net)
    classifiers.losses(net, x, y, COUNTS, "CE")
    before = statistics(plain)
    plain(x)
    assert equal(statistics(net), statistics(plain)) and not equal(statistics(net), before)
    assert all(m.track_running_stats for m in norms(net))
    with pytest.raises(ZeroDivisionError), classifiers.statistics_kept(net):
        raise ZeroDivisionError
    assert all(m.track_running_stats for m in norms(net))


def test_merged_logits_are_the_factorised_ones_in_eval_mode():
    net, x, y = tiny(b=0.3)
    for _ in range(3):  # statistics that aren't 0 and 1
        classifiers.losses(net, x, y, COUNTS, "CE")
    merged = cm.merge(net.eval())
    assert torch.allclose(merged(x), net(x), rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(classifiers.Network("small", 1, 4).state_dict())
    with cm.general_only(net):
        assert not torch.allclose(merged(x), net(x), rtol=0.1, atol=0.1)


def test_theta_g_gets_statistics_of_its_own():
    net, x, _ = tiny(b=0.3)
    net(x)  # theta's statistics, which don't count
    net.eval()
    images = torch.randint(256, (90, 1, 16, 16), dtype=torch.uint8)
    before = statistics(net)
    found = classifiers.general(net, images, batch=60)
    assert equal(statistics(net), before) and not net.training and not found.training
    assert not cm.reserved_layers(found) and cm.reserved_layers(net)
    x = cm.to_float(images[torch.randperm(90, generator=torch.Generator().manual_seed(0))])
    with cm.general_only(net), torch.no_grad():
        parts = [net.stem[0](part) for part in (x[:60], x[60:])]
    means = torch.stack([h.mean((0, 2, 3)) for h in parts]).mean(0)
    variances = torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in parts]).mean(0)
    assert torch.allclose(found.stem[1].running_mean, means, atol=1e-5)
    assert torch.allclose(found.stem[1].running_var, variances, rtol=1e-4)
    block = found.stages[0].conv1
    assert torch.equal(block.weight, net.stages[0].conv1.layer.weight)


# ------------------------------------------------------------------------------------------------
# Data and training


@pytest.fixture
def few(fewer_images):
    """40 images a class (a class: 60) to train, 4 to test."""
    fewer_images([40] * 3 + [60] + [40] * 6, 4)


@pytest.mark.parametrize("n_max", [12, None])
def test_images_are_cms(few, n_max):
    training, test, names = classifiers.read("fashion16", None, 16, n_max, 4, "cpu")
    data = cm.Data(cm.Config(ir=4, n_max=n_max).resolved())
    assert names == data.names and equal(test, (data.held_out, data.held_out_labels))
    assert equal(training, (data.images, data.labels))


def test_batches_pass_over_all_images_in_orders_of_their_own():
    batches = [classifiers.batch_of(i, 4, 10, seed=3) for i in range(1, 11)]
    assert all(len(batch) == 4 for batch in batches)
    passes = torch.cat(batches).view(4, 10)
    assert all(sorted(order.tolist()) == list(range(10)) for order in passes)
    assert len({tuple(order.tolist()) for order in passes}) == 4
    assert not torch.equal(batches[0], classifiers.batch_of(1, 4, 10, seed=4))
    assert len(classifiers.batch_of(2, 7, 3, seed=3)) == 7  # of more than two passes


def test_augmented_images_are_windows_of_the_padded_one_half_of_them_flipped():
    torch.manual_seed(0)
    x = torch.randn(60, 2, 8, 8)
    seen = set()
    for image, new in zip(x, classifiers.augmented(x), strict=True):
        padded = F.pad(image, (1, 1, 1, 1), value=-1.0)
        fits = [(i, j, flip) for i in range(3) for j in range(3) for flip in (False, True)
                if torch.equal(new.flip(2) if flip else new, padded[:, i:i + 8, j:j + 8])]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 14 and 15 < sum(flip for *_, flip in seen) * 60 / len(seen) < 45


@pytest.mark.parametrize("base, with_cm", [("LDAM-DRW", False), ("LA", True)])
def test_fit_is_sgd_with_torchs_own_cosine(base, with_cm, tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "BATCH", 8)
    torch.manual_seed(1)
    training = classifiers.Images(torch.randint(256, (20, 1, 16, 16), dtype=torch.uint8),
                                  torch.tensor([0] * 12 + [1] * 8))
    net = classifiers.fit("small", training, [12, 8], base, 3, 5, tmp_path / "x.pt", "", with_cm)
    torch.manual_seed(common.hashed(3))
    theirs = classifiers.Network("small", 1, 2)
    if with_cm:
        classifiers.reserve(theirs)
    theirs = cm.lay_out(theirs, torch.device("cpu"))  # another would round otherwise
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 5)
    for i in range(1, 6):
        index = classifiers.batch_of(i, 8, 20, 3)
        loss = classifiers.losses(theirs, training.images[index] / 127.5 - 1,
                                  training.labels[index], torch.tensor([12.0, 8.0]), base,
                                  late=i == 5)[0]
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        cosine.step()
    assert not net.training and list(net.state_dict()) == list(theirs.state_dict())
    for name, value in net.state_dict().items():
        assert torch.allclose(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-5), name


def test_balanced_batches_have_all_classes_alike_and_passes_dont(tmp_path, monkeypatch):
    seen, augmentations = [], []
    real = classifiers.losses
    monkeypatch.setattr(classifiers, "losses", lambda net, x, y, *rest: (
        seen.append(y.bincount(minlength=2)), real(net, x, y, *rest))[1])
    monkeypatch.setattr(classifiers, "augmented", lambda x: augmentations.append(1) or x)
    training = classifiers.Images(torch.zeros(100, 1, 16, 16, dtype=torch.uint8),
                                  torch.tensor([0] * 90 + [1] * 10))
    for name, options in (("a", dict(balanced=True, augment=True)), ("b", {})):
        classifiers.fit("small", training, [90, 10], "CE", 0, 5, tmp_path / name, "", **options)
    balanced, passes = (sum(seen[i:i + 5]) / (5 * classifiers.BATCH) for i in (0, 5))
    assert balanced[1].item() == pytest.approx(0.5, abs=0.06)
    assert passes[1].item() == pytest.approx(0.1, abs=0.02) and len(augmentations) == 5


def test_confusion_and_accuracies():
    judged = classifiers.Images(torch.arange(10, dtype=torch.uint8)[:, None, None, None] // 2,
                                torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3, 3]))
    takes = torch.tensor([[0, 1, 1, 0, 3]])  # the class for each grey level

    def net(x):
        return F.one_hot(takes[0][((x + 1) * 127.5).round().long().flatten()], 4)

    found = classifiers.confusion(net, judged, 4, batch=3)
    assert found.tolist() == [[2, 0, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0], [2, 0, 0, 2]]
    result = classifiers.accuracies(net, judged, cm.splits([9, 5, 3, 1]), "accuracy")
    assert result == {"accuracy Many": 1.0, "accuracy Medium": 1.0, "accuracy Few": 0.25,
                      "accuracy overall": 0.625}


@pytest.mark.parametrize("ir, sizes", [(100, [35, 35, 30]), (200, [30, 31, 39])])
def test_the_papers_overall_accuracies_are_those_of_its_groups(ir, sizes):
    groups = classifiers.by_shots(cm.class_counts(500, ir, 100))
    assert [len(groups[name]) for name in cls.SPLITS[:3]] == sizes
    assert sorted(np.concatenate(list(groups.values()))) == list(range(100))
    for *parts, overall in cls.PAPER[ir].values():
        assert np.dot(parts, sizes) / 100 == pytest.approx(overall, abs=0.02)
    edges = classifiers.by_shots([101, 100, 20, 19])
    assert {name: k.tolist() for name, k in edges.items()} == {
        "Many": [0], "Medium": [1, 2], "Few": [3]}


# ------------------------------------------------------------------------------------------------
# Tables, runs


def row(loss, method, seed, accuracy, few=0.5):
    return {"loss": loss, "method": method, "seed": seed, "status": "finished",
            "options": "--ir 100.0", "accuracy Few": few, "accuracy overall": accuracy}


def rows_of(rows):
    return common.numbers(common.text(rows), cls.WORDS)


def test_tables_at_numbers_worked_by_hand():
    rows = []
    for seed in (10, 11):
        rows += [row("LA", "CM", seed, 0.6 + 3 * seed / 1e3) | {"general Few": 0.25},
                 row("CE", "plain", seed, 0.5), row("LA", "plain", seed, 0.6 + seed / 1e3)]
    text = cls.table(rows_of(rows))
    lines = {line.split("|")[1].strip() + line.split("|")[2].strip(): line
             for line in text.splitlines() if "|" in line}
    assert "25.00 ± 0.00" in lines["LA + CM2"] and "63.15 ± 0.21" in lines["LA + CM2"]
    # 2.0 and 2.2 points: 2.1 ± 12.706 * 0.1
    assert "+2.10 [+0.83, +3.37]" in lines["LA + CM − LAhere"]
    paper = [line for line in text.splitlines() if "the paper" in line and "|" in line]
    assert [cell.strip() for cell in paper[0].split("|")[3:7]] == [
        "+3.69", "+1.14", "+0.27", "+1.78"]
    assert "+16.80" in paper[1] and len(paper) == 2
    rows[0]["options"] = "--ir 200.0"
    paper, ir = cls.papers(rows_of(rows))
    assert (paper["CE"][3], ir) == (36.56, 200)
    rows[0]["options"] = "--ir 50.0"
    assert cls.papers(rows_of(rows)) == (cls.PAPER[100], 100) and "the paper, IR 100" in text
    rows[0]["accuracy overall"] = math.nan  # ran off
    assert "| LA + CM  | 1 " in cls.table(rows_of(rows))


def test_the_picture_shows_what_cm_adds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(common, "save", lambda figure, path: figures.append(figure))
    rows = [row(base, method, 10, 0.6) | {
        f"accuracy {s}": 0.5 + (method == "CM") * (i + j) / 100
        for j, s in enumerate(cls.SPLITS)} for i, base in enumerate(("CE", "LA"))
        for method in cls.METHODS]
    cls.draw(rows_of(rows), tmp_path / "x.png")
    left, right = figures[0].axes
    assert [len(bars) for bars in left.containers if len(bars) == 4] == 4 * [4]
    shown = [line.get_ydata() for line in right.lines if len(line.get_ydata()) == 4]
    assert np.allclose(shown[0], [0, 1, 2, 3]) and np.allclose(shown[1], [1, 2, 3, 4])
    assert np.allclose(shown[2], np.subtract((61.60, 46.94, 23.80, 45.14),
                                             (57.91, 45.80, 23.53, 43.36)))


def test_what_is_trained_and_for_how_long(tmp_path, monkeypatch, capsys):
    calls = []

    def fit(*args, **how):
        calls.append((args, how))
        raise FloatingPointError("x: the loss is not finite at step 9")

    monkeypatch.setattr(classifiers, "fit", fit)
    images = classifiers.Images(torch.zeros(300, 1, 16, 16, dtype=torch.uint8),
                                torch.tensor([0] * 199 + [1] * 101))
    key, plain = (dict(zip(cls.KEY, ("LA", method, 5), strict=True)) for method in ("CM", "plain"))
    for dataset, augment in (("fashion16", False), ("cifar100", True)):
        args = SimpleNamespace(epochs=3, dataset=dataset, network="small", runs=tmp_path)
        found = cls.measure(args, key, (images, images, ["a", "b"]), "options")
        assert found["status"] == "not finite at step 9"
        (network, training, counts, base, seed, steps, path, options, with_cm), more = calls[-1]
        assert (network, base, seed, with_cm, options) == ("small", "LA", 5, True, "options")
        assert training is images and counts.tolist() == [199, 101] and path.parent == tmp_path
        assert steps == 8 and more == {"augment": augment}  # 3 * 300 / 128 = 7.03
        cls.measure(args, plain, (images, images, ["a", "b"]), "options")
        assert calls[-1][0][5] == 8 and calls[-1][0][8] is False  # as long without CM
        with monkeypatch.context() as patch:
            patch.setattr(classifiers, "fit", lambda *_, **__: torch.nn.Identity())
            patch.setattr(classifiers, "accuracies", lambda net, judged, groups, kind: {
                f"{kind} of": [len(groups[name]) for name in cls.SPLITS[:3] if name in groups]})
            found = cls.measure(args, plain, (images, images, ["a", "b"]), "options")
        assert found["accuracy of"] == ([2, 0, 0] if dataset == "cifar100" else [1, 1])
    monkeypatch.setattr(cls, "study", lambda args: calls.append(args))
    for dataset, n_max in (("fashion", 1000), ("cifar100", None)):
        with pytest.raises(SystemExit):
            cls.main(["--dataset", dataset, "--rows", str(tmp_path / "none.csv")])
        assert calls[-1].n_max == n_max and calls[-1].ir == 100 and calls[-1].seeds == [
            10, 11, 12, 13, 14]
        assert isinstance(calls[-1].ir, float)  # as when it is typed: it is in the rows' options


def test_a_miniature_stopped_and_resumed_ends_with_the_same_rows(
        few, kills_at, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifiers, "BATCH", 32)
    results, real = {}, cls.measure
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(classifiers, "losses", kills_at(8, classifiers.losses))
                with pytest.raises(SystemExit) as stopped:
                    cls.main(ARGS)
            assert stopped.value.code == 130
            assert len(Path("rows.csv").read_text().splitlines()) == 2
            assert [p.name for p in Path("runs").iterdir()] == ["LA-CM-5.pt"]
        capsys.readouterr()
        assert cls.main(ARGS) == 0
        out, err = capsys.readouterr()
        results[name] = Path("rows.csv").read_bytes(), out
        assert Path("classification.png").is_file() and not list(Path("runs").iterdir())
    assert results["whole"] == results["stopped"]
    assert "run 2 of 2" in err and "run 1 of 2" not in err
    rows = rows_of(pd.read_csv("rows.csv", dtype=str, keep_default_na=False).to_dict("records"))
    assert rows["method"].tolist() == ["plain", "CM"]
    assert rows["general Few"].isna().tolist() == [True, False]
    assert "LA + CM − LA" in results["whole"][1]
    monkeypatch.setattr(cls, "measure", None)  # nothing is run again
    assert cls.main(ARGS) == 0 and capsys.readouterr().out == results["whole"][1]
    assert cls.main([*ARGS, "--table"]) == 0 and capsys.readouterr().out == results["whole"][1]
    monkeypatch.setattr(cls, "measure", real)
    for other in ("--epochs 2", "--ir 7", "--n-max 13", "--network resnet18",
                  "--dataset fashion --data /nowhere"):
        with pytest.raises(SystemExit):
            cls.main([*ARGS, *other.split()])
        assert "made with other options" in capsys.readouterr().err


def test_a_run_that_ran_off_is_a_row(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifiers, "BATCH", 32)
    real = classifiers.losses

    def runs_off(net, *batch):
        total, *parts = real(net, *batch)
        return (math.nan * total if cm.reserved_layers(net) else total, *parts)

    monkeypatch.setattr(classifiers, "losses", runs_off)
    assert cls.main(ARGS) == 0
    rows = common.read_rows(Path("rows.csv"))
    assert rows["status"].tolist() == ["finished", "not finite at step 1"]
    assert rows["accuracy Few"].iloc[-1] == "nan"
    assert cls.main([*ARGS, "--table"]) == 0


@pytest.mark.parametrize("arguments, says", [
    ("--epochs 0", "--epochs"), ("--seeds -1", "--seeds"), ("--seeds x", "invalid int"),
    ("--seeds 5 5", "different numbers"),
    ("--ir 0.5", "imbalance ratio"), ("--n-max 0", "--n-max"), ("--n-max 2000", "--n-max 2000"),
    ("--bases OC", "invalid choice"), ("--dataset folder", "invalid choice"),
    ("--data none", "--data is none"), ("--steps 3", "unrecognized"),
    ("--table", "has no rows")])
def test_bad_input_is_one_line_and_status_2(arguments, says, few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cls.main(["--rows", "rows.csv", "--assets", ".", *arguments.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and says in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())
