"""How long the fuzz tests look for inputs that their readers do not expect.

By default each draws the same few inputs in every run. With FPT_FUZZ_SECONDS=600 in the environment, each
draws other inputs for that time.
"""

import os
import time
from collections.abc import Callable

import hypothesis
from hypothesis.strategies import SearchStrategy

EXAMPLES = 60


def fuzz(strategy: SearchStrategy, check: Callable[[object], None]) -> None:
  """Calls `check` with values that a strategy draws.

  Args:
    strategy: the values.
    check: function that raises an error if something is wrong with the handling of a value.
  """
  settings = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  settings(hypothesis.given(strategy)(check))()
  end = time.monotonic() + float(os.environ.get("FPT_FUZZ_SECONDS", 0))
  seed = time.time_ns()
  while time.monotonic() < end:
    seed += 1
    other = hypothesis.seed(seed)(hypothesis.given(strategy)(check))
    hypothesis.settings(settings, derandomize=False)(other)()


def damage(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
  """Returns bytes in which parts are replaced.

  Args:
    data: the bytes.
    edits: position, number of removed bytes and inserted bytes of each edit. Positions beyond the end count
      from the beginning again.
  """
  for position, removed, inserted in edits:
    at = position % (len(data) + 1)
    data = data[:at] + inserted + data[at + removed :]
  return data
