"""Orbax checkpoints: saved while training goes on, resumed exactly, restored anywhere.

A checkpoint has two items: `model`, every array of the model by name, and `optimizer`, which only
resuming reads. `config.json` beside them says what model it is.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from fpt_jax.errors import UserError
from fpt_jax.run import config_upgrade

CONFIG_FILE = "config.json"
IMPORTED_FILE = "imported.json"
# parts of a model's config that may change between training and use
NOT_OF_THE_WEIGHTS = (
  "test.",
  "rpn.test.",
  "rpn.train.",
  "category_names",
  "palette",
  "swaps",
  "dtype",
  "fpt.implementation",
)
# and those that a config which names no classes has from its data set
FROM_DATA = ("num_classes", "category_ids", "category_names", "class_names", "palette", "swaps")


def manager(workdir: str, keep: int | None = None) -> ocp.CheckpointManager:
  """The checkpoints of a run, written in the background; the newest `keep` stay."""
  options = ocp.CheckpointManagerOptions(max_to_keep=keep)
  return ocp.CheckpointManager(
    folder(workdir) / "checkpoints",
    options=options,
    item_handlers={name: ocp.PyTreeCheckpointHandler() for name in ("model", "optimizer")},
  )


def folder(workdir: str) -> epath.Path:
  """The run's folder, on a disk or in a bucket."""
  if not workdir:
    raise UserError("no --workdir: name the folder of the run")
  return epath.Path(workdir) if "://" in workdir else epath.Path(os.path.abspath(workdir))


