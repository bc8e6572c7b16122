"""The rows of the paper's tables 1 to 3, each as the argument of a config file, with its figures.

A row's `box` and `mask` are AP, AP50, AP75, APs, APm, APl in percent; None where the paper has none.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    name: what the paper calls it.
    arg: what stands behind the colon of the config's file.
    box, mask: the paper's six figures.
    parameters: in millions, as the paper counts them; None where it does not.
    gflops: likewise; multiply-adds in 1e9.
    config: the file in `configs`, without its ending.
  """

  name: str
  arg: str
  box: tuple[float, ...] | None
  mask: tuple[float, ...] | None
  parameters: float | None = None
  gflops: float | None = None
  config: str = "coco_mask"


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
  Row("BFP+BFI", "backbone=resnet101,pyramid=bfi,fpt=none", (39.5,), None),
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

TABLES = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3}
