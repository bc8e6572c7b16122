"""The fields of detection, and the words after the colon of its benchmarks.

Each field is assigned on its own line. Its comment is its description in the documentation.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fpt_jax.configs import variants
from fpt_jax.configs.base import base
from fpt_jax.models.preprocess import DETECTRON2


def detection() -> ConfigDict:
  """Returns the config of Mask R-CNN with FPT on a pyramid of a frozen ResNet-50 (paper, section 4.1)."""
  config = base()
  data, model = config.data, config.model
  # coco: format of the annotations: coco, yolo, voc (boxes of PASCAL VOC), labelme, cvat, or roboflow (its
  # export in COCO's format)
  data.format = "coco"
  data.annotations = ""  # one annotation file in COCO's format, instead of data.source
  # folder of the images of data.annotations; every tenth image is in the split "val"
  data.images = ""
  # coco: annotation file or label folder, and image folder of each split,
  # {"train": ("train.json", "images")}; unset: those of the official layout or of data.format
  data.builder.splits = placeholder(dict)
  data.long_edge = 1000  # upper bound of the longer edge of a resized image, pixels
  # how images are resized: torchvision (sizes cut off to whole pixels; bilinear, without antialiasing) or
  # detectron2 (sizes rounded; Pillow's bilinear filter, which averages where an image shrinks)
  data.resize = "torchvision"
  # the same for training images; 0: data.long_edge, in proportion to the largest of data.train_sizes
  data.train_long_edge = 0
  # size (height, width) of random crops of training images, pixels; (): whole images
  data.crop = ()
  # range of random factors of the size at which an image fits data.crop: (0.1, 2.0) is large-scale jitter
  data.scale = (1.0, 1.0)
  # share of training images that objects of another image are pasted into
  data.copy_paste = 0.0
  data.filter_empty = False  # leave training images without objects out, as detectron2 does
  # largest number of ground truths per image; the largest objects are kept
  data.max_instances = 100

  model.category_ids = ()  # category id of each class in the data set; (): taken from the data
  model.category_names = ()  # name of each class; (): taken from the data
  # side of the smallest square region that is pooled from P4, pixels
  model.canonical_size = 224.0
  model.aligned = True  # RoIAlign with the half-pixel offset; False: as in torchvision's Mask R-CNN
  pyramid = model.pyramid
  # normalisation after each convolution of the pyramid: none, sync_bn, bn (statistics per device),
  # group_norm, or frozen_bn for pretrained weights
  pyramid.norm = "none"
  # bfp, fpn, bpa: variance of the initial weights: fan_in (1 / fan-in) or fan_out (2 / fan-out)
  pyramid.init = "fan_in"
  # normalisation of the backbone's levels before the pyramid: none, sync_bn, bn (statistics per device) or
  # group_norm
  pyramid.level_norm = "none"
  rpn = model.rpn = ConfigDict()
  # sides of each level's anchors at an aspect ratio of 1, pixels
  rpn.anchor_sizes = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
  rpn.aspect_ratios = (0.5, 1.0, 2.0)  # height / width of the anchors
  # round the corners of anchors to pixels and spread their centres over the canvas, as in torchvision; False:
  # exact corners, and centres at multiples of the stride, as in detectron2
  rpn.round_anchors = True
  rpn.convs = 1  # number of the RPN's 3x3 convolutions
  rpn.fg_threshold = 0.7  # IoU from which an anchor is positive
  rpn.bg_threshold = 0.3  # IoU below which an anchor is negative
  rpn.samples = 256  # anchors per image in the RPN's loss
  rpn.positive_fraction = 0.5  # largest share of positive anchors in the RPN's loss
  rpn.nms_threshold = 0.7  # IoU above which a proposal suppresses another
  rpn.min_side = 1e-3  # proposals that are narrower or lower are discarded, pixels
  rpn.train = ConfigDict()
  rpn.train.pre_nms = 2000  # in training: proposals per level before NMS
  rpn.train.post_nms = 2000  # in training: proposals per image after NMS
  rpn.test = ConfigDict()
  rpn.test.pre_nms = 1000  # in evaluation: proposals per level before NMS
  rpn.test.post_nms = 1000  # in evaluation: proposals per image after NMS
  box_head = model.box_head = ConfigDict()
  box_head.pool_size = 7  # side of a region that is pooled for the box head, positions
  # sampling points of RoIAlign per bin and axis; 0: one per cell of the level, rounded up
  box_head.sampling_ratio = 2
  box_head.convs = 0  # number of 3x3 convolutions before the box head's fully connected layers
  box_head.linears = 2  # number of the box head's fully connected layers: 1 or 2
  box_head.hidden = 1024  # channels of the box head's fully connected layers
  # normalisation after the box head's convolutions: none, group_norm, or frozen_bn for pretrained weights
  box_head.norm = "none"
  box_head.samples = 512  # regions per image in the box head's loss
  box_head.positive_fraction = 0.25  # largest share of positive regions in the box head's loss
  box_head.fg_threshold = 0.5  # IoU from which a region is positive
  # error of a box delta from which the box head's loss is linear: 1/9 in torchvision, 1/3 in the code of
  # PANet and of FPT, 1 in Fast R-CNN
  box_head.beta = 1 / 9
  mask_head = model.mask_head = ConfigDict()
  mask_head.enabled = True  # predict masks; False: Faster R-CNN
  mask_head.pool_size = 14  # side of a region that is pooled for the mask head, positions
  mask_head.sampling_ratio = 2  # as model.box_head.sampling_ratio
  mask_head.hidden = 256  # channels of the mask head's convolutions
  mask_head.layers = 4  # number of the mask head's 3x3 convolutions
  # normalisation after these convolutions: none, group_norm, or frozen_bn for pretrained weights
  mask_head.norm = "none"
  test = model.test = ConfigDict()
  test.score_threshold = 0.05  # detections with a lower score are discarded
  test.min_side = 1e-2  # detections that are narrower or lower are discarded, pixels
  test.nms_threshold = 0.5  # IoU above which a detection suppresses another of its class
  test.detections_per_image = 100  # largest number of detections per image; the best are kept
  test.max_candidates = 2000  # largest number of boxes per image, of all classes, that enter NMS

  evaluation = config.eval
  # shorter edges of evaluation images, pixels; the detections at all sizes are combined; (): data.short_edge
  evaluation.short_edges = ()
  # package that matches detections with objects: pycocotools, or faster_coco_eval, which is installed by
  # itself: the same figures in less time
  evaluation.matcher = "pycocotools"
  # lowest score of a detection that the confusion matrix counts
  evaluation.confusion_score = 0.5
  # names of categories whose precision-recall curves are drawn beside the mean of all categories
  evaluation.curves_of = ()
  return config.lock()


def variant(config: ConfigDict, arg: str) -> ConfigDict:
  """Returns the config changed by the words after the colon of its file, in any order.

  Words: `small`, `tiny`, `demo`, `lsj`, `torchvision`, `torchvision_v2` or `detectron2`, `multiscale` and
  `literal`.
  Settings: those of `SETTINGS`, such as `backbone=resnet101_gc,pyramid=fpn,fpt=st+gt,head=augmented`.

  Raises:
    UserError: a word, a setting or its value does not exist, or two of them exclude each other.
  """
  return variants.apply(config, arg, sizes=SIZES, settings=SETTINGS, words=WORDS)


def set_backbone(config: ConfigDict, value: str) -> None:
  """Like `variants.set_backbone`; the levels of EfficientNet-Lite0 are normalised.

  These levels end in convolutions without an activation, and with ImageNet weights their standard deviations
  are 3 to 10. A pyramid of convolutions alone preserves this scale, and training diverges at usual
  learning rates.
  """
  variants.set_backbone(config, value)
  config.model.pyramid.level_norm = "sync_bn" if value == "efficientnet_lite0" else "none"


def set_pyramid(config: ConfigDict, value: str) -> None:
  config.model.pyramid.name = variants.choice("pyramid", value, PYRAMIDS)


def set_head(config: ConfigDict, value: str) -> None:
  config.model.head.name = variants.choice("head", value, HEADS)


def set_sbn(config: ConfigDict, value: str) -> None:
  config.model.fpt.norm = variants.choice("sbn", value, variants.SBN)


def multiscale(config: ConfigDict) -> None:
  """Sets PANet's multi-scale training: 400, 600, 800, 1000 or 1200 pixels, at most 1400, where 800 is usual.

  The sizes are those of the code of PANet and of FPT; the paper refers to PANet.
  """
  short = config.data.short_edge
  config.data.train_sizes = tuple(quarters * short // 4 for quarters in (2, 3, 4, 5, 6))
  config.data.train_long_edge = 7 * short // 4


def torchvision(config: ConfigDict) -> None:
  """Sets the detector that equals torchvision's fasterrcnn/maskrcnn_resnet50_fpn, for its weights."""
  config.data.long_edge = 1333
  # the canvas beyond an image affects convolutions: it must be as in torchvision
  config.data.buckets, config.data.few_canvases = (), False
  config.data.image_dtype = "float32"
  config.model.num_classes = 90
  config.model.category_ids = tuple(range(1, 91))  # COCO's ids, with their gaps
  config.model.aligned = False
  config.model.pyramid.name = "fpn"
  config.model.fpt.enabled = False


