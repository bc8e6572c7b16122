"""The cost of models, by module and next to the paper's numbers, counted without running them."""

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from fpt_jax import models
from fpt_jax.configs.published import PARAMETERS, Published
from fpt_jax.configs.tables import TABLES, Row
from fpt_jax.errors import UserError
from fpt_jax.models.costs import Cost, count
from fpt_jax.models.state import within
from fpt_jax.run.folder import run_folder, write_whole
from fpt_jax.tasks.task import check_config, task_of

FEATURES = ("backbone", "pyramid", "fpt")

CONVENTIONS = """\
Multiply-adds are those of convolutions and matrix products; attention is counted separately, by its formula.
Parameters are those that can be trained; activations are the outputs of the counted operations."""


class Analysis(NamedTuple):
  """The cost of a model for one image.

  Attributes:
    canvas: (height, width) of the image in pixels.
    dtype: dtype of the computation.
    modules: cost by module, in the order of the computation. The cost of a module outside its parts has
      the name of the module, so that all costs together are the cost of the model.
    notes: how often each module runs, by module, for modules that run once per region.
  """

  canvas: tuple[int, int]
  dtype: str
  modules: dict[str, Cost]
  notes: dict[str, str]

  def total(self, *names: str) -> Cost:
    """The sum over the modules with these names and their parts, or over all modules."""
    chosen = [
      cost
      for module, cost in self.modules.items()
      if not names or any(within(module, name) for name in names)
    ]
    return sum(chosen, Cost())

  def as_dict(self) -> dict:
    return {
      "canvas": list(self.canvas),
      "dtype": self.dtype,
      "modules": {name: cost.as_dict() for name, cost in self.modules.items()},
      "features": self.total(*FEATURES).as_dict(),
      "total": self.total().as_dict(),
      "notes": self.notes,
    }


def analyze(config: ConfigDict) -> Analysis:
  """Counts the cost of a config's model for one image of the benchmark's size, see `Task.canvas`.

  Raises:
    UserError: a part that the config names does not exist.
  """
  check_config(config, training=False)
  task = task_of(config)
  structure = models.structure_of(config)
  canvas = task.canvas(config)

  def run(arrays, image_BHWC, size_B2):
    return task.forward(structure.fill(arrays), image_BHWC, size_B2)

  image_BHWC = jax.ShapeDtypeStruct((1, *canvas, 3), jnp.float32)
  size_B2 = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  modules = count(run, structure, image_BHWC, size_B2)
  return Analysis(canvas, config.model.dtype, modules, task.cost_notes(config))


def analyze_model(config: ConfigDict, workdir: str) -> None:
  """Prints the cost of a config's model by module; writes `analysis.json` if there is a workdir."""
  analysis = analyze(config)
  print(format_modules(analysis))
  _write(workdir, analysis.as_dict())


def analyze_table(number: int, workdir: str, *, markdown: bool) -> None:
  """Prints the cost of every row of a table of the paper; writes `analysis.json` if there is a workdir.

  Args:
    number: number of the table in the paper.
    workdir: a folder, or "".
    markdown: print the table as Markdown.

  Raises:
    UserError: the table does not exist, or one of its rows cannot be built.
  """
  rows, analyses = rows_of_table(number), []
  known: dict[tuple, Analysis] = {}  # some rows differ in training only
  for i, row in enumerate(rows):
    logging.info("table %d, row %d of %d: %s", number, i + 1, len(rows), row.name)
    config = config_of_row(row)
    config.data.train_sizes = ()  # the rows of a table are counted for images of one size
    key = (config.model.to_json(), task_of(config).canvas(config))
    if key not in known:
      known[key] = analyze(config)
    analyses.append(known[key])
  print((format_markdown if markdown else format_rows)(rows, analyses))
  described = [
    {
      "name": row.name,
      "config": row.config,
      "arg": row.arg,
      "paper": {"parameters": row.parameters, "gflops": row.gflops},
      "published": published.as_dict() if (published := published_of(row)) else None,
      **analysis.as_dict(),
    }
    for row, analysis in zip(rows, analyses, strict=True)
  ]
  _write(workdir, {"table": number, "rows": described})


