"""Reading a trace: scopes of instructions, loops counted once, and a real trace on this CPU."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.tools.profiler import (
    UNKNOWN,
    Event,
    ProfileError,
    by_scope,
    choose_modules,
    read_events,
    read_module,
    short_scope,
    table,
)

TEXT = """HloModule jit_forward, is_scheduled=true

ENTRY %main.1 (x.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0), metadata={op_name="x"}
  %fusion.2 = f32[] fusion(%x.1), kind=kLoop, calls=%c, metadata={op_name="jit(forward)/mlp/dot_general" id=2}
  ROOT %custom-call.3 = f32[] custom-call(%fusion.2), metadata={a="p" op_name="jit(forward)/attention/jit(paged)/x"}
}
"""


def line(instruction, scope, opcode="fusion"):
    return f'  %{instruction} = (f32[8,2]{{1,0}}, s8[4]) {opcode}(%x), metadata={{op_name="jit(f)/{scope}/dot"}}\n'


def graph(*kernels, launch="1", op="command_buffer_1"):
    return [Event(name, "jit_f", "7", op, 1.0, launch) for name in kernels]


def scopes_of_kernels(events, module):
    return {time.scope: round(time.seconds) for time in by_scope(events, [module])}


@pytest.mark.parametrize(
    ("op_name", "depth", "scope"),
    [
        ("jit(forward)/attention/jit(paged)/while/body/dot_general", 2, "attention/paged"),
        ("jit(forward)/attention/jit(paged)/while/body/dot_general", 1, "attention"),
        ("jit(forward)/attention/norm/jit(_where)/select_n", 3, "attention/norm"),
        ("jit(forward)/attention/xkms,xksh->xkmh/dot_general", 3, "attention"),
        ("jit(sample)/add", 2, "sample"),
        ("x", 2, UNKNOWN),
    ],
)
def test_a_scope_is_named_by_scopes_and_functions_not_by_machinery(op_name, depth, scope):
    assert short_scope(op_name, depth) == scope


def test_instructions_get_their_scope_from_the_compiled_text():
    module = read_module(TEXT)
    assert module.name == "jit_forward"
    assert module.scopes["fusion.2"] == "jit(forward)/mlp/dot_general"
    assert module.scopes["custom-call.3"] == "jit(forward)/attention/jit(paged)/x"
    assert module.entry == (("fusion.2", "fusion"), ("custom-call.3", "custom-call"))


def test_of_modules_of_one_name_the_one_that_knows_the_instructions_is_taken():
    small = read_module("HloModule jit_f\n" + line("fusion.1", "a"))
    large = read_module("HloModule jit_f\n" + line("fusion.1", "b") + line("fusion.2", "b"))
    events = [Event("k", "jit_f", "7", op, 1.0) for op in ("fusion.1", "fusion.2")]
    chosen = choose_modules([*events, Event("k", "jit_f", "8", "fusion.1", 1.0)], [small, large])
    assert chosen == {("jit_f", "7"): large, ("jit_f", "8"): small}


def test_time_is_summed_by_scope_and_what_has_none_is_kept():
    events = [
        Event("gemm", "jit_forward", "1", "fusion.2", 3e-3),
        Event("gemm", "jit_forward", "1", "fusion.2", 1e-3),
        Event("paged", "jit_forward", "1", "custom-call.3", 2e-3),
        Event("memcpy", "", "", "", 1e-3),
    ]
    times = by_scope(events, [read_module(TEXT)])
    assert [(time.scope, round(time.seconds, 6), time.calls) for time in times] == [
        ("mlp", 4e-3, 2),
        ("attention/paged", 2e-3, 1),
        (UNKNOWN, 1e-3, 1),
    ]
    lines = table(times, steps=2).splitlines()
    assert lines[2] == "| mlp | 2.000 | 57.1% | 1.0 | gemm |"
    assert lines[-1] == "| all | 3.500 | 100% | 2.0 | |"


def test_a_real_trace_gives_the_read_module_the_program_and_no_second_twice(tmp_path):
    @jax.jit
    def program(x):
        with jax.named_scope("loop"):
            x = jax.lax.fori_loop(0, 4, lambda _, y: jnp.sin(y @ y), x)
        with jax.named_scope("tail"):
            return jnp.cos(x) @ x

    compiled = program.lower(jnp.ones((64, 64))).compile()
    jax.block_until_ready(compiled(jnp.ones((64, 64))))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(compiled(jnp.ones((64, 64))))
    events = read_events(tmp_path)
    times = {time.scope: time for time in by_scope(events, [read_module(compiled.as_text())])}
    assert {"loop", "tail"} <= times.keys()
    assert all(time.seconds >= 0 for time in times.values())
    assert times["loop"].calls > times["tail"].calls


def test_a_folder_without_a_trace_is_named(tmp_path):
    with pytest.raises(ProfileError, match="holds no trace"):
        read_events(tmp_path)


LAYERS = read_module(
    "HloModule jit_f\nENTRY %main {\n"
    + "".join(
        line(f"norm_fusion.{i}", "norm")
        + line(f"custom-call.{2 * i}", "attention", "custom-call")
        + line(f"add_fusion.{i}", "norm")
        + line(f"custom-call.{2 * i + 1}", "mlp", "custom-call")
        for i in range(3)
    )
    + "}\n"
)


def test_kernels_of_a_cuda_graph_are_told_apart_by_their_order():
    layer = ["norm_fusion_0", "paged", "add_fusion_0", "nvjet"]  # identical fusions share the first one's kernel
    assert scopes_of_kernels(graph(*layer * 3), LAYERS) == {"norm": 6, "attention": 3, "mlp": 3}


def test_every_launch_of_a_graph_begins_anew():
    step = ["norm_fusion_0", "paged", "add_fusion_0", "nvjet"] * 3
    events = [*graph(*step, launch="1"), *graph(*step, launch="2")]
    assert scopes_of_kernels(events, LAYERS) == {"norm": 12, "attention": 6, "mlp": 6}


def test_a_module_of_two_graphs_goes_on_where_the_first_ended():
    first = graph("norm_fusion_0", "paged", launch="1", op="command_buffer_1")
    second = graph("add_fusion_0", "nvjet", launch="2", op="command_buffer_2")
    assert scopes_of_kernels([*first, *second] * 2, LAYERS) == {"norm": 4, "attention": 2, "mlp": 2}


def test_a_copy_and_a_librarys_second_kernel_count_to_the_kernel_before():
    layer = ["norm_fusion_0", "paged", "splitk_reduce", "add_fusion_0", "memcpy32_post", "nvjet"]
    assert scopes_of_kernels(graph("norm_fusion_0", "paged", "splitk_reduce", "add_fusion_0", "nvjet"), LAYERS) == {
        "norm": 2,
        "attention": 2,
        "mlp": 1,
    }
    assert sum(scopes_of_kernels(graph(*layer), LAYERS).values()) == len(layer)
