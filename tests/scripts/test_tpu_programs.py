"""The arithmetic of a training step against that of its forward pass."""

from fpt_jax import models
from fpt_jax.configs import cityscapes
from fpt_jax.models.costs import count
from fpt_jax.tasks.task import task_of
from scripts.tpu_programs import random_key, training_costs


def costs_by_module(costs):
  """Multiply-adds without and in attention, by the first part of a module's name."""
  sums = {}
  for module, cost in costs.items():
    own = sums.setdefault(module.split(".")[0], [0, 0])
    own[0] += cost.multiply_adds
    own[1] += cost.attention
  return sums


def test_a_gradient_has_two_products_for_each_of_the_forward_pass():
  """One for the inputs and one for the weights, or for the second factor of attention.

  A frozen backbone has none, and the stem of a trained one has none for the image.
  """
  config = cityscapes.get_config("demo,fpt=st")
  config.data.crop = (32, 32)
  structure, task = models.structure_of(config), task_of(config)
  batch = task.batch_shapes(config, 2, (32, 32))

  def losses(arrays, batch, key):
    return sum(structure.fill(arrays).losses(batch, key).values())

  forward = costs_by_module(count(losses, structure, batch, random_key()))
  trained = costs_by_module(training_costs(config, structure, batch))
  stem = 2 * 16 * 16 * (7 * 7 * 3) * 16  # 7 x 7 with stride 2 from 3 to 16 channels
  assert forward["backbone"][0] > 4 * stem and forward["fpt"][1] > 0
  for module in ("pyramid", "fpt", "head"):
    assert trained[module] == [3 * products for products in forward[module]]
  assert trained["backbone"][0] == 3 * forward["backbone"][0] - stem

  config.model.backbone.frozen = True
  frozen = costs_by_module(training_costs(config, structure, batch))
  assert frozen["backbone"] == forward["backbone"]
  assert frozen["fpt"] == trained["fpt"]
