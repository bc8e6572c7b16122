"""A class for every pixel: see `fpt_jax.tasks` for the functions' roles.

Shapes: B images of a batch, H W rows and columns, K classes, T P true and predicted classes.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from fpt_jax import data
from fpt_jax.data import VOID, DatasetInfo, transforms
from fpt_jax.data.records import label_map
from fpt_jax.errors import UserError
from fpt_jax.models.state import Arrays, Skeleton
from fpt_jax.run import checkpoints, sharding
from fpt_jax.run.metrics import Countdown
from fpt_jax.tasks import pictures
from fpt_jax.tasks.segmentation import crops, draw, miou, submissions, views

BATCH_KEYS = ("image_BHWC", "label_BHW", "size_B2")
MAIN_METRIC = "mIoU"
CONFUSION_FILE = "eval/confusion.json"
SUBMISSION_FOLDER = "eval/submission"


def settle(config: ConfigDict, dataset: DatasetInfo) -> None:
  """Takes the data set's classes, their colours and mirror images into a config that names none.

  Raises:
    UserError: the data set has no label maps, or a class that the model has not, or the weights of
      the classes are not one a class.
  """
  model = config.model
  if not dataset.class_names:
    raise UserError(f"data.name={config.data.name!r} has no label maps; choose a data set that has")
  if not model.class_names:
    if model.num_classes != dataset.num_classes:
      logging.info("model.num_classes is %d, as many as the data has", dataset.num_classes)
    model.class_names, model.num_classes = dataset.class_names, dataset.num_classes
    model.palette, model.swaps = dataset.palette, dataset.swaps
  if len(model.class_names) != model.num_classes:
    raise UserError(
      f"model.class_names has {len(model.class_names)} names and model.num_classes is "
      f"{model.num_classes}; set --config.model.class_names='()' to take the data's own"
    )
  weights = tuple(model.class_weights)
  if weights and (len(weights) != model.num_classes or min(weights) <= 0):
    raise UserError(
      f"model.class_weights={weights} must be {model.num_classes} positive numbers, one a class, or ()"
    )
  class_table(config, dataset)


def class_table(config: ConfigDict, dataset: DatasetInfo) -> np.ndarray:
  """uint8 [256]: the model's class of each of the data set's, by its name; `VOID` for all others.

  Raises:
    UserError: the data set has a class that the model has not.
  """
  place = {name: i for i, name in enumerate(config.model.class_names)}
  strange = [name for name in dataset.class_names if name not in place]
  if strange:
    raise UserError(
      f"the data has classes {strange[:8]} that the model has not; "
      "set --config.model.class_names='()' to train on the data's own"
    )
  table = np.full(256, VOID, np.uint8)
  table[: dataset.num_classes] = [place[name] for name in dataset.class_names]
  return table


@contextlib.contextmanager
def train_batches(config: ConfigDict, start_step: int) -> Iterator[Iterator[dict]]:
  """This host's training batches from a step on, their labels the model's classes.

  As of `data.segmentation.train_batches`, which says what is raised.
  """
  to_class = class_table(config, data.info(config.data)).astype(np.int32)
  reading = data.segmentation.train_batches(
    config.data,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with reading as batches:
    yield (batch | {"label_BHW": to_class[batch["label_BHW"]]} for batch in batches)


def evaluate(
  config: ConfigDict,
  structure: Skeleton,
  arrays: Arrays,
  mesh: jax.sharding.Mesh,
  workdir: str,
) -> dict[str, float]:
  """Gives every pixel of `config.data.eval_split` a class and counts, at the files' own sizes.

  Writes `eval/confusion.json` and a picture of it into the run's folder and, where
  `config.eval.submission` says so, the files for the data set's server into `eval/submission`.

  Args:
    config: of the run; `eval` says through which windows and at which scales images are seen.
    structure: of the model.
    arrays: the model's numbers, on `mesh`.
    mesh: whose devices share each batch.
    workdir: the run's folder.

  Returns:
    "mIoU", "mAcc", "aAcc" and "IoU/<class>", x100; the same on every host.

  Raises:
    UserError: a field of `config.eval` is out of its range, or the data do not fit the model.
  """
  split, model = config.data.eval_split, config.model
  to_class = class_table(config, data.info(config.data))
  label_batch = labeller(
    config,
    structure,
    place=functools.partial(sharding.to_devices, mesh=mesh),
    out_shardings=sharding.over_batch(mesh),
  )
  keep = submission_writer(config, workdir) if config.eval.submission else None
  counts_TP, done = np.zeros((model.num_classes,) * 2, np.int64), 0
  total = data.num_images(config.data, split)
  countdown = Countdown(split, total, every_seconds=30)
  batches = data.segmentation.eval_batches(
    config.data,
    split,
    batch_size=config.eval.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with batches:
    for batch in batches:
      truth_BHW = to_class[batch["original_label_BHW"]]
      predicted_BHW = sharding.local_part(
        label_batch(
          arrays,
          batch["image_BHWC"],
          batch["size_B2"],
          batch["original_size_B2"],
          truth_BHW.shape[1:],
        )
      )
      for i in np.flatnonzero(batch["valid_B"]):
        height, width = batch["original_size_B2"][i]
        predicted_HW = predicted_BHW[i, :height, :width]
        counts_TP += miou.confusion_matrix(
          truth_BHW[i, :height, :width], predicted_HW, model.num_classes, void=VOID
        )
        if keep:
          keep(batch["file_name_B"][i].decode(), predicted_HW)
      done += int(batch["valid_B"].sum()) * jax.process_count()
      countdown.tell(max(done, 1))
  counts_TP = sharding.from_all_hosts({"counts": counts_TP[None]})["counts"].sum(axis=0)
  return score(config, counts_TP, total, workdir)


def score(config: ConfigDict, counts_TP: np.ndarray, images: int, workdir: str) -> dict:
  """Writes the counts and their picture, logs the table, returns the figures."""
  names = config.model.class_names
  metrics = miou.scores(counts_TP, names)
  if jax.process_index() == 0:
    path = checkpoints.folder(workdir) / CONFUSION_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"class_names": list(names), "counts": counts_TP.tolist()}))
    picture = draw.draw_confusion(counts_TP, names)
    path.with_suffix(".png").write_bytes(label_map.encode_label(picture))
    logging.info("%s, %d images:\n%s", config.data.eval_split, images, miou.format_table(metrics))
  return metrics


def labeller(
  config: ConfigDict,
  structure: Skeleton,
  *,
  place: Callable[[dict], dict] = lambda batch: batch,
  out_shardings: jax.sharding.Sharding | None = None,
) -> Callable[..., jax.Array]:
  """A function from images to label maps, by windows, scales and flips as `config.eval` says.

  The probabilities of all of them are averaged, at the size of the image file.

  Args:
    config: of the run.
    structure: of the model.
    place: puts a batch of arrays on the devices.
    out_shardings: of the label maps.

  Returns:
    (arrays, image_BHWC, size_B2, original_size_B2, canvas) -> uint8 [B, *canvas], classes: images as
    `data.segmentation.eval_batches` gives them, and a canvas for maps of the files' sizes.

  Raises:
    UserError: a field of `config.eval` is out of its range.
  """
  window, overlap, scales, flip = _eval_settings(config)
  multiple = config.data.canvas_multiple
  swapped_K = crops.mirror_table(config.model.swaps)[: config.model.num_classes]

  @functools.partial(jax.jit, static_argnames="canvas", out_shardings=out_shardings)
  def scores_at_one_scale(arrays, image_BHWC, size_B2, original_size_B2, canvas):
    model = structure.fill(arrays)
    look = functools.partial(
      views.probabilities,
      model.logits,
      window=window,
      overlap=overlap,
      multiple=multiple,
    )
    scores_BHWK = look(image_BHWC, size_B2)
    if flip:
      other_BHWK = look(views.mirrored(image_BHWC, size_B2), size_B2)
      scores_BHWK += views.mirrored(other_BHWK, size_B2)[..., swapped_K]
    return views.resized(scores_BHWK, size_B2, original_size_B2, canvas)

  @functools.partial(jax.jit, out_shardings=out_shardings)
  def best(scores_BHWK):
    return jnp.argmax(scores_BHWK, axis=-1).astype(jnp.uint8)

  def label(arrays, image_BHWC, size_B2, original_size_B2, canvas):
    total_BHWK = 0
    for scale in scales:
      image, size = at_scale(image_BHWC, size_B2, scale, multiple)
      inputs = place({"image": image, "size": size, "original": original_size_B2})
      total_BHWK += scores_at_one_scale(
        arrays, inputs["image"], inputs["size"], inputs["original"], canvas=tuple(canvas)
      )
    return best(total_BHWK)

  return label


def at_scale(
  image_BHWC: np.ndarray, size_B2: np.ndarray, scale: float, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
  """Images and their sizes, `scale` times as large, on canvases rounded up to `multiple` pixels."""
  if scale == 1:
    return image_BHWC, size_B2
  canvas = tuple(
    -(-round(edge * scale + 0.5) // multiple) * multiple for edge in image_BHWC.shape[1:3]
  )
  sizes = [crops.scaled_size(size, scale) for size in size_B2]
  images = [
    transforms.resize_and_pad(image_HWC[: old[0], : old[1]], new, canvas)
    for image_HWC, old, new in zip(image_BHWC, size_B2, sizes, strict=True)
  ]
  return np.stack(images), np.array(sizes, np.int32)


def _eval_settings(
  config: ConfigDict,
) -> tuple[tuple[int, ...], float, tuple[float, ...], bool]:
  """Window, overlap, scales and flip of `config.eval`."""
  window, scales = tuple(config.eval.window), tuple(config.eval.scales)
  if window and (len(window) != 2 or min(window) < 1):
    raise UserError(f"eval.window={window} must be (height, width) in pixels, or () for none")
  if not 0 <= config.eval.overlap < 1:
    raise UserError(f"eval.overlap={config.eval.overlap} must be from 0 to less than 1")
  if not scales or min(scales) <= 0:
    raise UserError(f"eval.scales={scales} must be positive factors, such as (1.0,)")
  return window, config.eval.overlap, scales, config.eval.flip


def submission_writer(
  config: ConfigDict, workdir: str
) -> Callable[[str, np.ndarray], pathlib.Path]:
  """A function of an image's file name and label map that writes the file for the server.

  Raises:
    UserError: the data set has no server, or the model other classes.
  """
  name, classes = config.data.name, config.model.num_classes
  if submissions.NUM_CLASSES.get(name) != classes:
    servers = ", ".join(f"{n} ({k} classes)" for n, k in submissions.NUM_CLASSES.items())
    raise UserError(
      f"eval.submission: there are servers for {servers}, not for data.name={name!r} with "
      f"{classes} classes; set --config.eval.submission=False"
    )
  folder = checkpoints.folder(workdir) / SUBMISSION_FOLDER
  return functools.partial(submissions.write, name, folder)


def predictor(
  config: ConfigDict, structure: Skeleton, arrays: Arrays
) -> Callable[[np.ndarray], dict]:
  """A function from an image, uint8 RGB [H, W, 3], to its `label_map`, uint8 [H, W].

  Images are seen as in evaluation.
  """
  label = labeller(config, structure)
  multiple, short_edge = config.data.canvas_multiple, config.data.short_edge

  def find(image_HWC: np.ndarray) -> dict:
    original = image_HWC.shape[:2]
    size = crops.short_edge_size(original, short_edge) if short_edge else original
    canvas = transforms.smallest_canvas(size, config.data.buckets, multiple)
    image = np.asarray(transforms.resize_and_pad(image_HWC, size, canvas))
    # rounded up, so that images of nearly the same size share a program
    original_canvas = transforms.smallest_canvas(original, (), multiple)
    sizes = (np.array([pair], np.int32) for pair in (size, original))
    (label_HW,) = np.asarray(label(arrays, image[None], *sizes, original_canvas))
    return {"label_map": label_HW[: original[0], : original[1]]}

  return find


def result(found: dict, image_HWC: np.ndarray) -> dict[str, np.ndarray]:
  """An image's label map as `Restored.predict` gives it."""
  del image_HWC
  return found


