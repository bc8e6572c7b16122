"""MS-COCO instances, any annotation file and image folder in COCO's format, and formats read into it."""

import collections
import dataclasses
import functools
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from fpt_jax.data.datasets import coco_json, formats, inputs
from fpt_jax.data.datasets.checks import (
  BadRecordError,
  ExifChoice,
  absolute,
  check_split_name,
  listed,
  source_folder,
)
from fpt_jax.data.records import instances
from fpt_jax.data.records.examples import ordered_key
from fpt_jax.data.records.images import bytes_for_record, decode_picture, read_bytes
from fpt_jax.errors import UserError
from fpt_jax.ops import masks
from fpt_jax.run.progress import Progress

# annotation file and image folder of each split, inside the source
OFFICIAL_SPLITS = {
  "train": ("annotations/instances_train2017.json", "train2017"),
  "val": ("annotations/instances_val2017.json", "val2017"),
}
# the same in Roboflow's export in COCO's format
ROBOFLOW_SPLITS = {
  "train": ("train/_annotations.coco.json", "train"),
  "val": ("valid/_annotations.coco.json", "valid"),
}
FORMATS = ("coco", "roboflow", *formats.FORMATS)


@dataclasses.dataclass(frozen=True)
class _Entries:
  """The annotations of a split, before they are checked.

  Attributes:
    file: annotation file or source, for messages.
    folder: folder of the images.
    content: lists of COCO's format.
    boxes_only: whether no annotation of the file has a mask.
    bad: where bad entries are counted.
    notes: notes of the files; those of the images in `content` are added.
  """

  file: pathlib.Path
  folder: pathlib.Path
  content: dict[str, list]
  boxes_only: bool
  bad: coco_json.BadEntries
  notes: dict[str, Any]


