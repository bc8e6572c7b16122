"""Explanations of untrained models of both tasks: what is written, and what is measured."""

import json

import numpy as np
import pytest
from PIL import Image

from fpt_jax import models
from fpt_jax.data.datasets import context_shapes
from fpt_jax.errors import UserError
from fpt_jax.explain import explain, parsed_points, share_on
from fpt_jax.restored import Restored
from fpt_jax.tasks import detection, segmentation
from fpt_jax.tasks.attention_pictures import Map
from fpt_jax.tasks.queries import Query
from fpt_jax.tasks.subjects import Subject, subjects_of_split
from tests.runs import tiny_config, tiny_segmentation_config


def untrained(config):
  detection_model = config.model.name == "rcnn"
  config.model.num_classes = 6 if detection_model else 7
  names = context_shapes.CATEGORIES
  if detection_model:
    config.model.update(dict(category_ids=(1, 2, 3, 4, 5, 6), category_names=names))
  else:
    config.model.class_names = ("background", *names)
  structure = models.structure_of(config)
  rng, trained = np.random.default_rng(0), structure.parameters()
  arrays = {
    name: (0.2 * rng.standard_normal(x.shape) if name in trained else np.ones(x.shape)).astype(
      x.dtype
    )
    for name, x in structure.shapes.items()
  }
  return Restored(config, 0, structure, arrays)


def explained(folder):
  """Returns the content of explain.json, whose images are those of explain.jsonl."""
  content = json.loads((folder / "explain" / "explain.json").read_text())
  lines = (folder / "explain" / "explain.jsonl").read_text().splitlines()
  assert content["images"] == [json.loads(line) for line in lines]
  return content


def test_a_detector_is_explained_at_its_detections_and_measured_on_beacons(tmp_path):
  restored = untrained(tiny_config(data__eval_split="val[:3]"))
  subjects = list(subjects_of_split(restored.config))
  explain(restored, iter(subjects), 3, str(tmp_path), points=(), min_score=0.0)
  found = explained(tmp_path)
  assert [image["file_name"] for image in found["images"]] == [s.name for s in subjects]
  for image in found["images"]:
    assert 1 <= len(image["rows"]) <= 4
    for row in image["rows"]:
      level = int(row["level"][1:])
      near = {f"RT from P{level - 1}", "ST", f"GT from P{level + 1}"} - {"RT from P1", "GT from P6"}
      assert {s["transformer"] for s in row["sources"]} == near
      for source in row["sources"]:
        assert 0 <= source["entropy"] <= 1 + 1e-6
        assert 0 <= source["peak"]["x"] < 64 and 0 <= source["peak"]["y"] < 64
        if source["transformer"].startswith("RT"):
          assert source["mixture"] == []
        else:
          assert sum(source["mixture"]) == pytest.approx(1, abs=1e-3)
  # satellites are small, and belong to P2
  assert set(found["attention_on_answers"]) == {"ST", "GT from P3"}
  beacons = [a for s in subjects for a in s.truth if not a.get("question") and not a["iscrowd"]]
  assert len(beacons) == 3
  for _, area in found["attention_on_answers"].values():
    assert min(b["area"] for b in beacons) <= area * 64 * 64 <= max(b["area"] for b in beacons)
  pictures = sorted((tmp_path / "explain").glob("*.png"))
  assert len(pictures) == 3 and min(Image.open(pictures[0]).size) > 200


def test_a_segmenter_is_explained_at_points_and_in_its_largest_classes(tmp_path, rng):
  restored = untrained(tiny_segmentation_config())
  image = rng.integers(0, 255, (50, 70, 3), np.uint8)
  subject = Subject("a/b.png", image, None)
  # images that cannot be read, or that a point is outside of, are left out
  subjects = [UserError("x.jpg is bad"), subject, Subject("y.png", image[:, :69], None)]
  with pytest.raises(
    UserError, match=r"^bad images: 2 of 3; .*explain; the first is: x\.jpg is bad"
  ):
    explain(restored, iter(subjects), 3, str(tmp_path), points=[(69, 0.5)], min_score=0.5)
  (explanation,) = explained(tmp_path)["images"]
  assert [row["level"] for row in explanation["rows"]] == [f"level {i}" for i in range(4)]
  assert {(row["x"], row["y"]) for row in explanation["rows"]} == {(69, 0.5)}
  assert (tmp_path / "explain" / "b.png").exists()

  explain(restored, iter([subject]), 1, str(tmp_path), points=(), min_score=0.5)
  (explanation,) = explained(tmp_path)["images"]
  label_HW = restored.infer(image)["label_map"]
  largest = np.argsort(-np.bincount(label_HW.ravel()), kind="stable")[:2]
  names = [restored.config.model.class_names[k] for k in largest]
  assert [row["name"] for row in explanation["rows"][::4]] == names
  for row in explanation["rows"]:
    k = restored.config.model.class_names.index(row["name"])
    assert label_HW[int(row["y"]), int(row["x"])] == k


