"""What several chapters' tests share."""

import functools
import sys
from pathlib import Path
from unittest import mock

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
        with np.load(cm.FASHION16) as file:  # as many images of each class, class by class
            kept = {name: file[name].reshape(10, -1, *file[name].shape[1:])[
                :, :n if "train" in name else m] for name in file.files}
        path = tmp_path_factory.mktemp("fewer") / "fashion16.npz"
        np.savez(path, **{name: values.reshape(-1, *values.shape[2:])
                          for name, values in kept.items()})
        monkeypatch.setattr(cm, "FASHION16", path)

    return make


@pytest.fixture
def weighed():
    """weighed(d, y, counts): L_CM [B] of distances d [B] of classes y by Eqs. (3) and (2)."""
    def l_cm(d, y, counts, w_div=0.2, margin=0.1):
        n = torch.as_tensor(counts, dtype=torch.float64)
        w = (len(n) * n / n.sum() - w_div * len(n) / (n * (1 / n).sum()))[y]
        return torch.where(w > 0, w * d, w * d.clamp(max=margin))

    return l_cm


@pytest.fixture
def stopped_and_whole(tmp_path, monkeypatch, capsys):
    """stopped_and_whole(main, args, *kills): what main(args) prints, after a check that it prints
    and leaves the same where Ctrl-C stopped it, at the call of that number of each kill's function,
    (module, name, number), and that it does nothing twice. The last run's directory stays."""
    from experiments import common  # it needs pandas, which the exercises don't
    monkeypatch.setattr(common, "train", functools.partial(common.train, every=1))

    def both(main, args, *kills):
        results = []
        for name, stops in (("whole", ()), ("stopped", kills)):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            for module, function, number in stops:
                effects = [*(number - 1) * [mock.DEFAULT], KeyboardInterrupt]
                killed = mock.Mock(wraps=getattr(module, function), side_effect=effects)
                with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
                    patch.setattr(module, function, killed)
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
