"""Image files: finding them in folders, decoding them to RGB arrays, and writing arrays as PNG.

H W rows and columns of the decoded image.

The EXIF data of a photo say how the camera was held. `exif`, the value of `config.data.exif`, says what
to do with them: "apply" turns the pixels upright, "ignore" leaves them as they are stored.
"""

import collections
import dataclasses
import errno
import io
import pathlib
import stat

import numpy as np
import PIL.ExifTags
import PIL.Image
from absl import logging

from fpt_jax.errors import UserError, first_of, one_line

EXIF = ("apply", "ignore")
# The formats that are read. Pillow also identifies documents, scientific data and videos, some of which
# it gives to other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "TGA", "JPEG2000", "AVIF")
# endings of their file names, in lower case
ENDINGS = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff",
  ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif",
)  # fmt: skip
# TFDS itself decodes these; files of other formats become PNG in records.
_KEPT = ("JPEG", "MPO", "PNG")  # MPO: a JPEG with further pictures behind it, as phones write
_NAMED = 5  # sub-folders that the log names; all of them are counted

_Turn = PIL.Image.Transpose
# what turns stored pixels upright, and what turns them back, by the value of EXIF's orientation
_TURNS = {
  2: (_Turn.FLIP_LEFT_RIGHT, _Turn.FLIP_LEFT_RIGHT),
  3: (_Turn.ROTATE_180, _Turn.ROTATE_180),
  4: (_Turn.FLIP_TOP_BOTTOM, _Turn.FLIP_TOP_BOTTOM),
  5: (_Turn.TRANSPOSE, _Turn.TRANSPOSE),
  6: (_Turn.ROTATE_270, _Turn.ROTATE_90),
  7: (_Turn.TRANSVERSE, _Turn.TRANSVERSE),
  8: (_Turn.ROTATE_90, _Turn.ROTATE_270),
}
_SIDEWAYS = (5, 6, 7, 8)


@dataclasses.dataclass(frozen=True)
class Picture:
  """A decoded image file.

  Attributes:
    pixels_HWC: uint8 RGB.
    orientation: EXIF's orientation of the stored pixels, 1 (upright) to 8; 1 if the file has none.
    format: Pillow's name of the file's format, such as "JPEG".
  """

  pixels_HWC: np.ndarray
  orientation: int
  format: str

  @property
  def size(self) -> tuple[int, int]:
    """(height, width) of the decoded image."""
    height, width, _ = self.pixels_HWC.shape
    return height, width

  @property
  def other_size(self) -> tuple[int, int]:
    """(height, width) with the other value of `exif`."""
    return other_size(self.size, self.orientation)


def other_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
  """Returns the (height, width) of an image of `size` with the other value of `exif`."""
  return size[::-1] if orientation in _SIDEWAYS else size


def decode_picture(data: bytes, *, exif: str = "apply") -> Picture:
  """Decodes an image file; of several frames, the first.

  Grey, palettes, CMYK and 1 bit per pixel become RGB. Transparency is dropped. Colours of 16 bits per
  channel are reduced to 8.

  Args:
    data: bytes of an image file of one of `FORMATS`.
    exif: "apply" or "ignore". Damaged EXIF data are as none.

  Raises:
    ValueError: the bytes are not a complete image, or have one channel of more than 8 bits, whose range
      is unknown. The message is one line.
  """
  try:
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
      if image.mode.startswith(("I", "F")):
        raise ValueError(
          f"pixels of mode {image.mode}, but 8 bits per channel are needed; convert the file"
        )
      turned, orientation = load_turned(image, exif)
      return Picture(_as_rgb(turned), orientation, image.format or "")
  except Exception as error:  # Pillow raises many classes for damaged files
    raise ValueError(f"undecodable image: {describe(error)}") from error


def decode_image(data: bytes, *, exif: str = "apply") -> np.ndarray:
  """Returns the pixels of an image file, uint8 RGB [H, W, 3]; see `decode_picture`."""
  return decode_picture(data, exif=exif).pixels_HWC


def _as_rgb(image: PIL.Image.Image) -> np.ndarray:
  """Converts a loaded image to uint8 RGB [H, W, 3]."""
  # Pillow would convert the transparent colour too, which not every palette has room for
  image.info.pop("transparency", None)
  if image.mode in ("La", "RGBa"):  # colours that are multiplied by their opacity
    image = image.convert("LA" if image.mode == "La" else "RGBA")
  # converting an image that is RGB already would copy it
  return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def load_turned(image: PIL.Image.Image, exif: str) -> tuple[PIL.Image.Image, int]:
  """Loads the pixels of an opened image, upright or as they are stored.

  Args:
    image: an image that Pillow has opened.
    exif: "apply" or "ignore".

  Returns:
    The image, and EXIF's orientation of its stored pixels, 1 to 8.
  """
  if exif not in EXIF:
    raise ValueError(f"expected exif to be one of {EXIF}, got {exif!r}")
  is_tiff = image.format == "TIFF"
  if not is_tiff:
    image.load()  # before its orientation is read: a PNG's EXIF data may follow its pixels
  orientation = _orientation(image)
  image.load()  # after it: Pillow turns a TIFF upright here, and forgets its orientation
  if orientation == 1 or is_tiff == (exif == "apply"):
    return image, orientation
  upright, stored = _TURNS[orientation]
  return image.transpose(stored if is_tiff else upright), orientation


