"""Training writes its files, resumes exactly, compiles once, and reports errors."""

import json
import logging
import re
import shutil

import jax
import mlflow
import numpy as np
import pytest

import fpt_jax
from fpt_jax import models, optim
from fpt_jax.errors import UserError
from fpt_jax.initial_weights import starting_arrays
from fpt_jax.models.costs import INTERPOLATIONS
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.profile import Steps
from fpt_jax.tasks import detection
from fpt_jax.tasks.task import task_of
from fpt_jax.train import train
from fpt_jax.train_step import make_train_step, state_shapes
from tests.data_sets import write_coco
from tests.runs import (
  entries_of,
  losses_by_step,
  norm_of,
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

  def evaluate(config, arrays, folder):
    return {"bbox/AP": 1.0, "segm/AP": next(scores)}

  monkeypatch.setattr(detection, "evaluator", lambda *_: evaluate)
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
  shapes = fpt_jax.restore(workdir).structure.shapes
  for text, step in (("best", 7), ("9", 9)):
    config = tiny_config(init_from=workdir, init_from_step=text)
    started = starting_arrays(config, sharding.on_one_device(shapes))
    expected = fpt_jax.restore(workdir, step=step).arrays
    assert all((started[name] == expected[name]).all() for name in expected), text
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
