"""Overlays and legends have the colours of the classes."""

import numpy as np
import pytest

from fpt_jax.tasks.segmentation import draw

PALETTE = ((0, 0, 0), (200, 0, 0), (0, 100, 250))


@pytest.mark.parametrize(
  ("label", "expected"),
  [
    (0, (35, 18, 4)),  # 0.35 of the image
    (1, (165, 18, 4)),  # and 0.65 of the palette
    (2, (35, 82, 166)),
    (255, (53, 53, 53)),  # void: the mean of 100, 50, 10
    (-1, (53, 53, 53)),
    (3, (53, 53, 53)),
  ],
)
def test_colors_are_mixed_with_the_image(label, expected):
  image_HWC = np.full((1, 1, 3), (100, 50, 10), np.uint8)
  drawn_HWC = draw.draw_label_map(image_HWC, np.array([[label]]), PALETTE)
  assert drawn_HWC.dtype == np.uint8
  np.testing.assert_allclose(drawn_HWC[0, 0], expected, atol=1)


def test_borders_are_drawn_between_classes():
  image_HWC = np.zeros((4, 6, 3), np.uint8)
  label_HW = np.zeros((4, 6), np.uint8)
  label_HW[2:, 3:] = 1
  drawn_HWC = draw.draw_label_map(image_HWC, label_HW, PALETTE)
  white_HW = (drawn_HWC == 255).all(-1)
  expected = np.zeros((4, 6), bool)
  expected[2:, 2] = expected[1, 3:] = True
  np.testing.assert_array_equal(white_HW, expected)


def test_sizes_must_agree():
  with pytest.raises(ValueError, match=r"got uint8 \(4, 6, 3\) and \(6, 4\)"):
    draw.draw_label_map(np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4)), PALETTE)


def test_legends_show_each_class_once():
  names = ("sky", "traffic light", "car")
  legend = draw.draw_legend(np.array([1, 2, 255]), names, PALETTE, 400)
  assert legend.dtype == np.uint8 and legend.shape[1:] == (400, 3)
  assert (legend == (200, 0, 0)).all(-1).sum() > 200 and (legend == (0, 100, 250)).all(
    -1
  ).sum() > 200
  one_row = legend.shape[0]
  narrow = draw.draw_legend([1, 2], names, PALETTE, 100)
  assert narrow.shape[1] == 100 and one_row < narrow.shape[0] < 2 * one_row + 1
  empty = draw.draw_legend([255], names, PALETTE, 100)
  assert (empty == 255).all()
