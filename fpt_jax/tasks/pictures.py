"""Detections drawn on images, and sheets of images; uint8 RGB in, uint8 RGB out."""

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
SALT = 24924


def category_color(name: str, instance: int = 0) -> Color:
  """The colour of a category: the same in every image and run; instances vary a little."""
  # the salt keeps the hues of COCO's most frequent neighbours apart
  digest = hashlib.md5(f"{SALT}{name}".encode()).digest()
  hue = int.from_bytes(digest[:4], "big") / 2**32 + (0, 0.02, -0.02)[instance % 3]
  lightness, chroma = ((0.74, 0.17), (0.84, 0.12), (0.66, 0.2))[(digest[4] + instance) % 3]
  return _oklch_to_rgb(lightness, chroma, hue)


def _oklch_to_rgb(lightness: float, chroma: float, hue: float) -> Color:
  """sRGB of a colour in OKLCH, where equal lightness looks equally light; hue from 0 to 1."""
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
  return tuple(round(255 * float(channel)) for channel in gamma)


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
    min_score: detections with a lower score are not drawn; nor are boxes off the image.

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

  order = np.arange(len(boxes_N4))
  if scores is not None:
    order = np.argsort(-np.asarray(scores), kind="stable")
    order = order[np.asarray(scores)[order] >= min_score]
  on_image = (boxes_N4[:, :2] < (width, height)).all(axis=1) & (boxes_N4[:, 2:] > 0).all(axis=1)
  order = order[on_image[order]].tolist()
  seen: dict[str, int] = {}
  colors = {}
  for i in order:
    colors[i] = category_color(names[i], seen.get(names[i], 0))
    seen[names[i]] = seen.get(names[i], 0) + 1
  areas = np.prod(np.maximum(boxes_N4[:, 2:] - boxes_N4[:, :2], 0), axis=1)
  by_area = sorted(order, key=lambda i: -areas[i])

  if masks is not None:
    canvas_HWC = image_HWC.copy()
    for i in by_area:
      mask_HW = _enlarge_mask(mask_ops.rasterize(_plain(masks[i]), height, width), zoom)
      _tint(canvas_HWC, image_HWC, mask_HW, colors[i], line)
    image_HWC = canvas_HWC

  picture = Image.fromarray(image_HWC)
  draw = ImageDraw.Draw(picture, "RGBA")
  for i in by_area:
    _draw_box(draw, boxes_N4[i] * zoom, colors[i], line, picture.size)
  taken: list[tuple[float, float, float, float]] = []
  for i in order:
    text = names[i] if scores is None else f"{names[i]} {100 * scores[i]:.0f}%"
    _draw_label(draw, boxes_N4[i] * zoom, text, colors[i], line, picture.size, taken)
  return np.asarray(picture)


def draw_anchors(
  image_HWC: np.ndarray,
  boxes_G4: np.ndarray,
  names: Sequence[str],
  positive_P4: np.ndarray,
  matched_P: np.ndarray,
  negative_N4: np.ndarray,
) -> np.ndarray:
  """Draws anchors over an image, those of an object in the colour that `draw_detections` gives it.

  Args:
    image_HWC: [H, W, 3] uint8; enlarged as by `draw_detections`.
    boxes_G4: ground truths, x0 y0 x1 y1 in pixels; their places are drawn as dots.
    names: [G] of their categories.
    positive_P4: anchors that belong to a ground truth.
    matched_P: [P] int, which.
    negative_N4: anchors that belong to none, drawn in grey.

  Returns:
    [k H, k W, 3] uint8, k = 1 unless the image is small.
  """
  image_HWC = _rgb(image_HWC)
  zoom = max(1, -(-MIN_EDGE // max(image_HWC.shape[:2])))
  picture = Image.fromarray(_enlarge(image_HWC, zoom))
  draw = ImageDraw.Draw(picture, "RGBA")
  line = max(1, round(0.002 * max(picture.size)))
  for box in negative_N4 * zoom:
    draw.rectangle(tuple(box), outline=(200, 200, 200, 160), width=line)
  colors = [category_color(name, names[:g].count(name)) for g, name in enumerate(names)]
  for box, g in zip(positive_P4 * zoom, matched_P, strict=True):
    draw.rectangle(tuple(box), outline=(*colors[g], 230), width=line)
  for box, color in zip(boxes_G4 * zoom, colors, strict=True):
    (x, y), radius = (box[:2] + box[2:]) / 2, 3 * line
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline="black")
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


def _enlarge_mask(mask_HW: np.ndarray, zoom: int) -> np.ndarray:
  if zoom == 1:
    return mask_HW
  height, width = mask_HW.shape
  image = Image.fromarray(mask_HW.astype(np.uint8) * 255)
  size = (width * zoom, height * zoom)
  return np.asarray(image.resize(size, Image.Resampling.BICUBIC)) > 127


def _tint(
  canvas_HWC: np.ndarray, image_HWC: np.ndarray, mask_HW: np.ndarray, color: Color, line: int
) -> None:
  """Tints an object and its contour, just inside it; what was tinted there before is replaced."""
  rows, cols = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
  if not rows.size:
    return
  window = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
  inside = mask_HW[window]
  depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1][inside][:, None]
  # a contour takes at most half of a thin object
  thickness = min(0.75 * line, max(1.0, depth.max() / 2))
  alpha = np.maximum(0.38, 0.95 * np.clip(thickness + 0.5 - depth, 0, 1)).astype(np.float32)
  tinted = (1 - alpha) * image_HWC[window][inside] + alpha * np.float32(color)
  canvas_HWC[window][inside] = tinted.round().astype(np.uint8)


def _draw_box(
  draw: ImageDraw.ImageDraw, box: np.ndarray, color: Color, line: int, size: tuple[int, int]
) -> None:
  """A frame around the box, shaded at its edges so that it shows on any background."""
  # frame and shade lie outside the box: a small object is not painted over
  x0, y0 = np.maximum(np.floor(box[:2]) - line - 1, 0)
  x1, y1 = np.minimum(np.ceil(box[2:]) + line + 1, size) - 1
  draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0, 110), width=line + 2)
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
  edge = np.sqrt(width * height)
  # a small object takes small letters, or its plate would hide what is around it
  share = np.clip(4 * np.sqrt(max(0, (box[2] - box[0]) * (box[3] - box[1]))) / edge, 0.7, 1)
  font = _font(round(max(10, 0.023 * edge * share)))
  pad = max(2, 0.2 * font.size)
  text = _shorten(text, font, width - 2 * pad)
  ascent, descent = font.getmetrics()
  w, h = font.getlength(text) + 2 * pad, ascent + descent + pad / 2
  x0, y0, x1, y1 = box
  away = line + 1
  places = [
    (x0 - away, y0 - away - h),  # above
    (x0, y0),  # inside, at the top
    (x0 - away, y1 + away),  # below
    (x1 + away - w, y0 - away - h),
    (x1 - w, y0),
    (x0, y1 - h),  # inside, at the bottom
    (x1 + away, y0),  # beside
    (x0 - away - w, y0),
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
      dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 125
      draw.rounded_rectangle(plate, radius=pad, fill=color, outline=(0, 0, 0, 110))
      draw.text((left + pad, top + pad / 4), text, fill="white" if dark else "black", font=font)
      return


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
  return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
