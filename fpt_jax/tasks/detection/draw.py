"""Pictures of detections and of training images with their anchors; uint8 RGB."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image, ImageDraw

from fpt_jax.models.heads.rpn import anchors_of_canvas, sampled_anchors
from fpt_jax.ops import masks as mask_ops
from fpt_jax.tasks import pictures

NEGATIVES_DRAWN = 12  # negative anchors in the picture of a training image
_sampled_anchors = jax.jit(sampled_anchors, static_argnums=0)


def draw_prediction(
  config: ConfigDict,
  image_HWC: np.ndarray,
  found: dict,
  truth: list[dict] | None,
  min_score: float,
) -> np.ndarray:
  """See `tasks.task.Task.draw_prediction`: ground truth on the left, detections on the right."""
  model = config.model
  names = dict(zip(model.category_ids, model.category_names, strict=False))
  shown = np.flatnonzero(found["scores"] >= min_score)
  detected = draw_detections(
    image_HWC,
    found["boxes_xyxy"][shown],
    [names.get(int(i), str(i)) for i in found["category_ids"][shown]],
    found["scores"][shown],
    masks=None if found["rles"] is None else [found["rles"][i] for i in shown],
  )
  if truth is None:
    return detected
  xywh = np.array([a["bbox"] for a in truth], np.float64).reshape(-1, 4)
  true = draw_detections(
    image_HWC,
    np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
    [names.get(a["category_id"], str(a["category_id"])) for a in truth],
    masks=[mask_ops.rasterize(a["segmentation"], *image_HWC.shape[:2]) for a in truth],
  )
  return pictures.contact_sheet([true, detected], columns=2, titles=["ground truth", "detected"])


def draw_example(config: ConfigDict, batch: dict[str, np.ndarray], step: int, i: int) -> np.ndarray:
  """See `tasks.task.Task.draw_example`: the objects, and a sample of the RPN's anchors.

  Positive anchors have the colour of their object. Negative anchors, of which a few are drawn, are grey.
  """
  image_HWC = np.clip(np.round(batch["image_BHWC"][i]), 0, 255).astype(np.uint8)
  height, width = image_HWC.shape[:2]
  boxes_G4, valid_G = batch["gt_boxes_BG4"][i], batch["gt_valid_BG"][i]
  true_G4 = boxes_G4[valid_G]
  bitmaps_Gmm = batch["gt_masks_BGmm"][i][valid_G].astype(np.float32)
  names = [config.model.category_names[k - 1] for k in batch["gt_labels_BG"][i][valid_G]]
  objects = draw_detections(
    image_HWC,
    true_G4,
    names,
    masks=list(mask_ops.paste(bitmaps_Gmm, true_G4, height, width, aligned=True) >= 0.5),
  )
  rpn = config.model.rpn
  anchors_A4 = anchors_of_canvas(rpn, (height, width))
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), i)
  sample = _sampled_anchors(FrozenConfigDict(rpn), anchors_A4.T, boxes_G4, valid_G, key)
  index_S, positive_S = np.asarray(sample.index_S), np.asarray(sample.positive_S)
  negatives = index_S[np.asarray(sample.valid_S) & ~positive_S]
  # index of each padded ground truth among the valid ones
  place_G = np.cumsum(valid_G) - 1
  sampled = draw_anchors(
    image_HWC,
    true_G4,
    names,
    anchors_A4[index_S[positive_S]],
    place_G[np.asarray(sample.matched_S)[positive_S]],
    anchors_A4[negatives[:: max(1, len(negatives) // NEGATIVES_DRAWN)]],
  )
  titles = [
    "objects",
    f"anchors: {positive_S.sum()} positive, {len(negatives)} negative",
  ]
  return pictures.contact_sheet([objects, sampled], columns=2, titles=titles)


def draw_detections(
  image_HWC: np.ndarray,
  boxes_xyxy: np.ndarray,
  names: Sequence[str],
  scores: np.ndarray | None = None,
  masks: Sequence[np.ndarray | Mapping[str, Any]] | None = None,
) -> np.ndarray:
  """Draws boxes, names, scores and masks over an image.

  Large objects are drawn first, so that small ones stay visible. Lines and letters scale with the
  image; a small image is enlarged by an integer factor first. Names are placed in order of score and do
  not cover each other: names without a free place are left out, and so are boxes outside the image.

  Args:
    image_HWC: uint8 [H, W, 3] or [H, W].
    boxes_xyxy: boxes (x0, y0, x1, y1) in pixels, [N, 4].
    names: text at each box, [N]; equal names have equal colours.
    scores: scores from 0 to 1, [N], or None to leave them out.
    masks: bitmaps [H, W] or RLEs of that size, [N], or None for boxes only.

  Returns:
    [k H, k W, 3] uint8, k = 1 unless the image is small.
  """
  image_HWC = pictures.as_rgb(image_HWC)
  boxes_N4 = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
  fields = [field for field in (boxes_N4, names, scores, masks) if field is not None]
  if len({len(field) for field in fields}) != 1:
    raise ValueError(
      f"expected the same number of boxes, names, scores and masks, got {[len(f) for f in fields]}"
    )
  height, width = image_HWC.shape[:2]
  zoom = pictures.zoom_of(image_HWC)
  image_HWC = pictures.enlarge(image_HWC, zoom)
  line = max(2, round(0.0035 * np.hypot(*image_HWC.shape[:2]) / np.sqrt(2)))

  order = np.arange(len(boxes_N4))
  if scores is not None:
    order = np.argsort(-np.asarray(scores), kind="stable")
  x0_N, y0_N, x1_N, y1_N = boxes_N4.T
  on_image_N = (x0_N < width) & (y0_N < height) & (x1_N > 0) & (y1_N > 0)
  order = order[on_image_N[order]].tolist()
  seen: dict[str, int] = {}
  colors = {}
  for i in order:
    colors[i] = pictures.category_color(names[i], seen.get(names[i], 0))
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
  """Draws anchors over an image; a positive one has the colour of its object in `draw_detections`.

  Args:
    image_HWC: uint8 [H, W, 3]; a small image is enlarged, as by `draw_detections`.
    boxes_G4: ground truths (x0, y0, x1, y1) in pixels, [G, 4]; their centres are drawn as dots.
    names: names of their categories, [G].
    positive_P4: anchors that are matched to a ground truth, [P, 4].
    matched_P: index of that ground truth, int [P].
    negative_N4: anchors that are not matched, [N, 4]; they are drawn in grey.

  Returns:
    [k H, k W, 3] uint8, k = 1 unless the image is small.
  """
  image_HWC = pictures.as_rgb(image_HWC)
  zoom = pictures.zoom_of(image_HWC)
  picture = Image.fromarray(pictures.enlarge(image_HWC, zoom))
  draw = ImageDraw.Draw(picture, "RGBA")
  line = max(1, round(0.002 * max(picture.size)))
  for box in negative_N4 * zoom:
    draw.rectangle(tuple(box), outline=(200, 200, 200, 160), width=line)
  colors = [pictures.category_color(name, names[:g].count(name)) for g, name in enumerate(names)]
  for box, g in zip(positive_P4 * zoom, matched_P, strict=True):
    draw.rectangle(tuple(box), outline=(*colors[g], 230), width=line)
  for box, color in zip(boxes_G4 * zoom, colors, strict=True):
    (x, y), radius = (box[:2] + box[2:]) / 2, 3 * line
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline="black")
  return np.asarray(picture)


def _plain(mask: np.ndarray | Mapping[str, Any]) -> np.ndarray | dict[str, Any]:
  return dict(mask) if isinstance(mask, Mapping) else np.asarray(mask)


def _enlarge_mask(mask_HW: np.ndarray, zoom: int) -> np.ndarray:
  if zoom == 1:
    return mask_HW
  height, width = mask_HW.shape
  image = Image.fromarray(mask_HW.astype(np.uint8) * 255)
  size = (width * zoom, height * zoom)
  return np.asarray(image.resize(size, Image.Resampling.BICUBIC)) > 127


def _tint(
  canvas_HWC: np.ndarray,
  image_HWC: np.ndarray,
  mask_HW: np.ndarray,
  color: pictures.Color,
  line: int,
) -> None:
  """Tints an object, with a contour inside its border; it replaces earlier tints."""
  bounds = mask_ops.bounds(mask_HW)
  if bounds is None:
    return
  x0, y0, x1, y1 = bounds
  window = (slice(y0, y1), slice(x0, x1))
  inside = mask_HW[window]
  depth = scipy.ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1][inside][:, None]
  # a contour takes at most half of a thin object
  thickness = min(0.75 * line, max(1.0, depth.max() / 2))
  alpha = np.maximum(0.38, 0.95 * np.clip(thickness + 0.5 - depth, 0, 1)).astype(np.float32)
  tinted = (1 - alpha) * image_HWC[window][inside] + alpha * np.array(color, np.float32)
  canvas_HWC[window][inside] = tinted.round().astype(np.uint8)


def _draw_box(
  draw: ImageDraw.ImageDraw,
  box: np.ndarray,
  color: pictures.Color,
  line: int,
  size: tuple[int, int],
) -> None:
  """Draws a frame around the box, with dark edges so that it is visible on any background."""
  # frame and edges lie outside the box, so that they do not cover a small object
  x0, y0 = np.maximum(np.floor(box[:2]) - line - 1, 0)
  x1, y1 = np.minimum(np.ceil(box[2:]) + line + 1, size) - 1
  draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0, 110), width=line + 2)
  draw.rectangle((x0, y0, x1, y1), outline=color, width=line)


def _draw_label(
  draw: ImageDraw.ImageDraw,
  box: np.ndarray,
  text: str,
  color: pictures.Color,
  line: int,
  size: tuple[int, int],
  taken: list[tuple[float, float, float, float]],
) -> None:
  """Writes a label near the box, inside the image and without overlap with the labels in `taken`."""
  width, height = size
  edge = np.sqrt(width * height)
  # a small object gets small letters: a large label would hide its surroundings
  share = np.clip(4 * np.sqrt(max(0, (box[2] - box[0]) * (box[3] - box[1]))) / edge, 0.7, 1)
  font = pictures.font_of(round(max(10, 0.023 * edge * share)))
  pad = max(2, 0.2 * font.size)
  text = pictures.shorten(text, font, width - 2 * pad)
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
  # a label inside a small object would hide it
  if (x1 - x0) < 1.5 * w or (y1 - y0) < 3 * h:
    places = [places[k] for k in (0, 2, 3, 6, 7)]
  for left, top in places:
    left, top = np.clip(left, 0, width - w), np.clip(top, 0, max(height - h, 0))
    label = (left, top, left + w, top + h)
    if all(_overlap(label, other) == 0 for other in taken):
      taken.append(label)
      dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 125
      draw.rounded_rectangle(label, radius=pad, fill=color, outline=(0, 0, 0, 110))
      draw.text((left + pad, top + pad / 4), text, fill="white" if dark else "black", font=font)
      return


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
  return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
