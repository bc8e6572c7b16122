"""SGD with momentum, its schedule, and what of a model is trained."""

import jax.numpy as jnp
import optax

from fpt_jax.errors import UserError


def batch_ratio(config) -> float:
  """Global batch size over the one the config's rates and steps are written for."""
  return config.batch_size / config.optim.base_batch_size


def total_steps(config) -> int:
  """Training steps at the config's batch size: twice the images a step, half the steps."""
  return max(1, round(config.steps / batch_ratio(config)))


def schedule(config) -> optax.Schedule:
  """The learning rate by step: linear warm-up, then steps (paper, 4.1) or half a cosine.

  Raises:
    UserError: the schedule does not exist.
  """
  optim = config.optim
  ratio = batch_ratio(config)
  peak = optim.learning_rate * ratio
  if optim.schedule == "step":
    decay = optax.piecewise_constant_schedule(
      peak, {max(1, round(step / ratio)): optim.decay_factor for step in optim.decay_steps}
    )
  elif optim.schedule == "cosine":
    decay = optax.cosine_decay_schedule(peak, total_steps(config))
  else:
    raise UserError(
      f"config.optim.schedule={optim.schedule!r} does not exist; choose step or cosine"
    )

  def rate(step):
    progress = jnp.minimum(step / max(optim.warmup_steps, 1), 1.0)
    return decay(step) * (optim.warmup_factor + (1 - optim.warmup_factor) * progress)

  return rate


def trainable(config, parameters: set[str]) -> set[str]:
  """Names of the parameters that gradients change; of a frozen backbone, none."""
  if not config.model.backbone.frozen:
    return set(parameters)
  return {name for name in parameters if not name.startswith("backbone.")}


def optimizer(config) -> optax.GradientTransformation:
  """SGD with momentum; weight decay joins the gradient before the momentum (paper, 4.1)."""
  optim = config.optim
  return optax.chain(
    optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
    optax.add_decayed_weights(optim.weight_decay),
    optax.sgd(schedule(config), momentum=optim.momentum),
  )
