"""Overlays and legends show the classes' own colours where the classes are."""

import numpy as np
import pytest

from fpt_jax.tasks.segmentation import draw

PALETTE = ((0, 0, 0), (200, 0, 0), (0, 100, 250))


def test_colors_are_mixed_as_the_opacity_says():
  image_HWC = np.full((2, 3, 3), (100, 50, 10), np.uint8)
  label_HW = np.array([[0, 1, 2], [255, -1, 3]])
  drawn_HWC = draw.draw_label_map(image_HWC, label_HW, PALETTE, opacity=0.5, border=False)
  assert drawn_HWC.dtype == np.uint8
  assert drawn_HWC[0].tolist() == [[50, 25, 5], [150, 25, 5], [50, 75, 130]]
  assert (drawn_HWC[1] == 53).all()  # void: the mean of 100, 50, 10


def test_opacity_is_from_the_image_to_the_palette(rng):
  image_HWC = rng.integers(0, 256, (5, 7, 3), np.uint8)
  label_HW = rng.integers(0, 3, (5, 7))
  plain = draw.draw_label_map(image_HWC, label_HW, PALETTE, opacity=0, border=False)
  np.testing.assert_array_equal(plain, image_HWC)
  full = draw.draw_label_map(image_HWC, label_HW, PALETTE, opacity=1, border=False)
  np.testing.assert_array_equal(full, np.array(PALETTE)[label_HW])


def test_borders_lie_where_classes_meet():
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
