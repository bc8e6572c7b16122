"""Image files: decoding them to RGB arrays, and writing arrays as PNG."""

import io
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageOps

from fpt_jax.errors import UserError, one_line

# Endings of file names, in lower case. Images are found in the folders of a data set and in those
# that predictions are made for; the two lists differ, since a data set's records keep the files'
# bytes and TFDS knows JPEG and PNG only.
DATASET_ENDINGS = (".jpg", ".jpeg", ".png")
PREDICTION_ENDINGS = (*DATASET_ENDINGS, ".bmp", ".webp")


def decode_image(data: bytes, *, upright: bool = False) -> np.ndarray:
  """Decodes an image file.

  Args:
    data: bytes of an image file, in colour, grey, CMYK or with a palette, 8 bits per channel.
    upright: whether to rotate the image as the camera's orientation tag says.

  Returns:
    uint8 RGB, [height, width, 3].

  Raises:
    ValueError: the bytes are not a complete image, or have more than 8 bits per channel.
  """
  try:
    with PIL.Image.open(io.BytesIO(data)) as file:
      if file.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {file.mode}, but 8 bits per channel are needed")
      image = PIL.ImageOps.exif_transpose(file) if upright else file
      # converting an image that is RGB already would copy it
      return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
  except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
    raise ValueError(f"undecodable image: {one_line(error)}") from error


def read_image(path: pathlib.Path) -> np.ndarray:
  """Reads a user's image file.

  Args:
    path: the file.

  Returns:
    uint8 RGB, [height, width, 3], upright as the camera's orientation tag says.

  Raises:
    UserError: the file cannot be read, or is not a complete image.
  """
  try:
    return decode_image(path.read_bytes(), upright=True)
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path} is not a readable image ({one_line(error)}); replace it, or skip such files with "
      "--config.data.skip_bad"
    ) from error


def encode_png(pixels: np.ndarray) -> bytes:
  """Returns a uint8 array as a PNG file: RGB [height, width, 3], or a label map [height, width]."""
  png = io.BytesIO()
  PIL.Image.fromarray(pixels).save(png, "PNG")
  return png.getvalue()