def rows_of_table(number: int) -> Sequence[Row]:
  """The rows of a table in `configs.tables`.

  Raises:
    UserError: the table does not exist.
  """
  if number not in TABLES:
    raise UserError(f"--table={number} does not exist; choose one of {', '.join(map(str, TABLES))}")
  return TABLES[number]


def config_of_row(row: Row) -> ConfigDict:
  """The config of a row of a table."""
  return importlib.import_module(f"fpt_jax.configs.{row.config}").get_config(row.arg)


def published_of(row: Row) -> Published | None:
  """The number of parameters that another source gives for a row of a table; None if there is none."""
  return PARAMETERS.get((row.config, row.arg))


def numbered(rows: Sequence[Row]) -> dict[Published, int]:
  """The numbers of the footnotes of a table, in the order of its rows."""
  found = (published_of(row) for row in rows)
  distinct = dict.fromkeys(published for published in found if published)
  return {published: i for i, published in enumerate(distinct, start=1)}


def format_modules(analysis: Analysis) -> str:
  """The cost by module, with parts below their module, and the total; "-" for zero."""
  names: list[str] = []  # in order, each module before its parts
  for module in analysis.modules:
    parts = module.split(".")
    top = parts[0]
    if top not in names:
      names.append(top)
    if module != top:
      last = max(i for i, name in enumerate(names) if within(name, top))
      names.insert(last + 1, module)
  lines = [
    f"One image of {' x '.join(map(str, analysis.canvas))}, {analysis.dtype}. {CONVENTIONS}",
    "",
    f"{'':<32}{'parameters':>12}{'multiply-adds':>15}{'attention':>12}{'activations':>13}",
    f"{'':<32}{'M':>12}{'G':>15}{'G':>12}{'MB':>13}",
  ]
  for name in names:
    indent = "  " if "." in name else ""
    label = indent + name.partition(".")[2] if indent else name
    lines.append(_line(label, analysis.total(name)) + f"  {analysis.notes.get(name, '')}".rstrip())
  lines.append(_line("features", analysis.total(*FEATURES)) + "  " + ", ".join(FEATURES))
  lines.append(_line("total", analysis.total()))
  return "\n".join(lines)


def _line(label: str, cost: Cost) -> str:
  return (
    f"{label:<32}{_number(cost.parameters / 1e6, 3):>12}{_number(cost.multiply_adds / 1e9, 2):>15}"
    f"{_number(cost.attention / 1e9, 2):>12}{_number(cost.activation_bytes / 2**20, 1):>13}"
  )


def _number(value: float | None, digits: int) -> str:
  return f"{value:.{digits}f}" if value else "-"


def format_rows(rows: Sequence[Row], analyses: Sequence[Analysis]) -> str:
  """A table's parameters and multiply-adds next to the paper's and to those of other sources.

  Footnotes have the sources and what differs, and sums over a row's parts follow.
  """
  canvases = [" x ".join(map(str, analysis.canvas)) for analysis in analyses]
  one_size = len(set(canvases)) == 1
  lines = [
    f"One image of {canvases[0] if one_size else 'the size on the right'}. {CONVENTIONS}",
    "features: without the heads.",
    "",
    f"{'':<24}{'parameters, M':^40}{'multiply-adds, G':^27}{'attention, G':>14}",
    f"{'':<24}{'ours':>9}{'features':>9}{'paper':>9}{'published':>13}"
    f"{'ours':>9}{'features':>9}{'paper':>9}{'ours':>14}",
  ]
  footnotes = numbered(rows)
  for row, analysis, canvas in zip(rows, analyses, canvases, strict=True):
    whole, features = analysis.total(), analysis.total(*FEATURES)
    cells = [
      *(_number(n / 1e6, 1) for n in (whole.parameters, features.parameters)),
      _number(row.parameters, 1),
      f"    {_published(row, footnotes):>9}",
      *(_number(n / 1e9, 1) for n in (whole.multiply_adds, features.multiply_adds)),
      _number(row.gflops, 1),
    ]
    lines.append(
      f"{row.name:<24}"
      + "".join(f"{cell:>9}" for cell in cells)
      + f"{_number(whole.attention / 1e9, 1):>14}"
      + ("" if one_size else f"  {canvas}")
    )
  notes = [f"[{i}] {published.note()}" for published, i in footnotes.items()]
  sums = format_sums(rows, analyses)
  return "\n".join([*lines, *([""] * bool(notes)), *notes, *(["", sums] if sums else [])])


