"""Records on a disk that is full, or that nothing can be written to."""

import os

import pytest

from fpt_jax import data
from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError


def config_of(folder, **builder):
  config = coco_mask.get_config("demo").data
  config.data_dir = str(folder)
  config.builder = type(config)({"train_size": 40, "val_size": 2, "image_size": 64} | builder)
  return config


def test_a_disk_that_becomes_full(tmp_path, full_disk):
  with (
    full_disk(30_000),
    pytest.raises(UserError, match=r"the disk is full\); free some space") as e,
  ):
    data.prepare(config_of(tmp_path))
  assert "\n" not in str(e.value)
  assert [name for _, _, files in os.walk(tmp_path) for name in files] == []
  data.prepare(config_of(tmp_path))  # nothing is in the way
  assert data.is_prepared(config_of(tmp_path))


def test_a_folder_that_nothing_can_be_written_to(tmp_path):
  (tmp_path / "file").write_text("kept")
  for folder in (tmp_path / "file", "/proc/records"):
    with pytest.raises(UserError, match="cannot be written"):
      data.prepare(config_of(folder))
  assert (tmp_path / "file").read_text() == "kept"
