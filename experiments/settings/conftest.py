"""What the three chapters' tests share."""

from pathlib import Path

import pytest

import cm


@pytest.fixture
def stopped_and_whole(kills_at, tmp_path, monkeypatch, capsys):
    """stopped_and_whole(main, args, *calls): what main(args) prints, after a check that it prints
    and leaves the same where Ctrl-C stopped it at these calls of cm.update. The last run's
    directory is the current one."""
    def both(main, args, *calls):
        results = []
        for name, kills in (("whole", ()), ("stopped", calls)):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)
            for call in kills:
                with monkeypatch.context() as patch:
                    patch.setattr(cm, "update", kills_at(call, cm.update))
                    with pytest.raises(SystemExit) as stopped:
                        main(args)
                assert stopped.value.code == 130
            capsys.readouterr()
            main(args)
            out = capsys.readouterr().out
            left = sorted(p for kind in ("*.csv", "*.png", "runs/*.npz") for p in Path().glob(kind))
            results.append((out[out.index("exploratory"):], [(p, p.read_bytes()) for p in left]))
        assert results[0] == results[1] and len(left) >= 2  # rows, a picture, samples
        return results[0][0]

    return both
