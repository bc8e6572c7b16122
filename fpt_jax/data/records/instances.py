"""The record of an image and its instances: one layout, whatever the data set.

G ground truths (instances), m = `BITMAP` pixels along the side of an instance's bitmap.
"""

import dataclasses
import io
import json

import numpy as np
import PIL.Image
import tensorflow as tf
import tensorflow_datasets as tfds

from fpt_jax.ops import masks

BITMAP = 112


@dataclasses.dataclass(frozen=True)
class Record:
  """A parsed record; boxes are (x0, y0, x1, y1) in pixels of the image file.

  Attributes:
    image: the bytes of the image file.
    image_id: the data set's own id.
    file_name: name of the image file inside its folder.
    size: (height, width) of the image file.
    boxes: float32, [G, 4].
    labels: int32 in 1..num_classes, [G].
    crowd: bool, [G], a region of many instances, never trained on.
    annotation_ids: int64, [G].
    annotations: JSON of `segmentation`, `bbox` and `area` as the annotation file has them.
    bitmaps: bits of the m x m masks relative to the boxes, packed; see `unpack_bitmaps`.
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
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "image_id": np.int64,
      "file_name": tfds.features.Text(),
      "height": np.int32,
      "width": np.int32,
      "objects": tfds.features.Sequence(
        {
          "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
          "label": np.int32,
          "is_crowd": np.bool_,
          "area": np.float32,
          "id": np.int64,
          # float32 would not give the annotation file's numbers back
          "annotation": tfds.features.Text(),
          "bitmap": tfds.features.Text(),
        }
      ),
    }
  )


def ordered_key(index: int, count: int) -> int:
  """Returns the TFDS key of the record at `index` of at most `count`.

  Records are written in the order of their keys. TFDS sorts large splits in a thousand parts of the
  128-bit range of keys, one part in memory at a time: the keys must fill that range evenly.
  """
  return index * (2**128 // count)


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
) -> dict:
  """Returns an instance in the form of `features()["objects"]`.

  Args:
    label: in 1..num_classes.
    annotation_id: the data set's own id.
    is_crowd: whether the annotation is of a crowd.
    box: (x0, y0, x1, y1) clipped to the image.
    bbox_xywh: COCO's box, as the annotation file has it.
    area: in pixels.
    segmentation: polygons or run lengths, as the annotation file has them.
    bitmap_mm: uint8 0/1, the mask relative to `box`.
  """
  annotation = {"segmentation": segmentation, "bbox": bbox_xywh, "area": area}
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
    serialized: what the ArrayRecord file holds.

  Raises:
    ValueError: the bytes are no record.
  """
  try:
    feature = tf.train.Example.FromString(serialized).features.feature
    (image,), (file_name,) = (feature[key].bytes_list.value for key in ("image", "file_name"))
    (image_id,), (height,), (width,) = (
      feature[key].int64_list.value for key in ("image_id", "height", "width")
    )
  except Exception as error:  # protobuf raises a class of its own in each implementation
    raise ValueError(f"not a record of fpt_jax.data ({error})") from error

  def ints(key: str, dtype: type) -> np.ndarray:
    return np.array(feature["objects/" + key].int64_list.value, dtype)

  return Record(
    image=image,
    image_id=image_id,
    file_name=file_name.decode(),
    size=(height, width),
    boxes=np.array(feature["objects/bbox"].float_list.value, np.float32).reshape(-1, 4),
    labels=ints("label", np.int32),
    crowd=ints("is_crowd", bool),
    annotation_ids=ints("id", np.int64),
    annotations=list(feature["objects/annotation"].bytes_list.value),
    bitmaps=list(feature["objects/bitmap"].bytes_list.value),
  )


def decode_annotation(annotation: bytes) -> dict:
  """Returns an annotation's `segmentation`, `bbox` and `area` as the annotation file has them."""
  return json.loads(annotation)


def unpack_bitmaps(bitmaps: list[bytes]) -> np.ndarray:
  """Returns uint8 0/1 masks of shape [G, m, m] from packed bits."""
  packed = np.frombuffer(b"".join(bitmaps), np.uint8)
  return np.unpackbits(packed).reshape(len(bitmaps), BITMAP, BITMAP)


def decode_image(data: bytes) -> np.ndarray:
  """Decodes an image file.

  Args:
    data: bytes of a JPEG or PNG file, in colour, grey, CMYK or with a palette.

  Returns:
    uint8 RGB, [height, width, 3].

  Raises:
    ValueError: the bytes are no whole image.
  """
  try:
    with PIL.Image.open(io.BytesIO(data)) as image:
      if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode}, 8 bits a channel are needed")
      # converting what is RGB already would copy it
      return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
  except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
    reason = str(error).replace("\n", " ")
    raise ValueError(f"undecodable image: {reason}") from error


def draw_bitmap(
  segmentation: list | dict, box: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
  """Draws an instance's bitmap: the mask seen through its box.

  Args:
    segmentation: polygons in pixels, or run lengths over the whole image.
    box: (x0, y0, x1, y1) in pixels.
    size: (height, width) of the image.

  Returns:
    uint8 0/1, [m, m]; empty where the box is.
  """
  x0, y0, x1, y1 = box
  if x1 <= x0 or y1 <= y0:
    return np.zeros((BITMAP, BITMAP), np.uint8)
  return masks.box_bitmap(segmentation, np.asarray(box), *size, BITMAP)
