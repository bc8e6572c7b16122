"""MS-COCO instances, or any annotation file and image folder in COCO's format."""

import collections
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from pycocotools import mask as coco_mask

from fpt_jax.data.records import instances
from fpt_jax.errors import UserError
from fpt_jax.ops import masks
from fpt_jax.run.progress import Progress

# annotation file and image folder of each split, inside the source
OFFICIAL_SPLITS = {
  "train": ("annotations/instances_train2017.json", "train2017"),
  "val": ("annotations/instances_val2017.json", "val2017"),
}
_TOLERANCE = 1.0  # pixels a box may stick out of its image; it is clipped
_NAMED = 10  # skipped records of a kind that the log names
_EVERY = 10  # of a single annotation file, one image in so many is for evaluation


class CocoInstances(tfds.core.GeneratorBasedBuilder):
  """Turns annotation files and image folders into records, checking each."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    *,
    data_dir: str,
    source: str = "",
    splits: Mapping[str, tuple[str, str]] | None = None,
    annotations: str = "",
    images: str = "",
    skip_bad: bool = False,
  ):
    """Args:
    data_dir: folder of prepared data.
    source: folder of the official layout; needed to prepare only.
    splits: (annotation file, image folder) of each split, inside `source` unless absolute.
    annotations, images: in place of `source`, one annotation file and its image folder. Every tenth
      image, in the order of ids, is of the split "val", the others of "train". The records lie in a
      folder of their own inside `data_dir`.
    skip_bad: leave bad images and annotations out, naming them in the log.

    Raises:
      UserError: the paths do not go together.
    """
    self._source = os.path.abspath(os.path.expanduser(source)) if source else ""
    self._files = dict(splits or OFFICIAL_SPLITS)
    self._is_single = bool(annotations or images)
    self._skip_bad = skip_bad
    if self._is_single:
      self._source, pair = _single_source(self._source, splits, annotations, images)
      self._files = {"train": pair, "val": pair}
      name = pathlib.Path(annotations).stem
      data_dir = os.path.join(data_dir, f"{name}-{zlib.crc32(self._source.encode()):08x}")
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Images with instances: boxes, categories and masks.",
      features=instances.features(),
      # the rest comes with the annotation files
      metadata=tfds.core.MetadataDict({"source": self._source, "sizes": {}}),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    if not self._source:
      raise UserError("data.source is empty; set it to the folder that holds the data set")
    root = pathlib.Path() if self._is_single else pathlib.Path(self._source)
    hint = (
      "data.annotations, data.images" if self._is_single else "data.source, data.builder.splits"
    )
    if not root.is_dir():
      raise UserError(f"data.source={root}: no such folder; download the data set there")
    for split, (annotations, images) in self._files.items():
      if not split.isidentifier() or split == "all":
        raise UserError(f"data.builder.splits: {split!r} cannot name a split; use letters, not all")
      if not (root / annotations).is_file():
        raise UserError(f"{root / annotations}: no such file; see {hint}")
      if not (root / images).is_dir():
        raise UserError(f"{root / images}: no such folder; see {hint}")
    return {
      split: self._generate_examples(split, root / annotations, root / images)
      for split, (annotations, images) in self._files.items()
    }

  def _generate_examples(
    self, split: str, annotation_file: pathlib.Path, image_folder: pathlib.Path
  ) -> Iterator[tuple[int, dict]]:
    content = _read_json(annotation_file)
    boxes_alone = _has_boxes_alone(content["annotations"])
    if boxes_alone:
      logging.info("%s: its annotations are boxes without masks", annotation_file)
      self.info.metadata["has_masks"] = False
    if self._is_single:
      content = _share(content, annotation_file, split)
    label_of = self._take_categories(annotation_file, content["categories"])
    judge = _Judge(annotation_file, skip=self._skip_bad)
    images = _index_images(content["images"], judge)
    annotations_of = _group_annotations(content["annotations"], images, label_of, judge)
    sizes = self.info.metadata["sizes"][split] = []
    progress = Progress(split, len(images))
    for image in images.values():
      with judge.image(image):
        example = _encode_image(image, image_folder)
        for annotation in annotations_of[image["id"]]:
          with judge.annotation(annotation):
            label = label_of[annotation["category_id"]]
            example["objects"].append(_encode_annotation(annotation, label, image, boxes_alone))
        yield instances.ordered_key(len(sizes), len(images)), example
        sizes.append([image["height"], image["width"]])
      progress.step()
    judge.report(split)
    if not sizes:
      raise UserError(f"{annotation_file}: field images holds no good image; add some")

  def _take_categories(self, annotation_file: pathlib.Path, categories: list) -> dict[int, int]:
    """Numbers the categories 1, 2, ... by their ids; all splits must agree."""
    names = {}
    for i, category in enumerate(categories):
      where = f"{annotation_file}: categories[{i}]"
      if not isinstance(category, dict) or not _is_int(category.get("id")):
        raise UserError(f"{where}: field id must be an integer; mend the file")
      if not isinstance(category.get("name"), str):
        raise UserError(f"{where}: field name must be a text; mend the file")
      if category["id"] in names:
        raise UserError(f"{where}: id {category['id']} is used twice; make category ids unique")
      names[category["id"]] = category["name"]
    if not names:
      raise UserError(f"{annotation_file}: field categories is empty; list the categories")
    ids = sorted(names)
    found = {"category_ids": ids, "category_names": [names[i] for i in ids]}
    metadata = self.info.metadata
    if "category_ids" in metadata and any(metadata[key] != found[key] for key in found):
      raise UserError(
        f"{annotation_file}: its categories differ from another split's; use one list for all"
      )
    metadata.update(found)
    return {category_id: label for label, category_id in enumerate(ids, 1)}


def _single_source(
  source: str, splits: object, annotations: str, images: str
) -> tuple[str, tuple[str, str]]:
  """What a single annotation file is known by, and its own and its image folder's absolute paths."""
  for field, value in (("source", source), ("builder.splits", splits)):
    if value:
      raise UserError(f"data.{field} and data.annotations exclude each other; leave one empty")
  for field, value in (("annotations", annotations), ("images", images)):
    if not value:
      raise UserError(
        f"data.{field} is empty; data.annotations (a file) and data.images (its image folder) are "
        "needed together"
      )
  pair = tuple(os.path.abspath(os.path.expanduser(path)) for path in (annotations, images))
  return f"{pair[0]} and {pair[1]}", pair


