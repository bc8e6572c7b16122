"""The canvases that images are laid on, so that a model is compiled for few sizes.

N images, K canvases.
"""

import math

import ml_collections
import numpy as np
from absl import logging

from fpt_jax.data import transforms
from fpt_jax.errors import UserError

_MANY = 8  # canvases; the log warns of more, since the model is compiled for each


def canvases(
  data: ml_collections.ConfigDict, sizes_N2: np.ndarray, remainder: int = 0
) -> np.ndarray:
  """Returns the sizes of the canvases for images of given sizes.

  Args:
    data: the config's `data`.
    sizes_N2: (height, width) of each image after its resize in pixels, int [N, 2].
    remainder: pixels beyond a multiple, see `transforms.round_up`.

  Returns:
    (height, width) in pixels, int [K, 2]: `data.buckets`, or, if there are none, each image's size
    rounded up to multiples of `data.canvas_multiple`, plus the remainder.

  Raises:
    UserError: the multiple is not positive.
  """
  if data.buckets:
    return np.array(data.buckets).reshape(-1, 2)
  canvases_K2 = np.unique(transforms.round_up(sizes_N2, multiple_of(data), remainder), axis=0)
  if len(canvases_K2) > _MANY:
    logging.warning(
      "the images have canvases of %d sizes, and the model is compiled for each; name a few in "
      "data.buckets, or raise data.canvas_multiple=%d",
      len(canvases_K2),
      multiple_of(data),
    )
  return canvases_K2


def of_prediction(
  data: ml_collections.ConfigDict, size: tuple[int, int], remainder: int = 0
) -> tuple[int, int]:
  """Returns the canvas of an image that is predicted alone, (height, width) in pixels.

  Args:
    data: the config's `data`.
    size: (height, width) of the image after its resize in pixels.
    remainder: pixels beyond a multiple, see `transforms.round_up`.

  Returns:
    The smallest of `data.buckets` that holds the image. If there is none, the size rounded up to multiples of
    `data.canvas_multiple`, plus the remainder; with `data.few_canvases` to those of
    `transforms.round_up_to_few`, so that images of any sizes have few canvases, each with less than 25/16 of
    the pixels that it has otherwise.

  Raises:
    UserError: the multiple is not positive.
  """
  return transforms.smallest_canvas(
    size, data.buckets, multiple_of(data), remainder, few=data.few_canvases
  )


def resized_size(
  data: ml_collections.ConfigDict, height: int, width: int, short: int | None = None
) -> tuple[int, int]:
  """Returns the (height, width) that an image is resized to, pixels, see `transforms.resized_size`.

  Args:
    data: the config's `data`.
    height, width: size of the image, pixels.
    short: shorter edge of the result, pixels; None for `data.short_edge`.
  """
  short = data.short_edge if short is None else short
  return transforms.resized_size(height, width, short, data.long_edge, data.resize)


def at_short_edge(data: ml_collections.ConfigDict, short: int) -> ml_collections.ConfigDict:
  """Returns the config's `data` for images whose shorter edge is `short` pixels.

  The longest edge and the buckets grow in proportion; the buckets are rounded up to multiples of
  `data.canvas_multiple`.

  Raises:
    UserError: the edge is not positive.
  """
  if short == data.short_edge:
    return data
  if short < 1:
    raise UserError(f"eval.short_edges: {short} must be a positive number of pixels")
  scaled = ml_collections.ConfigDict(data)
  ratio = short / data.short_edge
  scaled.short_edge, scaled.long_edge = short, math.floor(data.long_edge * ratio)
  scaled.buckets = tuple(
    tuple(map(int, transforms.round_up(np.ceil(np.multiply(bucket, ratio)), multiple_of(data))))
    for bucket in data.buckets
  )
  return scaled


def multiple_of(data: ml_collections.ConfigDict) -> int:
  """Returns `data.canvas_multiple`.

  Raises:
    UserError: it is not positive.
  """
  if data.canvas_multiple < 1:
    raise UserError(
      f"data.canvas_multiple={data.canvas_multiple} must be a positive number of pixels"
    )
  return data.canvas_multiple
