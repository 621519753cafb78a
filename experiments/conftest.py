"""What several scripts' tests share."""

import functools

import numpy as np
import pytest

import cm


@pytest.fixture
def fewer_images(monkeypatch, tmp_path_factory):
    """fewer_images(n, m): fashion16 has n training images, one number or one a class, and m test
    images a class."""
    def make(n, m):
        with np.load(cm.FASHION16) as file:
            arrays = dict(file)
        for part, each in (("train", n), ("test", m)):
            labels = arrays[f"{part}_labels"]
            place = np.arange(len(labels)) % (len(labels) // 10)  # in its class
            kept = place < np.broadcast_to(each, 10)[labels]
            arrays |= {f"{part}_{what}": arrays[f"{part}_{what}"][kept]
                       for what in ("images", "labels")}
        path = tmp_path_factory.mktemp("fewer") / "fashion16.npz"
        np.savez(path, **arrays)
        monkeypatch.setattr(cm, "FASHION16", path)

    return make


@pytest.fixture
def kills_at(monkeypatch):
    """kills_at(call, function): `function`, of which the call of that number is Ctrl-C. Before it
    common.train writes a checkpoint after every step."""
    from experiments import common
    monkeypatch.setattr(common, "train", functools.partial(common.train, every=1))

    def make(call, function):
        calls = []

        def killed(*args):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return function(*args)

        return killed

    return make
