"""The step of a training: a pure function of its state and a batch."""

from collections.abc import Callable, Collection, Container, Mapping
from typing import Any

import jax
import optax

from fpt_jax import optim
from fpt_jax.models.fpt.health import Figures
from fpt_jax.models.state import Arrays, Skeleton, arrays_of


def training_state(
  arrays: Mapping[str, Any],
  trained: Container[str],
  optimizer_state,
  average: Mapping[str, Any] | None = None,
) -> dict:
  """Returns the state of a training step: arrays, or their shapes, divided into trained ones and the rest.

  Args:
    arrays: arrays of the model by name.
    trained: names of the trained parameters.
    optimizer_state: state of the optimizer.
    average: moving average of those arrays that have one, see `optim.averaged`; None for none.
  """
  return {
    "trained": {n: a for n, a in arrays.items() if n in trained},
    "rest": {n: a for n, a in arrays.items() if n not in trained},
    "optimizer": optimizer_state,
    "average": dict(average or {}),
  }


def arrays_to_use(state: Mapping[str, Any]) -> Arrays:
  """Returns the arrays of the model that is evaluated: averages, and the others as they are."""
  return {**state["trained"], **state["rest"], **state["average"]}


def state_shapes(
  structure: Skeleton,
  trained: Container[str],
  optimizer: optax.GradientTransformation,
  averaged: Collection[str] = (),
) -> dict:
  """Returns the shapes and dtypes of the state of a training step, see `training_state`.

  Args:
    structure: skeleton of the model.
    trained: names of the trained parameters.
    optimizer: the optimizer.
    averaged: names of the arrays that have a moving average.
  """
  shapes = structure.shapes
  state = training_state(shapes, trained, None, {n: shapes[n] for n in averaged})
  return state | {"optimizer": jax.eval_shape(optimizer.init, state["trained"])}


def make_train_step(
  structure: Skeleton,
  optimizer: optax.GradientTransformation,
  total_steps: int,
  parts: int = 1,
  ema_decay: float = 0.0,
) -> Callable:
  """Returns the pure function of one step: (state, batch, step, key, measure) -> (state, losses, figures).

  If a step computes its batch in several parts, each part is a call, and `step` counts the parts since the
  beginning of the training.

  `figures` are the norm of the updates, and, if `measure` is true, `optim.norms` and those of FPT's health,
  see `models.fpt.health`; otherwise zeros in their place. The arrays in `state["average"]` are averaged with
  `ema_decay`, see `optim.moving_average`. The key is the same in every step. It is an argument so that runs
  with different seeds share the compiled program.

  Randomness is a function of the seed and the step alone, so that a resumed run equals an
  uninterrupted one. Only `state["trained"]` is differentiated.
  """

  def train_step(state, batch, step, key, measure):
    def total_loss(trained):
      model = structure.fill({**trained, **state["rest"]})
      measured = Figures(wanted=measure)
      losses = model.losses(
        batch,
        jax.random.fold_in(key, step),
        progress=step // parts / total_steps,
        measured=measured,
      )
      after = arrays_of(model)
      total = sum(losses.values())
      rest = {n: after[n] for n in state["rest"]}
      return total, ({"total_loss": total} | losses, rest, measured.values)

    gradients, (losses, rest, figures) = jax.grad(total_loss, has_aux=True)(state["trained"])
    updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["trained"])
    trained = optax.apply_updates(state["trained"], updates)
    mean = optim.mean_gradient(gradients, state["optimizer"])
    norms = Figures(wanted=measure)
    norms.add(lambda: optim.norms(mean, trained))
    figures |= norms.values | {"update_norm": optim.global_norm(updates)}
    average = optim.moving_average(
      state["average"], trained | rest, ema_decay, calls=step + 1, parts=parts
    )
    updated = {"trained": trained, "rest": rest, "optimizer": optimizer_state, "average": average}
    return updated, losses, figures

  return train_step
