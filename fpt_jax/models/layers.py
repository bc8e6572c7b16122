"""Convolution, normalisation, dropout and resizing, shared by all parts of the models.

Shapes: B batch, H W rows and columns, C channels, N groups of images, b images of a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.feature_map import FeatureMap, downsample_valid
from fpt_jax.ops.convolution import convolve, pointwise
from fpt_jax.ops.mesh import mesh_of
from fpt_jax.run.sharding import image_groups

NORMS = ("sync_bn", "bn", "frozen_bn", "group_norm", "none")
DROPPED = ("channels", "values")
# Accepted spellings of the dtype of the computation, and JAX's name of each.
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}


def conv(
  in_channels: int,
  out_channels: int,
  kernel: int | tuple[int, int],
  *,
  dtype=jnp.float32,
  rngs: nnx.Rngs,
  **options,
) -> nnx.Conv:
  """Builds a convolution whose output has ceil(H / stride) rows.

  Args:
    in_channels, out_channels, kernel, options: see `conv_arguments`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Returns:
    An `nnx.Conv`.
  """
  arguments = conv_arguments(in_channels, out_channels, kernel, **options)
  return nnx.Conv(**arguments, dtype=dtype, rngs=rngs)


def conv_arguments(
  in_channels: int,
  out_channels: int,
  kernel: int | tuple[int, int],
  *,
  stride: int = 1,
  dilation: int = 1,
  bias: bool = True,
  kernel_init=None,
) -> dict[str, Any]:
  """Returns the arguments of an `nnx.Conv` padded by k // 2 times the dilation on every side.

  Args:
    in_channels, out_channels: channels of the input and the output.
    kernel: side of the kernel k, or (rows, columns).
    stride: stride of both axes.
    dilation: dilation of both axes.
    bias: whether to add a bias.
    kernel_init: initializer of the kernel; None for He's normal distribution over the fan-out.
  """
  sides = (kernel, kernel) if isinstance(kernel, int) else kernel
  pads = [dilation * (side // 2) for side in sides]
  return dict(
    in_features=in_channels,
    out_features=out_channels,
    kernel_size=sides,
    strides=stride,
    padding=tuple((pad, pad) for pad in pads),
    kernel_dilation=dilation,
    use_bias=bias,
    kernel_init=kernel_init or nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
    conv_general_dilated=pointwise if sides == (1, 1) else convolve,
  )


class FrozenVariable(nnx.Variable):
  """A variable that comes with pretrained weights and is never trained."""


class FrozenBatchNorm(nnx.Module):
  """BatchNorm with stored statistics and nothing to train: an affine map per channel.

  Args:
    channels: channels C.
    epsilon: added to the variance.
    dtype: dtype of the computation; variables are float32.
  """

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


class BatchNorm(nnx.Module):
  """Batch normalisation (Ioffe & Szegedy 2015) with statistics over valid positions only.

  If synchronised (SBN: Zhang et al. 2018, reference [40] of the paper), statistics are those of the
  global batch. Otherwise they are those of the images of one device, as if every device ran its own
  program: the batch is divided among the devices in order, so the images of a device are consecutive, and
  no device waits for another. Running statistics are the mean over the devices.

  Args:
    channels: channels C.
    synchronised: whether statistics are those of all devices.
    momentum: share of the running statistics that an update keeps.
    epsilon: added to the variance.
    dtype: dtype of the result; variables and statistics are float32.
  """

  def __init__(
    self, channels: int, *, synchronised: bool, momentum: float, epsilon: float, dtype=jnp.float32
  ):
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))
    self.mean = nnx.BatchStat(jnp.zeros(channels))
    self.var = nnx.BatchStat(jnp.ones(channels))
    self.synchronised = synchronised
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = dtype

  def __call__(
    self, x_BHWC: jax.Array, *, valid_BHW: jax.Array | None = None, train: bool
  ) -> jax.Array:
    """Normalises features.

    Args:
      x_BHWC: [B, H, W, C] features.
      valid_BHW: [B, H, W] bool, the positions that statistics are over; None for all.
      train: use the statistics of the batch and update the running ones; otherwise use the running ones.

    Returns:
      [B, H, W, C].

    Raises:
      ValueError: the batch cannot be divided evenly among the devices.
    """
    if not train:
      mean_BC, var_BC = self.mean[...][None], self.var[...][None]
    else:
      mean_NC, var_NC = self.batch_statistics(x_BHWC, valid_BHW)
      for running, batch_NC in ((self.mean, mean_NC), (self.var, var_NC)):
        batch_C = jax.lax.stop_gradient(jnp.mean(batch_NC, axis=0))
        # `running[...] =` builds the message of an error that it catches, ten milliseconds each time
        running.set_value(self.momentum * running[...] + (1 - self.momentum) * batch_C)
      images = x_BHWC.shape[0] // mean_NC.shape[0]
      mean_BC, var_BC = (jnp.repeat(s, images, axis=0) for s in (mean_NC, var_NC))
    multiplier_BC = self.scale[...][None] * jax.lax.rsqrt(var_BC + self.epsilon)
    offset_BC = self.bias[...][None] - mean_BC * multiplier_BC
    y_BHWC = x_BHWC * multiplier_BC[:, None, None] + offset_BC[:, None, None]
    return y_BHWC.astype(self.dtype)

  def batch_statistics(self, x_BHWC, valid_BHW) -> tuple[jax.Array, jax.Array]:
    """[N, C] float32 mean and variance of each of N groups of images."""
    batch, height, width, channels = x_BHWC.shape
    groups = 1 if self.synchronised else image_groups(mesh_of(x_BHWC))
    if batch % groups:
      raise ValueError(
        f"norm 'bn' needs the same number of images on every device, got {batch} images for "
        f"{groups} devices"
      )
    x_NbHWC = x_BHWC.astype(jnp.float32).reshape(groups, -1, height, width, channels)
    if valid_BHW is None:
      valid_BHW = jnp.ones(x_BHWC.shape[:3], bool)
    valid_NbHW1 = valid_BHW.reshape(*x_NbHWC.shape[:4], 1)
    count_N1 = jnp.maximum(jnp.sum(valid_NbHW1, axis=(1, 2, 3), dtype=jnp.float32), 1)

    def mean(values_NbHWC):
      return jnp.sum(jnp.where(valid_NbHW1, values_NbHWC, 0), axis=(1, 2, 3)) / count_N1

    mean_NC = mean(x_NbHWC)
    return mean_NC, mean(jnp.square(x_NbHWC - mean_NC[:, None, None, None]))


class Norm(nnx.Module):
  """The normalisation that `kind` names, with statistics over valid positions only.

  Args:
    kind: "sync_bn" or "bn" for `BatchNorm`, synchronised or not; "frozen_bn" for `FrozenBatchNorm`;
      "group_norm" for GroupNorm (Wu & He 2018) with 32 groups, or fewer so that a group has at least 4
      channels; "none" for the identity.
    channels: channels C.
    epsilon: added to the variance.
    initial_scale: initial value of the trained scale, where the normalisation has one.
    dtype: dtype of the computation; variables are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the normalisation does not exist.
  """

  def __init__(
    self,
    kind: str,
    channels: int,
    *,
    epsilon: float = 1e-5,
    initial_scale: float = 1.0,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_choice("norm", kind, NORMS)
    self.kind = kind
    if kind == "frozen_bn":
      norm: Any = FrozenBatchNorm(channels, epsilon=epsilon, dtype=dtype)
    elif kind in ("sync_bn", "bn"):
      norm = BatchNorm(
        channels, synchronised=kind == "sync_bn", momentum=0.9, epsilon=epsilon, dtype=dtype
      )
    elif kind == "group_norm":
      most = max(1, min(32, channels // 4))
      groups = max(g for g in range(1, most + 1) if channels % g == 0)
      norm = nnx.GroupNorm(channels, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs)
    else:
      norm = None
    if kind in ("sync_bn", "bn", "group_norm") and initial_scale != 1.0:
      norm.scale[...] = jnp.full(channels, initial_scale, jnp.float32)
    self.norm = norm

  def __call__(
    self, x_BHWC: jax.Array, *, valid_BHW: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """Normalises [B, H, W, C] features; arguments as for `BatchNorm`."""
    if self.kind == "none":
      return x_BHWC
    if self.kind == "frozen_bn":
      return self.norm(x_BHWC)
    if self.kind == "group_norm":
      mask = None if valid_BHW is None else jnp.broadcast_to(valid_BHW[..., None], x_BHWC.shape)
      return self.norm(x_BHWC, mask=mask)
    return self.norm(x_BHWC, valid_BHW=valid_BHW, train=train)


class ConvNorm(nnx.Module):
  """A convolution, a normalisation and a ReLU on a feature map, whose padding counts as zeros.

  Args:
    in_channels, out_channels, kernel, stride, dilation: see `conv_arguments`.
    relu: whether to apply the ReLU.
    slope: factor of the ReLU below zero; 0.0 for none.
    norm: normalisation, see `Norm`; "none" for a bias.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
    slope: float = 0.0,
    norm: str,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.conv = conv(
      in_channels,
      out_channels,
      kernel,
      stride=stride,
      dilation=dilation,
      bias=norm == "none",
      **options,
    )
    self.norm = Norm(norm, out_channels, **options)
    self.stride = stride
    self.relu = relu
    self.slope = slope

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    valid_BHW = downsample_valid(x.valid_BHW, self.stride)
    y_BHWC = self.norm(self.conv(x.masked()), valid_BHW=valid_BHW, train=train)
    if self.relu:
      y_BHWC = nnx.leaky_relu(y_BHWC, self.slope) if self.slope else nnx.relu(y_BHWC)
    return FeatureMap(y_BHWC, valid_BHW, x.stride * self.stride)


