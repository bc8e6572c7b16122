"""The text of a program written by hand: its instructions, and how often each runs."""

import pytest

from scripts import hlo_text

# Types in the style of programs for TPUs; %kept is a loop of 13 passes, with one of 3 inside; the length of
# %found depends on the data.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%few (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%counter.1, %three), direction=LT
}

%inner (state.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %value.2 = f32[8]{0:T(128)} get-tuple-element(%state.2), index=1
  %counter.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %twice = f32[8]{0:T(128)} add(%value.2, %value.2), metadata={op_name="jit(step)/while/(twice)"}
  ROOT %next.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%counter.2, %twice)
}

%most (state.3: (f32[8], s32[])) -> pred[] {
  %state.3 = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %fifteen = s32[]{:T(128)} constant(15)
  %counter.3 = s32[]{:T(128)} get-tuple-element(%state.3), index=1
  ROOT %less.3 = pred[]{:T(512)} compare(%counter.3, %fifteen), direction=LT
}

%outer (state.4: (f32[8], s32[])) -> (f32[8], s32[]) {
  %state.4 = (f32[8]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %value.4 = f32[8]{0:T(128)} get-tuple-element(%state.4), index=0
  %begin.4 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%zero, %value.4)
  %loop.4 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%begin.4), condition=%few, body=%inner
  ROOT %next.4 = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%value.4, %zero)
}

%unlike (state.5: (s32[], s32[])) -> pred[] {
  %state.5 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %counter.5 = s32[]{:T(128)} get-tuple-element(%state.5), index=0
  %limit.5 = s32[]{:T(128)} get-tuple-element(%state.5), index=1
  ROOT %less.5 = pred[]{:T(512)} compare(%counter.5, %limit.5), direction=LT
}

%search (state.6: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %state.6 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
}

%yes (v: f32[8]) -> f32[8] {
  %v = f32[8]{0:T(128)} parameter(0)
  ROOT %negated = f32[8]{0:T(128)} negate(%v)
}

%no (w: f32[8]) -> f32[8] {
  ROOT %w = f32[8]{0:T(128)} parameter(0)
}

ENTRY %main (p: f32[8], n: s32[], c: pred[]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %c = pred[]{:T(512)} parameter(2)
  %two = s32[]{:T(128)} constant(2)
  %two.copy = s32[]{:T(128)S(6)} copy(%two)
  %begin = (f32[8]{0:T(128)}, s32[]{:T(128)}) tuple(%p, %two.copy)
  %kept = (f32[8]{0:T(128)}, /*index=1*/s32[]{:T(128)}) while(%begin), condition=%most, body=%outer
  %pair = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%two, %n)
  %found = (s32[]{:T(128)}, s32[]{:T(128)}) while(%pair), condition=%unlike, body=%search
  ROOT %chosen = f32[8]{0:T(128)} conditional(%c, %p, %p), true_computation=%yes, false_computation=%no
}
"""


@pytest.fixture
def program():
  return hlo_text.Program(PROGRAM)


def test_bodies_run_as_often_as_their_loops(program):
  times = {one.name: times for _, one, times in program.runs()}
  assert times["kept"] == 1 and times["loop.4"] == 13 and times["twice"] == 39
  assert times["negated"] == times["w"] == 1  # both branches
  assert "sum" not in times and "less.1" not in times  # reductions and conditions are not scheduled
  assert program.loops_of_unknown_length() == 1 and times["state.6"] == 1


def test_a_length_that_the_compiler_knows():
  text = PROGRAM.replace(
    "body=%search", 'body=%search, backend_config={"known_trip_count":{"n":"7"}}'
  )
  program = hlo_text.Program(text)
  assert {one.name: times for _, one, times in program.runs()}["state.6"] == 7
  assert program.loops_of_unknown_length() == 0


def test_parts_of_an_instruction():
  line = (
    "  ROOT %f.1 = (f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0:T(256)(2,1)S(1)}) fusion(%a, %b.2), "
    'kind=kLoop, calls=%body.3, metadata={op_name="jit(step)/add"}'
  )
  one = hlo_text.parse(line)
  assert (one.name, one.opcode, one.operands, one.is_root) == ("f.1", "fusion", ("a", "b.2"), True)
  assert (one.called("calls"), one.called("body"), one.source) == ("body.3", "", "jit(step)/add")
  assert hlo_text.sizes_of(one.type) == [24, 8]
  assert hlo_text.hbm_bytes(one.type) == 8 * 128 * 4
  branches = "  %c = f32[] conditional(%i, %a, %b), branch_computations={%one, %two.1, %three}"
  assert hlo_text.parse(branches).branches() == ["one", "two.1", "three"]
  assert hlo_text.parse("  %k = s32[]{:T(128)} constant(-5), metadata={}").literal == "-5"
  assert hlo_text.parse("}") is None


@pytest.mark.parametrize(
  ("array", "size"),
  [("pred[5]", 5), ("s8[3,2]", 6), ("u32[]", 4), ("bf16[7]{0}", 14), ("f8e4m3fn[9]", 9), ("s4[6]", 3),
   ("c64[2]", 16), ("f32[0,4]", 0), ("token[]", 0)],
)  # fmt: skip
def test_size_of_an_array(array, size):
  assert hlo_text.size_of(array) == size


def test_other_text_is_not_a_program():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo_text.Program("no program\n")


@pytest.mark.parametrize(
  ("array", "size"),
  [
    ("f32[5,4]{1,0:T(8,128)}", 8 * 128 * 4),
    ("f32[5,4]{0,1:T(4,128)}", 4 * 128 * 4),  # the first axis is the last in memory
    ("bf16[3,9,130]{2,1,0:T(8,128)(2,1)}", 3 * 16 * 256 * 2),
    ("bf16[3,9,130]{2,0,1:T(8,128)(2,1)S(1)}", 9 * 8 * 256 * 2),
    ("pred[1030]{0:T(1024)(128)(4,1)}", 2048),
    ("f32[6]{0:T(2,128)}", 2 * 128 * 4),
    ("u32[]{:T(128)}", 512),
    ("f32[5,4]{1,0}", 80),
    ("f32[5,4]", 80),
  ],
)
def test_size_in_memory(array, size):
  assert hlo_text.stored_size_of(array) == size
