"""Runs side by side: one row per image that all runs have predicted, and a table of their metrics."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from scripts import compare_runs


def a_run(folder, names, accuracy):
  predictions = folder / "predictions"
  predictions.mkdir(parents=True)
  for name in (*names, "contact_sheet"):
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save(predictions / f"{name}.png")
  lines = [
    {"step": 1, "total_loss": 2.0},
    {"step": 2, "context/accuracy": 1.0},
    {"step": 4, "context/accuracy": accuracy, "bbox/AP": 12.34},
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def run(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, arguments)])
  compare_runs.main()


def test_pictures_and_metrics_are_side_by_side(tmp_path, monkeypatch, capsys):
  one = a_run(tmp_path / "one", ["a", "b", "c"], 97.5)
  other = a_run(tmp_path / "other", ["b", "c", "d"], 51.0)
  out = tmp_path / "both.png"
  run(monkeypatch, f"--out={out}", f"FPT={one}", f"without={other}")
  printed = capsys.readouterr().out
  assert "97.5" in printed and "51.0" in printed and "12.3" in printed and str(out) in printed
  with Image.open(out) as picture:
    assert picture.width > 2 * 480 and picture.height < 3 * 400  # two columns, two rows


def test_mistakes_are_reported(tmp_path, monkeypatch):
  one = a_run(tmp_path / "one", ["a"], 97.5)
  other = a_run(tmp_path / "other", ["b"], 97.5)
  with pytest.raises(SystemExit, match="no pictures of the same images"):
    run(monkeypatch, f"--out={tmp_path}/x.png", f"A={one}", f"B={other}")
  with pytest.raises(SystemExit, match="run --mode=predict first"):
    run(monkeypatch, f"--out={tmp_path}/x.png", f"A={tmp_path}")
  with pytest.raises(SystemExit, match="must be NAME=WORKDIR"):
    run(monkeypatch, one)


def test_chosen_pictures_are_followed_by_their_explanation(tmp_path, monkeypatch):
  one = a_run(tmp_path / "one", ["a", "b"], 97.5)
  other = a_run(tmp_path / "other", ["a", "b"], 51.0)
  runs = (f"FPT={one}", f"without={other}")
  run(monkeypatch, f"--out={tmp_path}/two.png", "--names=b", *runs)
  (one / "explain").mkdir()
  Image.fromarray(np.full((30, 90, 3), 7, np.uint8)).save(one / "explain" / "b.png")
  out = tmp_path / "explained.png"
  run(monkeypatch, f"--out={out}", "--names=b", "--explain=FPT", *runs)
  with Image.open(tmp_path / "two.png") as before, Image.open(out) as picture:
    assert picture.width == before.width
    assert picture.height == before.height + round(before.width * 30 / 90)
    assert picture.getpixel((picture.width // 2, picture.height - 5)) == (7, 7, 7)
  with pytest.raises(SystemExit, match=r"a\.png does not exist; run --mode=explain first"):
    run(monkeypatch, f"--out={out}", "--names=a", "--explain=FPT", *runs)
  with pytest.raises(SystemExit, match=r"not all runs have predictions/z\.png"):
    run(monkeypatch, f"--out={out}", "--names=z", *runs)
  with pytest.raises(SystemExit, match="--explain=BFP must be one of FPT, without"):
    run(monkeypatch, f"--out={out}", "--explain=BFP", *runs)
