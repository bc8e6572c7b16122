"""COCO's average precision and recall of boxes and masks by pycocotools, x100, with detectron2's names."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpt_jax.errors import UserError

# both in the order of COCOeval.stats
PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl")
METRICS = PRECISIONS + RECALLS


def _pycocotools() -> tuple[type[COCO], type[COCOeval]]:
  return COCO, COCOeval


def _faster_coco_eval() -> tuple[type[COCO], type[COCOeval]]:
  try:
    import faster_coco_eval
  except ImportError as error:
    raise UserError(
      "config.eval.matcher='faster_coco_eval' needs a package that is not installed: pip install "
      "faster-coco-eval"
    ) from error
  return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


# functions that import a matcher and return its classes; both have the interface of pycocotools
MATCHERS: dict[str, Callable[[], tuple[type[COCO], type[COCOeval]]]] = {
  "pycocotools": _pycocotools,
  "faster_coco_eval": _faster_coco_eval,
}


def to_coco_results(
  image_id: int,
  boxes_xyxy: np.ndarray,
  scores: np.ndarray,
  category_ids: np.ndarray,
  rles: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
  """Converts the detections of one image to entries of COCO's results file.

  Args:
    image_id: id of the image in the ground truth.
    boxes_xyxy: boxes (x0, y0, x1, y1) in pixels of the original image, [N, 4].
    scores: scores, float [N].
    category_ids: the data set's category ids, not contiguous labels, int [N].
    rles: compressed masks of the original image's size, [N], or None for boxes only.

  Returns:
    N dictionaries of plain Python numbers and strings, ready for `json.dump`.
  """
  boxes_xyxy = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
  fields = [boxes_xyxy, scores, category_ids] + ([] if rles is None else [rles])
  lengths = [len(field) for field in fields]
  if len(set(lengths)) != 1:
    raise ValueError(
      f"expected the same number of boxes, scores, category ids and masks, got {lengths}"
    )
  results = []
  for i, (x0, y0, x1, y1) in enumerate(boxes_xyxy.tolist()):
    result = {
      "image_id": int(image_id),
      "category_id": int(category_ids[i]),
      "bbox": [x0, y0, x1 - x0, y1 - y0],
      "score": float(scores[i]),
    }
    if rles is not None:
      counts = rles[i]["counts"]
      result["segmentation"] = {
        "size": [int(length) for length in rles[i]["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
      }
    results.append(result)
  return results


def evaluate(
  ground_truth: Mapping[str, Any],
  results: Sequence[Mapping[str, Any]],
  iou_types: Sequence[str] = ("bbox", "segm"),
) -> dict[str, float]:
  """Computes COCO's metrics over all images of the ground truth: `metrics_of` what `evaluations` returns."""
  return metrics_of(evaluations(ground_truth, results, iou_types))


def evaluations(
  ground_truth: Mapping[str, Any],
  results: Sequence[Mapping[str, Any]],
  iou_types: Sequence[str] = ("bbox", "segm"),
  matcher: str = "pycocotools",
) -> dict[str, COCOeval]:
  """Matches detections with the objects of all images of the ground truth.

  Args:
    ground_truth: images, annotations and categories in COCO's format; not changed. A missing `iscrowd`
      means 0; a missing `area` is computed from the mask or the box.
    results: entries as `to_coco_results` returns them; not changed. At most 100 per image and category
      count.
    iou_types: "bbox", "segm" or both.
    matcher: one of `MATCHERS`; their results are the same.

  Returns:
    The matcher's evaluation of each IoU type, accumulated and summarized. With "segm", the masks of its
    annotations and detections are run-length encoded.

  Raises:
    UserError: a result has an image or a category that the ground truth does not have, a score that is
      not finite, or, for "segm", no mask of the size of its image; or the matcher is not installed.
  """
  coco, coco_eval = MATCHERS[matcher]()
  images = {image["id"]: image for image in ground_truth["images"]}
  category_ids = {category["id"] for category in ground_truth["categories"]}
  for i, result in enumerate(results):
    _check_result(i, result, images, category_ids, "segm" in iou_types)
  found_by_type = {}
  for iou_type in iou_types:
    if iou_type not in ("bbox", "segm"):
      raise ValueError(f"iou_types must be bbox or segm, got {iou_type!r}")
    with contextlib.redirect_stdout(io.StringIO()):
      truth = _index(coco(), ground_truth, _annotations(ground_truth, images, iou_type))
      found = _index(coco(), ground_truth, _detections(results, iou_type))
      evaluation = coco_eval(truth, found, iou_type)
      evaluation.evaluate()
      evaluation.accumulate()
      evaluation.summarize()
    found_by_type[iou_type] = evaluation
  return found_by_type


def metrics_of(evaluations: Mapping[str, COCOeval]) -> dict[str, float]:
  """Returns the metrics of `evaluations`.

  Returns:
    "bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APs", "bbox/APm", "bbox/APl", the average recall with at most
    1, 10 and 100 detections per image and category, "bbox/AR@1", "bbox/AR@10" and "bbox/AR@100", that of
    small, medium and large objects, "bbox/ARs", "bbox/ARm" and "bbox/ARl", and the same for "segm", from 0
    to 100. A metric without any ground truth (-1 in COCO) is left out.
  """
  return {
    f"{iou_type}/{name}": 100 * float(value)
    for iou_type, evaluation in evaluations.items()
    for name, value in zip(METRICS, evaluation.stats, strict=True)
    if value >= 0
  }


