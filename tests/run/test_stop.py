"""Signals are remembered, agreed on, and end evaluations."""

import os
import signal

import pytest

from fpt_jax.run import stop


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_is_remembered_and_the_handlers_are_restored(number):
  before = {n: signal.getsignal(n) for n in stop.SIGNALS}
  with stop.StopSignal() as found:
    assert not found.agreed() and found.seconds == 0
    os.kill(os.getpid(), number)
    assert found.agreed() and found.agreed() and found.seconds > 0
    # a second one has its usual effect
    assert signal.getsignal(number) == before[number]
  assert {n: signal.getsignal(n) for n in stop.SIGNALS} == before


def test_only_the_evaluation_of_a_training_is_ended():
  with stop.StopSignal() as found:
    stop.check()
    with found.during_evaluation(lambda: None):
      stop.check()
      os.kill(os.getpid(), signal.SIGTERM)
      with pytest.raises(stop.Stopped):
        stop.check()
    stop.check()  # --mode=eval, and evaluations of other code
