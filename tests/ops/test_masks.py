import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fpt_jax.ops import masks

from ..conftest import GOLDEN

mask_targets = jax.jit(masks.mask_targets, static_argnums=(4, 5))


def test_rasterize_takes_every_form_of_segmentation():
  rectangle = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]
  square = [7.0, 5.0, 9.0, 5.0, 9.0, 7.0, 7.0, 7.0]
  expected = np.zeros((8, 10), bool)
  expected[1:4, 2:6] = True
  expected[5:7, 7:9] = True
  columns = expected.T.ravel()
  lengths = [len(list(run)) for _, run in itertools.groupby(columns)]
  assert not columns[0]
  forms = [
    [rectangle, square],
    {"size": [8, 10], "counts": lengths},
    masks.encode_rle(expected),
    coco_mask.encode(np.asfortranarray(expected, np.uint8)),
    expected.astype(np.uint8),
  ]
  for form in forms:
    drawn = masks.rasterize(form, 8, 10)
    assert drawn.dtype == bool
    np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize(
  ("segmentation", "quoted"),
  [
    ([], r"\[\]"),
    ([[1.0, 2.0, 3.0, 4.0]], "4.0"),
    ([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], "7.0"),
    ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "1.0"),
    ({"size": [10, 8], "counts": [80]}, r"\[10, 8\]"),
    ({"size": [8, 10]}, "size"),
    ({"size": [8, 10], "counts": [79]}, "79"),
    (np.zeros((10, 8)), r"\(10, 8\)"),
    (None, "None"),
  ],
)
def test_rasterize_quotes_what_it_cannot_draw(segmentation, quoted):
  with pytest.raises(ValueError, match=quoted):
    masks.rasterize(segmentation, 8, 10)


def test_run_lengths_equal_those_of_the_pixels(rng):
  for _ in range(200):
    height, width = (int(n) for n in rng.integers(1, 60, 2))
    mask_HW = rng.random((height, width)) < rng.choice([0, 0.01, 0.5, 1])
    column = np.concatenate([[False], mask_HW.T.ravel(), [not mask_HW[-1, -1]]])
    edges = np.flatnonzero(np.diff(column))
    expected = np.diff(edges, prepend=0).tolist()
    compressed = coco_mask.encode(np.asfortranarray(mask_HW, np.uint8))
    for counts in (compressed["counts"], compressed["counts"].decode(), expected):
      rle = {"size": [height, width], "counts": counts}
      assert masks.run_lengths(rle, height, width) == expected
      np.testing.assert_array_equal(masks.rasterize(rle, height, width), mask_HW)


def test_run_lengths_of_a_large_image():
  mask_HW = np.zeros((30_000, 3), np.uint8)
  mask_HW[[5, 29_999], [0, 2]] = 1
  assert masks.run_lengths(masks.encode_rle(mask_HW), 30_000, 3) == [5, 1, 89_993, 1]


@pytest.mark.parametrize("kind", [str, str.encode])
@pytest.mark.parametrize(
  ("counts", "message"),
  [
    ("", "add up to 0, not to 8 x 10 = 80"),
    ("5", "add up to 5, not to 8 x 10 = 80"),
    ("`2O", "from 0 to 8 x 10 = 80, got -1"),
    ("`", "end within a number"),
    ("P", "end within a number"),
    ("`2 ", "the character ' '"),
    ("`2\0", r"the character '\\x00'"),
    ("`2p", "the character 'p'"),
    ("o" * 10**5, "a number of more than 60 bits"),
    ("oooooo3", "from 0 to 8 x 10 = 80, got 4294967295"),
  ],
)
def test_compressed_runs_that_do_not_cover_the_image(kind, counts, message):
  with pytest.raises(ValueError, match=message):
    masks.rasterize({"size": [8, 10], "counts": kind(counts)}, 8, 10)


