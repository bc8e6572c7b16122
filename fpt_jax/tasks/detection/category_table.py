"""COCO's metrics of each category: as a table for the log, and as CSV."""

import collections
import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table
import rich.text
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "AR@100")


def categories_of(evaluations: Mapping[str, COCOeval]) -> list[dict[str, Any]]:
  """Returns the metrics of each category.

  Args:
    evaluations: result of `coco_ap.evaluations`.

  Returns:
    One dictionary per category, in the order of the ids: "category_id", "category", its name, "objects", the
    number of its annotations without crowds, and "bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/AR@100" and the
    same for "segm", from 0 to 100; None without any ground truth.
  """
  truth = next(iter(evaluations.values())).cocoGt
  objects = collections.Counter(
    annotation["category_id"]
    for annotation in truth.dataset["annotations"]
    if not annotation["iscrowd"]
  )
  rows = [
    {"category_id": i, "category": truth.cats[i]["name"], "objects": objects[i]}
    for i in sorted(truth.cats)
  ]
  for iou_type, evaluation in evaluations.items():
    thresholds = evaluation.params.iouThrs
    # of all areas, and with the largest number of detections
    precision_TRK = evaluation.eval["precision"][:, :, :, 0, -1]
    recall_TK = evaluation.eval["recall"][:, :, 0, -1]
    for k, row in enumerate(rows):
      values = (
        precision_TRK[:, :, k],
        precision_TRK[np.isclose(thresholds, 0.5), :, k],
        precision_TRK[np.isclose(thresholds, 0.75), :, k],
        recall_TK[:, k],
      )
      for name, value in zip(METRICS, values, strict=True):
        row[f"{iou_type}/{name}"] = None if value.min() < 0 else 100 * float(value.mean())
  return rows


def format_categories(rows: Sequence[Mapping[str, Any]]) -> str:
  """Formats the rows of `categories_of` as a table for the log; "-" for a missing metric."""
  table = rich.table.Table(rich.table.Column("category", no_wrap=True))
  names = [name for name in rows[0] if name not in ("category_id", "category")]
  for name in names:
    table.add_column(name, justify="right", no_wrap=True)
  for row in rows:
    table.add_row(rich.text.Text(row["category"]), *(_cell(row[name]) for name in names))
  console = rich.console.Console(file=io.StringIO(), width=160, color_system=None)
  with console.capture() as text:
    console.print(table)
  return "\n".join(line.rstrip() for line in text.get().splitlines())


def _cell(value: float | None) -> str:
  if value is None:
    return "-"
  return str(value) if isinstance(value, int) else f"{value:.1f}"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows of `categories_of` as CSV with a header; a missing metric is an empty field."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()
