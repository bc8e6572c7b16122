"""The rows of the paper's tables: the config of each row, and the results that the paper reports."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    name: name of the row in the paper.
    arg: words after the colon of the config file.
    box: AP, AP50, AP75, APs, APm and APl of boxes in percent, or AP alone; None if not reported.
    mask: the same of masks.
    parameters: number of parameters in millions; None if not reported.
    gflops: number of multiply-adds in 1e9; None if not reported.
    config: name of the config file without its ending.
    miou: mIoU in percent. Table 4: on the training and the validation set; table 5: on one data set.
  """

  name: str
  arg: str
  box: tuple[float, ...] | None
  mask: tuple[float, ...] | None
  parameters: float | None = None
  gflops: float | None = None
  config: str = "coco_mask"
  miou: tuple[float | None, ...] | None = None


# Ablation of the transformers on val2017, ResNet-50.
TABLE_1 = (
  Row(
    "BFP",
    "fpt=none",
    (31.6, 54.1, 35.9, 16.1, 32.5, 48.8),
    (29.9, 50.7, 34.7, 14.2, 31.6, 48.5),
    34.6,
    172.3,
  ),
  Row(
    "BFP+ST",
    "fpt=st",
    (32.0, 54.9, 36.9, 16.5, 34.0, 49.1),
    (30.6, 51.4, 35.5, 15.1, 32.1, 49.7),
    55.0,
    248.2,
  ),
  Row(
    "BFP+GT",
    "fpt=gt",
    (35.1, 55.2, 38.1, 17.4, 36.3, 50.3),
    (33.9, 52.4, 37.7, 16.9, 33.3, 51.7),
    63.9,
    265.1,
  ),
  Row(
    "BFP+RT",
    "fpt=rt",
    (34.7, 55.5, 37.5, 17.0, 36.6, 52.0),
    (33.1, 52.0, 37.7, 15.3, 34.9, 52.1),
    39.8,
    187.9,
  ),
  Row(
    "BFP+ST+GT",
    "fpt=st+gt",
    (35.7, 55.7, 38.3, 18.0, 36.5, 52.1),
    (34.6, 54.1, 37.9, 17.4, 34.0, 50.5),
    82.5,
    322.9,
  ),
  Row(
    "BFP+ST+RT",
    "fpt=st+rt",
    (35.9, 56.8, 38.8, 19.1, 37.0, 53.1),
    (34.4, 55.1, 38.0, 17.9, 34.8, 52.2),
    61.2,
    256.7,
  ),
  Row(
    "BFP+GT+RT",
    "fpt=gt+rt",
    (36.9, 56.6, 38.2, 18.8, 37.7, 54.3),
    (35.1, 54.5, 38.5, 17.7, 35.3, 53.2),
    69.6,
    281.6,
  ),
  Row(
    "BFP+ST+GT+RT",
    "fpt=st+gt+rt",
    (38.0, 57.1, 38.9, 20.5, 38.1, 55.7),
    (36.8, 55.9, 38.6, 18.8, 35.3, 54.2),
    88.2,
    346.2,
  ),
)

# Synchronised BatchNorm and DropBlock on val2017, ResNet-50.
TABLE_2 = (
  Row(
    "FPT",
    "sbn=off,dropblock=off",
    (37.2, 56.0, 37.7, 19.0, 37.7, 53.1),
    (35.9, 54.3, 36.9, 17.2, 34.8, 51.3),
  ),
  Row(
    "FPT, SBN",
    "sbn=on,dropblock=off",
    (37.8, 56.7, 38.4, 19.6, 37.9, 54.0),
    (36.5, 55.2, 38.2, 18.0, 35.1, 52.1),
  ),
  Row(
    "FPT, DropBlock",
    "sbn=off,dropblock=on",
    (37.5, 56.5, 38.0, 19.5, 37.8, 53.8),
    (36.2, 54.8, 37.3, 17.8, 35.0, 51.9),
  ),
  Row(
    "FPT, SBN, DropBlock",
    "sbn=on,dropblock=on",
    (38.0, 57.1, 38.9, 20.5, 38.1, 55.7),
    (36.8, 55.9, 38.6, 18.8, 35.3, 54.2),
  ),
)

