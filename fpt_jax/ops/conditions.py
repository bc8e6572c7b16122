"""A computation that runs only under a condition."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def compute_if(condition: bool | jax.Array, compute: Callable[[], T]) -> T:
  """Returns `compute()` if the condition holds, and zeros of the same shapes and dtypes otherwise.

  Args:
    condition: bool scalar.
    compute: function that returns arrays in any tree.
  """

  def zeros():
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(compute))

  return jax.lax.cond(condition, compute, zeros)
