"""The classes of a detector and the categories of its data set, matched by name.

A model's classes are 1..num_classes, and 0 is background; a data set's category ids may have gaps.
"""

from collections.abc import Mapping

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax.data import DatasetInfo
from fpt_jax.errors import UserError
from fpt_jax.tasks.labels import match_names


def adopt_classes(config: ConfigDict, dataset: DatasetInfo) -> None:
  """Writes the data set's categories into a config that does not name its categories.

  Raises:
    UserError: the data set has no instances, no masks for the model's mask head, or a category that
      the model does not have; or the numbers of ids, names and classes in the config differ.
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
  counts = len(model.category_ids), len(model.category_names), model.num_classes
  if len(set(counts)) > 1:
    raise UserError(
      "model.category_ids has {} ids, model.category_names has {} names, and model.num_classes is {}; "
      "set --config.model.category_ids='()' to take the data's own".format(*counts)
    )
  label_table(config, dataset)


def label_table(config: ConfigDict, dataset: DatasetInfo) -> np.ndarray:
  """Returns the model's class of each label of the data set, int32 [labels + 1]; 0, for padding, stays 0.

  Categories are matched by name, see `match_names`. The ids decide where a name is used twice, or where the
  config has no name for an id.

  Raises:
    UserError: the data set has a category that the model does not have.
  """
  ids, names = tuple(config.model.category_ids), tuple(config.model.category_names)
  named = dict(zip(ids, names, strict=True)) if len(ids) == len(names) else {}
  place = {category: i for i, category in enumerate(ids)}
  categories = list(zip(dataset.category_ids, dataset.category_names, strict=True))
  by_name = match_names(dataset.category_names, tuple(named.values()))
  table = [0]
  for (category, name), i in zip(categories, by_name, strict=True):
    # `adopt_classes` names a category that the data do not have by its number
    unnamed = named.get(category, str(category)) == str(category)
    if category in place and (named.get(category) == name or (i is None and unnamed)):
      i = place[category]
    table.append(0 if i is None else i + 1)
  unknown = [category for category, k in zip(categories, table[1:], strict=True) if k == 0]
  if unknown:
    described = ", ".join(
      f"{category} is {name!r}"
      + (f" in the data and {named[category]!r} in the model" if category in named else "")
      for category, name in unknown[:4]
    )
    raise UserError(
      f"the data has categories {[category for category, _ in unknown[:8]]} that the model does not have "
      f"({described}); give them the model's names, or set --config.model.category_ids='()' to train on "
      "the data's own in a new --workdir"
    )
  twice = next((k for i, k in enumerate(table) if k in table[:i]), None)
  if twice:
    same = [i for i, k in zip(dataset.category_ids, table[1:], strict=True) if k == twice]
    raise UserError(
      f"the data's categories {same} are both the model's category {ids[twice - 1]}, "
      f"{named.get(ids[twice - 1])!r}; give each another name"
    )
  return np.array(table, np.int32)


def model_category_of(config: ConfigDict, dataset: DatasetInfo) -> dict[int, int]:
  """Returns the model's category id of each category id of the data set, matched by name.

  Raises:
    UserError: see `label_table`.
  """
  classes = label_table(config, dataset)[1:]
  return {
    category: config.model.category_ids[k - 1]
    for category, k in zip(dataset.category_ids, classes.tolist(), strict=True)
  }


def with_data_categories(found: dict, category_of_model: Mapping[int, int]) -> dict:
  """Returns detections with the category ids of a data set instead of the model's.

  Args:
    found: result of `prediction.to_original_image`.
    category_of_model: the data set's category id of each category id of the model. Detections of other
      categories are left out: the data set cannot score them.
  """
  ids = found["category_ids"].tolist()
  kept = [i for i, category in enumerate(ids) if category in category_of_model]
  rles = found["rles"]
  return {
    "boxes_xyxy": found["boxes_xyxy"][kept],
    "scores": found["scores"][kept],
    "category_ids": np.array([category_of_model[ids[i]] for i in kept], np.int64),
    "rles": None if rles is None else [rles[i] for i in kept],
  }
