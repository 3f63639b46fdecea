"""Finds the transfers between chips in the HLO text of a compiled program: their kind, size, groups and frequency."""

import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_mlp.checks import require

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SCATTER = "all-reduce-scatter"  # the TPU compiler writes a reduce-scatter as an all-reduce in a fusion of this name
MOVES = ("bitcast", "convert", "copy", "copy-done", "copy-start")  # instructions that do not change a number's value

INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")


@dataclass(frozen=True)
class Collective:
    """One transfer between chips.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: the size of its result on each chip.
      groups: the groups of chips that exchange data, as positions in the mesh. For a collective-permute, the pairs
        (source, target).
      times: how often it runs, including the loops around it. None if the text does not tell.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...] = ()
    times: int | None = 1

    @property
    def sent_bytes(self) -> float:
        """The least that a chip must send in one run.

        In a group of n chips that is (n - 1) / n of the array that is gathered, scattered or exchanged. An all-reduce
        sends twice as much, because it is a reduce-scatter and then an all-gather.
        """
        size = max(map(len, self.groups), default=1)
        if self.kind == "collective-permute":
            return self.bytes
        if self.kind == "reduce-scatter":
            return self.bytes * (size - 1)
        return self.bytes * (size - 1) / size * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Instruction:
    """One line of HLO text: `name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str  # the operands, a closing bracket, and the attributes

    @functools.cached_property
    def operands(self) -> list[str]:
        return [operand.split("%")[-1].strip() for operand in _split(self.rest)]

    def computation(self, attribute: str) -> str:
        """The name of the computation in `attribute`, for example the body of a loop."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        assert found is not None, self
        return found[1]


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Loop:
    """The while `instruction` of `computation`, whose body is being read; `outer` is the loop around it, if any."""

    computation: Computation
    instruction: Instruction
    outer: "Loop | None"

    def initial(self, index: int) -> str:
        """The name of the value that element `index` of the loop's state has before the first turn."""
        return self.computation[self.instruction.operands[0]].operands[index]


def collectives(text: str) -> tuple[Collective, ...]:
    """The transfers between chips, in the order in which they run.

    - An asynchronous transfer counts once, at its start. Both branches of a conditional count.
    - Transfers in fusions count once for each channel id, with the smallest number of runs. The TPU compiler splits one
      transfer over several fusions with the same channel id, some of them inside a concurrent loop.
    - Transfers outside of fusions all count. (Those that a program requests in `jax.shard_map` all have channel 1.)

    Raises:
      ValueError: if the text has no ENTRY, or writes groups in a form that this module does not know.
    """
    program = _Program(text)
    transfers = list(program.transfers(program.entry, 1, None))
    split_channels = {channel for channel, in_fusion, _ in transfers if in_fusion}
    found: dict[Any, Collective] = {}
    for position, (channel, _, each) in enumerate(transfers):
        key = channel if channel in split_channels and channel is not None else position
        found[key] = min(found.get(key, each), each, key=lambda each: math.inf if each.times is None else each.times)
    return tuple(found.values())


class _Program:
    """The computations of a program, each of them instructions by name."""

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
        require(bool(self.entry), "A program's text must have an ENTRY.", repr(text[:80]), "pass compiled.as_text().")

    def transfers(
        self, name: str, times: int | None, loop: Loop | None, in_fusion: bool = False
    ) -> Iterator[tuple[str | None, bool, Collective]]:
        """Yields (channel id, is it in a fusion?, transfer) for computation `name`, which runs `times` times."""
        computation = self.computations[name]
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if instruction.opcode == "while":
                inner = Loop(computation, instruction, loop)
                count = self.trip_count(inner)
                inner_times = None if times is None or count is None else times * count
                yield from self.transfers(instruction.computation("body"), inner_times, inner, in_fusion)
            elif kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                each = Collective(kind, _result_bytes(instruction), _groups(instruction.rest), times)
                yield channel and channel[0], in_fusion, each
            else:
                inside = in_fusion or instruction.opcode == "fusion"
                for called in _called(instruction):
                    for channel, fused, each in self.transfers(called, times, loop, inside):
                        if called.startswith(SCATTER):  # each chip keeps its shard of the sum
                            size = _bytes(instruction.shape)
                            each = Collective("reduce-scatter", size, each.groups, each.times)
                        yield channel, fused, each

    # The CPU's and the GPU's compilers write known_trip_count next to a loop. The TPU compilers do not, so the next
    # three methods derive it from the start, the step and the bound of the loop's counter.

    def trip_count(self, loop: Loop) -> int | None:
        """How many turns a loop makes, or None if that cannot be told."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.instruction.rest):
            return int(known[1])
        condition = self.computations[loop.instruction.computation("condition")]
        test = self.roots[loop.instruction.computation("condition")]
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, bound = test.operands
        index = _index(condition, counter)
        if index is None:
            return None
        body = loop.instruction.computation("body")
        start = self.constant(loop.computation, loop.initial(index), loop.outer)
        step = self.added(self.computations[body], self.roots[body].operands[index], index, loop)
        stop = self.constant(condition, bound, loop)
        if start is None or stop is None or not step:
            return None
        return max(0, math.ceil((stop - start) / step))

    def added(self, body: Computation, name: str, index: int, loop: Loop) -> int | None:
        """What a turn adds to element `index` of the loop's state, if `name` is that element at the turn's end."""
        last = body[_origin(body, name)]
        if last.opcode != "add":
            return 0 if _index(body, name) == index else None
        before, addend = last.operands
        if _index(body, before) != index:
            before, addend = addend, before
        earlier = self.added(body, before, index, loop)
        number = self.constant(body, addend, loop)
        return None if earlier is None or number is None else earlier + number

    def constant(self, computation: Computation, name: str, loop: Loop | None) -> int | None:
        """The constant that `name` stands for. If the loop only carries it, look it up outside of the loop."""
        name = _origin(computation, name)
        if computation[name].opcode == "constant":
            return int(computation[name].rest.partition(")")[0])
        index = _index(computation, name)
        if index is None or loop is None:
            return None
        body = loop.instruction.computation("body")
        if _index(self.computations[body], self.roots[body].operands[index]) != index:
            return None
        return self.constant(loop.computation, loop.initial(index), loop.outer)


def _origin(computation: Computation, name: str) -> str:
    """The instruction from which MOVES brought the value of `name`."""
    while computation[name].opcode in MOVES:
        name = computation[name].operands[0]
    return name


def _index(computation: Computation, name: str) -> int | None:
    """The position of `name` in the tuple that is the computation's parameter, or None if it is not an element."""
    element = computation[_origin(computation, name)]
    if element.opcode != "get-tuple-element" or computation[element.operands[0]].opcode != "parameter":
        return None
    return int(element.rest.rpartition("index=")[2].partition(",")[0])


def _called(instruction: Instruction) -> list[str]:
    """The names of the computations that a fusion, a call or a conditional runs."""
    names = re.findall(r"(?:calls|(?:true|false)_computation)=%?([\w.-]+)", instruction.rest)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
        names += [name.strip().removeprefix("%") for name in branches.split(",")]
    if instruction.opcode == "call":
        names.append(instruction.computation("to_apply"))
    return names


def _result_bytes(instruction: Instruction) -> int:
    """The size of a transfer's result.

    The shape at the start of an asynchronous transfer is (operands, results, ...). Only an all-reduce-start gives the
    results alone, unless its operands are in brackets.
    """
    shape = instruction.shape
    if instruction.opcode.endswith("-start") and (instruction.opcode != "all-reduce-start" or shape.startswith("((")):
        return _bytes(_split(shape[1:-1])[1])
    return _bytes(shape)


def _bytes(shape: str) -> int:
    """The size of a shape such as `bf16[8,128]{1,0}`, or of a tuple of shapes. A `pred` takes one byte."""
    arrays = re.findall(r"(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    return sum(int(bits or 8) * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in arrays) // 8


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Replica groups or source-target pairs, in any form that XLA writes."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d, {}]*\})\}", attributes):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", found[1]))
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={IOTA}", attributes):
        chips = _iota(found[2], found[3]).reshape(_numbers(found[1]))
    elif found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{([^}}]*)\}}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        chips = _iota(found[2] or ",".join(sizes.values()), found[3])
        # Example: replica_groups=mesh['a'=2,'b'=8], device_ids=([16]) {'a','b':(2)4}. A group spans a and 4 of b's 8.
        # Each axis is split into (outer, chosen, inner): a into (1, 2, 1), b into (2, 4, 1).
        factors = {name: (1, int(size), 1) for name, size in sizes.items()}
        for name, outer, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", found[4]):
            factors[name] = int(outer), int(size), int(sizes[name]) // (int(outer) * int(size))
        chosen = [3 * list(sizes).index(name) + 1 for name in re.findall(r"'([^']+)'", found[4])]
        chips = chips.reshape([factor for axis in factors.values() for factor in axis])
        count = math.prod(chips.shape[axis] for axis in chosen)
        chips = np.moveaxis(chips, chosen, range(-len(chosen), 0)).reshape(-1, count)
    else:
        rule = "Replica groups must be in a known form."
        require("replica_groups" not in attributes, rule, attributes[:300], "extend gemma_mlp.aot.hlo._groups.")
        return ()
    return tuple(map(tuple, chips.tolist()))


IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [4,2]T(1,0): the numbers 0 to 7 as an array of 4 x 2, transposed


def _iota(sizes: str, order: str | None) -> np.ndarray:
    chips = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return chips.transpose(_numbers(order) if order else range(chips.ndim))


def _numbers(text: str) -> list[int]:
    return list(map(int, text.split(",")))


def _split(text: str) -> list[str]:
    """Splits `text` at the commas outside of all brackets. It ends where it closes a bracket that it did not open."""
    depth = list(itertools.accumulate((char in "([{") - (char in ")]}") for char in text))
    end = next((at for at, level in enumerate(depth) if level < 0), len(text))
    cuts = [-1, *(at for at in range(end) if text[at] == "," and depth[at] == 0), end]
    return [text[a + 1 : b].strip() for a, b in itertools.pairwise(cuts)]
