"""FID, KID, Inception Score, precision and recall of generated images, overall and for Many / Medium / Few classes.

    python fid.py SAMPLES.npz --dataset cifar10                       # against the *balanced* training set (Sec. 4.1)
    python fid.py SAMPLES.npz --dataset fashion --data DIR --features classifier
    python fid.py SAMPLES.npz --reference REAL.npz --json scores.json
    python fid.py FOLDER --reference FOLDER                           # any images

SAMPLES is an .npz as `cm.py --sample` writes it (arr_0 uint8 [N, H, W, C], arr_1 labels, counts) or a folder of images.
The metrics are functions of feature matrices and know nothing of images:

    >>> from fid import *
    >>> features, logits = inception()(images_uint8)                  # [N, 2048], [N, 1008]
    >>> frechet_distance(features_real, features_generated)
"""

import argparse
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
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import cm

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # FID's own Inception-v3, as torch-fidelity hosts it
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + WEIGHTS

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: feature matrices [N, D] -> numbers


def matrices(*sets, names=("real", "generated"), least=2):
    """The sets as tensors. Raises ValueError on what no metric can take."""
    sets = [torch.as_tensor(s) for s in sets]
    for s, name in zip(sets, names):
        if s.ndim != 2 or len(s) < least:
            raise ValueError(f"{name} features have shape {list(s.shape)}; they must be [N, D] with N at least {least}")
        if not torch.isfinite(torch.stack(torch.aminmax(s))).all():  # one pass, and NaN comes through
            raise ValueError(f"{name} features are not all finite")
    if len({s.shape[1] for s in sets}) > 1:
        raise ValueError(f"features differ in size: {' and '.join(str(s.shape[1]) for s in sets)}")
    return sets


