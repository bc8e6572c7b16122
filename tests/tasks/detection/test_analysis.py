"""What an evaluation writes beside its results."""

import csv
import io
import json
import types

import numpy as np
import pytest
from etils import epath
from PIL import Image

from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection import analysis, evaluation
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def golden():
  return json.loads((GOLDEN / "tide.json").read_text())


def test_an_evaluation_writes_its_analysis(golden, tmp_path, caplog):
  config = coco_mask.get_config("demo")
  config.eval.curves_of = ("c2",)
  caplog.set_level("INFO")
  truth, expected = golden["ground_truth"], golden["expected"]
  metrics = evaluation.score(config, truth, golden["detections"], epath.Path(tmp_path))
  for kind in ("bbox", "segm"):
    for name, value in expected[kind]["errors"].items():
      assert metrics[f"{kind}/dAP-{name}"] == pytest.approx(value)
  assert "│ c3 " in caplog.text and "FalseNeg" in caplog.text
  written = tmp_path
  assert {path.name for path in written.iterdir()} == {
    "categories.csv", "coco_instances_results.json", "confusion.json", "confusion.png", "errors.png",
    "precision_recall.png",
  }  # fmt: skip
  rows = list(csv.DictReader(io.StringIO((written / "categories.csv").read_text())))
  mean = np.mean([float(row["segm/AP"]) for row in rows])
  assert mean == pytest.approx(metrics["segm/AP"])
  confusion = json.loads((written / "confusion.json").read_text())
  assert confusion["class_names"] == ["c1", "c2", "c3", "background"]
  assert np.sum(confusion["counts"][:3]) == len(truth["annotations"])
  for path in written.glob("*.png"):
    assert np.asarray(Image.open(path)).std() > 10


def test_masks_are_not_scored_against_boxes(golden, tmp_path, caplog):
  """Without masks in the annotations, the records hold whole boxes, and masks are not compared with those."""
  caplog.set_level("INFO")
  arguments = coco_mask.get_config("demo"), golden["ground_truth"], golden["detections"]
  both = evaluation.score(*arguments, epath.Path(tmp_path))
  boxes = evaluation.score(*arguments, epath.Path(tmp_path), has_masks=False)
  assert boxes == {name: both[name] for name in both if not name.startswith("segm/")}
  assert "masks are not scored: the annotations of the data set are boxes" in caplog.text


def test_pictures_without_objects(golden, tmp_path):
  truth = golden["ground_truth"] | {"annotations": []}
  config = coco_mask.get_config("demo")
  assert evaluation.score(config, truth, golden["detections"], epath.Path(tmp_path)) == {}
  assert len(list(tmp_path.glob("*.png"))) == 3


def test_curves_show_the_precision():
  """A detector that finds half of the objects without an error: a step in the middle of the axis."""
  precision = np.zeros((10, 101, 1, 4, 3))
  precision[:, :51] = 1
  params = types.SimpleNamespace(
    iouThrs=np.linspace(0.5, 0.95, 10), recThrs=np.linspace(0, 1, 101), catIds=(1,)
  )
  evaluated = types.SimpleNamespace(params=params, eval={"precision": precision})
  figure = analysis.curves_figure({"bbox": evaluated}, {1: "ant"}, ("ant",))
  lines = figure.axes[0].lines
  assert len(lines) == 4
  for line in lines:
    assert f"AP {5100 / 101:.1f}" in line.get_label()
    np.testing.assert_array_equal(line.get_ydata(), np.arange(101) <= 50)


def test_many_categories_are_shown_as_the_most_frequent_ones_and_others(monkeypatch):
  monkeypatch.setattr(analysis, "SHOWN", 2)
  counts_TP = np.array([[5, 1, 0, 2], [0, 1, 1, 0], [0, 3, 4, 0], [1, 2, 0, 0]])
  shown_TP, names = analysis.most_frequent(counts_TP, ["a", "b", "c", "background"])
  assert names == ["a", "c", "others", "background"]
  assert shown_TP.tolist() == [[5, 0, 1, 2], [0, 4, 3, 0], [0, 1, 1, 0], [1, 0, 2, 0]]
  monkeypatch.undo()
  assert analysis.most_frequent(counts_TP, ["a", "b", "c", "background"])[0] is counts_TP


def test_an_unknown_category_of_curves_is_reported():
  config = coco_mask.get_config("demo")
  config.eval.curves_of = ("cat", "cats")
  with pytest.raises(UserError, match=r"no category 'cats'; its categories are cat, dog"):
    analysis.check_curves(config, ("cat", "dog"))