class CocoInstances(tfds.core.GeneratorBasedBuilder):
  """Turns annotation files and image folders into records, checking each.

  Args:
    data_dir: folder of prepared data.
    source: folder of the official layout; only preparing needs it.
    splits: (annotation file, image folder) of each split, inside `source` unless absolute; None for
      `OFFICIAL_SPLITS`. In other formats, the label files have a folder, or are one file as well.
    annotations: one annotation file, used together with `images` instead of `source`. Every tenth
      image, in ascending order of the ids, is in the split "val", the others are in "train". The
      records lie in a separate folder inside `data_dir`.
    images: the image folder of `annotations`.
    skip_bad: whether to leave out bad images and annotations, and to name them in the log.
    exif: "apply" if the annotations are of upright images, "ignore" if of the pixels as they are stored.
    format: format of the annotations, one of `FORMATS`. The records of other formats than COCO's lie in a
      separate folder inside `data_dir`.

  Raises:
    UserError: the paths exclude each other, or there is no such format.
  """

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
    exif: str = "apply",
    format: str = "coco",
  ):
    if format not in FORMATS:
      raise UserError(f"data.format={format!r} must be one of {', '.join(FORMATS)}")
    self.source = absolute(source)
    self.root = pathlib.Path(self.source) if source else None
    self.options: dict[str, object] = {"data.skip_bad": skip_bad, "data.exif": exif}
    self.paths: dict[str, object] = {}
    self._exif = ExifChoice(exif)
    self._is_single = bool(annotations or images)
    self._skip_bad = skip_bad
    self._format = format
    # None: the source tells where the files of a split are
    self._files = _files_of_splits(splits) if splits else None
    if self._is_single:
      _check_single_file(source, splits, annotations, images, format)
      pair = absolute(annotations), absolute(images)
      self.source, self.root = f"{pair[0]} and {pair[1]}", pathlib.Path("/")
      self._files = {"train": pair, "val": pair}
      name = pathlib.Path(annotations).stem
      data_dir = os.path.join(data_dir, f"{name}-{zlib.crc32(self.source.encode()):08x}")
    else:
      if not splits and format not in formats.FORMATS:
        self._files = dict(ROBOFLOW_SPLITS if format == "roboflow" else OFFICIAL_SPLITS)
      self.options["data.builder.splits"] = sorted(self._files or OFFICIAL_SPLITS)
      self.paths["data.builder.splits"] = self._files
    if format != "coco":  # the records of earlier versions do not name it
      self.options["data.format"] = format
      place = f"{format} {self.source or source_folder(source)}"
      name = pathlib.Path(self.source).name
      data_dir = os.path.join(data_dir, f"{name}-{zlib.crc32(place.encode()):08x}")
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Images with instances: boxes, categories and masks.",
      features=instances.features(),
      # the rest is added while the annotation files are read
      metadata=tfds.core.MetadataDict(
        {"source": self.source, "sizes": {}, "objects": {}, "inputs": inputs.start(self)}
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    if self._is_single:
      root, fields = pathlib.Path(), "data.annotations, data.images"
    else:
      root, fields = source_folder(self.source), "data.source, data.builder.splits"
    for split in self._files or ():
      check_split_name(split)
    if self._format in formats.FORMATS:
      converted = self._convert(root)
      return {
        split: self._generate_examples(split, functools.partial(converted.__getitem__, split))
        for split in converted
      }
    files = {split: (root / a, root / b) for split, (a, b) in (self._files or {}).items()}
    for annotations, images in files.values():
      if not annotations.is_file():
        raise UserError(f"{annotations}: no such file; see {fields}")
      if not images.is_dir():
        raise UserError(f"{images}: no such folder; see {fields}")
    return {
      split: self._generate_examples(split, functools.partial(self._read_file, split, *pair))
      for split, pair in files.items()
    }

  def _convert(self, root: pathlib.Path) -> dict[str, _Entries]:
    """Reads the annotations of another format."""
    logging.info("%s: reading its annotations (data.format=%r)", root, self._format)
    converted = formats.convert(
      formats.FORMATS[self._format], root, self._files, exif=self._exif, skip_bad=self._skip_bad
    )
    entries = {}
    for split, part in converted.items():
      coco_json.check_units(root, part.content)
      boxes_only = coco_json.has_boxes_only(part.content["annotations"])
      notes = {"labels": part.labels, "images": part.images}
      entries[split] = _Entries(root, part.folder, part.content, boxes_only, part.bad, notes)
    return entries

  def _read_file(
    self, split: str, annotation_file: pathlib.Path, image_folder: pathlib.Path
  ) -> _Entries:
    """Reads an annotation file."""
    note = inputs.note(annotation_file)  # before it is read: it may be edited meanwhile
    content = coco_json.read_file(annotation_file)
    coco_json.check_units(annotation_file, content)
    boxes_only = coco_json.has_boxes_only(content["annotations"])
    if self._is_single:
      content = coco_json.part_of_split(content, annotation_file, split)
    if self._format == "roboflow":
      content = coco_json.without_root_category(content)
    bad = coco_json.BadEntries(annotation_file, skip=self._skip_bad)
    paths = str(annotation_file), str(image_folder)
    notes = {"paths": paths, "annotations": note, "images": {}}
    return _Entries(annotation_file, image_folder, content, boxes_only, bad, notes)

  def _generate_examples(
    self, split: str, read: Callable[[], _Entries]
  ) -> Iterator[tuple[int, dict]]:
    entries = read()
    annotation_file, image_folder, bad = entries.file, entries.folder, entries.bad
    content, notes = entries.content, entries.notes["images"]
    if entries.boxes_only:
      logging.info("%s: its annotations are boxes without masks", annotation_file)
      self.info.metadata["has_masks"] = False
    label_of = self._add_categories(annotation_file, content["categories"])
    images = coco_json.index_images(content["images"], bad)
    annotations_of = coco_json.group_annotations(content["annotations"], images, label_of, bad)
    sizes: list[list[int]] = []
    self.info.metadata["sizes"][split] = sizes
    self.info.metadata["inputs"]["files"][split] = entries.notes
    counts = _Counts()
    with Progress(f"prepare {split}", len(images)) as progress:
      for image in images.values():
        if isinstance(image.get("file_name"), str):  # also of a bad image, which may be replaced
          notes[image["file_name"]] = inputs.note(image_folder / image["file_name"])
        with bad.image(image):
          example = _encode_image(image, image_folder, self._exif)
          for annotation in annotations_of[image["id"]]:
            with bad.annotation(annotation):
              label = label_of[annotation["category_id"]]
              example["objects"].append(
                _encode_annotation(annotation, label, image, entries.boxes_only)
              )
          counts.add(example["objects"])
          yield ordered_key(len(sizes), len(images)), example
          sizes.append([image["height"], image["width"]])
        progress.advance()
    bad.report(split)
    if not sizes:
      raise UserError(f"{annotation_file}: field images has no good image; add some")
    if content["annotations"] and not counts.total():
      raise UserError(
        f"{annotation_file}: split {split} has no good annotation among "
        f"{len(content['annotations'])}; fix them"
      )
    self.info.metadata["objects"][split] = counts.objects.total()
    counts.report(split, self.info.metadata["category_names"])

  def changed_files(self, notes: Mapping[str, Any], *, moved: bool) -> list[str]:
    """See `inputs.Builder.changed_files`."""
    if self._format in formats.FORMATS:
      return self._changed_label_files(notes, moved=moved)
    found: list[str] = []
    for split, names in (self._files or {}).items():
      annotations, images = ((self.root or pathlib.Path()) / name for name in names)
      noted = notes[split]
      for path, before in zip((annotations, images), noted["paths"], strict=True):
        if not path.exists() and str(path) == before:
          inputs.warn_once(f"{path} does not exist any more; its records are used nevertheless")
        elif not path.exists():
          found.append(f"{before} was read, now {path}, which does not exist")
        elif path is annotations:
          found += inputs.changed_files({split: noted["annotations"]}, {split: path})
        else:
          files = {name: os.path.join(path, name) for name in noted["images"]}
          found += inputs.changed_files(noted["images"], files, sample=True)
    return found

  def _changed_label_files(self, notes: Mapping[str, Any], *, moved: bool) -> list[str]:
    """See `inputs.Builder.changed_files`; of formats with label files."""
    root = pathlib.Path(self.source)
    try:
      source = formats.FORMATS[self._format].find(root, self._files)
    except UserError as error:
      if moved:
        raise
      inputs.warn_once(f"{error}; the records are used nevertheless")
      return []
    found: list[str] = []
    for split, part in source.parts.items():
      found += inputs.changed_files(notes[split]["labels"], formats.label_paths(part, root))
      found += inputs.changed_files(notes[split]["images"], formats.image_paths(part), sample=True)
    return found

  def _add_categories(self, annotation_file: pathlib.Path, categories: list) -> dict[int, int]:
    """Adds the categories to the metadata, and returns their labels 1, 2, ... by id."""
    names = coco_json.read_categories(annotation_file, categories)
    found = {"category_ids": list(names), "category_names": list(names.values())}
    metadata = self.info.metadata
    if "category_ids" in metadata and any(metadata[key] != found[key] for key in found):
      raise UserError(
        f"{annotation_file}: its categories differ from another split's; use one list for all"
      )
    metadata.update(found)
    return {category_id: label for label, category_id in enumerate(names, 1)}


class _Counts:
  """Counts of a split's objects.

  Attributes:
    objects: objects that can be trained on, by label.
    crowds: number of crowds.
    empty: number of objects whose box has no area.
  """

  def __init__(self) -> None:
    self.objects: collections.Counter[int] = collections.Counter()
    self.crowds = self.empty = 0

  def add(self, objects: list[dict]) -> None:
    """Counts the objects of a record."""
    for found in objects:
      x0, y0, x1, y1 = found["bbox"]
      if found["is_crowd"]:
        self.crowds += 1
      elif x1 > x0 and y1 > y0:
        self.objects[found["label"]] += 1
      else:
        self.empty += 1

  def total(self) -> int:
    """Returns the number of annotations."""
    return self.objects.total() + self.crowds + self.empty

  def report(self, split: str, names: list[str]) -> None:
    """Warns of categories without an object, and of a split without any."""
    if not self.objects:
      logging.warning(
        "prepare %s: no object to train on or to find: no annotation but %d crowds and %d objects whose "
        "box is empty",
        *(split, self.crowds, self.empty),
      )
      return
    absent = [name for label, name in enumerate(names, 1) if not self.objects[label]]
    if absent:
      logging.warning(
        "prepare %s: no object of %d of %d categories: %s",
        *(split, len(absent), len(names), listed(absent)),
      )


def _files_of_splits(splits: object) -> dict[str, tuple[str, str]]:
  """Returns the annotation file and the image folder of each split.

  Raises:
    UserError: `data.builder.splits` has another form.
  """
  given = dict(splits) if isinstance(splits, Mapping) else splits
  if not isinstance(given, dict) or not all(map(_is_pair_of_paths, given.values())):
    raise UserError(
      f"data.builder.splits={given!r} must have an annotation file and an image folder for each split, "
      "such as {'train': ('train.json', 'images')}; set it in a config file"
    )
  return {split: (annotations, images) for split, (annotations, images) in given.items()}


def _is_pair_of_paths(value: object) -> bool:
  if not isinstance(value, tuple | list) or len(value) != 2:
    return False
  return all(isinstance(path, str) and path for path in value)


def _check_single_file(
  source: str, splits: object, annotations: str, images: str, format: str
) -> None:
  """Raises UserError unless a single annotation file has its image folder and nothing else."""
  if format != "coco":
    raise UserError(
      f"data.annotations is for data.format='coco', not for {format!r}; set data.source instead"
    )
  for field, value in (("source", source), ("builder.splits", splits)):
    if value:
      raise UserError(f"data.{field} and data.annotations exclude each other; leave one empty")
  for field, value in (("annotations", annotations), ("images", images)):
    if not value:
      raise UserError(
        f"data.{field} is empty; set both data.annotations (a file) and data.images (its image "
        "folder)"
      )


def _encode_image(image: dict, folder: pathlib.Path, exif: ExifChoice) -> dict:
  """Returns the record of an image, without objects."""
  coco_json.check_image(image)
  file = folder / image["file_name"]
  try:
    data = read_bytes(file)
  except OSError as error:
    raise BadRecordError("file cannot be read", f"{file} ({error.strerror})") from error
  try:
    picture = decode_picture(data, exif=exif.exif)
  except ValueError as error:
    raise BadRecordError("file is broken", f"{file} ({error})") from error
  height, width = picture.size
  stated = image["height"], image["width"]
  if stated != picture.size:
    detail = f"{stated[0]}x{stated[1]} in the record, {height}x{width} in"
    if stated == picture.other_size:
      raise BadRecordError(
        f"fields height and width fit data.exif={exif.other!r} only",
        f"{detail} the {exif.pixels} pixels; {exif.hint(picture.orientation, file)}",
      )
    raise BadRecordError("fields height and width are not those of the file", f"{detail} {file}")
  if picture.orientation != 1 and stated == picture.other_size:
    exif.log_assumption(picture.orientation, file)
  return {
    "image": bytes_for_record(data, picture),
    "image_id": image["id"],
    "file_name": image["file_name"],
    "height": height,
    "width": width,
    "objects": [],
  }


def _encode_annotation(annotation: dict, label: int, image: dict, boxes_only: bool) -> dict:
  """Returns an annotation as an object of a record; without masks, its bitmap is the whole box."""
  size = image["height"], image["width"]
  box = coco_json.check_box(annotation, size)
  if boxes_only:
    x0, y0, x1, y1 = box
    segmentation = [[x0, y0, x1, y0, x1, y1, x0, y1]]
  else:
    coco_json.check_segmentation(annotation, size)
    segmentation = annotation["segmentation"]
  area = annotation.get("area")
  try:
    if area is None:
      area = float(masks.rasterize(segmentation, *size).sum())
    bitmap_mm = instances.draw_bitmap(segmentation, box, size)
  except (ValueError, TypeError) as error:
    raise BadRecordError("field segmentation cannot be drawn", str(error)) from error
  coco_json.check_area(area)
  return instances.encode_object(
    label=label,
    annotation_id=annotation["id"],
    is_crowd=coco_json.is_crowd(annotation),
    box=box,
    bbox_xywh=annotation["bbox"],
    area=area,
    segmentation=segmentation,
    bitmap_mm=bitmap_mm,
  )
