"""Annotations of other formats as the dictionaries of COCO's format.

Everything behind them is that of COCO's format: checks, orientation, clipping and records.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging

from fpt_jax.data.datasets import coco_json, inputs
from fpt_jax.data.datasets.checks import (
  BadRecordError,
  BadRecords,
  ExifChoice,
  check_names,
  listed,
  quoted,
)
from fpt_jax.data.datasets.formats.files import Item, Pairs, Part, common_folder
from fpt_jax.data.datasets.formats.shapes import Format, Parsed, Shape, Size
from fpt_jax.data.records.images import read_size
from fpt_jax.errors import UserError
from fpt_jax.ops import masks


@dataclasses.dataclass(frozen=True)
class Converted:
  """A split in COCO's format.

  Attributes:
    folder: folder of the images.
    content: COCO's `images`, `annotations` and `categories`. Images are sorted by path. Ids depend on the
      files alone, and are unique in all splits together.
    bad: the bad records of the split; entries of `content` are named by file and line.
    labels: notes of all files but the images, by path in `data.source`.
    images: notes of the images that are not in `content`, by path in `folder`.
  """

  folder: pathlib.Path
  content: dict[str, list]
  bad: coco_json.BadEntries
  labels: dict[str, inputs.Note]
  images: dict[str, inputs.Note]


def convert(
  fmt: Format, root: pathlib.Path, pairs: Pairs | None, *, exif: ExifChoice, skip_bad: bool
) -> dict[str, Converted]:
  """Reads the annotations of all splits.

  Args:
    fmt: the format.
    root: `data.source`.
    pairs: `data.builder.splits`; None for the folders and lists that the format has.
    exif: whether fractions of an image are of the upright or of the stored pixels.
    skip_bad: whether to leave out what cannot be read.

  Raises:
    UserError: files are missing, or something cannot be read and `skip_bad` is False.
  """
  # the files are noted before they are read: they may be edited meanwhile
  noted = {split: _notes(part, root) for split, part in fmt.find(root, pairs).parts.items()}
  source = fmt.find(root, pairs)
  if source.names is not None:
    check_names(str(source.names_file), source.names)
  found, bad_of, places = {}, {}, {}
  for split, part in source.parts.items():
    places[split] = {}
    bad_of[split] = coco_json.BadEntries(root, skip=skip_bad, places=places[split])
    _check_part(part, root, split, bad_of[split])
    found[split] = _parse_part(fmt, part, source.names, exif, bad_of[split])
  names = source.names
  if names is None:
    parsed = [p for split in found.values() for p in split if p]
    names = sorted({shape.name for p in parsed for shape in p.shapes})
    logging.info("%s: %d classes: %s", root, len(names), listed(names))
    if not names:
      raise UserError(f"{root}: no label file has an object; see data.source, data.builder.splits")
  categories = [{"id": i, "name": name} for i, name in enumerate(names, fmt.first_id)]
  as_masks = fmt.boxes_are_masks and not _boxes_only(found.values())
  ids = _Ids()
  converted = {}
  for split, part in source.parts.items():
    content, left_out = _content(
      part, found[split], categories, source.names_file, as_masks, ids, bad_of[split], places[split]
    )
    converted[split] = Converted(
      common_folder(part.items), content, bad_of[split], noted[split], left_out
    )
  return converted


def label_paths(part: Part, root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns all files of a split but the images, by the names of their notes: paths in `data.source`."""
  return {pathlib.Path(os.path.relpath(path, root)).as_posix(): path for path in part.labels()}


def image_paths(part: Part) -> dict[str, pathlib.Path]:
  """Returns the images of a split, by the names of their notes."""
  if not part.items:
    return {}
  folder = common_folder(part.items)
  return {item.image.relative_to(folder).as_posix(): item.image for item in part.items}


def _notes(part: Part, root: pathlib.Path) -> dict[str, inputs.Note]:
  return {name: inputs.note(path) for name, path in label_paths(part, root).items()}


def _check_part(part: Part, root: pathlib.Path, split: str, bad: BadRecords) -> None:
  """Raises UserError if a split has no image, no label file, or a label file without an image."""
  for file in part.alone:
    with bad.record(str(file), "label file"):
      raise BadRecordError("no image of this name", "add the image, or remove the label file")
  if not part.items:
    raise UserError(f"{root}: split {split} has no image; see data.source, data.builder.splits")
  bare = sum(item.label is None for item in part.items)
  if bare == len(part.items):
    raise UserError(
      f"{root}: split {split} has no label file for any of its {bare} images, such as "
      f"{part.items[0].image}; see data.source, data.builder.splits"
    )
  if bare:
    logging.info("split %s: %d images have no label file: they have no object", split, bare)


