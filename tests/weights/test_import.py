"""The importer of pretrained weights, and the checks of a run that starts from them."""

import functools
import json
import pickle
import re

import jax.numpy as jnp
import numpy as np
import pytest

import fpt_jax
from fpt_jax import models
from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.models.preprocess import DETECTRON, DETECTRON2, RESNET_WEIGHTS, normalize
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.config_file import write_config
from fpt_jax.train import check_preprocessing, starting_arrays
from fpt_jax.weights.families import (
  FAMILIES,
  check_family,
  check_recorded,
  family_of,
  for_rgb,
  preprocessing,
  without_prefix,
)
from fpt_jax.weights.files import read_state_dict
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
  flags += ["--stride_in=1x1"]
  done = importer(*flags)
  assert done.returncode == 0, done.stderr
  restored = fpt_jax.restore(str(tmp_path / "run"))
  kernel = tensors["layer3.1.conv2.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(restored.arrays["backbone.stages.2.1.conv2.kernel"], kernel)
  # the weights for BGR are for RGB now
  kernel_of_stem = tensors["conv1.weight"][:, ::-1].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(restored.arrays["backbone.conv1.kernel"], kernel_of_stem)
  model = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
  assert model["channel_order"] == "rgb" and model["backbone"]["stride_in"] == "1x1"
  assert model["pixel_mean"] == [0.485, 0.456, 0.406] and model["pixel_std"] == [0.004] * 3

  config = coco_mask.get_config("demo")
  config.seed, config.init_from = 1, str(tmp_path / "run")
  config.model.backbone.stride_in, config.model.pixel_std = "1x1", (0.004,) * 3
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
    "has weights for model.pixel_std=(0.004, 0.004, 0.004), model.backbone.stride_in=1x1, and this run has "
    "(0.229, 0.224, 0.225), 3x3; set '--config.model.pixel_std=(0.004, 0.004, 0.004)' "
    "'--config.model.backbone.stride_in=1x1'"
  )
  assert message in str(error.value)
  config.model.pixel_std = (0.004, 0.004, 0.004)
  with pytest.raises(UserError, match=r"set '--config\.model\.backbone\.stride_in=1x1'"):
    check_preprocessing(config, restored.config)
  config.model.backbone.stride_in = "1x1"
  check_preprocessing(config, restored.config)
  config.model.channel_order = "bgr"
  with pytest.raises(
    UserError, match=r"weights for model\.channel_order=rgb, and this run has bgr"
  ):
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


@pytest.mark.parametrize("part", ["conv1.0.weight", "layer2.0.downsample.2.bias"])
def test_another_stem_or_shortcut_is_refused(part):
  """Those of timm's resnet18d."""
  tensors = resnet18(16)
  tensors[part] = tensors.pop("conv1.weight")
  message = rf"another stem or with pooled shortcuts \({re.escape(part)}\), such as timm's resnet50d; choose"
  with pytest.raises(UserError, match=message):
    convert(tensors, "demo")


def test_other_structures_are_named():
  tensors = resnet18(16)
  tensors["conv0.weight"] = tensors.pop("conv1.weight")
  tensors["layer2.0.downsample.0.weight"] = tensors.pop("layer2.0.conv1.weight")
  tensors["layer2.0.se.fc1.bias"] = tensors["layer2.0.bn1.bias"]
  with pytest.raises(UserError) as error:
    convert(tensors, "demo")
  for message in (
    "conv1.weight is missing",
    "conv0.weight has no place",
    "layer2.0.conv1.weight is missing",
    "layer2.0.downsample.0.weight is (32, 16, 3, 3) and does not fit",
    "layer2.0.se.fc1.bias has no place",
  ):
    assert message in str(error.value)


@pytest.mark.parametrize(
  ("prefix", "others"),
  [
    ("module.", ()),  # of torch's DataParallel
    ("module._orig_mod.", ()),
    ("model.", ()),
    ("backbone.", ("head.fc.weight", "head.fc.bias")),  # mmpretrain
    ("backbone.", ("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.bias")),  # mmdetection
    ("module.backbone.", ("module.head.mlp.0.weight",)),
    ("backbone.0.body.", ("transformer.encoder.norm.weight", "query_embed.weight")),  # DETR
  ],
)
def test_names_of_other_libraries(prefix, others, caplog):
  tensors = resnet18(16)
  wrapped = {prefix + name: array for name, array in tensors.items()}
  wrapped |= {name: np.zeros(3, np.float32) for name in others}
  with caplog.at_level("INFO"):
    found = without_prefix(wrapped)
  assert_equal(convert(found, "demo"), convert(tensors, "demo"))
  left_out = [r.getMessage() for r in caplog.records if "are not imported" in r.getMessage()]
  assert len(left_out) == bool(others)
  assert not others or others[-1].removeprefix("module.") in left_out[0]
  del found["layer4.0.bn1.running_var"]
  with pytest.raises(UserError, match=r"layer4\.0\.bn1\.running_var is missing"):
    convert(found, "demo")


