"""FID, KID, Inception Score, precision and recall of images, overall and for Many / Medium / Few.

    python fid.py SAMPLES.npz --dataset cifar10          # against the *balanced* set (Sec. 4.1)
    python fid.py SAMPLES.npz --dataset fashion --data DIR --features classifier
    python fid.py SAMPLES.npz --reference REAL.npz --json scores.json
    python fid.py FOLDER --reference FOLDER              # any images

SAMPLES is an .npz as `cm.py --sample` writes it (arr_0 uint8 [N, H, W, C], arr_1 labels, counts) or
a folder of images. The metrics are functions of feature matrices and know nothing of images:

    >>> from fid import *
    >>> features, logits = inception()(images_uint8)     # [N, 2048], [N, 1008]
    >>> frechet_distance(features_real, features_generated)

They run where their features lie: with --device cuda on the GPU.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import cm

# FID's own Inception-v3, as torch-fidelity hosts it
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS

# --------------------------------------------------------------------------------------------------
# Metrics: feature matrices [N, D], on any one device -> numbers


def matrices(*sets, names=("real", "generated"), least=2):
    """The sets as tensors. Raises ValueError on what no metric can take."""
    sets = [torch.as_tensor(s) for s in sets]
    for s, name in zip(sets, names, strict=True):
        if s.ndim != 2 or len(s) < least:
            raise ValueError(f"{name} features have shape {list(s.shape)}; they must be [N, D] "
                             f"with N at least {least}")
        if not torch.isfinite(torch.stack(torch.aminmax(s))).all():  # one pass, NaN comes through
            raise ValueError(f"{name} features are not all finite")
    if len({s.shape[1] for s in sets}) > 1:
        raise ValueError(f"features differ in size: {' and '.join(str(s.shape[1]) for s in sets)}")
    return sets


def product(x, y):
    """x y^T [N, M] of matrices [N, D] and [M, D] on one device. On the CPU NumPy's: where y is x it
    computes one half of the symmetric product, PyTorch both."""
    if x.is_cuda:
        return x @ y.T
    return torch.from_numpy(x.numpy() @ y.numpy().T)


def frechet_distance(a, b):
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two feature sets [N, D] (Heusel et
    al. 2017). Raises ValueError.

    No general matrix root, no complex numbers: the root's trace comes from symmetric eigenvalues,
    or, where a covariance is near to losing rank, from singular values: with S = x^T x = R^T R for
    each set, it is the nuclear norm of R_a R_b^T. Of many more images than features, most of the
    time goes into the two covariances, which every implementation needs."""
    a, b = (s.double() for s in matrices(a, b, names=("first", "second")))
    between = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((s - s.mean(0)).div_((len(s) - 1) ** 0.5) for s in (a, b))
    within = a.norm() ** 2 + b.norm() ** 2
    root = None
    if min(len(a), len(b)) > a.shape[1]:
        root = full_rank_trace(*(product(x.T, x.T).cpu().numpy() for x in (a, b)))
    if root is None:
        a, b = (x.cpu().numpy() for x in (a, b))
        r_a, r_b = (np.linalg.qr(x, "r") if len(x) > x.shape[1] else x for x in (a, b))
        root = np.linalg.svd(r_a @ r_b.T, compute_uv=False).sum()
    return max(0.0, float(between + within - 2 * root))


def full_rank_trace(cov_a, cov_b):
    """tr (S_a S_b)^(1/2) of covariances [D, D], NumPy arrays, or None where they are too near to
    losing rank. The eigenvalues of S_a S_b, which isn't symmetric, are those of L^T S_a L with
    S_b = L L^T, which is; all are off by some 1e-16 tr S_a tr S_b, so a root near 0 is lost."""
    try:
        squares = scipy.linalg.eigvalsh(cov_a.T, cov_b.T, type=2, driver="gv", check_finite=False)
    except np.linalg.LinAlgError:  # S_b has no such L
        return None
    if squares[0] < 1e-13 * np.trace(cov_a) * np.trace(cov_b):
        return None
    return np.sqrt(squares).sum()


