"""Which library a file of weights comes from, and what its ResNets become."""

import pickle
import re

import numpy as np
import pytest

from fpt_jax import models
from fpt_jax.configs import cityscapes, coco_mask
from fpt_jax.errors import UserError
from fpt_jax.models.preprocess import DETECTRON, DETECTRON2, RESNET_WEIGHTS, normalize
from fpt_jax.weights.families import (
  FAMILIES,
  check_recorded,
  family_of,
  for_rgb,
  preprocessing,
  without_prefix,
)
from fpt_jax.weights.files import read_state_dict
from tests.golden.fill import fill
from tests.weights.resnets import (
  R50,
  assert_equal,
  convert,
  detectron2_names,
  detectron_resnet50,
  resnet18,
  resnet50,
  torchvision_names,
)


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
