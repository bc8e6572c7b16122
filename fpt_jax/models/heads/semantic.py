"""Segmentation head: a class for every position, from levels of one size (paper, section 3.5).

Shapes: B batch, H W rows and columns, C channels, K classes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, Pyramid
from fpt_jax.models.heads.apnb import AsymmetricPyramid
from fpt_jax.models.heads.cfnet import CoOccurrentFeatureNetwork
from fpt_jax.models.heads.deeplab import AtrousPooling
from fpt_jax.models.heads.object_context import (
  AtrousObjectContext,
  BaseObjectContext,
  PyramidObjectContext,
)
from fpt_jax.models.heads.pspnet import PyramidPoolingContext
from fpt_jax.models.layers import DROPPED, ConvNorm, conv, dropout
from fpt_jax.models.pixel_attention import concatenated

# by name of the head: the module that turns the concatenated levels into one map
MIXERS: dict[str, Callable[..., nnx.Module]] = {
  "fcn": functools.partial(ConvNorm, kernel=3),
  "oc_base": BaseObjectContext,
  "oc_pyramid": PyramidObjectContext,
  "oc_asp": AtrousObjectContext,
  "acf": CoOccurrentFeatureNetwork,
  "apnb": AsymmetricPyramid,
  "psp": PyramidPoolingContext,
  "deeplabv3": AtrousPooling,
  "pointwise": functools.partial(ConvNorm, kernel=1),
}
# by name of the head: channels of the module's result, as a multiple of `hidden`, unless they are the same
WIDER = {"acf": 2}
DILATED = ("oc_asp", "deeplabv3")  # modules whose dilations depend on the stride


class SemanticHead(nnx.Module):
  """A module on the concatenated levels, dropout, and a 1x1 classifier.

  "fcn" has a 3x3 convolution: the head of the fully convolutional networks of Zhang et al. 2018 and 2019
  (references [40] and [41] of the paper). On C5 alone it makes the dilated baseline, on C4 the
  auxiliary loss. "pointwise" has a 1x1 convolution: the head of HRNetV2 (Wang et al. 2019, section 3.2). The
  other heads have OCNet's object context, CFNet's co-occurrent features, the asymmetric pyramid non-local
  block, PSPNet's pyramid pooling or DeepLabv3's dilated convolutions in place of the convolution.

  Args:
    in_channels: channels of each level.
    name: name of the head, one of `MIXERS`.
    hidden: channels of the module, 512 on C5 in those papers.
    output_stride: stride of the levels, pixels; dilations of "oc_asp" and "deeplabv3" depend on it.
    num_classes: number of classes K.
    dropout: rate of dropout before the classifier, 0.1 in those papers.
    dropout_of: what it drops, see `layers.dropout`.
    norm: normalisation behind the convolutions, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the head does not exist, or `hidden` does not fit it.
  """

  def __init__(
    self,
    in_channels: tuple[int, ...],
    *,
    name: str = "fcn",
    hidden: int,
    output_stride: int,
    num_classes: int,
    dropout: float,
    dropout_of: str = "channels",
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("head", name, MIXERS)
    check_choice("dropout_of", dropout_of, DROPPED)
    options = dict(dtype=dtype, rngs=rngs)
    strided = dict(output_stride=output_stride) if name in DILATED else {}
    self.mix = MIXERS[name](sum(in_channels), hidden, norm=norm, **strided, **options)
    self.classify = conv(
      WIDER.get(name, 1) * hidden,
      num_classes,
      1,
      kernel_init=nnx.initializers.normal(0.01),
      **options,
    )
    self.dropout, self.dropout_of = dropout, dropout_of

  def __call__(self, levels: Pyramid, *, key: jax.Array | None) -> FeatureMap:
    """Classifies every position.

    Args:
      levels: maps of one size.
      key: PRNG key for training (dropout, batch statistics); None for inference.

    Returns:
      The logits at the levels' stride, [B, H, W, K] in the computation's dtype.
    """
    x = self.mix(concatenated(*levels), train=key is not None)
    x_BHWC = dropout(x.values_BHWC, key, self.dropout, of=self.dropout_of)
    return x.with_values(self.classify(x_BHWC))
