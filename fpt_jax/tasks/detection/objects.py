"""The objects of training images: cut by crops, and pasted into other images (Ghiasi et al. 2021).

Shapes: G objects, H W rows and columns of an image file, h w those of a window, m side of a bitmap in pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fpt_jax.data import crops, transforms
from fpt_jax.data.crops import Crop
from fpt_jax.data.records import instances
from fpt_jax.ops import masks


class Objects(NamedTuple):
  """Objects in a window of a resized image.

  Attributes:
    boxes_G4: float32 (x0, y0, x1, y1) in pixels of the window.
    labels_G: int32 in 1..num_classes.
    bitmaps_Gmm: uint8 0 or 1, relative to the boxes; [0, m, m] if they are not needed.
    annotations_G: index of each object in its record.
  """

  boxes_G4: np.ndarray
  labels_G: np.ndarray
  bitmaps_Gmm: np.ndarray
  annotations_G: np.ndarray

  def take(self, indices: np.ndarray) -> "Objects":
    """Returns some of the objects."""
    bitmaps_Gmm = self.bitmaps_Gmm[indices] if len(self.bitmaps_Gmm) else self.bitmaps_Gmm
    return Objects(
      self.boxes_G4[indices], self.labels_G[indices], bitmaps_Gmm, self.annotations_G[indices]
    )


def trainable(record: instances.Record) -> np.ndarray:
  """Returns the indices of a record's objects that can be trained on: no crowds and no empty boxes."""
  x0_G, y0_G, x1_G, y1_G = record.boxes.T
  return np.flatnonzero(~record.crowd & ((x1_G - x0_G) * (y1_G - y0_G) > 0))


def objects_in(record: instances.Record, crop: Crop, with_bitmaps: bool) -> Objects:
  """Returns the objects of a record that lie in a window, without crowds.

  An object that is cut by the window keeps what is visible of it: the box of the visible part of its mask,
  inside its old box.

  Args:
    record: the record.
    crop: the window.
    with_bitmaps: whether to unpack the masks; a window that cuts the image needs them.
  """
  annotations_G = trainable(record)
  boxes_G4 = record.boxes[annotations_G]
  bitmaps = [record.bitmaps[i] for i in annotations_G if with_bitmaps]
  bitmaps_Gmm = instances.unpack_bitmaps(bitmaps)
  if crop.mirrored:
    boxes_G4, bitmaps_Gmm = transforms.flip_objects(record.size[1], boxes_G4, bitmaps_Gmm)
  boxes_G4 = transforms.scale_boxes(boxes_G4, record.size, crop.size)
  found = Objects(boxes_G4, record.labels[annotations_G], bitmaps_Gmm, annotations_G)
  if crop == crops.whole(crop.size, crop.mirrored):
    return found
  return _cut(found, record, crop)


def _cut(objects: Objects, record: instances.Record, crop: Crop) -> Objects:
  """Returns objects of the whole image as they are in a window."""
  (top, left), (height, width) = crop.offset, crop.valid
  boxes_G4 = objects.boxes_G4 - np.array([left, top, left, top], np.float32)
  inside_G4 = np.clip(boxes_G4, 0, np.array([width, height, width, height], np.float32))
  is_cut_G = (boxes_G4 != inside_G4).any(axis=1)

  def visible_pixels(g: int) -> np.ndarray | None:
    return mask_in(record, objects.annotations_G[g], crop) if is_cut_G[g] else None

  return _visible(objects._replace(boxes_G4=inside_G4), visible_pixels)