def frechet_distance(a, b):
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two feature sets [N, D] (Heusel et al. 2017).

    With S = R^T R for each set, tr (S_a S_b)^(1/2) is the nuclear norm of R_a R_b^T: no general matrix root, no
    complex numbers, right also for rank-deficient covariances. Raises ValueError."""
    a, b = (s.double().cpu().numpy() for s in matrices(a, b, names=("first", "second")))
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    nuclear = None
    if min(len(a), len(b)) > a.shape[1]:
        nuclear = full_rank_trace(a.T @ a, b.T @ b)
    if nuclear is None:  # a covariance has lost the digits that its root needs: take the features' own root
        roots = [np.linalg.qr(x, "r") if len(x) > x.shape[1] else x for x in (a, b)]
        nuclear = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return max(0.0, float(means + np.vdot(a, a) + np.vdot(b, b) - 2 * nuclear))


def full_rank_trace(cov_a, cov_b):
    """tr (S_a S_b)^(1/2) of covariances [D, D], or None where they are too near to losing rank. The singular values of
    the product of Cholesky roots come from a symmetric eigenproblem: several times faster, exact where none is near 0."""
    try:
        root_a, root_b = (scipy.linalg.cholesky(c, check_finite=False) for c in (cov_a, cov_b))
    except np.linalg.LinAlgError:
        return None
    product = scipy.linalg.blas.dtrmm(1.0, root_a, root_b.T)  # both are triangular
    squares = scipy.linalg.eigvalsh(product @ product.T, check_finite=False, overwrite_a=True)
    full = all(r.diagonal().min() > 1e-6 * r.diagonal().max() for r in (root_a, root_b)) and squares[0] > 1e-12 * squares[-1]
    return np.sqrt(squares).sum() if full else None


def kernel_distance(a, b, subsets=100, subset_size=1000, seed=0):
    """KID (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x.y / D + 1)^3, (mean, std) over random subsets of
    the feature sets [N, D]; a subset is never larger than either set. Raises ValueError."""
    a, b = (s.float().cpu().numpy() for s in matrices(a, b, names=("first", "second")))
    m, rng, values = min(subset_size, len(a), len(b)), np.random.RandomState(seed), []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), m, replace=False)] for s in (a, b))
        kxx, kyy, kxy = (cubic_kernel(p, q) for p, q in ((x, x), (y, y), (x, y)))
        off_diagonal = sum(k.sum(dtype=np.float64) - np.trace(k, dtype=np.float64) for k in (kxx, kyy))
        values.append(off_diagonal / (m * (m - 1)) - 2 * kxy.mean(dtype=np.float64))
    return float(np.mean(values)), float(np.std(values))


def cubic_kernel(x, y):
    k = x @ y.T
    k /= x.shape[1]
    k += 1
    return k * k * k


def manifold_radii(features, k=3, block=2000):
    """Distance of each of the features [N, D] to its k-th nearest neighbour, [N], in blocks of rows. Raises ValueError."""
    (features,) = matrices(features, names=("a manifold's",), least=k + 1)
    features = features.float() - features.float().mean(0)  # float32 distances lose less around 0
    return torch.cat([torch.cdist(rows, features).topk(k + 1, largest=False).values[:, k] for rows in features.split(block)])


def precision_recall(real, generated, k=3, block=2000, real_radii=None):
    """Improved (precision, recall) (Kynkäänniemi et al. 2019) of feature sets [N, D]: the share of generated samples
    inside the real manifold, and the reverse; a manifold is the balls around its samples that reach their k-th nearest
    neighbour. Memory is block x N. `real_radii`: manifold_radii(real, k), if at hand. Raises ValueError."""
    real, generated = matrices(real, generated, least=k + 1)
    if real_radii is None:
        real_radii = manifold_radii(real, k, block)
    generated_radii = manifold_radii(generated, k, block)
    center = real.float().mean(0)
    real, generated = (s.float() - center for s in (real, generated))
    inside_real, inside_generated = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radius in zip(generated.split(block), generated_radii.split(block)):
        distance = torch.cdist(rows, real)
        inside_real.append((distance <= real_radii).any(1))
        inside_generated |= (distance <= radius[:, None]).any(0)
    return float(torch.cat(inside_real).double().mean()), float(inside_generated.double().mean())


def inception_score(logits, splits=10, seed=0):
    """(mean, std) over splits of exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016) of logits [N, classes], shuffled
    first, since class-ordered samples ruin the splits; seed None leaves the order. Raises ValueError."""
    (logits,) = matrices(logits, names=("logits of the",))
    if splits < 1 or len(logits) < splits:
        raise ValueError(f"{len(logits)} images can't make {splits} splits")
    if seed is not None:
        logits = logits[torch.as_tensor(np.random.RandomState(seed).permutation(len(logits)), device=logits.device)]
    log_p, n, scores = logits.double().log_softmax(1), len(logits), []
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        scores.append(float((part.exp() * (part - part.exp().mean(0).log())).nan_to_num(0.0).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------------------------------------------------------------
# Inception: torchvision's modules, and the few differences of FID's network


def resize_matrix(size, out=299):
    """[out, size] rows that interpolate as TensorFlow 1 did: source = i * size / out, no half-pixel centres."""
    source = torch.arange(out, dtype=torch.float32) * (size / out)
    low = source.long().clamp(max=size - 1)
    weight = source - low
    matrix = torch.zeros(out, size)
    matrix[torch.arange(out), low] += 1 - weight
    matrix[torch.arange(out), (low + 1).clamp(max=size - 1)] += weight
    return matrix


class Inception(nn.Module):
    """uint8 images [N, 1 or 3, H, W] -> (features [N, 2048], logits without their bias [N, 1008])."""

    def __init__(self):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                                   transform_input=False, init_weights=False).eval().requires_grad_(False)

    def load(self, state):
        """Take the weights, patch the pooling branches, fold the batch norms. Raises ValueError."""
        try:
            self.net.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError):
            raise ValueError("the weights are not those of FID's Inception-v3 (1008 outputs)") from None
        average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        for name, block in self.net.named_children():
            if name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
                patch_pool(block, average)
        patch_pool(self.net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))
        for m in list(self.net.modules()):
            if isinstance(m, torchvision.models.inception.BasicConv2d):
                m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
        return self

    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; Inception takes uint8 [N, 1 or 3, H, W]")
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


def patch_pool(block, pool):
    """Let the branch after `block`'s pooling see pool(input) instead of torchvision's average."""
    held = {}
    block.register_forward_pre_hook(lambda module, args: held.update(x=args[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, args: (pool(held.pop("x")),))


def inception(weights=None):
    """FID's Inception-v3 (2015-12-05), weights from a file, or None: fetched once, its hash checked. Raises ValueError."""
    try:
        if weights is None:
            state = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, progress=False)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as e:  # urllib, hashlib and pickle each have errors of their own
        if weights is not None:
            raise ValueError(f"{weights} can't be read as PyTorch weights ({type(e).__name__})") from None
        raise ValueError(f"{WEIGHTS} (91 MiB, SHA-256 6726825d...) could not be fetched; put it into "
                         f"{torch.hub.get_dir()}/checkpoints/ or name it with --weights, or type --features classifier") from None
    return Inception().load(state)


# ---------------------------------------------------------------------------------------------------------------------
# A classifier, where ImageNet's features mean little or can't be had