def assert_equal(ours, expected):
  assert ours.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(ours[name], array, err_msg=name)


# A ResNet-50 of width 16 under the names of each library, written out independently of the importer.

LETTERS = "abc"
NORMS = ("weight", "bias", "running_mean", "running_var")


def resnet50_layers(width=16):
  """Yields the stage, the block, the layer and the shape of each convolution; 0, 0, 0 is the stem."""
  yield 0, 0, 0, (width, 3, 7, 7)
  inputs = width
  for stage, blocks in enumerate((3, 4, 6, 3), start=1):
    inner = width * 2 ** (stage - 1)
    for block in range(blocks):
      if block == 0:
        yield stage, block, "shortcut", (4 * inner, inputs, 1, 1)
      yield stage, block, 1, (inner, inputs, 1, 1)
      yield stage, block, 2, (inner, inner, 3, 3)
      yield stage, block, 3, (4 * inner, inner, 1, 1)
      inputs = 4 * inner


def torchvision_names(stage, block, layer):
  if stage == 0:
    return "conv1.weight", "bn1.{}"
  if layer == "shortcut":
    return f"layer{stage}.{block}.downsample.0.weight", f"layer{stage}.{block}.downsample.1.{{}}"
  return f"layer{stage}.{block}.conv{layer}.weight", f"layer{stage}.{block}.bn{layer}.{{}}"


def detectron2_names(stage, block, layer):
  if stage == 0:
    return "stem.conv1.weight", "stem.conv1.norm.{}"
  part = layer if layer == "shortcut" else f"conv{layer}"
  return f"res{stage + 1}.{block}.{part}.weight", f"res{stage + 1}.{block}.{part}.norm.{{}}"


def resnet50(names, prefix="", statistics=True):
  """Returns a state dict with the same tensors for each kind of names."""
  tensors = {}
  for stage, block, layer, shape in resnet50_layers():
    kernel, norm = names(stage, block, layer)
    tensors[prefix + kernel] = fill(f"{stage}.{block}.{layer}.kernel", shape)
    for leaf in NORMS if statistics else NORMS[:2]:
      tensors[prefix + norm.format(leaf)] = fill(f"{stage}.{block}.{layer}.{leaf}", shape[:1])
  return tensors


def detectron_resnet50(biases):
  """Returns the blobs of a file like R-50.pkl; `biases` are those of all convolutions."""
  blobs = {"fc1000_w": np.zeros((1000, 512), np.float32), "fc1000_b": np.zeros(1000, np.float32)}
  for stage, block, layer, shape in resnet50_layers():
    name = f"res{stage + 1}_{block}_branch" + (
      "1" if layer == "shortcut" else f"2{LETTERS[int(layer) - 1]}"
    )
    kernel, norm = (name, f"{name}_bn") if stage else ("conv1", "res_conv1_bn")
    of_layer = f"{stage}.{block}.{layer}"
    blobs[f"{kernel}_w"] = fill(f"{of_layer}.kernel", shape)
    blobs[f"{kernel}_w_momentum"] = np.zeros(shape, np.float32)
    if biases is not None:
      blobs[f"{kernel}_b"] = np.full(shape[:1], biases, np.float32)
    blobs[f"{norm}_s"] = fill(f"{of_layer}.weight", shape[:1])
    blobs[f"{norm}_b"] = fill(f"{of_layer}.bias", shape[:1])
  return blobs


R50 = "demo,backbone=resnet50"


@pytest.mark.parametrize(
  ("prefix", "other", "names"),
  [
    ("backbone.body.", "rpn.head.cls_logits.weight", torchvision_names),
    ("module.backbone.bottom_up.", "module.backbone.fpn_lateral2.weight", detectron2_names),
  ],
)
def test_the_backbone_of_a_detector(prefix, other, names, caplog):
  expected = convert(resnet50(torchvision_names), R50)
  tensors = resnet50(names, prefix)
  assert_equal(convert(without_prefix(tensors), R50), expected)  # a file of the backbone alone
  tensors[other] = np.zeros(3, np.float32)
  tensors["module." * prefix.startswith("module.") + "pixel_mean"] = np.zeros(3, np.float32)
  assert any(name.startswith("backbone.") for name in without_prefix(tensors))
  with caplog.at_level("INFO"):
    found = without_prefix(tensors, only_backbone=True)
  assert other.removeprefix("module.") in caplog.text
  assert "pixel_mean" in found
  del found["pixel_mean"]
  assert_equal(convert(found, R50), expected)
  with pytest.raises(UserError, match="--only_backbone is for detectors"):
    without_prefix(found, only_backbone=True)


