"""Self-Transformer: objects that occur together on one level (paper, 3.2)."""

from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt.non_local import NonLocalInteraction


class SelfTransformer(nnx.Module):
  """Every position of a map attends to all of the same map, by dot product (paper, eq. 3).

  Args:
    in_channels: channels of the map.
    channels: channels of the result.
    parts: softmaxes in the mixture, 2 in the paper.
    options: see `NonLocalInteraction`.
  """

  def __init__(
    self, in_channels: int, channels: int = 256, *, parts: int = 2, rngs: nnx.Rngs, **options
  ):
    self.interaction = NonLocalInteraction(
      in_channels, in_channels, channels, parts=parts, similarity="dot", rngs=rngs, **options
    )

  def __call__(self, level: FeatureMap):
    """[B, H, W, C]: the transformed map, of the size of its input."""
    return self.interaction(level, level)
