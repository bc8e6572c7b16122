"""Semantic segmentation of your own data set: images/<split>/* and labels/<split>/*.png.

    python -m fpt_jax.main --config=configs/image_folder.py:small --workdir=... \\
      --config.data.source=/data/mine --config.data.builder.num_classes=5

A label file has one 8-bit number per pixel: 0 to num_classes - 1, and 255 where there is no class
(`data.builder.void`). Instead of their number, `data.builder.class_names` may give the classes' names.
Without `small` the network is the paper's, for accelerators.

The words after the colon are those of `configs/cityscapes.py`.
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  config = segmentation()
  config.train_images = 40_000
  config.data.update(dict(name="image_folder", crop=(521, 521), canvas_multiple=128))
  config.eval.every_steps = 1000
  return variant(config, arg)
