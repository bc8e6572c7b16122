"""A training that is interrupted, or continued elsewhere, goes on as if nothing had happened."""

import contextlib
import itertools
import json
import re
import resource
import shutil
import signal

import jax
import numpy as np
import pytest

import fpt_jax
from fpt_jax import models
from fpt_jax.errors import UserError
from fpt_jax.run import checkpoints, sharding
from fpt_jax.tasks import detection
from fpt_jax.train import train
from tests.data_sets import write_coco
from tests.runs import (
  command,
  config_file,
  entries_of,
  error_lines,
  host_devices,
  losses_by_step,
  norm_of,
  succeed,
  tiny_config,
  tiny_segmentation_config,
  wait_for_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_accumulation_trains_like_whole_batches_and_resumes_exactly(tmp_path):
  """Without batch statistics and dropout, whose results depend on the images computed together."""

  def run(name, parts, steps):
    config = tiny_segmentation_config("head=fcn", steps=steps, checkpoint__every_steps=1)
    config.model.norm = config.model.backbone.norm = "group_norm"
    config.model.head.dropout = 0.0
    config.optim.update(dict(accumulate_steps=parts, schedule="step", decay_at=()))
    train(config, str(tmp_path / name))
    arrays = [fpt_jax.restore(str(tmp_path / name), s).arrays for s in (steps - 1, steps)]
    return entries_of(tmp_path / name), *arrays

  entries, before, after = run("parts", 2, 4)
  assert set(entries) == {1, 2, 3, 4}
  moved = norm_of({n: after[n] - before[n] for n in after}, after)
  assert entries[4]["update_norm"] == pytest.approx(moved, rel=1e-3)
  expected, _, whole = run("whole", 1, 4)
  for step, entry in entries.items():
    for name in ("total_loss", "lr", "grad_norm", "update_norm", "param_norm"):
      assert entry[name] == pytest.approx(expected[step][name], rel=1e-3), (step, name)
  for name, array in whole.items():
    np.testing.assert_allclose(after[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
  run("resumed", 2, 2)
  resumed, _, arrays = run("resumed", 2, 4)
  speeds = {"images_per_second", "data_wait", "eta_seconds"}
  for step, entry in entries.items():
    assert {k: v for k, v in resumed[step].items() if k not in speeds} == {
      k: v for k, v in entry.items() if k not in speeds
    }
  assert all((arrays[n] == after[n]).all() for n in after)


@pytest.mark.slow
def test_averaged_weights_are_used_and_resumed_exactly(tmp_path):
  """Of AdamW with a group of its own, in two parts: what is saved, evaluated, restored and started from."""

  def run(name, steps, **optimizer):
    config = tiny_segmentation_config("head=fcn", steps=steps, checkpoint__every_steps=1)
    config.checkpoint.keep = 5
    config.optim.update(dict(name="adamw", accumulate_steps=2, schedule="step", decay_at=()))
    config.optim.update(dict(groups=(("^head", 0.5, 0.0),), ema_decay=0.15) | optimizer)
    train(config, str(tmp_path / name))

  run("whole", 4)
  structure = models.structure_of(fpt_jax.restore(str(tmp_path / "whole")).config)
  names = structure.parameters() | structure.statistics()
  shapes = sharding.on_one_device({n: structure.shapes[n] for n in names})
  saved = checkpoints.manager(str(tmp_path / "whole"), create=False)
  averages = {step: fpt_jax.restore(str(tmp_path / "whole"), step).arrays for step in (1, 2, 3, 4)}
  for step, decay in ((2, 0.15), (3, 0.15), (4, 0.15)):
    trained = checkpoints.restore_trained(saved, step, shapes)
    for name, array in trained.items():
      expected = decay * np.float64(averages[step - 1][name]) + (1 - decay) * np.float64(array)
      np.testing.assert_allclose(averages[step][name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
  assert any((averages[4][n] != trained[n]).any() for n in structure.statistics())
  saved.close()

  run("resumed", 2)
  run("resumed", 4)
  resumed = fpt_jax.restore(str(tmp_path / "resumed")).arrays
  assert all((resumed[n] == averages[4][n]).all() for n in resumed)
  assert losses_by_step(tmp_path / "resumed") == losses_by_step(tmp_path / "whole")
  scores = [
    json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])
    for n in ("whole", "resumed")
  ]
  assert scores[0]["mIoU"] == scores[1]["mIoU"]
  for path in ("whole", "resumed"):
    config = tmp_path / path / "config.json"
    config.write_text(config.read_text().replace('"ema_decay": 0.15', '"ema_decay": 0.0'))
  with pytest.raises(UserError, match=r"step 4 in .* has moving averages; resume with"):
    run("whole", 6, ema_decay=0.0)


@pytest.mark.slow
def test_steps_before_an_error_are_kept(tmp_path, monkeypatch):
  @contextlib.contextmanager
  def two_batches(config, start):
    with batches_of(config, start) as batches:
      yield itertools.chain(itertools.islice(batches, 2), bad_record())

  def bad_record():
    raise UserError("record 3 cannot be read")
    yield

  batches_of = detection.train_batches
  config = tiny_config(steps=6, data__flip=False, checkpoint__every_steps=100, log_every=100)
  monkeypatch.setattr(detection, "train_batches", two_batches)
  with pytest.raises(UserError, match="record 3 cannot be read"):
    train(config, str(tmp_path))
  monkeypatch.undo()
  assert fpt_jax.restore(str(tmp_path)).step == 2


@pytest.mark.slow
def test_other_training_data_are_noticed(tmp_path):
  content = write_coco(tmp_path / "coco")
  fields = dict(data__name="coco", data__source=str(tmp_path / "coco"), data__builder={})
  fields |= dict(data__data_dir=str(tmp_path / "data"), steps=1, batch_size=4)
  train(tiny_config(**fields), str(tmp_path / "run"))
  (tmp_path / "coco").rename(tmp_path / "moved")
  fields |= dict(data__source=str(tmp_path / "moved"))
  shutil.rmtree(tmp_path / "data")
  train(tiny_config(**fields), str(tmp_path / "run"))  # the same files elsewhere
  content["annotations"][0]["bbox"][2] += 1
  file = tmp_path / "moved/annotations/instances_train2017.json"
  file.write_text(json.dumps(content))
  shutil.rmtree(tmp_path / "data")
  with pytest.raises(UserError, match=r"the files of data\.train_split have changed"):
    train(tiny_config(**fields), str(tmp_path / "run"))


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
  """With every augmentation."""
  augmentation = dict(data__crop=(64, 64), data__scale=(0.5, 2.0), data__copy_paste=0.5)
  augmentation |= dict(data__color_jitter=(0.4, 0.4, 0.4, 0.1))
  file = config_file(tmp_path, steps=60, checkpoint__every_steps=3, **augmentation)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  succeed(command(f"--config={file}", f"--workdir={whole}"))
  for step in (4, 25):
    process = command(f"--config={file}", f"--workdir={killed}")
    wait_for_step(killed, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
  succeed(command(f"--config={file}", f"--workdir={killed}"))
  expected = losses_by_step(whole)
  assert set(expected) == set(range(1, 61))
  assert losses_by_step(killed) == expected
  ours, theirs = (fpt_jax.restore(str(w)).arrays for w in (killed, whole))
  assert all((ours[n] == theirs[n]).all() for n in ours)


@pytest.mark.slow
def test_sigterm_saves_before_it_ends(tmp_path):
  file = config_file(tmp_path, steps=4000, checkpoint__every_steps=2000)
  workdir = tmp_path / "run"
  process = command(f"--config={file}", f"--workdir={workdir}")
  wait_for_step(workdir, 3, process)
  process.send_signal(signal.SIGTERM)
  (line,) = error_lines(process)
  assert process.returncode == 75
  step = int(re.search(r"stopped by a signal; step (\d+) is saved", line)[1])
  assert fpt_jax.restore(str(workdir)).step == step
  assert max(losses_by_step(workdir)) == step


@pytest.mark.slow
def test_two_devices_train_as_one_and_restore_on_one(tmp_path):
  file = config_file(tmp_path, steps=3)
  one, two = tmp_path / "one", tmp_path / "two"
  succeed(command(f"--config={file}", f"--workdir={one}"))
  succeed(command(f"--config={file}", f"--workdir={two}", **host_devices(2)))
  first, second = losses_by_step(one), losses_by_step(two)
  for name, value in first[1].items():
    assert second[1][name] == pytest.approx(value, rel=1e-4), name
  assert jax.device_count() == 1
  assert fpt_jax.restore(str(two)).step == 3


@pytest.mark.slow
def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path):
  file = config_file(tmp_path, steps=4, checkpoint__every_steps=2)
  workdir = tmp_path / "run"
  process = command(f"--config={file}", f"--workdir={workdir}")
  wait_for_step(workdir, 2, process)
  error_lines(process)
  file = config_file(tmp_path, steps=8, checkpoint__every_steps=2)
  process = command(f"--config={file}", f"--workdir={workdir}")
  # from here on, no file may grow beyond 100 kB: writes fail as on a full disk
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
  lines = [line for line in error_lines(process) if line.startswith("error:")]
  assert process.returncode == 2
  assert (
    len(lines) == 1
    and "could not be written" in lines[0]
    and "the complete ones are [2, 4]" in lines[0]
  )
  assert fpt_jax.restore(str(workdir)).step == 4
