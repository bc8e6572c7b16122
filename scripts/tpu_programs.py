"""The programs of a config that `tpu_compile.py` compiles, with the shapes of their arguments.

They are those that `fpt_jax.train` and an evaluation run, and FPT alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, FrozenConfigDict

from fpt_jax import models, optim
from fpt_jax.models.costs import Cost, count
from fpt_jax.models.feature_map import FeatureMap
from fpt_jax.models.fpt import build_fpt
from fpt_jax.models.state import Skeleton, skeleton
from fpt_jax.ops import target
from fpt_jax.run import sharding
from fpt_jax.tasks.task import task_of
from fpt_jax.train_step import make_train_step, state_shapes

PARTS = ("train", "eval", "fpt")


@dataclasses.dataclass(frozen=True)
class Work:
  """A program to compile.

  Attributes:
    name: what it is called in reports.
    canvas: (height, width) of the images, pixels.
    lower: lowers the program for its devices.
    cost: counts the arithmetic of the devices that share an image.
    shares: number of these devices.
  """

  name: str
  canvas: tuple[int, int]
  lower: Callable[[], jax.stages.Lowered]
  cost: Callable[[], Cost]
  shares: int

  def lowered(self) -> jax.stages.Lowered:
    """The lowered program; code that depends on the backend chooses as on a TPU."""
    with target.tracing_for("tpu"):
      return self.lower()

  def flops(self) -> int:
    """Arithmetic operations of one device; a multiply-add is two."""
    with target.tracing_for("tpu"):
      cost = self.cost()
    return 2 * (cost.multiply_adds + cost.attention) // self.shares


def works(part: str, config: ConfigDict, devices: list, images: int) -> list[Work]:
  """Returns the programs of a part.

  Args:
    part: one of `PARTS`.
    config: complete config.
    devices: devices of a topology.
    images: images on each device, or on the devices that share an image.

  Raises:
    UserError: the config does not fit the part.
  """
  mesh = sharding.mesh(config.mesh.shape, devices=devices)
  return {"train": train, "eval": evaluation, "fpt": fpt}[part](config, mesh, images)


def placed(tree, where: NamedSharding):
  """Shapes with one sharding."""
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), tree)


def total(costs: dict[str, Cost]) -> Cost:
  return sum(costs.values(), Cost())


def random_key() -> jax.ShapeDtypeStruct:
  return jax.eval_shape(lambda: jax.random.key(0))


def train(config: ConfigDict, mesh: Mesh, images: int) -> list[Work]:
  """The step that `fpt_jax.train` runs.

  Its arithmetic is that of the forward pass and of the gradient of the trained parameters, without what is
  computed twice to save memory. Figures of FPT's health, which few steps have, are not counted.
  """
  structure = models.structure_of(config)
  trained, optimizer = optim.trainable(config, structure.parameters()), optim.optimizer(config)
  averaged = optim.averaged(config, structure, trained)
  state = sharding.laid_out(state_shapes(structure, trained, optimizer, averaged), mesh)
  whole = sharding.replicated(mesh)
  task = task_of(config)
  canvas = task.canvas(config)

  def lower() -> jax.stages.Lowered:
    decay = config.optim.ema_decay
    step = make_train_step(structure, optimizer, optim.total_steps(config), ema_decay=decay)
    batch = task.batch_shapes(config, images * sharding.image_groups(mesh), canvas)
    numbers = (
      jax.ShapeDtypeStruct((), jnp.int32),
      random_key(),
      jax.ShapeDtypeStruct((), jnp.bool_),
    )
    outputs = (sharding.shardings(state), whole, whole)
    return jax.jit(step, donate_argnums=0, out_shardings=outputs).lower(
      state, placed(batch, sharding.over_batch(mesh)), *placed(numbers, whole)
    )

  def cost() -> Cost:
    return total(training_costs(config, structure, task.batch_shapes(config, images, canvas)))

  return [Work("train", canvas, lower, cost, mesh.shape["query"])]


def training_costs(config: ConfigDict, structure: Skeleton, batch: dict) -> dict[str, Cost]:
  """Returns the cost of the losses of a batch and of their gradient to the trained parameters, by module."""
  trained = optim.trainable(config, structure.parameters())

  def gradient(arrays, batch, key):
    def loss(parameters):
      return sum(structure.fill({**arrays, **parameters}).losses(batch, key).values())

    return jax.grad(loss)({n: arrays[n] for n in trained})

  return count(gradient, structure, batch, random_key())


def evaluation(config: ConfigDict, mesh: Mesh, images: int) -> list[Work]:
  """The program that an evaluation runs for each batch; its arithmetic is that of the forward pass."""
  structure = models.structure_of(config)
  task = task_of(config)
  everything = images * sharding.image_groups(mesh)
  program, inputs, options = task.eval_program(config, structure, mesh, everything)
  leaves = jax.tree.leaves(inputs)
  image_BHWC = next(leaf for leaf in leaves if leaf.ndim == 4)
  height, width = image_BHWC.shape[1:3]

  def lower() -> jax.stages.Lowered:
    arrays = sharding.laid_out(structure.shapes, mesh)
    return program.lower(arrays, *placed(inputs, sharding.over_batch(mesh)), **options)

  def forward(arrays, image_BHWC, size_B2):
    return task.forward(structure.fill(arrays), image_BHWC, size_B2)

  def cost() -> Cost:
    image_BHWC = jax.ShapeDtypeStruct((images, height, width, 3), jnp.float32)
    size_B2 = jax.ShapeDtypeStruct((images, 2), jnp.int32)
    once = total(count(forward, structure, image_BHWC, size_B2))
    return once + once if config.eval.flip else once

  return [Work("eval", (height, width), lower, cost, mesh.shape["query"])]


def fpt(config: ConfigDict, mesh: Mesh, images: int) -> list[Work]:
  """FPT alone: the forward pass, and the gradient to parameters and inputs, as a training step needs it."""
  model, strides = FrozenConfigDict(config.model), strides_of(config)
  structure = skeleton(
    lambda: build_fpt(model, (model.pyramid.channels,) * len(strides), rngs=nnx.Rngs(0))
  )
  height, width = canvas = task_of(config).canvas(config)

  def levels(images: int) -> tuple[FeatureMap, ...]:
    sizes = [(images, -(-height // stride), -(-width // stride)) for stride in strides]
    channels = config.model.pyramid.channels
    return tuple(
      FeatureMap(
        jax.ShapeDtypeStruct((*size, channels), config.model.dtype),
        jax.ShapeDtypeStruct(size, bool),
        stride,
      )
      for size, stride in zip(sizes, strides, strict=True)
    )

  def work(name: str, run: Callable) -> Work:
    def lower() -> jax.stages.Lowered:
      return jax.jit(run).lower(
        sharding.laid_out(structure.shapes, mesh),
        placed(levels(images * sharding.image_groups(mesh)), sharding.over_batch(mesh)),
        placed(random_key(), sharding.replicated(mesh)),
      )

    def cost() -> Cost:
      return total(count(run, structure, levels(images), random_key()))

    return Work(name, canvas, lower, cost, mesh.shape["query"])

  return [work("forward", fpt_forward(structure)), work("gradient", fpt_gradient(structure))]


def strides_of(config: ConfigDict) -> tuple[int, ...]:
  """Strides of the four levels: those of P2 to P5, or the output stride of a dilated backbone."""
  backbone = config.model.backbone
  return (backbone.output_stride,) * 4 if "output_stride" in backbone else (4, 8, 16, 32)


def fpt_forward(structure: Skeleton) -> Callable:
  """The function from arrays, levels and a key to the values of the transformed levels."""

  def forward(arrays, maps, key):
    return tuple(m.values_BHWC for m in structure.fill(arrays)(maps, key=key))

  return forward


def fpt_gradient(structure: Skeleton) -> Callable:
  """The gradient of a function of all transformed levels to the parameters and the levels."""
  forward = fpt_forward(structure)

  def gradient(arrays, maps, key):
    parameters = {n: arrays[n] for n in structure.parameters()}
    values = [m.values_BHWC for m in maps]

    def square(parameters, values):
      inputs = tuple(m.with_values(v) for m, v in zip(maps, values, strict=True))
      outputs = forward({**arrays, **parameters}, inputs, key)
      return sum(jnp.sum(jnp.square(o.astype(jnp.float32))) for o in outputs)

    return jax.grad(square, argnums=(0, 1))(parameters, values)

  return gradient
