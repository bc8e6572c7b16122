"""What a format has to give: how its files are found, and the shapes that were drawn around objects."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from fpt_jax.data.datasets.checks import BadRecordError, BadRecords, quoted
from fpt_jax.data.datasets.formats.files import Item, Pairs, Source
from fpt_jax.ops import masks

Size = tuple[int, int]  # height and width of an image, pixels
_MOST_PIXELS = 2**28  # Pillow refuses to decode larger images


@dataclasses.dataclass(frozen=True)
class Shape:
  """What was drawn around an object, or a part of it.

  Attributes:
    name: class of the object.
    place: file and line, for messages.
    segmentation: polygons in pixels, or run lengths, as in COCO's format.
    is_box: whether a box was drawn; its segmentation is the outline.
    is_crowd: whether the object is neither trained on nor scored.
    group: shapes of an image with the same group and class are one object; None: an object of its own.
  """

  name: str
  place: str
  segmentation: list[list[float]] | dict
  is_box: bool = False
  is_crowd: bool = False
  group: object = None


@dataclasses.dataclass(frozen=True)
class Parsed:
  """The content of a label file.

  Attributes:
    size: height and width of its image in pixels.
    shapes: what was drawn.
  """

  size: Size
  shapes: list[Shape]


@dataclasses.dataclass(frozen=True)
class Format:
  """How a format is read.

  Attributes:
    find: function of `data.source` and `data.builder.splits` (None if it is unset) that returns the files
      of each split. It raises UserError if files or folders are missing.
    parse: function of an image with a label file, the names of the classes (None if no file has them), a
      function that returns the size of the image file, and the bad records, in whose contexts it reads
      single objects. It raises BadRecordError if the whole label file is bad.
    first_id: category id of the first class.
    boxes_are_masks: whether a box beside polygons is the mask of its object; otherwise it has none.
  """

  find: Callable[[pathlib.Path, Pairs | None], Source]
  parse: Callable[[Item, Sequence[str] | None, Callable[[], Size], BadRecords], Parsed]
  first_id: int = 1
  boxes_are_masks: bool = False


def box_outline(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
  """Returns a box as one polygon."""
  return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def placed_mask(inside_hw: np.ndarray, x: int, y: int, size: Size) -> dict:
  """Returns a mask that is given inside a rectangle as COCO's run lengths of the whole image.

  Args:
    inside_hw: the pixels in the rectangle, bool.
    x, y: its first column and row.
    size: (height, width) of the image.

  Raises:
    BadRecordError: the rectangle is empty or extends beyond the image.
  """
  h, w = inside_hw.shape
  check_inside(x, y, w, h, size)
  mask_HW = np.zeros(size, bool)
  mask_HW[y : y + h, x : x + w] = inside_hw
  return masks.encode_rle(mask_HW)


def check_inside(x: int, y: int, width: int, height: int, size: Size) -> None:
  """Raises BadRecordError if the rectangle of a mask is empty or extends beyond an image of `size`."""
  if min(x, y) < 0 or min(width, height) < 1 or y + height > size[0] or x + width > size[1]:
    raise BadRecordError(
      "mask lies outside the image",
      f"{width} x {height} pixels at {x}, {y} of {size[1]} x {size[0]}",
    )


def number(text: object, what: str, where: object = "") -> float:
  """Returns a number of a file.

  Raises:
    BadRecordError: it is not a finite number.
  """
  try:
    value = math.nan if isinstance(text, bool) else float(text)  # type: ignore[arg-type]
  except (TypeError, ValueError, OverflowError):
    value = math.nan
  if not math.isfinite(value):
    raise BadRecordError(f"{what} is not a finite number", quoted(text), where)
  return value


def image_size(height: float, width: float, where: object = "") -> Size:
  """Returns the size that a label file gives for its image.

  Raises:
    BadRecordError: they are not whole numbers of pixels, or of more than an image file can have.
  """
  if not all(side >= 1 and side == int(side) for side in (height, width)):
    raise BadRecordError(
      "height and width are not numbers of pixels", f"{height:g} and {width:g}", where
    )
  if height * width > _MOST_PIXELS:
    raise BadRecordError("image is too large", f"{height:g} x {width:g} pixels", where)
  return int(height), int(width)


def ellipse_outline(
  center: tuple[float, float], radii: tuple[float, float], angle: float = 0.0
) -> list[float]:
  """Returns an ellipse as a polygon of 64 points on it; its area is 0.2 % smaller.

  Args:
    center: x and y in pixels.
    radii: the semi-axes along x and y, before the rotation, in pixels.
    angle: degrees, clockwise in the image.
  """
  t_P = np.arange(64) * (2 * np.pi / 64)
  points_P2 = np.stack([radii[0] * np.cos(t_P), radii[1] * np.sin(t_P)], -1)
  return rotated(points_P2, center, angle)


def rotated(points_P2: np.ndarray, center: tuple[float, float], angle: float) -> list[float]:
  """Returns points relative to a centre, rotated by degrees clockwise in the image, as [x0, y0, ...]."""
  radians = math.radians(angle)
  turn_22 = np.array(
    [[math.cos(radians), math.sin(radians)], [-math.sin(radians), math.cos(radians)]]
  )
  return (points_P2 @ turn_22 + np.asarray(center)).ravel().tolist()
