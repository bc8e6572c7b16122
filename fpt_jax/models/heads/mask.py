"""Mask head: the mask of the object in a region (He et al. 2017).

Shapes: B batch, R regions, P side of the pooled square, C channels, K classes with background as 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.heads.region_convs import apply_region_convs, region_convs
from fpt_jax.models.layers import conv


class MaskHead(nnx.Module):
  """3x3 convolutions, a 2x2 transposed convolution of stride 2, and one logit per class.

  Args:
    channels: channels of the pooled features.
    hidden: channels of the convolutions, 256 in Mask R-CNN.
    layers: number of 3x3 convolutions, 4 in Mask R-CNN.
    norm: normalisation behind them, one of `region_convs.REGION_NORMS`.
    num_classes: number of foreground classes; class 0, background, has a map too, as in torchvision.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    channels: int,
    *,
    hidden: int = 256,
    layers: int = 4,
    norm: str = "none",
    num_classes: int,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.convs, self.norms = region_convs(channels, hidden, layers, norm=norm, **options)
    # With stride and kernel both 2 no outputs overlap: a transposed convolution is a matrix product.
    self.deconv = nnx.Linear(
      hidden, 4 * hidden, kernel_init=nnx.initializers.he_normal(), use_bias=False, **options
    )
    self.deconv_bias = nnx.Param(jnp.zeros(hidden))
    self.logits = conv(hidden, num_classes + 1, 1, **options)

  @jax.named_scope("mask_head")
  def __call__(self, pooled_BRPPC: jax.Array, labels_BR: jax.Array) -> jax.Array:
    """Predicts the mask of each region; logits of other classes are not computed.

    Args:
      pooled_BRPPC: [B, R, P, P, C] pooled regions.
      labels_BR: [B, R] int32, the class of each region.

    Returns:
      [B, R, 2P, 2P] float32 logits of each region's class.
    """
    batch, regions = pooled_BRPPC.shape[:2]
    x_NPPC = pooled_BRPPC.reshape(-1, *pooled_BRPPC.shape[2:])
    x_NPPC = apply_region_convs(self.convs, self.norms, x_NPPC)
    x_NPPC = nnx.relu(self.upsample(x_NPPC))
    labels_N = labels_BR.reshape(-1)
    kernel_NC = self.logits.kernel[0, 0].T[labels_N].astype(x_NPPC.dtype)
    logits_NPP = jnp.einsum("nijc,nc->nij", x_NPPC, kernel_NC, preferred_element_type=jnp.float32)
    logits_NPP += self.logits.bias[...][labels_N][:, None, None]
    return logits_NPP.reshape(batch, regions, *logits_NPP.shape[1:])

  def upsample(self, x_NPPC: jax.Array) -> jax.Array:
    """[N, 2P, 2P, C]: the transposed convolution of [N, P, P, C]."""
    n, height, width, channels = x_NPPC.shape
    y = self.deconv(x_NPPC).reshape(n, height, width, 2, 2, channels)
    y = y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, channels)
    return y + self.deconv_bias[...].astype(y.dtype)[None, None, None]
