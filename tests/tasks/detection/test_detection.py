"""Imported detectors give torchvision's detections for images of any size (tests/golden/README.md)."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask as coco_mask

import fpt_jax
from fpt_jax import data
from fpt_jax.tasks.detection.evaluation import RESULTS_FILE
from tests.conftest import GOLDEN
from tests.runs import command, importer, succeed
from tests.weights.test_torchvision import assert_close, golden_config, state_dict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(GOLDEN / "maskrcnn_any_size.npz"))


@pytest.fixture(scope="module")
def config(golden, tmp_path_factory):
  """Returns torchvision's config, with the images as a data set in COCO's format."""
  folder = tmp_path_factory.mktemp("coco")
  content = {
    "images": [],
    "annotations": [],
    "categories": [{"id": i, "name": str(i)} for i in range(1, 91)],
  }
  for i in range(4):
    image_HWC = golden[f"image_HWC_{i}"]
    Image.fromarray(image_HWC).save(folder / f"{i}.png")
    height, width, _ = image_HWC.shape
    content["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
    content["annotations"].append(
      {
        "id": i + 1,
        "image_id": i,
        "category_id": 1,
        "bbox": [9, 9, 50, 50],
        "segmentation": [[9, 9, 59, 9, 59, 59]],
        "area": 1250,
        "iscrowd": 0,
      }
    )
  (folder / "val.json").write_text(json.dumps(content))
  config = golden_config("torchvision")
  config.model.test.score_threshold = 0.3
  config.data.source, config.data.data_dir = str(folder), str(folder / "records")
  config.data.builder = ConfigDict({"splits": {"val": ("val.json", ".")}})
  config.data.eval_split = "val[:2]"
  config.eval.batch_size = 2
  data.prepare(config.data)
  return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  """Returns the folder that the import script writes for torchvision's weights."""
  folder = tmp_path_factory.mktemp("import")
  np.savez(folder / "weights.npz", **state_dict("maskrcnn_resnet50_fpn"))
  flags = [f"--config={file_of(config, folder)}", f"--weights={folder}/weights.npz"]
  done = importer(*flags, f"--workdir={folder}/run")
  assert done.returncode == 0, done.stderr
  return folder / "run"


def file_of(config, folder):
  """Writes a config file for the command line and returns its path."""
  (folder / "config.json").write_text(config.to_json())
  file = folder / "config.py"
  file.write_text(
    "import json, pathlib\n"
    "from ml_collections import ConfigDict\n\n\n"
    "def get_config():\n"
    "  text = pathlib.Path(__file__).with_suffix('.json').read_text()\n"
    "  return ConfigDict(json.loads(text))\n"
  )
  return file


def assert_same(boxes_xyxy, scores, labels, areas, golden, i):
  """Checks that an image has the same detections in the same order."""
  np.testing.assert_array_equal(labels, golden[f"image_{i}_labels"])
  # Random weights amplify rounding: 3e-4 if computed in float64, 2e-4 to 1.2e-3 in float32, depending
  # on the CPU's instructions.
  assert_close(scores, golden[f"image_{i}_scores"], tolerance=2e-3)
  assert_close(boxes_xyxy, golden[f"image_{i}_boxes_xyxy"])
  # a pixel at exactly one half may be rounded either way
  np.testing.assert_allclose(areas, golden[f"image_{i}_mask_areas"], atol=3)


def evaluated(workdir):
  """Returns the detections of each image that evaluation wrote into a run's folder."""
  results = json.loads((workdir / "eval" / RESULTS_FILE).read_text())
  found = []
  for i in range(4):
    of_image = [r for r in results if r["image_id"] == i]
    xywh = np.array([r["bbox"] for r in of_image]).reshape(-1, 4)
    found.append(
      (
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        np.array([r["score"] for r in of_image]),
        [r["category_id"] for r in of_image],
        [coco_mask.area(r["segmentation"]) for r in of_image],
      )
    )
  return found


def test_detections_in_a_batch_with_padding(run, golden):
  """Two images of different sizes share the canvas that fits them best; uses the command line."""
  succeed(command("--mode=eval", f"--workdir={run}"))
  found = evaluated(run)
  for i in range(2):
    assert_same(*found[i], golden, i)


def test_predictions_of_one_image(run, golden):
  (found,) = fpt_jax.restore(str(run)).predict([golden["image_HWC_2"]])
  areas = found["masks"].sum(axis=(1, 2))
  assert_same(found["boxes_xyxy"], found["scores"], found["labels"], areas, golden, 2)


def test_detections_on_the_canvas_of_the_largest_image(run, config, golden, tmp_path):
  """The first and the last image share a canvas that is larger than either, as in torchvision."""
  config = config.copy_and_resolve_references()
  config.data.buckets, config.data.eval_split = ((192, 224),), "val[:1]+val[3:]"
  file = file_of(config, tmp_path)
  succeed(command("--mode=eval", f"--workdir={run}", f"--config={file}"))
  found = evaluated(run)
  assert len(found[0][1]) > 0
  assert_same(*found[3], golden, 3)
