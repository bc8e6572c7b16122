"""What a run tells while it goes on: metrics on disk, a line with speed and time left in the log."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping

import tensorflow as tf
from absl import logging

from fpt_jax.run.checkpoints import folder


class MetricsWriter:
  """`metrics.jsonl`, one object a line, and TensorBoard events, of one run.

  Lines beyond the step a run resumes from belong to work that is done again: they are taken out.
  """

  def __init__(self, workdir: str, start_step: int):
    self._path = folder(workdir) / "metrics.jsonl"
    self._path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) for entry in read_metrics(workdir) if entry["step"] <= start_step]
    temporary = self._path.parent / "metrics.jsonl.tmp"
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.replace(self._path)
    self._events = tf.summary.create_file_writer(str(folder(workdir)))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends what is known at a step; numbers that JSON cannot hold are left out."""
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
  """The lines of `metrics.jsonl`; a last line that a crash cut short is passed over."""
  path = folder(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  entries = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      entries.append(json.loads(line))
  return entries


class Clock:
  """Images a second, the share of time spent waiting for data, and the time left.

  Speeds are of the time since the last call of `figures` or `restart`; what happens inside `paused`
  does not count.
  """

  def __init__(self, start_step: int, total_steps: int, batch_size: int):
    self._total_steps, self._batch_size = total_steps, batch_size
    self._since = (start_step, time.perf_counter())
    self._waited = self._paused = 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around the wait for the next batch."""
    begun = time.perf_counter()
    yield
    self._waited += time.perf_counter() - begun

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around what is not training."""
    begun = time.perf_counter()
    yield
    self._paused += time.perf_counter() - begun

  def restart(self, step: int) -> float:
    """Forgets the time until now, which was spent on compiling; returns it in seconds."""
    seconds = time.perf_counter() - self._since[1]
    self._since, self._waited, self._paused = (step, time.perf_counter()), 0.0, 0.0
    return seconds

  def figures(self, step: int) -> dict[str, float]:
    """`images_per_second`, `data_wait` (share of the time), `eta_seconds`; {} before a whole step."""
    last_step, last_time = self._since
    if step == last_step:
      return {}
    now = time.perf_counter()
    seconds = max(now - last_time - self._paused, 1e-9)
    per_step = seconds / (step - last_step)
    waited = self._waited / seconds
    self._since, self._waited, self._paused = (step, now), 0.0, 0.0
    return {
      "images_per_second": self._batch_size / per_step,
      "data_wait": waited,
      "eta_seconds": per_step * (self._total_steps - step),
    }

  def line(self, step: int, losses: Mapping[str, float], figures: Mapping[str, float]) -> str:
    """One line for the log."""
    parts = [
      f"step {step}/{self._total_steps}",
      " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items()),
    ]
    if figures:
      left = round(figures["eta_seconds"])
      parts += [
        f"{figures['images_per_second']:.3g} images/s",
        f"data wait {figures['data_wait']:.0%}",
        f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
      ]
    return " | ".join(parts)


class Countdown:
  """Tells in the log how many of a number of images are done, and the time left."""

  def __init__(self, what: str, total: int, every_seconds: float):
    """Args: what is being looked at, how many images it has, and how often to tell."""
    self._what, self._total, self._every_seconds = what, total, every_seconds
    self._begun = self._told = time.monotonic()

  def tell(self, done: int) -> None:
    """Logs a line, unless one was logged just now; done: images, > 0."""
    now = time.monotonic()
    if now - self._told > self._every_seconds:
      self._told = now
      left = round((now - self._begun) / done * (self._total - done))
      logging.info(
        "%s: %d of %d images, %d:%02d left", self._what, done, self._total, *divmod(left, 60)
      )
