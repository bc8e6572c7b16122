"""The paper's training recipe, step by step, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fpt_jax import models, optim
from fpt_jax.configs import cityscapes, coco_box, coco_mask
from fpt_jax.errors import UserError


@pytest.mark.parametrize(
  ("module", "total", "drop"), [(coco_mask, 160_000, 120_000), (coco_box, 100_000, 80_000)]
)
def test_the_papers_schedule(module, total, drop):
  config = module.get_config()
  assert optim.total_steps(config) == total
  rate = optim.schedule(config)
  assert rate(0) == pytest.approx(0.05 * 0.001)
  assert rate(250) == pytest.approx(0.05 * (0.001 + 0.999 / 2))
  assert rate(500) == rate(drop - 1) == pytest.approx(0.05)
  assert rate(drop + 1) == rate(total) == pytest.approx(0.005)


def test_learning_rate_is_linear_in_the_batch_size():
  config = coco_mask.get_config()
  config.batch_size = 32
  assert optim.total_steps(config) == 40_000
  rate = optim.schedule(config)
  assert rate(1000) == pytest.approx(0.2)
  assert rate(29_999) == pytest.approx(0.2) and rate(30_001) == pytest.approx(0.02)
  config.steps = 3
  assert optim.total_steps(config) == 3


def test_unknown_schedules_are_reported():
  config = coco_mask.get_config()
  config.optim.schedule = "linear"
  with pytest.raises(UserError, match="'linear' does not exist; choose step, cosine or poly"):
    optim.schedule(config)


def test_sgd_with_momentum_and_weight_decay(rng):
  config = coco_mask.get_config()
  config.optim.warmup_steps = 0
  config.optim.clip_norm = 1.0
  optimizer = optim.optimizer(config)
  p = rng.standard_normal(5).astype(np.float32)
  ours, state = {"p": p}, optimizer.init({"p": p})
  momentum, expected = np.zeros(5), np.float64(p)
  update = jax.jit(optimizer.update)
  for _ in range(3):
    g = 3 * rng.standard_normal(5)
    updates, state = update({"p": g.astype(np.float32)}, state, ours)
    ours = optax.apply_updates(ours, updates)
    g = g / max(1, np.linalg.norm(g)) + 1e-4 * expected
    momentum = 0.9 * momentum + g
    expected = expected - 0.05 * momentum
    np.testing.assert_allclose(ours["p"], expected, rtol=1e-5)


@pytest.mark.parametrize("bias_rate", [1.0, 2.0])
def test_biases_and_norms_without_decay_and_biases_with_a_rate_of_their_own(bias_rate, rng):
  """As in Detectron: decay for weights alone, and the rate of biases that are not of a norm."""
  config = coco_mask.get_config()
  config.optim.update(dict(warmup_steps=0, decay_biases_and_norms=False, bias_rate=bias_rate))
  config.optim.weight_decay = 0.5
  names = ("conv.kernel", "conv.bias", "norm.scale", "norm.bias", "deconv_bias", "spread_biases.0")
  p = {n: rng.standard_normal(3).astype(np.float32) for n in names}
  optimizer = optim.optimizer(config)
  state, ours, momentum, expected = optimizer.init(p), p, dict.fromkeys(p, 0.0), dict(p)
  for _ in range(3):
    g = {n: rng.standard_normal(3).astype(np.float32) for n in p}
    updates, state = optimizer.update(g, state, ours)
    ours = optax.apply_updates(ours, updates)
    for n in p:
      decay = 0.5 if n == "conv.kernel" else 0.0
      momentum[n] = 0.9 * momentum[n] + g[n] + decay * expected[n]
      rate = 0.05 * (bias_rate if "bias" in n and n != "norm.bias" else 1.0)
      expected[n] = expected[n] - rate * momentum[n]
      np.testing.assert_allclose(ours[n], expected[n], rtol=1e-5, atol=1e-6, err_msg=n)


def test_adamw(rng):
  """Against algorithm 2 of Loshchilov and Hutter in float64, behind clipping."""
  config = coco_mask.get_config()
  fields = dict(name="adamw", learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95)
  config.optim.update(dict(warmup_steps=0, clip_norm=1.0, epsilon=1e-3, **fields))
  optimizer = optim.optimizer(config)
  p = rng.standard_normal(5).astype(np.float32)
  ours, state = {"p": p}, optimizer.init({"p": p})
  m, v, expected = np.zeros(5), np.zeros(5), np.float64(p)
  update = jax.jit(optimizer.update)
  for step in range(1, 5):
    g = 3 * rng.standard_normal(5)
    updates, state = update({"p": g.astype(np.float32)}, state, ours)
    ours = optax.apply_updates(ours, updates)
    g = g / max(1, np.linalg.norm(g))
    m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
    scaled = m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-3)
    expected = expected - 0.01 * (scaled + 0.1 * expected)
    np.testing.assert_allclose(ours["p"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups_have_rates_and_decays_of_their_own(name, rng):
  """The first group that fits counts; its rate multiplies that of biases."""
  config = coco_mask.get_config()
  config.optim.update(dict(name=name, warmup_steps=0, learning_rate=0.1, weight_decay=0.5))
  config.optim.update(dict(decay_biases_and_norms=False, bias_rate=3.0))
  p = {
    n: rng.standard_normal(3).astype(np.float32)
    for n in ("a.kernel", "a.bias", "b.1.kernel", "b.kernel")
  }
  g = {n: rng.standard_normal(3).astype(np.float32) for n in p}

  def updates(groups, gradient=g):
    config.optim.groups = groups
    optimizer = optim.optimizer(config)
    return optimizer.update(gradient, optimizer.init(p), p)[0]

  plain, still = updates(()), {n: np.zeros_like(a) for n, a in p.items()}
  found = updates(((r"^b\.\d", 2.0, 0.0), ("^b", 0.5, 3.0), ("bias|1", 0.1, 1.0)))
  np.testing.assert_allclose(found["a.kernel"], plain["a.kernel"], rtol=1e-6)
  np.testing.assert_allclose(found["a.bias"], 0.1 * plain["a.bias"], rtol=1e-6)
  np.testing.assert_allclose(
    found["b.1.kernel"],
    2 * (plain["b.1.kernel"] + 0.1 * 0.5 * p["b.1.kernel"]),
    rtol=1e-5,
    atol=1e-6,
  )
  decayed = updates((("^b", 0.5, 3.0),), still)["b.kernel"]
  np.testing.assert_allclose(decayed, -0.5 * 0.1 * 3 * 0.5 * p["b.kernel"], rtol=1e-5)
  assert (updates((), still)["a.bias"] == 0).all()


def test_groups_without_parameters_are_refused():
  config = coco_mask.get_config()  # the backbone is frozen
  config.optim.groups = (("backbone", 0.1, 1.0),)
  with pytest.raises(
    UserError, match=r"groups has 'backbone', but no trained parameter .* rpn\.bias"
  ):
    optim.trainable(config, {"backbone.conv1.kernel", "rpn.bias"})
  config.model.backbone.frozen = False
  optim.trainable(config, {"backbone.conv1.kernel", "rpn.bias"})


@pytest.mark.parametrize("parts", [1, 3])
def test_moving_average(parts, rng):
  """Against float64: the decay rises to 0.6, and only the last part of a batch changes the average."""
  x_TN = rng.standard_normal((30, 4)).astype(np.float32)
  average, expected = {"x": jnp.ones(4)}, np.ones(4)
  step = jax.jit(
    lambda a, x, n: optim.moving_average(a, {"x": x, "y": x}, 0.6, calls=n, parts=parts)
  )
  for call, x_N in enumerate(x_TN, start=1):
    average = step(average, x_N, call)
    if call % parts == 0:
      update = call // parts
      decay = min(0.6, update / (update + 9))
      expected = decay * expected + (1 - decay) * x_N
    np.testing.assert_allclose(average["x"], expected, rtol=1e-5, atol=1e-6)
  constant = {"x": jnp.float32([0.1, 1e9, -3.3])}
  for call in range(1, 30):
    updated = optim.moving_average(constant, constant, 0.999, calls=call, parts=1)
    assert (updated["x"] == constant["x"]).all()


def test_biases_and_norms_of_a_model():
  """Of a model with every kind of normalisation: what is neither is a kernel or has another name."""
  config = coco_mask.get_config("demo,backbone=resnet18_gc,head=augmented")
  config.model.fpt.similarity_norm = "unit"
  parameters = models.structure_of(config).parameters()
  config.optim.update(dict(decay_biases_and_norms=False, bias_rate=2.0))
  factors = optim.factors(config, parameters)
  alone = {n for n in parameters if factors[n] == (1, 1)}
  biases = {n for n in parameters if factors[n] == (2, 0)}
  assert all(factors[n] == (1, 0) for n in parameters - alone - biases)
  assert all(n.rpartition(".")[2] in ("kernel", "log_temperature") for n in alone)
  assert all("norm" in n for n in parameters - alone - biases)
  assert not any(".norm" in n for n in biases) and "mask_head.of_class.deconv_bias" in biases


def test_accumulated_parts_of_a_batch_equal_the_batch(rng):
  """A linear model, with warm-up, momentum, weight decay and clipping."""
  config = coco_mask.get_config()
  config.batch_size, config.steps = 12, 40
  config.optim.update(dict(warmup_steps=3, decay_at=(0.1,), clip_norm=0.5, learning_rate=0.1))
  x_TBC = rng.standard_normal((8, 12, 5)).astype(np.float32)
  y_TB = rng.standard_normal((8, 12)).astype(np.float32)

  def run(parts):
    config.optim.accumulate_steps = parts
    assert optim.total_steps(config) == 40
    optimizer = optim.optimizer(config)

    @jax.jit
    def update(w, state, x_BC, y_B):
      gradient = jax.grad(lambda w: jnp.mean(jnp.square(x_BC @ w["w"] - y_B)))(w)
      mean = optim.mean_gradient(gradient, state)
      updates, state = optimizer.update(gradient, state, w)
      return optax.apply_updates(w, updates), state, mean

    w, weights, means = {"w": jnp.ones(5)}, [], []
    state = optimizer.init(w)
    for x_BC, y_B in zip(x_TBC, y_TB, strict=True):
      before = w
      for x, y in zip(np.split(x_BC, parts), np.split(y_B, parts), strict=True):
        assert (w["w"] == before["w"]).all()  # until the last part
        w, state, mean = update(w, state, x, y)
      weights.append(w["w"])
      means.append(mean["w"])
    return np.stack(weights), np.stack(means)

  whole, gradients = run(1)
  assert (np.abs(np.diff(whole, axis=0)).max(axis=1) > 1e-4).all()  # every step changes the weights
  for parts in (2, 3, 12):
    weights, means = run(parts)
    np.testing.assert_allclose(weights, whole, rtol=1e-5)
    np.testing.assert_allclose(means, gradients, rtol=1e-4, atol=1e-6)


def test_a_frozen_backbone_is_not_trained():
  config = coco_mask.get_config()
  names = {"backbone.conv1.kernel", "fpt.fuse.0.kernel", "rpn.conv.bias"}
  assert optim.trainable(config, names) == names - {"backbone.conv1.kernel"}
  config.model.backbone.frozen = False
  assert optim.trainable(config, names) == names
  config.optim.frozen = ("backbone", "rpn.conv.bias")
  assert optim.trainable(config, names) == {"fpt.fuse.0.kernel"}
  config.optim.frozen = ("fpt.fus",)
  with pytest.raises(UserError, match="but no parameter begins with it"):
    optim.trainable(config, names)


@pytest.mark.parametrize(("suffix", "count"), [("nl", 8), ("gc", 42), ("aa", 24)])
def test_context_blocks_of_a_frozen_backbone_are_trained(suffix, count):
  """The parameters that a plain ResNet does not have: 8, 7 in each of 6 blocks, and 4 in each of them."""
  config = coco_mask.get_config(f"backbone=resnet18_{suffix},fpt=none")
  assert config.model.backbone.frozen
  parameters = models.structure_of(config).parameters()
  backbone = {n for n in parameters if n.startswith("backbone.")}
  trained = optim.trainable(config, parameters)
  inside = trained & backbone
  assert len(inside) == count and trained - inside == parameters - backbone
  assert all(".context." in n for n in inside) and not any(
    ".context." in n for n in backbone - inside
  )
  config.optim.frozen = ("backbone",)
  assert optim.trainable(config, parameters) == parameters - backbone
  config.optim.frozen = ("backbone.context",) if suffix == "nl" else ("backbone.stages.2",)
  kept = {n for n in inside if n.startswith(config.optim.frozen)}
  assert kept and optim.trainable(config, parameters) == trained - kept


def test_poly_schedule():
  """Paper, 4.2: the rate falls with the 0.9th power of the remaining share of the steps."""
  config = cityscapes.get_config()
  total = optim.total_steps(config)
  assert total == 44_625  # 120 epochs of 2975 images, 8 per step
  rate = optim.schedule(config)
  for step in (0, 1, 1000, 44_000, total):
    assert rate(step) == pytest.approx(0.01 * (1 - step / total) ** 0.9, rel=1e-4, abs=1e-9)