def test_box_bitmap_of_a_triangle_is_the_half_plane_below_the_diagonal():
  # 3.2 x 1.6 pixels of the image: a bitmap resampled from whole pixels would be blocks
  x0, y0, x1, y1 = 10.3, 20.7, 13.5, 22.3
  bitmap = masks.box_bitmap([[x0, y0, x1, y1, x0, y1]], np.array([x0, y0, x1, y1]), 40, 40)
  row, col = np.mgrid[:112, :112]
  assert bitmap.dtype == np.uint8
  clear = np.abs(row - col) > 1
  np.testing.assert_array_equal(bitmap[clear], (row > col)[clear])


def test_box_bitmap_crops_segmentations_beyond_the_box():
  polygon = [-20.0, 4.0, 30.0, 4.0, 30.0, 8.0, -20.0, 8.0]
  bitmap = masks.box_bitmap([polygon], np.array([0.0, 0.0, 16.0, 16.0]), 20, 20, size=16)
  expected = np.zeros((16, 16), np.uint8)
  expected[4:8] = 1
  np.testing.assert_array_equal(bitmap, expected)


def test_box_bitmap_of_pixels_enlarges_and_averages():
  image = np.zeros((12, 12), bool)
  image[2:4, 3:6] = [[1, 0, 1], [0, 1, 1]]
  enlarged = masks.box_bitmap(image, np.array([3.0, 2.0, 6.0, 4.0]), 12, 12, size=6)
  expected = np.kron(image[2:4, 3:6], np.ones((3, 2), np.uint8))
  np.testing.assert_array_equal(enlarged, expected)
  # cells of 3 x 2 pixels: covered by 1, 3, 0 of 6 pixels in the first row, 2, 0, 0 in the second
  image[:] = False
  image[0:4, 2:11] = [
    [0, 0, 1, 1, 1, 0, 0, 0, 0],
    [1, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, 0, 0, 0, 0, 0, 0, 0],
  ]
  box = np.array([2.0, 0.0, 11.0, 6.0])
  averaged = masks.box_bitmap(masks.encode_rle(image), box, 12, 12, size=3)
  np.testing.assert_array_equal(averaged, [[0, 0, 0], [0, 0, 0], [0, 0, 0]])
  image[1, 5] = True
  averaged = masks.box_bitmap(masks.encode_rle(image), box, 12, 12, size=3)
  np.testing.assert_array_equal(averaged, [[0, 1, 0], [0, 0, 0], [0, 0, 0]])


def test_box_bitmap_reaches_the_borders_of_the_image():
  bitmap = masks.box_bitmap(np.ones((7, 5), bool), np.array([0.0, 0.0, 5.0, 7.0]), 7, 5)
  assert bitmap.all()


@pytest.mark.parametrize("box", [[3.0, 3.0, 3.0, 5.0], [5.0, 3.0, 3.0, 5.0], [0.0, 0.0, 5.0]])
def test_box_bitmap_refuses_an_empty_box(box):
  with pytest.raises(ValueError, match="box"):
    masks.box_bitmap(np.ones((9, 9), bool), np.array(box), 9, 9)


def test_polygons_and_their_pixels_give_the_same_bitmap_of_real_objects(real_data):
  truth = json.loads((real_data / "coco/annotations/instances_val2017.json").read_text())
  sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
  overlaps = []
  for annotation in truth["annotations"]:
    x, y, w, h = annotation["bbox"]
    if isinstance(annotation["segmentation"], list) and min(w, h) > 60:
      size, box = sizes[annotation["image_id"]], np.array([x, y, x + w, y + h])
      drawn = masks.box_bitmap(annotation["segmentation"], box, *size)
      pixels = masks.rasterize(annotation["segmentation"], *size)
      resampled = masks.box_bitmap(pixels, box, *size)
      overlaps.append((drawn & resampled).sum() / (drawn | resampled).sum())
  assert len(overlaps) > 50
  assert np.mean(overlaps) > 0.975
  assert np.min(overlaps) > 0.85


