"""Weights of others: which family a state dict is of, and how images are prepared for it."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from fpt_jax.errors import UserError
from fpt_jax.weights.efficientnet import from_efficientnet
from fpt_jax.weights.torchvision import from_torchvision

# Fields of a config's `model` that a network's weights go with.
PREPROCESSING = ("pixel_mean", "pixel_std", "channel_order", "backbone.stride_in")


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of state dict.

  Attributes:
    title: for messages.
    mark: how the name of a tensor starts that only this family has.
    backbones: how the names of the backbones start that it fills.
    convert: (state_dict, shapes) -> our arrays.
    pixel_mean, pixel_std: of RGB in 0..1, where nothing else is said.
  """

  title: str
  mark: str
  backbones: str
  convert: Callable
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FAMILIES = (
  Family("a torchvision detector", "backbone.body.", "resnet", from_torchvision, *IMAGENET),
  Family("a ResNet", "layer1.0.", "resnet", from_torchvision, *IMAGENET),
  Family(
    "EfficientNet-Lite0",
    "_conv_stem.",
    "efficientnet_lite0",
    from_efficientnet,
    (127 / 255,) * 3,
    (128 / 255,) * 3,
  ),
)


def family_of(state_dict: Mapping[str, np.ndarray]) -> Family:
  """The family whose mark is among the names.

  Raises:
    UserError: there is none.
  """
  for family in FAMILIES:
    if any(name.startswith(family.mark) for name in state_dict):
      return family
  known = ", ".join(f"{f.title} ({f.mark}*)" for f in FAMILIES)
  names = ", ".join(list(state_dict)[:3]) or "none"
  raise UserError(
    f"the weights are of no known family: there is {known}; the names are {names}, ..."
  )


def check_family(family: Family, backbone: str) -> None:
  """Raises UserError where the weights are of another network than the config's backbone."""
  if not backbone.startswith(family.backbones):
    raise UserError(
      f"the weights are of {family.title}, and the config's backbone is {backbone}; "
      "choose the one or the other"
    )


def preprocessing(model) -> dict[str, str | tuple[float, ...]]:
  """How a model's weights want images, and where the strides are, by field.

  Args:
    model: the `model` part of a config, perhaps as it comes back from JSON; fields that it does not
      have are left out.
  """
  values = {}
  for field in PREPROCESSING:
    part, _, key = field.rpartition(".")
    value = (model[part] if part else model).get(key)
    if value is not None:
      values[field] = value if isinstance(value, str) else tuple(value)
  return values
