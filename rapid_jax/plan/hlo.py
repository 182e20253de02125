# SPDX-License-Identifier: Apache-2.0
"""What a compiled program's text says: its collectives, how often each runs, and the order of what is started when."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)(?:^|\s)([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(rest`."""

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    def called(self) -> list[str]:
        """Computations that it runs once; the bodies of loops are not among them."""
        names = [name for group in _BRANCHES.findall(self.rest) for name in re.findall(r"[\w.\-]+", group)]
        return names + _CALLED.findall(self.rest)


@dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str
    arrays: tuple[tuple[int, ...], ...]  # shapes on one device of what comes out of it (reduce-scatter: goes in)
    bytes: int
    times: int  # that it runs, when the program is called once


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[Computations, str]:
    """(instructions by computation, in the order of the schedule where the text has one; the entry's name)."""
    found: Computations = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = _HEADER.match(line)
        if header:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            current.append(Instruction(*match.groups(), root=line.lstrip().startswith("ROOT ")))
    return found, entry


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, dimensions) of every array in a shape's text."""
    dense = re.sub(r"\{[^{}]*\}", "", shape)
    return [(kind, tuple(int(x) for x in dims.split(",") if x)) for kind, dims in _ARRAY.findall(dense)]


def bytes_of(arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    """Of the arrays without padding; what is no array of numbers counts nothing."""
    return int(sum(_ITEM_BYTES.get(kind, 0) * math.prod(dims) for kind, dims in arrays))


def widest_sort(text: str) -> int:
    """The largest dimension of what any sort of a program takes; 0 without one."""
    sorts = (line for lines in parse(text)[0].values() for line in lines if line.opcode == "sort")
    return max((size for line in sorts for _, sizes in arrays_of(line.shape) for size in sizes), default=0)


def largest_copy(text: str) -> int:
    """Bytes of the largest array that a program copies or lays out anew outside of its loops; 0 without one."""
    computations, entry = parse(text)
    lines = [line for line in computations[entry] if _is_copy(line, computations)]
    return max((bytes_of(arrays_of(line.shape)[:1]) for line in lines), default=0)


def copied(text: str) -> set[tuple[int, ...]]:
    """Shapes of what a program copies or lays out anew, in its loops too. A move to or from fast memory is none."""
    computations, _ = parse(text)
    found = set()
    for lines in _outside_fusions(computations):
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            if _is_copy(line, computations):
                (to, dims), (source, _) = (_placed(shape)[0] for shape in (line.shape, shapes[line.operands[0]]))
                found |= {dims} if to == source else set()
    return found


def made(text: str) -> set[tuple[int, ...]]:
    """Shapes of what a program's instructions make in a device's large memory, in its loops too. A fusion is one."""
    passing = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional")
    return {
        dims
        for lines in _outside_fusions(parse(text)[0])
        for line in lines
        if line.opcode not in passing and not line.opcode.endswith("-start")
        for memory, dims in _placed(line.shape)
        if memory is None
    }


def _placed(shape: str) -> list[tuple[str | None, tuple[int, ...]]]:
    """(memory, None: the large one; dimensions) of every array in a shape's text."""
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", shape)
    memories = (re.search(r"S\(\d+\)", array) for array in arrays)
    return [(found and found[0], arrays_of(array)[0][1]) for found, array in zip(memories, arrays, strict=True)]


def _outside_fusions(computations: Computations) -> Iterator[list[Instruction]]:
    fusions = (line for lines in computations.values() for line in lines if line.opcode == "fusion")
    inside = {name for line in fusions for name in line.called()}
    return (lines for name, lines in computations.items() if name not in inside)


def _is_copy(line: Instruction, computations: Computations) -> bool:
    copies = ("copy", "copy-start", "transpose")
    if line.opcode != "fusion" or "output_to_operand_aliasing" in line.rest:  # the same bytes under another name
        return line.opcode in copies
    return any(inner.root and inner.opcode in copies for name in line.called() for inner in computations[name])


def collectives(text: str, loops: Sequence[int] = ()) -> list[Collective]:
    """Every collective of a program. A pair of start and done is one.

    A loop's body counts as often as its condition says. Where it does not say, it counts as `loops` says: one number a
    depth of such loops, outermost first; 1 beyond.
    """
    computations, entry = parse(text)
    found: list[Collective] = []

    def visit(name: str, times: int, depth: int) -> None:
        instructions = computations.get(name, [])
        shapes = {item.name: item.shape for item in instructions}
        for item in instructions:
            kind = item.opcode.removesuffix("-start")
            if kind in KINDS:
                found.append(_collective(kind, item, shapes, times))
            elif item.opcode == "while":
                count = trip_count(item, instructions, computations)
                known = count is not None
                repeated = count if count is not None else (loops[depth] if depth < len(loops) else 1)
                visit(_attribute(item, "body"), times * repeated, depth + (not known))
            elif item.opcode not in ("async-done", "async-update", "reduce", "sort", "scatter", "map"):
                for called in item.called():
                    visit(called, times, depth)

    visit(entry, 1, 0)
    return found


def totals(found: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}}, each as often as it runs."""
    table: dict[str, dict[str, int]] = {}
    for item in found:
        row = table.setdefault(item.kind, {"count": 0, "bytes": 0})
        row["count"] += item.times
        row["bytes"] += item.times * item.bytes
    return table


def gathered_kv(text: str, *, slots: int, head_dim: int) -> list[tuple[int, ...]]:
    """Shapes of what is all-gathered, or sent all to all, that may be keys or values of a cache.

    `slots` is a device's share: what has the head dim last and an axis at least that long.
    """
    return [
        dims
        for item in collectives(text)
        if item.kind in ("all-gather", "all-to-all")
        for dims in item.arrays
        if dims and dims[-1] == head_dim and max(dims[:-1], default=0) >= slots
    ]


def trip_count(loop: Instruction, around: Sequence[Instruction], computations: Computations) -> int | None:
    """How often a loop runs, if its text says: a known count, or an index from a constant below a constant."""
    known = re.search(r'known_trip_count[^}]*?"n":"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition = computations.get(_attribute(loop, "condition"), [])
    by_name = {item.name: item for item in condition}
    root = next((item for item in condition if item.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest or len(root.operands) != 2:
        return None
    index, limit = (by_name.get(name) for name in root.operands)
    if index is None or limit is None or index.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    start = _start(loop, around, int(_attribute(index, "index")))
    return None if start is None else max(int(limit.rest.split(")")[0]) - start, 0)


def _start(loop: Instruction, around: Sequence[Instruction], index: int) -> int | None:
    """The constant that a loop's state begins with at `index`; 0 where copies hide it."""
    by_name = {item.name: item for item in around}
    state = by_name.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return 0
    first = by_name.get(state.operands[index])
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = by_name.get(first.operands[0])
    if first is None or first.opcode != "constant":
        return 0
    value = first.rest.split(")")[0]
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _attribute(item: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", item.rest)
    return match[1] if match else ""


def _collective(kind: str, item: Instruction, shapes: dict[str, str], times: int) -> Collective:
    arrays = arrays_of(item.shape)
    if kind == "reduce-scatter":
        arrays = [array for name in item.operands for array in arrays_of(shapes.get(name, ""))] or arrays
    elif item.opcode in ("all-gather-start", "collective-permute-start"):  # operands, results, and words of its own
        arrays = [array for array in arrays if array != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    return Collective(kind, tuple(dims for _, dims in arrays), bytes_of(arrays), times)


@dataclass(frozen=True)
class Event:
    """Something that takes long, in the order in which a device starts it."""

    kind: str  # start, done (of a permute), kernel, loop
    name: str  # done: of its start
    bytes: int = 0  # that a permute moves


def schedule(text: str) -> dict[str, list[Event]]:
    """{computation: events}, of those that have a permute. A kernel is a custom call of Mosaic, or a call of one."""
    computations, _ = parse(text)
    kernels = {name for name, items in computations.items() if any(map(_is_kernel, items))}

    def events(items: Sequence[Instruction]) -> Iterator[Event]:
        for item in items:
            if item.opcode == "collective-permute-start":
                yield Event("start", item.name, _collective("collective-permute", item, {}, 1).bytes)
            elif item.opcode == "collective-permute-done":
                yield Event("done", item.operands[0], bytes_of(arrays_of(item.shape)))
            elif _is_kernel(item) or kernels & set(item.called()):
                yield Event("kernel", item.name)
            elif item.opcode == "while":
                yield Event("loop", item.name)

    table = {name: list(events(items)) for name, items in computations.items()}
    return {name: found for name, found in table.items() if any(event.kind == "start" for event in found)}


def under_kernels(events: Sequence[Event], least_bytes: int = 2**20) -> bool:
    """Whether a kernel runs between the start and the end of every permute of at least so many bytes.

    Smaller ones, of positions, take less time than a kernel takes to start. False where there is no large one.
    """
    kernels = [index for index, event in enumerate(events) if event.kind == "kernel"]
    starts = {event.name: index for index, event in enumerate(events) if event.kind == "start"}
    pairs = [
        (starts[event.name], index)
        for index, event in enumerate(events)
        if event.kind == "done" and event.bytes >= least_bytes and event.name in starts
    ]
    return bool(pairs) and all(any(start < kernel < done for kernel in kernels) for start, done in pairs)


def _is_kernel(item: Instruction) -> bool:
    return item.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in item.rest
