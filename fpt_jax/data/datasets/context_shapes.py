"""Context Shapes: generated images with questions that only context answers.

An image has one beacon, a circle or a square, and far from it small grey discs, the satellites. All
satellites look the same: only the beacon tells whether they are satellites of a circle or of a square.
The background is a gradient of greys. The layout, the greys and the noise are drawn without regard to the
beacon's kind: two images that differ in the kind alone are equal everywhere but at the beacon. Large
triangles have a fine texture.

The annotations ask three questions. What is known without context:

  "same_level", satellites of a small beacon: from the surroundings of a satellite, up to a quarter of the
    image's side, nothing is known about its category. A small beacon is plainly a circle or a square, but
    only fine levels of a pyramid see it. They must interact across positions.
  "coarse", satellites of a large beacon: again nothing is known from their surroundings. The beacon is a
    patchwork of reddish and bluish cells, of which 80 % are of the kind's colour: one cell is wrong one time
    in five, while one position of a coarse level averages many. Fine levels must interact with coarse ones,
    or with many positions of the beacon. Its outline tells the kind as well, at the corners of a square.
  "fine", triangles: stripes and checks have the same mean colour and contrast, and a period of seven pixels
    in an image of 128 x 128, so that an average over a few periods tells nothing. A triangle of this size
    belongs to a coarse level, which knows the texture from finer ones, or from what its features kept of it.

The features of a deep backbone have context of their own: a position whose receptive field covers satellite
and beacon can answer every question without FPT. How well it learns to is the score of the baseline.

With `beacons="shape"`, the colours are random, and only the outline tells the kind.

A crowd is a cluster of tiny satellites under one annotation. It asks no question.

Shapes: H W rows and columns, C cells of a patchwork.
"""

import dataclasses
import io
import math
import os
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageDraw
import tensorflow_datasets as tfds
from pycocotools import mask as coco_mask

from fpt_jax.data.datasets import layouts
from fpt_jax.data.records import instances
from fpt_jax.data.records.examples import ordered_key
from fpt_jax.errors import UserError
from fpt_jax.run.progress import Progress

CATEGORIES = (
  "circle",
  "square",
  "striped triangle",
  "checked triangle",
  "satellite of circle",
  "satellite of square",
)
CIRCLE, SQUARE, STRIPED, CHECKED, OF_CIRCLE, OF_SQUARE = range(1, 7)
BEACONS = ("color", "shape")
# sides of the shapes, relative to the image's
_SMALL, _LARGE, _TRIANGLE, _CLUSTER = (0.085, 0.125), (0.3, 0.45), (0.25, 0.4), (0.2, 0.2)
_FAR = 0.25  # gap between the beacon and the satellites, relative to the image's side
_MISLEADING = 0.2  # share of a large beacon that has the other kind's colour
_OVERSAMPLING = 4


