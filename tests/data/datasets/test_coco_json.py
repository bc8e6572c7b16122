"""Each field of an annotation file has its type, or is refused with the place and the value."""

import json
import pathlib
import re

import pytest

from fpt_jax.data.datasets import coco_json
from fpt_jax.data.datasets.checks import BadRecordError, quoted
from fpt_jax.errors import UserError

HEIGHT, WIDTH = 20, 40
FILE = pathlib.Path("a.json")
INF, NAN = float("inf"), float("nan")
GOOD = {
  "id": 7,
  "image_id": 5,
  "category_id": 90,
  "bbox": [2, 1.5, 10, 4],
  "segmentation": [[2, 1.5, 12, 1.5, 12, 5.5, 2, 5.5]],
}
NOT_NUMBERS = ["5", "", None, True, [], [5], {}, NAN, INF, -INF, 10**400]


def _read(tmp_path, text):
  path = tmp_path / "a.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return coco_json.read_file(path)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("[" * 100_000, "nested too deeply"),
    ('{"images":' * 100_000, "nested too deeply"),
    ('{"images": [' + "9" * 4400 + "]}", "a number has thousands of digits"),
    ('{"images": [-' + "9" * 100_000 + "]}", "a number has thousands of digits"),
    (b'{"images": "\xff"}', "not text in UTF-8"),
    ("{}".encode("utf-16"), "not text in UTF-8"),
    ("", "line 1, column 1: not valid JSON"),
    ('{"images": [],\n', "line 2, column 1: not valid JSON"),
    ('{"images": {}, "annotations": [], "categories": []}', "field images must be a list"),
    ("null", "field images must be a list"),
  ],
)
def test_files_that_are_not_annotations(tmp_path, text, words):
  with pytest.raises(UserError, match=words) as raised:
    _read(tmp_path, text)
  assert "\n" not in str(raised.value) and str(tmp_path / "a.json") in str(raised.value)
  assert len(str(raised.value)) < 300


def test_a_byte_order_mark_is_skipped(tmp_path):
  content = {"images": [], "annotations": [], "categories": []}
  assert _read(tmp_path, b"\xef\xbb\xbf" + json.dumps(content).encode()) == content


def test_a_file_that_cannot_be_opened(tmp_path):
  with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
    coco_json.read_file(tmp_path)


@pytest.mark.parametrize(
  ("categories", "words"),
  [
    ([5], r"categories\[0\]: must be an object"),
    ([{"name": "ant"}], r"categories\[0\]: field id must be an integer .* not None"),
    ([{"id": "1", "name": "ant"}], r"field id must be an integer of at most 64 bits, not '1'"),
    ([{"id": 1.0, "name": "ant"}], "not 1.0"),
    ([{"id": True, "name": "ant"}], "not True"),
    ([{"id": 2**63, "name": "ant"}], "not 9223372036854775808"),
    ([{"id": 10**4299, "name": "ant"}], r"not 1000.*\.\.\..*000;"),
    ([{"id": 1, "name": "ant"}, {"id": 1, "name": "bee"}], r"categories\[1\]: id 1 is used twice"),
    (
      [{"id": 2, "name": "ant"}, {"id": 1, "name": "ant"}],
      r"name of categories\[1\]: 'ant' is given",
    ),
    ([{"id": 1}], r"field name of categories\[0\]: None must be a string"),
    ([{"id": 1, "name": 5}], r"field name of categories\[0\]: 5 must be a string"),
    ([{"id": 1, "name": " "}], r"categories\[0\]: ' ' must be a string that is not empty"),
    ([{"id": 1, "name": "a\0"}], r"'a\\x00' has a character that is not text"),
    ([{"id": 1, "name": "\ud800"}], r"'\\ud800' has a character that is not text"),
    ([], "categories is empty"),
  ],
)
def test_categories(categories, words):
  with pytest.raises(UserError, match=words) as raised:
    coco_json.read_categories(FILE, categories)
  message = str(raised.value)
  message.encode()
  assert "\n" not in message and message.startswith("a.json: ") and len(message) < 300