def test_a_resnet_of_detectron2():
  expected = convert(resnet50(torchvision_names), R50)
  assert_equal(convert(resnet50(detectron2_names), R50), expected)
  assert family_of(resnet50(detectron2_names)).preprocessing == DETECTRON2

  affine = convert(resnet50(detectron2_names, statistics=False), R50)
  assert affine.keys() == expected.keys()
  mean, var = (affine[f"backbone.stages.3.2.bn3.norm.{leaf}"] for leaf in ("mean", "var"))
  assert not mean.any() and np.array_equal(np.sqrt(var + np.float32(1e-5)), np.ones_like(var))

  tensors = resnet50(detectron2_names)
  tensors["res2.0.conv1.weight"] = np.zeros((16, 16, 3, 3), np.float32)
  tensors["res3.0.conv9.weight"] = tensors.pop("res3.0.shortcut.norm.running_var")
  with pytest.raises(UserError) as error:
    convert(tensors, R50)
  for message in (
    "res2.0.conv1.weight is (16, 16, 3, 3) and does not fit",
    "res3.0.shortcut.norm.running_var is missing",
    "res3.0.conv9.weight has no place",
  ):
    assert message in str(error.value)


def test_a_resnet_of_detectron(tmp_path):
  """R-50.pkl: scales and offsets instead of statistics; Caffe's biases, zero or not."""
  expected = convert(resnet50(torchvision_names), R50)
  for biases in (None, 0.0, 0.5):
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(detectron_resnet50(biases), 2))
    blobs = read_state_dict(tmp_path / "R-50.pkl")
    assert family_of(blobs).preprocessing == DETECTRON
    found = convert(without_prefix(blobs), R50)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
      if name.endswith(".mean"):
        array = np.zeros_like(array)
      elif name.endswith(".var"):
        array = np.ones_like(array) - np.float32(1e-5)
      elif biases and name.endswith("norm.bias"):
        array = array + biases * expected[name.replace("norm.bias", "norm.scale")]
      np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7, err_msg=name)

  blobs["res2_1_branch2b_w"] = np.zeros((16, 16, 1, 1), np.float32)
  blobs["fpn_inner_res2_2_sum_lateral_w"] = blobs.pop("res_conv1_bn_s")
  blobs["res5_0_branch1_b"] = np.zeros(3, np.float32)
  with pytest.raises(UserError) as error:
    convert(blobs, R50)
  for message in (
    "res2_1_branch2b_w is (16, 16, 1, 1) and does not fit",
    "res_conv1_bn_s is missing",
    "fpn_inner_res2_2_sum_lateral_w has no place",
    "res5_0_branch1_b has no place",
  ):
    assert message in str(error.value)


def test_the_stem_of_weights_for_bgr(rng):
  """The convolution of BGR minus its mean, in 0..255, equals ours of the normalised RGB image."""
  images = rng.integers(0, 256, (1, 7, 7, 3)).astype(np.float32)
  for weights, mean_bgr in (
    ("detectron", [102.9801, 115.9465, 122.7717]),
    ("detectron2", [103.53, 116.28, 123.675]),
  ):
    model = coco_mask.get_config(f"weights={weights}").model
    assert model.channel_order == "rgb" and model.backbone.stride_in == "1x1"
    kernel = fill("0.0.0.kernel", (16, 3, 7, 7))
    bgr = images[0, ..., ::-1].astype(np.float64) - np.array(mean_bgr)[None, None]
    expected = np.einsum("hwc,ochw->o", bgr, kernel.astype(np.float64))
    arrays = convert(resnet50(detectron2_names), R50)
    ours = for_rgb(arrays, "bgr")["backbone.conv1.kernel"]
    found = np.einsum("hwc,hwco->o", normalize(model, images, np.ones((1, 7, 7), bool))[0], ours)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)
    assert_equal({**for_rgb(arrays, "rgb")}, arrays)
  with pytest.raises(UserError, match="channel_order=bgr is for ResNets"):
    for_rgb({"backbone.stem.kernel": ours}, "bgr")


def test_a_mean_in_the_file_is_compared():
  recorded = {"pixel_mean": np.array([103.53, 116.28, 123.675]).reshape(3, 1, 1)}
  recorded["pixel_std"] = np.ones((3, 1, 1))
  check_recorded(recorded, DETECTRON2)
  check_recorded({}, DETECTRON2)
  with pytest.raises(
    UserError, match=r"the file has pixel_mean=\[103.53, .* \[102.98, .* in bgr; set"
  ):
    check_recorded(recorded, DETECTRON)
  with pytest.raises(UserError, match=r"the file has pixel_std=\[57"):
    check_recorded({"pixel_std": np.array([57.375, 57.12, 58.395])}, DETECTRON2)


def test_the_setting_of_the_weights_is_what_the_importer_records():
  for name, chosen in RESNET_WEIGHTS.items():
    for module in (coco_mask, cityscapes):
      model = module.get_config(f"weights={name}").model
      assert preprocessing(model) == {
        "pixel_mean": chosen.pixel_mean,
        "pixel_std": chosen.pixel_std,
        "channel_order": "rgb",
        "backbone.stride_in": chosen.stride_in,
      }
  with pytest.raises(
    UserError, match="weights=detectron are those of a ResNet, and the backbone is"
  ):
    coco_mask.get_config("weights=detectron,backbone=efficientnet_lite0")


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
