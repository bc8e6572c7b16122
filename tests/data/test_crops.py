"""Crops against float64 NumPy written from the definitions, pixel by pixel."""

import fractions
import math

import numpy as np
import pytest
import tensorflow as tf

from fpt_jax.data import crops, transforms

SIZES = [  # of the file, resized, offset, canvas
  ((7, 11), (7, 11), (0, 0), (7, 11)),
  ((7, 11), (14, 22), (3, 5), (8, 9)),
  ((13, 9), (5, 4), (0, 0), (8, 6)),
  ((10, 6), (17, 11), (9, 0), (8, 16)),
  ((1, 1), (3, 2), (0, 0), (4, 4)),
  ((97, 64), (131, 87), (60, 20), (33, 41)),
]


def _window(image_HW, size, offset, canvas, sample, outside):
  """Computes the window value by value; `sample` returns the value at a point of the source in pixels."""
  out = np.full(canvas, outside, np.float64)
  for i in range(canvas[0]):
    for j in range(canvas[1]):
      y, x = i + offset[0], j + offset[1]
      if y < size[0] and x < size[1]:
        point = [
          fractions.Fraction(2 * c + 1, 2) * old / new
          for c, old, new in zip((y, x), image_HW.shape, size, strict=True)
        ]
        out[i, j] = sample(image_HW, *point)
  return out


def _nearest(image_HW, y, x):
  return image_HW[math.floor(y), math.floor(x)]  # the pixel whose square contains the point


def _bilinear(image_HW, y, x):
  value = 0.0
  for dy in (0, 1):
    for dx in (0, 1):
      corner = [math.floor(c - fractions.Fraction(1, 2)) + d for c, d in ((y, dy), (x, dx))]
      weight = [
        1 - abs(c - fractions.Fraction(1, 2) - k) for c, k in zip((y, x), corner, strict=True)
      ]
      clamped = [min(max(k, 0), n - 1) for k, n in zip(corner, image_HW.shape, strict=True)]
      value += float(weight[0] * weight[1]) * float(image_HW[clamped[0], clamped[1]])
  return value


@pytest.mark.parametrize(("old", "size", "offset", "canvas"), SIZES)
def test_windows_equal_the_definitions(rng, old, size, offset, canvas):
  image_HWC = rng.integers(0, 256, (*old, 3), np.uint8)
  found = crops.cut_image(image_HWC, tf.constant(size), tf.constant(offset), tf.constant(canvas))
  assert found.dtype == tf.float32 and found.shape == (*canvas, 3)
  for c in range(3):
    expected = _window(image_HWC[..., c], size, offset, canvas, _bilinear, 0)
    np.testing.assert_allclose(found[..., c], expected, atol=0.02)  # of 255

  label_HW = rng.integers(0, 21, old, np.uint8)
  valid = tuple(min(s - o, c) for s, o, c in zip(size, offset, canvas, strict=True))
  label_hw = crops.cut_label(label_HW, crops.Crop(size, offset, valid, mirrored=False))
  padded_hw = crops.pad_label(tf.constant(label_hw), tf.constant(canvas))
  expected = _window(label_HW, size, offset, canvas, _nearest, 255)
  np.testing.assert_array_equal(padded_hw, expected)


@pytest.mark.parametrize(("old", "size", "offset", "canvas"), SIZES)
def test_a_window_is_a_part_of_the_whole(rng, old, size, offset, canvas):
  image_HWC = rng.uniform(0, 255, (*old, 3)).astype(np.float32)
  whole = tuple(o + c for o, c in zip(offset, canvas, strict=True))
  whole = tuple(max(w, s) for w, s in zip(whole, size, strict=True))
  expected = transforms.resize_and_pad(image_HWC, size, whole)[
    offset[0] : offset[0] + canvas[0], offset[1] : offset[1] + canvas[1]
  ]
  found = crops.cut_image(image_HWC, tf.constant(size), tf.constant(offset), tf.constant(canvas))
  np.testing.assert_allclose(found, expected, atol=0.02)


