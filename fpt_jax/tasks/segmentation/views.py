"""Test-time views of segmentation: probabilities averaged over windows, scales and mirror images.

Shapes: B images, H W rows and columns of a canvas, h w those of a window's canvas, K classes, L = K + 1
sums (of the probabilities, and the number of windows), C channels. Sizes are (height, width) in pixels.
An image lies at the top left of its canvas; the rest is padding, which does not affect the result.
"""

import functools
import math
from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fpt_jax.data import canvases, crops, transforms
from fpt_jax.models.feature_map import valid_positions
from fpt_jax.models.state import Skeleton
from fpt_jax.ops.mirror import mirror
from fpt_jax.ops.resize import resized


class Rounding(TypedDict):
  """How the size of an image is rounded up to that of its canvas, see `transforms.round_up`."""

  multiple: int
  remainder: int


def probabilities(
  logits: Callable[[jax.Array, jax.Array], jax.Array],
  image_BHWC: jax.Array,
  size_B2: jax.Array,
  *,
  classes: int,
  window: tuple[int, int] | tuple[()] = (),
  overlap: float = 0.0,
  multiple: int = 1,
  remainder: int = 0,
) -> jax.Array:
  """Computes the probabilities of the classes at every pixel, from windows that slide over the image.

  Windows follow each other in rows; the last of a row ends at the image's edge. A pixel in several
  windows gets the mean of their probabilities. A window of the image's size is the whole image.

  Args:
    logits: function of images and their sizes, [B, h, w, K] float32, see `models.segmenter`.
    image_BHWC: images, float32 in 0..255, zero on padding.
    size_B2: sizes of the images, int32.
    classes: number of classes K.
    window: size of a window; () for the whole canvas.
    overlap: share of a window that overlaps the next one, from 0 to less than 1.
    multiple, remainder: how the size of a window is rounded up to that of its canvas, see
      `transforms.round_up`.

  Returns:
    [B, H, W, K] float32, 0 on padding.
  """
  canvas = image_BHWC.shape[1:3]
  window = tuple(map(min, window, canvas)) if window else canvas
  room = tuple(
    min(transforms.round_up(w, multiple, remainder), edge)
    for w, edge in zip(window, canvas, strict=True)
  )
  step_2 = jnp.array([max(1, math.ceil(w * (1 - overlap))) for w in window])
  window_2 = jnp.array(window)
  spare_B2 = jnp.maximum(size_B2 - window_2[None], 0)
  rows, columns = 1 + jnp.max(-(-spare_B2 // step_2[None]), axis=0)
  # a window's canvas may reach beyond the image's
  reach = [(0, 0), *((0, r - w) for r, w in zip(room, window, strict=True)), (0, 0)]
  padded_BHWC = jnp.pad(image_BHWC, reach)

  def add_window(i, sums):
    place_2 = jnp.stack([i // columns, i % columns])
    start_B2 = jnp.minimum((place_2 * step_2)[None], spare_B2)
    # an image smaller than others of its batch has fewer windows
    new_B = ((place_2 == 0)[None] | (((place_2 - 1) * step_2)[None] < spare_B2)).all(axis=1)
    seen_B2 = jnp.minimum(size_B2 - start_B2, window_2[None])
    seen_Bhw = valid_positions(seen_B2, *room)
    image_BhwC = jnp.where(seen_Bhw[..., None], _cut(padded_BHWC, start_B2, room), 0)
    weight_Bhw1 = (seen_Bhw & new_B[:, None, None])[..., None].astype(jnp.float32)
    scores_BhwK = jax.nn.softmax(logits(image_BhwC, seen_B2), axis=-1) * weight_Bhw1
    scores_BhwL = jnp.concatenate([scores_BhwK, weight_Bhw1], axis=-1)
    return _paste(sums, _cut(sums, start_B2, room) + scores_BhwL, start_B2)

  sums_BHWL = jnp.zeros((*padded_BHWC.shape[:3], classes + 1), jnp.float32)
  sums_BHWL = jax.lax.fori_loop(0, rows * columns, add_window, sums_BHWL)[
    :, : canvas[0], : canvas[1]
  ]
  return sums_BHWL[..., :-1] / jnp.maximum(sums_BHWL[..., -1:], 1)


def scorer_at_one_scale(
  config: ConfigDict,
  structure: Skeleton,
  out_shardings: jax.sharding.Sharding | None = None,
) -> jax.stages.Wrapped:
  """Returns the jitted function from images at one scale to the scores of the classes.

  Args:
    config: config of the run; its windows and mirror images are combined.
    structure: skeleton of the model.
    out_shardings: sharding of the scores.

  Returns:
    A function (arrays, image_BHWC, size_B2, original_size_B2, canvas) -> float32 [B, *canvas, K] at the size
    of the image files; the canvas is static.
  """
  swapped_K = crops.mirror_table(config.model.swaps)[: config.model.num_classes]

  @functools.partial(jax.jit, static_argnames="canvas", out_shardings=out_shardings)
  def scores_at_one_scale(arrays, image_BHWC, size_B2, original_size_B2, canvas):
    model = structure.fill(arrays)
    infer = functools.partial(
      probabilities,
      model.logits,
      classes=config.model.num_classes,
      window=tuple(config.eval.window),
      overlap=config.eval.overlap,
      **rounding(config),
    )
    scores_BHWK = infer(image_BHWC, size_B2)
    if config.eval.flip:
      other_BHWK = infer(mirror(image_BHWC, size_B2), size_B2)
      scores_BHWK += mirror(other_BHWK, size_B2)[..., swapped_K]
    return resized(scores_BHWK, size_B2, original_size_B2, canvas)

  return scores_at_one_scale


def labeller(
  config: ConfigDict,
  structure: Skeleton,
  *,
  place: Callable[[dict], dict] = lambda batch: batch,
  out_shardings: jax.sharding.Sharding | None = None,
) -> Callable[..., jax.Array]:
  """Returns a function from images to label maps, over the views that `config.eval` sets.

  The probabilities of all windows, scales and mirror images are averaged at the size of the image file.

  Args:
    config: config of the run.
    structure: skeleton of the model.
    place: function that puts a batch of arrays on the devices.
    out_shardings: sharding of the label maps.

  Returns:
    A function (arrays, image_BHWC, size_B2, original_size_B2, canvas) -> uint8 [B, *canvas] of classes,
    with images as `batches.eval_batches` yields them, and a canvas at least as large as each file's image.
  """
  scales = tuple(config.eval.scales)
  scores_at_one_scale = scorer_at_one_scale(config, structure, out_shardings)

  @functools.partial(jax.jit, out_shardings=out_shardings)
  def best(scores_BHWK):
    return jnp.argmax(scores_BHWK, axis=-1).astype(jnp.uint8)

  def label(arrays, image_BHWC, size_B2, original_size_B2, canvas):
    total_BHWK = 0
    for scale in scales:
      image, size = at_scale(image_BHWC, size_B2, scale, **rounding(config))
      inputs = place({"image": image, "size": size, "original": original_size_B2})
      total_BHWK += scores_at_one_scale(
        arrays, inputs["image"], inputs["size"], inputs["original"], canvas=tuple(canvas)
      )
    return best(total_BHWK)

  return label


def rounding(config: ConfigDict) -> Rounding:
  """Returns how the sizes of canvases are rounded up.

  They are multiples of `data.canvas_multiple`, and one pixel more with `model.align_corners`: then the last
  pixel of a canvas lies on the last position of a level, as with the crops. Where devices share the rows of
  an image, they stay multiples. With `model.backbone.masks_padding`, the canvas of an image does not affect
  its result.
  """
  whole_images = config.mesh.shape[-1] == 1
  return {
    "multiple": canvases.multiple_of(config.data),
    "remainder": int(config.model.align_corners and whole_images),
  }


def at_scale(
  image_BHWC: np.ndarray, size_B2: np.ndarray, scale: float, *, multiple: int, remainder: int
) -> tuple[np.ndarray, np.ndarray]:
  """Resizes images by a factor, on canvases of sizes as of `rounding`; returns them and their sizes."""
  if scale == 1:
    return image_BHWC, size_B2
  canvas = scaled_canvas(image_BHWC.shape[1:3], scale, multiple=multiple, remainder=remainder)
  sizes = [crops.scaled_size(size, scale) for size in size_B2]
  images = [
    transforms.resize_and_pad(image_HWC[: old[0], : old[1]], new, canvas)
    for image_HWC, old, new in zip(image_BHWC, size_B2, sizes, strict=True)
  ]
  return np.stack(images), np.array(sizes, np.int32)


def scaled_canvas(
  canvas: tuple[int, int], scale: float, *, multiple: int, remainder: int
) -> tuple[int, int]:
  """Returns the size of the canvas that `at_scale` lays images on."""
  if scale == 1:
    return canvas
  height, width = (
    transforms.round_up(round(edge * scale + 0.5), multiple, remainder) for edge in canvas
  )
  return height, width


def _cut(x_BHWC, start_B2, size):
  """Returns the window of each image that begins at its start, [B, *size, C]."""
  return jax.vmap(
    lambda x_HWC, start_2: jax.lax.dynamic_slice(
      x_HWC, (start_2[0], start_2[1], 0), (*size, x_HWC.shape[-1])
    )
  )(x_BHWC, start_B2)


def _paste(x_BHWC, window_BhwC, start_B2):
  """Returns the images, each with its window pasted at its start."""
  return jax.vmap(
    lambda x_HWC, window_hwC, start_2: jax.lax.dynamic_update_slice(
      x_HWC, window_hwC, (start_2[0], start_2[1], 0)
    )
  )(x_BHWC, window_BhwC, start_B2)
