"""Self-Transformer: a level attends to itself (paper, section 3.2)."""

from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt.non_local import NonLocalInteraction


class SelfTransformer(nnx.Module):
  """Every position of a map attends to all positions of the map, by dot product (paper, eq. 3).

  Args:
    in_channels: channels of the map.
    channels: channels of the result.
    parts: number of softmaxes in the mixture, 2 in the paper.
    rngs: source of the initial weights.
    options: other arguments of `NonLocalInteraction`.
  """

  def __init__(
    self, in_channels: int, channels: int = 256, *, parts: int = 2, rngs: nnx.Rngs, **options
  ):
    self.interaction = NonLocalInteraction(
      in_channels, in_channels, channels, parts=parts, similarity="dot", rngs=rngs, **options
    )

  def __call__(self, level: FeatureMap):
    """Returns the transformed map, [B, H, W, C]."""
    return self.interaction(level, level)
