"""The builder of all data sets of images and label maps: checking and writing them."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from fpt_jax.data.datasets import inputs
from fpt_jax.data.datasets.checks import (
  BadRecordError,
  BadRecords,
  ExifChoice,
  absolute,
  check_split_name,
  is_storable_text,
  listed,
  quoted,
  source_folder,
)
from fpt_jax.data.datasets.layouts import Layout, Pairs
from fpt_jax.data.records import label_map
from fpt_jax.data.records.examples import ordered_key
from fpt_jax.data.records.images import (
  Picture,
  bytes_for_record,
  decode_picture,
  encode_png,
  other_size,
  read_bytes,
)
from fpt_jax.data.records.label_map import VOID
from fpt_jax.errors import UserError
from fpt_jax.run.progress import Progress


class LabelMaps(tfds.core.GeneratorBasedBuilder):
  """Turns images and label files into records, checking each.

  Args:
    layout: layout of the source.
    data_dir: folder of prepared data; each data set has a folder inside it.
    source: folder of the official layout; only preparing needs it.
    splits: splits to prepare; () for those of the layout.
    skip_bad: whether to leave out bad images and label maps, and to name them in the log.
    exif: "apply" if the label maps are of upright images, "ignore" if of the pixels as they are stored.
    options: values of the config that the layout was made from, by field; None for a fixed layout.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    layout: Layout,
    *,
    data_dir: str,
    source: str = "",
    splits: Sequence[str] = (),
    skip_bad: bool = False,
    exif: str = "apply",
    options: Mapping[str, object] | None = None,
  ):
    self._layout = layout
    self._exif = ExifChoice(exif)
    self.source = absolute(source)
    self.root = pathlib.Path(self.source) if source else None
    if isinstance(splits, str) or not all(isinstance(split, str) for split in splits):
      raise UserError(f"data.builder.splits={splits!r} must be names, such as ('train', 'val')")
    self._splits = tuple(splits) or layout.splits
    self._skip_bad = skip_bad
    self._images = 0
    if options is None:  # JSON has no integers as keys
      classes = sorted(layout.class_of_id.items())
      options = {
        "the layout's class_names": layout.class_names,
        "the layout's class_of_id": classes,
      }
    self.options: dict[str, object] = {
      "data.builder.splits": self._splits,
      "data.skip_bad": skip_bad,
      "data.exif": exif,
      **options,
    }
    self.paths: dict[str, object] = {}
    super().__init__(data_dir=os.path.join(data_dir, layout.name), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    metadata = {
      "source": self.source,
      "inputs": inputs.start(self),
      "class_names": self._layout.class_names,
      "palette": self._layout.palette,
      "swaps": self._layout.swaps,
      "sizes": {},
      # of each class, and of pixels without one
      "class_pixels": {},
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="Images with label maps.",
      features=label_map.features(),
      metadata=tfds.core.MetadataDict(metadata),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    root = source_folder(self.source)
    pairs = {}
    for split in self._splits:
      check_split_name(split)
      pairs[split] = self._layout.pairs(root, split)
      if not pairs[split]:
        raise UserError(f"{root}: split {split} has no image; add some, or see data.builder.splits")
    return {split: self._generate_examples(split, pairs[split]) for split in pairs}

  def _generate_examples(self, split: str, pairs: Pairs) -> Iterator[tuple[int, dict]]:
    sizes: list[list[int]] = []
    notes: dict[str, dict[str, inputs.Note]] = {"images": {}, "labels": {}}
    self.info.metadata["sizes"][split] = sizes
    pixels_256 = np.zeros(256, np.int64)
    self.info.metadata["inputs"]["files"][split] = notes
    bad = BadRecords(skip=self._skip_bad)
    with Progress(f"prepare {split}", len(pairs)) as progress:
      for image_file, label_file in pairs:
        self._images += 1
        for kind, file in (("images", image_file), ("labels", label_file)):
          notes[kind][self._name(file)] = inputs.note(file)  # before it is read
        with bad.record():
          example, label_HW = _encode(
            image_file, label_file, self._images, self._layout, self._exif
          )
          pixels_256 += np.bincount(label_HW.ravel(), minlength=256)
          yield ordered_key(len(sizes), len(pairs)), example
          sizes.append([example["height"], example["width"]])
        progress.advance()
    bad.report(split)
    if not sizes:
      raise UserError(f"{self.source}: split {split} has no good image; add some")
    count = len(self._layout.class_names)
    self.info.metadata["class_pixels"][split] = [
      *pixels_256[:count].tolist(),
      int(pixels_256[VOID]),
    ]
    self._check_classes(split)

  def _check_classes(self, split: str) -> None:
    """Warns of classes without a pixel in a split.

    Raises:
      UserError: one class is left beside the pixels without a class in a split of two classes, or in all
        splits together, once the last is written.
    """
    names, pixels = self._layout.class_names, self.info.metadata["class_pixels"]
    absent = [names[i] for i, number in enumerate(pixels[split][:-1]) if not number]
    if len(absent) == len(names):
      logging.warning("prepare %s: no pixel of the label files has a class", split)
    elif absent:
      logging.warning(
        "prepare %s: no label file has a pixel of %d of %d classes: %s",
        *(split, len(absent), len(names), listed(absent)),
      )
    if len(names) <= 2:
      self._check_two_values(f"split {split}", np.array(pixels[split]))
    if set(pixels) == set(self._splits):
      self._check_two_values("all splits", np.sum(list(pixels.values()), axis=0))

  def _check_two_values(self, where: str, pixels: np.ndarray) -> None:
    """Raises UserError if all pixels that have a class have the same one, and the others are void."""
    present = np.flatnonzero(pixels[:-1])
    if len(present) != 1 or not pixels[-1]:
      return
    names, class_of_id = self._layout.class_names, self._layout.class_of_id
    numbers = {class_: number for number, class_ in class_of_id.items()}
    void = listed([str(number) for number, class_ in class_of_id.items() if class_ == VOID])
    others = [numbers[i] for i in range(len(names)) if i != present[0]]
    advice = (
      f"write {others[0]} instead" if others else "write 0 and 1, with data.builder.num_classes=2"
    )
    raise UserError(
      f"{self.source}: the label files of {where} have no class but {numbers[present[0]]} "
      f"({quoted(names[present[0]])}); their other pixels, {100 * pixels[-1] / pixels.sum():.0f}%, are "
      f"void ({void}) and would be ignored; if they are a second class, {advice}"
    )

  def changed_files(self, notes: Mapping[str, Any], *, moved: bool) -> list[str]:
    """See `inputs.Builder.changed_files`.

    Raises:
      UserError: a folder or list is missing in another source than the one that was prepared.
    """
    found: list[str] = []
    for split in self._splits:
      try:
        pairs = self._layout.pairs(pathlib.Path(self.source), split)
      except UserError as error:
        if moved:
          raise
        inputs.warn_once(f"{error}; the records of split {split} are used nevertheless")
        continue
      for kind, files in zip(("images", "labels"), zip(*pairs, strict=True), strict=False):
        paths = {self._name(file): file for file in files}
        found += inputs.changed_files(notes[split][kind], paths, sample=kind == "images")
      if not pairs:
        found.append(f"split {split} has no image any more")
    return found

  def _name(self, file: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(file, self.source)).as_posix()


def _encode(
  image_file: pathlib.Path,
  label_file: pathlib.Path,
  image_id: int,
  layout: Layout,
  exif: ExifChoice,
) -> tuple[dict, np.ndarray]:
  """Returns an image in the form of `label_map.features()`, and its label map, uint8 [H, W]."""
  if not is_storable_text(image_file.name):
    raise BadRecordError(
      "file name has a character that no file name has, or is not UTF-8",
      quoted(image_file.name),
      image_file.parent,
    )
  image = _read(image_file, "image cannot be read")
  try:
    picture = decode_picture(image, exif=exif.exif)
  except ValueError as error:
    raise BadRecordError("image is broken", str(error), image_file) from error
  ids_HW = _read_ids(label_file, picture, image_file, exif)
  label_HW = _classes(ids_HW, layout.class_of_id, label_file)
  example = {
    "image": bytes_for_record(image, picture),
    "image_id": image_id,
    "file_name": image_file.name,
    "height": picture.size[0],
    "width": picture.size[1],
    "label": encode_png(label_HW),
  }
  return example, label_HW


def _read_ids(
  file: pathlib.Path, picture: Picture, image_file: pathlib.Path, exif: ExifChoice
) -> np.ndarray:
  """Returns the numbers in the label file of a picture, uint8."""
  png = _read(file, "labels cannot be read")
  try:
    ids_HW, orientation = label_map.decode_turned_ids(png, exif=exif.exif)
  except ValueError as error:
    raise BadRecordError("labels are unusable", str(error), file) from error
  size = ids_HW.shape[0], ids_HW.shape[1]
  fits_other = other_size(size, orientation) == picture.other_size
  turned = (orientation, file) if picture.orientation == 1 else (picture.orientation, image_file)
  if size != picture.size:
    detail = "{}x{} (height x width), but the image is {}x{}".format(*size, *picture.size)
    if fits_other:
      raise BadRecordError(
        f"labels have the size of their image with data.exif={exif.other!r} only",
        f"{detail}; {exif.hint(*turned)}",
        file,
      )
    raise BadRecordError("labels are not of the size of their image", detail, file)
  if fits_other and picture.orientation != orientation:
    exif.log_assumption(*turned)
  return ids_HW


def _classes(ids_HW: np.ndarray, class_of_id: Mapping[int, int], file: pathlib.Path) -> np.ndarray:
  """Returns the numbers of a label file as classes and `VOID`, uint8 [H, W]."""
  unknown = sorted(set(np.unique(ids_HW).tolist()) - set(class_of_id))
  if unknown:
    raise BadRecordError("labels are out of range", f"{unknown[:8]} belong to no class", file)
  table = np.full(256, VOID, np.uint8)
  table[list(class_of_id)] = list(class_of_id.values())
  return table[ids_HW]


def _read(file: pathlib.Path, kind: str) -> bytes:
  try:
    return read_bytes(file)
  except OSError as error:
    raise BadRecordError(kind, error.strerror or str(error), file) from error
