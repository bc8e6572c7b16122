"""COCO's average precision and recall, against pycocotools and against values computed by hand."""

import contextlib
import copy
import csv
import io
import json
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpt_jax.configs import coco_mask
from fpt_jax.errors import UserError
from fpt_jax.ops import masks
from fpt_jax.tasks.detection import category_table, coco_ap, tide
from fpt_jax.tasks.task import check_config
from tests.conftest import GOLDEN

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
METRICS += ["AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl"]
PERFECT = {f"{kind}/{name}": 100.0 for kind in ("bbox", "segm") for name in METRICS}


@pytest.fixture(scope="module")
def real_truth(real_data):
  return json.loads((real_data / "coco/annotations/instances_val2017.json").read_text())


def detect(truth, mask_of, score=lambda i: 1.0):
  """Returns the ground truth, without crowds, as results."""
  images = {image["id"]: image for image in truth["images"]}
  results = []
  for i, annotation in enumerate(truth["annotations"]):
    if not annotation.get("iscrowd"):
      image, (x, y, w, h) = images[annotation["image_id"]], annotation["bbox"]
      box = np.array([x, y, x + w, y + h])
      rle = mask_of(annotation["segmentation"], box, image["height"], image["width"])
      results += coco_ap.to_coco_results(
        image["id"], box[None], [score(i)], [annotation["category_id"]], [rle]
      )
  return results


def exact(segmentation, box, height, width):
  return masks.encode_rle(masks.rasterize(segmentation, height, width))