def kernel_distance(a, b, subsets=100, subset_size=1000, seed=0):
    """KID (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x.y / D + 1)^3, (mean, std) over
    random subsets of the feature sets [N, D]; a subset is never larger than either set. Raises
    ValueError."""
    a, b = (s.float() for s in matrices(a, b, names=("first", "second")))
    m = min(subset_size, len(a), len(b))
    rng, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), m, replace=False)] for s in (a, b))
        within = 0
        for k in (cubic_kernel(x, x), cubic_kernel(y, y)):
            off_diagonal = k.sum(dtype=torch.float64) - k.diagonal().sum(dtype=torch.float64)
            within += off_diagonal / (m * (m - 1))
        between = cubic_kernel(x, y).mean(dtype=torch.float64)
        values.append(float(within - 2 * between))
    return float(np.mean(values)), float(np.std(values))


def cubic_kernel(x, y):
    """(x.y / D + 1)^3 [N, M] of the rows of x [N, D] and y [M, D]."""
    return product(x, y).div_(x.shape[1]).add_(1).pow_(3)


def manifold_radii(features, k=3, block=2000):
    """Distance of each of the features [N, D] to its k-th nearest neighbour, [N], `block` rows at
    a time. Raises ValueError."""
    (features,) = matrices(features, names=("a manifold's",), least=k + 1)
    features = features.float()
    features = features - features.mean(0)  # float32 distances lose less around 0
    radii = []
    for rows in features.split(block):
        nearest = torch.cdist(rows, features).topk(k + 1, largest=False).values
        radii.append(nearest[:, k])  # the nearest of all is the row itself
    return torch.cat(radii)


def precision_recall(real, generated, k=3, block=2000, real_radii=None):
    """Improved (precision, recall) (Kynkäänniemi et al. 2019) of feature sets [N, D]: the share of
    generated samples inside the real manifold, and the reverse; a manifold is the balls around its
    samples that reach their k-th nearest neighbour. Memory is block x N. `real_radii`:
    manifold_radii(real, k), if at hand. Raises ValueError."""
    real, generated = matrices(real, generated, least=k + 1)
    if real_radii is None:
        real_radii = manifold_radii(real, k, block)
    generated_radii = manifold_radii(generated, k, block)
    center = real.float().mean(0)
    real, generated = (s.float() - center for s in (real, generated))
    inside_real = []
    inside_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    blocks = zip(generated.split(block), generated_radii.split(block), strict=True)
    for rows, radius in blocks:
        distance = torch.cdist(rows, real)
        inside_real.append((distance <= real_radii).any(1))
        inside_generated |= (distance <= radius[:, None]).any(0)
    precision, recall = torch.cat(inside_real), inside_generated
    return float(precision.double().mean()), float(recall.double().mean())


def inception_score(logits, splits=10, seed=0):
    """(mean, std) over splits of exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016) of logits
    [N, classes], shuffled first, since class-ordered samples ruin the splits; seed None leaves the
    order. Raises ValueError."""
    (logits,) = matrices(logits, names=("logits of the",))
    if splits < 1 or len(logits) < splits:
        raise ValueError(f"{len(logits)} images can't make {splits} splits")
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    log_p, n, scores = logits.double().log_softmax(1), len(logits), []
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        p = part.exp()
        divergence = p * (part - p.mean(0).log())
        divergence = divergence.nan_to_num(0.0)  # 0 log 0, where exp has run out of digits
        scores.append(float(divergence.sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


# --------------------------------------------------------------------------------------------------
# Inception: torchvision's modules, and the few differences of FID's network


def resize_matrix(size, out=299):
    """[out, size] rows that interpolate as TensorFlow 1 did: source = i * size / out, without
    half-pixel centres."""
    source = torch.arange(out, dtype=torch.float32) * (size / out)
    low = source.long().clamp(max=size - 1)
    weight = source - low
    matrix = torch.zeros(out, size)
    matrix[torch.arange(out), low] += 1 - weight
    matrix[torch.arange(out), (low + 1).clamp(max=size - 1)] += weight
    return matrix


AVERAGING = [f"Mixed_{name}" for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")]


def average_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, 1, 1)


def patch_pool(block, pool):
    """Let the branch after `block`'s pooling see pool(input) instead of torchvision's average."""
    held = {}

    def hold(module, args):
        held["x"] = args[0]

    def replace(module, args):
        return (pool(held.pop("x")),)

    block.register_forward_pre_hook(hold)
    block.branch_pool.register_forward_pre_hook(replace)


class Inception(nn.Module):
    """uint8 images [N, 1 or 3, H, W] -> (features [N, 2048], logits [N, 1008] without bias)."""

    def __init__(self):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                                   transform_input=False, init_weights=False)
        self.net.eval().requires_grad_(False)

    def load(self, state):
        """Take the weights, patch the pooling branches, fold the batch norms. Raises ValueError."""
        try:
            self.net.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError):
            raise ValueError("the weights are not those of FID's Inception-v3 "
                             "(1008 outputs)") from None
        for name, block in self.net.named_children():
            if name in AVERAGING:
                patch_pool(block, average_pool)
        patch_pool(self.net.Mixed_7c, max_pool)
        for m in list(self.net.modules()):
            if isinstance(m, torchvision.models.inception.BasicConv2d):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
        return self

    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; "
                             "Inception takes uint8 [N, 1 or 3, H, W]")
        x = images.float().expand(-1, 3, -1, -1)
        height, width = (resize_matrix(s).to(x.device) for s in x.shape[2:])
        x = (height @ x @ width.T - 128) / 128  # [N, 3, 299, 299]
        x = x.contiguous(memory_format=torch.channels_last)
        for name, module in self.net.named_children():
            if name == "avgpool":
                break
            x = module(x)
        features = x.mean((2, 3))
        return features, features @ self.net.fc.weight.T


