"""Data sets for tests: a small one in COCO's format, and fixtures of prepared ones."""

import concurrent.futures
import io
import json
import pathlib

import ml_collections
import numpy as np
import PIL.Image
import pytest

from fpt_jax import data

HEIGHT, WIDTH = 20, 40
LABEL_HEIGHT, LABEL_WIDTH = 6, 9  # of `image_folder`
# what turns stored pixels upright, by EXIF's orientation: its table says at which sides of the upright image
# the stored first row and first column are
UPRIGHT = {
  1: lambda pixels: pixels,  # top, left
  2: lambda pixels: pixels[:, ::-1],  # top, right
  3: lambda pixels: pixels[::-1, ::-1],  # bottom, right
  4: lambda pixels: pixels[::-1],  # bottom, left
  5: lambda pixels: pixels.swapaxes(0, 1),  # left, top
  6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],  # right, top
  7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
  8: lambda pixels: pixels.swapaxes(0, 1)[::-1],  # left, bottom
}


def errors_of_preparing(settings: ml_collections.ConfigDict, *, times: int) -> list[BaseException]:
  """Prepares a data set several times at the same time, in threads; returns the errors."""
  with concurrent.futures.ThreadPoolExecutor(times) as pool:
    calls = [pool.submit(data.prepare, settings) for _ in range(times)]
  return [error for call in calls if (error := call.exception())]


def encode_tagged(pixels: np.ndarray, orientation: int, name: str, **options: object) -> bytes:
  """Returns an image file of the format `name` with these stored pixels and this EXIF orientation."""
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, name, exif=exif, **options)
  return file.getvalue()


def write_clip(path: pathlib.Path, codec: str = "mpeg4", frames: int = 30) -> None:
  """Writes a video of 64 x 48 pixels and 10 frames per second; skips the test if PyAV is not installed.

  Frame i is grey, 8 i in 0..255, and white in the 16 x 16 pixels at the top left.
  """
  av = pytest.importorskip("av")
  with av.open(f"file:{path}", "w") as container:
    stream = container.add_stream(codec, rate=10)
    stream.width, stream.height, stream.bit_rate = 64, 48, 4_000_000
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    for i in range(frames):
      pixels = np.full((48, 64, 3), 8 * i, np.uint8)
      pixels[:16, :16] = 255
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())


