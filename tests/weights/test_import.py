"""The importer of pretrained weights, and the checks of a run that starts from them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import fpt_jax
from fpt_jax import models
from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.initial_weights import check_preprocessing, starting_arrays
from fpt_jax.models.preprocess import normalize
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.config_file import write_config
from fpt_jax.weights.imported import write_imported
from tests.runs import ROOT, importer
from tests.weights.resnets import convert, resnet18, structure

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
      "fpt_jax.initial_weights.initial_arrays", lambda build, shardings, arg=arg: zeros(arg)
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
