"""Colours of categories and contact sheets."""

import numpy as np
import pytest

from fpt_jax.tasks import pictures


def test_colors_of_categories_are_distinct():
  common = ["person", "chair", "car", "dining table", "cup", "bottle", "dog", "cat", "book"]
  colors = np.array([pictures.category_color(name) for name in common], float)
  distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
  assert distances[~np.eye(len(common), dtype=bool)].min() > 25
  # instances of a category differ, by less than half the range
  first, second = (np.array(pictures.category_color("person", i), float) for i in (0, 1))
  assert 15 < np.linalg.norm(first - second) < 130


def test_contact_sheet_keeps_aspect_ratios():
  red, green, blue = (np.zeros((h, w, 3), np.uint8) for h, w in [(50, 100), (300, 100), (7, 9)])
  red[..., 0], green[..., 1], blue[..., 2] = 255, 255, 255
  sheet = pictures.contact_sheet([red, green, blue], 2, ["a", "b" * 300, "c"], cell_width=120)
  assert sheet.dtype == np.uint8 and 240 < sheet.shape[1] < 280
  shapes = []
  for channel in range(3):
    pure = np.zeros(3, np.uint8)
    pure[channel] = 255
    rows, cols = np.nonzero((sheet == pure).all(axis=-1))
    shapes.append((np.ptp(rows) + 1, np.ptp(cols) + 1))
    assert len(rows) == np.prod(shapes[-1])
  assert shapes == [(60, 120), (160, 53), (93, 120)]
  assert pictures.contact_sheet([red], 5, cell_width=120).shape[1] < 140
  with pytest.raises(ValueError, match="0"):
    pictures.contact_sheet([], 2)
  with pytest.raises(ValueError, match="1 for 2"):
    pictures.contact_sheet([red, red], 2, ["one"])