def png(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  PIL.Image.fromarray(array).save(file, "PNG")
  return file.getvalue()


def image_folder(tmp_path: pathlib.Path) -> ml_collections.ConfigDict:
  """A user's data set: four images per split, three classes, void 9."""
  root = tmp_path / "source"
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    (root / "images" / split).mkdir(parents=True)
    (root / "labels" / split).mkdir(parents=True)
    for i, ending in enumerate((".jpg", ".png", ".JPEG", ".jpg")):
      image = rng.integers(0, 256, (LABEL_HEIGHT, LABEL_WIDTH, 3), np.uint8)
      PIL.Image.fromarray(image).save(root / "images" / split / f"{i}{ending}")
      label = rng.choice([0, 1, 2, 9], (LABEL_HEIGHT, LABEL_WIDTH)).astype(np.uint8)
      (root / "labels" / split / f"{i}.png").write_bytes(png(label))
  (root / "images" / "train" / "notes.txt").write_text("not an image")
  (root / "images" / "train" / ".hidden.jpg").write_text("not an image")
  return label_config(
    "image_folder",
    tmp_path / "data",
    source=str(root),
    builder={"class_names": ("sky", "road", "car"), "void": 9},
  )


def write_coco(root: pathlib.Path) -> dict:
  """Writes four images and their annotations in the official layout; returns the train JSON."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
  for split in ("train2017", "val2017"):
    (root / split).mkdir(parents=True)
    PIL.Image.fromarray(pixels).save(root / split / "rgb.jpg")
    PIL.Image.fromarray(pixels[..., 0]).save(root / split / "grey.jpg")
    PIL.Image.fromarray(pixels).convert("CMYK").save(root / split / "cmyk.jpg")
    PIL.Image.fromarray(pixels.transpose(1, 0, 2)).save(root / split / "tall.png")
  content = {
    "images": [
      {"id": 70, "file_name": "rgb.jpg", "height": HEIGHT, "width": WIDTH},
      {"id": 5, "file_name": "grey.jpg", "height": HEIGHT, "width": WIDTH},
      {"id": 6, "file_name": "cmyk.jpg", "height": HEIGHT, "width": WIDTH},
      {"id": 9, "file_name": "tall.png", "height": WIDTH, "width": HEIGHT},
    ],
    "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "ant"}],
    "annotations": [
      {  # fills the left half of its box
        "id": 1000000007,
        "image_id": 70,
        "category_id": 90,
        "bbox": [10.1, 4.0, 20.0, 8.0],
        "segmentation": [[10.1, 4.0, 20.1, 4.0, 20.1, 12.0, 10.1, 12.0]],
        "area": 80.3,
        "iscrowd": 0,
      },
      {  # column-major runs: all of columns 2 to 11
        "id": 2,
        "image_id": 70,
        "category_id": 3,
        "bbox": [2, 0, 10, 20],
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": [40, 200, 560]},
        "area": 200,
        "iscrowd": 1,
      },
      {
        "id": 3,
        "image_id": 5,
        "category_id": 3,
        "bbox": [2, 0, 10, 20],
        # the same runs, compressed: 5 bits per character from "0"; the sixth bit marks that more follow
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": "X1X6`a0"},
        "iscrowd": 0,
      },
      {
        "id": 4,
        "image_id": 9,
        "category_id": 90,
        "bbox": [0, 30, 20, 10],
        "segmentation": [[0, 30, 20, 30, 20, 40, 0, 40]],
        "iscrowd": 0,
      },
    ],
  }
  (root / "annotations").mkdir()
  for split in ("train", "val"):
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
  return content


def _data(fields: dict[str, object]) -> ml_collections.ConfigDict:
  both_tasks = {
    "source": "",
    "cache_dir": "",
    "train_split": "train",
    "eval_split": "val",
    "train_sizes": (),
    "color_jitter": (),
    "flip": True,
    "canvas_multiple": 32,
    "few_canvases": True,
    "image_dtype": "float32",
    "skip_bad": False,
    "digest": "",
    "exif": "apply",
    "num_workers": 2,
    "prefetch": 2,
    "builder": {},
  }
  return ml_collections.ConfigDict(both_tasks | fields)


def config(name: str, data_dir: pathlib.Path, **fields: object) -> ml_collections.ConfigDict:
  """Returns the `data` of a config for detection."""
  defaults = {
    "name": name,
    "data_dir": str(data_dir),
    "format": "coco",
    "annotations": "",
    "images": "",
    "short_edge": 20,
    "long_edge": 40,
    "resize": "torchvision",
    "train_long_edge": 0,
    "crop": (),
    "scale": (1.0, 1.0),
    "copy_paste": 0.0,
    "filter_empty": False,
    "buckets": ((20, 40), (40, 20)),
    "max_instances": 4,
  }
  return _data(defaults | fields)


def label_config(name: str, data_dir: pathlib.Path, **fields: object) -> ml_collections.ConfigDict:
  """Returns the `data` of a config for segmentation."""
  defaults = {
    "name": name,
    "data_dir": str(data_dir),
    "crop": (24, 32),
    "scale": (0.5, 2.0),
    "short_edge": 0,
    "buckets": (),
  }
  return _data(defaults | fields)


@pytest.fixture
def coco(tmp_path: pathlib.Path) -> ml_collections.ConfigDict:
  """The data set of `write_coco` in tmp_path / "source", prepared in tmp_path / "data"."""
  write_coco(tmp_path / "source")
  coco = config("coco", tmp_path / "data", source=str(tmp_path / "source"))
  data.prepare(coco)
  return coco


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
  """Context Shapes with 23 + 5 images, prepared."""
  shapes = config(
    "context_shapes",
    tmp_path_factory.mktemp("shapes"),
    short_edge=64,
    long_edge=64,
    buckets=((64, 64),),
    max_instances=9,
    builder={"train_size": 23, "val_size": 5, "image_size": 64},
  )
  data.prepare(shapes)
  return shapes


@pytest.fixture(scope="session")
def real_coco(
  real_data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> ml_collections.ConfigDict:
  """The real COCO images, prepared."""
  coco = config(
    "coco",
    tmp_path_factory.mktemp("coco"),
    source=str(real_data / "coco"),
    short_edge=128,
    long_edge=160,
    buckets=((128, 160), (160, 128)),
    max_instances=100,
  )
  data.prepare(coco)
  return coco
