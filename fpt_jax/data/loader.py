"""Batches from a plan of images: images are read, decoded and augmented in the background.

B images of this host.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import ml_collections
import numpy as np
from etils import epy

from fpt_jax.data.order import Plan
from fpt_jax.data.reader import Reader

with epy.lazy_imports():
  import tensorflow as tf


class Batches:
  """An iterator over batches; close it, or use it as a context, to end its threads.

  Args:
    dataset: batches as dicts of tensors.
    reader: the reader of the records; closed with the batches.
    failures: exceptions raised while images were loaded; the first one is raised again here.
  """

  _open: ClassVar[weakref.WeakSet] = weakref.WeakSet()

  def __init__(self, dataset: tf.data.Dataset, reader: Reader, failures: list[Exception]):
    self._iterator: Iterator | None = dataset.as_numpy_iterator()
    self._reader, self._failures = reader, failures
    Batches._open.add(self)

  def __iter__(self) -> Batches:
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

  def __enter__(self) -> Batches:
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
  # an iterator that is still open when the interpreter exits makes it hang
  for batches in list(Batches._open):
    batches.close()


def assemble(
  data: ml_collections.ConfigDict,
  reader: Reader,
  plan: Plan,
  fields: dict[str, tuple[tf.DType, tuple[int | None, ...]]],
  load: Callable[[int, int, bool], dict[str, np.ndarray]],
  finish: Callable[[dict[str, tf.Tensor], tf.Tensor], dict[str, tf.Tensor]],
) -> Batches:
  """Returns this host's batches of a plan: its images are loaded and finished one by one.

  Args:
    data: the config's `data`.
    reader: the reader of the records; closed with the batches.
    plan: the images of each step.
    fields: dtype and shape of each array that `load` returns.
    load: function from position, index and validity to the arrays of an image.
    finish: function from these arrays as tensors, and the bucket, to the image's part of the batch;
      all images of a batch have the same shapes.
  """
  failures: list[Exception] = []

  def guarded(position: np.int64, index: np.int64, valid: np.bool_) -> list[np.ndarray]:
    try:
      example = load(int(position), int(index), bool(valid))
    except Exception as error:  # kept for Batches: TensorFlow passes on its text only
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
  workers = data.num_workers or os.cpu_count()
  options = tf.data.Options()
  options.autotune.enabled = False
  options.threading.private_threadpool_size = workers
  dataset = (
    tf.data.Dataset.range(plan.steps.start, plan.steps.stop)
    .map(
      lambda step: tuple(
        tf.ensure_shape(column, (plan.images,))
        for column in tf.numpy_function(plan.batch, [step], dtypes)
      )
    )
    .unbatch()
    .map(element, num_parallel_calls=workers, deterministic=True)
    .batch(plan.images, drop_remainder=True)
    .prefetch(data.prefetch)
    .with_options(options)
  )
  return Batches(dataset, reader, failures)
