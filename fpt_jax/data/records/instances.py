"""The record of an image and its instances, the same for all data sets.

G ground truths (instances), m = `BITMAP` pixels along each side of an instance's bitmap.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from etils import epy

from fpt_jax.data.records.examples import image_features, parse_example
from fpt_jax.ops import masks

with epy.lazy_imports():
  import tensorflow_datasets as tfds

BITMAP = 112


@dataclasses.dataclass(frozen=True)
class Record:
  """A parsed record; boxes are (x0, y0, x1, y1) in pixels of the image file.

  Attributes:
    image: bytes of the image file.
    image_id: id of the image in the data set.
    file_name: name of the image file inside its folder.
    size: (height, width) of the image file.
    boxes: float32 [G, 4].
    labels: int32 [G], 1..num_classes.
    crowd: bool [G], True for a region of many instances, which is never trained on.
    annotation_ids: int64 [G], ids of the annotations in the data set.
    annotations: JSON of `segmentation`, `bbox` and `area` as in the annotation file, and of any further
      fields, [G].
    bitmaps: packed bits of the m x m masks relative to the boxes, [G]; see `unpack_bitmaps`.
  """

  image: bytes
  image_id: int
  file_name: str
  size: tuple[int, int]
  boxes: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray
  annotation_ids: np.ndarray
  annotations: list[bytes]
  bitmaps: list[bytes]


def features() -> tfds.features.FeaturesDict:
  """Returns the TFDS features of a record, see `Record`."""
  objects = {
    "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
    "label": np.int32,
    "is_crowd": np.bool_,
    "area": np.float32,
    "id": np.int64,
    # float32 would not preserve the numbers of the annotation file
    "annotation": tfds.features.Text(),
    "bitmap": tfds.features.Text(),
  }
  return tfds.features.FeaturesDict(image_features() | {"objects": tfds.features.Sequence(objects)})


def encode_object(
  *,
  label: int,
  annotation_id: int,
  is_crowd: bool,
  box: tuple[float, float, float, float],
  bbox_xywh: list[float],
  area: float,
  segmentation: list | dict,
  bitmap_mm: np.ndarray,
  extra: Mapping[str, object] | None = None,
) -> dict:
  """Returns an instance in the form of `features()["objects"]`.

  Args:
    label: class, 1..num_classes.
    annotation_id: id of the annotation in the data set.
    is_crowd: whether the annotation is of a crowd.
    box: (x0, y0, x1, y1) in pixels, clipped to the image.
    bbox_xywh: COCO's box (x, y, width, height) in pixels, as in the annotation file.
    area: number of pixels, as in the annotation file.
    segmentation: polygons or run lengths, as in the annotation file.
    bitmap_mm: mask relative to `box`, uint8 0/1.
    extra: further fields of the annotation, of any type that JSON has.
  """
  annotation = {"segmentation": segmentation, "bbox": bbox_xywh, "area": area, **(extra or {})}
  return {
    "bbox": np.asarray(box, np.float32),
    "label": label,
    "is_crowd": is_crowd,
    "area": area,
    "id": annotation_id,
    "annotation": json.dumps(annotation, separators=(",", ":")),
    "bitmap": np.packbits(bitmap_mm).tobytes(),
  }


def parse(serialized: bytes) -> Record:
  """Parses a record without decoding its image.

  Args:
    serialized: bytes of the record in the ArrayRecord file.

  Raises:
    ValueError: the bytes are not such a record.
  """
  values, feature = parse_example(serialized)

  def ints(key: str, dtype: type) -> np.ndarray:
    return np.array(feature["objects/" + key].int64_list.value, dtype)

  return Record(
    **values,
    boxes=np.array(feature["objects/bbox"].float_list.value, np.float32).reshape(-1, 4),
    labels=ints("label", np.int32),
    crowd=ints("is_crowd", bool),
    annotation_ids=ints("id", np.int64),
    annotations=list(feature["objects/annotation"].bytes_list.value),
    bitmaps=list(feature["objects/bitmap"].bytes_list.value),
  )


def decode_annotation(annotation: bytes) -> dict:
  """Returns an annotation's `segmentation`, `bbox`, `area` and further fields, see `encode_object`."""
  return json.loads(annotation)


def unpack_bitmaps(bitmaps: list[bytes]) -> np.ndarray:
  """Returns uint8 0/1 masks of shape [G, m, m] from packed bits."""
  packed = np.frombuffer(b"".join(bitmaps), np.uint8)
  return np.unpackbits(packed).reshape(len(bitmaps), BITMAP, BITMAP)


def draw_bitmap(
  segmentation: list | dict, box: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
  """Draws an instance's bitmap: the part of its mask inside its box, resampled to m x m.

  Args:
    segmentation: polygons in pixels, or run lengths over the whole image.
    box: (x0, y0, x1, y1) in pixels.
    size: (height, width) of the image in pixels.

  Returns:
    uint8 0/1, [m, m]; zeros if the box is empty.
  """
  x0, y0, x1, y1 = box
  if x1 <= x0 or y1 <= y0:
    return np.zeros((BITMAP, BITMAP), np.uint8)
  return masks.box_bitmap(segmentation, np.asarray(box), *size, BITMAP)