def _published(row: Row, footnotes: Mapping[Published, int], mark: str = " [{}]") -> str:
  published = published_of(row)
  return f"{published.millions:.2f}{mark.format(footnotes[published])}" if published else "-"


def format_sums(rows: Sequence[Row], analyses: Sequence[Analysis]) -> str:
  """Compares rows with several transformers to the sums of what each adds; "" if there are none.

  Such a row is named "base+X+Y"; the table also has the rows "base", "base+X" and "base+Y".
  """
  counts = {
    row.name: (row.parameters, analysis.total().parameters / 1e6, row.gflops,
               analysis.total().multiply_adds / 1e9)
    for row, analysis in zip(rows, analyses, strict=True)
    if row.parameters and row.gflops
  }  # fmt: skip
  lines = []
  for name, values in counts.items():
    base, *parts = name.split("+")
    if len(parts) < 2 or any(f"{base}+{part}" not in counts for part in parts):
      continue
    alone = [counts[f"{base}+{part}"] for part in parts]
    sums = [b + sum(a - b for a in column) for b, *column in zip(counts[base], *alone, strict=True)]
    cells = [f"{v:>9.1f}{s:>9.1f}{v - s:>+8.1f}" for v, s in zip(values, sums, strict=True)]
    lines.append(f"{name:<24}" + "".join(cells))
  if not lines:
    return ""
  heads = ("parameters, paper, M", "ours", "multiply-adds, paper, G", "ours")
  return "\n".join(
    [
      "Each row, and the sum of the base and what each part alone adds to it:",
      f"{'':<24}" + "".join(f"{head:>26}" for head in heads),
      f"{'':<24}" + f"{'row':>9}{'sum':>9}{'':>8}" * len(heads),
      *lines,
      "The difference in our counts is the level's own share of the fusing convolution: a row has it once,",
      "while the sum counts it once per part.",
    ]
  )


def format_markdown(rows: Sequence[Row], analyses: Sequence[Analysis]) -> str:
  """The table and its footnotes as Markdown."""
  footnotes = numbered(rows)
  known = any(row.parameters or row.gflops for row in rows)  # from the paper
  paper = " / paper" if known else ""
  heads = (
    "row",
    "`--config=`",
    f"paper, {'box / mask AP' if rows[0].miou is None else 'mIoU'}",
    f"parameters, M: ours (features){paper}",
    *["parameters published, M"] * bool(footnotes),
    f"multiply-adds, G: ours (features){paper}",
    "attention, G",
  )
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for row, analysis in zip(rows, analyses, strict=True):
    whole, features = analysis.total(), analysis.total(*FEATURES)
    cells = (
      row.name,
      f"`configs/{row.config}.py{':' * bool(row.arg)}{row.arg}`",
      " / ".join(_number(value, 1) for value in results_of(row)),
      f"{whole.parameters / 1e6:.1f} ({features.parameters / 1e6:.1f})"
      + f" / {_number(row.parameters, 1)}" * known,
      *[_published(row, footnotes, "<sup>{}</sup>")] * bool(footnotes),
      f"{whole.multiply_adds / 1e9:.1f} ({features.multiply_adds / 1e9:.1f})"
      + f" / {_number(row.gflops, 1)}" * known,
      _number(whole.attention / 1e9, 1),
    )
    lines.append(f"| {' | '.join(cells)} |")
  notes = [f"{i}. {published.note()}" for published, i in footnotes.items()]
  return "\n".join([*lines, *([""] * bool(notes)), *notes])


def results_of(row: Row) -> tuple[float | None, ...]:
  """The paper's results of a row: mIoU, or box AP and mask AP."""
  if row.miou is not None:
    return row.miou
  return tuple(metrics[0] if metrics else None for metrics in (row.box, row.mask))


def _write(workdir: str, content: dict) -> None:
  if workdir:
    path = run_folder(workdir) / "analysis.json"
    write_whole(path, json.dumps(content, indent=2) + "\n")
    logging.info("wrote %s", path)
