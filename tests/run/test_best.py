"""The best step of a run, its checkpoint, and when the training ends."""

import json

import jax.numpy as jnp
import pytest

from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.run import checkpoints
from fpt_jax.run.best import Best, best_of_run, best_step, parsed_step


def scored(mode, *scores):
  best = Best("AP", mode)
  for step, score in enumerate(scores, start=1):
    best.add(10 * step, {"AP": score, "loss": 1.0})
  return best


@pytest.mark.parametrize(
  ("mode", "scores", "step", "since"),
  [
    ("max", (), None, 0),
    ("max", (5.0,), 10, 0),
    ("max", (5.0, 7.0, 6.0), 20, 1),
    ("min", (5.0, 7.0, 6.0), 10, 2),
    ("max", (5.0, 5.0, 5.0), 10, 2),  # equal is not better
    ("min", (5.0, 4.0, 3.0), 30, 0),
  ],
)
def test_the_best_step_and_the_evaluations_since(mode, scores, step, since):
  best = scored(mode, *scores)
  assert best.step() == step and best.evaluations_since() == since


def test_the_best_step_of_those_that_are_left():
  best = scored("max", 5.0, 7.0, 6.0)
  assert best.step([10, 30, 40]) == 30
  assert best.step([40]) is None
  best = Best("", "max")
  best.add(10, {"AP": 5.0})
  assert best.step() is None and best.evaluations_since() == 0


@pytest.mark.parametrize("value", [{}, {"segm/AP": float("nan")}])
def test_a_metric_that_an_evaluation_does_not_have_is_reported(value):
  best = Best("segm/AP", "max")
  message = "'segm/AP' is not among .* at step 8; choose one of bbox/AP, bbox/AP50$"
  with pytest.raises(UserError, match=message):
    best.add(8, {"step": 8, "bbox/AP": 1.0, "bbox/AP50": 2.0} | value)


def arrays(step):
  return {"kernel": jnp.full((2, 3), float(step))}


@pytest.mark.parametrize(
  ("keep", "mode", "kept"),
  [
    (1, "max", [4, 12]),
    (2, "max", [4, 10, 12]),
    (1, "min", [8, 12]),
    (4, "max", [4, 6, 8, 10, 12]),
  ],
)
def test_the_best_checkpoint_is_kept_beside_the_newest(keep, mode, kept, tmp_path):
  """Checkpoints every 2 steps, evaluations every 4, each after its checkpoint."""
  best = Best("AP", mode)
  scores = {4: 9.0, 8: 3.0, 12: 5.0}
  saved = checkpoints.manager(str(tmp_path), keep, best=lambda steps: best.step(steps))
  with checkpoints.closing(saved):
    for step in range(2, 13, 2):
      checkpoints.save(saved, step, arrays(step))
      if step in scores:
        best.add(step, {"AP": scores[step]})
  with checkpoints.closing(checkpoints.manager(str(tmp_path), create=False)) as saved:
    assert sorted(saved.all_steps()) == kept
    assert checkpoints.choose_step(saved) == 12
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept


@pytest.fixture
def run(tmp_path):
  lines = [
    {"step": 2, "total_loss": 1.0},
    {"step": 2, "bbox/AP": 50.0},  # of a version without the other metric
    {"step": 4, "bbox/AP": 30.0, "bbox/AR@10": 40.0},
    {"step": 6, "bbox/AP": 20.0, "bbox/AR@10": 60.0},
    {"step": 8, "bbox/AP": 40.0, "bbox/AR@10": 10.0},
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(tmp_path)


def config(metric, mode="max"):
  config = coco_mask.get_config("demo")
  config.checkpoint.update(dict(best_metric=metric, best_mode=mode))
  return config


def test_the_best_step_of_a_run_is_read_from_its_metrics(run):
  assert best_of_run(run, config("bbox/AP")).step() == 2
  assert best_of_run(run, config("bbox/AP"), last_step=0).step() is None
  assert best_of_run(run, config("bbox/AR@10")).evaluations_since() == 1
  assert best_of_run(run, config("bbox/AR@10"), last_step=4).step() == 4
  assert best_step(run, config("bbox/AP"), [4, 6, 8]) == 8
  assert best_step(run, config("bbox/AP", "min"), [4, 6, 8]) == 6


@pytest.mark.parametrize(
  ("metric", "steps", "message"),
  [
    ("", [4], "the run has no config.checkpoint.best_metric"),
    ("bbox/AP", [3, 5], r"no checkpoint has been evaluated .* one of \[3, 5\]"),
    ("segm/AP", [4], "'segm/AP' is not among .* at step 2; choose one of bbox/AP"),
  ],
)
def test_a_best_step_that_cannot_be_told_is_reported(run, metric, steps, message):
  with pytest.raises(UserError, match=message):
    best_step(run, config(metric), steps)


def test_a_missing_metric_of_another_run_is_reported(run):
  with pytest.raises(UserError, match=r"best_metric .* give --config\.init_from_step as a number$"):
    best_step(run, config(""), [4], flag="--config.init_from_step")


def test_steps_are_numbers_or_the_best():
  assert [parsed_step(text) for text in ("", "0", "120", "best")] == [None, 0, 120, "best"]
  for text in ("newest", "-1", "1.5", "9" * 30):
    with pytest.raises(UserError, match=f"--step={text} must be a number of training steps, or b"):
      parsed_step(text)
