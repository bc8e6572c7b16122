"""Mask R-CNN with FPT on COCO instances: the paper's section 4.1, last row of table 1.

    python -m fpt_jax.main --config=configs/coco_mask.py --workdir=... --config.data.source=/data/coco

The paper reports 38.0 box AP and 36.8 mask AP on val2017 for ResNet-50 after 160k steps of 8 images, with
a frozen backbone that was pretrained on ImageNet (`--config.init_from`, see the README).

Variants, behind the file's colon:

    coco_mask.py:demo         generated shapes, a narrow ResNet-18 from scratch, minutes on two CPU cores
    coco_mask.py:small        the same on real images at low resolution, for trying things on a laptop
    coco_mask.py:tiny         the same, lower still: FPT at three times the speed
    coco_mask.py:torchvision  torchvision's maskrcnn_resnet50_fpn, to evaluate its weights
"""

from fpt_jax.configs.detection import detection, variant


def get_config(arg: str = ""):
  """`arg`: "" for the paper, or see `variant`."""
  return variant(detection(), arg)
