"""Orbax checkpoints: written in the background, resumed exactly, restored on any devices.

A checkpoint has two items: `model`, with every array of the model by name, and `optimizer`, which is
needed to resume training. `config.json` in the run's folder describes the model.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping

import jax
import orbax.checkpoint as ocp

from fpt_jax.errors import UserError, one_line
from fpt_jax.run.folder import run_folder

SHOWN_DIFFERENCES = 4


def manager(workdir: str, keep: int | None = None) -> ocp.CheckpointManager:
  """Opens the checkpoints of a run.

  Args:
    workdir: folder of the run.
    keep: number of newest checkpoints to keep on disk; None for all.
  """
  options = ocp.CheckpointManagerOptions(max_to_keep=keep)
  return ocp.CheckpointManager(
    run_folder(workdir) / "checkpoints",
    options=options,
    item_handlers={name: ocp.PyTreeCheckpointHandler() for name in ("model", "optimizer")},
  )


def save(checkpoints: ocp.CheckpointManager, step: int, model: Mapping, optimizer=None) -> None:
  """Starts to write a checkpoint in the background; a failure is reported by the next call or `finish`.

  Args:
    checkpoints: checkpoints of the run.
    step: number of training steps done.
    model: arrays of the model by name.
    optimizer: state of the optimizer; None for weights that training does not resume from.

  Raises:
    UserError: a checkpoint cannot be written. Complete checkpoints are not touched.
  """
  items = {"model": ocp.args.PyTreeSave(dict(model))}
  if optimizer is not None:
    items["optimizer"] = ocp.args.PyTreeSave(optimizer)
  finish(checkpoints)
  _check_space(checkpoints, sum(a.nbytes for a in jax.tree.leaves((model, optimizer))))
  with _reported(checkpoints):
    checkpoints.save(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def closing(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
  """Context that waits at its end until all saved checkpoints are on disk, and closes them."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(Exception):  # report the error that ended the context
      checkpoints.close()
    raise
  finish(checkpoints)
  checkpoints.close()


def finish(checkpoints: ocp.CheckpointManager) -> None:
  """Waits until all saved checkpoints are on disk.

  Raises:
    UserError: a checkpoint could not be written.
  """
  with _reported(checkpoints):
    checkpoints.wait_until_finished()


def restore_model(
  checkpoints: ocp.CheckpointManager, step: int, shapes: Mapping, sharding
) -> dict[str, jax.Array]:
  """Restores the model's arrays at a step with a sharding, whatever devices they were saved from.

  Args:
    checkpoints: checkpoints of the run.
    step: one of their steps.
    shapes: shapes of the model's arrays by name, see `Skeleton.shapes`.
    sharding: sharding of every array.

  Raises:
    UserError: the checkpoint belongs to another model, or cannot be read.
  """
  return _restore(checkpoints, step, "model", dict(shapes), sharding)


def restore_optimizer(checkpoints: ocp.CheckpointManager, step: int, shapes, sharding):
  """Restores the optimizer's state at a step; `shapes` is a tree of shapes. See `restore_model`."""
  return _restore(checkpoints, step, "optimizer", shapes, sharding)


def restore_matching(
  checkpoints: ocp.CheckpointManager, shapes: Mapping, sharding
) -> dict[str, jax.Array]:
  """Restores those arrays of the newest checkpoint whose names and shapes the model has as well.

  Raises:
    UserError: there is no checkpoint, or it has nothing in common with the model.
  """
  step = choose_step(checkpoints)
  saved = _saved_shapes(checkpoints, step, "model")
  common = {n: s for n, s in shapes.items() if saved.get(n) == tuple(s.shape)}
  if not common:
    raise UserError(
      f"step {step} in {checkpoints.directory} has no array with a name and shape of the model"
    )
  return _read(checkpoints, step, "model", common, sharding, partial=True)


def choose_step(checkpoints: ocp.CheckpointManager, step: int | None = None) -> int:
  """Returns `step`, or the newest step if it is None.

  Raises:
    UserError: there is no checkpoint, or none of this step.
  """
  steps = checkpoints.all_steps()
  if not steps:
    raise UserError(f"{checkpoints.directory} has no checkpoint; train first (--mode=train)")
  if step is not None and step not in steps:
    raise UserError(f"{checkpoints.directory} has no step {step}; its steps are {sorted(steps)}")
  return max(steps) if step is None else step


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
    raise UserError(
      f"{where} cannot be read ({one_line(error, 300)}); choose another step"
    ) from error
  if saved is None:
    raise UserError(f"{where} has no {item}; evaluate it, or start from it with --config.init_from")
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
      f"{_where(checkpoints, step)} cannot be read ({one_line(error, 300)}); delete its folder to "
      "continue from an earlier one"
    ) from error


def _named(tree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _path_name(path) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _check_shapes(saved: Mapping, wanted: Mapping, where: str) -> None:
  problems = [f"{n} is missing" for n in wanted if n not in saved]
  problems += [f"{n} is not in the model" for n in saved if n not in wanted]
  problems += [
    f"{n} is {saved[n]} instead of {wanted[n]}"
    for n in wanted
    if n in saved and saved[n] != wanted[n]
  ]
  if problems:
    shown = problems[:SHOWN_DIFFERENCES]
    more = f" and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    raise UserError(f"{where} belongs to another model: {'; '.join(shown)}{more}")


def _check_space(checkpoints: ocp.CheckpointManager, size: int) -> None:
  """Raises UserError if a local disk is too full: a write that fails midway is reported less clearly."""
  directory = str(checkpoints.directory)
  if "://" in directory:
    return
  free = shutil.disk_usage(directory).free
  if free < size:
    complete = sorted(checkpoints.all_steps())
    raise UserError(
      f"{directory}: a checkpoint needs {size / 1e6:.0f} MB, but {free / 1e6:.0f} MB are free; the "
      f"complete checkpoints are {complete}; free some space and run the same command again"
    )


@contextlib.contextmanager
def _reported(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    checkpoints.reload()
    complete = sorted(checkpoints.all_steps())
    kept = f"the complete ones are {complete}" if complete else "none is complete yet"
    raise UserError(
      f"a checkpoint could not be written to {checkpoints.directory} ({one_line(error, 300)}); {kept}; "
      "free some space and run the same command again"
    ) from error
