"""LabelMe's JSON files: one per image, with polygons, rectangles, circles and masks (labelme 3 to 5).

A rectangle, a circle and a mask are filled as LabelMe's own conversions to label maps and COCO fill them.
"""

import base64
import binascii
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from fpt_jax.data.datasets.checks import BadRecordError, BadRecords, quoted
from fpt_jax.data.datasets.formats import files
from fpt_jax.data.datasets.formats.files import Item, Pairs, Part, Source
from fpt_jax.data.datasets.formats.shapes import (
  Format,
  Parsed,
  Shape,
  Size,
  box_outline,
  ellipse_outline,
  image_size,
  number,
  placed_mask,
)
from fpt_jax.data.records.images import decode_image, read_bytes
from fpt_jax.errors import UserError
from fpt_jax.run.folder import parse_json

_POINTS = {"rectangle": 2, "circle": 2, "mask": 2}  # of each type that has a fixed number


def _find(root: pathlib.Path, pairs: Pairs | None) -> Source:
  if pairs is not None:
    parts = {
      split: files.pair(files.images_in(root / images), root / labels, root / images, ".json")
      for split, (labels, images) in pairs.items()
    }
  elif folders := files.split_folders(root):
    parts = {split: _part_in(folder) for split, folder in folders.items()}
  else:
    parts = files.divide(_part_in(root), root)
  names, names_file = files.class_list(root)
  if names:
    # what LabelMe's own lists begin with
    names = [name for name in names if name not in ("__ignore__", "_background_")]
    parts = {s: Part(p.items, p.alone, [*p.others, names_file]) for s, p in parts.items()}
  return Source(parts, names, names_file)


def _part_in(folder: pathlib.Path) -> Part:
  """Returns the images in a folder, and its label files in `labels` or beside the images."""
  images = files.first_folder(folder, ("images",)) or folder
  labels = files.first_folder(folder, ("labels",)) or images
  return files.pair(files.images_in(images), labels, images, ".json")


def _parse(
  item: Item, names: Sequence[str] | None, size: Callable[[], Size], bad: BadRecords
) -> Parsed:
  assert item.label is not None
  try:
    content = parse_json(read_bytes(item.label), "its text", "save it again in LabelMe")
  except OSError as error:
    raise BadRecordError("file cannot be read", str(error.strerror)) from error
  except UserError as error:
    raise BadRecordError("file is broken", str(error)) from error
  if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
    raise BadRecordError("field shapes must be a list", "use a file of LabelMe")
  sides = {field: content.get(field) for field in ("imageHeight", "imageWidth")}
  if any(side is not None for side in sides.values()):
    height, width = image_size(*(number(side, field) for field, side in sides.items()))
  else:
    height, width = size()
  shapes = []
  for i, shape in enumerate(content["shapes"]):
    place = f"{item.label}: shapes[{i}]"
    with bad.record(place, "annotation"):
      shapes.append(_shape(shape, place, (height, width)))
  return Parsed((height, width), shapes)


def _shape(shape: object, place: str, size: Size) -> Shape:
  if not isinstance(shape, dict):
    raise BadRecordError("shape is not an object", quoted(shape))
  label, kind, group = shape.get("label"), shape.get("shape_type", "polygon"), shape.get("group_id")
  if not isinstance(label, str) or not label.strip():
    raise BadRecordError("field label must be a name", quoted(label))
  if not isinstance(group, int | str | None):
    raise BadRecordError("field group_id must be a number", quoted(group))
  points_P2 = _points(shape.get("points"), kind)
  if kind == "polygon":
    segmentation: list | dict = [points_P2.ravel().tolist()]
  elif kind == "rectangle":
    segmentation = box_outline(*points_P2.min(0).tolist(), *points_P2.max(0).tolist())
  elif kind == "circle":  # its centre, and a point on it
    radius = float(np.hypot(*(points_P2[1] - points_P2[0])))
    x, y = points_P2[0].tolist()
    segmentation = [ellipse_outline((x, y), (radius, radius))]
  elif kind == "mask":
    segmentation = _mask(shape.get("mask"), points_P2, size)
  else:
    raise BadRecordError(
      "shape has no area",
      f"shape_type {quoted(kind)}; draw a polygon, rectangle, circle or mask, or remove it",
    )
  return Shape(label, place, segmentation, is_box=kind == "rectangle", group=group)


def _points(value: object, kind: object) -> np.ndarray:
  """Returns the points of a shape, float64 [points, 2]."""
  if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
    raise BadRecordError("field points must be a list of x, y", quoted(value))
  points_P2 = np.array([[number(v, "coordinate") for v in p] for p in value]).reshape(-1, 2)
  needed = _POINTS.get(str(kind))
  if needed and len(points_P2) != needed:
    raise BadRecordError(f"a {kind} must have {needed} points", f"{len(points_P2)} points")
  if kind == "polygon" and len(points_P2) < 3:
    raise BadRecordError("a polygon must have 3 points or more", f"{len(points_P2)} points")
  return points_P2


def _mask(value: object, points_P2: np.ndarray, size: Size) -> dict:
  """Returns a mask, a PNG of the rectangle whose first and last pixels the points are, as run lengths."""
  try:
    png = base64.b64decode(value, validate=True)  # type: ignore[arg-type]
    inside_hw = np.any(decode_image(png, exif="ignore"), axis=-1)
  except (binascii.Error, TypeError, ValueError) as error:
    raise BadRecordError("field mask is not a PNG in base64", str(error)) from error
  x, y = np.round(points_P2[0]).astype(int).tolist()
  return placed_mask(inside_hw, x, y, size)


FORMAT = Format(_find, _parse, boxes_are_masks=True)
