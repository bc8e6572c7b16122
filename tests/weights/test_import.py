"""The importer of pretrained weights, and the checks of a run that starts from them."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import fpt_jax
from fpt_jax import models
from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.models.preprocess import normalize
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.config_file import write_config
from fpt_jax.train import check_preprocessing, starting_arrays
from fpt_jax.weights.families import FAMILIES, check_family, family_of
from fpt_jax.weights.imported import write_imported
from tests.golden.fill import fill
from tests.runs import ROOT, importer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def resnet18(width: int) -> dict[str, np.ndarray]:
  """A state dict with the names of torchvision's and timm's resnet18."""
  shapes = {"conv1.weight": (width, 3, 7, 7), "fc.weight": (10, 8 * width), "fc.bias": (10,)}

  def norm(name, channels):
    leaves = ("weight", "bias", "running_mean", "running_var")
    shapes.update({f"{name}.{leaf}": (channels,) for leaf in leaves})
    shapes[f"{name}.num_batches_tracked"] = ()

  norm("bn1", width)
  inputs = width
  for stage in range(4):
    channels = width * 2**stage
    for block in range(2):
      prefix = f"layer{stage + 1}.{block}"
      shapes[f"{prefix}.conv1.weight"] = (channels, inputs, 3, 3)
      shapes[f"{prefix}.conv2.weight"] = (channels, channels, 3, 3)
      norm(f"{prefix}.bn1", channels)
      norm(f"{prefix}.bn2", channels)
      if inputs != channels:
        shapes[f"{prefix}.downsample.0.weight"] = (channels, inputs, 1, 1)
        norm(f"{prefix}.downsample.1", channels)
      inputs = channels
  return {name: fill(name, shape) for name, shape in shapes.items()}


@pytest.mark.slow
def test_the_script_makes_a_checkpoint(tmp_path):
  tensors = resnet18(16)
  np.savez(tmp_path / "weights.npz", **tensors)
  flags = [f"--config={ROOT}/configs/coco_mask.py:demo", f"--weights={tmp_path}/weights.npz"]
  flags += [f"--workdir={tmp_path}/run", "--channel_order=bgr", "--pixel_std=0.004,0.004,0.004"]
  done = importer(*flags)
  assert done.returncode == 0, done.stderr
  restored = fpt_jax.restore(str(tmp_path / "run"))
  kernel = tensors["layer3.1.conv2.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(restored.arrays["backbone.stages.2.1.conv2.kernel"], kernel)
  model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
  assert model["channel_order"] == "bgr" and model["backbone"]["stride_in"] == "3x3"
  assert model["pixel_mean"] == [0.485, 0.456, 0.406] and model["pixel_std"] == [0.004] * 3

  config = coco_mask.get_config("demo")
  config.seed, config.init_from = 1, str(tmp_path / "run")
  config.model.channel_order, config.model.pixel_std = "bgr", (0.004,) * 3
  start = starting_arrays(config, sharding.on_one_device(models.structure_of(config).shapes))
  name = "backbone.stages.2.1.conv2.kernel"
  np.testing.assert_array_equal(start[name], kernel)
  # arrays that were not imported depend on the run's seed
  assert np.any(start["box_head.fc6.kernel"] != restored.arrays["box_head.fc6.kernel"])

  config = coco_mask.get_config("demo")
  config.init_from = str(tmp_path / "run")
  with pytest.raises(UserError) as error:
    check_preprocessing(config, restored.config)
  message = (
    "has weights for model.pixel_std=(0.004, 0.004, 0.004), and this run has (0.229, 0.224, 0"
  )
  assert message in str(error.value)
  assert "set '--config.model.pixel_std=(0.004, 0.004, 0.004)'" in str(error.value)
  config.model.pixel_std = (0.004, 0.004, 0.004)
  with pytest.raises(UserError, match=r"model\.channel_order=bgr, and this run has rgb"):
    check_preprocessing(config, restored.config)
  config.model.channel_order = "bgr"
  check_preprocessing(config, restored.config)
  config.model.backbone.stride_in = "1x1"
  with pytest.raises(UserError, match=r"set '--config\.model\.backbone\.stride_in=3x3'"):
    check_preprocessing(config, restored.config)


@functools.cache
def structure(arg):
  return models.structure_of(coco_mask.get_config(arg))


def convert(tensors, arg):
  family = family_of(tensors)
  check_family(family, coco_mask.get_config(arg).model.backbone.name)
  return family.convert(tensors, structure(arg).shapes)


def test_context_keeps_its_initial_weights():
  tensors = resnet18(16)
  plain = convert(tensors, "demo")
  for arg in ("demo,backbone=resnet18_nl", "demo,backbone=resnet18_gc"):
    assert convert(tensors, arg).keys() == plain.keys()


def test_an_augmented_convolution_gets_the_first_channels():
  """Attention has the others, about a tenth and at least 8; the norm behind has all."""
  tensors = resnet18(16)
  augmented = convert(tensors, "demo,backbone=resnet18_aa")
  backbone = {n for n in structure("demo,backbone=resnet18_aa").shapes if n.startswith("backbone.")}
  missing = backbone - augmented.keys()
  assert missing and all(".conv2.context." in n for n in missing)
  cut = 0
  for name, array in convert(tensors, "demo").items():
    if name in augmented:
      np.testing.assert_array_equal(augmented[name], array)
    else:
      kernel = augmented[name.replace("conv2.kernel", "conv2.conv.kernel")]
      channels = {32: 24, 64: 56, 128: 112}[array.shape[-1]]
      np.testing.assert_array_equal(kernel, array[..., :channels])
      cut += 1
  assert cut == 6  # two blocks in each of C3 to C5

  tensors["layer3.1.conv2.weight"] = tensors["layer3.1.conv2.weight"][:, :8]
  message = r"layer3\.1\.conv2\.weight is \(64, 8, 3, 3\) and does not fit"
  with pytest.raises(UserError, match=message):
    convert(tensors, "demo,backbone=resnet18_aa")


def zeros(arg):
  return {n: jnp.zeros(s.shape, s.dtype) for n, s in structure(arg).shapes.items()}


def imported(arg, folder):
  """Writes a checkpoint as the script does, without random weights; returns its folder."""
  converted = convert(resnet18(16), arg)
  write_config(folder, coco_mask.get_config(arg))
  write_imported(folder, converted)
  saved = checkpoints.manager(folder)
  checkpoints.save(saved, 0, zeros(arg) | {n: jnp.asarray(a) for n, a in converted.items()})
  checkpoints.finish(saved)
  saved.close()
  return folder


def test_only_pretrained_arrays_that_are_missing_are_warned_about(tmp_path, caplog, monkeypatch):
  plain = imported("demo", str(tmp_path / "plain"))
  augmented = imported("demo,backbone=resnet18_aa", str(tmp_path / "augmented"))
  for folder, suffix, missing in (
    (plain, "nl", False),
    (plain, "gc", False),
    (augmented, "aa", False),
    (plain, "aa", True),
  ):
    arg = f"demo,backbone=resnet18_{suffix}"
    monkeypatch.setattr(
      "fpt_jax.train.initial_arrays", lambda build, shardings, arg=arg: zeros(arg)
    )
    config = coco_mask.get_config(arg)
    config.model.backbone.frozen = True
    config.init_from = folder
    caplog.clear()
    with caplog.at_level("WARNING"):
      start = starting_arrays(config, sharding.on_one_device(structure(arg).shapes))
    assert start.keys() == structure(arg).shapes.keys()
    found = [r.getMessage() for r in caplog.records if "backbone is frozen" in r.getMessage()]
    assert len(found) == missing
  text = f"6 of its arrays are not in {plain}, backbone.stages.1.0.conv2.conv.kernel first"
  assert text in found[0]


def test_other_structures_are_named():
  """Deep stems and pooled shortcuts, as timm's resnet18d has them."""
  tensors = resnet18(16)
  tensors["conv1.0.weight"] = tensors.pop("conv1.weight")
  for leaf in ("weight", "bias"):
    tensors[f"layer2.0.downsample.2.{leaf}"] = tensors[f"layer2.0.downsample.1.{leaf}"]
  tensors["layer2.0.downsample.1.weight"] = tensors.pop("layer2.0.downsample.0.weight")
  with pytest.raises(UserError) as error:
    convert(tensors, "demo")
  for message in (
    "conv1.weight is missing",
    "conv1.0.weight has no place",
    "layer2.0.downsample.0.weight is missing",
    "layer2.0.downsample.1.weight is (32, 16, 1, 1) and does not fit",
    "layer2.0.downsample.2.bias has no place",
  ):
    assert message in str(error.value)


