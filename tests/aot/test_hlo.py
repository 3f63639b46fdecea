"""Transfers between chips, found in programs written by hand and in one that this machine's compiler made."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from gemma_mlp import aot
from gemma_mlp.aot import Collective, hlo

FLAT = """
ENTRY %main (p0: bf16[8,16]) -> bf16[32,16] {
  %all-reduce.1 = f32[128,64]{1,0} all-reduce(%dot), channel_id=1, replica_groups={{0,1},{2,3}}
  %start = (bf16[8,16]{1,0:T(8,128)}, bf16[32,16]{1,0:T(8,128)S(1)}, u32[]) all-gather-start(%p0), dimensions={0}
  %done = bf16[32,16]{1,0:T(8,128)} all-gather-done(%start)
  %sum = f32[4]{0} all-reduce-start(%q), channel_id=2
  %wrapped = ((f32[4]{0}), f32[4]{0}) all-reduce-start(%q), channel_id=3
  %pair = (u8[4]{0}, pred[2,3]{1,0}) all-to-all(%a, %b)
  %scalar = s32[] reduce-scatter(%c)
  %fusion = bf16[32,16]{1,0} fusion(%all-reduce.1), kind=kLoop
}
"""


def test_kinds_and_bytes():
    assert hlo.collectives(FLAT) == (
        Collective("all-reduce", 128 * 64 * 4, ((0, 1), (2, 3))),
        Collective("all-gather", 32 * 16 * 2),
        Collective("all-reduce", 4 * 4),
        Collective("all-reduce", 4 * 4),
        Collective("all-to-all", 4 + 6),
        Collective("reduce-scatter", 4),
    )


def test_transfers_of_shard_map_share_a_channel_and_all_count():
    text = """
ENTRY %main (p0: bf16[8,16]) -> bf16[4,16] {
  %one = bf16[4,16]{1,0} reduce-scatter(%p0), channel_id=1, replica_groups={{0,1}}
  %two = bf16[4,16]{1,0} reduce-scatter(%p1), channel_id=1, replica_groups={{0,1}}
}
"""
    assert hlo.collectives(text) == (Collective("reduce-scatter", 128, ((0, 1),)),) * 2


# A loop of 5 turns around a loop of 4. The inner counter starts at a constant that the outer loop carries, grows by 2
# in two additions and ends at 9. The transfer of channel 7 is split over fusions, one of them in the inner loop.
LOOPS = """
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %step = f32[32]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}
}

%inner_condition (c: (s32[], f32[8])) -> pred[] {
  %nine = s32[] constant(9)
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %nine), direction=LT
}

%inner_body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %unit = s32[] constant(1)
  %once = s32[] add(%i, %unit)
  %twice = s32[] add(%unit, %once)
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %during = f32[32]{0} fusion(%x), kind=kCustom, calls=%fused
  %sent = f32[8]{0} collective-permute(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
  ROOT %next = (s32[], f32[8]) tuple(%twice, %sent)
}

