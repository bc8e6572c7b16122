"""Batches: their contents, resuming, sharing among hosts, and closing."""

import json
import pathlib
import subprocess
import sys
import threading

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fpt_jax import data
from fpt_jax.data import transforms
from fpt_jax.data.reader import Reader
from fpt_jax.data.records.images import Picture, decode_image
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection.batches import eval_batches, train_batches
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from fpt_jax.tasks.detection.prediction import view_at
from tests.data_sets import config, write_coco
from tests.runs import ROOT


def _take(batches, count):
  with batches:
    return [next(batches) for _ in range(count)]


def _assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
  root = tmp_path_factory.mktemp("pipeline")
  write_coco(root / "source")
  coco = config("coco", root / "data", source=str(root / "source"))
  data.prepare(coco)
  return coco


def test_shapes_and_dtypes_of_a_batch(shapes):
  (batch,) = _take(train_batches(shapes, batch_size=2, seed=0), 1)
  assert {name: (v.shape, v.dtype.name) for name, v in batch.items()} == {
    "image_BHWC": ((2, 64, 64, 3), "float32"),
    "size_B2": ((2, 2), "int32"),
    "original_size_B2": ((2, 2), "int32"),
    "image_id_B": ((2,), "int64"),
    "valid_B": ((2,), "bool"),
    "gt_boxes_BG4": ((2, 9, 4), "float32"),
    "gt_labels_BG": ((2, 9), "int32"),
    "gt_masks_BGmm": ((2, 9, 112, 112), "uint8"),
    "gt_valid_BG": ((2, 9), "bool"),
  }


def test_an_image_and_its_ground_truth_on_the_canvas(coco):
  coco = coco.copy_and_resolve_references()
  coco.update(short_edge=40, long_edge=60, buckets=((60, 30), (31, 61)))
  (batch,) = _take(eval_batches(coco, "train[:1]", batch_size=1), 1)
  # 20 x 40 becomes 30 x 60; the crowd is left out
  assert batch["size_B2"].tolist() == [[30, 60]]
  assert batch["original_size_B2"].tolist() == [[20, 40]]
  assert batch["image_id_B"].tolist() == [70] and batch["valid_B"].tolist() == [True]
  assert batch["gt_valid_BG"].tolist() == [[True, False, False, False]]
  assert batch["gt_labels_BG"].tolist() == [[2, 0, 0, 0]]
  np.testing.assert_allclose(
    batch["gt_boxes_BG4"][0], [[15.15, 6, 45.15, 18]] + [[0] * 4] * 3, rtol=1e-6
  )
  pixels = decode_image(pathlib.Path(coco.source, "train2017/rgb.jpg").read_bytes())
  np.testing.assert_array_equal(
    batch["image_BHWC"][0], transforms.resize_and_pad(pixels, (30, 60), (31, 61)).numpy()
  )


def test_images_are_resized_as_the_config_says(coco):
  coco = coco.copy_and_resolve_references()
  coco.update(short_edge=37, long_edge=69, buckets=((40, 72),), resize="detectron2")
  (batch,) = _take(eval_batches(coco, "train[:1]", batch_size=1), 1)
  # 20 x 40 becomes 37 x 74, then 34.5 x 69
  assert batch["size_B2"].tolist() == [[35, 69]]
  pixels = decode_image(pathlib.Path(coco.source, "train2017/rgb.jpg").read_bytes())
  resized = Image.fromarray(pixels).resize((69, 35), Image.Resampling.BILINEAR)
  np.testing.assert_allclose(batch["image_BHWC"][0, :35, :69], np.asarray(resized), atol=1)
  view = view_at(ml_collections.ConfigDict({"data": coco}), pixels, 37)
  for name in ("size_B2", "image_BHWC"):
    np.testing.assert_array_equal(view[name], batch[name])