def test_ids_of_64_bits_are_kept():
  ids = [-(2**63), 0, 2**63 - 1]
  categories = [{"id": i, "name": str(i)} for i in reversed(ids)]
  assert list(coco_json.read_categories(FILE, categories)) == ids
  bad = coco_json.BadEntries(FILE, skip=False)
  images = coco_json.index_images([{"id": i} for i in ids], bad)
  note = GOOD | {"image_id": 2**63 - 1, "category_id": 0, "id": -(2**63)}
  assert coco_json.group_annotations([note], images, {0: 1}, bad)[2**63 - 1] == [note]


@pytest.mark.parametrize("field", ["id", "image_id", "category_id"])
@pytest.mark.parametrize(
  "value", [*NOT_NUMBERS, 5.0, 5.5, "a\nb", 2**63, -(2**63) - 1, 10**4299], ids=quoted
)
def test_ids_of_other_types(field, value):
  """The image and the category have the ids 0, 1 and 5, so that False, True and 5.0 equal one of them."""
  bad = coco_json.BadEntries(FILE, skip=False)
  ids = {0: {}, 1: {}, 5: {}}
  with pytest.raises(UserError, match=rf"field {field} must be .*integer") as raised:
    coco_json.group_annotations(
      [GOOD | {"category_id": 5, field: value}], ids, dict.fromkeys(ids, 1), bad
    )
  message = str(raised.value)
  assert message.startswith("a.json: annotation id ") and "\n" not in message and len(message) < 400
  if field == "id":
    with pytest.raises(UserError, match=r"a\.json: image id .*: field id must be an integer"):
      coco_json.index_images([{"id": value}], bad)


@pytest.mark.parametrize("value", ["1", 1.0, True, None, [1], 2**63], ids=quoted)
def test_images_without_usable_ids_are_not_counted_but_named(value):
  content = {"images": [{"id": 3}, {"id": value}], "annotations": [], "categories": []}
  with pytest.raises(UserError, match=r"field id; it must be an integer .* not ") as raised:
    coco_json.part_of_split(content, FILE, "train")
  assert "0 images" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["height", "width"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -20, 20.0, 20.5, 2**31, 10**4299], ids=quoted)
def test_sizes_of_other_types(field, value):
  image = {"file_name": "a.png", "height": 20, "width": 20, field: value}
  with pytest.raises(BadRecordError, match=f"field {field} must be a positive integer"):
    coco_json.check_image(image)


@pytest.mark.parametrize("name", ["", None, 5, ["a.png"], "a\0.png", "\ud800.png", "../a", "/a"])
def test_file_names(name):
  with pytest.raises(BadRecordError, match="field file_name") as raised:
    coco_json.check_image({"file_name": name, "height": 20, "width": 20})
  str(raised.value).encode()


@pytest.mark.parametrize(
  ("value", "crowd"), [(0, 0), (1, 1), (False, 0), (True, 1), (1.0, 1), (0.0, 0)]
)
def test_crowds(value, crowd):
  assert coco_json.is_crowd({"iscrowd": value}) is bool(crowd)
  assert coco_json.is_crowd({}) is False


@pytest.mark.parametrize(
  "value",
  ["0", "1", "", "false", "true", None, 2, -1, 0.5, NAN, INF, [], [0], {}, 10**4299],
  ids=quoted,
)
def test_crowds_of_other_types(value):
  with pytest.raises(BadRecordError, match="field iscrowd must be 0 or 1"):
    coco_json.is_crowd({"iscrowd": value})


@pytest.mark.parametrize(
  "value", [v for v in NOT_NUMBERS if v is not None] + [-1, -0.5, 1e39], ids=quoted
)
def test_areas_of_other_types(value):
  with pytest.raises(BadRecordError, match="field area must be a number of pixels"):
    coco_json.check_area(value)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=quoted)
@pytest.mark.parametrize("place", range(4))
def test_boxes_of_other_types(value, place):
  box = [2, 1.5, 10, 4]
  box[place] = value
  with pytest.raises(BadRecordError, match="field bbox must be four numbers") as raised:
    coco_json.check_box({"bbox": box}, (HEIGHT, WIDTH))
  assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
  "box", [None, "2 1 3 4", 5, {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2], [3, 4]]]
)
def test_boxes_of_other_forms(box):
  with pytest.raises(BadRecordError, match="field bbox must be four numbers"):
    coco_json.check_box({"bbox": box}, (HEIGHT, WIDTH))