def save(checkpoints: ocp.CheckpointManager, step: int, model: Mapping, optimizer=None) -> None:
  """Starts to write a checkpoint; an earlier write that failed is told here.

  Args:
    checkpoints: of the run.
    step: training steps done.
    model: its arrays by name.
    optimizer: its state; None for weights that are not to be trained on from here.

  Raises:
    UserError: a checkpoint cannot be written. Those complete are untouched.
  """
  items = {"model": ocp.args.PyTreeSave(dict(model))}
  if optimizer is not None:
    items["optimizer"] = ocp.args.PyTreeSave(optimizer)
  finish(checkpoints)
  _check_space(checkpoints, sum(a.nbytes for a in jax.tree.leaves((model, optimizer))))
  with _told(checkpoints):
    checkpoints.save(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def closing(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
  """On the way out, also by an error, what was saved before reaches the disk."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(Exception):  # the error under way is the one to tell
      checkpoints.close()
    raise
  finish(checkpoints)
  checkpoints.close()


def finish(checkpoints: ocp.CheckpointManager) -> None:
  """Waits until what was saved is on disk.

  Raises:
    UserError: it could not be written.
  """
  with _told(checkpoints):
    checkpoints.wait_until_finished()


def restore_model(
  checkpoints: ocp.CheckpointManager, step: int, shapes: Mapping, sharding
) -> dict[str, jax.Array]:
  """The model's arrays of a step, laid out as `sharding` says, whatever they were saved from.

  Args:
    checkpoints: of the run.
    step: one of its steps.
    shapes: of the model by name, `Skeleton.shapes`.
    sharding: of every array.

  Raises:
    UserError: the checkpoint is of another model, or cannot be read.
  """
  return _restore(checkpoints, step, "model", dict(shapes), sharding)


def restore_optimizer(checkpoints: ocp.CheckpointManager, step: int, shapes, sharding):
  """The optimizer's state of a step; `shapes` is a tree of shapes, see `restore_model`."""
  return _restore(checkpoints, step, "optimizer", shapes, sharding)


def restore_matching(
  checkpoints: ocp.CheckpointManager, shapes: Mapping, sharding
) -> dict[str, jax.Array]:
  """What the newest checkpoint and a model have in common, by name and shape: where to start from.

  Raises:
    UserError: there is no checkpoint, or it has nothing in common with the model.
  """
  step = choose_step(checkpoints)
  saved = _saved_shapes(checkpoints, step, "model")
  common = {n: s for n, s in shapes.items() if saved.get(n) == tuple(s.shape)}
  if not common:
    raise UserError(f"step {step} in {checkpoints.directory} has no array that fits the model")
  return _read(checkpoints, step, "model", common, sharding, partial=True)


def write_imported(workdir: str, names: Iterable[str]) -> None:
  """Writes which of the arrays of an import are others' weights; the rest are random."""
  (folder(workdir) / IMPORTED_FILE).write_text(json.dumps(sorted(names)) + "\n")


def worth_starting_from(workdir: str, shapes: Mapping) -> dict:
  """Of `shapes`, those that an import brought; all of them where the folder is a run's."""
  path = folder(workdir) / IMPORTED_FILE
  if not path.exists():
    return dict(shapes)
  names = set(json.loads(path.read_text()))
  return {name: shape for name, shape in shapes.items() if name in names}


def choose_step(checkpoints: ocp.CheckpointManager, step: int | None = None) -> int:
  """`step`, or the newest one.

  Raises:
    UserError: there is none, or not this one.
  """
  steps = checkpoints.all_steps()
  if not steps:
    raise UserError(f"{checkpoints.directory} holds no checkpoint; train first (--mode=train)")
  if step is not None and step not in steps:
    raise UserError(f"{checkpoints.directory} holds no step {step}; it holds {sorted(steps)}")
  return max(steps) if step is None else step


def write_config(workdir: str, config: ConfigDict) -> None:
  """Writes `config.json`, whole or not at all.

  Raises:
    UserError: the folder holds a run of another model.
  """
  path = folder(workdir) / CONFIG_FILE
  if path.exists():
    check_same_model(read_config(workdir), config, workdir)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f"{CONFIG_FILE}.tmp"
  temporary.write_text(config.to_json(indent=2) + "\n")
  temporary.replace(path)


def read_config(workdir: str) -> ConfigDict:
  """The config of the run in a folder.

  Raises:
    UserError: there is none, or it is no JSON.
  """
  path = folder(workdir) / CONFIG_FILE
  if not path.exists():
    raise UserError(f"{path} does not exist: {workdir} is not the folder of a run")
  try:
    config = ConfigDict(json.loads(path.read_text()))
  except json.JSONDecodeError as error:
    raise UserError(
      f"{path} line {error.lineno} is no JSON ({error.msg}); restore the file"
    ) from error
  config_upgrade.complete(config)
  return config


def config_of_run(workdir: str, config: ConfigDict | None) -> ConfigDict:
  """The run's own config, or `config` where it is given and of the same model.

  Raises:
    UserError: the folder holds no run, or one of another model.
  """
  saved = read_config(workdir)
  if config is None:
    return saved
  model = config.model
  if not (model.get("category_ids") or model.get("class_names")):
    model.update({k: saved.model[k] for k in FROM_DATA if k in model and k in saved.model})
  check_same_model(saved, config, workdir)
  return config


def check_same_model(saved: ConfigDict, config: ConfigDict, workdir: str) -> None:
  """Raises UserError if the two configs describe different models."""
  old, new = (dict(_flatten(json.loads(c.model.to_json()))) for c in (saved, config))
  differing = [
    k
    for k in sorted(old | new)
    if old.get(k) != new.get(k) and not k.startswith(NOT_OF_THE_WEIGHTS)
  ]
  if differing:
    changes = "; ".join(f"model.{k} was {old.get(k)}, now {new.get(k)}" for k in differing[:4])
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise UserError(
      f"--workdir={workdir} holds a run of another model ({changes}{more}); "
      "choose another --workdir, or the config it was made with"
    )


def _flatten(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _restore(checkpoints, step, item, shapes, sharding):
  saved = _saved_shapes(checkpoints, step, item)
  _check_shapes(saved, _named(shapes), _where(checkpoints, step))
  return _read(checkpoints, step, item, shapes, sharding, partial=False)


def _where(checkpoints, step) -> str:
  return f"step {step} in {checkpoints.directory}"


def _saved_shapes(checkpoints, step, item) -> dict[str, tuple[int, ...]]:
  where = _where(checkpoints, step)
  try:
    saved = checkpoints.item_metadata(step)[item]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{where} cannot be read ({_one_line(error)}); choose another step") from error
  if saved is None:
    raise UserError(f"{where} has no {item}: it can be evaluated, or named by --config.init_from")
  return _named(saved.tree)


def _read(checkpoints, step, item, shapes, sharding, partial):
  target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
  args = ocp.args.PyTreeRestore(
    target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=partial,
  )
  try:
    return checkpoints.restore(step, args=ocp.args.Composite(**{item: args}))[item]
  except (OSError, ValueError) as error:
    raise UserError(
      f"{_where(checkpoints, step)} cannot be read ({_one_line(error)}); delete its folder to go on "
      "from an earlier one"
    ) from error


def _named(tree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _path_name(path) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _check_shapes(saved: Mapping, wanted: Mapping, where: str) -> None:
  complaints = [f"{n} is missing" for n in wanted if n not in saved]
  complaints += [f"{n} has no place in the model" for n in saved if n not in wanted]
  complaints += [
    f"{n} is {saved[n]}, the model's {wanted[n]}"
    for n in wanted
    if n in saved and saved[n] != wanted[n]
  ]
  if complaints:
    more = f" and {len(complaints) - 4} more" if len(complaints) > 4 else ""
    raise UserError(f"{where} is of another model: {'; '.join(complaints[:4])}{more}")


def _check_space(checkpoints: ocp.CheckpointManager, size: int) -> None:
  """Raises UserError where a local disk has no room: a write that fails midway is told less clearly."""
  directory = str(checkpoints.directory)
  if "://" in directory:
    return
  free = shutil.disk_usage(directory).free
  if free < size:
    complete = sorted(checkpoints.all_steps())
    raise UserError(
      f"{directory}: a checkpoint takes {size / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; complete "
      f"checkpoints are {complete}; make room and run the same command again"
    )


@contextlib.contextmanager
def _told(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    checkpoints.reload()
    complete = sorted(checkpoints.all_steps())
    kept = f"complete are {complete}" if complete else "none is complete yet"
    raise UserError(
      f"a checkpoint could not be written to {checkpoints.directory} ({_one_line(error)}); {kept}; "
      "make room and start again"
    ) from error


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split())[:300]
