"""Resizing as torchvision does it; boxes and bitmaps move with the image."""

import numpy as np

from fpt_jax.data import transforms
from tests.conftest import GOLDEN


def test_resized_size_of_known_images():
  # torchvision's rule at the paper's 800/1000; 427 * 1000 / 640 = 667.19
  assert transforms.resized_size(480, 640, 800, 1000) == (750, 1000)
  assert transforms.resized_size(427, 640, 800, 1000) == (667, 1000)
  assert transforms.resized_size(640, 480, 800, 1333) == (1066, 800)
  assert transforms.resized_size(1, 5000, 800, 1000) == (1, 1000)


def test_resize_and_pad_equals_torchvision():
  golden = np.load(GOLDEN / "maskrcnn_resnet50_fpn.npz")
  batched_BHWC = golden["batched_BHWC"]
  mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
  for i, expected_HWC in enumerate(batched_BHWC):
    image_HWC = golden[f"image_HWC_{i}"]
    height, width = transforms.resized_size(*image_HWC.shape[:2], 160, 200)
    canvas = transforms.resize_and_pad(
      image_HWC * np.float32(255), (height, width), batched_BHWC.shape[1:3]
    ).numpy()
    assert canvas.dtype == np.float32
    normalized_HWC = (canvas[:height, :width].astype(float) / 255 - mean[None, None]) / std
    np.testing.assert_allclose(normalized_HWC, expected_HWC[:height, :width], atol=2e-5)
    assert not canvas[height:].any() and not canvas[:, width:].any()


def test_resize_of_a_hand_written_row():
  # half-pixel centres at 2x: -0.25, 0.25, 0.75, 1.25 between the pixels 0 and 100
  row = np.array([[[0], [100]]], np.uint8)
  canvas = transforms.resize_and_pad(row, (2, 4), (3, 5)).numpy()[..., 0]
  expected = [[0, 25, 75, 100, 0], [0, 25, 75, 100, 0], [0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(canvas, np.array(expected, np.float32))


def test_scale_boxes():
  boxes_G4 = np.array([[1, 2, 3, 4]], np.float32)
  np.testing.assert_array_equal(transforms.scale_boxes(boxes_G4, (10, 20), (5, 60)), [[3, 1, 9, 2]])


def test_flip_moves_boxes_and_bitmaps_together():
  boxes_G4 = np.array([[2, 1, 6, 3]], np.float32)
  bitmaps_Gmm = np.array([[[1, 1, 0, 0]] * 4], np.uint8)
  boxes_G4, bitmaps_Gmm = transforms.flip_objects(10, boxes_G4, bitmaps_Gmm)
  np.testing.assert_array_equal(boxes_G4, [[4, 1, 8, 3]])
  np.testing.assert_array_equal(bitmaps_Gmm[0], [[0, 0, 1, 1]] * 4)


def test_flip_without_instances():
  boxes_G4, bitmaps_Gmm = transforms.flip_objects(2, np.zeros((0, 4)), np.zeros((0, 112, 112)))
  assert boxes_G4.shape == (0, 4) and bitmaps_Gmm.shape == (0, 112, 112)


def test_augmentation_covers_its_range_and_is_a_pure_function():
  draws = [transforms.draw_augmentation(0, i, (30, 33)) for i in range(400)]
  assert draws == [transforms.draw_augmentation(0, i, (30, 33)) for i in range(400)]
  shorts, flips = zip(*draws, strict=True)
  assert set(shorts) == {30, 31, 32, 33}
  assert 150 < sum(flips) < 250
  assert draws != [transforms.draw_augmentation(1, i, (30, 33)) for i in range(400)]


def test_augmentation_never_changes():
  # Philox under SeedSequence((0, 0x5CA1E, i)); a resumed run must draw the same numbers
  sizes, flips = (30, 32, 31, 32, 32, 33), (True, False, False, True, True, False)
  expected = list(zip(sizes, flips, strict=True))
  assert [transforms.draw_augmentation(0, i, (30, 33)) for i in range(6)] == expected
  expected = [(40, flip) for flip in flips]
  assert [transforms.draw_augmentation(0, i, (40,)) for i in range(6)] == expected


def test_train_sizes_are_one_a_range_or_a_list():
  draw = transforms.draw_train_size
  assert {draw(bits, (30,)) for bits in range(9)} == {30}
  assert [draw(bits, (30, 33)) for bits in range(5)] == [30, 31, 32, 33, 30]
  assert draw(2**64 - 1, (30, 30)) == 30
  assert [draw(bits, (9, 30, 7)) for bits in range(4)] == [9, 30, 7, 9]
