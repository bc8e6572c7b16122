#!/usr/bin/env python3
"""Makes the small data sets of docs/results.md from the full COCO 2017 and PASCAL VOC 2012.

    python scripts/take_subset.py coco /data/coco /data/coco_small
    python scripts/take_subset.py voc2012 /data/VOCdevkit/VOC2012 /data/voc2012_small

The images are named in docs/results/subsets.json. Pictures become links to those of the full data set. Both
splits of the VOC subset are parts of the official validation set.
"""

import argparse
import json
import pathlib
import sys

SUBSETS = pathlib.Path(__file__).resolve().parent.parent / "docs" / "results" / "subsets.json"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("name", choices=("coco", "voc2012"))
  parser.add_argument("source", type=pathlib.Path, help="folder of the full data set")
  parser.add_argument("target", type=pathlib.Path, help="folder to write; it must not exist")
  options = parser.parse_args()
  if options.target.exists():
    parser.error(f"{options.target} exists; delete it or choose another folder")
  take = take_coco if options.name == "coco" else take_voc
  for split, images in json.loads(SUBSETS.read_text())[options.name].items():
    try:
      take(split, images, options.source, options.target)
    except FileNotFoundError as error:
      sys.exit(f"error: {error.filename} does not exist; is {options.source} complete?")
    print(f"{options.target}: {len(images)} images of {split}")


def take_coco(split: str, ids: list[int], source: pathlib.Path, target: pathlib.Path) -> None:
  file = pathlib.Path("annotations", f"instances_{split}2017.json")
  annotations = json.loads((source / file).read_text())
  wanted = set(ids)
  for key, field in (("images", "id"), ("annotations", "image_id")):
    annotations[key] = [item for item in annotations[key] if item[field] in wanted]
  if len(annotations["images"]) < len(ids):
    sys.exit(f"error: {source / file} lacks images of the subset; it is not that of COCO 2017")
  for image in annotations["images"]:
    link(pathlib.Path(f"{split}2017", image["file_name"]), source, target)
  (target / file).parent.mkdir(parents=True, exist_ok=True)
  (target / file).write_text(json.dumps(annotations))


def take_voc(split: str, names: list[str], source: pathlib.Path, target: pathlib.Path) -> None:
  for name in names:
    link(pathlib.Path("JPEGImages", f"{name}.jpg"), source, target)
    link(pathlib.Path("SegmentationClass", f"{name}.png"), source, target)
  file = target / "ImageSets" / "Segmentation" / f"{split}.txt"
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text("".join(f"{name}\n" for name in names))


def link(file: pathlib.Path, source: pathlib.Path, target: pathlib.Path) -> None:
  (target / file).parent.mkdir(parents=True, exist_ok=True)
  (target / file).symlink_to((source / file).resolve(strict=True))


if __name__ == "__main__":
  main()
