"""Canny's edges against integers in NumPy, pixel by pixel, from OpenCV's definition."""

import jax
import numpy as np
import pytest

from fpt_jax.models.feature_map import valid_positions
from fpt_jax.ops.canny import canny

CANVAS = (13, 17)
RUN = jax.jit(canny)


def reference(image_HWC, low, high):
  """Sobel with repeated borders, suppression along four directions, and hysteresis with a stack."""
  h, w, colours = image_HWC.shape
  padded = np.pad(image_HWC.astype(int), ((1, 1), (1, 1), (0, 0)), mode="edge")
  x, y = np.zeros((h, w), int), np.zeros((h, w), int)
  for r, c in np.ndindex(h, w):
    best = -1
    for k in range(colours):
      seen = padded[r : r + 3, c : c + 3, k]
      dx = (seen[:, 2] - seen[:, 0]) @ [1, 2, 1]
      dy = (seen[2] - seen[0]) @ [1, 2, 1]
      if abs(dx) + abs(dy) > best:
        best, x[r, c], y[r, c] = abs(dx) + abs(dy), dx, dy
  magnitude = np.pad(np.abs(x) + np.abs(y), 1)
  thin = np.zeros((h, w), bool)
  for r, c in np.ndindex(h, w):
    m = magnitude[r + 1, c + 1]
    angle = np.degrees(np.arctan2(abs(y[r, c]), abs(x[r, c])))
    if angle < 22.5:
      peak = m > magnitude[r + 1, c] and m >= magnitude[r + 1, c + 2]
    elif angle > 67.5:
      peak = m > magnitude[r, c + 1] and m >= magnitude[r + 2, c + 1]
    else:
      side = 1 if x[r, c] * y[r, c] > 0 else -1
      peak = m > magnitude[r, c + 1 - side] and m > magnitude[r + 2, c + 1 + side]
    thin[r, c] = peak and m > low
  edges = thin & (magnitude[1:-1, 1:-1] > high)
  stack = list(zip(*np.nonzero(edges), strict=True))
  while stack:
    r, c = stack.pop()
    for i in range(max(r - 1, 0), min(r + 2, h)):
      for j in range(max(c - 1, 0), min(c + 2, w)):
        if thin[i, j] and not edges[i, j]:
          edges[i, j] = True
          stack.append((i, j))
  return edges


def images(rng, kind):
  """Noise, areas of one colour, or slopes; at low contrast, so that both thresholds matter."""
  for size in ((13, 17), (9, 11), (1, 5)):
    if kind == "noise":
      yield rng.integers(0, 60, (*size, 3))
      continue
    coarse = rng.integers(0, 80, (5, 6, 3)).astype(float)
    rows, columns = (np.linspace(0, n - 1.01, m) for n, m in zip((5, 6), size, strict=True))
    if kind == "areas":
      yield coarse[rows.astype(int)][:, columns.astype(int)].astype(int)
      continue
    tents = (
      np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n))) for at, n in ((rows, 5), (columns, 6))
    )
    yield np.round(np.einsum("Hh,hwc,Ww->HWc", next(tents), coarse, next(tents))).astype(int)


@pytest.mark.parametrize("kind", ["noise", "areas", "slopes"])
def test_it_equals_its_definition_and_padding_changes_nothing(kind, rng):
  found_edges = 0
  for _ in range(3):
    pictures = list(images(rng, kind))
    canvas = rng.integers(0, 256, (len(pictures), *CANVAS, 3)).astype(np.float32)
    sizes = np.array([p.shape[:2] for p in pictures], np.int32)
    for picture, on_canvas in zip(pictures, canvas, strict=True):
      on_canvas[: picture.shape[0], : picture.shape[1]] = picture
    valid = valid_positions(sizes, *CANVAS)
    found = np.asarray(RUN(canvas, valid))
    assert not found[~np.asarray(valid)].any()
    for picture, edges in zip(pictures, found, strict=True):
      h, w, _ = picture.shape
      np.testing.assert_array_equal(edges[:h, :w], reference(picture, 10, 100))
      found_edges += edges.sum()
  assert found_edges > 50


def test_a_weak_edge_continues_a_strong_one():
  """Steps of 30 and 8 have magnitudes of 120 and 32; the step of 8 in another place has no strong one."""
  image = np.zeros((1, *CANVAS, 3), np.float32)
  image[0, :6, 8:] = 30
  image[0, 6:, 8:] = 8
  edges = RUN(image, np.ones((1, *CANVAS), bool))[0]
  assert np.asarray(edges)[[0, 3, 9, 12], 7].all()
  image[0, :6, 8:] = 8
  assert not RUN(image, np.ones((1, *CANVAS), bool)).any()