def torchvision_v2(config: ConfigDict) -> None:
  """Sets the detector that equals torchvision's fasterrcnn/maskrcnn_resnet50_fpn_v2, for its weights.

  It has more convolutions, and a BatchNorm behind those of the pyramid and of the heads. They keep their
  stored statistics, as in the backbone.
  """
  torchvision(config)
  config.model.pyramid.norm = "frozen_bn"
  config.model.rpn.convs = 2
  config.model.box_head.update(dict(convs=4, linears=1, norm="frozen_bn"))
  config.model.mask_head.norm = "frozen_bn"


def lsj(config: ConfigDict) -> None:
  """Sets large-scale jitter and its schedule of 100 epochs, as detectron2's mask_rcnn_R_50_FPN_100ep_LSJ.

  It repeats Ghiasi et al. 2021: images at 0.1 to 2 times 1024 pixels, cut to 1024 x 1024, all weights trained
  with Synchronised Batch Norm, 64 images per step. The paper's copy-paste is `data.copy_paste`.
  """
  config.data.crop = (1024, 1024)
  config.data.scale = (0.1, 2.0)
  config.data.short_edge = config.data.long_edge = 1024
  config.data.buckets = ((1024, 1024),)
  config.model.backbone.update(dict(norm="sync_bn", frozen=False))
  config.batch_size = config.optim.base_batch_size = 64
  config.train_images = 184_375 * 64
  config.optim.learning_rate = 0.1
  config.optim.weight_decay = 4e-5
  config.optim.warmup_factor = 0.067
  config.optim.decay_at = (163_889 / 184_375, 177_546 / 184_375)


