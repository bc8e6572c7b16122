"""Training writes its files, resumes exactly, compiles once, and reports errors."""

import contextlib
import itertools
import json
import logging
import re
import resource
import shutil
import signal
import time

import jax
import mlflow
import numpy as np
import pytest

import fpt_jax
from fpt_jax import models, optim
from fpt_jax.errors import UserError
from fpt_jax.models.costs import INTERPOLATIONS
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.profile import Steps
from fpt_jax.tasks import detection
from fpt_jax.tasks.task import task_of
from fpt_jax.train import train
from fpt_jax.train_step import make_train_step, state_shapes
from tests.data_sets import write_coco
from tests.runs import (
  command,
  config_file,
  error_lines,
  host_devices,
  losses_by_step,
  succeed,
  tiny_config,
  tiny_segmentation_config,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "total_loss"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns folder, metrics and log messages about compilation of a run of 6 steps."""
  workdir = tmp_path_factory.mktemp("run")
  config = tiny_config(steps=6, data__flip=False)
  records = []
  handler = logging.Handler()
  handler.emit = lambda record: records.append(record.getMessage())
  logger = logging.getLogger("jax._src.dispatch")
  logger.addHandler(handler)
  before = logger.level
  logger.setLevel(logging.DEBUG)
  metrics = train(config, str(workdir), profile_steps=Steps(3, 4))
  logger.setLevel(before)
  logger.removeHandler(handler)
  return workdir, metrics, records


def test_files_that_a_run_writes(finished):
  workdir, metrics, _ = finished
  losses = losses_by_step(workdir)
  assert set(losses) == {1, 2, 3, 4, 5, 6}
  assert all(set(entry) == LOSSES for entry in losses.values())
  for entry in losses.values():
    parts = sum(v for k, v in entry.items() if k != "total_loss")
    assert entry["total_loss"] == pytest.approx(parts, rel=1e-5)
  assert {"bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"} <= set(metrics)
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  assert last["step"] == 6 and last["segm/AP"] == metrics["segm/AP"]
  assert json.loads((workdir / "config.json").read_text())["steps"] == 6
  kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert kept == [2, 4, 6]
  assert list(workdir.glob("events.out.tfevents*"))
  results = json.loads((workdir / "eval" / "coco_instances_results.json").read_text())
  assert all(
    {"image_id", "category_id", "bbox", "score", "segmentation"} <= set(r) for r in results
  )


def entries_of(workdir):
  """Returns what training wrote into metrics.jsonl, by step."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {entry["step"]: entry for entry in lines if "total_loss" in entry}


def norm_of(arrays, names):
  return np.sqrt(sum(np.sum(np.square(np.float64(arrays[name]))) for name in names))


def test_norms_of_gradients_parameters_and_updates(finished):
  workdir, _, _ = finished
  restored, entries = fpt_jax.restore(str(workdir)), entries_of(workdir)
  parameters = models.structure_of(restored.config).parameters()
  trained = optim.trainable(restored.config, parameters)
  for step in (2, 4, 6):
    arrays = fpt_jax.restore(str(workdir), step).arrays
    assert entries[step]["param_norm"] == pytest.approx(norm_of(arrays, trained), rel=1e-5)
  # before the first step, the momentum is zero and the weights are those of the seed
  rate, decay = entries[1]["lr"], restored.config.optim.weight_decay
  clipped = min(entries[1]["grad_norm"], restored.config.optim.clip_norm)
  slack = decay * entries[1]["param_norm"] * 1.1
  assert entries[1]["update_norm"] / rate == pytest.approx(clipped, abs=slack)
  assert all(e["grad_norm"] > 0 and e["update_norm"] > 0 for e in entries.values())


def test_the_trace_of_some_steps(finished):
  workdir, _, _ = finished
  (file,) = workdir.glob("profile/plugins/profile/steps_3_4/*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(file)).planes
  events = [event for plane in planes for line in plane.lines for event in line.events]
  assert [dict(e.stats)["step_num"] for e in events if e.name == "train_step"] == [3, 4]


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


def equations_of(jaxpr, scope=""):
  """Yields the equations of a jaxpr and of those inside it, with the scopes around each."""
  for equation in jaxpr.eqns:
    name = f"{scope}/{equation.source_info.name_stack}"
    yield equation, name
    for value in equation.params.values():
      for item in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(item, "jaxpr", item)
        if hasattr(inner, "eqns"):
          yield from equations_of(inner, name)


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


@pytest.mark.parametrize("make", [tiny_config, tiny_segmentation_config])
def test_bfloat16_is_the_dtype_of_layers_only(make):
  config = make(model__dtype="bfloat16")
  structure, optimizer, task = models.structure_of(config), optim.optimizer(config), task_of(config)
  state = state_shapes(structure, optim.trainable(config, structure.parameters()), optimizer)
  batch = task.batch_shapes(config, 2, task.canvas(config))
  key = jax.eval_shape(lambda: jax.random.key(0))
  scalars = jax.ShapeDtypeStruct((), np.int32), key, jax.ShapeDtypeStruct((), bool)
  step = make_train_step(structure, optimizer, total_steps=8)
  jaxpr, (updated, losses, _) = jax.make_jaxpr(step, return_shape=True)(state, batch, *scalars)
  for leaf in jax.tree.leaves((state, updated, losses)):
    assert leaf.dtype in (np.float32, np.int32)  # int32: counts of steps

  layers = ("backbone", "pyramid", "rpn", "box_head", "mask_head", "/head", "rendering_", "fuse.")
  found = set()
  for equation, scope in equations_of(jaxpr.jaxpr):
    forward = "jvp" in scope and "transpose" not in scope
    layer = next((name for name in layers if name in scope.replace("(", "/")), None)
    product = equation.primitive.name == "dot_general" and not any(
      n in scope for n in INTERPOLATIONS
    )
    if equation.primitive.name == "conv_general_dilated" or (product and forward and layer):
      assert {v.aval.dtype.name for v in equation.invars} == {"bfloat16"}, scope
      found.add(layer)
  assert {"pyramid", "fuse."} < found


def test_parts_that_the_devices_cannot_share_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"batch_size=4 cannot be computed in .*accumulate_steps=3 "):
    train(tiny_config(optim__accumulate_steps=3), str(tmp_path))


def test_scores_are_kept_if_their_file_cannot_be_written(finished, tmp_path, caplog):
  workdir, metrics, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  file = tmp_path / "run" / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  file.write_text("".join(lines[:-1]))  # the evaluation of the last step runs again
  results = tmp_path / "run" / "eval" / "coco_instances_results.json"
  results.unlink()
  results.mkdir()
  with caplog.at_level(logging.ERROR):
    assert train(tiny_config(steps=6, data__flip=False), str(tmp_path / "run")) == metrics
  assert "coco_instances_results.json cannot be written" in caplog.text
  assert file.read_text().splitlines(keepends=True) == lines


def test_other_loggers_get_what_metrics_jsonl_has(finished, tmp_path, monkeypatch):
  """A run that began without a logger is resumed with one."""
  shutil.copytree(finished[0], tmp_path / "run")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  train(tiny_config(steps=8, data__flip=False, loggers=("mlflow",)), str(tmp_path / "run"))
  (run_id,) = json.loads((tmp_path / "run" / "loggers.json").read_text()).values()
  client = mlflow.MlflowClient()
  run = client.get_run(run_id)
  assert run.info.run_name == "run" and run.info.status == "FINISHED"
  assert "striped" in run.data.params["model.category_names"]  # from the data set
  losses = client.get_metric_history(run_id, "total_loss")
  written = losses_by_step(tmp_path / "run")
  assert {m.step: m.value for m in losses} == {s: written[s]["total_loss"] for s in (7, 8)}
  assert [m.step for m in client.get_metric_history(run_id, "segm/AP")] == [8]
  images = tmp_path.glob("mlruns/**/images/*.png")
  assert any(re.match(r"eval.errors.step.8\D", image.name) for image in images)


def test_the_best_checkpoint_stays_and_the_training_ends_early(
  finished, tmp_path, monkeypatch, caplog
):
  """Six more steps would follow; evaluations with scores of our own, each after its checkpoint."""
  shutil.copytree(finished[0], tmp_path / "run")
  workdir, scores = str(tmp_path / "run"), iter((50.0, 40.0, 50.0))

  def evaluate(config, structure, arrays, mesh, workdir):
    return {"bbox/AP": 1.0, "segm/AP": next(scores)}

  monkeypatch.setattr(detection, "evaluate", evaluate)
  fields = dict(steps=20, data__flip=False, eval__every_steps=1, eval__patience=2)
  fields |= dict(checkpoint__best_metric="segm/AP", checkpoint__keep=1)
  with caplog.at_level(logging.INFO):
    for _ in range(2):  # the second time, there is nothing to do
      train(tiny_config(**fields), workdir)
  assert caplog.text.count("segm/AP has not improved in 2 evaluations since step 7") == 2
  kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
  assert kept == [7, 9]
  assert fpt_jax.restore(workdir).step == 9
  assert fpt_jax.restore(workdir, step="best").step == 7
  fields["checkpoint__best_metric"] = "context/other"
  with pytest.raises(UserError, match=r"'context/other' is not among the metrics .* at step 6"):
    train(tiny_config(**fields), workdir)


def test_one_compilation_per_input_shape(finished):
  _, _, records = finished
  compiled = [m for m in records if re.match(r"Finished XLA compilation of jit\(train_step\)", m)]
  assert len(compiled) == 1, compiled


def test_restore_predicts_on_images_of_any_size(finished, rng):
  workdir, _, _ = finished
  restored = fpt_jax.restore(str(workdir))
  assert restored.step == 6
  assert fpt_jax.restore(str(workdir), step=4).step == 4
  images = [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((64, 64), (37, 51), (9, 200))]
  for image, found in zip(images, restored.predict(images), strict=True):
    height, width = image.shape[:2]
    count = len(found["scores"])
    assert found["boxes_xyxy"].shape == (count, 4) and found["labels"].shape == (count,)
    assert found["masks"].shape == (count, height, width) and found["masks"].dtype == bool
    assert (np.diff(found["scores"]) <= 0).all()
    assert set(found["labels"].tolist()) <= set(restored.config.model.category_ids)
    low, high = found["boxes_xyxy"][:, :2], found["boxes_xyxy"][:, 2:]
    assert (low >= -1e-3).all() and (high <= np.array([width, height]) + 1e-3).all()
  with pytest.raises(ValueError, match=r"image 0 must be a uint8 array .*float64 \(4, 4, 3\)"):
    restored.predict([np.zeros((4, 4, 3))])
  with pytest.raises(UserError, match=r"has no step 5; its steps are \[2, 4, 6\]"):
    fpt_jax.restore(str(workdir), step=5)


def test_another_model_or_training_is_refused_and_nothing_is_touched(finished):
  workdir, _, _ = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  with pytest.raises(UserError, match=r"model\.mask_head\.hidden was 8, now 4"):
    train(tiny_config(steps=6, model__mask_head__hidden=4), str(workdir))
  with pytest.raises(UserError, match=r"another config \(optim\.learning_rate was .*, now 0\.7"):
    train(tiny_config(steps=6, data__flip=False, optim__learning_rate=0.7), str(workdir))
  (workdir / "config.json").rename(workdir / "away.json")
  with pytest.raises(UserError, match=r"step 6 in .* belongs to another model: .*mask_head"):
    train(tiny_config(steps=8, model__mask_head__hidden=4), str(workdir))
  (workdir / "away.json").rename(workdir / "config.json")
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_init_from_takes_the_arrays_that_fit(finished, tmp_path):
  workdir, _, _ = finished
  config = tiny_config(steps=1, init_from=str(workdir), model__num_classes=5)
  config.optim.learning_rate = 0.0
  train(config, str(tmp_path))
  old, new = (fpt_jax.restore(str(w)).arrays for w in (workdir, tmp_path))
  assert all((old[n] == new[n]).all() for n in old if n.endswith("kernel"))


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
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  config = tiny_config(steps=8, optim__learning_rate=1e20, optim__clip_norm=0.0)
  config.checkpoint.every_steps = 1
  with pytest.raises(UserError, match=r"step [2-8]: .*total_loss.* is not finite"):
    train(config, str(tmp_path))
  saved = checkpoints.manager(str(tmp_path))
  newest = checkpoints.choose_step(saved)
  saved.close()
  arrays = fpt_jax.restore(str(tmp_path), newest).arrays
  assert all(np.isfinite(array).all() for array in arrays.values())


def wait_for_step(workdir, step, process, seconds=900):
  """Waits until metrics.jsonl has reached a step."""
  file, end = workdir / "metrics.jsonl", time.monotonic() + seconds
  while time.monotonic() < end and process.poll() is None:
    if file.exists() and any(f'"step": {n},' in file.read_text() for n in range(step, step + 20)):
      return
    time.sleep(0.05)
  raise AssertionError(f"step {step} was not reached: {process.communicate()[1][-2000:]}")


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


def test_data_without_objects_end_a_run_before_it_begins(tmp_path):
  content = write_coco(tmp_path / "coco")
  for annotation in content["annotations"]:
    annotation["iscrowd"] = 1
  (tmp_path / "coco/annotations/instances_train2017.json").write_text(json.dumps(content))
  config = tiny_config(
    data__name="coco",
    data__source=str(tmp_path / "coco"),
    data__data_dir=str(tmp_path / "data"),
    data__builder={},
  )
  with pytest.raises(UserError, match="has no object to train on"):
    train(config, str(tmp_path / "run"))
  for written in ("config.json", "metrics.jsonl", "checkpoints"):
    assert not (tmp_path / "run" / written).exists()
