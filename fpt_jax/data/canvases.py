"""The canvases that images are laid on, so that a model is compiled for few sizes.

N images, K canvases.
"""

import math

import ml_collections
import numpy as np
from absl import logging

from fpt_jax.errors import UserError

_MULTIPLE = 32  # pixels: the coarsest stride of a backbone
_MANY = 8


def canvases(data: ml_collections.ConfigDict, sizes_N2: np.ndarray) -> np.ndarray:
  """The sizes of the canvases for images of these sizes.

  Args:
    data: the config's `data`.
    sizes_N2: int (height, width) of each image after its resize, pixels.

  Returns:
    int [K, 2], (height, width) in pixels: `data.buckets`, or, where there are none, each image's own
    size rounded up to multiples of `data.canvas_multiple`.

  Raises:
    UserError: the multiple is not positive.
  """
  if data.get("buckets", ()):
    return np.array(data.buckets).reshape(-1, 2)
  canvases_K2 = np.unique(round_up(sizes_N2, multiple_of(data)), axis=0)
  if len(canvases_K2) > _MANY:
    logging.warning(
      "the images have canvases of %d sizes, and the model is compiled for each; name a few in "
      "data.buckets, or raise data.canvas_multiple=%d",
      len(canvases_K2),
      multiple_of(data),
    )
  return canvases_K2


def at_short_edge(data: ml_collections.ConfigDict, short: int) -> ml_collections.ConfigDict:
  """The config's `data` for images with their shorter edge at `short` pixels.

  Longest edge and buckets grow in proportion, these up to multiples of `data.canvas_multiple`.

  Raises:
    UserError: the edge is not positive.
  """
  if short == data.short_edge:
    return data
  if short < 1:
    raise UserError(f"model.test.short_edges: {short} must be a positive number of pixels")
  scaled = ml_collections.ConfigDict(data)
  ratio = short / data.short_edge
  scaled.short_edge, scaled.long_edge = short, math.floor(data.long_edge * ratio)
  scaled.buckets = tuple(
    tuple(map(int, round_up(np.ceil(np.multiply(bucket, ratio)), multiple_of(data))))
    for bucket in data.get("buckets", ())
  )
  return scaled


def round_up(sizes_N2: np.ndarray, multiple: int) -> np.ndarray:
  """The smallest multiples not below."""
  return -(-sizes_N2 // multiple) * multiple


def multiple_of(data: ml_collections.ConfigDict) -> int:
  """`data.canvas_multiple`, which runs from before the field existed lack.

  Raises:
    UserError: it is not positive.
  """
  multiple = data.get("canvas_multiple", _MULTIPLE)
  if multiple < 1:
    raise UserError(f"data.canvas_multiple={multiple} must be a positive number of pixels")
  return multiple
