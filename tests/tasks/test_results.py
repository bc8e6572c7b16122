"""The scores of an evaluation are not lost with its files."""

import logging

import numpy as np
import pytest
from etils import epath

from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.errors import ResultsNotWrittenError
from fpt_jax.tasks.detection import evaluation as detection
from fpt_jax.tasks.segmentation import evaluation as segmentation

GROUND_TRUTH = {
  "images": [{"id": 1, "height": 20, "width": 20}],
  "categories": [{"id": 1, "name": "ant"}],
  "annotations": [
    {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9], "area": 81, "iscrowd": 0}
  ],
}


def _score_detection(folder):
  config = coco_mask.get_config("demo")
  config.model.mask_head.enabled = False
  found = [{"image_id": 1, "category_id": 1, "bbox": [2.0, 2, 9, 9], "score": 0.9}] * 20
  return "bbox/AP", detection.score(config, GROUND_TRUTH, found, folder)


def _score_segmentation(folder):
  config = cityscapes.get_config("demo")
  config.model.class_names = ("ground", "ant")
  return "mIoU", segmentation.score(config, np.diag([3, 4]), 1, folder)


@pytest.mark.parametrize("score", [_score_detection, _score_segmentation])
def test_scores_are_logged_before_the_files_are_written(score, tmp_path, full_disk, caplog):
  name, metrics = score(epath.Path(tmp_path))
  assert metrics[name] == pytest.approx(100)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  caplog.clear()
  with (
    caplog.at_level(logging.INFO),
    full_disk(50),
    pytest.raises(ResultsNotWrittenError, match=r"free some space.*; the scores are complete") as e,
  ):
    score(epath.Path(tmp_path))
  np.testing.assert_equal(e.value.metrics, metrics)
  assert "100.0" in caplog.text
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
