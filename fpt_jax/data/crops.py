"""Random training crops of resized images and their annotations.

Shapes: H W rows and columns of an image file, h w those of the crop.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from etils import epy

from fpt_jax.data import transforms
from fpt_jax.data.records.label_map import VOID

with epy.lazy_imports():
  import tensorflow as tf

_CROP = 0xC409  # separates these random numbers from others of the same seed


@dataclasses.dataclass(frozen=True)
class Crop:
  """A window of a resized image. Sizes are (height, width) in pixels.

  Attributes:
    size: size of the whole image after the resize.
    offset: (y, x) of the window's top left corner on the resized image.
    valid: size of the part of the window that lies on the image, at the window's top left.
    mirrored: whether the image is mirrored left to right before the resize.
  """

  size: tuple[int, int]
  offset: tuple[int, int]
  valid: tuple[int, int]
  mirrored: bool


def whole(size: tuple[int, int], mirrored: bool) -> Crop:
  """Returns the window of a whole image of this size."""
  return Crop(size, (0, 0), size, mirrored)


def draw(
  seed: int,
  position: int,
  size: tuple[int, int],
  canvas: tuple[int, int],
  *,
  scale: tuple[float, float] = (1.0, 1.0),
  train_sizes: tuple[int, ...] = (),
  flip: bool = False,
) -> Crop:
  """Draws a random crop; the result is a pure function of the arguments.

  Args:
    seed: seed of the run.
    position: position of the image in the run: step * global batch size + index in the batch.
    size: (height, width) of the image file.
    canvas: (height, width) of the crop.
    scale: smallest and largest factor of the image size; the factor is drawn uniformly.
    train_sizes: shorter edges in pixels to draw from instead of a factor, see
      `transforms.draw_train_size`; () to use `scale`.
    flip: whether half of the images are mirrored.
  """
  bits = np.random.Philox(np.random.SeedSequence((seed, _CROP, position))).random_raw(4).tolist()
  if train_sizes:
    resized = short_edge_size(size, transforms.draw_train_size(bits[0], train_sizes))
  else:
    low, high = scale
    resized = scaled_size(size, low + (high - low) * (bits[0] / 2**64))
  top, left = (
    bit % (max(edge - room, 0) + 1)
    for bit, edge, room in zip(bits[1:3], resized, canvas, strict=True)
  )
  height, width = (min(edge, room) for edge, room in zip(resized, canvas, strict=True))
  return Crop(resized, (top, left), (height, width), flip and bits[3] >= 2**63)


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> float:
  """Returns the factor of an image's size at which it just fits on a canvas; both are (height, width)."""
  return min(room / edge for room, edge in zip(canvas, size, strict=True))


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
  """Returns (height, width) times `scale`, rounded to whole pixels, at least 1."""
  height, width = (max(1, int(edge * scale + 0.5)) for edge in size)
  return height, width


def short_edge_size(size: tuple[int, int], short_edge: int) -> tuple[int, int]:
  """Returns (height, width) resized so that the shorter edge is `short_edge` pixels."""
  return scaled_size(size, short_edge / min(size))


def nearest(old: int, new: int, start: int, count: int) -> np.ndarray:
  """Returns the source pixels of a nearest-neighbour resize along one edge.

  The centre of target pixel i lies at (i + 0.5) * old / new in the source, and target pixel i takes the
  value of the source pixel there; on the border of two, that of the second. The bilinear resize has the
  same geometry.

  Args:
    old: length of the edge before the resize, pixels.
    new: length of the edge after the resize, pixels.
    start: index of the first target pixel.
    count: number of target pixels.

  Returns:
    int64 [count].
  """
  return (2 * np.arange(start, start + count) + 1) * old // (2 * new)  # integers: exact


def cut_label(label_HW: np.ndarray, crop: Crop) -> np.ndarray:
  """Returns the part of the resized label map that lies in the crop, of size `crop.valid`."""
  if crop.mirrored:
    label_HW = label_HW[:, ::-1]
  rows, columns = (
    nearest(*edges)
    for edges in zip(label_HW.shape, crop.size, crop.offset, crop.valid, strict=True)
  )
  return label_HW[rows[:, None], columns[None, :]]


def cut_image(
  image_HWC: np.ndarray | tf.Tensor, size: tf.Tensor, offset: tf.Tensor, canvas: tf.Tensor
) -> tf.Tensor:
  """Resizes an image and cuts out a window, without computing the rest.

  Bilinear with half-pixel centres and no antialiasing, as `transforms.resize_and_pad`.

  Args:
    image_HWC: image of any real dtype.
    size: (height, width) of the whole image after the resize.
    offset: (y, x) of the window's top left corner on it.
    canvas: (height, width) of the window.

  Returns:
    float32 of the canvas's size, in the value range of `image_HWC`, 0 beyond the image.
  """
  old = tf.cast(tf.shape(image_HWC)[:2], tf.float32)
  return tf.raw_ops.ScaleAndTranslate(
    images=image_HWC[None],
    size=canvas,
    scale=tf.cast(size, tf.float32) / old,
    translation=-tf.cast(offset, tf.float32),
    kernel_type="triangle",
    antialias=False,
  )[0]


def pad_label(label_hw: tf.Tensor, canvas: tf.Tensor) -> tf.Tensor:
  """Returns a label map at the top left of a canvas that is `VOID` elsewhere."""
  rest = canvas - tf.shape(label_hw)
  return tf.pad(label_hw, [[0, rest[0]], [0, rest[1]]], constant_values=VOID)


def mirror_table(swaps: tuple[tuple[int, int], ...]) -> np.ndarray:
  """Returns the class that each class becomes in a mirrored image, uint8 [256]."""
  table = np.arange(256, dtype=np.uint8)
  for left, right in swaps:
    table[left], table[right] = right, left
  return table