def rectangle(x, y, w, h):
  return {"bbox": [x, y, w, h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}


@pytest.fixture
def truth():
  """Returns two images with a small, a medium and a large object and a crowd, and without birds."""
  return {
    "images": [
      {"id": 7, "height": 200, "width": 300},
      {"id": 9, "height": 120, "width": 100},
    ],
    "categories": [
      {"id": 3, "name": "cat"},
      {"id": 18, "name": "dog"},
      {"id": 44, "name": "bird"},
    ],
    "annotations": [
      {"id": 0, "image_id": 7, "category_id": 3, **rectangle(10, 20, 120, 100)},
      {"id": 1, "image_id": 7, "category_id": 18, **rectangle(150, 20, 50, 60)},
      {"id": 2, "image_id": 9, "category_id": 3, **rectangle(5, 5, 20, 20)},
      {"id": 3, "image_id": 9, "category_id": 18, "iscrowd": 1, **rectangle(40, 40, 50, 50)},
    ],
  }


def result(image_id, category_id, score, x, y, w, h, size):
  box = np.array([[x, y, x + w, y + h]], np.float32)
  rle = masks.encode_rle(masks.rasterize(rectangle(x, y, w, h)["segmentation"], *size))
  return coco_ap.to_coco_results(image_id, box, [score], [category_id], [rle])


def test_results_are_plain_json():
  boxes = np.array([[1, 2, 11, 22], [0.5, 0.25, 3, 4]], np.float32)
  rles = [{"size": np.array([4, 5]), "counts": b"d0"}, {"size": [4, 5], "counts": "d0"}]
  results = coco_ap.to_coco_results(
    np.int64(5), boxes, np.array([0.5, 0.25], np.float32), np.array([3, 18], np.int32), rles
  )
  assert json.loads(json.dumps(results)) == [
    {
      "image_id": 5,
      "category_id": 3,
      "bbox": [1.0, 2.0, 10.0, 20.0],
      "score": 0.5,
      "segmentation": {"size": [4, 5], "counts": "d0"},
    },
    {
      "image_id": 5,
      "category_id": 18,
      "bbox": [0.5, 0.25, 2.5, 3.75],
      "score": 0.25,
      "segmentation": {"size": [4, 5], "counts": "d0"},
    },
  ]
  assert "segmentation" not in coco_ap.to_coco_results(5, boxes, [1.0, 1.0], [3, 3])[0]
  assert coco_ap.to_coco_results(5, np.zeros((0, 4)), [], [], []) == []
  with pytest.raises(ValueError, match=r"\[2, 1, 2\]"):
    coco_ap.to_coco_results(5, boxes, [1.0], [3, 3])


def test_ground_truth_as_detections_is_perfect(truth):
  metrics = coco_ap.evaluate(truth, detect(truth, exact))
  assert metrics == pytest.approx(PERFECT)


def test_average_precision_computed_by_hand(truth):
  results = (
    result(7, 3, 0.9, 10, 20, 120, 100, (200, 300))  # the large cat
    + result(9, 3, 0.8, 60, 80, 20, 20, (120, 100))  # no cat there
    + result(9, 3, 0.7, 5, 5, 20, 16, (120, 100))  # the small cat at IoU 0.8
  )
  evaluations = coco_ap.evaluations(truth, results)
  metrics = coco_ap.metrics_of(evaluations)
  cat, dog, bird = category_table.categories_of(evaluations)
  # 51 of 101 recalls have precision 1, and 50 have 2/3; only the former if the IoU must exceed 0.8
  both, one = (51 + 50 * 2 / 3) / 101 * 100, 51 / 101 * 100
  for kind in ("bbox", "segm"):
    assert cat[f"{kind}/AP"] == pytest.approx((7 * both + 3 * one) / 10)
    assert cat[f"{kind}/AP50"] == cat[f"{kind}/AP75"] == pytest.approx(both)
    assert cat[f"{kind}/AR@100"] == pytest.approx((7 * 100 + 3 * 50) / 10)
    assert dog[f"{kind}/AP"] == dog[f"{kind}/AR@100"] == 0
    assert bird[f"{kind}/AP"] is None
    assert metrics[f"{kind}/AP50"] == pytest.approx(both / 2)
    assert metrics[f"{kind}/AP"] == pytest.approx(cat[f"{kind}/AP"] / 2)
    assert metrics[f"{kind}/APl"] == pytest.approx(100)
    # the small cat is the second detection in its image
    assert metrics[f"{kind}/AR@1"] == pytest.approx(50 / 2)
    assert metrics[f"{kind}/AR@10"] == metrics[f"{kind}/AR@100"] == cat[f"{kind}/AR@100"] / 2
  assert [row["objects"] for row in (cat, dog, bird)] == [2, 1, 0]


def test_metrics_are_zero_without_detections_and_absent_without_ground_truth(truth):
  metrics = coco_ap.evaluate(truth, [])
  assert metrics == dict.fromkeys(PERFECT, 0)
  del truth["annotations"][:3]
  assert coco_ap.evaluate(truth, result(9, 3, 0.5, 5, 5, 20, 20, (120, 100))) == {}
  truth["annotations"] = [
    {"id": 1, "image_id": 7, "category_id": 18, **rectangle(150, 20, 50, 60)},
  ]
  metrics = coco_ap.evaluate(truth, [], iou_types=("bbox",))
  names = ("AP", "AP50", "AP75", "APm", "AR@1", "AR@10", "AR@100", "ARm")
  assert metrics == {f"bbox/{name}": 0 for name in names}


def test_nothing_is_printed_and_nothing_is_changed(truth, capfd):
  results = detect(truth, exact)
  before = copy.deepcopy((truth, results))
  coco_ap.evaluate(truth, results + results)
  assert (truth, results) == before
  assert capfd.readouterr() == ("", "")


def test_sizes_of_masks_are_those_of_the_mask_not_the_box(truth):
  # a diagonal sliver: its box is large, its mask small
  sliver = [[10.0, 20.0, 130.0, 115.0, 130.0, 120.0]]
  truth["annotations"] = [
    {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 120, 100], "segmentation": sliver}
  ]
  metrics = coco_ap.evaluate(truth, detect(truth, exact))
  assert "segm/APs" in metrics and "segm/APl" not in metrics
  # a false positive with a small mask and a large box
  wrong = detect(truth, exact, score=lambda i: 1.5)
  wrong[0]["segmentation"] = masks.encode_rle(
    masks.rasterize([[170.0, 20.0, 290.0, 115.0, 290.0, 120.0]], 200, 300)
  )
  wrong[0]["bbox"] = [170.0, 20.0, 120.0, 100.0]
  with_wrong = coco_ap.evaluate(truth, detect(truth, exact) + wrong)
  assert metrics["segm/APs"] == pytest.approx(100)
  assert with_wrong["segm/APs"] == pytest.approx(50)
  assert with_wrong["bbox/AP"] == pytest.approx(50)


