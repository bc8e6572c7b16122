"""Rendering Transformer: a coarse level drawn with the attributes of a fine one (paper, 3.4).

Shapes: B batch, H W rows and columns of the coarse map, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, mean_over_valid
from fpt_jax.models.layers import conv

GATES = {"identity": lambda w: w, "sigmoid": jax.nn.sigmoid}


def strided_padding(fine: int, coarse: int, stride: int) -> tuple[int, int]:
  """Padding of a strided 3x3 convolution whose output position i is centred on input i * stride.

  Raises:
    ValueError: the sizes are not the stride apart.
  """
  if abs(fine - stride * coarse) >= stride:
    raise ValueError(
      f"a level of {fine} positions cannot render one of {coarse} at {stride} times its stride"
    )
  return 1, (coarse - 1) * stride + 2 - fine


class RenderingTransformer(nnx.Module):
  """Channel attention from the fine map's mean, plus the fine map, downsampled (paper, eq. 6).

  Args:
    coarse_channels: channels of the map that is rendered (Q), and of the result.
    fine_channels: channels of the map that renders (K and V).
    gate: what the pooled weight goes through before it multiplies: "identity" (paper) or "sigmoid".
  """

  def __init__(
    self,
    coarse_channels: int,
    fine_channels: int,
    *,
    gate: str = "identity",
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if gate not in GATES:
      raise ValueError(f"gate={gate!r} does not exist; choose one of {', '.join(GATES)}")
    if coarse_channels != fine_channels:
      raise ValueError(
        f"the weights of {fine_channels} fine channels cannot multiply {coarse_channels} coarse channels"
      )
    channels = coarse_channels
    init = nnx.initializers.lecun_normal()
    self.refine = conv(channels, channels, 3, kernel_init=init, dtype=dtype, rngs=rngs)
    self.downsample = conv(channels, channels, 3, kernel_init=init, dtype=dtype, rngs=rngs)
    self.fuse = conv(channels, channels, 3, kernel_init=init, dtype=dtype, rngs=rngs)
    self.gate = gate

  def __call__(self, coarse: FeatureMap, fine: FeatureMap) -> jax.Array:
    """[B, H, W, C]: the rendered coarse map.

    Raises:
      ValueError: the maps' sizes do not agree with their strides.
    """
    weight_BC = GATES[self.gate](mean_over_valid(fine)).astype(coarse.values_BHWC.dtype)
    attended = coarse.with_values(coarse.values_BHWC * weight_BC[:, None, None])
    refined_BHWC = self.refine(attended.masked())
    fused = coarse.with_values(refined_BHWC + self.downsampled_value(fine, coarse))
    return self.fuse(fused.masked())

  def downsampled_value(self, fine: FeatureMap, coarse: FeatureMap) -> jax.Array:
    """[B, H, W, C]: one 3x3 convolution whose stride is the ratio of the two scales."""
    stride = coarse.stride // fine.stride
    padding = [strided_padding(f, c, stride) for f, c in zip(fine.size, coarse.size, strict=True)]
    kernel = self.downsample.kernel[...].astype(self.downsample.dtype)
    value_BHWC = jax.lax.conv_general_dilated(
      fine.masked().astype(kernel.dtype),
      kernel,
      window_strides=(stride, stride),
      padding=padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return value_BHWC + self.downsample.bias[...].astype(kernel.dtype)[None, None, None]