# Against other backbones, pyramids and training strategies on test-dev.
TABLE_3 = (
  Row(
    "BFP, ResNet-101",
    "backbone=resnet101,fpt=none",
    (33.1, 53.8, 34.6, 12.6, 35.3, 49.5),
    (32.6, 51.7, 33.3, 11.4, 34.4, 48.9),
  ),
  Row(
    "BFP, NL-ResNet-101",
    "backbone=resnet101_nl,fpt=none",
    (34.4, 54.3, 35.8, 15.1, 37.1, 50.7),
    (33.7, 53.6, 33.9, 13.7, 36.0, 49.7),
  ),
  Row(
    "BFP, GC-ResNet-101",
    "backbone=resnet101_gc,fpt=none",
    (35.0, 55.8, 36.5, 14.8, 38.6, 50.9),
    (34.2, 54.1, 35.3, 13.9, 37.3, 50.5),
  ),
  Row(
    "BFP, AA-ResNet-101",
    "backbone=resnet101_aa,fpt=none",
    (33.8, 54.2, 35.4, 13.0, 35.5, 50.0),
    (32.8, 52.3, 33.8, 12.3, 34.5, 49.0),
  ),
  Row(
    "BFP+FPN",
    "backbone=resnet101,pyramid=fpn,fpt=none",
    (36.2, 59.1, 39.0, 18.2, 39.0, 52.4),
    (35.7, 58.0, 37.8, 15.5, 38.1, 49.2),
  ),
  Row(
    "BFP+BPA",
    "backbone=resnet101,pyramid=bpa,fpt=none",
    (37.3, 60.4, 39.9, 18.9, 39.7, 53.0),
    (36.3, 59.0, 38.3, 16.3, 39.0, 50.5),
  ),
  Row("BFP+BFI", "backbone=resnet101,pyramid=bfi,fpt=none,head=zigzag", (39.5,), None),
  Row(
    "BFP+FPT, ResNet-101",
    "backbone=resnet101",
    (41.6, 60.9, 44.0, 23.4, 41.5, 53.1),
    (38.6, 58.2, 43.3, 19.0, 39.2, 50.8),
  ),
  Row(
    "BFP+FPT, NL-ResNet-101",
    "backbone=resnet101_nl",
    (42.0, 62.1, 46.5, 25.1, 42.6, 53.7),
    (39.5, 60.7, 45.4, 20.8, 41.0, 53.0),
  ),
  Row(
    "BFP+FPT, GC-ResNet-101",
    "backbone=resnet101_gc",
    (42.5, 62.0, 46.1, 25.3, 42.7, 53.1),
    (40.3, 61.0, 45.8, 21.1, 41.8, 52.7),
  ),
  Row(
    "BFP+FPT, AA-ResNet-101",
    "backbone=resnet101_aa",
    (42.1, 61.5, 46.5, 25.2, 42.6, 53.5),
    (40.1, 60.1, 45.2, 20.6, 41.2, 52.0),
  ),
  Row(
    "BFP+FPT [AH]",
    "backbone=resnet101,head=augmented",
    (41.1, 62.0, 46.6, 24.2, 42.1, 53.3),
    (40.0, 59.9, 45.5, 20.5, 41.0, 52.5),
  ),
  Row(
    "BFP+FPT [MT]",
    "backbone=resnet101,multiscale",
    (41.2, 62.1, 46.0, 24.1, 41.9, 53.2),
    (39.8, 60.1, 45.1, 20.9, 40.8, 51.9),
  ),
  Row(
    "BFP+FPN [all]",
    "backbone=resnet101,pyramid=fpn,fpt=none,head=augmented,multiscale",
    (37.9, 59.6, 40.1, 19.5, 41.0, 53.5),
    (36.3, 58.8, 39.1, 16.7, 40.3, 51.1),
  ),
  Row(
    "BFP+BPA [all]",
    "backbone=resnet101,pyramid=bpa,fpt=none,head=augmented,multiscale",
    (39.0, 60.8, 41.7, 20.2, 41.5, 54.1),
    (37.7, 59.4, 40.1, 18.5, 40.1, 52.4),
  ),
  Row(
    "BFP+BFI [all]",
    "backbone=resnet101,pyramid=bfi,fpt=none,head=augmented,multiscale",
    (40.1, 61.2, 42.6, 21.9, 42.4, 54.3),
    (38.2, 60.0, 42.4, 19.6, 40.8, 52.5),
  ),
  Row(
    "BFP+FPT [all]",
    "backbone=resnet101,head=augmented,multiscale",
    (42.6, 62.4, 46.9, 24.9, 43.0, 54.5),
    (40.3, 61.1, 45.9, 21.3, 41.2, 53.3),
  ),
)


