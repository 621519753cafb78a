"""What several chapters' tests share."""

import functools
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # whatever pytest's import mode
import cm

torch.set_num_threads(1)  # pytest -n 2 runs two processes; results repeat with as many threads


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
def stopped_and_whole(tmp_path, monkeypatch, capsys):
    """stopped_and_whole(main, args, *kills): what main(args) prints, after a check that it prints
    and leaves the same where Ctrl-C stopped it, at the call of that number of each kill's function,
    (module, name, number), and that it does nothing twice. The last run's directory stays."""
    from experiments import common  # it needs pandas, which the exercises don't
    monkeypatch.setattr(common, "train", functools.partial(common.train, every=1))

    def killed(function, at):
        calls = itertools.count(1)

        def called(*args):
            if next(calls) == at:
                raise KeyboardInterrupt
            return function(*args)

        return called

    def both(main, args, *kills):
        results = []
        for name, stops in (("whole", ()), ("stopped", kills)):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            for module, function, number in stops:
                with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
                    patch.setattr(module, function, killed(getattr(module, function), number))
                    main(args)
            main(args)
            capsys.readouterr()
            with monkeypatch.context() as patch:
                for module, function, _ in kills:
                    patch.setattr(module, function, None)
                main(args)
            left = [p for kind in ("*.csv", "*.png", "**/*.npz") for p in Path().glob(kind)]
            results.append((capsys.readouterr().out, {p: p.read_bytes() for p in left}))
        assert results[0] == results[1] and Path("rows.csv") in left
        return results[0][0]

    return both
