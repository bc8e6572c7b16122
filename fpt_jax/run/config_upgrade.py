"""Upgrades of configs that were written by earlier versions.

A renamed field moves to its new name. A field that did not exist yet gets the value that describes what
the earlier version did.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from fpt_jax.errors import UserError

# New names of renamed fields, for messages.
RENAMED = {
  "images": "train_images",
  "data.short_edge_min": "data.train_sizes",
  "data.short_edges": "data.train_sizes",
  "data.scale_min": "data.scale",
  "data.scale_max": "data.scale",
  "model.head": "model.head.name",
  "model.head.context": "model.head.name",
  "model.test.short_edges": "eval.short_edges",
  "model.test.flip": "eval.flip",
}
_BOTH = {
  "name": "",
  "init_from_step": "",
  "loggers": (),
  "mesh": ConfigDict({"shape": (-1, 1, 1)}),
  "data.builder": ConfigDict(),
  # earlier versions ignored it in data sets and applied it to files
  "data.exif": "apply",
  "data.digest": "",
  "data.cache_dir": "~/.cache/fpt_jax_data",
  "data.num_workers": 0,
  "data.prefetch": 2,
  "data.few_canvases": False,
  "data.image_dtype": "float32",
  "data.train_sizes": (),
  "data.color_jitter": (),
  "optim.accumulate_steps": 1,
  "optim.frozen": (),
  "optim.decay_at": (0.75,),
  "optim.decay_factor": 0.1,
  "optim.power": 0.9,
  "optim.decay_biases_and_norms": True,
  "optim.bias_rate": 1.0,
  "optim.name": "sgd",
  "optim.beta1": 0.9,
  "optim.beta2": 0.999,
  "optim.epsilon": 1e-8,
  "optim.groups": (),
  "optim.ema_decay": 0.0,
  "eval.flip": False,
  "eval.sets": (),
  "model.backbone.masks_padding": False,
  "model.remat": "none",
  "model.remat_parts": ("backbone", "pyramid", "fpt", "heads"),
  "checkpoint.every_minutes": 0.0,
  "checkpoint.best_metric": "",
  "checkpoint.best_mode": "max",
  "eval.patience": 0,
  "model.fpt.wide": False,
  "model.fpt.grounding_similarity": "euclidean",
  "model.fpt.similarity_norm": "none",
  "model.fpt.uniform_mixture": False,
  "model.fpt.output_norm": False,
  "model.fpt.output_norm_scale": 1.0,
  "model.fpt.gate": "identity",
  "model.fpt.outside": "zero",
  "model.fpt.drop_block_schedule": "constant",
}
_LATER_FIELDS = {  # by model
  "rcnn": {
    "train_images": 160_000 * 8,
    "data.format": "coco",
    "data.annotations": "",
    "data.images": "",
    "data.canvas_multiple": 32,
    "data.resize": "torchvision",
    "data.train_long_edge": 0,
    "data.crop": (),
    "data.scale": (1.0, 1.0),
    "data.copy_paste": 0.0,
    "data.filter_empty": False,
    "model.aligned": True,
    "model.canonical_size": 224.0,
    "model.box_head.beta": 1 / 9,
    "model.channel_order": "rgb",
    "model.head": ConfigDict({"name": "standard"}),
    "model.backbone.context": "none",
    "model.backbone.stride_in": "3x3",
    "model.rpn.round_anchors": True,
    "model.rpn.min_side": 1e-3,
    "model.test.min_side": 1e-2,
    "model.backbone.upsampling": "nearest",
    "model.pyramid.level_norm": "none",
    "model.pyramid.norm": "none",
    "model.pyramid.init": "fan_out",
    "model.rpn.convs": 1,
    "model.box_head.convs": 0,
    "model.box_head.linears": 2,
    "model.box_head.norm": "none",
    "model.mask_head.norm": "none",
    "model.fpt.scale": None,
    "model.fpt.window": None,
    "eval.short_edges": (),
    "eval.matcher": "pycocotools",
    "eval.confusion_score": 0.5,
    "eval.curves_of": (),
  },
  "segmenter": {
    "model.swaps": (),
    "model.backbone.upsampling": "bilinear",
    "model.class_weights": (),
    "model.align_corners": False,
    "model.hard_pixels": 0,
    "model.hard_probability": 0.7,
    "model.head.name": "fcn",
    "model.head.dropout_of": "channels",
    "model.edges": ConfigDict(
      {
        "radius": 2.0,
        "weight": 20.0,
        "class_weight": 1.0,
        "threshold": 0.8,
        "gradient_weight": 1.0,
        "temperature": 0.5,
      }
    ),
  },
}


# heads of segmentation with other layers in versions whose configs have no model.head.dropout_of
_REBUILT = ("oc_base", "oc_pyramid", "oc_asp", "acf")


def upgrade(config: ConfigDict) -> ConfigDict:
  """Returns a config of this or an earlier version with the fields of this version.

  Args:
    config: a complete config; it is changed in place.

  Raises:
    UserError: this version does not have the model of the config.
  """
  _move(config, "images")
  _UPGRADES.get(config.model.name, lambda _: None)(config)
  for path, value in (_BOTH | _LATER_FIELDS.get(config.model.name, {})).items():
    group, field = _group(config, path)
    if field not in group:
      group[field] = ConfigDict(value) if isinstance(value, ConfigDict) else value
  if config.model.fpt.get("implementation") == "tiled":  # what "auto" is for windows
    config.model.fpt.implementation = "auto"
  return config


def _move(config: ConfigDict, path: str) -> None:
  """Moves the value of a renamed field to its new name, if the config has the old one."""
  group, field = _group(config, path)
  if field in group:
    new_group, new_field = _group(config, RENAMED[path])
    new_group[new_field] = group[field]
    del group[field]


def _upgrade_rcnn(config: ConfigDict) -> None:
  data, model = config.data, config.model
  _move(config, "model.test.short_edges")
  _move(config, "model.test.flip")
  if "short_edge_min" in data:
    low = data.short_edge_min
    data.train_sizes = (low, data.short_edge) if low else ()
    del data.short_edge_min
  if isinstance(model.get("head"), str):
    name = model.head
    del model.head
    model.head = ConfigDict({"name": name})


def _upgrade_segmenter(config: ConfigDict) -> None:
  data, head = config.data, config.model.head
  if "scale_min" in data:
    data.scale = (data.scale_min, data.scale_max)
    del data.scale_min, data.scale_max
  if "short_edges" in data:
    sizes = tuple(data.short_edges)
    # earlier versions drew one of the numbers; two numbers are a range now, so both are repeated
    data.train_sizes = sizes * 2 if len(sizes) == 2 else sizes
    del data.short_edges
  if "context" in head:
    head.name = "fcn" if head.context == "none" else head.context
    del head.context
  if head.get("name") in _REBUILT and "dropout_of" not in head:
    raise UserError(
      f"the head {head.name!r} of this run has other layers in this version; use the run with the version "
      "that trained it, or train again"
    )


_UPGRADES: dict[str, Callable[[ConfigDict], None]] = {
  "rcnn": _upgrade_rcnn,
  "segmenter": _upgrade_segmenter,
}


def _group(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
  """Returns the group that a field belongs to, and the field's name in it."""
  *groups, field = path.split(".")
  for name in groups:
    config = config[name]
  return config, field