def paste_as_torchvision(mask, box, height, width):
  """torchvision's steps: pad, expand, truncate, resize, crop; float32 where the box is truncated."""
  size = len(mask)
  padded = np.pad(mask.astype(np.float64), 1)
  x0, y0, x1, y1 = box.astype(np.float32)
  grow = np.float32((size + 2) / size)
  half_w, half_h = (x1 - x0) * np.float32(0.5) * grow, (y1 - y0) * np.float32(0.5) * grow
  mid_x, mid_y = (x0 + x1) * np.float32(0.5), (y0 + y1) * np.float32(0.5)
  left, top = int(mid_x - half_w), int(mid_y - half_h)
  right, bottom = int(mid_x + half_w), int(mid_y + half_h)
  out_w, out_h = max(right - left + 1, 1), max(bottom - top + 1, 1)
  resized = np.zeros((out_h, out_w))
  for i, j in np.ndindex(out_h, out_w):
    y = max((i + 0.5) * (size + 2) / out_h - 0.5, 0)
    x = max((j + 0.5) * (size + 2) / out_w - 0.5, 0)
    i0, j0 = int(y), int(x)
    i1, j1 = min(i0 + 1, size + 1), min(j0 + 1, size + 1)
    above = padded[i0, j0] * (1 - (x - j0)) + padded[i0, j1] * (x - j0)
    below = padded[i1, j0] * (1 - (x - j0)) + padded[i1, j1] * (x - j0)
    resized[i, j] = above * (1 - (y - i0)) + below * (y - i0)
  image = np.zeros((height, width))
  for i, j in np.ndindex(out_h, out_w):
    if 0 <= top + i < height and 0 <= left + j < width:
      image[top + i, left + j] = resized[i, j]
  return image


BOXES = np.array(
  [
    [3.2, 4.7, 17.9, 15.1],
    [-6.5, -3.2, 9.0, 11.3],
    [20.4, 14.2, 44.0, 31.0],
    [-9.0, -9.0, 60.0, 50.0],
    [7.6, 7.6, 7.7, 7.7],
    [5.0, 5.0, 5.0, 5.0],
    [-30.0, -30.0, -10.0, -10.0],
    [50.0, 3.0, 60.0, 9.0],
    [0.0, 0.0, 31.0, 23.0],
  ],
  np.float32,
)


@pytest.mark.parametrize("size", [7, 28])
def test_paste_equals_torchvisions_definition(rng, size):
  probabilities = rng.random((len(BOXES), size, size), np.float32)
  pasted = masks.paste(probabilities, BOXES, 23, 31)
  expected = [paste_as_torchvision(m, b, 23, 31) for m, b in zip(probabilities, BOXES, strict=True)]
  assert pasted.dtype == np.float32
  np.testing.assert_allclose(pasted, expected, atol=2e-6)


def paste_aligned(mask, box, height, width):
  size = len(mask)
  padded = np.pad(mask.astype(np.float64), 1)
  image = np.zeros((height, width))
  if box[2] > box[0] and box[3] > box[1]:
    for i, j in np.ndindex(height, width):
      y = (i + 0.5 - box[1]) / (box[3] - box[1]) * size + 0.5
      x = (j + 0.5 - box[0]) / (box[2] - box[0]) * size + 0.5
      i0, j0 = int(np.floor(y)), int(np.floor(x))
      if 0 <= i0 <= size and 0 <= j0 <= size:
        above = padded[i0, j0] * (1 - (x - j0)) + padded[i0, j0 + 1] * (x - j0)
        below = padded[i0 + 1, j0] * (1 - (x - j0)) + padded[i0 + 1, j0 + 1] * (x - j0)
        image[i, j] = above * (1 - (y - i0)) + below * (y - i0)
  return image