def _parse_part(
  fmt: Format,
  part: Part,
  names: Sequence[str] | None,
  exif: ExifChoice,
  bad: BadRecords,
) -> list[Parsed | None]:
  """Returns the content of each image's label file, None where it is bad."""
  found: list[Parsed | None] = []
  for item in part.items:
    parsed = None

    def size(item: Item = item) -> Size:
      return _size(item, exif)

    with bad.record(str(item.label or item.image), "label file" if item.label else "image"):
      parsed = fmt.parse(item, names, size, bad) if item.label else Parsed(size(), [])
    found.append(parsed)
  return found


def _size(item: Item, exif: ExifChoice) -> Size:
  try:
    size, orientation = read_size(item.image, exif=exif.exif)
  except OSError as error:
    raise BadRecordError("file cannot be read", str(error.strerror), item.image) from error
  except ValueError as error:
    raise BadRecordError("file is broken", str(error), item.image) from error
  if orientation != 1 and item.label:
    exif.log_assumption(orientation, item.image)
  return size


def _boxes_only(splits: Iterable[list[Parsed | None]]) -> bool:
  return all(shape.is_box for parsed in splits for p in parsed if p for shape in p.shapes)


class _Ids:
  """The ids that were given so far, in all splits together.

  Attributes:
    images: the number of images.
    annotations: the number of annotations. pycocotools takes the id 0 for none.
  """

  def __init__(self) -> None:
    self.images = self.annotations = 0


def _content(
  part: Part,
  parsed: list[Parsed | None],
  categories: list[dict],
  names_file: pathlib.Path,
  as_masks: bool,
  ids: _Ids,
  bad: BadRecords,
  places: dict[tuple[str, int], str],
) -> tuple[dict[str, list], dict[str, inputs.Note]]:
  """Returns a split as COCO's dictionaries, and the notes of the images that are left out."""
  id_of = {category["name"]: category["id"] for category in categories}
  images, annotations, left_out = [], [], {}
  for (name, path), item, found in zip(image_paths(part).items(), part.items, parsed, strict=True):
    ids.images += 1
    if found is None:
      left_out[name] = inputs.note(path)
      continue
    height, width = found.size
    places["image", ids.images] = str(item.label or path)
    images.append({"id": ids.images, "file_name": name, "height": height, "width": width})
    for shapes in _objects(found.shapes):
      ids.annotations += 1
      first = shapes[0]
      with bad.record(first.place, "annotation"):
        if first.name not in id_of:
          raise BadRecordError(
            "class is not in the list",
            f"{quoted(first.name)} is none of the {len(id_of)} classes of {names_file}",
          )
        segmentation = _united(shapes, found.size)
        annotation = {
          "id": ids.annotations,
          "image_id": ids.images,
          "category_id": id_of[first.name],
          "bbox": _bbox(segmentation, found.size),
          "iscrowd": int(first.is_crowd),
        }
        if as_masks or not all(shape.is_box for shape in shapes):
          annotation["segmentation"] = segmentation
        annotations.append(annotation)
        places["annotation", ids.annotations] = first.place
  content = {"images": images, "annotations": annotations, "categories": categories}
  return content, left_out


def _objects(shapes: list[Shape]) -> list[list[Shape]]:
  """Returns the shapes of each object, in the order of its first shape."""
  objects: dict[object, list[Shape]] = {}
  for i, shape in enumerate(shapes):
    key = i if shape.group is None else (shape.name, shape.group)
    objects.setdefault(key, []).append(shape)
  return list(objects.values())


def _united(shapes: list[Shape], size: Size) -> list | dict:
  """Returns the segmentation of all shapes of an object together."""
  parts = [shape.segmentation for shape in shapes]
  if len(parts) == 1:
    return parts[0]
  polygons = [polygon for part in parts if isinstance(part, list) for polygon in part]
  if all(isinstance(part, list) for part in parts):
    return polygons
  coco_json.check_polygons(polygons, size)  # pycocotools' memory grows with the outline
  return masks.encode_rle(np.any([masks.rasterize(part, *size) for part in parts], axis=0))


def _bbox(segmentation: list | dict, size: Size) -> list[float]:
  """Returns the box (x, y, width, height) around polygons or run lengths."""
  if isinstance(segmentation, list):
    x, y = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation]).T.tolist()
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]
  x0, y0, x1, y1 = masks.bounds(masks.rasterize(segmentation, *size)) or (0, 0, 0, 0)
  return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]
