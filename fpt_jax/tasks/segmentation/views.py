"""Probabilities of classes for whole images: windows, mirror images and other sizes put together.

Shapes: B images, H W rows and columns of a canvas, h w those of a window's, K classes, C channels.
Sizes are (height, width) in pixels. An image lies at the top left of its canvas; the rest is padding,
which changes nothing.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fpt_jax.models.feature_map import valid_positions


def probabilities(
  logits: Callable[[jax.Array, jax.Array], jax.Array],
  image_BHWC: jax.Array,
  size_B2: jax.Array,
  *,
  window: tuple[int, int] | tuple[()] = (),
  overlap: float = 0.0,
  multiple: int = 1,
) -> jax.Array:
  """Probabilities of the classes at every pixel, seen through windows that slide over the image.

  Windows follow each other in rows; the last of a row ends at the image's edge. A pixel that several
  windows see gets the mean of their probabilities. A window of the image's size is the whole image.

  Args:
    logits: of images and their sizes, [B, h, w, K] float32, see `models.segmenter`.
    image_BHWC: float32 0..255, zero on padding.
    size_B2: int32.
    window: height and width of a window; (): the whole canvas.
    overlap: share of a window that the next one sees again, from 0 to less than 1.
    multiple: a window's own canvas is its size rounded up to multiples of this.

  Returns:
    [B, H, W, K] float32, 0 on padding.
  """
  canvas = image_BHWC.shape[1:3]
  window = tuple(map(min, window, canvas)) if window else canvas
  room = tuple(
    min(-(-w // multiple) * multiple, edge) for w, edge in zip(window, canvas, strict=True)
  )
  step_2 = jnp.array([max(1, math.ceil(w * (1 - overlap))) for w in window])
  window_2 = jnp.array(window)
  spare_B2 = jnp.maximum(size_B2 - window_2[None], 0)
  rows, columns = 1 + jnp.max(-(-spare_B2 // step_2[None]), axis=0)
  # a window's canvas may reach beyond the image's
  reach = [(0, 0), *((0, r - w) for r, w in zip(room, window, strict=True)), (0, 0)]
  padded_BHWC = jnp.pad(image_BHWC, reach)
  classes = jax.eval_shape(logits, image_BHWC[:, : room[0], : room[1]], size_B2).shape[-1]

  def look(i, sums):
    place_2 = jnp.stack([i // columns, i % columns])
    start_B2 = jnp.minimum((place_2 * step_2)[None], spare_B2)
    # an image smaller than others of its batch is through with its windows earlier
    new_B = ((place_2 == 0)[None] | (((place_2 - 1) * step_2)[None] < spare_B2)).all(axis=1)
    seen_B2 = jnp.minimum(size_B2 - start_B2, window_2[None])
    seen_Bhw = valid_positions(seen_B2, *room)
    image_BhwC = jnp.where(seen_Bhw[..., None], _cut(padded_BHWC, start_B2, room), 0)
    weight_Bhw1 = (seen_Bhw & new_B[:, None, None])[..., None].astype(jnp.float32)
    scores_BhwK = jax.nn.softmax(logits(image_BhwC, seen_B2), axis=-1) * weight_Bhw1
    scores_BhwL = jnp.concatenate([scores_BhwK, weight_Bhw1], axis=-1)
    return _paste(sums, _cut(sums, start_B2, room) + scores_BhwL, start_B2)

  sums_BHWL = jnp.zeros((*padded_BHWC.shape[:3], classes + 1), jnp.float32)
  sums_BHWL = jax.lax.fori_loop(0, rows * columns, look, sums_BHWL)[:, : canvas[0], : canvas[1]]
  return sums_BHWL[..., :-1] / jnp.maximum(sums_BHWL[..., -1:], 1)


def mirrored(x_BHWC: jax.Array, size_B2: jax.Array) -> jax.Array:
  """Images, or scores, mirrored left to right, each within its own size; padding stays padding."""
  width = x_BHWC.shape[2]
  return jax.vmap(lambda x_HWC, size_2: jnp.roll(x_HWC[:, ::-1], size_2[1] - width, axis=1))(
    x_BHWC, size_B2
  )


def resized(
  x_BHWC: jax.Array, size_B2: jax.Array, new_size_B2: jax.Array, canvas: tuple[int, int]
) -> jax.Array:
  """Resizes images, or scores, each from its own size to its own new one.

  Bilinear with half-pixel centres and no antialiasing, as `data.transforms.resize_and_pad`; nothing
  beyond an image's edge is looked at. The same size gives the same values.

  Args:
    x_BHWC: float.
    size_B2: int32.
    new_size_B2: int32.
    canvas: of the result, at least as large as every new size.

  Returns:
    [B, *canvas, C]; beyond the new sizes, the edges go on.
  """

  def one(x_HWC, size_2, new_size_2):
    for axis in (0, 1):
      last = size_2[axis] - 1
      ratio = size_2[axis] / new_size_2[axis]
      place_N = jnp.clip((jnp.arange(canvas[axis]) + 0.5) * ratio - 0.5, 0, last)
      low_N = jnp.floor(place_N).astype(jnp.int32)
      share_N = jnp.expand_dims(place_N - low_N, (1 - axis, 2))
      low_HWC = jnp.take(x_HWC, low_N, axis=axis)
      high_HWC = jnp.take(x_HWC, jnp.minimum(low_N + 1, last), axis=axis)
      x_HWC = low_HWC * (1 - share_N) + high_HWC * share_N
    return x_HWC

  return jax.vmap(one)(x_BHWC, size_B2, new_size_B2)


def _cut(x_BHWC, start_B2, size):
  """[B, *size, C]: the window of each image that begins at its start."""
  return jax.vmap(
    lambda x_HWC, start_2: jax.lax.dynamic_slice(
      x_HWC, (start_2[0], start_2[1], 0), (*size, x_HWC.shape[-1])
    )
  )(x_BHWC, start_B2)


def _paste(x_BHWC, window_BhwC, start_B2):
  """The images with each one's window laid over it at its start."""
  return jax.vmap(
    lambda x_HWC, window_hwC, start_2: jax.lax.dynamic_update_slice(
      x_HWC, window_hwC, (start_2[0], start_2[1], 0)
    )
  )(x_BHWC, window_BhwC, start_B2)
