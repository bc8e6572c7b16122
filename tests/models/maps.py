"""Feature maps for tests."""

import jax.numpy as jnp
import numpy as np

from fpt_jax.models.feature_map import FeatureMap


def padded_map(
  rng: np.random.Generator, shape: tuple[int, int, int], stride: int = 1
) -> FeatureMap:
  """Returns random values of a whole image and of one with two rows and a column of padding.

  Args:
    rng: source of the values.
    shape: (rows, columns, channels).
    stride: stride of the map.
  """
  rows, columns, _ = shape
  valid = jnp.zeros((2, rows, columns), bool)
  valid = valid.at[0].set(True).at[1, : rows - 2, : columns - 1].set(True)
  return FeatureMap(jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32), valid, stride)
