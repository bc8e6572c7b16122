"""`config.json`: the config that a run was made with, and its comparison with other configs."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from fpt_jax.errors import UserError, one_line
from fpt_jax.run.config_upgrade import upgrade
from fpt_jax.run.folder import read_json, run_folder, write_whole

CONFIG_FILE = "config.json"
# groups of fields that the config of every run has
GROUPS = ("data", "eval", "model", "model.fpt", "optim")
SHOWN_DIFFERENCES = 4


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
    UserError: the file does not exist, is not valid JSON, or is not the config of a run.
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
          f"{path}: {group} is {_shown(part)}, not a group of fields; restore the file"
        )
  name = content["model"].get("name")
  if not isinstance(name, str):
    raise UserError(f"{path}: model.name is {_shown(name)}, not a name; restore the file")
  try:
    return upgrade(ConfigDict(content))
  # a field can have any name and any value
  except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
    raise UserError(
      f"{path} is not the config of a run ({type(error).__name__}: {one_line(error, 200)}); restore the file"
    ) from error


def _shown(value: object) -> str:
  return "missing" if value is None else f"{json.dumps(value)[:40]}"


def config_of_run(
  workdir: str,
  config: ConfigDict | None,
  *,
  from_data: Sequence[str],
  not_of_the_weights: Sequence[str],
) -> ConfigDict:
  """Returns the config to use a run with: its own, or `config` if it describes the same model.

  Args:
    workdir: folder of the run.
    config: None for the run's own config.
    from_data: fields of `model` that a run takes from its data set. They are copied from the run if
      `config` leaves the first of them empty.
    not_of_the_weights: see `check_same_model`.

  Raises:
    UserError: the folder does not hold a run, or the run has another model.
  """
  saved = read_config(workdir)
  if config is None:
    return saved
  same_task = saved.model.name == config.model.name
  if same_task and not config.model[from_data[0]]:
    config.model.update({name: saved.model[name] for name in from_data})
  check_same_model(saved, config, workdir, not_of_the_weights)
  return config


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
  old, new = (dict(_flatten(json.loads(c.model.to_json()))) for c in (saved, config))
  differing = [
    name
    for name in sorted(old | new)
    if old.get(name) != new.get(name) and not name.startswith(tuple(not_of_the_weights))
  ]
  if differing:
    shown = differing[:SHOWN_DIFFERENCES]
    changes = "; ".join(f"model.{n} was {old.get(n)}, now {new.get(n)}" for n in shown)
    more = f" and {len(differing) - len(shown)} more" if len(differing) > len(shown) else ""
    raise UserError(
      f"--workdir={workdir} belongs to a run of another model ({changes}{more}); "
      "choose another --workdir, or the config it was made with"
    )


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
