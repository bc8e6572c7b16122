"""The record of an image and its label map: one layout, whatever the data set.

H W rows and columns of the image file. A class is 0..num_classes-1, `VOID` is no class.
"""

import dataclasses
import io

import numpy as np
import PIL.Image
import tensorflow as tf
import tensorflow_datasets as tfds

VOID = 255
_PNG_END = b"IEND\xaeB`\x82"


@dataclasses.dataclass(frozen=True)
class LabelRecord:
  """A parsed record.

  Attributes:
    image: the bytes of the image file.
    image_id: the image's number in the prepared data set, 1, 2, ... over all splits.
    file_name: name of the image file.
    size: (height, width) of the image file.
    label: bytes of a grey 8-bit PNG of that size, of classes and `VOID`.
  """

  image: bytes
  image_id: int
  file_name: str
  size: tuple[int, int]
  label: bytes


def features() -> tfds.features.FeaturesDict:
  """Returns the TFDS features of a record, see `LabelRecord`."""
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "image_id": np.int64,
      "file_name": tfds.features.Text(),
      "height": np.int32,
      "width": np.int32,
      "label": tfds.features.Image(shape=(None, None, 1)),
    }
  )


def parse(serialized: bytes) -> LabelRecord:
  """Parses a record without decoding its image or label map.

  Args:
    serialized: what the ArrayRecord file holds.

  Raises:
    ValueError: the bytes are no record.
  """
  try:
    feature = tf.train.Example.FromString(serialized).features.feature
    image, file_name, label = (
      feature[key].bytes_list.value[0] for key in ("image", "file_name", "label")
    )
    image_id, height, width = (
      feature[key].int64_list.value[0] for key in ("image_id", "height", "width")
    )
  except Exception as error:  # protobuf raises a class of its own in each implementation
    raise ValueError(f"not a record of images and label maps ({error})") from error
  return LabelRecord(image, image_id, file_name.decode(), (height, width), label)


def encode_label(label_HW: np.ndarray) -> bytes:
  """Returns a uint8 label map as PNG, which loses nothing."""
  png = io.BytesIO()
  PIL.Image.fromarray(label_HW).save(png, "PNG")
  return png.getvalue()


def decode_ids(png: bytes) -> np.ndarray:
  """Reads the numbers that a PNG of labels holds, whatever its palette shows.

  Args:
    png: bytes of a PNG with one channel of at most 8 bits, or with a palette.

  Returns:
    uint8 [H, W].

  Raises:
    ValueError: the bytes are no whole PNG, hold colours, or more than 8 bits a pixel.
  """
  try:
    with PIL.Image.open(io.BytesIO(png)) as image:
      if image.format != "PNG":
        raise ValueError(f"labels must be a PNG, this is {image.format}")
      if _PNG_END not in png:  # Pillow is content when the last pixel is there
        raise ValueError("the file is truncated")
      if image.mode.startswith("I"):
        raise ValueError("16 bits a pixel, labels must have 8")
      if image.mode not in ("1", "L", "P"):
        raise ValueError(f"a PNG of colours ({image.mode}), labels must be one number a pixel")
      ids_HW = np.array(image, np.uint8)
      # Pillow stretches greys of fewer bits to 0..255; byte 24 of a PNG is the bits a pixel
      return ids_HW // (255 // (2 ** png[24] - 1)) if image.mode == "L" else ids_HW
  except (OSError, SyntaxError, IndexError, PIL.Image.DecompressionBombError) as error:
    reason = str(error).replace("\n", " ")
    raise ValueError(f"undecodable: {reason}") from error
