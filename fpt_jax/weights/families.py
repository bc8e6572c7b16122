"""Families of pretrained weights: how to recognise a state dict, and the images it was trained on."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from fpt_jax.errors import UserError
from fpt_jax.models.preprocess import EFFICIENTNET_LITE, IMAGENET
from fpt_jax.weights.efficientnet import from_efficientnet
from fpt_jax.weights.hrnet import from_hrnet
from fpt_jax.weights.torchvision import from_torchvision, from_torchvision_segmentation

# Fields of a config's `model` that depend on the pretrained weights.
PREPROCESSING = ("pixel_mean", "pixel_std", "channel_order", "backbone.stride_in")


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of state dict.

  Attributes:
    title: name for messages.
    mark: beginning of a tensor's name that only this family has.
    backbones: beginning of the names of the backbones that the weights fit.
    convert: function (state_dict, shapes) -> our arrays by name.
    pixel_mean, pixel_std: mean and standard deviation that the weights expect, of RGB in 0..1, unless the
      user gives others.
  """

  title: str
  mark: str
  backbones: str
  convert: Callable
  pixel_mean: tuple[float, ...]
  pixel_std: tuple[float, ...]


FAMILIES = (
  Family("a torchvision detector", "backbone.body.", "resnet", from_torchvision, *IMAGENET),
  Family(
    "a torchvision segmentation network",
    "classifier.4.",
    "resnet",
    from_torchvision_segmentation,
    *IMAGENET,
  ),
  # an HRNet has layers with names of a ResNet, too
  Family("an HRNet", "stage2.0.branches.", "hrnet", from_hrnet, *IMAGENET),
  Family("a segmentation HRNet", "model.stage2.0.branches.", "hrnet", from_hrnet, *IMAGENET),
  Family("a ResNet", "layer1.0.", "resnet", from_torchvision, *IMAGENET),
  Family(
    "EfficientNet-Lite0",
    "_conv_stem.",
    "efficientnet_lite0",
    from_efficientnet,
    *EFFICIENTNET_LITE,
  ),
)


def family_of(state_dict: Mapping[str, np.ndarray]) -> Family:
  """Returns the family of a state dict.

  Args:
    state_dict: tensors by name.

  Raises:
    UserError: the names are not those of a known family.
  """
  for family in FAMILIES:
    if any(name.startswith(family.mark) for name in state_dict):
      return family
  known = ", ".join(f"{f.title} ({f.mark}*)" for f in FAMILIES)
  names = ", ".join(list(state_dict)[:3]) or "none"
  raise UserError(
    f"the names of the weights are not those of a known network; known are {known}, and the file has "
    f"{names}, ..."
  )


def check_family(family: Family, backbone: str) -> None:
  """Checks that weights fit a backbone.

  Args:
    family: family of the weights.
    backbone: name of the config's backbone.

  Raises:
    UserError: the weights are those of another network.
  """
  if not backbone.startswith(family.backbones):
    raise UserError(
      f"the weights are those of {family.title}, but the config's backbone is {backbone}; choose other "
      "weights or another backbone"
    )


def preprocessing(model) -> dict[str, str | tuple[float, ...]]:
  """Returns the values of a config's fields that depend on the pretrained weights.

  Args:
    model: `model` part of a config.

  Returns:
    Values by name of the field, see `PREPROCESSING`.
  """
  values = {}
  for field in PREPROCESSING:
    part, _, key = field.rpartition(".")
    value = (model[part] if part else model)[key]
    values[field] = value if isinstance(value, str) else tuple(value)
  return values
