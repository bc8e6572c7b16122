"""Progress of long work: a bar on a terminal, lines in the log elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import rich.console
import rich.progress
from absl import logging

LOG_SECONDS = 15.0


class Progress:
  """Shows how many of a number of items are done, how fast, and the time left.

  On a terminal it is a progress bar; elsewhere a line is logged every `LOG_SECONDS` and at the end.
  Use it as a context.

  Args:
    title: name of the work, such as "prepare train".
    total: number of items.
    unit: name of the items, in the plural.
  """

  def __init__(self, title: str, total: int, unit: str = "images"):
    self._title, self._total, self._unit = title, total, unit
    self._done = 0
    self._start = self._logged = time.monotonic()
    self._bar: rich.progress.Progress | None = None
    if sys.stderr.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(unit),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
      )
      self._task = self._bar.add_task(title, total=total)

  def __enter__(self) -> "Progress":
    if self._bar:
      self._bar.start()
      # the bar has replaced sys.stderr: log lines must go above it
      self._log_stream = logging.get_absl_handler().python_handler.setStream(sys.stderr)
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar:
      if self._log_stream:
        logging.get_absl_handler().python_handler.setStream(self._log_stream)
      self._bar.stop()

  def advance(self, count: int = 1) -> None:
    """Counts items that are done."""
    self._done += count
    if self._bar:
      self._bar.update(self._task, completed=self._done)
      return
    now = time.monotonic()
    if now - self._logged < LOG_SECONDS and self._done != self._total:
      return
    self._logged = now
    rate = self._done / max(now - self._start, 1e-9)
    left = round(max(self._total - self._done, 0) / max(rate, 1e-9))
    logging.info(
      "%s: %d of %d %s, %.3g per second, %s left",
      *(self._title, self._done, self._total, self._unit, rate, duration(left)),
    )


class Clock:
  """Measures images per second, the share of time spent waiting for data, and the time left.

  Speeds are averages since the last call of `speeds` or `restart`; the time inside `paused` is left out.
  """

  def __init__(self, start_step: int, total_steps: int, batch_size: int):
    self._total_steps, self._batch_size = total_steps, batch_size
    self._since = (start_step, time.perf_counter())
    self._waited = self._paused = 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Context for waiting for the next batch."""
    begun = time.perf_counter()
    yield
    self._waited += time.perf_counter() - begun

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Context for work that is not training."""
    begun = time.perf_counter()
    yield
    self._paused += time.perf_counter() - begun

  def restart(self, step: int) -> float:
    """Discards the time until now, which was spent on compilation; returns it in seconds."""
    seconds = time.perf_counter() - self._since[1] - self._paused
    self._since, self._waited, self._paused = (step, time.perf_counter()), 0.0, 0.0
    return seconds

  def speeds(self, step: int) -> dict[str, float]:
    """Returns the metrics of speed; {} if no step was completed since the last call.

    They are "images_per_second", "data_wait", the share of the time, and "eta_seconds".
    """
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

  def line(self, step: int, losses: Mapping[str, float], speeds: Mapping[str, float]) -> str:
    """Returns a line for the log."""
    parts = [
      f"step {step}/{self._total_steps}",
      " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items()),
    ]
    if speeds:
      parts += [
        f"{speeds['images_per_second']:.3g} images/s",
        f"data wait {speeds['data_wait']:.0%}",
        f"{duration(round(speeds['eta_seconds']))} left",
      ]
    return " | ".join(parts)


def duration(seconds: int) -> str:
  """Formats a number of seconds as hours, minutes and seconds, "1:02:03"."""
  return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