def disturbed(truth, rng):
  """Returns the ground truth as shifted, duplicated, missing and misclassified detections."""

  def shifted(segmentation, box, height, width):
    bitmap = masks.rasterize(segmentation, height, width)
    step = tuple(rng.integers(-4, 5, 2))
    return masks.encode_rle(np.roll(bitmap, step, (0, 1)))

  results = detect(truth, shifted, score=lambda i: round(rng.random(), 2))
  categories = [category["id"] for category in truth["categories"]]
  kept = []
  for entry in results:
    x, y, w, h = entry["bbox"]
    dx, dy, dw, dh = rng.normal(0, 0.08, 4)
    entry["bbox"] = [x + dx * w, y + dy * h, w * np.exp(dw), h * np.exp(dh)]
    if rng.random() < 0.1:
      entry["category_id"] = int(rng.choice(categories))
    kept += [entry] * int(rng.choice([0, 1, 1, 1, 2]))
  return kept


def test_metrics_equal_pycocotools_on_real_images(real_truth, rng):
  results = disturbed(real_truth, rng)
  evaluations = coco_ap.evaluations(real_truth, results)
  metrics, rows = coco_ap.metrics_of(evaluations), category_table.categories_of(evaluations)
  for kind in ("bbox", "segm"):
    with contextlib.redirect_stdout(io.StringIO()):
      oracle = COCO()
      oracle.dataset = copy.deepcopy(real_truth)
      oracle.createIndex()
      fields = ["image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation"]
      found = oracle.loadRes([{field: r[field] for field in fields} for r in results])
      evaluation = COCOeval(oracle, found, kind)
      evaluation.evaluate()
      evaluation.accumulate()
      evaluation.summarize()
    assert 5 < metrics[f"{kind}/AP"] < 95
    ours = [metrics[f"{kind}/{name}"] for name in METRICS]
    np.testing.assert_allclose(ours, 100 * evaluation.stats, rtol=1e-12)
    per_category = [row[f"{kind}/AP"] for row in rows]
    assert len(per_category) == 80
    assert np.mean(per_category) == pytest.approx(metrics[f"{kind}/AP"])


def assert_matchers_agree(truth, results):
  """Equal to the last digits, so that every average is."""
  pytest.importorskip("faster_coco_eval")
  ours, theirs = (coco_ap.evaluations(truth, results, matcher=m) for m in coco_ap.MATCHERS)
  assert coco_ap.metrics_of(theirs) == pytest.approx(coco_ap.metrics_of(ours), abs=1e-9)
  for row, expected in zip(*map(category_table.categories_of, (theirs, ours)), strict=True):
    assert row == pytest.approx(expected, abs=1e-9)
  for kind, evaluation in ours.items():
    for name in ("precision", "recall"):
      np.testing.assert_allclose(theirs[kind].eval[name], evaluation.eval[name], atol=1e-11)
    matched = (tide.match(coco_ap.images_of(e[kind]), kind) for e in (ours, theirs))
    for values, others in zip(*matched, strict=True):
      np.testing.assert_array_equal(values, others)


def test_matchers_agree_on_real_images(real_truth, rng):
  assert_matchers_agree(real_truth, disturbed(real_truth, rng))


def test_matchers_agree_without_objects_or_detections(truth):
  assert_matchers_agree(truth, [])
  assert_matchers_agree(truth | {"annotations": []}, detect(truth, exact))
  assert_matchers_agree(truth, detect(truth, exact))


def test_a_matcher_that_is_not_installed_is_reported(monkeypatch):
  monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
  with pytest.raises(UserError, match="not installed: pip install faster-coco-eval"):
    coco_ap.evaluations({"images": [], "categories": []}, [], matcher="faster_coco_eval")
  config = coco_mask.get_config("demo")
  config.eval.matcher = "other"
  with pytest.raises(UserError, match="must be one of pycocotools, faster_coco_eval"):
    check_config(config)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_category_alone_has_the_metrics_of_its_row(kind):
  golden = json.loads((GOLDEN / "tide.json").read_text())
  rows = category_table.categories_of(
    coco_ap.evaluations(golden["ground_truth"], golden["detections"], (kind,))
  )
  read = list(csv.DictReader(io.StringIO(category_table.to_csv(rows))))
  with contextlib.redirect_stdout(io.StringIO()):
    oracle = COCO()
    oracle.dataset = copy.deepcopy(golden["ground_truth"])
    oracle.createIndex()
    evaluation = COCOeval(oracle, oracle.loadRes(golden["detections"]), kind)
    for row, line in zip(rows, read, strict=True):
      evaluation.params.catIds = [row["category_id"]]
      evaluation.evaluate()
      evaluation.accumulate()
      evaluation.summarize()
      expected = dict(zip(METRICS, 100 * evaluation.stats, strict=True))
      for name in ("AP", "AP50", "AP75", "AR@100"):
        assert row[f"{kind}/{name}"] == pytest.approx(expected[name], rel=1e-12)
        assert float(line[f"{kind}/{name}"]) == row[f"{kind}/{name}"]
  assert [line["category"] for line in read] == ["c1", "c2", "c3"]
  assert sum(row["objects"] for row in rows) == len(golden["ground_truth"]["annotations"])