def _share(content: dict, annotation_file: pathlib.Path, split: str) -> dict:
  """The images of a split in a file that is of all, and their annotations; what is bad is in "train"."""

  def id_of(entry: object, field: str) -> int | None:
    return entry[field] if isinstance(entry, dict) and _is_int(entry.get(field)) else None

  ids = {id_of(image, "id") for image in content["images"]} - {None}
  if len(ids) < 2:
    raise UserError(
      f"{annotation_file}: {len(ids)} images cannot be divided into those to train on and those to "
      "evaluate; add some, or name two files in data.builder.splits"
    )
  of_val = set(sorted(ids)[::_EVERY])
  logging.info(
    "%s: %d of its %d images are for %s",
    *(annotation_file, len(of_val) if split == "val" else len(ids) - len(of_val), len(ids), split),
  )
  return content | {
    name: [e for e in content[name] if (id_of(e, field) in of_val) == (split == "val")]
    for name, field in (("images", "id"), ("annotations", "image_id"))
  }


class _BadError(Exception):
  """Something wrong with one image or annotation; `kind` is what the log counts."""

  def __init__(self, kind: str, detail: str):
    super().__init__(f"{kind}: {detail}")
    self.kind = kind


class _Judge:
  """Stops at what is bad, or skips, counts and names it."""

  def __init__(self, annotation_file: pathlib.Path, *, skip: bool):
    self._file, self._skip = annotation_file, skip
    self._counts = collections.Counter()

  def image(self, image: object) -> "_Verdict":
    """Returns a context in which `_BadError` concerns the image."""
    return _Verdict(self, "image", image)

  def annotation(self, annotation: object) -> "_Verdict":
    """Returns a context in which `_BadError` concerns the annotation."""
    return _Verdict(self, "annotation", annotation)

  def sentence(self, what: str, entry: object, bad: _BadError) -> None:
    """Raises, or counts and logs."""
    name = f"{what} id {entry.get('id')}" if isinstance(entry, dict) else what
    message = f"{self._file}: {name}: {bad}"
    if not self._skip:
      raise UserError(f"{message}; mend it, or leave such out with data.skip_bad=True") from bad
    self._counts[what, bad.kind] += 1
    if self._counts[what, bad.kind] <= _NAMED:
      logging.warning("skipped: %s", message)

  def report(self, split: str) -> None:
    """Logs how many of each kind were skipped."""
    for (what, kind), count in sorted(self._counts.items()):
      logging.warning("prepare %s: %d skipped: %s: %s", split, count, what, kind)


