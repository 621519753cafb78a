"""FID, KID, Inception Score, precision and recall of images, overall and for Many / Medium / Few.

    python fid.py SAMPLES.npz --dataset cifar10       # against the *balanced* set (Sec. 4.1)
    python fid.py SAMPLES.npz --dataset fashion16 --features classifier
    python fid.py SAMPLES.npz --reference REAL.npz    # images, or statistics (mu, sigma)

SAMPLES: an .npz as `cm.py --sample` writes it (arr_0 [N, H, W, C], arr_1, counts), or a folder.
"""

import argparse
import contextlib
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

import cm

# FID's own Inception-v3, as torch-fidelity hosts it; pytorch-fid's file is the same network
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS

# --------------------------------------------------------------------------------------------------
# Metrics: feature matrices [N, D], on any one device -> numbers


def matrices(*sets, least=2):
    """The sets as tensors. Raises ValueError on what no metric can take."""
    sets = [torch.as_tensor(s) for s in sets]
    for s in sets:
        if s.ndim != 2 or len(s) < least or s.shape[1] != sets[0].shape[1]:
            raise ValueError(f"features have shapes {[list(s.shape) for s in sets]}; they must be "
                             f"[N, D], with one D and N at least {least}")
        if not torch.isfinite(torch.stack(torch.aminmax(s))).all():  # one pass, NaN comes through
            raise ValueError("features are not all finite")
    return sets


def product(x, y):
    """x y^T of matrices on one device, on the CPU by NumPy: where y is x it computes but half."""
    return x @ y.T if x.is_cuda else torch.from_numpy(x.numpy() @ y.numpy().T)


def frechet_distance(a, b):
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two feature sets [N, D] (Heusel et
    al. 2017). Raises ValueError.

    No general matrix root, no complex numbers: the eigenvalues of S_a S_b are those of a symmetric
    matrix, off by some 1e-16 tr S_a tr S_b. Where a covariance is so near to losing rank that roots
    would be lost, with S = R^T R for each set, the trace is the nuclear norm of R_a R_b^T."""
    a, b = (s.double() for s in matrices(a, b))
    distance = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((s - s.mean(0)).div_((len(s) - 1) ** 0.5) for s in (a, b))
    distance += a.norm() ** 2 + b.norm() ** 2
    if min(len(a), len(b)) > a.shape[1]:
        cov_a, cov_b = (product(x.T, x.T).cpu().numpy() for x in (a, b))
        with contextlib.suppress(np.linalg.LinAlgError):  # S_b has lost rank
            squares = scipy.linalg.eigvalsh(cov_a, cov_b, type=2, driver="gv", check_finite=False)
            if squares[0] > 1e-13 * np.trace(cov_a) * np.trace(cov_b):
                return max(0.0, float(distance - 2 * np.sqrt(squares).sum()))
    a, b = (x.cpu().numpy() for x in (a, b))
    a, b = (np.linalg.qr(x, "r") if len(x) > x.shape[1] else x for x in (a, b))
    return max(0.0, float(distance - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()))


def features_with(mean, covariance):
    """[2 D, D] float64 features that have this mean [D] and covariance [D, D]."""
    mean, covariance = (torch.as_tensor(s).double() for s in (mean, covariance))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * ((len(mean) - 0.5) * values.clamp(min=0)).sqrt()
    return torch.cat([mean + root.T, mean - root.T])


def kernel_distance(a, b, subsets=100, subset_size=1000, seed=0):
    """KID (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x.y / D + 1)^3, (mean, std) over
    random subsets of sets [N, D]; no std (None) of one that isn't larger. Raises ValueError."""
    a, b = (s.float() for s in matrices(a, b))
    m = min(subset_size, len(a), len(b))
    kernel = lambda x, y: product(x, y).div_(x.shape[1]).add_(1).pow_(3)
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), m, replace=False)] for s in (a, b))
        within = sum(kernel(z, z).fill_diagonal_(0).sum(dtype=torch.float64) for z in (x, y))
        values.append(float(within / (m * (m - 1)) - 2 * kernel(x, y).mean(dtype=torch.float64)))
    return float(np.mean(values)), float(np.std(values)) if min(len(a), len(b)) > m else None


