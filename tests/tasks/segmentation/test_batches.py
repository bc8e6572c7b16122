"""Batches of label maps have the right pixels in the right order for any step and host."""

import collections

import numpy as np
import PIL.Image
import pytest

from fpt_jax import data
from fpt_jax.configs.segmentation import segmentation
from fpt_jax.data import canvases, crops, order, transforms
from fpt_jax.data.datasets import label_maps
from fpt_jax.data.reader import Reader
from fpt_jax.errors import UserError
from fpt_jax.tasks.detection import batches as detection_batches
from fpt_jax.tasks.segmentation.batches import eval_batches, images, train_batches
from tests.data_sets import label_config

SIZES = [(20, 30), (33, 17), (40, 40), (21, 30), (64, 50), (19, 29), (40, 39)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns the config of seven images of different sizes; a pixel's label is its red channel / 50."""
  root = tmp_path_factory.mktemp("folder")
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for kind in ("images", "labels"):
      (root / kind / split).mkdir(parents=True)
    for i, size in enumerate(SIZES):
      label = np.kron(rng.integers(0, 5, (8, 8), np.uint8), np.ones((8, 8), np.uint8))
      label = label[: size[0], : size[1]]
      image = np.stack([label * 50, *rng.integers(0, 256, (2, *size), np.uint8)], -1)
      PIL.Image.fromarray(image).save(root / "images" / split / f"{i}.png")
      PIL.Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
  config = label_config("image_folder", root / "data", source=str(root), builder={"num_classes": 5})
  data.prepare(config)
  return config


def _changed(config, **fields):
  config = config.copy_and_resolve_references()
  config.update(fields)
  return config


def _take(batches, count):
  with batches:
    return [next(batches) for _ in range(count)]


def _assert_equal(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_shapes_and_dtypes_of_a_training_batch(folder):
  (batch,) = _take(train_batches(folder, batch_size=4, seed=0), 1)
  assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
    "image_BHWC": ((4, 24, 32, 3), np.float32),
    "label_BHW": ((4, 24, 32), np.int32),
    "size_B2": ((4, 2), np.int32),
    "original_size_B2": ((4, 2), np.int32),
    "image_id_B": ((4,), np.int64),
    "file_name_B": ((4,), object),
    "valid_B": ((4,), bool),
  }
  assert batch["valid_B"].all()


def test_images_as_bytes_are_rounded(folder):
  exact, stored = (
    _take(train_batches(_changed(folder, image_dtype=dtype), batch_size=4, seed=0), 1)[0]
    for dtype in ("float32", "uint8")
  )
  assert stored["image_BHWC"].dtype == np.uint8
  _assert_equal(stored, exact | {"image_BHWC": np.floor(exact["image_BHWC"] + 0.5)})


def test_training_crops_are_those_drawn(folder):
  """Each image of a batch is the drawn crop of the right file."""
  files = {
    name: (i, image_HWC, label_HW)
    for i, (name, image_HWC, label_HW) in enumerate(images(folder, "train"))
  }
  stream = order.TrainOrder(np.zeros(7, int), seed=5, batch_size=4)
  seen = collections.Counter()
  for step, batch in enumerate(_take(train_batches(folder, batch_size=4, seed=5), 7)):
    np.testing.assert_array_equal(batch["image_id_B"], stream.batch(step)[0] + 1)
    for b in range(4):
      index, image_HWC, label_HW = files[batch["file_name_B"][b].decode()]
      assert batch["image_id_B"][b] == index + 1
      seen[index] += 1
      crop = crops.draw(5, 4 * step + b, SIZES[index], (24, 32), scale=(0.5, 2.0), flip=True)
      if crop.mirrored:
        image_HWC, label_HW = image_HWC[:, ::-1], label_HW[:, ::-1]
      whole = transforms.resize_and_pad(image_HWC, crop.size, crop.size).numpy()
      (y, x), (h, w) = crop.offset, crop.valid
      np.testing.assert_array_equal(batch["size_B2"][b], (h, w))
      np.testing.assert_allclose(
        batch["image_BHWC"][b, :h, :w], whole[y : y + h, x : x + w], atol=0.02
      )
      assert (batch["image_BHWC"][b, h:] == 0).all() and (batch["image_BHWC"][b, :, w:] == 0).all()
      rows = ((y + np.arange(h) + 0.5) * SIZES[index][0] / crop.size[0]).astype(int)
      columns = ((x + np.arange(w) + 0.5) * SIZES[index][1] / crop.size[1]).astype(int)
      np.testing.assert_array_equal(batch["label_BHW"][b, :h, :w], label_HW[np.ix_(rows, columns)])
      outside = np.ones((24, 32), bool)
      outside[:h, :w] = False
      assert (batch["label_BHW"][b][outside] == 255).all()
      assert (batch["label_BHW"][b][~outside] < 5).all()
  assert set(seen.values()) == {4}  # 28 positions for 7 images, none left out


def test_labels_are_aligned_with_their_image(folder):
  for batch in _take(train_batches(folder, batch_size=4, seed=1), 5):
    for image_HWC, label_HW in zip(batch["image_BHWC"], batch["label_BHW"], strict=True):
      on_HW = label_HW < 255
      assert (np.abs(image_HWC[..., 0] / 50 - label_HW) < 0.5)[on_HW].mean() > 0.75


def test_any_step_can_be_the_first(folder):
  whole = _take(train_batches(folder, batch_size=3, seed=2), 6)
  part = _take(train_batches(folder, batch_size=3, seed=2, start_step=4), 2)
  for one, other in zip(whole[4:], part, strict=True):
    _assert_equal(one, other)
  other = _take(train_batches(folder, batch_size=3, seed=3), 1)[0]
  assert not np.array_equal(whole[0]["image_BHWC"], other["image_BHWC"])


def test_hosts_read_the_shares_of_one_batch(folder):
  (whole,) = _take(train_batches(folder, batch_size=4, seed=0), 1)
  parts = [
    _take(train_batches(folder, batch_size=4, seed=0, process_index=i, process_count=2), 1)[0]
    for i in range(2)
  ]
  _assert_equal(whole, {k: np.concatenate([part[k] for part in parts]) for k in whole})
  with pytest.raises(UserError, match="batch_size=4 cannot be shared by 3 hosts"):
    train_batches(folder, batch_size=4, seed=0, process_count=3)


def test_mirrored_people_change_sides(tmp_path):
  """If the left half of an image is a left arm, the right half of its mirror image is a right arm."""
  for kind in ("images", "segmentations"):
    (tmp_path / f"train_{kind}").mkdir()
  label = np.array([[14] * 8 + [19] * 8] * 12, np.uint8)
  PIL.Image.fromarray(np.stack([label] * 3, -1) * 10).save(tmp_path / "train_images" / "1.png")
  PIL.Image.fromarray(label).save(tmp_path / "train_segmentations" / "1.png")
  config = label_config(
    "lip",
    tmp_path / "data",
    source=str(tmp_path),
    crop=(12, 16),
    scale=(1.0, 1.0),
    builder={"splits": ("train",)},
  )
  data.prepare(config)
  (batch,) = _take(train_batches(config, batch_size=16, seed=0), 1)
  mirrored_B = batch["image_BHWC"][:, 0, 0, 0] == 190
  assert 2 < mirrored_B.sum() < 14
  for label_HW, mirrored in zip(batch["label_BHW"], mirrored_B, strict=True):
    expected = [[18] * 8 + [15] * 8] if mirrored else [[14] * 8 + [19] * 8]
    np.testing.assert_array_equal(label_HW, expected * 12)
  (still,) = _take(train_batches(_changed(config, flip=False), batch_size=16, seed=0), 1)
  np.testing.assert_array_equal(still["label_BHW"], label[None].repeat(16, 0))


def test_shorter_edges_instead_of_scales(folder):
  config = _changed(folder, train_sizes=(10, 20, 30), crop=(30, 30))
  seen = set()
  for batch in _take(train_batches(config, batch_size=4, seed=0), 6):
    assert batch["image_BHWC"].shape == (4, 30, 30, 3)
    seen |= {min(size) for size in batch["size_B2"].tolist()}
  assert seen == {10, 20, 30}


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_evaluation_reads_every_image_once_and_whole(folder, batch_size):
  files = {name: (image, label) for name, image, label in images(folder, "val")}
  seen = []
  with eval_batches(folder, "val", batch_size=batch_size) as batches:
    for batch in batches:
      canvas = batch["image_BHWC"].shape[1:3]
      assert canvas == batch["label_BHW"].shape[1:]
      for b in range(batch_size):
        if not batch["valid_B"][b]:
          assert batch["image_id_B"][b] == -1
          continue
        name = batch["file_name_B"][b].decode()
        seen.append(name)
        image_HWC, label_HW = files[name]
        h, w = size = image_HWC.shape[:2]
        assert canvas == tuple(-(-edge // 32) * 32 for edge in size)
        assert batch["image_id_B"][b] == 8 + int(name[0])
        np.testing.assert_array_equal(batch["size_B2"][b], size)
        np.testing.assert_array_equal(batch["original_size_B2"][b], size)
        np.testing.assert_array_equal(batch["image_BHWC"][b, :h, :w], image_HWC)
        assert batch["image_BHWC"][b].sum() == image_HWC.sum()
        for key in ("label_BHW", "original_label_BHW"):
          np.testing.assert_array_equal(batch[key][b, :h, :w], label_HW)
          assert (batch[key][b] != 255).sum() == h * w
  assert sorted(seen) == sorted(files)


def test_evaluation_at_another_size_keeps_the_labels_of_the_file(folder):
  config = _changed(folder, short_edge=12, buckets=((16, 24), (32, 16)))
  files = {name: label for name, _, label in images(folder, "val")}
  count = 0
  with eval_batches(config, "val", batch_size=2) as batches:
    for batch in batches:
      assert batch["image_BHWC"].shape[1:3] in ((16, 24), (32, 16))
      for b in np.flatnonzero(batch["valid_B"]):
        count += 1
        label_HW = files[batch["file_name_B"][b].decode()]
        h, w = label_HW.shape
        np.testing.assert_array_equal(batch["original_size_B2"][b], (h, w))
        np.testing.assert_array_equal(batch["original_label_BHW"][b, :h, :w], label_HW)
        size = crops.short_edge_size((h, w), 12)
        np.testing.assert_array_equal(batch["size_B2"][b], size)
        rows, columns = (
          ((np.arange(n) + 0.5) * o / n).astype(int) for n, o in zip(size, (h, w), strict=True)
        )
        expected = np.full(batch["label_BHW"].shape[1:], 255)
        expected[: size[0], : size[1]] = label_HW[np.ix_(rows, columns)]
        np.testing.assert_array_equal(batch["label_BHW"][b], expected)
  assert count == len(SIZES)


def test_hosts_share_an_evaluation(folder):
  def read(**hosts):
    with eval_batches(folder, "val[:5]", batch_size=2, **hosts) as batches:
      return list(batches)

  whole, *parts = read(), *(read(process_index=i, process_count=2) for i in range(2))
  assert len(whole) == len(parts[0]) == len(parts[1])
  for one, *two in zip(whole, *parts, strict=True):
    _assert_equal(one, {k: np.concatenate([part[k] for part in two]) for k in one})


def test_many_canvases_are_logged(folder, caplog, monkeypatch):
  monkeypatch.setattr(canvases, "_MANY", 6)
  with caplog.at_level("WARNING"):
    eval_batches(folder, "val", batch_size=1).close()
    assert "canvases" not in caplog.text
    eval_batches(_changed(folder, canvas_multiple=1), "val", batch_size=1).close()
  assert "canvases of 7 sizes" in caplog.text and "data.canvas_multiple=1" in caplog.text


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"train_split": "test"}, r"split 'test' cannot be read"),
  ],
)
def test_splits_that_do_not_exist_are_reported(folder, fields, message):
  with pytest.raises(UserError, match=message):
    train_batches(_changed(folder, **fields), batch_size=1, seed=0)