class _Verdict:
  def __init__(self, judge: _Judge, what: str, entry: object):
    self._judge, self._what, self._entry = judge, what, entry

  def __enter__(self) -> None:
    pass

  def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
    if not isinstance(error, _BadError):
      return False
    self._judge.sentence(self._what, self._entry, error)
    return True


def _read_json(path: pathlib.Path) -> dict:
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except json.JSONDecodeError as error:
    raise UserError(
      f"{path}: no valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
      "download or write the file again"
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: no UTF-8 text ({error}); download or write it again") from error
  for field in ("images", "annotations", "categories"):
    if not isinstance(content, dict) or not isinstance(content.get(field), list):
      raise UserError(f"{path}: field {field} must be a list; is it an instances file of COCO?")
  return content


def _index_images(entries: list, judge: _Judge) -> dict[int, dict]:
  """Returns the images by id, in the order of the file."""
  images = {}
  for image in entries:
    with judge.image(image):
      _require(image, "id", _is_int, "an integer")
      if image["id"] in images:
        raise _BadError("field id is used twice", "image ids must be unique")
      images[image["id"]] = image
  return images


def _group_annotations(
  entries: list, images: dict[int, dict], label_of: dict[int, int], judge: _Judge
) -> dict[int, list[dict]]:
  """Returns each image's annotations, in the order of the file."""
  groups = {image_id: [] for image_id in images}
  seen = set()
  for annotation in entries:
    with judge.annotation(annotation):
      _require(annotation, "id", _is_int, "an integer")
      _require(annotation, "image_id", lambda v: v in images, "the id of an image of the file")
      _require(annotation, "category_id", lambda v: v in label_of, "the id of a category")
      if annotation["id"] in seen:
        raise _BadError("field id is used twice", "annotation ids must be unique")
      seen.add(annotation["id"])
      groups[annotation["image_id"]].append(annotation)
  return groups


def _encode_image(image: dict, folder: pathlib.Path) -> dict:
  """Returns the image's record, still without objects."""
  _require(image, "file_name", lambda v: isinstance(v, str) and v, "a text")
  for field in ("height", "width"):
    _require(image, field, lambda v: _is_int(v) and v > 0, "a positive integer")
  name = pathlib.PurePosixPath(image["file_name"])
  if name.is_absolute() or ".." in name.parts:
    raise _BadError("field file_name leaves the image folder", repr(image["file_name"]))
  try:
    data = (folder / name).read_bytes()
  except OSError as error:
    raise _BadError("file cannot be read", f"{folder / name} ({error.strerror})") from error
  try:
    height, width, _ = instances.decode_image(data).shape
  except ValueError as error:
    raise _BadError("file is broken", f"{folder / name} ({error})") from error
  if (height, width) != (image["height"], image["width"]):
    raise _BadError(
      "fields height and width are not the file's",
      f"{image['height']}x{image['width']} in the record, {height}x{width} in {folder / name}",
    )
  return {
    "image": data,
    "image_id": image["id"],
    "file_name": image["file_name"],
    "height": height,
    "width": width,
    "objects": [],
  }


def _has_boxes_alone(annotations: list) -> bool:
  """Whether no annotation of a file has a mask; where some have, one without is bad."""
  return bool(annotations) and not any(
    isinstance(annotation, dict) and annotation.get("segmentation") for annotation in annotations
  )


def _encode_annotation(annotation: dict, label: int, image: dict, boxes_alone: bool) -> dict:
  """Returns the annotation as an object of a record; without masks, its bitmap is the whole box."""
  size = image["height"], image["width"]
  box = _check_box(annotation, size)
  if boxes_alone:
    x0, y0, x1, y1 = box
    segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
  else:
    _check_segmentation(annotation, size)
    segmentation = annotation["segmentation"]
  area = annotation.get("area")
  try:
    if area is None:
      area = float(masks.rasterize(segmentation, *size).sum())
    bitmap_mm = instances.draw_bitmap(segmentation, box, size)
  except (ValueError, TypeError) as error:
    raise _BadError("field segmentation cannot be drawn", str(error)) from error
  if not _is_number(area) or area < 0:
    raise _BadError("field area must be a number of pixels", repr(area))
  return instances.encode_object(
    label=label,
    annotation_id=annotation["id"],
    is_crowd=bool(annotation.get("iscrowd", 0)),
    box=box,
    bbox_xywh=annotation["bbox"],
    area=area,
    segmentation=segmentation,
    bitmap_mm=bitmap_mm,
  )


def _check_box(annotation: dict, size: tuple[int, int]) -> tuple[float, float, float, float]:
  """Returns the annotation's box as (x0, y0, x1, y1), clipped to the image."""
  _require(annotation, "bbox", lambda v: _is_numbers(v) and len(v) == 4, "four numbers x, y, w, h")
  height, width = size
  x, y, w, h = annotation["bbox"]
  # COCO itself has boxes without height: kept as ground truth, never trained on
  if w < 0 or h < 0:
    raise _BadError("field bbox has a negative side", repr(annotation["bbox"]))
  if min(x, y, width - x - w, height - y - h) < -_TOLERANCE:
    raise _BadError(
      "field bbox lies outside the image",
      f"x, y, w, h = {annotation['bbox']} in an image of height {height}, width {width}",
    )
  x0, y0 = max(x, 0.0), max(y, 0.0)
  return x0, y0, max(min(x + w, width), x0), max(min(y + h, height), y0)


def _check_segmentation(annotation: dict, size: tuple[int, int]) -> None:
  height, width = size
  segmentation = annotation.get("segmentation")
  if isinstance(segmentation, list) and segmentation:
    for polygon in segmentation:
      if not _is_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
        points = len(polygon) / 2 if isinstance(polygon, list) else 0
        raise _BadError(
          "field segmentation has a polygon of fewer than 3 points, or of odd numbers",
          f"{points:g} points",
        )
      far = np.abs(np.reshape(polygon, (-1, 2)) / (width, height) - 0.5).max()
      if far > 1.5:
        raise _BadError("field segmentation has a polygon far outside the image", str(polygon[:6]))
  elif isinstance(segmentation, dict):
    if segmentation.get("size") != [height, width]:
      raise _BadError(
        "field segmentation.size is not the image's",
        f"{segmentation.get('size')} instead of {[height, width]}",
      )
    counts = segmentation.get("counts")
    if isinstance(counts, list):
      if not all(_is_int(c) and c >= 0 for c in counts) or sum(counts) != height * width:
        raise _BadError("field segmentation.counts does not add up to the image's pixels", "")
    elif isinstance(counts, str):
      try:
        coco_mask.decode(segmentation)
      except (ValueError, TypeError) as error:
        raise _BadError("field segmentation.counts is no run lengths", str(error)) from error
    else:
      raise _BadError("field segmentation.counts is missing", "run lengths have size and counts")
  else:
    raise _BadError("field segmentation is missing", "polygons or run lengths are needed")


def _require(entry: object, field: str, test: object, needed: str) -> None:
  """Raises unless the field is there and passes the test."""
  if not isinstance(entry, dict):
    raise _BadError("entry is no object", repr(entry)[:40])
  if field not in entry:
    raise _BadError(f"field {field} is missing", f"it must be {needed}")
  try:
    good = test(entry[field])
  except TypeError:  # an unhashable value cannot be an id
    good = False
  if not good:
    raise _BadError(f"field {field} must be {needed}", repr(entry[field])[:40])


def _is_int(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _is_numbers(value: object) -> bool:
  return isinstance(value, list) and all(map(_is_number, value))
