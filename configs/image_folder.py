"""Semantic segmentation of a data set of one's own: images/<split>/* and labels/<split>/*.png.

    python -m fpt_jax.main --config=configs/image_folder.py:small --workdir=... \\
      --config.data.source=/data/mine --config.data.builder.num_classes=5

A label file has one number of 8 bits a pixel: 0 to num_classes - 1, and 255 where there is no class
(`data.builder.void`). `data.builder.class_names` may name the classes instead of counting them.
Without `small` the network is the paper's, for accelerators.

Variants are those of `configs/cityscapes.py`.
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """`arg`: "" for the paper's network, or see `configs/cityscapes.py`."""
  config = segmentation()
  config.train_images = 40_000
  config.data.update(dict(name="image_folder", crop=(521, 521), canvas_multiple=128))
  config.eval.every_steps = 1000
  return variant(config, arg)
