"""PASCAL VOC 2012: JPEGImages, SegmentationClass, and the lists in ImageSets/Segmentation.

The source is the folder VOC2012 of the development kit. Each list is a split, such as "trainval".
Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015.
"""

import pathlib

from fpt_jax.data.datasets import layouts
from fpt_jax.data.records.label_map import VOID
from fpt_jax.errors import UserError, one_line


def _pairs(root: pathlib.Path, split: str) -> layouts.Pairs:
  names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
  if not names.is_file():
    raise UserError(f"{names}: no such file; see data.source, data.builder.splits")
  images, labels = root / "JPEGImages", root / "SegmentationClass"
  layouts.list_folder(images)
  layouts.list_folder(labels)
  try:
    listed = names.read_text(encoding="utf-8").split()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{names}: not a readable text file ({one_line(error)}); replace it") from error
  return [(images / f"{name}.jpg", labels / f"{name}.png") for name in listed]


_NAMES = layouts.names(
  "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, "
  "dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor"
)
LAYOUT = layouts.Layout(
  name="voc2012",
  class_names=_NAMES,
  palette=layouts.numbered_colors(len(_NAMES)),
  class_of_id={i: i for i in range(len(_NAMES))} | {255: VOID},
  splits=("train", "val"),
  pairs=_pairs,
)
