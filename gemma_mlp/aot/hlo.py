"""Reads a compiled program's HLO text: what is sent between chips, how often, and by which of them to which."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_mlp.checks import require

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SCATTER = "all-reduce-scatter"  # the fusions in which the TPU's compiler has a reduce-scatter, as an all-reduce
MOVES = ("bitcast", "convert", "copy", "copy-done", "copy-start")  # of one number to another place

INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")


@dataclass(frozen=True)
class Collective:
    """One transfer between chips.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: of its result on each chip.
      groups: the chips that exchange with one another, as positions in the mesh; of a collective-permute the pairs
        (source, target).
      times: how often it runs, in loops within loops; None where the text does not tell.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...] = ()
    times: int | None = 1

    @property
    def sent_bytes(self) -> float:
        """What a chip has to send, at least, for one run: all but its own part, a sum's parts once more."""
        size = max(map(len, self.groups), default=1)
        if self.kind == "collective-permute":
            return self.bytes
        if self.kind == "reduce-scatter":
            return self.bytes * (size - 1)
        return self.bytes * (size - 1) / size * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @functools.cached_property
    def operands(self) -> list[str]:
        return [operand.split("%")[-1].strip() for operand in _split(self.rest[: _end(self.rest)])]

    def computation(self, attribute: str) -> str:
        """The computation that `attribute` names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        assert found is not None, self
        return found[1]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Call:
    """A loop's body, entered from `instruction` of `computation`, which `outer` entered."""

    computation: Computation
    instruction: Instruction
    outer: "Call | None"


def collectives(text: str) -> tuple[Collective, ...]:
    """The transfers between chips, in the order in which they run; an asynchronous one counts once, at its start.

    Both branches of a conditional count. What the TPU's compiler spreads over fusions, some of them inside of loops
    that run meanwhile, has one channel, and counts once, where it runs least. (Those that a program asks for itself, in
    `jax.shard_map`, all have channel 1.)
    """
    program = _Program(text)
    transfers = list(program.transfers(program.entry, 1, None))
    spread = {channel for channel, fused, _ in transfers if fused}
    found: dict[Any, Collective] = {}
    for position, (channel, _, each) in enumerate(transfers):
        key = channel if channel in spread and channel is not None else position
        found[key] = min(found.get(key, each), each, key=lambda each: math.inf if each.times is None else each.times)
    return tuple(found.values())


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = name = ""
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                name = header[2]
                self.computations[name] = {}
                self.entry = name if header[1] else self.entry
            elif found := INSTRUCTION.match(line):
                instruction = Instruction(*found.groups()[1:])
                self.computations[name][instruction.name] = instruction
                if found[1]:
                    self.roots[name] = instruction
        require(bool(self.entry), "A program's HLO text has an ENTRY.", repr(text[:80]), "pass compiled.as_text().")

    def transfers(
        self, name: str, times: int | None, call: Call | None, fused: bool = False
    ) -> Iterator[tuple[str | None, bool, Collective]]:
        """Those of one computation, which runs `times` times, each with its channel and whether it is in a fusion."""
        for instruction in self.computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "while":
                trips = self.trips(self.computations[name], instruction, call)
                inner = None if times is None or trips is None else times * trips
                body = instruction.computation("body")
                yield from self.transfers(body, inner, Call(self.computations[name], instruction, call), fused)
            elif kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                each = Collective(kind, _result_bytes(instruction), _groups(instruction.rest), times)
                yield channel and channel[0], fused, each
            else:
                inside = fused or instruction.opcode == "fusion"
                for called in _called(instruction):
                    for channel, within, each in self.transfers(called, times, call, inside):
                        yield channel, within, _scattered(each, instruction) if called.startswith(SCATTER) else each

    def trips(self, computation: Computation, loop: Instruction, call: Call | None) -> int | None:
        """How often a loop runs: as the compiler says, or as its counter's start, step and bound give it."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations[loop.computation("condition")]
        test = self.roots[loop.computation("condition")]
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, bound = test.operands
        index = _index(condition, counter)
        if index is None:
            return None
        inside = Call(computation, loop, call)
        start = self.number(computation, computation[loop.operands[0]].operands[index], call)
        body = self.computations[loop.computation("body")]
        step = self.step(body, self.roots[loop.computation("body")].operands[index], index, inside)
        stop = self.number(condition, bound, inside)
        if start is None or stop is None or not step:
            return None
        return max(0, math.ceil((stop - start) / step))

    def step(self, body: Computation, name: str, index: int, call: Call) -> int | None:
        """What a turn adds to element `index` of what a loop carries, ending as `name`."""
        last = body[_moved(body, name)]
        if last.opcode != "add":
            return 0 if _index(body, name) == index else None
        before, added = last.operands
        if _index(body, before) != index:
            before, added = added, before
        earlier = self.step(body, before, index, call)
        number = self.number(body, added, call)
        return None if earlier is None or number is None else earlier + number

    def number(self, computation: Computation, name: str, call: Call | None) -> int | None:
        """The constant that `name` is, looked up outside of the loop where the loop only carries it."""
        name = _moved(computation, name)
        if computation[name].opcode == "constant":
            return int(computation[name].rest.partition(")")[0])
        index = _index(computation, name)
        if index is None or call is None:
            return None
        body = call.instruction.computation("body")
        if _index(self.computations[body], self.roots[body].operands[index]) != index:
            return None
        return self.number(call.computation, call.computation[call.instruction.operands[0]].operands[index], call.outer)


def _scattered(total: Collective, fusion: Instruction) -> Collective:
    """The sum inside of a fusion of which each chip keeps its part."""
    return dataclasses.replace(total, kind="reduce-scatter", bytes=_bytes(fusion.shape))


def _moved(computation: Computation, name: str) -> str:
    """Where `name` comes from, through moves."""
    while computation[name].opcode in MOVES:
        name = computation[name].operands[0]
    return name


def _index(computation: Computation, name: str) -> int | None:
    """Which element of the computation's parameter `name` is."""
    element = computation[_moved(computation, name)]
    if element.opcode != "get-tuple-element" or computation[element.operands[0]].opcode != "parameter":
        return None
    return int(element.rest.rpartition("index=")[2].partition(",")[0])


