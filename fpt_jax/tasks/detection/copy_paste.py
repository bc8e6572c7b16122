"""Copy-paste: objects of a random image are pasted into another one (Ghiasi et al. 2021, section 3).

Shapes: H W rows and columns of a canvas, h w those of the part of it that an image covers, G objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epy

from fpt_jax.ops import masks
from fpt_jax.tasks.detection.examples import Loaded
from fpt_jax.tasks.detection.objects import Objects, behind, joined, union

with epy.lazy_imports():
  import tensorflow as tf

_PASTE = 0x9A57E  # separates these random numbers from others of the same seed
_GRAY = 128  # of pixels between an image and what is pasted beside it


class Pasted(NamedTuple):
  """What is pasted into an image.

  Attributes:
    source: the image that it is from.
    mask_hw: the pixels that are pasted, bool, of the size `source.crop.valid`.
    objects: the objects of both images, those behind the pasted ones as far as they are visible.
    size: (height, width) of the part of the canvas that both images cover, pixels.
  """

  source: Loaded
  mask_hw: np.ndarray
  objects: Objects
  size: tuple[int, int]


def seed_of_sources(seed: int) -> int:
  """Returns the seed of the windows of the images that objects are pasted from."""
  return int(np.random.SeedSequence((seed, _PASTE)).generate_state(1, np.uint64)[0])


def paste(
  loaded: Loaded,
  seed: int,
  position: int,
  probability: float,
  images: int,
  load: Callable[[int], Loaded],
) -> Pasted | None:
  """Pastes a random half of the objects of a random image, as a pure function of seed and position.

  Args:
    loaded: the image to paste into.
    seed: seed of the run.
    position: position of the image in the run: step * global batch size + index in the batch.
    probability: share of the images that objects are pasted into.
    images: number of images to paste from.
    load: function from the index of an image to the image.

  Returns:
    What is pasted; None if nothing is.
  """
  random = np.random.Philox(np.random.SeedSequence((seed, _PASTE, position)))
  wanted, index = random.random_raw(2).tolist()
  if wanted >= probability * 2**64:
    return None
  source = load(index % images)
  chosen_G = random.random_raw(len(source.objects.labels_G)) >= np.uint64(2**63)
  objects = source.objects.take(np.flatnonzero(chosen_G))
  mask_hw = union(objects, source.record, source.crop)
  bounds = masks.bounds(mask_hw)
  if bounds is None:
    return None
  # a box can be a part of a pixel larger than its mask
  right, bottom = np.ceil(objects.boxes_G4[:, 2:].max(0)).astype(int).tolist()
  height, width = loaded.crop.valid
  size = max(height, bottom, bounds[3]), max(width, right, bounds[2])
  visible = behind(loaded.objects, loaded.record, loaded.crop, mask_hw)
  return Pasted(source, mask_hw, joined(visible, objects), size)


def compose(
  image_HWC: tf.Tensor,
  own_size: tf.Tensor,
  source_HWC: tf.Tensor,
  mask_HW: tf.Tensor,
  size: tf.Tensor,
) -> tf.Tensor:
  """Returns the image with the pasted pixels; grey where neither image is, 0 beyond `size`.

  Args:
    image_HWC: image on the canvas.
    own_size: (height, width) that it covers.
    source_HWC: image that is pasted from, on the same canvas and of the same dtype.
    mask_HW: bool, the pixels that are pasted.
    size: (height, width) of the result on the canvas.
  """
  own_HW, covered_HW = (_rectangle(s, tf.shape(mask_HW)) for s in (own_size, size))
  gray, black = (tf.constant(value, image_HWC.dtype) for value in (_GRAY, 0))
  background_HWC = tf.where(own_HW[..., None], image_HWC, gray)
  result_HWC = tf.where(mask_HW[..., None], source_HWC, background_HWC)
  return tf.where(covered_HW[..., None], result_HWC, black)


def _rectangle(size: tf.Tensor, canvas: tf.Tensor) -> tf.Tensor:
  """bool [H, W]: the pixels of a canvas above and left of `size`."""
  return (tf.range(canvas[0]) < size[0])[:, None] & (tf.range(canvas[1]) < size[1])[None, :]
