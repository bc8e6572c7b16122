"""Which images make up which batch: pure functions of the seed and the step.

A batch holds images of one bucket (one canvas size). The images of a bucket form an endless stream of
epochs, each with another permutation, so that within an epoch no image is repeated or left out. The
bucket of a step follows a low-discrepancy sequence, in proportion to the buckets' numbers of images.
Nothing depends on earlier steps, so that starting at any step is free, and all hosts agree.

N images of the split, B images of a global batch, K buckets, S steps.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fpt_jax.errors import UserError

_ORDER = 0x0DE5  # separates these random numbers from others of the same seed
_GOLDEN = np.uint64(
  0x9E3779B97F4A7C15
)  # 2**64 / golden ratio: spreads steps evenly over [0, 2**64)


def assign_buckets(sizes_N2: np.ndarray, buckets: ArrayLike) -> np.ndarray:
  """Finds for each image the smallest bucket that holds it.

  Args:
    sizes_N2: (height, width) of each image after the resize in pixels, int [N, 2].
    buckets: (height, width) of each canvas in pixels.

  Returns:
    Indices into `buckets`, int [N].

  Raises:
    UserError: an image fits no bucket.
  """
  buckets_K2 = np.asarray(buckets).reshape(-1, 2)
  fits_NK = np.all(sizes_N2[:, None, :] <= buckets_K2[None, :, :], axis=-1)
  unfit = np.flatnonzero(~np.any(fits_NK, axis=1))
  if unfit.size:
    height, width = sizes_N2[unfit[0]]
    raise UserError(
      f"data.buckets: an image resized to {height}x{width} (height x width) fits none of "
      f"{[tuple(map(int, b)) for b in buckets_K2]}; add a larger bucket, or resize to a smaller size"
    )
  areas_1K = np.where(fits_NK, buckets_K2.prod(1)[None, :], np.iinfo(np.int64).max)
  return areas_1K.argmin(1)


class TrainOrder:
  """The endless order of training images.

  Args:
    bucket_N: bucket of each image, int [N].
    seed: seed of the run.
    batch_size: number of images of a global batch.
  """

  def __init__(self, bucket_N: np.ndarray, *, seed: int, batch_size: int):
    if len(bucket_N) == 0:
      raise ValueError("an order needs at least one image, got none")
    self._seed, self._batch_size = seed, batch_size
    self._members = [np.flatnonzero(bucket_N == k) for k in range(bucket_N.max() + 1)]
    counts = [len(members) for members in self._members]
    # integers, so that 64 bits are enough for any step; the last bound, 2**64, is left out
    self._bounds = np.array(
      [int(c) * 2**64 // sum(counts) for c in np.cumsum(counts)[:-1]], np.uint64
    )
    self._table = functools.lru_cache(maxsize=2)(self._make_table)
    self._permutation = functools.lru_cache(maxsize=16)(self._make_permutation)

  def batch(self, step: int) -> tuple[np.ndarray, int]:
    """Returns the global batch of a step: indices of images, int [B], and their bucket."""
    bucket_S, rank_S = self._table(max(4096, 1 << int(step).bit_length()))
    bucket = int(bucket_S[step])
    members = self._members[bucket]
    positions_B = int(rank_S[step]) * self._batch_size + np.arange(self._batch_size)
    epochs_B, places_B = np.divmod(positions_B, len(members))
    indices_B = [
      members[self._permutation(bucket, int(epoch))[place]]
      for epoch, place in zip(epochs_B, places_B, strict=True)
    ]
    return np.array(indices_B), bucket

  def _make_table(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for steps 0..steps-1, the bucket and the number of earlier steps with the same one."""
    with np.errstate(over="ignore"):
      points_S = np.arange(steps, dtype=np.uint64) * _GOLDEN
    bucket_S = np.searchsorted(self._bounds, points_S, side="right")
    rank_S = np.zeros(steps, np.int64)
    for k in range(len(self._members)):
      is_k_S = bucket_S == k
      rank_S[is_k_S] = np.cumsum(is_k_S)[is_k_S] - 1
    return bucket_S.astype(np.int32), rank_S

  def _make_permutation(self, bucket: int, epoch: int) -> np.ndarray:
    # NumPy keeps raw bits the same in every version, unlike Generator.permutation
    bits = np.random.Philox(np.random.SeedSequence((self._seed, _ORDER, bucket, epoch)))
    return np.argsort(bits.random_raw(len(self._members[bucket])), kind="stable")


