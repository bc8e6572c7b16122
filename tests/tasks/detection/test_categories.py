"""Categories of a data set are those of the same name in the model, or the data set is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath

from fpt_jax import data
from fpt_jax.configs import coco_box
from fpt_jax.data import DatasetInfo
from fpt_jax.errors import UserError
from fpt_jax.run import sharding
from fpt_jax.run.config_file import config_of_run, read_config, write_config
from fpt_jax.tasks import detection
from fpt_jax.tasks.detection import views
from fpt_jax.tasks.detection.categories import label_table, model_category_of
from fpt_jax.tasks.detection.evaluation import RESULTS_FILE
from fpt_jax.train import adopt_classes
from tests.data_sets import HEIGHT, WIDTH, config

RED, BLUE = [2, 3, 10, 8], [20, 4, 12, 12]  # boxes x, y, w, h
RUN = ((1, "red"), (2, "blue"))
# the categories of other exports of the same objects
SAME = {
  "as trained": RUN,
  "swapped names": ((1, "blue"), (2, "red")),
  "other ids": ((7, "red"), (5, "blue")),
  "ids that overlap": ((2, "red"), (3, "blue")),
  "other case and spaces": ((1, " Blue"), (2, "RED ")),
}
OTHER = {
  "renamed": (
    ((1, "red"), (2, "green")),
    "[2]",
    "2 is 'green' in the data and 'blue' in the model",
  ),
  "one more": (((1, "red"), (2, "blue"), (3, "green")), "[3]", "(3 is 'green')"),
  "shifted": (((0, "none"), (1, "red"), (2, "blue")), "[0]", "(0 is 'none')"),
}


def dataset_info(categories):
  ids, names = zip(*sorted(categories), strict=True)
  return DatasetInfo(names, ids, {"val": 1})


def run_config(categories=RUN):
  """Returns a config of a run that was trained on these categories."""
  run = coco_box.get_config()
  detection.adopt_classes(run, dataset_info(categories))
  return run


def prepared(root, categories):
  """Prepares one image with an object "red" and an object "blue"; returns the config's `data`."""
  (root / "images").mkdir(parents=True)
  PIL.Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(root / "images" / "a.png")
  id_of = {name.strip().lower(): category for category, name in categories}
  objects = [("red", RED), ("blue", BLUE)]
  content = {
    "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
    "categories": [{"id": category, "name": name} for category, name in categories],
    "annotations": [
      {"id": i, "image_id": 1, "category_id": id_of[name], "bbox": box, "iscrowd": 0}
      for i, (name, box) in enumerate(objects, 1)
      if name in id_of
    ],
  }
  (root / "a.json").write_text(json.dumps(content))
  prepared = config(
    "coco",
    root / "data",
    source=str(root),
    builder={"splits": {s: ("a.json", "images") for s in ("train", "val")}},
    buckets=((HEIGHT, WIDTH),),
  )
  data.prepare(prepared)
  return prepared


def evaluated(monkeypatch, tmp_path, run, categories):
  """Evaluates a model of `RUN` that finds both objects; returns the metrics and the results' category ids."""
  run.data.update(prepared(tmp_path / "set", categories).to_dict())
  run.eval.update(dict(batch_size=1))
  found = {
    "boxes_BD4": np.array([[[x, y, x + w, y + h] for x, y, w, h in (RED, BLUE)]], np.float32),
    "scores_BD": np.array([[0.9, 0.8]], np.float32),
    "labels_BD": np.array([[1, 2]]),
    "valid_BD": np.ones((1, 2), bool),
  }
  found = jax.tree.map(jnp.asarray, found)
  monkeypatch.setattr(views, "detector", lambda *_: lambda arrays, seen: found)
  evaluate = detection.evaluator(run, None, sharding.mesh())
  metrics = evaluate(run, {}, epath.Path(tmp_path))
  results = json.loads((tmp_path / RESULTS_FILE).read_text())
  return metrics, [result["category_id"] for result in results]


@pytest.mark.parametrize("case", SAME)
def test_another_export_of_the_same_objects_scores_the_same(case, monkeypatch, tmp_path):
  categories = SAME[case]
  metrics, ids = evaluated(monkeypatch, tmp_path, run_config(), categories)
  assert metrics["bbox/AP"] == pytest.approx(100)
  # the results have the ids of the annotation file
  assert ids == [i for name in ("red", "blue") for i, n in categories if n.strip().lower() == name]


