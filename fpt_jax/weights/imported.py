"""Which arrays of an imported checkpoint come from a file of weights; the others are random."""

import json
from collections.abc import Iterable, Mapping

import jax

from fpt_jax.errors import UserError
from fpt_jax.run.folder import read_json, run_folder, write_whole

IMPORTED_FILE = "imported.json"


def write_imported(workdir: str, names: Iterable[str]) -> None:
  """Writes the names of the arrays that come from a file of weights."""
  write_whole(run_folder(workdir) / IMPORTED_FILE, json.dumps(sorted(names)) + "\n")


def pretrained_shapes(
  workdir: str, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the part of `shapes` whose arrays in `workdir` are trained.

  Of an import these are the arrays from the file of weights; of a run, all.

  Raises:
    UserError: the list of these arrays cannot be read.
  """
  path = run_folder(workdir) / IMPORTED_FILE
  if not path.exists():
    return dict(shapes)
  names = read_json(path)
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UserError(f"{path} is not a list of names; import the weights again")
  imported = set(names)
  return {name: shape for name, shape in shapes.items() if name in imported}
