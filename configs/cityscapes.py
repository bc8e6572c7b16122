"""Semantic segmentation of Cityscapes with UFP and FPT: the paper's section 4.2, last row of table 4.

    python -m fpt_jax.main --config=configs/cityscapes.py --workdir=... --config.data.source=/data/cityscapes

The paper reports 81.7 mIoU on val and 82.2 on test for a frozen dilated ResNet-101 that was pretrained
on ImageNet (`--config.init_from`, see the README), after 120 epochs of crops of 969 x 969. It names 8
GPUs and no batch size: one image a GPU is ours.

Behind the file's colon stand words and settings, separated by commas:

    cityscapes.py:demo                 generated shapes, a narrow ResNet-18, minutes on two CPU cores
    cityscapes.py:small                EfficientNet-Lite0 at low resolution
    cityscapes.py:backbone=resnet50    or resnet18, resnet34, efficientnet_lite0
    cityscapes.py:pyramid=ufp          or ppm, aspp, none
    cityscapes.py:fpt=lgt+st+rt        any of st, lgt or gt, rt; or none
    cityscapes.py:fpt=none,context=oc_base   or oc_pyramid, oc_asp: OCNet's object context on the pyramid
    cityscapes.py:head=fcn             or ocnet, cfnet, afnb: whole networks of others, without FPT
    cityscapes.py:sbn=off              statistics of each device's images alone
    cityscapes.py:dropblock=off
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """`arg`: "" for the paper, or see above."""
  return variant(segmentation(), arg)