# category ids of COCO's 80 classes: 1 to 90 without those that no object has
COCO_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))


def detectron2(config: ConfigDict) -> None:
  """Sets the detector that equals detectron2's mask_rcnn_R_50_FPN (configs/COCO-InstanceSegmentation).

  With its weights it gives detectron2's detections. Losses are those of this project.
  """
  config.data.long_edge = 1333
  config.data.resize = "detectron2"
  config.data.buckets, config.data.few_canvases = (), False
  config.model.pixel_mean = DETECTRON2.pixel_mean
  config.model.pixel_std = DETECTRON2.pixel_std
  config.model.backbone.stride_in = DETECTRON2.stride_in
  config.model.num_classes = len(COCO_IDS)
  config.model.category_ids = COCO_IDS
  config.model.pyramid.name = "fpn"
  config.model.fpt.enabled = False
  config.model.rpn.round_anchors = False
  config.model.rpn.min_side = 1e-6  # detectron2 discards what has no area
  config.model.rpn.train.post_nms = 1000
  config.model.box_head.sampling_ratio = 0
  config.model.mask_head.sampling_ratio = 0
  config.model.test.min_side = 1e-6


def small(config: ConfigDict) -> None:
  """Sets a narrow ResNet-18 from scratch at low resolution: real images on two CPU cores."""
  config.data.short_edge = 192
  config.data.long_edge = 256
  config.data.buckets = ((192, 256), (256, 192))
  config.optim.learning_rate = 0.04
  config.optim.warmup_steps = 50
  config.optim.schedule = "cosine"
  config.optim.clip_norm = 10.0
  config.model.backbone.update(dict(name="resnet18", width=32, norm="sync_bn", frozen=False))
  config.model.canonical_size = 84.0  # smaller than 224 by the same factor as the anchors
  config.model.pyramid.channels = 64
  config.model.rpn.anchor_sizes = ((12.0,), (24.0,), (48.0,), (96.0,), (192.0,))
  config.model.rpn.samples = 64
  config.model.rpn.train.update(dict(pre_nms=200, post_nms=100))
  config.model.rpn.test.update(dict(pre_nms=200, post_nms=100))
  config.model.box_head.samples = 64
  config.model.box_head.hidden = 256
  config.model.mask_head.update(dict(hidden=64, layers=2))
  config.model.test.update(dict(detections_per_image=50, max_candidates=500))


