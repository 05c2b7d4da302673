"""Shows that no size overflows a 32-bit integer in a Triton kernel, without a GPU and without running it.

    python -m tests.integer_proof few        # or: many

The backends' own host code launches on fake CUDA tensors of up to 2^32 columns (recorder.py). Every kernel is then
compiled to Triton's intermediate code, with the argument types it would have there, and each integer gets the interval
of its possible values: arguments are known, program ids are bounded by the grid, loop variables by their bounds. What
an address, a loop bound or a mask of a load or store depends on must fit its type, and every loop must advance.
Prints one JSON object: how much was looked at, and the faults.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from . import recorder
from .recorder import Launch

SIZES = (2**26, 85_000_000, 2**30, 2**32)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
Interval = tuple[int, int] | None  # None: not known


class _ReachedError(Exception):
    """Carries the intermediate code out of Triton's compiler."""


def intermediate_code(kernel: Any, signature: dict, constants: dict, attributes: dict, options: dict) -> str:
    """Of a kernel, after Triton's own simplifications, before anything of the GPU."""
    original = CUDABackend.add_stages

    def stop(module: Any, metadata: Any) -> None:
        # Printed without places where this version would leave them out anyway.
        raise _ReachedError(str(module))

    def only_first(self: Any, stages: dict, *rest: Any) -> None:
        original(self, stages, *rest)
        stages["ttgir"] = stop

    CUDABackend.add_stages = only_first
    try:
        source = ASTSource(kernel, signature, constants, attributes)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except _ReachedError as reached:
        return str(reached)
    finally:
        CUDABackend.add_stages = original
    raise AssertionError("the compiler did not pass its first stage")


@dataclass
class Compiled:
    """A launch, compiled as it would be for these arguments."""

    text: str
    values: dict[str, int]  # of the integer arguments
    grid: tuple[int, ...]


_texts: dict[Any, str] = {}


def compiled(kernel: Any, launch: Launch) -> Compiled:
    """Types as Triton's launcher chooses them: 32 bits where a value fits, 1 and None are constants."""
    names = [name for name in kernel.arg_names if name not in launch.constants]
    loose = {kernel.arg_names[p.num] for p in kernel.params if p.do_not_specialize}
    options = {name: launch.constants[name] for name in ("num_warps", "num_stages") if name in launch.constants}
    constants = {name: value for name, value in launch.constants.items() if name in kernel.arg_names}
    signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
    values, attributes = {}, {}
    assert len(names) == len(launch.arguments)
    for name, value in zip(names, launch.arguments, strict=True):
        place = (kernel.arg_names.index(name),)
        if value is None or (isinstance(value, int) and value == 1 and name not in loose):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[place] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            values[name] = value
            if value % 16 == 0 and name not in loose:
                attributes[place] = [["tt.divisibility", 16]]
    ordered = {name: signature[name] for name in kernel.arg_names}
    # Triton 3.4 prints arguments by number.
    runtime = [name for name in kernel.arg_names if ordered[name] != "constexpr"]
    values |= {f"arg{i}": values[name] for i, name in enumerate(runtime) if name in values}
    key = repr((launch.name, kernel.fn.__module__, ordered, constants, attributes, options))
    if key not in _texts:
        _texts[key] = intermediate_code(kernel, ordered, constants, attributes, options)
    return Compiled(_texts[key], values, launch.grid)


_RESULT = re.compile(r"^(%[\w.$-]+)(?::(\d+))? = (.*)$")
_NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
_CHECKED = {"arith.addi", "arith.subi", "arith.muli", "arith.shli", "arith.trunci"}
_PASSED_ON = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.extui",
              "tt.unsplat"}  # fmt: skip


@dataclass
class _Line:
    """One operator."""

    number: int
    name: str  # "arith.muli"
    operands: list[str]
    kind: str  # the result's type, as written
    text: str
    sources: list[list[str]] = field(default_factory=list)  # of results that come out of regions: all that can be it