def _orientation(image: PIL.Image.Image) -> int:
  """Returns EXIF's orientation of an image, 1 if it has none or its EXIF data are damaged."""
  try:
    value = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
  except Exception:  # Pillow raises many classes for damaged EXIF data
    return 1
  return value if isinstance(value, int) and value in _TURNS else 1


def describe(error: Exception) -> str:
  """Returns an error of Pillow in one line."""
  if isinstance(error, PIL.UnidentifiedImageError):
    return "no image of a known format"  # Pillow names the buffer in memory
  return one_line(error) or type(error).__name__


def bytes_for_record(data: bytes, picture: Picture) -> bytes:
  """Returns the bytes that a record keeps: those of a JPEG or PNG file, else the pixels as PNG."""
  return data if picture.format in _KEPT else encode_png(picture.pixels_HWC)


def read_bytes(path: pathlib.Path) -> bytes:
  """Reads a file.

  Raises:
    OSError: the file cannot be read, or is not a regular file: reading a named pipe would wait forever.
  """
  if not stat.S_ISREG(path.stat().st_mode):
    raise OSError(errno.EINVAL, "not a regular file")
  return path.read_bytes()


def read_image(path: pathlib.Path, *, exif: str = "apply") -> np.ndarray:
  """Reads a user's image file.

  Args:
    path: the file.
    exif: "apply" or "ignore".

  Returns:
    uint8 RGB, [H, W, 3].

  Raises:
    UserError: the file cannot be read, or is not a complete image.
  """
  try:
    return decode_image(read_bytes(path), exif=exif)
  except (OSError, ValueError) as error:
    reason = error.strerror if isinstance(error, OSError) else None
    raise UserError(
      f"{path} is not a readable image ({one_line(reason or error)}); replace it, or skip such files "
      "with --config.data.skip_bad"
    ) from error


def read_size(path: pathlib.Path, *, exif: str = "apply") -> tuple[tuple[int, int], int]:
  """Reads the size of an image file; of most formats, the pixels are not decoded.

  Args:
    path: the file.
    exif: "apply" or "ignore".

  Returns:
    (height, width) of `decode_picture`, and EXIF's orientation of the stored pixels, 1 to 8.

  Raises:
    OSError: the file cannot be read, or is not a regular file.
    ValueError: it is not an image. The message is one line.
  """
  if not stat.S_ISREG(path.stat().st_mode):
    raise OSError(errno.EINVAL, "not a regular file")
  try:
    with PIL.Image.open(path, formats=FORMATS) as image:
      if image.format == "TIFF":  # Pillow's size is that of neither before the pixels are loaded
        turned, orientation = load_turned(image, exif)
        return (turned.height, turned.width), orientation
      orientation = _orientation(image)
      size = image.height, image.width
      return other_size(size, orientation) if exif == "apply" else size, orientation
  except Exception as error:  # Pillow raises many classes for damaged files
    raise ValueError(f"undecodable image: {describe(error)}") from error


def list_images(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the images in a folder, sorted by name; one line of the log counts what is passed over.

  An image has one of `ENDINGS`, in upper or lower case. Hidden files, such as macOS's "._x.jpg", and
  sub-folders are passed over.

  Raises:
    UserError: the folder cannot be listed.
  """
  try:
    paths = sorted(folder.iterdir())
  except OSError as error:
    raise UserError(
      f"{folder}: cannot be listed ({error.strerror}); see its permissions"
    ) from error
  found, folders = [], []
  others: collections.Counter[str] = collections.Counter()
  for path in paths:
    if path.name.startswith("."):
      others["hidden"] += 1
    elif path.is_dir():
      folders.append(path.name)
    elif path.suffix.lower() in ENDINGS:
      found.append(path)
    else:
      others[path.suffix.lower() or "without ending"] += 1
  passed = [f"{count} {ending}" for ending, count in sorted(others.items())]
  if folders:
    passed.append(f"the sub-folders {first_of(list(map(repr, folders)), _NAMED)}")
  if passed:
    logging.warning("%s: %d images; passed over: %s", folder, len(found), ", ".join(passed))
  return found


def encode_png(pixels: np.ndarray) -> bytes:
  """Returns a uint8 array as a PNG file: RGB [height, width, 3], or a label map [height, width]."""
  png = io.BytesIO()
  PIL.Image.fromarray(pixels).save(png, "PNG")
  return png.getvalue()
