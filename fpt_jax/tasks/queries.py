"""Positions of an image whose attention is explained, see `fpt_jax.explain`.

Shapes: H W rows and columns of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict


class Query(NamedTuple):
  """A position of an image.

  Attributes:
    name: what is there, such as "dog 98%".
    x, y: pixels of the image.
    box: (x0, y0, x1, y1) of the object in pixels of the image, or None.
    level: index of the level of the pyramid that the object is pooled from; None for all levels.
  """

  name: str
  x: float
  y: float
  box: tuple[float, float, float, float] | None = None
  level: int | None = None


class Question(NamedTuple):
  """A position whose class can only be known from elsewhere in the image.

  Attributes:
    query: the position.
    answer_HW: bool, the pixels of the objects that tell the class.
  """

  query: Query
  answer_HW: np.ndarray


class Queries(Protocol):
  """The functions of a task whose models are explained."""

  def view(self, config: ConfigDict, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
    """Returns image_BHWC and size_B2 of an image, uint8 RGB, as the model sees it in its first view."""

  def queries(
    self,
    config: ConfigDict,
    image_HWC: np.ndarray,
    found: dict[str, Any],
    size: Sequence[int],
    min_score: float,
  ) -> list[Query]:
    """Chooses positions whose attention is explained.

    Args:
      config: the run's config.
      image_HWC: the image.
      found: what the predictor found in it.
      size: (height, width) of the image in its first view.
      min_score: lowest score of a detection that is chosen.
    """

  def questions(
    self, config: ConfigDict, image_HWC: np.ndarray, truth: Any, size: Sequence[int]
  ) -> list[Question]:
    """Returns the positions whose class the ground truth `truth` says to be known only from elsewhere."""

  def level_name(self, level: int) -> str:
    """Returns the name of a level of the pyramid that FPT transforms, by its index."""
