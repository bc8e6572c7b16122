"""Pictures of what the transformers attend to: heat maps over an image.

Shapes: h w rows and columns of a level, H W those of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epy

from fpt_jax.tasks import pictures
from fpt_jax.tasks.queries import Query

with epy.lazy_imports():
  from matplotlib import axes, patches
  from matplotlib import figure as figures

PICTURE_WIDTH = 2.4  # inches of one picture of a grid
DPI = 100


class Map(NamedTuple):
  """What one position takes from a level.

  Attributes:
    weight_hw: [h, w] float32 weight of each position of the level, see `models.fpt.query_attention`.
    stride: pixels of the canvas between neighbouring positions.
    entropy: entropy of the weights over the logarithm of the number of keys.
    mixture: weights of the mixture of softmaxes; () for a Rendering Transformer.
  """

  weight_hw: np.ndarray
  stride: int
  entropy: float
  mixture: tuple[float, ...]

  @property
  def outside(self) -> float:
    """Share of the attention that zero keys outside the level draw, in a local window at its border."""
    return max(0.0, 1.0 - float(self.weight_hw.sum())) if self.mixture else 0.0


class Row(NamedTuple):
  """What a level takes from the others at one position.

  Attributes:
    query: the position.
    level: index of the level.
    maps: what it takes from each level, by the index of that level.
  """

  query: Query
  level: int
  maps: dict[int, Map]


def transformer_name(level: int, source: int, level_name: Callable[[int], str]) -> str:
  """Returns a name such as "ST", "GT from P4" or "RT from P2"."""
  if source == level:
    return "ST"
  return f"{'GT' if source > level else 'RT'} from {level_name(source)}"


def draw(
  image_HWC: np.ndarray,
  size: Sequence[int],
  rows: Sequence[Row],
  level_name: Callable[[int], str],
) -> np.ndarray:
  """Draws a grid: the position on the image in the first column, then what it takes from each level.

  A heat map has the brightest colour where its weight is largest.

  Args:
    image_HWC: the image, uint8 RGB.
    size: (height, width) of the image on the canvas of the maps.
    rows: the rows.
    level_name: function from the index of a level to its name.

  Returns:
    uint8 RGB.
  """
  height, width = size
  sources = sorted({source for row in rows for source in row.maps})
  cell = (PICTURE_WIDTH, PICTURE_WIDTH * height / width + 0.45)
  columns = 1 + len(sources)
  figure = figures.Figure(
    figsize=(columns * cell[0], len(rows) * cell[1]), dpi=DPI, layout="constrained"
  )
  grid = figure.subplots(len(rows), columns, squeeze=False)
  everywhere = (0, width, height, 0)
  for axes, row in zip(grid, rows, strict=True):
    axes[0].imshow(image_HWC, extent=everywhere)
    axes[0].set_title(f"{row.query.name}\nat {level_name(row.level)}", fontsize=9)
    for axis, source in zip(axes[1:], sources, strict=True):
      if source not in row.maps:
        axis.set_axis_off()
        continue
      axis.imshow(image_HWC.mean(axis=-1), extent=everywhere, cmap="gray", vmin=-80, vmax=400)
      seen = row.maps[source]
      draw_map(axis, seen)
      below = "gradient x input"
      if seen.mixture:
        below = "mixture " + " ".join(f"{weight:.2f}" for weight in seen.mixture)
        below += f", outside {seen.outside:.2f}" if seen.outside >= 0.005 else ""
      axis.set_title(f"{transformer_name(row.level, source, level_name)}\n{below}", fontsize=9)
    for axis in axes:
      axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
      if axis.images:
        draw_query(axis, row.query, width / image_HWC.shape[1])
  return pictures.pixels_of(figure)


def draw_map(axis: axes.Axes, seen: Map) -> None:
  """Draws weights over a picture; position i is centred on pixel i * stride."""
  weight_hw, stride = seen.weight_hw, seen.stride
  start = 0.5 - stride / 2
  bottom, right = (start + edge * stride for edge in weight_hw.shape)
  axis.imshow(
    weight_hw,
    extent=(start, right, bottom, start),
    cmap="inferno",
    alpha=0.85 * np.sqrt(weight_hw / max(weight_hw.max(), 1e-30)),
    interpolation="nearest",
  )


def draw_query(axis: axes.Axes, query: Query, ratio: float) -> None:
  """Marks the position, and the object's box, on a picture that is scaled by `ratio`."""
  axis.plot(query.x * ratio, query.y * ratio, "+", color="cyan", markersize=9, markeredgewidth=1.5)
  if query.box is not None:
    x0, y0, x1, y1 = (edge * ratio for edge in query.box)
    axis.add_patch(patches.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="cyan"))
