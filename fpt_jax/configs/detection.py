"""Defaults that the benchmarks share; every field a config may set is here, with its unit."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fpt_jax.configs import variants
from fpt_jax.configs.variants import apply, choice, set_dropblock, set_fpt, set_scope


def backbone() -> ConfigDict:
  """A frozen ResNet-50."""
  return ConfigDict(
    dict(
      name="resnet50",
      width=64,  # of a ResNet's stem
      stride_in="3x3",  # or "1x1": the convolution of a bottleneck that has the stride
      context="none",  # or "non_local", "global_context", "attention_augmented": blocks in a ResNet
      norm="frozen_bn",
      frozen=True,
    )
  )


def feature_pyramid_transformer() -> ConfigDict:
  """All three transformers, as for instances: the paper's section 3.5."""
  return ConfigDict(
    dict(
      enabled=True,
      self_transformer=True,
      grounding_transformer=True,
      rendering_transformer=True,
      self_parts=2,
      grounding_parts=4,
      scope="all",  # or "adjacent": the levels that a level hears
      gate="identity",  # or "sigmoid": of the Rendering Transformer's channel weights
      window=placeholder(int),  # odd side of a locality-constrained Grounding Transformer
      scale=placeholder(float),  # of the similarities; 1 / sqrt(channels of a part) where not set
      norm="sync_bn",  # or "bn": statistics of each device's images alone
      drop_block_size=5,
      keep_probability=0.9,
      implementation="auto",
    )
  )


def detection() -> ConfigDict:
  """Mask R-CNN with FPT on a bottom-up pyramid of a frozen ResNet-50: the paper's section 4.1."""
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""  # a workdir whose newest weights to start from
  config.batch_size = 8  # images of all devices together
  config.images = 160_000 * 8  # images to train on: the paper's 160k steps of 8
  config.steps = 0  # 0: as many as `images` makes at this batch size
  config.log_every = 20  # steps

  config.data = ConfigDict(
    dict(
      name="coco",
      source="",  # folder of the data set's official layout, read by --mode=prepare
      annotations="",  # instead: a single file of one's own in COCO's format,
      images="",  # and the folder of its images; every tenth image is the split "val"
      data_dir="~/fpt_jax_data",  # where records are written and read
      train_split="train",
      eval_split="val",
      short_edge=800,  # pixels
      short_edge_min=0,  # pixels; training draws each image's shorter edge from here on; 0: one scale
      long_edge=1000,  # pixels, at most
      buckets=(
        (800, 1024),
        (1024, 800),
      ),  # (height, width) of the canvases; (): each image's own size
      canvas_multiple=32,  # pixels; what that size is rounded up to
      max_instances=100,  # ground truths an image; the largest are kept
      flip=True,
      skip_bad=False,  # count and name bad records instead of stopping
    )
  )

  config.model = ConfigDict(
    dict(
      name="rcnn",
      num_classes=80,  # foreground classes; taken from the data where category_ids is empty
      category_ids=(),  # the data set's own id of each class
      category_names=(),
      pixel_mean=(0.485, 0.456, 0.406),  # of RGB in 0..1
      pixel_std=(0.229, 0.224, 0.225),
      channel_order="rgb",  # or "bgr": of the images the backbone was trained on
      dtype="float32",  # of the computation; "bfloat16" on TPU
      canonical_size=224.0,  # pixels, the side of the smallest square region pooled from P4
      aligned=True,  # regions are cut out to the half pixel; False: as torchvision's Mask R-CNN
    )
  )
  config.model.backbone = backbone()
  config.model.pyramid = ConfigDict(
    dict(
      name="bfp",  # or "fpn", "bpa", "bfi"
      channels=256,
      level_norm="none",  # or "sync_bn", "bn", "group_norm": of the backbone's levels, before the pyramid
    )
  )
  config.model.fpt = feature_pyramid_transformer()
  config.model.rpn = ConfigDict(
    dict(
      anchor_sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),  # pixels, a level each
      aspect_ratios=(0.5, 1.0, 2.0),  # height / width
      fg_threshold=0.7,
      bg_threshold=0.3,
      samples=256,
      positive_fraction=0.5,
      nms_threshold=0.7,
      train=dict(pre_nms=2000, post_nms=2000),  # pre_nms is a level's count
      test=dict(pre_nms=1000, post_nms=1000),
    )
  )
  config.model.head = "standard"  # or "augmented": PANet's box and mask heads
  config.model.box_head = ConfigDict(
    dict(
      pool_size=7,
      sampling_ratio=2,
      hidden=1024,
      samples=512,
      positive_fraction=0.25,
      fg_threshold=0.5,
    )
  )
  config.model.mask_head = ConfigDict(
    dict(enabled=True, pool_size=14, sampling_ratio=2, hidden=256, layers=4)
  )
  config.model.test = ConfigDict(
    dict(
      score_threshold=0.05,
      nms_threshold=0.5,
      detections_per_image=100,
      max_candidates=2000,  # boxes of all classes that suppression looks at
      short_edges=(),  # pixels; detections at these sizes are put together; (): data.short_edge alone
      flip=False,  # detections in the mirrored image too
    )
  )

  config.optim = ConfigDict(
    dict(
      learning_rate=0.05,  # for batches of base_batch_size
      base_batch_size=8,  # images; larger batches have a rate as much higher
      momentum=0.9,
      weight_decay=1e-4,
      warmup_steps=500,
      warmup_factor=0.001,
      decay_at=(0.75,),  # shares of the training after which the rate is multiplied by decay_factor
      decay_factor=0.1,
      schedule="step",  # or "cosine"
      clip_norm=0.0,  # of the gradient; 0 for none
      frozen=(),  # beginnings of names of parameters to keep as they are: ("backbone.stem", "rpn")
    )
  )
  config.eval = ConfigDict(dict(every_steps=10_000, batch_size=8))
  config.checkpoint = ConfigDict(dict(every_steps=1000, keep=3))
  return config


