"""Training batches whose labels are the model's classes instead of the data set's."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from fpt_jax.data import Batches
from fpt_jax.run import sharding


@contextlib.contextmanager
def model_batches(
  read: Callable[..., Batches],
  config: ConfigDict,
  start_step: int,
  name: str,
  class_of_label: np.ndarray,
) -> Iterator[Iterator[dict[str, np.ndarray]]]:
  """Opens this host's training batches and replaces labels of the data set by classes of the model.

  Args:
    read: the task's function `train_batches` of its module `batches`.
    config: complete config.
    start_step: step of the first batch.
    name: name of the array of labels in a batch.
    class_of_label: class of each label.

  Raises:
    UserError: see `read`.
  """
  batches = read(
    config.data,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    **sharding.this_host(),
  )
  with batches:
    yield (batch | {name: class_of_label[batch[name]]} for batch in batches)