def test_canvases_that_do_not_fit_are_reported(folder):
  with pytest.raises(UserError, match=r"64x50 \(height x width\) fits none"):
    eval_batches(_changed(folder, buckets=((50, 50),)), "val", batch_size=1)
  with pytest.raises(UserError, match=r"data.canvas_multiple=0"):
    eval_batches(_changed(folder, canvas_multiple=0), "val", batch_size=1)


def test_the_error_of_damaged_labels_names_their_record(folder, tmp_path, monkeypatch):
  encode = label_maps.encode_png
  monkeypatch.setattr(label_maps, "encode_png", lambda label_HW: encode(label_HW)[:-20])
  broken = _changed(folder, data_dir=str(tmp_path))
  data.prepare(broken)
  for reading in (
    eval_batches(broken, "val[2:]", batch_size=1),
    images(broken, "val[2:]"),
  ):
    with pytest.raises(UserError, match=r"record \d of split val in .*png: labels: .*") as error:
      next(reading)
    assert "the file is truncated; delete the folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_default_config_reads_an_image_folder(folder, tmp_path):
  config = segmentation().data
  fields_on_the_command_line = {
    "name": "image_folder",
    "source": folder.source,
    "data_dir": str(tmp_path),
    "builder.num_classes": 5,
    "builder.splits": ("val", "train"),
    "crop": (24, 32),
  }
  config.update_from_flattened_dict(fields_on_the_command_line)
  data.prepare(config)
  ours = _take(train_batches(config, batch_size=2, seed=0), 2)
  theirs = _take(train_batches(_changed(folder, image_dtype="uint8"), batch_size=2, seed=0), 2)
  for one, other in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(one["image_BHWC"], other["image_BHWC"])
    np.testing.assert_array_equal(one["label_BHW"], other["label_BHW"])
  with eval_batches(config, config.eval_split, batch_size=7) as batches:
    assert sum(batch["valid_B"].sum() for batch in batches) == 7


