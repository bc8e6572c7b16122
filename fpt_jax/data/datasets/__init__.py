"""The TFDS builders of all data sets, by `config.data.name`."""

from __future__ import annotations

from typing import Any

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


def builder(name: str, **arguments: Any) -> tfds.core.GeneratorBasedBuilder:
  """Returns the builder of a data set, one of `INSTANCES` and `LABEL_MAPS`.

  Args:
    name: `config.data.name`.
    **arguments: those of the builder's class, and for "image_folder" those of `image_folder.layout_of`.

  Raises:
    TypeError: an argument does not exist.
    UserError: the value of an argument is wrong.
  """
  # the modules of the builders, which load TensorFlow, are imported where one is needed
  if name == "coco":
    from fpt_jax.data.datasets.coco import CocoInstances

    return CocoInstances(**arguments)
  if name == "context_shapes":
    from fpt_jax.data.datasets.context_shapes import ContextShapes

    return ContextShapes(**arguments)
  from fpt_jax.data.datasets.label_maps import LabelMaps

  if name in LAYOUTS:
    return LabelMaps(LAYOUTS[name], **arguments)
  of_layout = {key: arguments.pop(key) for key in image_folder.FIELDS if key in arguments}
  layout, options = image_folder.layout_of(**of_layout)
  return LabelMaps(layout, options=options, **arguments)