def test_flipped_images_carry_flipped_ground_truth(shapes):
  flipped = 0
  still = shapes.copy_and_resolve_references()
  still.flip = False
  for one, other in zip(
    _take(train_batches(shapes, batch_size=4, seed=0), 3),
    _take(train_batches(still, batch_size=4, seed=0), 3),
    strict=True,
  ):
    for i in range(4):
      if np.array_equal(one["image_BHWC"][i], other["image_BHWC"][i]):
        continue
      flipped += 1
      np.testing.assert_array_equal(one["image_BHWC"][i], other["image_BHWC"][i, :, ::-1])
      valid_G = one["gt_valid_BG"][i]
      x0_G, y0_G, x1_G, y1_G = other["gt_boxes_BG4"][i, valid_G].T
      np.testing.assert_array_equal(
        one["gt_boxes_BG4"][i, valid_G], np.stack([64 - x1_G, y0_G, 64 - x0_G, y1_G], -1)
      )
      np.testing.assert_array_equal(one["gt_masks_BGmm"][i], other["gt_masks_BGmm"][i, :, :, ::-1])
  assert 2 <= flipped <= 10


def test_any_step_can_be_the_first(shapes):
  shapes = shapes.copy_and_resolve_references()
  shapes.train_sizes = (40, 64)
  run = _take(train_batches(shapes, batch_size=4, seed=0), 9)
  resumed = _take(train_batches(shapes, batch_size=4, seed=0, start_step=6), 3)
  for one, other in zip(run[6:], resumed, strict=True):
    _assert_same(one, other)
  sizes = np.concatenate([batch["size_B2"] for batch in run])
  assert sizes.min() < 50 and sizes.max() > 55  # multi-scale


def test_the_longer_edge_of_training_images_has_a_bound_of_its_own(coco):
  coco = coco.copy_and_resolve_references()
  coco.train_sizes, coco.train_long_edge = (10, 20, 30), 40
  sizes = np.concatenate(
    [b["size_B2"] for b in _take(train_batches(coco, batch_size=2, seed=0), 12)]
  )
  assert {tuple(sorted(size)) for size in sizes.tolist()} == {(10, 20), (20, 40)}
  coco.train_long_edge = 0  # 60 for the largest size
  sizes = np.concatenate(
    [b["size_B2"] for b in _take(train_batches(coco, batch_size=2, seed=0), 12)]
  )
  assert {tuple(sorted(size)) for size in sizes.tolist()} == {(10, 20), (20, 40), (30, 60)}


def test_hosts_read_the_shares_of_one_batch(shapes):
  whole = _take(train_batches(shapes, batch_size=4, seed=0), 2)
  shares = [
    _take(train_batches(shapes, batch_size=4, seed=0, process_index=i, process_count=2), 2)
    for i in range(2)
  ]
  for step in range(2):
    joined = {k: np.concatenate([s[step][k] for s in shares]) for k in whole[step]}
    _assert_same(joined, whole[step])


def test_evaluation_reads_every_image_once_on_all_hosts(coco):
  ids = []
  for host in range(2):
    with eval_batches(coco, "train", batch_size=2, process_index=host, process_count=2) as batches:
      read = list(batches)
    assert [b["image_BHWC"].shape[1:3] for b in read] == [(20, 40), (20, 40), (40, 20)]
    assert all("gt_masks_BGmm" not in batch for batch in read)
    ids += [i for b in read for i, v in zip(b["image_id_B"], b["valid_B"], strict=True) if v]
    assert all((b["image_id_B"][~b["valid_B"]] == -1).all() for b in read)
  assert sorted(ids) == [5, 6, 9, 70]


def test_the_largest_of_too_many_instances_are_kept(shapes, caplog):
  few = shapes.copy_and_resolve_references()
  few.max_instances = 2
  with caplog.at_level("WARNING"), eval_batches(few, "train", batch_size=1) as batches:
    read = list(batches)
  with eval_batches(shapes, "train", batch_size=1) as batches:
    complete = list(batches)
  cut = 0
  for one, other in zip(read, complete, strict=True):
    areas = [
      np.prod(b["gt_boxes_BG4"][0, :, 2:] - b["gt_boxes_BG4"][0, :, :2], -1) for b in (one, other)
    ]
    np.testing.assert_array_equal(np.sort(areas[0]), np.sort(areas[1])[-2:])
    if other["gt_valid_BG"].sum() > 2:
      cut += 1
      assert f"image id {one['image_id_B'][0]} " in caplog.text
  assert cut > 3 and f"{cut} such images so far" in caplog.text


