"""Context blocks inside a ResNet: Non-local, Global Context, Attention-Augmented convolution.

Padded positions are never attended to. A pretrained ResNet has no context blocks, so their arrays are not
imported, and they are trained even where the backbone is frozen. `in_context_block` tells their names.

Shapes: B batch, H W rows and columns, C channels, N heads, D channels of a head's keys, Q = K = H W
positions, X channels of a head's keys plus the H + W rows and columns, M = 1.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.feature_map import FeatureMap, average_pool
from fpt_jax.models.layers import Norm, conv
from fpt_jax.ops.mos_attention import mos_attention
from fpt_jax.ops.resize import upsample_bilinear

CONTEXTS = ("none", "non_local", "global_context", "attention_augmented")

HEADS = 8
# Shares of an augmented convolution's channels, and the smallest number of key channels per head.
KEY_SHARE, VALUE_SHARE = 0.2, 0.1
MIN_KEY_CHANNELS = 20
# Largest distance with its own embedding: the largest one on a map of 64 x 64 positions.
MAX_DISTANCE = 63


def in_context_block(name: str) -> bool:
  """Returns whether an array of a backbone belongs to a context block.

  `resnet.py` and `AttentionAugmentedConv` keep everything that a plain ResNet does not have in attributes
  with the name "context".

  Args:
    name: name of the array, such as "backbone.stages.1.0.conv2.context.qkv.kernel".
  """
  return "context" in name.split(".")


class NonLocal(nnx.Module):
  """The non-local block, embedded Gaussian (Wang et al. 2018, section 3, eq. 6 and fig. 2).

      z = x + BN(W_z softmax(theta(x) phi(x)^T / sqrt(C / 2)) g(x))

  The paper has no temperature; its release divides the logits by the square root of the inner channels,
  as we do. The block starts as the identity (section 4.1): the scale of a trained normalisation after W_z
  starts at zero. Where the normalisation would not be trained ("frozen_bn", "none"), it is left out, and
  W_z itself starts at zero. Keys and values are not subsampled.

  The normalisation of a block in a frozen backbone has statistics of its own, so it uses those of the batch
  in training, unlike the frozen ones around it. With its initial statistics 0 and 1 instead, the scale would
  learn much more slowly, because W_z has small outputs.

  Args:
    channels: input and output channels C; there are half as many inner channels (section 3.3).
    norm: normalisation, see `layers.Norm`.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(self, channels: int, *, norm: str, dtype=jnp.float32, rngs: nnx.Rngs):
    inner = channels // 2
    trained_norm = norm not in ("frozen_bn", "none")
    small, zeros = nnx.initializers.normal(0.01), nnx.initializers.zeros
    options = dict(dtype=dtype, rngs=rngs)
    self.theta = conv(channels, inner, 1, kernel_init=small, **options)
    self.phi = conv(channels, inner, 1, kernel_init=small, **options)
    self.g = conv(channels, inner, 1, kernel_init=small, **options)
    self.project = conv(inner, channels, 1, kernel_init=small if trained_norm else zeros, **options)
    self.norm = Norm(norm if trained_norm else "none", channels, initial_scale=0.0, **options)

  def __call__(self, x: FeatureMap, *, train: bool) -> FeatureMap:
    """Returns the map plus, at each position, the attention to all valid positions."""
    x_BHWC = x.values_BHWC
    B, H, W, _ = x_BHWC.shape
    q_BQMD, k_BKMD = (f(x_BHWC).reshape(B, H * W, 1, -1) for f in (self.theta, self.phi))
    y_BQC = mos_attention(
      q_BQMD,
      k_BKMD,
      self.g(x_BHWC).reshape(B, H * W, -1),
      jnp.ones((B, 1), jnp.float32),
      scale=q_BQMD.shape[-1] ** -0.5,
      key_valid_BK=x.valid_BHW.reshape(B, H * W),
    )
    y_BHWC = self.project(y_BQC.reshape(B, H, W, -1))
    return x.with_values(x_BHWC + self.norm(y_BHWC, valid_BHW=x.valid_BHW, train=train))


