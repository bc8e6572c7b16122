"""A trace of some training steps, for XProf, TensorBoard and Perfetto."""

from __future__ import annotations

import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax
from absl import logging

from fpt_jax.errors import UserError, one_line
from fpt_jax.run.folder import make_folder, run_folder, writing

FOLDER = "profile"


class Steps(NamedTuple):
  """The first and the last of the steps to trace; steps are counted from 1."""

  first: int
  last: int


def parsed_steps(text: str, total_steps: int) -> Steps | None:
  """Parses the value of `--profile_steps`.

  Args:
    text: "FIRST:LAST", both included; "" for no trace.
    total_steps: number of training steps of the run.

  Raises:
    UserError: the text has another form, or names steps that the run does not have.
  """
  if not text:
    return None
  numbers = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
  if not numbers:
    raise UserError(f"--profile_steps={text} must be FIRST:LAST, such as 20:25")
  steps = Steps(*map(int, numbers.groups()))
  if not 1 <= steps.first <= steps.last <= total_steps:
    raise UserError(
      f"--profile_steps={text}: the first step must be 1 or more and at most the last, and the run has "
      f"{total_steps} steps"
    )
  return steps


class Trace:
  """Traces some steps of a training loop into the folder `profile` of the run. Use it as a context.

  Each host writes files of its own, with what its processor and its devices did. Those of all hosts are one
  session of XProf. If they cannot be written, this is logged, and the training goes on.

  Args:
    workdir: folder of the run.
    steps: the steps to trace; None for none.
    start: step that the run resumes from. Steps that are done already are not traced: a run can be resumed by
      the same command.
  """

  def __init__(self, workdir: str, steps: Steps | None, start: int):
    self._folder = run_folder(workdir) / FOLDER
    self._steps = steps
    self._running: tuple[Steps, tempfile.TemporaryDirectory] | None = None
    if steps and steps.first <= start:
      logging.warning(
        "--profile_steps=%d:%d: the run resumes at step %d, so nothing is traced", *steps, start
      )
      self._steps = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._write()

  def begin(self, step: int, arrays: Any) -> None:
    """Called before a step with arrays that the steps before it compute."""
    if self._steps and step == self._steps.first:
      jax.block_until_ready(arrays)
      self._running = self._steps, tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._running[1].name)

  def end(self, step: int, arrays: Any) -> None:
    """Called after a step with arrays that it computes."""
    if self._running is not None and step == self._running[0].last:
      jax.block_until_ready(arrays)
      self._write()

  def _write(self) -> None:
    """Ends the trace, if one is running, and writes it."""
    if self._running is None:
      return
    # Through a local folder, because the profiler cannot write to buckets. XProf looks for sessions in
    # plugins/profile.
    (steps, local), self._running = self._running, None
    session = self._folder / "plugins" / "profile" / f"steps_{steps.first}_{steps.last}"
    with local:
      try:
        jax.profiler.stop_trace()
        make_folder(session)
        for file in pathlib.Path(local.name).glob("plugins/profile/*/*"):
          target = session / f"{jax.process_index()}_{file.name}"
          with writing(target):
            target.write_bytes(file.read_bytes())
      except (UserError, OSError, RuntimeError) as error:
        logging.error("the trace of --profile_steps could not be written: %s", one_line(error, 300))
        return
    logging.info(
      "the trace of steps %d to %d is in %s; show it with `pip install xprof` and `xprof --logdir=%s`, or "
      "open its *.trace.json.gz at https://ui.perfetto.dev",
      *(*steps, self._folder, self._folder),
    )