class Classifier(nn.Module):
    """uint8 images [N, C, H, W] -> (features [N, 128], logits [N, classes])."""

    def __init__(self, channels, num_classes, width=32):
        super().__init__()
        block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.body = nn.Sequential(block(channels, width), nn.MaxPool2d(2), block(width, 2 * width), nn.MaxPool2d(2),
                                  block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                  nn.Linear(16 * width, 128), nn.ReLU())
        self.head = nn.Linear(128, num_classes)

    def forward(self, images):
        features = self.body(cm.to_float(images).contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


def train_classifier(images, labels, test_images, test_labels, num_classes, device="cpu", steps=1000, seed=0):
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
    predicted = extract(net, test_images, "testing the classifier")[1].argmax(1)
    return net, float((predicted == test_labels).double().mean())


# ---------------------------------------------------------------------------------------------------------------------
# Images, features, and the table


def extract(net, images, what, batch_size=250):
    """(features, logits) of uint8 images [N, C, H, W], on the CPU; only a batch is ever in float."""
    device, parts = next(net.parameters()).device, []
    with torch.inference_mode(), tqdm(total=len(images), desc=what, unit="image", leave=False) as progress:
        for batch in images.split(batch_size):
            parts.append([v.float().cpu() for v in net(batch.to(device))])
            progress.update(len(batch))
    return tuple(torch.cat(p).clone() for p in zip(*parts))


def read_images(path):
    """uint8 [N, C, H, W], labels [N] or None, counts [C] or None, of an .npz or a folder of images. Raises ValueError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS)
        images = []
        for file in tqdm(files, "reading", leave=False):
            try:
                images.append(np.asarray(torchvision.datasets.folder.pil_loader(file)))
            except OSError as e:
                raise ValueError(f"{file} can't be read as an image ({e})") from None
        if len({i.shape for i in images}) != 1:
            raise ValueError(f"{path} holds " + ("images of several sizes" if images else "no images"))
        arrays = {"arr_0": np.stack(images)}
    else:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except Exception as e:  # zipfile, zlib, numpy and the system each have errors of their own
            raise ValueError(f"{path} can't be read as an .npz of images ({getattr(e, 'strerror', None) or type(e).__name__})") from None
    x, labels, counts = arrays.get("arr_0"), arrays.get("arr_1"), arrays.get("counts")
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"{path} holds no arr_0 of uint8 [N, H, W, 1 or 3]")
    if len(x) < 2:
        raise ValueError(f"{path} holds {len(x)} image; a distribution needs at least two")
    if labels is not None and (labels.shape != x.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0):
        raise ValueError(f"{path}: arr_1 must hold one integer label an image, from 0")
    return (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), None if labels is None else torch.from_numpy(labels).long(),
            None if counts is None else [int(n) for n in counts])


def score(real, generated, kind, logits=None, labels=None, radii=manifold_radii):
    """{metric: value} of one set of features against another; `logits` are the generated images'."""
    fd, kd = frechet_distance(real, generated), kernel_distance(real, generated)
    k = min(3, len(real) - 1, len(generated) - 1)
    precision, recall = precision_recall(real, generated, k, real_radii=radii(real, k))
    result = {"images": len(generated), "real": len(real), "FID" if kind == "inception" else "FD": fd,
              "KID" if kind == "inception" else "KD": kd[0], "KID std" if kind == "inception" else "KD std": kd[1],
              "precision": precision, "recall": recall}
    if kind == "inception":
        result["IS"], result["IS std"] = inception_score(logits, min(10, len(logits)))
    elif labels is not None:
        result["accuracy"] = float((logits.argmax(1) == labels).double().mean())
    return result


def cached(directory, kind, key, make):
    """torch.load of what `make` once gave for this key. The key hashes everything that the result depends on."""
    digest = hashlib.sha256()
    for part in key:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    path = directory / f"{kind}-{digest.hexdigest()[:16]}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    result = make()
    directory.mkdir(parents=True, exist_ok=True)
    cm.write_atomically(path, lambda p: torch.save(result, p))
    return result


def evaluate(samples, dataset=None, data=None, reference=None, features="inception", weights=None, device="cpu",
             cache="data/fid", batch_size=250):
    """All scores of `samples` (a path), {"settings": ..., "overall": ..., "Many": ..., ...}. Raises ValueError."""
    cache = Path(cache)
    images, labels, counts = read_images(samples)
    if reference is not None:
        real, real_labels, _ = read_images(reference)
        num_classes = 0 if real_labels is None else int(real_labels.max()) + 1
    elif dataset is not None:
        arrays, real_labels, names = cm.load_dataset(dataset, data, images.shape[2])
        real, num_classes = torch.from_numpy(np.ascontiguousarray(arrays)).permute(0, 3, 1, 2).contiguous(), len(names)
        real_labels = torch.from_numpy(real_labels)
    else:
        raise ValueError("the real images are missing: type --dataset NAME, or --reference with an .npz or a folder")
    if real.shape[1:] != images.shape[1:]:
        raise ValueError(f"sizes differ: samples are {list(images.shape[1:])}, real images {list(real.shape[1:])}")
    if labels is not None and real_labels is not None and labels.max() >= num_classes:
        raise ValueError(f"{samples} has labels from {int(labels.min())} to {int(labels.max())}; the real set has classes 0 to {num_classes - 1}")
    if counts is not None and real_labels is not None and len(counts) != num_classes:
        raise ValueError(f"{samples} has counts of {len(counts)} classes, the real set has {num_classes}")
    stamp = [real.numpy().tobytes(), tuple(real.shape), features]
    settings = {"features": features, "against": str(reference) if reference else f"{dataset}, balanced training set"}
    if features == "inception":
        net = inception(weights)
        stamp.append(float(sum(p.double().abs().sum() for p in net.parameters())))
    else:
        if real_labels is None:
            raise ValueError("--features classifier needs real images with labels: --dataset, or an .npz with arr_1")
        held, held_labels, held_name = real, real_labels, "its own training images"
        if dataset is not None and reference is None:
            arrays, test_labels, _ = cm.load_dataset(dataset, data, images.shape[2], train=False)
            if len(arrays):
                held, held_labels, held_name = torch.from_numpy(np.ascontiguousarray(arrays)).permute(0, 3, 1, 2), torch.from_numpy(test_labels), "held-out images"
        stamp += [real_labels.numpy().tobytes(), "classifier 1"]

        def fit():
            net, accuracy = train_classifier(real, real_labels, held, held_labels, num_classes, device)
            return {"weights": net.state_dict(), "accuracy": accuracy}
        state = cached(cache, "classifier", stamp, fit)
        net = Classifier(real.shape[1], num_classes).eval()
        net.load_state_dict(state["weights"])
        settings["classifier accuracy"] = state["accuracy"]
        print(f"the classifier recognises {100 * state['accuracy']:.1f} % of {held_name}", file=sys.stderr)
    net = net.to(device)
    real_features = cached(cache, "features", stamp, lambda: extract(net, real, "real images", batch_size)[0])
    generated, logits = extract(net, images, "generated images", batch_size)
    radii = lambda part, k: cached(cache, "radii", [part.numpy().tobytes(), k], lambda: manifold_radii(part, k))  # the slow part
    result = {"settings": settings, "overall": score(real_features, generated, features, logits, labels, radii)}
    if labels is not None and counts is not None and real_labels is not None:
        for name, classes in cm.splits(counts).items():
            classes = torch.as_tensor(classes)
            r, g = torch.isin(real_labels, classes), torch.isin(labels, classes)
            if min(int(r.sum()), int(g.sum())) >= 2:
                result[name] = score(real_features[r], generated[g], features, logits[g], labels[g], radii)
    return result


def show(result):
    """One table: a row a split; * where there are fewer images than the paper's protocol asks for."""
    rows = {k: v for k, v in result.items() if k != "settings"}
    columns = [c for c in rows["overall"] if not c.endswith(" std")]
    print(f"{result['settings']['features']} features, against {result['settings']['against']}")
    print(f"{'':8}" + "".join(f"{c:>22}" if f"{c} std" in rows["overall"] else f"{c:>11}" for c in columns))
    starred = False
    for name, values in rows.items():
        cells = []
        for c in columns:
            if c in ("images", "real"):
                few = c == "images" and values[c] < (50_000 if name == "overall" else 20_000)
                starred |= few
                cells.append(f"{values[c]:>10}{'*' if few else ' '}")
            elif f"{c} std" in values:
                cells.append(f"{values[c]:>12.5g} ± {values[c + ' std']:<7.2g}")
            else:
                cells.append(f"{values[c]:>11.4f}")
        print(f"{name:8}" + "".join(cells))
    if starred:
        print("* fewer than the paper's 50,000 (overall) or 20,000 (a split, from a file of its own): the distance is biased upwards")


def fail(message):
    """One line on stderr, status 2."""
    print("fid.py: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("samples", help="an .npz, or a folder of images")
    parser.add_argument("--dataset", choices=list(cm.DATASETS), help="real images: the balanced training set")
    parser.add_argument("--data", help="where the data set lies, as for cm.py")
    parser.add_argument("--reference", help="real images: an .npz or a folder, instead of --dataset")
    parser.add_argument("--features", choices=["inception", "classifier"], default="inception")
    parser.add_argument("--weights", help=f"{WEIGHTS}, if it can't be fetched")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the scores there, too")
    args = vars(parser.parse_args(argv))
    try:
        out = args.pop("json")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"--json {out}: {out.parent} is not a directory")
        try:
            torch.empty(0, device=args["device"])
        except (RuntimeError, AssertionError):
            raise ValueError(f"--device {args['device']} is not to be had here") from None
        result = evaluate(**args)
        show(result)
        if out is not None:
            cm.write_atomically(out, lambda p: p.write_text(json.dumps(result, indent=1)))
        return 0
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    sys.exit(main())
