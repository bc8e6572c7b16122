"""Context Shapes: generated images in which the category of a small object depends on a distant one.

Every image holds beacons, which are large circles or large squares but never both, and far from them
small grey discs, the satellites. All satellites look the same: only the beacons determine whether one
is a satellite of a circle or of a square. Triangles are large and carry no information.
"""

import io
import math
import os
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageDraw
import tensorflow_datasets as tfds
from pycocotools import mask as coco_mask

from fpt_jax.data.datasets import label_maps
from fpt_jax.data.records import instances
from fpt_jax.data.records.examples import ordered_key
from fpt_jax.errors import UserError
from fpt_jax.run.progress import Progress

CATEGORIES = ("circle", "square", "triangle", "satellite of circle", "satellite of square")
_CIRCLE, _SQUARE, _TRIANGLE, _SATELLITE = 1, 2, 3, 4
_OVERSAMPLING = 4


class ContextShapes(tfds.core.GeneratorBasedBuilder):
  """Draws the data set; the same seed gives the same images.

  Args:
    data_dir: folder of prepared data; each combination of the other arguments has a folder inside it.
    train_size: number of images of the split "train".
    val_size: number of images of the split "val".
    image_size: height and width of the images in pixels, at least 64.
    seed: seed of the drawing.

  Raises:
    UserError: a number is too small.
  """

  VERSION = tfds.core.Version("1.1.0")

  def __init__(
    self,
    *,
    data_dir: str,
    train_size: int = 2000,
    val_size: int = 200,
    image_size: int = 128,
    seed: int = 0,
  ):
    if image_size < 64 or min(train_size, val_size) < 1:
      raise UserError(
        f"data.builder: image_size={image_size} must be at least 64, train_size={train_size} and "
        f"val_size={val_size} at least 1"
      )
    self._sizes = {"train": train_size, "val": val_size}
    self._image_size, self._seed = image_size, seed
    variant = f"{image_size}px_{train_size}_{val_size}_seed{seed}"
    super().__init__(data_dir=os.path.join(data_dir, variant), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    metadata = {
      "source": "",
      "category_names": CATEGORIES,
      "category_ids": list(range(1, len(CATEGORIES) + 1)),
      "class_names": ("background", *CATEGORIES),
      "palette": label_maps.numbered_colors(1 + len(CATEGORIES)),
      "sizes": {split: [[self._image_size] * 2] * count for split, count in self._sizes.items()},
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="A small object's category depends on a distant large object.",
      features=instances.features(),
      metadata=tfds.core.MetadataDict(metadata),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    return {
      "train": self._generate_examples(split="train", first_id=1),
      "val": self._generate_examples(split="val", first_id=1 + self._sizes["train"]),
    }

  def _generate_examples(self, split: str, first_id: int) -> Iterator[tuple[int, dict]]:
    count = self._sizes[split]
    with Progress(f"prepare {split}", count) as progress:
      for i in range(count):
        yield ordered_key(i, count), draw_example(first_id + i, self._image_size, self._seed)
        progress.advance()


def draw_example(image_id: int, size: int, seed: int) -> dict:
  """Draws one image with its annotations, as a pure function of the arguments.

  Args:
    image_id: id of the image, at least 1 and unique in the data set.
    size: height and width of the image in pixels.
    seed: seed of the data set.

  Returns:
    A record in the form of `instances.features()`.
  """
  rng = np.random.default_rng((seed, image_id))
  shapes = _place(rng, size)
  image_HW3 = _background(rng, size)
  masks: list[np.ndarray] = []
  for kind, box in shapes:
    coverage_HW = _coverage(kind, box, size, rng)
    color_HW3 = _texture(kind, size, rng)
    image_HW3 += coverage_HW[..., None] * (color_HW3 - image_HW3)
    mask_HW = coverage_HW >= 0.5
    masks = [below_HW & ~mask_HW for below_HW in masks] + [mask_HW]
  image_HW3 += 6 * rng.standard_normal(image_HW3.shape, np.float32)
  jpeg = io.BytesIO()
  PIL.Image.fromarray(np.clip(image_HW3, 0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=95)

  beacon = shapes[0][0]
  objects = []
  for i, ((kind, _), mask_HW) in enumerate(zip(shapes, masks, strict=True)):
    label = kind if kind != _SATELLITE else _SATELLITE + beacon - _CIRCLE
    rle = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    x, y, w, h = map(float, coco_mask.toBbox(rle))
    box = (x, y, x + w, y + h)
    objects.append(
      instances.encode_object(
        label=label,
        annotation_id=image_id * 100 + i,
        is_crowd=False,
        box=box,
        bbox_xywh=[x, y, w, h],
        area=float(mask_HW.sum()),
        segmentation=segmentation,
        bitmap_mm=instances.draw_bitmap(segmentation, box, (size, size)),
      )
    )
  return {
    "image": jpeg.getvalue(),
    "image_id": image_id,
    "file_name": f"{image_id:06d}.jpg",
    "height": size,
    "width": size,
    "objects": objects,
  }


def _place(rng: np.random.Generator, size: int) -> list[tuple[int, tuple[float, ...]]]:
  """Returns (kind, box) from bottom to top: 1-2 beacons, 0-2 triangles, 1-2 satellites.

  A layout that does not fit is drawn again as a whole, so that counts and places carry no information
  about the category.
  """
  beacon = int(rng.integers(_CIRCLE, _SQUARE + 1))
  while True:
    kinds = [beacon] * rng.integers(1, 3)
    kinds += [_TRIANGLE] * rng.integers(0, 3)
    kinds += [_SATELLITE] * rng.integers(1, 3)
    shapes: list[tuple[int, tuple[float, ...]]] = []
    for kind in kinds:
      side = size * (rng.uniform(0.085, 0.125) if kind == _SATELLITE else rng.uniform(0.25, 0.38))
      x0, y0 = rng.uniform(1, size - 1 - side, 2)
      shapes.append((kind, (x0, y0, x0 + side, y0 + side)))
    if all(_compatible(a, b, size) for i, a in enumerate(shapes) for b in shapes[:i]):
      return shapes


def _compatible(a: tuple, b: tuple, size: int) -> bool:
  """Whether two shapes fit: large ones may overlap a little, satellites are apart from all others."""
  (kind_a, (ax0, ay0, ax1, ay1)), (kind_b, (bx0, by0, bx1, by1)) = a, b
  gap_x, gap_y = max(ax0, bx0) - min(ax1, bx1), max(ay0, by0) - min(ay1, by1)
  kinds = {kind_a, kind_b}
  if _SATELLITE not in kinds:
    return max(gap_x, gap_y) > -0.05 * size
  if kinds & {_CIRCLE, _SQUARE}:
    return max(gap_x, gap_y) > 0.25 * size
  return max(gap_x, gap_y) > 0.02 * size


def _coverage(kind: int, box: tuple[float, ...], size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns the fraction of each pixel that the shape covers, float32 [size, size]."""
  canvas = PIL.Image.new("L", (size * _OVERSAMPLING,) * 2)
  draw = PIL.ImageDraw.Draw(canvas)
  x0, y0, x1, y1 = (v * _OVERSAMPLING for v in box)
  if kind in (_CIRCLE, _SATELLITE):
    draw.ellipse((x0, y0, x1, y1), fill=255)
  elif kind == _SQUARE:
    draw.rectangle((x0, y0, x1, y1), fill=255)
  else:
    apex = (x0 + rng.uniform(0.3, 0.7) * (x1 - x0), y0)
    draw.polygon((apex, (x1, y1), (x0, y1)), fill=255)
  return np.asarray(canvas.reduce(_OVERSAMPLING), np.float32) / 255


def _texture(kind: int, size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns float32 RGB [size, size, 3]: stripes of two colours, or plain grey for satellites."""
  if kind == _SATELLITE:
    return np.full((size, size, 3), rng.uniform(170, 215), np.float32)
  # the lighter stripe stands out from every background
  colors = rng.uniform([[130], [20]], [[250], [235]], (2, 3)).astype(np.float32)
  angle, phase = rng.uniform(0, 2 * np.pi, 2)
  steps_S = np.arange(size, dtype=np.float32) * np.float32(50 / size)
  across_SS = steps_S[None, :] * math.cos(angle) + steps_S[:, None] * math.sin(angle)
  wave_HW = np.sin(across_SS + np.float32(phase))
  mix_HW1 = (0.5 + 0.5 * wave_HW)[..., None]
  return colors[0] * mix_HW1 + colors[1] * (1 - mix_HW1)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
  """Returns float32 RGB [size, size, 3]: a gradient between dark colours of the four corners."""
  corners_223 = rng.uniform(40, 130, (2, 2, 3)).astype(np.float32)
  t = np.linspace(0, 1, size, dtype=np.float32)
  weights_2S = np.stack([1 - t, t])
  return np.einsum("yxc,yh,xw->hwc", corners_223, weights_2S, weights_2S)
