"""Convolution, normalisation and DropBlock, as every part of the models uses them.

Shapes: B batch, H W rows and columns, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

NORMS = ("sync_bn", "frozen_bn", "group_norm", "none")


def conv(
  in_channels: int,
  out_channels: int,
  kernel: int,
  *,
  stride: int = 1,
  dilation: int = 1,
  bias: bool = True,
  kernel_init=None,
  dtype=jnp.float32,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """A k x k convolution padded by k // 2 times the dilation on every side, so stride s gives ceil(H / s).

  Weights start from He's normal distribution over the fan-out unless `kernel_init` says otherwise.
  """
  pad = dilation * (kernel // 2)
  return nnx.Conv(
    in_channels,
    out_channels,
    (kernel, kernel),
    strides=stride,
    padding=((pad, pad), (pad, pad)),
    kernel_dilation=dilation,
    use_bias=bias,
    kernel_init=kernel_init or nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    dtype=dtype,
    rngs=rngs,
  )


class FrozenVariable(nnx.Variable):
  """A number that comes with pretrained weights and is never trained."""


class FrozenBatchNorm(nnx.Module):
  """BatchNorm with stored statistics and no trainable part: an affine map per channel."""

  def __init__(self, channels: int, *, epsilon: float = 1e-5, dtype=jnp.float32):
    self.epsilon = epsilon
    self.dtype = dtype
    self.scale = FrozenVariable(jnp.ones(channels))
    self.bias = FrozenVariable(jnp.zeros(channels))
    self.mean = FrozenVariable(jnp.zeros(channels))
    self.var = FrozenVariable(jnp.ones(channels))

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    multiplier_C = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
    offset_C = self.bias[...] - self.mean[...] * multiplier_C
    return (
      x_BHWC * multiplier_C.astype(self.dtype)[None, None, None]
      + (offset_C.astype(self.dtype)[None, None, None])
    )


class Norm(nnx.Module):
  """The normalisation `kind` names; statistics are over valid positions only.

  "sync_bn" takes the mean over the whole global batch: under one jitted program that is what a plain
  mean over the batch axis computes, whatever the number of devices (Zhang et al. 2018, SBN).
  """

  def __init__(
    self, kind: str, channels: int, *, epsilon: float = 1e-5, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    self.kind = kind
    if kind == "frozen_bn":
      self.norm = FrozenBatchNorm(channels, epsilon=epsilon, dtype=dtype)
    elif kind == "sync_bn":
      self.norm = nnx.BatchNorm(channels, momentum=0.9, epsilon=epsilon, dtype=dtype, rngs=rngs)
    elif kind == "group_norm":
      groups = min(32, channels // 4)
      self.norm = nnx.GroupNorm(
        channels, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs
      )
    elif kind == "none":
      self.norm = None
    else:
      raise ValueError(f"norm={kind!r} does not exist; choose one of {', '.join(NORMS)}")

  def __call__(
    self, x_BHWC: jax.Array, *, valid_BHW: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    if self.kind == "none":
      return x_BHWC
    if self.kind == "frozen_bn":
      return self.norm(x_BHWC)
    mask = None if valid_BHW is None else valid_BHW[..., None]
    if self.kind == "group_norm":
      return self.norm(x_BHWC, mask=None if mask is None else jnp.broadcast_to(mask, x_BHWC.shape))
    return self.norm(x_BHWC, use_running_average=not train, mask=mask)


def drop_block(
  x_BHWC: jax.Array,
  key: jax.Array,
  *,
  block_size: int,
  keep_probability: float,
  valid_BHW: jax.Array | None = None,
) -> jax.Array:
  """DropBlock (Ghiasi et al. 2018, algorithm 1): square blocks of every channel become zero.

  Args:
    x_BHWC: [B, H, W, C] features.
    key: PRNG key.
    block_size: side of a dropped square; on smaller maps, the map's shorter side.
    keep_probability: expected share of kept values, in (0, 1].
    valid_BHW: [B, H, W] bool; the rescaling counts these positions only.

  Returns:
    [B, H, W, C], scaled image by image so that the kept values make up for the dropped ones.
  """
  if keep_probability == 1.0:
    return x_BHWC
  _, height, width, channels = x_BHWC.shape
  block = min(block_size, height, width)
  centres = (height - block + 1) * (width - block + 1)
  gamma = (1 - keep_probability) / block**2 * (height * width) / centres
  seeds_BhwC = jax.random.bernoulli(
    key, gamma, (x_BHWC.shape[0], height - block + 1, width - block + 1, channels)
  )
  # A position is dropped if any of the block_size^2 squares that cover it is.
  edge = (block - 1, block - 1)
  dropped_BHWC = jax.lax.reduce_window(
    seeds_BhwC, False, jax.lax.bitwise_or, (1, block, block, 1), (1, 1, 1, 1),
    ((0, 0), edge, edge, (0, 0)),
  )  # fmt: skip
  if valid_BHW is None:
    valid_BHW = jnp.ones(x_BHWC.shape[:3], bool)
  kept_BHWC = ~dropped_BHWC & valid_BHW[..., None]
  count_B = jnp.sum(valid_BHW, axis=(1, 2), dtype=jnp.float32) * channels
  kept_B = jnp.sum(kept_BHWC, axis=(1, 2, 3), dtype=jnp.float32)
  rescale_B = (count_B / jnp.maximum(kept_B, 1)).astype(x_BHWC.dtype)
  return jnp.where(dropped_BHWC, 0, x_BHWC) * rescale_B[:, None, None, None]


def resize_nearest(x_BHWC: jax.Array, height: int, width: int) -> jax.Array:
  """Nearest neighbour by floor(i * in / out), as torch.nn.functional.interpolate does."""

  def resize_axis(x, size, axis):
    if -(-size // 2) == x.shape[axis]:  # a pyramid's case: doubling needs no gather
      return jax.lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, size, axis=axis)
    return jnp.take(x, jnp.arange(size) * x.shape[axis] // size, axis)

  return resize_axis(resize_axis(x_BHWC, height, 1), width, 2)
