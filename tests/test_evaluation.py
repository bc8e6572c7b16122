"""A run is evaluated on several sets, each under its own name."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict, config_flags

import fpt_jax
from fpt_jax import data
from fpt_jax.errors import ResultsNotWrittenError, RunAgainError, UserError
from fpt_jax.evaluation import evaluator, prepare
from fpt_jax.run import sharding
from fpt_jax.run.eval_sets import configs_of_sets
from fpt_jax.run.metrics import read_metrics
from fpt_jax.run.stop import Stopped
from fpt_jax.tasks import segmentation
from fpt_jax.tasks.task import check_config
from fpt_jax.train import adopt_classes, train
from tests.data_sets import config as detection_data
from tests.data_sets import image_folder, write_coco
from tests.runs import tiny_config, tiny_segmentation_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

MAKERS = {"detection": tiny_config, "segmentation": tiny_segmentation_config}
WEIGHT = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)
OTHER_IMAGES = {"train_size": 4, "val_size": 3, "image_size": 64, "seed": 7}


def elsewhere(folder):
  """Returns the fields of a set of other images in another folder."""
  return {"data_dir": str(folder), "builder": OTHER_IMAGES, "eval_split": "val[1:]+train"}


def evaluated(config, workdir, times=1):
  """Evaluates a function of the pixels; returns the metrics and how often the function was traced."""
  seen = []

  def logits(image_BHWC, size_B2):
    seen.append(image_BHWC.shape)
    return (image_BHWC / 255 - 0.5) @ WEIGHT

  def detect(image_BHWC, size_B2):
    seen.append(image_BHWC.shape)
    score_B1 = image_BHWC.mean(axis=(1, 2, 3))[:, None] / 255
    boxes_D4 = jnp.array([[0.0, 0, 64, 64], [9, 9, 40, 40], [30, 20, 60, 60]])
    return {
      "boxes_BD4": jnp.tile(boxes_D4[None], (len(score_B1), 1, 1)),
      "scores_BD": score_B1 * jnp.array([[1.0, 0.9, 0.8]]),
      "labels_BD": jnp.tile(jnp.array([[1, 2, 3]]), (len(score_B1), 1)),
      "valid_BD": jnp.ones((len(score_B1), 3), bool),
    }

  model = SimpleNamespace(logits=logits, detect=detect)
  structure = SimpleNamespace(fill=lambda _: model)
  evaluate = evaluator(config, structure, sharding.mesh(), str(workdir))
  (metrics, *others) = [evaluate({}) for _ in range(times)]
  for other in others:
    np.testing.assert_equal(other, metrics)  # nan is nan
  return metrics, len(seen)


def ready(task, sets=(), **fields):
  """Returns the config of a run whose model takes its classes from the data."""
  if task == "detection":
    fields["model__mask_head__enabled"] = False
  config = MAKERS[task](eval__sets=sets, **fields)
  check_config(config)
  prepare(config)
  adopt_classes(config, "/none")
  return config


def files_in(folder):
  files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
  assert len(files) > 1
  return files


def of_set(metrics, name):
  return {m.removeprefix(f"{name}/"): v for m, v in metrics.items() if m.startswith(f"{name}/")}


@pytest.mark.parametrize("task", MAKERS)
def test_a_set_has_the_metrics_and_files_of_its_own_evaluation(task, tmp_path):
  other = elsewhere(tmp_path / "data")
  config = ready(task, (("same", "val"), ("other", other)))
  metrics, compiled = evaluated(config, tmp_path / "run", times=2)
  plain, compiled_alone = evaluated(ready(task), tmp_path / "plain")
  assert compiled == compiled_alone
  alone = ready(task)
  alone.data.update(other)
  others, _ = evaluated(alone, tmp_path / "alone")
  assert str(others) != str(plain)
  expected = plain | {f"same/{m}": v for m, v in plain.items()}
  np.testing.assert_equal(metrics, expected | {f"other/{m}": v for m, v in others.items()})
  written = tmp_path / "run" / "eval"
  assert files_in(written) == files_in(written / "same") == files_in(tmp_path / "plain" / "eval")
  assert files_in(written / "other") == files_in(tmp_path / "alone" / "eval")


def test_scores_of_all_sets_are_kept_if_a_file_cannot_be_written(tmp_path):
  config = ready("segmentation", (("a", "val"), ("b", "val[:1]")))
  expected, _ = evaluated(config, tmp_path / "run")
  confusion = tmp_path / "run" / "eval" / "a" / "confusion.json"
  confusion.unlink()
  confusion.mkdir()
  with pytest.raises(ResultsNotWrittenError, match=r"eval/a/confusion\.json cannot be") as error:
    evaluated(config, tmp_path / "run")
  np.testing.assert_equal(error.value.metrics, expected)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns the folder and the fields of a run of 2 steps."""
  workdir = tmp_path_factory.mktemp("run")
  fields = dict(eval__every_steps=1, eval__sets=(("same", "val"), ("few", "val[:2]")))
  fields |= dict(checkpoint__best_metric="few/aAcc", checkpoint__keep=1)
  train(tiny_segmentation_config("fpt=none", steps=2, **fields), str(workdir))
  return workdir, fields


