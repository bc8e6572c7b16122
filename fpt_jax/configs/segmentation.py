"""Defaults that the benchmarks of semantic segmentation share; every field is here, with its unit."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fpt_jax.configs import detection, variants


def segmentation_data() -> ConfigDict:
  """Crops of 969 x 969 of Cityscapes: the paper's section 4.2. The others change a few fields."""
  return ConfigDict(
    dict(
      name="cityscapes",  # or "ade20k", "lip", "voc2012", "camvid", "image_folder", "context_shapes"
      source="",  # folder of the data set's official layout, read by --mode=prepare
      data_dir="~/fpt_jax_data",  # where records are written and read
      builder=dict(
        splits=placeholder(tuple),  # which to prepare; where not set, all of the data set
        num_classes=placeholder(int),  # of an image_folder, which needs this or class_names
        class_names=placeholder(tuple),  # of an image_folder
        void=placeholder(
          int
        ),  # of an image_folder's label files: no class; where not set 255, -1: none
      ),
      train_split="train",
      eval_split="val",
      crop=(969, 969),  # pixels, (height, width) of a training image; LIP 573, PASCAL VOC 2012 521
      scale_min=0.5,  # training draws a factor of each image's size from here ...
      scale_max=2.0,  # ... to here
      short_edges=(),  # pixels; where given, drawn instead of a factor: (269, 369, 469, 569) of ADE20K
      flip=True,  # mirror half of the training images
      short_edge=0,  # pixels, of evaluation; 0: the images' own size
      canvas_multiple=32,  # pixels; an evaluated image's canvas is its size rounded up to multiples
      buckets=(),  # pixels, (height, width) of the canvases of evaluation, instead of rounding up
      skip_bad=False,  # count and name bad images and label maps instead of stopping
      num_workers=0,  # threads that read images; 0: one a core
      prefetch=2,  # batches made ahead
    )
  )


def segmentation() -> ConfigDict:
  """UFP and FPT on a frozen dilated ResNet-101, trained on Cityscapes: the paper's sections 3.5, 4.2."""
  config = ConfigDict()
  config.seed = 0
  config.init_from = ""  # a workdir whose newest weights to start from
  config.batch_size = 8  # images of all devices together
  config.images = 120 * 2975  # images to train on: the paper's epochs times those of the split
  config.steps = 0  # 0: as many as `images` makes at this batch size
  config.log_every = 20  # steps
  config.data = segmentation_data()

  config.model = ConfigDict(
    dict(
      name="segmenter",
      num_classes=19,  # taken from the data where class_names is empty
      class_names=(),
      palette=(),  # RGB of each class
      class_weights=(),  # of each class's pixels in the loss; (): all pixels alike
      swaps=(),  # pairs of classes that a mirrored image exchanges, such as left and right arm
      pixel_mean=(0.485, 0.456, 0.406),  # of RGB in 0..1
      pixel_std=(0.229, 0.224, 0.225),
      channel_order="rgb",  # or "bgr": of the images the backbone was trained on
      dtype="float32",  # of the computation; "bfloat16" on TPU
      norm="sync_bn",  # of the pyramid and the heads; "bn": statistics of each device's images alone
    )
  )
  config.model.backbone = detection.backbone()
  config.model.backbone.name = "resnet101"
  config.model.backbone.output_stride = 8  # pixels; or 16, 32
  config.model.pyramid = ConfigDict(
    dict(
      name="ufp",  # or "ppm", "aspp"; "afnb" and "none" have one level
      channels=256,  # of each of the four levels
      kernels=(1, 7, 15, 31),  # of ufp, in positions of the backbone's last map
    )
  )
  config.model.fpt = detection.feature_pyramid_transformer()
  config.model.fpt.window = 5  # positions; None for the global Grounding Transformer
  config.model.fpt.drop_block_size = 3
  config.model.head = ConfigDict(
    dict(
      hidden=512,  # channels of the 3x3 convolution
      context="none",  # or in its place "oc_base", "oc_pyramid", "oc_asp", "acf", "apnb"
      dropout=0.1,  # share of its channels
    )
  )
  config.model.auxiliary = ConfigDict(
    dict(
      weight=0.4,  # of the loss on C4 (Zhao et al. 2017, section 4.1); 0: no such head
      hidden=256,
    )
  )

  config.optim = ConfigDict(
    dict(
      learning_rate=0.01,  # for batches of base_batch_size
      base_batch_size=8,  # images, one a device: the paper names 8 GPUs and no batch size
      momentum=0.9,
      weight_decay=5e-4,
      warmup_steps=0,
      warmup_factor=0.001,
      schedule="poly",  # the rate is multiplied by (1 - step / steps) ** power; or "cosine"
      power=0.9,
      clip_norm=0.0,  # of the gradient; 0 for none
      frozen=(),  # beginnings of names of parameters to keep as they are: ("backbone.stem", "head")
    )
  )
  config.eval = ConfigDict(
    dict(
      every_steps=5000,
      batch_size=8,
      window=(),  # pixels, (height, width) of a sliding window; (): the whole image at once
      overlap=1 / 3,  # share of a window that the next one sees again
      scales=(1.0,),  # factors of the image's size; the scores are averaged
      flip=False,  # average with the mirrored image's scores
      submission=False,  # write the files that the data set's evaluation server takes
    )
  )
  config.checkpoint = ConfigDict(dict(every_steps=1000, keep=3))
  return config


