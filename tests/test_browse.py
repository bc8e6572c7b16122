"""Pictures of training batches with their objects and the anchors that the RPN samples."""

import jax
import numpy as np
import PIL.Image
import pytest

from fpt_jax import data, models
from fpt_jax.browse import browse
from fpt_jax.errors import UserError
from fpt_jax.models.heads.rpn import anchors_of_canvas
from fpt_jax.tasks import detection, pictures
from fpt_jax.tasks.detection.draw import draw_anchors
from tests.runs import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_pictures_are_written_in_the_order_of_training(tmp_path):
  config = tiny_config(data__flip=False)
  browse(config, str(tmp_path), num_images=5)
  with detection.train_batches(config, 0) as batches:
    ids = [int(i) for _ in range(2) for i in next(batches)["image_id_B"]][:5]
  names = sorted(p.name for p in (tmp_path / "browse").iterdir())
  assert names == [f"{i + 1:03d}_{image_id}.png" for i, image_id in enumerate(ids)] + [
    "contact_sheet.png"
  ]
  with PIL.Image.open(tmp_path / "browse" / names[0]) as picture:
    assert picture.width > 2 * 448  # objects and anchors, side by side
  with PIL.Image.open(tmp_path / "browse" / "contact_sheet.png") as sheet:
    assert sheet.mode == "RGB" and sheet.width > 2 * 800
  assert not (tmp_path / "checkpoints").exists()


def test_a_folder_that_nothing_can_be_written_to_is_reported_first(tmp_path, monkeypatch):
  config = tiny_config(data__data_dir=str(tmp_path / "data"))
  monkeypatch.setattr(data, "is_prepared", lambda _: pytest.fail("the data were looked at"))
  (tmp_path / "browse").write_text("kept")
  with pytest.raises(UserError, match="browse cannot be written"):
    browse(config, str(tmp_path), num_images=1)
  assert (tmp_path / "browse").read_text() == "kept"


@pytest.mark.parametrize("canvas", [(64, 64), (96, 160), (100, 75)])
def test_drawn_anchors_are_those_of_the_model(canvas):
  config = tiny_config()
  structure = models.structure_of(config)
  levels = []

  def sizes(arrays, image, size):
    pyramid = structure.fill(arrays).features(image, size)
    grids = structure.fill(arrays).rpn.anchors(pyramid, canvas)
    levels.extend(grid.boxes() for grid in grids)
    return pyramid[0].values_BHWC

  jax.eval_shape(
    sizes,
    structure.shapes,
    jax.ShapeDtypeStruct((1, *canvas, 3), np.float32),
    jax.ShapeDtypeStruct((1, 2), np.int32),
  )
  np.testing.assert_array_equal(anchors_of_canvas(config.model.rpn, canvas), np.concatenate(levels))


def test_anchors_have_the_colors_of_their_objects():
  image_HWC = np.zeros((400, 500, 3), np.uint8)
  boxes_G4 = np.array([[10.0, 10, 60, 60], [300, 200, 400, 300]])
  drawn = draw_anchors(
    image_HWC,
    boxes_G4,
    ["ant", "bee"],
    np.array([[290.0, 210, 410, 310]]),
    np.array([1]),
    np.array([[100.0, 100, 150, 180]]),
  )
  color = np.array(pictures.category_color("bee"), float)
  np.testing.assert_allclose(drawn[250, 290], color * 230 / 255, atol=2)
  np.testing.assert_allclose(drawn[250, 350], color)  # the dot in the middle of the object
  assert drawn[130, 100].tolist() == [round(200 * 160 / 255)] * 3
  assert drawn[130, 60].tolist() == [0, 0, 0]
