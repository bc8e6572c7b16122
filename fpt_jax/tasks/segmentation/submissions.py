"""Label maps in the formats of the benchmarks' evaluation servers."""

import pathlib

import numpy as np
from etils import epath

from fpt_jax.data.datasets import ade20k, cityscapes
from fpt_jax.data.records.images import encode_png
from fpt_jax.run.folder import write_whole

# numbers in the files for the classes 0, 1, ...
_IDS = {
  "cityscapes": cityscapes.IDS,
  "ade20k": tuple(range(1, 1 + len(ade20k.LAYOUT.class_names))),
}
CLASS_NAMES = {
  "cityscapes": cityscapes.LAYOUT.class_names,
  "ade20k": ade20k.LAYOUT.class_names,
}


def write(name: str, folder: epath.Path, file_name: str, label_HW: np.ndarray) -> epath.Path:
  """Writes the prediction for one image.

  Cityscapes: label ids (road is 7) in <city>_<sequence>_<frame>_pred_labelIds.png. ADE20K: 1..150
  in a PNG of the image's name.

  Args:
    name: name of the data set, "cityscapes" or "ade20k".
    folder: folder to write into; it is created if it does not exist.
    file_name: name of the image file.
    label_HW: classes of `CLASS_NAMES`, int, of the size of the image file.

  Returns:
    The file that was written.

  Raises:
    ValueError: the data set has no server, or the label map has numbers that are not classes.
    UserError: the file cannot be written.
  """
  if name not in _IDS:
    raise ValueError(f"no submission format for {name!r}; choose one of {sorted(_IDS)}")
  ids = np.array(_IDS[name], np.uint8)
  if label_HW.ndim != 2 or label_HW.min() < 0 or label_HW.max() >= len(ids):
    raise ValueError(
      f"{file_name}: expected a map of classes 0..{len(ids) - 1}, got shape {label_HW.shape} with "
      f"{label_HW.min()}..{label_HW.max()}"
    )
  stem = pathlib.PurePath(file_name).stem
  if name == "cityscapes":
    stem = stem.removesuffix("_leftImg8bit") + "_pred_labelIds"
  file = folder / f"{stem}.png"
  write_whole(file, encode_png(ids[label_HW]))
  return file
