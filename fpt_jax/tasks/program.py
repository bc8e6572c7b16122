"""A model as one function of an image file's pixels, see `fpt_jax.export`.

Shapes: B images, H W rows and columns of an image.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fpt_jax.data.transforms import round_up
from fpt_jax.errors import UserError
from fpt_jax.models.feature_map import valid_positions
from fpt_jax.models.state import Arrays
from fpt_jax.ops.resize import resized, rounding_limits, scaled_edge

LONGEST_EDGE = 16384  # pixels of an image

Difference = Callable[[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]], float]


class Limit(NamedTuple):
  """A limit of the sizes of images: rows * height + columns * width <= most, in pixels."""

  rows: int
  columns: int
  most: int

  def __str__(self) -> str:
    terms = ((self.rows, "h"), (self.columns, "w"))
    return " + ".join(f"{n}*{edge}" for n, edge in terms if n) + f" <= {self.most}"


@dataclasses.dataclass(frozen=True)
class ImageProgram:
  """What a model computes from images of any size that fits on a canvas.

  The functions that compare take what `run` returns for one image, the image, and the result of
  `Restored.predict`.

  Attributes:
    run: function of a model's arrays and images of one size, uint8 RGB [B, H, W, 3], to arrays by name, which
      begin with B. H and W may be symbolic dimensions.
    canvas: (height, width) that images are laid on, pixels.
    limits: the sizes of images that fit.
    classes: what the numbers in the result stand for, as JSON; with masks, also how they are pasted.
    difference: the largest difference of a number.
    mismatch: the share of detections that have no match, or of pixels of another class.
  """

  run: Callable[[Arrays, jax.Array], dict[str, jax.Array]]
  canvas: tuple[int, int]
  limits: tuple[Limit, ...]
  classes: dict[str, Any]
  difference: Difference
  mismatch: Difference

  def fits(self, size: tuple[int, int]) -> bool:
    """Returns whether an image of (height, width) pixels fits on the canvas."""
    return all(rows * size[0] + columns * size[1] <= most for rows, columns, most in self.limits)


def chosen_canvas(
  data: ConfigDict,
  canvas: tuple[int, int] | None,
  *,
  multiple: int,
  remainder: int = 0,
) -> tuple[int, int]:
  """Returns `canvas`, or the first bucket of `config.data`.

  Args:
    data: the config's `data`.
    canvas: (height, width), pixels, or None.
    multiple, remainder: how `canvas` is rounded up, see `data.transforms.round_up`.

  Raises:
    UserError: there is none of them.
  """
  if data.buckets and not canvas:
    height, width = data.buckets[0]
    return height, width
  if not canvas:
    raise UserError(
      "--canvas=HEIGHT,WIDTH is needed: config.data.buckets is (), so that nothing says how large images are"
    )
  height, width = (round_up(edge, multiple, remainder) for edge in canvas)
  return height, width


def limits_of_sizes(
  canvas: tuple[int, int], short: int, long: int | None = None
) -> tuple[Limit, ...]:
  """Returns the limits of images that fit on a canvas after their resize.

  Args:
    canvas: (height, width), pixels.
    short: shorter edge after the resize, pixels; 0 for no resize.
    long: longest edge after the resize, pixels; None for any.

  Raises:
    UserError: nothing fits.
  """
  height, width = canvas
  limits = [Limit(1, 0, LONGEST_EDGE), Limit(0, 1, LONGEST_EDGE)]
  if not short:
    return Limit(1, 0, min(height, LONGEST_EDGE)), Limit(0, 1, min(width, LONGEST_EDGE))
  if min(canvas) < short:
    raise UserError(
      f"--canvas={height},{width} holds no image whose shorter edge is config.data.short_edge={short}"
    )
  if long is None or long > height:
    limits.append(Limit(short, -height, 0))  # rows / columns is at most height / short
  if long is None or long > width:
    limits.append(Limit(-width, short, 0))
  return tuple(limits)


def size_of(image_BHWC: jax.Array) -> jax.Array:
  """Returns int32 [2], height and width of images of one size; they may be symbolic dimensions."""
  return jnp.stack([jnp.asarray(edge, jnp.int32) for edge in image_BHWC.shape[1:3]])


def repeated(size_2: jax.Array, images: int) -> jax.Array:
  """Returns a size for each of a number of images, [images, 2]."""
  return jnp.broadcast_to(size_2, (images, 2))


class Resize:
  """The size of an image after its resize, computed while a program runs, as the data pipeline computes it.

  Args:
    short: shorter edge of the result, pixels; 0 for no resize.
    long: longest edge of the result, pixels; None for any.
    round_half_up: whether edges are rounded, as in `data.crops.scaled_size`, or fractions of a pixel cut
      off, as in `data.transforms.resized_size`.
  """

  def __init__(self, short: int, long: int | None = None, *, round_half_up: bool = False):
    self._targets = tuple(edge for edge in (short, long) if edge)
    self._halves = 2 if round_half_up else 1
    self._limits = [rounding_limits(edge, LONGEST_EDGE) for edge in self._targets]

  def __call__(self, size_2: jax.Array) -> jax.Array:
    """Returns int32 [2], height and width after the resize of an image of these height and width."""
    if not self._targets:
      return size_2
    target, divisor = self._targets[0], jnp.min(size_2)
    limit = jnp.asarray(self._limits[0])[divisor]
    if len(self._targets) == 2:
      long, longer = self._targets[1], jnp.max(size_2)
      is_short = target * longer <= long * divisor
      limit = jnp.where(is_short, limit, jnp.asarray(self._limits[1])[longer])
      target = jnp.where(is_short, target, long)
      divisor = jnp.where(is_short, divisor, longer)
    scale = lambda edge: scaled_edge(edge, target, divisor, limit, halves=self._halves)
    return jnp.maximum(jnp.stack([scale(size_2[0]), scale(size_2[1])]), 1)


def on_canvas(image_BHWC: jax.Array, size_2: jax.Array, canvas: tuple[int, int]) -> jax.Array:
  """Resizes images of one size and lays each on a black canvas, as `data.transforms.resize_and_pad`.

  Args:
    image_BHWC: uint8 or float; height and width may be symbolic dimensions.
    size_2: int32, height and width after the resize.
    canvas: (height, width), pixels.

  Returns:
    float32 [B, *canvas, 3].
  """
  images = image_BHWC.shape[0]
  old_B2, size_B2 = repeated(size_of(image_BHWC), images), repeated(size_2, images)
  resized_BHWC = resized(image_BHWC.astype(jnp.float32), old_B2, size_B2, canvas)
  return jnp.where(valid_positions(size_B2, *canvas)[..., None], resized_BHWC, 0)