POLYGON = GOOD["segmentation"][0]
PAIRS = [[2, 1.5], [12, 1.5], [12, 5.5], [2, 5.5]]


@pytest.mark.parametrize(
  ("segmentation", "words"),
  [
    (POLYGON, r"one flat list of numbers: \[2, 1.5, 12, .* a list of polygons is needed, \[\[x0"),
    ([[POLYGON]], r"a polygon that is not a flat list .*; write \[x0, y0, x1, y1, \.\.\.\]"),
    ([PAIRS], r"a polygon that is not a flat list of numbers: \[\[2, 1.5\], \[12"),
    (PAIRS, r"one list of points: \[\[2, 1.5\], .* a list of polygons is needed, \[\[x0"),
    ([[{"x": 2, "y": 1.5}]], "a polygon that is not a flat list of numbers"),
    ([{"size": [HEIGHT, WIDTH], "counts": [800]}], "not a list of finite numbers: {'counts'"),
    ([[]], "at least 3 points: 0 points"),
    ([POLYGON, POLYGON[:4]], "at least 3 points: 2 points"),
    ([POLYGON[:7]], "at least 3 points: 3.5 points"),
    ([POLYGON, None], "not a list of finite numbers: None"),
    ([[*POLYGON[:-1], "5.5"]], "not a list of finite numbers"),
    ([[*POLYGON[:-1], NAN]], "not a list of finite numbers"),
    ([[*POLYGON[:-1], True]], "not a list of finite numbers"),
    ([[*POLYGON[:-1], 10**400]], "not a list of finite numbers"),
    ([[*POLYGON[:-1], 10**20]], "far outside the image"),
    (["2 1 12 1 12 5"], "not a list of finite numbers: '2 1"),
    ("=3300000a0", "neither polygons nor run lengths: '=33"),
    (5, "neither polygons nor run lengths: 5"),
    (0, "neither polygons nor run lengths: 0"),
    (None, "field segmentation is missing"),
    ([], "field segmentation is missing"),
  ],
)
def test_polygons_of_other_forms(segmentation, words):
  with pytest.raises(BadRecordError) as raised:
    coco_json.check_segmentation(GOOD | {"segmentation": segmentation}, (HEIGHT, WIDTH))
  message = f"{raised.value.kind}: {raised.value.detail}"
  assert re.search(words, message) and "\n" not in message


# the columns 2 to 11, as runs and compressed
COLUMNS, COMPRESSED = [40, 200, 560], "X1X6`a0"


@pytest.mark.parametrize(
  "counts",
  [
    COLUMNS[:2],
    [*COLUMNS, 1],
    [40, 200, 561],
    [840, -40],
    [40, 200, -1, 561],
    [40.0, 200.0, 560.0],
    ["40", "200", "560"],
    [True, 239, 560],
    [2**64 + 800],
    [10**4299],
    [NAN],
    [],
    "",
    COMPRESSED[:-1],  # ends within a number
    COMPRESSED[:2],
    COMPRESSED[: len(COMPRESSED) // 2 + 1],
    COMPRESSED + "0",  # more pixels than the image: 0 is the difference to the last but one
    COMPRESSED + "1",
    "A" + COMPRESSED,
    "X1X6~a0",
    "X1X6 a0",
    "X1\u00ff",
    "O",  # -1
    "o" * 100_000,
    None,
    5,
    {},
    True,
  ],
)
def test_run_lengths_of_other_values(counts):
  """Whatever the form, runs that do not cover the image exactly never become a mask."""
  segmentation = {"size": [HEIGHT, WIDTH], "counts": counts}
  box = {"bbox": [2, 0, 10, 20]}
  good = box | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": COMPRESSED}}
  coco_json.check_segmentation(good, (HEIGHT, WIDTH))
  with pytest.raises(BadRecordError, match=r"field segmentation\.counts") as raised:
    coco_json.check_segmentation(box | {"segmentation": segmentation}, (HEIGHT, WIDTH))
  assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
  "size",
  [None, [WIDTH, HEIGHT], [20.0, 40.0], ["20", "40"], [20], "20x40", [20, 40, 1], [20, True], 800],
)
def test_run_lengths_of_another_size(size):
  annotation = {"bbox": [2, 0, 10, 20], "segmentation": {"size": size, "counts": COLUMNS}}
  with pytest.raises(BadRecordError, match=r"field segmentation\.size is not that of the image"):
    coco_json.check_segmentation(annotation, (HEIGHT, WIDTH))


