"""Two processes train as one, stop together, and report what is missing."""

import json
import re
import signal

import pytest

import fpt_jax
from fpt_jax.run import lock
from fpt_jax.run.folder import run_folder
from tests.runs import command, config_file, error_lines, free_port, losses_by_step, succeed
from tests.test_train import wait_for_step


def two(*flags: str):
  """Starts two processes that share the devices of both."""
  common = (f"--coordinator=localhost:{free_port()}", "--num_processes=2")
  return [command(*flags, *common, f"--process_id={i}") for i in range(2)]


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(tmp_path):
  file = config_file(tmp_path, steps=4000, checkpoint__every_steps=2000)
  workdir = tmp_path / "two"
  processes = two(f"--config={file}", f"--workdir={workdir}")
  wait_for_step(workdir, 3, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  steps = set()
  for process in processes:
    (line,) = error_lines(process)
    assert process.returncode == 2
    steps.add(int(re.search(r"stopped by a signal; step (\d+) is saved", line)[1]))
  (step,) = steps
  assert fpt_jax.restore(str(workdir)).step == step
  assert not (workdir / "running.lock").exists()
  file = config_file(tmp_path, steps=3)
  one = tmp_path / "one"
  succeed(command(f"--config={file}", f"--workdir={one}"))
  found, expected = losses_by_step(workdir), losses_by_step(one)
  for name, value in expected[1].items():
    assert found[1][name] == pytest.approx(value, rel=1e-4), name

  # both evaluate what one process has trained
  results = one / "eval" / "coco_instances_results.json"
  scores = [result["score"] for result in json.loads(results.read_text())]
  results.unlink()
  for process in two("--mode=eval", f"--workdir={one}"):
    succeed(process)
  found = [result["score"] for result in json.loads(results.read_text())]
  assert sorted(found) == pytest.approx(sorted(scores), rel=1e-3)


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_both(tmp_path):
  """The others must not wait for it."""
  file = config_file(tmp_path)
  with lock.locked(run_folder(str(tmp_path / "run"))):
    for process in two(f"--config={file}", f"--workdir={tmp_path}/run"):
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
