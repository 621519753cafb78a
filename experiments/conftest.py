"""What several scripts' tests share."""

import os
import signal

import pytest


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