def tiny(config: ConfigDict) -> None:
  """Like `small`, at 120 pixels, where attention costs a sixth; regions are pooled one level finer."""
  small(config)
  config.data.short_edge = 120
  config.data.long_edge = 160
  config.data.buckets = ((128, 160), (160, 128))
  config.model.canonical_size = 26.0
  config.model.rpn.anchor_sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))


def demo(config: ConfigDict) -> None:
  """Sets generated images of 96 x 96 and a narrower network: minutes on two CPU cores."""
  small(config)
  config.data.name = "context_shapes"
  config.data.builder.image_size = 96
  config.data.short_edge = config.data.long_edge = 96
  config.data.buckets = ((96, 96),)
  config.data.max_instances = 9  # a beacon, two triangles and six satellites
  config.steps = 300
  config.log_every = 10
  config.model.canonical_size = 30.0  # large objects are pooled from coarse levels
  config.model.backbone.width = 16
  config.model.pyramid.channels = 48
  config.model.rpn.anchor_sizes = ((9.0,), (18.0,), (30.0,), (48.0,), (72.0,))
  config.model.rpn.test.post_nms = 50
  config.model.box_head.samples = 32
  config.model.box_head.hidden = 128
  config.model.mask_head.hidden = 32
  config.model.test.update(dict(detections_per_image=20, max_candidates=200))
  config.eval.update(dict(every_steps=config.steps, batch_size=20))
  config.checkpoint.every_steps = 150


PYRAMIDS = ("bfp", "fpn", "bpa", "bfi")
HEADS = ("standard", "augmented", "zigzag")
SIZES = {
  "small": small,
  "tiny": tiny,
  "demo": demo,
  "torchvision": torchvision,
  "detectron2": detectron2,
  "torchvision_v2": torchvision_v2,
  "lsj": lsj,
}
SETTINGS = {
  "backbone": set_backbone,
  "weights": variants.set_weights,
  "pyramid": set_pyramid,
  "fpt": variants.set_fpt,
  "scope": variants.set_scope,
  "head": set_head,
  "sbn": set_sbn,
  "dropblock": variants.set_dropblock,
}
WORDS = {"multiscale": multiscale, "literal": variants.literal}