class Analysis:
    """Intervals of a kernel's integers, and what is wrong with them."""

    def __init__(self, code: Compiled):
        self.code = code
        self.lines: dict[str, _Line] = {}  # by result
        self.carried: dict[str, list[str]] = {}  # loop-carried values: what they may be
        self.loops: list[tuple[str, str, str, str, str, int]] = []  # variable, bounds, step, type, line
        self.roots: set[str] = set()
        self.known: dict[str, Interval] = {}
        self.faults: list[str] = []
        self.places = dict(re.findall(r"^(#loc\d*) = (loc\(.*\))$", code.text, re.MULTILINE))
        self._parse(code.text.splitlines())

    def _parse(self, lines: list[str]) -> None:
        # Loops and branches that are open: results of their operator, carried values.
        open_regions: list[tuple[str | None, int, list[str]]] = []
        for number, raw in enumerate(lines):
            text = re.sub(r"\s*loc\((?:[^()]|\([^()]*\))*\)", "", raw).strip()
            match = _RESULT.match(text)
            name, count, body = (match[1], int(match[2] or 1), match[3]) if match else (None, 0, text)
            operator = re.match(r"\"?([a-z_]+\.[\w.]+)", body)
            if operator is None:
                if body.startswith("}") and not body.startswith("} else") and open_regions:
                    open_regions.pop()
                continue
            kind = body.rsplit(" : ", 1)[-1].rsplit(" to ", 1)[-1].strip() if " : " in body else ""
            called = operator[1]
            if called == "scf.for":
                head = re.match(
                    r"scf\.for (%[\w.$-]+) = (%\S+) to (%\S+) step (%[\w.$-]+)\s*(?:iter_args\((.*?)\))?", body
                )
                assert head, text
                kind = re.search(r" : (i\d+)\s*\{?", body.split("->")[-1] if "->" in body else body)
                width = kind[1] if kind else "i32"
                self.loops.append((head[1], head[2], head[3], head[4], width, number))
                self.roots |= {head[2], head[3], head[4]}
                pairs = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", head[5] or "")
                for argument, first in pairs:
                    self.carried[argument] = [first]
                open_regions.append((name, count, [argument for argument, _ in pairs]))
                continue
            if called == "scf.if":
                self.roots |= set(_NAME.findall(body.split(" -> ")[0].split(" : ")[0]))
                open_regions.append((name, count, []))
                continue
            if called == "scf.yield":
                values = _NAME.findall(body.split(" : ")[0])
                result, many, arguments = open_regions[-1]
                for i, value in enumerate(values):
                    if i < len(arguments):
                        self.carried[arguments[i]].append(value)
                    if result is not None:
                        self.carried.setdefault(result if many == 1 else f"{result}#{i}", []).append(value)
                continue
            if raw.rstrip().endswith("{") or body.endswith("({"):  # tt.reduce, tt.scan, the function itself
                open_regions.append((None, 0, []))
            operands = _NAME.findall(body.split(" : ")[0])
            line = _Line(number, called, operands, kind, raw)
            if name is not None:
                self.lines[name] = line
            if called == "tt.addptr":
                self.roots.add(operands[1])
            elif called in ("tt.load", "tt.store"):
                self.roots |= set(operands[1 if called == "tt.load" else 2 :])
            elif called == "tt.atomic_rmw":
                self.roots |= set(operands[2:])

    def run(self) -> list[str]:
        """The faults."""
        for name in self._slice():
            self.interval(name)
        for _, low, high, step, width, number in self.loops:
            first, last, by = self.interval(low), self.interval(high), self.interval(step)
            if by is None or by[0] < 1:
                self._fault(number, f"a loop whose step is in {by}")
            elif last is not None and last[1] - 1 + by[1] > _limits(width)[1]:
                self._fault(number, f"a loop over {width} from {first} to {last} by {by}")
        return self.faults

    def _slice(self) -> Iterable[str]:
        """All that addresses, bounds and masks depend on."""
        found, todo = [], list(self.roots)
        seen = set(todo)
        while todo:
            name = todo.pop()
            found.append(name)
            line = self.lines.get(name)
            more = self.carried.get(name, []) if line is None else line.operands
            more = [*more, *next(((low, high, step) for v, low, high, step, *_ in self.loops if v == name), ())]
            if line is not None and line.name in ("tt.load", "tt.reduce", "tt.scan"):
                more = []  # values from memory and sums of them: not known
            todo += [m for m in more if m not in seen]
            seen |= set(more)
        return found

    def interval(self, name: str) -> Interval:
        if name not in self.known:
            self.known[name] = None  # while it is worked out: what depends on itself is not known
            self.known[name] = self._work_out(name)
        return self.known[name]

    def _work_out(self, name: str) -> Interval:
        line = self.lines.get(name)
        if line is None:
            loop = next((loop for loop in self.loops if loop[0] == name), None)
            if loop is not None:
                low, high = self.interval(loop[1]), self.interval(loop[2])
                return None if low is None or high is None else (low[0], max(low[0], high[1] - 1))
            if name in self.carried:
                return _union([self.interval(value) for value in self.carried[name]])
            value = self.code.values.get(name.lstrip("%"))
            return None if value is None else (value, value)
        result = self._of_operator(line)
        bits = re.search(r"(?:^|x)i(\d+)>?$", line.kind)
        if bits is None or result is None:
            return None
        low, high = _limits(f"i{bits[1]}")
        if int(bits[1]) > 1 and not (low <= result[0] and result[1] <= high):
            if line.name in _CHECKED:
                self._fault(line.number, f"{line.name} of {line.kind} in {list(result)}")
            return None
        return result

    def _of_operator(self, line: _Line) -> Interval:
        name = line.name
        if name == "arith.constant":
            text = line.text.split(" loc(")[0]
            found = re.search(r"arith\.constant (?:dense<)?(-?\d+|true|false)>? :", text) or re.search(
                r"arith\.constant (true|false)", text
            )
            if not found:
                return None
            value = {"true": 1, "false": 0}.get(found[1])
            value = int(found[1]) if value is None else value
            return value, value
        if name == "tt.get_program_id":
            axis = "xyz".index(re.search(r"get_program_id ([xyz])", line.text)[1])
            return 0, (self.code.grid[axis] if axis < len(self.code.grid) else 1) - 1
        if name == "tt.make_range":
            ends = {key: int(value) for key, value in re.findall(r"(start|end) = (\d+) : i32", line.text)}
            return ends["start"], ends["end"] - 1
        if name in ("tt.load", "tt.reduce", "tt.scan", "arith.cmpi", "arith.cmpf"):
            return None
        operands = [self.interval(operand) for operand in line.operands]
        if name in _PASSED_ON or name == "arith.trunci":
            return operands[0]
        if name == "arith.select":
            return _union(operands[1:])
        if name == "arith.andi":  # a mask of bits keeps a value within it
            bounds = [o[1] for o in operands if o is not None and o[0] >= 0]
            return (0, min(bounds)) if bounds else None
        if len(operands) != 2 or any(o is None for o in operands):
            return None
        (a, b), (c, d) = operands
        corners = {
            "arith.addi": lambda: [a + c, b + d],
            "arith.subi": lambda: [a - d, b - c],
            "arith.muli": lambda: [a * c, a * d, b * c, b * d],
            "arith.shli": lambda: [x << y for x in (a, b) for y in (c, d)] if c >= 0 and d < 64 else None,
            "arith.divsi": lambda: [_cut(x, y) for x in (a, b) for y in (c, d)] if c > 0 else None,
            "arith.remsi": lambda: [0 if a >= 0 else 1 - d, min(b, d - 1)] if c > 0 else None,
            "arith.minsi": lambda: [min(a, c), min(b, d)],
            "arith.maxsi": lambda: [max(a, c), max(b, d)],
        }.get(name, lambda: None)()
        return None if corners is None else (min(corners), max(corners))

    def _fault(self, number: int, what: str) -> None:
        self.faults.append(f"{what}, at {self._place(number)}")

    def _place(self, number: int) -> str:
        """Where in the sources a line comes from."""
        text = self.code.text.splitlines()[number]
        alias = re.findall(r"loc\((#loc\d*)\)", text)
        here = self.places.get(alias[-1], "") if alias else text
        for _ in range(20):
            place = re.search(r'loc\("([^"]+\.py)":(\d+)', here)
            if place:
                return f"{place[1].rsplit('/', 1)[-1]}:{place[2]}"
            inner = re.search(r"#loc\d+", here)
            here = self.places.get(inner[0], "") if inner else ""
        return text.strip()[:160]


def _limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _cut(a: int, b: int) -> int:
    return abs(a) // b * (1 if a >= 0 else -1)


def _union(intervals: list[Interval]) -> Interval:
    if not intervals or any(i is None for i in intervals):
        return None
    return min(i[0] for i in intervals), max(i[1] for i in intervals)


def faults_of(kernel: Any, launch: Launch) -> list[str]:
    """What is wrong with a kernel when launched like this."""
    return Analysis(compiled(kernel, launch)).run()


def main(group: str) -> dict[str, Any]:
    """Everything of a group of launches, over all sizes."""
    from .launch_cases import launch_all

    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # what is compiled already would not pass by here
    kernels = {name: getattr(module, name) for module, names in recorder.KERNELS.items() for name in names}
    looked, faults = set(), []
    for d in SIZES:
        with recorder.recorded(cuda_is_built=False) as recording:
            launch_all(group, d)
        for launch in recording.launches:
            label = f"{launch.name} {launch.constants.get('STAGE', '')}".strip()
            looked.add(label)
            for fault in faults_of(kernels[launch.name], launch):
                faults.append(f"{label}, d = {d}: {fault}")
    return {"kernels": sorted(looked), "compiled": len(_texts), "faults": sorted(set(faults))}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
