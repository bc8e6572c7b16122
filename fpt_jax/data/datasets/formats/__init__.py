"""Annotations in other formats than COCO's, read into its dictionaries."""

from fpt_jax.data.datasets.formats import cvat, labelme, voc, yolo
from fpt_jax.data.datasets.formats.convert import Converted, convert, image_paths, label_paths

# by the value of data.format
FORMATS = {
  "yolo": yolo.FORMAT,
  "voc": voc.FORMAT,
  "labelme": labelme.FORMAT,
  "cvat": cvat.FORMAT,
}

__all__ = ["FORMATS", "Converted", "convert", "image_paths", "label_paths"]
