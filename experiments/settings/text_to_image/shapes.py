"""The captioned images of this chapter: shapes, their attributes as words. No command line.

A data set of one's own, CUB-200 or Oxford-102, enters here: see README.md.
"""

import math

import numpy as np
import torch

RADII = {"small": (0.32, 0.38), "large": (0.48, 0.53)}  # of half the image's side
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # 60 degrees of hue apart
PLACES = {"upper left": (-0.36, -0.36), "upper right": (0.36, -0.36), "centre": (0, 0),
          "lower left": (-0.36, 0.36), "lower right": (0.36, 0.36)}  # (x, y), y downwards
UPRIGHT = {"heart": 225, "star": 270}  # degrees from how SHAPES has them
LENGTH = 7  # words a caption, at most


def box(x, y, a, b):
    """Signed distance (nearly) from points (x, y) to the rectangle |x| < a, |y| < b."""
    return np.maximum(abs(x) - a, abs(y) - b)


def triangle(x, y):  # three half-planes
    normals = np.pi * np.array([0.5, 7 / 6, 11 / 6])
    return np.max([x * math.cos(a) + y * math.sin(a) for a in normals], 0) - 0.5


def heart(x, y):  # a square with a half-disc on each of two sides
    x, y = x + 0.2, y + 0.2
    discs = np.minimum(np.hypot(x - 0.5, y), np.hypot(x, y - 0.5)) - 0.5
    return np.minimum(box(x, y, 0.5, 0.5), discs)


def star(x, y):  # five-fold symmetry: fold the angle, then one edge from tip to notch
    a = abs((np.arctan2(y, x) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch = 0.45 * np.array([math.cos(np.pi / 5), math.sin(np.pi / 5)])
    edge = math.hypot(notch[1], 1.0 - notch[0])
    normal = np.array([notch[1], 1.0 - notch[0]]) / edge
    r = np.hypot(x, y)
    return (r * np.cos(a) - 1.0) * normal[0] + r * np.sin(a) * normal[1]


SHAPES = {  # signed distance, negative inside, from points (x, y) to a shape of about unit radius
    "disc": lambda x, y: np.hypot(x, y) - 0.85,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.7) - 0.22,
    "cross": lambda x, y: np.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95)),
    "bar": lambda x, y: np.hypot(x - np.clip(x, -0.75, 0.75), y) - 0.22,
    "square": lambda x, y: box(x, y, 0.75, 0.75),
    "triangle": triangle,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.72 - np.hypot(x - 0.42, y)),
    "heart": heart,
    "star": star,
    "frame": lambda x, y: abs(box(x, y, 0.66, 0.66)) - 0.17,
}


def captioned_images(per_class, seed, size=32):
    """Drawn shapes: uint8 [10 * per_class, 3, size, size], their captions, labels [N] by class.

    A caption is "a SIZE COLOUR SHAPE, PLACE", then ", turned" where the shape isn't upright (disc
    and ring always are). Radius, hue, place and angle vary within each word."""
    rng, images, captions = np.random.RandomState(seed), [], []
    for shape in SHAPES:
        sizes = rng.choice(list(RADII), per_class)
        places = rng.choice(list(PLACES), per_class)
        colours = rng.randint(len(COLOURS), size=per_class)
        turned = (rng.rand(per_class) < 0.5) & (shape not in ("disc", "ring"))
        for a, b, c, is_turned in zip(sizes, colours, places, turned, strict=True):
            captions.append(f"a {a} {COLOURS[b]} {shape}, {c}" + ", turned" * int(is_turned))

        radius = rng.uniform(*np.array([RADII[a] for a in sizes]).T)
        centre = np.array([PLACES[c] for c in places]) + rng.uniform(-0.04, 0.04, (per_class, 2))
        degrees = rng.uniform(25, 45, per_class) * rng.choice([-1, 1], per_class) * turned
        angle = np.radians(degrees + UPRIGHT.get(shape, 0))
        hue = colours / len(COLOURS) + rng.uniform(-0.04, 0.04, per_class)
        images.append(drawn(SHAPES[shape], radius, centre, angle, colour_of(hue), size))
    images = torch.from_numpy(np.concatenate(images))
    return images, captions, np.repeat(np.arange(len(SHAPES)), per_class)


