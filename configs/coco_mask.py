"""Mask R-CNN with FPT on COCO instances (paper, section 4.1, last row of table 1).

    python -m fpt_jax.main --config=configs/coco_mask.py --workdir=... --config.data.source=/data/coco

The paper reports 38.0 box AP and 36.8 mask AP on val2017 for ResNet-50 after 160k steps of 8 images, with
a frozen backbone with ImageNet weights (`--config.init_from`, see docs/weights.md).

Words and settings after the colon, in any order, separated by commas:

    coco_mask.py:demo                   generated images, a narrow ResNet-18, minutes on two CPU cores
    coco_mask.py:small                  the same network on real images at low resolution, for laptops
    coco_mask.py:tiny                   the same at a lower resolution, with FPT three times as fast
    coco_mask.py:torchvision            torchvision's maskrcnn_resnet50_fpn, to evaluate its weights
    coco_mask.py:torchvision_v2         the same for its maskrcnn_resnet50_fpn_v2
    coco_mask.py:detectron2             detectron2's mask_rcnn_R_50_FPN, to evaluate its weights
    coco_mask.py:multiscale             training images of random sizes
    coco_mask.py:backbone=resnet101_gc  or resnet18 to resnet101, with _nl, _gc, _aa; or
                                        efficientnet_lite0, hrnet_w48, wider_resnet38
    coco_mask.py:weights=detectron      for R-50.pkl, see docs/weights.md; or torchvision, detectron2
    coco_mask.py:pyramid=fpn            or bfp, bpa, bfi
    coco_mask.py:fpt=st+gt+rt           any of st, gt or lgt, rt; or none, fuse, fuse_wide
    coco_mask.py:scope=adjacent         levels interact with their neighbours only
    coco_mask.py:head=augmented         PANet's box and mask heads
    coco_mask.py:sbn=off                batch statistics per device
    coco_mask.py:dropblock=off
    coco_mask.py:literal                FPT from the bare equations, see docs/fpt.md
"""

from fpt_jax.configs.detection import detection, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  return variant(detection(), arg)
