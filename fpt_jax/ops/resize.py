"""Bilinear resizes: of maps with padding by an integer factor, and of images of sizes known at run time.

Shapes: B batch, h w rows and columns of the coarse map, H W of the fine one, C channels, N lengths of an
edge.
"""

import jax
import jax.numpy as jnp
import numpy as np


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


def resized(
  x_BHWC: jax.Array, size_B2: jax.Array, new_size_B2: jax.Array, canvas: tuple[int, int]
) -> jax.Array:
  """Resizes images, or scores, each from its own size to its own new size.

  Bilinear with half-pixel centres and no antialiasing, as `data.transforms.resize_and_pad`; values
  beyond an image's edge are not used. The same size gives the same values.

  Args:
    x_BHWC: images or scores, float.
    size_B2: sizes of the images, int32.
    new_size_B2: sizes to resize to, int32.
    canvas: size of the result, at least every new size.

  Returns:
    [B, *canvas, C]; beyond the new sizes, the values of the edges continue.
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


def rounding_limits(target: int, longest: int) -> np.ndarray:
  """Returns where float64 rounds products with `target / n` down, for `scaled_edge`.

  Args:
    target: length of an edge after the resize, pixels.
    longest: largest length of an edge, pixels.

  Returns:
    int32 [longest + 1]. For z * (n / target) an integer, float64 gives less than z for
    z * (n / target) * (target / n) if z, shifted to 2**23 or more, is greater than entry n; for z a power of
    two, if the entry is less than 2**24. Entry 0 is not used.
  """
  limits_N = np.full(longest + 1, 2**24, np.int32)
  for n in range(1, longest + 1):
    numerator, denominator = (target / n).as_integer_ratio()
    short_of = target * denominator - numerator * n  # the relative error times target * denominator
    if 2**54 * short_of > target * denominator:  # half the spacing below a power of two
      limits_N[n] = target * denominator // (short_of * 2**30)
  return limits_N


def scaled_edge(
  edge: jax.Array, target: jax.Array, divisor: jax.Array, limit: jax.Array, *, halves: int = 1
) -> jax.Array:
  """Computes floor(edge * (target / divisor)) in integers, as float64 computes it on the host.

  Where the product is an integer, float64 may give a little less, which costs a pixel. The sizes of images
  must not depend on where they are computed, and TPUs have no float64.

  Args:
    edge, target, divisor: int32 scalars; the products must be less than 2**30, the result less than 2**22.
    limit: entry `divisor` of `rounding_limits(target)`.
    halves: 2 to round to the nearest integer instead: floor(edge * (target / divisor) + 0.5).

  Returns:
    int32 scalar.
  """
  scaled = halves * edge * target
  floor, rest = scaled // divisor, scaled % divisor
  top = 31 - jax.lax.clz(floor)
  shifted = jnp.left_shift(floor, jnp.maximum(23 - top, 0))
  below = jnp.where(shifted == 2**23, limit < 2**24, shifted > limit)
  floor -= ((rest == 0) & below).astype(jnp.int32)
  return floor if halves == 1 else (floor + 1) // 2