def drawn(distance, radius, centre, angle, colour, size):
    """Anti-aliased shapes on black, uint8 [N, 3, size, size]: distance of SHAPES; radius [N];
    centre [N, 2] (x, y) in [-1, 1], their centroid; angle [N] in radians; colour [N, 3]."""
    fine = np.mgrid[-1:1:201j, -1:1:201j]  # (y, x)
    centroid_y, centroid_x = fine[:, distance(*fine[::-1]) < 0].mean(1)  # of the shape in SHAPES
    radius, angle = radius[:, None, None], angle[:, None, None]
    grid = (np.arange(size) + 0.5) / size * 2 - 1  # pixel centres
    u = (grid - centre[:, 0, None, None]) / radius  # [N, 1, size]
    v = (grid[:, None] - centre[:, 1, None, None]) / radius  # [N, size, 1]
    x = u * np.cos(angle) + v * np.sin(angle) + centroid_x
    y = v * np.cos(angle) - u * np.sin(angle) + centroid_y
    cover = np.clip(0.5 - distance(x, y) * radius * size / 2, 0, 1)
    return np.rint(255 * cover[:, None] * colour[:, :, None, None]).astype(np.uint8)


def colour_of(hue):
    """Red, green, blue in [0, 1], [N, 3], of hue [N] in turns: cosines a third apart, cut off."""
    turns = hue[:, None] - np.array([0, 1 / 3, 2 / 3])
    return np.clip(1.5 * np.cos(2 * np.pi * turns) + 0.75, 0.05, 1)


def read(images):
    """(colours, places), words, of uint8 images [N, 3, H, W]; "?" where no pixel is lit.

    The colour: red, green and blue are unit vectors a third of a turn apart; the lit pixels' sum
    has the hue's angle. The place: the lit pixels' centroid, weighted by brightness."""
    x = images.double() / 255
    x = x * (x.amax(1, keepdim=True) > 0.25)
    vectors = torch.exp(2j * torch.pi * torch.tensor([0, 1 / 3, 2 / 3], dtype=torch.float64))
    hue = (x.mean((2, 3)) * vectors).sum(1).angle() / (2 * torch.pi)
    colours = (hue * len(COLOURS)).round().long() % len(COLOURS)

    light = x.amax(1)  # [N, H, W]
    total = light.sum((1, 2))
    grid = (torch.arange(x.shape[2]) + 0.5) / x.shape[2] * 2 - 1
    centroid = torch.stack([(light.sum(1) * grid).sum(1), (light.sum(2) * grid).sum(1)], 1)
    known = torch.tensor(list(PLACES.values()), dtype=torch.float64)
    places = torch.cdist(centroid / total[:, None], known).argmin(1)
    return [[names[i] if lit else "?" for i, lit in zip(found, total > 0, strict=True)]
            for names, found in ((COLOURS, colours), (list(PLACES), places))]


def word_ids(captions, words):
    """[N, LENGTH] int64: each word's number in `words`, from 1; then 0, which is attended to like
    any word, as in Stable Diffusion. Raises ValueError."""
    ids = torch.zeros(len(captions), LENGTH, dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        used = caption.lower().replace(",", " ").split()
        wrong = [word for word in used if word not in words] + used[LENGTH:]
        if wrong:
            raise ValueError(f"unknown word, or one too many: {wrong[0]!r}; a caption is up to "
                             f"{LENGTH} of {', '.join(words)}")
        row[:len(used)] = torch.tensor([words.index(word) + 1 for word in used])
    return ids
