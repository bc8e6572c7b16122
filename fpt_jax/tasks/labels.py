"""Training batches whose labels are the model's classes instead of the data set's."""

import contextlib
from collections.abc import Iterator

import numpy as np

from fpt_jax.data.loader import Batches


@contextlib.contextmanager
def with_model_classes(
  batches: Batches, name: str, class_of_label: np.ndarray
) -> Iterator[Iterator[dict[str, np.ndarray]]]:
  """Context with the same batches, in which the labels of one array are the model's classes.

  Args:
    batches: batches of the data loader; they are closed at the end.
    name: name of the array of labels.
    class_of_label: the model's class of each label of the data set.
  """
  with batches:
    yield (batch | {name: class_of_label[batch[name]]} for batch in batches)
