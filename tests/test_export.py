"""Exported programs run without the package and equal `restore(...).predict`."""

import json
import logging
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx
from jax import export as jax_export
from pycocotools import mask as coco_mask

import fpt_jax
from fpt_jax import data, export, models
from fpt_jax.errors import UserError
from fpt_jax.models.state import initial_arrays
from fpt_jax.ops.masks import paste_rle
from fpt_jax.run import checkpoints
from fpt_jax.run.config_file import write_config
from fpt_jax.tasks.task import task_of
from tests.runs import QUICK, tiny_config, tiny_segmentation_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

# what a user's process does; fpt_jax cannot be imported in it
USER = """
import sys
sys.modules["fpt_jax"] = None
import jax, numpy as np
model, images, results = sys.argv[1:]
exported = jax.export.deserialize(open(model, "rb").read())
for name, image in np.load(images).items():
  np.savez(f"{results}/{name}.npz", **exported.call(image))
"""


def save_run(config, workdir) -> None:
  """Writes a run of a model with initial weights."""
  task_of(config).adopt_classes(config, data.info(config.data))
  write_config(str(workdir), config)
  with checkpoints.closing(checkpoints.manager(str(workdir))) as saved:
    checkpoints.save(saved, 3, initial_arrays(lambda: models.build(config, nnx.Rngs(0))))


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def exported(request, tmp_path_factory):
  """Returns task, restored model, images, what the program returned for them, and the JSON file."""
  workdir = tmp_path_factory.mktemp(request.param)
  config = tiny_config() if request.param == "detection" else tiny_segmentation_config()
  save_run(config, workdir)
  restored = fpt_jax.restore(str(workdir))
  out = workdir / "export"
  export.export(restored, epath.Path(out))
  rng = np.random.default_rng(0)
  images = {
    name: np.kron(rng.integers(0, 256, (rows, columns, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    for name, rows, columns in (("wide", 9, 15), ("tall", 14, 6))
  }
  np.savez(workdir / "images.npz", **images)
  files = [str(out / "model_cpu.jax_export"), str(workdir / "images.npz"), str(workdir)]
  environment = os.environ | QUICK | {"JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-I", "-c", USER, *files], check=True, env=environment)
  results = {name: dict(np.load(workdir / f"{name}.npz")) for name in images}
  return (
    request.param,
    restored,
    images,
    results,
    json.loads((out / "export_cpu.json").read_text()),
  )


def test_a_process_without_the_package_predicts_the_same(exported):
  task, restored, images, results, _ = exported
  for name, image_HWC in images.items():
    found = results[name]
    (expected,) = restored.predict([image_HWC])
    if task == "segmentation":
      assert len(np.unique(expected["label_map"])) > 1
      np.testing.assert_array_equal(found["label_map"], expected["label_map"])
      continue
    valid_D = found["valid"]
    assert len(expected["scores"]) == valid_D.sum() > 2
    np.testing.assert_allclose(found["scores"][valid_D], expected["scores"], atol=1e-4)
    np.testing.assert_allclose(found["boxes_xyxy"][valid_D], expected["boxes_xyxy"], atol=1e-2)
    np.testing.assert_array_equal(found["labels"][valid_D], expected["labels"])
    for mask, box, mask_HW in zip(
      found["masks"][valid_D], found["boxes_xyxy"][valid_D], expected["masks"], strict=True
    ):
      rle = paste_rle(mask, box, *image_HWC.shape[:2], aligned=restored.config.model.aligned)
      assert (coco_mask.decode(rle) != mask_HW).mean() < 1e-3
    assert not any(values[~valid_D].any() for values in found.values())


def test_the_json_describes_the_program(exported):
  task, restored, images, results, description = exported
  assert description["step"] == restored.step == 3
  assert description["input"]["image"]["shape"] == ["h", "w", 3]
  for name, values in results["wide"].items():
    described = description["output"][name]
    height, width = images["wide"].shape[:2]
    shape = [{"h": height, "w": width}.get(edge, edge) for edge in described["shape"]]
    assert (described["dtype"], shape) == (str(values.dtype), list(values.shape))
  names = restored.config.model["category_names" if task == "detection" else "class_names"]
  assert list(names) in [list(v) for v in description.values() if isinstance(v, list)]


def test_a_batch_predicts_what_single_images_do(exported, tmp_path, caplog):
  task, restored, *_ = exported
  with caplog.at_level(logging.INFO, logger="absl"):
    export.export(restored, epath.Path(tmp_path), batch=2)
  assert re.search(r"model_cpu.jax_export: .* images per call: 2", caplog.text)
  assert re.search(r"largest difference from .*; per image \d+ ms, predict \d+ ms", caplog.text)
  description = json.loads((tmp_path / "export_cpu.json").read_text())
  assert description["input"]["image"]["shape"] == [2, "h", "w", 3]
  rng = np.random.default_rng(1)
  image_BHWC = np.kron(rng.integers(0, 256, (2, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
  outputs = export.load(epath.Path(tmp_path / "model_cpu.jax_export"), "stablehlo")(image_BHWC)
  assert {name: [2, *values.shape[1:]] for name, values in outputs.items()} == {
    name: [64 if edge in ("h", "w") else edge for edge in array["shape"]]
    for name, array in description["output"].items()
  }
  expected = restored.predict(image_BHWC)
  for i in range(2):
    found = {name: values[i] for name, values in outputs.items()}
    if task == "segmentation":
      np.testing.assert_array_equal(found["label_map"], expected[i]["label_map"])
      continue
    valid_D = found["valid"]
    assert valid_D.sum() > 2
    np.testing.assert_allclose(found["scores"][valid_D], expected[i]["scores"], atol=1e-4)
    np.testing.assert_allclose(found["boxes_xyxy"][valid_D], expected[i]["boxes_xyxy"], atol=64e-4)
    np.testing.assert_array_equal(found["labels"][valid_D], expected[i]["labels"])


def in_bfloat16(restored):
  """Returns a model that computes in bfloat16, with the same weights."""
  config = restored.config.copy_and_resolve_references()
  config.model.dtype = "bfloat16"
  return fpt_jax.Restored(config, 3, models.structure_of(config), restored.arrays)


def test_bfloat16_is_compared_by_matches(exported, tmp_path, caplog):
  task, restored, *_ = exported
  low = in_bfloat16(restored)
  with caplog.at_level(logging.INFO, logger="absl"):
    export.export(low, epath.Path(tmp_path))
  assert "mean share without a match from restore(...).predict" in caplog.text
  path = epath.Path(tmp_path / "model_cpu.jax_export")
  call = export.load(path, "stablehlo")

  def other(image_HWC):
    found = call(image_HWC)
    if task == "segmentation":
      in_first_columns = np.arange(image_HWC.shape[1]) < 4  # 3 % of the pixels
      return {"label_map": np.where(in_first_columns, 255, found["label_map"])}
    return found | {"scores": found["scores"] * 0.9}

  program = task_of(low.config).image_program(low.config, low.structure, None)
  image = export.drawn(program.canvas)
  with pytest.raises(UserError, match=r"without a match: .*, more than 0\.02, and was removed"):
    export.compare(low, program, other, iter([image]), path)


@pytest.mark.parametrize("exported", ["detection"], indirect=True)
def test_the_target_decides_and_not_this_machine(exported, tmp_path):
  restored = exported[1]
  export.export(restored, epath.Path(tmp_path), platforms=("tpu",))
  program = jax_export.deserialize(bytearray((tmp_path / "model_tpu.jax_export").read_bytes()))
  assert program.platforms == ("tpu",)
  assert "tpu_custom_call" in program.mlir_module()
  assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("exported", ["segmentation"], indirect=True)
def test_a_program_that_differs_is_an_error_and_removed(exported, tmp_path, monkeypatch):
  restored = exported[1]
  nothing = lambda image_HWC: {"label_map": np.full(image_HWC.shape[:2], 255, np.uint8)}
  monkeypatch.setattr(export, "load", lambda path, format: nothing)
  with pytest.raises(UserError, match=r"differs from restore\(\.\.\.\)\.predict, .*was removed"):
    export.export(restored, epath.Path(tmp_path))
  assert not (tmp_path / "model_cpu.jax_export").exists()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format": "onnx"}, "--format=onnx does not exist: .*use --format=stablehlo"),
    ({"format": "saved_model", "platforms": ("tpu",)}, "does not exist on this machine"),
    ({"canvas": (32, 64)}, "--canvas=32,64 holds no image"),
  ],
)
def test_what_does_not_exist_is_said(options, message, tmp_path):
  config = tiny_config()
  restored = types.SimpleNamespace(config=config, arrays={}, step=0)
  with pytest.raises(UserError, match=message) as error:
    export.export(restored, epath.Path(tmp_path), **options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("data__resize", "detectron2", "data.resize='detectron2' cannot be exported"),
    ("eval__short_edges", (64, 96), "images at one size"),
  ],
)
def test_views_that_one_program_does_not_compute(field, value, message, tmp_path):
  config = tiny_config(**{field: value})
  with pytest.raises(UserError, match=message):
    export.export(types.SimpleNamespace(config=config, arrays={}, step=0), epath.Path(tmp_path))


def test_flags():
  assert export.parsed_canvas(["480", "640"]) == (480, 640)
  assert export.parsed_canvas([]) is None
  assert export.checked_platforms(["tpu", "cpu", "tpu"]) == ("tpu", "cpu")
  for edges in (["480"], ["0", "5"], ["a", "5"]):
    with pytest.raises(UserError, match="must be HEIGHT,WIDTH"):
      export.parsed_canvas(edges)
  with pytest.raises(UserError, match="--platforms=gpu must be some of cpu,tpu,cuda"):
    export.checked_platforms(["gpu"])
