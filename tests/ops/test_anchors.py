"""Anchors against torchvision's and by hand."""

import numpy as np
import pytest

from fpt_jax.ops import anchors
from tests.conftest import GOLDEN


def test_equal_to_torchvision():
  golden = np.load(GOLDEN / "maskrcnn_resnet50_fpn.npz")
  rows = (56, 28, 14, 7, 4)
  levels = anchors.anchors(
    [(size, size) for size in rows],
    [224 // size for size in rows],
    [(32,), (64,), (128,), (256,), (512,)],
    (0.5, 1.0, 2.0),
  )
  assert [len(level) for level in levels] == [size * size * 3 for size in rows]
  np.testing.assert_array_equal(np.concatenate(levels), golden["anchors_xyxy"])


def test_order_and_rounding_by_hand():
  (level,) = anchors.anchors([(1, 2)], [(4, 8)], [(8, 16)], (1.0, 0.5))
  base = np.array([[-4, -4, 4, 4], [-8, -8, 8, 8], [-6, -3, 6, 3], [-11, -6, 11, 6]])
  np.testing.assert_array_equal(level, np.concatenate([base, base + [8, 0, 8, 0]]))
  assert level.dtype == np.float32


def test_levels_must_agree():
  with pytest.raises(ValueError, match="1, 2 and 1"):
    anchors.anchors([(1, 1)], [4, 8], [(32,)], (1.0,))
