"""Annotation files in COCO's format: reading them, and checking their entries."""

import json
import math
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeGuard

import numpy as np
from absl import logging
from pycocotools import mask as coco_mask

from fpt_jax.data.datasets.checks import BadRecordError, BadRecords
from fpt_jax.errors import UserError

_TOLERANCE = 1.0  # pixels that a box may extend beyond its image; it is clipped
_EVERY = 10  # of a single annotation file, one image in so many is for evaluation


class BadEntries(BadRecords):
  """The bad images and annotations of an annotation file.

  Args:
    file: the annotation file.
    skip: whether to skip bad entries.
  """

  def __init__(self, file: pathlib.Path, *, skip: bool):
    super().__init__(skip=skip)
    self._file = file

  def image(self, entry: object) -> AbstractContextManager[None]:
    """Context in which a `BadRecordError` leaves the image out."""
    return self._entry("image", entry)

  def annotation(self, entry: object) -> AbstractContextManager[None]:
    """Context in which a `BadRecordError` leaves the annotation out."""
    return self._entry("annotation", entry)

  def _entry(self, group: str, entry: object) -> AbstractContextManager[None]:
    name = f"{group} id {entry.get('id')}" if isinstance(entry, dict) else group
    return self.record(f"{self._file}: {name}", group)


