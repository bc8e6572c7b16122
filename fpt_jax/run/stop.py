"""Stopping on SIGINT and SIGTERM at a step that all hosts agree on."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818 - it is not an error
  """Ends an evaluation after a signal."""


class StopSignal:
  """Context that remembers signals, so that a run ends after a step, with a checkpoint.

  A second signal ends the process at once. With several hosts, SIGTERM is left to JAX's preemption service,
  which makes all hosts stop at the same step, whichever of them got the signal.
  """

  def __init__(self):
    self._hosts = jax.process_count()
    self._calls = 0
    self._agreed = False
    self._since: float | None = None

  def __enter__(self):
    ours = SIGNALS if self._hosts == 1 else (signal.SIGINT,)
    self._before = {number: signal.signal(number, self._remember) for number in ours}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def agreed(self) -> bool:
    """Returns whether to stop now; all hosts must call it equally often, and get the same answer."""
    if not self._agreed:
      self._calls += 1
      if self._hosts == 1:
        self._agreed = self._since is not None
      else:
        self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
    if self._agreed and self._since is None:
      self._since = time.monotonic()
    return self._agreed

  @property
  def seconds(self) -> float:
    """Seconds since the signal, or since all hosts have agreed to stop."""
    return 0.0 if self._since is None else time.monotonic() - self._since

  @contextlib.contextmanager
  def during_evaluation(self, check_lock: Callable[[], None]) -> Iterator[None]:
    """Context in which `check` calls `check_lock`, and raises Stopped once all hosts agree to stop."""
    global _check

    def check_signal_and_lock() -> None:
      check_lock()
      if self.agreed():
        raise Stopped

    _check = check_signal_and_lock
    try:
      yield
    finally:
      _check = None

  def _remember(self, number, frame):
    del frame
    logging.warning("signal %d: saving, then stopping; send it again to stop at once", number)
    self._since = time.monotonic()
    signal.signal(number, self._before[number])
    if self._hosts > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # to JAX's preemption service


_check: Callable[[], None] | None = None


def check() -> None:
  """Called between the batches of an evaluation: ends it if the training that it belongs to must stop.

  Raises:
    Stopped: see `StopSignal.during_evaluation`; outside of it, nothing is raised.
  """
  if _check is not None:
    _check()
