"""Feature maps that mark which of their positions lie on the image.

Shapes: B batch, H W rows and columns, C channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fpt_jax.ops.resize import upsample_bilinear


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("values_BHWC", "valid_BHW"),
  meta_fields=("stride",),
)
@dataclasses.dataclass(frozen=True)
class FeatureMap:
  """One level of a pyramid.

  Attributes:
    values_BHWC: [B, H, W, C] features.
    valid_BHW: [B, H, W] bool, True where the position lies on the image, not on its padding.
    stride: pixels of the image between neighbouring positions.
  """

  values_BHWC: jax.Array
  valid_BHW: jax.Array
  stride: int

  @property
  def size(self) -> tuple[int, int]:
    """(rows, columns)."""
    return self.values_BHWC.shape[1:3]

  @property
  def channels(self) -> int:
    return self.values_BHWC.shape[-1]

  def with_values(self, values_BHWC: jax.Array) -> "FeatureMap":
    """Returns a map with other values at the same positions."""
    return dataclasses.replace(self, values_BHWC=values_BHWC)

  def masked(self) -> jax.Array:
    """[B, H, W, C] values with zeros on padding, for a convolution that must not see the padding."""
    return masked(self.values_BHWC, self.valid_BHW)


Pyramid = tuple[FeatureMap, ...]  # fine to coarse


def masked(x_BHWC: jax.Array, valid_BHW: jax.Array) -> jax.Array:
  """[B, H, W, C]: features with zeros on padding."""
  return jnp.where(valid_BHW[..., None], x_BHWC, 0)


def valid_positions(size_B2: jax.Array, height: int, width: int) -> jax.Array:
  """Marks the positions of a canvas that images cover.

  Args:
    size_B2: [B, 2] int, height and width of each image, in the upper left corner of the canvas.
    height, width: size of the canvas.

  Returns:
    [B, H, W] bool.
  """
  rows_H, columns_W = jnp.arange(height), jnp.arange(width)
  return (rows_H[None, :, None] < size_B2[:, 0, None, None]) & (
    columns_W[None, None, :] < size_B2[:, 1, None, None]
  )


def downsample_valid(valid_BHW: jax.Array, factor: int) -> jax.Array:
  """[B, ceil(H/f), ceil(W/f)]: output position i of a strided convolution is centred on input i*f."""
  return valid_BHW[:, ::factor, ::factor]


def subsample(level: FeatureMap, factor: int = 2) -> FeatureMap:
  """Returns every `factor`-th position, as FPN makes P6 for the RPN (Lin et al. 2017)."""
  return FeatureMap(
    level.values_BHWC[:, ::factor, ::factor],
    downsample_valid(level.valid_BHW, factor),
    level.stride * factor,
  )


def average_pool(x: FeatureMap) -> FeatureMap:
  """[B, ceil(H / 2), ceil(W / 2), C]: 3x3 means over valid positions, with stride 2."""

  def window_sums(y_BHWC):
    return jax.lax.reduce_window(
      y_BHWC, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )

  count_BHW1 = window_sums(x.valid_BHW[..., None].astype(jnp.float32))
  mean_BHWC = window_sums(x.masked().astype(jnp.float32)) / jnp.maximum(count_BHW1, 1)
  return FeatureMap(
    mean_BHWC.astype(x.values_BHWC.dtype), downsample_valid(x.valid_BHW, 2), x.stride * 2
  )


def upsampled_bilinear(x: FeatureMap, fine: FeatureMap) -> jax.Array:
  """[B, H, W, C] of x's dtype: a map at the size of one with a smaller stride, with half-pixel centres.

  The factor is the ratio of the strides, whatever the sizes are, so that positions keep their place in the
  image. Padding is not read.
  """
  factor = x.stride // fine.stride
  y_BHWC = upsample_bilinear(x.values_BHWC, x.valid_BHW, factor, *fine.size)
  return y_BHWC.astype(x.values_BHWC.dtype)


def mean_over_valid(level: FeatureMap) -> jax.Array:
  """[B, C] float32: the mean over the positions on the image (global average pooling)."""
  count_B1 = jnp.maximum(jnp.sum(level.valid_BHW, axis=(1, 2), dtype=jnp.float32), 1)[:, None]
  return jnp.sum(level.masked().astype(jnp.float32), axis=(1, 2)) / count_B1


def as_pyramid(maps) -> Pyramid:
  """Makes a Pyramid of plain arrays.

  Args:
    maps: [B, H, W, C] arrays, fine to coarse; or `FeatureMap`s, which are returned unchanged.

  Returns:
    `FeatureMap`s. Of plain arrays, all positions are valid, and strides are relative to the finest map.

  Raises:
    ValueError: there is no map, a map does not have four axes, or the sizes do not form a pyramid.
  """
  maps = tuple(maps)
  if not maps:
    raise ValueError("a pyramid needs at least one feature map")
  if all(isinstance(m, FeatureMap) for m in maps):
    return maps
  for i, m in enumerate(maps):
    if getattr(m, "ndim", None) != 4:
      raise ValueError(
        f"feature map {i} must be a [batch, height, width, channels] array, "
        f"got {getattr(m, 'shape', type(m).__name__)}"
      )
  finest = max((m.shape[1:3] for m in maps), key=lambda size: size[0] * size[1])
  return tuple(
    FeatureMap(m, jnp.ones(m.shape[:3], bool), stride_between(finest, m.shape[1:3])) for m in maps
  )


def stride_between(fine: tuple[int, int], coarse: tuple[int, int]) -> int:
  """Infers the stride between two levels from their sizes.

  Args:
    fine, coarse: (rows, columns) of the two maps.

  Returns:
    Positions of the fine map between neighbouring positions of the coarse map. Sizes may be rounded up,
    as by padded convolutions, or down. Where several strides fit (9 to 3 positions), a power of two is
    preferred.

  Raises:
    ValueError: no stride leads from one size to the other.
  """
  strides = sorted(range(1, max(fine) + 1), key=lambda s: (s & (s - 1) != 0, s))
  for rounding in (lambda n, s: -(-n // s), lambda n, s: n // s):
    for stride in strides:
      if all(rounding(f, stride) == c for f, c in zip(fine, coarse, strict=True)):
        return stride
  raise ValueError(
    f"maps of {fine} and {coarse} positions are not levels of one pyramid: their sizes must be "
    "(rounded) multiples of each other"
  )
