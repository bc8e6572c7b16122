"""`config.json`: the config that a run was made with, and its comparison with other configs."""

import json
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from fpt_jax.errors import UserError
from fpt_jax.run.config_upgrade import upgrade
from fpt_jax.run.folder import run_folder, write_whole

CONFIG_FILE = "config.json"
SHOWN_DIFFERENCES = 4


def has_config(workdir: str) -> bool:
  """Whether the folder already belongs to a run."""
  return (run_folder(workdir) / CONFIG_FILE).exists()


def write_config(workdir: str, config: ConfigDict) -> None:
  """Writes `config.json` atomically."""
  write_whole(run_folder(workdir) / CONFIG_FILE, config.to_json(indent=2) + "\n")


def read_config(workdir: str) -> ConfigDict:
  """Reads the config of a run, upgraded to the fields of this version.

  Raises:
    UserError: the file does not exist, or is not valid JSON.
  """
  path = run_folder(workdir) / CONFIG_FILE
  if not path.exists():
    raise UserError(f"{path} does not exist; {workdir} is not the folder of a run")
  try:
    config = ConfigDict(json.loads(path.read_text()))
  except json.JSONDecodeError as error:
    raise UserError(
      f"{path}, line {error.lineno}: not valid JSON ({error.msg}); restore the file"
    ) from error
  return upgrade(config)


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
    from_data: fields of `model` that a run takes from its data set. Those that `config` leaves empty are
      copied from the run; all of them, if the first is empty.
    not_of_the_weights: see `check_same_model`.

  Raises:
    UserError: the folder does not hold a run, or the run has another model.
  """
  saved = read_config(workdir)
  if config is None:
    return saved
  if saved.model.name == config.model.name:
    named = bool(config.model[from_data[0]])
    taken = (name for name in from_data if not (named and config.model[name]))
    config.model.update({name: saved.model[name] for name in taken})
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
