"""Look Into Person: <split>_images/*.jpg and <split>_segmentations/*.png.

Both lie in the source folder, or in its folders TrainVal_images and TrainVal_parsing_annotations, as the
archives unpack. Gong et al., "Look into Person", CVPR 2017. Left and right are the person's.
"""

import pathlib

from fpt_jax.data.datasets import layouts


def _pairs(root: pathlib.Path, split: str) -> layouts.Pairs:
  images, labels = f"{split}_images", f"{split}_segmentations"
  if (root / "TrainVal_images").is_dir():
    images, labels = f"TrainVal_images/{images}", f"TrainVal_parsing_annotations/{labels}"
  return layouts.pair_folders(root / images, root / labels)


_NAMES = layouts.names(
  "background, hat, hair, glove, sunglasses, upper clothes, dress, coat, socks, pants, jumpsuits, "
  "scarf, skirt, face, left arm, right arm, left leg, right leg, left shoe, right shoe"
)
LAYOUT = layouts.Layout(
  name="lip",
  class_names=_NAMES,
  palette=layouts.colors(
    "000000 800000 ff0000 005500 aa0033 ff5500 000055 0077dd 555500 005555 553300 345680 008000 "
    "0000ff 33aadd 00ffff 55ffaa aaff55 ffff00 ffaa00"
  ),
  class_of_id={i: i for i in range(len(_NAMES))},
  splits=("train", "val"),
  pairs=_pairs,
  swaps=((14, 15), (16, 17), (18, 19)),
)
