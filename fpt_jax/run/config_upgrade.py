"""Configs of runs that an earlier version wrote: what they lack is set to what that version did."""

from ml_collections import ConfigDict

_BOTH = {"optim.frozen": ()}
_LATER_FIELDS = {  # by model
  "rcnn": _BOTH
  | {
    "data.annotations": "",
    "data.images": "",
    "data.short_edge_min": 0,
    "data.canvas_multiple": 32,
    "model.aligned": True,
    "model.canonical_size": 224.0,
    "model.channel_order": "rgb",
    "model.head": "standard",
    "model.backbone.context": "none",
    "model.backbone.stride_in": "3x3",
    "model.pyramid.level_norm": "none",
    "model.fpt.scale": None,
    "model.fpt.window": None,
    "model.test.short_edges": (),
    "model.test.flip": False,
  },
  "segmenter": _BOTH | {"model.swaps": (), "model.class_weights": ()},
}


def complete(config: ConfigDict) -> None:
  """Adds the fields that the config of an earlier version's run does not have."""
  for path, value in _LATER_FIELDS.get(config.model.name, {}).items():
    *groups, field = path.split(".")
    group = config
    for name in groups:
      group = group[name]
    if field not in group:
      group[field] = value
