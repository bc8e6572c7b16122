"""Weights & Biases (offline) and MLflow (in a folder) get metrics, pictures and the config.

Their packages are the real ones, and the tests read what they have written.
"""

import json
import logging
import re
import struct
import sys
import threading
import time

import mlflow
import numpy as np
import pytest
from etils import epath
from PIL import Image
from wandb.proto import wandb_internal_pb2

from fpt_jax.errors import UserError
from fpt_jax.run import loggers
from fpt_jax.run.metrics import MetricsWriter, read_metrics
from tests.runs import tiny_config


@pytest.fixture
def workdir(monkeypatch, tmp_path):
  """Returns a run's folder with a picture; both services write below `tmp_path`."""
  folder = tmp_path / "a run"
  (folder / "eval").mkdir(parents=True)
  Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(folder / "eval" / "errors.png")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
  return folder


def write(workdir, start, steps, **fields):
  """Writes the metrics of steps and the pictures of the last one, as a training does; returns the ids."""
  config = tiny_config(**fields)
  with MetricsWriter(str(workdir), start, loggers.open_loggers(config, str(workdir))) as writer:
    for step in steps:
      writer.write(step, {"bbox/AR@100": step / 2, "nan": float("nan")})
    writer.write_pictures(step, epath.Path(workdir / "eval"))
  return json.loads((workdir / loggers.LOGGERS_FILE).read_text())


def wait_for(holds):
  """Waits until a condition holds: Weights & Biases writes its file in a process of its own."""
  end = time.monotonic() + 30
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.05)


def wandb_records_of(file):
  """Yields the records of a file of Weights & Biases: 7 bytes, then the log format of LevelDB."""
  data, position, record = file.read_bytes(), 7, b""
  while position < len(data):
    if 2**15 - position % 2**15 < 7:  # a header does not cross the border of a block
      position += 2**15 - position % 2**15
      continue
    # checksum, bytes, whole/first/middle/last
    _, length, part = struct.unpack_from("<IHB", data, position)
    record += data[position + 7 : position + 7 + length]
    position += 7 + length
    if part in (1, 4):
      yield wandb_internal_pb2.Record.FromString(record)
      record = b""


def test_wandb(workdir):
  ids = write(workdir, 0, (1, 2, 3), loggers=("wandb",))
  time.sleep(1.1)  # the second of its start names a run's folder
  assert write(workdir, 2, (3, 4), loggers=("wandb",), name="resumed", batch_size=8) == ids
  wait_for(
    lambda: all(b"errors" in f.read_bytes() for f in workdir.glob("wandb/offline-run-*/*.wandb"))
  )
  histories, configs, names = [], [], []
  for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
    rows, config = [], {}
    for record in wandb_records_of(file):
      if record.HasField("history"):
        items = record.history.item
        row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
        rows.append({k: v for k, v in row.items() if not k.startswith("_")})
      if record.HasField("run"):
        assert record.run.run_id == ids["wandb"]
        names.append(record.run.display_name)
      if record.HasField("config"):
        config |= {i.key: json.loads(i.value_json) for i in record.config.update if i.key}
    histories.append(rows)
    configs.append(config)
  assert names == ["a run", "resumed"]
  for rows, steps in zip(histories, ((1, 2, 3), (3, 4)), strict=True):
    assert rows[:-1] == [{"step": s, "bbox/AR@100": s / 2} for s in steps]
    picture = {key: rows[-1][f"eval/errors/{key}"] for key in ("_type", "width", "height")}
    assert picture == {"_type": "image-file", "width": 6, "height": 4}
    assert rows[-1]["step"] == steps[-1]
  assert [config["batch_size"] for config in configs] == [4, 8]
  assert configs[0]["model.fpt.scope"] == "adjacent"
  assert configs[0]["data.buckets"] == [[64, 64]]


def test_mlflow(workdir, tmp_path):
  ids = write(workdir, 0, (1, 2, 3), loggers=("mlflow",), name="a name")
  assert write(workdir, 2, (3, 4), loggers=("mlflow",), name="a name", batch_size=8) == ids
  client = mlflow.MlflowClient()
  run = client.get_run(ids["mlflow"])
  assert run.info.run_name == "a name" and run.info.status == "FINISHED"
  assert run.data.params["model.fpt.scope"] == "adjacent"
  assert run.data.params["data.buckets"] == "[[64, 64]]"
  assert run.data.params["batch_size"] == "4"  # that of the start
  history = client.get_metric_history(ids["mlflow"], "bbox/AR_100")
  assert sorted((m.step, m.value) for m in history) == [(s, s / 2) for s in (1, 2, 3, 3, 4)]
  pictures = sorted(tmp_path.glob("mlruns/**/images/*.png"))
  assert [re.match(r"eval.errors.step.(\d+)", p.name)[1] for p in pictures] == ["3", "4"]
  np.testing.assert_array_equal(np.asarray(Image.open(pictures[0])), np.full((4, 6, 3), 200))