def images(config: ConfigDict) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """The images of `config.data.eval_split`: file name, uint8 RGB, label map of the model's classes."""
  to_class = class_table(config, data.info(config.data))
  for name, image_HWC, label_HW in data.segmentation.images(config.data, config.data.eval_split):
    yield name, image_HWC, to_class[label_HW]


def entries(config: ConfigDict, name: str, found: dict) -> list[dict]:
  """The image's name and each class's share of its pixels, the largest first."""
  label_HW = found["label_map"]
  classes, pixels = np.unique(label_HW, return_counts=True)
  shares = {
    config.model.class_names[classes[i]]: round(float(pixels[i] / label_HW.size), 6)
    for i in np.argsort(-pixels, kind="stable")
  }
  return [{"file_name": name, "shares": shares}]


def save(config: ConfigDict, workdir: str, stem: str, name: str, found: dict) -> None:
  """Writes the label map as `predictions/<stem>_labels.png`, classes as numbers, and for the server.

  Raises:
    UserError: see `submission_writer`.
  """
  path = checkpoints.folder(workdir) / "predictions" / f"{stem}_labels.png"
  path.write_bytes(label_map.encode_label(found["label_map"]))
  if config.eval.submission:
    submission_writer(config, workdir)(name, found["label_map"])


def draw(
  config: ConfigDict,
  image_HWC: np.ndarray,
  found: dict,
  truth: np.ndarray | None,
  min_score: float,
) -> np.ndarray:
  """The image in its classes' colours over a legend; with ground truth, that on the left."""
  del min_score
  maps = [found["label_map"]] if truth is None else [truth, found["label_map"]]
  titles = None if truth is None else ["ground truth", "predicted"]
  return draw_maps(config, [image_HWC] * len(maps), maps, titles)


