"""Means over a grid of bins, and their interpolation. Bins divide each image, without its padding.

Shapes: B batch, H W rows and columns of a map, n bins per side, C channels. Images lie in the upper left
corner of their maps, so both functions multiply by a matrix for the rows and one for the columns.
"""

import jax
import jax.numpy as jnp


@jax.named_scope("bins")
def bin_means(x_BHWC: jax.Array, valid_BHW: jax.Array, bins: int) -> jax.Array:
  """Computes means over n x n bins (adaptive average pooling).

  Bin i of an image of h rows holds rows floor(i h / n) up to, not including, ceil((i + 1) h / n), so
  neighbours overlap where n does not divide h.

  Args:
    x_BHWC: [B, H, W, C] float.
    valid_BHW: [B, H, W] bool, a rectangle in the upper left corner.
    bins: n, bins per side.

  Returns:
    [B, n, n, C] float32.
  """

  def weights(extent_B, size):
    edge_n, position_H = jnp.arange(bins), jnp.arange(size)
    first_Bn = edge_n[None] * extent_B[:, None] // bins
    stop_Bn = -(-(edge_n[None] + 1) * extent_B[:, None] // bins)
    inside_BnH = position_H[None, None] >= first_Bn[..., None]
    inside_BnH &= position_H[None, None] < stop_Bn[..., None]
    return inside_BnH / jnp.maximum(jnp.sum(inside_BnH, axis=-1, keepdims=True), 1)

  rows_BnH, columns_BmW = (
    weights(extent_B, size)
    for extent_B, size in zip(extents(valid_BHW), valid_BHW.shape[1:], strict=True)
  )
  masked_BHWC = jnp.where(valid_BHW[..., None], x_BHWC, 0).astype(jnp.float32)
  return jnp.einsum("BnH,BHWC,BmW->BnmC", rows_BnH, masked_BHWC, columns_BmW)


@jax.named_scope("bins")
def spread_bins(x_BnnC: jax.Array, valid_BHW: jax.Array) -> jax.Array:
  """Interpolates n x n bins over each image, bilinearly, with half-pixel centres.

  Args:
    x_BnnC: [B, n, n, C] float.
    valid_BHW: [B, H, W] bool, a rectangle in the upper left corner.

  Returns:
    [B, H, W, C] float32; the value at the border is repeated on padding.
  """
  bins = x_BnnC.shape[1]

  def weights(extent_B, size):
    scale_B1 = bins / jnp.maximum(extent_B, 1)[:, None]
    at_BH = (jnp.arange(size)[None] + 0.5) * scale_B1 - 0.5
    at_BH1 = jnp.clip(at_BH, 0, bins - 1)[..., None]
    return jnp.maximum(1 - jnp.abs(at_BH1 - jnp.arange(bins)[None, None]), 0)

  rows_BHn, columns_BWm = (
    weights(extent_B, size)
    for extent_B, size in zip(extents(valid_BHW), valid_BHW.shape[1:], strict=True)
  )
  return jnp.einsum("BHn,BnmC,BWm->BHWC", rows_BHn, x_BnnC.astype(jnp.float32), columns_BWm)


def extents(valid_BHW: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the number of rows and of columns that each image covers, [B] int32 each."""
  return jnp.sum(valid_BHW[:, :, 0], axis=1), jnp.sum(valid_BHW[:, 0], axis=1)