def test_explanations_in_a_bucket(bucket, rng):
  restored = untrained(tiny_segmentation_config())
  subject = Subject("a/b.png", rng.integers(0, 255, (50, 70, 3), np.uint8), None)
  explain(restored, iter([subject]), 1, "gs://b/run", points=[(69, 0.5)], min_score=0.5)
  assert len(explained(bucket / "b" / "run")["images"]) == 1
  Image.open(bucket / "b" / "run" / "explain" / "b.png").load()


def test_points_outside_an_image_and_baselines_are_reported(tmp_path):
  restored = untrained(tiny_config("fpt=fuse"))
  with pytest.raises(UserError, match="has no transformers to explain"):
    explain(restored, iter(()), 0, str(tmp_path), points=(), min_score=0.5)
  restored = untrained(tiny_config())
  subject = Subject("x.png", np.zeros((40, 60, 3), np.uint8), None)
  for point in ((60, 0), (0, 40), (-1, 5)):
    with pytest.raises(UserError, match=r"outside x\.png, which is 60 pixels wide and 40 high"):
      explain(restored, iter([subject]), 1, str(tmp_path), points=[point], min_score=0.5)


def test_points_are_parsed_or_reported():
  assert parsed_points("") == []
  assert parsed_points("1,2; 3.5,4;") == [(1, 2), (3.5, 4)]
  for text in ("1", "1,2,3", "a,b", "1;2"):
    with pytest.raises(UserError, match="must have the form x,y;x,y"):
      parsed_points(text)


def test_the_share_on_an_object_counts_covered_parts_of_positions():
  # an image of 8 x 12 on a canvas of stride 4: positions are centred on rows 0, 4 and columns 0, 4, 8
  weight = np.array([[0.1, 0.2, 0.0], [0.3, 0.0, 0.4]], np.float32)
  answer = np.zeros((8, 12), bool)
  answer[2:8, :2] = True  # all of position (1, 0)
  answer[0:2, 2:4] = (
    True  # a half of the pixels of position (0, 1), which has rows 0-1, columns 2-5
  )
  attention, area = share_on(Map(weight, 4, 0.5, (1.0,)), answer, (8, 12))
  assert area == pytest.approx(16 / 96)
  assert attention == pytest.approx(0.3 + 0.2 * 4 / 8)
  # the same object in an image of twice the size
  larger = answer.repeat(2, axis=0).repeat(2, axis=1)
  assert share_on(Map(weight, 4, 0.5, (1.0,)), larger, (8, 12)) == pytest.approx((attention, area))


def test_queries_know_the_level_that_their_box_is_pooled_from(tmp_path):
  config = tiny_config()
  config.model.category_ids, config.model.category_names = (7, 9), ("cat", "dog")
  found = {
    "boxes_xyxy": np.array([[0, 0, 8, 8], [0, 0, 60, 60], [4, 4, 20, 12]], np.float32),
    "scores": np.array([0.9, 0.8, 0.7], np.float32),
    "category_ids": np.array([7, 9, 7]),
  }
  image = np.zeros((64, 64, 3), np.uint8)
  small, large = detection.QUERIES.queries(config, image, found, (64, 64), 0.75)
  assert small == Query("cat 90%", 4, 4, (0, 0, 8, 8), 0)
  # canonical_size=30 is pooled from P4, twice that from P5
  assert config.model.canonical_size == 30
  assert large == Query("dog 80%", 30, 30, (0, 0, 60, 60), 3)
  # at half the size on the canvas, the same box belongs to the level below
  _, half = detection.QUERIES.queries(config, image, found, (32, 32), 0.75)
  assert half.level == 2
  assert segmentation.QUERIES.questions(config, image, None, (64, 64)) == []
