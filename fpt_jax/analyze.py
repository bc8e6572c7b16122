"""What a model costs, by module and beside the paper's figures, without running it."""

import importlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from fpt_jax import models
from fpt_jax.data import canvases, transforms
from fpt_jax.errors import UserError
from fpt_jax.models.costs import Cost, count
from fpt_jax.models.rcnn import MASK_BLOCK
from fpt_jax.models.state import within
from fpt_jax.run import checkpoints

FORWARD = {"rcnn": "detect", "segmenter": "logits"}  # method of (image_BHWC, size_B2)
FEATURES = ("backbone", "pyramid", "fpt")

CONVENTIONS = """\
Multiply-adds are those of convolutions and matrix products; attention is counted apart, written out.
Parameters are those a gradient may change; activations are the outputs of what is counted, one image."""


class Analysis(NamedTuple):
  """What a model costs.

  Attributes:
    canvas: (height, width) of the image, pixels.
    dtype: of the computation.
    modules: cost by name, in the order of the computation. What belongs to a module but to none of its
      parts stands under the module's own name, so that all together are the whole.
    notes: how often a module runs, by name.
  """

  canvas: tuple[int, int]
  dtype: str
  modules: dict[str, Cost]
  notes: dict[str, str]

  def total(self, *names: str) -> Cost:
    """The sum over the modules with these names and their parts; over all where none is given."""
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
  """Counts what the model of a config does for one image of the paper's size.

  That size is the first of `data.buckets` for detectors, or the widest canvas where there are none,
  and `data.crop` for segmentation.

  Raises:
    UserError: a part the config names does not exist.
  """
  structure = models.structure_of(config)
  canvas = canvas_of(config)
  forward = FORWARD[config.model.name]

  def run(arrays, image_BHWC, size_B2):
    return getattr(structure.fill(arrays), forward)(image_BHWC, size_B2)

  image_BHWC = jax.ShapeDtypeStruct((1, *canvas, 3), jnp.float32)
  size_B2 = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  modules = count(run, structure, image_BHWC, size_B2)
  return Analysis(canvas, config.model.dtype, modules, _notes(config.model))


def canvas_of(config: ConfigDict) -> tuple[int, int]:
  """(height, width) of the image that is counted for, pixels."""
  data = config.data
  if "crop" in data:
    return tuple(data.crop)
  if data.buckets:
    return tuple(data.buckets[0])
  widest = (data.short_edge, data.long_edge)
  return transforms.smallest_canvas(widest, (), canvases.multiple_of(data))


def _notes(model: ConfigDict) -> dict[str, str]:
  if model.name != "rcnn":
    return {}
  notes = {"box_head": f"{model.rpn.test.post_nms} regions"}
  if model.mask_head.enabled:
    masks = model.test.detections_per_image
    places = -(-masks // MASK_BLOCK) * MASK_BLOCK  # the last block is computed whole
    notes["mask_head"] = f"{places} places for {masks} masks, each of its own class"
  return notes


def analyze_model(config: ConfigDict, workdir: str) -> None:
  """Prints the cost of a config's model by module; into a workdir it writes `analysis.json`."""
  analysis = analyze(config)
  print(format_modules(analysis))
  _write(workdir, analysis.as_dict())


def analyze_table(number: int, workdir: str, *, markdown: bool) -> None:
  """Prints the cost of every row of a table of the paper; into a workdir it writes `analysis.json`.

  Args:
    number: of the table in the paper.
    workdir: a folder, or "".
    markdown: print it as the README has it.

  Raises:
    UserError: there is no such table, or a row of it cannot be built.
  """
  rows, analyses = rows_of_table(number), []
  known: dict[tuple, Analysis] = {}  # some rows differ in how they are trained only
  for i, row in enumerate(rows):
    logging.info("table %d, row %d of %d: %s", number, i + 1, len(rows), row.name)
    config = config_of_row(row)
    key = (config.model.to_json(), canvas_of(config))
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
      **analysis.as_dict(),
    }
    for row, analysis in zip(rows, analyses, strict=True)
  ]
  _write(workdir, {"table": number, "rows": described})


def rows_of_table(number: int) -> Sequence:
  """The rows of `configs.tables`.

  Raises:
    UserError: it cannot be found, or has no such table.
  """
  tables = _import("configs.tables").TABLES
  if number not in tables:
    raise UserError(f"--table={number} does not exist; choose one of {', '.join(map(str, tables))}")
  return tables[number]


def config_of_row(row) -> ConfigDict:
  """The config a row of a table stands for."""
  return _import(f"configs.{row.config}").get_config(row.arg)


def _import(name: str):
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "configs":
      raise
    raise UserError(f"{name} cannot be imported: run this in the repository's folder") from error


def format_modules(analysis: Analysis) -> str:
  """The cost by module, parts below their module, and of the whole; "-" for nothing."""
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


