"""Several processes train and evaluate as one, stop together, and report what is missing."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from flax import nnx

import fpt_jax
from fpt_jax import data, models
from fpt_jax.models.state import initial_arrays
from fpt_jax.run import checkpoints, lock
from fpt_jax.run.config_file import write_config
from fpt_jax.run.folder import run_folder
from fpt_jax.run.metrics import read_metrics
from fpt_jax.tasks import segmentation
from fpt_jax.tasks.detection import coco_ap
from tests.runs import (
  command,
  config_file,
  error_lines,
  free_port,
  host_devices,
  losses_by_step,
  succeed,
  tiny_segmentation_config,
  wait_for_step,
)


def start(count: int, *flags: str):
  """Starts processes that share the devices of all of them."""
  common = (f"--coordinator=localhost:{free_port()}", f"--num_processes={count}")
  return [command(*flags, *common, f"--process_id={i}") for i in range(count)]


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(tmp_path):
  """Two processes of one device, and one process of two devices, compute the same numbers."""
  # three images in batches of two: the second process has one image less
  fields = dict(steps=60, eval__batch_size=2, data__eval_split="val[:3]")
  file = config_file(tmp_path, **fields, checkpoint__every_steps=2000)
  one, both = tmp_path / "one", tmp_path / "both"
  succeed(command(f"--config={file}", f"--workdir={one}", **host_devices(2)))
  processes = start(2, f"--config={file}", f"--workdir={both}")
  wait_for_step(both, 3, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  steps = set()
  for process in processes:
    (line,) = error_lines(process)
    assert process.returncode == 75
    steps.add(int(re.search(r"stopped by a signal; step (\d+) is saved", line)[1]))
  (step,) = steps
  assert fpt_jax.restore(str(both)).step == step < 60
  assert not (both / "running.lock").exists()

  # one process goes on
  succeed(command(f"--config={file}", f"--workdir={both}", **host_devices(2)))
  assert losses_by_step(both) == losses_by_step(one)
  ours, theirs = (fpt_jax.restore(str(workdir)).arrays for workdir in (both, one))
  assert all((ours[name] == theirs[name]).all() for name in theirs)
  ours, theirs = (read_metrics(str(workdir))[-1] for workdir in (both, one))
  assert ours == theirs and ours["step"] == 60

  # both evaluate what one process has trained
  results = one / "eval" / "coco_instances_results.json"
  expected = results.read_text()
  results.unlink()
  logs = [succeed(process) for process in start(2, "--mode=eval", f"--workdir={one}")]
  assert len(json.loads(expected)) > 3 and results.read_text() == expected
  assert coco_ap.format_table(theirs) in logs[0]


@pytest.mark.slow
def test_four_processes_evaluate_segmentation_as_one(tmp_path):
  # three images in a batch of four: the last process has none
  fields = dict(data__eval_split="val[:3]", eval__sets=(("few", "val[:1]"),))
  config = tiny_segmentation_config("fpt=none", eval__batch_size=4, **fields)
  segmentation.adopt_classes(config, data.info(config.data))
  arrays = initial_arrays(lambda: models.build(config, nnx.Rngs(0)))
  with checkpoints.closing(checkpoints.manager(str(tmp_path))) as saved:
    checkpoints.save(saved, 0, arrays)
  write_config(str(tmp_path), config)
  flags = ("--mode=eval", f"--workdir={tmp_path}")
  succeed(command(*flags, **host_devices(4)))
  files = [tmp_path / "eval" / name for name in ("confusion.json", "few/confusion.json")]
  expected = [file.read_text() for file in files]
  shutil.rmtree(tmp_path / "eval")
  for process in start(4, *flags):
    succeed(process)
  assert [np.sum(json.loads(text)["counts"]) for text in expected] == [3 * 64 * 64, 64 * 64]
  assert [file.read_text() for file in files] == expected


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_both(tmp_path):
  """The others must not wait for it."""
  file = config_file(tmp_path)
  with lock.locked(run_folder(str(tmp_path / "run"))):
    for process in start(2, f"--config={file}", f"--workdir={tmp_path}/run"):
      (line,) = error_lines(process)
      assert process.returncode == 2
      assert "is in use by process" in line or "the first host has stopped" in line


@pytest.mark.slow
def test_processes_that_cannot_join_are_reported(tmp_path):
  process = command(
    "--config=configs/coco_mask.py:demo",
    f"--workdir={tmp_path}",
    JAX_COORDINATOR_ADDRESS="localhost:1",
  )
  (line,) = error_lines(process)
  assert process.returncode == 2
  assert "cannot join the other processes that JAX_COORDINATOR_ADDRESS=localhost:1 names" in line


def test_modes_for_one_process_do_not_wait_for_others(tmp_path):
  process = command(
    "--mode=predict", f"--workdir={tmp_path}", JAX_COORDINATOR_ADDRESS="localhost:1"
  )
  (line,) = error_lines(process)
  assert process.returncode == 2 and "--mode=predict runs in one process" in line