%outer_condition (c: (s32[], f32[8], s32[])) -> pred[] {
  %five = s32[] constant(5)
  %c = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%outer_body (c: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %c = (s32[], f32[8], /*index=2*/s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %low = s32[] get-tuple-element(%c), index=2
  %from = s32[] copy(%low)
  %begin = (s32[], f32[8]) tuple(%from, %x)
  %loop = (s32[], f32[8]) while(%begin), condition=%inner_condition, body=%inner_body
  %first = f32[32]{0} fusion(%x), kind=kCustom, calls=%fused
  %second = f32[32]{0} fusion(%x), kind=kCustom, calls=%fused
  %unit = s32[] constant(1)
  %after = s32[] add(%i, %unit)
  %y = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %next = (s32[], f32[8], s32[]) tuple(%after, %y, %low)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = s32[] constant(2)
  %begin = (s32[], f32[8], s32[]) tuple(%zero, %x, %start)
  %loop = (s32[], f32[8], s32[]) while(%begin), condition=%outer_condition, body=%outer_body
  ROOT %y = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def times(text):
    return {each.kind: each.times for each in hlo.collectives(text)}


def test_loops_within_loops_multiply():
    assert len(hlo.collectives(LOOPS)) == 2
    assert times(LOOPS) == {"collective-permute": 5 * 4, "all-gather": 5}


@pytest.mark.parametrize(
    ("old", "new", "permutes"),
    [
        ("constant(9)", "constant(8)", 5 * 3),
        ("s32[] constant(2)", "s32[] constant(3)", 5 * 3),
        ("add(%unit, %once)", "add(%once, %once)", None),  # not a constant step
        ("add(%unit, %once)", "copy(%i)", None),  # no step
        ("compare(%i, %nine), direction=LT", "compare(%i, %nine), direction=NE", None),
        ("tuple(%after, %y, %low)", "tuple(%after, %y, %after)", None),  # the start changes from turn to turn
        ("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}', 5 * 7),
    ],
)
def test_trip_counts_are_derived_from_the_counter(old, new, permutes):
    assert old in LOOPS
    assert times(LOOPS.replace(old, new)) == {"collective-permute": permutes, "all-gather": 5}


@pytest.mark.parametrize("move", ["bitcast", "convert", "copy", "copy-done", "copy-start"])
@pytest.mark.parametrize("moved", ["%i", "%nine", "%unit"], ids=["counter", "bound", "step"])
def test_a_counter_is_followed_through_every_move(move, moved):
    """The counter, the bound and the step of the inner loop each pass through a move before they are used."""
    use = "ROOT %less = pred[] compare(%i, %nine)" if moved == "%nine" else "%once = s32[] add(%i, %unit)"
    assert LOOPS.count(use) == 1
    text = LOOPS.replace(use, f"%moved = s32[] {move}({moved})\n  {use.replace(moved, '%moved')}")
    assert times(text) == {"collective-permute": 5 * 4, "all-gather": 5}


# The branches of two conditionals, in both forms that XLA writes, and a call: each runs inside a loop of 5 turns.
BRANCHES = """
%yes (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}
}

%no (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} collective-permute(%p), channel_id=2, source_target_pairs={{0,1}}
}

%first (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} reduce-scatter(%p), channel_id=3, replica_groups={{0,1}}
}

%second (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%third (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} all-gather(%p), channel_id=4, replica_groups={{0,1}}
}

%routine (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} all-to-all(%p), channel_id=5, replica_groups={{0,1}}
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %a = f32[8]{0} conditional(%flag, %x, %x), true_computation=%yes, false_computation=%no
  %b = f32[8]{0} conditional(%i, %a, %a, %a), branch_computations={%first, %second, %third}
  %d = f32[8]{0} call(%b), to_apply=%routine
  ROOT %next = (s32[], f32[8]) tuple(%i, %d)
}

%test (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8]) tuple(%zero, %x)
  ROOT %y = (s32[], f32[8]) while(%begin), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_every_branch_of_a_conditional_and_every_call_is_searched():
    kinds = ("all-reduce", "collective-permute", "reduce-scatter", "all-gather", "all-to-all")
    assert times(BRANCHES) == dict.fromkeys(kinds, 5)


@pytest.mark.parametrize("count", [2, 3])
def test_branches_of_this_machines_compiler(count):
    """With two branches and a bool XLA may write another form than with three and a number."""
    mesh = jax.make_mesh((8,), ("a",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:8])
    transfers = [lambda x: x + 1, lambda x: jax.lax.psum(x, "a"), lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])]

    def run(which, x):
        if count == 2:
            return jax.lax.cond(which > 0, transfers[2], transfers[1], x)
        return jax.lax.switch(which, transfers, x)

    sharded = jax.shard_map(run, in_specs=(jax.P(), jax.P("a")), out_specs=jax.P("a"), check_vma=False)
    given = (
        jax.ShapeDtypeStruct((), "int32", sharding=NamedSharding(mesh, jax.P())),
        jax.ShapeDtypeStruct((8, 4), "float32", sharding=NamedSharding(mesh, jax.P("a"))),
    )
    with jax.set_mesh(mesh):
        compiled = aot.compile_for("cpu", sharded, *given)
    assert {each.kind for each in compiled.collectives} == {"all-reduce", "collective-permute"}


SCATTERED = """
%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%p), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%sum, %at, %zero), dynamic_slice_sizes={2,4}
}

ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %fusion = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_an_all_reduce_of_which_each_chip_keeps_a_shard_is_a_reduce_scatter():
    """TPU programs write their reduce-scatters so."""
    assert hlo.collectives(SCATTERED) == (Collective("reduce-scatter", 2 * 4 * 4, ((0, 1, 2, 3),)),)


PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
ACROSS = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", PAIRS),
        ("source_target_pairs={{0,4},{1,5},{2,6},{3,7}}", ACROSS),
        ("replica_groups=[4,2]<=[8]", PAIRS),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ACROSS),
        ("replica_groups=[1,8]<=[8]", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ACROSS),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ACROSS),
        (
            "replica_groups=mesh['a'=2,'b'=8], device_ids=([16]) {'a','b':(2)4}",
            ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
        ),
    ],
)
def test_groups_in_every_form(written, groups):
    text = f"ENTRY %main {{\n  %y = f32[2]{{0}} all-gather(%x), channel_id=1, {written}, dimensions={{0}}\n}}"
    assert hlo.collectives(text)[0].groups == groups


# The same forms with sizes and orders made up by Hypothesis. They are expanded here number by number, without NumPy.


MANY = settings(max_examples=100)  # few orders of axes differ from their own inverse


