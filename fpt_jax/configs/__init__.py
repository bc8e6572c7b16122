"""The benchmarks, and what they share.

`base`, `detection` and `segmentation` have every field with its default. `variants` reads the words after
the colon of `--config=FILE:WORDS`. `tables` has the rows of the paper's tables, `published` the sizes that
other sources give for them, `ablations` the rows of `scripts/ablation.py`. Each benchmark is a module as
well: `from fpt_jax.configs import coco_mask`. In a checkout the benchmarks are the files in `configs/`; an
installed package contains them here.
"""

import pathlib

from fpt_jax.configs import detection, segmentation

# configs with the defaults of all fields, by `model.name`
DEFAULTS = {"rcnn": detection.detection, "segmenter": segmentation.segmentation}
_PACKAGE = pathlib.Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "configs").is_dir():
  __path__.append(str(_CHECKOUT / "configs"))

SHARED = (
  "__init__", "ablations", "base", "detection", "published", "segmentation", "tables", "variants"
)  # fmt: skip


def benchmarks() -> dict[str, pathlib.Path]:
  """Returns the file of each benchmark by its name, such as "coco_mask"."""
  files = sorted(file for folder in __path__ for file in pathlib.Path(folder).glob("*.py"))
  return {file.stem: file for file in files if file.stem not in SHARED}
