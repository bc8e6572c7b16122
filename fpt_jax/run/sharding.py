"""The device mesh, the shardings of arrays, and communication between hosts.

Data parallelism: every device has all weights and its share of the images of a global batch.
"""

import math
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpt_jax.errors import UserError, one_line

T = TypeVar("T")


def initialize() -> None:
  """Joins the other hosts of a TPU pod or cluster; on a single host it does nothing.

  A pod is recognised by the environment variables of its runtime. Elsewhere, JAX_COORDINATOR_ADDRESS has the
  address of the first process, JAX_NUM_PROCESSES their number, and JAX_PROCESS_ID the index of this one;
  under Slurm and Open MPI, which tell JAX the last two, they can be left out.

  Raises:
    UserError: the variables are incomplete or wrong, or the other processes cannot be reached.
  """
  if not is_one_of_several() or jax.distributed.is_initialized():
    return
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  numbers = {}
  for argument, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
      raise UserError(f"{name}={text} must be a number")
    if text:
      numbers[argument] = int(text)
  if numbers.get("process_id", 0) >= numbers.get("num_processes", math.inf):
    raise UserError(
      f"JAX_PROCESS_ID={numbers['process_id']} must be less than "
      f"JAX_NUM_PROCESSES={numbers['num_processes']}"
    )
  # the collectives of several CPU processes; other devices have their own
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(**numbers)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f"cannot join the other processes at JAX_COORDINATOR_ADDRESS={address} ({one_line(error, 200)}); set "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in every process"
    ) from error


def is_one_of_several() -> bool:
  """Returns whether the environment says that this process is one of several, see `initialize`."""
  pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
  return pod or bool(os.environ.get("JAX_COORDINATOR_ADDRESS"))


def is_same_everywhere(text: str) -> bool:
  """Returns whether all hosts have the same text, of at most 64 bytes."""
  row = np.frombuffer(text.encode().ljust(64, b"\0"), np.uint8)[None]
  rows = from_all_hosts({"text": row})["text"]
  return bool((rows == rows[:1]).all())


def agreed(fine: bool) -> bool:
  """Returns whether `fine` is true on every host."""
  return bool(from_all_hosts({"fine": np.array([fine], np.int32)})["fine"].all())


def on_first_host(action: Callable[[], T], error_type: type[UserError] = UserError) -> T | None:
  """Runs an action on the first host only, such as writing a file.

  Args:
    action: the action.
    error_type: type of the error on the other hosts.

  Returns:
    What the action returns; None on the other hosts.

  Raises:
    UserError: the action has raised it. All hosts raise an error, so that none waits for the first one.
  """
  result, error = None, None
  if jax.process_index() == 0:
    try:
      result = action()
    except UserError as raised:
      error = raised
  if not agreed(error is None):
    raise error or error_type("the first host has stopped; see its message")
  return result


def this_host() -> dict[str, int]:
  """Returns the index of this host and the number of hosts, as keyword arguments."""
  return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def mesh(*batch_sizes: int) -> Mesh:
  """Returns a mesh of all devices along one axis, "data".

  Raises:
    UserError: the devices cannot share global batches of these sizes evenly.
  """
  devices = jax.device_count()
  for batch_size in batch_sizes:
    if batch_size % devices:
      raise UserError(
        f"a batch size of {batch_size} cannot be shared by {devices} devices; set config.batch_size and "
        f"config.eval.batch_size to multiples of {devices}"
      )
  return jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays of which every device has a copy."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that are split along their first axis."""
  return NamedSharding(mesh, PartitionSpec("data"))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this host's part of a global batch on the devices of the mesh."""
  return {
    name: jax.make_array_from_process_local_data(over_batch(mesh), value)
    for name, value in batch.items()
  }


def replicate(arrays: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts arrays, equal on every host, on all devices of the mesh."""
  return {
    name: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(value))
    for name, value in arrays.items()
  }


def local_part(array: jax.Array) -> np.ndarray:
  """Returns this host's part of an array that is sharded along its first axis."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


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
