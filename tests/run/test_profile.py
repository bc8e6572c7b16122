"""Traces of training steps: which steps they hold, and values that are refused."""

import jax
import jax.numpy as jnp
import pytest

from fpt_jax.errors import UserError
from fpt_jax.run import profile


def loop(workdir, steps, start=0, total=6, fail_at=None):
  """A loop of small steps as in training."""
  step_of = jax.jit(lambda x: x + 1)
  x = jnp.float32(0)
  with profile.Trace(str(workdir), steps, start) as trace:
    for step in range(start + 1, total + 1):
      trace.begin(step, x)
      with jax.profiler.StepTraceAnnotation("train_step", step_num=step):
        x = step_of(x)
      if step == fail_at:
        raise UserError("record 3 cannot be read")
      trace.end(step, x)


def traced_steps(workdir):
  (file,) = workdir.glob("profile/plugins/profile/*/*.xplane.pb")
  events = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    for line in plane.lines
    for event in line.events
  ]
  return [dict(event.stats)["step_num"] for event in events if event.name == "train_step"]


def test_the_named_steps_are_traced(tmp_path):
  loop(tmp_path, profile.parsed_steps("3:4", 6))
  assert traced_steps(tmp_path) == [3, 4]
  assert list(tmp_path.glob("profile/plugins/profile/steps_3_4/*.trace.json.gz"))


def test_an_error_in_between_keeps_what_was_traced(tmp_path):
  with pytest.raises(UserError, match="record 3"):
    loop(tmp_path, profile.Steps(3, 6), fail_at=4)
  assert traced_steps(tmp_path) == [3, 4]


def test_a_bucket(bucket):
  loop("gs://runs/one", profile.Steps(2, 2))
  assert traced_steps(bucket / "runs" / "one") == [2]


def test_nothing_to_trace(tmp_path, caplog):
  loop(tmp_path, None)
  loop(tmp_path, profile.Steps(2, 4), start=2)
  assert not list(tmp_path.iterdir())
  assert "--profile_steps=2:4: the run resumes at step 2, so nothing is traced" in caplog.text


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
  (tmp_path / "profile").write_text("a file in its place")
  loop(tmp_path, profile.Steps(2, 3))
  assert "the trace of --profile_steps could not be written" in caplog.text


@pytest.mark.parametrize("text", ["20", "a:b", "20:25:30", "-1:5", "5:", "1.5:2", " 1:2"])
def test_malformed_steps_are_refused(text):
  with pytest.raises(UserError, match="must be FIRST:LAST, such as 20:25"):
    profile.parsed_steps(text, 100)


@pytest.mark.parametrize("text", ["0:5", "7:6", "95:101", "101:102"])
def test_steps_that_the_run_does_not_have_are_refused(text):
  with pytest.raises(UserError, match=f"--profile_steps={text}: .* the run has 100 steps"):
    profile.parsed_steps(text, 100)


def test_steps_at_the_ends():
  assert profile.parsed_steps("", 100) is None
  assert profile.parsed_steps("1:100", 100) == (1, 100)
