"""Data in COCO's format are read unchanged, from the official layout and from the user's files."""

import json
import pathlib
import re

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask
from tensorflow_datasets.core import shuffle

from fpt_jax import data
from fpt_jax.configs import coco_box
from fpt_jax.configs import coco_mask as coco_mask_config
from fpt_jax.data.reader import Reader
from fpt_jax.data.records import instances
from fpt_jax.data.records.images import decode_image
from fpt_jax.errors import UserError
from fpt_jax.ops import masks
from fpt_jax.tasks import detection
from fpt_jax.tasks.detection.batches import eval_batches
from fpt_jax.tasks.detection.ground_truth import coco_ground_truth
from tests.data_sets import HEIGHT, WIDTH, config, write_coco


def _read(coco, split="train"):
  reader = Reader(coco, split)
  found = [reader.read(i) for i in range(len(reader))]
  reader.close()
  return found


def test_categories_with_gaps_become_contiguous_labels(coco):
  assert data.info(coco) == data.DatasetInfo(("ant", "zebra"), (3, 90), {"train": 4, "val": 4})
  assert [r.labels.tolist() for r in _read(coco)] == [[2, 1], [1], [], [2]]


def test_records_keep_the_order_and_bytes_of_the_files(coco):
  found = _read(coco)
  assert [r.image_id for r in found] == [70, 5, 6, 9]
  for record in found:
    path = pathlib.Path(coco.source) / "train2017" / record.file_name
    assert record.image == path.read_bytes()
    assert decode_image(record.image).shape == (*record.size, 3)


def test_grey_and_cmyk_become_rgb(coco):
  _, grey, cmyk, _ = (decode_image(r.image).astype(int) for r in _read(coco))
  assert (grey[..., :1] == grey).all()
  inks = PIL.Image.open(pathlib.Path(coco.source) / "train2017" / "cmyk.jpg")
  c, m, y, k = np.moveaxis(np.asarray(inks, float), -1, 0)
  np.testing.assert_allclose(
    cmyk, np.stack([(255 - v) * (255 - k) / 255 for v in (c, m, y)], -1), atol=1.5
  )


def test_ground_truth_equals_the_file(coco):
  original = json.loads(
    (pathlib.Path(coco.source) / "annotations/instances_train2017.json").read_text()
  )
  rebuilt = coco_ground_truth(coco, "train")
  assert rebuilt["images"] == original["images"]
  assert rebuilt["categories"] == sorted(original["categories"], key=lambda c: c["id"])
  # two lack an area: 10 columns of 20 pixels, and 20 columns of 10
  for annotation, area in zip(original["annotations"][2:], (200.0, 200.0), strict=True):
    annotation["area"] = area
  assert rebuilt["annotations"] == original["annotations"]


def test_bitmaps_are_relative_to_the_box(coco):
  found = _read(coco)
  left_half = np.zeros((112, 112), np.uint8)
  left_half[:, :56] = 1
  np.testing.assert_array_equal(
    instances.unpack_bitmaps(found[0].bitmaps), [left_half, np.ones_like(left_half)]
  )
  np.testing.assert_array_equal(instances.unpack_bitmaps(found[1].bitmaps), [left_half * 0 + 1])


def test_bitmap_of_runs_samples_the_mask():
  mask_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
  mask_HW[3:6, 8:12] = [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]
  runs = coco_mask.encode(np.asfortranarray(mask_HW))
  bitmap = instances.draw_bitmap(runs, (8, 3, 12, 5), (HEIGHT, WIDTH))
  np.testing.assert_array_equal(bitmap, np.kron(mask_HW[3:5, 8:12], np.ones((56, 28))))


def test_bitmap_of_a_tiny_box_takes_little_memory():
  polygon = [[0, 0, 600, 0, 600, 400, 0, 400]]
  bitmap = instances.draw_bitmap(polygon, (300, 200, 300 + 1e-6, 200 + 1e-6), (400, 600))
  assert bitmap.shape == (112, 112) and bitmap.all()


