"""Human parsing on Look Into Person with UFP and FPT (paper, section 4.2, last row of table 5).

    python -m fpt_jax.main --config=configs/lip.py --workdir=... --config.data.source=/data/lip

The paper reports 56.2 mIoU on val for a frozen dilated ResNet-101, after 50 epochs of crops of
573 x 573. On a mirrored image, left and right parts of the body are exchanged.

The words after the colon are those of `configs/cityscapes.py`.
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  config = segmentation()
  config.train_images = 50 * 30_462
  config.data.update(
    dict(
      name="lip",
      crop=(573, 573),
      canvas_multiple=128,  # images are of hundreds of sizes
    )
  )
  config.model.num_classes = 20
  config.model.align_corners = False  # the crop is 4 n + 1
  return variant(config, arg)
