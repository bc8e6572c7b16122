"""Annotation files in COCO's format: reading them, and checking their entries."""

import math
import pathlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import numpy as np
from absl import logging

from fpt_jax.data.datasets.checks import (
  BadRecordError,
  BadRecords,
  check_names,
  is_storable_text,
  quoted,
)
from fpt_jax.errors import UserError
from fpt_jax.ops import masks
from fpt_jax.run.folder import read_json

EVERY = 10  # of data without splits, one image in so many is for evaluation
_AN_ID = "an integer of at most 64 bits"
_LARGEST = int(np.finfo(np.float64).max)
_TOLERANCE = 1.0  # pixels that a box may extend beyond its image; it is clipped
_FRACTIONS = 1.01  # no number of a box or polygon is larger if they are fractions of the image


class BadEntries(BadRecords):
  """The bad images and annotations of an annotation file.

  Args:
    file: the annotation file.
    skip: whether to skip bad entries.
    places: file and line of entries of other formats, by ("image" or "annotation", id); they are named
      instead of `file` and the id.
  """

  def __init__(
    self,
    file: pathlib.Path,
    *,
    skip: bool,
    places: Mapping[tuple[str, int], str] | None = None,
  ):
    super().__init__(skip=skip)
    self._file, self._places = file, places

  def image(self, entry: object) -> AbstractContextManager[None]:
    """Context in which a `BadRecordError` leaves the image out."""
    return self._entry("image", entry)

  def annotation(self, entry: object) -> AbstractContextManager[None]:
    """Context in which a `BadRecordError` leaves the annotation out."""
    return self._entry("annotation", entry)

  def _entry(self, group: str, entry: Any) -> AbstractContextManager[None]:
    if self._places is not None:
      return self.record(self._places[group, entry["id"]], group)
    name = f"{group} id {_text(entry.get('id'))}" if isinstance(entry, dict) else group
    return self.record(f"{self._file}: {name}", group)


def read_file(path: pathlib.Path) -> dict[str, list]:
  """Reads an annotation file.

  Raises:
    UserError: the file cannot be read, is not JSON, or does not have the lists of COCO's format.
  """
  content = read_json(path, "download or write it again")
  for field in ("images", "annotations", "categories"):
    if not isinstance(content, dict) or not isinstance(content.get(field), list):
      raise UserError(
        f"{path}: field {field} must be a list; use an annotation file of COCO's instances"
      )
  return content


def read_categories(path: pathlib.Path, categories: list) -> dict[int, str]:
  """Returns the names of the categories by id, in ascending order of the ids.

  Raises:
    UserError: a category is bad, an id or a name is used twice, or the list is empty.
  """
  names: dict[int, Any] = {}
  for i, category in enumerate(categories):
    where = f"{path}: categories[{i}]"
    if not isinstance(category, dict):
      raise UserError(f"{where}: must be an object with the fields id and name; fix the file")
    if not _is_id(category.get("id")):
      raise UserError(
        f"{where}: field id must be {_AN_ID}, not {quoted(category.get('id'))}; fix the file"
      )
    if category["id"] in names:
      raise UserError(f"{where}: id {category['id']} is used twice; make category ids unique")
    names[category["id"]] = category.get("name")  # checked below, with those of the others
  if not names:
    raise UserError(f"{path}: field categories is empty; list the categories")
  check_names(f"{path}: field name of categories", list(names.values()))
  return dict(sorted(names.items()))


def without_root_category(content: dict[str, list]) -> dict[str, list]:
  """Returns the lists of a Roboflow export without the category that stands for all others.

  It has the id 0, the name of the project, the supercategory "none" and no object. Its name may be that of
  another category.
  """

  def is_root(category: object) -> bool:
    if not isinstance(category, dict):
      return False
    return category.get("id") == 0 and category.get("supercategory") == "none"

  rest = [category for category in content["categories"] if not is_root(category)]
  used = any(isinstance(a, dict) and a.get("category_id") == 0 for a in content["annotations"])
  return content if used or not rest else content | {"categories": rest}