def images_of(
  evaluation: COCOeval,
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
  """Yields the annotations and the detections of each image of an evaluation, in the order of the ids."""
  for image in sorted(evaluation.cocoGt.imgs):
    yield evaluation.cocoGt.imgToAnns[image], evaluation.cocoDt.imgToAnns[image]


def iou(
  detections: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], iou_type: str
) -> np.ndarray:
  """Returns the IoU of detections and annotations, float64 [D, G]; with a crowd, the share that it covers.

  Args:
    detections, annotations: entries in COCO's format; each annotation has `iscrowd`.
    iou_type: "bbox", or "segm" for run-length encoded masks.
  """
  if not detections or not annotations:
    return np.zeros((len(detections), len(annotations)))
  crowd_G = [int(annotation["iscrowd"]) for annotation in annotations]
  if iou_type == "segm":
    masks = ([entry["segmentation"] for entry in entries] for entries in (detections, annotations))
    return np.asarray(coco_mask.iou(*masks, crowd_G), np.float64)
  boxes = (
    np.array([entry["bbox"] for entry in entries], np.float64)
    for entries in (detections, annotations)
  )
  return np.asarray(coco_mask.iou(*boxes, crowd_G), np.float64)


def format_table(metrics: Mapping[str, float]) -> str:
  """Formats the average precisions, one row for boxes and one for masks; "-" for a missing metric."""
  lines = ["      " + "".join(f"{name:>7}" for name in PRECISIONS)]
  for iou_type in ("bbox", "segm"):
    if any(name.startswith(f"{iou_type}/") for name in metrics):
      values = [metrics.get(f"{iou_type}/{name}") for name in PRECISIONS]
      cells = ["-" if value is None else f"{value:.1f}" for value in values]
      lines.append(f"{iou_type:<6}" + "".join(f"{cell:>7}" for cell in cells))
  return "\n".join(lines)


def _check_result(
  i: int,
  result: Mapping[str, Any],
  images: Mapping[int, Mapping[str, Any]],
  category_ids: set[int],
  needs_mask: bool,
) -> None:
  image = images.get(result["image_id"])
  if image is None:
    raise UserError(
      f"result {i} belongs to image {result['image_id']}, which is not in the ground truth; "
      "use the annotations of the split that was predicted"
    )
  where = f"result {i} (image {result['image_id']})"
  if result["category_id"] not in category_ids:
    raise UserError(
      f"{where}: category_id {result['category_id']} is not in the ground truth; "
      "results need the data set's category ids, not contiguous labels"
    )
  if not math.isfinite(result["score"]):
    raise UserError(
      f"{where}: score {result['score']} is not finite; the model has computed NaN or infinity"
    )
  if needs_mask:
    mask = result.get("segmentation")
    if mask is None:
      raise UserError(f"{where} has no segmentation; add masks, or evaluate bbox only")
    # pycocotools silently counts masks of another size as misses
    if list(mask["size"]) != [image["height"], image["width"]]:
      raise UserError(
        f"{where}: the mask has size {list(mask['size'])}, the image "
        f"{[image['height'], image['width']]}; paste masks at the size of the image file"
      )


def _index(coco: COCO, ground_truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
  coco.dataset = {
    "images": ground_truth["images"],
    "categories": ground_truth["categories"],
    "annotations": annotations,
  }
  coco.createIndex()
  return coco


def _annotations(
  ground_truth: Mapping[str, Any], images: Mapping[int, Mapping[str, Any]], iou_type: str
) -> list[dict[str, Any]]:
  """Returns copies of the annotations with every field that COCOeval needs."""
  annotations = []
  for number, annotation in enumerate(ground_truth["annotations"], start=1):
    # COCOeval treats the id 0 as "no match", and changes the annotations
    annotation = {"iscrowd": 0, **annotation, "id": number}
    if iou_type == "segm" and not annotation.get("segmentation"):
      raise UserError(
        f"annotation {number - 1} (image {annotation['image_id']}) of the ground truth has no "
        "segmentation; evaluate bbox only, or complete the annotations"
      )
    image = images[annotation["image_id"]]
    if iou_type == "segm":
      annotation["segmentation"] = _rle(annotation["segmentation"], image)
    if "area" not in annotation:
      annotation["area"] = _area(annotation, image)
    annotations.append(annotation)
  return annotations


def _area(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> float:
  segmentation = annotation.get("segmentation")
  if not segmentation:
    return annotation["bbox"][2] * annotation["bbox"][3]
  return float(coco_mask.area(_rle(segmentation, image)))


def _rle(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
  """Returns polygons, or the run lengths of a mask, as a compressed mask."""
  if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
    segmentation = coco_mask.frPyObjects(segmentation, image["height"], image["width"])
  if isinstance(segmentation, list):
    segmentation = coco_mask.merge(segmentation)
  return segmentation


def _detections(results: Sequence[Mapping[str, Any]], iou_type: str) -> list[dict[str, Any]]:
  """Converts results to annotations, with the area of the box or of the mask."""
  detections = []
  for number, result in enumerate(results, start=1):
    if iou_type == "segm":
      area = float(coco_mask.area(result["segmentation"]))
    else:
      area = result["bbox"][2] * result["bbox"][3]
    detections.append({**result, "id": number, "area": area, "iscrowd": 0})
  return detections
