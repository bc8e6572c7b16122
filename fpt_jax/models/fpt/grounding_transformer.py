"""Grounding Transformer: a fine level attends to a coarse one (paper, section 3.3)."""

from flax import nnx

from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt.non_local import NonLocalInteraction


class GroundingTransformer(nnx.Module):
  """Every fine position attends to the coarse map (paper, eq. 4 and 5).

  Args:
    fine_channels: channels of the fine map (queries).
    coarse_channels: channels of the coarse map (keys and values).
    channels: channels of the result.
    parts: number of softmaxes in the mixture, 4 in the paper.
    similarity: "euclidean" for the negative squared distance (paper), or "dot".
    window: None for the whole coarse map; an odd side for the locality-constrained version, where
      positions outside the map count as zero keys and zero values (square_size, 5 in the paper).
    rngs: source of the initial weights.
    options: other arguments of `NonLocalInteraction`.
  """

  def __init__(
    self,
    fine_channels: int,
    coarse_channels: int,
    channels: int = 256,
    *,
    parts: int = 4,
    similarity: str = "euclidean",
    window: int | None = None,
    rngs: nnx.Rngs,
    **options,
  ):
    self.interaction = NonLocalInteraction(
      fine_channels,
      coarse_channels,
      channels,
      parts=parts,
      similarity=similarity,
      window=window,
      rngs=rngs,
      **options,
    )

  def __call__(self, fine: FeatureMap, coarse: FeatureMap):
    """Returns the transformed fine map, [B, H, W, C]."""
    return self.interaction(fine, coarse)
