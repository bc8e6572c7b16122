"""Defaults that the benchmarks of semantic segmentation share; every field is here, with its unit."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


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
