"""Anchor boxes of every level, as NumPy constants: they depend only on shapes."""

from collections.abc import Sequence

import numpy as np


def anchors(
  feature_sizes: Sequence[tuple[int, int]],
  strides: Sequence[int | tuple[int, int]],
  sizes: Sequence[Sequence[float]],
  aspect_ratios: Sequence[float],
  *,
  rounded: bool = True,
) -> tuple[np.ndarray, ...]:
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
    For each level [H * W * A, 4] float32 in pixels, in the order (row, column, ratio, size), with
    A = len(ratios) * len(sizes of the level). Anchors may extend beyond the image.

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
    _level(rows, columns, stride, level_sizes, aspect_ratios, rounded)
    for (rows, columns), stride, level_sizes in zip(feature_sizes, strides, sizes, strict=True)
  )


def _level(rows, columns, stride, sizes, aspect_ratios, rounded):
  stride_y, stride_x = stride if isinstance(stride, tuple) else (stride, stride)
  root_A1 = np.sqrt(np.asarray(aspect_ratios, np.float32))[:, None]
  sizes_1A = np.asarray(sizes, np.float32)[None]
  widths_A = ((1 / root_A1) * sizes_1A).reshape(-1)
  heights_A = (root_A1 * sizes_1A).reshape(-1)
  base_A4 = np.stack([-widths_A, -heights_A, widths_A, heights_A], axis=1) / 2
  if rounded:
    base_A4 = np.round(base_A4)

  y_HW, x_HW = np.meshgrid(
    np.arange(rows, dtype=np.float32) * stride_y,
    np.arange(columns, dtype=np.float32) * stride_x,
    indexing="ij",
  )
  shift_HW4 = np.stack([x_HW, y_HW, x_HW, y_HW], axis=-1)
  return (shift_HW4[:, :, None] + base_A4).reshape(-1, 4)
