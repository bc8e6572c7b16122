"""The record of an image and its label map, the same for all data sets.

H W rows and columns of the image file. Classes are 0..num_classes-1; `VOID` marks unlabelled pixels.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import PIL.Image
from etils import epy

from fpt_jax.data.records.examples import image_features, parse_example
from fpt_jax.data.records.images import FORMATS, describe, load_turned

with epy.lazy_imports():
  import tensorflow_datasets as tfds

VOID = 255
_PNG_END = b"IEND\xaeB`\x82"


@dataclasses.dataclass(frozen=True)
class LabelRecord:
  """A parsed record.

  Attributes:
    image: bytes of the image file.
    image_id: number of the image in the prepared data set, 1, 2, ... over all splits.
    file_name: name of the image file.
    size: (height, width) of the image file.
    label: bytes of a grey 8-bit PNG of that size that holds classes and `VOID`.
  """

  image: bytes
  image_id: int
  file_name: str
  size: tuple[int, int]
  label: bytes


def features() -> tfds.features.FeaturesDict:
  """Returns the TFDS features of a record, see `LabelRecord`."""
  return tfds.features.FeaturesDict(
    image_features() | {"label": tfds.features.Image(shape=(None, None, 1))}
  )


def parse(serialized: bytes) -> LabelRecord:
  """Parses a record without decoding its image or label map.

  Args:
    serialized: bytes of the record in the ArrayRecord file.

  Raises:
    ValueError: the bytes are not such a record.
  """
  values, _ = parse_example(serialized, ("label",))
  return LabelRecord(**values)


def decode(record: LabelRecord) -> np.ndarray:
  """Returns a record's label map, uint8 [H, W].

  Raises:
    ValueError: it cannot be decoded, or has another size than the image.
  """
  label_HW = decode_ids(record.label)
  if label_HW.shape != record.size:
    raise ValueError(f"the label map has size {label_HW.shape}, the image {record.size}")
  return label_HW


def decode_ids(png: bytes) -> np.ndarray:
  """Returns the numbers in a PNG of labels, uint8 [H, W]; see `decode_turned_ids`."""
  return decode_turned_ids(png, exif="apply")[0]


def decode_turned_ids(png: bytes, *, exif: str) -> tuple[np.ndarray, int]:
  """Reads the numbers in a PNG of labels; a palette is ignored.

  Args:
    png: bytes of a PNG with one channel of at most 8 bits, or with a palette.
    exif: "apply" to turn the labels as their EXIF data say, or "ignore".

  Returns:
    uint8 [H, W], and EXIF's orientation of the stored labels, 1 (upright) to 8.

  Raises:
    ValueError: the bytes are not a complete PNG, or have several channels or more than 8 bits per
      pixel.
  """
  try:
    with PIL.Image.open(io.BytesIO(png), formats=FORMATS) as image:
      problem = _problem(image, png)
      if not problem:
        turned, orientation = load_turned(image, exif)
        ids_HW = np.array(turned, np.uint8)
        if image.mode == "L":
          # Pillow stretches greys of fewer bits to 0..255; byte 24 of a PNG is the bits per pixel
          ids_HW //= 255 // (2 ** png[24] - 1)
        return ids_HW, orientation
  except Exception as error:  # Pillow raises many classes for damaged files
    raise ValueError(f"undecodable: {describe(error)}") from error
  raise ValueError(problem)


def _problem(image: PIL.Image.Image, png: bytes) -> str:
  """Returns why an opened image cannot be labels; "" if it can."""
  if image.format != "PNG":
    return f"labels must be a PNG, this is {image.format}"
  if _PNG_END not in png:  # Pillow accepts a file that ends after the last pixel
    return "the file is truncated"
  if image.mode.startswith("I"):
    return "16 bits per pixel, labels must have 8"
  if image.mode not in ("1", "L", "P"):
    return f"a colour PNG ({image.mode}), labels must be one number per pixel"
  return ""
