"""Boxes of PASCAL VOC: an XML file per image.

Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015. The layouts
are the development kit's (Annotations, JPEGImages, and ImageSets/Main with a list per split), and folders
with XML files beside their images, as Roboflow and labelImg write.
"""

import pathlib
from collections.abc import Callable, Sequence

from fpt_jax.data.datasets.checks import BadRecordError, BadRecords, quoted
from fpt_jax.data.datasets.formats import files, xml_tree
from fpt_jax.data.datasets.formats.files import Item, Pairs, Part, Source
from fpt_jax.data.datasets.formats.shapes import (
  Format,
  Parsed,
  Shape,
  Size,
  box_outline,
  image_size,
  number,
)
from fpt_jax.data.datasets.formats.xml_tree import Element
from fpt_jax.errors import UserError

_IMAGES, _LABELS = ("JPEGImages", "images"), ("Annotations", "annotations")


def _find(root: pathlib.Path, pairs: Pairs | None) -> Source:
  lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
  if pairs is not None:
    parts = {
      split: _part(root / labels, root / images, root) for split, (labels, images) in pairs.items()
    }
  elif any(path.is_file() for path in lists.values()):
    labels = files.first_folder(root, _LABELS) or root
    parts = {split: _part(labels, path, root) for split, path in lists.items()}
  elif folders := files.split_folders(root):
    parts = {split: _part_in(folder, root) for split, folder in folders.items()}
  else:
    parts = files.divide(_part_in(root, root), root)
  names, names_file = files.class_list(root)
  if names:
    parts = {s: Part(p.items, p.alone, [*p.others, names_file]) for s, p in parts.items()}
  return Source(parts, names, names_file)


def _part_in(folder: pathlib.Path, root: pathlib.Path) -> Part:
  """Returns the images in a folder, and its label files in a folder of their own or beside the images."""
  images = files.first_folder(folder, _IMAGES) or folder
  return _part(files.first_folder(folder, _LABELS) or images, images, root)


def _part(labels: pathlib.Path, images: pathlib.Path, root: pathlib.Path) -> Part:
  """Returns a split whose images are a folder, or a list of names without endings."""
  if images.suffix != ".txt":
    return files.pair(files.images_in(images), labels, images, ".xml")
  if not images.is_file():
    raise UserError(f"{images}: no such file; see data.source, data.builder.splits")
  folder = files.first_folder(root, _IMAGES) or root
  whole = files.pair(files.images_in(folder), labels, folder, ".xml")
  item_of = {
    item.image.relative_to(folder).with_suffix("").as_posix(): item for item in whole.items
  }
  items = []
  for name in dict.fromkeys(files.read_lines(images)):
    if name not in item_of:
      raise UserError(f"{images}: no image {quoted(name)} in {folder}; add it, or correct the list")
    items.append(item_of[name])
  return Part(sorted(items, key=lambda item: item.image), [], [images])


def _parse(
  item: Item, names: Sequence[str] | None, size: Callable[[], Size], bad: BadRecords
) -> Parsed:
  assert item.label is not None
  root = xml_tree.read(item.label, "annotation")
  shapes = []
  for element in root.all("object"):
    with bad.record(element.place, "annotation"):
      shapes.append(_shape(element))
  return Parsed(_stated_size(root) or size(), shapes)


def _stated_size(root: Element) -> Size | None:
  """Returns the size of the image that a label file gives; None for 0 x 0, as some tools write."""
  element = root.first("size")
  if element is None:
    return None
  height, width = (number(element.child_text(f), f, element.place) for f in ("height", "width"))
  if height == width == 0:
    return None
  return image_size(height, width, element.place)


def _shape(element: Element) -> Shape:
  name = element.child_text("name")
  if not name:
    raise BadRecordError("element name is empty", "name the class")
  difficult = element.first("difficult")
  is_difficult = difficult is not None and difficult.text.strip() not in ("", "0")
  box = element.first("bndbox")
  if box is None:
    raise BadRecordError("element object has no bndbox", "add it")
  x0, y0, x1, y1 = (
    number(box.child_text(f), f, box.place) for f in ("xmin", "ymin", "xmax", "ymax")
  )
  if x1 < x0 or y1 < y0:
    raise BadRecordError(
      "box has a negative side", f"xmin, ymin, xmax, ymax = {x0:g}, {y0:g}, {x1:g}, {y1:g}"
    )
  # pixels are counted from 1, and both ends belong to the box
  outline = box_outline(x0 - 1, y0 - 1, x1, y1)
  return Shape(name, element.place, outline, is_box=True, is_crowd=is_difficult)


FORMAT = Format(_find, _parse)
