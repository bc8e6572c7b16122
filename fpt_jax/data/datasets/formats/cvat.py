"""CVAT's XML 1.1 for images: one file `annotations.xml` for all images.

https://docs.cvat.ai/docs/manual/advanced/xml_format/ describes it. The export has the images in `images/`,
those of a project in a sub-folder for each subset.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from fpt_jax.data.datasets.checks import BadRecordError, BadRecords, quoted
from fpt_jax.data.datasets.formats import files, xml_tree
from fpt_jax.data.datasets.formats.files import Item, Pairs, Part, Source
from fpt_jax.data.datasets.formats.shapes import (
  Format,
  Parsed,
  Shape,
  Size,
  box_outline,
  check_inside,
  ellipse_outline,
  image_size,
  number,
  placed_mask,
  rotated,
)
from fpt_jax.data.datasets.formats.xml_tree import Element
from fpt_jax.errors import UserError

_FILE = "annotations.xml"


def _find(root: pathlib.Path, pairs: Pairs | None) -> Source:
  if pairs is not None:
    places = {split: (root / file, root / images) for split, (file, images) in pairs.items()}
  elif not (root / _FILE).is_file() and (folders := files.split_folders(root)):
    places = {split: (folder / _FILE, _images(folder)) for split, folder in folders.items()}
  else:
    places = {"": (root / _FILE, _images(root))}
  parts, names = {}, []
  for split, (file, images) in places.items():
    top = _read(file)
    names += [name for name in _labels(top, file) if name not in names]
    parts[split] = _part(top, file, images)
  if "" in parts:
    parts = _by_subsets(parts[""], root / _FILE)
  return Source(parts, names, next(iter(places.values()))[0])


def _images(folder: pathlib.Path) -> pathlib.Path:
  return files.first_folder(folder, ("images",)) or folder


def _read(file: pathlib.Path) -> Element:
  try:
    top = xml_tree.read(file, "annotations")
  except BadRecordError as error:
    raise UserError(
      f"{error.where}: {error.kind}: {error.detail}; export as CVAT for images 1.1"
    ) from error
  track = top.first("track")
  if track is not None:
    raise UserError(f"{track.place}: tracks of a video are not read; export as CVAT for images 1.1")
  return top


def _labels(top: Element, file: pathlib.Path) -> list[str]:
  """Returns the names of the classes: those of the task, job or project."""
  owners = [owner for meta in top.all("meta") for owner in meta.children]
  labels = [label for o in owners for group in o.all("labels") for label in group.all("label")]
  # a label with a parent is a point of a skeleton
  try:
    names = [label.child_text("name") for label in labels if not label.first("parent")]
  except BadRecordError as error:
    raise UserError(f"{error.where}: {error.kind}: {error.detail}") from error
  if not names:
    raise UserError(f"{file}: element meta has no label; export as CVAT for images 1.1")
  return names


def _part(top: Element, file: pathlib.Path, images: pathlib.Path) -> Part:
  items: dict[pathlib.Path, Item] = {}
  for element in top.all("image"):
    name, subset = element.attributes.get("name", ""), element.attributes.get("subset", "")
    if not name:
      raise UserError(f"{element.place}: element image has no attribute name; add it")
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
      raise UserError(
        f"{element.place}: attribute name points outside the image folder: {quoted(name)}; correct it"
      )
    image = images / subset / path
    if not image.exists():
      image = images / path
    if image in items:
      raise UserError(f"{element.place}: {image} has another element image already; remove one")
    items[image] = Item(image, file, element)
  return Part(sorted(items.values(), key=lambda item: item.image))


def _by_subsets(part: Part, file: pathlib.Path) -> dict[str, Part]:
  """Divides the images by the subsets `train` and `validation` of a project, if it has the first."""
  subsets = [
    (item.element.attributes.get("subset", "") if item.element else "").lower()
    for item in part.items
  ]
  if "train" not in subsets:
    return files.divide(part, file)
  parts = {
    split: Part([i for i, s in zip(part.items, subsets, strict=True) if s in known])
    for split, known in files.SPLIT_NAMES.items()
  }
  rest = len(part.items) - sum(len(p.items) for p in parts.values())
  if rest:
    logging.info("%s: %d images are of other subsets than train and validation", file, rest)
  return parts


def _parse(
  item: Item, names: Sequence[str] | None, size: Callable[[], Size], bad: BadRecords
) -> Parsed:
  image = item.element
  assert image is not None
  height, width = (number(image.attribute(f), f, image.place) for f in ("height", "width"))
  size_hw = image_size(height, width, image.place)
  shapes = []
  for element in image.children:
    if element.tag in ("tag", "attribute"):  # of the whole image
      continue
    with bad.record(element.place, "annotation"):
      shapes.append(_shape(element, size_hw))
  return Parsed(size_hw, shapes)


def _shape(element: Element, size: Size) -> Shape:
  def numbers(*names: str) -> list[float]:
    return [number(element.attribute(name), name) for name in names]

  angle = number(element.attributes.get("rotation", "0"), "rotation")
  if element.tag == "box":
    x0, y0, x1, y1 = numbers("xtl", "ytl", "xbr", "ybr")
    if x1 < x0 or y1 < y0:
      raise BadRecordError(
        "box has a negative side", f"xtl, ytl, xbr, ybr = {x0:g}, {y0:g}, {x1:g}, {y1:g}"
      )
    segmentation: list | dict = box_outline(x0, y0, x1, y1)
    if angle:
      center = (x0 + x1) / 2, (y0 + y1) / 2
      segmentation = [
        rotated(np.reshape(segmentation[0], (-1, 2)) - np.array(center), center, angle)
      ]
  elif element.tag == "polygon":
    segmentation = [_points(element)]
  elif element.tag == "ellipse":
    cx, cy, rx, ry = numbers("cx", "cy", "rx", "ry")
    segmentation = [ellipse_outline((cx, cy), (rx, ry), angle)]
  elif element.tag == "mask":
    segmentation = _mask(element, size)
  else:
    raise BadRecordError("shape has no area", f"element {quoted(element.tag)}; remove it in CVAT")
  group = element.attributes.get("group_id", "0")
  return Shape(
    element.attribute("label"),
    element.place,
    segmentation,
    is_box=element.tag == "box",
    group=None if group in ("", "0") else group,
  )


def _points(element: Element) -> list[float]:
  """Returns the points of a polygon, "x,y;x,y;...", as [x0, y0, ...]."""
  pairs = [pair.split(",") for pair in element.attribute("points").split(";")]
  if len(pairs) < 3 or any(len(pair) != 2 for pair in pairs):
    raise BadRecordError(
      "attribute points must have 3 or more x,y", quoted(element.attribute("points"))
    )
  return [number(value, "coordinate") for pair in pairs for value in pair]


def _mask(element: Element, size: Size) -> dict:
  """Returns a mask as COCO's run lengths.

  CVAT's are of the rows inside a rectangle: background, object, background, ...
  """
  sides = {f: number(element.attribute(f), f) for f in ("left", "top", "width", "height")}
  if any(value != int(value) for value in sides.values()):
    raise BadRecordError("mask lies between pixels", quoted(sides))
  x, y, w, h = map(int, sides.values())
  check_inside(x, y, w, h, size)  # before its pixels need memory
  text = element.attribute("rle")
  counts = [number(value, "run length") for value in text.split(",")]
  if any(c < 0 or c != int(c) for c in counts) or sum(counts) != w * h:
    raise BadRecordError(
      "attribute rle must be run lengths of all pixels of the mask", f"{quoted(text)} of {w} x {h}"
    )
  runs = [int(count) for count in counts]
  inside_hw = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)
  return placed_mask(inside_hw, x, y, size)


FORMAT = Format(_find, _parse, boxes_are_masks=True)
