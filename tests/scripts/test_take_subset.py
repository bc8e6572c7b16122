"""Small data sets that are cut out of COCO and VOC hold what the list of images says."""

import json
import sys

import pytest

from scripts import take_subset


@pytest.fixture
def take(tmp_path, monkeypatch):
  """Runs the script with a list of two images of each data set."""
  subsets = {"coco": {"val": [2, 5]}, "voc2012": {"val": ["a", "c"]}}
  (tmp_path / "subsets.json").write_text(json.dumps(subsets))
  monkeypatch.setattr(take_subset, "SUBSETS", tmp_path / "subsets.json")

  def run(name):
    monkeypatch.setattr(
      sys, "argv", ["take_subset.py", name, str(tmp_path / "full"), str(tmp_path / "small")]
    )
    take_subset.main()
    return tmp_path / "small"

  return run


def test_coco(take, tmp_path):
  full = tmp_path / "full"
  (full / "annotations").mkdir(parents=True)
  (full / "val2017").mkdir()
  annotations = {
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 5)],
    "annotations": [{"id": 10 + i, "image_id": i} for i in (1, 2, 2)],
    "categories": [{"id": 1, "name": "a"}],
  }
  (full / "annotations/instances_val2017.json").write_text(json.dumps(annotations))
  for i in (1, 2, 5):
    (full / "val2017" / f"{i}.jpg").write_bytes(b"%d" % i)
  small = take("coco")
  found = json.loads((small / "annotations/instances_val2017.json").read_text())
  assert [image["id"] for image in found["images"]] == [2, 5]
  assert [annotation["id"] for annotation in found["annotations"]] == [12, 12]
  assert found["categories"] == annotations["categories"]
  assert {file.name: file.read_bytes() for file in (small / "val2017").iterdir()} == {
    "2.jpg": b"2",
    "5.jpg": b"5",
  }


def test_voc(take, tmp_path):
  for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
    (tmp_path / "full" / folder).mkdir(parents=True)
    for name in "abc":
      (tmp_path / "full" / folder / f"{name}.{ending}").write_text(name)
  small = take("voc2012")
  assert (small / "ImageSets/Segmentation/val.txt").read_text() == "a\nc\n"
  assert sorted(file.name for file in (small / "SegmentationClass").iterdir()) == ["a.png", "c.png"]
  assert (small / "JPEGImages/c.jpg").read_text() == "c"


def test_another_data_set_is_refused(take):
  with pytest.raises(SystemExit, match=r"does not exist; is .*full complete"):
    take("voc2012")
