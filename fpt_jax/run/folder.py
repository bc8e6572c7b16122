"""The folder of a run, on a disk or in a bucket."""

import os

from etils import epath

from fpt_jax.errors import UserError


def run_folder(workdir: str) -> epath.Path:
  """Returns the folder that `--workdir` names; local paths become absolute.

  Raises:
    UserError: `workdir` is empty.
  """
  if not workdir:
    raise UserError("--workdir is missing; set it to the folder of the run")
  return epath.Path(workdir) if "://" in workdir else epath.Path(os.path.abspath(workdir))


def write_whole(path: epath.Path, text: str) -> None:
  """Replaces a text file atomically: an interruption leaves either the old file or the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f"{path.name}.tmp"
  temporary.write_text(text)
  temporary.replace(path)
