"""Runs of an earlier version resume, evaluate and predict (tests/golden/README.md)."""

import json
import math
import tarfile

import pytest

import fpt_jax
from fpt_jax import data
from fpt_jax.predict import predict
from fpt_jax.run.config_file import read_config
from fpt_jax.tasks.subjects import subjects_of_split
from fpt_jax.train import train
from tests.conftest import GOLDEN
from tests.runs import losses_by_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def unpacked(name, folder):
  """Unpacks a run and the images that it was trained on, and returns its config."""
  for archive in (name, "context_shapes"):
    with tarfile.open(GOLDEN / "runs" / f"{archive}.tar.gz") as files:
      files.extractall(folder, filter="data")
  images = folder / "context_shapes"
  changes = {"data_dir": str(folder / "data"), "source": str(images)}
  if name == "detection":
    splits = {s: [str(images / f"{s}.json"), str(images / "images" / s)] for s in ("train", "val")}
    changes |= {"name": "coco", "builder": {"splits": splits}}
  else:
    categories = json.loads((images / "train.json").read_text())["categories"]
    names = ["background", *(category["name"] for category in categories)]
    changes |= {"name": "image_folder", "builder": {"class_names": names}}
  config = json.loads((folder / "config.json").read_text())
  config["data"] |= changes
  (folder / "config.json").write_text(json.dumps(config))
  config = read_config(str(folder))
  if not data.is_prepared(config.data):
    data.prepare(config.data)
  return config


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_an_older_run_resumes(name, tmp_path):
  config = unpacked(name, tmp_path)
  assert fpt_jax.restore(str(tmp_path)).step == 4
  config.steps = config.checkpoint.every_steps = 6
  metrics = train(config, str(tmp_path))

  lines = (GOLDEN / "runs" / f"{name}_resumed.jsonl").read_text().splitlines()
  losses = losses_by_step(tmp_path)
  assert set(losses) == {1, 2, 3, 4, 5, 6}
  for entry in map(json.loads, lines):
    if "total_loss" in entry:
      for loss, value in losses[entry["step"]].items():
        assert value == pytest.approx(entry[loss], rel=2e-3, abs=1e-4), loss
    else:
      # metrics.jsonl leaves out what is not finite, such as the IoU of a class without pixels
      finite = {metric for metric, value in metrics.items() if math.isfinite(value)}
      measured = set(entry) - {"step"}
      assert measured <= finite  # this version has more metrics
      for metric in measured:
        # on another CPU, a pixel or a detection may fall on the other side of a threshold
        assert metrics[metric] == pytest.approx(entry[metric], abs=1.0), metric
  assert json.loads((tmp_path / "config.json").read_text())["train_images"]

  restored = fpt_jax.restore(str(tmp_path))
  assert restored.step == 6
  restored.config.data.eval_split = "val[:1]"
  predict(restored, subjects_of_split(restored.config), 1, str(tmp_path), min_score=0.05)
  assert (tmp_path / "predictions" / "contact_sheet.png").exists()