def test_other_views_are_the_same_images_at_other_sizes(coco):
  coco = ml_collections.ConfigDict(json.loads(coco.to_json()))  # as read from a run's config.json
  (large,) = _take(eval_batches(coco, "val", batch_size=3, short_edges=(30, 20)), 1)
  (small,) = _take(eval_batches(coco, "val", batch_size=3), 1)
  (view,) = large["other_views"]
  for name, values in view.items():
    np.testing.assert_array_equal(values, small[name])
  assert large["image_BHWC"].shape == (3, 32, 64, 3) and large["size_B2"].tolist() == [[30, 60]] * 3
  np.testing.assert_allclose(large["gt_boxes_BG4"], 1.5 * small["gt_boxes_BG4"], rtol=1e-6)
  np.testing.assert_array_equal(large["image_id_B"], small["image_id_B"])
  with pytest.raises(UserError, match=r"eval\.short_edges: 0 must be"):
    eval_batches(coco, "val", batch_size=3, short_edges=(0,))


def test_canvases_of_the_images_own_sizes(coco):
  coco = coco.copy_and_resolve_references()
  coco.update({"buckets": (), "canvas_multiple": 24, "short_edge": 18})
  for batches, count in (
    (eval_batches(coco, "val", batch_size=3), 2),
    (train_batches(coco, batch_size=3, seed=0), 8),
  ):
    shapes = {b["image_BHWC"].shape[1:3] for b in _take(batches, count)}
    assert shapes == {(24, 48), (48, 24)}
  coco.canvas_multiple = 0
  with pytest.raises(UserError, match="canvas_multiple=0 must be"):
    eval_batches(coco, "val", batch_size=3)


def test_part_of_a_split(shapes):
  shapes = shapes.copy_and_resolve_references()
  shapes.train_split = "train[2:5]+val[:1]"
  batches = _take(train_batches(shapes, batch_size=2, seed=0), 2)
  assert sorted(np.concatenate([b["image_id_B"] for b in batches])) == [3, 4, 5, 24]
  assert len(coco_ground_truth(shapes, shapes.train_split)["images"]) == 4


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"name": "cocoa"}, ("data.name='cocoa'", "context_shapes")),
    ({"data_dir": "gs:/bucket/data"}, ("data.data_dir=gs:/bucket/data", "gs://")),
    ({"data_dir": "/nowhere/at/all"}, ("/nowhere/at/all", "--mode=prepare")),
    ({"builder": {"trainsize": 3}}, ("data.builder", "trainsize")),
    ({"train_split": "test"}, ("'test'", "['train', 'val']")),
    ({"train_split": "train[:"}, ("'train[:'", "['train', 'val']")),
    ({"train_split": "train[:0]"}, ("'train[:0]'", "['train', 'val']")),
    ({"buckets": ((64, 60),)}, ("data.buckets", "64x64", "(64, 60)")),
  ],
)
def test_mistakes_are_reported_in_one_line(shapes, change, words):
  shapes = shapes.copy_and_resolve_references().unlock()
  shapes.update(change)
  with pytest.raises(UserError) as raised:
    train_batches(shapes, batch_size=2, seed=0)
  assert all(word in str(raised.value) for word in words)
  assert "\n" not in str(raised.value)


