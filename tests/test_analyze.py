"""The costs of whole models and of the paper's tables."""

import json

import pytest

from fpt_jax import analyze
from fpt_jax.configs import cityscapes, coco_mask, tables
from fpt_jax.configs.published import PARAMETERS, Published
from fpt_jax.errors import UserError
from fpt_jax.models.costs import Cost


@pytest.fixture(scope="module")
def torchvision():
  return analyze.analyze(coco_mask.get_config("torchvision"))


def test_costs_of_torchvisions_detector_equal_those_computed_by_hand(torchvision):
  """Has 44.4 M parameters, as torchvision documents; the other numbers follow from the layers' sizes."""
  assert torchvision.total().parameters == 44_401_393
  assert torchvision.canvas == (800, 1344)
  positions = [200 * 336, 100 * 168, 50 * 84, 25 * 42]
  laterals = sum(n * c * 256 for n, c in zip(positions, (256, 512, 1024, 2048), strict=True))
  modules = torchvision.modules
  assert modules["pyramid"].multiply_adds == laterals + sum(positions) * 9 * 256**2
  with_p6 = sum(positions) + 13 * 21
  assert modules["rpn"].multiply_adds == with_p6 * (9 * 256**2 + 256 * 15)
  assert modules["box_head"].multiply_adds == 1000 * (12544 * 1024 + 1024**2 + 1024 * 5 * 91)
  mask = 14**2 * 4 * 9 * 256**2 + 14**2 * 4 * 256**2 + 28**2 * 256
  assert modules["mask_head"].multiply_adds == 100 * mask
  assert modules["roi_align"] == Cost(activation_bytes=4 * 256 * (1000 * 7**2 + 100 * 14**2))
  assert "elsewhere" not in modules
  assert torchvision.total().attention == 0


def test_parts_are_listed_below_their_module(torchvision):
  lines = analyze.format_modules(torchvision).splitlines()
  names = [line[:32].rstrip() for line in lines[5:]]
  stages = ["  conv1", *(f"  stages.{i}" for i in range(4))]
  heads = ["rpn", "roi_align", "box_head", "mask_head", "features", "total"]
  assert names == ["backbone", *stages, "pyramid", *heads]
  assert lines[-1].split() == ["total", "44.401", "267.39", "-", "1405.3"]
  assert lines[-4].endswith("1000 regions")
  assert all(len(line) >= 84 for line in lines[5:])


def test_costs_of_a_model_are_written_into_its_folder(tmp_path, capsys):
  config = coco_mask.get_config("demo,fpt=gt,head=augmented")
  analyze.analyze_model(config, str(tmp_path / "run"))
  written = json.loads((tmp_path / "run" / "analysis.json").read_text())
  assert written["canvas"] == [96, 96] and written["dtype"] == "float32"
  modules = written["modules"]
  for name, total in written["total"].items():
    assert sum(cost[name] for cost in modules.values()) == total > 0
  heads = ("rpn", "roi_align", "box_head", "mask_head")
  for name, features in written["features"].items():
    assert features == written["total"][name] - sum(modules[h][name] for h in heads)
  # P2, of 24 x 24, attends to P3, P4 and P5, in 4 parts with 48 channels together
  keys = 12**2 + 6**2 + 3**2
  assert modules["fpt.grounding_transformers.0"]["attention"] == keys * (24**2 * (2 * 48 + 4) + 48)
  assert "grounding_transformers.0" in capsys.readouterr().out


def test_a_table_is_printed_and_written(tmp_path, capsys, monkeypatch):
  rows = [
    tables.Row("BFP", "demo,fpt=none", (31.6,), (29.9,), 34.6, 172.3, "cityscapes"),
    tables.Row("BFP+ST", "demo,fpt=st", (32.0,), None, 55.0, 248.2, "cityscapes"),
    tables.Row("BFP+RT", "demo,fpt=rt", (34.7,), (33.1,), 39.8, 187.9, "cityscapes"),
    tables.Row("BFP+ST+RT", "demo,fpt=st+rt", (35.9,), (34.4,), 61.2, 256.7, "cityscapes"),
  ]
  monkeypatch.setitem(tables.TABLES, 1, rows)
  analyze.analyze_table(1, str(tmp_path), markdown=False)
  written = json.loads((tmp_path / "analysis.json").read_text())["rows"]
  printed = capsys.readouterr().out
  totals = [row["total"]["parameters"] for row in written]
  assert [row["paper"]["gflops"] for row in written] == [172.3, 248.2, 187.9, 256.7]
  # the level's own share of the fusing convolution, and two normalisations, are counted twice
  channels = cityscapes.get_config("demo").model.pyramid.channels
  own = 4 * (9 * channels**2 + 2 * 2 * channels)
  assert totals[3] == totals[1] + totals[2] - totals[0] - own
  (sums,) = [line for line in printed.splitlines() if line.count("+1.0")]
  assert sums.split()[:4] == ["BFP+ST+RT", "61.2", "60.2", "+1.0"]
  assert f"{-own / 1e6:+.1f}" in sums


def test_table_in_markdown(torchvision, monkeypatch):
  rows = [
    tables.Row("A", "fpt=st", (32.0, 54.9), None, 55.0, 248.2),
    tables.Row("B", "", (31.6,), (29.9,)),
  ]
  monkeypatch.setattr(analyze, "PARAMETERS", {})
  lines = analyze.format_markdown(rows, [torchvision] * 2).splitlines()
  assert len({line.count("|") for line in lines}) == 1
  assert lines[2:] == [
    "| A | `configs/coco_mask.py:fpt=st` | 32.0 / - | 44.4 (26.8) / 55.0 | 267.4 (148.5) / 248.2 | - |",
    "| B | `configs/coco_mask.py` | 31.6 / 29.9 | 44.4 (26.8) / - | 267.4 (148.5) / - | - |",
  ]


