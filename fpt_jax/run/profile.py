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
    self._folder = (
      run_folder(workdir) / FOLDER
    )  # XProf finds sessions in its folder plugins/profile
    self._steps, self._temporary = steps, None
    if steps and steps.first <= start:
      logging.warning(
        "--profile_steps=%d:%d: the run resumes at step %d, so nothing is traced", *steps, start
      )
      self._steps = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._temporary is not None:
      self._write()

  def begin(self, step: int, arrays: Any) -> None:
    """Called before a step with arrays that the steps before it compute."""
    if self._steps and step == self._steps.first:
      jax.block_until_ready(arrays)
      self._temporary = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._temporary.name)

  def end(self, step: int, arrays: Any) -> None:
    """Called after a step with arrays that it computes."""
    if self._temporary is not None and step == self._steps.last:
      jax.block_until_ready(arrays)
      self._write()

  def _write(self) -> None:
    # through a local folder, because the profiler cannot write to buckets
    source, self._temporary = self._temporary, None
    session = self._folder / "plugins" / "profile" / f"steps_{self._steps.first}_{self._steps.last}"
    with source:
      try:
        jax.profiler.stop_trace()
        make_folder(session)
        for file in pathlib.Path(source.name).glob("plugins/profile/*/*"):
          target = session / f"{jax.process_index()}_{file.name}"
          with writing(target):
            target.write_bytes(file.read_bytes())
      except (UserError, OSError, RuntimeError) as error:
        logging.error("the trace of --profile_steps could not be written: %s", one_line(error, 300))
        return
    logging.info(
      "steps %d to %d are traced in %s; show them with `pip install xprof` and `xprof --logdir=%s`, or open "
      "the *.trace.json.gz there at https://ui.perfetto.dev",
      *(*self._steps, self._folder, self._folder),
    )
