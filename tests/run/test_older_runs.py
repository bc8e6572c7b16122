"""Folders of runs that an earlier version wrote resume, evaluate and predict (tests/golden/README.md)."""

import json
import tarfile

import jax
import numpy as np
import pytest

import fpt_jax
from fpt_jax import data
from fpt_jax.predict import predict, subjects_of_split
from fpt_jax.restored import open_run
from fpt_jax.run import sharding
from fpt_jax.run.config_file import read_config, write_config
from fpt_jax.tasks.task import task_of
from fpt_jax.train import train
from tests.conftest import GOLDEN
from tests.runs import losses_by_step, shared_data_dir

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def older(request, tmp_path_factory):
  """The folder of a run of four steps, and what the earlier version logged when it resumed it."""
  folder = tmp_path_factory.mktemp(request.param)
  with tarfile.open(GOLDEN / "runs" / f"{request.param}.tar.gz") as archive:
    archive.extractall(folder, filter="data")
  config = json.loads((folder / "config.json").read_text())
  config["data"]["data_dir"] = shared_data_dir()
  (folder / "config.json").write_text(json.dumps(config))
  if not data.is_prepared(read_config(str(folder)).data):
    data.prepare(read_config(str(folder)).data)
  lines = (GOLDEN / "runs" / f"{request.param}_resumed.jsonl").read_text().splitlines()
  return folder, [json.loads(line) for line in lines]


def test_it_evaluates(older):
  workdir, _ = older
  restored = fpt_jax.restore(str(workdir))
  assert restored.step == 4
  config = restored.config
  results = workdir / "eval" / "coco_instances_results.json"
  before = json.loads(results.read_text()) if results.exists() else []
  logged = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  mesh = sharding.mesh(jax.device_count())
  arrays = sharding.replicate(restored.arrays, mesh)
  metrics = task_of(config).evaluate(config, restored.structure, arrays, mesh, str(workdir))
  for name in set(metrics) & set(logged):
    # a pixel or a detection may fall on either side of a threshold on another CPU
    assert metrics[name] == pytest.approx(logged[name], abs=1.0), name
  if before:
    now = json.loads(results.read_text())
    assert len(now) == len(before) > 0
    scores = [sorted(r["score"] for r in entries) for entries in (now, before)]
    np.testing.assert_allclose(*scores, atol=2e-3)


def test_it_predicts(older, tmp_path):
  workdir, _ = older
  restored = open_run(str(workdir), read_config(str(workdir)))
  predict(restored, subjects_of_split(restored.config), 4, str(tmp_path), min_score=0.05)
  assert len(list((tmp_path / "predictions").glob("0000*.png"))) >= 4


def test_it_resumes(older):
  workdir, expected = older
  config = read_config(str(workdir))
  config.steps = config.checkpoint.every_steps = 6
  train(config, str(workdir))
  losses = losses_by_step(workdir)
  assert set(losses) == {1, 2, 3, 4, 5, 6}
  for entry in expected:
    if "total_loss" in entry:
      for name, value in losses[entry["step"]].items():
        assert value == pytest.approx(entry[name], rel=2e-3, abs=1e-4), name
  # what is written back is a config of today
  assert json.loads((workdir / "config.json").read_text())["train_images"]
  write_config(str(workdir), read_config(str(workdir)))
