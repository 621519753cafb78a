"""Make assets/fashion16.npz of Fashion-MNIST, as `apt-get install dataset-fashion-mnist` has it."""

import gzip
from pathlib import Path

import numpy as np

import cm

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def read(part):
    """Images uint8 [N, 16, 16], padded to 32x32 and averaged 2x2, and labels [N]."""
    pixels, labels = (gzip.decompress((DEBIAN / f"{part}-{file}-ubyte.gz").read_bytes())
                      for file in ("images-idx3", "labels-idx1"))
    images = np.pad(np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28, 1),
                    ((0, 0), (2, 2), (2, 2), (0, 0)))
    return cm.shrink(images, 16)[..., 0], np.frombuffer(labels, np.uint8, offset=8)


def lay_out(images, labels, per_class):
    """The first `per_class` images that seed 0 draws of each class, where it draws them again."""
    kept = np.repeat(np.unique(labels), per_class)
    stored = np.empty((len(kept), *images.shape[1:]), np.uint8)
    places, drawn = (cm.long_tail_indices(y, 1, n_max=per_class) for y in (kept, labels))
    stored[places] = images[drawn]
    return stored, kept


def make(path):
    train_images, train_labels = lay_out(*read("train"), 1000)
    images, labels = read("t10k")
    test = np.concatenate([np.where(labels == c)[0][:200] for c in range(10)])
    np.savez_compressed(path, train_images=train_images, train_labels=train_labels,
                        test_images=images[test], test_labels=labels[test])


if __name__ == "__main__":
    make(cm.FASHION16)
