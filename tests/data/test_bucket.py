"""Records in a bucket are written once, and copied to a disk, where they are read."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from fpt_jax import data
from fpt_jax.errors import UserError
from tests.data_sets import config, errors_of_preparing, write_coco

pytestmark = pytest.mark.usefixtures("bucket")


@pytest.fixture
def coco(tmp_path):
  """A data set that is not prepared, with `data_dir` in a bucket."""
  write_coco(tmp_path / "source")
  fields = {"source": str(tmp_path / "source"), "cache_dir": str(tmp_path / "cache")}
  return config("coco", "gs://b/data", **fields)


def files(folder):
  (info,) = folder.rglob("dataset_info.json")
  return {path.name: path.read_bytes() for path in info.parent.iterdir()}


def test_records_are_written_to_the_bucket_and_read_from_a_copy(coco, bucket, tmp_path, caplog):
  assert not data.is_prepared(coco)
  with pytest.raises(UserError, match=r"gs://b/data/coco\S* is not prepared; run --mode=prepare"):
    data.info(coco)
  data.prepare(coco)
  assert data.is_prepared(coco)
  written = files(bucket / "b/data")
  manifest = json.loads(written.pop("manifest.json"))
  for name, content in written.items():
    expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest.pop(name) == expected
  assert not manifest and not list(bucket.rglob("running.lock"))

  # another machine, to which the bucket is all that it has
  shutil.rmtree(tmp_path / "cache")
  shutil.rmtree(tmp_path / "source")
  found = list(data.examples(coco, "train"))
  assert files(tmp_path / "cache") == files(bucket / "b/data")
  local = config("coco", tmp_path / "local", source=str(tmp_path / "source"))
  write_coco(tmp_path / "source")
  data.prepare(local)
  for ours, theirs in zip(found, data.examples(local, "train"), strict=True):
    assert ours.keys() == theirs.keys()
    for name in ours:
      np.testing.assert_array_equal(ours[name], theirs[name])
  caplog.set_level("INFO")
  data.prepare(coco)
  assert "already prepared: gs://b/data/coco" in caplog.text


def test_several_preparations_at_a_time(coco, caplog):
  caplog.set_level("INFO")
  assert not errors_of_preparing(coco, times=3)
  assert caplog.text.count("preparing coco in") >= 1
  assert len(list(data.examples(coco, "val"))) == 4


def test_a_copy_of_other_records_is_replaced(coco, bucket, tmp_path):
  data.prepare(coco)
  content = json.loads((tmp_path / "source/annotations/instances_val2017.json").read_text())
  content["annotations"] = content["annotations"][:1]
  (tmp_path / "source/annotations/instances_val2017.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"gs://b/data/coco\S* was prepared from other inputs"):
    data.info(coco)
  shutil.rmtree(bucket / "b/data")
  assert not data.is_prepared(coco)
  data.prepare(coco)
  assert [len(e["boxes_xyxy"]) for e in data.examples(coco, "val")] == [1, 0, 0, 0]
  # a machine with a copy of the earlier records
  (manifest,) = (tmp_path / "cache").rglob("manifest.json")
  manifest.write_text("{}")
  (manifest.parent / "metadata.json").write_text("{}")
  assert [len(e["boxes_xyxy"]) for e in data.examples(coco, "val")] == [1, 0, 0, 0]
  assert files(tmp_path / "cache") == files(bucket / "b/data")


def test_a_disk_without_room_for_a_copy(coco, tmp_path, monkeypatch):
  data.prepare(coco)
  shutil.rmtree(tmp_path / "cache")
  usage = shutil.disk_usage(tmp_path)._replace(free=10)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(UserError, match=r"data\.cache_dir: the copy of gs://b/data.*0 MB are free"):
    data.info(coco)


def test_damage_in_the_bucket_is_noticed(coco, bucket, tmp_path):
  data.prepare(coco)
  shutil.rmtree(tmp_path / "cache")
  (metadata,) = bucket.rglob("metadata.json")
  metadata.write_bytes(metadata.read_bytes()[:-1] + b" ")
  message = r"gs://b/data/coco.*metadata\.json has another content .*; delete gs://b/data/coco"
  with pytest.raises(UserError, match=message):
    data.info(coco)
  metadata.unlink()
  with pytest.raises(UserError, match=r"metadata\.json cannot be read \(.*; check the bucket"):
    data.info(coco)
  assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("data_dir", "gs:/b/data", r"data\.data_dir=gs:/b/data must be a local path or begin with"),
    ("cache_dir", "gs://b/cache", r"data\.cache_dir=gs://b/cache must be a folder on a local disk"),
  ],
)
def test_folders_of_other_kinds_are_refused(coco, field, value, message):
  coco[field] = value
  with pytest.raises(UserError, match=message):
    data.prepare(coco)
