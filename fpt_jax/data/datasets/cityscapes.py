"""Cityscapes: leftImg8bit/<split>/<city>/*.png and gtFine/<split>/<city>/*_gtFine_labelIds.png.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import pathlib

from fpt_jax.data.datasets import layouts
from fpt_jax.data.records.label_map import VOID

# the number of each class in the label files, which hold 0..33; the others are not evaluated
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_NUM_IDS = 34
_IMAGE, _LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"


def _pairs(root: pathlib.Path, split: str) -> layouts.Pairs:
  labels = root / "gtFine" / split
  layouts.list_folder(labels)
  return [
    (image, labels / city.name / (image.name.removesuffix(_IMAGE) + _LABEL))
    for city in layouts.list_folder(root / "leftImg8bit" / split)
    for image in layouts.list_folder(city)
    if image.name.endswith(_IMAGE)
  ]


LAYOUT = layouts.Layout(
  name="cityscapes",
  class_names=layouts.names(
    "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, "
    "terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle"
  ),
  palette=layouts.colors(
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 "
    "00008e 000046 003c64 005064 0000e6 770b20"
  ),
  class_of_id=dict.fromkeys(range(_NUM_IDS), VOID) | {id_: i for i, id_ in enumerate(IDS)},
  splits=("train", "val"),
  pairs=_pairs,
)
