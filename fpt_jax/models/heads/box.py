"""Box head: what is in a region, and where exactly (Girshick 2015; Lin et al. 2017).

Shapes: B batch, R regions, P side of the pooled square, C channels, K classes with background as 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class BoxHead(nnx.Module):
  """Two fully connected layers, then class logits and a box refinement for every class.

  Args:
    channels: of the pooled features.
    pool_size: side P of the pooled square.
    hidden: width of the two layers (1024 in FPN).
    num_classes: foreground classes; background is added as class 0.
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
    def linear(inputs, outputs, init):
      return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)

    he = nnx.initializers.he_normal()
    self.fc6 = linear(channels * pool_size**2, hidden, he)
    self.fc7 = linear(hidden, hidden, he)
    self.cls_score = linear(hidden, num_classes + 1, nnx.initializers.normal(0.01))
    self.bbox_pred = linear(hidden, 4 * (num_classes + 1), nnx.initializers.normal(0.001))

  @jax.named_scope("box_head")
  def __call__(self, pooled_BRPPC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [B, R, K] and deltas [B, R, K, 4] in float32."""
    batch, regions = pooled_BRPPC.shape[:2]
    x = nnx.relu(self.fc6(pooled_BRPPC.reshape(batch, regions, -1)))
    x = nnx.relu(self.fc7(x))
    deltas = self.bbox_pred(x).reshape(batch, regions, -1, 4)
    return self.cls_score(x).astype(jnp.float32), deltas.astype(jnp.float32)
