"""Traffic of single instructions, counted by hand."""

import pytest

from scripts.hlo_memory import memory_bytes
from scripts.hlo_text import Program

BODIES = """\
HloModule jit_f, is_scheduled=true

%slices (a: f32[100], i: s32[], b: f32[10]) -> f32[10] {
  %a = f32[100]{0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[10]{0} parameter(2)
  %flat = f32[100]{0} bitcast(%a)
  %slice = f32[10]{0} dynamic-slice(%flat, %i), dynamic_slice_sizes={10}
  ROOT %r = f32[10]{0} add(%slice, %b)
}

%updates (c: f32[100], d: f32[10], j: s32[]) -> (f32[100], f32[10]) {
  %c = f32[100]{0} parameter(0)
  %d = f32[10]{0} parameter(1)
  %j = s32[] parameter(2)
  %n = f32[10]{0} negate(%d)
  %new = f32[100]{0} dynamic-update-slice(%c, %n, %j)
  ROOT %t = (f32[100]{0}, f32[10]{0}) tuple(%new, %d)
}

%limit (s: (s32[], f32[100])) -> pred[] {
  %s = (s32[], f32[100]{0}) parameter(0)
  %four = s32[] constant(4)
  %k = s32[] get-tuple-element(%s), index=0
  ROOT %l = pred[] compare(%k, %four), direction=LT
}

%pass (u: (s32[], f32[100])) -> (s32[], f32[100]) {
  %u = (s32[], f32[100]{0}) parameter(0)
  %m = s32[] get-tuple-element(%u), index=0
  %v = f32[100]{0} get-tuple-element(%u), index=1
  %w = f32[100]{0} negate(%v)
  ROOT %x = (s32[], f32[100]{0}) tuple(%m, %w)
}

ENTRY %main (p: f32[100], q: f32[10], z: s32[]) -> f32[10] {
  %p = f32[100]{0} parameter(0)
  %q = f32[10]{0} parameter(1)
  %z = s32[]{:S(6)} parameter(2)
  %chip = f32[100]{0:S(1)} parameter(3)
  %zero = s32[]{:S(6)} constant(0)
"""


@pytest.mark.parametrize(
  ("instruction", "traffic"),
  [
    ("%r1 = f32[100]{0} add(%p, %chip)", 800),
    ("%r1 = f32[100]{0:S(1)} multiply(%p, %p)", 400),  # read once
    ("%r1 = f32[50]{0} slice(%p), slice={[0:50]}", 400),
    ("%r1 = f32[50]{0} slice(%chip), slice={[0:50]}", 200),
    ("%r1 = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%p)", 400),
    ("%r1 = ((f32[100]{0}), f32[20]{0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:20]}", 80),
    ("%r1 = f32[100]{0} custom-call(), custom_call_target=\"AllocateBuffer\"", 0),
    ("%r1 = f32[10,10]{1,0} bitcast(%p)", 0),
    # a tenth of %p, all of %q, and the result
    ("%r1 = f32[10]{0} fusion(%p, %z, %q), kind=kLoop, calls=%slices", 120),
    ("%r1 = f32[10]{0:S(1)} fusion(%chip, %z, %q), kind=kLoop, calls=%slices", 40),
    # reads %q, and writes it into a tenth of %p; passes %q on
    ("%r1 = (f32[100]{0}, f32[10]{0}) fusion(%p, %q, %z), kind=kLoop, calls=%updates", 80),
  ],
)  # fmt: skip
def test_traffic_of_an_instruction(instruction, traffic):
  assert memory_bytes(Program(f"{BODIES}  {instruction}\n}}\n")) == traffic


def test_traffic_of_a_loop():
  loop = """\
  %begin = (s32[]{:S(6)}, f32[100]{0}) tuple(%zero, %p)
  ROOT %loop = (s32[]{:S(6)}, f32[100]{0}) while(%begin), condition=%limit, body=%pass
}
"""
  assert memory_bytes(Program(BODIES + loop)) == 4 * 800
