"""The fields that every config has, with their defaults and units.

Each field is assigned on its own line. Its comment is its description in the documentation.
`detection.py` and `segmentation.py` add the fields of their task.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fpt_jax.models.preprocess import IMAGENET


def base() -> ConfigDict:
  """Returns the shared fields with the defaults of detection, unlocked so that a task can add its own."""
  config = ConfigDict()
  config.name = ""  # name of the run for its loggers; "": the name of its folder
  config.seed = 0  # seed of the initial weights, the image order, augmentation and sampling
  # workdir of a run whose weights a new run starts from; "": random weights
  config.init_from = ""
  # step of the checkpoint of init_from: a number, or best, see checkpoint.best_metric; "": the newest
  config.init_from_step = ""
  config.batch_size = 8  # images per training step (update), on all devices together
  # length of the training: number of images, counting each as often as it is used
  config.train_images = 160_000 * 8
  config.steps = 0  # number of training steps; 0: train_images / batch_size
  mesh = config.mesh = ConfigDict()
  # number of devices along the axes of the mesh, (data, fsdp, query); -1: those that remain. data: images;
  # fsdp: images, with the weights and the optimizer's state stored in shares; query: rows of an image
  mesh.shape = (-1, 1, 1)
  config.log_every = 20  # training steps between two lines of metrics in the log
  # loggers that get all metrics and pictures beside TensorBoard: some of wandb and mlflow, whose packages are
  # installed by themselves
  config.loggers = ()
  add_data(config)
  add_model(config)
  add_optim(config)
  evaluation = config.eval = ConfigDict()
  evaluation.every_steps = 10_000  # training steps between two evaluations
  evaluation.batch_size = 8  # images per evaluation step, on all devices together
  # sets to evaluate on beside data.eval_split: pairs of a name and a split, or of a name and other values of
  # fields of data, such as (("few", "val[:500]"), ("mine", {"source": "/data/mine", "data_dir": "/records"}))
  evaluation.sets = ()
  # evaluations without a better checkpoint.best_metric after which the training ends; 0: it goes on to its
  # last step
  evaluation.patience = 0
  evaluation.flip = False  # also evaluate each image mirrored, and combine both results
  checkpoint = config.checkpoint = ConfigDict()
  checkpoint.every_steps = 1000  # training steps between two checkpoints
  # minutes after which a checkpoint is saved at the next line of losses, unless one was saved; 0: no limit
  checkpoint.every_minutes = 0.0
  checkpoint.keep = 3  # number of newest checkpoints to keep on disk
  # metric of the evaluations, such as bbox/AP, by which the best checkpoint is kept as well and is that of
  # --step=best; "": none
  checkpoint.best_metric = ""
  # whether the best checkpoint.best_metric is the highest (max) or the lowest (min)
  checkpoint.best_mode = "max"
  return config


def add_data(config: ConfigDict) -> None:
  """Adds the group `data`."""
  data = config.data = ConfigDict()
  # name of the data set: coco, context_shapes, cityscapes, ade20k, lip, voc2012, camvid, image_folder
  data.name = "coco"
  data.source = ""  # folder of the data set in its official layout, read by --mode=prepare
  data.data_dir = "~/fpt_jax_data"  # folder of the prepared records, on a disk or in a bucket
  # folder on the local disk for a copy of the records, if data.data_dir is in a bucket
  data.cache_dir = "~/.cache/fpt_jax_data"
  data.digest = ""  # digest of the files of data.train_split; set by the run
  # split to train on, in TFDS syntax: "train[:100]" is its first 100 images
  data.train_split = "train"
  data.eval_split = "val"  # split to evaluate on, in TFDS syntax
  data.skip_bad = False  # log and leave out bad images and annotations instead of stopping
  # orientation in the EXIF data of images and label files: apply (turn the pixels upright) or ignore (for
  # annotations of the pixels as they are stored)
  data.exif = "apply"
  data.flip = True  # mirror a random half of the training images
  # largest random changes of brightness, contrast, saturation (factors of 1 - x to 1 + x) and hue (of the
  # colour circle, up to 0.5) of training images, such as (0.4, 0.4, 0.4, 0.1); (): none
  data.color_jitter = ()
  # dtype of training images on their way to the devices: uint8 rounds resized images to whole grey levels, as
  # 8-bit libraries do, and takes a quarter of the memory; float32 does not round, as in evaluation
  data.image_dtype = "uint8"
  # shorter edge of training images, pixels: one of these numbers at random; if there are two, any size from
  # the first to the second; (): data.short_edge (detection), random factors of data.scale (segmentation)
  data.train_sizes = ()
  # shorter edge of evaluation images, pixels; in segmentation, 0 keeps the size of the image file
  data.short_edge = 800
  # canvases (height, width) that images are padded to, pixels; (): the size of each image, rounded up
  data.buckets = ((800, 1024), (1024, 800))
  # if data.buckets is (), canvas sizes are rounded up to multiples of this number of pixels, in segmentation
  # plus one with model.align_corners
  data.canvas_multiple = 32
  # prediction of images that fit none of data.buckets: edges of canvases are rounded up to few sizes, such as
  # 256, 320, 384, 448, 512, 640 and 768 pixels, so that the model is compiled for few canvases; False: to
  # multiples of data.canvas_multiple, as in evaluation
  data.few_canvases = True
  data.num_workers = 0  # number of threads that read images; 0: one per core
  data.prefetch = 2  # number of batches that are read ahead
  builder = data.builder = ConfigDict()
  # image_folder: number of classes, unless class_names is set
  builder.num_classes = placeholder(int)
  builder.class_names = placeholder(tuple)  # image_folder: name of each class
  # image_folder: label of pixels without a class; unset: 255; -1: every pixel has a class
  builder.void = placeholder(int)
  builder.train_size = placeholder(int)  # context_shapes: number of training images
  builder.val_size = placeholder(int)  # context_shapes: number of validation images
  builder.image_size = placeholder(int)  # context_shapes: side of an image, pixels
  builder.seed = placeholder(int)  # context_shapes: seed of the drawings
  # context_shapes: what tells the beacons' kinds apart: color (and shape), or shape alone
  builder.beacons = placeholder(str)


def add_model(config: ConfigDict) -> None:
  """Adds the group `model`."""
  model = config.model = ConfigDict()
  model.name = "rcnn"  # name of the model: rcnn (detection) or segmenter (segmentation)
  # number of classes; taken from the data unless the config names the classes
  model.num_classes = 80
  # mean of the images that the backbone was trained on: R, G, B in 0..1
  model.pixel_mean = IMAGENET.pixel_mean
  # standard deviation of the images that the backbone was trained on: R, G, B in 0..1
  model.pixel_std = IMAGENET.pixel_std
  # order of the channels that the backbone takes: rgb, or bgr in checkpoints that earlier versions imported
  model.channel_order = "rgb"
  # dtype of the computation: float32 or bfloat16; parameters and the optimizer's state are float32
  model.dtype = "float32"
  # what the backward pass computes again instead of keeping it in memory: none, dots_saveable (all but the
  # outputs of convolutions and matrix products) or nothing_saveable (everything); same results
  model.remat = "none"
  # parts of the model that model.remat applies to
  model.remat_parts = ("backbone", "pyramid", "fpt", "heads")
  backbone = model.backbone = ConfigDict()
  # name of the backbone: resnet18, resnet34, resnet50, resnet101, efficientnet_lite0, hrnet_w48 or
  # wider_resnet38
  backbone.name = "resnet50"
  # channels of the stem of a ResNet, HRNet or WiderResNet; others change by the same factor
  backbone.width = 64
  # convolution of a ResNet's bottleneck that has the stride: 3x3, or 1x1 as in Caffe
  backbone.stride_in = "3x3"
  # context blocks in a ResNet: none, non_local, global_context or attention_augmented
  backbone.context = "none"
  # how an HRNet upsamples coarser branches where branches exchange features: nearest (classification,
  # detection) or bilinear (segmentation)
  backbone.upsampling = "nearest"
  # normalisation in the backbone: frozen_bn, sync_bn, bn (statistics per device), group_norm or none
  backbone.norm = "frozen_bn"
  # convolutions of the backbone see zeros on the padding of an image, as at the edge of a canvas, so that its
  # features do not depend on the canvas; False: what the layers before put there, as in torchvision
  backbone.masks_padding = False
  # keep the pretrained weights of the backbone as they are; its context blocks are trained nevertheless
  backbone.frozen = True
  pyramid = model.pyramid = ConfigDict()
  # name of the pyramid; detection: bfp, fpn, bpa or bfi; segmentation: ufp, ppm, aspp, afnb or none
  pyramid.name = "bfp"
  pyramid.channels = 256  # channels of each level of the pyramid
  fpt = model.fpt = ConfigDict()
  fpt.enabled = True  # build FPT on the pyramid
  fpt.self_transformer = True  # build the Self-Transformers
  fpt.grounding_transformer = True  # build the Grounding Transformers
  fpt.rendering_transformer = True  # build the Rendering Transformers
  fpt.self_parts = 2  # softmaxes in the mixture of the Self-Transformer (N in the paper)
  fpt.grounding_parts = 4  # softmaxes in the mixture of the Grounding Transformer
  # similarity of the Grounding Transformer: euclidean (negative squared distance) or dot
  fpt.grounding_similarity = "euclidean"
  fpt.scope = "all"  # levels that a level interacts with: all or adjacent
  # what bounds the similarities: levels (normalised before the transformers), unit (queries and keys of
  # one length, with a trained temperature) or none
  fpt.similarity_norm = "levels"
  fpt.uniform_mixture = True  # start with equal weights of the softmaxes in a mixture
  fpt.output_norm = True  # normalise each transformer's output
  fpt.output_norm_scale = 1.0  # initial scale of these normalisations
  # function that the Rendering Transformer applies to its channel weights: identity or sigmoid
  fpt.gate = "sigmoid"
  # odd side of the window of a locality-constrained Grounding Transformer, positions; unset: global
  fpt.window = placeholder(int)
  # positions outside the map in a local window: zero (keys and values of zero) or masked
  fpt.outside = "zero"
  # factor of the similarities in attention; unset: 1 / sqrt(channels of a part)
  fpt.scale = placeholder(float)
  # without transformers: a second 3x3 convolution, so wide that FPT has as many parameters as with them
  fpt.wide = False
  # normalisation in FPT: sync_bn, bn (statistics per device), group_norm or none
  fpt.norm = "sync_bn"
  fpt.drop_block_size = 5  # side of a block that DropBlock drops, positions
  fpt.keep_probability = 0.9  # share of values that DropBlock keeps; 1.0: no DropBlock
  # share of values that DropBlock drops: linear (rises from 0 during the training) or constant
  fpt.drop_block_schedule = "linear"
  # implementation of the attention: auto, naive, chunked or pallas; local windows have two, naive and one
  # for all other values
  fpt.implementation = "auto"
  head = model.head = ConfigDict()
  # name of the head; detection: standard, augmented (PANet) or zigzag (ZigZagNet); segmentation: fcn,
  # oc_base, oc_pyramid, oc_asp, acf, apnb, psp, deeplabv3, pointwise or gscnn
  head.name = "standard"


def add_optim(config: ConfigDict) -> None:
  """Adds the group `optim`."""
  optim = config.optim = ConfigDict()
  # learning rate at a batch size of optim.base_batch_size; scaled linearly to batch_size
  optim.learning_rate = 0.05
  optim.base_batch_size = 8  # batch size that optim.learning_rate is meant for, images
  optim.name = "sgd"  # optimizer: sgd (with momentum) or adamw
  optim.momentum = 0.9  # sgd: momentum
  optim.beta1 = 0.9  # adamw: decay of the mean of the gradients
  optim.beta2 = 0.999  # adamw: decay of the mean of their squares
  optim.epsilon = 1e-8  # adamw: what is added to the root of that mean
  # weight decay: this factor times the parameter is added to the gradient (sgd) or to the update (adamw)
  optim.weight_decay = 1e-4
  # also decay biases and the scales and biases of normalisations, as the code of OCNet, HRNet and EncNet
  # does; False: as in Detectron, PANet and the code of FPT
  optim.decay_biases_and_norms = True
  # factor of the learning rate of biases, except those of normalisations; 2 in Detectron, PANet and the code
  # of FPT
  optim.bias_rate = 1.0
  # factors of the learning rate and of the weight decay by regular expressions that are searched in the names
  # of parameters, such as (("^backbone", 0.1, 1.0),); the first that fits counts
  optim.groups = ()
  # share of the moving average of the weights that an update keeps, such as 0.999; evaluation, prediction and
  # runs with init_from take the average; 0: no average
  optim.ema_decay = 0.0
  # training steps in which the learning rate rises linearly; 0: no warm-up
  optim.warmup_steps = 500
  optim.warmup_factor = 0.001  # factor of the learning rate at the first step of the warm-up
  optim.schedule = "step"  # schedule of the learning rate: step, cosine or poly
  optim.decay_at = (0.75,)  # schedule step: shares of the training after which the rate decays
  optim.decay_factor = 0.1  # schedule step: factor of the learning rate at each decay
  # schedule poly: the learning rate is multiplied by (1 - step / steps) ** power
  optim.power = 0.9
  optim.clip_norm = 0.0  # largest norm of the whole gradient; 0: no clipping
  # parts of batch_size / accumulate_steps images that a training step computes one after the other and whose
  # gradients it averages: less memory for the same images, updates, number of steps and learning rate
  optim.accumulate_steps = 1
  # parameters that are not trained, by the beginnings of their names, such as ("backbone.stem", "rpn")
  optim.frozen = ()