def part_of_split(content: dict[str, list], path: pathlib.Path, split: str) -> dict[str, list]:
  """Returns the images and annotations of "train" or "val" from a file that holds both.

  Every tenth image, in ascending order of the ids, is in "val". Entries without a usable id are in
  "train", where they are reported.

  Raises:
    UserError: there are fewer than two images with a usable id.
  """

  def id_of(entry: object, field: str) -> int | None:
    return entry[field] if isinstance(entry, dict) and _is_id(entry.get(field)) else None

  found = (id_of(image, "id") for image in content["images"])
  ids = {image_id for image_id in found if image_id is not None}
  if len(ids) < 2:
    for image in content["images"]:
      if id_of(image, "id") is None:
        value = image.get("id") if isinstance(image, dict) else image
        raise UserError(
          f"{path}: fewer than two images have a usable field id; it must be {_AN_ID}, not "
          f"{quoted(value)}; fix the file"
        )
    raise UserError(
      f"{path}: {len(ids)} images cannot be divided into those to train on and those to evaluate; "
      "add some, or name two files in data.builder.splits"
    )
  of_val = set(sorted(ids)[::EVERY])
  count = len(of_val) if split == "val" else len(ids) - len(of_val)
  logging.info("%s: %d of its %d images are for %s", path, count, len(ids), split)
  return content | {
    name: [e for e in content[name] if (id_of(e, field) in of_val) == (split == "val")]
    for name, field in (("images", "id"), ("annotations", "image_id"))
  }


def has_boxes_only(annotations: list) -> bool:
  """Whether no annotation of a file has a mask; if some have one, all must."""
  return bool(annotations) and not any(
    isinstance(annotation, dict) and _has_segmentation(annotation) for annotation in annotations
  )


def check_units(path: pathlib.Path, content: dict[str, list]) -> None:
  """Checks that the boxes are in pixels.

  A few boxes in 0..1 may be in pixels, in the corner of the image; more than half of all cannot.

  Raises:
    UserError: more than half of the boxes lie in 0..1, as fractions of the image do.
  """
  small = {  # of such an image, a box in pixels may be in 0..1
    image["id"]
    for image in content["images"]
    if isinstance(image, dict)
    and _is_id(image.get("id"))
    and all(_is_number(image.get(field)) and image[field] <= 2 for field in ("height", "width"))
  }
  boxes, fractions = 0, []
  for annotation in content["annotations"]:
    box = annotation.get("bbox") if isinstance(annotation, dict) else None
    if not _is_numbers(box) or len(box) != 4:
      continue
    image_id = annotation.get("image_id")
    if _is_id(image_id) and image_id in small:
      continue
    boxes += 1
    if min(box) >= 1 - _FRACTIONS and 0 < max(box) <= _FRACTIONS:
      fractions.append(quoted(annotation.get("id")))
  if not fractions:
    return
  what = (
    f"{path}: {len(fractions)} of {boxes} annotations have a bbox whose numbers all lie in 0..1, "
    f"id {fractions[0]} first"
  )
  if 2 * len(fractions) > boxes:
    raise UserError(f"{what}; write x, y, w, h in pixels, not as fractions of the image")
  logging.warning("%s; if they are fractions of the image, write pixels", what)


def index_images(entries: list, bad: BadEntries) -> dict[int, dict]:
  """Returns the images by id, in the order of the file."""
  images = {}
  for image in entries:
    with bad.image(image):
      _require(image, "id", _is_id, _AN_ID)
      if image["id"] in images:
        raise BadRecordError("field id is used twice", "image ids must be unique")
      images[image["id"]] = image
  return images


def group_annotations(
  entries: list, images: dict[int, dict], label_of: dict[int, int], bad: BadEntries
) -> dict[int, list[dict]]:
  """Returns each image's annotations, in the order of the file.

  Args:
    entries: the annotations of the file.
    images: images of the file by id.
    label_of: labels of the categories by id.
    bad: where bad annotations are counted.
  """
  groups: dict[int, list[dict]] = {image_id: [] for image_id in images}
  seen = set()
  for annotation in entries:
    with bad.annotation(annotation):
      _require(annotation, "id", _is_id, _AN_ID)
      for field, known, what in (
        ("image_id", images, "an image of the file"),
        ("category_id", label_of, "a category"),
      ):
        # True and 1.0 equal 1, so that a dictionary alone would find them
        _require(
          annotation,
          field,
          lambda v, k=known: _is_id(v) and v in k,
          f"the id of {what}, an integer",
        )
      if annotation["id"] in seen:
        raise BadRecordError("field id is used twice", "annotation ids must be unique")
      seen.add(annotation["id"])
      groups[annotation["image_id"]].append(annotation)
  return groups