def test_families():
  assert [family_of({f.mark + "x": 0}) for f in FAMILIES] == list(FAMILIES)
  with pytest.raises(UserError, match=r"known are .*, and the file has stem\.0, \.\.\."):
    family_of({"stem.0": np.zeros(1)})
  with pytest.raises(
    UserError, match="of a ResNet, but the config's backbone is efficientnet_lite0"
  ):
    convert(resnet18(16), "backbone=efficientnet_lite0")


def test_efficientnet_tensors_are_named():
  config = coco_mask.get_config("backbone=efficientnet_lite0")
  shapes = models.structure_of(config).shapes
  tensors = {"_conv_stem.weight": np.zeros((32, 3, 3, 3)), "_fc.bias": np.zeros(1000)}
  with pytest.raises(UserError) as error:
    family_of(tensors).convert(tensors | {"_se_reduce.bias": np.zeros(3)}, shapes)
  assert "_blocks.0._depthwise_conv.weight is missing" in str(error.value)
  assert "_fc.bias" not in str(error.value) and "_conv_stem" not in str(error.value)


def test_normalize(rng):
  image = rng.integers(0, 256, (1, 2, 3, 3)).astype(np.float32)
  valid = jnp.ones((1, 2, 3), bool).at[0, 1, 2].set(False)
  model = coco_mask.get_config().model
  for order, channels in (("rgb", [0, 1, 2]), ("bgr", [2, 1, 0])):
    model.channel_order = order
    y = np.asarray(normalize(model, image, valid))
    red = (image[0, 0, 0, 0] / 255 - 0.485) / 0.229
    np.testing.assert_allclose(y[0, 0, 0, channels[0]], red, rtol=1e-5)
    blue = (image[0, 0, 0, 2] / 255 - 0.406) / 0.225
    np.testing.assert_allclose(y[0, 0, 0, channels[2]], blue, rtol=1e-5)
    assert (y[0, 1, 2] == 0).all()
  model.channel_order = "gbr"
  with pytest.raises(
    ValueError, match="channel_order 'gbr' does not exist; choose one of rgb, bgr"
  ):
    normalize(model, image, valid)