class GlobalContext(nnx.Module):
  """The global context block (Cao et al. 2019, section 3.3, fig. 4d).

      z_i = x_i + W_v2 relu(LN(W_v1 sum_j softmax_j(W_k x_j) x_j))

  W_v2 starts at zero, so that the block starts as the identity. W_k has no bias, to which a softmax is
  invariant.

  Args:
    channels: input and output channels C.
    ratio: C over the channels of the bottleneck, 16 in the paper's COCO models (section 4.1).
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(self, channels: int, *, ratio: int = 16, dtype=jnp.float32, rngs: nnx.Rngs):
    inner = max(1, channels // ratio)
    zeros = nnx.initializers.zeros
    options = dict(dtype=dtype, rngs=rngs)
    self.key = nnx.Linear(channels, 1, use_bias=False, **options)
    self.squeeze = nnx.Linear(channels, inner, **options)
    self.norm = nnx.LayerNorm(inner, epsilon=1e-5, **options)
    self.expand = nnx.Linear(inner, channels, kernel_init=zeros, **options)

  def __call__(self, x_BHWC: jax.Array, *, valid_BHW: jax.Array) -> jax.Array:
    """Adds the context of the valid positions to [B, H, W, C]; the softmax is computed in float32."""
    logits_BHW = self.key(x_BHWC)[..., 0].astype(jnp.float32)
    logits_BHW = jnp.where(valid_BHW, logits_BHW, jnp.finfo(jnp.float32).min)
    share_BHW = jax.nn.softmax(logits_BHW, axis=(1, 2))
    share_BHW = jnp.where(valid_BHW, share_BHW, 0)
    masked_BHWC = jnp.where(valid_BHW[..., None], x_BHWC, 0)
    context_BC = jnp.einsum(
      "bhw,bhwc->bc",
      share_BHW.astype(x_BHWC.dtype),
      masked_BHWC,
      preferred_element_type=jnp.float32,
    )
    hidden = nnx.relu(self.norm(self.squeeze(context_BC.astype(x_BHWC.dtype))))
    return x_BHWC + self.expand(hidden)[:, None, None]


class AttentionAugmentedConv(nnx.Module):
  """A 3x3 convolution with some channels replaced by attention (Bello et al. 2019, section 3).

      y = concat(conv(x), MHA(x)),   logits_ij = q_i (k_j + r_w[column_j - column_i]
                                                          + r_h[row_j - row_i]) / sqrt(D)

  MHA has 8 heads (eq. 1 to 5). Keys have 0.2 and values 0.1 of the output's channels, rounded to the
  nearest multiple of the number of heads, and keys at least 20 channels per head (section 4). The heads
  share the embeddings r.

  The paper has one embedding for every distance on maps of one size. Images for detection have all sizes:
  here there are 127 embeddings per direction, for distances from -63 to 63, and larger distances count
  as 63.

  The logits of relative positions are a dot product too, of the query's logits over all rows and columns
  with a one at the key's row and column. So `mos_attention` computes everything and bounds the memory.

  `downsample` attends on a coarser grid (section 3.3): 3x3 average pooling with stride 2 over valid
  positions before, bilinear interpolation after. In a strided block, which the paper does not specify,
  the same pooling gives attention the stride of the convolution. Position i of a pooled map lies on
  position 2i of the finer one, as with our convolutions, so interpolation is exact there.

  The convolution's channels come first. With the weights of a plain ResNet, they are the first channels of
  its convolution, and attention starts from random weights: the block does not start as a plain one.

  Args:
    in_channels, out_channels: channels of the input and the output.
    stride, dilation: stride and dilation of the convolution; attention has no dilation.
    downsample: whether to attend at half the output's resolution.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: attention would take all channels.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    downsample: bool = False,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.key_channels = HEADS * max(MIN_KEY_CHANNELS, round(KEY_SHARE * out_channels / HEADS))
    self.value_channels = HEADS * max(1, round(VALUE_SHARE * out_channels / HEADS))
    if self.value_channels >= out_channels:
      raise ValueError(
        f"an attention-augmented convolution needs more than {HEADS} channels, got {out_channels}; "
        "set a larger backbone.width"
      )
    self.poolings = (stride == 2) + downsample
    self.downsample = downsample
    options = dict(bias=False, dtype=dtype, rngs=rngs)
    self.conv = conv(
      in_channels,
      out_channels - self.value_channels,
      3,
      stride=stride,
      dilation=dilation,
      **options,
    )
    self.context = nnx.Module()
    self.context.qkv = conv(in_channels, 2 * self.key_channels + self.value_channels, 1, **options)
    self.context.project = conv(self.value_channels, self.value_channels, 1, **options)
    depth = self.key_channels // HEADS
    init = nnx.initializers.normal(depth**-0.5)
    shape = (2 * MAX_DISTANCE + 1, depth)
    self.context.rows = nnx.Param(init(rngs.params(), shape, jnp.float32))
    self.context.columns = nnx.Param(init(rngs.params(), shape, jnp.float32))

  def __call__(self, x_BHWC: jax.Array, *, valid_BHW: jax.Array) -> jax.Array:
    """Convolves and attends.

    Args:
      x_BHWC: [B, H, W, in_channels] features.
      valid_BHW: [B, H, W] bool, the positions that are attended to.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), out_channels], the channels of the convolution first.
    """
    convolved_BHWC = self.conv(x_BHWC)
    x = FeatureMap(x_BHWC, valid_BHW, 1)
    for _ in range(self.poolings):
      x = average_pool(x)
    attended_BHWC = self.context.project(self.attend(x))
    if self.downsample:
      size = convolved_BHWC.shape[1:3]
      attended_BHWC = upsample_bilinear(attended_BHWC, x.valid_BHW, 2, *size, align_corners=True)
      attended_BHWC = attended_BHWC.astype(convolved_BHWC.dtype)
    return jnp.concatenate([convolved_BHWC, attended_BHWC], axis=-1)

  def attend(self, x: FeatureMap) -> jax.Array:
    """Returns the outputs of all heads, concatenated: [B, H, W, value_channels]."""
    B, H, W, _ = x.values_BHWC.shape
    K = self.key_channels
    qkv_BHWC = self.context.qkv(x.masked())
    q_BHWC, k_BHWC, v_BHWC = jnp.split(qkv_BHWC, (K, 2 * K), axis=-1)
    q_BHWND, k_BHWND, v_BHWND = (y.reshape(B, H, W, HEADS, -1) for y in (q_BHWC, k_BHWC, v_BHWC))
    q_BHWND *= q_BHWND.shape[-1] ** -0.5

    rows_HhD = of_distance(self.context.rows[...], H).astype(q_BHWND.dtype)
    columns_WwD = of_distance(self.context.columns[...], W).astype(q_BHWND.dtype)
    rows_BHWNh = jnp.einsum("BHWND,HhD->BHWNh", q_BHWND, rows_HhD)
    columns_BHWNw = jnp.einsum("BHWND,WwD->BHWNw", q_BHWND, columns_WwD)
    q_BHWNX = jnp.concatenate([q_BHWND, rows_BHWNh, columns_BHWNw], axis=-1)
    place_HWX = jnp.concatenate(
      [
        jnp.broadcast_to(jnp.eye(H)[:, None], (H, W, H)),
        jnp.broadcast_to(jnp.eye(W)[None], (H, W, W)),
      ],
      axis=-1,
    ).astype(k_BHWND.dtype)
    place_BHWNX = jnp.broadcast_to(place_HWX[None, :, :, None], (B, H, W, HEADS, H + W))
    k_BHWNX = jnp.concatenate([k_BHWND, place_BHWNX], axis=-1)

    def by_head(y_BHWND):  # Heads become part of the batch: from here on, they share nothing.
      return jnp.moveaxis(y_BHWND, 3, 1).reshape(B * HEADS, H * W, -1)

    out_BQC = mos_attention(
      by_head(q_BHWNX)[:, :, None],
      by_head(k_BHWNX)[:, :, None],
      by_head(v_BHWND),
      jnp.ones((B * HEADS, 1), jnp.float32),
      key_valid_BK=jnp.repeat(x.valid_BHW.reshape(B, H * W), HEADS, axis=0),
    )
    out_BNHWD = out_BQC.reshape(B, HEADS, H, W, -1)
    return jnp.moveaxis(out_BNHWD, 1, 3).reshape(B, H, W, -1)


def of_distance(table_RD: jax.Array, size: int) -> jax.Array:
  """[size, size, D]: the embedding of the distance j - i, for query i and key j."""
  positions = jnp.arange(size)
  distance = positions[None, :] - positions[:, None]
  return table_RD[jnp.clip(distance, -MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]