def variant(config: ConfigDict, arg: str) -> ConfigDict:
  """The config as the part behind its file's colon asks: words and settings, separated by commas.

  Words: `small`, `demo`. Settings: those of `SETTINGS`, such as
  `backbone=resnet50,pyramid=ppm,fpt=st+lgt+rt`.

  Raises:
    ValueError: a word, a setting or its value does not exist.
  """
  return variants.apply(config, arg, WORDS, SETTINGS)


def small(config: ConfigDict) -> ConfigDict:
  """EfficientNet-Lite0 at low resolution: what two CPU cores can train on real images.

  It is trained from C4 on and with the batch's statistics: on CamVid, features that stayed as they were
  reached 39 mIoU, and with frozen statistics training diverged at this rate.
  """
  config = variants.set_backbone(config, "efficientnet_lite0")
  config.model.backbone.update(dict(frozen=False, norm="sync_bn"))
  config.optim.frozen = ("backbone.stem", *(f"backbone.blocks.{i}" for i in range(5)))
  config.optim.learning_rate = 0.03
  config.data.crop = (288, 384)
  config.data.short_edges = ()
  config.model.backbone.output_stride = 16
  config.model.pyramid.channels = 64
  config.model.head.hidden = 128
  config.model.auxiliary.weight = 0.0  # it would train nothing but itself
  return config


def demo(config: ConfigDict) -> ConfigDict:
  """Generated 128 x 128 images, a narrow ResNet-18 from scratch: minutes on two CPU cores."""
  config.data.update(dict(name="context_shapes", train_split="train", eval_split="val"))
  config.data.update(dict(crop=(128, 128), short_edges=(), scale_min=1.0, scale_max=1.0))
  config.data.buckets = ((128, 128),)
  config.batch_size = 8
  config.steps = 300
  config.model.update(dict(num_classes=6, class_weights=()))
  config.model.auxiliary.weight = 0.4
  config.model.backbone.update(
    dict(name="resnet18", width=16, norm="sync_bn", frozen=False, output_stride=8)
  )
  config.model.pyramid.update(dict(channels=48, kernels=(1, 3, 7, 15)))
  config.model.head.hidden = 64
  config.model.auxiliary.hidden = 32
  config.optim.update(dict(learning_rate=0.05, base_batch_size=8, warmup_steps=20, clip_norm=10.0))
  config.optim.frozen = ()
  config.eval.update(dict(every_steps=config.steps, batch_size=20, scales=(1.0,)))
  config.checkpoint.every_steps = 150
  return config


def set_sbn(config: ConfigDict, value: str) -> ConfigDict:
  config.model.norm = variants.choice("sbn", value, value, {"on": "sync_bn", "off": "bn"})
  config.model.fpt.norm = config.model.norm
  return config


def set_context(config: ConfigDict, value: str) -> ConfigDict:
  config.model.head.context = value
  return config


def set_head(config: ConfigDict, value: str) -> ConfigDict:
  """Whole networks of others behind the backbone: `fcn`, `ocnet`, `cfnet`, `afnb`.

  Raises:
    ValueError: the network is not built here.
  """
  if value in NOT_BUILT:
    raise ValueError(f"head={value}: {NOT_BUILT[value]}")
  config.model.pyramid.name, config.model.head.context = variants.choice(
    "head", value, value, HEADS
  )
  config.model.fpt.enabled = False
  return config


HEADS = {  # pyramid and context
  "fcn": ("none", "none"),
  "ocnet": ("none", "oc_asp"),
  "cfnet": ("none", "acf"),
  "afnb": ("afnb", "apnb"),
}
NOT_BUILT = {
  "hrnet": "HRNetV2 is a backbone of its own and is not built here",
  "gscnn": "GSCNN with its Wide-ResNet-101 is not built here",
}
WORDS = {"small": small, "demo": demo}
SETTINGS = {
  "backbone": variants.set_backbone,
  "pyramid": variants.set_pyramid,
  "fpt": variants.set_fpt,
  "scope": variants.set_scope,
  "context": set_context,
  "head": set_head,
  "sbn": set_sbn,
  "dropblock": variants.set_dropblock,
}