def read_file(path: pathlib.Path) -> dict[str, list]:
  """Reads an annotation file.

  Raises:
    UserError: the file is not JSON, or does not have the lists of COCO's format.
  """
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except json.JSONDecodeError as error:
    raise UserError(
      f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
      "download or write the file again"
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not UTF-8 text ({error}); download or write it again") from error
  for field in ("images", "annotations", "categories"):
    if not isinstance(content, dict) or not isinstance(content.get(field), list):
      raise UserError(
        f"{path}: field {field} must be a list; use an annotation file of COCO's instances"
      )
  return content


def read_categories(path: pathlib.Path, categories: list) -> dict[int, str]:
  """Returns the names of the categories by id, in ascending order of the ids.

  Raises:
    UserError: a category is bad, an id is used twice, or the list is empty.
  """
  names = {}
  for i, category in enumerate(categories):
    where = f"{path}: categories[{i}]"
    if not isinstance(category, dict) or not _is_int(category.get("id")):
      raise UserError(f"{where}: field id must be an integer; fix the file")
    if not isinstance(category.get("name"), str):
      raise UserError(f"{where}: field name must be a string; fix the file")
    if category["id"] in names:
      raise UserError(f"{where}: id {category['id']} is used twice; make category ids unique")
    names[category["id"]] = category["name"]
  if not names:
    raise UserError(f"{path}: field categories is empty; list the categories")
  return dict(sorted(names.items()))


def part_of_split(content: dict[str, list], path: pathlib.Path, split: str) -> dict[str, list]:
  """Returns the images and annotations of "train" or "val" from a file that holds both.

  Every tenth image, in ascending order of the ids, is in "val". Entries without a usable id are in
  "train", where they are reported.

  Raises:
    UserError: there are fewer than two images.
  """

  def id_of(entry: object, field: str) -> int | None:
    return entry[field] if isinstance(entry, dict) and _is_int(entry.get(field)) else None

  found = (id_of(image, "id") for image in content["images"])
  ids = {image_id for image_id in found if image_id is not None}
  if len(ids) < 2:
    raise UserError(
      f"{path}: {len(ids)} images cannot be divided into those to train on and those to evaluate; "
      "add some, or name two files in data.builder.splits"
    )
  of_val = set(sorted(ids)[::_EVERY])
  count = len(of_val) if split == "val" else len(ids) - len(of_val)
  logging.info("%s: %d of its %d images are for %s", path, count, len(ids), split)
  return content | {
    name: [e for e in content[name] if (id_of(e, field) in of_val) == (split == "val")]
    for name, field in (("images", "id"), ("annotations", "image_id"))
  }


def has_boxes_only(annotations: list) -> bool:
  """Whether no annotation of a file has a mask; if some have one, all must."""
  return bool(annotations) and not any(
    isinstance(annotation, dict) and annotation.get("segmentation") for annotation in annotations
  )


def index_images(entries: list, bad: BadEntries) -> dict[int, dict]:
  """Returns the images by id, in the order of the file."""
  images = {}
  for image in entries:
    with bad.image(image):
      _require(image, "id", _is_int, "an integer")
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
      _require(annotation, "id", _is_int, "an integer")
      _require(annotation, "image_id", lambda v: v in images, "the id of an image of the file")
      _require(annotation, "category_id", lambda v: v in label_of, "the id of a category")
      if annotation["id"] in seen:
        raise BadRecordError("field id is used twice", "annotation ids must be unique")
      seen.add(annotation["id"])
      groups[annotation["image_id"]].append(annotation)
  return groups


def check_image(image: dict) -> None:
  """Raises BadRecordError if a field of an image is missing or wrong."""
  _require(image, "file_name", lambda v: isinstance(v, str) and v, "a string")
  for field in ("height", "width"):
    _require(image, field, lambda v: _is_int(v) and v > 0, "a positive integer")
  name = pathlib.PurePosixPath(image["file_name"])
  if name.is_absolute() or ".." in name.parts:
    raise BadRecordError(
      "field file_name points outside the image folder", repr(image["file_name"])
    )


def check_area(area: object) -> None:
  """Raises BadRecordError if an area is not a number of pixels."""
  if not _is_number(area) or area < 0:
    raise BadRecordError("field area must be a number of pixels", repr(area))


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
    raise BadRecordError("field bbox has a negative side", repr(annotation["bbox"]))
  if min(x, y, width - x - w, height - y - h) < -_TOLERANCE:
    raise BadRecordError(
      "field bbox lies outside the image",
      f"x, y, w, h = {annotation['bbox']} in an image of height {height}, width {width}",
    )
  x0, y0 = max(x, 0.0), max(y, 0.0)
  return x0, y0, max(min(x + w, width), x0), max(min(y + h, height), y0)


def check_segmentation(annotation: dict, size: tuple[int, int]) -> None:
  """Raises BadRecordError unless an annotation has a mask for an image of `size`."""
  segmentation = annotation.get("segmentation")
  if isinstance(segmentation, list) and segmentation:
    for polygon in segmentation:
      _check_polygon(polygon, size)
  elif isinstance(segmentation, dict):
    _check_run_lengths(segmentation, size)
  else:
    raise BadRecordError("field segmentation is missing", "polygons or run lengths are needed")


def _check_polygon(polygon: object, size: tuple[int, int]) -> None:
  height, width = size
  if not _is_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
    points = len(polygon) / 2 if isinstance(polygon, list) else 0
    raise BadRecordError(
      "field segmentation has a polygon that is not x, y pairs of at least 3 points",
      f"{points:g} points",
    )
  farthest = np.abs(np.reshape(polygon, (-1, 2)) / (width, height) - 0.5).max()
  if farthest > 1.5:
    raise BadRecordError("field segmentation has a polygon far outside the image", str(polygon[:6]))


def _check_run_lengths(segmentation: dict, size: tuple[int, int]) -> None:
  height, width = size
  if segmentation.get("size") != [height, width]:
    raise BadRecordError(
      "field segmentation.size is not that of the image",
      f"{segmentation.get('size')} instead of {[height, width]}",
    )
  counts = segmentation.get("counts")
  if isinstance(counts, list):
    if not all(_is_int(c) and c >= 0 for c in counts):
      raise BadRecordError(
        "field segmentation.counts must be non-negative integers", repr(counts)[:40]
      )
    if sum(counts) != height * width:
      raise BadRecordError(
        "field segmentation.counts does not add up to the pixels of the image",
        f"{sum(counts)} instead of {height * width}",
      )
  elif isinstance(counts, str):
    try:
      coco_mask.decode(segmentation)
    except (ValueError, TypeError) as error:
      raise BadRecordError(
        "field segmentation.counts is not a run-length encoding", str(error)
      ) from error
  else:
    raise BadRecordError(
      "field segmentation.counts is missing", "run lengths have the fields size and counts"
    )


def _require(entry: object, field: str, test: Callable[..., object], needed: str) -> None:
  """Raises BadRecordError unless the field exists and passes the test."""
  if not isinstance(entry, dict):
    raise BadRecordError("entry is not an object", repr(entry)[:40])
  if field not in entry:
    raise BadRecordError(f"field {field} is missing", f"it must be {needed}")
  try:
    good = test(entry[field])
  except TypeError:  # an unhashable value cannot be an id
    good = False
  if not good:
    raise BadRecordError(f"field {field} must be {needed}", repr(entry[field])[:40])


def _is_int(value: object) -> TypeGuard[int]:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
  return isinstance(value, int | float) and math.isfinite(value)


def _is_numbers(value: object) -> TypeGuard[list[float]]:
  return isinstance(value, list) and all(map(_is_number, value))
