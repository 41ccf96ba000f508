"""What the reader of compiled programs counts, for programs counted by hand."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo_cost import HloCost, hlo_cost

KB = 1024
SIDE = 32
PRODUCT = 2 * SIDE**3


def make_mesh() -> Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)


REPLICATED = P()


def compiled(function, *specs, shape, out=REPLICATED, dtype=jnp.float32):
    """Compiles a function of shards whose global shape is `shape`."""
    mesh = make_mesh()
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for spec in specs
    ]
    return jax.jit(mapped).lower(*arguments).compile()


def cost_of(function, *specs, **options) -> HloCost:
    return hlo_cost(compiled(function, *specs, **options).as_text())


def literal(attributes, result="f32[256]", operand="f32[256]"):
    """A module for eight devices with one instruction."""
    return hlo_cost(
        textwrap.dedent(f"""\
        HloModule jit_f, is_scheduled=true, num_partitions=8

        ENTRY %main (x: {operand}) -> {result} {{
          %x = {operand}{{0:T(256)}} parameter(0)
          ROOT %y = {result} {attributes}
        }}
        """)
    )


BOTH = ("fsdp", "tensor")
# (256, 8) float32 is 8 kB, over the four of "fsdp" 2 kB a device, over all 1 kB.
COLLECTIVES = {
    "all-gather": (
        lambda x: lax.all_gather(x, "fsdp", tiled=True),
        P("fsdp"),
        8 * KB * 3 / 4,
    ),
    "all-reduce": (lambda x: lax.psum(x, "tensor"), P("fsdp"), 2 * 2 * KB / 2),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, BOTH, tiled=True),
        P(),
        8 * KB * 7 / 8,
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, BOTH, 1, 0, tiled=True),
        P(BOTH),
        KB * 7 / 8,
    ),
    "collective-permute": (
        lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
        P("fsdp"),
        2 * KB,
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_bytes_of_a_collective(kind):
    function, spec, sent = COLLECTIVES[kind]
    cost = cost_of(function, spec, shape=(256, 8), out=P(BOTH))
    (found,) = cost.collectives.values()
    assert set(cost.collectives) == {kind}
    assert (found.count, found.executions, found.wire_bytes) == (1, 1, sent)
    assert (cost.wire_bytes, cost.flops, cost.collectives_in_products) == (sent, 0, 0)


def test_a_variadic_all_reduce_is_one_of_all_its_arrays():
    def total(x, y):
        return lax.psum((x, y), BOTH)

    cost = cost_of(total, P("fsdp"), P("tensor"), shape=(256, 8), out=(P(), P()))
    assert cost.collectives["all-reduce"].count == 1
    assert cost.wire_bytes == 2 * (2 * KB + 4 * KB) * 7 / 8


def test_bytes_depend_on_the_dtype():
    function, spec, sent = COLLECTIVES["all-to-all"]
    cost = cost_of(function, spec, shape=(256, 8), out=P(BOTH), dtype=jnp.int8)
    assert cost.wire_bytes == sent / 4


def test_two_collectives_of_a_kind_are_counted_twice():
    def twice(x):
        return lax.psum(jnp.sin(lax.psum(x, "fsdp")), "fsdp")

    cost = cost_of(twice, P("fsdp"), shape=(256, 8))
    assert cost.collectives["all-reduce"].count == 2


def dot(x, y):
    return jnp.einsum("abij,abjk->abik", x, y)


def test_products_of_a_batch():
    shape = (2, 3, SIDE, SIDE)
    program = compiled(dot, P(), P(), shape=shape)
    assert hlo_cost(program.as_text()).flops == 6 * PRODUCT
    assert program.cost_analysis()["flops"] == pytest.approx(6 * PRODUCT, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": [(1, 1), (0, 2)]},
        {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": [(1, 1), (0, 2)], "lhs_dilation": (1, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_products_of_a_convolution(options):
    def convolve(x, kernel):
        groups = options.get("feature_group_count", 1)
        return lax.conv_general_dilated(x, kernel[:, : 4 // groups, :3, :3], **options)

    program = compiled(convolve, P(), P(), shape=(4, 4, 8, 9))
    found = hlo_cost(program.as_text()).flops
    assert found > 0
    # The compiler's count has elementwise operations in it.
    assert program.cost_analysis()["flops"] == pytest.approx(found, rel=0.01)


def test_a_loop_counts_as_often_as_it_runs():
    def iterate(x):
        def step(x, _):
            return lax.psum(x @ x, "fsdp"), None

        def outer(x, _):
            return lax.scan(step, x, length=5)[0] * 2, None

        return lax.scan(outer, x, length=3)[0]

    cost = cost_of(iterate, P(), shape=(SIDE, SIDE))
    assert cost.flops == 15 * PRODUCT
    reduced = cost.collectives["all-reduce"]
    assert (reduced.count, reduced.executions) == (1, 15)
    assert cost.wire_bytes == 15 * 2 * 4 * SIDE**2 * 3 / 4
    assert cost.collectives_in_products == 15


def test_collectives_beside_products_are_not_in_them():
    def beside(x):
        def step(x, _):
            return x @ x, None

        def reduce(x, _):
            return lax.psum(jnp.sin(x), "fsdp"), None

        x = lax.psum(lax.scan(step, x, length=3)[0], "fsdp")
        return lax.scan(reduce, x, length=2)[0]

    cost = cost_of(beside, P(), shape=(SIDE, SIDE))
    assert cost.collectives["all-reduce"].executions == 3
    assert cost.collectives_in_products == 0


def test_a_loop_of_unknown_length_is_an_error():
    def until_large(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="unknown number of times"):
        cost_of(until_large, P(), shape=(SIDE, SIDE))


def power(exponent):
    def function(x):
        for _ in range(exponent - 1):
            x = x @ jnp.sin(x)
        return x

    return function


def switch_on_device(*exponents):
    def function(x):
        index = jnp.array([i % len(exponents) for i in range(4)])
        branches = [power(exponent) for exponent in exponents]
        return lax.switch(index[lax.axis_index("fsdp")], branches, x)

    return function


def test_the_slowest_device_decides_between_branches():
    def two_switches(x):
        first = switch_on_device(4, 1, 2)(x)
        return switch_on_device(1, 3, 4)(first)

    # Kinds of devices: 3 + 0, 0 + 2 and 1 + 3 products.
    assert cost_of(two_switches, P(), shape=(SIDE, SIDE)).flops == 4 * PRODUCT


def test_two_kinds_of_devices_are_no_test_of_data():
    cost = cost_of(switch_on_device(1, 4), P(), shape=(SIDE, SIDE))
    assert cost.flops == 3 * PRODUCT


@pytest.mark.parametrize("rare_first", [False, True])
def test_the_rare_branch_of_a_test_of_data_does_not_count(rare_first):
    def guarded(x):
        branches = (power(4), power(2)) if rare_first else (power(2), power(4))
        return lax.cond(jnp.max(jnp.abs(x)) < 1e9, *branches, x)

    def function(x):
        def step(x, _):
            return guarded(x), None

        return lax.scan(step, x, length=5)[0]

    assert cost_of(function, P(), shape=(SIDE, SIDE)).flops == 5 * PRODUCT


def test_a_test_within_the_branches_of_devices():
    def guarded(x):
        return lax.cond(jnp.sum(x) > 0, power(3), power(5), x)

    def function(x):
        index = jnp.array([0, 1, 1, 0])[lax.axis_index("fsdp")]
        return lax.switch(index, [lambda x: x, guarded], x)

    assert cost_of(function, P(), shape=(SIDE, SIDE)).flops == 2 * PRODUCT


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['fsdp'=8] {'fsdp'}", 8),
        ("mesh['data'=1,'fsdp'=4,'tensor'=2] {'fsdp'}", 4),
        ("mesh['fsdp'=4,'tensor'=2] {'tensor','fsdp'}", 8),
        ("mesh['fsdp'=4,'tensor'=2], device_ids=(0,2,1) {'fsdp':(2)2,'tensor'}", 4),
        ("{}", 8),
    ],
)
def test_textual_forms_of_groups(groups, size):
    cost = literal(
        f"all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%a"
    )
    assert cost.wire_bytes == 2 * KB * (size - 1) / size


def test_unknown_groups_are_an_error():
    with pytest.raises(ValueError, match="replica_groups"):
        literal("all-reduce(%x), replica_groups=all, to_apply=%a")


GROUPS = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("kind", "result", "sent"),
    [
        ("all-gather", "(f32[256]{0:T(256)}, f32[1024]{0:T(256)})", 3 * KB),
        ("all-gather", "((f32[256], f32[256]), (f32[1024], f32[1024]))", 6 * KB),
        ("all-reduce", "f32[256]{0}", 1.5 * KB),
        ("reduce-scatter", "((f32[256]), f32[64])", 0.75 * KB),
        ("all-to-all", "((f32[256]), f32[256], u32[], u32[])", 0.75 * KB),
        (
            "collective-permute",
            "(bf16[256], bf16[256], u32[]{:S(2)}, u32[]{:S(2)})",
            0.5 * KB,
        ),
    ],
)
def test_a_start_and_its_end_are_one_collective(kind, result, sent):
    operands = "%x, /*index=1*/%x" if "((f32[256], f32" in result else "%x"
    text = f"""\