def test_the_error_of_a_damaged_image_names_its_record(coco, tmp_path, monkeypatch):
  # preparing without decoding the images simulates files that are damaged afterwards
  write_coco(tmp_path / "source")
  path = tmp_path / "source/train2017/grey.jpg"
  path.write_bytes(path.read_bytes()[:-100])
  with monkeypatch.context() as patch:
    patch.setattr(
      "fpt_jax.data.datasets.coco.decode_picture",
      lambda content, exif: Picture(
        np.zeros(((40, 20) if b"PNG" in content else (20, 40)) + (3,), np.uint8), 1, "JPEG"
      ),
    )
    broken = config("coco", tmp_path / "data", source=str(tmp_path / "source"))
    data.prepare(broken)
  with (
    pytest.raises(UserError, match=r"record 1 of split train .*image id 5: undecodable image"),
    train_batches(broken, batch_size=2, seed=0) as batches,
  ):
    for _ in range(10):
      next(batches)


def test_the_error_of_a_corrupt_record_names_it(shapes, tmp_path):
  broken = shapes.copy_and_resolve_references()
  broken.data_dir = str(tmp_path)
  data.prepare(broken)
  (path,) = tmp_path.rglob("*train.array_record*")
  content = bytearray(path.read_bytes())
  content[len(content) // 10] ^= 0xFF
  path.write_bytes(content)
  with (
    pytest.raises(UserError, match=r"record \d+ of split train in .* cannot be read"),
    eval_batches(broken, "train", batch_size=1) as batches,
  ):
    list(batches)
  with pytest.raises(UserError, match=r"record \d+ of split train in .* cannot be read"):
    coco_ground_truth(broken, "train")


def test_records_can_be_read_by_tfds_alone(shapes):
  folder = next(pathlib.Path(shapes.data_dir).rglob("dataset_info.json")).parent
  example = tfds.builder_from_directory(folder).as_data_source("val")[0]
  assert example["image"].shape == (64, 64, 3)
  assert np.shape(example["objects"]["bbox"])[1:] == (4,)


def test_closed_batches_raise(shapes):
  batches = train_batches(shapes, batch_size=2, seed=0)
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)


def test_exhausted_batches_stay_exhausted(shapes):
  batches = eval_batches(shapes, "val", batch_size=5)
  assert len(list(batches)) == 1 and list(batches) == []


def test_closing_ends_every_thread(shapes):
  def python_threads():
    return {thread.name for thread in threading.enumerate()}

  _take(train_batches(shapes, batch_size=2, seed=0), 1)
  before = python_threads(), len(list(pathlib.Path("/proc/self/task").iterdir()))
  for _ in range(3):
    _take(train_batches(shapes, batch_size=2, seed=0), 1)
  after = python_threads(), len(list(pathlib.Path("/proc/self/task").iterdir()))
  assert after[0] == before[0]
  assert after[1] <= before[1] + 1


@pytest.mark.slow
def test_the_interpreter_exits_in_the_middle_of_an_epoch(shapes):
  script = """
import json, sys
import ml_collections
from fpt_jax.tasks.detection.batches import train_batches
config = ml_collections.ConfigDict(json.loads(sys.argv[1]))
batches = train_batches(config, batch_size=4, seed=0)
for _ in range(3):
  next(batches)
sys.exit(3)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, json.dumps(shapes.to_dict())],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 3, done.stderr


def test_real_images_fit_and_are_all_read(real_coco):
  read = 0
  with eval_batches(real_coco, "val", batch_size=8) as batches:
    for batch in batches:
      _, height, width, _ = batch["image_BHWC"].shape
      assert (height, width) in real_coco.buckets
      assert (batch["size_B2"] <= [height, width]).all()
      boxes_N4 = batch["gt_boxes_BG4"][batch["gt_valid_BG"]]
      assert (boxes_N4[:, 2:] > boxes_N4[:, :2]).all()
      assert boxes_N4.min() >= 0 and (boxes_N4 <= [width, height] * 2).all()
      read += batch["valid_B"].sum()
  assert read == 100


def test_each_record_has_a_name(shapes):
  reader = Reader(shapes, "val[1:3]+train[:1]")
  assert [reader.name(i).split(" in ")[0] for i in range(len(reader))] == [
    "record 1 of split val",
    "record 2 of split val",
    "record 0 of split train",
  ]