def precision_recall(real, generated, k=3, block=2000):
    """Improved (precision, recall) (Kynkäänniemi et al. 2019) of feature sets [N, D]: the share of
    generated samples inside the real manifold, and the reverse; a manifold is the balls around its
    samples that reach their k-th nearest neighbour. Memory is block x N. Raises ValueError."""
    real, generated = (s.float() for s in matrices(real, generated, least=k + 1))
    real, generated = (s - real.mean(0) for s in (real, generated))  # distances lose less around 0
    radii = []
    for s in (real, generated):
        nearest = [torch.cdist(x, s).topk(k + 1, largest=False).values for x in s.split(block)]
        radii.append(torch.cat(nearest)[:, k])  # the nearest of all is the row itself
    inside_real = []
    inside_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radius in zip(generated.split(block), radii[1].split(block), strict=True):
        distance = torch.cdist(rows, real)
        inside_real.append((distance <= radii[0]).any(1))
        inside_generated |= (distance <= radius[:, None]).any(0)
    return tuple(float(x.double().mean()) for x in (torch.cat(inside_real), inside_generated))


def inception_score(logits, splits=10, seed=0):
    """(mean, std) over splits of exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016) of logits
    [N, classes], shuffled first, since class-ordered samples ruin the splits. Raises ValueError."""
    (logits,) = matrices(logits)
    if splits < 1 or len(logits) < splits:
        raise ValueError(f"{len(logits)} images can't make {splits} splits")
    logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    log_p, n, scores = logits.double().log_softmax(1), len(logits), []
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        p = part.exp()
        divergence = (p * (part - p.mean(0).log())).nan_to_num(0.0)  # 0 log 0, out of digits
        scores.append(float(divergence.sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


# --------------------------------------------------------------------------------------------------
# Networks: FID's Inception in torchvision's modules; a classifier, where ImageNet means little


def resize_matrix(size, out=299):
    """[out, size] rows that interpolate as TensorFlow 1 did, without half-pixel centres."""
    source = torch.arange(out, dtype=torch.float32) * (size / out)
    offset = source.clamp(max=size - 1)[:, None] - torch.arange(size)
    return (1 - offset.abs()).clamp(min=0)


def patch_pool(block, pool, **options):
    """Let the branch after `block`'s pooling see pool(input) instead of torchvision's average."""
    held = []
    replace = lambda module, args: pool(held.pop(), 3, stride=1, padding=1, **options)
    block.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    block.branch_pool.register_forward_pre_hook(replace)


class Inception(nn.Module):
    """uint8 images [N, 1 or 3, H, W] -> (features [N, 2048], logits [N, 1008] without bias)."""

    def __init__(self, state):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                                   transform_input=False, init_weights=False)
        # a plain dict may lack num_batches_tracked, as files from an older PyTorch do
        self.net.load_state_dict(dict(state))
        self.net.eval().requires_grad_(False)
        for block in self.net.children():
            if hasattr(block, "branch_pool") and block is not self.net.Mixed_7c:
                patch_pool(block, F.avg_pool2d, count_include_pad=False)
        patch_pool(self.net.Mixed_7c, F.max_pool2d)
        for m in list(self.net.modules()):  # folded, a batch norm costs nothing
            if isinstance(m, torchvision.models.inception.BasicConv2d):
                m.conv, m.bn = nn.utils.fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()

    def forward(self, images):
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}; Inception takes uint8")
        x = images.float().expand(-1, 3, -1, -1)
        height, width = (resize_matrix(s).to(x.device) for s in x.shape[2:])
        x = (height @ x @ width.T - 128) / 128  # [N, 3, 299, 299]
        x = x.contiguous(memory_format=torch.channels_last)
        for module in list(self.net.children())[:-3]:  # but for avgpool, dropout and fc
            x = module(x)
        features = x.mean((2, 3))
        return features, features @ self.net.fc.weight.T