@pytest.mark.parametrize("case", SAME)
def test_training_labels_are_the_models_classes(case):
  dataset = dataset_info(SAME[case])
  wanted = [1 + ["red", "blue"].index(n.strip().lower()) for n in dataset.category_names]
  assert label_table(run_config(), dataset).tolist() == [0, *wanted]


def test_truth_is_drawn_under_the_models_categories(tmp_path):
  run = run_config()
  run.data.update(prepared(tmp_path, SAME["swapped names"]).to_dict())
  ((_, _, truth),) = detection.eval_images(run)
  assert [(a["category_id"], a["bbox"]) for a in truth] == [(1, RED), (2, BLUE)]


def test_a_missing_category_is_not_scored(monkeypatch, tmp_path):
  metrics, ids = evaluated(monkeypatch, tmp_path, run_config(), ((1, "blue"),))
  assert metrics["bbox/AP"] == pytest.approx(100) and ids == [1]


@pytest.mark.parametrize("case", OTHER)
def test_other_categories_are_refused(case, monkeypatch, tmp_path):
  categories, ids, words = OTHER[case]
  for use in (
    lambda: detection.adopt_classes(run_config(), dataset_info(categories)),
    lambda: evaluated(monkeypatch, tmp_path, run_config(), categories),
  ):
    with pytest.raises(UserError) as raised:
      use()
    assert f"the data has categories {ids} that the model does not have" in str(raised.value)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_two_categories_of_one_name():
  with pytest.raises(
    UserError, match=r"categories \[1, 3\] are both the model's category 1, 'red'"
  ):
    label_table(run_config(), dataset_info(((1, "red"), (2, "blue"), (3, "Red"))))
  # a model that was trained on them tells them apart by their ids
  twice = ((1, "red"), (3, "red"))
  assert label_table(run_config(twice), dataset_info(twice)).tolist() == [0, 1, 2]
  # and those that differ in case by their exact names
  similar = dataset_info(((1, "Red"), (3, "red")))
  assert label_table(run_config(((1, "red"), (3, "Red"))), similar).tolist() == [0, 2, 1]


def test_ids_decide_where_the_model_has_no_names():
  run = run_config()
  run.model.category_names = ()
  assert model_category_of(run, dataset_info(SAME["swapped names"])) == {1: 1, 2: 2}
  run.model.category_names = ("1", "2")
  assert model_category_of(run, dataset_info(SAME["swapped names"])) == {1: 1, 2: 2}
  assert model_category_of(run, dataset_info(((1, "2"), (2, "1")))) == {1: 2, 2: 1}


@pytest.mark.parametrize("fields", [{"num_classes": 3}, {"category_names": ("red",)}])
def test_numbers_of_ids_names_and_classes_are_equal(fields):
  run = run_config()
  run.model.update(fields)
  with pytest.raises(
    UserError, match=r"category_ids has 2 ids, .* names, and model\.num_classes is"
  ):
    detection.adopt_classes(run, dataset_info(RUN))


def test_a_resumed_run_keeps_its_names(tmp_path):
  workdir = str(tmp_path / "run")
  write_config(workdir, run_config())
  resumed = coco_box.get_config()
  resumed.data.update(prepared(tmp_path / "swapped", SAME["swapped names"]).to_dict())
  adopt_classes(resumed, workdir)
  assert tuple(resumed.model.category_names) == ("red", "blue")
  assert label_table(resumed, data.info(resumed.data)).tolist() == [0, 2, 1]

  renamed = coco_box.get_config()
  renamed.data.update(prepared(tmp_path / "renamed", ((1, "blue"), (2, "green"))).to_dict())
  with pytest.raises(UserError, match="2 is 'green' in the data and 'blue' in the model"):
    adopt_classes(renamed, workdir)

  # a fresh folder has the data's own
  fresh = coco_box.get_config()
  fresh.data.update(renamed.data.to_dict())
  adopt_classes(fresh, str(tmp_path / "other"))
  assert tuple(fresh.model.category_names) == ("blue", "green")


def test_a_config_with_ids_alone_has_the_names_of_the_run(tmp_path):
  write_config(str(tmp_path), run_config())
  other = coco_box.get_config()
  other.model.update(dict(category_ids=(1, 2), num_classes=2))
  fields = dict(from_data=detection.FROM_DATA, not_of_the_weights=detection.NOT_OF_THE_WEIGHTS)
  used = config_of_run(read_config(str(tmp_path)), other, str(tmp_path), **fields)
  assert tuple(used.model.category_names) == ("red", "blue")
  assert tuple(read_config(str(tmp_path)).model.category_names) == ("red", "blue")
