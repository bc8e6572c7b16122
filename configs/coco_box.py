"""Faster R-CNN with FPT on COCO boxes (paper, section 4.1).

    python -m fpt_jax.main --config=configs/coco_box.py --workdir=... --config.data.source=/data/coco

The paper's schedule without masks is shorter: 100k steps of 8 images, with the rate divided by ten after
80k. The words after the colon are those of `configs/coco_mask.py`.
"""

from fpt_jax.configs.detection import detection, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  config = detection()
  config.model.mask_head.enabled = False
  config.train_images = 100_000 * 8
  config.optim.decay_at = (0.8,)
  return variant(config, arg)
