"""The images of files and folders that predictions are made for."""

import os
import pathlib
import re

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import UserError
from fpt_jax.tasks.segmentation.batches import images
from fpt_jax.tasks.subjects import image_files, subjects_of_files
from tests.data_sets import UPRIGHT, encode_tagged, label_config


@pytest.fixture
def pixels(rng):
  return rng.integers(0, 256, (6, 9, 3), np.uint8)


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_files_are_decoded_as_data_sets_are(exif, pixels, tmp_path):
  """For every orientation and kind of pixels that both read."""
  for split in ("train", "val"):
    (tmp_path / "images" / split).mkdir(parents=True)
    (tmp_path / "labels" / split).mkdir(parents=True)
  folder = tmp_path / "images" / "train"
  for o in UPRIGHT:
    (folder / f"{o}.png").write_bytes(encode_tagged(pixels, o, "PNG"))
    (folder / f"{o}_.tif").write_bytes(encode_tagged(pixels, o, "TIFF"))
    (folder / f"{o}__.webp").write_bytes(encode_tagged(pixels, o, "WEBP"))
  for mode, ending in (("1", "png"), ("L", "bmp"), ("LA", "png"), ("P", "gif"), ("CMYK", "jpg")):
    PIL.Image.fromarray(pixels).convert(mode).save(folder / f"mode_{mode}.{ending}")
  files = image_files([str(folder)])
  assert len(files) == 3 * 8 + 5
  subjects = list(subjects_of_files(files, exif=exif, skip_bad=False))
  for subject in subjects:
    label = np.zeros(subject.image_HWC.shape[:2], np.uint8)
    name = pathlib.Path(subject.name).stem
    (tmp_path / "labels" / "train" / f"{name}.png").write_bytes(encode_png(label))
  builder = {"num_classes": 1, "splits": ("train",)}
  config = label_config(
    "image_folder", tmp_path / "data", source=str(tmp_path), builder=builder, exif=exif
  )
  data.prepare(config)
  found = list(images(config, "train"))
  assert [name for name, _, _ in found] == [file.name for file in files]
  for subject, (_, image_HWC, _) in zip(subjects, found, strict=True):
    np.testing.assert_array_equal(subject.image_HWC, image_HWC)
  upright = {pathlib.Path(s.name).name: s.image_HWC for s in subjects}
  for o, turn in UPRIGHT.items():
    expected = turn(pixels) if exif == "apply" else pixels
    np.testing.assert_array_equal(upright[f"{o}.png"], expected)
    np.testing.assert_array_equal(upright[f"{o}_.tif"], expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_other_pixels_are_refused_as_in_data_sets(dtype, tmp_path):
  for split in ("images/train", "labels/train"):
    (tmp_path / split).mkdir(parents=True)
  file = tmp_path / "images/train/deep.tif"
  PIL.Image.fromarray(np.full((4, 5), 1000, dtype)).save(file)
  reason = "8 bits per channel are needed; convert the file"
  (one,) = subjects_of_files([file], exif="apply", skip_bad=False)
  assert isinstance(one, UserError) and re.match(rf"{file} is .*{reason}", str(one))
  builder = {"num_classes": 1, "splits": ("train",)}
  config = label_config("image_folder", tmp_path / "data", source=str(tmp_path), builder=builder)
  with pytest.raises(UserError, match=rf"^{file}: image is broken: .*{reason}") as other:
    data.prepare(config)
  assert "\n" not in str(one) + str(other.value)


def test_what_folders_pass_over_is_counted(pixels, tmp_path, caplog):
  for name in ("b.JPG", "a.webp", "._a.webp"):
    PIL.Image.fromarray(pixels).save(tmp_path / name, name.rsplit(".", 1)[1].replace("JPG", "JPEG"))
  (tmp_path / "notes.txt").touch()
  (tmp_path / "deeper").mkdir()
  assert [file.name for file in image_files([str(tmp_path)])] == ["a.webp", "b.JPG"]
  assert caplog.messages == [
    f"{tmp_path}: 2 images; passed over: 1 .txt, 1 hidden, the sub-folders 'deeper'"
  ]


def test_paths_without_images_raise(tmp_path):
  (tmp_path / "a.heic").touch()
  with pytest.raises(UserError, match=r"has no images \(JPEG, PNG, WEBP, "):
    image_files([str(tmp_path)])
  with pytest.raises(UserError, match="nowhere does not exist"):
    image_files([str(tmp_path / "nowhere")])


def test_named_pipes_are_refused_or_skipped(pixels, tmp_path, caplog):
  os.mkfifo(tmp_path / "a.jpg")
  (tmp_path / "b.png").write_bytes(encode_png(pixels))
  for files in (image_files([str(tmp_path)]), image_files([str(tmp_path / "a.jpg")])):
    pipe, *others = subjects_of_files(files, exif="apply", skip_bad=False)
    assert isinstance(pipe, UserError) and len(others) == len(files) - 1
    assert "a.jpg is not a readable image (not a regular file)" in str(pipe)
  both = image_files([str(tmp_path)])
  (subject,) = subjects_of_files(both, exif="apply", skip_bad=True)
  assert subject.name.endswith("b.png")
  assert "1 of 2 files skipped" in caplog.text
