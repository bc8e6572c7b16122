"""A function of many regions, computed a few regions at a time, and only where there is one.

Shapes: B batch, R regions of an image, N blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def in_blocks(
  function: Callable, regions: dict[str, jax.Array], valid_BR: jax.Array, size: int
) -> jax.Array:
  """Applies `function` to blocks of regions, and skips blocks without a valid region.

  Most images have far fewer positives and detections than the arrays have room for, and masks are the
  most expensive part of a region. Blocks are skipped only if valid regions come first. The backward pass
  computes each block again and skips the same ones. JAX's own gradient of such a loop would keep the values
  of all blocks, with a copy of the weights for each, and would add zeros for those that are skipped.

  Args:
    function: function from a dict like `regions`, with R = `size`, to one array. The arrays that it
      closes over have gradients, the regions have none.
    regions: arrays [B, R, ...] by name.
    valid_BR: [B, R] bool.
    size: regions of an image in a block.

  Returns:
    [N, ...]: the result of each block; zeros for a block without a valid region.
  """
  blocks = -(-valid_BR.shape[1] // size)

  def split(x_BR):
    batch, count = x_BR.shape[:2]
    rest = [(0, 0)] * (x_BR.ndim - 2)
    padded = jnp.pad(x_BR, [(0, 0), (0, blocks * size - count), *rest])
    return jnp.moveaxis(padded.reshape(batch, blocks, size, *x_BR.shape[2:]), 1, 0)

  some_N = jnp.any(split(valid_BR), axis=(1, 2))
  blocks_N = jax.tree.map(lambda x_BR: split(lax.stop_gradient(x_BR)), regions)
  of_block, closed_over = jax.closure_convert(function, jax.tree.map(lambda x: x[0], blocks_N))
  return _map(of_block, some_N, blocks_N, closed_over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map(of_block, some_N, blocks_N, closed_over):
  """[N, ...]: `of_block` of each block and of arrays for all blocks; zeros where `some_N` is False."""
  result = jax.eval_shape(of_block, jax.tree.map(lambda x: x[0], blocks_N), *closed_over)

  def one(some_and_block):
    some, block = some_and_block
    return lax.cond(
      some,
      lambda block: of_block(block, *closed_over),
      lambda _: jnp.zeros(result.shape, result.dtype),
      block,
    )

  return lax.map(one, (some_N, blocks_N))


def _forward(of_block, some_N, blocks_N, closed_over):
  return _map(of_block, some_N, blocks_N, closed_over), (some_N, blocks_N, closed_over)


def _backward(of_block, saved, dy_N):
  some_N, blocks_N, closed_over = saved

  def add(gradients, block, dy):
    _, transpose = jax.vjp(lambda *arrays: of_block(block, *arrays), *closed_over)
    return jax.tree.map(jnp.add, gradients, list(transpose(dy)))

  def one(gradients, of_one):
    some, block, dy = of_one
    return lax.cond(some, add, lambda gradients, *_: gradients, gradients, block, dy), None

  zeros = jax.tree.map(jnp.zeros_like, closed_over)
  gradients, _ = lax.scan(one, zeros, (some_N, blocks_N, dy_N))
  return None, None, gradients


_map.defvjp(_forward, _backward)
