"""Anchors against torchvision's and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.ops import anchors
from tests.conftest import GOLDEN


def test_equal_to_torchvision():
  golden = np.load(GOLDEN / "maskrcnn_resnet50_fpn.npz")
  rows = (56, 28, 14, 7, 4)
  grids = anchors.anchor_grids(
    [(size, size) for size in rows],
    [224 // size for size in rows],
    [(32,), (64,), (128,), (256,), (512,)],
    (0.5, 1.0, 2.0),
  )
  levels = [grid.boxes() for grid in grids]
  assert [len(level) for level in levels] == [size * size * 3 for size in rows]
  np.testing.assert_array_equal(np.concatenate(levels), golden["anchors_xyxy"])


def test_order_and_rounding_by_hand():
  (grid,) = anchors.anchor_grids([(1, 2)], [(4, 8)], [(8, 16)], (1.0, 0.5))
  level = grid.boxes()
  base = np.array([[-4, -4, 4, 4], [-8, -8, 8, 8], [-6, -3, 6, 3], [-11, -6, 11, 6]])
  np.testing.assert_array_equal(level, np.concatenate([base, base + [8, 0, 8, 0]]))
  assert level.dtype == np.float32


@pytest.mark.parametrize("rounded", [True, False])
def test_one_by_one(rounded):
  for grid in anchors.anchor_grids(
    [(5, 7), (3, 4)], [(13, 9), 16], [(8, 11.5), (32,)], (0.5, 1.0, 2.0), rounded=rounded
  ):
    index = jnp.arange(grid.total)
    np.testing.assert_array_equal(jax.jit(grid.at)(index), grid.boxes())
    np.testing.assert_array_equal(grid.at(index[3:5][None]), grid.boxes()[3:5][None])


def test_levels_must_agree():
  with pytest.raises(ValueError, match="1, 2 and 1"):
    anchors.anchor_grids([(1, 1)], [4, 8], [(32,)], (1.0,))
