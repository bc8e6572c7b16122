"""The section of docs/results.md that `scripts/ablation.py` writes for a table, and its picture."""

import numpy as np
from matplotlib.figure import Figure

from fpt_jax.configs.ablations import Row, Table
from scripts.markdown import table as markdown_table


def values(runs: list[dict], metric: str) -> list[float]:
  return [run["figures"][metric] for run in runs if metric in run["figures"]]


def markdown(
  name: str, table: Table, rows: dict[Row, list[dict]], shared: str, *, picture: str
) -> str:
  """The section of a table: the command, the table with means and standard deviations, and the picture."""
  every = [run for runs in rows.values() for run in runs]
  has_paper = any(row.paper is not None for row in rows)
  header = ["row", *table.metrics, *(["paper"] if has_paper else []), "seeds", "minutes"]
  lines = []
  for row, runs in rows.items():
    cells = [row.name, *(mean_and_deviation(values(runs, metric)) for metric in table.metrics)]
    if has_paper:
      cells.append("-" if row.paper is None else f"{row.paper:.1f}")
    minutes = [run["minutes"] for run in runs if run["minutes"] is not None]
    cells += [str(len(runs)), f"{np.mean(minutes):.0f}" if minutes else "-"]
    lines.append(cells)
  seeds = ",".join(str(seed) for seed in sorted({run["seed"] for run in every}))
  command = f"python scripts/ablation.py {name} --seeds={seeds}"
  if len(rows) < len(table.rows):
    command += f" '--only={','.join(row.name for row in rows)}'"
  command += "".join(f" --{option}={example}" for option, example in table.needs.items())
  command += shared and f" -- {shared}"
  dates = " to ".join(dict.fromkeys(f([run["date"] for run in every]) for f in (min, max)))
  machines = " or ".join(sorted({run["machine"] for run in every}))
  notes = f"Mean and standard deviation over the seeds. Each run: {machines}; {dates}."
  if table.note:
    notes += f" {table.note}"
  if has_paper:
    notes += " The paper's figures are those of its own data and size."
  return "\n\n".join(
    [
      f"## {table.title}",
      f"```bash\n{command}\n```",
      markdown_table(header, lines),
      notes,
      f"![Left: the training loss, averaged over the seeds. Right: {table.metrics[0]}]({picture})\n",
    ]
  )


def mean_and_deviation(figures: list[float]) -> str:
  if not figures:
    return "-"
  deviation = deviation_of(figures)
  return f"{np.mean(figures):.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def deviation_of(figures: list[float]) -> float | None:
  """Standard deviation of a sample; None for a single figure."""
  return float(np.std(figures, ddof=1)) if len(figures) > 1 else None


def draw(table: Table, rows: dict[Row, list[dict]]) -> Figure:
  """Left: the loss of each row, averaged over the seeds. Right: the table's first metric."""
  figure = Figure(figsize=(12, 4.5), dpi=100, layout="constrained")
  curves, bars = figure.subplots(1, 2)
  for i, (row, runs) in enumerate(rows.items()):
    losses = [dict(map(tuple, run["losses"])) for run in runs]
    steps = sorted(set.intersection(*(set(by_step) for by_step in losses)))
    means = [np.mean([by_step[step] for by_step in losses]) for step in steps]
    curves.plot(steps, means, label=row.name, linestyle="-" if i < 10 else "--")
    if found := values(runs, table.metrics[0]):
      bars.barh(row.name, np.mean(found), xerr=deviation_of(found))
  curves.set(xlabel="step", ylabel="total loss", yscale="log")
  curves.legend(fontsize=8)
  bars.invert_yaxis()
  bars.set_xlabel(table.metrics[0])
  for axes in (curves, bars):
    axes.grid(alpha=0.3)
  return figure
