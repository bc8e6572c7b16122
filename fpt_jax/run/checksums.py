"""Checksums of arrays, whatever their layout: a checkpoint that a disk has changed is noticed.

The checksum of an array is the sum over its elements, modulo 2**64, of the element's bits times an odd number
that depends on its position. Sums of parts add up to the sum of the whole, so that it does not matter how an
array is divided among devices, and no part has to leave its host. A change of a single bit always changes the
sum.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np

from fpt_jax.run.hosts import from_all_hosts

BLOCK = 1 << 18  # elements that are summed at a time
MODULUS = 2**64
STEP = 0x9E3779B97F4A7C15 * 2 % MODULUS  # from the golden ratio; a multiple plus 1 is odd
_STEPS = np.arange(BLOCK, dtype=np.uint64) * np.uint64(STEP)


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Returns the checksum of each array; all hosts get the same.

  Arrays that are local to each host, such as those on one device, are not added up over the hosts.

  Args:
    arrays: arrays by name, of any sharding, with a dtype of at most 64 bits.
  """
  local = np.array([[local_sum(array) for array in arrays.values()]], np.uint64)
  of_hosts = from_all_hosts({"sums": local.view(np.int64)})["sums"].view(np.uint64)
  own = np.array([array.is_fully_addressable for array in arrays.values()], bool)
  sums = np.where(own, local[0], of_hosts.sum(axis=0, dtype=np.uint64))
  return dict(zip(arrays, sums.tolist(), strict=True))


def local_sum(array: jax.Array) -> int:
  """Returns the sum over the parts of an array that this host counts: each part is counted by one host."""
  parts = (
    part_sum(np.asarray(shard.data), shard.index, array.shape)
    for shard in array.addressable_shards
    if shard.replica_id == 0
  )
  return sum(parts) % MODULUS


def part_sum(values: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
  """Returns the sum over a part of an array.

  Args:
    values: the part.
    index: its place, a slice for each axis of the array.
    shape: shape of the whole array.
  """
  starts = [part.indices(edge)[0] for part, edge in zip(index, shape, strict=True)]
  if values.shape[1:] == shape[1:]:
    return run_sum(values.reshape(-1), starts[0] * math.prod(shape[1:]) if shape else 0)
  # the rows of the last axis are the longest runs of positions that follow each other
  total = 0
  for place in np.ndindex(values.shape[:-1]):
    first = np.ravel_multi_index([*np.add(place, starts[:-1]), starts[-1]], shape)
    total += run_sum(values[place], int(first))
  return total % MODULUS


def run_sum(values: np.ndarray, first: int) -> int:
  """Returns the sum over elements at positions first, first + 1, ... of an array."""
  bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
  total = 0
  for start in range(0, bits.size, BLOCK):
    block = bits[start : start + BLOCK].astype(np.uint64)
    weight = (first + start) * STEP + 1
    total += int(np.sum(block)) * weight + int(np.dot(block, _STEPS[: block.size]))
  return total % MODULUS
