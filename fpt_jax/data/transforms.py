"""What happens to an image and its instances between the record and the batch.

H W rows and columns, G ground truths, m pixels along each side of an instance's bitmap.
Boxes are (x0, y0, x1, y1) in pixels, float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from etils import epy

with epy.lazy_imports():
  import tensorflow as tf

_SCALE, _COLOR = 0x5CA1E, 0xC0105  # separate these random numbers from others of the same seed

RESIZES = ("torchvision", "detectron2")


def resized_size(
  height: int, width: int, short: int, long: int, resize: str = "torchvision"
) -> tuple[int, int]:
  """Returns (height, width) with a shorter edge of `short` and a longer edge of at most `long`.

  Args:
    height, width: size of the image, pixels.
    short, long: edges of the result, pixels.
    resize: "torchvision" for the rule of GeneralizedRCNNTransform, which cuts off fractions of a pixel, or
      "detectron2" for that of ResizeShortestEdge, which rounds them.
  """
  if resize == "detectron2":
    scale = short / min(height, width)
    y, x = (short, scale * width) if height < width else (scale * height, short)
    again = min(1.0, long / max(y, x))
    return max(1, math.floor(y * again + 0.5)), max(1, math.floor(x * again + 0.5))
  scale = min(short / min(height, width), long / max(height, width))
  return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def smallest_canvas(
  size: tuple[int, int],
  buckets: Sequence[tuple[int, int]],
  multiple: int = 32,
  remainder: int = 0,
  *,
  few: bool = False,
) -> tuple[int, int]:
  """Returns the smallest bucket that holds an image, or its size rounded up if none does.

  Args:
    size: (height, width) of the image in pixels.
    buckets: (height, width) of each canvas in pixels.
    multiple, remainder: pixels; how the size is rounded up, see `round_up`.
    few: whether it is rounded up to one of few sizes, see `round_up_to_few`.
  """
  fitting = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
  if fitting:
    height, width = min(fitting, key=lambda b: b[0] * b[1])
  else:
    rounded = round_up_to_few if few else round_up
    height, width = (rounded(edge, multiple, remainder) for edge in size)
  return height, width


def round_up(size, multiple: int, remainder: int = 0):
  """Returns the smallest multiple plus the remainder that is not smaller; `size` is a number or an array."""
  return -(-(size - remainder) // multiple) * multiple + remainder


def round_up_to_few(size: int, multiple: int, remainder: int = 0) -> int:
  """Returns the smallest of few sizes that is not smaller: at most four from one size to twice that size.

  They are sizes of `round_up`. The result is that of `round_up` up to 8 multiples, and less than a quarter
  larger beyond.
  """
  multiples = -(-(size - remainder) // multiple)
  step = 1 << max(0, multiples.bit_length() - 3)  # four steps from a power of two to the next
  return round_up(multiples, step) * multiple + remainder


def resize_and_pad(
  image_HWC: np.ndarray | tf.Tensor,
  size: tuple[int, int] | tf.Tensor,
  bucket: tuple[int, int] | tf.Tensor,
  resize: str = "torchvision",
  dtype: str = "float32",
) -> tf.Tensor:
  """Resizes an image and places it at the top left of a black canvas.

  The resize is bilinear with half-pixel centres.

  Args:
    image_HWC: image of any real dtype.
    size: (height, width) of the image on the canvas in pixels.
    bucket: (height, width) of the canvas in pixels.
    resize: "torchvision" for no antialiasing, in float32, as in torch's interpolate(mode="bilinear",
      align_corners=False); or "detectron2" for Pillow's BILINEAR on 8-bit images: it averages where the
      image shrinks, and rounds after the columns and after the rows.
    dtype: of the result, see `converted`.

  Returns:
    [*bucket, C], in the value range of `image_HWC`.
  """
  size, bucket = tf.convert_to_tensor(size, tf.int32), tf.convert_to_tensor(bucket, tf.int32)
  if resize == "detectron2":
    wide = tf.stack([tf.shape(image_HWC)[0], size[1]])
    resized_HWC = _resize_and_round(_resize_and_round(image_HWC, wide), size)
  else:
    resized_HWC = tf.image.resize(image_HWC, size, "bilinear", antialias=False)
  rest = bucket - size
  return tf.pad(converted(resized_HWC, dtype), [[0, rest[0]], [0, rest[1]], [0, 0]])


def converted(image_HWC: tf.Tensor, dtype: str) -> tf.Tensor:
  """Returns an image in 0..255 with this dtype: "float32", or "uint8" rounded to the nearest grey level."""
  if dtype == "uint8":
    image_HWC = tf.cast(image_HWC, tf.float32) + 0.5
  return tf.cast(image_HWC, dtype)


def on_canvas(
  image_HWC: np.ndarray, size: tuple[int, int], canvas: tuple[int, int], resize: str = "torchvision"
) -> np.ndarray:
  """Like `resize_and_pad`, bit for bit, for an image in memory.

  It needs no TensorFlow, which takes seconds and 500 MB to load, unless "detectron2" changes the size.
  """
  if image_HWC.shape[:2] != tuple(size):
    if resize == "detectron2":
      return np.asarray(resize_and_pad(image_HWC, size, canvas, resize))
    wide_HWC = _interpolated(image_HWC.astype(np.float32), 1, size[1])
    image_HWC = _interpolated(wide_HWC, 0, size[0])
  laid_HWC = np.zeros((*canvas, image_HWC.shape[2]), np.float32)
  laid_HWC[: size[0], : size[1]] = image_HWC
  return laid_HWC


def _interpolated(image_HWC: np.ndarray, axis: int, length: int) -> np.ndarray:
  """Resizes one axis of a float32 image linearly, with half-pixel centres."""
  old = image_HWC.shape[axis]
  scale = np.float32(old) / np.float32(length)
  at = (np.arange(length, dtype=np.float32) + 0.5) * scale - 0.5
  below = np.floor(at)
  fraction = np.expand_dims(at - below, [other for other in range(3) if other != axis])
  low_HWC = np.take(image_HWC, np.maximum(below, 0).astype(int), axis)
  high_HWC = np.take(image_HWC, np.minimum(np.ceil(at), old - 1).astype(int), axis)
  return low_HWC + (high_HWC - low_HWC) * fraction


def _resize_and_round(image_HWC: np.ndarray | tf.Tensor, size: tf.Tensor) -> tf.Tensor:
  return tf.floor(tf.image.resize(image_HWC, size, "bilinear", antialias=True) + 0.5)


def scale_boxes(
  boxes_G4: np.ndarray, old_size: tuple[int, int], new_size: tuple[int, int]
) -> np.ndarray:
  """Returns the boxes of an image that was resized from `old_size` (height, width) to `new_size`."""
  ratio_y, ratio_x = (new / old for new, old in zip(new_size, old_size, strict=True))
  return boxes_G4 * np.array([[ratio_x, ratio_y, ratio_x, ratio_y]], np.float32)


def flip_objects(
  width: int, boxes_G4: np.ndarray, bitmaps_Gmm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Mirrors the boxes of an image, and the bitmaps relative to the boxes, left to right.

  Args:
    width: width of the image, pixels.
    boxes_G4: the boxes.
    bitmaps_Gmm: the bitmaps; there may be none.
  """
  x0_G, y0_G, x1_G, y1_G = boxes_G4.T
  flipped_G4 = np.stack([width - x1_G, y0_G, width - x0_G, y1_G], -1)
  return flipped_G4, bitmaps_Gmm[:, :, ::-1]


