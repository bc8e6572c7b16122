"""The fields of semantic segmentation, and the words after the colon of its benchmarks.

Each field is assigned on its own line. Its comment is its description in the documentation.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fpt_jax.configs import variants
from fpt_jax.configs.base import base


def segmentation() -> ConfigDict:
  """Returns the config of UFP and FPT on a frozen dilated ResNet-101 (paper, sections 3.5, 4.2)."""
  config = base()
  data, model = config.data, config.model
  config.train_images = 120 * 2975  # the paper's epochs times the images of the training split
  data.name = "cityscapes"
  # names of the splits to prepare, ("train", "val"); unset: those of the data set
  data.builder.splits = placeholder(tuple)
  data.crop = (969, 969)  # size (height, width) of a training crop, pixels
  # range of the random factor that training images are resized by, unless data.train_sizes is set
  data.scale = (0.5, 2.0)
  data.short_edge = 0
  data.buckets = ()

  model.name = "segmenter"
  model.num_classes = 19
  model.class_names = ()  # name of each class; (): taken from the data
  model.palette = ()  # colour of each class in pictures, R, G, B; (): taken from the data
  model.class_weights = ()  # weight of each class's pixels in the loss; (): 1 for all
  # online hard example mining: smallest number of pixels of a batch in the main loss, 100,000 in OCNet's code
  # and 131,072 in HRNet's for the images of one GPU; 0: all pixels
  model.hard_pixels = 0
  # probability of its class up to which a pixel is in the loss in any case, if model.hard_pixels is not 0:
  # 0.7 in OCNet's code, 0.9 in HRNet's
  model.hard_probability = 0.7
  # pairs of classes that are exchanged when an image is mirrored, such as left and right arm;
  # (): taken from the data
  model.swaps = ()
  # normalisation in the pyramid and the heads: sync_bn, bn (statistics per device), group_norm or none
  model.norm = "sync_bn"
  # enlarge logits with aligned corners, as in the code of PSPNet, OCNet, ANN and EncNet: position i of a map
  # lies at pixel i times the stride; canvases have one pixel more than a multiple of data.canvas_multiple.
  # For crops of 8 n + 1 pixels. False: with half-pixel centres, (stride - 1) / 2 pixels away, as in
  # torchvision and in HRNet's branch pytorch-v1.1
  model.align_corners = True
  model.backbone.name = "resnet101"
  # stride of the backbone's last level, pixels: 8, 16 or 32; 4 too for an HRNet, whose last level has all
  # of its branches, concatenated, unless this is 32
  model.backbone.output_stride = 8
  model.backbone.upsampling = "bilinear"
  model.backbone.masks_padding = True
  model.pyramid.name = "ufp"
  # ufp: sides of the windows, positions of the last level
  model.pyramid.kernels = (1, 7, 15, 31)
  model.fpt.window = 5
  model.fpt.drop_block_size = 3
  model.head.name = "fcn"
  model.head.hidden = 512  # channels before the head's classifier
  model.head.dropout = 0.1  # share of what dropout drops before the head's classifier
  # what it drops: channels (OCNet's and ANN's code) or values one by one (the code of EncNet and CFNet)
  model.head.dropout_of = "channels"
  auxiliary = model.auxiliary = ConfigDict()
  # weight of the auxiliary loss on C4 (Zhao et al. 2017, 4.1); 0: no auxiliary head
  auxiliary.weight = 0.4
  auxiliary.hidden = 256  # channels before the auxiliary head's classifier
  # losses of head gscnn (Takikawa et al. 2019, section 3.3)
  edges = model.edges = ConfigDict()
  # gscnn: distance from another class up to which a pixel is on an edge, pixels; 2 in GSCNN's code
  edges.radius = 2.0
  edges.weight = 20.0  # weight of the loss of predicted edges (lambda 1 of GSCNN's paper)
  # weight of the loss of classes at pixels on predicted edges (lambda 4 of GSCNN's paper)
  edges.class_weight = 1.0
  # probability from which a pixel is on a predicted edge, as in GSCNN's paper
  edges.threshold = 0.8
  # weight of the loss that compares borders in the prediction and the labels (lambda 3 of GSCNN's paper)
  edges.gradient_weight = 1.0
  # temperature of the Gumbel-softmax in the comparison of borders; 0.5 in GSCNN's code
  edges.temperature = 0.5

  optim = config.optim
  optim.learning_rate = 0.01
  optim.weight_decay = 5e-4
  optim.warmup_steps = 0
  optim.schedule = "poly"

  evaluation = config.eval
  evaluation.every_steps = 5000
  evaluation.window = ()  # size (height, width) of a sliding window, pixels; (): the whole image
  evaluation.overlap = 1 / 3  # share of a sliding window that overlaps the next one
  # factors of the image size; the probabilities at all of them are averaged
  evaluation.scales = (1.0,)
  evaluation.submission = False  # also write the files for the data set's evaluation server
  return config.lock()


def variant(config: ConfigDict, arg: str) -> ConfigDict:
  """Returns the config changed by the words after the colon of its file, in any order.

  Words: `small` or `demo`, and `literal`. Settings: those of `SETTINGS`, such as
  `backbone=resnet50,pyramid=ppm,fpt=st+lgt+rt`.

  Raises:
    UserError: a word, a setting or its value does not exist, or two of them exclude each other.
  """
  replaces = {
    "head": ("pyramid", "fpt", "context"),
    "head=hrnet": ("backbone",),
    "head=gscnn": ("backbone",),
  }
  return variants.apply(config, arg, sizes=SIZES, settings=SETTINGS, words=WORDS, replaces=replaces)


def small(config: ConfigDict) -> None:
  """Sets EfficientNet-Lite0 at low resolution: real images on two CPU cores.

  Its layers from C4 on are trained, with the statistics of the batch: on CamVid, frozen features reached
  39 mIoU, and with frozen statistics training diverged at this learning rate.
  """
  variants.set_backbone(config, "efficientnet_lite0")
  config.model.backbone.update(dict(frozen=False, norm="sync_bn"))
  config.optim.frozen = ("backbone.stem", *(f"backbone.blocks.{i}" for i in range(5)))
  config.optim.learning_rate = 0.03
  config.data.crop = (288, 384)
  config.data.train_sizes = ()
  config.model.align_corners = False
  config.model.backbone.output_stride = 16
  config.model.pyramid.channels = 64
  config.model.head.hidden = 128
  # on frozen features, this loss would train the auxiliary head alone
  config.model.auxiliary.weight = 0.0


def demo(config: ConfigDict) -> None:
  """Sets generated images of 128 x 128 and a narrow ResNet-18 from scratch: minutes on two CPU cores."""
  config.data.update(dict(name="context_shapes", train_split="train", eval_split="val"))
  config.data.update(dict(crop=(128, 128), train_sizes=(), scale=(1.0, 1.0)))
  config.data.buckets = ((128, 128),)
  config.batch_size = 8
  config.steps = 300
  config.log_every = 10
  config.model.update(dict(num_classes=7, class_weights=(), align_corners=False))
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


def set_pyramid(config: ConfigDict, value: str) -> None:
  config.model.pyramid.name = variants.choice("pyramid", value, PYRAMIDS)


def set_context(config: ConfigDict, value: str) -> None:
  config.model.head.name = variants.choice("context", value, CONTEXTS)


def set_head(config: ConfigDict, value: str) -> None:
  """Sets another network on the backbone, one of `HEADS`; or HRNetV2 or GSCNN, each a backbone and a head.

  Raises:
    UserError: the network does not exist.
  """
  model = config.model
  if value in WIDE_AUXILIARY:
    model.auxiliary.hidden *= 2
  model.pyramid.name, model.head.name = variants.choice("head", value, HEADS)
  model.fpt.enabled = False
  if value in HALF_PIXEL:
    model.align_corners = False
  if value in ("deeplabv3", "gscnn"):
    model.head.hidden //= 2  # 256, where the other networks have 512
  if value == "hrnet":
    variants.set_backbone(config, "hrnet_w48")
    model.backbone.output_stride = 4
    # as many channels as the branches have together, 720
    model.head.hidden = model.backbone.width * 48 * (1 + 2 + 4 + 8) // 64
  if value == "gscnn":
    variants.set_backbone(config, "wider_resnet38")
  if value in ("hrnet", "gscnn"):
    model.head.dropout = 0.0
    model.auxiliary.weight = 0.0


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
  "psp": "psp",
  "deeplabv3": "deeplabv3",
}
HEADS = {  # name: pyramid and head
  "fcn": ("none", "fcn"),
  "ocnet": ("none", "oc_asp"),
  "cfnet": ("none", "acf"),
  "afnb": ("afnb", "apnb"),
  "pspnet": ("none", "psp"),
  "deeplabv3": ("none", "deeplabv3"),
  "hrnet": ("none", "pointwise"),
  "gscnn": ("none", "gscnn"),
}
# networks whose authors' code has 512 channels in the auxiliary head, twice as many as PSPNet
WIDE_AUXILIARY = ("ocnet", "afnb")
# networks whose weights are trained with half-pixel centres: torchvision's, and HRNet's branch pytorch-v1.1
HALF_PIXEL = ("fcn", "deeplabv3", "hrnet")
SIZES = {"small": small, "demo": demo}
SETTINGS = {
  "backbone": variants.set_backbone,
  "weights": variants.set_weights,
  "pyramid": set_pyramid,
  "fpt": variants.set_fpt,
  "scope": variants.set_scope,
  "context": set_context,
  "head": set_head,
  "sbn": set_sbn,
  "dropblock": variants.set_dropblock,
}
WORDS = {"literal": variants.literal}