HloModule jit_f, is_scheduled=true, num_partitions=8

ENTRY %main (x: f32[256]) -> f32[256] {{
  %x = f32[256]{{0:T(256)}} parameter(0)
  %start = {result} {kind}-start({operands}), channel_id=1, {GROUPS}
  ROOT %done = f32[256]{{0}} {kind}-done(%start), metadata={{op_name="jit(f)"}}
}}
"""
    cost = hlo_cost(text)
    assert cost.collectives[kind].count == 1
    assert cost.wire_bytes == sent


def test_one_collective_in_all_fusions_that_run_meanwhile():
    gather = f'all-gather(%p), {GROUPS}, frontend_attributes={{chain_id="3"}}'
    start = 'custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    end = 'custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"'
    text = f"""\
HloModule jit_f, is_scheduled=true, num_partitions=8

%fused_computation.1 (p: f32[256]) -> (f32[256], f32[1024], u32[]) {{
  %p = f32[256]{{0}} parameter(0)
  %g = f32[1024]{{0}} {gather}
  ROOT %s = (f32[256]{{0}}, f32[1024]{{0}}, u32[]{{:S(2)}}) {start}
}}

%async_collective_fusion.2 (p: f32[256], q: f32[16,16]) -> f32[16,16] {{
  %p = f32[256]{{0}} parameter(0)
  %q = f32[16,16]{{1,0}} parameter(1)
  %g = f32[1024]{{0}} {gather}
  ROOT %c = f32[16,16]{{1,0}} convolution(%q, %q), dim_labels=bf_io->bf
}}

