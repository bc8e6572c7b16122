"""Mirror images of padded batches.

Shapes: B batch, H W rows and columns of the canvas, C channels.
"""

import jax
import jax.numpy as jnp


def mirror(x_BHWC: jax.Array, size_B2: jax.Array) -> jax.Array:
  """Mirrors images left to right, each within its own width.

  Args:
    x_BHWC: [B, H, W, C] images, or scores of their pixels, in the upper left corner of a canvas.
    size_B2: [B, 2] int32, height and width of each image in pixels.

  Returns:
    [B, H, W, C]; each image stays at the left of its canvas, and its padding at the right.
  """
  canvas_width = x_BHWC.shape[2]

  def one_image(x_HWC, size_2):
    return jnp.roll(x_HWC[:, ::-1], size_2[1] - canvas_width, axis=1)

  return jax.vmap(one_image)(x_BHWC, size_B2)
