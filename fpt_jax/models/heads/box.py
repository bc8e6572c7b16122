"""Box head: the class of a region and its refined box (Girshick 2015; Lin et al. 2017).

Shapes: B batch, R regions, P side of the pooled square, C channels, K classes with background as 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class BoxHead(nnx.Module):
  """Two fully connected layers, then class logits and a box refinement for every class.

  Args:
    channels: channels of the pooled features.
    pool_size: side P of the pooled square.
    hidden: width of the two layers, 1024 in FPN.
    num_classes: number of foreground classes; background is added as class 0.
    dtype: dtype of the computation; parameters are float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    channels: int,
    *,
    pool_size: int,
    hidden: int,
    num_classes: int,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    he = nnx.initializers.he_normal()
    self.fc6 = nnx.Linear(channels * pool_size**2, hidden, kernel_init=he, **options)
    self.fc7 = nnx.Linear(hidden, hidden, kernel_init=he, **options)
    self.cls_score, self.bbox_pred = box_outputs(hidden, num_classes, **options)

  @jax.named_scope("box_head")
  def __call__(self, pooled_BRPPC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the logits [B, R, K] and deltas [B, R, K, 4], float32, of [B, R, P, P, C] regions."""
    batch, regions = pooled_BRPPC.shape[:2]
    x = nnx.relu(self.fc6(pooled_BRPPC.reshape(batch, regions, -1)))
    return read_out(nnx.relu(self.fc7(x)), self.cls_score, self.bbox_pred)


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
