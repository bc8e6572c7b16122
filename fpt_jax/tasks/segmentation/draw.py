"""Label maps drawn on images, and their legends; uint8 RGB in, uint8 RGB out."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
BORDER = (255, 255, 255)  # between two classes


def draw_label_map(
  image_HWC: np.ndarray,
  label_HW: np.ndarray,
  palette: Sequence[Color],
  *,
  opacity: float = 0.65,
  border: bool = True,
) -> np.ndarray:
  """Colours an image by its classes; where there is no class it is left grey and uncoloured.

  Args:
    image_HWC: uint8 RGB.
    label_HW: int, of the image's size; what is no place in the palette, such as 255, is void.
    palette: RGB of class 0, 1, ...
    opacity: of the colours, from 0 to 1.
    border: whether to draw a line where two classes meet.

  Returns:
    uint8 RGB of the image's size.

  Raises:
    ValueError: the sizes differ.
  """
  image_HWC, label_HW = np.asarray(image_HWC), np.asarray(label_HW)
  if image_HWC.dtype != np.uint8 or image_HWC.shape != (*label_HW.shape, 3):
    raise ValueError(
      f"a uint8 RGB image and its label map expected, got {image_HWC.dtype} {image_HWC.shape} and "
      f"{label_HW.shape}"
    )
  known_HW = (label_HW >= 0) & (label_HW < len(palette))
  colors_C3 = np.array(palette, np.float32)
  color_HWC = colors_C3[np.where(known_HW, label_HW, 0)]
  grey_HW1 = image_HWC.mean(-1, keepdims=True, dtype=np.float32)
  drawn_HWC = np.where(
    known_HW[..., None], (1 - opacity) * image_HWC + opacity * color_HWC, grey_HW1
  )
  if border:
    drawn_HWC[_borders(label_HW)] = BORDER
  return np.round(drawn_HWC).astype(np.uint8)


def draw_legend(
  classes: Iterable[int],
  class_names: Sequence[str],
  palette: Sequence[Color],
  width: int,
  *,
  font_size: int = 16,
) -> np.ndarray:
  """Draws colours with their names, in as many rows as the width asks for.

  Args:
    classes: which to show, such as `np.unique` of a label map; void is passed over.
    class_names: of class 0, 1, ...
    palette: RGB of class 0, 1, ...
    width: of the picture, in pixels; a name that is wider is cut off.
    font_size: pixels.

  Returns:
    uint8 RGB [rows, width, 3] on white.
  """
  shown = [int(c) for c in classes if 0 <= c < len(class_names)]
  font = ImageFont.load_default(font_size)
  gap, line = font_size // 2, font_size * 3 // 2
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


def draw_confusion(counts_TP: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
  """Draws a matrix of counts: a row a true class, the darker the larger its share of the row.

  Args:
    counts_TP: int [T, P], pixels of true class T predicted as P.
    class_names: of class 0, 1, ...

  Returns:
    uint8 RGB.
  """
  truth_T1 = counts_TP.sum(axis=1, keepdims=True)
  share_TP = 100 * counts_TP / np.maximum(truth_T1, 1)
  edge = 2.5 + 0.34 * len(class_names)  # inches
  figure = Figure(figsize=(edge, edge), dpi=100, layout="constrained")
  canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
  axes.imshow(share_TP, cmap="Blues", vmin=0, vmax=100)
  axes.set_xticks(range(len(class_names)), class_names, rotation=90)
  axes.set_yticks(range(len(class_names)), class_names)
  axes.set_xlabel("predicted")
  axes.set_ylabel("true, % of its pixels")
  for t, p in zip(*np.nonzero(share_TP >= 0.5), strict=True):
    color = "white" if share_TP[t, p] > 50 else "black"
    axes.text(p, t, f"{share_TP[t, p]:.0f}", ha="center", va="center", color=color, size=8)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _borders(label_HW: np.ndarray) -> np.ndarray:
  """bool [H, W]: pixels whose right or lower neighbour is of another class."""
  border_HW = np.zeros(label_HW.shape, bool)
  border_HW[:, :-1] |= label_HW[:, :-1] != label_HW[:, 1:]
  border_HW[:-1] |= label_HW[:-1] != label_HW[1:]
  return border_HW