def test_a_mask_without_pixels():
  for counts in ([800], [800, 0], [0, 0, 800]):
    annotation = {"bbox": [2, 0, 10, 20], "segmentation": {"size": [20, 40], "counts": counts}}
    with pytest.raises(BadRecordError, match="segmentation has no pixel"):
      coco_json.check_segmentation(annotation, (HEIGHT, WIDTH))


FRACTION_BOX, FRACTION_POLYGON = (
  [0.05, 0.075, 0.25, 0.2],
  [0.05, 0.075, 0.3, 0.075, 0.3, 0.275, 0.05, 0.275],
)


@pytest.mark.parametrize(
  "fields",
  [
    {"bbox": FRACTION_BOX},
    {"segmentation": [FRACTION_POLYGON]},
    {"bbox": [0, 0, 1.0, 1.0], "segmentation": [[0, 0, 40, 0, 40, 20, 0, 20]]},
    {"bbox": [0, 0, 40, 20], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]},
    {"bbox": FRACTION_BOX, "segmentation": {"size": [20, 40], "counts": COLUMNS}},
    {"bbox": [20, 10, 10, 4]},
  ],
)
def test_masks_and_boxes_in_different_units(fields):
  with pytest.raises(
    BadRecordError, match="segmentation and bbox are of different places or units"
  ):
    coco_json.check_segmentation(GOOD | fields, (HEIGHT, WIDTH))


@pytest.mark.parametrize(
  "fields",
  [
    {"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]},
    {"bbox": [0, 0, 1, 1], "segmentation": {"size": [20, 40], "counts": [0, 1, 799]}},
    {"bbox": [0, 0, 1.5, 1.5], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]},
    {"bbox": [3, 1.5, 0, 4]},
    {"bbox": [12.5, 1.5, 4, 4]},
  ],
)
def test_tiny_objects_and_rounded_boxes_are_good(fields):
  coco_json.check_segmentation(GOOD | fields, (HEIGHT, WIDTH))


def _content(boxes, size=(HEIGHT, WIDTH)):
  return {
    "images": [{"id": 5, "height": size[0], "width": size[1]}],
    "annotations": [{"id": i, "image_id": 5, "bbox": box} for i, box in enumerate(boxes)],
  }


def test_boxes_in_fractions_of_the_image(caplog):
  odd = [None, [], ["0"], [0, 0, 0, 0]]  # refused or kept elsewhere
  for boxes, words in (
    ([FRACTION_BOX], "1 of 1 annotations have a bbox .* id 0 first; write x, y, w, h in pixels"),
    ([FRACTION_BOX, [0, 0, 1, 1], *odd[:3]], "2 of 2 annotations"),
    ([FRACTION_BOX, [-1e-6, 0, 1 + 1e-6, 1], [2, 1, 10, 4]], "2 of 3 annotations"),
  ):
    with pytest.raises(UserError, match=words):
      coco_json.check_units(FILE, _content(boxes))
  coco_json.check_units(FILE, _content(odd))
  coco_json.check_units(FILE, _content([[0, 0, 1, 1]], size=(1, 2)))
  assert not caplog.text
  coco_json.check_units(FILE, _content([[2, 1, 10, 4], FRACTION_BOX]))
  assert "1 of 2 annotations have a bbox whose numbers all lie in 0..1, id 1 first" in caplog.text


def test_only_missing_masks_are_missing():
  assert coco_json.has_boxes_only([{}, {"segmentation": None}, {"segmentation": []}])
  for segmentation in ({}, 0, "", [[]], False):
    assert not coco_json.has_boxes_only([{}, {"segmentation": segmentation}])
  assert not coco_json.has_boxes_only([])
