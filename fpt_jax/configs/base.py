"""The fields that every config has, with their defaults and units.

One assignment per line, with its comment: the documentation's list of fields is made from them.
`detection.py` and `segmentation.py` add the fields of their task.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fpt_jax.models.preprocess import IMAGENET


def base() -> ConfigDict:
  """Returns the shared fields with the defaults of detection; unlocked, for a task to add its own."""
  config = ConfigDict()
  config.seed = 0  # of initial weights, image order, augmentation and sampling
  config.init_from = ""  # a workdir whose newest weights the run starts from
  config.batch_size = 8  # images of all devices together
  config.train_images = 160_000 * 8  # number of images to train on
  config.steps = 0  # training steps; 0: train_images / batch_size
  config.log_every = 20  # steps between two lines of metrics
  add_data(config)
  add_model(config)
  add_optim(config)
  evaluation = config.eval = ConfigDict()
  evaluation.every_steps = 10_000  # training steps between two evaluations
  evaluation.batch_size = 8  # images of all devices together
  evaluation.flip = False  # evaluate the mirrored image as well and combine both
  checkpoint = config.checkpoint = ConfigDict()
  checkpoint.every_steps = 1000  # training steps between two checkpoints
  checkpoint.keep = 3  # number of newest checkpoints that stay on disk
  return config


def add_data(config: ConfigDict) -> None:
  """Adds the group `data`."""
  data = config.data = ConfigDict()
  # data set: coco, context_shapes, cityscapes, ade20k, lip, voc2012, camvid, image_folder
  data.name = "coco"
  data.source = ""  # folder with the data set's official layout, read by --mode=prepare
  data.data_dir = "~/fpt_jax_data"  # folder where prepared records are written and read
  # split to train on, in TFDS syntax: "train[:100]" is its first 100 images
  data.train_split = "train"
  data.eval_split = "val"  # split to evaluate on, in TFDS syntax
  data.skip_bad = False  # log and leave out bad images and annotations instead of stopping
  data.flip = True  # mirror half of the training images
  # shorter edge of training images, pixels; two numbers: any size from the first to the second;
  # more: one of them; (): data.short_edge in detection, factors of data.scale in segmentation
  data.train_sizes = ()
  # shorter edge of evaluated images, pixels; 0 in segmentation: size of the file
  data.short_edge = 800
  # canvases (height, width) that images are padded to, pixels; (): each image's size, rounded up
  data.buckets = ((800, 1024), (1024, 800))
  # pixels; without buckets, canvas sizes are rounded up to multiples of this
  data.canvas_multiple = 32
  data.num_workers = 0  # threads that read images; 0: one per core
  data.prefetch = 2  # batches that are read ahead
  builder = data.builder = ConfigDict()
  # coco: {"train": ("train.json", "images"), ...}; label maps: names of the splits to prepare
  builder.splits = placeholder(object)
  builder.num_classes = placeholder(int)  # image_folder: number of classes, or give class_names
  builder.class_names = placeholder(tuple)  # image_folder: name of each class
  # image_folder: label of pixels without a class; 255 if unset, -1: none
  builder.void = placeholder(int)
  builder.train_size = placeholder(int)  # context_shapes: number of training images
  builder.val_size = placeholder(int)  # context_shapes: number of validation images
  builder.image_size = placeholder(int)  # context_shapes: side of an image, pixels
  builder.seed = placeholder(int)  # context_shapes: seed of the drawings


def add_model(config: ConfigDict) -> None:
  """Adds the group `model`."""
  model = config.model = ConfigDict()
  model.name = "rcnn"  # rcnn (detection) or segmenter (segmentation)
  model.num_classes = 80  # taken from the data unless the config names the classes
  model.pixel_mean = IMAGENET.pixel_mean  # of R, G, B in 0..1
  model.pixel_std = IMAGENET.pixel_std  # of R, G, B in 0..1
  model.channel_order = "rgb"  # rgb or bgr: what the backbone was trained on
  model.dtype = "float32"  # of the computation: float32 or bfloat16
  backbone = model.backbone = ConfigDict()
  backbone.name = "resnet50"  # resnet18, resnet34, resnet50, resnet101 or efficientnet_lite0
  backbone.width = 64  # channels of a ResNet's stem
  # convolution of a bottleneck that has the stride: 3x3, or 1x1 as in Caffe
  backbone.stride_in = "3x3"
  # blocks in a ResNet: none, non_local, global_context or attention_augmented
  backbone.context = "none"
  backbone.norm = "frozen_bn"  # frozen_bn, sync_bn, bn (statistics per device), group_norm or none
  backbone.frozen = True  # the backbone keeps its weights
  pyramid = model.pyramid = ConfigDict()
  # detection: bfp, fpn, bpa or bfi; segmentation: ufp, ppm, aspp, afnb or none
  pyramid.name = "bfp"
  pyramid.channels = 256  # channels of each level
  fpt = model.fpt = ConfigDict()
  fpt.enabled = True  # False: the pyramid alone
  fpt.self_transformer = True  # build the Self-Transformers
  fpt.grounding_transformer = True  # build the Grounding Transformers
  fpt.rendering_transformer = True  # build the Rendering Transformers
  fpt.self_parts = 2  # softmaxes in the mixture of the Self-Transformer (N in the paper)
  fpt.grounding_parts = 4  # softmaxes in the mixture of the Grounding Transformer
  fpt.scope = "all"  # levels that a level interacts with: all or adjacent
  fpt.gate = "identity"  # of the Rendering Transformer's channel weights: identity or sigmoid
  # odd side of a locality-constrained Grounding Transformer; unset: global
  fpt.window = placeholder(int)
  fpt.scale = placeholder(float)  # factor of the similarities; unset: 1 / sqrt(channels of a part)
  # behind the fusing convolution: sync_bn, bn (per device), group_norm or none
  fpt.norm = "sync_bn"
  fpt.drop_block_size = 5  # side of a dropped block, positions
  fpt.keep_probability = 0.9  # share of values that DropBlock keeps; 1.0: no DropBlock
  fpt.implementation = "auto"  # of the attention: auto, naive, chunked or pallas
  head = model.head = ConfigDict()
  # detection: standard or augmented (PANet); segmentation: fcn, oc_base, oc_pyramid, oc_asp, acf or apnb
  head.name = "standard"


def add_optim(config: ConfigDict) -> None:
  """Adds the group `optim`."""
  optim = config.optim = ConfigDict()
  optim.learning_rate = 0.05  # at a batch size of base_batch_size; scaled linearly for others
  optim.base_batch_size = 8  # images
  optim.momentum = 0.9  # of SGD
  optim.weight_decay = 1e-4  # added to the gradient, times the parameter
  optim.warmup_steps = 500  # steps in which the rate rises linearly
  optim.warmup_factor = 0.001  # of the rate at the first step
  optim.schedule = "step"  # step, cosine or poly
  optim.decay_at = (0.75,)  # step: shares of the training after which the rate decays
  optim.decay_factor = 0.1  # step: factor of each decay
  optim.power = 0.9  # poly: the rate is multiplied by (1 - step / steps) ** power
  optim.clip_norm = 0.0  # largest norm of the gradient; 0: no clipping
  optim.frozen = ()  # beginnings of names of parameters to keep: ("backbone.stem", "rpn")
