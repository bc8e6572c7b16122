"""CamVid with 11 classes: <split>/* and <split>annot/*.png, 11 = void.

The lists next to the folders name the same files with the paths of another machine; they are not read.
Brostow et al., "Semantic object classes in video: A high-definition ground truth database", 2009;
the classes and splits are those of Badrinarayanan et al., "SegNet", 2017.
"""

import pathlib

from fpt_jax.data.datasets import layouts
from fpt_jax.data.records.label_map import VOID


def _pairs(root: pathlib.Path, split: str) -> layouts.Pairs:
  return layouts.pair_folders(root / split, root / f"{split}annot")


_NAMES = layouts.names(
  "sky, building, pole, road, sidewalk, tree, sign symbol, fence, car, pedestrian, bicyclist"
)
LAYOUT = layouts.Layout(
  name="camvid",
  class_names=_NAMES,
  palette=layouts.colors(
    "808080 800000 c0c080 804080 0000c0 808000 c08080 404080 400080 404000 0080c0"
  ),
  class_of_id={i: i for i in range(len(_NAMES))} | {len(_NAMES): VOID},
  splits=("train", "val", "test"),
  pairs=_pairs,
)
