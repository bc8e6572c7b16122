"""Checks of the values of a config, before any work begins."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from fpt_jax.errors import UserError, one_line

SCHEDULES = ("step", "cosine", "poly")


class Rule(NamedTuple):
  """A condition on a value, in words and as a function."""

  needed: str
  holds: Callable[[Any], bool]


def one_of(*choices: str) -> Rule:
  """Returns the rule that a value is one of `choices`."""
  return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def some_of(*choices: str) -> Rule:
  """Returns the rule that each of several values is one of `choices`."""
  return Rule(
    f"some of {', '.join(choices)}",
    lambda values: not isinstance(values, str) and set(values) <= set(choices),
  )


def is_expression(text: str) -> bool:
  """Returns whether a text is a regular expression."""
  try:
    re.compile(text)
  except re.error:
    return False
  return True


POSITIVE = Rule("1 or more", lambda value: value >= 1)
NOT_NEGATIVE = Rule("0 or more", lambda value: value >= 0)
ABOVE_ZERO = Rule("more than 0", lambda value: value > 0)
SHARE = Rule("from 0 to less than 1", lambda value: 0 <= value < 1)
SHARES = Rule("numbers between 0 and 1", lambda values: all(0 < value <= 1 for value in values))
KEPT = Rule("more than 0 and at most 1", lambda value: 0 < value <= 1)
THREE = Rule(
  "three numbers, for R, G and B", lambda values: len(values) == 3 and math.isfinite(sum(values))
)
THREE_POSITIVE = Rule(
  "three numbers above 0, for R, G and B", lambda values: len(values) == 3 and min(values) > 0
)
SIZES = Rule(
  "pairs (height, width) of positive numbers of pixels",
  lambda sizes: all(len(size) == 2 and min(size) >= 1 for size in sizes),
)
FACTORS = Rule(
  "(low, high), two positive factors, the smaller one first",
  lambda scale: len(scale) == 2 and 0 < scale[0] <= scale[1],
)
COLORS = Rule(
  "() or four numbers, for brightness, contrast and saturation (0 to 1) and hue (0 to 0.5)",
  lambda colors: (
    not colors or (len(colors) == 4 and min(colors) >= 0 and max(colors) <= 1 and colors[3] <= 0.5)
  ),
)
PIXELS = Rule("positive numbers of pixels", lambda sizes: all(size >= 1 for size in sizes))
TRAIN_SIZES = Rule(
  "positive numbers of pixels; if there are two, the smaller one first",
  lambda sizes: all(s >= 1 for s in sizes) and (len(sizes) != 2 or sizes[0] <= sizes[1]),
)
GROUPS = Rule(
  "triples (regular expression, factor of the rate, factor of the decay), the factors 0 or more",
  lambda groups: all(
    len(group) == 3 and is_expression(group[0]) and min(group[1:]) >= 0 for group in groups
  ),
)
MESH = Rule(
  "three numbers of devices, (data, fsdp, query), each 1 or more and at most one of them -1",
  lambda shape: (
    len(shape) == 3
    and all(type(n) is int and (n >= 1 or n == -1) for n in shape)
    and list(shape).count(-1) <= 1
  ),
)
ODD = Rule(
  "an odd number, or unset", lambda value: value is None or (value >= 1 and value % 2 == 1)
)

STEP = Rule(
  "a number of training steps, best, or '' for the newest",
  lambda step: bool(re.fullmatch("([0-9]{1,18}|best)?", step)),
)

TRAINING_RULES = {
  "init_from_step": STEP,
  "batch_size": POSITIVE,
  "train_images": POSITIVE,
  "seed": NOT_NEGATIVE,
  "steps": NOT_NEGATIVE,
  "log_every": POSITIVE,
  "data.train_sizes": TRAIN_SIZES,
  "data.num_workers": NOT_NEGATIVE,
  "data.color_jitter": COLORS,
  "data.prefetch": POSITIVE,
  "model.fpt.drop_block_size": POSITIVE,
  "model.fpt.keep_probability": KEPT,
  "optim.accumulate_steps": POSITIVE,
  "optim.learning_rate": NOT_NEGATIVE,
  "optim.base_batch_size": POSITIVE,
  "optim.name": one_of("sgd", "adamw"),
  "optim.momentum": SHARE,
  "optim.beta1": SHARE,
  "optim.beta2": SHARE,
  "optim.epsilon": ABOVE_ZERO,
  "optim.groups": GROUPS,
  "optim.ema_decay": SHARE,
  "optim.weight_decay": NOT_NEGATIVE,
  "optim.bias_rate": NOT_NEGATIVE,
  "optim.warmup_steps": NOT_NEGATIVE,
  "optim.warmup_factor": NOT_NEGATIVE,
  "optim.schedule": one_of(*SCHEDULES),
  "optim.decay_at": SHARES,
  "optim.decay_factor": ABOVE_ZERO,
  "optim.power": ABOVE_ZERO,
  "optim.clip_norm": NOT_NEGATIVE,
  "eval.every_steps": POSITIVE,
  "eval.patience": NOT_NEGATIVE,
  "checkpoint.every_steps": POSITIVE,
  "checkpoint.every_minutes": NOT_NEGATIVE,
  "checkpoint.keep": POSITIVE,
}
RULES = {
  "mesh.shape": MESH,
  "data.exif": one_of("apply", "ignore"),
  "data.image_dtype": one_of("uint8", "float32"),
  "data.short_edge": NOT_NEGATIVE,
  "data.buckets": SIZES,
  "data.canvas_multiple": POSITIVE,
  "model.num_classes": POSITIVE,
  "model.pixel_mean": THREE,
  "model.pixel_std": THREE_POSITIVE,
  "model.channel_order": one_of("rgb", "bgr"),
  "model.backbone.width": POSITIVE,
  "model.pyramid.channels": POSITIVE,
  "model.fpt.self_parts": POSITIVE,
  "model.fpt.grounding_parts": POSITIVE,
  "model.fpt.window": ODD,
  "eval.batch_size": POSITIVE,
  "checkpoint.best_mode": one_of("max", "min"),
}


def check(config: ConfigDict, rules: Mapping[str, Rule]) -> None:
  """Checks the values of a config.

  Args:
    config: a complete config.
    rules: rule of each field, such as `RULES`; a field is named by its path with dots.

  Raises:
    UserError: a value breaks its rule.
  """
  for path, (needed, holds) in rules.items():
    value = value_at(config, path)
    try:
      good = holds(value)
    except TypeError:
      good = False
    if not good:
      raise UserError(f"config.{path}={value!r} must be {needed}")


def check_types(config: ConfigDict, default: ConfigDict) -> None:
  """Checks that a config, which may have been read from a file, has the fields of another and their types.

  Args:
    config: the config.
    default: a config of the same model. Fields that are placeholders there may be unset. A placeholder
      without a default may also be missing, or have a value of any type.

  Raises:
    UserError: a field is missing, or has a value of another type.
  """
  for path, expected, optional in _fields(default):
    if expected is None:
      continue
    value = value_at(config, path)
    if not (_is_of_type(value, expected) or (optional and value is None)):
      group = isinstance(expected, ConfigDict)
      needed = "a group of fields" if group else f"of the type of its default, {expected!r}"
      raise UserError(f"config.{path}={one_line(value, 100)} must be {needed}")


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
  """Yields the path and the value of each group and each field, and whether it is a placeholder's.

  Groups come before their fields.
  """
  for name, value in config.items(preserve_field_references=True):
    if isinstance(value, FieldReference):
      yield prefix + name, value.get(), True
      continue
    yield prefix + name, value, False
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{prefix}{name}.")


def _is_of_type(value: object, expected: object) -> bool:
  if isinstance(expected, float):
    return isinstance(value, int | float) and not isinstance(value, bool)
  if isinstance(expected, tuple):
    return isinstance(value, tuple | list)  # JSON has lists only
  return type(value) is type(expected)


def value_at(config: ConfigDict, path: str) -> Any:
  """Returns the value of a field that is named by its path with dots.

  Raises:
    UserError: the config does not have the field.
  """
  value: Any = config
  for name in path.split("."):
    if not isinstance(value, ConfigDict) or name not in value:
      raise UserError(
        f"the config has no field {path}, which model.name={config.model.name!r} needs"
      )
    value = value[name]
  return value
