"""Detections drawn on images, and sheets of images; uint8 RGB in, uint8 RGB out."""

import colorsys
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from fpt_jax.ops import masks as mask_ops

Color = tuple[int, int, int]
MIN_EDGE = 400  # a smaller picture is enlarged, so that names have room


def category_color(name: str, instance: int = 0) -> Color:
  """The colour of a category: the same in every image and run; instances vary a little."""
  digest = hashlib.md5(name.encode()).digest()
  hue = int.from_bytes(digest[:4], "big") / 2**32
  saturation = (0.95, 0.65, 0.8)[instance % 3]
  value = (1.0, 0.95, 0.8)[(instance // 3 + instance) % 3]
  return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def draw_detections(
  image_HWC: np.ndarray,
  boxes_xyxy: np.ndarray,
  names: Sequence[str],
  scores: np.ndarray | None = None,
  masks: Sequence[np.ndarray | Mapping[str, Any]] | None = None,
  min_score: float = 0.0,
) -> np.ndarray:
  """Draws boxes, names, scores and masks over an image.

  Large objects are drawn first, so that small ones stay in sight. Lines and letters grow with the
  image; an image whose longer edge is under `MIN_EDGE` is enlarged by a whole factor first. Names
  avoid each other, in order of score; one without a free place is left out.

  Args:
    image_HWC: [H, W, 3] or [H, W] uint8.
    boxes_xyxy: [N, 4] x0 y0 x1 y1 in pixels.
    names: [N] what to write at each box; equal names get equal colours.
    scores: [N] from 0 to 1, or None: none is written.
    masks: [N] bitmaps [H, W] or RLEs of that size, or None: boxes only.
    min_score: detections with a lower score are not drawn.

  Returns:
    [k H, k W, 3] uint8, k = 1 unless the image is small.
  """
  image_HWC = _rgb(image_HWC)
  boxes_N4 = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
  fields = [field for field in (boxes_N4, names, scores, masks) if field is not None]
  if len({len(field) for field in fields}) != 1:
    raise ValueError(f"as many of each expected, got {[len(field) for field in fields]}")
  height, width = image_HWC.shape[:2]
  zoom = max(1, -(-MIN_EDGE // max(height, width)))
  image_HWC = _enlarge(image_HWC, zoom)
  line = max(2, round(0.0035 * np.hypot(*image_HWC.shape[:2]) / np.sqrt(2)))

  order = range(len(boxes_N4))
  if scores is not None:
    order = [i for i in np.argsort(-np.asarray(scores), kind="stable") if scores[i] >= min_score]
  seen: dict[str, int] = {}
  colors = {}
  for i in order:
    colors[i] = category_color(names[i], seen.get(names[i], 0))
    seen[names[i]] = seen.get(names[i], 0) + 1
  areas = np.prod(np.maximum(boxes_N4[:, 2:] - boxes_N4[:, :2], 0), axis=1)
  by_area = sorted(order, key=lambda i: -areas[i])

  if masks is not None:
    canvas = image_HWC.astype(np.float32)
    for i in by_area:
      bitmap = mask_ops.rasterize(_plain(masks[i]), height, width)
      _blend_mask(canvas, bitmap.repeat(zoom, 0).repeat(zoom, 1), colors[i], line)
    image_HWC = canvas.round().astype(np.uint8)

  picture = Image.fromarray(image_HWC)
  draw = ImageDraw.Draw(picture)
  for i in by_area:
    _draw_box(draw, boxes_N4[i] * zoom, colors[i], line, picture.size, faint=masks is not None)
  taken: list[tuple[float, float, float, float]] = []
  for i in order:
    text = names[i] if scores is None else f"{names[i]} {100 * scores[i]:.0f}%"
    _draw_label(draw, boxes_N4[i] * zoom, text, colors[i], line, picture.size, taken)
  return np.asarray(picture)


def contact_sheet(
  images: Sequence[np.ndarray],
  columns: int,
  titles: Sequence[str] | None = None,
  cell_width: int = 480,
) -> np.ndarray:
  """Lays images of any sizes out in rows, each scaled to its column, none distorted or cropped.

  Args:
    images: [H, W, 3] or [H, W] uint8 each.
    columns: images a row.
    titles: a line above each image, or None.
    cell_width: pixels of a column.

  Returns:
    [rows, columns * cell_width + margins, 3] uint8 on white.
  """
  if not images or columns < 1:
    raise ValueError(f"images and columns expected, got {len(images)} and {columns}")
  if titles is not None and len(titles) != len(images):
    raise ValueError(f"a title an image expected, got {len(titles)} for {len(images)}")
  columns = min(columns, len(images))
  gap = max(4, cell_width // 40)
  font = _font(max(12, cell_width // 26))
  title_height = 0 if titles is None else sum(font.getmetrics()) + gap // 2
  tiles = [_fit(_rgb(image), cell_width, 4 * cell_width // 3) for image in images]
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
        title = _shorten(titles[r * columns + c], font, cell_width)
        draw.text((left, top), title, fill=(40, 40, 40), font=font)
      sheet.paste(tile, (left + (cell_width - tile.width) // 2, top + title_height))
    top += heights[r] + title_height + gap
  return np.asarray(sheet)


def _rgb(image: np.ndarray) -> np.ndarray:
  image = np.asarray(image)
  if image.ndim == 2:
    image = np.stack([image] * 3, axis=-1)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(f"uint8 [H, W, 3] or [H, W] expected, got {image.dtype} {image.shape}")
  return image


def _plain(mask: np.ndarray | Mapping[str, Any]) -> np.ndarray | dict[str, Any]:
  return dict(mask) if isinstance(mask, Mapping) else np.asarray(mask)


def _enlarge(image_HWC: np.ndarray, zoom: int) -> np.ndarray:
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
def _font(size: int) -> ImageFont.FreeTypeFont:
  # DejaVu Sans comes with matplotlib, so it is the same on every machine
  path = pathlib.Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"
  return ImageFont.truetype(str(path), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(text + "…") > width:
    text = text[:-1]
  return text + "…"


def _blend_mask(canvas_HWC: np.ndarray, mask_HW: np.ndarray, color: Color, line: int) -> None:
  """Tints the object and draws its contour just inside it, with a soft edge."""
  rows, cols = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
  if not rows.size:
    return
  window = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
  inside = mask_HW[window]
  depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
  # a contour takes at most a quarter of a thin object
  thickness = min(0.75 * line, max(1.0, depth.max() / 2))
  contour = np.clip(thickness + 0.5 - depth, 0, 1)
  alpha = inside * np.maximum(0.4, 0.95 * contour)
  crop = canvas_HWC[window]
  crop += alpha[..., None] * (np.float32(color) - crop)


def _draw_box(
  draw: ImageDraw.ImageDraw,
  box: np.ndarray,
  color: Color,
  line: int,
  size: tuple[int, int],
  faint: bool,
) -> None:
  """A frame around the box, dark at its edges so that it shows on any background."""
  # the frame lies outside the box: a small object is not painted over
  line = max(1, line // 2) if faint else line
  x0, y0 = np.floor(box[:2]) - line
  x1, y1 = np.ceil(box[2:]) + line - 1
  x0, y0 = max(x0, 0), max(y0, 0)
  x1, y1 = min(x1, size[0] - 1), min(y1, size[1] - 1)
  if x1 < x0 or y1 < y0:
    return
  dark = tuple(c // 4 for c in color)
  draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=dark, width=line + 2)
  draw.rectangle((x0, y0, x1, y1), outline=color, width=line)


def _draw_label(
  draw: ImageDraw.ImageDraw,
  box: np.ndarray,
  text: str,
  color: Color,
  line: int,
  size: tuple[int, int],
  taken: list[tuple[float, float, float, float]],
) -> None:
  """Writes the text on a plate near the box, within the image, off the plates in `taken`."""
  width, height = size
  font = _font(round(max(11, 0.021 * np.sqrt(width * height))))
  pad = max(2, line)
  text = _shorten(text, font, width - 2 * pad)
  ascent, descent = font.getmetrics()
  w, h = font.getlength(text) + 2 * pad, ascent + descent + pad
  x0, y0, x1, y1 = box
  places = [
    (x0 - line, y0 - line - h),  # above
    (x0, y0),  # inside, at the top
    (x0 - line, y1 + line),  # below
    (x1 + line - w, y0 - line - h),
    (x1 - w, y0),
    (x0, y1 - h),  # inside, at the bottom
    (x1 + line, y0),  # beside
    (x0 - line - w, y0),
    (x1 - w, y1 - h),
  ]
  # where the object is small, a plate inside would hide it
  if (x1 - x0) < 1.5 * w or (y1 - y0) < 3 * h:
    places = [places[k] for k in (0, 2, 3, 6, 7)]
  for left, top in places:
    left, top = np.clip(left, 0, width - w), np.clip(top, 0, max(height - h, 0))
    plate = (left, top, left + w, top + h)
    if all(_overlap(plate, other) == 0 for other in taken):
      taken.append(plate)
      dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
      draw.rounded_rectangle(plate, radius=pad, fill=color, outline=tuple(c // 4 for c in color))
      draw.text((left + pad, top + pad / 2), text, fill="white" if dark else "black", font=font)
      return


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
  return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
