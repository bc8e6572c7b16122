"""The TFDS builders of all data sets, by `config.data.name`."""

from __future__ import annotations

import functools
from collections.abc import Callable

from etils import epy

from fpt_jax.data.datasets import ade20k, camvid, cityscapes, image_folder, lip, voc2012

with epy.lazy_imports():
  import tensorflow_datasets as tfds

LAYOUTS = {
  layout.name: layout
  for layout in (ade20k.LAYOUT, camvid.LAYOUT, cityscapes.LAYOUT, lip.LAYOUT, voc2012.LAYOUT)
}
INSTANCES = ("coco", "context_shapes")
LABEL_MAPS = (*LAYOUTS, "image_folder")


def builder_of(name: str) -> Callable[..., tfds.core.GeneratorBasedBuilder]:
  """Returns the function that makes the builder of a data set, a class of TFDS or one like it.

  Args:
    name: `config.data.name`, one of `INSTANCES` and `LABEL_MAPS`.

  Raises:
    ValueError: there is no such data set.
  """
  # the modules of the builders load TensorFlow, so they are imported where one is needed
  if name == "coco":
    from fpt_jax.data.datasets.coco import CocoInstances

    return CocoInstances
  if name == "context_shapes":
    from fpt_jax.data.datasets.context_shapes import ContextShapes

    return ContextShapes
  from fpt_jax.data.datasets.label_maps import LabelMaps

  if name in LAYOUTS:
    return functools.partial(LabelMaps, LAYOUTS[name])
  if name == "image_folder":
    return image_folder.builder
  raise ValueError(f"no data set is called {name!r}")
