"""Bilinear upsampling of maps with padding.

Shapes: B batch, h w rows and columns of the coarse map, H W of the fine one, C channels.
"""

import jax
import jax.numpy as jnp


@jax.named_scope("upsample")
def upsample_bilinear(
  x_BhwC: jax.Array,
  valid_Bhw: jax.Array,
  factor: int,
  height: int,
  width: int,
  *,
  align_corners: bool = False,
) -> jax.Array:
  """Upsamples a map by an integer factor without reading its padding.

  Fine position p lies at (p + 0.5) / factor - 0.5 on the coarse map: half-pixel centres. With aligned
  corners it lies at p / factor, as output position i of a strided convolution is centred on input
  i * factor; for `factor` * (n - 1) + 1 positions, this is torch's `interpolate(align_corners=True)`.

  Invalid neighbours have weight zero, and the other weights are normalised, so the last position is
  repeated at the border of an image, independently of its canvas. Between invalid positions, the result
  is 0.

  Args:
    x_BhwC: [B, h, w, C] float.
    valid_Bhw: [B, h, w] bool.
    factor: fine positions per coarse position.
    height, width: size of the result, at most `factor` times h and w; it is cropped at the bottom and
      the right.
    align_corners: whether the centres of the first positions are aligned, see above.

  Returns:
    [B, height, width, C] float32.

  Raises:
    ValueError: the map is too small for this size.
  """
  size = (height, width)
  if any(factor * n < m for n, m in zip(x_BhwC.shape[1:3], size, strict=True)):
    raise ValueError(f"a map of {x_BhwC.shape[1:3]} times {factor} does not cover {size}")
  translation = 0.0
  if align_corners:
    translation = (1 - factor) / 2
    # an invalid position more, since fine ones lie up to (factor - 1) / factor behind the last coarse one
    x_BhwC = jnp.pad(x_BhwC, ((0, 0), (0, 1), (0, 1), (0, 0)))
    valid_Bhw = jnp.pad(valid_Bhw, ((0, 0), (0, 1), (0, 1)))

  def upsample(y_BhwC):
    return jax.image.scale_and_translate(
      y_BhwC,
      (y_BhwC.shape[0], *size, y_BhwC.shape[3]),
      (1, 2),
      jnp.full(2, factor, jnp.float32),
      jnp.full(2, translation, jnp.float32),
      method="bilinear",
      antialias=False,
    )

  valid_Bhw1 = valid_Bhw[..., None]
  values_BHWC = upsample(jnp.where(valid_Bhw1, x_BhwC, 0).astype(jnp.float32))
  weight_BHW1 = upsample(valid_Bhw1.astype(jnp.float32))
  return values_BHWC / jnp.where(weight_BHW1 > 0, weight_BHW1, 1)
