"""The end of a residual block, in a form that XLA does not compute twice on CPUs."""

import jax
import jax.numpy as jnp
from flax import nnx

from fpt_jax.ops import target


def relu_of_sum(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns relu(x + y) of two arrays of one shape and floating dtype.

  XLA for CPUs computes the maximum of a sum and 0 again wherever it is read, so that the sums of all blocks
  of a stage become one expression whose inputs all stay in memory. It stores a sum that comes last:
  max(x, -y) + y is the same number. (For an infinite y it is not a number.)
  """
  return _sum_last(x, y) if target.platform() == "cpu" else nnx.relu(x + y)


@jax.custom_jvp
def _sum_last(x, y):
  return jnp.maximum(x, -y) + y


@_sum_last.defjvp
def _tangent(primals, tangents):
  result = _sum_last(*primals)
  return result, jnp.where(result > 0, tangents[0] + tangents[1], 0)
