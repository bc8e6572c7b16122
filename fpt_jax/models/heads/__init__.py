"""Task heads on top of a feature pyramid."""

from flax import nnx

from fpt_jax.models.heads.augmented import AugmentedBoxHead, AugmentedMaskHead
from fpt_jax.models.heads.box import BoxHead
from fpt_jax.models.heads.mask import MaskHead

# by name: a box head, a mask head; "augmented" ones are given each region from every level
HEADS = {"standard": (BoxHead, MaskHead), "augmented": (AugmentedBoxHead, AugmentedMaskHead)}


def build_heads(config, *, levels: int, **options) -> tuple[nnx.Module, nnx.Module | None]:
  """The box head and the mask head that the `model` part of a config describes; None for no masks.

  Args:
    config: see `configs/common.py`.
    levels: how many levels of the pyramid have regions.
    options: `dtype` and `rngs` of the heads.

  Raises:
    ValueError: the head does not exist.
  """
  if config.head not in HEADS:
    raise ValueError(f"head {config.head!r} does not exist; choose one of {', '.join(HEADS)}")
  box_head, mask_head = HEADS[config.head]
  box, mask = config.box_head, config.mask_head
  options["num_classes"] = config.num_classes
  channels = config.pyramid.channels
  mask_options = dict(hidden=mask.hidden, layers=mask.layers)
  if config.head == "augmented":
    options["levels"] = levels
    mask_options["pool_size"] = mask.pool_size
  return (
    box_head(channels, pool_size=box.pool_size, hidden=box.hidden, **options),
    mask_head(channels, **mask_options, **options) if mask.enabled else None,
  )
