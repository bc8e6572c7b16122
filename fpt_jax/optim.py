"""SGD with momentum, its schedules, and which parameters are trained."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from fpt_jax.errors import UserError
from fpt_jax.models.backbones.context_blocks import in_context_block
from fpt_jax.models.state import within


def total_steps(config) -> int:
  """Returns the number of training steps: `config.steps`, or `config.train_images` / `config.batch_size`."""
  return config.steps or max(1, round(config.train_images / config.batch_size))


def schedule(config) -> optax.Schedule:
  """Returns the learning rate as a function of the step.

  A linear warm-up is followed by "step" decays (paper, 4.1), half a "cosine", or "poly": a power of the
  remaining share of the steps (paper, 4.2).

  Raises:
    UserError: the schedule does not exist.
  """
  optim = config.optim
  peak = optim.learning_rate * config.batch_size / optim.base_batch_size
  total = total_steps(config)
  if optim.schedule == "step":
    decay = optax.piecewise_constant_schedule(
      peak, {max(1, round(share * total)): optim.decay_factor for share in optim.decay_at}
    )
  elif optim.schedule == "cosine":
    decay = optax.cosine_decay_schedule(peak, total)
  elif optim.schedule == "poly":
    decay = optax.polynomial_schedule(peak, 0.0, optim.power, total)
  else:
    raise UserError(
      f"config.optim.schedule={optim.schedule!r} does not exist; choose step, cosine or poly"
    )

  if not optim.warmup_steps:
    return decay

  def rate(step):
    progress = jnp.minimum(step / optim.warmup_steps, 1.0)
    return decay(step) * (optim.warmup_factor + (1 - optim.warmup_factor) * progress)

  return rate


def trainable(config, parameters: set[str]) -> set[str]:
  """Returns the names of the trained parameters: all but those that the config freezes.

  `config.model.backbone.frozen` freezes what a pretrained network has. Context blocks are in no file of
  weights, so they are trained in a frozen backbone too. A name in `config.optim.frozen` freezes everything
  below it.

  Args:
    config: a complete config.
    parameters: names of all parameters (`Skeleton.parameters`).

  Raises:
    UserError: no parameter begins with a name in `config.optim.frozen`.
  """
  for module in config.optim.frozen:
    if not any(within(name, module) for name in parameters):
      raise UserError(
        f"config.optim.frozen has {module!r}, but no parameter begins with it; --mode=analyze lists "
        "the modules"
      )

  def is_frozen(name: str) -> bool:
    if any(within(name, module) for module in config.optim.frozen):
      return True
    pretrained = within(name, "backbone") and not in_context_block(name)
    return pretrained and config.model.backbone.frozen

  return {name for name in parameters if not is_frozen(name)}


def optimizer(config) -> optax.GradientTransformation:
  """Returns SGD with momentum; weight decay is added to the gradient before the momentum (paper, 4.1).

  It takes dictionaries of arrays by name. `optim.bias_rate` multiplies the gradients of biases, and so the
  updates.

  If `config.optim.accumulate_steps` is more than 1, it takes the gradients of so many parts of a batch one
  after the other. Its updates are zero until the last part, which gives the update of the mean gradient. The
  schedule counts batches.
  """
  optim = config.optim
  steps = [
    optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
    optax.add_decayed_weights(
      optim.weight_decay, mask=None if optim.decay_biases_and_norms else weights_alone
    ),
  ]
  if optim.bias_rate != 1:
    steps.append(optax.masked(optax.scale(optim.bias_rate), biases))
  sgd = optax.chain(*steps, optax.sgd(schedule(config), momentum=optim.momentum))
  if optim.accumulate_steps == 1:
    return sgd
  return optax.MultiSteps(sgd, optim.accumulate_steps).gradient_transformation()


def weights_alone(parameters: Collection[str]) -> dict[str, bool]:
  """Marks the parameters, given by name, that are neither biases nor belong to a normalisation."""
  return {n: not (of_norm(n, parameters) or is_bias(n)) for n in parameters}


def biases(parameters: Collection[str]) -> dict[str, bool]:
  """Marks the parameters, given by name, that are biases, except those of normalisations."""
  return {n: is_bias(n) and not of_norm(n, parameters) for n in parameters}


def is_bias(name: str) -> bool:
  return any(part.endswith(("bias", "biases")) for part in name.split("."))


def of_norm(name: str, parameters: Collection[str]) -> bool:
  """Whether a parameter belongs to a normalisation: a scale, or a bias beside a scale."""
  beginning, _, last = name.rpartition(".")
  return last == "scale" or (last == "bias" and f"{beginning}.scale" in parameters)


def norms(gradient, trained, state) -> dict[str, jax.Array]:
  """Returns Euclidean norms over all trained parameters together, float32 scalars.

  All of these arrays are in memory in any case. The updates are not; their norm is the learning rate times
  that of the momentum.

  Args:
    gradient: gradient of the losses, before clipping and weight decay.
    trained: parameters after the step.
    state: state of the optimizer after the step.
  """
  momentum = optax.tree_utils.tree_get(state, "trace")
  return {
    "grad_norm": optax.global_norm(gradient),
    "param_norm": optax.global_norm(trained),
    "momentum_norm": optax.global_norm(momentum),
  }


def mean_gradient(gradients, state):
  """Returns the mean of the gradients of a batch up to its latest part.

  Args:
    gradients: gradients of the latest part.
    state: state of the optimizer before it takes them.
  """
  if not isinstance(state, optax.MultiStepsState):
    return gradients
  return jax.tree.map(
    lambda g, mean: mean + (g - mean) / (state.mini_step + 1), gradients, state.acc_grads
  )