def inception(weights=None):
    """FID's Inception-v3 (2015-12-05), weights from a file, or None: fetched once, their hash
    checked. Raises ValueError."""
    try:
        if weights is None:
            state = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True,
                                                       progress=False)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as e:  # urllib, hashlib and pickle each have errors of their own
        if weights is not None:
            raise ValueError(f"{weights} can't be read as PyTorch weights "
                             f"({type(e).__name__})") from None
        raise ValueError(f"{WEIGHTS} (91 MiB, SHA-256 6726825d...) could not be fetched; "
                         f"put it into {torch.hub.get_dir()}/checkpoints/ "
                         "or name it with --weights, or type --features classifier") from None
    return Inception().load(state)


# --------------------------------------------------------------------------------------------------
# A classifier, where ImageNet's features mean little or can't be had


def conv_block(channels_in, channels_out):
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class Classifier(nn.Module):
    """uint8 images [N, C, H, W] -> (features [N, 128], logits [N, classes])."""

    def __init__(self, channels, num_classes, width=32):
        super().__init__()
        self.body = nn.Sequential(
            conv_block(channels, width), nn.MaxPool2d(2),
            conv_block(width, 2 * width), nn.MaxPool2d(2),
            conv_block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
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
# Images, features, and the table


def chw(images):
    """uint8 [N, H, W, C], an array of NumPy's, as a tensor [N, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()


def extract(net, images, what, batch_size=250):
    """(features, logits) of uint8 images [N, C, H, W], float32, on the network's device; only a
    batch of the images is ever in float. A GPU's TF32 is off: its 10 bits would move the scores."""
    device, parts = next(net.parameters()).device, []
    float32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    bar = tqdm(total=len(images), desc=what, unit="image", leave=False)
    with torch.no_grad(), float32, bar as progress:
        for batch in images.split(batch_size):
            parts.append(net(batch.to(device)))
            progress.update(len(batch))
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(logits)


def read_images(path):
    """uint8 [N, C, H, W], labels [N] or None, counts [C] or None, of an .npz or a folder of images.
    Raises ValueError."""
    path = Path(path)
    arrays = read_folder(path) if path.is_dir() else read_npz(path)
    x, labels, counts = arrays.get("arr_0"), arrays.get("arr_1"), arrays.get("counts")
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"{path} holds no arr_0 of uint8 [N, H, W, 1 or 3]")
    if len(x) < 2:
        raise ValueError(f"{path} holds {len(x)} image; a distribution needs at least two")
    if labels is not None:
        whole = np.issubdtype(labels.dtype, np.integer)
        if labels.shape != x.shape[:1] or not whole or labels.min() < 0:
            raise ValueError(f"{path}: arr_1 must hold one integer label an image, from 0")
        labels = torch.from_numpy(labels).long()
    if counts is not None:
        counts = [int(n) for n in counts]
    return chw(x), labels, counts


def read_folder(path):
    """{"arr_0": uint8 [N, H, W, 3]} of the images under `path`, in their names' order."""
    suffixes, images = torchvision.datasets.folder.IMG_EXTENSIONS, []
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
    for file in tqdm(files, "reading", leave=False):
        try:
            images.append(np.asarray(torchvision.datasets.folder.pil_loader(file)))
        except OSError as e:
            raise ValueError(f"{file} can't be read as an image ({e})") from None
    if not images:
        raise ValueError(f"{path} holds no images")
    if len({i.shape for i in images}) > 1:
        raise ValueError(f"{path} holds images of several sizes")
    return {"arr_0": np.stack(images)}


