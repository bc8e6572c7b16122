"""Canny's edge detector (Canny 1986) on padded batches of colour images, with the conventions of OpenCV.

Shapes: B batch, H W rows and columns of the canvas, C colours.
"""

import jax
import jax.numpy as jnp

from fpt_jax.ops.neighbours import shifted

_BITS = 15  # of fixed-point numbers
# tan 22.5 degrees; tan 67.5 degrees is larger by 2
_TAN_22 = round(0.4142135623730950488 * 2**_BITS)


def canny(
  image_BHWC: jax.Array, valid_BHW: jax.Array, low: float = 10, high: float = 100
) -> jax.Array:
  """Finds the edges of images, as `cv2.Canny(image, low, high)` does for each image without its padding.

  The image is not smoothed first. Gradients come from Sobel's 3x3 filters; outside the image, the values at
  its border are repeated. The magnitude of a gradient is |x| + |y|, in the colour where this is largest. A
  position is an edge if its magnitude is a maximum along the gradient, whose direction is rounded to 45
  degrees, and is above `high`. It is also an edge if its magnitude is above `low` and other such positions
  connect it to an edge, diagonally or not.

  Args:
    image_BHWC: [B, H, W, C] images in 0..255, in the upper left corner of the canvas; they are rounded.
    valid_BHW: [B, H, W] bool, the positions on the image.
    low, high: thresholds of the magnitude.

  Returns:
    [B, H, W] bool; False on padding.
  """
  x_BHW, y_BHW = gradients(jnp.round(image_BHWC).astype(jnp.int32), valid_BHW)
  magnitude_BHW = jnp.where(valid_BHW, jnp.abs(x_BHW) + jnp.abs(y_BHW), 0)
  thin_BHW = (magnitude_BHW > low) & is_maximum(x_BHW, y_BHW, magnitude_BHW)
  return connected(thin_BHW & (magnitude_BHW > high), thin_BHW)


def gradients(image_BHWC: jax.Array, valid_BHW: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes Sobel's gradients along columns and rows in the colour whose magnitude is largest.

  Args:
    image_BHWC: [B, H, W, C] int32.
    valid_BHW: [B, H, W] bool, the positions on the image.

  Returns:
    Two int32 arrays [B, H, W].
  """

  def sides(x_BHWC, rows, columns):
    return (
      jnp.where(
        shifted(valid_BHW, sign * rows, sign * columns)[..., None],
        shifted(x_BHWC, sign * rows, sign * columns),
        x_BHWC,
      )
      for sign in (-1, 1)
    )

  left_BHWC, right_BHWC = sides(image_BHWC, 0, 1)
  above_BHWC, below_BHWC = sides(right_BHWC - left_BHWC, 1, 0)
  x_BHWC = above_BHWC + 2 * (right_BHWC - left_BHWC) + below_BHWC
  smooth_BHWC = left_BHWC + 2 * image_BHWC + right_BHWC
  above_BHWC, below_BHWC = sides(smooth_BHWC, 1, 0)
  y_BHWC = below_BHWC - above_BHWC
  x_BHW, y_BHW = x_BHWC[..., 0], y_BHWC[..., 0]
  for c in range(1, image_BHWC.shape[-1]):
    larger_BHW = jnp.abs(x_BHWC[..., c]) + jnp.abs(y_BHWC[..., c]) > jnp.abs(x_BHW) + jnp.abs(y_BHW)
    x_BHW = jnp.where(larger_BHW, x_BHWC[..., c], x_BHW)
    y_BHW = jnp.where(larger_BHW, y_BHWC[..., c], y_BHW)
  return x_BHW, y_BHW


def is_maximum(x_BHW: jax.Array, y_BHW: jax.Array, magnitude_BHW: jax.Array) -> jax.Array:
  """[B, H, W] bool: whether a magnitude is the largest of three along its gradient (int32 arrays)."""
  along_x, along_y = jnp.abs(x_BHW), jnp.abs(y_BHW) << _BITS
  flat_BHW = along_y < along_x * _TAN_22
  steep_BHW = along_y > along_x * _TAN_22 + (along_x << (_BITS + 1))

  def larger(rows, columns, *, strictly):
    other_BHW = shifted(magnitude_BHW, rows, columns)
    return magnitude_BHW > other_BHW if strictly else magnitude_BHW >= other_BHW

  # of two equal neighbours on a line, the left or upper one is the maximum; on a diagonal, neither is
  horizontal_BHW = larger(0, -1, strictly=True) & larger(0, 1, strictly=False)
  vertical_BHW = larger(-1, 0, strictly=True) & larger(1, 0, strictly=False)
  falling_BHW = larger(-1, -1, strictly=True) & larger(1, 1, strictly=True)
  rising_BHW = larger(-1, 1, strictly=True) & larger(1, -1, strictly=True)
  diagonal_BHW = jnp.where((x_BHW ^ y_BHW) < 0, rising_BHW, falling_BHW)
  straight_BHW = jnp.where(flat_BHW, horizontal_BHW, vertical_BHW)
  return jnp.where(flat_BHW | steep_BHW, straight_BHW, diagonal_BHW)


def connected(seeds_BHW: jax.Array, through_BHW: jax.Array) -> jax.Array:
  """[B, H, W] bool: the positions of `through` that are connected to a seed, diagonals included."""

  def grow(state):
    found_BHW, _ = state
    wide_BHW = found_BHW | shifted(found_BHW, 0, -1) | shifted(found_BHW, 0, 1)
    grown_BHW = (wide_BHW | shifted(wide_BHW, -1, 0) | shifted(wide_BHW, 1, 0)) & through_BHW
    return grown_BHW, jnp.any(grown_BHW != found_BHW)

  start = (seeds_BHW & through_BHW, jnp.array(True))
  return jax.lax.while_loop(lambda state: state[1], grow, start)[0]