def test_a_training_writes_the_metrics_and_pictures_of_each_set(finished):
  workdir, _ = finished
  lines = [line for line in read_metrics(str(workdir)) if "mIoU" in line]
  assert [line["step"] for line in lines] == [1, 2]
  for line in lines:
    main = {m: v for m, v in line.items() if not m.startswith(("same/", "few/", "step"))}
    assert of_set(line, "same") == main
    assert {"mIoU", "aAcc", "IoU/background"} <= set(of_set(line, "few"))
  counts = json.loads((workdir / "eval" / "few" / "confusion.json").read_text())["counts"]
  assert np.sum(counts) == 2 * 64 * 64
  tags = set()
  for file in workdir.glob("events*"):
    for event in tf.compat.v1.train.summary_iterator(str(file)):
      tags |= {value.tag for value in event.summary.value}
  assert {"few/mIoU", "mIoU", "eval/confusion", "eval/same/confusion", "eval/few/confusion"} <= tags


def test_the_best_checkpoint_is_that_of_a_set(finished):
  workdir, _ = finished
  scores = {line["step"]: line["few/aAcc"] for line in read_metrics(str(workdir)) if "mIoU" in line}
  best = 2 if scores[2] > scores[1] else 1
  assert fpt_jax.restore(str(workdir), step="best").step == best
  assert {int(p.name) for p in (workdir / "checkpoints").iterdir()} == {best, 2}


def test_an_evaluation_that_was_stopped_between_two_sets_is_done_again(
  finished, tmp_path, monkeypatch
):
  _, fields = finished
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  calls, stopped_at = [], ["same"]
  scores = {"eval": 1.0, "same": 2.0, "few": 3.0, "more": 4.0}

  def evaluate(config, arrays, folder):
    calls.append(folder.name)
    if folder.name in stopped_at:
      stopped_at.remove(folder.name)
      raise Stopped
    return {"mIoU": scores[folder.name], "aAcc": 10 * scores[folder.name]}

  monkeypatch.setattr(segmentation, "evaluator", lambda *_: evaluate)

  def run(**changes):
    """Returns the sets that are evaluated, and the mIoU in the last line of metrics."""
    calls.clear()
    with contextlib.suppress(RunAgainError):
      train(tiny_segmentation_config("fpt=none", steps=3, **fields | changes), str(workdir))
    last = read_metrics(str(workdir))[-1]
    return calls, {name: value for name, value in last.items() if name.endswith("mIoU")}

  assert run() == (["eval", "same"], {})
  whole = {"mIoU": 1.0, "same/mIoU": 2.0, "few/mIoU": 3.0}
  assert run() == (["eval", "same", "few"], whole)
  assert run() == ([], whole)
  # a set that has been added is evaluated at the step that the run goes on from
  more = {"eval__sets": (*fields["eval__sets"], ("more", "val"))}
  assert run(**more) == (["eval", "same", "few", "more"], whole | {"more/mIoU": 4.0})


@pytest.mark.parametrize("task", MAKERS)
def test_sets_are_read_from_json_and_the_command_line(task, tmp_path):
  config = ready(task, (("few", "val[:2]"), ("other", elsewhere(tmp_path))))
  read = ConfigDict(json.loads(config.to_json()))
  check_config(read)
  for name, expected in configs_of_sets(config).items():
    assert configs_of_sets(read)[name].to_json() == expected.to_json()
  parser = config_flags.tuple_parser.TupleParser()
  assert parser.parse("(('few','val[:2]'),('other',{'source':'/data'}))") == (
    ("few", "val[:2]"),
    ("other", {"source": "/data"}),
  )


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize(
  ("sets", "message"),
  [
    (("few", "val"), "must be pairs of a name and a split"),
    ((("few", "val", "test"),), "must be pairs of a name and a split"),
    ((("few", 3),), "must be pairs of a name and a split"),
    (((3, "val"),), "must be pairs of a name and a split"),
    ((("a/b", "val"),), r"the name 'a/b' must have letters"),
    ((("", "val"),), r"the name '' must have letters"),
    ((("confusion.json", "val"),), r"the name 'confusion\.json' must have letters"),
    ((("submission", "val"),), "the name 'submission' is that of other metrics or files"),
    ((("few", "val"), ("Few", "val")), "two sets have the name 'Few'"),
    ((("few", {"flip": False}),), r"'few': a set has no field 'flip'; .* among .*buckets, "),
    ((("few", {"source": 3}),), r"'few': data\.source=3 must be of the type .*, ''"),
    ((("few", {"builder": "x"}),), r"'few': data\.builder=x must be of the type"),
    ((("few", {"buckets": ((0, 5),)}),), r"'few': config\.data\.buckets=.* must be pairs"),
    ((("few", {"exif": "no"}),), r"'few': config\.data\.exif='no' must be one of apply, ignore"),
  ],
)
def test_impossible_sets_are_reported(task, sets, message):
  config = MAKERS[task](eval__sets=sets)
  with pytest.raises(UserError, match=rf"config\.eval\.sets.*{message}") as error:
    check_config(config)
  assert "\n" not in str(error.value)


