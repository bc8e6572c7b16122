"""Box head: the class of a region and its refined box (Girshick 2015; Lin et al. 2017).

Shapes: B batch, R regions, P side of the pooled square, C channels, K classes with background as 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.heads.region_convs import apply_region_convs, region_convs


class BoxHead(nnx.Module):
  """Fully connected layers, then class logits and a box refinement for every class.

  FPN has two of these layers. One layer behind four 3x3 convolutions is the head of Wu & He 2018 (section
  4.2) and of torchvision's v2.

  Args:
    channels: channels of the pooled features, and of the convolutions.
    pool_size: side P of the pooled square.
    convs: number of 3x3 convolutions before the fully connected layers.
    linears: number of fully connected layers: 1 or 2.
    hidden: width of these layers, 1024 in FPN.
    norm: normalisation behind the convolutions, one of `region_convs.REGION_NORMS`.
    num_classes: number of foreground classes; background is added as class 0.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.

  Raises:
    ValueError: the number of fully connected layers or the normalisation does not exist.
  """

  def __init__(
    self,
    channels: int,
    *,
    pool_size: int,
    convs: int = 0,
    linears: int = 2,
    hidden: int,
    norm: str = "none",
    num_classes: int,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    check_choice("box_head.linears", linears, (1, 2))
    he = nnx.initializers.he_normal()
    self.convs, self.norms = region_convs(channels, channels, convs, norm=norm, **options)
    self.fc6 = nnx.Linear(channels * pool_size**2, hidden, kernel_init=he, **options)
    self.fc7 = nnx.Linear(hidden, hidden, kernel_init=he, **options) if linears == 2 else None
    self.cls_score, self.bbox_pred = box_outputs(hidden, num_classes, **options)

  @jax.named_scope("box_head")
  def __call__(self, pooled_BRPPC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the logits [B, R, K] and deltas [B, R, K, 4], float32, of [B, R, P, P, C] regions."""
    batch, regions = pooled_BRPPC.shape[:2]
    x_NPPC = pooled_BRPPC.reshape(-1, *pooled_BRPPC.shape[2:])
    x_NPPC = apply_region_convs(self.convs, self.norms, x_NPPC)
    x_BRC = nnx.relu(self.fc6(x_NPPC.reshape(batch, regions, -1)))
    if self.fc7 is not None:
      x_BRC = nnx.relu(self.fc7(x_BRC))
    return read_out(x_BRC, self.cls_score, self.bbox_pred)


def box_outputs(
  hidden: int, num_classes: int, *, dtype, rngs: nnx.Rngs
) -> tuple[nnx.Linear, nnx.Linear]:
  """Builds the last layers of a box head: class logits, and a box refinement for every class.

  Args:
    hidden: channels of their input.
    num_classes: number of foreground classes; background is added as class 0.
    dtype: dtype of the computation.
    rngs: source of the initial weights.

  Returns:
    The layer of the logits and that of the deltas.
  """

  def linear(outputs: int, spread: float) -> nnx.Linear:
    init = nnx.initializers.normal(spread)
    return nnx.Linear(hidden, outputs, kernel_init=init, dtype=dtype, rngs=rngs)

  return linear(num_classes + 1, 0.01), linear(4 * (num_classes + 1), 0.001)


def read_out(
  x_BRC: jax.Array, cls_score: nnx.Linear, bbox_pred: nnx.Linear
) -> tuple[jax.Array, jax.Array]:
  """Returns the logits [B, R, K] and deltas [B, R, K, 4], float32, of [B, R, C] features."""
  deltas = bbox_pred(x_BRC).reshape(*x_BRC.shape[:2], -1, 4)
  return cls_score(x_BRC).astype(jnp.float32), deltas.astype(jnp.float32)
