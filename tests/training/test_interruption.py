"""Signals in a training: the first one waits for the step, a second one doesn't."""

from __future__ import annotations

import os
import signal

import pytest

from repfx.training.interruption import noticed_signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noticed_and_the_second_obeyed_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with noticed_signals() as stopping:
        assert not stopping()
        send(number)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert signal.getsignal(number) == before


def test_a_launcher_s_sigterm_after_ctrl_c_waits_for_the_step_too() -> None:
    with noticed_signals() as stopping:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