def test_real_ground_truth_as_detections_is_perfect(real_truth):
  metrics = coco_ap.evaluate(real_truth, detect(real_truth, exact))
  of_few = {f"{kind}/AR@{most}" for kind in ("bbox", "segm") for most in (1, 10)}
  assert all(metrics[name] == pytest.approx(100) for name in set(PERFECT) - of_few)


@pytest.mark.parametrize(
  ("size", "aligned", "at_least"), [(112, True, 99), (28, True, 93), (112, False, 88)]
)
def test_bitmaps_preserve_real_objects(real_truth, size, aligned, at_least):
  def through_bitmap(segmentation, box, height, width):
    bitmap = masks.box_bitmap(segmentation, box, height, width, size).astype(np.float32)
    return masks.paste_rle(bitmap, box, height, width, aligned=aligned)

  metrics = coco_ap.evaluate(real_truth, detect(real_truth, through_bitmap), ("segm",))
  assert metrics["segm/AP"] >= at_least


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image_id": 8}, "image 8"),
    ({"category_id": 1}, "category_id 1 "),
    ({"score": float("nan")}, "nan"),
    ({"segmentation": None}, "no segmentation"),
    ({"segmentation": {"size": [300, 200], "counts": "d0"}}, r"\[300, 200\].*\[200, 300\]"),
  ],
)
def test_results_that_do_not_fit_are_reported(truth, change, message):
  results = detect(truth, exact)
  results[1] |= change
  with pytest.raises(UserError, match=f"result 1 .*{message}"):
    coco_ap.evaluate(truth, results)


def test_masks_need_ground_truth_masks(truth):
  del truth["annotations"][2]["segmentation"]
  with pytest.raises(UserError, match=r"annotation 2 \(image 9\)"):
    coco_ap.evaluate(truth, [])
  assert coco_ap.evaluate(truth, [], ("bbox",))["bbox/APs"] == 0
  with pytest.raises(ValueError, match="keypoints"):
    coco_ap.evaluate(truth, [], ("keypoints",))


def test_table_of_metrics():
  metrics = {"bbox/AP": 37.94, "bbox/AP50": 100.0, "bbox/APs": 0.0, "segm/APl": 5.25, "loss": 1.0}
  assert coco_ap.format_table(metrics).splitlines() == [
    "           AP   AP50   AP75    APs    APm    APl",
    "bbox     37.9  100.0      -    0.0      -      -",
    "segm        -      -      -      -      -    5.2",
  ]
  assert len(coco_ap.format_table({"bbox/AP": 1.0}).splitlines()) == 2


def test_table_and_csv_of_categories():
  rows = [
    {"category_id": 7, "category": "cat, [red]", "objects": 12, "bbox/AP": 37.94, "bbox/AP50": 1.0},
    {"category_id": 9, "category": "dog", "objects": 0, "bbox/AP": None, "bbox/AP50": None},
  ]
  lines = category_table.format_categories(rows).splitlines()
  cells = [line.strip("│").split("│") for line in lines if line.startswith("│")]
  assert [[cell.strip() for cell in row] for row in cells] == [
    ["cat, [red]", "12", "37.9", "1.0"],
    ["dog", "0", "-", "-"],
  ]
  assert category_table.to_csv(rows) == (
    'category_id,category,objects,bbox/AP,bbox/AP50\n7,"cat, [red]",12,37.94,1.0\n9,dog,0,,\n'
  )
