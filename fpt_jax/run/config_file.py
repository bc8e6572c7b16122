"""`config.json`: the config that a run was made with, and its comparison with other configs."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from fpt_jax.errors import UserError, first_of, one_line
from fpt_jax.run.config_upgrade import upgrade
from fpt_jax.run.folder import read_json, run_folder, write_whole

CONFIG_FILE = "config.json"
HISTORY_FILE = "config_history.jsonl"
# groups of fields that the config of every run has
GROUPS = ("data", "eval", "model", "model.fpt", "optim")
SHOWN_DIFFERENCES = 4
# Fields, or groups ending in ".", that a resumed run may change: its losses do not depend on them. The number
# of steps may grow.
FREE_TO_CHANGE = (
  "checkpoint.",
  "data.cache_dir",
  "data.data_dir",
  "data.eval_split",
  "data.num_workers",
  "data.prefetch",
  "data.skip_bad",
  "data.source",
  "eval.",
  "init_from",
  "log_every",
  "loggers",
  "mesh.",
  "model.fpt.implementation",
  "model.palette",
  "model.remat",
  "model.rpn.test.",
  "model.test.",
  "name",
  "steps",
  "train_images",
)
# fields that may change as well if data.digest tells that the same files are there
PATHS = ("data.annotations", "data.builder.splits", "data.images")
Changes = dict[str, tuple[object, object]]  # old and new value of each field by name


def has_config(workdir: str) -> bool:
  """Whether the folder already belongs to a run."""
  return (run_folder(workdir) / CONFIG_FILE).exists()


def write_config(workdir: str, config: ConfigDict) -> None:
  """Writes `config.json` atomically.

  Raises:
    UserError: the file cannot be written.
  """
  write_whole(run_folder(workdir) / CONFIG_FILE, config.to_json(indent=2) + "\n")


def read_config(workdir: str) -> ConfigDict:
  """Reads the config of a run, upgraded to the fields of this version.

  Raises:
    UserError: the file does not exist, is not valid JSON, or is not the config of a run; or this version
      does not have its model.
  """
  path = run_folder(workdir) / CONFIG_FILE
  if not path.exists():
    raise UserError(f"{path} does not exist; {workdir} is not the folder of a run")
  content = read_json(path)
  if not isinstance(content, dict):
    raise UserError(f"{path} is not a JSON object; restore the file")
  for group in GROUPS:
    part: Any = content
    for name in group.split("."):
      part = part.get(name)
      if not isinstance(part, dict):
        raise UserError(
          f"{path}: {group} is {_short(part)}, not a group of fields; restore the file"
        )
  name = content["model"].get("name")
  if not isinstance(name, str):
    raise UserError(f"{path}: model.name is {_short(name)}, not a name; restore the file")
  try:
    return upgrade(ConfigDict(content))
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  # a field can have any name and any value
  except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
    raise UserError(
      f"{path} is not the config of a run ({type(error).__name__}: {one_line(error, 200)}); restore the file"
    ) from error


def _short(value: object) -> str:
  return "missing" if value is None else json.dumps(value)[:40]


def config_of_run(
  saved: ConfigDict,
  config: ConfigDict | None,
  workdir: str,
  *,
  from_data: Sequence[str],
  not_of_the_weights: Sequence[str],
) -> ConfigDict:
  """Returns the config to use a run with: its own, or `config` if it describes the same model.

  Args:
    saved: the run's own config.
    config: None for the run's own config.
    workdir: folder of the run, for messages.
    from_data: fields of `model` that a run takes from its data set. Those that `config` leaves empty are
      copied from the run; all of them, if the first is empty.
    not_of_the_weights: see `check_same_model`.

  Raises:
    UserError: the run has another model.
  """
  if config is None:
    return saved
  if saved.model.name == config.model.name:
    named = bool(config.model[from_data[0]])
    taken = (name for name in from_data if not (named and config.model[name]))
    config.model.update({name: saved.model[name] for name in taken})
  check_same_model(saved, config, workdir, not_of_the_weights)
  return config


def changes(saved: ConfigDict, config: ConfigDict) -> Changes:
  """Returns the fields that differ, by name, with both values.

  A field that only one of the configs has belongs to another version, and is not compared.
  """
  old, new = (json.loads(c.to_json()) for c in (saved, config))
  return dict(sorted(_differences(old, new)))


def check_resumable(
  changed: Changes,
  *,
  old_steps: int,
  new_steps: int,
  start: int,
  same_files: bool,
  workdir: str,
  allow: bool,
) -> None:
  """Checks that a run can be resumed with another config, so that its result can be explained.

  Args:
    changed: the changes since the run's config was written.
    old_steps, new_steps: number of training steps before and after the changes.
    start: step to resume from.
    same_files: whether the training data are known to be the same.
    workdir: folder of the run, for the message.
    allow: whether to resume whatever has changed.

  Raises:
    UserError: the training would be another one than before, or has fewer steps than are done.
  """
  if new_steps < start:
    raise UserError(
      f"--workdir={workdir} has done {start} steps, and the config has {new_steps}; train as many or "
      "more, or choose another --workdir"
    )
  may_change = FREE_TO_CHANGE + (PATHS if same_files else ())
  free = tuple(name for name in changed if name.startswith(may_change))
  if new_steps < old_steps:
    free = tuple(name for name in free if name not in ("steps", "train_images"))
  refused = {name: values for name, values in changed.items() if name not in free}
  if refused and not allow:
    raise UserError(
      f"--workdir={workdir} was trained for {start} steps with another config "
      f"({_shown(refused)}); restore these values, choose another --workdir, or resume nevertheless "
      "with --allow_config_changes"
    )


def record_changes(workdir: str, changed: Changes, step: int) -> None:
  """Logs changes of the config and appends them to `config_history.jsonl`; without changes, does nothing."""
  if not changed:
    return
  logging.info("changed since the run began: %s", _shown(changed, len(changed)))
  path = run_folder(workdir) / HISTORY_FILE
  line = {
    "step": step,
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "changed": {name: {"from": old, "to": new} for name, (old, new) in changed.items()},
  }
  before = path.read_bytes() if path.exists() else b""
  write_whole(path, before + f"{json.dumps(line)}\n".encode())


def _shown(changed: Mapping[str, tuple[object, object]], most: int = SHOWN_DIFFERENCES) -> str:
  """Formats changes as "a was 1, now 2; b was ..."."""
  described = [
    "the files of data.train_split have changed"
    if name == "data.digest"
    else f"{name} was {old}, now {new}"
    for name, (old, new) in changed.items()
  ]
  return first_of(described, most, "; ")


def check_same_model(
  saved: ConfigDict, config: ConfigDict, workdir: str, not_of_the_weights: Sequence[str]
) -> None:
  """Checks that two configs describe models with the same weights.

  Args:
    saved: the config of the run in `workdir`.
    config: the other config.
    workdir: folder of the run, for the message.
    not_of_the_weights: fields of `model`, or groups ending in ".", that may differ.

  Raises:
    UserError: other fields of `model` differ.
  """
  old, new = (flattened(c.model) for c in (saved, config))
  differing = [
    name
    for name in sorted(old | new)
    if old.get(name) != new.get(name) and not name.startswith(tuple(not_of_the_weights))
  ]
  if differing:
    different = {f"model.{n}": (old.get(n), new.get(n)) for n in differing}
    raise UserError(
      f"--workdir={workdir} belongs to a run of another model ({_shown(different)}); "
      "choose another --workdir, or the config it was made with"
    )


def _differences(
  old: dict, new: dict, prefix: str = ""
) -> Iterator[tuple[str, tuple[object, object]]]:
  for key in old.keys() & new.keys():
    before, now = old[key], new[key]
    if isinstance(before, dict) and isinstance(now, dict):
      yield from _differences(before, now, f"{prefix}{key}.")
    elif before != now:
      yield prefix + key, (before, now)


def flattened(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields of a config by their full names, with the values that JSON has for them."""
  return dict(_flatten(json.loads(config.to_json())))


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