def test_published_sizes_have_a_column_and_footnotes(torchvision, monkeypatch):
  found = Published(44.46, "torchvision's metadata", ((0.053, "BatchNorm"), (0.01, "more classes")))
  monkeypatch.setattr(
    analyze,
    "PARAMETERS",
    {("coco_mask", "a"): found, ("coco_mask", "c"): Published(44.4, "README")},
  )
  rows = [tables.Row(arg.upper(), arg, (30.0,), None, 55.0, 248.2) for arg in "abc"]
  notes = [
    "torchvision's metadata. Differs from ours by +0.053 M, BatchNorm; +0.010 M, more classes.",
    "README. The same as ours.",
  ]
  lines = analyze.format_rows(rows, [torchvision] * 3).splitlines()
  printed = {line.split()[0]: line.split() for line in lines if line[:2] in ("A ", "B ", "C ")}
  assert printed["A"][3:6] == ["55.0", "44.46", "[1]"]
  assert printed["B"][3:5] == ["55.0", "-"]
  assert printed["C"][3:6] == ["55.0", "44.40", "[2]"]
  assert [f"[{i}] {note}" in lines for i, note in enumerate(notes, start=1)] == [True, True]
  header = next(i for i, line in enumerate(lines) if "published" in line)
  (row,) = [line for line in lines if line.startswith("A")]
  assert row.index("44.46 [1]") + len("44.46 [1]") == lines[header].index("published") + len(
    "published"
  )

  lines = analyze.format_markdown(rows, [torchvision] * 3).splitlines()
  cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
  column = cells[0].index("parameters published, M")
  assert [row[column] for row in cells[2:]] == ["44.46<sup>1</sup>", "-", "44.40<sup>2</sup>"]
  assert len({len(row) for row in cells}) == 1
  assert lines[-2:] == [f"{i}. {note}" for i, note in enumerate(notes, start=1)]


def test_published_sizes_belong_to_rows():
  assert set(PARAMETERS) <= {
    (row.config, row.arg) for table in tables.TABLES.values() for row in table
  }


def test_costs_of_a_segmenter():
  """The image is a training crop; the auxiliary head, used in training only, has parameters alone."""
  config = cityscapes.get_config("demo,fpt=lgt")
  counted = analyze.analyze(config)
  assert counted.canvas == tuple(config.data.crop)
  assert "elsewhere" not in counted.modules
  assert counted.total("auxiliary").multiply_adds == 0 < counted.total("auxiliary").parameters
  height, width = config.data.crop
  stride, classes = config.model.backbone.output_stride, config.model.num_classes
  positions = (height // stride) * (width // stride)
  hidden, channels = config.model.head.hidden, config.model.pyramid.channels
  assert counted.modules["head"].multiply_adds == positions * hidden * (9 * 4 * channels + classes)
  assert counted.modules["upsample"].activation_bytes == 4 * height * width * classes
  assert not any(name.startswith("fpt.self") for name in counted.modules)


@pytest.mark.slow
def test_costs_of_hrnet():
  """65.86 M parameters; the multiply-adds at 1024 x 2048 were counted from the layers of the release."""
  config = cityscapes.get_config("head=hrnet")
  config.data.crop = (1024, 2048)
  config.model.backbone.norm = "sync_bn"
  total = analyze.analyze(config).total()
  assert total.parameters / 1e6 == pytest.approx(65.86, rel=1e-4)
  assert total.multiply_adds / 1e9 == pytest.approx(747.5, rel=1e-4)


@pytest.mark.slow
def test_costs_of_gscnn():
  """2705 G at 969 x 969, 1867 G of them in the backbone: counted from the release without rounding sizes."""
  config = cityscapes.get_config("head=gscnn")
  config.data.crop = (968, 968)
  counted = analyze.analyze(config)
  found = [counted.total(*names).multiply_adds / 1e9 for names in ((), ("backbone",))]
  assert found == pytest.approx([2705 * (968 / 969) ** 2, 1867 * (968 / 969) ** 2], rel=1e-4)
  assert "elsewhere" not in counted.modules


def test_the_papers_rows_do_not_add_up():
  """As the README says: ST and GT together are 1.8 M less than the sum of both, ST and RT 1.0 M more."""
  paper = {row.name: (row.parameters, row.gflops) for row in tables.TABLE_1}

  def surplus(name):
    base, *parts = name.split("+")
    return [
      round(paper[name][i] - paper[base][i] - sum(paper[f"{base}+{p}"][i] - paper[base][i] for p in parts), 1)
      for i in range(2)
    ]  # fmt: skip

  assert surplus("BFP+ST+GT") == [-1.8, -18.1]
  assert surplus("BFP+ST+RT") == [1.0, -7.1]
  assert surplus("BFP+GT+RT") == [0.5, 0.9]
  assert surplus("BFP+ST+GT+RT") == [-1.3, -10.4]


def test_tables_that_do_not_exist_are_reported():
  with pytest.raises(UserError, match="--table=9 does not exist; choose one of 1, 2, 3"):
    analyze.rows_of_table(9)