def variant(config: ConfigDict, arg: str) -> ConfigDict:
  """The config as the part behind its file's colon asks: words and settings, separated by commas.

  Words: `small`, `tiny`, `demo`, `torchvision`, `multiscale`. Settings: those of `SETTINGS`, such as
  `backbone=resnet101_gc,pyramid=fpn,fpt=st+gt,head=augmented`.

  Raises:
    ValueError: a word, a setting or its value does not exist.
  """
  return apply(config, arg, WORDS, SETTINGS)


def set_backbone(config: ConfigDict, value: str) -> ConfigDict:
  """As `variants.set_backbone`; the levels of EfficientNet-Lite0 are normalised.

  They end in convolutions without an activation, and with ImageNet's weights their standard deviations
  are 3 to 10: a pyramid of convolutions alone hands that on, and training diverges at usual rates.
  """
  config = variants.set_backbone(config, value)
  config.model.pyramid.level_norm = "sync_bn" if value == "efficientnet_lite0" else "none"
  return config


def set_pyramid(config: ConfigDict, value: str) -> ConfigDict:
  config.model.pyramid.name = choice("pyramid", value, value, {name: name for name in PYRAMIDS})
  return config


def set_head(config: ConfigDict, value: str) -> ConfigDict:
  config.model.head = choice(
    "head", value, value, {"standard": "standard", "augmented": "augmented"}
  )
  return config


def set_sbn(config: ConfigDict, value: str) -> ConfigDict:
  config.model.fpt.norm = choice("sbn", value, value, {"on": "sync_bn", "off": "bn"})
  return config


def multiscale(config: ConfigDict) -> ConfigDict:
  """Each training image at a size of its own, from half the usual one: multi-scale training of PANet."""
  config.data.short_edge_min = config.data.short_edge // 2
  return config


def torchvision(config: ConfigDict) -> ConfigDict:
  """The detector that equals torchvision's fasterrcnn/maskrcnn_resnet50_fpn, for its weights."""
  config.data.long_edge = 1333
  config.data.buckets = ()  # what lies beyond an image matters, so its canvas must be torchvision's
  config.model.num_classes = 90
  config.model.category_ids = tuple(range(1, 91))  # COCO's own ids, gaps and all
  config.model.aligned = False
  config.model.pyramid.name = "fpn"
  config.model.fpt.enabled = False
  return config


def small(config: ConfigDict) -> ConfigDict:
  """A narrow ResNet-18 from scratch at low resolution: what two CPU cores can train on real images."""
  config.data.short_edge = 192
  config.data.long_edge = 256
  config.data.buckets = ((192, 256), (256, 192))
  config.optim.learning_rate = 0.04
  config.optim.warmup_steps = 50
  config.optim.schedule = "cosine"
  config.optim.clip_norm = 10.0
  config.model.backbone.update(dict(name="resnet18", width=32, norm="sync_bn", frozen=False))
  config.model.canonical_size = 84.0  # as much smaller than 224 as the anchors are
  config.model.pyramid.channels = 64
  config.model.rpn.anchor_sizes = ((12.0,), (24.0,), (48.0,), (96.0,), (192.0,))
  config.model.rpn.samples = 64
  config.model.rpn.train.update(dict(pre_nms=200, post_nms=100))
  config.model.rpn.test.update(dict(pre_nms=200, post_nms=100))
  config.model.box_head.samples = 64
  config.model.box_head.hidden = 256
  config.model.mask_head.update(dict(hidden=64, layers=2))
  config.model.test.update(dict(detections_per_image=50, max_candidates=500))
  return config


def tiny(config: ConfigDict) -> ConfigDict:
  """As `small` at 120 pixels, where attention costs a sixth; regions are pooled one level finer."""
  config = small(config)
  config.data.short_edge = 120
  config.data.long_edge = 160
  config.data.buckets = ((128, 160), (160, 128))
  config.model.canonical_size = 26.0
  config.model.rpn.anchor_sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
  return config


def demo(config: ConfigDict) -> ConfigDict:
  """Generated 128 x 128 images, narrower still: minutes on two CPU cores."""
  config = small(config)
  config.data.name = "context_shapes"
  config.data.short_edge = config.data.long_edge = 128
  config.data.buckets = ((128, 128),)
  config.data.max_instances = 8
  config.steps = 300
  config.model.canonical_size = 224.0
  config.model.backbone.width = 16
  config.model.pyramid.channels = 48
  config.model.rpn.anchor_sizes = ((12.0,), (24.0,), (40.0,), (64.0,), (96.0,))
  config.model.rpn.test.post_nms = 50
  config.model.box_head.samples = 32
  config.model.box_head.hidden = 128
  config.model.mask_head.hidden = 32
  config.model.test.update(dict(detections_per_image=20, max_candidates=200))
  config.eval.update(dict(every_steps=config.steps, batch_size=20))
  config.checkpoint.every_steps = 150
  return config


PYRAMIDS = ("bfp", "fpn", "bpa", "bfi")
WORDS = {
  "small": small,
  "demo": demo,
  "torchvision": torchvision,
  "multiscale": multiscale,
  "tiny": tiny,
}
SETTINGS = {
  "backbone": set_backbone,
  "pyramid": set_pyramid,
  "fpt": set_fpt,
  "scope": set_scope,
  "head": set_head,
  "sbn": set_sbn,
  "dropblock": set_dropblock,
}
