"""The TFDS builders of all data sets, by `config.data.name`."""

import functools

from fpt_jax.data.datasets import ade20k, camvid, cityscapes, image_folder, lip, voc2012
from fpt_jax.data.datasets.coco import CocoInstances
from fpt_jax.data.datasets.context_shapes import ContextShapes
from fpt_jax.data.datasets.label_maps import LabelMaps

LABEL_MAPS = {
  layout.name: functools.partial(LabelMaps, layout)
  for layout in (ade20k.LAYOUT, camvid.LAYOUT, cityscapes.LAYOUT, lip.LAYOUT, voc2012.LAYOUT)
} | {"image_folder": image_folder.builder}
INSTANCES = {"coco": CocoInstances, "context_shapes": ContextShapes}
BUILDERS = INSTANCES | LABEL_MAPS