%fused_computation.3 (p: f32[256]) -> f32[1024] {{
  %p = f32[256]{{0}} parameter(0)
  %g = f32[1024]{{0}} {gather}
  ROOT %d = f32[1024]{{0}} {end}
}}

ENTRY %main (x: f32[256], y: f32[16,16]) -> f32[1024] {{
  %x = f32[256]{{0:T(256)}} parameter(0)
  %y = f32[16,16]{{1,0}} parameter(1)
  %a = (f32[256], f32[1024], u32[]) fusion(%x), calls=%fused_computation.1
  %b = f32[16,16] fusion(%x, %y), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %c = f32[1024]{{0}} fusion(%x), kind=kCustom, calls=%fused_computation.3
}}
"""
    cost = hlo_cost(text)
    assert (cost.collectives["all-gather"].count, cost.wire_bytes) == (1, 3 * KB)
    assert cost.flops == 2 * 16**3


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    text = f"""\
HloModule jit_f, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (input: f32[256]) -> f32[64] {{
  %input = f32[256]{{0}} parameter(0)
  %sum = f32[256]{{0}} all-reduce(%input), {GROUPS}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[64]{{0}} dynamic-slice(%sum, %zero), dynamic_slice_sizes={{64}}
}}

ENTRY %main (x: f32[256]) -> f32[64] {{
  %x = f32[256]{{0:T(256)}} parameter(0)
  ROOT %y = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""
    cost = hlo_cost(text)
    assert set(cost.collectives) == {"reduce-scatter"}
    assert cost.wire_bytes == 0.75 * KB


def test_a_batch_written_as_a_dilated_convolution():
    cost = literal(
        "convolution(%x, %x), window={size=4 stride=3 lhs_dilate=4}, "
        "dim_labels=0bf_0io->0bf",
        result="bf16[4,256,256]{2,1,0:T(8,128)(2,1)S(1)}",
        operand="bf16[4,256,256]",
    )
    assert cost.flops == 4 * 2 * 256**3


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_products_of_highest_precision(precision):
    def chain(x):
        def step(y, _):
            return jnp.dot(y, x, precision=precision), None

        return lax.scan(step, jnp.sin(x @ x), length=3)[0]

    cost = cost_of(chain, P(), shape=(SIDE, SIDE))
    assert cost.flops == 4 * PRODUCT
    assert cost.flops_highest == (3 * PRODUCT if precision == "highest" else 0)


def counting_loop(start="0", step="1", direction="LT"):
    """As the TPU compiler writes a loop of seven products, without their number."""
    return f"""\
HloModule jit_f, is_scheduled=true, num_partitions=8

%body (param: (s32[], f32[16,16])) -> (s32[], f32[16,16]) {{
  %one = s32[]{{:T(128)}} constant({step})
  %param = (s32[]{{:T(128)}}, f32[16,16]{{1,0:T(8,128)S(1)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%param), index=0
  %copy = s32[]{{:T(128)S(6)}} copy(%i)
  %next = s32[]{{:T(128)}} add(%copy, %one)
  %x = f32[16,16]{{1,0:T(8,128)S(1)}} get-tuple-element(%param), index=1
  %y = f32[16,16]{{1,0:T(8,128)S(1)}} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %tuple = (s32[]{{:T(128)}}, f32[16,16]{{1,0:T(8,128)S(1)}}) tuple(%next, %y)
}}

%condition (param.1: (s32[], f32[16,16])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(7)
  %param.1 = (s32[]{{:T(128)}}, f32[16,16]{{1,0:T(8,128)S(1)}}) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%param.1), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%j, %limit), direction={direction}
}}

ENTRY %main (x: f32[16,16]) -> (s32[], f32[16,16]) {{
  %x = f32[16,16]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[]{{:T(128)}} constant({start})
  %c = s32[]{{:T(128)}} copy(%zero)
  %t = (s32[]{{:T(128)}}, f32[16,16]{{1,0:T(8,128)}}) tuple(%c, %x)
  ROOT %w = (s32[], f32[16,16]) while(%t), condition=%condition, body=%body
}}
"""


def test_a_loop_is_counted_by_its_condition():
    assert hlo_cost(counting_loop()).flops == 7 * 2 * 16**3
    assert hlo_cost(counting_loop(start="2")).flops == 5 * 2 * 16**3


@pytest.mark.parametrize("wrong", [{"step": "2"}, {"direction": "GT"}])
def test_a_loop_that_counts_otherwise_is_an_error(wrong):
    with pytest.raises(ValueError, match="unknown number of times"):
        hlo_cost(counting_loop(**wrong))


def test_products_of_libraries():
    contraction = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
    call = "custom-call(%x, %x), custom_call_target"
    result, operand = "(f32[8,8]{1,0}, s8[4194304]{0})", "f32[16,8]"
    cost = literal(
        f'{call}="__cublas$gemm", backend_config={{{contraction}}}', result, operand
    )
    assert cost.flops == 2 * 8 * 8 * 16
    with pytest.raises(ValueError, match="tpu_custom_call are unknown"):
        literal(f'{call}="tpu_custom_call"', result, operand)


def test_temporary_bytes_are_passed_on():
    program = compiled(power(3), P(), shape=(SIDE, SIDE))
    size = program.memory_analysis().temp_size_in_bytes
    assert hlo_cost(program.as_text(), size).temporary_bytes == size


def test_other_collectives_and_texts_are_errors():
    with pytest.raises(ValueError, match="ragged-all-to-all"):
        literal(f"ragged-all-to-all(%x), {GROUPS}")
    with pytest.raises(ValueError, match="ENTRY"):
        hlo_cost("module @jit_f {}")
