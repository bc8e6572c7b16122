"""The optimizer, its schedule, which parameters are trained and how, and the average of the weights."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fpt_jax.errors import UserError
from fpt_jax.models.backbones.context_blocks import in_context_block
from fpt_jax.models.state import Skeleton, within
from fpt_jax.run.sharding import MIN_SHARED_SIZE


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
    UserError: no parameter begins with a name in `config.optim.frozen`, or none that is trained has a name
      like one in `config.optim.groups`.
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

  trained = {name for name in parameters if not is_frozen(name)}
  for pattern, _, _ in config.optim.groups:
    if not any(re.search(pattern, name) for name in trained):
      raise UserError(
        f"config.optim.groups has {pattern!r}, but no trained parameter has a name like this, such as "
        f"{min(trained, default='backbone.conv1.kernel')}"
      )
  return trained


def optimizer(config) -> optax.GradientTransformation:
  """Returns the optimizer, which takes dictionaries of arrays by name.

  "sgd" is SGD with momentum, whose weight decay is added to the gradient before the momentum (paper, 4.1).
  "adamw" adds the weight decay to the update instead (Loshchilov and Hutter 2019, algorithm 2). `factors`
  says which rate and decay a parameter has.

  If `config.optim.accumulate_steps` is more than 1, it takes the gradients of so many parts of a batch one
  after the other. Its updates are zero until the last part, which gives the update of the mean gradient. The
  schedule counts batches.
  """
  optim = config.optim

  def decay(updates, parameters):
    of = factors(config, parameters)
    return {n: u + optim.weight_decay * of[n].decay * parameters[n] for n, u in updates.items()}

  def at_rates(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    # without a state of its own: the states of earlier versions fit
    def update(updates, state, parameters):
      updates, state = transformation.update(updates, state, parameters)
      of = factors(config, parameters)
      return {n: u if of[n].rate == 1 else of[n].rate * u for n, u in updates.items()}, state

    return optax.GradientTransformation(transformation.init, update)

  def clip(updates, parameters):
    del parameters
    factor = jnp.minimum(1.0, optim.clip_norm / global_norm(updates))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)

  if optim.name == "sgd":
    sgd = optax.sgd(schedule(config), momentum=optim.momentum)
    steps = [optax.stateless(decay), at_rates(sgd)]
  else:
    adam = optax.scale_by_adam(optim.beta1, optim.beta2, optim.epsilon)
    rate = optax.scale_by_learning_rate(schedule(config))
    steps = [adam, optax.stateless(decay), at_rates(rate)]
  clipping = optax.stateless(clip) if optim.clip_norm else optax.identity()
  chain = optax.chain(clipping, *steps)
  if optim.accumulate_steps == 1:
    return chain
  return optax.MultiSteps(chain, optim.accumulate_steps).gradient_transformation()


class Factors(NamedTuple):
  """Factors of the learning rate and of the weight decay."""

  rate: float
  decay: float


def factors(config, parameters: Collection[str]) -> dict[str, Factors]:
  """Returns the factors of each trained parameter: those of its group, of biases and of normalisations.

  Args:
    config: a complete config. A parameter belongs to the first of `config.optim.groups` that its name fits.
    parameters: names of the trained parameters.
  """
  optim = config.optim

  def of(name: str) -> Factors:
    groups = (
      Factors(rate, decay) for pattern, rate, decay in optim.groups if re.search(pattern, name)
    )
    rate, decay = next(groups, (1.0, 1.0))
    norm = of_norm(name, parameters)
    bias = is_bias(name) and not norm
    return Factors(
      rate * optim.bias_rate if bias else rate,
      0.0 if (bias or norm) and not optim.decay_biases_and_norms else decay,
    )

  return {name: of(name) for name in parameters}


def is_bias(name: str) -> bool:
  return any(part.endswith(("bias", "biases")) for part in name.split("."))


def of_norm(name: str, parameters: Collection[str]) -> bool:
  """Whether a parameter belongs to a normalisation: a scale, or a bias beside a scale."""
  beginning, _, last = name.rpartition(".")
  return last == "scale" or (last == "bias" and f"{beginning}.scale" in parameters)


def global_norm(arrays) -> jax.Array:
  """Returns the Euclidean norm over all arrays of a tree together, as `optax.global_norm`.

  Most arrays of a model are small, and a reduction of each of them takes longer to compile, and to start,
  than to run. They are joined, unless they may be stored in shares.
  """
  leaves = jax.tree.leaves(arrays)
  small = [leaf.reshape(-1) for leaf in leaves if leaf.size < MIN_SHARED_SIZE]
  large = [leaf for leaf in leaves if leaf.size >= MIN_SHARED_SIZE]
  joined = [jnp.concatenate(small), *large] if small else large
  return jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in joined))


def norms(gradient, trained) -> dict[str, jax.Array]:
  """Returns Euclidean norms over all trained parameters together, float32 scalars.

  Args:
    gradient: gradient of the losses, before clipping and weight decay.
    trained: parameters after the step.
  """
  return {"grad_norm": global_norm(gradient), "param_norm": global_norm(trained)}


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


def averaged(config, structure: Skeleton, trained: Collection[str]) -> set[str]:
  """Returns the names of the arrays that have a moving average: what training changes, or nothing.

  Args:
    config: a complete config; with `optim.ema_decay=0`, nothing has an average.
    structure: skeleton of the model.
    trained: names of the trained parameters.
  """
  return set(trained) | structure.statistics() if config.optim.ema_decay else set()


def moving_average(
  average: Mapping[str, jax.Array],
  arrays: Mapping[str, jax.Array],
  decay: float,
  *,
  calls: int | jax.Array,
  parts: int,
) -> dict[str, jax.Array]:
  """Returns the exponential moving average of arrays after a call of the training step.

  The average begins as the initial weights and forgets them: the decay at update n is at most n / (n + 9), as
  in TensorFlow's ExponentialMovingAverage with its number of updates.

  Args:
    average: the average before, by name.
    arrays: arrays after the call, these and others.
    decay: share of the average that an update keeps, 0 to 1.
    calls: number of calls, this one included.
    parts: calls for an update, which the last of them makes; the others leave the average as it is.
  """
  update = calls // parts
  weight = 1 - jnp.minimum(decay, update / (update + 9))
  weight = jnp.where(calls % parts == 0, weight, 0.0)
  return {n: old + weight * (arrays[n] - old) for n, old in average.items()}
