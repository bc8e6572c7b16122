"""Prediction as a program in a file, which runs without this package."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath, epy
from jax import export as jax_export

from fpt_jax import models
from fpt_jax.errors import UserError, one_line
from fpt_jax.models.state import Arrays
from fpt_jax.ops import target
from fpt_jax.restored import Restored
from fpt_jax.run.folder import make_folder, write_whole, writing
from fpt_jax.tasks.program import Difference, ImageProgram
from fpt_jax.tasks.subjects import Subject
from fpt_jax.tasks.task import task_of

with epy.lazy_imports():
  import tensorflow as tf
  from jax.experimental import jax2tf

FOLDER = "export"
FORMATS = ("stablehlo", "saved_model", "onnx")
# of jax.export, and the name of the backend
PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu"}
TIMED_CALLS = 5

Call = Callable[[np.ndarray], dict[str, np.ndarray]]


class Check(NamedTuple):
  """How a program is compared with `Restored.predict`.

  Attributes:
    name: what is compared, for messages.
    compare: the function of a program that compares one image.
    over_images: the function that makes one number of those of all images.
    most: the largest value that is allowed.
  """

  name: str
  compare: Callable[[ImageProgram], Difference]
  over_images: Callable[[list[float]], float]
  most: float


# by dtype; in bfloat16, a compiler's choice of what is rounded moves all numbers, so that of two boxes that
# overlap, another one may suppress the other
CHECKS = {
  "float32": Check("largest difference", lambda program: program.difference, np.max, 1e-4),
  "bfloat16": Check("mean share without a match", lambda program: program.mismatch, np.mean, 2e-2),
}


def checked_platforms(names: Sequence[str]) -> tuple[str, ...]:
  """Returns what --platforms names.

  Raises:
    UserError: a platform is not one of `PLATFORMS`, or there is none.
  """
  if not names or not set(names) <= set(PLATFORMS):
    raise UserError(f"--platforms={','.join(names)} must be some of {','.join(PLATFORMS)}")
  return tuple(dict.fromkeys(names))


def parsed_canvas(edges: Sequence[str]) -> tuple[int, int] | None:
  """Returns the (height, width) that --canvas names, or None if it is not set.

  Raises:
    UserError: it is not two positive numbers.
  """
  if not edges:
    return None
  if len(edges) != 2 or not all(edge.isdecimal() and int(edge) for edge in edges):
    raise UserError(
      f"--canvas={','.join(edges)} must be HEIGHT,WIDTH, two positive numbers of pixels"
    )
  height, width = map(int, edges)
  return height, width


def export(
  restored: Restored,
  out: epath.Path,
  *,
  format: str = "stablehlo",
  platforms: Sequence[str] = ("cpu",),
  canvas: tuple[int, int] | None = None,
  batch: int | None = None,
  subjects: Iterator[Subject | UserError] | None = None,
) -> None:
  """Writes a model as a program for each platform, from images of any size to predictions.

  Writes `model_<platform>.jax_export`, a serialized `jax.export.Exported`, or the folder
  `saved_model_<platform>`, and `export_<platform>.json`, which describes input and output. The program
  for this machine's platform is read again and compared with `Restored.predict`; one that differs is removed.
  Its size and the times of both are logged.

  Args:
    restored: the model.
    out: folder for the files.
    format: one of `FORMATS`.
    platforms: some of `PLATFORMS`.
    canvas: (height, width) that images are laid on, pixels; None for what the config says, see
      `tasks.task.Task.image_program`.
    batch: number of images of one size that a call takes; None for one image without a batch dimension.
    subjects: images to compare predictions for; None for a drawn one. An image that cannot be read is an
      error in its place.

  Raises:
    UserError: the format does not exist, the config cannot be exported, a file cannot be written, or the
      predictions differ.
  """
  if format == "onnx":
    raise UserError(
      "--format=onnx does not exist: no maintained converter reads JAX's programs; use --format=stablehlo, "
      "or --format=saved_model for TensorFlow"
    )
  here = {platform for platform in platforms if PLATFORMS[platform] == jax.default_backend()}
  if format == "saved_model" and set(platforms) != here:
    raise UserError(
      f"--format=saved_model --platforms={','.join(platforms)} does not exist on this machine: "
      "TensorFlow has to run a program before it is kept, since it may be older than JAX; use "
      "--format=stablehlo"
    )
  if restored.config.mesh.shape[-1] != 1:
    raise UserError(
      f"config.mesh.shape={tuple(restored.config.mesh.shape)}: an exported program runs on one device; set "
      "--config.mesh.shape='(-1, 1)'"
    )
  make_folder(out)
  for platform in platforms:
    with target.tracing_for(PLATFORMS[platform]):
      structure = models.structure_of(restored.config)
      program = task_of(restored.config).image_program(restored.config, structure, canvas)
      exported = exported_program(program, restored.arrays, platform, batch)
    path = write(exported, program, out, format, platform)
    description = described(exported, program, restored, platform)
    write_whole(out / f"export_{platform}.json", json.dumps(description, indent=2) + "\n")
    size = size_of_files(path)
    logging.info(
      "%s: %.1f MB, canvas %d x %d, images per call: %d",
      *(path, size / 1e6, *program.canvas, batch or 1),
    )
    if platform not in here:
      logging.warning(
        "%s is not checked: this machine has no %s; run it on one image there", path, platform
      )
      continue
    chosen = subjects or iter([drawn(program.canvas)])
    try:
      compare(restored, program, load(path, format), chosen, path, batch)
    except UserError:
      path.rmtree() if path.is_dir() else path.unlink()
      raise


def exported_program(
  program: ImageProgram, arrays: Arrays, platform: str, batch: int | None = None
) -> jax_export.Exported:
  """Returns a program with the model's arrays inside, for images of symbolic height and width."""
  arrays_inside = jax.device_get(arrays)
  scope = jax_export.SymbolicScope([str(limit) for limit in program.limits])
  shape = jax_export.symbolic_shape(
    "h, w, 3" if batch is None else f"{batch}, h, w, 3", scope=scope
  )

  @jax.jit
  def predict(image):
    image_BHWC = image[None] if batch is None else image
    found = program.run(jax.tree.map(jnp.asarray, arrays_inside), image_BHWC)
    return jax.tree.map(lambda values: values[0], found) if batch is None else found

  return jax_export.export(predict, platforms=[platform])(jax.ShapeDtypeStruct(shape, jnp.uint8))