def format_rows(rows: Sequence, analyses: Sequence[Analysis]) -> str:
  """A table's parameters and multiply-adds beside the paper's, and how both add up."""
  canvases = [" x ".join(map(str, analysis.canvas)) for analysis in analyses]
  one_size = len(set(canvases)) == 1
  lines = [
    f"One image of {canvases[0] if one_size else 'the size on the right'}. {CONVENTIONS}",
    "features: without the heads.",
    "",
    f"{'':<24}{'parameters, M':^27}{'multiply-adds, G':^27}{'attention, G':>14}",
    f"{'':<24}" + f"{'ours':>9}{'features':>9}{'paper':>9}" * 2 + f"{'ours':>14}",
  ]
  for row, analysis, canvas in zip(rows, analyses, canvases, strict=True):
    whole, features = analysis.total(), analysis.total(*FEATURES)
    cells = [
      *(_number(n / 1e6, 1) for n in (whole.parameters, features.parameters)),
      _number(row.parameters, 1),
      *(_number(n / 1e9, 1) for n in (whole.multiply_adds, features.multiply_adds)),
      _number(row.gflops, 1),
    ]
    lines.append(
      f"{row.name:<24}"
      + "".join(f"{cell:>9}" for cell in cells)
      + f"{_number(whole.attention / 1e9, 1):>14}"
      + ("" if one_size else f"  {canvas}")
    )
  sums = format_sums(rows, analyses)
  return "\n".join(lines + (["", sums] if sums else []))


def format_sums(rows: Sequence, analyses: Sequence[Analysis]) -> str:
  """How far each row with several transformers is from the sum of what each adds alone; "" if none.

  The paper's rows are "base+X+Y", after "base" and each "base+X".
  """
  figures = {
    row.name: (row.parameters, analysis.total().parameters / 1e6, row.gflops,
               analysis.total().multiply_adds / 1e9)
    for row, analysis in zip(rows, analyses, strict=True)
    if row.parameters and row.gflops
  }  # fmt: skip
  lines = []
  for name, values in figures.items():
    base, *parts = name.split("+")
    if len(parts) < 2 or any(f"{base}+{part}" not in figures for part in parts):
      continue
    alone = [figures[f"{base}+{part}"] for part in parts]
    sums = [
      b + sum(a - b for a in column) for b, *column in zip(figures[base], *alone, strict=True)
    ]
    cells = [f"{v:>9.1f}{s:>9.1f}{v - s:>+8.1f}" for v, s in zip(values, sums, strict=True)]
    lines.append(f"{name:<24}" + "".join(cells))
  if not lines:
    return ""
  heads = ("parameters, paper, M", "ours", "multiply-adds, paper, G", "ours")
  return "\n".join(
    [
      "Rows beside the sums of the base and what each part alone adds to it:",
      f"{'':<24}" + "".join(f"{head:>26}" for head in heads),
      f"{'':<24}" + f"{'row':>9}{'sum':>9}{'':>8}" * len(heads),
      *lines,
      "In ours the difference is the share of the level itself in the convolution that fuses, which a",
      "model has once, and each part alone brings with it.",
    ]
  )


def format_markdown(rows: Sequence, analyses: Sequence[Analysis]) -> str:
  """The table as the README has it."""
  known = any(row.parameters or row.gflops for row in rows)  # to the paper
  beside = " / paper" if known else ""
  heads = (
    "row",
    "`--config=`",
    f"paper, {'box / mask AP' if rows[0].miou is None else 'mIoU'}",
    f"parameters, M: ours (features){beside}",
    f"multiply-adds, G: ours (features){beside}",
    "attention, G",
  )
  lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
  for row, analysis in zip(rows, analyses, strict=True):
    whole, features = analysis.total(), analysis.total(*FEATURES)
    cells = (
      row.name,
      f"`configs/{row.config}.py{':' * bool(row.arg)}{row.arg}`",
      " / ".join(_number(figure, 1) for figure in figures_of(row)),
      f"{whole.parameters / 1e6:.1f} ({features.parameters / 1e6:.1f})"
      + f" / {_number(row.parameters, 1)}" * known,
      f"{whole.multiply_adds / 1e9:.1f} ({features.multiply_adds / 1e9:.1f})"
      + f" / {_number(row.gflops, 1)}" * known,
      _number(whole.attention / 1e9, 1),
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def figures_of(row) -> tuple[float | None, ...]:
  """What the paper says a row reaches: mIoU, or the first figures of boxes and masks."""
  if row.miou is not None:
    return row.miou
  return tuple(figures[0] if figures else None for figures in (row.box, row.mask))


def _write(workdir: str, content: dict) -> None:
  if workdir:
    folder = checkpoints.folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(json.dumps(content, indent=2) + "\n")
    logging.info("wrote %s", folder / "analysis.json")