def test_boxes_of_height_0_and_slightly_outside_are_kept(tmp_path):
  source = tmp_path / "source"
  content = write_coco(source)
  content["annotations"][0]["bbox"] = [30.0, 4.0, 10.7, 0.0]
  for split in ("train", "val"):
    (source / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
  coco = config("coco", tmp_path / "data", source=str(source))
  data.prepare(coco)
  assert coco_ground_truth(coco, "val")["annotations"][0]["bbox"] == [30.0, 4.0, 10.7, 0.0]
  np.testing.assert_array_equal(_read(coco)[0].boxes[0], [30, 4, 40, 4])
  # neither the box of height 0 nor the crowd is trained on
  with eval_batches(coco, "train[:1]", batch_size=1) as batches:
    assert not next(batches)["gt_valid_BG"].any()


@pytest.mark.parametrize(
  "without", [lambda a: a.pop("segmentation"), lambda a: a.update(segmentation=[])]
)
def test_boxes_without_masks(without, tmp_path):
  """Many tools write them; a detector accepts them, a mask head does not."""
  source = tmp_path / "source"
  content = write_coco(source)
  for annotation in content["annotations"]:
    without(annotation)
    annotation.update(iscrowd=0)
  for split in ("train", "val"):
    (source / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
  coco = config("coco", tmp_path / "data", source=str(source))
  data.prepare(coco)
  boxes = [a["bbox"] for a in coco_ground_truth(coco, "train")["annotations"]]
  assert boxes == [a["bbox"] for a in content["annotations"]]
  assert all(instances.unpack_bitmaps(record.bitmaps).all() for record in _read(coco))
  assert not data.info(coco).has_masks
  detection.adopt_classes(coco_box.get_config(), data.info(coco))
  with pytest.raises(UserError, match=r"boxes without masks; use configs/coco_box.py or"):
    detection.adopt_classes(coco_mask_config.get_config(), data.info(coco))


def test_splits_of_the_user(tmp_path):
  write_coco(tmp_path / "source")
  (tmp_path / "source/train2017").rename(tmp_path / "pictures")
  coco = config(
    "coco",
    tmp_path / "data",
    source=str(tmp_path / "source"),
    builder={
      "splits": {"mine": ("annotations/instances_val2017.json", str(tmp_path / "pictures"))}
    },
  )
  data.prepare(coco)
  assert data.info(coco).num_images == {"mine": 4}


def test_prepared_data_are_never_overwritten(coco, tmp_path):
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")}
  data.prepare(coco)
  content = write_coco(tmp_path / "other")
  content["annotations"].pop()
  (tmp_path / "other/annotations/instances_val2017.json").write_text(json.dumps(content))
  coco.source = str(tmp_path / "other")
  with pytest.raises(
    UserError, match=r"was prepared from .*source, not from .*other: .*val2017.json has"
  ):
    data.prepare(coco)
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")} == before
  coco.source = ""  # the records suffice, the source is not needed
  assert data.info(coco).num_images["val"] == 4


def test_splits_larger_than_memory_are_sorted_in_parts(tmp_path, monkeypatch):
  write_coco(tmp_path / "source")
  coco = config("coco", tmp_path / "data", source=str(tmp_path / "source"))
  parts = set()
  original = shuffle.get_bucket_number

  def note(hkey, num_buckets, max_hkey=None):
    parts.add(original(hkey, num_buckets, max_hkey))
    return original(hkey, num_buckets, max_hkey)

  monkeypatch.setattr(shuffle, "get_bucket_number", note)
  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 10)
  data.prepare(coco)
  assert parts == {0, 250, 500, 750}
  assert [r.image_id for r in _read(coco)] == [70, 5, 6, 9]


def test_incomplete_records_of_a_killed_prepare_are_not_used(coco, tmp_path):
  folder = tmp_path / "data" / "coco_instances" / "1.0.0"
  killed = folder.with_name("incomplete.ABC123_1.0.0")
  folder.rename(killed)
  (killed / "dataset_info.json").unlink()
  assert not data.is_prepared(coco)
  data.prepare(coco)
  assert data.is_prepared(coco)


def test_half_a_folder_is_refused(coco, tmp_path):
  (tmp_path / "data/coco_instances/1.0.0/dataset_info.json").unlink()
  with pytest.raises(UserError, match=r"coco_instances/1.0.0 is incomplete; delete it"):
    data.prepare(coco)


def test_real_coco_comes_back_whole(real_coco):
  assert data.info(real_coco).num_images == {"train": 200, "val": 100}
  for split, bare in (("train", 2), ("val", 0)):
    path = pathlib.Path(real_coco.source) / "annotations" / f"instances_{split}2017.json"
    original = json.loads(path.read_text())
    rebuilt = coco_ground_truth(real_coco, split)
    by_id = {a["id"]: a for a in original["annotations"]}
    assert {a["id"]: a for a in rebuilt["annotations"]} == by_id
    assert [i["id"] for i in rebuilt["images"]] == [i["id"] for i in original["images"]]
    annotated = {a["image_id"] for a in original["annotations"]}
    assert sum(i["id"] not in annotated for i in rebuilt["images"]) == bare
    assert [c["id"] for c in rebuilt["categories"]] == [c["id"] for c in original["categories"]]


def test_real_bitmaps_agree_with_the_masks(real_coco):
  overlaps = []
  for record in _read(real_coco, "val[:30]"):
    bitmaps = instances.unpack_bitmaps(record.bitmaps)
    for box, annotation, bitmap in zip(record.boxes, record.annotations, bitmaps, strict=True):
      x0, y0, x1, y1 = box
      if min(x1 - x0, y1 - y0) < 32:
        continue
      segmentation = instances.decode_annotation(annotation)["segmentation"]
      mask_HW = masks.rasterize(segmentation, *record.size)
      # look up the centre of each pixel in the bitmap
      rows, columns = (np.arange(n) + 0.5 for n in record.size)
      u, v = (columns - x0) / (x1 - x0) * 112, (rows - y0) / (y1 - y0) * 112
      inside = ((v >= 0) & (v < 112))[:, None] & ((u >= 0) & (u < 112))[None, :]
      seen = bitmap[v.clip(0, 111).astype(int)[:, None], u.clip(0, 111).astype(int)[None, :]]
      seen = seen.astype(bool) & inside
      overlaps.append((seen & (mask_HW > 0)).sum() / (seen | (mask_HW > 0)).sum())
  assert len(overlaps) > 30
  assert min(overlaps) > 0.85 and np.mean(overlaps) > 0.95


def _one_file(root, count=23, **fields):
  """A single annotation file of `count` images with ids 100, 99, ..., and its config."""
  content = write_coco(root)
  first, note = content["images"][0], content["annotations"][0]
  content["images"] = [first | {"id": 100 - i} for i in range(count)]
  content["annotations"] = [note | {"id": 7 + i, "image_id": 100 - i} for i in range(count)]
  file = root / "mine.json"
  file.write_text(json.dumps(content))
  paths = {"annotations": str(file), "images": str(root / "train2017")} | fields
  return content, config("coco", root / "data", **paths)


def test_one_file_is_divided_by_image_ids(tmp_path):
  content, coco = _one_file(tmp_path)
  data.prepare(coco)
  assert data.info(coco).num_images == {"train": 20, "val": 3}
  truth = {split: coco_ground_truth(coco, split) for split in ("train", "val")}
  assert [image["id"] for image in truth["val"]["images"]] == [98, 88, 78]
  assert [a["image_id"] for a in truth["val"]["annotations"]] == [98, 88, 78]
  for kind in ("images", "annotations"):
    together = truth["train"][kind] + truth["val"][kind]
    assert sorted(together, key=lambda e: -e["id"]) == sorted(content[kind], key=lambda e: -e["id"])
  # another file in the same folder has separate records
  other = tmp_path / "other.json"
  other.write_text((tmp_path / "mine.json").read_text())
  coco.annotations = str(other)
  assert not data.is_prepared(coco)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"images": ""}, ("data.images is empty",)),
    ({"annotations": ""}, ("data.annotations is empty",)),
    ({"annotations": "none.json"}, ("none.json: no such file; see data.annotations",)),
    ({"images": "nowhere"}, ("nowhere: no such folder; see data.annotations, data.images",)),
    ({"source": "coco"}, ("data.source and data.annotations exclude each other",)),
    ({"builder": {"splits": {"a": ("b", "c")}}}, ("data.builder.splits and",)),
    ({"name": "camvid"}, ("data.annotations is for data.name='coco', not for 'camvid'",)),
  ],
)
def test_paths_that_do_not_go_together(fields, words, tmp_path):
  _, coco = _one_file(tmp_path)
  coco.update(fields)
  with pytest.raises(UserError) as raised:
    data.prepare(coco)
  assert all(word in str(raised.value) for word in words)


def test_one_image_cannot_be_divided(tmp_path):
  _, coco = _one_file(tmp_path, count=1)
  with pytest.raises(UserError, match="1 images cannot be divided"):
    data.prepare(coco)


def test_a_bad_entry_of_a_single_file_is_named_once(tmp_path, caplog):
  content, coco = _one_file(tmp_path, skip_bad=True)
  content["annotations"][1]["image_id"] = [3]
  content["annotations"][2]["bbox"] = [1, 2]  # on the first image of "val"
  (tmp_path / "mine.json").write_text(json.dumps(content))
  with caplog.at_level("WARNING"):
    data.prepare(coco)
  assert len(re.findall("skipped: .*annotation id", caplog.text)) == 2
  assert "prepare train: 1 skipped: annotation: field image_id" in caplog.text
  assert "prepare val: 1 skipped: annotation: field bbox" in caplog.text
