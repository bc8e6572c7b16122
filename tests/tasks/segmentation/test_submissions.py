"""Files for evaluation servers have the right numbers and names, and the data set's reader reads them."""

import numpy as np
import PIL.Image
import pytest

from fpt_jax.data.datasets import ade20k, cityscapes
from fpt_jax.data.records import label_map
from fpt_jax.tasks.segmentation import submissions


def test_cityscapes_gets_label_ids(rng, tmp_path):
  label_HW = rng.integers(0, 19, (5, 8))
  file = submissions.write(
    "cityscapes", tmp_path / "new", "frankfurt_000000_000294_leftImg8bit.png", label_HW
  )
  assert file == tmp_path / "new" / "frankfurt_000000_000294_pred_labelIds.png"
  with PIL.Image.open(file) as image:
    assert image.mode == "L" and image.size == (8, 5)
  ids_HW = label_map.decode_ids(file.read_bytes())
  np.testing.assert_array_equal(np.vectorize(cityscapes.LAYOUT.class_of_id.get)(ids_HW), label_HW)


def test_cityscapes_ids_are_those_of_its_list(tmp_path):
  file = submissions.write("cityscapes", tmp_path, "a_0_0_leftImg8bit.png", np.arange(19)[None])
  ids = label_map.decode_ids(file.read_bytes())[0].tolist()
  assert ids == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def test_ade20k_gets_one_to_150(tmp_path):
  label_HW = np.arange(150, dtype=np.uint8).reshape(10, 15)
  file = submissions.write("ade20k", tmp_path, "ADE_test_00000001.jpg", label_HW)
  assert file.name == "ADE_test_00000001.png"
  ids_HW = label_map.decode_ids(file.read_bytes())
  np.testing.assert_array_equal(ids_HW, label_HW.astype(int) + 1)
  assert [ade20k.LAYOUT.class_of_id[i] for i in ids_HW.ravel()] == list(range(150))


def test_labels_that_are_not_classes_are_reported(tmp_path):
  with pytest.raises(ValueError, match=r"x.png: expected a map of classes 0..18, .* 0..255"):
    submissions.write("cityscapes", tmp_path, "x.png", np.array([[0, 255]]))
  with pytest.raises(ValueError, match="got shape"):
    submissions.write("ade20k", tmp_path, "x.png", np.zeros((2, 2, 1), int))
  with pytest.raises(ValueError, match="no submission format for 'camvid'"):
    submissions.write("camvid", tmp_path, "x.png", np.zeros((2, 2), int))
  assert not list(tmp_path.iterdir())
