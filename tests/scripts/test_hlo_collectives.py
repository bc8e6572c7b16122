"""Collectives of programs written by hand, counted by hand."""

import pytest

from scripts.hlo_collectives import Collective, collectives, group_size
from scripts.hlo_text import Program

# A gradient that is summed (all-reduce) in a loop of 5 passes; a gathered weight whose transfer overlaps with
# another fusion; a sum of which each chip keeps a quarter; a shift to the neighbour.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%five (s: (s32[], f32[10])) -> pred[] {
  %s = (s32[], f32[10]{0}) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], f32[10])) -> (s32[], f32[10]) {
  %t = (s32[], f32[10]{0}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %g = f32[10]{0} get-tuple-element(%t), index=1
  %r = f32[10]{0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add, \
metadata={op_name="jit(step)/psum"}
  ROOT %u = (s32[], f32[10]{0}) tuple(%j, %r)
}

%begins (a: bf16[4,6]) -> (bf16[4,6], bf16[16,6]) {
  %a = bf16[4,6]{1,0} parameter(0)
  %gather.1 = bf16[16,6]{1,0} all-gather(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %start = (bf16[4,6]{1,0}, bf16[16,6]{1,0}) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%proceeds (b: bf16[4,6], c: f32[10]) -> (f32[10], bf16[16,6]) {
  %b = bf16[4,6]{1,0} parameter(0)
  %c = f32[10]{0} parameter(1)
  %n = f32[10]{0} negate(%c)
  %gather.2 = bf16[16,6]{1,0} all-gather(%b), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %both = (f32[10]{0}, bf16[16,6]{1,0}) tuple(%n, %gather.2)
}

%all-reduce-scatter.1 (d: f32[16]) -> f32[4] {
  %d = f32[16]{0} parameter(0)
  %whole = f32[16]{0} all-reduce(%d), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[4]{0} dynamic-slice(%whole, %zero), dynamic_slice_sizes={4}
}

ENTRY %main (p: f32[10], w: bf16[4,6], v: f32[16]) -> f32[4] {
  %p = f32[10]{0} parameter(0)
  %w = bf16[4,6]{1,0} parameter(1)
  %v = f32[16]{0} parameter(2)
  %none = s32[] constant(0)
  %begin = (s32[], f32[10]{0}) tuple(%none, %p)
  %loop = (s32[], f32[10]{0}) while(%begin), condition=%five, body=%body
  %async = (bf16[4,6]{1,0}, bf16[16,6]{1,0}) fusion(%w), kind=kCustom, calls=%begins
  %on = (f32[10]{0}, bf16[16,6]{1,0}) fusion(%w, %p), kind=kOutput, calls=%proceeds
  %shift = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%v), \
source_target_pairs={{0,1},{1,0}}
  %shifted = f32[16]{0} collective-permute-done(%shift)
  ROOT %part = f32[4]{0} fusion(%shifted), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/grad"}
}
"""


def test_each_collective_is_counted_once_per_run():
  found = [(c.kind, c.bytes, c.group, c.times, c.source) for c in collectives(Program(PROGRAM))]
  assert found == [
    ("all-reduce", 40, 8, 5, "jit(step)/psum"),
    ("all-gather", 16 * 6 * 2, 4, 1, ""),
    ("collective-permute", 64, 2, 1, ""),
    ("reduce-scatter", 64, 4, 1, "jit(step)/grad"),
  ]


def test_the_dtype_is_that_of_the_largest_array():
  both = "(f32[3]{0}, bf16[8,2]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})"
  assert Collective("all-reduce", 44, 8, 1, both, "").dtype == "bf16"


@pytest.mark.parametrize(
  ("kind", "group", "sent"),
  [
    # a ring of 4 passes on quarters: 3 of them to sum, and 3 more for everyone to have the sum
    ("all-reduce", 4, 600),
    ("reduce-scatter", 4, 300),
    ("all-gather", 4, 300),
    ("all-to-all", 4, 300),
    ("collective-permute", 2, 400),
    ("all-reduce", 1, 0),
  ],
)
def test_bytes_that_a_chip_sends(kind, group, sent):
  assert Collective(kind, 400, group, 1, "f32[100]", "").sent == sent


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", 2),
    ("replica_groups=[4,64]<=[16,16]T(1,0), dimensions={0}", 64),
    ("replica_groups=mesh['data'=8,'fsdp'=4,'query'=2] {'data','fsdp'}", 32),
  ],
)
def test_number_of_chips_that_take_part(groups, size):
  assert group_size(groups) == size
