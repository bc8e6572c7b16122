"""Which class of a model is which category of a data set.

A model's classes are 1..num_classes, 0 is background; a data set's own category ids may have gaps.
"""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax.data import DatasetInfo
from fpt_jax.errors import UserError


def take_categories(config: ConfigDict, dataset: DatasetInfo) -> None:
  """Writes the data set's categories into a config that names none.

  Raises:
    UserError: the data set has none.
  """
  model = config.model
  if not dataset.category_ids:
    raise UserError(
      f"data.name={config.data.name!r} has no instances to detect; choose a data set that has"
    )
  if not model.category_ids:
    model.category_ids = dataset.category_ids
    model.category_names = dataset.category_names
    if model.num_classes != len(dataset.category_ids):
      logging.info("model.num_classes is %d, as many as the data has", len(dataset.category_ids))
      model.num_classes = len(dataset.category_ids)
  elif not model.category_names:
    names = dict(zip(dataset.category_ids, dataset.category_names, strict=True))
    model.category_names = tuple(names.get(i, str(i)) for i in model.category_ids)


def label_table(config: ConfigDict, dataset: DatasetInfo) -> np.ndarray:
  """[labels of the data set + 1] int32: the model's class of each label; padding's 0 stays 0.

  Raises:
    UserError: the data set has a category that the model has not.
  """
  classes = {category: i + 1 for i, category in enumerate(config.model.category_ids)}
  strange = [i for i in dataset.category_ids if i not in classes]
  if strange:
    raise UserError(
      f"the data has categories {strange[:8]} that the model has no class for; "
      "set --config.model.category_ids='()' to train on the data's own"
    )
  return np.array([0] + [classes[i] for i in dataset.category_ids], np.int32)
