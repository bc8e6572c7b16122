"""Damaged checkpoints are reported in one line, and never restored."""

import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpt_jax.errors import UserError
from fpt_jax.run import checkpoints, sharding

COUNT = sharding.on_one_device(jax.ShapeDtypeStruct((), jnp.int32))
SHAPES = {"conv.kernel": (3, 3, 8, 8), "conv.bias": (8,), "norm.mean": (64,)}


def arrays(step):
  rng = np.random.default_rng(step)
  return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  saved = checkpoints.manager(str(folder))
  for step in (2, 4):
    checkpoints.save(
      saved, step, arrays(step), {"trace": arrays(step + 1), "count": jnp.int32(step)}
    )
    checkpoints.finish(saved)
  saved.close()
  return folder


def restored(folder, step=None):
  saved = checkpoints.manager(str(folder))
  try:
    step = checkpoints.choose_step(saved, step)
    shapes = sharding.on_one_device(arrays(step))
    model = checkpoints.restore_model(saved, step, shapes)
    state = {"trace": shapes, "count": COUNT}
    return step, model, checkpoints.restore_optimizer(saved, step, state)
  finally:
    saved.close()


def test_what_is_saved_is_restored(folder):
  for wanted in (None, 2):
    step, model, optimizer = restored(folder, wanted)
    assert step == (wanted or 4) and int(optimizer["count"]) == step
    for name, value in arrays(step).items():
      assert (model[name] == value).all()
      assert (optimizer["trace"][name] == arrays(step + 1)[name]).all()


def damages():
  def flip(data, at):
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

  yield "cut", lambda data: data[: len(data) // 2]
  yield "empty", lambda data: b""
  yield "zeros", lambda data: bytes(len(data))
  yield "deleted", lambda data: None
  for share in (0.1, 0.5, 0.9):
    yield f"bit at {share}", lambda data, share=share: flip(data, int(share * len(data)))


# of other reads that end with that of the damaged array
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  ("name", "damage"), damages(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_damage_is_noticed_or_harmless(name, damage, folder, tmp_path):
  files = [p for p in (folder / "checkpoints" / "4").rglob("*") if p.is_file()]
  assert len(files) > 8
  noticed = 0
  for i, file in enumerate(files):
    copy = tmp_path / str(i)
    shutil.copytree(folder, copy)
    target = copy / file.relative_to(folder)
    data = damage(target.read_bytes()) if target.stat().st_size else None
    target.unlink()
    if data is not None:
      target.write_bytes(data)
    try:
      step, model, optimizer = restored(copy, 4)
    except UserError as error:
      text = str(error)
      assert "\n" not in text and len(text) < 800
      assert "step 4" in text, text
      noticed += 1
    else:
      for key, value in arrays(step).items():
        assert (model[key] == value).all(), (name, file)
        assert (optimizer["trace"][key] == arrays(step + 1)[key]).all(), (name, file)
    shutil.rmtree(copy)
  assert noticed >= 2, name


def test_changed_values_are_named_with_what_to_do(folder, tmp_path, monkeypatch):
  saved = checkpoints.manager(str(tmp_path))
  monkeypatch.setattr(checkpoints, "checksums", lambda leaves: dict.fromkeys(leaves, 7))
  checkpoints.save(saved, 3, arrays(3))
  checkpoints.finish(saved)
  monkeypatch.undo()
  shapes = sharding.on_one_device(arrays(3))
  with pytest.raises(
    UserError, match=r"step 3 in .* is damaged \(model: conv\.bias and 2 more arrays"
  ):
    checkpoints.restore_model(saved, 3, shapes)
  with pytest.raises(UserError, match=r"there is no other checkpoint"):
    checkpoints.restore_matching(saved, 3, shapes)
  saved.close()


def test_checkpoints_without_checksums_are_restored(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "checksums")
  step, model, _ = restored(tmp_path / "run")
  assert step == 4 and (model["conv.bias"] == arrays(4)["conv.bias"]).all()


def test_a_missing_optimizer_is_not_called_damage(tmp_path):
  saved = checkpoints.manager(str(tmp_path))
  checkpoints.save(saved, 0, arrays(0))
  checkpoints.finish(saved)
  with pytest.raises(UserError, match="has no optimizer; evaluate it, or start from it"):
    checkpoints.restore_optimizer(saved, 0, {"count": COUNT})
  saved.close()


def test_a_folder_that_was_deleted_is_reported(tmp_path):
  saved = checkpoints.manager(str(tmp_path))
  shutil.rmtree(tmp_path / "checkpoints")
  with pytest.raises(UserError, match=r"none is complete yet; restore the folder and run"):
    checkpoints.save(saved, 0, arrays(0))
  saved.close()


def test_reading_creates_nothing(tmp_path):
  saved = checkpoints.manager(str(tmp_path), create=False)
  with pytest.raises(UserError, match="has no checkpoint; train first"):
    checkpoints.choose_step(saved)
  saved.close()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("cause", "advice"),
  [
    ("Error writing: No space left on device", "free some space"),
    ("File too large", "free some space"),
    ("[Errno 13] Permission denied: 'x'", "make the folder writable"),
    ("[Errno 30] Read-only file system", "make the folder writable"),
    ("[Errno 2] No such file or directory", "restore the folder"),
    ("something else", "check the disk"),
  ],
)
def test_the_advice_fits_the_cause(cause, advice, tmp_path):
  saved = checkpoints.manager(str(tmp_path))
  message = pytest.raises(UserError, match=f"{advice} and run the same command again")
  with message, checkpoints._reported(saved):
    raise OSError(cause)
  saved.close()
  assert pathlib.Path(tmp_path).exists()


def test_a_timer_counts_from_the_last_checkpoint(monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  timer, never = checkpoints.Timer(minutes=1.5), checkpoints.Timer(minutes=0.0)
  due = []
  for seconds in (89, 1, 5):
    now[0] += seconds
    due.append(timer.is_due())
  timer.restart()
  assert due == [False, True, True] and not timer.is_due() and not never.is_due()
  now[0] += 90
  assert timer.is_due()
