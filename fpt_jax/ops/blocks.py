"""A function of many regions, computed a few regions at a time, and only where there is one.

Most images have far fewer positives and detections than the arrays have room for, and masks are the most
expensive part of a region. Blocks are skipped only if valid regions come first.

Shapes: B batch, R regions of an image, N blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fpt_jax.ops.conditions import compute_if

Regions = dict[str, jax.Array]


def map_blocks(
  function: Callable[[Regions], jax.Array], regions: Regions, valid_BR: jax.Array, size: int
) -> jax.Array:
  """Applies `function` to blocks of regions, and skips blocks without a valid region.

  Args:
    function: function from a dict like `regions`, with R = `size`, to one array.
    regions: arrays [B, R, ...] by name.
    valid_BR: [B, R] bool.
    size: regions of an image in a block.

  Returns:
    [N, ...]: the result of each block; zeros for a block without a valid region.
  """
  some_N, blocks_N = _split(regions, valid_BR, size)

  def one(some_and_block):
    some, block = some_and_block
    return compute_if(some, lambda: function(block))

  return lax.map(one, (some_N, blocks_N))


def sum_over_blocks(
  function: Callable[[Regions], jax.Array], regions: Regions, valid_BR: jax.Array, size: int
) -> jax.Array:
  """Sums `function` over blocks of regions, and skips blocks without a valid region.

  Where a gradient is asked for, the forward pass computes that of each block at once, so that neither the
  values inside a block are kept nor is a block computed again.

  Args:
    function: function from a dict like `regions`, with R = `size`, to a scalar. The arrays that it
      closes over have gradients, the regions have none.
    regions: arrays [B, R, ...] by name.
    valid_BR: [B, R] bool.
    size: regions of an image in a block.

  Returns:
    A scalar.
  """
  some_N, blocks_N = _split(jax.tree.map(lax.stop_gradient, regions), valid_BR, size)
  of_block, closed_over = jax.closure_convert(function, _first(blocks_N))
  return _sum(of_block, some_N, blocks_N, closed_over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(of_block, some_N, blocks_N, closed_over):
  """The sum of `of_block` of each block where `some_N` and of arrays for all blocks."""
  return _accumulate(lambda block: of_block(block, *closed_over), some_N, blocks_N)


def _forward(of_block, some_N, blocks_N, closed_over):
  def value_and_gradients(block):
    return jax.value_and_grad(lambda arrays: of_block(block, *arrays))(closed_over)

  return _accumulate(value_and_gradients, some_N, blocks_N)


def _backward(of_block, gradients, dy):
  scaled = jax.tree.map(lambda gradient: (dy * gradient).astype(gradient.dtype), gradients)
  return None, None, scaled


_sum.defvjp(_forward, _backward)


def _accumulate(function: Callable, some_N: jax.Array, blocks_N: Regions):
  """The sum of the arrays that `function` returns for each block where `some_N`."""

  def add(total, block):
    return jax.tree.map(jnp.add, total, function(block))

  def one(total, some_and_block):
    some, block = some_and_block
    return lax.cond(some, add, lambda total, _: total, total, block), None

  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, _first(blocks_N)))
  return lax.scan(one, zeros, (some_N, blocks_N))[0]


def _split(regions: Regions, valid_BR: jax.Array, size: int) -> tuple[jax.Array, Regions]:
  """Returns whether each block has a valid region, [N] bool, and the blocks: arrays [N, B, size, ...]."""
  blocks = -(-valid_BR.shape[1] // size)

  def split(x_BR):
    batch, count = x_BR.shape[:2]
    rest = [(0, 0)] * (x_BR.ndim - 2)
    padded = jnp.pad(x_BR, [(0, 0), (0, blocks * size - count), *rest])
    return jnp.moveaxis(padded.reshape(batch, blocks, size, *x_BR.shape[2:]), 1, 0)

  return jnp.any(split(valid_BR), axis=(1, 2)), jax.tree.map(split, regions)


def _first(blocks_N: Regions) -> Regions:
  return jax.tree.map(lambda x_N: x_N[0], blocks_N)
