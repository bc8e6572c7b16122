"""Anchor boxes of every level: they depend only on shapes.

Shapes: A anchors of a position or of a level.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class AnchorGrid(NamedTuple):
  """The anchors of a level, in the order (row, column, anchor of the cell).

  Attributes:
    size: (rows, columns) of the level.
    strides: pixels between its cells, (vertical, horizontal).
    first_A4: float32 anchors of the cell at row and column 0, pixels.
  """

  size: tuple[int, int]
  strides: tuple[int, int]
  first_A4: np.ndarray

  @property
  def total(self) -> int:
    """Number of anchors."""
    return self.size[0] * self.size[1] * len(self.first_A4)

  def boxes(self) -> np.ndarray:
    """Returns all anchors, [rows * columns * A, 4] float32 in pixels; they may extend beyond the image."""
    y_HW, x_HW = np.meshgrid(
      *(
        np.arange(count, dtype=np.float32) * stride
        for count, stride in zip(self.size, self.strides, strict=True)
      ),
      indexing="ij",
    )
    shift_HW4 = np.stack([x_HW, y_HW, x_HW, y_HW], axis=-1)
    return (shift_HW4[:, :, None] + self.first_A4).reshape(-1, 4)

  def at(self, index: jax.Array) -> jax.Array:
    """Returns the anchors of an int32 index of any shape, [..., 4]: `boxes` without their memory."""
    cell, anchor = jnp.divmod(index, len(self.first_A4))
    row, column = jnp.divmod(cell, self.size[1])
    x, y = (
      place.astype(jnp.float32) * stride
      for place, stride in zip((column, row), self.strides[::-1], strict=True)
    )
    return jnp.stack([x, y, x, y], axis=-1) + jnp.asarray(self.first_A4)[anchor]


def anchor_grids(
  feature_sizes: Sequence[tuple[int, int]],
  strides: Sequence[int | tuple[int, int]],
  sizes: Sequence[Sequence[float]],
  aspect_ratios: Sequence[float],
  *,
  rounded: bool = True,
) -> tuple[AnchorGrid, ...]:
  """Makes anchors centred on the top left corner of every cell.

  Args:
    feature_sizes: (rows, columns) of each level, fine to coarse.
    strides: pixels between cells of each level, one number or (vertical, horizontal). On a canvas whose
      size is not a multiple of the stride, cells are further apart than a power of two: torchvision
      takes canvas size // feature size.
    sizes: square roots of the anchors' areas for each level, pixels.
    aspect_ratios: height / width, the same for all levels.
    rounded: whether the corners of an anchor around (0, 0) are rounded to pixels, as in torchvision, or
      exact, as in detectron2.

  Returns:
    The anchors of each level, len(ratios) * len(sizes of the level) in each cell, in the order (ratio, size).

  Raises:
    ValueError: the three sequences differ in length.

  Source: Ren et al., Faster R-CNN, section 3.1; rounding and order as in torchvision.
  """
  if not len(feature_sizes) == len(strides) == len(sizes):
    raise ValueError(
      "feature_sizes, strides and sizes must have one entry per level, got "
      f"{len(feature_sizes)}, {len(strides)} and {len(sizes)}"
    )
  return tuple(
    AnchorGrid(
      size,
      stride if isinstance(stride, tuple) else (stride, stride),
      _around_origin(level_sizes, aspect_ratios, rounded),
    )
    for size, stride, level_sizes in zip(feature_sizes, strides, sizes, strict=True)
  )


def _around_origin(sizes, aspect_ratios, rounded) -> np.ndarray:
  root_A1 = np.sqrt(np.asarray(aspect_ratios, np.float32))[:, None]
  sizes_1A = np.asarray(sizes, np.float32)[None]
  widths_A = ((1 / root_A1) * sizes_1A).reshape(-1)
  heights_A = (root_A1 * sizes_1A).reshape(-1)
  first_A4 = np.stack([-widths_A, -heights_A, widths_A, heights_A], axis=1) / 2
  return np.round(first_A4) if rounded else first_A4
