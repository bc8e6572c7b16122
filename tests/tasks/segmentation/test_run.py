"""A segmenter trains, evaluates, restores and predicts like a detector."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath

import fpt_jax
from fpt_jax.errors import UserError
from fpt_jax.evaluation import evaluator
from fpt_jax.predict import predict
from fpt_jax.run import sharding
from fpt_jax.tasks import segmentation
from fpt_jax.tasks.subjects import Subject
from fpt_jax.train import train
from tests.runs import losses_by_step, tiny_segmentation_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns the folder and the metrics of a run of 3 steps."""
  workdir = tmp_path_factory.mktemp("run")
  aligned = dict(model__align_corners=True, data__crop=(65, 65), data__buckets=())
  return workdir, train(tiny_segmentation_config("fpt=none", steps=3, **aligned), str(workdir))


def test_files_that_a_run_writes(finished):
  workdir, metrics = finished
  losses = losses_by_step(workdir)
  assert set(losses) == {1, 2, 3}
  assert all(set(e) == {"loss_seg", "loss_aux", "total_loss"} for e in losses.values())
  model = json.loads((workdir / "config.json").read_text())["model"]
  assert model["num_classes"] == 7 and model["class_names"][:2] == ["background", "circle"]
  assert len(model["palette"]) == 7
  assert {"mIoU", "mAcc", "aAcc", "IoU/background"} <= set(metrics)
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  assert last["step"] == 3 and last["mIoU"] == metrics["mIoU"]
  counts = np.array(json.loads((workdir / "eval" / "confusion.json").read_text())["counts"])
  assert counts.sum() == 4 * 64 * 64
  with PIL.Image.open(workdir / "eval" / "confusion.png") as picture:
    assert picture.size[0] == picture.size[1] > 300


def test_predictions_equal_those_of_evaluation(finished, rng):
  workdir, metrics = finished
  restored = fpt_jax.restore(str(workdir))
  right = labelled = 0
  for _, image_HWC, label_HW in segmentation.eval_images(restored.config):
    (found,) = restored.predict([image_HWC])
    assert found["label_map"].dtype == np.uint8
    right += (found["label_map"] == label_HW).sum()
    labelled += (label_HW != 255).sum()
  assert 100 * right / labelled == pytest.approx(metrics["aAcc"], abs=0.05)
  odd = rng.integers(0, 255, (37, 51, 3), np.uint8)
  (found,) = restored.predict([odd])
  assert found["label_map"].shape == (37, 51) and found["label_map"].max() < 7
  elsewhere = fpt_jax.restore(str(workdir))
  elsewhere.config.data.buckets = ((48, 88),)
  (other,) = elsewhere.predict([odd])
  assert (found["label_map"] != other["label_map"]).mean() < 1e-3  # classes with equal scores
  large = rng.integers(0, 255, (261, 270, 3), np.uint8)
  (found,) = restored.predict([large])
  elsewhere.config.data.update({"buckets": (), "few_canvases": False})
  (other,) = elsewhere.predict([large])
  assert (found["label_map"] != other["label_map"]).mean() < 1e-3


def test_canvases_with_aligned_corners_have_a_pixel_more(finished, tmp_path):
  workdir, _ = finished
  config = fpt_jax.restore(str(workdir)).config
  config.eval.update({"scales": (1.0, 0.5), "window": (40, 33)})
  seen = []

  def logits(image_BHWC, size_B2):
    seen.append(image_BHWC.shape[1:3])
    return jnp.zeros((*image_BHWC.shape[:3], 7))

  structure = SimpleNamespace(fill=lambda _: SimpleNamespace(logits=logits))
  segmentation.evaluator(config, structure, sharding.mesh())(config, {}, epath.Path(tmp_path))
  assert set(seen) == {(65, 33), (33, 33)}
  config.eval.window = ()
  seen.clear()
  segmentation.predictor(config, structure, {})(np.zeros((97, 98, 3), np.uint8))
  assert set(seen) == {(97, 129), (65, 65)}
  view = segmentation.QUERIES.view(config, np.zeros((97, 98, 3), np.uint8))
  assert view["image_BHWC"].shape[1:3] == (97, 129)
  config.mesh.shape = (1, 1, 2)  # devices that share an image have as many rows each
  view = segmentation.QUERIES.view(config, np.zeros((97, 98, 3), np.uint8))
  assert view["image_BHWC"].shape[1:3] == (128, 128)


def test_a_window_of_the_images_size_changes_no_metric(finished):
  workdir, metrics = finished
  restored = fpt_jax.restore(str(workdir))
  mesh = sharding.mesh()
  arrays = sharding.replicate(restored.arrays, mesh)
  restored.config.eval.update({"window": (64, 64), "overlap": 0.5})
  arguments = (restored.config, restored.structure, mesh, str(workdir))
  np.testing.assert_equal(evaluator(*arguments)(arrays), metrics)  # nan is nan
  restored.config.eval.submission = True
  with pytest.raises(UserError, match=r"not for data\.name='context_shapes' with 7 classes"):
    evaluator(*arguments)


def test_pictures_of_predictions(finished, tmp_path):
  workdir, _ = finished
  restored = fpt_jax.restore(str(workdir))
  _, image_HWC, label_HW = next(segmentation.eval_images(restored.config))
  names = ["a.png", "x/a.png", "a_labels.png", "contact_sheet.png"]
  subjects = [Subject(name, image_HWC, label_HW if i else None) for i, name in enumerate(names)]
  predict(restored, iter(subjects), len(subjects), str(tmp_path), min_score=0.5)
  stems = ["a", "a_2", "a_labels_2", "contact_sheet_2"]
  written = {f"{s}.png" for s in stems} | {f"{s}_labels.png" for s in stems}
  left = {p.name for p in (tmp_path / "predictions").iterdir()}
  assert left == written | {"contact_sheet.png", "predictions.json", "predictions.jsonl"}
  entries = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
  assert [e["file_name"] for e in entries] == names
  assert all(sum(e["shares"].values()) == pytest.approx(1, abs=1e-5) for e in entries)


def test_other_classes_are_reported(finished):
  workdir, _ = finished
  names = ("background", "circle", "square", "striped triangle", "checked triangle", "cat", "dog")
  fields = dict(model__class_names=names, model__align_corners=True)
  config = tiny_segmentation_config("fpt=none", steps=3, **fields)
  with pytest.raises(
    UserError, match=r"classes \['satellite of circle', .*that the model does not have"
  ):
    train(config, str(workdir))
