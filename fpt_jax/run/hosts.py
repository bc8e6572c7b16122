"""Communication between the hosts of a run, outside the compiled programs."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from etils import epy
from jax.experimental import multihost_utils

from fpt_jax.errors import UserError

with epy.lazy_imports():
  import orbax.checkpoint as ocp

T = TypeVar("T")
_LONGEST_WAIT = 7 * 24 * 3600  # seconds
_EXCHANGED = 64 << 20  # bytes that the hosts exchange at a time, all of them together
_barriers = itertools.count()


def wait_for_all_hosts(seconds: float = _LONGEST_WAIT, name: str = "") -> None:
  """Waits until all hosts have called this function with the same name, or equally often without a name.

  Hosts wait at a barrier of JAX's coordination service, however long the work of another host takes. XLA
  limits the time of a collective of the devices, on CPUs by --xla_cpu_collective_timeout_seconds. If a host
  dies, JAX ends the others.

  Args:
    seconds: the longest time to wait.
    name: a name that is used once.

  Raises:
    RuntimeError: some hosts have not called it after a number of seconds.
  """
  if jax.process_count() == 1:
    return
  barrier = ocp.multihost.get_barrier_sync_fn()
  barrier(key=f"fpt_jax/{name or next(_barriers)}", timeout_ms=round(1000 * seconds))


def is_same_everywhere(text: str) -> bool:
  """Returns whether all hosts have the same text."""
  return len(set(gather(text))) == 1


def agreed(fine: bool) -> bool:
  """Returns whether `fine` is true on every host."""
  return bool(from_all_hosts({"fine": np.array([fine], np.int32)})["fine"].all())


def is_true_on_first_host(flag: bool) -> bool:
  """Returns the first host's `flag` on every host."""
  return bool(from_all_hosts({"flag": np.array([flag], np.int32)})["flag"][0])


def on_first_host(action: Callable[[], T], error_type: type[UserError] = UserError) -> T | None:
  """Runs an action on the first host only, such as writing a file; the others wait.

  Args:
    action: the action.
    error_type: type of the error on the other hosts.

  Returns:
    What the action returns; None on the other hosts.

  Raises:
    UserError: the action has raised it. All hosts raise an error, so that none waits for the first one.
  """

  def here() -> T | None:
    return action() if jax.process_index() == 0 else None

  return _together(here, error_type("the first host has stopped; see its message"))


def on_every_host(action: Callable[[], T]) -> T:
  """Runs an action on every host, which may take one much longer than another.

  Raises:
    UserError: the action has raised it on a host. All hosts raise an error, so that none waits for that one.
  """
  return _together(action, UserError("another host has stopped; see its message"))


def _together(action: Callable[[], T], stopped: UserError) -> T:
  """Runs an action, waits for all hosts, and raises its error, or `stopped` if another host has an error."""
  result: T | None = None
  error: UserError | None = None
  try:
    result = action()
  except UserError as raised:
    error = raised
  wait_for_all_hosts()
  if not agreed(error is None):
    raise error or stopped
  return cast(T, result)


def from_first_host(action: Callable[[], Any]) -> Any:
  """Runs an action on the first host only; returns what it returns, which must fit into JSON, on every host.

  Raises:
    UserError: see `on_first_host`.
  """
  result = on_first_host(action)
  if jax.process_count() == 1:
    return result
  return gather(result)[0]


def gather(value: Any) -> list[Any]:
  """Returns the hosts' values, each of which must fit into JSON, in the order of the hosts."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(zlib.compress(json.dumps(value).encode()), np.uint8)
  lengths = from_all_hosts({"length": np.array([data.size])})["length"]
  # few sizes, so that few programs are compiled, and small parts, since every device gets those of all hosts
  part = min(1 << int(lengths.max()).bit_length(), _EXCHANGED // jax.process_count())
  parts = []
  for start in range(0, int(lengths.max()), part):
    mine = data[start : start + part]
    padded = np.pad(mine, (0, part - mine.size))[None]
    parts.append(from_all_hosts({"part": padded})["part"])
  rows = np.concatenate(parts, axis=1)
  return [
    json.loads(zlib.decompress(row[:length].tobytes()))
    for row, length in zip(rows, lengths, strict=True)
  ]


def this_host() -> dict[str, int]:
  """Returns the index of this host and the number of hosts, as keyword arguments."""
  return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def from_all_hosts(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the hosts' parts of a global batch, concatenated in order along the first axis."""
  if jax.process_count() == 1:
    return values
  # 64-bit integers are sent as pairs of 32 bits: JAX would truncate them
  wide = [name for name, value in values.items() if value.dtype == np.int64]
  pairs = {n: np.ascontiguousarray(values[n])[..., None].view(np.int32) for n in wide}
  gathered = multihost_utils.process_allgather(values | pairs, tiled=True)
  whole = {n: np.ascontiguousarray(gathered[n]).view(np.int64)[..., 0] for n in wide}
  return gathered | whole
