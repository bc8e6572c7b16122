"""The classes of a segmenter and those of its data set, matched by name."""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax.data import VOID, DatasetInfo
from fpt_jax.errors import UserError
from fpt_jax.tasks.labels import match_names


def adopt_classes(config: ConfigDict, dataset: DatasetInfo) -> None:
  """Writes the data set's classes, colours and swaps into a config that does not name its classes.

  Raises:
    UserError: the data set has no label maps or has a class that the model does not have, or
      `class_weights` is not one positive number per class.
  """
  model = config.model
  if not dataset.class_names:
    raise UserError(f"data.name={config.data.name!r} has no label maps; choose another data set")
  if not model.class_names:
    if model.num_classes != dataset.num_classes:
      logging.info(
        "model.num_classes is set to %d, the number of classes in the data", dataset.num_classes
      )
    model.class_names, model.num_classes = dataset.class_names, dataset.num_classes
    model.palette, model.swaps = dataset.palette, dataset.swaps
  if len(model.class_names) != model.num_classes:
    raise UserError(
      f"model.class_names has {len(model.class_names)} names and model.num_classes is "
      f"{model.num_classes}; set --config.model.class_names='()' to take the data's own"
    )
  weights = tuple(model.class_weights)
  if weights and (len(weights) != model.num_classes or min(weights) <= 0):
    raise UserError(
      f"model.class_weights={weights} must be {model.num_classes} positive numbers, one per class, or ()"
    )
  class_table(config, dataset)


def class_table(config: ConfigDict, dataset: DatasetInfo) -> np.ndarray:
  """Returns the model's class of each class of the data set, by name, uint8 [256]; `VOID` for other labels.

  Raises:
    UserError: the data set has a class that the model does not have, or two classes of one name.
  """
  names = tuple(config.model.class_names)
  places = match_names(dataset.class_names, names)
  if names == tuple(dataset.class_names):
    places = list(range(len(names)))
  classes = [i for i in places if i is not None]
  if len(classes) < len(places):
    unknown = [name for name, i in zip(dataset.class_names, places, strict=True) if i is None]
    raise UserError(
      f"the data has classes {unknown[:8]} that the model does not have; its classes are "
      f"{list(names)[:8]}{'...' * (len(names) > 8)}; give them the model's names, or set "
      "--config.model.class_names='()' to train on the data's own in a new --workdir"
    )
  if len(set(classes)) < len(classes):
    twice = next(i for i in classes if classes.count(i) > 1)
    same = [name for name, i in zip(dataset.class_names, places, strict=True) if i == twice]
    raise UserError(
      f"the data's classes {same} are both the model's class {names[twice]!r}; give each another name"
    )
  table = np.full(256, VOID, np.uint8)
  table[: dataset.num_classes] = classes
  return table
