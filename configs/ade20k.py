"""Semantic segmentation of ADE20K with UFP and FPT: the paper's section 4.2, last row of table 5.

    python -m fpt_jax.main --config=configs/ade20k.py --workdir=... --config.data.source=/data/ADE20K

The paper reports 45.9 mIoU on val for a frozen dilated ResNet-101, after 120 epochs of images whose
shorter edge is 269, 369, 469 or 569, as in OCNet. It names a rate of 0.02 and no batch size: batches
of 16 are OCNet's, and keep the rate an image that of the other data sets. Crops of 569 x 569 are ours.

Variants are those of `configs/cityscapes.py`.
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """`arg`: "" for the paper, or see `configs/cityscapes.py`."""
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
