"""Evaluation counts every labelled pixel once and averages scores, also on real data."""

import dataclasses
import importlib
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath

from fpt_jax import data
from fpt_jax.browse import browse
from fpt_jax.configs.segmentation import segmentation as segmentation_config
from fpt_jax.data import DatasetInfo
from fpt_jax.data.datasets import context_shapes
from fpt_jax.data.records import label_map
from fpt_jax.errors import UserError
from fpt_jax.run import sharding
from fpt_jax.run.config_file import write_config
from fpt_jax.tasks import segmentation
from fpt_jax.tasks.segmentation import submissions
from fpt_jax.tasks.segmentation.batches import images
from fpt_jax.tasks.segmentation.classes import class_table
from fpt_jax.tasks.segmentation.draw import palette_of
from fpt_jax.tasks.segmentation.prediction import submission_writer
from fpt_jax.tasks.segmentation.views import labeller
from fpt_jax.train import adopt_classes
from tests.data.datasets.test_label_maps import REAL, _map_of_ids
from tests.data_sets import label_config

DATASET = DatasetInfo((), (), {"train": 1}, ("sky", "car", "bus"), ((1, 2, 3),) * 3, ((1, 2),))


def run_config(data_config, **fields):
  """Returns a complete config with the fields that evaluation and pictures read."""
  config = segmentation_config().unlock()
  config.data = label_config("image_folder", "none")
  config.data.update(data_config)
  config.batch_size = 2
  config.model.num_classes = 3
  config.eval.update({"batch_size": 1, "overlap": 0.0})
  config.update_from_flattened_dict(fields)
  return config


def structure_of(logits):
  """Returns a skeleton whose model has these logits, whatever its arrays."""
  return SimpleNamespace(fill=lambda _: SimpleNamespace(logits=logits))


def test_classes_are_taken_from_the_data():
  config = run_config({"name": "mine"})
  segmentation.adopt_classes(config, DATASET)
  assert config.model.class_names == DATASET.class_names and config.model.swaps == ((1, 2),)
  table = class_table(config, DATASET)
  assert table[:4].tolist() == [0, 1, 2, 255] and table.shape == (256,) and table[255] == 255


def test_classes_are_matched_by_name():
  config = run_config(
    {"name": "mine"}, **{"model.class_names": ("bus", "tram", "car", "sky"), "model.num_classes": 4}
  )
  segmentation.adopt_classes(config, DATASET)
  assert class_table(config, DATASET)[:3].tolist() == [3, 2, 0]
  assert len(palette_of(config)) == 4
  config.model.class_names = ("bus", "car", "van", "tram")
  with pytest.raises(UserError, match=r"classes \['sky'\] that the model does not have"):
    segmentation.adopt_classes(config, DATASET)
  config.model.num_classes = 3
  with pytest.raises(UserError, match=r"has 4 names and model\.num_classes is 3"):
    segmentation.adopt_classes(config, DATASET)
  with pytest.raises(UserError, match="'mine' has no label maps"):
    segmentation.adopt_classes(config, DatasetInfo(("cat",), (1,), {}))


def test_names_may_differ_in_case_and_spaces():
  config = run_config({"name": "mine"}, **{"model.class_names": ("Bus ", "CAR", "sky")})
  segmentation.adopt_classes(config, DATASET)
  assert class_table(config, DATASET)[:3].tolist() == [2, 1, 0]
  # an equal name comes first
  similar = DatasetInfo((), (), {}, ("Car", "car"))
  config.model.class_names = ("car", "Car", "bus")
  assert class_table(config, similar)[:2].tolist() == [1, 0]
  config.model.class_names = ("car", "van", "bus")
  with pytest.raises(UserError, match=r"\['Car', 'car'\] are both the model's class 'car'"):
    class_table(config, similar)
  config.model.class_names = ("CAR", "cAR", "bus")
  with pytest.raises(UserError, match=r"classes \['Car', 'car'\] that the model does not have"):
    class_table(config, similar)


def test_a_resumed_run_refuses_classes_in_another_order(tmp_path, monkeypatch):
  run = run_config({"name": "mine"})
  segmentation.adopt_classes(run, DATASET)
  write_config(str(tmp_path), run)
  reordered = dataclasses.replace(DATASET, class_names=("car", "sky", "bus"))
  monkeypatch.setattr(data, "info", lambda _: reordered)
  with pytest.raises(
    UserError, match=r"model\.class_names was .*'sky', 'car'.*, now .*'car', 'sky'"
  ):
    adopt_classes(run_config({"name": "mine"}), str(tmp_path))
  # evaluation matches them
  assert class_table(run, reordered)[:3].tolist() == [1, 0, 2]