def test_aligned_paste_looks_up_the_centre_of_each_pixel(rng):
  probabilities = rng.random((len(BOXES), 7, 7), np.float32)
  pasted = masks.paste(probabilities, BOXES, 23, 31, aligned=True)
  boxes = BOXES.astype(np.float64)
  expected = [paste_aligned(m, b, 23, 31) for m, b in zip(probabilities, boxes, strict=True)]
  np.testing.assert_allclose(pasted, expected, atol=2e-5)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_paste_rle_is_paste_above_the_threshold(rng, aligned, threshold):
  probabilities = rng.random((len(BOXES), 7, 7), np.float32)
  pasted = masks.paste(probabilities, BOXES, 23, 31, aligned=aligned)
  for mask, box, image in zip(probabilities, BOXES, pasted, strict=True):
    rle = masks.paste_rle(mask, box, 23, 31, threshold, aligned)
    assert json.loads(json.dumps(rle)) == rle
    np.testing.assert_array_equal(masks.rasterize(rle, 23, 31), image > threshold)


def test_paste_refuses_masks_without_a_box_each():
  with pytest.raises(ValueError, match=r"\(3, 4\)"):
    masks.paste(np.zeros((2, 28, 28)), np.zeros((3, 4)), 10, 10)


@pytest.mark.parametrize("aligned", [False, True])
def test_targets_on_whole_images_equal_torchvisions_roi_align(aligned):
  golden = np.load(GOLDEN / "roi_align.npz")
  maps_Ghw = golden["features_HWC"].transpose(2, 0, 1)
  G, height, width = maps_Ghw.shape
  rois_R4 = golden["boxes_xyxy"] * np.float32(golden["spatial_scale"])
  frames_G4 = np.tile(np.float32([0, 0, width, height]), (G, 1))
  matched = np.repeat(np.arange(G), len(rois_R4))
  targets = mask_targets(maps_Ghw, frames_G4, np.tile(rois_R4, (G, 1)), matched, 7, aligned)
  expected = golden[f"out_RHWC_aligned{int(aligned)}_sampling0"].transpose(3, 0, 1, 2)
  np.testing.assert_allclose(targets.reshape(expected.shape), expected, atol=2e-5)


def bin_by_bin(bitmap, frame, roi, size, aligned):
  """RoIAlign sample by sample in float64; a sample outside the frame is zero."""
  h, w = bitmap.shape
  cell_w, cell_h = (frame[2] - frame[0]) / w, (frame[3] - frame[1]) / h
  shift = 0.0 if aligned else 0.5
  roi_w, roi_h = np.maximum(roi[2:] - roi[:2], 0 if aligned else 1)
  across, down = int(np.ceil(roi_w / size)), int(np.ceil(roi_h / size))
  out = np.zeros((size, size))
  for i, j, a, b in np.ndindex(size, size, down, across):
    y = (roi[1] + (i + (a + 0.5) / down) * roi_h / size + shift - frame[1]) / cell_h
    x = (roi[0] + (j + (b + 0.5) / across) * roi_w / size + shift - frame[0]) / cell_w
    # half a cell beyond the frame, or half a pixel if that is less
    margin_y, margin_x = 0.5 * min(1, 1 / cell_h), 0.5 * min(1, 1 / cell_w)
    if -margin_y <= y <= h + margin_y and -margin_x <= x <= w + margin_x:
      y, x = np.clip(y - 0.5, 0, h - 1), np.clip(x - 0.5, 0, w - 1)
      rows = np.maximum(1 - np.abs(y - np.arange(h)), 0)
      cols = np.maximum(1 - np.abs(x - np.arange(w)), 0)
      out[i, j] += rows @ bitmap @ cols / (down * across)
  return out