def _ablation(
  name: str, fpt: str, train: float, val: float, parameters: float, gflops: float
) -> Row:
  return Row(name, f"fpt={fpt}", None, None, parameters, gflops, "cityscapes", (train, val))


# Ablation of the transformers on Cityscapes val, dilated ResNet-101.
TABLE_4 = (
  _ablation("UFP", "none", 86.0, 79.1, 71.3, 916.1),
  _ablation("UFP+ST", "st", 86.9, 80.7, 91.2, 948.4),
  _ablation("UFP+LGT", "lgt", 86.5, 80.3, 102.8, 1008.3),
  _ablation("UFP+RT", "rt", 86.3, 80.1, 77.4, 929.3),
  _ablation("UFP+LGT+ST", "lgt+st", 87.2, 80.9, 121.3, 1052.6),
  _ablation("UFP+RT+ST", "rt+st", 87.0, 80.8, 96.2, 985.2),
  _ablation("UFP+LGT+RT", "lgt+rt", 86.6, 80.4, 107.0, 1014.8),
  _ablation("UFP+LGT+ST+RT", "lgt+st+rt", 87.4, 81.7, 127.2, 1063.9),
)

# Against other methods: Cityscapes test, ADE20K val, LIP val, PASCAL VOC 2012 test. All have the dilated
# ResNet-101 but HRNet, with HRNetV2-W48, and GSCNN, with WiderResNet-38. The paper names Wide-ResNet-101 for
# GSCNN, which neither GSCNN's paper nor its code has.
# OCNet's and AFNB's papers have several variants: we use OCNet with ASP-OC, and AFNB with APNB. The paper
# does not say which object context it puts on a pyramid; base-OC is our choice.
DATA_SETS = ("cityscapes", "ade20k", "lip", "voc2012")
METHODS = (
  ("baseline", "head=fcn", (65.3, 40.9, 42.7, 62.2)),
  ("CFNet", "head=cfnet", (80.6, 44.9, 54.6, 84.2)),
  ("AFNB", "head=afnb", (81.3, 45.2, None, None)),
  ("OCNet", "head=ocnet", (81.7, 45.5, 54.7, 84.3)),
  ("HRNet", "head=hrnet", (81.6, 44.7, 55.9, 84.5)),
  ("GSCNN", "head=gscnn", (82.8, None, 55.2, None)),
  ("PPM+OC", "pyramid=ppm,fpt=none,context=oc_base", (79.9, 43.7, 53.0, 82.9)),
  ("ASPP+OC", "pyramid=aspp,fpt=none,context=oc_base", (80.0, 44.1, 53.3, 82.7)),
  ("UFP+OC", "pyramid=ufp,fpt=none,context=oc_base", (80.6, 44.7, 54.5, 83.2)),
  ("PPM+FPT", "pyramid=ppm", (80.4, 44.8, 54.2, 83.2)),
  ("ASPP+FPT", "pyramid=aspp", (80.7, 45.2, 54.4, 83.1)),
  ("UFP+FPT", "pyramid=ufp", (82.2, 45.9, 56.2, 85.0)),
)
TABLE_5 = tuple(
  Row(f"{name}, {data}", arg, None, None, config=data, miou=(miou[i],))
  for i, data in enumerate(DATA_SETS)
  for name, arg, miou in METHODS
)

TABLES = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3, 4: TABLE_4, 5: TABLE_5}