@pytest.mark.parametrize("weights", [(1.0,) * 2, (1.0, 0.0, 1.0)])
def test_class_weights_must_be_positive_and_one_per_class(weights):
  config = run_config({"name": "mine"}, **{"model.class_weights": weights})
  with pytest.raises(UserError, match="must be 3 positive numbers, one per class"):
    segmentation.adopt_classes(config, DATASET)


@pytest.mark.parametrize(
  "name", ["ade20k", "camvid", "cityscapes", "image_folder", "lip", "voc2012"]
)
def test_any_demo_fits_the_generated_data(name):
  config = importlib.import_module(f"fpt_jax.configs.{name}").get_config("demo")
  shapes = ("background", *context_shapes.CATEGORIES)
  segmentation.adopt_classes(config, DatasetInfo((), (), {}, shapes))
  assert config.model.num_classes == len(shapes)


def test_scores_are_averaged_not_labels():
  """Class 0 is best in the image, class 2 in its mirror image, and class 1 on average."""
  fields = {"model.swaps": (), "eval.flip": True}
  config = run_config(label_config("mine", "none"), **fields)
  one, other = jnp.log(jnp.array([[0.5, 0.45, 0.05], [0.05, 0.45, 0.5]]))

  def logits(image_BHWC, size_B2):
    bright_B = image_BHWC[:, 0, 0, 0] > 0.5
    scores_BK = jnp.where(bright_B[:, None], one[None], other[None])
    return jnp.broadcast_to(scores_BK[:, None, None], (*image_BHWC.shape[:3], 3))

  image_BHWC = np.zeros((1, 32, 32, 3), np.float32)
  image_BHWC[0, :, :4] = 1
  inputs = ({}, image_BHWC, np.array([[20, 25]]), np.array([[20, 25]]), (20, 25))
  assert (np.asarray(labeller(config, structure_of(logits))(*inputs)) == 1).all()
  # with swaps, class 2 in the mirror image is class 0 here, which is then best in both
  config.model.swaps = ((0, 2),)
  assert (np.asarray(labeller(config, structure_of(logits))(*inputs)) == 0).all()


@pytest.mark.parametrize("align_corners", [False, True])
def test_scales_are_averaged(align_corners):
  fields = {"eval.scales": (1.0, 0.5, 2.0), "model.align_corners": align_corners}
  config = run_config(label_config("mine", "none"), **fields)
  seen = []

  def logits(image_BHWC, size_B2):
    seen.append(image_BHWC.shape)
    return image_BHWC @ jnp.eye(3)

  image_BHWC = np.zeros((1, 64, 64, 3), np.float32)
  image_BHWC[0, :33, :20, 0] = image_BHWC[0, :33, 20:51, 2] = 9.0
  size_B2, original_B2 = np.array([[33, 51]]), np.array([[66, 102]])
  label = labeller(config, structure_of(logits))
  (label_HW,) = np.asarray(label({}, image_BHWC, size_B2, original_B2, (66, 102)))
  edges = {64, 33, 129} if align_corners else {64, 32, 128}
  assert set(seen) == {(1, edge, edge, 3) for edge in edges}
  assert label_HW.dtype == np.uint8
  assert (label_HW[:, :39] == 0).all() and (label_HW[:, 42:] == 2).all()


WEIGHT = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)


