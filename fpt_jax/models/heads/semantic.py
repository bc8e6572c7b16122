"""The segmentation head: a class for every pixel, from levels of one size (paper, 3.5).

Shapes: B batch, H W rows and columns, C channels, K classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.backbones.resnet import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.heads.afnb import AsymmetricPyramid
from fpt_jax.models.heads.cfnet import AggregatedCoOccurrentFeature
from fpt_jax.models.heads.object_context import (
  AtrousObjectContext,
  BaseObjectContext,
  PyramidObjectContext,
  beside,
)
from fpt_jax.models.layers import ConvNorm, conv, drop_channels

CONTEXTS = {
  "oc_base": BaseObjectContext,
  "oc_pyramid": PyramidObjectContext,
  "oc_asp": AtrousObjectContext,
  "acf": AggregatedCoOccurrentFeature,
  "apnb": AsymmetricPyramid,
}


class SemanticHead(nnx.Module):
  """A 3x3 convolution of the concatenated levels, dropout, and a 1x1 classifier.

  It is the head of the fully convolutional networks of Zhang et al. 2018 and 2019 (the paper's [40]
  and [41]); on C5 alone it makes the dilated baseline, on C4 the auxiliary loss.

  A network with more context has a module of `CONTEXTS` where the 3x3 convolution is: OCNet's object
  context, CFNet's co-occurrent features, the asymmetric pyramid non-local block.

  Args:
    in_channels: of each level.
    hidden: channels of the convolution, 512 on C5 in those papers.
    context: "none" or one of `CONTEXTS`.
    output_stride: of the levels.
    num_classes: K.
    dropout: rate of the dropped channels, 0.1 in those papers.
    norm: see `layers.Norm`.
  """

  def __init__(
    self,
    in_channels: tuple[int, ...],
    *,
    hidden: int,
    context: str = "none",
    output_stride: int,
    num_classes: int,
    dropout: float,
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    check_choice("context", context, ("none", *CONTEXTS))
    if context == "none":
      self.mix = ConvNorm(sum(in_channels), hidden, 3, norm=norm, **options)
    else:
      self.mix = CONTEXTS[context](
        sum(in_channels), hidden, output_stride=output_stride, norm=norm, **options
      )
    self.classify = conv(
      hidden, num_classes, 1, kernel_init=nnx.initializers.normal(0.01), **options
    )
    self.dropout = dropout

  def __call__(self, levels: Pyramid, *, key: jax.Array | None) -> FeatureMap:
    """The logits at the levels' stride.

    Args:
      levels: of one size.
      key: a PRNG key to train; None to infer.

    Returns:
      [B, H, W, K] in the computation's dtype.
    """
    x = self.mix(beside(*levels), train=key is not None)
    x_BHWC = drop_channels(x.values_BHWC, key, self.dropout)
    return x.with_values(self.classify(x_BHWC))
