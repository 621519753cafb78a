"""What several scripts' tests share."""

import os
import signal

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
def kills_at():
    """kills_at(call, function): `function`, whose call of that number stops the process first."""
    def make(call, function):
        calls = []

        def killed(*args):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args)

        return killed

    return make