def dropout(
  x_BHWC: jax.Array, key: jax.Array | None, rate: float, *, of: str = "channels"
) -> jax.Array:
  """Drops whole channels (Tompson et al. 2015, SpatialDropout) or single values (Srivastava et al. 2014).

  Args:
    x_BHWC: [B, H, W, C] features.
    key: PRNG key for training; None for inference, which drops nothing.
    rate: expected share of what is dropped, in [0, 1).
    of: what is dropped, one of `DROPPED`.

  Returns:
    [B, H, W, C]; what is kept is divided by 1 - rate.
  """
  if key is None or not rate:
    return x_BHWC
  batch, height, width, channels = x_BHWC.shape
  shape = (batch, 1, 1, channels) if of == "channels" else (batch, height, width, channels)
  return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x_BHWC / (1 - rate), 0)


def drop_block(
  x_BHWC: jax.Array,
  key: jax.Array,
  *,
  block_size: int,
  keep_probability: float | jax.Array,
  valid_BHW: jax.Array | None = None,
) -> jax.Array:
  """Sets square blocks of every channel to zero: DropBlock (Ghiasi et al. 2018, algorithm 1).

  Args:
    x_BHWC: [B, H, W, C] features.
    key: PRNG key.
    block_size: side of a dropped square, positions; on smaller maps, the shorter side of the map.
    keep_probability: expected share of kept values, in (0, 1].
    valid_BHW: [B, H, W] bool, the positions that the rescaling counts; None for all.

  Returns:
    [B, H, W, C], with the kept values of each image scaled to compensate for the dropped ones.
  """
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
  """Resizes [B, H, W, C] by nearest neighbour, floor(i * in / out), as torch's `interpolate`."""

  def resize_axis(x, size, axis):
    if -(-size // 2) == x.shape[axis]:  # the case of pyramids: doubling needs no gather
      return jax.lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, size, axis=axis)
    return jnp.take(x, jnp.arange(size) * x.shape[axis] // size, axis)

  return resize_axis(resize_axis(x_BHWC, height, 1), width, 2)
