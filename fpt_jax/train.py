"""The training loop, read from top to bottom."""

import signal
from collections.abc import Callable

import jax
import numpy as np
import optax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from fpt_jax import data, models, optim
from fpt_jax.errors import UserError
from fpt_jax.models.state import Skeleton, arrays_of, initial_arrays
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.metrics import Clock, MetricsWriter, read_metrics
from fpt_jax.tasks import task_of
from fpt_jax.weights.families import preprocessing


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
  """Trains from the newest checkpoint of `workdir`, or from the start, to the config's last step.

  Args:
    config: see `configs/common.py`.
    workdir: the run's folder, on a disk or in a bucket.

  Returns:
    The metrics of the last evaluation.

  Raises:
    UserError: something the user can mend; nothing saved before is lost.
  """
  # Data. Records are prepared at the first run.
  task = task_of(config)
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  task.settle(config, data.info(config.data))
  first_host = jax.process_index() == 0

  # Model and optimizer, as dictionaries of arrays over a skeleton.
  mesh = sharding.mesh(config.batch_size)
  everywhere = sharding.replicated(mesh)
  structure = models.structure_of(config)
  if first_host:
    checkpoints.write_config(workdir, config)
  trained = optim.trainable(config, structure.parameters())
  optimizer = optim.optimizer(config)
  total_steps = optim.total_steps(config)
  step_key = jax.random.key(config.seed)

  # Where to start: the run's own newest checkpoint, or other weights, or none.
  saved = checkpoints.manager(workdir, keep=config.checkpoint.keep)
  shapes = structure.shapes
  if saved.all_steps():
    start = checkpoints.choose_step(saved)
    arrays = checkpoints.restore_model(saved, start, shapes, everywhere)
    state_shapes = jax.eval_shape(optimizer.init, {n: shapes[n] for n in trained})
    optimizer_state = checkpoints.restore_optimizer(saved, start, state_shapes, everywhere)
    logging.info("resuming at step %d of %s", start, saved.directory)
  else:
    start = 0
    arrays = starting_arrays(config, structure, everywhere)
    optimizer_state = jax.jit(optimizer.init, out_shardings=everywhere)(
      {n: arrays[n] for n in trained}
    )
  state = {
    "trained": {n: arrays[n] for n in trained},
    "rest": {n: a for n, a in arrays.items() if n not in trained},
    "optimizer": optimizer_state,
  }
  train_step = jax.jit(
    make_train_step(structure, optimizer, step_key), donate_argnums=0, out_shardings=everywhere
  )
  metrics = MetricsWriter(workdir, start) if first_host else None
  rate = optim.schedule(config)

  def save(step: int) -> None:
    checkpoints.save(saved, step, {**state["trained"], **state["rest"]}, state["optimizer"])

  def run_evaluation(step: int) -> dict[str, float]:
    arrays = {**state["trained"], **state["rest"]}
    results = task.evaluate(config, structure, arrays, mesh, workdir)
    if metrics:
      metrics.write(step, results)
    return results

  def evaluation_due(step: int) -> bool:
    return step % config.eval.every_steps == 0 or step == total_steps

  # The loop. Losses are fetched only when they are told, so that the devices never wait.
  results, pending, stopping = {}, [], False
  clock = Clock(start, total_steps, config.batch_size)
  stop = StopSignal()
  if start and evaluation_due(start) and not was_evaluated(workdir, start, task.MAIN_METRIC):
    results = run_evaluation(start)
  with checkpoints.closing(saved), task.train_batches(config, start) as batches, stop:
    for done in range(start + 1, total_steps + 1):
      with clock.waiting():
        host_batch = next(batches)
      batch = sharding.to_devices({k: host_batch[k] for k in task.BATCH_KEYS}, mesh)
      step = jax.device_put(np.int32(done - 1), everywhere)
      with jax.transfer_guard("disallow"):
        state, losses = train_step(state, batch, step)
      pending.append((done, losses))
      if done == start + 1:
        jax.block_until_ready(losses)
        logging.info("first step, compilation included: %.0f s", clock.restart(done))

      stopping = stop.asked  # looked at once: a signal may come at any moment
      last = done == total_steps or stopping
      checkpoint_due = done % config.checkpoint.every_steps == 0 or last
      log_due = done % config.log_every == 0 or last
      if log_due or checkpoint_due:
        losses = finite_losses(pending)
        pending = []
      if log_due and metrics:
        figures = clock.figures(done)
        metrics.write(done, losses | {"lr": float(rate(done - 1))} | figures)
        logging.info("%s", clock.line(done, losses, figures))
      if checkpoint_due:
        save(done)
      if stopping:
        break
      if evaluation_due(done):
        with clock.paused():
          results = run_evaluation(done)
  if metrics:
    metrics.close()
  if stopping:
    raise UserError(f"stopped by a signal; step {done} is saved, the same command goes on from it")
  return results


