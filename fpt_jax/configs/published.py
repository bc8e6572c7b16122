"""Numbers of parameters that other sources give for the networks in the paper's tables.

A release is the code that the authors of a network have published. Its parameters are counted layer by layer,
with 80 classes of objects (COCO) or 19 classes of pixels (Cityscapes).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
  """The size of a network by another source.

  Attributes:
    millions: number of parameters in millions.
    source: where the number comes from.
    differences: parts that differ: the source's parameters minus ours, in millions, and what they are.
  """

  millions: float
  source: str
  differences: tuple[tuple[float, str], ...] = ()

  def note(self) -> str:
    """The source and all differences in one line."""
    if not self.differences:
      return f"{self.source}. The same as ours."
    parts = (f"{amount:+.3f} M, {reason}" for amount, reason in self.differences)
    return f"{self.source}. Differs from ours by {'; '.join(parts)}."

  def as_dict(self) -> dict:
    return dataclasses.asdict(self)


_NORMS_50 = (
  0.053,
  "the backbone's BatchNorm, which is frozen and not counted here",
)
_NORMS_101 = (0.105, _NORMS_50[1])
_STEM = (
  0.124,
  "a stem of three 3x3 convolutions (here one of 7x7, as in torchvision's weights)",
)
_BIASES = "biases of convolutions in front of a BatchNorm"
_MASK_RCNN = (
  "Counted: Mask R-CNN as in torchvision (its metadata: 44.401 M with ResNet-50 and 91 classes)"
)
_BFP = f"{_MASK_RCNN} without the 3x3 convolutions of FPN"
_FPT = (
  (-0.398, "GT, which is half as wide in the release"),
  (-1.963, "RT, which has another form in the release"),
  (-0.010, "normalisations of the levels and of the transformers' outputs"),
)
_FPT_50 = Published(64.08, f"{_BFP}, with the neck of FPT's release (22.04 M)", (_NORMS_50, *_FPT))
_FPT_101 = Published(83.07, _FPT_50.source, (_NORMS_101, *_FPT))

# by name of the config file and words after its colon, as in `tables.Row`
PARAMETERS = {
  ("coco_mask", "fpt=none"): Published(42.04, _BFP, (_NORMS_50,)),
  ("coco_mask", "fpt=st+gt+rt"): _FPT_50,
  **{
    ("coco_mask", f"sbn={sbn},dropblock={drop}"): _FPT_50
    for sbn in ("off", "on")
    for drop in ("off", "on")
  },
  ("coco_mask", "backbone=resnet101,fpt=none"): Published(61.03, _BFP, (_NORMS_101,)),
  ("coco_mask", "backbone=resnet101_nl,fpt=none"): Published(
    63.13,
    f"{_BFP}; the block counted from its release, 2.10 M (GCNet, table 2: 2.1 M)",
    (_NORMS_101,),
  ),
  ("coco_mask", "backbone=resnet101_gc,fpt=none"): Published(
    65.82, f"{_BFP}; the blocks counted from GCNet's release, 4.79 M", (_NORMS_101,)
  ),
  ("coco_mask", "backbone=resnet101,pyramid=fpn,fpt=none"): Published(
    63.39, _MASK_RCNN, (_NORMS_101,)
  ),
  ("coco_mask", "backbone=resnet101,pyramid=bpa,fpt=none"): Published(
    66.93, "Counted from PANet's release, without GroupNorm and its heads", (_NORMS_101,)
  ),
  ("coco_mask", "backbone=resnet101,pyramid=bpa,fpt=none,head=augmented,multiscale"): Published(
    92.35, "Counted from PANet's release", (_NORMS_101, (0.004, "GroupNorm in the pyramid"))
  ),
  ("coco_mask", "backbone=resnet101,pyramid=bfi,fpt=none,head=zigzag"): Published(
    143.79,
    "Counted from ZigZagNet's release: 91.6 M and 52.2 M of its encoding of regions",
    (_NORMS_101,),
  ),
  ("coco_mask", "backbone=resnet101"): _FPT_101,
  ("coco_mask", "backbone=resnet101,multiscale"): _FPT_101,
  ("cityscapes", "head=fcn"): Published(
    54.31, "Torchvision's fcn_resnet101 (its metadata: 54.314 M with 21 classes)", (_NORMS_101,)
  ),
  ("cityscapes", "head=cfnet"): Published(
    57.51,
    "Counted from CFNet's release (PyTorch-Encoding, `atten.py`) on a ResNet-101 with torchvision's stem",
    (
      _NORMS_101,
      (-0.003, "biases of keys and values, and the weights of the mixture of softmaxes"),
    ),
  ),
  ("cityscapes", "head=afnb"): Published(
    67.69, "Counted from ANN's release", (_STEM, _NORMS_101, (0.004, _BIASES))
  ),
  ("cityscapes", "head=ocnet"): Published(
    62.54, "Counted from OCNet's release (ASP-OC)", (_STEM, _NORMS_101, (0.002, _BIASES))
  ),
  ("cityscapes", "head=hrnet"): Published(
    65.86,
    "Counted from HRNet's release for segmentation (its README: 65.8 M)",
    ((0.085, _NORMS_50[1]),),
  ),
  ("cityscapes", "head=gscnn"): Published(
    137.28,
    "Counted from GSCNN's release, whose backbone is WiderResNet-38; the table's Wide-ResNet-101 is in "
    "neither GSCNN's paper nor its release",
    ((0.040, _NORMS_50[1]),),
  ),
}
