"""Geometry of boxes (x0, y0, x1, y1) in pixels; boxes of zeros, as used for padding, are valid inputs.

Shape suffixes: N, M boxes, 4 coordinates. Leading axes (batch, class) are allowed where a docstring
writes `...`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# A predicted box is at most 1000/16 times as wide or high as its reference.
_MAX_LOG_SCALE = math.log(1000.0 / 16)


def area(boxes_N4: jax.Array) -> jax.Array:
  """Computes the areas of boxes.

  Args:
    boxes_N4: [..., 4] float, pixels.

  Returns:
    [...], square pixels.

  Raises:
    ValueError: the shape or dtype is not that of boxes; this holds for all functions of this module.
  """
  _check(boxes_N4, "boxes_N4")
  return _area(*_columns(boxes_N4))


def iou(a_N4: jax.Array, b_M4: jax.Array) -> jax.Array:
  """Computes the intersection over union of every box of `a` with every box of `b`.

  Args:
    a_N4: [N, 4] float, pixels.
    b_M4: [M, 4] float, pixels.

  Returns:
    [N, M] in [0, 1]; 0 where the union is empty.
  """
  _check(a_N4, "a_N4", rank=2)
  _check(b_M4, "b_M4", rank=2)
  return iou_of_columns(_columns(a_N4), _columns(b_M4))


def iou_of_columns(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
  """Like `iou`, of boxes as columns x0, y0, x1, y1: [N] arrays of `a`, [M] of `b`.

  TPUs pad the last axis of an array to 128, so that an array [N, 4] of many boxes takes 32 times its size.
  """
  a, b = [x_N[:, None] for x_N in a], [x_M[None] for x_M in b]
  width_NM = jnp.minimum(a[2], b[2]) - jnp.maximum(a[0], b[0])
  height_NM = jnp.minimum(a[3], b[3]) - jnp.maximum(a[1], b[1])
  intersection_NM = jnp.maximum(width_NM, 0) * jnp.maximum(height_NM, 0)
  union_NM = _area(*a) + _area(*b) - intersection_NM
  # The inner where keeps 0/0 out of the gradient.
  return jnp.where(union_NM > 0, intersection_NM / jnp.where(union_NM > 0, union_NM, 1), 0)


def clip(
  boxes_N4: jax.Array, height: jax.typing.ArrayLike, width: jax.typing.ArrayLike
) -> jax.Array:
  """Clips boxes to an image.

  Args:
    boxes_N4: [..., 4] float, pixels.
    height: height of the image, scalar, pixels; may be traced.
    width: width of the image, scalar, pixels; may be traced.

  Returns:
    [..., 4] with x in [0, width] and y in [0, height].
  """
  _check(boxes_N4, "boxes_N4")
  x0, y0, x1, y1 = _columns(boxes_N4)
  return jnp.stack(
    [jnp.clip(x0, 0, width), jnp.clip(y0, 0, height)]
    + [jnp.clip(x1, 0, width), jnp.clip(y1, 0, height)],
    axis=-1,
  )


def large_enough(boxes_N4: jax.Array, side: float) -> jax.Array:
  """Returns which of [..., 4] boxes are at least `side` pixels wide and high, [...] bool."""
  _check(boxes_N4, "boxes_N4")
  x0, y0, x1, y1 = _columns(boxes_N4)
  return (x1 - x0 >= side) & (y1 - y0 >= side)


def encode(
  boxes_N4: jax.Array, reference_N4: jax.Array, weights: tuple[float, float, float, float]
) -> jax.Array:
  """Computes the deltas from which `decode` gives `boxes` again.

  Args:
    boxes_N4: [..., 4] float boxes to encode, pixels.
    reference_N4: [..., 4] float anchors or proposals, pixels.
    weights: factors of (dx, dy, dw, dh).

  Returns:
    [..., 4] deltas; 0 where either box is degenerate.

  Source: Girshick et al., Rich feature hierarchies, appendix C.
  """
  _check(boxes_N4, "boxes_N4")
  _check(reference_N4, "reference_N4")
  cx, cy, w, h = _centre_form(boxes_N4)
  rx, ry, rw, rh = _centre_form(reference_N4)
  whole = (w > 0) & (h > 0) & (rw > 0) & (rh > 0)
  w, h, rw, rh = (jnp.where(whole, size, 1) for size in (w, h, rw, rh))
  wx, wy, ww, wh = weights
  deltas_N4 = jnp.stack(
    [wx * (cx - rx) / rw, wy * (cy - ry) / rh, ww * jnp.log(w / rw), wh * jnp.log(h / rh)], axis=-1
  )
  return jnp.where(whole[..., None], deltas_N4, 0)


def decode(
  deltas_N4: jax.Array, reference_N4: jax.Array, weights: tuple[float, float, float, float]
) -> jax.Array:
  """Applies predicted deltas to reference boxes.

  Args:
    deltas_N4: [..., 4] float deltas; dw and dh are clipped to at most log(1000 / 16).
    reference_N4: [..., 4] float anchors or proposals, pixels; same rank as the deltas.
    weights: factors of (dx, dy, dw, dh), as for `encode`.

  Returns:
    [..., 4] boxes, pixels, not clipped to the image.

  Source: Girshick et al., Rich feature hierarchies, appendix C.
  """
  _check(deltas_N4, "deltas_N4")
  _check(reference_N4, "reference_N4")
  cx, cy, w, h = _centre_form(reference_N4)
  dx, dy, dw, dh = (
    delta / weight for delta, weight in zip(_columns(deltas_N4), weights, strict=True)
  )
  centre_x, centre_y = dx * w + cx, dy * h + cy
  half_w = 0.5 * (jnp.exp(jnp.minimum(dw, _MAX_LOG_SCALE)) * w)
  half_h = 0.5 * (jnp.exp(jnp.minimum(dh, _MAX_LOG_SCALE)) * h)
  return jnp.stack(
    [centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h], axis=-1
  )


def _columns(boxes_N4):
  return tuple(boxes_N4[..., i] for i in range(4))


def _area(x0, y0, x1, y1):
  return (x1 - x0) * (y1 - y0)


def _centre_form(boxes_N4):
  x0, y0, x1, y1 = _columns(boxes_N4)
  w, h = x1 - x0, y1 - y0
  return x0 + 0.5 * w, y0 + 0.5 * h, w, h


def _check(boxes, name: str, rank: int | None = None):
  if boxes.ndim == 0 or boxes.shape[-1] != 4 or (rank is not None and boxes.ndim != rank):
    raise ValueError(f"{name} must end in an axis of 4 (rank {rank or 'any'}), got {boxes.shape}")
  if not jnp.issubdtype(boxes.dtype, jnp.floating):
    raise ValueError(f"{name} must be floating, got {boxes.dtype}")