def _called(instruction: Instruction) -> list[str]:
    names = re.findall(r"(?:calls|(?:true|false)_computation)=%?([\w.-]+)", instruction.rest)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
        names += [name.strip().removeprefix("%") for name in branches.split(",")]
    if instruction.opcode == "call":
        names.append(instruction.computation("to_apply"))
    return names


def _result_bytes(instruction: Instruction) -> int:
    """Of a transfer's result. The start of an asynchronous one gives (operands, results, ...), a sum's, unless its
    operands are in brackets, the results alone."""
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and (instruction.opcode != "all-reduce-start" or shape.startswith("((")):
        return _bytes(_split(shape[1:-1])[1])
    return _bytes(shape)


def _bytes(shape: str) -> int:
    """The size of `bf16[8,128]{1,0}` or of a tuple of such."""
    total = 0
    for dtype, dims in re.findall(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]", shape):
        name = {"pred": "bool", "bf16": "bfloat16"}.get(dtype) or re.sub(r"^([fsu])(\d+)$", _numpy_name, dtype)
        total += jnp.dtype(name).itemsize * math.prod(int(size) for size in dims.split(",") if size)
    return total


def _numpy_name(match: re.Match) -> str:
    return {"f": "float", "s": "int", "u": "uint"}[match[1]] + match[2]


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Replica groups or source-target pairs, in any of the forms that XLA writes."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d, {}]*\})\}", attributes):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", found[1]))
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={IOTA}", attributes):
        return _rows(_iota(*found.groups()[1:]).reshape(_numbers(found[1])))
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{([^}}]*)\}}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        chips = _iota(found[2] or ",".join(sizes.values()), found[3])
        # Each axis in three: 'axis':(2)4 is the four after an outer two, 'axis' is all of it.
        parts = {name: (1, int(size), 1) for name, size in sizes.items()}
        for name, outer, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", found[4]):
            parts[name] = int(outer), int(size), int(sizes[name]) // (int(outer) * int(size))
        chosen = [3 * list(sizes).index(name) + 1 for name in re.findall(r"'([^']+)'", found[4])]
        chips = chips.reshape([part for axis in parts.values() for part in axis])
        count = math.prod(chips.shape[axis] for axis in chosen)
        return _rows(np.moveaxis(chips, chosen, range(-len(chosen), 0)).reshape(-1, count))
    require("replica_groups" not in attributes, "Groups are in a known form.", attributes[:300], "extend hlo._groups.")
    return ()


IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [4,2]T(1,0): the numbers of an array of 4 x 2, transposed


def _iota(sizes: str, order: str | None) -> np.ndarray:
    chips = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return chips.transpose(_numbers(order) if order else range(chips.ndim))


def _numbers(text: str) -> list[int]:
    return list(map(int, text.split(",")))


def _rows(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in array.tolist())


def _split(text: str) -> list[str]:
    """Parts between commas that are outside of all brackets."""
    depth = itertools.accumulate((char in "([{") - (char in ")]}") for char in text)
    cuts = [-1, *(at for at, (char, level) in enumerate(zip(text, depth)) if char == "," and level == 0), len(text)]
    return [text[a + 1 : b].strip() for a, b in itertools.pairwise(cuts)]


def _end(text: str) -> int:
    """Where the bracket that was opened before `text` is closed."""
    depth = itertools.accumulate((char == "(") - (char == ")") for char in text)
    return next(at for at, level in enumerate(depth) if level < 0)