def write(
  exported: jax_export.Exported, program: ImageProgram, out: epath.Path, format: str, platform: str
) -> epath.Path:
  """Writes a program in one of the formats that exist; returns its path."""
  if format == "stablehlo":
    path = out / f"model_{platform}.jax_export"
    write_whole(path, bytes(exported.serialize()))
    return path
  path = out / f"saved_model_{platform}"
  shape = exported.in_avals[0].shape
  function = jax2tf.convert(
    exported.call,
    polymorphic_shapes=[", ".join(map(str, shape))],
    polymorphic_constraints=[str(limit) for limit in program.limits],
    native_serialization_platforms=[platform],
    with_gradient=False,
  )
  sides = [edge if isinstance(edge, int) else None for edge in shape]
  module = tf.Module()
  module.__call__ = tf.function(
    function,
    autograph=False,
    input_signature=[tf.TensorSpec(sides, tf.uint8, name="image")],
  )
  with writing(path):
    tf.saved_model.save(module, str(path))
  return path


def load(path: epath.Path, format: str) -> Call:
  """Returns the function that a file or folder of `write` has, compiled when it is called."""
  if format == "stablehlo":
    call = jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)
    return lambda image: jax.device_get(call(image))
  module = tf.saved_model.load(str(path))
  return lambda image: {name: x.numpy() for name, x in module(image).items()}


