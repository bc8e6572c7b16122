"""The part of a config behind its file's colon: words and settings, separated by commas."""

from collections.abc import Callable

from ml_collections import ConfigDict


def apply(
  config: ConfigDict, arg: str, words: dict[str, Callable], settings: dict[str, Callable]
) -> ConfigDict:
  """The config as `arg` asks.

  Args:
    config: where to start.
    arg: such as "small,fpt=st+gt".
    words: what each word does, config -> config.
    settings: what each setting does, (config, value) -> config.

  Raises:
    ValueError: a word, a setting or its value does not exist.
  """
  for part in filter(None, arg.split(",")):
    name, is_setting, value = part.partition("=")
    known = settings if is_setting else words
    if name not in known:
      kind = "setting" if is_setting else "variant"
      raise ValueError(f"{kind} {name!r} does not exist; choose one of {', '.join(known)}")
    config = known[name](config, value) if is_setting else known[name](config)
  return config


def choice(setting: str, value: str, key: str, choices: dict):
  """`choices[key]`, or a ValueError that tells what there is."""
  if key not in choices:
    raise ValueError(
      f"{setting}={value} does not exist: {key!r} is none of {', '.join(k or 'nothing' for k in choices)}"
    )
  return choices[key]


CONTEXTS = {
  "": "none",
  "nl": "non_local",
  "gc": "global_context",
  "aa": "attention_augmented",
}


def set_backbone(config: ConfigDict, value: str) -> ConfigDict:
  """A name of `models.backbones`, for a ResNet perhaps with `_nl`, `_gc` or `_aa` behind it."""
  name, _, context = value.partition("_") if value.startswith("resnet") else (value, "", "")
  config.model.backbone.name = name
  config.optim.frozen = ()  # parts of another backbone
  config.model.backbone.context = choice("backbone", value, context, CONTEXTS)
  if name == "efficientnet_lite0":  # small, and there for its weights
    config.model.pixel_mean, config.model.pixel_std = (127 / 255,) * 3, (128 / 255,) * 3
    config.model.backbone.update(dict(norm="frozen_bn", frozen=True))
  return config


def set_pyramid(config: ConfigDict, value: str) -> ConfigDict:
  config.model.pyramid.name = value
  return config


def set_fpt(config: ConfigDict, value: str) -> ConfigDict:
  """The transformers, such as `st+gt+rt`, with `lgt` for a locality-constrained gt; or `none`."""
  names = [] if value == "none" else value.split("+")
  for name in names:
    choice("fpt", value, name, dict.fromkeys(("st", "gt", "lgt", "rt")))
  config.model.fpt.enabled = bool(names)
  config.model.fpt.self_transformer = "st" in names
  config.model.fpt.grounding_transformer = "gt" in names or "lgt" in names
  config.model.fpt.rendering_transformer = "rt" in names
  config.model.fpt.window = 5 if "lgt" in names else None
  return config


def set_scope(config: ConfigDict, value: str) -> ConfigDict:
  config.model.fpt.scope = choice("scope", value, value, {"all": "all", "adjacent": "adjacent"})
  return config


def set_dropblock(config: ConfigDict, value: str) -> ConfigDict:
  config.model.fpt.keep_probability = choice("dropblock", value, value, {"on": 0.9, "off": 1.0})
  return config
