"""The fields of semantic segmentation, and the words behind the colon of its benchmarks.

One assignment per line, with its comment: the documentation's list of fields is made from them.
"""

from ml_collections import ConfigDict

from fpt_jax.configs import variants
from fpt_jax.configs.base import base
from fpt_jax.errors import UserError


def segmentation() -> ConfigDict:
  """UFP and FPT on a frozen dilated ResNet-101, trained on Cityscapes (paper, sections 3.5, 4.2)."""
  config = base()
  data, model = config.data, config.model
  config.train_images = 120 * 2975  # the paper's epochs times the images of the training split
  data.name = "cityscapes"
  data.crop = (969, 969)  # size (height, width) of a training image, pixels
  data.scale = (0.5, 2.0)  # training images are resized by a random factor in this range
  data.short_edge = 0
  data.buckets = ()

  model.name = "segmenter"
  model.num_classes = 19
  model.class_names = ()  # name of each class; (): taken from the data
  model.palette = ()  # R, G, B of each class
  model.class_weights = ()  # weight of each class's pixels in the loss; (): 1
  model.swaps = ()  # pairs of classes that a mirrored image exchanges, such as left and right arm
  # of the pyramid and the heads: sync_bn, bn (per device), group_norm or none
  model.norm = "sync_bn"
  model.backbone.name = "resnet101"
  model.backbone.output_stride = 8  # of the last level, pixels: 8, 16 or 32
  model.pyramid.name = "ufp"
  model.pyramid.kernels = (
    1,
    7,
    15,
    31,
  )  # of ufp: sides of the windows, positions of the last level
  model.fpt.window = 5
  model.fpt.drop_block_size = 3
  model.head.name = "fcn"
  model.head.hidden = 512  # channels in front of the classifier
  model.head.dropout = 0.1  # share of these channels that is dropped
  auxiliary = model.auxiliary = ConfigDict()
  # of the auxiliary loss on C4 (Zhao et al. 2017, 4.1); 0: no auxiliary head
  auxiliary.weight = 0.4
  auxiliary.hidden = 256  # channels in front of its classifier

  optim = config.optim
  optim.learning_rate = 0.01
  optim.weight_decay = 5e-4
  optim.warmup_steps = 0
  optim.schedule = "poly"

  evaluation = config.eval
  evaluation.every_steps = 5000
  evaluation.window = ()  # size (height, width) of a sliding window, pixels; (): the whole image
  evaluation.overlap = 1 / 3  # share of a window that the next one covers again
  evaluation.scales = (1.0,)  # factors of the image size; the probabilities are averaged
  evaluation.submission = False  # write the files that the data set's evaluation server takes
  return config.lock()


def variant(config: ConfigDict, arg: str) -> ConfigDict:
  """Returns the config that the words behind the colon of its file ask for, in any order.

  Words: `small` or `demo`. Settings: those of `SETTINGS`, such as
  `backbone=resnet50,pyramid=ppm,fpt=st+lgt+rt`.

  Raises:
    UserError: a word, a setting or its value does not exist, or two exclude each other.
  """
  replaces = {"head": ("pyramid", "fpt", "context")}
  return variants.apply(config, arg, sizes=SIZES, settings=SETTINGS, words={}, replaces=replaces)


def small(config: ConfigDict) -> ConfigDict:
  """EfficientNet-Lite0 at low resolution: real images on two CPU cores.

  It is trained from C4 on, with the statistics of the batch: on CamVid, frozen features reached 39
  mIoU, and with frozen statistics training diverged at this rate.
  """
  variants.set_backbone(config, "efficientnet_lite0")
  config.model.backbone.update(dict(frozen=False, norm="sync_bn"))
  config.optim.frozen = ("backbone.stem", *(f"backbone.blocks.{i}" for i in range(5)))
  config.optim.learning_rate = 0.03
  config.data.crop = (288, 384)
  config.data.train_sizes = ()
  config.model.backbone.output_stride = 16
  config.model.pyramid.channels = 64
  config.model.head.hidden = 128
  config.model.auxiliary.weight = 0.0  # the loss on frozen features would train its own head alone
  return config


def demo(config: ConfigDict) -> ConfigDict:
  """Generated images of 128 x 128 and a narrow ResNet-18 from scratch: minutes on two CPU cores."""
  config.data.update(dict(name="context_shapes", train_split="train", eval_split="val"))
  config.data.update(dict(crop=(128, 128), train_sizes=(), scale=(1.0, 1.0)))
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


def set_pyramid(config: ConfigDict, value: str) -> None:
  config.model.pyramid.name = variants.choice("pyramid", value, PYRAMIDS)


def set_context(config: ConfigDict, value: str) -> None:
  config.model.head.name = variants.choice("context", value, CONTEXTS)


def set_head(config: ConfigDict, value: str) -> None:
  """Sets another network behind the backbone: `fcn`, `ocnet`, `cfnet` or `afnb`.

  Raises:
    UserError: the network does not exist here.
  """
  if value in NOT_BUILT:
    raise UserError(f"head={value}: {NOT_BUILT[value]}")
  pyramid, head = variants.choice("head", value, HEADS)
  config.model.pyramid.name, config.model.head.name = pyramid, head
  config.model.fpt.enabled = False


def set_sbn(config: ConfigDict, value: str) -> None:
  config.model.norm = config.model.fpt.norm = variants.choice("sbn", value, variants.SBN)


PYRAMIDS = ("ufp", "ppm", "aspp", "afnb", "none")
CONTEXTS = {
  "none": "fcn",
  "oc_base": "oc_base",
  "oc_pyramid": "oc_pyramid",
  "oc_asp": "oc_asp",
  "acf": "acf",
  "apnb": "apnb",
}
HEADS = {  # name: pyramid and head
  "fcn": ("none", "fcn"),
  "ocnet": ("none", "oc_asp"),
  "cfnet": ("none", "acf"),
  "afnb": ("afnb", "apnb"),
}
NOT_BUILT = {
  "hrnet": "HRNetV2 is a backbone of its own, which does not exist here",
  "gscnn": "GSCNN with its Wide-ResNet-101 does not exist here",
}
SIZES = {"small": small, "demo": demo}
SETTINGS = {
  "backbone": variants.set_backbone,
  "pyramid": set_pyramid,
  "fpt": variants.set_fpt,
  "scope": variants.set_scope,
  "context": set_context,
  "head": set_head,
  "sbn": set_sbn,
  "dropblock": variants.set_dropblock,
}
