"""Feature maps that know which of their positions lie on the image.

Shapes: B batch, H W rows and columns, C channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


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
    stride: pixels of the image between two neighbouring positions.
  """

  values_BHWC: jax.Array
  valid_BHW: jax.Array
  stride: int

  @property
  def size(self) -> tuple[int, int]:
    return self.values_BHWC.shape[1:3]

  @property
  def channels(self) -> int:
    return self.values_BHWC.shape[-1]

  def with_values(self, values_BHWC: jax.Array) -> "FeatureMap":
    return dataclasses.replace(self, values_BHWC=values_BHWC)

  def masked(self) -> jax.Array:
    """[B, H, W, C] values, zero on padding: what a convolution at the image's border must see."""
    return jnp.where(self.valid_BHW[..., None], self.values_BHWC, 0)


Pyramid = tuple[FeatureMap, ...]  # fine to coarse


def valid_positions(size_B2: jax.Array, height: int, width: int) -> jax.Array:
  """[B, H, W] bool: the positions of a height x width canvas covered by images of (h, w) `size_B2`.

  Images sit in the canvas's upper left corner.
  """
  rows_H, columns_W = jnp.arange(height), jnp.arange(width)
  return (rows_H[None, :, None] < size_B2[:, 0, None, None]) & (
    columns_W[None, None, :] < size_B2[:, 1, None, None]
  )


def downsample_valid(valid_BHW: jax.Array, factor: int) -> jax.Array:
  """[B, ceil(H/f), ceil(W/f)]: a strided convolution's output position i is centred on input i*f."""
  return valid_BHW[:, ::factor, ::factor]


def subsample(level: FeatureMap, factor: int = 2) -> FeatureMap:
  """Every `factor`-th position: how FPN makes P6 for the RPN (Lin et al. 2017)."""
  return FeatureMap(
    level.values_BHWC[:, ::factor, ::factor],
    downsample_valid(level.valid_BHW, factor),
    level.stride * factor,
  )


def mean_over_valid(level: FeatureMap) -> jax.Array:
  """[B, C] global average pooling over the positions on the image, in float32."""
  count_B1 = jnp.maximum(jnp.sum(level.valid_BHW, axis=(1, 2), dtype=jnp.float32), 1)[:, None]
  return jnp.sum(level.masked().astype(jnp.float32), axis=(1, 2)) / count_B1


def as_pyramid(maps) -> Pyramid:
  """A Pyramid from plain [B, H, W, C] arrays, all positions valid, or from a Pyramid itself.

  Plain arrays have no image behind them: strides are taken relative to the finest map.
  """
  maps = tuple(maps)
  if not maps:
    raise ValueError("a pyramid needs at least one feature map, got none")
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
  """How many positions of a map lie between two neighbours of a coarser one.

  Sizes may be rounded up, as padded convolutions do, or down. Where several strides would do (9 to 3
  positions), a power of two is more likely.

  Raises:
    ValueError: no stride leads from one size to the other.
  """
  strides = sorted(range(1, max(fine) + 1), key=lambda s: (s & (s - 1) != 0, s))
  for rounding in (lambda n, s: -(-n // s), lambda n, s: n // s):
    for stride in strides:
      if all(rounding(f, stride) == c for f, c in zip(fine, coarse, strict=True)):
        return stride
  raise ValueError(
    f"a map of {fine} positions and one of {coarse} are no levels of one pyramid: their sizes must be "
    "(rounded) multiples of each other"
  )