def test_names_of_metrics_are_no_names_of_sets():
  for make, name in ((tiny_config, "bbox"), (tiny_config, "segm"), (tiny_config, "context")):
    with pytest.raises(UserError, match=f"the name '{name}' is that of other metrics"):
      check_config(make(eval__sets=((name, "val"),)))
  for name in ("IoU", "mIoU"):
    with pytest.raises(UserError, match=f"the name '{name}' is that of other metrics"):
      check_config(tiny_segmentation_config(eval__sets=((name, "val"),)))


def test_the_best_metric_is_that_of_a_set_that_exists():
  config = tiny_config(eval__sets=(("few", "val"),), checkpoint__best_metric="few/segm/AP50")
  check_config(config)
  config.checkpoint.best_metric = "other/segm/AP50"
  with pytest.raises(UserError, match=r"'other/segm/AP50' must be one of bbox/AP, .* few/\.\.\.$"):
    check_config(config)


@pytest.mark.parametrize(
  ("task", "fields", "message"),
  [
    ("detection", {"eval_split": "test"}, r"'mine': split 'test' cannot be read from .*'train'"),
    ("segmentation", {"eval_split": "val[:0]"}, r"'mine': .*val\[:0\]"),
    ("detection", "coco", r"'mine': the data has categories \[3, 90\] that the model does not"),
    ("segmentation", "image_folder", r"'mine': the data has classes \['sky', 'road', 'car'\] that"),
    ("detection", {"name": "coco", "builder": {}, "source": "/none"}, r"'mine': .*/none"),
  ],
)
def test_data_of_a_set_that_do_not_fit_are_reported_before_the_training(
  task, fields, message, tmp_path
):
  if fields == "coco":
    write_coco(tmp_path / "source")
    mine = detection_data("coco", tmp_path / "data", source=str(tmp_path / "source"))
    fields = {"name": "coco", "source": mine.source, "data_dir": mine.data_dir, "builder": {}}
  elif fields == "image_folder":
    mine = image_folder(tmp_path)
    fields = {"name": "image_folder", "source": mine.source, "data_dir": mine.data_dir}
    fields["builder"] = mine.builder.to_dict()
  config = MAKERS[task](eval__sets=(("mine", fields),), steps=1)
  with pytest.raises(UserError, match=rf"config\.eval\.sets, {message}") as error:
    train(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value)
  assert (
    not list((tmp_path / "run").glob("checkpoints/*"))
    and not (tmp_path / "run" / "metrics.jsonl").exists()
  )


def test_a_set_that_is_not_prepared_is_reported(tmp_path):
  config = ready("segmentation")
  config.eval.sets = (("other", elsewhere(tmp_path)),)
  with pytest.raises(
    UserError, match=r"config\.eval\.sets, 'other': .*is not prepared; run --mode"
  ):
    evaluated(config, tmp_path / "run")
  prepare(config)
  assert data.is_prepared(configs_of_sets(config)["other"].data)


@pytest.mark.slow
def test_a_detector_is_trained_with_a_set(tmp_path):
  config = tiny_config(steps=1, eval__sets=(("same", "val"),))
  metrics = train(config, str(tmp_path))
  main = {m: v for m, v in metrics.items() if not m.startswith("same/")}
  assert {"bbox/AP", "segm/AP"} <= set(main)
  np.testing.assert_equal(of_set(metrics, "same"), main)
  results = [
    (tmp_path / "eval" / folder / "coco_instances_results.json").read_text()
    for folder in (".", "same")
  ]
  assert results[0] == results[1] and len(json.loads(results[0])) > 0