def check_image(image: dict) -> None:
  """Raises BadRecordError if a field of an image is missing or wrong."""
  _require(image, "file_name", lambda v: isinstance(v, str) and v, "a string")
  for field in ("height", "width"):
    _require(image, field, lambda v: _is_int(v) and 0 < v < 2**31, "a positive integer")
  if not is_storable_text(image["file_name"]):
    raise BadRecordError(
      "field file_name has a character that no file name has", quoted(image["file_name"])
    )
  name = pathlib.PurePosixPath(image["file_name"])
  if name.is_absolute() or ".." in name.parts:
    raise BadRecordError(
      "field file_name points outside the image folder", quoted(image["file_name"])
    )


def check_area(area: object) -> None:
  """Raises BadRecordError if an area is not a number of pixels."""
  # records hold it in float32
  if not _is_number(area) or not 0 <= area <= float(np.finfo(np.float32).max):
    raise BadRecordError("field area must be a number of pixels", quoted(area))


def is_crowd(annotation: dict) -> bool:
  """Returns whether an annotation is of a crowd; without the field `iscrowd`, it is not.

  Raises:
    BadRecordError: the field is neither 0 nor 1.
  """
  value = annotation.get("iscrowd", 0)
  if not isinstance(value, int | float) or value not in (0, 1):
    raise BadRecordError("field iscrowd must be 0 or 1", quoted(value))
  return bool(value)


def check_box(annotation: dict, size: tuple[int, int]) -> tuple[float, float, float, float]:
  """Returns an annotation's box as (x0, y0, x1, y1), clipped to an image of `size`.

  Raises:
    BadRecordError: the box is missing, wrong, or outside the image.
  """
  _require(annotation, "bbox", lambda v: _is_numbers(v) and len(v) == 4, "four numbers x, y, w, h")
  height, width = size
  x, y, w, h = annotation["bbox"]
  # COCO itself has boxes of height 0: they are kept as ground truth and never trained on
  if w < 0 or h < 0:
    raise BadRecordError("field bbox has a negative side", quoted(annotation["bbox"]))
  if min(x, y, width - x - w, height - y - h) < -_TOLERANCE:
    raise BadRecordError(
      "field bbox lies outside the image",
      f"x, y, w, h = {quoted(annotation['bbox'])} in an image of height {height}, width {width}",
    )
  x0, y0 = max(x, 0.0), max(y, 0.0)
  return x0, y0, max(min(x + w, width), x0), max(min(y + h, height), y0)


def check_segmentation(annotation: dict, size: tuple[int, int]) -> None:
  """Checks the mask of an annotation whose box is good.

  Raises:
    BadRecordError: the annotation has no mask for an image of `size`, or it is nowhere near the box.
  """
  if not _has_segmentation(annotation):
    raise BadRecordError("field segmentation is missing", "polygons or run lengths are needed")
  segmentation = annotation["segmentation"]
  if isinstance(segmentation, list):
    check_polygons(segmentation, size)
    points_P2 = np.concatenate([np.reshape(_floats(polygon), (-1, 2)) for polygon in segmentation])
    low_2, high_2 = points_P2.min(0), points_P2.max(0)
    in_fractions = high_2.max() <= _FRACTIONS
  elif isinstance(segmentation, dict):
    _check_run_lengths(segmentation, size)
    bounds = masks.bounds(masks.rasterize(segmentation, *size))
    if bounds is None:
      raise BadRecordError("field segmentation has no pixel", "the mask of an object is empty")
    low_2, high_2 = np.array(bounds[:2]), np.array(bounds[2:])
    in_fractions = False
  else:
    raise BadRecordError(
      "field segmentation is neither polygons nor run lengths", quoted(segmentation)
    )
  box_4 = _floats(annotation["bbox"])
  start_2, stop_2 = box_4[:2], box_4[:2] + box_4[2:]
  apart = (start_2 > high_2 + _TOLERANCE) | (stop_2 < low_2 - _TOLERANCE)
  # fractions of the image and pixels overlap where an object touches the image's corner
  in_fractions = in_fractions or stop_2.max() <= _FRACTIONS
  larger = max(stop_2.max(), high_2.max()) > _FRACTIONS + _TOLERANCE
  # a box of height 0 is neither drawn nor trained on
  if box_4[2:].all() and (apart.any() or (in_fractions and larger)):
    raise BadRecordError(
      "fields segmentation and bbox are of different places or units",
      f"x and y of the mask lie in {_span(low_2, high_2)}, of the box in {_span(start_2, stop_2)}; "
      "both must be in pixels",
    )


