"""The training loop."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fpt_jax import data, models, optim
from fpt_jax.errors import ResultsNotWrittenError, RunAgainError, UserError
from fpt_jax.evaluation import evaluator, prepare
from fpt_jax.initial_weights import starting_arrays
from fpt_jax.run import checkpoints, hosts, loggers, sharding
from fpt_jax.run.best import Best, best_of_run
from fpt_jax.run.config_file import (
  Changes,
  changes,
  check_resumable,
  check_same_model,
  has_config,
  read_config,
  record_changes,
  write_config,
)
from fpt_jax.run.eval_sets import configs_of_sets, folder_of_set, in_set
from fpt_jax.run.folder import check_writable, run_folder
from fpt_jax.run.lock import TakenOverError, locked_by_first_host
from fpt_jax.run.metrics import MetricsWriter, has_metrics
from fpt_jax.run.profile import Steps, Trace
from fpt_jax.run.progress import Clock
from fpt_jax.run.stop import Stopped, StopSignal
from fpt_jax.tasks.task import check_config, check_types, task_of
from fpt_jax.train_step import arrays_to_use, make_train_step, state_shapes, training_state


def train(
  config: ConfigDict,
  workdir: str,
  *,
  allow_config_changes: bool = False,
  take_over: bool = False,
  profile_steps: Steps | None = None,
) -> dict[str, float]:
  """Trains from the newest checkpoint of `workdir`, or from the start, to the config's last step.

  Args:
    config: a complete config, see `fpt_jax.configs`.
    workdir: folder of the run, on a disk or in a bucket.
    allow_config_changes: whether a run is resumed even if its config has changed in a way that changes the
      training; see `run.config_file.FREE_TO_CHANGE` for what may change in any case.
    take_over: whether to take the folder over from a process that is training in it.
    profile_steps: steps to trace into the folder `profile` of the run, see `run.profile`.

  Returns:
    The metrics of the last evaluation.

  Raises:
    UserError: a mistake that the user can fix; nothing that was saved is lost.
    RunAgainError: a signal has stopped the run; the same call goes on with it.
  """
  check_config(config)
  with locked_by_first_host(workdir, take_over=take_over) as check_lock:
    return _train(config, workdir, check_lock, allow_config_changes, profile_steps)


def _train(
  config: ConfigDict,
  workdir: str,
  check_lock: Callable[[], None],
  allow_config_changes: bool,
  profile_steps: Steps | None,
) -> dict[str, float]:
  # Data. Records are prepared by the first run.
  task = task_of(config)
  check_writable(run_folder(workdir) / "eval")
  hosts.on_first_host(lambda: loggers.check_installed(config.loggers))
  prepare(config, data.prepare_for_all_hosts)
  before = adopt_classes(config, workdir)
  data.check_trainable(config.data)
  config.data.digest = data.digest(config.data)
  if not hosts.is_same_everywhere(config.data.digest):
    raise UserError(
      f"data.data_dir={config.data.data_dir}: the hosts have records of different files; delete them on all "
      "hosts and prepare the same data"
    )

  # Model and optimizer: a skeleton, and dictionaries of arrays.
  mesh = sharding.mesh(config.mesh.shape, batch_sizes=(config.batch_size, config.eval.batch_size))
  parts = config.optim.accumulate_steps
  check_parts(config, mesh)
  replicated = sharding.replicated(mesh)
  structure = models.structure_of(config)
  evaluate = evaluator(config, structure, mesh, workdir)
  trained = optim.trainable(config, structure.parameters())
  optimizer = optim.optimizer(config)
  total_steps = optim.total_steps(config)
  key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated)()

  # Initial state: the run's newest checkpoint, or other weights, or random ones.
  best = Best(config.checkpoint.best_metric, config.checkpoint.best_mode)
  saved = checkpoints.manager(
    workdir, keep=config.checkpoint.keep, best=lambda steps: best.step(steps)
  )
  averaged = optim.averaged(config, structure, trained)
  shapes = sharding.laid_out(state_shapes(structure, trained, optimizer, averaged), mesh)
  shapes_of_model = {**shapes["trained"], **shapes["rest"]}
  placement = sharding.shardings(shapes)
  logging.info("%s", sharding.describe(mesh, shapes, config.batch_size))
  if saved.all_steps():
    start = checkpoints.choose_step(saved)
    changed = accepted_changes(before, config, workdir, start=start, allow=allow_config_changes)
    arrays = checkpoints.restore_model(saved, start, shapes_of_model)
    average = {n: arrays[n] for n in averaged}
    arrays |= checkpoints.restore_trained(saved, start, {n: shapes_of_model[n] for n in averaged})
    optimizer_state = checkpoints.restore_optimizer(saved, start, shapes["optimizer"])
    logging.info("resuming at step %d of %s", start, saved.directory)
    hosts.on_first_host(lambda: record_changes(workdir, changed, start))
  else:
    start = 0
    arrays = starting_arrays(config, shapes_of_model)
    average = {n: jnp.copy(arrays[n]) for n in averaged}
    optimizer_state = jax.jit(optimizer.init, out_shardings=placement["optimizer"])(
      {n: arrays[n] for n in trained}
    )
  best = best_of_run(workdir, config, last_step=start)
  hosts.on_first_host(lambda: write_config(workdir, config))
  state = training_state(arrays, trained, optimizer_state, average)
  train_step = jax.jit(
    make_train_step(structure, optimizer, total_steps, parts, config.optim.ema_decay),
    donate_argnums=0,
    out_shardings=(placement, replicated, replicated),
  )
  metrics = hosts.on_first_host(
    lambda: MetricsWriter(workdir, start, loggers.open_loggers(config, workdir))
  )
  rate = optim.schedule(config)
  clock = Clock(start, total_steps, config.batch_size)
  stop = StopSignal()
  trace = Trace(workdir, profile_steps, start)
  sets = tuple(configs_of_sets(config))
  pending: list[tuple[int, dict[str, jax.Array]]] = []
  last_saved = start
  save_timer = checkpoints.Timer(config.checkpoint.every_minutes)

  def save(step: int) -> None:
    nonlocal last_saved
    check_lock()
    finite_losses(pending)
    arrays = {**state["trained"], **state["rest"]}
    being_trained = {n: arrays[n] for n in averaged}
    checkpoints.save(saved, step, arrays_to_use(state), state["optimizer"], being_trained)
    last_saved = step
    save_timer.restart()

  @contextlib.contextmanager
  def keeping(step: int, *, on_every_host: bool) -> Iterator[None]:
    """Saves the steps that are done if an error ends the run; a host cannot do that alone."""
    try:
      yield
    except (TakenOverError, ResultsNotWrittenError):
      raise
    except UserError:
      if step > last_saved and (on_every_host or jax.process_count() == 1):
        save(step)
      raise

  def write_metrics(
    step: int, entries: Mapping[str, float], *, with_pictures: bool = False
  ) -> None:
    def write() -> None:
      if metrics:
        metrics.write(step, entries)
        if with_pictures:
          for name in sets:
            metrics.write_pictures(step, folder_of_set(workdir, name))

    with keeping(step, on_every_host=True):
      hosts.on_first_host(write)

  def run_evaluation(step: int) -> dict[str, float] | None:
    """Returns the scores; None if a signal ends the evaluation. A resumed run begins with it then."""
    arrays = arrays_to_use(state)
    written = True
    try:
      with (
        clock.paused(),
        stop.during_evaluation(check_lock),
        keeping(step, on_every_host=False),
      ):
        results = evaluate(arrays)
    except ResultsNotWrittenError as error:
      logging.error("%s", error)
      results, written = error.metrics, False
    except Stopped:
      return None
    check_lock()
    write_metrics(step, results, with_pictures=written)
    best.add(step, results)
    return results

  def logged(step: int) -> bool:
    return step % config.log_every == 0 or step == total_steps

  def evaluation_due(step: int) -> bool:
    return step % config.eval.every_steps == 0 or step == total_steps

  def is_past_best() -> bool:
    """Whether the training ends before its last step."""
    if not 0 < config.eval.patience <= best.evaluations_since():
      return False
    logging.info(
      "%s has not improved in %d evaluations since step %d: the training ends",
      *(config.checkpoint.best_metric, best.evaluations_since(), best.step()),
    )
    return True

  # The loop. Losses are fetched only when they are logged, so that the devices never wait.
  results: dict[str, float] | None = {}
  stopping, done = False, start
  with (
    metrics or contextlib.nullcontext(),
    checkpoints.closing(saved),
    task.train_batches(config, start) as batches,
    stop,
    trace,
  ):
    # one line has the metrics of all sets, so that it is missing if an evaluation was stopped between two
    scored = has_metrics(workdir, start, [in_set(name, task.MAIN_METRIC) for name in sets])
    if start and evaluation_due(start) and not scored:
      results = run_evaluation(start)
      stopping = results is None
    for done in () if stopping or is_past_best() else range(start + 1, total_steps + 1):
      with clock.waiting(), keeping(done - 1, on_every_host=False):
        host_batch = next(batches)
      trace.begin(done, state)
      for part in range(parts):
        host_part = {k: np.split(host_batch[k], parts)[part] for k in task.BATCH_KEYS}
        batch = sharding.to_devices(host_part, mesh)
        measure = logged(done) and part == parts - 1
        numbers = {"step": np.int32((done - 1) * parts + part), "measure": np.bool_(measure)}
        numbers = sharding.replicate(numbers, mesh)
        with (
          jax.transfer_guard("disallow"),
          jax.profiler.StepTraceAnnotation("train_step", step_num=done),
        ):
          state, losses, figures = train_step(
            state, batch, numbers["step"], key, numbers["measure"]
          )
        pending.append((done, losses))
      trace.end(done, state)
      if done == start + 1:
        jax.block_until_ready(losses)
        logging.info("first step, compilation included: %.0f s", clock.restart(done))

      stopping = stop.agreed()
      last = done == total_steps or stopping
      log_due = logged(done) or stopping
      # before an evaluation: it may end later than a preemption allows
      checkpoint_due = (
        done % config.checkpoint.every_steps == 0
        or last
        or evaluation_due(done)
        or (log_due and save_timer.is_due())
      )
      if log_due or checkpoint_due:
        losses = finite_losses(pending)
        pending.clear()
        check_lock()
      if log_due:
        speeds = clock.speeds(done)
        lr = float(rate(done - 1))
        measured = {}
        if logged(done):
          measured = jax.device_get(figures)
        write_metrics(done, losses | {"lr": lr} | speeds | measured)
        if metrics:
          logging.info("%s", clock.line(done, losses, speeds))
      if checkpoint_due:
        save(done)
      if stopping:
        break
      if evaluation_due(done):
        results = run_evaluation(done)
        if results is None:
          stopping = True
          break
        if is_past_best():
          break
  if stopping:
    logging.info("saved and closed %.1f s after the signal", stop.seconds)
    raise RunAgainError(
      f"stopped by a signal; step {done} is saved, and the same command resumes from it"
    )
  return results or {}


def check_parts(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Checks that the devices can share the images of each of the `config.optim.accumulate_steps` parts.

  Raises:
    UserError: they cannot.
  """
  if config.batch_size % (config.optim.accumulate_steps * sharding.image_groups(mesh)):
    raise UserError(
      f"config.batch_size={config.batch_size} cannot be computed in config.optim.accumulate_steps="
      f"{config.optim.accumulate_steps} equal parts on {mesh.size} device(s); choose a multiple of both"
    )


