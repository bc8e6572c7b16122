"""Orbax checkpoints: written in the background, resumed exactly, restored on any devices.

A checkpoint has the items `model`, with every array of the model by name; `optimizer`, which is needed to
resume training; if those of the model are moving averages, `trained`, the arrays that are averaged, as they
are trained; and `checksums` of all arrays, which are compared whenever arrays are restored. `config.json`
in the run's folder describes the model.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epy

from fpt_jax.errors import UserError, first_of, one_line
from fpt_jax.run import hosts
from fpt_jax.run.checksums import checksums
from fpt_jax.run.folder import is_remote, run_folder

with epy.lazy_imports():
  import orbax.checkpoint as ocp

SHOWN_DIFFERENCES = 4


class Timer:
  """Says when a checkpoint is due by the time since the last one.

  Args:
    minutes: time between two checkpoints; 0 for none.
  """

  def __init__(self, minutes: float):
    self._seconds = 60 * minutes
    self.restart()

  def restart(self) -> None:
    """Starts again, at a checkpoint."""
    self._since = time.monotonic()

  def is_due(self) -> bool:
    """Returns whether the time has passed on the first host; all hosts must call it equally often."""
    if not self._seconds:
      return False
    return hosts.is_true_on_first_host(time.monotonic() - self._since >= self._seconds)


class NewestAndBest:
  """Says which checkpoints stay on disk, as a policy of Orbax.

  Args:
    keep: number of newest checkpoints to keep.
    best: function from the steps that have a checkpoint to one to keep as well, or None. The steps' scores
      come from evaluations, after the checkpoints are saved.
  """

  def __init__(self, keep: int, best: Callable[[Collection[int]], int | None]):
    self._keep, self._best = keep, best

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns whether each checkpoint, in the order of the steps, stays on disk."""
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self._keep :], self._best(steps)}
    return [step in kept for step in steps]


def manager(
  workdir: str,
  keep: int | None = None,
  *,
  best: Callable[[Collection[int]], int | None] = lambda steps: None,
  create: bool = True,
) -> ocp.CheckpointManager:
  """Opens the checkpoints of a run.

  Args:
    workdir: folder of the run.
    keep: number of newest checkpoints to keep on disk; None for all.
    best: see `NewestAndBest`.
    create: whether to make their folder if it does not exist.
  """
  policy = None if keep is None else NewestAndBest(keep, best)
  options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=create)
  return ocp.CheckpointManager(
    run_folder(workdir) / "checkpoints",
    options=options,
    item_handlers={
      "model": ocp.PyTreeCheckpointHandler(),
      "optimizer": ocp.PyTreeCheckpointHandler(),
      "trained": ocp.PyTreeCheckpointHandler(),
      "checksums": ocp.JsonCheckpointHandler(),
    },
  )