def eval_order(
  bucket_N: np.ndarray, *, batch_size: int
) -> list[tuple[np.ndarray, np.ndarray, int]]:
  """Returns the batches of one pass over a split, with every image exactly once.

  Args:
    bucket_N: bucket of each image, int [N].
    batch_size: number of images of a global batch.

  Returns:
    (indices_B, valid_B, bucket) of each batch. The last batch of a bucket is filled up by repeating
    an image, with valid_B False.
  """
  batches = []
  for bucket in np.unique(bucket_N):
    members = np.flatnonzero(bucket_N == bucket)
    for start in range(0, len(members), batch_size):
      places_B = start + np.arange(batch_size)
      valid_B = places_B < len(members)
      batches.append((members[np.where(valid_B, places_B, start)], valid_B, int(bucket)))
  return batches


class Plan(NamedTuple):
  """The images that a host reads at each step.

  Attributes:
    steps: the steps, in order.
    images: number of images of the host's part of a batch.
    batch: function from a step to (position, index, valid, bucket) of these images: positions in the
      run, indices of images and buckets, int64 [images], and validity, bool [images].
  """

  steps: range
  images: int
  batch: Callable[[int], tuple[np.ndarray, ...]]


def train_plan(
  bucket_N: np.ndarray,
  *,
  seed: int,
  batch_size: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Plan:
  """Plans what a host reads of `TrainOrder`, without an end.

  Args:
    bucket_N: bucket of each image, int [N].
    seed: seed of the run.
    batch_size: number of images of a global batch.
    start_step: the first step.
    process_index: index of the host.
    process_count: number of hosts.

  Raises:
    UserError: the batch cannot be divided evenly among the hosts.
  """
  order = TrainOrder(bucket_N, seed=seed, batch_size=batch_size)
  valid_B = np.ones(batch_size, bool)

  def global_batch(step: int) -> tuple[np.ndarray, np.ndarray, int]:
    indices_B, bucket = order.batch(step)
    return indices_B, valid_B, bucket

  steps = range(start_step, np.iinfo(np.int64).max)
  return _plan(steps, global_batch, batch_size, process_index, process_count)


def eval_plan(
  bucket_N: np.ndarray, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Plan:
  """Plans what a host reads of `eval_order`; all hosts have the same number of steps.

  Args:
    bucket_N: bucket of each image, int [N].
    batch_size: number of images of a global batch.
    process_index: index of the host.
    process_count: number of hosts.

  Raises:
    UserError: the batch cannot be divided evenly among the hosts.
  """
  batches = eval_order(bucket_N, batch_size=batch_size)
  steps = range(len(batches))
  return _plan(steps, batches.__getitem__, batch_size, process_index, process_count)


def _plan(
  steps: range,
  global_batch: Callable[[int], tuple[np.ndarray, np.ndarray, int]],
  batch_size: int,
  process_index: int,
  process_count: int,
) -> Plan:
  """Returns the plan of a host's share; `global_batch`: step -> indices_B, valid_B and the bucket."""
  share = host_share(batch_size, process_index, process_count)

  def batch(step: int) -> tuple[np.ndarray, ...]:
    indices_B, valid_B, bucket = global_batch(step)
    positions_B = int(step) * batch_size + np.arange(batch_size)
    columns = (positions_B, indices_B, valid_B, np.full(batch_size, bucket))
    return tuple(column[share] for column in columns)

  return Plan(steps, share.stop - share.start, batch)


def host_share(batch_size: int, process_index: int, process_count: int) -> slice:
  """Returns the contiguous part of a global batch that a host reads.

  Args:
    batch_size: number of images of a global batch.
    process_index: index of the host.
    process_count: number of hosts.

  Raises:
    UserError: the batch cannot be divided evenly among the hosts.
  """
  if batch_size % process_count:
    raise UserError(
      f"batch_size={batch_size} cannot be shared by {process_count} hosts; make it a multiple of "
      f"{process_count}"
    )
  share = batch_size // process_count
  return slice(process_index * share, (process_index + 1) * share)
