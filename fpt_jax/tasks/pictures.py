"""Colours, fonts, contact sheets and confusion matrices for the pictures of both tasks; images are uint8 RGB.

Shapes: H W C rows, columns and channels, T P true and predicted classes.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epy
from PIL import Image, ImageDraw, ImageFont

with epy.lazy_imports():
  import matplotlib
  from matplotlib import figure as figures
  from matplotlib.backends import backend_agg

Color = tuple[int, int, int]
MIN_EDGE = 400  # pixels; smaller pictures are enlarged, so that names have room
SALT = 24924


def category_color(name: str, instance: int = 0) -> Color:
  """Returns the colour of a category, the same in every image and run; its instances differ slightly."""
  # the salt keeps the hues of COCO's most frequent neighbours apart
  digest = hashlib.md5(f"{SALT}{name}".encode()).digest()
  hue = int.from_bytes(digest[:4], "big") / 2**32 + (0, 0.02, -0.02)[instance % 3]
  lightness, chroma = ((0.74, 0.17), (0.84, 0.12), (0.66, 0.2))[(digest[4] + instance) % 3]
  return _oklch_to_rgb(lightness, chroma, hue)


def _oklch_to_rgb(lightness: float, chroma: float, hue: float) -> Color:
  """Converts a colour from OKLCH, a perceptually uniform space, to sRGB; hue is from 0 to 1."""
  a, b = chroma * np.cos(2 * np.pi * hue), chroma * np.sin(2 * np.pi * hue)
  cones = np.array(
    [
      lightness + 0.3963377774 * a + 0.2158037573 * b,
      lightness - 0.1055613458 * a - 0.0638541728 * b,
      lightness - 0.0894841775 * a - 1.2914855480 * b,
    ]
  )
  to_linear = np.array(
    [
      [4.0767416621, -3.3077115913, 0.2309699292],
      [-1.2684380046, 2.6097574011, -0.3413193965],
      [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
  )
  linear = np.clip(to_linear @ cones**3, 0, 1)
  gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
  red, green, blue = (round(255 * float(channel)) for channel in gamma)
  return red, green, blue


def contact_sheet(
  images: Sequence[np.ndarray],
  columns: int,
  titles: Sequence[str] | None = None,
  cell_width: int = 480,
) -> np.ndarray:
  """Arranges images of any sizes in rows, scaled to the columns without distortion or cropping.

  Args:
    images: uint8 [H, W, 3] or [H, W] each.
    columns: number of images per row.
    titles: one line above each image, or None.
    cell_width: width of a column in pixels.

  Returns:
    [rows, columns * cell_width + margins, 3] uint8 on white.
  """
  if not images or columns < 1:
    raise ValueError(f"expected images and columns, got {len(images)} and {columns}")
  if titles is not None and len(titles) != len(images):
    raise ValueError(f"expected one title per image, got {len(titles)} for {len(images)}")
  columns = min(columns, len(images))
  gap = max(4, cell_width // 40)
  font = font_of(max(12, cell_width // 26))
  title_height = 0 if titles is None else sum(font.getmetrics()) + gap // 2
  tiles = [_fit(as_rgb(image), cell_width, 4 * cell_width // 3) for image in images]
  rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
  heights = [max(tile.height for tile in row) for row in rows]
  sheet = Image.new(
    "RGB",
    (columns * (cell_width + gap) + gap, sum(heights) + len(rows) * (gap + title_height) + gap),
    "white",
  )
  draw = ImageDraw.Draw(sheet)
  top = gap
  for r, row in enumerate(rows):
    for c, tile in enumerate(row):
      left = gap + c * (cell_width + gap)
      if titles is not None:
        title = shorten(titles[r * columns + c], font, cell_width)
        draw.text((left, top), title, fill=(40, 40, 40), font=font)
      sheet.paste(tile, (left + (cell_width - tile.width) // 2, top + title_height))
    top += heights[r] + title_height + gap
  return np.asarray(sheet)


def pixels_of(figure: figures.Figure) -> np.ndarray:
  """Returns a figure of matplotlib as uint8 RGB."""
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_confusion(counts_TP: np.ndarray, class_names: Sequence[str], unit: str) -> np.ndarray:
  """Draws a confusion matrix, one row per true class; cells are shaded by their share of the row.

  Args:
    counts_TP: number of those of true class T that are predicted as P, int [T, P].
    class_names: name of class 0, 1, ...
    unit: what is counted, such as "pixels".

  Returns:
    uint8 RGB.
  """
  truth_T1 = counts_TP.sum(axis=1, keepdims=True)
  share_TP = 100 * counts_TP / np.maximum(truth_T1, 1)
  edge = 2.5 + 0.34 * len(class_names)  # inches
  figure = figures.Figure(figsize=(edge, edge), dpi=100, layout="constrained")
  axes = figure.add_subplot()
  axes.imshow(share_TP, cmap="Blues", vmin=0, vmax=100)
  axes.set_xticks(range(len(class_names)), class_names, rotation=90)
  axes.set_yticks(range(len(class_names)), class_names)
  axes.set_xlabel("predicted")
  axes.set_ylabel(f"true, % of its {unit}")
  for t, p in zip(*np.nonzero(share_TP >= 0.5), strict=True):
    color = "white" if share_TP[t, p] > 50 else "black"
    text = axes.text(p, t, f"{share_TP[t, p]:.0f}", ha="center", va="center", color=color, size=8)
    text.set_in_layout(False)  # the layout would measure each of them
  return pixels_of(figure)


def as_rgb(image: np.ndarray) -> np.ndarray:
  """Converts an RGB or grey image to uint8 RGB [H, W, 3]."""
  image = np.asarray(image)
  if image.ndim == 2:
    image = np.stack([image] * 3, axis=-1)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(f"expected uint8 [H, W, 3] or [H, W], got {image.dtype} {image.shape}")
  return image


def zoom_of(image_HWC: np.ndarray) -> int:
  """Returns the integer factor that makes the longer edge of an image at least `MIN_EDGE`."""
  return max(1, -(-MIN_EDGE // max(image_HWC.shape[:2])))


def enlarge(image_HWC: np.ndarray, zoom: int) -> np.ndarray:
  """Enlarges an image by an integer factor."""
  if zoom == 1:
    return image_HWC
  height, width = image_HWC.shape[:2]
  size = (width * zoom, height * zoom)
  return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))


def _fit(image_HWC: np.ndarray, width: int, max_height: int) -> Image.Image:
  height_in, width_in = image_HWC.shape[:2]
  scale = min(width / width_in, max_height / height_in)
  size = (max(1, round(width_in * scale)), max(1, round(height_in * scale)))
  return Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=32)
def font_of(size: int) -> ImageFont.FreeTypeFont:
  """Returns the font of all pictures, DejaVu Sans Bold, at a size in pixels."""
  # DejaVu Sans comes with matplotlib, so it is the same on every machine
  path = pathlib.Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"
  return ImageFont.truetype(str(path), size)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
  """Shortens a text that is wider than `width` pixels: its end becomes an ellipsis."""
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(text + "…") > width:
    text = text[:-1]
  return text + "…"