def make_train_step(
  structure: Skeleton, optimizer: optax.GradientTransformation, key: jax.Array
) -> Callable:
  """The pure function (state, batch, step) -> (state, losses) of one step of training.

  Randomness is a function of the seed and the step alone, so that a resumed run equals an
  uninterrupted one. Nothing outside `state["trained"]` is differentiated.
  """

  def train_step(state, batch, step):
    def total_loss(trained):
      model = structure.fill({**trained, **state["rest"]})
      losses = model.losses(batch, jax.random.fold_in(key, step))
      updated = arrays_of(model)
      total = sum(losses.values())
      return total, ({"total_loss": total} | losses, {n: updated[n] for n in state["rest"]})

    gradients, (losses, rest) = jax.grad(total_loss, has_aux=True)(state["trained"])
    updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["trained"])
    trained = optax.apply_updates(state["trained"], updates)
    return {"trained": trained, "rest": rest, "optimizer": optimizer_state}, losses

  return train_step


def starting_arrays(config: ConfigDict, structure: Skeleton, placement) -> dict[str, jax.Array]:
  """Initial weights, those of `config.init_from` in their place where it holds any.

  Raises:
    UserError: `config.init_from` holds nothing that fits, or weights for images prepared otherwise.
  """
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(config.seed)))
  arrays = jax.device_put(arrays, placement)
  if not config.init_from:
    if config.model.backbone.frozen:
      logging.warning("the backbone is frozen at random weights: --config.init_from names better")
    return arrays
  check_preprocessing(config, checkpoints.read_config(config.init_from))
  other = checkpoints.manager(config.init_from)
  wanted = checkpoints.worth_starting_from(config.init_from, structure.shapes)
  loaded = checkpoints.restore_matching(other, wanted, placement)
  other.close()
  fresh = sorted(set(arrays) - set(loaded))
  if fresh:
    logging.info(
      "%d arrays are not in %s and start afresh, from %s", len(fresh), config.init_from, fresh[0]
    )
  if config.model.backbone.frozen and any(n.startswith("backbone.") for n in fresh):
    logging.warning(
      "the backbone is frozen, and a part of it is not in %s: --config.model.backbone.frozen=False "
      "trains it",
      config.init_from,
    )
  return arrays | loaded


def check_preprocessing(config: ConfigDict, other: ConfigDict) -> None:
  """Raises UserError where the weights of `config.init_from` want images prepared otherwise.

  Args:
    config: of the run.
    other: of the folder that `config.init_from` names.
  """
  theirs = preprocessing(other.model)
  for field, value in preprocessing(config.model).items():
    wanted = theirs.get(field, value)  # runs from before a field existed do not tell
    same = value == wanted if isinstance(value, str) else np.allclose(value, wanted, atol=1e-4)
    if not same:
      raise UserError(
        f"--config.init_from={config.init_from} has weights for model.{field}={wanted}, and this run "
        f"has {value}; set '--config.model.{field}={wanted}'"
      )


def finite_losses(pending: list[tuple[int, dict[str, jax.Array]]]) -> dict[str, float]:
  """The newest of the steps' losses.

  Raises:
    UserError: the loss of a step is not finite.
  """
  fetched = jax.device_get(pending)
  for done, losses in fetched:
    if not np.isfinite(losses["total_loss"]):
      bad = ", ".join(name for name, value in losses.items() if not np.isfinite(value))
      raise UserError(
        f"step {done}: {bad} is not finite; lower config.optim.learning_rate or set "
        "config.optim.clip_norm, and start again: checkpoints before this step are intact"
      )
  return {name: float(value) for name, value in fetched[-1][1].items()}


def was_evaluated(workdir: str, step: int, metric: str) -> bool:
  """Whether `metrics.jsonl` has this step's figure of a metric: a crash may have come between."""
  return any(e["step"] == step and metric in e for e in read_metrics(workdir))


class StopSignal:
  """Remembers SIGINT and SIGTERM, so that the loop ends after a step, with a checkpoint."""

  SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self):
    self.asked = False

  def __enter__(self):
    self._before = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _remember(self, number, frame):
    del frame
    logging.warning("signal %d: saving after this step; again to stop at once", number)
    self.asked = True
    signal.signal(number, self._before[number])
