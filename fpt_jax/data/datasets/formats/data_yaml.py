"""`data.yaml` of YOLO: the names of the classes, and the images of each split."""

import os
import pathlib
from typing import Any

import yaml

from fpt_jax.data.datasets.checks import quoted
from fpt_jax.data.datasets.formats import files
from fpt_jax.errors import UserError, one_line


def find(root: pathlib.Path) -> pathlib.Path | None:
  """Returns `data.yaml` of a folder, or the only YAML file in it, None without one.

  Raises:
    UserError: there are several, and none is `data.yaml`.
  """
  if (root / "data.yaml").is_file():
    return root / "data.yaml"
  found = sorted(f for f in root.iterdir() if f.suffix in (".yaml", ".yml") and f.is_file())
  if len(found) > 1:
    raise UserError(
      f"{root}: several YAML files, {found[0].name} and {found[1].name} among them; rename the one that "
      "describes the data to data.yaml"
    )
  return found[0] if found else None


def read(file: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of the file.

  Raises:
    UserError: it cannot be read, is not YAML, or has no fields.
  """
  try:
    content = yaml.safe_load(file.read_bytes())
  except (OSError, yaml.YAMLError, ValueError) as error:
    raise UserError(f"{file}: not a readable YAML file ({one_line(error, 200)}); fix it") from error
  if not isinstance(content, dict):
    raise UserError(f"{file}: must have fields, such as names and train; fix it")
  return content


def names_in(value: object, file: pathlib.Path) -> list[str]:
  """Returns the names of the classes 0, 1, ...

  Args:
    value: the field `names`: a list, or a dictionary by number.
    file: where it is, for messages.

  Raises:
    UserError: it is neither, or numbers are missing.
  """
  if isinstance(value, dict):
    if sorted(value, key=str) != sorted(range(len(value)), key=str):
      raise UserError(
        f"{file}: field names must have the numbers 0 to {len(value) - 1}, not "
        f"{quoted(list(value))}; fix it"
      )
    value = [value[i] for i in range(len(value))]
  if not isinstance(value, list) or not value:
    raise UserError(f"{file}: field names must be a list of names, not {quoted(value)}; fix it")
  # a name such as 7 is a number in YAML; yes and no are truth values, and have lost their text
  return [str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in value]


def images_of(content: dict[str, Any], split: str, file: pathlib.Path) -> list[pathlib.Path]:
  """Returns the images of a split, sorted by path.

  Folders are relative to the field `path`, and without it, or where they do not exist there, to the file.

  Args:
    content: the fields of the file.
    split: "train" or "val".
    file: the file.

  Raises:
    UserError: the field is missing, or what it names does not exist or has no image.
  """
  value = content.get(split)
  if value is None and split == "val":
    value = content.get("valid")
  paths: list[Any] = value if isinstance(value, list) else [value]
  if not paths or not all(isinstance(path, str) and path for path in paths):
    raise UserError(
      f"{file}: field {split} must be a folder or a list of images, not {quoted(value)}; set it, or "
      "set data.builder.splits"
    )
  bases = [file.parent]
  if isinstance(content.get("path"), str):
    # Ultralytics looks for it in a folder of its settings, and other machines have other folders
    bases.insert(0, file.parent / os.path.expanduser(content["path"]))
  found: list[pathlib.Path] = []
  for path in paths:
    candidates = [b / path for b in bases]
    if path.startswith("../"):  # as Roboflow writes, of folders beside the file
      candidates += [b / path[3:] for b in bases]
    existing = next((c for c in candidates if c.exists()), None)
    if existing is None:
      raise UserError(f"{file}: field {split}: {candidates[0]}: no such file or folder; fix it")
    found += _listed_images(existing, existing.parent)
  return sorted(dict.fromkeys(found))


def _listed_images(path: pathlib.Path, base: pathlib.Path) -> list[pathlib.Path]:
  """Returns the images in a folder, or those that a text file lists, a path on each line."""
  path = pathlib.Path(os.path.normpath(path))
  if path.is_dir():
    return files.images_in(path)
  return [pathlib.Path(os.path.normpath(base / line)) for line in files.read_lines(path)]
