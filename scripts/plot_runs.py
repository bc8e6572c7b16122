#!/usr/bin/env python3
"""Draws the learning curves of several runs in one picture, from their metrics.jsonl.

    python scripts/plot_runs.py --out=curves.png UFP=/runs/ufp UFP+FPT=/runs/fpt

On the left: the running mean of the total loss. On the right: for segmentation, the IoU of each class in
the last evaluation; for detection, the box AP50 of every evaluation.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}  # as fpt_jax.main

import argparse

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fpt_jax.errors import UserError
from fpt_jax.run.metrics import losses_and_evaluations

SMOOTHED = 9  # losses per running mean


def read(workdir: str) -> tuple[list[dict], list[dict]]:
  """The metrics that a run logged in training, and in its evaluations."""
  training, evaluations = losses_and_evaluations(workdir)
  if not training:
    raise SystemExit(f"error: {workdir}: metrics.jsonl has no losses; give the folder of a run")
  return training, [e for e in evaluations if "mIoU" in e or "bbox/AP50" in e]


def running_mean(values: list[float]) -> np.ndarray:
  """[N]: the mean of each value and its neighbours."""
  half = SMOOTHED // 2
  return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def draw(runs: dict[str, str]) -> Figure:
  figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")
  losses, figures = figure.subplots(1, 2)
  losses.set(xlabel="step", ylabel="total loss")
  for i, (name, workdir) in enumerate(runs.items()):
    training, evaluations = read(workdir)
    steps = [e["step"] for e in training]
    (line,) = losses.plot(steps, running_mean([e["total_loss"] for e in training]), label=name)
    if not evaluations:
      continue
    last = evaluations[-1]
    if "mIoU" in last:
      classes = [key for key in last if key.startswith("IoU/")]
      places = np.arange(len(classes)) + 0.8 * (i - (len(runs) - 1) / 2) / len(runs)
      label = f"{name}: {last['mIoU']:.1f} mIoU"
      heights = [last[key] for key in classes]
      figures.bar(places, heights, 0.8 / len(runs), label=label, color=line.get_color())
      names = [key.removeprefix("IoU/") for key in classes]
      figures.set_xticks(range(len(classes)), names, rotation=60, ha="right")
      figures.set_ylabel("IoU, %")
    else:
      steps = [e["step"] for e in evaluations]
      values = [e["bbox/AP50"] for e in evaluations]
      figures.plot(steps, values, "o-", label=name, color=line.get_color())
      figures.set(xlabel="step", ylabel="box AP50")
  for axes in (losses, figures):
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend()
  return figure


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True, help="the PNG file to write")
  parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
  options = parser.parse_args()
  if any("=" not in run for run in options.runs):
    parser.error("each run is NAME=WORKDIR")
  out = pathlib.Path(options.out).expanduser()
  try:
    figure = draw(dict(run.split("=", 1) for run in options.runs))
  except UserError as error:
    raise SystemExit(f"error: {error}") from error
  out.parent.mkdir(parents=True, exist_ok=True)
  FigureCanvasAgg(figure).print_png(out)
  print(out)


if __name__ == "__main__":
  main()