def test_a_run_that_ends_by_an_error_has_failed(workdir):
  config = tiny_config(loggers=("mlflow",))
  senders = loggers.open_loggers(config, str(workdir))
  with pytest.raises(UserError, match="the loss"), MetricsWriter(str(workdir), 0, senders):
    raise UserError("the loss is not finite")
  (run_id,) = json.loads((workdir / loggers.LOGGERS_FILE).read_text()).values()
  assert mlflow.MlflowClient().get_run(run_id).info.status == "FAILED"


def test_an_error_in_the_middle_is_logged_once_and_the_others_go_on(workdir, tmp_path, caplog):
  config = tiny_config(loggers=("mlflow", "wandb"))
  senders = loggers.open_loggers(config, str(workdir))
  (tmp_path / "mlruns").rename(tmp_path / "away")
  (tmp_path / "mlruns").write_text("a file in the place of the folder")
  with MetricsWriter(str(workdir), 0, senders) as writer, caplog.at_level(logging.WARNING):
    for step in (1, 2, 3):
      writer.write(step, {"total_loss": 1.0})
    writer.write_pictures(3, epath.Path(workdir / "eval"))
  assert caplog.text.count("config.loggers: mlflow: ") == 1
  assert caplog.text.count("the training goes on") == 1
  assert [entry["step"] for entry in read_metrics(str(workdir))] == [1, 2, 3]
  (file,) = workdir.glob("wandb/offline-run-*/*.wandb")
  wait_for(lambda: b"total_loss" in file.read_bytes())


def test_a_server_that_is_away_ends_the_start_of_a_new_run_only(workdir, monkeypatch, caplog):
  write(workdir, 0, (1,), loggers=("mlflow",))
  monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
  with caplog.at_level(logging.WARNING):
    write(workdir, 1, (2,), loggers=("mlflow",))
  assert caplog.text.count("config.loggers: mlflow: ") == 1 and "delete loggers.json" in caplog.text
  assert [entry["step"] for entry in read_metrics(str(workdir))] == [1, 2]
  (workdir / loggers.LOGGERS_FILE).unlink()
  with pytest.raises(
    UserError, match=r"mlflow cannot open a run \(\w+: .*MLFLOW_TRACKING_URI"
  ) as e:
    write(workdir, 1, (2,), loggers=("wandb", "mlflow"))
  assert "\n" not in str(e.value)


def test_a_logger_that_hangs_is_not_waited_for(workdir, monkeypatch, caplog):
  released, taken = threading.Event(), []

  class Slow:
    run_id = "1"

    def __init__(self, *_):
      pass

    def log(self, step, metrics):
      taken.append(step)
      released.wait()

    def close(self, failed):
      pass

  monkeypatch.setitem(loggers.LOGGERS, "wandb", Slow)
  monkeypatch.setattr(loggers, "MOST_WAITING", 5)
  monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.2)
  config, start = tiny_config(loggers=("wandb",)), time.monotonic()
  (sender,) = loggers.open_loggers(config, str(workdir))
  with caplog.at_level(logging.WARNING), MetricsWriter(str(workdir), 0, [sender]) as writer:
    for step in range(20):
      writer.write(step, {"total_loss": 1.0})
  assert time.monotonic() - start < 10
  assert caplog.text.count("config.loggers: wandb: 5 lines wait for it") == 1
  released.set()
  while sender._thread.is_alive():
    time.sleep(0.01)
  # those that wait, and the one that hangs, which may have left the queue later
  assert taken[:5] == [0, 1, 2, 3, 4] and len(taken) in (5, 6)


def test_packages_that_are_not_installed_and_damaged_files_are_reported(workdir, monkeypatch):
  loggers.check_installed(("wandb", "mlflow"))
  for module, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"not installed: pip install {package}$"):
      loggers.check_installed((module,))
  for content in ("{", "[]", '{"wandb": 3}'):
    (workdir / loggers.LOGGERS_FILE).write_text(content)
    with pytest.raises(UserError, match=r"loggers\.json.*delete it to begin new runs"):
      loggers.open_loggers(tiny_config(loggers=("wandb",)), str(workdir))
