"""Faster R-CNN with FPT on COCO boxes: the paper's section 4.1.

    python -m fpt_jax.main --config=configs/coco_box.py --workdir=... --config.data.source=/data/coco

The paper's schedule for boxes alone is shorter: 100k steps of 8 images, the rate divided by ten after 80k.
Variants are those of `configs/coco_mask.py`.
"""

from fpt_jax.configs.detection import detection, variant


def get_config(arg: str = ""):
  """`arg`: "" for the paper, or see `variant`."""
  config = detection()
  config.model.mask_head.enabled = False
  config.train_images = 100_000 * 8
  config.optim.decay_at = (0.8,)
  return variant(config, arg)
