"""Box and mask heads of detectors by name."""

from flax import nnx

from fpt_jax.models.choices import check_choice
from fpt_jax.models.heads.augmented import AugmentedBoxHead, AugmentedMaskHead
from fpt_jax.models.heads.box import BoxHead
from fpt_jax.models.heads.mask import MaskHead
from fpt_jax.models.heads.zigzag import EncodedMaskHead, SummedBoxHead

# box head and mask head by name
HEADS = {
  "standard": (BoxHead, MaskHead),
  "augmented": (AugmentedBoxHead, AugmentedMaskHead),
  "zigzag": (SummedBoxHead, EncodedMaskHead),
}
# heads whose input is each region pooled from every level
OF_ALL_LEVELS = ("augmented", "zigzag")
# fields of the standard heads alone, with their defaults
OF_STANDARD = {
  "box_head.convs": 0,
  "box_head.linears": 2,
  "box_head.norm": "none",
  "mask_head.norm": "none",
}


def build_heads(config, *, levels: int, **options) -> tuple[nnx.Module, nnx.Module | None]:
  """Builds the box head and the mask head that a config describes.

  Args:
    config: `model` part of a detection config.
    levels: number of levels of the pyramid that regions are pooled from.
    options: `dtype` and `rngs` of the heads.

  Returns:
    The box head, and the mask head or None where the config has no masks.

  Raises:
    ValueError: the head does not exist, or does not have a field that the config sets.
  """
  name = config.head.name
  check_choice("head", name, HEADS)
  box_head, mask_head = HEADS[name]
  box, mask = config.box_head, config.mask_head
  options["num_classes"] = config.num_classes
  channels = config.pyramid.channels
  box_options = dict(pool_size=box.pool_size, hidden=box.hidden)
  mask_options = dict(hidden=mask.hidden, layers=mask.layers)
  if name in OF_ALL_LEVELS:
    for field, default in OF_STANDARD.items():
      group, part = field.split(".")
      value = config[group][part]
      if value != default:
        raise ValueError(
          f"head {name!r} has no {field}={value!r}; set it to {default!r}, or choose the head 'standard'"
        )
    options["levels"] = levels
    mask_options["pool_size"] = mask.pool_size
  else:
    box_options |= dict(convs=box.convs, linears=box.linears, norm=box.norm)
    mask_options["norm"] = mask.norm
  return (
    box_head(channels, **box_options, **options),
    mask_head(channels, **mask_options, **options) if mask.enabled else None,
  )