def draw_train_size(bits: int, sizes: Sequence[int]) -> int:
  """Returns the shorter edge that random bits select.

  Args:
    bits: 64 random bits.
    sizes: one size in pixels; or the smallest and the largest of a range, both included; or three or
      more sizes, one of which is selected.
  """
  if len(sizes) == 2:
    low, high = sizes
    return low + bits % (high - low + 1)
  return sizes[bits % len(sizes)]


def draw_augmentation(seed: int, position: int, sizes: Sequence[int]) -> tuple[int, bool]:
  """Draws a shorter edge and whether to flip, as a pure function of the arguments.

  Args:
    seed: seed of the run.
    position: position of the image in the run, step * global batch size + place in the batch.
    sizes: shorter edges in pixels, see `draw_train_size`.

  Returns:
    The shorter edge in pixels, and whether to flip.
  """
  bits = np.random.Philox(np.random.SeedSequence((seed, _SCALE, position))).random_raw(2).tolist()
  return draw_train_size(bits[0], sizes), bits[1] >= 2**63


def draw_colors(seed: int, position: int, ranges: Sequence[float]) -> np.ndarray:
  """Draws the changes of an image's colours, as a pure function of the arguments.

  Args:
    seed: seed of the run.
    position: position of the image in the run, step * global batch size + place in the batch.
    ranges: largest changes of brightness, contrast, saturation and hue, see `jitter_colors`.

  Returns:
    float32 [4]: factors of brightness, contrast and saturation, uniform in 1 - range to 1 + range, and the
    shift of the hue, uniform in -range to range.
  """
  bits_4 = np.random.Philox(np.random.SeedSequence((seed, _COLOR, position))).random_raw(4)
  uniform_4 = 2 * (bits_4 / 2**64) - 1
  return (np.array([1, 1, 1, 0]) + uniform_4 * np.asarray(ranges)).astype(np.float32)


def jitter_colors(image_HWC: tf.Tensor, colors_4: tf.Tensor, ranges: Sequence[float]) -> tf.Tensor:
  """Changes brightness, contrast, saturation and hue of an image, in this order.

  Each change is that of torchvision's ColorJitter on float images, which draws the order as well.

  Args:
    image_HWC: RGB in 0..255, of any real dtype.
    colors_4: what `draw_colors` returns.
    ranges: the largest changes, see `draw_colors`; a change whose range is 0 is left out.

  Returns:
    float32 [H, W, 3] in 0..255.
  """
  brightness, contrast, saturation, hue = ranges
  image_HWC = tf.cast(image_HWC, tf.float32)

  def blend(image_HWC: tf.Tensor, other_HWC: tf.Tensor | float, factor: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(factor * image_HWC + (1 - factor) * other_HWC, 0.0, 255.0)

  if brightness:
    image_HWC = blend(image_HWC, 0.0, colors_4[0])
  if contrast:
    mean = tf.reduce_mean(tf.image.rgb_to_grayscale(image_HWC))
    image_HWC = blend(image_HWC, mean, colors_4[1])
  if saturation:
    image_HWC = blend(image_HWC, tf.image.rgb_to_grayscale(image_HWC), colors_4[2])
  if hue:
    image_HWC = tf.image.adjust_hue(image_HWC / 255, colors_4[3]) * 255
  return image_HWC