def _span(low_2: np.ndarray, high_2: np.ndarray) -> str:
  (x0, y0), (x1, y1) = low_2.tolist(), high_2.tolist()
  return f"{x0:g}..{x1:g} and {y0:g}..{y1:g}"


def _has_segmentation(annotation: dict) -> bool:
  segmentation = annotation.get("segmentation")
  return segmentation is not None and segmentation != []


def check_polygons(polygons: list, size: tuple[int, int]) -> None:
  """Raises BadRecordError if a segmentation is not polygons near an image of `size`."""
  height, width = size
  if _is_numbers(polygons):
    raise BadRecordError(
      "field segmentation is one flat list of numbers",
      f"{quoted(polygons)}; a list of polygons is needed, [[x0, y0, x1, y1, ...]]",
    )
  if all(isinstance(point, list) and len(point) == 2 for point in polygons):
    raise BadRecordError(
      "field segmentation is one list of points",
      f"{quoted(polygons)}; a list of polygons is needed, [[x0, y0, x1, y1, ...]]",
    )
  for polygon in polygons:
    if isinstance(polygon, list) and any(isinstance(point, list | dict) for point in polygon):
      raise BadRecordError(
        "field segmentation has a polygon that is not a flat list of numbers",
        f"{quoted(polygon)}; write [x0, y0, x1, y1, ...]",
      )
    if not _is_numbers(polygon):
      raise BadRecordError(
        "field segmentation has a polygon that is not a list of finite numbers", quoted(polygon)
      )
    if len(polygon) < 6 or len(polygon) % 2:
      raise BadRecordError(
        "field segmentation has a polygon that is not x, y pairs of at least 3 points",
        f"{len(polygon) / 2:g} points",
      )
    farthest = np.abs(np.reshape(_floats(polygon), (-1, 2)) / (width, height) - 0.5).max()
    if farthest > 1.5:
      raise BadRecordError(
        "field segmentation has a polygon far outside the image", quoted(polygon)
      )


def _check_run_lengths(segmentation: dict, size: tuple[int, int]) -> None:
  found = segmentation.get("size")
  if not isinstance(found, list) or not all(map(_is_int, found)) or tuple(found) != size:
    raise BadRecordError(
      "field segmentation.size is not that of the image",
      f"{quoted(found)} instead of {list(size)}",
    )
  counts = segmentation.get("counts")
  if not isinstance(counts, list | str):
    raise BadRecordError(
      "field segmentation.counts must be run lengths, a list or a string", quoted(counts)
    )
  try:
    masks.run_lengths(segmentation, *size)
  except ValueError as error:
    raise BadRecordError(
      "field segmentation.counts is not a run-length encoding of the image", str(error)
    ) from error


def _require(entry: object, field: str, test: Callable[..., object], needed: str) -> None:
  """Raises BadRecordError unless the field exists and passes the test."""
  if not isinstance(entry, dict):
    raise BadRecordError("entry is not an object", quoted(entry))
  if field not in entry:
    raise BadRecordError(f"field {field} is missing", f"it must be {needed}")
  if not test(entry[field]):
    raise BadRecordError(f"field {field} must be {needed}", quoted(entry[field]))


def _is_int(value: object) -> TypeGuard[int]:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: object) -> TypeGuard[int]:
  return _is_int(value) and -(2**63) <= value < 2**63


def _is_number(value: object) -> TypeGuard[float]:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  # an integer may be beyond the range of floats
  return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


def _is_numbers(value: object) -> TypeGuard[list[float]]:
  return isinstance(value, list) and all(map(_is_number, value))


def _floats(values: list[float]) -> np.ndarray:
  return np.asarray(values, np.float64)


def _text(value: object) -> str:
  return quoted(value)[1:-1] if isinstance(value, str) else quoted(value)
