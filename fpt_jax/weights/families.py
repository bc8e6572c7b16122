"""Families of pretrained weights: how to recognise a state dict, and the images it was trained on."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from fpt_jax.errors import UserError, first_of
from fpt_jax.models.preprocess import (
  DETECTRON,
  DETECTRON2,
  EFFICIENTNET_LITE,
  IMAGENET,
  Preprocessing,
)
from fpt_jax.weights.detectron import from_detectron
from fpt_jax.weights.detectron2 import from_detectron2
from fpt_jax.weights.efficientnet import from_efficientnet
from fpt_jax.weights.hrnet import from_hrnet
from fpt_jax.weights.torchvision import from_torchvision, from_torchvision_segmentation
from fpt_jax.weights.wider_resnet import from_wider_resnet

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
    preprocessing: what the weights expect, unless the user gives something else.
  """

  title: str
  mark: str
  backbones: str
  convert: Callable
  preprocessing: Preprocessing


FAMILIES = (
  Family("a torchvision detector", "backbone.body.", "resnet", from_torchvision, IMAGENET),
  Family("a detectron2 detector", "backbone.bottom_up.", "resnet", from_detectron2, DETECTRON2),
  Family(
    "a torchvision segmentation network",
    "classifier.4.",
    "resnet",
    from_torchvision_segmentation,
    IMAGENET,
  ),
  # an HRNet has layers with names of a ResNet, too
  Family("an HRNet", "stage2.0.branches.", "hrnet", from_hrnet, IMAGENET),
  Family("a segmentation HRNet", "model.stage2.0.branches.", "hrnet", from_hrnet, IMAGENET),
  Family("a WiderResNet", "mod1.conv1.", "wider_resnet", from_wider_resnet, IMAGENET),
  Family("a ResNet", "layer1.0.", "resnet", from_torchvision, IMAGENET),
  Family("a detectron2 ResNet", "res2.0.", "resnet", from_detectron2, DETECTRON2),
  Family("a Detectron ResNet", "res2_0_", "resnet", from_detectron, DETECTRON),
  Family(
    "EfficientNet-Lite0",
    "_conv_stem.",
    "efficientnet_lite0",
    from_efficientnet,
    EFFICIENTNET_LITE,
  ),
)

# What wrappers of a whole network put before all names: torch's parallel and compiled modules, Lightning.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# Where other libraries keep a ResNet within a classifier or a detector, and the name of its first tensor:
# mmdetection and mmpretrain, DETR; torchvision and detectron2, whose whole detectors are in `FAMILIES`.
_WITHIN = {"backbone.": "conv1.weight", "backbone.0.body.": "conv1.weight"}
_WITHIN_KNOWN = {"backbone.body.": "conv1.weight", "backbone.bottom_up.": "stem.conv1.weight"}
_CONSTANTS = ("pixel_mean", "pixel_std")  # of detectron2, see `check_recorded`


def without_prefix(
  state_dict: Mapping[str, np.ndarray], *, only_backbone: bool = False
) -> dict[str, np.ndarray]:
  """Returns a state dict without what other libraries put before the names.

  Prefixes of all names are removed ("module."). If the file has a ResNet within another network, which is
  not one of `FAMILIES`, its tensors alone are returned, and the log says how many others there are.

  Args:
    state_dict: tensors by name.
    only_backbone: whether to return the ResNet alone of a detector that is one of `FAMILIES`, too. A file
      with the ResNet alone under a detector's names needs no such choice.

  Raises:
    UserError: the ResNet of a detector is asked for, and the file has none.
  """
  arrays = dict(state_dict)
  while found := [p for p in _WRAPPERS if arrays and all(name.startswith(p) for name in arrays)]:
    arrays = {name.removeprefix(found[0]): array for name, array in arrays.items()}
  known = any(name.startswith(family.mark) for family in FAMILIES for name in arrays)
  for prefix, first in (({} if known else _WITHIN) | _WITHIN_KNOWN).items():
    if prefix + first not in arrays:
      continue
    inside = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    constants = {name: arrays[name] for name in _CONSTANTS if name in arrays}
    others = [n for n in arrays if not n.startswith(prefix) and n not in constants]
    if prefix in _WITHIN_KNOWN and others and not only_backbone:
      return arrays
    if others:
      logging.info(
        "%d of %d tensors are not below %s and are not imported: %s",
        *(len(others), len(arrays), prefix.removesuffix("."), first_of(others, 3)),
      )
    return inside | constants
  if only_backbone:
    raise UserError(
      "--only_backbone is for detectors, and the names of the weights are not a detector's"
    )
  return arrays


def family_of(state_dict: Mapping[str, np.ndarray]) -> Family:
  """Returns the family of a state dict.

  Args:
    state_dict: tensors by name, see `without_prefix`.

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


def for_rgb(arrays: dict[str, np.ndarray], channel_order: str) -> dict[str, np.ndarray]:
  """Returns a ResNet's arrays for images in RGB.

  Args:
    arrays: arrays by our names.
    channel_order: order of the channels that they are for, "rgb" or "bgr". For "bgr", the input channels
      of the first convolution are reversed, which gives the same features.

  Raises:
    UserError: the order is "bgr", and the weights are not those of a ResNet.
  """
  if channel_order == "rgb":
    return arrays
  first = next((name for name in ("backbone.conv1.kernel", "conv1.kernel") if name in arrays), "")
  if not first:
    raise UserError(
      f"--channel_order={channel_order} is for ResNets, and these weights are of another network"
    )
  return arrays | {first: np.ascontiguousarray(arrays[first][:, :, ::-1])}


def check_recorded(state_dict: Mapping[str, np.ndarray], chosen: Preprocessing) -> None:
  """Checks mean and standard deviation against those in the file, which detectron2 may store.

  Args:
    state_dict: tensors by name; "pixel_mean" and "pixel_std" are those of the file's channels in 0..255.
    chosen: what the weights are taken to expect.

  Raises:
    UserError: they differ.
  """
  step = 1 if chosen.channel_order == "rgb" else -1
  for name, values in (("pixel_mean", chosen.pixel_mean), ("pixel_std", chosen.pixel_std)):
    expected = 255 * np.array(values)[::step]
    stored = np.ravel(state_dict.get(name, expected))
    if stored.shape != (3,) or not np.allclose(stored, expected, rtol=1e-3):
      raise UserError(
        f"the file has {name}={stored.tolist()}, and the weights are taken to expect "
        f"{expected.round(3).tolist()} in {chosen.channel_order}; set --channel_order, --stride_in, "
        "--pixel_mean and --pixel_std"
      )
