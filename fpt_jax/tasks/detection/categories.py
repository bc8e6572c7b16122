"""The classes of a detector and the categories of its data set.

A model's classes are 1..num_classes, and 0 is background; a data set's category ids may have gaps.
"""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax.data import DatasetInfo
from fpt_jax.errors import UserError


def adopt_classes(config: ConfigDict, dataset: DatasetInfo) -> None:
  """Writes the data set's categories into a config that does not name its categories.

  Raises:
    UserError: the data set has no instances, no masks for the model's mask head, or a category that
      the model does not have.
  """
  model = config.model
  if model.mask_head.enabled and not dataset.has_masks:
    raise UserError(
      "the annotations of the data set are boxes without masks; use configs/coco_box.py or set "
      "--config.model.mask_head.enabled=False"
    )
  if not dataset.category_ids:
    raise UserError(
      f"data.name={config.data.name!r} has no instances to detect; choose another data set"
    )
  if not model.category_ids:
    model.category_ids = dataset.category_ids
    model.category_names = dataset.category_names
    count = len(dataset.category_ids)
    if model.num_classes != count:
      logging.info("model.num_classes is set to %d, the number of categories in the data", count)
      model.num_classes = count
  elif not model.category_names:
    names = dict(zip(dataset.category_ids, dataset.category_names, strict=True))
    model.category_names = tuple(names.get(i, str(i)) for i in model.category_ids)
  label_table(config, dataset)


def label_table(config: ConfigDict, dataset: DatasetInfo) -> np.ndarray:
  """Returns the model's class of each label of the data set, int32 [labels + 1]; 0, for padding, stays 0.

  Raises:
    UserError: the data set has a category that the model does not have.
  """
  classes = {category: i + 1 for i, category in enumerate(config.model.category_ids)}
  unknown = [i for i in dataset.category_ids if i not in classes]
  if unknown:
    raise UserError(
      f"the data has categories {unknown[:8]} that the model does not have; "
      "set --config.model.category_ids='()' to train on the data's own"
    )
  return np.array([0] + [classes[i] for i in dataset.category_ids], np.int32)