class ContextShapes(tfds.core.GeneratorBasedBuilder):
  """Draws the data set; the same seed gives the same images.

  Args:
    data_dir: folder of prepared data; each combination of the other arguments has a folder inside it.
    train_size: number of images of the split "train".
    val_size: number of images of the split "val".
    image_size: height and width of the images in pixels, at least 64.
    seed: seed of the drawing.
    beacons: what tells a beacon's kind: "color" (and the outline), or "shape" (the outline alone).

  Raises:
    UserError: a number is too small, or `beacons` is something else.
  """

  VERSION = tfds.core.Version("3.0.0")

  def __init__(
    self,
    *,
    data_dir: str,
    train_size: int = 2000,
    val_size: int = 200,
    image_size: int = 128,
    seed: int = 0,
    beacons: str = "color",
  ):
    if image_size < 64 or min(train_size, val_size) < 1 or seed < 0:
      raise UserError(
        f"data.builder: image_size={image_size} must be at least 64, train_size={train_size} and "
        f"val_size={val_size} at least 1, and seed={seed} at least 0"
      )
    if beacons not in BEACONS:
      raise UserError(f"data.builder.beacons={beacons!r} must be one of {BEACONS}")
    self._sizes = {"train": train_size, "val": val_size}
    self._image_size, self._seed, self._beacons = image_size, seed, beacons
    variant = f"{image_size}px_{train_size}_{val_size}_{beacons}_seed{seed}"
    super().__init__(data_dir=os.path.join(data_dir, variant), file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    metadata = {
      "source": "",
      "category_names": CATEGORIES,
      "category_ids": list(range(1, len(CATEGORIES) + 1)),
      "class_names": ("background", *CATEGORIES),
      "palette": layouts.numbered_colors(1 + len(CATEGORIES)),
      "sizes": {split: [[self._image_size] * 2] * count for split, count in self._sizes.items()},
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description="The category of a satellite depends on a distant beacon.",
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
        example = draw_example(first_id + i, self._image_size, self._seed, self._beacons)
        yield ordered_key(i, count), example
        progress.advance()


@dataclasses.dataclass(frozen=True)
class _Shape:
  """A shape of a layout.

  Attributes:
    role: "beacon", "triangle", "satellite" or "crowd".
    box: (x0, y0, x1, y1) in pixels.
    large: whether it is a triangle or a large beacon.
    label: category of a triangle; that of the other shapes depends on the beacon's kind. 0 if unset.
  """

  role: str
  box: tuple[float, float, float, float]
  large: bool
  label: int = 0


def draw_example(
  image_id: int, size: int, seed: int, beacons: str = "color", kind: int | None = None
) -> dict:
  """Draws one image with its annotations, as a pure function of the arguments.

  Args:
    image_id: id of the image, at least 1 and unique in the data set.
    size: height and width of the image in pixels.
    seed: seed of the data set.
    beacons: what tells a beacon's kind: "color" or "shape".
    kind: `CIRCLE` or `SQUARE`; None to draw it. Nothing but the beacon and the categories of the
      satellites depends on it.

  Returns:
    A record in the form of `instances.features()`. Annotations have the field `question`: "same_level",
    "coarse" or "fine"; beacons and crowds do not.
  """
  rng = np.random.default_rng((seed, image_id))
  shapes = _place(rng, size)
  # from here on, every kind and colour takes the same number of draws
  drawn, other = (int(k) for k in rng.integers(CIRCLE, SQUARE + 1, 2))
  kind = drawn if kind is None else kind
  color = kind if beacons == "color" else other
  image_HW3 = _background(rng, size)
  masks: list[np.ndarray] = []
  for shape in shapes:
    coverage_HW = _coverage(shape, kind, size, rng)
    color_HW3 = _texture(shape, color, coverage_HW, rng)
    image_HW3 += coverage_HW[..., None] * (color_HW3 - image_HW3)
    mask_HW = coverage_HW >= 0.5
    masks = [below_HW & ~mask_HW for below_HW in masks] + [mask_HW]
  image_HW3 += 6 * rng.standard_normal(image_HW3.shape, np.float32)
  jpeg = io.BytesIO()
  PIL.Image.fromarray(np.clip(image_HW3, 0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=95)

  (beacon,) = (shape for shape in shapes if shape.role == "beacon")
  labels = {"beacon": kind, "satellite": OF_CIRCLE + kind - CIRCLE}
  labels["crowd"] = labels["satellite"]
  questions = {"satellite": "coarse" if beacon.large else "same_level", "triangle": "fine"}
  objects = []
  for i, (shape, mask_HW) in enumerate(zip(shapes, masks, strict=True)):
    rle = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    x, y, w, h = map(float, coco_mask.toBbox(rle))
    box = (x, y, x + w, y + h)
    question = questions.get(shape.role)
    objects.append(
      instances.encode_object(
        label=shape.label or labels[shape.role],
        annotation_id=image_id * 100 + i,
        is_crowd=shape.role == "crowd",
        box=box,
        bbox_xywh=[x, y, w, h],
        area=float(mask_HW.sum()),
        segmentation=segmentation,
        bitmap_mm=instances.draw_bitmap(segmentation, box, (size, size)),
        extra={"question": question} if question else None,
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


def _place(rng: np.random.Generator, size: int) -> list[_Shape]:
  """Returns the layout of an image, from bottom to top, without regard to the beacon's kind.

  Positions that do not fit are drawn again, after some failures all of them, and after more the sizes
  and counts as well. Whether the beacon is large is drawn once, so that half of all beacons are.
  """
  large_beacon = bool(rng.integers(2))
  while True:
    # larger shapes first: they are the hardest to place
    wanted = [("beacon", _LARGE if large_beacon else _SMALL, large_beacon, 0)]
    for _ in range(rng.integers(0, 3)):
      wanted.append(("triangle", _TRIANGLE, True, int(rng.integers(STRIPED, CHECKED + 1))))
    if rng.random() < 0.15:
      wanted.append(("crowd", _CLUSTER, False, 0))
    wanted += [("satellite", _SMALL, False, 0)] * int(rng.integers(4, 7))
    sides = [size * rng.uniform(*sides) for _, sides, _, _ in wanted]
    for _ in range(50):
      shapes: list[_Shape] = []
      for (role, _, large, label), side in zip(wanted, sides, strict=True):
        for _ in range(50):
          x0, y0 = map(float, rng.uniform(1, size - 1 - side, 2))
          shape = _Shape(role, (x0, y0, x0 + side, y0 + side), large, label)
          if all(_compatible(shape, other, size) for other in shapes):
            shapes.append(shape)
            break
        else:
          break
      if len(shapes) == len(wanted):
        large_ones = [shape for shape in shapes if shape.large]
        order = rng.permutation(len(large_ones))
        return [large_ones[i] for i in order] + [shape for shape in shapes if not shape.large]


def _compatible(a: _Shape, b: _Shape, size: int) -> bool:
  """Whether two shapes fit: large ones may overlap a little, satellites are far from the beacon."""
  (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
  gap = max(ax0 - bx1, bx0 - ax1, ay0 - by1, by0 - ay1) / size
  roles = {a.role, b.role}
  if "beacon" in roles and roles & {"satellite", "crowd"}:
    return gap > _FAR
  return gap > (-0.05 if a.large and b.large else 0.02)


def _coverage(shape: _Shape, kind: int, size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns the fraction of each pixel that the shape covers, float32 [H, W].

  Args:
    shape: shape to draw.
    kind: kind of a beacon, `CIRCLE` or `SQUARE`.
    size: height and width of the image in pixels.
    rng: source of a triangle's apex and a crowd's places.
  """
  canvas = PIL.Image.new("L", (size * _OVERSAMPLING,) * 2)
  draw = PIL.ImageDraw.Draw(canvas)
  x0, y0, x1, y1 = (v * _OVERSAMPLING for v in shape.box)
  side = x1 - x0
  if shape.role == "beacon" and kind == SQUARE:
    draw.rectangle((x0, y0, x1, y1), fill=255)
  elif shape.role in ("beacon", "satellite"):
    draw.ellipse((x0, y0, x1, y1), fill=255)
  elif shape.role == "triangle":
    apex_x, apex_y = x0 + rng.uniform(0.3, 0.7) * side, y0 + 0.25 * side
    draw.polygon(((apex_x, apex_y), (x1, y1), (x0, y1)), fill=255)
    half = max(2.0, rng.uniform(2, 3) * size / 128) * _OVERSAMPLING / 2
    # the mast starts inside the triangle, where the tip is as wide as the mast
    draw.rectangle((apex_x - half, y0, apex_x + half, apex_y + 0.1 * side), fill=255)
  else:
    cell, disc = side / 4, 0.8 * side / 4
    for place in rng.permutation(16)[: rng.integers(6, 11)]:
      dx, dy = rng.uniform(0, cell - disc, 2)
      x, y = x0 + place % 4 * cell + dx, y0 + place // 4 * cell + dy
      draw.ellipse((x, y, x + disc, y + disc), fill=255)
  return np.asarray(canvas.reduce(_OVERSAMPLING), np.float32) / 255


def _texture(
  shape: _Shape, color: int, coverage_HW: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Returns the shape's colours, float32 RGB that broadcasts to [H, W, 3].

  Args:
    shape: shape to draw.
    color: kind whose colour a beacon has: `CIRCLE` for reddish, `SQUARE` for bluish.
    coverage_HW: fraction of each pixel that the shape covers.
    rng: source of colours and phases.
  """
  if shape.role == "triangle":
    return _waves(shape.label, len(coverage_HW), rng)
  if shape.role != "beacon":
    return np.full(3, rng.uniform(170, 215), np.float32)
  red_3 = rng.uniform([190, 40, 40], [240, 80, 80])
  blue_3 = rng.uniform([40, 60, 190], [80, 100, 240])
  colors_23 = np.stack([red_3, blue_3] if color == CIRCLE else [blue_3, red_3]).astype(np.float32)
  if not shape.large:
    return colors_23[0]
  return colors_23[_misleading(shape, coverage_HW, rng).astype(int)]


def _misleading(shape: _Shape, coverage_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Chooses cells that have the other kind's colour; returns where they are, bool [H, W]."""
  size = len(coverage_HW)
  cells = math.ceil((shape.box[2] - shape.box[0]) * 16 / size)
  x_W, y_H = (
    np.clip(((np.arange(size) + 0.5 - start) * 16 / size).astype(int), 0, cells - 1)
    for start in shape.box[:2]
  )
  cell_HW = y_H[:, None] * cells + x_W
  share_C = np.bincount(cell_HW.ravel(), coverage_HW.ravel(), cells**2) / coverage_HW.sum()
  order_C = rng.permutation(cells**2)
  # cells at the border count by the part of them that is covered
  count = np.abs(np.cumsum(share_C[order_C]) - _MISLEADING).argmin() + 1
  return np.isin(cell_HW, order_C[:count])


def _waves(label: int, size: int, rng: np.random.Generator) -> np.ndarray:
  """Returns greenish upright stripes or checks of equal mean and contrast, float32 RGB [H, W, 3]."""
  mean_3, amplitude = rng.uniform([65, 120, 65], [95, 150, 95]), rng.uniform(50, 60)
  angle = rng.uniform(-math.pi / 12, math.pi / 12)
  phase, other_phase = rng.uniform(0, 2 * math.pi, 2)
  steps = np.arange(size) * (math.pi / max(size / 36, 2))  # half a period per cell
  across_HW = steps * math.cos(angle) + steps[:, None] * math.sin(angle)
  along_HW = steps[:, None] * math.cos(angle) - steps * math.sin(angle)
  if label == STRIPED:
    wave_HW = np.sin(across_HW + phase) / math.sqrt(2)  # the variance of a product of two waves
  else:
    wave_HW = np.sin(across_HW + phase) * np.sin(along_HW + other_phase)
  return (mean_3 + amplitude * wave_HW[..., None]).astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
  """Returns float32 RGB [H, W, 3]: a gradient between the dark greys of the four corners, with one tint."""
  corners_223 = (rng.uniform(40, 100, (2, 2, 1)) + rng.uniform(-8, 8, 3)).astype(np.float32)
  t = np.linspace(0, 1, size, dtype=np.float32)
  weights_2S = np.stack([1 - t, t])
  return np.einsum("yxc,yh,xw->hwc", corners_223, weights_2S, weights_2S)