def draw_example(config: ConfigDict, batch: dict[str, np.ndarray], step: int, i: int) -> np.ndarray:
  """A training image as it is fed, and its classes; where it is grey, nothing is learned.

  Args:
    config: of the run.
    batch: see `train_batches`.
    step: whose batch it is.
    i: which image.
  """
  del step
  image_HWC = np.clip(np.round(batch["image_BHWC"][i]), 0, 255).astype(np.uint8)
  maps = [None, batch["label_BHW"][i]]
  return draw_maps(config, [image_HWC] * 2, maps, ["image", "classes"])


def draw_maps(
  config: ConfigDict,
  images: Sequence[np.ndarray],
  maps: Sequence[np.ndarray | None],
  titles: Sequence[str] | None,
) -> np.ndarray:
  """Images side by side in the colours of their label maps, over one legend.

  Args:
    config: its `model` has the classes' names and colours.
    images: uint8 RGB [H, W, 3] each.
    maps: int [H, W] each, `VOID` where there is no class; None: the image as it is.
    titles: a line above each, or None.
  """
  names, palette = config.model.class_names, palette_of(config)
  drawn = []
  for image_HWC, label_HW in zip(images, maps, strict=True):
    zoom = max(1, -(-pictures.MIN_EDGE // max(image_HWC.shape[:2])))
    size = (image_HWC.shape[1] * zoom, image_HWC.shape[0] * zoom)
    large_HWC = np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))
    if label_HW is not None:
      large_HW = label_HW.repeat(zoom, axis=0).repeat(zoom, axis=1)
      large_HWC = draw.draw_label_map(large_HWC, large_HW, palette)
    drawn.append(large_HWC)
  if len(drawn) > 1 or titles:
    drawn = [pictures.contact_sheet(drawn, columns=len(drawn), titles=titles)]
  present = np.unique(np.concatenate([m.ravel() for m in maps if m is not None]))
  legend_HWC = draw.draw_legend(present, names, palette, drawn[0].shape[1])
  return np.concatenate([drawn[0], legend_HWC])


def palette_of(config: ConfigDict) -> list[tuple[int, int, int]]:
  """RGB of the model's classes: the config's, or colours made from their names."""
  model = config.model
  return [tuple(c) for c in model.palette] or [
    pictures.category_color(name) for name in model.class_names
  ]
