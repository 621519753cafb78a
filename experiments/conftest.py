"""What several scripts' tests share."""

import functools
import itertools

import numpy as np
import pytest

import cm


@pytest.fixture
def fewer_images(monkeypatch, tmp_path_factory):
    """fewer_images(n, m): fashion16 has n training and m test images a class."""
    def make(n, m):
        path = tmp_path_factory.mktemp("fewer") / "fashion16.npz"
        arrays = {}
        with np.load(cm.FASHION16) as file:
            for part, each in (("train", n), ("test", m)):
                labels = file[f"{part}_labels"]
                kept = np.arange(len(labels)) % (len(labels) // 10) < each  # by place in the class
                for what in (f"{part}_images", f"{part}_labels"):
                    arrays[what] = file[what][kept]
        np.savez(path, **arrays)
        monkeypatch.setattr(cm, "FASHION16", path)

    return make


@pytest.fixture
def kills_at(monkeypatch):
    """kills_at(call, function): `function`, of which the call of that number is Ctrl-C. Before it
    common.train writes a checkpoint after every step."""
    from experiments import common  # it needs pandas, which the exercises don't
    monkeypatch.setattr(common, "train", functools.partial(common.train, every=1))

    def make(call, function):
        calls = itertools.count(1)

        def killed(*args):
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*args)

        return killed

    return make
