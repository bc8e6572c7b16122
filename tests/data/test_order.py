"""The order of images is a pure function of the step and neither repeats nor drops images."""

import numpy as np
import pytest

from fpt_jax.data import order
from fpt_jax.errors import UserError

BUCKET_N = np.array([0, 1, 0, 0, 2, 1, 0, 0, 1, 0, 0, 0, 1])  # 8, 4 and 1 images


def test_each_image_takes_the_smallest_bucket_it_fits():
  buckets = ((20, 40), (40, 20), (40, 40))
  sizes_N2 = np.array([[20, 40], [21, 20], [21, 21], [1, 1], [40, 40]])
  np.testing.assert_array_equal(order.assign_buckets(sizes_N2, buckets), [0, 1, 2, 0, 2])
  with pytest.raises(UserError, match="41x40"):
    order.assign_buckets(np.array([[41, 40]]), buckets)


def test_no_image_is_repeated_or_dropped_within_an_epoch():
  stream = order.TrainOrder(BUCKET_N, seed=3, batch_size=3)
  seen = {0: [], 1: [], 2: []}
  for step in range(200):
    indices_B, bucket = stream.batch(step)
    assert (BUCKET_N[indices_B] == bucket).all()
    seen[bucket] += indices_B.tolist()
  for bucket, indices in seen.items():
    members = np.flatnonzero(bucket == BUCKET_N)
    whole = len(indices) // len(members) * len(members)
    epochs = np.reshape(indices[:whole], (-1, len(members)))
    np.testing.assert_array_equal(np.sort(epochs), np.tile(members, (len(epochs), 1)))


def test_buckets_come_in_proportion_from_the_start():
  stream = order.TrainOrder(BUCKET_N, seed=3, batch_size=3)
  buckets = np.array([stream.batch(step)[1] for step in range(2000)])
  for bucket, share in enumerate(np.bincount(BUCKET_N) / len(BUCKET_N)):
    expected = share * np.arange(1, 2001)
    assert np.abs(np.cumsum(buckets == bucket) - expected).max() < 3


def test_a_step_does_not_depend_on_the_first_step():
  stream = order.TrainOrder(BUCKET_N, seed=3, batch_size=3)
  for step in (5000, 0, 4095, 4096, 17):  # at 4096 the table of steps is made again
    fresh = order.TrainOrder(BUCKET_N, seed=3, batch_size=3).batch(step)
    np.testing.assert_array_equal(fresh[0], stream.batch(step)[0])
    assert fresh[1] == stream.batch(step)[1]


def test_another_seed_gives_another_order():
  one, other = (
    [order.TrainOrder(np.zeros(50, int), seed=s, batch_size=50).batch(0)[0]] for s in (0, 1)
  )
  assert (one[0] != other[0]).mean() > 0.8


def test_the_order_does_not_depend_on_the_version_of_numpy():
  # raw bits of Philox under SeedSequence(0, 0x0DE5, 0, 0), sorted: fixed by their definitions
  indices_B, _ = order.TrainOrder(np.zeros(8, int), seed=0, batch_size=8).batch(0)
  np.testing.assert_array_equal(indices_B, [4, 1, 3, 6, 0, 7, 2, 5])


def test_evaluation_reads_every_image_once():
  batches = order.eval_order(BUCKET_N, batch_size=3)
  assert [bucket for _, _, bucket in batches] == [0, 0, 0, 1, 1, 2]
  assert all((BUCKET_N[indices] == bucket).all() for indices, _, bucket in batches)
  read = np.concatenate([indices[valid] for indices, valid, _ in batches])
  np.testing.assert_array_equal(np.sort(read), np.arange(13))


def test_hosts_divide_a_batch():
  shares = [np.arange(12)[order.host_share(12, i, 4)] for i in range(4)]
  np.testing.assert_array_equal(np.concatenate(shares), np.arange(12))
  with pytest.raises(
    UserError, match="batch_size=12 cannot be shared by 5 hosts; make it a multiple of 5"
  ):
    order.host_share(12, 0, 5)


def _side_by_side(hosts, step):
  return [
    np.concatenate(parts) for parts in zip(*(plan.batch(step) for plan in hosts), strict=True)
  ]


def test_training_plans_of_all_hosts_make_up_the_global_batches():
  hosts = [
    order.train_plan(BUCKET_N, seed=3, batch_size=4, start_step=6, process_index=i, process_count=2)
    for i in (0, 1)
  ]
  assert all(plan.steps.start == 6 and plan.images == 2 for plan in hosts)
  stream = order.TrainOrder(BUCKET_N, seed=3, batch_size=4)
  for step in (6, 7, 5000):
    indices_B, bucket = stream.batch(step)
    expected = (4 * step + np.arange(4), indices_B, [True] * 4, [bucket] * 4)
    for column_B, expected_B in zip(_side_by_side(hosts, step), expected, strict=True):
      np.testing.assert_array_equal(column_B, expected_B)


def test_evaluation_plans_of_all_hosts_make_up_the_pass():
  hosts = [
    order.eval_plan(BUCKET_N, batch_size=4, process_index=i, process_count=2) for i in (0, 1)
  ]
  batches = order.eval_order(BUCKET_N, batch_size=4)
  assert all(plan.steps == range(len(batches)) and plan.images == 2 for plan in hosts)
  for step, (indices_B, valid_B, bucket) in enumerate(batches):
    expected = (4 * step + np.arange(4), indices_B, valid_B, [bucket] * 4)
    for column_B, expected_B in zip(_side_by_side(hosts, step), expected, strict=True):
      np.testing.assert_array_equal(column_B, expected_B)