def test_image_and_label_share_one_geometry(rng):
  """Where the image is constant around a point, its value is that of the label."""
  blocks_HW = rng.integers(0, 4, (6, 5), np.uint8)
  label_HW = blocks_HW.repeat(16, 0).repeat(16, 1)
  for size, offset in (((67, 171), (11, 40)), ((190, 49), (70, 3)), ((96, 80), (5, 6))):
    crop = crops.Crop(size, offset, (32, 40), mirrored=False)
    label_hw = crops.cut_label(label_HW, crop)
    image_hwC = crops.cut_image(
      label_HW[..., None] * 60.0, tf.constant(size), tf.constant(offset), tf.constant((32, 40))
    )
    # a bilinear value is a mixture of neighbouring blocks, and the nearest has the largest share
    flat_hw = np.isin(np.round(image_hwC[..., 0], 1), [0, 60, 120, 180])
    same_hw = np.abs(image_hwC[..., 0] - 60.0 * label_hw) < 0.1
    assert flat_hw.mean() > 0.6 and same_hw[flat_hw].mean() > 0.99
    assert np.abs(image_hwC[..., 0] - 60.0 * label_hw).max() <= 0.75 * 180 + 1


def test_mirroring_comes_first(rng):
  label_HW = rng.integers(0, 9, (7, 11), np.uint8)
  crop = crops.Crop((13, 17), (2, 3), (8, 9), mirrored=True)
  plain = crops.Crop((13, 17), (2, 3), (8, 9), mirrored=False)
  expected = crops.cut_label(np.fliplr(label_HW), plain)
  np.testing.assert_array_equal(crops.cut_label(label_HW, crop), expected)


def test_draws_are_reproducible_and_uniform():
  size, canvas = (100, 200), (80, 120)
  arguments = {"scale": (0.5, 2.0), "flip": True}
  drawn = [crops.draw(3, i, size, canvas, **arguments) for i in range(2000)]
  assert drawn[7] == crops.draw(3, 7, size, canvas, **arguments) != drawn[8]
  assert drawn[7] != crops.draw(4, 7, size, canvas, **arguments)
  scales = np.array([crop.size[0] / 100 for crop in drawn])
  assert scales.min() >= 0.5 and scales.max() <= 2.0
  np.testing.assert_allclose(np.histogram(scales, 3, (0.5, 2.0))[0] / 2000, 1 / 3, atol=0.05)
  assert abs(np.mean([crop.mirrored for crop in drawn]) - 0.5) < 0.05
  for crop in drawn:
    for resized, offset, valid, room in zip(
      crop.size, crop.offset, crop.valid, canvas, strict=True
    ):
      assert 0 <= offset <= max(resized - room, 0) and valid == min(resized, room)
  shares = [crop.offset[0] / (crop.size[0] - 80) for crop in drawn if crop.size[0] > 120]
  assert min(shares) == 0 and max(shares) == 1 and abs(np.mean(shares) - 0.5) < 0.05
  assert not any(crops.draw(3, i, size, canvas, scale=(0.5, 2.0)).mirrored for i in range(50))


def test_shorter_edges_are_drawn_from_the_list():
  edges = (269, 369, 469, 569)
  sizes = [crops.draw(0, i, (683, 512), (569, 569), train_sizes=edges).size for i in range(400)]
  counts = np.unique([min(size) for size in sizes], return_counts=True)
  assert counts[0].tolist() == list(edges) and counts[1].min() > 60
  assert {size[0] for size in sizes} == {round(e * 683 / 512) for e in edges}


def test_sizes_are_rounded_and_at_least_one():
  assert crops.scaled_size((3, 5), 0.5) == (2, 3)
  assert crops.scaled_size((1, 100), 0.1) == (1, 10)
  assert crops.short_edge_size((1024, 2048), 513) == (513, 1026)
  assert crops.short_edge_size((500, 333), 320) == (480, 320)
