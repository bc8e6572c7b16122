"""Semantic segmentation of Cityscapes with UFP and FPT (paper, section 4.2, last row of table 4).

    python -m fpt_jax.main --config=configs/cityscapes.py --workdir=... --config.data.source=/data/cityscapes

The paper reports 81.7 mIoU on val and 82.2 on test for a frozen dilated ResNet-101 with ImageNet weights
(`--config.init_from`, see docs/weights.md), after 120 epochs of crops of 969 x 969. It gives 8 GPUs and no
batch size; one image per GPU is our choice.

Words and settings after the colon, in any order, separated by commas:

    cityscapes.py:demo                 generated images, a narrow ResNet-18, minutes on two CPU cores
    cityscapes.py:small                EfficientNet-Lite0 at low resolution
    cityscapes.py:backbone=resnet50    or resnet18, resnet34, efficientnet_lite0, hrnet_w48, wider_resnet38
    cityscapes.py:pyramid=ufp          or ppm, aspp, afnb, none
    cityscapes.py:fpt=lgt+st+rt        any of st, lgt or gt, rt; or none, fuse, fuse_wide
    cityscapes.py:fpt=none,context=oc_base   or oc_pyramid, oc_asp (OCNet), acf (CFNet), apnb (AFNB),
                                       psp (PSPNet), deeplabv3
    cityscapes.py:head=fcn             or ocnet, cfnet, afnb, pspnet, deeplabv3: other networks, without FPT
    cityscapes.py:head=hrnet           HRNetV2-W48, backbone and head
    cityscapes.py:head=gscnn           GSCNN: WiderResNet-38, shape stream and head
    cityscapes.py:scope=adjacent       levels interact with their neighbours only
    cityscapes.py:sbn=off              batch statistics per device
    cityscapes.py:dropblock=off
    cityscapes.py:literal              FPT from the bare equations, see docs/fpt.md
"""

from fpt_jax.configs.segmentation import segmentation, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  return variant(segmentation(), arg)