def described(
  exported: jax_export.Exported, program: ImageProgram, restored: Restored, platform: str
) -> dict[str, Any]:
  """Returns what a user of a program has to know, as JSON."""

  def array(value: jax.core.ShapedArray) -> dict[str, Any]:
    shape = [edge if isinstance(edge, int) else str(edge) for edge in value.shape]
    return {"dtype": str(value.dtype), "shape": shape}

  outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  config = restored.config
  return {
    "platform": platform,
    "input": {"image": array(exported.in_avals[0]) | {"values": "RGB, 0 to 255"}},
    "sizes_that_fit": [str(limit) for limit in program.limits],
    "output": {name: array(value) for name, value in outputs.items()},
    "canvas": list(program.canvas),
    "step": restored.step,
    "model": config.model.name,
    "data": config.data.name,
    "jax": jax.__version__,
    "calling_convention_version": exported.calling_convention_version,
  } | program.classes


def drawn(canvas: tuple[int, int]) -> Subject:
  """Returns an image of rectangles in many colours, of the size of a canvas."""
  rng = np.random.default_rng(0)
  height, width = canvas
  image_HWC = np.full((height, width, 3), 96, np.uint8)
  for _ in range(24):
    y, x = (int(rng.integers(edge)) for edge in canvas)
    rows, columns = (int(rng.integers(edge // 16, edge // 2) + 1) for edge in canvas)
    image_HWC[y : y + rows, x : x + columns] = rng.integers(0, 256, 3)
  return Subject("a drawn image", image_HWC, None)


def compare(
  restored: Restored,
  program: ImageProgram,
  call: Call,
  subjects: Iterator[Subject | UserError],
  path: epath.Path,
  batch: int | None = None,
) -> None:
  """Compares a program with `Restored.predict`, and logs their difference and their times.

  With a batch, a call gets an image together with copies of it that are shifted around its edges.

  Raises:
    UserError: an image cannot be read or does not fit on the canvas, or the predictions differ.
  """
  check = CHECKS[str(restored.config.model.dtype)]
  images = batch or 1
  differences: list[float] = []
  for subject in subjects:
    if isinstance(subject, UserError):
      raise subject
    image_HWC = subject.image_HWC
    height, width = image_HWC.shape[:2]
    if not program.fits((height, width)):
      raise UserError(
        f"--images: {subject.name} has {height} x {width} pixels and does not fit on the canvas of "
        f"{program.canvas[0]} x {program.canvas[1]}; set a larger --canvas, or leave it out"
      )
    image_BHWC = np.stack([np.roll(image_HWC, i * width // images, axis=1) for i in range(images)])
    given = image_HWC if batch is None else image_BHWC
    expected = restored.predict(list(image_BHWC))
    try:
      found = call(given)
    except Exception as error:
      advice = "use --format=stablehlo" if path.is_dir() else "set a smaller --canvas or --batch"
      raise UserError(
        f"{path} does not run and was removed; {advice}; the reason is {one_line(error, 300)}"
      ) from error
    if batch is None:
      found = {name: values[None] for name, values in found.items()}
    of_subject = [
      check.compare(program)({name: values[i] for name, values in found.items()}, *pair)
      for i, pair in enumerate(zip(image_BHWC, expected, strict=True))
    ]
    logging.info(
      "%s: %s from restore(...).predict %.2g; per image %.0f ms, predict %.0f ms",
      subject.name,
      check.name,
      check.over_images(of_subject),
      milliseconds(call, given) / images,
      milliseconds(restored.predict, image_BHWC) / images,
    )
    differences += of_subject
  total = check.over_images(differences)
  if not total <= check.most:
    raise UserError(
      f"{path} differs from restore(...).predict, {check.name}: {total:.2g}, more than {check.most:g}, and "
      "was removed; set --canvas to the canvas that the config lays such images on, or compare other images "
      "with --images"
    )


def milliseconds(call: Callable[[Any], Any], argument: Any) -> float:
  """Returns the median time of some calls in milliseconds."""
  times = []
  for _ in range(TIMED_CALLS):
    start = time.perf_counter()
    call(argument)
    times.append(time.perf_counter() - start)
  return 1000 * statistics.median(times)


def size_of_files(path: epath.Path) -> int:
  """Returns the size of a file, or of all files of a folder, in bytes."""
  if not path.is_dir():
    return path.stat().length
  return sum(size_of_files(inside) for inside in path.iterdir())