def read_npz(path):
    """The arrays of an .npz, by name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as e:  # zipfile, zlib, numpy and the system each have errors of their own
        why = getattr(e, "strerror", None) or type(e).__name__
        raise ValueError(f"{path} can't be read as an .npz of images ({why})") from None


def score(real, generated, kind, logits=None, labels=None, radii=manifold_radii):
    """{metric: value} of one set of features against another; `logits` and `labels` are the
    generated images', radii(real, k) gives manifold_radii."""
    frechet, kernel = ("FID", "KID") if kind == "inception" else ("FD", "KD")
    result = {"images": len(generated), "real": len(real)}
    result[frechet] = frechet_distance(real, generated)
    result[kernel], result[kernel + " std"] = kernel_distance(real, generated)
    k = min(3, len(real) - 1, len(generated) - 1)
    precision, recall = precision_recall(real, generated, k, real_radii=radii(real, k))
    result |= {"precision": precision, "recall": recall}
    if kind == "inception":
        result["IS"], result["IS std"] = inception_score(logits, min(10, len(logits)))
    elif labels is not None:
        result["accuracy"] = float((logits.argmax(1).cpu() == labels).double().mean())
    return result


def cached(directory, kind, key, make):
    """What `make` once gave for this key, on the CPU. The key hashes everything that the result
    depends on."""
    digest = hashlib.sha256()
    for part in key:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    path = directory / f"{kind}-{digest.hexdigest()[:16]}.pt"
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    result = make()
    directory.mkdir(parents=True, exist_ok=True)
    cm.write_atomically(path, lambda p: torch.save(result, p))
    return result


def check_device(device):
    """Raises ValueError on what isn't a CPU or an NVIDIA GPU that is here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise ValueError(f"--device {device}: type cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not to be had here") from None


def real_set(dataset, data, reference, size):
    """The real images uint8 [N, C, H, W], their labels [N] or None, the number of classes, and what
    they are, in words. Raises ValueError."""
    if reference is not None:
        images, labels, _ = read_images(reference)
        num_classes = 0 if labels is None else int(labels.max()) + 1
        return images, labels, num_classes, str(reference)
    if dataset is None:
        raise ValueError("the real images are missing: type --dataset NAME, or --reference with an "
                         ".npz or a folder")
    images, labels, names = cm.load_dataset(dataset, data, size)
    labels = torch.from_numpy(labels)
    what = f"{dataset}, balanced training set"
    if dataset == "folder":  # nobody has balanced it
        counts = torch.bincount(labels, minlength=len(names))
        fewest, most = int(counts.min()), int(counts.max())
        each = most if fewest == most else f"{fewest} to {most}"
        what = f"folder {data}, training images as they come, {each} a class"
    return chw(images), labels, len(names), what


def check_samples(path, images, labels, counts, real, real_labels, num_classes):
    """Raises ValueError on samples that can't be compared with the real images."""
    if real.shape[1:] != images.shape[1:]:
        raise ValueError(f"sizes differ: samples are {list(images.shape[1:])}, "
                         f"real images {list(real.shape[1:])}")
    if real_labels is None:
        return
    if labels is not None and labels.max() >= num_classes:
        raise ValueError(f"{path} has labels from {int(labels.min())} to {int(labels.max())}; "
                         f"the real set has classes 0 to {num_classes - 1}")
    if counts is not None and len(counts) != num_classes:
        raise ValueError(f"{path} has counts of {len(counts)} classes, "
                         f"the real set has {num_classes}")


