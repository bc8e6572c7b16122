"""The words and settings after the colon of `--config=FILE:WORDS`, in any order.

A benchmark's size is applied first, then its settings, then the words that depend on the size, in
whatever order they are written: the same words always give the same config.
"""

from collections.abc import Callable, Iterable, Mapping

from ml_collections import ConfigDict

from fpt_jax.errors import UserError
from fpt_jax.models.fpt import LITERAL
from fpt_jax.models.preprocess import EFFICIENTNET_LITE, IMAGENET, RESNET_WEIGHTS

Change = Callable[[ConfigDict], None]
Setting = Callable[[ConfigDict, str], None]


def apply(
  config: ConfigDict,
  arg: str,
  *,
  sizes: Mapping[str, Change],
  settings: Mapping[str, Setting],
  words: Mapping[str, Change],
  replaces: Mapping[str, Iterable[str]] | None = None,
) -> ConfigDict:
  """Changes a config by the words and settings in `arg` and returns it.

  Args:
    config: the benchmark's config; it is changed in place.
    arg: words and settings, separated by commas, such as "small,fpt=st+gt".
    sizes: words that exclude each other; applied first.
    settings: functions of the config and the value, by the name of the setting.
    words: other words; applied last.
    replaces: for a setting, or a setting with a value, the settings that it replaces, so that they exclude
      each other.

  Raises:
    UserError: a word, a setting or its value does not exist, is given twice, or two words exclude
      each other.
  """
  known = {**sizes, **words}
  chosen: dict[str, str] = {}
  for part in filter(None, (part.strip() for part in arg.split(","))):
    name, is_setting, value = part.partition("=")
    choices: Iterable[str] = settings if is_setting else known
    if name not in choices:
      kind = "setting" if is_setting else "word"
      raise UserError(f"the {kind} {name!r} does not exist; choose one of {', '.join(choices)}")
    if chosen.get(name, value) != value:
      raise UserError(f"{name}={chosen[name]} and {name}={value} exclude each other; keep one")
    chosen[name] = value
  exclusive = [name for name in chosen if name in sizes]
  if len(exclusive) > 1:
    raise UserError(f"the words {' and '.join(exclusive)} exclude each other; keep one")
  for name, others in (replaces or {}).items():
    setting, has_value, value = name.partition("=")
    if setting not in chosen or (has_value and chosen[setting] != value):
      continue
    for other in others:
      if other in chosen:
        raise UserError(f"the settings {name} and {other} exclude each other; keep one")
  for name in exclusive:
    sizes[name](config)
  for name in settings:
    if name in chosen:
      settings[name](config, chosen[name])
  for name in words:
    if name in chosen:
      words[name](config)
  return config


def choice(setting: str, value: str, choices: Iterable[str]):
  """Returns `value` if it is one of `choices`; if they are a mapping, returns what it maps `value` to.

  Raises:
    UserError: the choice does not exist.
  """
  if value not in choices:
    known = ", ".join(choices)
    raise UserError(f"{setting}={value} does not exist; choose one of {known}")
  return choices[value] if isinstance(choices, Mapping) else value


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
HRNETS = ("hrnet_w48",)
WIDER_RESNETS = ("wider_resnet38",)
BACKBONES = (*RESNETS, "efficientnet_lite0", *HRNETS, *WIDER_RESNETS)
CONTEXTS = {  # what follows the name of a ResNet
  "": "none",
  "_nl": "non_local",
  "_gc": "global_context",
  "_aa": "attention_augmented",
}
FPT_NAMES = ("none", "fuse", "fuse_wide", "st", "gt", "lgt", "rt")
SCOPES = ("all", "adjacent")
SBN = {"on": "sync_bn", "off": "bn"}
DROPBLOCK = {"on": 0.9, "off": 1.0}


def set_backbone(config: ConfigDict, value: str) -> None:
  """Sets a backbone.

  EfficientNet in place of another backbone, and another one in place of EfficientNet, starts from frozen
  pretrained weights, and gets the mean and standard deviation of the images that it was trained on. Otherwise
  the backbone keeps those of the benchmark, its normalisation and width, and is frozen or trained as before.

  Args:
    config: a complete config.
    value: a name of `BACKBONES`; a ResNet can be followed by `_nl`, `_gc` or `_aa`.
  """
  backbone = config.model.backbone
  known = {f"{name}{suffix}": (name, CONTEXTS[suffix]) for name in RESNETS for suffix in CONTEXTS}
  known |= {name: (name, "none") for name in BACKBONES if name not in RESNETS}
  name, context = choice("backbone", value, known)
  if (name, context) == (backbone.name, backbone.context):
    return
  is_efficientnet = name == "efficientnet_lite0"
  if is_efficientnet != (backbone.name == "efficientnet_lite0"):
    images = EFFICIENTNET_LITE if is_efficientnet else IMAGENET
    config.model.pixel_mean, config.model.pixel_std = images.pixel_mean, images.pixel_std
    backbone.update(dict(norm="frozen_bn", frozen=True))
  backbone.name, backbone.context = name, context
  config.optim.frozen = ()  # they are names of another backbone's parts


def set_weights(config: ConfigDict, value: str) -> None:
  """Sets what a ResNet's pretrained weights expect, by the library that they come from.

  Args:
    config: a complete config.
    value: a name of `RESNET_WEIGHTS`.
  """
  images = choice("weights", value, RESNET_WEIGHTS)
  if config.model.backbone.name not in RESNETS:
    raise UserError(
      f"weights={value} are those of a ResNet, and the backbone is {config.model.backbone.name}; set "
      "backbone=resnet50 too"
    )
  config.model.pixel_mean, config.model.pixel_std = images.pixel_mean, images.pixel_std
  config.model.backbone.stride_in = images.stride_in


def set_fpt(config: ConfigDict, value: str) -> None:
  """Sets the transformers, such as `st+gt+rt`, with `lgt` for a locality-constrained gt; or a baseline.

  Baselines are `none`, the pyramid alone; `fuse`, with FPT's 3x3 convolution and normalisation but no
  transformer; and `fuse_wide`, with a second convolution and as many parameters as FPT.
  """
  names = [choice("fpt", name, FPT_NAMES) for name in value.split("+")]
  baselines = {"none", "fuse", "fuse_wide"} & set(names)
  if (baselines and len(names) > 1) or {"gt", "lgt"} <= set(names):
    raise UserError(
      f"fpt={value}: its parts exclude each other; choose a sum such as st+gt+rt, or none, fuse or "
      "fuse_wide"
    )
  fpt = config.model.fpt
  fpt.enabled = "none" not in names
  fpt.wide = "fuse_wide" in names
  fpt.self_transformer = "st" in names
  fpt.grounding_transformer = "gt" in names or "lgt" in names
  fpt.rendering_transformer = "rt" in names
  fpt.window = 5 if "lgt" in names else None


def set_scope(config: ConfigDict, value: str) -> None:
  config.model.fpt.scope = choice("scope", value, SCOPES)


def literal(config: ConfigDict) -> None:
  """Sets the bare equations of the paper, without further normalisation."""
  config.model.fpt.update(LITERAL)
  if "init" in config.model.pyramid:
    config.model.pyramid.init = "fan_out"


def set_dropblock(config: ConfigDict, value: str) -> None:
  config.model.fpt.keep_probability = choice("dropblock", value, DROPBLOCK)