def accepted_changes(
  before: ConfigDict | None, config: ConfigDict, workdir: str, *, start: int, allow: bool
) -> Changes:
  """Returns what has changed since a run was last started.

  Args:
    before: config of the run; None if its config.json is gone.
    config: the config to resume with.
    workdir: folder of the run, for messages.
    start: step to resume from.
    allow: whether to accept changes of the training.

  Raises:
    UserError: see `check_resumable`.
  """
  if before is None:
    logging.warning(
      "%s has checkpoints without config.json: what has changed since they were saved is not known",
      workdir,
    )
    return {}
  changed = changes(before, config)
  known = bool(before.data.digest)
  if not known:
    changed.pop("data.digest", None)  # an earlier version did not note it
  check_resumable(
    changed,
    old_steps=optim.total_steps(before),
    new_steps=optim.total_steps(config),
    start=start,
    same_files=known and "data.digest" not in changed,
    workdir=workdir,
    allow=allow,
  )
  return changed


def adopt_classes(config: ConfigDict, workdir: str) -> ConfigDict | None:
  """Takes the classes that a config does not name from its data set.

  The classes of a run that is in `workdir` already keep their names; those of the data set are matched with
  them.

  Returns:
    The config of the run that is in `workdir` already; None for a new run.

  Raises:
    UserError: the data set does not fit the config, or the run in `workdir` has another model or other
      classes.
  """
  task = task_of(config)
  dataset = data.info(config.data)
  unnamed = [field for field in task.FROM_DATA if not config.model[field]]
  task.adopt_classes(config, dataset)
  if not has_config(workdir):
    return None
  before = read_config(workdir)
  check_types(before)
  check_same_model(before, config, workdir, task.NOT_OF_THE_WEIGHTS)
  config.model.update({field: before.model[field] for field in unnamed if before.model[field]})
  task.adopt_classes(config, dataset)
  return before


def finite_losses(pending: list[tuple[int, dict[str, jax.Array]]]) -> dict[str, float]:
  """Fetches the losses of pending steps and returns those of the newest; {} if no step is pending.

  If the batch of a step was computed in parts, its losses are the means over them.

  Raises:
    UserError: a loss is not finite.
  """
  fetched = jax.device_get(pending)
  for done, losses in fetched:
    if not np.isfinite(losses["total_loss"]):
      bad = ", ".join(name for name, value in losses.items() if not np.isfinite(value))
      raise UserError(
        f"step {done}: {bad} is not finite; lower config.optim.learning_rate or set "
        "config.optim.clip_norm, and run the command again; checkpoints before this step are intact"
      )
  newest = [losses for done, losses in fetched if done == fetched[-1][0]]
  return {name: float(np.mean([losses[name] for losses in newest])) for name in (newest or [{}])[0]}
