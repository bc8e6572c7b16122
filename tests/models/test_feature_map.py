"""Strides and valid positions of maps, odd sizes included."""

import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.models.feature_map import as_pyramid, downsample_valid, stride_between, valid_positions


@pytest.mark.parametrize(
  ("fine", "coarse", "stride"),
  [
    ((8, 8), (8, 8), 1),
    ((8, 8), (4, 4), 2),
    ((9, 7), (5, 4), 2),
    ((9, 7), (3, 2), 4),  # 3 would fit the rows alone
    ((25, 17), (12, 8), 2),  # rounded down
    ((12, 9), (4, 3), 3),
    ((64, 33), (8, 5), 8),
  ],
)
def test_stride_between(fine, coarse, stride):
  assert stride_between(fine, coarse) == stride


@pytest.mark.parametrize(
  ("fine", "coarse"), [((10, 10), (7, 7)), ((8, 8), (4, 3)), ((4, 4), (8, 8))]
)
def test_sizes_of_different_pyramids_are_refused(fine, coarse):
  with pytest.raises(ValueError, match="not levels of one pyramid"):
    stride_between(fine, coarse)


def test_valid_positions_and_their_subsample():
  valid = valid_positions(jnp.array([[3, 5], [4, 1]], jnp.int32), 4, 6)
  np.testing.assert_array_equal(valid.sum((1, 2)), [15, 4])
  assert valid[0, 2, 4] and not valid[0, 3, 0] and not valid[0, 0, 5]
  # a convolution of stride 2 is centred on positions 0, 2, 4: half of 5 columns, rounded up, are valid
  np.testing.assert_array_equal(downsample_valid(valid, 2).sum((1, 2)), [2 * 3, 2 * 1])


def test_as_pyramid_of_plain_arrays():
  levels = as_pyramid([jnp.zeros((1, 9, 7, 2)), jnp.zeros((1, 5, 4, 3)), jnp.zeros((1, 3, 2, 4))])
  assert [level.stride for level in levels] == [1, 2, 4]
  assert all(level.valid_BHW.all() for level in levels)
  assert as_pyramid(levels) == levels
  with pytest.raises(ValueError, match=r"feature map 1 must be .* got \(5, 4\)"):
    as_pyramid([jnp.zeros((1, 9, 7, 2)), jnp.zeros((5, 4))])
  with pytest.raises(ValueError, match="at least one"):
    as_pyramid([])
