"""YOLO's text files: a line per object, with its class and a box or a polygon in fractions of the image.

The layout is that of Ultralytics: `data.yaml` names the classes and the image folders of the splits, and a
label file lies where its image does with the last folder `images` of the path replaced by `labels`, or
beside the image. Label Studio, labelImg and CVAT write `classes.txt` or `obj.names` instead of `data.yaml`.
"""

import pathlib
from collections.abc import Callable, Sequence

from fpt_jax.data.datasets.checks import BadRecordError, BadRecords, quoted
from fpt_jax.data.datasets.formats import data_yaml, files
from fpt_jax.data.datasets.formats.files import Item, Pairs, Part, Source
from fpt_jax.data.datasets.formats.shapes import (
  Format,
  Parsed,
  Shape,
  Size,
  box_outline,
  number,
)
from fpt_jax.errors import UserError, one_line

_CLASS_FILES = ("classes.txt", "obj.names")
# text files that may lie among the label files
_NO_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt")
_TOLERANCE = 0.01  # of a fraction beyond 0..1, where rounding moves a point; boxes are clipped


def _find(root: pathlib.Path, pairs: Pairs | None) -> Source:
  file = data_yaml.find(root)
  content = data_yaml.read(file) if file else {}
  if content.get("kpt_shape"):
    raise UserError(f"{file}: kpt_shape: its labels are keypoints, which are not read")
  if file and content.get("names") is not None:
    names, names_file = data_yaml.names_in(content["names"], file), file
  else:
    names, names_file = _class_list(root)
  if pairs is not None:
    parts = {
      split: files.pair(files.images_in(root / images), root / labels, root / images, ".txt")
      for split, (labels, images) in pairs.items()
    }
  elif file and "train" in content:
    parts = {
      split: _part(data_yaml.images_of(content, split, file), root) for split in ("train", "val")
    }
  else:
    parts = _by_folders(root)
  others = list(dict.fromkeys([*([file] if file else []), names_file]))
  for split, part in parts.items():
    alone = [file for file in part.alone if file.name not in _NO_LABELS]
    parts[split] = Part(part.items, alone, others)
  return Source(parts, names, names_file)


def _class_list(root: pathlib.Path) -> tuple[list[str], pathlib.Path]:
  """Returns the names in `classes.txt` or `obj.names`, and the file.

  Raises:
    UserError: there is none, or it is empty.
  """
  folders = [root, *(root / name for name in ("labels", "train", "labels/train", "train/labels"))]
  for file in (folder / name for folder in folders for name in _CLASS_FILES):
    if file.is_file():
      names = files.read_lines(file)
      if not names:
        raise UserError(f"{file}: is empty; write the name of a class on each line")
      return names, file
  raise UserError(
    f"{root}: no file names the classes; add data.yaml with the field names, or classes.txt with a name "
    "on each line"
  )


def _part(images: list[pathlib.Path], root: pathlib.Path) -> Part:
  """Pairs images with the label files where Ultralytics looks for them."""
  by_folder: dict[pathlib.Path, list[pathlib.Path]] = {}
  for image in images:
    by_folder.setdefault(image.parent, []).append(image)
  items, alone = [], []
  for folder, inside in by_folder.items():
    labels = _label_folder(folder, root)
    if not labels.is_dir():
      items += [Item(image, None) for image in inside]
      continue
    part = files.pair(inside, labels, folder, ".txt")
    items += part.items
    alone += [file for file in part.alone if file.parent == labels]
  return Part(sorted(items, key=lambda item: item.image), alone)


def _label_folder(folder: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the label files of a folder of images."""
  parts = list(folder.parts)
  above = len(root.parts) if folder.is_relative_to(root) else 0  # may be called images, too
  for i in reversed(range(above, len(parts))):
    if parts[i] == "images":
      return pathlib.Path(*parts[:i], "labels", *parts[i + 1 :])
  return folder


def _by_folders(root: pathlib.Path) -> dict[str, Part]:
  """Returns the splits of a source whose `data.yaml` names none."""
  images = files.first_folder(root, ("images",))
  folders = files.split_folders(root) or (images and files.split_folders(images))
  if folders:
    return {split: _part(files.images_in(folder), root) for split, folder in folders.items()}
  return files.divide(_part(files.images_in(images or root), root), root)


def _parse(
  item: Item, names: Sequence[str] | None, size: Callable[[], Size], bad: BadRecords
) -> Parsed:
  assert item.label is not None and names is not None
  try:
    text = item.label.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise BadRecordError("not a readable text file", one_line(error)) from error
  height, width = size()
  shapes = []
  for i, line in enumerate(text.splitlines(), 1):
    if fields := line.split():
      place = f"{item.label}, line {i}"
      with bad.record(place, "annotation"):
        shapes.append(_shape(fields, names, place, height, width))
  return Parsed((height, width), shapes)


def _shape(fields: list[str], names: Sequence[str], place: str, height: int, width: int) -> Shape:
  index = number(fields[0], "class")
  if index != int(index) or not 0 <= index < len(names):
    raise BadRecordError(
      "class is not in the list", f"{quoted(fields[0])} is none of 0 to {len(names) - 1}"
    )
  is_box = len(fields) == 5
  if not is_box and (len(fields) < 7 or len(fields) % 2 == 0):
    raise BadRecordError(
      "wrong number of fields",
      f"{len(fields)}; write a class and x, y, w, h, or a class and x, y of 3 or more points",
    )
  values = [number(field, "coordinate") for field in fields[1:]]
  if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
    outside = next(v for v in values if not -_TOLERANCE <= v <= 1 + _TOLERANCE)
    raise BadRecordError(
      "coordinate is outside 0..1", f"{outside:g}; write fractions of the image's width and height"
    )
  if is_box:
    x, y, w, h = values
    outline = box_outline(
      (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    )
  else:
    outline = [[v * (height if i % 2 else width) for i, v in enumerate(values)]]
  return Shape(names[int(index)], place, outline, is_box=is_box)


FORMAT = Format(_find, _parse, first_id=0)