@pytest.mark.parametrize("name", REAL)
def test_real_samples_are_browsed_and_evaluated(name, real_data, tmp_path):
  """Every labelled pixel of the files is counted once, under its own class."""
  folder, split, _, label_files = REAL[name]
  root = real_data / folder
  data_config = label_config(
    name,
    tmp_path / "data",
    source=str(root),
    builder={"splits": (split,)},
    train_split=split,
    eval_split=f"{split}[:5]" if name in ("voc2012", "camvid") else split,
    canvas_multiple=256,
    crop=(96, 128),
  )
  config = run_config(data_config)
  workdir = tmp_path / "run"
  browse(config, str(workdir), num_images=3)
  pictures = sorted(p.name for p in (workdir / "browse").iterdir())
  assert len(pictures) == 4 and pictures[-1] == "contact_sheet.png"
  with PIL.Image.open(workdir / "browse" / pictures[0]) as picture:
    assert picture.width > 2 * 256 and picture.mode == "RGB"

  config.eval.submission = name in ("cityscapes", "ade20k")
  classes = config.model.num_classes

  def logits(image_BHWC, size_B2):
    return (image_BHWC / 255 - 0.5) @ WEIGHT[:, :classes]

  evaluate = segmentation.evaluator(config, structure_of(logits), sharding.mesh())
  metrics = evaluate(config, {}, epath.Path(workdir / "eval"))
  assert 0 <= metrics["mIoU"] <= 100
  written = json.loads((workdir / "eval" / "confusion.json").read_text())
  counts_TP = np.array(written["counts"])
  table = np.array([_map_of_ids(name).get(i, 255) for i in range(256)])
  expected, agreeing = np.zeros(256, int), 0
  paths = {path.stem: path for path in root.glob(label_files)}
  for file_name, image_HWC, _ in images(config.data, config.data.eval_split):
    stem = file_name.rsplit(".", 1)[0].replace("_leftImg8bit", "_gtFine_labelIds")
    with PIL.Image.open(paths[stem]) as label:
      truth_HW = table[np.asarray(label)]
    expected += np.bincount(truth_HW.ravel(), minlength=256)
    best_HW = ((image_HWC / 255.0 - 0.5) @ WEIGHT[:, :classes]).argmax(-1)
    agreeing += (best_HW == truth_HW)[truth_HW != 255].sum()
  assert counts_TP.sum(axis=1).tolist() == expected[:classes].tolist()
  assert expected[classes:255].sum() == 0
  # float32 and float64 may differ in pixels whose two best classes have equal scores
  assert abs(counts_TP.trace() - agreeing) <= 1e-4 * counts_TP.sum()
  assert metrics["aAcc"] == pytest.approx(100 * counts_TP.trace() / counts_TP.sum())

  if config.eval.submission:
    files = sorted((workdir / "eval" / "submission").iterdir())
    ids_HW = label_map.decode_ids(files[0].read_bytes())
    inverse = {v: k for k, v in _map_of_ids(name).items() if v != 255}
    assert set(np.unique(ids_HW)) <= set(inverse.values())
    assert len(files) == len(paths)


def test_a_submission_needs_a_server(tmp_path):
  config = run_config({"name": "camvid"}, **{"eval.submission": True})
  with pytest.raises(
    UserError, match=r"cityscapes \(19 classes\), ade20k .*not for data.name='camvid'"
  ):
    submission_writer(config, epath.Path(tmp_path))


def test_predictions_for_a_server(tmp_path):
  config = run_config({"name": "cityscapes"}, **{"eval.submission": True})
  config.model.num_classes = 19
  (tmp_path / "predictions").mkdir()
  found = {"label_map": np.array([[0, 18], [10, 1]], np.uint8)}
  segmentation.write_prediction(config, str(tmp_path), "a", "test/a_000_leftImg8bit.png", found)
  (file,) = (tmp_path / "eval" / "submission").iterdir()
  assert file.name == "a_000_pred_labelIds.png"
  ids_HW = label_map.decode_ids(file.read_bytes())
  assert ids_HW.tolist() == [[7, 33], [23, 8]]  # road, bicycle; sky, sidewalk


def test_classes_for_a_server_are_matched_by_name(tmp_path):
  config = run_config({"name": "cityscapes"}, **{"eval.submission": True})
  config.model.num_classes = 19
  config.model.class_names = tuple(reversed(submissions.CLASS_NAMES["cityscapes"]))
  write = submission_writer(config, epath.Path(tmp_path))
  ids_HW = label_map.decode_ids(write("a.png", np.array([[0, 18]], np.uint8)).read_bytes())
  assert ids_HW.tolist() == [[33, 7]]  # the first class is bicycle now, and the last one road
  config.model.class_names = ("street", *submissions.CLASS_NAMES["cityscapes"][1:])
  with pytest.raises(UserError, match="the model's class 'street' is not one class of the server"):
    submission_writer(config, epath.Path(tmp_path))


def test_pictures_and_entries_of_an_image(rng, tmp_path):
  config = run_config({"name": "mine"})
  segmentation.adopt_classes(config, DATASET)
  config.model.palette = ((200, 0, 0), (0, 150, 0), (0, 0, 250))
  image_HWC = np.full((30, 40, 3), 128, np.uint8)
  label_HW = np.zeros((30, 40), np.uint8)
  label_HW[:, 30:] = 2
  found = {"label_map": label_HW}
  assert segmentation.to_entries(config, "a.jpg", found) == [
    {"file_name": "a.jpg", "shares": {"sky": 0.75, "bus": 0.25}}
  ]
  alone = segmentation.draw_prediction(config, image_HWC, found, None, 0.5)
  assert alone.dtype == np.uint8 and alone.shape[1] == 400 and alone.shape[0] > 300
  truth_HW = np.full((30, 40), 255, np.uint8)
  pair = segmentation.draw_prediction(config, image_HWC, found, truth_HW, 0.5)
  assert pair.shape[1] > 800
  (tmp_path / "predictions").mkdir()
  segmentation.write_prediction(config, str(tmp_path), "a", "x/a.jpg", found)
  with PIL.Image.open(tmp_path / "predictions" / "a_labels.png") as saved:
    np.testing.assert_array_equal(np.asarray(saved), label_HW)
