"""Pictures of label maps and their legends; uint8 RGB.

Shapes: H W rows and columns, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from fpt_jax.tasks import pictures

BORDER = (255, 255, 255)  # colour of the line between two classes
OPACITY = 0.65  # opacity of the colours over the image
FONT_SIZE = 16  # size of the font of legends, pixels


def draw_label_map(
  image_HWC: np.ndarray,
  label_HW: np.ndarray,
  palette: Sequence[pictures.Color],
) -> np.ndarray:
  """Colours an image by its classes, with lines between them; void pixels become grey.

  Args:
    image_HWC: image, uint8 RGB.
    label_HW: classes, int, of the image's size; labels without a colour, such as 255, are void.
    palette: R, G, B of class 0, 1, ...

  Returns:
    uint8 RGB of the image's size.

  Raises:
    ValueError: the sizes differ.
  """
  image_HWC, label_HW = np.asarray(image_HWC), np.asarray(label_HW)
  if image_HWC.dtype != np.uint8 or image_HWC.shape != (*label_HW.shape, 3):
    raise ValueError(
      f"expected a uint8 RGB image and its label map, got {image_HWC.dtype} {image_HWC.shape} and "
      f"{label_HW.shape}"
    )
  known_HW = (label_HW >= 0) & (label_HW < len(palette))
  colors_C3 = np.array(palette, np.float32)
  color_HWC = colors_C3[np.where(known_HW, label_HW, 0)]
  grey_HW1 = image_HWC.mean(-1, keepdims=True, dtype=np.float32)
  drawn_HWC = np.where(
    known_HW[..., None], (1 - OPACITY) * image_HWC + OPACITY * color_HWC, grey_HW1
  )
  drawn_HWC[_borders(label_HW)] = BORDER
  return np.round(drawn_HWC).astype(np.uint8)


def draw_legend(
  classes: Iterable[int],
  class_names: Sequence[str],
  palette: Sequence[pictures.Color],
  width: int,
) -> np.ndarray:
  """Draws the colours of classes with their names, in as many rows as needed.

  Args:
    classes: classes to show, such as `np.unique` of a label map; void is left out.
    class_names: name of class 0, 1, ...
    palette: R, G, B of class 0, 1, ...
    width: width of the picture in pixels; a name that is wider is cut off.

  Returns:
    uint8 RGB [rows, width, 3] on white.
  """
  shown = [int(c) for c in classes if 0 <= c < len(class_names)]
  font = ImageFont.load_default(FONT_SIZE)
  gap, line = FONT_SIZE // 2, FONT_SIZE * 3 // 2
  places, left, row = [], gap, 0
  for c in shown:
    entry = line + gap + round(font.getlength(class_names[c])) + 2 * gap
    if left > gap and left + entry > width:
      left, row = gap, row + 1
    places.append((left, row))
    left += entry
  legend = Image.new("RGB", (width, (row + 1) * (line + gap) + gap), "white")
  draw = ImageDraw.Draw(legend)
  for c, (left, row) in zip(shown, places, strict=True):
    top = gap + row * (line + gap)
    draw.rectangle((left, top, left + line, top + line - 1), fill=palette[c], outline=(90, 90, 90))
    draw.text(
      (left + line + gap, top + line // 2),
      class_names[c],
      fill=(40, 40, 40),
      font=font,
      anchor="lm",
    )
  return np.asarray(legend)


def _borders(label_HW: np.ndarray) -> np.ndarray:
  """Returns the pixels whose right or lower neighbour has another class, bool [H, W]."""
  border_HW = np.zeros(label_HW.shape, bool)
  border_HW[:, :-1] |= label_HW[:, :-1] != label_HW[:, 1:]
  border_HW[:-1] |= label_HW[:-1] != label_HW[1:]
  return border_HW


def draw_prediction(
  config: ConfigDict,
  image_HWC: np.ndarray,
  found: dict,
  truth: np.ndarray | None,
  min_score: float,
) -> np.ndarray:
  """See `tasks.task.Task.draw_prediction`: the image in the colours of its classes, above a legend."""
  del min_score
  maps = [found["label_map"]] if truth is None else [truth, found["label_map"]]
  titles = None if truth is None else ["ground truth", "predicted"]
  return draw_maps(config, [image_HWC] * len(maps), maps, titles)


def draw_example(config: ConfigDict, batch: dict[str, np.ndarray], step: int, i: int) -> np.ndarray:
  """See `tasks.task.Task.draw_example`: the image and its classes; grey pixels have no class."""
  del step
  image_HWC = np.clip(np.round(batch["image_BHWC"][i]), 0, 255).astype(np.uint8)
  maps = [None, batch["label_BHW"][i]]
  return draw_maps(config, [image_HWC] * 2, maps, ["image", "classes"])


def draw_maps(
  config: ConfigDict,
  images: Sequence[np.ndarray],
  maps: Sequence[np.ndarray | None],
  titles: Sequence[str] | None,
) -> np.ndarray:
  """Draws images side by side in the colours of their label maps, above one legend.

  Args:
    config: a config whose `model` has the names and colours of the classes.
    images: uint8 RGB [H, W, 3] each.
    maps: int [H, W] each, `VOID` where there is no class; None for the image itself.
    titles: one line above each image, or None.
  """
  names, palette = config.model.class_names, palette_of(config)
  drawn = []
  for image_HWC, label_HW in zip(images, maps, strict=True):
    zoom = pictures.zoom_of(image_HWC)
    large_HWC = pictures.enlarge(image_HWC, zoom)
    if label_HW is not None:
      large_HW = label_HW.repeat(zoom, axis=0).repeat(zoom, axis=1)
      large_HWC = draw_label_map(large_HWC, large_HW, palette)
    drawn.append(large_HWC)
  if len(drawn) > 1 or titles:
    drawn = [pictures.contact_sheet(drawn, columns=len(drawn), titles=titles)]
  present = np.unique(np.concatenate([m.ravel() for m in maps if m is not None]))
  legend_HWC = draw_legend(present, names, palette, drawn[0].shape[1])
  return np.concatenate([drawn[0], legend_HWC])


def palette_of(config: ConfigDict) -> list[tuple[int, int, int]]:
  """Returns the colours of the model's classes: those of the config, or colours derived from the names."""
  model = config.model
  return [tuple(c) for c in model.palette] or [
    pictures.category_color(name) for name in model.class_names
  ]
