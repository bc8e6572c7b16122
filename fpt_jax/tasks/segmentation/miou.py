"""Mean intersection over union of label maps, from a confusion matrix; metrics are x100.

Shapes: T true classes and P predicted classes, both 0..num_classes-1; H W rows and columns, N pixels.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def confusion_matrix(
  truth_HW: np.ndarray, prediction_HW: np.ndarray, num_classes: int, *, void: int = 255
) -> np.ndarray:
  """Counts pixels by true and predicted class; the matrices of images and of hosts can be added.

  Args:
    truth_HW: true classes, int, of any shape; pixels with the label `void` are not counted.
    prediction_HW: predicted classes, int, of the same shape.
    num_classes: number of classes.
    void: label of pixels without a class.

  Returns:
    int64 [T, P].

  Raises:
    ValueError: the shapes differ, or a counted pixel has a label that is not a class.
  """
  truth_HW, prediction_HW = np.asarray(truth_HW), np.asarray(prediction_HW)
  if truth_HW.shape != prediction_HW.shape:
    raise ValueError(
      f"truth has shape {truth_HW.shape} and prediction has shape {prediction_HW.shape}"
    )
  counted_HW = truth_HW != void
  truth_N, prediction_N = (
    map_HW[counted_HW].astype(np.int64) for map_HW in (truth_HW, prediction_HW)
  )
  for name, classes_N in (("truth", truth_N), ("prediction", prediction_N)):
    unknown = np.unique(classes_N[(classes_N < 0) | (classes_N >= num_classes)])
    if unknown.size:
      raise ValueError(
        f"{name} has labels {unknown[:8].tolist()}, classes are 0..{num_classes - 1}"
      )
  pairs_N = truth_N * num_classes + prediction_N
  return np.bincount(pairs_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion_TP: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
  """Computes the metrics of a confusion matrix.

  Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010, section 4.1.2 for IoU;
  Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, section 5 for all.

  Args:
    confusion_TP: counts, int64 [T, P], see `confusion_matrix`.
    class_names: name of class 0, 1, ...

  Returns:
    Metrics from 0 to 100, nan where nothing was counted:
      "mIoU": mean of the classes' IoU. The IoU of a class that is in neither truth nor prediction is
        nan, and left out of the mean.
      "mAcc": mean over the true classes of the share of their pixels that is predicted correctly.
      "aAcc": share of all pixels that is predicted correctly.
      "IoU/<class>": pixels in both truth and prediction / pixels in either.
  """
  confusion_TP = np.asarray(confusion_TP, np.float64)
  if confusion_TP.shape != (len(class_names),) * 2:
    raise ValueError(
      f"a matrix of shape {confusion_TP.shape} does not fit {len(class_names)} class names"
    )
  both_T, truth_T, prediction_T = np.diag(confusion_TP), confusion_TP.sum(1), confusion_TP.sum(0)
  iou_T = _percent(both_T, truth_T + prediction_T - both_T)
  accuracy_T = _percent(both_T, truth_T)
  metrics = {
    "mIoU": _mean(iou_T),
    "mAcc": _mean(accuracy_T),
    "aAcc": float(_percent(both_T.sum(), truth_T.sum())),
  }
  return metrics | {f"IoU/{name}": float(iou) for name, iou in zip(class_names, iou_T, strict=True)}


def format_table(metrics: Mapping[str, float]) -> str:
  """Formats the metrics of `scores` as a table: one line for all classes, then one per class."""
  lines = ["  ".join(f"{name} {metrics[name]:.1f}" for name in ("mIoU", "mAcc", "aAcc"))]
  classes = {name.removeprefix("IoU/"): v for name, v in metrics.items() if name.startswith("IoU/")}
  width = max(map(len, classes), default=0)
  for name, iou in classes.items():
    lines.append(f"{name:<{width}}  {'    -' if np.isnan(iou) else f'{iou:5.1f}'}")
  return "\n".join(lines)


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  """Returns 100 part / whole, nan where the whole is 0."""
  return 100 * np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _mean(values_T: np.ndarray) -> float:
  """Returns the mean of the values that are not nan; nan if all are."""
  known_N = values_T[~np.isnan(values_T)]
  return float(known_N.mean()) if known_N.size else float("nan")