def _visible(objects: Objects, visible_pixels: Callable[[int], np.ndarray | None]) -> Objects:
  """Returns what is visible of objects.

  Args:
    objects: the objects.
    visible_pixels: function from the index of an object to its visible pixels in the window, bool; None if it
      is as it was.
  """
  boxes_G4, bitmaps_Gmm, kept = objects.boxes_G4.copy(), objects.bitmaps_Gmm.copy(), []
  for g, box_4 in enumerate(objects.boxes_G4):
    pixels_hw = visible_pixels(g)
    if pixels_hw is not None:
      visible = visible_part(pixels_hw, box_4)
      if visible is None:
        continue
      boxes_G4[g], bitmaps_Gmm[g] = visible
    kept.append(g)
  return objects._replace(boxes_G4=boxes_G4, bitmaps_Gmm=bitmaps_Gmm).take(np.array(kept, int))


def mask_in(record: instances.Record, annotation: int, crop: Crop) -> np.ndarray:
  """Draws an object's mask in a window.

  Args:
    record: the record.
    annotation: index of the object in the record.
    crop: the window.

  Returns:
    bool [h, w], of the size `crop.valid`.
  """
  segmentation = instances.decode_annotation(record.annotations[annotation])["segmentation"]
  if not isinstance(segmentation, list):
    return crops.cut_label(masks.rasterize(segmentation, *record.size), crop)
  height, width = record.size
  ratio_2 = np.array([crop.size[1] / width, crop.size[0] / height])
  offset_2 = np.array(crop.offset[::-1])
  polygons = []
  for polygon in segmentation:
    points_P2 = np.reshape(np.float64(polygon), (-1, 2))
    if crop.mirrored:
      points_P2 = np.array([width, 0]) + points_P2 * np.array([-1, 1])
    polygons.append((points_P2 * ratio_2 - offset_2).ravel().tolist())
  return masks.rasterize(polygons, *crop.valid)


def visible_part(mask_hw: np.ndarray, box_4: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns the box and the bitmap [m, m] of what is visible of an object; None if nothing is.

  Args:
    mask_hw: the object's visible pixels, bool.
    box_4: the object's box, which the new one lies in.
  """
  bounds = masks.bounds(mask_hw)
  if bounds is None:
    return None
  low_2, high_2 = np.maximum(box_4[:2], bounds[:2]), np.minimum(box_4[2:], bounds[2:])
  if (low_2 >= high_2).any():
    return None
  visible_4 = np.concatenate([low_2, high_2]).astype(np.float32)
  height, width = mask_hw.shape
  bitmap_mm = masks.box_bitmap(mask_hw, visible_4, height, width, instances.BITMAP)
  return (visible_4, bitmap_mm) if bitmap_mm.any() else None


def behind(
  objects: Objects, record: instances.Record, crop: Crop, pasted_hw: np.ndarray
) -> Objects:
  """Returns what is visible of the objects in a window behind pasted pixels.

  Args:
    objects: the objects, see `objects_in`.
    record: their record.
    crop: the window.
    pasted_hw: bool, the pixels that are pasted, with the same top left corner as the window.
  """
  over_hw = np.zeros(crop.valid, bool)
  part_hw = pasted_hw[: crop.valid[0], : crop.valid[1]]
  over_hw[: part_hw.shape[0], : part_hw.shape[1]] = part_hw

  def visible_pixels(g: int) -> np.ndarray | None:
    x0, y0, x1, y1 = objects.boxes_G4[g]
    if not over_hw[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].any():
      return None
    mask_hw = mask_in(record, objects.annotations_G[g], crop)
    return mask_hw & ~over_hw if (mask_hw & over_hw).any() else None

  return _visible(objects, visible_pixels)


def union(objects: Objects, record: instances.Record, crop: Crop) -> np.ndarray:
  """Returns the pixels of objects in a window, bool [h, w], of the size `crop.valid`."""
  union_hw = np.zeros(crop.valid, bool)
  for annotation in objects.annotations_G:
    union_hw |= mask_in(record, annotation, crop)
  return union_hw


def joined(*parts: Objects) -> Objects:
  """Returns the objects of several images together."""
  return Objects(*(np.concatenate(values) for values in zip(*parts, strict=True)))
