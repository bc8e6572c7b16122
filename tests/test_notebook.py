"""The notebook: it is stored without outputs, and its cells run from top to bottom."""

import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

from tests.runs import QUICK, ROOT, config_file

NOTEBOOK = ROOT / "notebooks" / "fpt_tpu_colab.ipynb"


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def is_run(cell) -> bool:
  return "not-run" not in cell.metadata.get("tags", ())


def printed(cell) -> str:
  """What a cell has printed; a stream may be cut anywhere."""
  return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def test_it_is_stored_without_outputs(notebook):
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert cell.outputs == [] and cell.execution_count is None
      assert is_run(cell) != bool(re.search(r"^# not run: ", cell.source, re.MULTILINE))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(notebook, tmp_path):
  workdir = tmp_path / "run"
  scripts = pathlib.Path(sys.executable).parent  # where %%bash finds this Python
  environment = os.environ | QUICK | {
    "CONFIG": str(config_file(tmp_path, steps=4)),
    "WORKDIR": str(workdir),
    "MIN_SCORE": "0",
    "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
  }  # fmt: skip
  notebook.cells = [cell for cell in notebook.cells if is_run(cell)]
  client = nbclient.NotebookClient(
    notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
  )
  client.execute(env=environment)
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  pictures = [output for output in outputs if "image/png" in output.get("data", {})]
  text = "\n".join(printed(cell) for cell in notebook.cells)
  # training data, losses, predictions, two images of one's own, and their explanations
  assert len(pictures) == 7
  assert re.search(r"^step 4 with \d+ arrays", text, re.MULTILINE)
  assert re.search(r"^context/accuracy +\d", text, re.MULTILINE)
  assert {"circle.png", "square.png"} <= {file.name for file in (workdir / "explain").iterdir()}
