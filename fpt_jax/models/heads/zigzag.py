"""The box and mask heads of ZigZagNet (Lin et al., CVPR 2019), with its encoding of regions.

From the authors' detector (github.com/sitingshen/Detectron-ZZNet: `modeling/fast_rcnn_heads.py`, and
`add_three_stage_mask` in `modeling/mask_rcnn_heads.py`), which specifies the operations: every region is
pooled from every level; the box head takes the sum over the levels; the mask head first encodes the
regions of all levels with each other. The encoding has neither a normalisation nor an activation.

Our choice: the initial weights of the encoding keep the variance of the features, whatever the number of
terms of a sum.

Shapes: B batch, R regions, N all regions of a batch, P side of the pooled square, C channels, K classes
with background as 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.heads.box import BoxHead
from fpt_jax.models.heads.mask import MaskHead
from fpt_jax.models.layers import conv


class SummedBoxHead(nnx.Module):
  """The standard box head on the sum of a region's features from all levels.

  Args:
    channels: channels of the pooled features.
    levels: number of levels that a region is pooled from.
    options: other arguments of `BoxHead`.
  """

  def __init__(self, channels: int, *, levels: int, **options):
    del levels  # the sum has no parameters
    self.of_sum = BoxHead(channels, **options)

  def __call__(self, pooled: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Classifies regions and refines their boxes.

    Args:
      pooled: [B, R, P, P, C] regions of every level, fine to coarse.

    Returns:
      Logits [B, R, K] and deltas [B, R, K, 4], float32.
    """
    return self.of_sum(sum_of(pooled))


class RegionEncoding(nnx.Module):
  """Encodes the features of a region from all levels with its mean and with each other.

      part_l = A_l F_l + D_l mean(F_l),   S = sum_l part_l,   result = sum_l (B_l part_l + E_l S)

  where F_l are the features of level l; A_l, B_l and E_l are 1x1 convolutions; and D_l, a transposed
  convolution with a kernel as large as the region, spreads the region's mean over it.

  Args:
    channels: channels C of the pooled features and of the result.
    levels: number of levels that a region is pooled from.
    pool_size: side P of the pooled square, 14 in the authors' detector.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self, channels: int, *, levels: int, pool_size: int, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    options = dict(dtype=dtype, rngs=rngs)

    def share_of(terms: int):
      return nnx.initializers.variance_scaling(1 / terms, "fan_in", "normal")

    def convs(terms: int) -> nnx.List:
      init = share_of(terms)
      return nnx.List(
        [conv(channels, channels, 1, kernel_init=init, **options) for _ in range(levels)]
      )

    self.local = convs(2)
    # With an input of one position, a transposed convolution is a matrix product.
    self.spread = nnx.List(
      [
        nnx.Linear(
          channels, pool_size**2 * channels, use_bias=False, kernel_init=share_of(2), **options
        )
        for _ in range(levels)
      ]
    )
    self.spread_biases = nnx.List([nnx.Param(jnp.zeros(channels)) for _ in range(levels)])
    self.of_part = convs(2 * levels)
    self.of_sum = convs(2 * levels**2)

  def __call__(self, pooled: tuple[jax.Array, ...]) -> jax.Array:
    """[N, P, P, C], N = B R, from the [B, R, P, P, C] regions of every level, fine to coarse."""
    parts = []
    for x_BRPPC, local, spread, bias in zip(
      pooled, self.local, self.spread, self.spread_biases, strict=True
    ):
      x_NPPC = x_BRPPC.reshape(-1, *x_BRPPC.shape[2:])
      mean_NC = jnp.mean(x_NPPC.astype(jnp.float32), axis=(1, 2)).astype(x_NPPC.dtype)
      spread_NPPC = spread(mean_NC).reshape(x_NPPC.shape)
      spread_NPPC += bias[...].astype(spread_NPPC.dtype)[None, None, None]
      parts.append(local(x_NPPC) + spread_NPPC)
    together_NPPC = sum_of(parts)
    return sum_of(
      [
        of_part(part_NPPC) + of_sum(together_NPPC)
        for part_NPPC, of_part, of_sum in zip(parts, self.of_part, self.of_sum, strict=True)
      ]
    )


class EncodedMaskHead(nnx.Module):
  """The standard mask head on the encoded features of a region.

  Args:
    channels: channels of the pooled features.
    levels: number of levels that a region is pooled from.
    pool_size: side P of the pooled square.
    hidden: channels of the convolutions.
    layers: number of 3x3 convolutions.
    num_classes: number of foreground classes; class 0, background, has a map too.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    channels: int,
    *,
    levels: int,
    pool_size: int,
    hidden: int = 256,
    layers: int = 4,
    num_classes: int,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.encoding = RegionEncoding(channels, levels=levels, pool_size=pool_size, **options)
    self.of_encoding = MaskHead(
      channels, hidden=hidden, layers=layers, num_classes=num_classes, **options
    )

  @jax.named_scope("mask_head")
  def __call__(self, pooled: tuple[jax.Array, ...], labels_BR: jax.Array) -> jax.Array:
    """Predicts the mask of each region.

    Args:
      pooled: [B, R, P, P, C] regions of every level, fine to coarse.
      labels_BR: [B, R] int32, the class of each region.

    Returns:
      [B, R, 2P, 2P] float32 logits of each region's class.
    """
    encoded_NPPC = self.encoding(pooled)
    return self.of_encoding(encoded_NPPC.reshape(pooled[0].shape), labels_BR)


def sum_of(terms) -> jax.Array:
  """The sum of arrays of one shape."""
  first, *rest = terms
  return sum(rest, start=first)
