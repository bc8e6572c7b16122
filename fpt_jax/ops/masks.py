"""Instance masks: COCO's segmentations, box-relative bitmaps, training targets, and pasting into images.

Shape suffixes: N boxes, R regions, G ground truths, H W rows and columns of the image, h w those of a
mask, m side of a square mask. All functions but `mask_targets` are NumPy on the host. Coordinates are
continuous: pixel j covers [j, j + 1].
"""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Segmentation = list | dict | np.ndarray  # polygons, RLE (compressed or not), or a bitmap [H, W]


# Corners of a polygon are clipped to this many box sides: pycocotools' memory grows with the outline.
_REACH = 100
_LONGEST_NUMBER = 60  # bits of a number in compressed run lengths


def _coco_mask():
  """pycocotools' functions on masks, imported here because models use this module without them."""
  from pycocotools import mask

  return mask


def rasterize(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
  """Draws a COCO segmentation as a bitmap of the whole image.

  Args:
    segmentation: polygons `[[x0, y0, x1, y1, ...], ...]` in pixels, which are united; an RLE
      `{"size": [height, width], "counts": list | str | bytes}`; or a bitmap [H, W].
    height: rows of the image.
    width: columns of the image.

  Returns:
    [H, W] bool.

  Raises:
    ValueError: the segmentation is none of the three, or has another size.
  """
  if isinstance(segmentation, np.ndarray):
    if segmentation.shape != (height, width):
      raise ValueError(f"expected a bitmap of {(height, width)}, got {segmentation.shape}")
    return segmentation.astype(bool)
  if isinstance(segmentation, dict):
    counts = run_lengths(segmentation, height, width)
    bits = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(bits.reshape(width, height).T)
  return _fill(_polygons(segmentation), height, width)


def run_lengths(rle: dict, height: int, width: int) -> list[int]:
  """Returns the run lengths of an RLE, checked.

  pycocotools does not check them: for runs that end early, it returns memory that was never written.

  Args:
    rle: `{"size": [height, width], "counts": list | str | bytes}`.
    height: rows of the image.
    width: columns of the image.

  Returns:
    Pixels of each run in column-major order: background, object, background, ...; together
    height * width.

  Raises:
    ValueError: the RLE has another size, or its counts are not run lengths of that many pixels.
  """
  size = rle.get("size")
  if not isinstance(size, list | tuple) or list(size) != [height, width] or "counts" not in rle:
    raise ValueError(
      f"expected an RLE with counts and size {[height, width]}, "
      f"got keys {sorted(map(str, rle))!s:.80} and size {reprlib.repr(size)}"
    )
  counts, pixels = rle["counts"], height * width
  if isinstance(counts, bytes):
    counts = counts.decode("latin-1")
  if isinstance(counts, str):
    counts = _decompressed(counts)
  elif not isinstance(counts, list):
    raise ValueError(f"RLE counts must be a list or a string, got {reprlib.repr(counts)}")
  for count in counts:
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not whole or not 0 <= count <= pixels:
      raise ValueError(
        f"RLE counts must be integers from 0 to {height} x {width} = {pixels}, "
        f"got {reprlib.repr(count)}"
      )
  if sum(counts) != pixels:
    raise ValueError(
      f"RLE counts add up to {sum(counts)}, not to {height} x {width} = {pixels} pixels"
    )
  return counts


def _decompressed(text: str) -> list[int]:
  """Returns the numbers of compressed run lengths; raises ValueError if the text does not hold any.

  A number has 5 bits per character from "0", lowest first, the last of them the sign; the sixth bit marks
  that more follow. From the fourth number on, it is the difference to the last but one.
  """
  counts: list[int] = []
  value = shift = 0
  for character in text:
    bits = ord(character) - 48
    if not 0 <= bits < 64:
      raise ValueError(
        f"RLE counts have the character {character!a}, which is not between '0' and 'o'"
      )
    value |= (bits & 31) << shift
    shift += 5
    if shift > _LONGEST_NUMBER:
      raise ValueError(f"RLE counts have a number of more than {_LONGEST_NUMBER} bits")
    if not bits & 32:
      if bits & 16:
        value -= 1 << shift
      counts.append(value + counts[-2] if len(counts) > 2 else value)
      value = shift = 0
  if shift:
    raise ValueError("RLE counts end within a number")
  return counts


def _polygons(segmentation: list) -> list[np.ndarray]:
  """Returns polygons as float64 [points, 2]; raises ValueError if they are malformed."""
  if not isinstance(segmentation, list) or not segmentation:
    raise ValueError(f"expected polygons, an RLE or a bitmap, got {segmentation!r:.80}")
  for polygon in segmentation:
    if not isinstance(polygon, list | tuple | np.ndarray) or len(polygon) < 6 or len(polygon) % 2:
      raise ValueError(f"expected a polygon of 6 or more numbers x0, y0, ..., got {polygon!r:.80}")
  return [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation]


def _fill(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
  """[H, W] bool: the union of polygons [points, 2]."""
  rles = _coco_mask().frPyObjects([p.ravel().tolist() for p in polygons], height, width)
  return _coco_mask().decode(_coco_mask().merge(rles)).astype(bool)


def box_bitmap(
  segmentation: Segmentation, box_xyxy: np.ndarray, height: int, width: int, size: int = 112
) -> np.ndarray:
  """Draws a COCO segmentation as a bitmap of its box.

  Polygons are scaled to the box before they are drawn, so the pixel grid of the image does not limit the
  detail of small objects. For an RLE or a bitmap, a cell is set if at least half of its area is covered.

  Args:
    segmentation: as for `rasterize`.
    box_xyxy: [4] box in pixels of the image, of positive width and height.
    height: rows of the image.
    width: columns of the image.
    size: rows and columns of the result.

  Returns:
    [size, size] uint8, 0 or 1.

  Raises:
    ValueError: as for `rasterize`, or the box is empty.
  """
  box = np.asarray(box_xyxy, np.float64)
  if box.shape != (4,) or not (box[2] > box[0] and box[3] > box[1]):
    raise ValueError(f"expected a box with x0 < x1 and y0 < y1, got {box_xyxy!r}")
  if isinstance(segmentation, list):
    scale = size / (box[2:] - box[:2])
    scaled = [
      np.clip((polygon - box[:2]) * scale, -_REACH * size, _REACH * size)
      for polygon in _polygons(segmentation)
    ]
    return _fill(scaled, size, size).astype(np.uint8)
  left, top = np.maximum(np.floor(box[:2]), 0).astype(int)
  right, bottom = np.maximum(np.ceil(box[2:]), 0).astype(int)
  crop_hw = rasterize(segmentation, height, width)[top:bottom, left:right].astype(np.float32)
  cover_mh = _cover(box[1] - top, box[3] - top, crop_hw.shape[0], size)
  cover_mw = _cover(box[0] - left, box[2] - left, crop_hw.shape[1], size)
  return (cover_mh @ crop_hw @ cover_mw.T >= 0.5).astype(np.uint8)


def _cover(start: float, stop: float, pixels: int, cells: int) -> np.ndarray:
  """[cells, pixels]: the share of each cell of [start, stop] that each pixel covers."""
  edges = np.linspace(start, stop, cells + 1)
  pixel = np.arange(pixels)
  overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
  return (np.maximum(overlap, 0) * cells / (stop - start)).astype(np.float32)


def bounds(mask_HW: np.ndarray) -> tuple[int, int, int, int] | None:
  """Returns the smallest box (x0, y0, x1, y1) around the pixels of a bitmap [H, W]; None without any."""
  rows, columns = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
  if not len(rows):
    return None
  return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def encode_rle(mask_HW: np.ndarray) -> dict[str, Any]:
  """Compresses a bitmap [H, W] to COCO's RLE, with `counts` as a string for JSON."""
  rle = _coco_mask().encode(np.asfortranarray(mask_HW, dtype=np.uint8))
  return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def paste(
  masks_Nmm: np.ndarray, boxes_N4: np.ndarray, height: int, width: int, aligned: bool = False
) -> np.ndarray:
  """Pastes box-relative mask probabilities into images of zeros, one per detection.

  Args:
    masks_Nmm: [N, m, m] float probabilities.
    boxes_N4: [N, 4] boxes (x0, y0, x1, y1) in pixels of the image; may extend beyond it.
    height: rows of the image.
    width: columns of the image.
    aligned: True to look up each pixel's centre in the box as it is, the inverse of
      `mask_targets(..., aligned=True)`. False for torchvision's `paste_masks_in_image`, which first adds a
      border of zeros and truncates the box to whole pixels, and is less exact for small objects.

  Returns:
    [N, H, W] float32.

  Raises:
    ValueError: the shapes are not as described.
  """
  masks_Nmm, boxes_N4 = np.asarray(masks_Nmm), np.asarray(boxes_N4)
  if masks_Nmm.ndim != 3 or boxes_N4.shape != (len(masks_Nmm), 4):
    raise ValueError(f"expected [N, m, m] and [N, 4], got {masks_Nmm.shape}, {boxes_N4.shape}")
  images_NHW = np.zeros((len(masks_Nmm), height, width), np.float32)
  for image_HW, mask_mm, box in zip(images_NHW, masks_Nmm, boxes_N4, strict=True):
    crop, rows, cols = _paste_crop(mask_mm, box, height, width, aligned)
    image_HW[rows, cols] = crop
  return images_NHW


def paste_rle(
  mask_mm: np.ndarray,
  box_xyxy: np.ndarray,
  height: int,
  width: int,
  threshold: float = 0.5,
  aligned: bool = False,
) -> dict[str, Any]:
  """Pastes one mask as `paste` does, and returns the pixels above a threshold as COCO's RLE.

  Args:
    mask_mm: [m, m] float probabilities.
    box_xyxy: [4] box in pixels of the image; may extend beyond it.
    height: rows of the image.
    width: columns of the image.
    threshold: probability above which a pixel belongs to the object.
    aligned: as for `paste`.

  Returns:
    `{"size": [height, width], "counts": str}`.
  """
  mask_mm, box_xyxy = np.asarray(mask_mm), np.asarray(box_xyxy)
  crop, rows, cols = _paste_crop(mask_mm, box_xyxy, height, width, aligned)
  bitmap_HW = np.zeros((height, width), np.uint8, order="F")
  bitmap_HW[rows, cols] = crop > threshold
  return encode_rle(bitmap_HW)


def _paste_crop(
  mask_mm: np.ndarray, box: np.ndarray, height: int, width: int, aligned: bool
) -> tuple[np.ndarray, slice, slice]:
  """Returns the part of the pasted mask on the image, and its rows and columns."""
  look_up = _look_up_aligned if aligned else _look_up_truncated
  x0, y0, x1, y1 = box.astype(np.float32)
  y, rows = look_up(y0, y1, height, mask_mm.shape[0])
  x, cols = look_up(x0, x1, width, mask_mm.shape[1])
  bordered = np.pad(mask_mm.astype(np.float32), 1)
  return _interpolate(_interpolate(bordered, y).T, x).T, rows, cols


def _look_up_aligned(
  low: np.float32, high: np.float32, pixels: int, cells: int
) -> tuple[np.ndarray, slice]:
  """Returns the positions of the pixels near [low, high] among its cells with a border, and the pixels."""
  cell = (high - low) / cells
  if not cell > 0:
    return np.zeros(0, np.float32), slice(0, 0)
  visible, span = _visible(np.floor(low - cell), np.ceil(high + cell), pixels)
  return np.clip((visible + 0.5 - low) / cell + 0.5, 0, cells + 1), span


def _look_up_truncated(
  low: np.float32, high: np.float32, pixels: int, cells: int
) -> tuple[np.ndarray, slice]:
  """As `_look_up_aligned`, for [low, high] with the border, truncated to whole pixels."""
  # All float32: the truncation must give the same pixel as torchvision's.
  half = (high - low) * np.float32(0.5) * np.float32((cells + 2) / cells)
  centre = (high + low) * np.float32(0.5)
  first, last = np.trunc(centre - half), np.trunc(centre + half)
  length = max(last - first + 1, 1)
  visible, span = _visible(first, last + 1, pixels)
  source = (visible - first + np.float32(0.5)) * np.float32((cells + 2) / length) - np.float32(0.5)
  return np.clip(source, 0, cells + 1), span


def _visible(first: float, stop: float, pixels: int) -> tuple[np.ndarray, slice]:
  """Returns the pixels first..stop - 1 on the image, as numbers and as a slice."""
  first, stop = (int(np.clip(position, 0, pixels)) for position in (first, stop))
  return np.arange(first, stop, dtype=np.float32), slice(first, stop)


def _interpolate(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Interpolates linearly between the rows of a matrix."""
  # Two taps instead of a matrix product: at this size, the threads of BLAS cost more than the work.
  above = np.minimum(rows.astype(np.int64), len(values) - 2)
  fraction = (rows - above).astype(np.float32)[:, None]
  return values[above] * (1 - fraction) + values[above + 1] * fraction


def mask_targets(
  masks_Ghw: jax.Array,
  mask_boxes_G4: jax.Array,
  rois_R4: jax.Array,
  matched_R: jax.Array,
  size: int = 28,
  aligned: bool = False,
) -> jax.Array:
  """Crops the target of the mask head for each RoI from the bitmap of its ground truth.

  RoIAlign with ceil(RoI / size) samples per bin, as for the targets of torchvision's Mask R-CNN. For
  bitmaps of the whole canvas, `mask_boxes_G4` = (0, 0, w, h), the result is the same. For box-relative
  bitmaps, it samples the same points of the canvas, with zeros outside the box.

  Args:
    masks_Ghw: [G, h, w] bitmaps of any dtype.
    mask_boxes_G4: [G, 4] the part of the canvas that each bitmap covers, pixels.
    rois_R4: [R, 4] float32, pixels of the canvas.
    matched_R: [R] int, the ground truth of each RoI.
    size: rows and columns of a target.
    aligned: False for torchvision's targets, which are shifted by half a pixel up and to the left; True
      for targets at the object's position.

  Returns:
    [R, size, size] float32 between 0 and 1, without a gradient.

  Raises:
    ValueError: the shapes are not as described.
  """
  if masks_Ghw.ndim != 3 or mask_boxes_G4.shape != (masks_Ghw.shape[0], 4):
    raise ValueError(f"expected [G, h, w], [G, 4], got {masks_Ghw.shape}, {mask_boxes_G4.shape}")
  if rois_R4.ndim != 2 or rois_R4.shape[1] != 4 or matched_R.shape != rois_R4.shape[:1]:
    raise ValueError(f"expected [R, 4] and [R], got {rois_R4.shape} and {matched_R.shape}")
  rois_R4 = jax.lax.stop_gradient(rois_R4.astype(jnp.float32))
  frames_R4 = mask_boxes_G4.astype(jnp.float32)[matched_R]
  rows_Rsh = _target_matrix(rois_R4[:, 1::2], frames_R4[:, 1::2], size, masks_Ghw.shape[1], aligned)
  cols_Rsw = _target_matrix(rois_R4[:, 0::2], frames_R4[:, 0::2], size, masks_Ghw.shape[2], aligned)
  masks_Rhw = masks_Ghw[matched_R].astype(jnp.float32)
  exact = jax.lax.Precision.HIGHEST
  rows_Rsw = jnp.einsum("Rsh,Rhw->Rsw", rows_Rsh, masks_Rhw, precision=exact)
  return jnp.einsum("Rsw,Rtw->Rst", rows_Rsw, cols_Rsw, precision=exact)


def _target_matrix(
  rois_R2: jax.Array, frames_R2: jax.Array, size: int, cells: int, aligned: bool
) -> jax.Array:
  """RoIAlign along one axis: the mean weight [R, size, cells] of each cell in each bin.

  The samples of a bin form an arithmetic progression, and the weight of a cell rises and falls linearly
  over one cell on either side. So the sum over the samples on each slope is their number times the weight
  of their mean: there is no loop over samples and no static bound on their number.
  """
  start_R11, stop_R11 = rois_R2[:, :1, None], rois_R2[:, 1:, None]
  low_R11, high_R11 = frames_R2[:, :1, None], frames_R2[:, 1:, None]
  # Padded ground truths have empty boxes: their targets are not used, but must be finite.
  extent_R11 = jnp.where(high_R11 > low_R11, high_R11 - low_R11, 1.0)
  scale_R11 = cells / extent_R11
  # If not aligned, a RoI is at least one pixel long; if aligned, it must not be empty.
  length_R11 = jnp.maximum(stop_R11 - start_R11, 1e-3 if aligned else 1.0)
  count_R11 = jnp.ceil(length_R11 / size)
  step_R11 = length_R11 / size / count_R11
  bin_1s1 = jnp.arange(size, dtype=jnp.float32)[None, :, None]
  cell_11c = jnp.arange(cells, dtype=jnp.float32)[None, None, :]
  point_Rs1 = start_R11 + bin_1s1 * (length_R11 / size) + 0.5 * step_R11
  # If not aligned, RoIAlign places pixel j at j, although its centre is at j + 0.5.
  point_Rs1 = (point_Rs1 + (0.0 if aligned else 0.5) - low_R11) * scale_R11 - 0.5
  step_R11 = step_R11 * scale_R11
  # RoIAlign repeats the border for half a pixel; for cells smaller than a pixel, half a cell is enough.
  margin_R11 = 0.5 * jnp.minimum(scale_R11, 1.0)
  first_11c, last_11c = cell_11c == 0, cell_11c == cells - 1
  left_R1c = jnp.where(first_11c, -0.5 - margin_R11, cell_11c - 1)
  right_R1c = jnp.where(last_11c, cells - 0.5 + margin_R11, cell_11c + 1)

  def samples_below(position):
    return jnp.clip(jnp.ceil((position - point_Rs1) / step_R11), 0, count_R11)

  def mean_distance(begin, end):
    return point_Rs1 + step_R11 * (begin + end - 1) / 2 - cell_11c

  begin, middle, end = samples_below(left_R1c), samples_below(cell_11c), samples_below(right_R1c)
  rising = jnp.where(first_11c, 1.0, 1.0 + mean_distance(begin, middle))
  falling = jnp.where(last_11c, 1.0, 1.0 - mean_distance(middle, end))
  return ((middle - begin) * rising + (end - middle) * falling) / count_R11
