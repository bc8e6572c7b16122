"""The metrics of a run: `metrics.jsonl`, TensorBoard events, and other loggers."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Self

from etils import epath, epy

from fpt_jax.errors import UserError, one_line
from fpt_jax.run.folder import parse_json, run_folder, write_whole
from fpt_jax.run.loggers import Sender

with epy.lazy_imports():
  import tensorflow as tf

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
  """Writes `metrics.jsonl`, one object per line, and TensorBoard events of one run.

  Lines after the step that a run resumes from are removed, since these steps run again. As a context, it ends
  with `close`.

  Args:
    workdir: folder of the run.
    start_step: step that the run resumes from.
    loggers: other loggers, which get the same; they are closed as well.
  """

  def __init__(self, workdir: str, start_step: int, loggers: Sequence[Sender] = ()):
    self._path = run_folder(workdir) / METRICS_FILE
    entries = [entry for entry in read_metrics(workdir) if entry["step"] <= start_step]
    write_whole(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))
    self._events = tf.summary.create_file_writer(str(run_folder(workdir)))
    self._loggers = loggers

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
    self.close(failed=error_type is not None)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends the metrics of a step; values that JSON cannot represent are left out.

    Raises:
      UserError: they cannot be written.
    """
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    with self._reported(step):
      with tf.io.gfile.GFile(str(self._path), "a") as file:
        file.write(json.dumps({"step": step, **finite}) + "\n")
      with self._events.as_default():
        for name, value in finite.items():
          tf.summary.scalar(name, value, step=step)
      self._events.flush()
    for sender in self._loggers:
      sender.send(lambda logger: logger.log(step, finite))

  def write_pictures(self, step: int, folder: epath.Path) -> None:
    """Adds the PNG files of a folder in that of the run to TensorBoard and the loggers.

    The name of eval/errors.png is eval/errors.

    Raises:
      UserError: they cannot be read or written.
    """
    pictures = {}
    with self._reported(step):
      with self._events.as_default():
        for path in sorted(folder.glob("*.png")):
          name = str(path.relative_to(self._path.parent).with_suffix(""))
          pictures[name] = path.read_bytes()
          picture_HWC = tf.io.decode_png(pictures[name], channels=3)
          tf.summary.image(name, picture_HWC[None], step=step)
      self._events.flush()
    for sender in self._loggers:
      sender.send(lambda logger: logger.log_pictures(step, pictures))

  @contextlib.contextmanager
  def _reported(self, step: int) -> Iterator[None]:
    try:
      yield
    except (OSError, tf.errors.OpError) as error:
      raise UserError(
        f"{self._path}: step {step} cannot be written ({one_line(error, 200)}); free some space or check the "
        "disk, and run the same command again"
      ) from error

  def close(self, *, failed: bool = False) -> None:
    """Closes all files and loggers; `failed`: an error has ended the run."""
    self._events.close()
    for logger in self._loggers:
      logger.close(failed=failed)


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """Reads the lines of `metrics.jsonl`; a last line that a crash left incomplete is skipped.

  Raises:
    UserError: the file cannot be read, or another line is not an object of a step and its metrics.
  """
  path = run_folder(workdir) / METRICS_FILE
  if not path.exists():
    return []
  try:
    *lines, last = path.read_bytes().split(b"\n")
  except OSError as error:
    raise UserError(f"{path} cannot be read ({one_line(error.strerror or error, 200)})") from error
  entries = [_entry(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
  if last.strip():
    with contextlib.suppress(UserError):
      entries.append(_entry(last, ""))
  return entries


def _entry(line: bytes, where: str) -> dict[str, float]:
  """Parses a line."""
  try:
    entry = parse_json(line, where)
  except UserError as error:
    raise UserError(f"{where}: not valid JSON; delete the line") from error
  if not isinstance(entry, dict):
    raise UserError(f"{where}: not a JSON object; delete the line")
  for name, value in entry.items():
    # a bool is an int; float() of a large int raises an error
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or abs(value) > sys.float_info.max or value != value:
      raise UserError(f"{where}: {name[:80]!r} is not a finite number; correct or delete the line")
  if not isinstance(entry.get("step"), int):
    raise UserError(f"{where}: 'step' is not an integer; correct or delete the line")
  return entry


def losses_and_evaluations(workdir: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
  """Reads `metrics.jsonl`: the lines that training wrote, and those of evaluations."""
  entries = read_metrics(workdir)
  training = [entry for entry in entries if "total_loss" in entry]
  return training, [entry for entry in entries if "total_loss" not in entry]


def has_metrics(workdir: str, step: int, names: Collection[str]) -> bool:
  """Whether a line of `metrics.jsonl` has all of these metrics at a step."""
  wanted = set(names)
  return any(entry["step"] == step and wanted <= entry.keys() for entry in read_metrics(workdir))