@pytest.mark.parametrize("aligned", [False, True])
def test_targets_on_box_bitmaps_equal_sampling_bin_by_bin(rng, aligned):
  bitmaps_Ghw = (rng.random((3, 9, 12)) > 0.5).astype(np.uint8)
  frames_G4 = np.float32([[10.2, 5.1, 14.9, 8.3], [40.3, 20.2, 75.1, 61.7], [3.3, 2.2, 15.4, 11.3]])
  rois_R4 = np.float32(
    [
      [10.2, 5.1, 14.9, 8.3],
      [8.13, 3.11, 13.37, 12.71],
      [38.07, 15.3, 90.11, 70.9],
      [45.9, 30.3, 50.7, 33.1],
      [4.1, 4.3, 4.2, 4.5],
      [100.0, 100.0, 120.0, 120.0],
    ]
  )
  matched_R = np.array([0, 0, 1, 1, 2, 2])
  targets = mask_targets(bitmaps_Ghw, frames_G4, rois_R4, matched_R, 4, aligned)
  expected = [
    bin_by_bin(bitmaps_Ghw[g], frames_G4[g].astype(np.float64), r.astype(np.float64), 4, aligned)
    for g, r in zip(matched_R, rois_R4, strict=True)
  ]
  np.testing.assert_allclose(targets, expected, atol=2e-4)
  assert np.asarray(targets)[5].max() == 0


def test_targets_from_a_box_bitmap_are_those_from_the_whole_image():
  polygon = [20.0, 10.0, 50.0, 16.0, 44.0, 40.0, 22.0, 34.0]
  box = np.float32([20, 10, 50, 40])
  whole = masks.rasterize([polygon], 64, 80)
  bitmap = masks.box_bitmap([polygon], box, 64, 80)
  rois_R4 = np.float32([[18, 9, 53, 41], [30, 20, 60, 60]])
  matched = np.zeros(2, np.int32)
  for aligned in (False, True):
    frame = np.float32([[0, 0, 80, 64]])
    expected = mask_targets(whole[None], frame, rois_R4, matched, 14, aligned)
    targets = mask_targets(bitmap[None], box[None], rois_R4, matched, 14, aligned)
    # they differ along the contour, where pixels are coarser than cells
    assert np.abs(targets - expected).mean() < 0.015
    assert np.asarray((targets > 0.5) == (expected > 0.5)).mean() > 0.98


def test_aligned_targets_pasted_back_give_the_object():
  polygon = [20.4, 10.7, 50.2, 16.0, 44.0, 40.1, 22.0, 34.0]
  box = np.float32([20.4, 10.7, 50.2, 40.1])
  bitmap = masks.box_bitmap([polygon], box, 64, 80)
  target = mask_targets(bitmap[None], box[None], box[None], np.zeros(1, int), 28, True)
  pasted = masks.paste(np.asarray(target), box[None], 64, 80, aligned=True)[0] > 0.5
  drawn = masks.rasterize([polygon], 64, 80)
  assert (pasted & drawn).sum() / (pasted | drawn).sum() > 0.97


def test_padded_ground_truths_give_finite_targets_and_no_gradient(rng):
  bitmaps_Ghw = np.zeros((2, 6, 6), np.uint8)
  frames_G4 = np.zeros((2, 4), np.float32)

  def loss(rois_R4, aligned):
    return mask_targets(
      jnp.asarray(bitmaps_Ghw), frames_G4, rois_R4, np.array([0, 1, 1]), 4, aligned
    ).sum()

  rois_R4 = jnp.asarray([[0.0, 0, 0, 0], [1, 1, 9, 9], [-5, -5, -5, 7]])
  for aligned in (False, True):
    value, gradient = jax.value_and_grad(loss)(rois_R4, aligned)
    assert float(value) == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize(
  ("bitmaps", "frames", "rois", "matched"),
  [
    ((2, 6), (2, 4), (3, 4), (3,)),
    ((2, 6, 6), (3, 4), (3, 4), (3,)),
    ((2, 6, 6), (2, 4), (3, 5), (3,)),
    ((2, 6, 6), (2, 4), (3, 4), (2,)),
  ],
)
def test_targets_refuse_wrong_shapes(bitmaps, frames, rois, matched):
  with pytest.raises(ValueError, match=r"expected .*, got \("):
    masks.mask_targets(
      np.zeros(bitmaps), np.zeros(frames), np.zeros(rois), np.zeros(matched, np.int32)
    )
