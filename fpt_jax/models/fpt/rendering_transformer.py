"""Rendering Transformer: a fine level weights the channels of a coarse one (paper, section 3.4).

Shapes: B batch, H W rows and columns of the coarse map, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, mean_over_valid
from fpt_jax.models.layers import conv

GATES = {"identity": lambda w: w, "sigmoid": jax.nn.sigmoid}


def strided_padding(fine: int, coarse: int, stride: int) -> tuple[int, int]:
  """Computes the padding of a strided 3x3 convolution along one axis.

  Args:
    fine, coarse: number of positions of the input and the output.
    stride: stride of the convolution.

  Returns:
    Zeros before and after, so that output position i is centred on input position i * stride.

  Raises:
    ValueError: the sizes do not fit the stride.
  """
  if abs(fine - stride * coarse) >= stride:
    raise ValueError(
      f"a level of {fine} positions cannot render a level of {coarse} positions with stride {stride}"
    )
  return 1, (coarse - 1) * stride + 2 - fine


class RenderingTransformer(nnx.Module):
  """Channel attention from the mean of the fine map, plus the downsampled fine map (paper, eq. 6).

  Args:
    coarse_channels: channels of the coarse map (Q), and of the result.
    fine_channels: channels of the fine map (K and V).
    gate: function of the pooled weights: "identity" (paper) or "sigmoid".
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the gate does not exist, or the numbers of channels differ.
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
    check_choice("gate", gate, GATES)
    if coarse_channels != fine_channels:
      raise ValueError(
        f"the fine and the coarse map need the same number of channels, got {fine_channels} and "
        f"{coarse_channels}"
      )
    channels = coarse_channels
    init = nnx.initializers.lecun_normal()
    self.refine = conv(channels, channels, 3, kernel_init=init, dtype=dtype, rngs=rngs)
    self.downsample = conv(channels, channels, 3, kernel_init=init, dtype=dtype, rngs=rngs)
    self.fuse = conv(channels, channels, 3, kernel_init=init, dtype=dtype, rngs=rngs)
    self.gate = gate

  def __call__(self, coarse: FeatureMap, fine: FeatureMap) -> jax.Array:
    """Returns the rendered coarse map, [B, H, W, C].

    Raises:
      ValueError: the sizes of the maps do not fit their strides.
    """
    weight_BC = GATES[self.gate](mean_over_valid(fine)).astype(coarse.values_BHWC.dtype)
    attended = coarse.with_values(coarse.values_BHWC * weight_BC[:, None, None])
    refined_BHWC = self.refine(attended.masked())
    fused = coarse.with_values(refined_BHWC + self.downsampled_value(fine, coarse))
    return self.fuse(fused.masked())

  def downsampled_value(self, fine: FeatureMap, coarse: FeatureMap) -> jax.Array:
    """[B, H, W, C]: a 3x3 convolution of the fine map whose stride is the ratio of the two strides."""
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
