"""What happens to an image and its instances between the record and the batch.

H W rows and columns, G ground truths, m pixels along the side of an instance's bitmap.
Boxes are (x0, y0, x1, y1) in pixels, float32.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

_SCALE = 0x5CA1E  # keeps these streams apart from others drawn from the same seed


def resized_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
  """Returns (height, width) with the shorter edge at `short`, the longer at most at `long`.

  The rule is that of torchvision's GeneralizedRCNNTransform, fractions of a pixel cut off.
  """
  scale = min(short / min(height, width), long / max(height, width))
  return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def smallest_canvas(
  size: tuple[int, int], buckets: Sequence[tuple[int, int]], multiple: int = 32
) -> tuple[int, int]:
  """The smallest bucket that holds an image, or its size rounded up to `multiple` if none does."""
  fitting = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
  if fitting:
    return tuple(min(fitting, key=lambda b: b[0] * b[1]))
  return tuple(-(-edge // multiple) * multiple for edge in size)


def resize_and_pad(
  image_HWC: np.ndarray | tf.Tensor,
  size: tuple[int, int] | tf.Tensor,
  bucket: tuple[int, int] | tf.Tensor,
) -> tf.Tensor:
  """Resizes an image and lays it at the top left of a black canvas.

  Bilinear with half-pixel centres and no antialiasing, in float32: what torch's
  interpolate(mode="bilinear", align_corners=False) computes.

  Args:
    image_HWC: any real dtype.
    size: (height, width) of the image on the canvas.
    bucket: (height, width) of the canvas.

  Returns:
    float32 of the bucket's size, in the value range of `image_HWC`.
  """
  size, bucket = tf.convert_to_tensor(size, tf.int32), tf.convert_to_tensor(bucket, tf.int32)
  resized_HWC = tf.cast(tf.image.resize(image_HWC, size, "bilinear", antialias=False), tf.float32)
  rest = bucket - size
  return tf.pad(resized_HWC, [[0, rest[0]], [0, rest[1]], [0, 0]])


def scale_boxes(
  boxes_G4: np.ndarray, old_size: tuple[int, int], new_size: tuple[int, int]
) -> np.ndarray:
  """Returns the boxes after an image of `old_size` (height, width) became one of `new_size`."""
  ratio_y, ratio_x = (new / old for new, old in zip(new_size, old_size, strict=True))
  return boxes_G4 * np.array([[ratio_x, ratio_y, ratio_x, ratio_y]], np.float32)


def flip(
  image_HWC: np.ndarray, boxes_G4: np.ndarray, bitmaps_Gmm: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Mirrors an image, the boxes on it and the bitmaps in the boxes left to right."""
  width = image_HWC.shape[1]
  x0_G, y0_G, x1_G, y1_G = boxes_G4.T
  flipped_G4 = np.stack([width - x1_G, y0_G, width - x0_G, y1_G], -1)
  return image_HWC[:, ::-1], flipped_G4, bitmaps_Gmm[:, :, ::-1]


def draw_augmentation(seed: int, position: int, short: tuple[int, int]) -> tuple[int, bool]:
  """Draws the shorter edge and whether to flip, a pure function of its arguments.

  Args:
    seed: of the run.
    position: of the image in the run, step * global batch size + place in the batch.
    short: smallest and largest shorter edge, both included.

  Returns:
    (shorter edge in pixels, whether to flip).
  """
  bits = np.random.Philox(np.random.SeedSequence((seed, _SCALE, position))).random_raw(2)
  return short[0] + int(bits[0]) % (short[1] - short[0] + 1), bool(bits[1] >> 63)
