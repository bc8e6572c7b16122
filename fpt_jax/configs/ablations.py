"""The tables of `scripts/ablation.py`: small runs that compare variants of FPT and its baselines.

A row is added by one line.
"""

import dataclasses
from collections.abc import Iterable

from fpt_jax.configs import tables

VOC_SMALL = (
  "--config.data.crop=(256,256)",
  "--config.data.scale=(0.5,1.25)",
  "--config.train_images=2560",
)
COCO_SMALL = (
  "--config.steps=600",
  "--config.batch_size=8",
  "--config.optim.learning_rate=0.1",
)
CANONICAL = "--config.model.canonical_size=42.0"  # 224 at an edge of 1024 pixels
DETECTION, SEGMENTATION = "configs/coco_mask.py:demo", "configs/cityscapes.py:demo"
CONTEXT = ("segm/AP", "bbox/AP", "context/accuracy", "context/fine")
MIOU = ("mIoU",)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    name: name of the row.
    config: value of --config.
    flags: further flags of fpt_jax.main.
    paper: the paper's figure for the table's first metric, at the paper's size; None if there is none.
  """

  name: str
  config: str
  flags: tuple[str, ...] = ()
  paper: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows that are trained with the same budget.

  Attributes:
    title: heading of the table.
    metrics: names in metrics.jsonl of the columns; the bars show the first one.
    rows: the rows.
  """

  title: str
  metrics: tuple[str, ...]
  rows: tuple[Row, ...]


def with_words(config: str, words: str) -> str:
  """A value of --config with further words after the colon."""
  return f"{config}{',' if ':' in config else ':'}{words}"


def of_paper(base: str, rows: Iterable[tables.Row]) -> list[Row]:
  """The rows of a table of the paper, with another size and data set."""
  figures = [(row, row.mask[0] if row.mask else row.miou[-1] if row.miou else None) for row in rows]
  return [Row(row.name, with_words(base, row.arg), paper=figure) for row, figure in figures]


def fpt(base: str, name: str, *fields: str) -> Row:
  """A row with other values of fields of `model.fpt`, such as "scale=1.0"."""
  return Row(name, base, tuple(f"--config.model.fpt.{field}" for field in fields))


def baselines(base: str) -> list[Row]:
  return [Row(name, with_words(base, f"fpt={name}")) for name in ("fuse", "fuse_wide")]


def conditioning(base: str) -> tuple[Row, ...]:
  return (
    fpt(base, "default"),
    Row("literal", f"{base},literal"),
    fpt(base, "unit", "similarity_norm=unit"),
    fpt(base, "no similarity norm", "similarity_norm=none"),
    fpt(base, "mixture not uniform", "uniform_mixture=False"),
    fpt(base, "no output norm", "output_norm=False"),
    fpt(base, "output norm from 0", "output_norm_scale=0.0"),
    fpt(base, "output norm from 0.5", "output_norm_scale=0.5"),
    fpt(base, "identity gate", "gate=identity"),
    fpt(base, "constant DropBlock", "drop_block_schedule=constant"),
  )


def frozen_coco(size: str) -> str:
  """COCO with a frozen EfficientNet-Lite0; `size` is a word of the benchmark."""
  return f"configs/coco_box.py:{size},backbone=efficientnet_lite0"


ABLATIONS = {
  "table1": Table(
    "Table 1 of the paper, on Context Shapes",
    CONTEXT,
    (*of_paper(DETECTION, tables.TABLE_1), *baselines(DETECTION)),
  ),
  "table2": Table(
    "Table 2 of the paper, on Context Shapes",
    CONTEXT,
    (*of_paper(DETECTION, tables.TABLE_2),),
  ),
  "necks": Table(
    "Necks of table 3 of the paper, on Context Shapes",
    CONTEXT,
    (
      Row("BFP", f"{DETECTION},fpt=none"),
      Row("FPN", f"{DETECTION},pyramid=fpn,fpt=none"),
      Row("BPA", f"{DETECTION},pyramid=bpa,fpt=none"),
      Row("BFI", f"{DETECTION},pyramid=bfi,fpt=none"),
      *baselines(DETECTION),
      Row("BFP+FPT", f"{DETECTION},fpt=st+gt+rt"),
    ),
  ),
  "table4": Table(
    "Table 4 of the paper, on Context Shapes",
    MIOU,
    (*of_paper(SEGMENTATION, tables.TABLE_4), *baselines(SEGMENTATION)),
  ),
  "attention": Table(
    "Softmaxes of a mixture and the factor of the similarities, on Context Shapes",
    CONTEXT,
    (
      Row("N of ST = 2, of GT = 4", f"{DETECTION},fpt=st+gt+rt"),
      fpt(DETECTION, "N = 1", "self_parts=1", "grounding_parts=1"),
      fpt(DETECTION, "N = 2", "self_parts=2", "grounding_parts=2"),
      fpt(DETECTION, "N = 4", "self_parts=4", "grounding_parts=4"),
      fpt(DETECTION, "factor 1", "scale=1.0"),
      fpt(DETECTION, "factor 1/8", "scale=0.125"),
    ),
  ),
  "conditioning_detection": Table(
    "Conditioning, detection on Context Shapes", CONTEXT, conditioning(DETECTION)
  ),
  "conditioning_segmentation": Table(
    "Conditioning, segmentation of Context Shapes", MIOU, conditioning(SEGMENTATION)
  ),
  "camvid": Table(
    "CamVid, from ImageNet weights",
    MIOU,
    (
      Row("UFP", "configs/camvid.py:fpt=none"),
      *baselines("configs/camvid.py"),
      Row("UFP+FPT", "configs/camvid.py"),
    ),
  ),
  "voc2012": Table(
    "PASCAL VOC 2012, 300 training images, from ImageNet weights",
    MIOU,
    (
      Row("UFP", "configs/voc2012.py:small,fpt=none", VOC_SMALL),
      Row("UFP+FPT", "configs/voc2012.py:small", VOC_SMALL),
    ),
  ),
  "coco_120": Table(
    "COCO at 120 pixels, 200 training images, frozen ImageNet features",
    ("bbox/AP50", "bbox/AP"),
    (
      Row("BFP", f"{frozen_coco('tiny')},fpt=none", COCO_SMALL),
      Row("BFP+FPT", frozen_coco("tiny"), COCO_SMALL),
    ),
  ),
  "coco_192": Table(
    "COCO at 192 pixels, 200 training images, frozen ImageNet features",
    ("bbox/AP50", "bbox/AP"),
    (
      Row("BFP", f"{frozen_coco('small')},fpt=none", (*COCO_SMALL, CANONICAL)),
      Row("BFP+FPT", frozen_coco("small"), (*COCO_SMALL, CANONICAL)),
    ),
  ),
}