def inception(weights=None):
    """FID's Inception-v3 (2015-12-05), its weights from a file or fetched. Raises ValueError."""
    try:
        fetch = torch.hub.load_state_dict_from_url
        return Inception(fetch(URL, map_location="cpu", check_hash=True) if weights is None else
                         torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as e:  # urllib, hashlib, pickle and PyTorch each have errors of their own
        raise ValueError(f"{weights or URL} can't be had as FID's Inception-v3 ({type(e).__name__})"
                         f": name {WEIGHTS} by --weights, or type --features classifier") from None


class Classifier(nn.Module):
    """uint8 images [N, C, H, W] -> (features [N, 128], logits [N, classes])."""

    def __init__(self, channels, num_classes, width=32):
        super().__init__()
        block = lambda cin, cout: nn.Sequential(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())
        self.body = nn.Sequential(
            block(channels, width), nn.MaxPool2d(2), block(width, 2 * width), nn.MaxPool2d(2),
            block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(16 * width, 128), nn.ReLU())
        self.head = nn.Linear(128, num_classes)

    def forward(self, images):
        features = self.body(cm.to_float(images).contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


def train_classifier(images, labels, test_images, test_labels, num_classes, device="cpu",
                     steps=1000, seed=0):
    """A Classifier trained on uint8 images [N, C, H, W], and its test accuracy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(images.shape[1], num_classes).to(device)
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, steps)
    for _ in tqdm(range(steps), "training the classifier", leave=False):
        index = torch.randint(len(images), (128,), generator=generator)
        loss = F.cross_entropy(net(images[index].to(device))[1], labels[index].to(device))
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    net.eval().requires_grad_(False)
    predicted = extract(net, test_images, "testing the classifier")[1].argmax(1).cpu()
    return net, float((predicted == test_labels).double().mean())


# --------------------------------------------------------------------------------------------------
# Images, as files hold them, and their features


def chw(x):
    """uint8 [N, H, W, C], NumPy's, as a tensor [N, C, H, W]; C is 1 where all images are grey."""
    grey = (x == x[..., :1]).all()  # so that no file's kind changes their scores
    return torch.from_numpy(np.ascontiguousarray(x[..., :1 if grey else 3])).permute(0, 3, 1, 2)


def extract(net, images, what, batch_size=250):
    """(features, logits) of uint8 images [N, C, H, W], float32, on the network's device; only a
    batch of the images is ever in float. A GPU's TF32 is off: its 10 bits would move the scores."""
    device, parts = next(net.parameters()).device, []
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in tqdm(images.split(batch_size), what, leave=False):
            parts.append(net(batch.to(device)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def read_npz(path):
    """The arrays of an .npz that fid.py knows, by name. Raises ValueError on what it can't use."""
    known = "arr_0", "arr_1", "counts", "mu", "sigma", "sampler", "sample_steps", "guidance"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in known if name in file}
    except Exception as e:  # zipfile, zlib, numpy and the system have errors of their own
        why = getattr(e, "strerror", None) or e
        raise ValueError(f"{path} can't be read as an .npz of images ({why})") from None
    whole = lambda x: x.ndim == 1 and x.dtype.kind in "iu" and x.min(initial=0) >= 0
    image = "uint8 [N, H, W, 1 or 3]:"
    for name, fits, must in (
            ("arr_0", lambda x: x.ndim != 3, f"{image} x[..., None] adds a channel"),
            ("arr_0", lambda x: x.shape[3:] != (4,), f"{image} x[..., :3] drops transparency"),
            ("arr_0", lambda x: x.shape[3:] in ((1,), (3,)), f"{image} x.transpose(0, 2, 3, 1)?"),
            ("arr_0", lambda x: x.dtype == np.uint8, f"{image} np.rint(255 * x).astype(np.uint8)"),
            ("arr_1", whole, "[N] classes from 0 on: one-hot labels need .argmax(1)"),
            ("arr_1", lambda y: len(y) == len(arrays.get("arr_0", y)), "one label an image"),
            ("counts", whole, "[C] numbers of training images"),
            ("mu", lambda x: x.shape == (2048,) and "sigma" in arrays, "[2048], beside sigma"),
            ("sigma", lambda x: x.shape == (2048, 2048) and "mu" in arrays, "[2048, 2048] and mu")):
        if name in arrays and not fits(x := arrays[name]):
            raise ValueError(f"{path}: {name} is {x.dtype} {list(x.shape)}; it must be {must}")
    return arrays


def read(path, reference=False):
    """An .npz's arrays, or a folder's images as arr_0, uint8 [N, C, H, W]; class folders of a
    reference give arr_1 [N] and names, and it may hold statistics alone. Raises ValueError."""
    path, tree, names = Path(path), Path(path), [""]
    if path.is_dir():
        with contextlib.suppress(ValueError):  # a folder of anything
            tree, names = cm.class_folders(path) if reference else (path, [""])
        files, labels = cm.list_images(tree, names)
        arrays = {"arr_0": cm.read_images(files)} if files else {}
        arrays |= {"arr_1": labels, "names": names} if len(names) > 1 else {}
    else:
        arrays = read_npz(path)
    n = len(arrays.get("arr_0", ()))
    if n < 2 and not (n == 0 and reference and {"mu", "sigma"} <= set(arrays)):
        raise ValueError(f"{path} holds {n} images, as arr_0 in an .npz; two or more are needed")
    if n:
        arrays["arr_0"] = chw(arrays["arr_0"])
    if "arr_1" in arrays:
        arrays["arr_1"] = torch.from_numpy(arrays["arr_1"].astype(np.int64))
    return arrays


def read_images(path):
    """uint8 [N, C, H, W], labels [N] or None, counts [C] or None. Raises ValueError."""
    return tuple(map(read(path).get, ("arr_0", "arr_1", "counts")))


def cached(directory, kind, key, make):
    """What `make` once gave for this key, all that the result depends on; on the CPU. What can't be
    read is made anew, what can't be written is only said."""
    digest = hashlib.sha256()
    for part in key:
        if torch.is_tensor(part):  # in pieces: a copy of all would take as much memory again
            digest.update(repr((part.dtype, part.shape)).encode())
            for piece in part.split(1000):
                digest.update(piece.contiguous().numpy().reshape(-1))
        else:
            digest.update(repr(part).encode())
    path = Path(directory) / f"{kind}-{digest.hexdigest()[:16]}.pt"
    with contextlib.suppress(Exception):  # there is none, or it is damaged, or another program's
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if kept["key"] == digest.hexdigest():
            return kept["result"]
    kept = {"key": digest.hexdigest(), "result": make()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cm.write_atomically(path, lambda p: torch.save(kept, p))
    except OSError as e:
        print(f"{path} can't be kept ({e}); --cache names another directory", file=sys.stderr)
    return kept["result"]


# --------------------------------------------------------------------------------------------------
# Scores, and their table


def real_set(dataset, data, reference, size, train=True):
    """The real images as `read` gives them, the classes' names, `what` it is. Raises ValueError."""
    if reference is not None:
        real = read(reference, reference=True)
        classes = int(real["arr_1"].max()) + 1 if "arr_1" in real else 0
        return {"what": reference, "names": [""] * classes} | real
    try:
        images, labels, names = cm.load_dataset(dataset, data, size, train)
    except ValueError as e:
        raise ValueError(str(e).replace("--image-size", "the samples' size")) from None
    what = f"{data}, as it comes" if dataset == "folder" else f"{dataset}, balanced training set"
    return {"arr_0": chw(images), "arr_1": torch.from_numpy(labels), "names": names, "what": what}


def match(new, real):
    """Gives grey images the others' channels. Raises ValueError on sets that can't be compared."""
    if "arr_0" in real:
        channels = max(x["arr_0"].shape[1] for x in (new, real))
        for x in (new, real):
            x["arr_0"] = x["arr_0"].expand(-1, channels, -1, -1)
        sizes = [list(x["arr_0"].shape[2:]) for x in (new, real)]
        if sizes[0] != sizes[1]:
            raise ValueError("sizes differ: samples are {}, real images {}".format(*sizes))
    if "arr_1" in new and "arr_1" in real:
        most, names = int(new["arr_1"].max()), real["names"]
        counts = len(new.get("counts", names))
        if most >= len(names) or counts != len(names):
            raise ValueError(f"samples have labels to {most} and {counts} counts, real images the "
                             f"classes 0 {names[0]} to {len(names) - 1} {names[-1]}")


def score(real, generated, kind, logits=None, labels=None):
    """{metric: value} of sets of features; `logits` and `labels` are the generated images'."""
    frechet, kernel = ("FID", "KID") if kind == "inception" else ("FD", "KD")
    result = {"images": len(generated), "real": len(real)}
    result[frechet] = frechet_distance(real, generated)
    result[kernel], spread = kernel_distance(real, generated)
    result |= {} if spread is None else {kernel + " std": spread}
    k = min(3, len(real) - 1, len(generated) - 1)
    result["precision"], result["recall"] = precision_recall(real, generated, k)
    if kind == "inception":
        result["IS"], result["IS std"] = inception_score(logits, min(10, len(logits)))
    elif labels is not None:
        result["accuracy"] = float((logits.argmax(1).cpu() == labels).double().mean())
    return result


def prepare(kind, real, held, weights, device, cache):
    """The network, the real images' features, the classifier's accuracy. Raises ValueError."""
    images, labels, classes = real.get("arr_0"), real.get("arr_1"), len(real["names"])
    if kind == "inception":
        net = inception(weights).to(device)
        key = images, float(sum(p.double().abs().sum() for p in net.parameters()))
        make = lambda: extract(net, images, "real images")[0].cpu()
        rows = None if images is None else cached(cache, kind, key, make).to(device)
        return net, rows, None
    if images is None or labels is None:
        raise ValueError("--features classifier needs real images with labels")
    channels = images.shape[1]
    test = held["arr_0"][:, :channels].expand(-1, channels, -1, -1), held["arr_1"]

    def make():
        net, accuracy = train_classifier(images, labels, *test, classes, device)
        rows = extract(net, images, "real images")[0].cpu()
        return net.cpu().state_dict(), rows, accuracy

    # the number: to be raised when the classifier or its training changes
    state, rows, accuracy = cached(cache, kind, (images, labels, *test, 2), make)
    net = Classifier(images.shape[1], classes).eval().requires_grad_(False)
    net.load_state_dict(state)
    return net.to(device), rows.to(device), accuracy


def evaluate(samples, dataset=None, data=None, reference=None, features="inception", weights=None,
             device="cpu", cache="data/fid"):
    """All scores of `samples` (a path), {"settings": ..., "overall": ..., "Many": ..., ...}. The
    cache keeps the real images' features and the classifier. Raises ValueError."""
    device, new = cm.pick_device(device), read(samples)
    real = held = real_set(dataset, data, reference, new["arr_0"].shape[2])
    match(new, real)
    if dataset is not None and features == "classifier":
        held = real_set(dataset, data, None, new["arr_0"].shape[2], train=False)
        held = held if len(held["arr_0"]) else real
    net, real_rows, accuracy = prepare(features, real, held, weights, device, cache)
    count = f"{len(real['arr_0']):,}" if "arr_0" in real else "no"
    settings = {"features": features, "against": f"{real['what']}, {count} images", "notes": []}
    for name in ("sampler", "sample_steps", "guidance"):
        settings[name] = new[name].item() if name in new else None
    if accuracy is not None:
        which = "its own training images" if held is real else "held-out images"
        settings["notes"].append(f"the classifier recognises {100 * accuracy:.1f} % of {which}")
    rows, logits = extract(net, new["arr_0"], "generated images")
    labels, real_labels = new.get("arr_1"), real.get("arr_1")
    overall = ({"images": len(rows)} if real_rows is None else
               score(real_rows, rows, features, logits, labels))
    if features == "inception" and "mu" in real:
        statistics = features_with(real["mu"], real["sigma"]).to(device)
        overall["FID"] = frechet_distance(statistics, rows)
        settings["notes"].append("FID overall is against the reference's mu and sigma" + (
            "; without its images other columns are left out" if real_rows is None else ""))
    result = {"settings": settings, "overall": overall}
    if labels is None or real_labels is None or "counts" not in new:
        return result
    for name, classes in cm.splits(new["counts"]).items():
        r, g = (torch.isin(y, torch.as_tensor(classes)) for y in (real_labels, labels))
        if min(r.sum(), g.sum()) >= 2:
            result[name] = score(real_rows[r], rows[g], features, logits[g], labels[g])
        else:
            which = ", ".join(f"{k} {real['names'][k]}".strip() for k in classes)
            settings["notes"].append(f"{name} is left out, with {r.sum()} real images and "
                                     f"{g.sum()} generated ones of the classes {which}")
    return result


def show(result):
    """One table, a row a split; * where there are fewer images than in the paper's protocol."""
    settings, rows = result["settings"], {k: v for k, v in result.items() if k != "settings"}
    how = "{sampler}, {sample_steps} steps, ".format(**settings) if settings["sampler"] else ""
    w = "unknown" if settings["guidance"] is None else settings["guidance"]
    print(f"{how}guidance {w}; {settings['features']} features against {settings['against']}")
    columns = [c for c in rows["overall"] if not c.endswith(" std")]
    table = [["", *columns]]
    for name, row in rows.items():
        cells = {c: str(v) if isinstance(v, int) else f"{v:.5g}" for c, v in row.items()}
        cells["images"] += "*" * (row["images"] < (50_000 if name == "overall" else 20_000))
        spreads = {c: f" ± {row[c + ' std']:.2g}" for c in columns if c + " std" in row}
        table.append([name, *(cells[c] + spreads.get(c, "") for c in columns)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(map(str.rjust, cells, widths)))
    if any("*" in cells[1] for cells in table):
        print("* fewer than the paper's 50,000, or a split's 20,000: distances are biased upwards")
    if any(c in row and f"{c} std" not in row for row in rows.values() for c in ("KID", "KD")):
        print("no ±: one of the sets has at most 1,000 images, and every subset is all of it")
    for note in settings["notes"]:
        print(note)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cm.fail
    parser.add_argument("samples", help="an .npz, or a folder of images")
    real = parser.add_mutually_exclusive_group(required=True)
    real.add_argument("--dataset", choices=list(cm.DATASETS), help="its whole training set")
    real.add_argument("--reference", help="an .npz or a folder of real images, or statistics")
    parser.add_argument("--data", help="where the data set lies, as for cm.py")
    parser.add_argument("--features", choices=["inception", "classifier"], default="inception")
    parser.add_argument("--weights", help=f"{WEIGHTS}, or pytorch-fid's, if it can't be fetched")
    parser.add_argument("--device", help="cpu, cuda or cuda:N [default: cuda if there is one]")
    parser.add_argument("--cache", default="data/fid", help="for real features [%(default)s]")
    parser.add_argument("--json", type=Path, help="write the scores there, too")
    args = vars(parser.parse_args(argv))
    out = args.pop("json")
    try:
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"--json {out}: {out.parent} is not a directory")
        result = evaluate(**args)
        show(result)
        if out is not None:
            cm.write_atomically(out, lambda p: p.write_text(json.dumps(result, indent=1)))
        return 0
    except (ValueError, OSError, KeyboardInterrupt) as e:
        cm.fail(str(e) or "interrupted; type it again, what was finished is in the cache")


if __name__ == "__main__":
    sys.exit(main())
