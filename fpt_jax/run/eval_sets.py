"""The sets that a run is evaluated on: `config.data.eval_split`, and those of `config.eval.sets`.

A set of `config.eval.sets` is a pair of a name and what differs from `config.data`: a split, or fields by
name. The main set has the name "".
"""

import contextlib
import re
from collections.abc import Collection, Iterator

from etils import epath
from ml_collections import ConfigDict

from fpt_jax.errors import UserError, one_line
from fpt_jax.run.folder import run_folder

# Fields of `config.data` that a set may replace: where its images are, and the sizes at which they are seen.
FIELDS = (
  "annotations",
  "buckets",
  "builder",
  "cache_dir",
  "data_dir",
  "eval_split",
  "exif",
  "format",
  "images",
  "long_edge",
  "name",
  "short_edge",
  "skip_bad",
  "source",
)
# names of files of `eval`, and of groups of metrics and pictures, beside those of the task
_RESERVED = ("eval", "fpt", "submission")


def configs_of_sets(config: ConfigDict) -> dict[str, ConfigDict]:
  """Returns the config to evaluate each set with, by the set's name; the main one is `config` itself."""
  sets = {name: _config_of(config, name, changes) for name, changes in config.eval.sets}
  return {"": config, **sets}


def _config_of(
  config: ConfigDict, name: str, changes: str | dict[str, object] | ConfigDict
) -> ConfigDict:
  """Returns the config of a set, whose fields may still have values that are not possible."""
  of_set = config.copy_and_resolve_references()
  of_set.eval.sets = ()
  fields = {"eval_split": changes} if isinstance(changes, str) else dict(changes)
  for field, value in fields.items():
    try:
      of_set.data[field] = value
    except (TypeError, ValueError) as error:
      raise UserError(
        f"config.eval.sets, {name!r}: data.{field}={one_line(value, 100)} must be of the type of "
        f"config.data.{field}, {one_line(repr(of_set.data[field]), 100)}"
      ) from error
  return of_set


def check(config: ConfigDict, metrics: Collection[str]) -> None:
  """Checks the form of `config.eval.sets` and the names of the sets and fields.

  Args:
    config: a complete config.
    metrics: names of the metrics of an evaluation.

  Raises:
    UserError: they are not possible.
  """
  reserved = {*_RESERVED, *(metric.split("/")[0] for metric in metrics)}
  seen: set[str] = set()
  for pair in config.eval.sets:
    if not _is_set(pair):
      raise UserError(
        f"config.eval.sets={config.eval.sets!r} must be pairs of a name and a split, or of a name and fields "
        "of config.data, such as (('few','val[:500]'),('mine',{'source':'/data/mine'}))"
      )
    name, changes = pair
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
      raise UserError(
        f"config.eval.sets: the name {name!r} must have letters of A to Z, digits, - and _ only"
      )
    if name in reserved:
      raise UserError(
        f"config.eval.sets: the name {name!r} is that of other metrics or files; choose another one"
      )
    if name.lower() in seen:  # some file systems do not tell them apart
      raise UserError(f"config.eval.sets: two sets have the name {name!r}; give each another name")
    seen.add(name.lower())
    known = [field for field in FIELDS if field in config.data]
    for field in () if isinstance(changes, str) else changes:
      if field not in known:
        raise UserError(
          f"config.eval.sets, {name!r}: a set has no field {field!r}; its fields are those of config.data "
          f"among {', '.join(known)}"
        )


def _is_set(pair: object) -> bool:
  if not isinstance(pair, tuple | list) or len(pair) != 2:
    return False
  name, changes = pair
  return isinstance(name, str) and isinstance(changes, str | dict | ConfigDict)


def in_set(name: str, metric: str) -> str:
  """Returns the name of a metric of a set: NAME/metric, or the metric's own name for the main set."""
  return f"{name}/{metric}" if name else metric


def folder_of_set(workdir: str, name: str) -> epath.Path:
  """Returns the folder of a set's results, "eval/NAME" in the run's folder, or "eval" for the main set."""
  folder = run_folder(workdir) / "eval"
  return folder / name if name else folder


@contextlib.contextmanager
def errors_of_set(name: str) -> Iterator[None]:
  """Context in which the messages of a UserError begin with the set; those of the main set do not change."""
  try:
    yield
  except UserError as error:
    # a subclass has a meaning of its own
    if not name or type(error) is not UserError:
      raise
    raise UserError(f"config.eval.sets, {name!r}: {error}") from error
