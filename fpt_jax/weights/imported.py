"""Which arrays of an imported checkpoint come from a file of weights; the others are random."""

import json
from collections.abc import Iterable, Mapping

import jax

from fpt_jax.run.folder import run_folder

IMPORTED_FILE = "imported.json"


def write_imported(workdir: str, names: Iterable[str]) -> None:
  """Writes the names of the arrays that come from a file of weights."""
  (run_folder(workdir) / IMPORTED_FILE).write_text(json.dumps(sorted(names)) + "\n")


def pretrained_shapes(
  workdir: str, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the part of `shapes` whose arrays in `workdir` are trained.

  Of an import these are the arrays from the file of weights; of a run, all.
  """
  path = run_folder(workdir) / IMPORTED_FILE
  if not path.exists():
    return dict(shapes)
  names = set(json.loads(path.read_text()))
  return {name: shape for name, shape in shapes.items() if name in names}
