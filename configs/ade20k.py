"""Semantic segmentation of ADE20K with UFP and FPT (paper, section 4.2, last row of table 5).

    python -m fpt_jax.main --config=configs/ade20k.py --workdir=... --config.data.source=/data/ADE20K

The paper reports 45.9 mIoU on val for a frozen dilated ResNet-101, after 120 epochs of images with a
shorter edge of 269, 369, 469 or 569 pixels, as in OCNet. It gives a rate of 0.02 and no batch size. The
batch size of 16 is OCNet's, with which the rate per image equals that of the other data sets. The crop
size of 569 x 569 is our choice.

The words after the colon are those of `configs/cityscapes.py`.
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  config = segmentation()
  config.batch_size = 16
  config.train_images = 120 * 20_210
  config.data.update(
    dict(
      name="ade20k",
      crop=(569, 569),
      train_sizes=(269, 369, 469, 569),
      canvas_multiple=128,  # images are of hundreds of sizes
    )
  )
  config.model.num_classes = 150
  config.optim.update(dict(learning_rate=0.02, base_batch_size=16, weight_decay=1e-4))
  return variant(config, arg)
