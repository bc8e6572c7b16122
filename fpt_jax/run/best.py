"""The best step of a run by one metric of its evaluations."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Literal

from absl import logging
from ml_collections import ConfigDict

from fpt_jax.errors import UserError
from fpt_jax.run import hosts
from fpt_jax.run.metrics import losses_and_evaluations


class Best:
  """The scores of a run's evaluations by one metric. Of equal scores, the first is the best.

  Args:
    metric: name of the metric; "" for none: then no step is the best.
    mode: "max" if a higher value is better, "min" if a lower one is.
  """

  def __init__(self, metric: str, mode: str):
    self._metric = metric
    self._sign = 1 if mode == "max" else -1
    self._scores: dict[int, float] = {}

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of an evaluation.

    Raises:
      UserError: the metric is not among them, or not finite.
    """
    if not self._metric:
      return
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if self._metric not in finite:
      names = ", ".join(name for name in finite if name != "step")
      raise UserError(
        f"config.checkpoint.best_metric={self._metric!r} is not among the metrics of the evaluation at step "
        f"{step}; choose one of {names}"
      )
    self._scores[step] = self._sign * metrics[self._metric]

  def step(self, among: Collection[int] | None = None) -> int | None:
    """Returns the best step, of those in `among` if it is given; None if none has a score."""
    scores = {s: v for s, v in self._scores.items() if among is None or s in among}
    return max(scores, key=lambda step: (scores[step], -step), default=None)

  def evaluations_since(self) -> int:
    """Returns the number of evaluations after the best one."""
    best = self.step()
    return 0 if best is None else sum(step > best for step in self._scores)


def parsed_step(text: str) -> int | Literal["best"] | None:
  """Returns the step that --step names; None for the newest.

  Raises:
    UserError: it is neither a number of steps nor "best".
  """
  if text == "best":
    return "best"
  if text and not re.fullmatch(r"[0-9]{1,18}", text):
    raise UserError(f"--step={text} must be a number of training steps, or best")
  return int(text) if text else None


def best_of_run(workdir: str, config: ConfigDict, last_step: int | None = None) -> Best:
  """Reads the evaluations in `metrics.jsonl`, on the first host; the result is the same on every host.

  Evaluations without the metric, such as those of an earlier version, are left out unless all lack it.

  Args:
    workdir: folder of the run.
    config: config with the metric, `checkpoint.best_metric`.
    last_step: evaluations after this step are left out; None for all evaluations.

  Raises:
    UserError: there are evaluations, and none has the metric; or the file cannot be read.
  """
  best = Best(config.checkpoint.best_metric, config.checkpoint.best_mode)
  if config.checkpoint.best_metric:
    entries = hosts.from_first_host(lambda: losses_and_evaluations(workdir)[1])
    entries = [entry for entry in entries if last_step is None or entry["step"] <= last_step]
    for entry in [e for e in entries if config.checkpoint.best_metric in e] or entries:
      best.add(entry["step"], entry)
  return best


def best_step(
  workdir: str, config: ConfigDict, steps: Collection[int], flag: str = "--step"
) -> int:
  """Returns the best of the steps that have a checkpoint, and logs it.

  Args:
    workdir: folder of the run.
    config: see `best_of_run`.
    steps: steps of the checkpoints.
    flag: name of the flag that asks for the step, for messages.

  Raises:
    UserError: the config names no metric, or none of these steps has been evaluated in the training.
  """
  if not config.checkpoint.best_metric:
    or_else = ", or set the field together with --config" if flag == "--step" else ""
    raise UserError(
      f"{workdir}: the run has no config.checkpoint.best_metric to choose the best step by; give {flag} as a "
      f"number{or_else}"
    )
  step = best_of_run(workdir, config).step(steps)
  if step is None:
    raise UserError(
      f"{workdir}: no checkpoint has been evaluated in the training; give {flag} as a number, one of "
      f"{sorted(steps)}"
    )
  logging.info("%s: the best step by %s is %d", workdir, config.checkpoint.best_metric, step)
  return step
