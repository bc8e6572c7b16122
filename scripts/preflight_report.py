"""Comparisons of the preflight's checks, and the table of their results."""

import dataclasses
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from fpt_jax.errors import UserError, one_line
from fpt_jax.run import hosts


class DifferenceError(Exception):
  """Two results differ; the message says in what."""


@dataclasses.dataclass(frozen=True)
class Check:
  """A check by name; it returns its figure, and raises an exception if it fails."""

  name: str
  run: Callable[[], str]


def largest_difference(
  got: Mapping[str, jax.typing.ArrayLike],
  want: Mapping[str, jax.typing.ArrayLike],
  tolerance: float,
) -> float:
  """Compares arrays, each relative to its largest expected absolute value.

  Args:
    got: arrays of numbers by name.
    want: the expected arrays, with the same names.
    tolerance: largest difference that is accepted.

  Returns:
    The largest difference. An array of expected zeros counts as if its largest value were 1.

  Raises:
    DifferenceError: names or shapes differ, a value is not finite, or a difference exceeds the tolerance.
  """
  if set(got) != set(want):
    raise DifferenceError(f"got {sorted(got)} instead of {sorted(want)}")
  largest = 0.0
  for name in want:
    g, w = (np.asarray(values[name], np.float64) for values in (got, want))
    if g.shape != w.shape:
      raise DifferenceError(f"{name} has shape {g.shape} instead of {w.shape}")
    if not np.isfinite(g).all():
      raise DifferenceError(f"{name}: {np.sum(~np.isfinite(g))} of {g.size} values are not finite")
    scale = np.abs(w).max() or 1.0
    difference = np.abs(g - w) / scale
    if difference.max() > tolerance:
      place = np.unravel_index(difference.argmax(), difference.shape)
      where = f"{name}[{', '.join(map(str, place))}]" if place else name
      raise DifferenceError(
        f"{where} is {g[place]:.6g} instead of {w[place]:.6g}: a difference of {difference.max():.1e} of "
        f"the largest value, more than {tolerance:.1e}"
      )
    largest = max(largest, float(difference.max()))
  return largest


def check_same_bits(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
  """Compares arrays bit for bit, so that NaN equals itself, and 0.0 differs from -0.0.

  Raises:
    DifferenceError: names, dtypes, shapes or bits differ.
  """
  if set(got) != set(want):
    raise DifferenceError(f"got {sorted(got)} instead of {sorted(want)}")
  for name in want:
    g, w = got[name], want[name]
    if (g.dtype, g.shape) != (w.dtype, w.shape):
      raise DifferenceError(f"{name} is {g.dtype} {g.shape} instead of {w.dtype} {w.shape}")
    bits = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (g, w)]
    changed = np.count_nonzero(bits[0] != bits[1])
    if changed:
      raise DifferenceError(f"{name}: {changed} of {bits[0].size} bytes differ")


def run_checks(checks: Sequence[Check], *, limit: float, trace: bool = False) -> bool:
  """Runs checks one after the other on all hosts; the first host prints a line for each.

  A check that fails does not end the others. One that does not end in time ends the process with status 1:
  the devices may be waiting for one another.

  Args:
    checks: the same checks on all hosts.
    limit: seconds that a check may take.
    trace: whether to print the stack trace of each failure to standard error.

  Returns:
    Whether all checks have passed on all hosts.
  """
  passed = True
  for check in checks:
    begun = time.monotonic()
    watch = threading.Timer(limit, _give_up, (check.name, limit))
    watch.daemon = True
    watch.start()
    figure, problem = _outcome(check, trace)
    problem = _of_all_hosts(problem)
    watch.cancel()
    passed &= not problem
    _print_line(check.name, not problem, time.monotonic() - begun, problem or figure)
  return passed


def _outcome(check: Check, trace: bool) -> tuple[str, str]:
  """Returns a check's figure and its problem, one of which is empty."""
  try:
    return check.run(), ""
  except Exception as error:  # whatever a compiler, a device or a disk raises
    if trace:
      traceback.print_exc()
    text = one_line(error, 300) or "no message"
    known = isinstance(error, DifferenceError | UserError)
    return "", text if known else f"{type(error).__name__}: {text}"


def _of_all_hosts(problem: str) -> str:
  """Returns the problem of the first host that has one, with the host's index; "" if none has."""
  if jax.process_count() == 1:
    return problem
  try:
    problems = hosts.gather(problem)
  except Exception as error:  # the devices of the hosts do not reach one another
    return f"{problem}; the hosts cannot exchange results ({one_line(error, 200)})".lstrip("; ")
  return next((f"host {host}: {text}" for host, text in enumerate(problems) if text), "")


def _print_line(name: str, passed: bool, seconds: float, text: str) -> None:
  if jax.process_index() == 0:
    print(f"{name:<24}{'ok' if passed else 'FAILED':<8}{seconds:>6.1f} s  {text}", flush=True)


def _give_up(name: str, limit: float) -> None:
  _print_line(name, False, limit, "no result; the devices may be waiting for one another")
  os._exit(1)  # the thread that waits cannot be interrupted
