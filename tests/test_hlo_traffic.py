"""What the reader of TPU programs counts as traffic, for programs counted by hand."""

import textwrap

import pytest

from benchmarks.hlo_traffic import hbm_bytes

ARRAY = 256 * 128 * 4
HBM, CORE = "f32[256,128]{1,0:T(8,128)}", "f32[256,128]{1,0:T(8,128)S(1)}"
SLICE = "f32[8,128]{1,0:T(8,128)}"


def traffic(*instructions: str, root: str, others: str = "") -> float:
    """Of a program of one array %x."""
    lines = [f"%x = {HBM} parameter(0)", *instructions, f"ROOT {root}"]
    text = "HloModule jit_f, is_scheduled=true\n\n" + textwrap.dedent(others)
    entry = "".join(f"  {line}\n" for line in lines)
    return hbm_bytes(f"{text}\nENTRY %main (x: f32[256,128]) -> f32[] {{\n{entry}}}\n")


def test_only_arrays_in_hbm_count():
    assert traffic(root=f"%y = {HBM} negate(%x)") == 2 * ARRAY
    assert traffic(root=f"%y = {CORE} negate(%x)") == ARRAY
    both = traffic(f"%y = {CORE} negate(%x)", root=f"%z = {CORE} add(%y, %x)")
    assert both == 2 * ARRAY
    assert traffic(root="%y = (f32[256,128]) tuple(%x)") == 0


def test_copies_into_the_core_are_read_once():
    start = f"%s = ({CORE}, {HBM}, u32[]{{:S(2)}}) copy-start(%x)"
    assert traffic(start, root=f"%y = {CORE} copy-done(%s)") == ARRAY
    part = SLICE.replace("}", "S(1)}")
    start = f"%s = (({HBM}), {part}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:8]}}"
    assert traffic(start, root=f"%y = {part} slice-done(%s)") == ARRAY / 32


FUSIONS = f"""\
%reads (p: f32[256,128], i: s32[]) -> f32[8,128] {{
  %p = {HBM} parameter(0)
  %b = {HBM} bitcast(%p)
  %i = s32[]{{:S(6)}} parameter(1)
  %s = {SLICE} dynamic-slice(%b, %i, %i), dynamic_slice_sizes={{8,128}}
  ROOT %n = {SLICE} negate(%s)
}}

%writes (p: f32[256,128], q: f32[8,128], i: s32[]) -> f32[256,128] {{
  %p = {HBM} parameter(0)
  %q = {SLICE} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  ROOT %u = {HBM} dynamic-update-slice(%p, %q, %i, %i)
}}

"""


def test_fusions_move_the_slices_that_they_use():
    index = "%i = s32[]{:S(6)} constant(3)"
    read = f"%r = {SLICE} fusion(%x, %i), kind=kLoop, calls=%reads"
    assert traffic(index, root=read, others=FUSIONS) == 2 * ARRAY / 32
    write = f"%w = {HBM} fusion(%x, %r, %i), kind=kLoop, calls=%writes"
    assert traffic(index, read, root=write, others=FUSIONS) == 4 * ARRAY / 32


BRANCHES = f"""\
%little (p: f32[256,128]) -> f32[256,128] {{
  %p = {HBM} parameter(0)
  ROOT %c = {CORE} copy(%p)
}}

%much (p: f32[256,128]) -> f32[256,128] {{
  %p = {HBM} parameter(0)
  ROOT %c = {HBM} copy(%p)
}}

%test (p: f32[256,128]) -> pred[] {{
  %p = {HBM} parameter(0)
  ROOT %t = pred[]{{:S(6)}} custom-call(), custom_call_target="AllocateBuffer"
}}

"""


def test_loops_count_as_often_as_they_run():
    loop = f"%w = {HBM} while(%x), condition=%test, body=%much"
    known = 'backend_config={"known_trip_count":{"n":"5"}}'
    assert traffic(root=f"{loop}, {known}", others=BRANCHES) == 5 * 2 * ARRAY


def test_of_branches_the_cheapest_counts():
    chosen = "conditional(%p, %x, %x), branch_computations={%much, %little}"
    pred = '%p = pred[]{:S(6)} custom-call(), custom_call_target="AllocateBuffer"'
    assert traffic(pred, root=f"%y = {HBM} {chosen}", others=BRANCHES) == ARRAY


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="unknown number of times"):
        loop = f"%w = {HBM} while(%x), condition=%sure, body=%much"
        sure = BRANCHES.replace("%test", "%sure").replace("%t =", "%compare =")
        traffic(root=loop, others=sure)
