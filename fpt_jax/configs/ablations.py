"""The tables of `scripts/ablation.py`: small runs that compare variants of FPT and its baselines.

A row is added by one line.
"""

import dataclasses
from collections.abc import Iterable, Mapping

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
FASTER_FPT = ('--config.optim.groups=(("^fpt",3.0,1.0),)',)
ALIGNED = ("--config.model.align_corners=True",)
DETECTION, SEGMENTATION = "configs/coco_mask.py:demo", "configs/cityscapes.py:demo"
FPT_DETECTION = "fpt=st+gt+rt"  # in full, as in table 1: runs with the same flags are trained once
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
    needs: options of scripts/ablation.py that the table needs, such as the weights that its runs start
      from; the value is an example for the page.
    devices: number of devices that the core of a run appears as.
    note: sentence below the table.
  """

  title: str
  metrics: tuple[str, ...]
  rows: tuple[Row, ...]
  needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  devices: int = 1
  note: str = ""


def with_words(config: str, words: str) -> str:
  """A value of --config with further words after the colon."""
  return f"{config}{',' if ':' in config else ':'}{words}"


def of_paper(base: str, rows: Iterable[tables.Row], flags: tuple[str, ...] = ()) -> list[Row]:
  """The rows of a table of the paper, with another size and data set."""
  figures = [(row, row.mask[0] if row.mask else row.miou[-1] if row.miou else None) for row in rows]
  return [
    Row(row.name.replace(", ", "+"), with_words(base, row.arg), flags, figure)
    for row, figure in figures
  ]


def fpt(base: str, name: str, *fields: str) -> Row:
  """A row with other values of fields of `model.fpt`, such as "scale=1.0"."""
  return Row(name, base, tuple(f"--config.model.fpt.{field}" for field in fields))


def baselines(base: str, flags: tuple[str, ...] = ()) -> list[Row]:
  return [Row(name, with_words(base, f"fpt={name}"), flags) for name in ("fuse", "fuse_wide")]


def neck(name: str, words: str, row: str) -> Row:
  """A neck of table 3 of the paper, with the figure of its row there."""
  (found,) = (r for r in tables.TABLE_3 if r.name == row)
  return Row(name, with_words(DETECTION, words), paper=found.mask[0] if found.mask else None)


def conditioning(base: str, default: str) -> tuple[Row, ...]:
  return (
    Row("default", default),
    Row("literal", f"{base},literal"),
    fpt(base, "unit", "similarity_norm=unit"),
    fpt(base, "no similarity norm", "similarity_norm=none"),
    fpt(base, "mixture not uniform", "uniform_mixture=False"),
    fpt(base, "no output norm", "output_norm=False"),
    fpt(base, "output norm from 0", "output_norm_scale=0.0"),
    fpt(base, "output norm from 0.5", "output_norm_scale=0.5"),
    fpt(base, "identity gate", "gate=identity"),
    fpt(base, "constant DropBlock", "drop_block_schedule=constant"),
    *baselines(base),
  )


def real(name: str) -> dict[str, str]:
  """What a table of real data needs."""
  return {"source": f"/data/{name}", "init_from": "/runs/efficientnet_lite0"}


def frozen_coco(title: str, size: str, flags: tuple[str, ...]) -> Table:
  """COCO with a frozen EfficientNet-Lite0; `size` is a word of the benchmark."""
  base = f"configs/coco_box.py:{size},backbone=efficientnet_lite0"
  rows = (
    Row("BFP", with_words(base, "fpt=none"), flags),
    *baselines(base, flags),
    Row("BFP+FPT", base, flags),
  )
  return Table(title, ("bbox/AP50", "bbox/AP"), rows, needs=real("coco_small"))


ABLATIONS = {
  "table1": Table(
    "Table 1 of the paper, on Context Shapes",
    CONTEXT,
    (*of_paper(DETECTION, tables.TABLE_1), *baselines(DETECTION)),
  ),
  "table2": Table(
    "Table 2 of the paper, on Context Shapes",
    CONTEXT,
    (*of_paper(DETECTION, tables.TABLE_2, ("--config.eval.batch_size=40",)),),
    devices=8,
    note="As in the paper, 8 devices with one image each; without SBN, each has its own statistics.",
  ),
  "necks": Table(
    "Necks of table 3 of the paper, on Context Shapes",
    CONTEXT,
    (
      neck("BFP", "fpt=none", "BFP, ResNet-101"),
      neck("FPN", "pyramid=fpn,fpt=none", "BFP+FPN"),
      neck("BPA", "pyramid=bpa,fpt=none", "BFP+BPA"),
      neck("BFI", "pyramid=bfi,fpt=none", "BFP+BFI"),
      *baselines(DETECTION),
      neck("BFP+FPT", FPT_DETECTION, "BFP+FPT, ResNet-101"),
    ),
  ),
  "table4": Table(
    "Table 4 of the paper, on Context Shapes",
    MIOU,
    (*of_paper(SEGMENTATION, tables.TABLE_4), *baselines(SEGMENTATION)),
  ),
  "attention": Table(
    "Similarity, softmaxes of a mixture and factor of the similarities, on Context Shapes",
    CONTEXT,
    (
      Row("default", with_words(DETECTION, FPT_DETECTION)),
      fpt(DETECTION, "GT by dot product", "grounding_similarity=dot"),
      Row("literal", with_words(DETECTION, "literal")),
      fpt(
        with_words(DETECTION, "literal"),
        "literal and GT by dot product",
        "grounding_similarity=dot",
      ),
      fpt(DETECTION, "N = 1", "self_parts=1", "grounding_parts=1"),
      fpt(DETECTION, "N = 2", "self_parts=2", "grounding_parts=2"),
      fpt(DETECTION, "N = 4", "self_parts=4", "grounding_parts=4"),
      fpt(DETECTION, "factor 1", "scale=1.0"),
      fpt(DETECTION, "factor 1/8", "scale=0.125"),
      *baselines(DETECTION),
    ),
    note="By default, N of ST is 2 and N of GT 4, and the factor 1 / sqrt(channels of a part).",
  ),
  "conditioning_detection": Table(
    "Conditioning, detection on Context Shapes",
    CONTEXT,
    (
      *conditioning(DETECTION, with_words(DETECTION, FPT_DETECTION)),
      Row("pyramid from 2/fan-out", DETECTION, ("--config.model.pyramid.init=fan_out",)),
    ),
  ),
  "precision": Table(
    "float32 and bfloat16, detection on Context Shapes",
    CONTEXT,
    (
      Row("float32", with_words(DETECTION, FPT_DETECTION)),
      Row("bfloat16", with_words(DETECTION, FPT_DETECTION), ("--config.model.dtype=bfloat16",)),
    ),
    note="Weights and the optimizer's state are float32 in both.",
  ),
  "conditioning_segmentation": Table(
    "Conditioning, segmentation of Context Shapes",
    MIOU,
    (
      *conditioning(SEGMENTATION, SEGMENTATION),
      fpt(SEGMENTATION, "windows masked", "outside=masked"),
      Row("aligned corners", SEGMENTATION, ALIGNED),
    ),
  ),
  "camvid": Table(
    "CamVid, from ImageNet weights",
    MIOU,
    (
      Row("UFP", "configs/camvid.py:fpt=none"),
      *baselines("configs/camvid.py"),
      Row("UFP+FPT", "configs/camvid.py"),
      Row("UFP+FPT at 3 times the rate", "configs/camvid.py", FASTER_FPT),
    ),
    needs=real("camvid"),
  ),
  "camvid_corners": Table(
    "Logits enlarged with half-pixel centres and with aligned corners, CamVid, from ImageNet weights",
    MIOU,
    (
      Row("UFP", "configs/camvid.py:fpt=none"),
      Row("UFP aligned", "configs/camvid.py:fpt=none", ALIGNED),
      Row("UFP+FPT", "configs/camvid.py"),
      Row("UFP+FPT aligned", "configs/camvid.py", ALIGNED),
    ),
    needs=real("camvid"),
    note="The two differ by a shift of 7.5 pixels, at the stride of 16.",
  ),
  "voc2012": Table(
    "PASCAL VOC 2012, from ImageNet weights",
    MIOU,
    (
      Row("UFP", "configs/voc2012.py:small,fpt=none", VOC_SMALL),
      *baselines("configs/voc2012.py:small", VOC_SMALL),
      Row("UFP+FPT", "configs/voc2012.py:small", VOC_SMALL),
    ),
    needs=real("voc2012_small"),
  ),
  "coco_120": frozen_coco("COCO at 120 pixels, frozen ImageNet features", "tiny", COCO_SMALL),
  "coco_192": frozen_coco(
    "COCO at 192 pixels, frozen ImageNet features", "small", (*COCO_SMALL, CANONICAL)
  ),
}