def evaluate(samples, dataset=None, data=None, reference=None, features="inception", weights=None,
             device="cpu", cache="data/fid", batch_size=250):
    """All scores of `samples` (a path), {"settings": ..., "overall": ..., "Many": ..., ...}. The
    cache keeps the real images' features and radii, and the classifier, all on the CPU. Raises
    ValueError."""
    check_device(device)
    cache = Path(cache)
    images, labels, counts = read_images(samples)
    real, real_labels, num_classes, what = real_set(dataset, data, reference, images.shape[2])
    check_samples(samples, images, labels, counts, real, real_labels, num_classes)
    settings = {"features": features, "against": what}
    stamp = [real.numpy().tobytes(), tuple(real.shape), features]
    if features == "inception":
        net = inception(weights)
    else:
        if real_labels is None:
            raise ValueError("--features classifier needs real images with labels: --dataset, "
                             "or an .npz with arr_1")
        held = real, real_labels, "its own training images"
        if reference is None:
            arrays, test_labels, _ = cm.load_dataset(dataset, data, images.shape[2], train=False)
            if len(arrays):
                held = chw(arrays), torch.from_numpy(test_labels), "held-out images"
        # the version, to be raised when the classifier or its training changes
        stamp += [real_labels.numpy().tobytes(), "classifier 1"]

        def make_classifier():
            net, accuracy = train_classifier(real, real_labels, *held[:2], num_classes, device)
            return {"weights": net.cpu().state_dict(), "accuracy": accuracy}

        state = cached(cache, "classifier", stamp, make_classifier)
        net = Classifier(real.shape[1], num_classes).eval().requires_grad_(False)
        net.load_state_dict(state["weights"])
        accuracy = settings["classifier accuracy"] = state["accuracy"]
        print(f"the classifier recognises {100 * accuracy:.1f} % of {held[2]}", file=sys.stderr)
    stamp.append(float(sum(p.double().abs().sum() for p in net.parameters())))
    net = net.to(device)

    def make_features():
        return extract(net, real, "real images", batch_size)[0].cpu()

    def radii(part, k):
        def make_radii():
            return manifold_radii(part, k).cpu()

        key = [part.cpu().numpy().tobytes(), k]
        return cached(cache, "radii", key, make_radii).to(device)  # the slow part on a CPU

    real_features = cached(cache, "features", stamp, make_features).to(device)
    generated, logits = extract(net, images, "generated images", batch_size)
    overall = score(real_features, generated, features, logits, labels, radii)
    result = {"settings": settings, "overall": overall}
    if labels is None or counts is None or real_labels is None:
        return result
    for name, classes in cm.splits(counts).items():
        classes = torch.as_tensor(classes)
        r, g = torch.isin(real_labels, classes), torch.isin(labels, classes)
        if min(int(r.sum()), int(g.sum())) >= 2:
            result[name] = score(real_features[r], generated[g], features, logits[g], labels[g],
                                 radii)
    return result


def show(result):
    """One table, a row a split; * where there are fewer images than in the paper's protocol."""
    rows = {k: v for k, v in result.items() if k != "settings"}
    columns = [c for c in rows["overall"] if not c.endswith(" std")]
    spread = {c for c in columns if f"{c} std" in rows["overall"]}
    print(f"{result['settings']['features']} features, against {result['settings']['against']}")
    print(f"{'':8}" + "".join(f"{c:>22}" if c in spread else f"{c:>11}" for c in columns))
    starred = False
    for name, values in rows.items():
        cells = []
        for c in columns:
            if c in ("images", "real"):
                few = c == "images" and values[c] < (50_000 if name == "overall" else 20_000)
                starred |= few
                cells.append(f"{values[c]:>10}{'*' if few else ' '}")
            elif c in spread:
                cells.append(f"{values[c]:>12.5g} ± {values[c + ' std']:<7.2g}")
            else:
                cells.append(f"{values[c]:>11.4f}")
        print(f"{name:8}" + "".join(cells))
    if starred:
        print("* fewer than the paper's 50,000 (overall) or 20,000 (a split, from a file of its "
              "own): the distance is biased upwards")


def fail(message):
    """One line on stderr, status 2."""
    print("fid.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("samples", help="an .npz, or a folder of images")
    parser.add_argument("--dataset", choices=list(cm.DATASETS),
                        help="real images: its whole training set")
    parser.add_argument("--data", help="where the data set lies, as for cm.py")
    parser.add_argument("--reference",
                        help="real images: an .npz or a folder, instead of --dataset")
    parser.add_argument("--features", choices=["inception", "classifier"], default="inception")
    parser.add_argument("--weights", help=f"{WEIGHTS}, if it can't be fetched")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="write the scores there, too")
    args = vars(parser.parse_args(argv))
    try:
        out = args.pop("json")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"--json {out}: {out.parent} is not a directory")
        result = evaluate(**args)
        show(result)
        if out is not None:
            cm.write_atomically(out, lambda p: p.write_text(json.dumps(result, indent=1)))
        return 0
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    sys.exit(main())
