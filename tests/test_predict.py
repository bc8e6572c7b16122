"""Predictions are written as they come; bad images are reported by name and the others are done."""

import json
import logging
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image

from fpt_jax import main
from fpt_jax.configs import cityscapes
from fpt_jax.data.records.images import encode_png
from fpt_jax.errors import UserError
from fpt_jax.predict import predict
from fpt_jax.restored import Restored
from fpt_jax.tasks import subjects
from fpt_jax.tasks.subjects import Subject, image_files, num_subjects, subjects_of_files
from tests.data_sets import write_clip


@pytest.fixture
def restored():
  """A model that finds class 1 everywhere."""
  config = cityscapes.get_config("demo")
  config.model.class_names = ("background", "circle")
  infer = lambda image_HWC: {"label_map": np.ones(image_HWC.shape[:2], np.uint8)}
  return types.SimpleNamespace(config=config, infer=infer)


@pytest.fixture
def folder(tmp_path):
  """Three images; the last of four files is truncated."""
  folder = tmp_path / "photos"
  folder.mkdir()
  for name in ("a", "b", "c"):
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(folder / f"{name}.png")
  data = encode_png(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
  (folder / "d.png").write_bytes(data[: len(data) // 2])
  return folder


def run(restored, folder, workdir, *, skip_bad=False):
  files = image_files([str(folder)])
  subjects = subjects_of_files(files, exif=restored.config.data.exif, skip_bad=skip_bad)
  predict(restored, subjects, num_subjects(files), str(workdir), min_score=0.5)


def entries(out):
  lines = (out / "predictions.jsonl").read_text().splitlines()
  whole = json.loads((out / "predictions.json").read_text())
  assert [json.loads(line) for line in lines] == whole
  return whole


@pytest.mark.parametrize("bad", ["d.png", "a.png"])
def test_a_bad_file_is_named_and_the_others_are_done(bad, restored, folder, tmp_path, caplog):
  (folder / "d.png").rename(folder / bad)
  with (
    caplog.at_level(logging.ERROR),
    pytest.raises(UserError, match=rf"^bad images: 1 of \d; .*predictions; .*{bad}") as error,
  ):
    run(restored, folder, tmp_path)
  assert "\n" not in str(error.value)
  (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
  assert f"{bad} is not a readable image" in record.getMessage()
  good = sorted({"a.png", "b.png", "c.png"} - {bad})
  out = tmp_path / "predictions"
  assert [e["file_name"] for e in entries(out)] == [str(folder / name) for name in good]
  assert all(e["shares"] == {"circle": 1.0} for e in entries(out))
  assert {p.name for p in out.glob("*.png")} == {
    "contact_sheet.png",
    *good,
    *(name.replace(".png", "_labels.png") for name in good),
  }


def test_bad_files_can_be_skipped_unless_all_are_bad(restored, folder, tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    run(restored, folder, tmp_path, skip_bad=True)
  assert len(entries(tmp_path / "predictions")) == 3
  assert "1 of 4 files skipped" in caplog.text and "d.png" in caplog.text
  before = (tmp_path / "predictions" / "predictions.json").read_bytes()
  for name in "abc":
    (folder / f"{name}.png").unlink()
  with pytest.raises(UserError, match="none of the 1 files is a readable image"):
    run(restored, folder, tmp_path, skip_bad=True)
  with pytest.raises(UserError, match=r"^bad images: 1 of 1; nothing was written; .*d\.png"):
    run(restored, folder, tmp_path)
  assert (tmp_path / "predictions" / "predictions.json").read_bytes() == before
  assert len(entries(tmp_path / "predictions")) == 3


def test_frames_of_a_video(restored, folder, tmp_path, caplog):
  write_clip(tmp_path / "clip.mp4", frames=3)
  write_clip(tmp_path / "cut.mp4")
  (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:2000])
  files = [str(tmp_path / "clip.mp4"), str(folder / "a.png"), str(tmp_path / "cut.mp4")]
  assert num_subjects(image_files(files)) == 5
  found = subjects_of_files(image_files(files), exif="apply", skip_bad=False)
  message = r"^bad images: 1 of 5; .*cut\.mp4 (is not a readable video|has no frames)"
  with pytest.raises(UserError, match=message):
    predict(restored, found, 5, str(tmp_path), min_score=0.5)
  out = tmp_path / "predictions"
  found = [(e["file_name"], e.get("frame"), e.get("seconds")) for e in entries(out)]
  assert found == [(files[0], i, pytest.approx(i / 10)) for i in range(3)] + [
    (files[1], None, None)
  ]
  names = ("a", "clip_000000", "clip_000001", "clip_000002")
  assert {p.name for p in out.glob("*.png")} == {"contact_sheet.png"} | {
    f"{name}{end}.png" for name in names for end in ("", "_labels")
  }


def test_files_in_a_users_own_code(restored, folder, monkeypatch):
  read = []

  def infer(image_HWC):
    return {"label_map": np.full(image_HWC.shape[:2], len(read), np.uint8)}

  own = Restored(restored.config, 3, None, {})
  monkeypatch.setitem(vars(own), "infer", infer)
  original = subjects.read_image
  monkeypatch.setattr(
    subjects, "read_image", lambda path, **exif: read.append(path.name) or original(path, **exif)
  )
  found = own.predict_files(folder)
  assert read == []  # nothing is read before it is asked for
  first = next(found)
  assert (first.name, first.frame, first.seconds) == (str(folder / "a.png"), None, None)
  assert first.image_HWC.shape == (6, 8, 3) and first.result["label_map"].shape == (6, 8)
  assert len(read) <= 2  # the next image, and no other
  assert [pathlib.Path(next(found).name).name for _ in range(2)] == ["b.png", "c.png"]
  with pytest.raises(UserError, match=r"d\.png is not a readable image"):
    next(found)
  with pytest.raises(StopIteration):
    next(found)
  own.config.data.skip_bad = True
  assert len(list(own.predict_files([folder / "a.png", folder]))) == 4
  with pytest.raises(UserError, match=r"^paths: .*nowhere does not exist"):
    own.predict_files(str(folder / "nowhere"))


def test_videos_in_a_users_own_code(restored, tmp_path, monkeypatch):
  write_clip(tmp_path / "clip.mp4", frames=3)
  own = Restored(restored.config, 3, None, {})
  monkeypatch.setitem(vars(own), "infer", restored.infer)
  found = list(own.predict_files(tmp_path / "clip.mp4"))
  assert [(one.frame, one.seconds) for one in found] == [
    (i, pytest.approx(i / 10)) for i in range(3)
  ]
  for i, one in enumerate(found):
    assert abs(one.image_HWC[24:].mean() - 8 * i) < 3
    assert one.result["label_map"].shape == (48, 64)
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(UserError, match="not installed: pip install av"):
    own.predict_files(tmp_path / "clip.mp4")


def test_results_are_on_disk_when_the_next_image_is_read(restored, folder, tmp_path):
  out, seen = tmp_path / "predictions", []

  def subjects():
    for i in range(3):
      if i:
        seen.append(len((out / "predictions.jsonl").read_text().splitlines()))
      yield Subject(f"{i}.png", np.zeros((6, 8, 3), np.uint8), None)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    predict(restored, subjects(), 3, str(tmp_path), min_score=0.5)
  assert seen == [1, 2]
  assert [e["file_name"] for e in entries(out)] == ["0.png", "1.png", "2.png"]
  assert (out / "contact_sheet.png").exists()


def test_long_and_undecodable_names(restored, tmp_path):
  names = ["a" * 248 + ".png", "a" * 248 + ".jpg", "é" * 120 + ".png", "x\udcff.png", "\udcff.png"]
  subjects = [Subject(f"photos/{name}", np.zeros((6, 8, 3), np.uint8), None) for name in names]
  predict(restored, iter(subjects), len(names), str(tmp_path), min_score=0.5)
  out = tmp_path / "predictions"
  assert [e["file_name"] for e in entries(out)] == [f"photos/{name}" for name in names]
  stems = ["a" * 220, "a" * 220 + "_2", "é" * 110, "x", "image"]
  assert {p.name for p in out.glob("*.png")} == {"contact_sheet.png"} | {
    f"{stem}{end}.png" for stem in stems for end in ("", "_labels")
  }


def test_predictions_in_a_bucket(restored, folder, tmp_path, bucket, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="results of the others are in gs://b/run/predictions; "):
    run(restored, folder, "gs://b/run")
  out = bucket / "b" / "run" / "predictions"
  assert len(entries(out)) == 3
  pictures = ("a", "b", "c", "a_labels", "b_labels", "c_labels", "contact_sheet")
  assert {p.name for p in out.iterdir()} == {
    "predictions.json",
    "predictions.jsonl",
    *(f"{name}.png" for name in pictures),
  }
  for name in pictures:
    Image.open(out / f"{name}.png").load()
  assert not (tmp_path / "gs:").exists()


def test_a_full_disk_keeps_what_is_complete(restored, folder, tmp_path, full_disk):
  run(restored, folder, tmp_path, skip_bad=True)
  out = tmp_path / "predictions"
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  with (
    full_disk(100),
    pytest.raises(UserError, match=r"a\.png cannot be written .*; free some space"),
  ):
    run(restored, folder, tmp_path)
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_paths_of_images(monkeypatch, tmp_path, folder):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert image_files(["~/photos"]) == image_files([str(folder)])
  with pytest.raises(UserError, match=r"gs://b/x\.png is not in a file system"):
    image_files(["gs://b/x.png"])


@pytest.mark.parametrize("mode", ["eval", "predict", "explain"])
def test_output_folders_are_checked_before_the_model_is_restored(mode, monkeypatch, tmp_path):
  (tmp_path / {"predict": "predictions"}.get(mode, mode)).write_text("kept")
  monkeypatch.setattr(main, "_POINTS", types.SimpleNamespace(value=""))

  def opened(*_):
    raise AssertionError("the model was restored")

  monkeypatch.setattr(main, "open_run", opened)
  with pytest.raises(UserError, match=r"cannot be written .*; a file is in the place of a folder"):
    getattr(main, f"run_{mode}")(cityscapes.get_config("demo"), str(tmp_path))
