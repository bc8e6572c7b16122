"""The metrics of a run on disk: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import math
from collections.abc import Mapping

import tensorflow as tf

from fpt_jax.run.folder import run_folder, write_whole

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
  """Writes `metrics.jsonl`, one object per line, and TensorBoard events of one run.

  Lines after the step that a run resumes from are removed, since these steps run again.
  """

  def __init__(self, workdir: str, start_step: int):
    self._path = run_folder(workdir) / METRICS_FILE
    entries = [entry for entry in read_metrics(workdir) if entry["step"] <= start_step]
    write_whole(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))
    self._events = tf.summary.create_file_writer(str(run_folder(workdir)))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends the metrics of a step; values that JSON cannot represent are left out."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    with tf.io.gfile.GFile(str(self._path), "a") as file:
      file.write(json.dumps({"step": step, **finite}) + "\n")
    with self._events.as_default():
      for name, value in finite.items():
        tf.summary.scalar(name, value, step=step)
    self._events.flush()

  def close(self) -> None:
    self._events.close()


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """Reads the lines of `metrics.jsonl`; a last line that a crash left incomplete is skipped."""
  path = run_folder(workdir) / METRICS_FILE
  if not path.exists():
    return []
  entries = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      entries.append(json.loads(line))
  return entries


def losses_and_evaluations(workdir: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
  """Reads `metrics.jsonl`: the lines that training wrote, and those of evaluations."""
  entries = read_metrics(workdir)
  training = [entry for entry in entries if "total_loss" in entry]
  return training, [entry for entry in entries if "total_loss" not in entry]


def has_metric(workdir: str, step: int, name: str) -> bool:
  """Whether `metrics.jsonl` has a metric at a step."""
  return any(entry["step"] == step and name in entry for entry in read_metrics(workdir))
