"""What an evaluation of detection writes beside its results: categories, errors, curves, confusions.

Shapes: T IoU thresholds, R recalls, K categories; in confusion matrices T P true and predicted classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epy
from ml_collections import ConfigDict
from pycocotools.cocoeval import COCOeval

from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import UserError, first_of
from fpt_jax.tasks import pictures
from fpt_jax.tasks.detection import category_table, coco_ap, confusion, tide

with epy.lazy_imports():
  from matplotlib import figure as figures

CATEGORIES_FILE = "categories.csv"
CONFUSION_FILE = "confusion.json"
CONFUSION_PICTURE = "confusion.png"
CURVES_PICTURE = "precision_recall.png"
ERRORS_PICTURE = "errors.png"
TITLES = {"bbox": "boxes", "segm": "masks"}
CURVES_AT = (0.5, 0.75)  # IoU
SHOWN = 80  # categories in the picture of the confusion matrix


class Analysis(NamedTuple):
  """An analysis of detections.

  Attributes:
    metrics: "bbox/dAP-Cls" and so on, see `tide.errors`, and the same for "segm".
    text: tables for the log.
    files: content of each file by its name.
  """

  metrics: dict[str, float]
  text: str
  files: dict[str, str | bytes]


def analyse(config: ConfigDict, evaluations: Mapping[str, COCOeval]) -> Analysis:
  """Analyses the detections of an evaluation.

  Args:
    config: config of the run; `eval` has the fields of the analysis.
    evaluations: result of `coco_ap.evaluations`.
  """
  rows = category_table.categories_of(evaluations)
  names = {row["category_id"]: row["category"] for row in rows}
  errors = {
    iou_type: tide.errors(tide.match(coco_ap.images_of(evaluation), iou_type))
    for iou_type, evaluation in evaluations.items()
  }
  boxes = next(iter(evaluations.values()))
  counts_TP = confusion.count(coco_ap.images_of(boxes), list(names), config.eval.confusion_score)
  class_names = [*names.values(), "background"]
  confusions = {
    "class_names": class_names,
    "min_score": config.eval.confusion_score,
    "counts": counts_TP.tolist(),
  }
  drawn = {
    CONFUSION_PICTURE: pictures.draw_confusion(*most_frequent(counts_TP, class_names), "objects"),
    CURVES_PICTURE: pictures.pixels_of(curves_figure(evaluations, names, config.eval.curves_of)),
    ERRORS_PICTURE: pictures.pixels_of(errors_figure(errors)),
  }
  return Analysis(
    metrics={
      f"{iou_type}/dAP-{name}": value
      for iou_type, values in errors.items()
      for name, value in values.items()
    },
    text=f"{category_table.format_categories(rows)}\n{format_errors(errors)}",
    files={
      CATEGORIES_FILE: category_table.to_csv(rows),
      CONFUSION_FILE: json.dumps(confusions),
      **{path: encode_png(picture_HWC) for path, picture_HWC in drawn.items()},
    },
  )


def check_curves(config: ConfigDict, names: Sequence[str]) -> None:
  """Checks the names of `config.eval.curves_of`.

  Raises:
    UserError: the data set does not have a category of this name.
  """
  unknown = [name for name in config.eval.curves_of if name not in names]
  if unknown:
    raise UserError(
      f"config.eval.curves_of: the data set has no category {unknown[0]!r}; its categories are "
      f"{first_of(names, 20)}"
    )


def most_frequent(
  counts_TP: np.ndarray, class_names: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
  """Returns a confusion matrix of at most `SHOWN` categories, those with the most objects, and its names.

  The others are one category together. The last class, background, stays.

  Args:
    counts_TP: result of `confusion.count`.
    class_names: names of its classes.
  """
  if len(class_names) - 1 <= SHOWN:
    return counts_TP, list(class_names)
  objects_T = counts_TP[:-1].sum(axis=1)
  kept = np.sort(np.argsort(-objects_T, kind="stable")[:SHOWN])
  place_T = np.full(len(class_names), SHOWN)
  place_T[kept], place_T[-1] = np.arange(SHOWN), SHOWN + 1
  shown_TP = np.zeros((SHOWN + 2,) * 2, counts_TP.dtype)
  np.add.at(shown_TP, (place_T[:, None], place_T[None]), counts_TP)
  return shown_TP, [*(class_names[k] for k in kept), "others", class_names[-1]]


def format_errors(errors: Mapping[str, Mapping[str, float]]) -> str:
  """Formats the errors as a table: the AP50 that each type of error costs, one row per IoU type."""
  lines = ["dAP50 " + "".join(f"{name:>9}" for name in (*tide.MAIN, *tide.SPECIAL))]
  for iou_type, values in errors.items():
    lines.append(f"{iou_type:<6}" + "".join(f"{value:>9.1f}" for value in values.values()))
  return "\n".join(lines)


def errors_figure(errors: Mapping[str, Mapping[str, float]]) -> figures.Figure:
  """Draws what each type of error costs as bars, as figure 1 of TIDE's paper.

  Args:
    errors: result of `tide.errors` of each IoU type.
  """
  figure = figures.Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
  for axes, names in zip(
    figure.subplots(1, 2, width_ratios=(6, 3)), (tide.MAIN, tide.SPECIAL), strict=True
  ):
    height = 0.8 / len(errors)
    for i, (iou_type, values) in enumerate(errors.items()):
      lengths = [values.get(name, 0.0) for name in names]
      bars = axes.barh(
        np.arange(len(names)) + (i - (len(errors) - 1) / 2) * height,
        lengths,
        height,
        label=TITLES[iou_type],
      )
      axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("AP50 that the errors cost")
    axes.grid(alpha=0.3, axis="x")
  axes.legend(fontsize=8)
  return figure


def curves_figure(
  evaluations: Mapping[str, COCOeval], names: Mapping[int, str], chosen: Sequence[str]
) -> figures.Figure:
  """Draws the precision by recall at the IoU thresholds 0.5 and 0.75: means over categories.

  Args:
    evaluations: result of `coco_ap.evaluations`.
    names: name of each category by its id.
    chosen: names of categories whose own curves are drawn as well.
  """
  figure = figures.Figure(figsize=(5 * len(evaluations) + 1, 4.5), dpi=100, layout="constrained")
  panels = figure.subplots(1, len(evaluations), squeeze=False)[0]
  for axes, (iou_type, evaluation) in zip(panels, evaluations.items(), strict=True):
    recalls_R = evaluation.params.recThrs
    precision_TRK = evaluation.eval["precision"][:, :, :, 0, -1]
    for style, threshold in zip(("-", "--"), CURVES_AT, strict=True):
      (t,) = np.flatnonzero(np.isclose(evaluation.params.iouThrs, threshold))
      precision_RK = precision_TRK[t]
      known_K = precision_RK.min(axis=0) >= 0
      if known_K.any():
        mean_R = precision_RK[:, known_K].mean(axis=1)
        label = f"mean of {known_K.sum()}, IoU {threshold}: AP {100 * mean_R.mean():.1f}"
        axes.plot(recalls_R, mean_R, style, color="black", linewidth=2, label=label)
      for k, category in enumerate(evaluation.params.catIds):
        if names[category] in chosen and known_K[k]:
          precision_R = precision_RK[:, k]
          axes.plot(
            recalls_R,
            precision_R,
            style,
            color=np.array(pictures.category_color(names[category])) / 255,
            label=f"{names[category]}, IoU {threshold}: AP {100 * precision_R.mean():.1f}",
          )
    axes.set(
      title=TITLES[iou_type], xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02)
    )
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend(fontsize=8, loc="lower left")
  return figure