def save(
  checkpoints: ocp.CheckpointManager,
  step: int,
  model: Mapping,
  optimizer=None,
  trained: Mapping | None = None,
) -> None:
  """Starts to write a checkpoint in the background; a failure is reported by the next call or `finish`.

  Args:
    checkpoints: checkpoints of the run.
    step: number of training steps done.
    model: arrays of the model by name.
    optimizer: state of the optimizer; None for weights that training does not resume from.
    trained: the arrays of which the model has moving averages, as they are trained; None or {} for none.

  Raises:
    UserError: a checkpoint cannot be written. Complete checkpoints are not touched.
  """
  trees = {"model": dict(model), "optimizer": optimizer, "trained": dict(trained or {}) or None}
  items = {item: ocp.args.PyTreeSave(tree) for item, tree in trees.items() if tree is not None}
  sums = {item: checksums(_leaves(tree)) for item, tree in trees.items()}
  items["checksums"] = ocp.args.JsonSave(sums)
  finish(checkpoints)
  with _reported(checkpoints):
    _check_space(checkpoints, sum(a.nbytes for a in jax.tree.leaves(trees)))
    checkpoints.save(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def closing(checkpoints: ocp.CheckpointManager) -> Iterator[ocp.CheckpointManager]:
  """Context that waits at its end until all saved checkpoints are on disk, and closes them."""
  try:
    yield checkpoints
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
  checkpoints: ocp.CheckpointManager, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Restores the model's arrays at a step, whatever devices they were saved from.

  Args:
    checkpoints: checkpoints of the run.
    step: one of their steps.
    shapes: shape, dtype and sharding of the model's arrays by name, see `sharding.laid_out`.

  Raises:
    UserError: the checkpoint belongs to another model, or cannot be read.
  """
  return _restore(checkpoints, step, "model", dict(shapes))


def restore_optimizer(checkpoints: ocp.CheckpointManager, step: int, shapes):
  """Restores the optimizer's state at a step; `shapes` is a tree of shapes. See `restore_model`."""
  return _restore(checkpoints, step, "optimizer", shapes)


def restore_trained(
  checkpoints: ocp.CheckpointManager, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Restores the arrays of which the model has moving averages, as they are trained.

  Args:
    checkpoints: checkpoints of the run.
    step: one of their steps.
    shapes: shape, dtype and sharding of these arrays by name; {} if the run makes no averages.

  Raises:
    UserError: the checkpoint has such arrays and the run does not, or the reverse; see also `restore_model`.
  """
  if shapes:
    return _restore(checkpoints, step, "trained", dict(shapes))
  if (checkpoints.directory / str(step) / "trained").exists():
    raise UserError(
      f"{_where(checkpoints, step)} has moving averages; resume with the run's config.optim.ema_decay, or "
      "start from it in another --workdir with --config.init_from"
    )
  return {}


def restore_matching(
  checkpoints: ocp.CheckpointManager, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Restores those arrays of a step whose names and shapes the model has as well.

  Raises:
    UserError: the step has nothing in common with the model.
  """
  saved = _saved_shapes(checkpoints, step, "model")
  common = {n: s for n, s in shapes.items() if saved.get(n) == tuple(s.shape)}
  if not common:
    raise UserError(
      f"step {step} in {checkpoints.directory} has no array with a name and shape of the model"
    )
  return _read(checkpoints, step, "model", common, partial=True)


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


def _restore(checkpoints, step, item, shapes):
  saved = _saved_shapes(checkpoints, step, item)
  wanted = {name: tuple(leaf.shape) for name, leaf in _leaves(shapes).items()}
  _check_shapes(saved, wanted, _where(checkpoints, step))
  return _read(checkpoints, step, item, shapes, partial=False)


def _where(checkpoints, step) -> str:
  return f"step {step} in {checkpoints.directory}"


def _saved_shapes(checkpoints, step, item) -> dict[str, tuple[int, ...]]:
  if not (checkpoints.directory / str(step) / item).exists():
    raise UserError(
      f"{_where(checkpoints, step)} has no {item}; evaluate it, or start from it with "
      "--config.init_from"
    )
  try:
    saved = checkpoints.item_metadata(step)[item]
  except Exception as error:  # whatever Orbax makes of damaged files
    raise _damaged(checkpoints, step, one_line(error, 300)) from error
  if saved is None:
    raise _damaged(checkpoints, step, f"{item}/_METADATA is missing")
  return {name: tuple(leaf.shape) for name, leaf in _leaves(saved.tree).items()}


def _read(checkpoints, step, item, target, partial):
  args = {
    item: ocp.args.PyTreeRestore(
      target,
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
      partial_restore=partial,
    )
  }
  if (checkpoints.directory / str(step) / "checksums").exists():
    args["checksums"] = ocp.args.JsonRestore()
  try:
    restored = checkpoints.restore(step, args=ocp.args.Composite(**args))
    sums = dict(restored["checksums"][item]) if "checksums" in args else None
  except Exception as error:  # whatever Orbax and TensorStore make of damaged files
    raise _damaged(checkpoints, step, one_line(error, 300)) from error
  if sums is None:
    logging.warning("%s has no checksums: damage would go unnoticed", _where(checkpoints, step))
    return restored[item]
  found = checksums(_leaves(restored[item]))
  changed = [name for name, value in found.items() if sums.get(name) != value]
  if changed:
    more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
    raise _damaged(
      checkpoints, step, f"{item}: {changed[0]}{more} have other values than were saved"
    )
  return restored[item]


def _damaged(checkpoints, step, what: str) -> UserError:
  """Returns the error for a checkpoint that cannot be read; it names the others."""
  others = sorted(s for s in checkpoints.all_steps() if s != step)
  advice = (
    f"move its folder away to use an earlier one; there are {others}"
    if others
    else "there is no other checkpoint; restore this one from a backup, or train in a new --workdir"
  )
  return UserError(f"{_where(checkpoints, step)} is damaged ({what}); {advice}")


def _leaves(tree) -> dict[str, Any]:
  return {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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
    shown = first_of(problems, SHOWN_DIFFERENCES, "; ")
    raise UserError(f"{where} belongs to another model: {shown}")


def _check_space(checkpoints: ocp.CheckpointManager, size: int) -> None:
  """Raises UserError if a local disk is too full: a write that fails midway is reported less clearly."""
  directory = checkpoints.directory
  if is_remote(directory):
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
    with contextlib.suppress(Exception):  # the folder may be gone
      checkpoints.reload()
    complete = sorted(checkpoints.all_steps())
    kept = f"the complete ones are {complete}" if complete else "none is complete yet"
    text = one_line(error, 300)
    raise UserError(
      f"a checkpoint could not be written to {checkpoints.directory} ({text}); {kept}; "
      f"{_advice(text)} and run the same command again"
    ) from error


def _advice(error: str) -> str:
  """What to do about an error while writing, by its text: TensorStore's errors have no number."""
  causes = {
    "make the folder writable": ("permission denied", "read-only file system", "not permitted"),
    "restore the folder": ("no such file", "not a directory", "not_found"),
    "free some space": ("no space left", "file too large", "quota"),
  }
  for advice, parts in causes.items():
    if any(part in error.lower() for part in parts):
      return advice
  return "check the disk"
