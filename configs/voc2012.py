"""Semantic segmentation of PASCAL VOC 2012 with UFP and FPT (paper, section 4.2, last row of table 5).

    python -m fpt_jax.main --config=configs/voc2012.py --workdir=... --config.data.source=/data/VOC2012

The paper reports 85.0 mIoU on test for a frozen dilated ResNet-101, after 80 epochs of crops of
521 x 521. It does not say of which images; other methods in its table 5 add those of Hariharan et al.
2011. With their label maps in SegmentationClass and a list trainaug.txt beside train.txt:

    --config.data.builder.splits='("trainaug", "val")' --config.data.train_split=trainaug \\
      --config.train_images=846560

The words after the colon are those of `configs/cityscapes.py`.
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  config = segmentation()
  config.train_images = 80 * 1464
  config.data.update(
    dict(
      name="voc2012",
      crop=(521, 521),
      buckets=((512, 512),),  # no edge of an image is longer than 500 pixels
    )
  )
  config.model.num_classes = 21
  config = variant(config, arg)
  if config.model.align_corners:
    config.data.buckets = ((505, 505),)
  return config