def read(written):
    text = f"ENTRY %main {{\n  %y = f32[2]{{0}} all-gather(%x), channel_id=1, {written}, dimensions={{0}}\n}}"
    (found,) = hlo.collectives(text)
    return found.groups


def listed(groups):
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


def places(sizes):
    return itertools.product(*map(range, sizes))


def iota(sizes, order):
    """The numbers of an array of these sizes, counted row by row, read row by row after it is transposed."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return [
        sum(at * strides[axis] for at, axis in zip(place, order)) for place in places([sizes[axis] for axis in order])
    ]


@st.composite
def iotas(draw):
    """(text, numbers)"""
    sizes = draw(st.lists(st.sampled_from([2, 3, 4, 1]), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(sizes))))
    text = f"[{','.join(map(str, sizes))}]"
    if order != sorted(order) or draw(st.booleans()):
        text += f"T({','.join(map(str, order))})"
    return text, iota(sizes, order)


def divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@given(st.permutations(range(12)), st.lists(st.integers(1, 11), max_size=5, unique=True))
def test_any_listed_groups(chips, cuts):
    groups = tuple(tuple(chips[a:b]) for a, b in itertools.pairwise([0, *sorted(cuts), len(chips)]))
    assert read(f"replica_groups={listed(groups)}") == groups


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=12))
def test_any_pairs(pairs):
    assert read(f"source_target_pairs={listed(pairs)}") == tuple(pairs)


@MANY
@given(iotas(), st.data())
def test_any_iota(iota, data):
    text, chips = iota
    size = data.draw(st.sampled_from(divisors(len(chips))))
    groups = tuple(tuple(chips[at : at + size]) for at in range(0, len(chips), size))
    assert read(f"replica_groups=[{len(chips) // size},{size}]<={text}") == groups


@MANY
@given(iotas(), st.data())
def test_any_axes_of_a_mesh(iota, data):
    """A group has the chips whose places differ on the chosen axes alone, or on the chosen part of one."""
    text, chips = iota
    sizes = data.draw(st.sampled_from([sizes for sizes in MESHES if math.prod(sizes) == len(chips)] or [(len(chips),)]))
    names = "abc"[: len(sizes)]
    chosen = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(1, len(sizes)))]
    mesh = "mesh[" + ",".join(f"'{name}'={size}" for name, size in zip(names, sizes)) + "]"
    mesh += f", device_ids=({text})" if chips != sorted(chips) or data.draw(st.booleans()) else ""
    parts, written = {}, []  # of a chosen axis: how many chips it takes, and their distance along the axis
    for axis in chosen:
        size = data.draw(st.sampled_from(divisors(sizes[axis])))
        outer = data.draw(st.sampled_from(divisors(sizes[axis] // size)))
        whole = size == sizes[axis]
        parts[axis] = size, sizes[axis] // (outer * size)
        written.append(f"'{names[axis]}'" + ("" if whole else f":({outer}){size}"))
    groups = {}
    for chip, place in zip(chips, places(sizes)):
        within = [place[axis] // parts[axis][1] % parts[axis][0] for axis in chosen]
        start = list(place)
        for axis, at in zip(chosen, within):
            start[axis] -= at * parts[axis][1]
        groups.setdefault(tuple(start), []).append((within, chip))
    expected = sorted(tuple(chip for _, chip in sorted(group)) for group in groups.values())
    assert sorted(read(f"replica_groups={mesh} {{{','.join(written)}}}")) == expected


MESHES = [sizes for length in (1, 2, 3) for sizes in itertools.product(range(1, 9), repeat=length)]


def test_unknown_forms_are_explained():
    with pytest.raises(ValueError, match=r"Replica groups must be in a known form\..*<rows>"):
        hlo.collectives("ENTRY %main {\n  %y = f32[2] all-gather(%x), replica_groups=<rows>\n}")
    with pytest.raises(ValueError, match="must have an ENTRY"):
        hlo.collectives("module {}")


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("all-to-all", 75), ("reduce-scatter", 300), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_bytes_that_a_chip_sends(kind, sent):
    """The result has 100 bytes, the group four chips."""
    assert Collective(kind, 100, ((0, 1, 2, 3),)).sent_bytes == sent


def test_a_scan_of_this_machines_compiler():
    mesh = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8])
    weights = jax.ShapeDtypeStruct((6, 8, 8), "float32", sharding=NamedSharding(mesh, jax.P(None, "b")))
    x = jax.ShapeDtypeStruct((4, 8), "float32", sharding=NamedSharding(mesh, jax.P("a", "b")))

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    with jax.set_mesh(mesh):
        compiled = aot.compile_for("cpu", run, weights, x, donate_argnums=1)
    rows = np.arange(8).reshape(2, 4)
    found = {(each.times, each.groups) for each in compiled.collectives}
    assert (6, tuple(map(tuple, rows.tolist()))) in found
