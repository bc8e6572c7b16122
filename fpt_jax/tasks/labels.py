"""The classes of a model and those of its data set: matching them by name, and batches of the model's."""

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from fpt_jax.data import Batches
from fpt_jax.run import hosts


def match_names(of_data: Sequence[str], of_model: Sequence[str]) -> list[int | None]:
  """Finds the names of a data set's classes among those of a model.

  A name that the model does not have matches one that differs in case and spaces only.

  Args:
    of_data: names of the data set's classes.
    of_model: names of the model's classes.

  Returns:
    Index into `of_model` of each name of the data set; None if the model does not have it, or has several
    such names.
  """
  exact, similar = collections.defaultdict(list), collections.defaultdict(list)
  for i, name in enumerate(of_model):
    exact[name].append(i)
    similar[_folded(name)].append(i)
  found = [exact.get(name) or similar.get(_folded(name), []) for name in of_data]
  return [places[0] if len(places) == 1 else None for places in found]


def _folded(name: str) -> str:
  return " ".join(name.split()).casefold()


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
    **hosts.this_host(),
  )
  with batches:
    yield (batch | {name: class_of_label[batch[name]]} for batch in batches)
