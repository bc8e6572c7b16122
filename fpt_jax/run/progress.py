"""How far the preparation of a data set is, told in the log."""

import time

from absl import logging

_EVERY_SECONDS = 10.0


class Progress:
  """Logs images done, images a second and the time left, every ten seconds and at the end."""

  def __init__(self, split: str, total: int):
    """Args: the split's name and its number of images."""
    self._split, self._total, self._done = split, total, 0
    self._start = self._told = time.monotonic()

  def step(self) -> None:
    """Counts one image."""
    self._done += 1
    now = time.monotonic()
    if now - self._told < _EVERY_SECONDS and self._done < self._total:
      return
    self._told = now
    rate = self._done / max(now - self._start, 1e-9)
    left = (self._total - self._done) / rate
    logging.info(
      "prepare %s: %d/%d images, %.0f/s, %d:%02d left",
      self._split,
      self._done,
      self._total,
      rate,
      left // 60,
      left % 60,
    )