def test_context_shapes_serve_both_tasks(shapes):
  config = label_config("context_shapes", shapes.data_dir, crop=(64, 64), builder=shapes.builder)
  (batch,) = _take(train_batches(config, batch_size=2, seed=0), 1)
  assert batch["image_BHWC"].shape == (2, 64, 64, 3)
  with eval_batches(config, "val", batch_size=5) as batches:
    (batch,) = batches
  assert set(np.unique(batch["label_BHW"])) <= set(range(7)) and 0 in batch["label_BHW"]
  (detection,) = _take(detection_batches.eval_batches(shapes, "val", batch_size=5), 1)
  np.testing.assert_array_equal(batch["image_BHWC"], detection["image_BHWC"])
  for b in range(5):
    found = set(np.unique(batch["label_BHW"][b])) - {0}
    assert found == set(detection["gt_labels_BG"][b][detection["gt_valid_BG"][b]])


def test_real_images_fit_the_largest_crops(real_data, tmp_path):
  config = label_config(
    "ade20k",
    tmp_path,
    source=str(real_data / "ade20k_sample"),
    train_split="val",
    crop=(569, 569),
    train_sizes=(269, 369, 469, 569),
    builder={"splits": ("val",)},
  )
  data.prepare(config)
  (batch,) = _take(train_batches(config, batch_size=6, seed=0), 1)
  edges_B = batch["size_B2"].min(1)
  assert set(edges_B) <= {269, 369, 469, 569}
  for b in range(6):
    h, w = batch["size_B2"][b]
    assert ((batch["label_BHW"][b] < 150) | (batch["label_BHW"][b] == 255)).all()
    assert batch["image_BHWC"][b, :h, :w].mean() > 20


def test_reader_recognises_both_kinds_of_records(folder, shapes):
  assert Reader(folder, "val").read(0).label and Reader(shapes, "val").read(0).bitmaps
