"""From a plan of images to batches: read, decode and augment in the background.

B images of this host.
"""

import atexit
import os
import weakref
from collections.abc import Callable
from typing import ClassVar

import ml_collections
import numpy as np
import tensorflow as tf

from fpt_jax.data.prepared import Reader


class Batches:
  """An iterator over batches; close it, or use it as a context, to end its threads."""

  _open: ClassVar[weakref.WeakSet] = weakref.WeakSet()

  def __init__(self, dataset: tf.data.Dataset, reader: Reader, failures: list[Exception]):
    """Args: dicts of batched tensors, where the records come from, and why an image failed."""
    self._iterator = dataset.as_numpy_iterator()
    self._reader, self._failures = reader, failures
    Batches._open.add(self)

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      raise ValueError("these batches are closed")
    try:
      return next(self._iterator)
    except StopIteration:
      self.close()
      self._iterator = iter(())
      raise
    except tf.errors.OpError:
      self.close()
      if not self._failures:
        raise
    raise self._failures[0]

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the threads that read ahead; idempotent."""
    self._iterator = None
    self._reader.close()
    Batches._open.discard(self)


@atexit.register
def _close_all() -> None:
  # an iterator that outlives the interpreter's shutdown hangs it
  for batches in list(Batches._open):
    batches.close()


def assemble(
  data: ml_collections.ConfigDict,
  reader: Reader,
  steps: tf.data.Dataset,
  plan: Callable[[np.int64], tuple[np.ndarray, ...]],
  fields: dict[str, tuple[tf.DType, tuple[int | None, ...]]],
  load: Callable[[int, int, bool], dict[str, np.ndarray]],
  finish: Callable[[dict[str, tf.Tensor], tf.Tensor], dict[str, tf.Tensor]],
  share: int,
) -> Batches:
  """Turns steps into this host's batches: plan, then load and finish image by image.

  Args:
    data: the config's `data`.
    reader: where the records come from; closed with the batches.
    steps: int64 scalars.
    plan: of a step, this host's (position in the run, index of the record, valid, bucket), a column
      each, int64 and bool.
    fields: dtype and shape of each array that `load` returns.
    load: of position, index and valid, an image's arrays.
    finish: of these as tensors and the bucket, the image's part of the batch, all of one shape.
    share: images of this host.
  """
  failures = []

  def guarded(position: np.int64, index: np.int64, valid: np.bool_) -> list[np.ndarray]:
    try:
      example = load(int(position), int(index), bool(valid))
    except Exception as error:  # carried around TensorFlow, which would keep its text alone
      failures.append(error)
      raise
    return [example[name] for name in fields]

  def element(
    position: tf.Tensor, index: tf.Tensor, valid: tf.Tensor, bucket: tf.Tensor
  ) -> dict[str, tf.Tensor]:
    dtypes = [dtype for dtype, _ in fields.values()]
    values = tf.numpy_function(guarded, [position, index, valid], dtypes)
    example = {
      name: tf.ensure_shape(value, shape)
      for (name, (_, shape)), value in zip(fields.items(), values, strict=True)
    }
    return finish(example, bucket)

  dtypes = [tf.int64, tf.int64, tf.bool, tf.int64]
  workers = data.get("num_workers", 0) or os.cpu_count()
  options = tf.data.Options()
  options.autotune.enabled = False
  options.threading.private_threadpool_size = workers
  dataset = (
    steps.map(
      lambda step: tuple(
        tf.ensure_shape(column, (share,)) for column in tf.numpy_function(plan, [step], dtypes)
      )
    )
    .unbatch()
    .map(element, num_parallel_calls=workers, deterministic=True)
    .batch(share, drop_remainder=True)
    .prefetch(data.get("prefetch", 2))
    .with_options(options)
  )
  return Batches(dataset, reader, failures)
