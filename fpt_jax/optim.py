"""SGD with momentum, its schedule, and what of a model is trained."""

import jax.numpy as jnp
import optax

from fpt_jax.errors import UserError
from fpt_jax.models.state import within


def total_steps(config) -> int:
  """Training steps: `config.steps`, or as many as `config.images` makes at the batch size."""
  return config.steps or max(1, round(config.images / config.batch_size))


def schedule(config) -> optax.Schedule:
  """The learning rate by step: linear warm-up, then steps (paper, 4.1), half a cosine, or a
  power of the share that is left (paper, 4.2).

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
  """Names of the parameters that gradients change; of a frozen backbone, none.

  Raises:
    UserError: `config.optim.frozen` names what is no parameter.
  """
  frozen = (*config.optim.frozen, *(("backbone",) if config.model.backbone.frozen else ()))
  for beginning in config.optim.frozen:
    if not any(within(name, beginning) for name in parameters):
      raise UserError(
        f"config.optim.frozen names {beginning!r}, with which no parameter begins; --mode=analyze "
        "lists the modules"
      )
  return {name for name in parameters if not any(within(name, part) for part in frozen)}


def optimizer(config) -> optax.GradientTransformation:
  """SGD with momentum; weight decay joins the gradient before the momentum (paper, 4.1)."""
  optim = config.optim
  return optax.chain(
    optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
    optax.add_decayed_weights(optim.weight_decay),
    optax.sgd(schedule(config), momentum=optim.momentum),
  )
