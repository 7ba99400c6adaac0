"""PTX statements to the instructions of `core/machine.h`: one instruction a statement, labels resolved.

What an instruction's operands and modifiers mean is said in core/, beside the operation that reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any, ClassVar

import numpy as np

from emulator.library import operation_index
from emulator.ptx import BYTES, Body, Parameter, UnsupportedError, closing, number, opcode_of, split


class Control(IntEnum):
    NEXT, BRANCH, EXIT, CONVERGE, BARRIER, WAIT, TRAP = range(7)


def _numbered(names: str) -> dict[str, int]:
    return {name: k for k, name in enumerate(names.split())}


SPACES = {"global": 0, "const": 0, "shared": 1, "param": 2, "local": 3}
GENERIC = 4
TYPES = _numbered("u8 s8 u16 s16 u32 s32 u64 s64 f16 bf16 f32 f64") | {"b8": 0, "b16": 2, "b32": 4, "b64": 6}
ROUNDINGS = _numbered("rn rz rm rp rni rzi rmi rpi")
COMPARISONS = _numbered("eq ne lt le gt ge equ neu ltu leu gtu geu num nan") | {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
MAP_FIELDS = ("global_address", "rank", "box_dim", "global_dim", "global_stride", "elemtype", "swizzle_mode")
MAP_IGNORED = ("element_stride", "interleave_layout", "fill_mode")
NO_EFFECT = {"fence", "membar", "prefetch", "nanosleep", "griddepcontrol"}

_SMALL = ["operation", "control", "predicate", "negated", "operands", "modifiers", "list", "target", "line"]
_COUNTS = {"operands": 6, "modifiers": 8}
INSTRUCTION = np.dtype([("immediate", "i8"), *((name, "i4", _COUNTS.get(name, ())) for name in _SMALL)], align=True)


@dataclass
class Code:
    """A kernel as `emulator_kernel` takes it. `opcodes`: of each instruction; `lines`: its text by line number."""

    name: str
    parameters: list[Parameter]
    threads: int | None  # a block, where the PTX fixes them
    registers_a_thread: int
    instructions: np.ndarray
    lists: list[int]
    registers: int
    constants: dict[int, int]  # value: register
    specials: dict[int, int]
    static_shared: int
    local_bytes: int
    opcodes: list[str]
    lines: dict[int, str]


class Module:
    """The kernels and variables of a PTX text."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"//[^\n]*", "", text)
        outside = self.text[: self.text.find(".entry")]
        self.shared = re.findall(
            r"^\s*(?:\.extern )?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", outside, re.M
        )
        self.variables: dict[str, np.ndarray] = {}
        declared = (
            r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?(?:\s*=\s*\{?([^};]+)\}?)?\s*;"
        )
        for kind, name, count, values in re.findall(declared, outside):
            data = np.zeros(int(count or 1), f"u{BYTES[kind]}")
            given = [number(v.strip()) for v in values.split(",") if v.strip()]
            data[: len(given)] = np.array(given, "i8").astype(data.dtype)
            self.variables[name] = data
        self.entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", self.text))

    @property
    def names(self) -> list[str]:
        return [entry[1] for entry in self.entries]

    @cache  # noqa: B019 - lives as long as the module
    def code(self, name: str) -> Code:
        entry = next(e for e in self.entries if e[1] == name)
        end = closing(self.text, entry.end(), "()")
        begin = self.text.index("{", end) + 1
        parameters, body = self.text[entry.end() : end], self.text[begin : closing(self.text, begin, "{}")]
        outside = {symbol: data.ctypes.data for symbol, data in self.variables.items()}
        encoder = Encoder(parameters, body, self.text.count("\n", 0, begin) + 1, outside, self.shared)
        return encoder.code(name, self.text[end:begin])


class Encoder(Body):
    """Encodes the statements of a kernel."""

    def __init__(self, *text: Any) -> None:
        super().__init__(*text)
        self.rows: list[tuple[Any, ...]] = []
        self.lists: list[int] = []

    def code(self, name: str, directives: str) -> Code:
        for statement in self.statements:
            self.statement = statement
            try:
                self._encode()
            except (UnsupportedError, KeyError, StopIteration) as error:
                raise UnsupportedError(f"{name}, line {statement.line}: {statement.text} ({error})") from None
        self.guard = (-1, 0)
        self._emit("nop", control=Control.EXIT)

        def directive(pattern: str) -> int | None:
            found = re.search(pattern, directives)
            return int(found[1]) if found else None

        return Code(
            name=name,
            parameters=self.parameters,
            threads=directive(r"\.(?:reqntid|maxntid)\s+(\d+)"),
            registers_a_thread=directive(r"\.maxnreg\s+(\d+)") or 255,
            instructions=np.array(self.rows, INSTRUCTION),
            lists=self.lists,
            registers=self.count,
            constants=self.constants,
            specials=self.specials,
            static_shared=self.static_shared,
            local_bytes=self.local_bytes,
            opcodes=[opcode_of(s.text) for s in self.statements] + ["ret"],
            lines={s.line: s.text for s in self.statements},
        )

    def _emit(
        self,
        operation: str,
        operands: Sequence[int] = (),
        modifiers: Sequence[int] = (),
        *,
        immediate: int = 0,
        values: Sequence[int] = (),
        control: Control = Control.NEXT,
        target: int = 0,
    ) -> None:
        index = operation_index(operation)
        if index < 0:
            raise UnsupportedError(operation)
        filled = (*operands, *[-1] * (6 - len(operands))), (*modifiers, *[0] * (8 - len(modifiers)))
        row = immediate, index, int(control), *self.guard, *filled, len(self.lists), target, self.statement.line
        self.rows.append(row)
        self.lists.extend(values)

    def _encode(self) -> None:
        words = self.statement.text.split(None, 1)
        self.guard = (-1, 0)
        if words[0].startswith("@"):
            name = words[0][1:]
            self.guard = (self.reg(name.lstrip("!")), int(name.startswith("!")))
            words = words[1].split(None, 1)
        opcode, operands = words[0], split(words[1]) if len(words) > 1 else []
        parts = opcode.replace("::", ":").split(".")
        before = len(self.rows)
        encode = self._ENCODERS.get(parts[0])
        if encode:
            encode(self, parts, operands)
        elif parts[0] in NO_EFFECT:
            self._fence(parts, operands)
        else:
            self._arithmetic(parts, operands)
        assert len(self.rows) == before + 1

    def _arithmetic(self, parts: list[str], operands: list[str]) -> None:
        kept = [
            p for p in parts[1:-1] if p in ("lo", "hi", "wide", "NaN", "relu") or (p == "ftz" and parts[-1] == "f32")
        ]
        if unknown := set(parts[1:-1]) - {*kept, "rn", "approx", "full", "ftz"}:
            raise UnsupportedError(f"modifiers {sorted(unknown)}")
        name = "fma" if parts[0] == "mad" and parts[-1] in ("f32", "f64") else parts[0]
        self._emit(".".join([name, *kept, parts[-1]]), [self.reg(o) for o in operands])

    def _branch(self, parts: list[str], operands: list[str]) -> None:
        target = next(self.labels[operands[0] + s] for s in self.statement.scope if operands[0] + s in self.labels)
        self._emit("nop", control=Control.BRANCH, target=target)

    def _access(self, parts: list[str], operands: list[str]) -> None:
        write = parts[0] == "st"
        (register, offset), values = self.address(operands[not write]), self.regs(operands[write])
        size, is_signed = BYTES[parts[-1]], parts[-1].startswith("s") and BYTES[parts[-1]] < 4
        self._emit(
            "st" if write else "ld",
            [register],
            [self._space(parts), size, len(values), is_signed],
            immediate=offset,
            values=values,
        )

    @staticmethod
    def _space(parts: list[str]) -> int:
        return next((SPACES[p.split(":")[0]] for p in parts[1:] if p.split(":")[0] in SPACES), GENERIC)

    def _atomic(self, parts: list[str], operands: list[str]) -> None:
        operation = next(
            k for k, p in enumerate(("add", "min", "max", "exch", "cas", "and", "or", "xor")) if p in parts
        )
        result = -1 if parts[0] == "red" else self.reg(operands.pop(0))
        register, offset = self.address(operands[0])
        order = 3 if "acq_rel" in parts else 1 if "acquire" in parts else 2 if "release" in parts else 0
        kind, size = parts[-1], BYTES[parts[-1]]
        modifiers = [self._space(parts), size, operation, kind.startswith("f"), kind.startswith("s"), order]
        if size < 4:
            raise UnsupportedError("atomics of 16 bits")
        self._emit("atom", [result, register, *map(self.reg, operands[1:])], modifiers, immediate=offset)

    def _copy(self, parts: list[str], operands: list[str]) -> None:
        kind = ".".join(parts[1:3])
        if kind == "async.commit_group":
            self._emit("cp.async.commit")
        elif kind in ("async.wait_group", "async.wait_all"):
            self._emit("cp.async.wait", modifiers=[number(operands[0]) if operands else -1])
        elif kind in ("async.ca", "async.cg"):
            (to, offset), (start, start_offset) = self.address(operands[0]), self.address(operands[1])
            taken = self.reg(operands[3]) if len(operands) > 3 else -1
            self._emit(
                "cp.async", [to, start, taken], [number(operands[2]), start_offset, 0, 0, 0, 0, 0, 1], immediate=offset
            )
        elif kind == "async.bulk" and parts[3] == "tensor" and parts[6] == "global" and "mbarrier" in parts[7]:
            (to, offset), (barrier, _), (name, where) = (
                self.address(operands[0]),
                self.address(operands[2]),
                split(operands[1][1:-1]),
            )
            at = self.regs(where)
            self._emit("bulk", [to, self.reg(name), barrier], [len(at)], immediate=offset, values=at)
        elif kind == "async.bulk" and parts[3] in ("commit_group", "wait_group"):
            self._emit("nop")  # of stores, which are not supported, and of tensor maps, which are published at once
        else:
            raise UnsupportedError(kind)

    def _tensormap(self, parts: list[str], operands: list[str]) -> None:
        register, offset = self.address(operands[0])
        if parts[1] == "cp_fenceproxy":
            self._emit("tensormap.publish", [register, self.address(operands[1])[0]], control=Control.CONVERGE)
            return
        names = [*MAP_FIELDS, *MAP_IGNORED]
        which = min(names.index(parts[3]), len(MAP_FIELDS))
        modifiers = [which, number(operands[1]) if len(operands) > 2 else 0]
        self._emit("tensormap.replace", [register, self.reg(operands[-1])], modifiers, immediate=offset)

    def _fence(self, parts: list[str], operands: list[str]) -> None:
        if parts[:3] == ["fence", "proxy", "async"]:
            self._emit("fence.proxy.async")
        elif parts[:2] == ["fence", "proxy"] and "tensormap" in parts[2] and "acquire" in parts:
            self._emit("tensormap.acquire", [self.address(operands[0])[0]])
        else:
            self._emit("nop")

    def _move(self, parts: list[str], operands: list[str]) -> None:
        to, source = operands
        kind = parts[-1]
        if kind == "pred":
            return self._emit("mov.pred", [self.reg(to), self.reg(source)])
        if to.startswith("{"):
            values = self.regs(to)
            return self._emit(
                "unpack", [self.reg(source)], [len(values), 8 * BYTES[kind] // len(values)], values=values
            )
        if source.startswith("{"):
            values = self.regs(source)
            return self._emit("pack", [self.reg(to)], [len(values), 8 * BYTES[kind] // len(values)], values=values)
        return self._emit("mov", [self.reg(to), self.reg(source)], [8 * BYTES[kind]])

    def _convert(self, parts: list[str], operands: list[str]) -> None:
        to, source = parts[-2:]
        registers = [self.reg(o) for o in operands]
        pair = to.endswith("x2")
        rounding = next((ROUNDINGS[p] for p in parts if p in ROUNDINGS), 0)
        flags = rounding, "sat" in parts, "ftz" in parts, "relu" in parts
        if unknown := {*parts[1:-2]} - ({"rna"} if to == "tf32" else {*ROUNDINGS, "sat", "ftz", "relu"}):
            raise UnsupportedError(f"modifiers {sorted(unknown)}")
        if to == "tf32":
            self._emit("cvt.tf32", registers)
        elif (to, source) == ("f32", "bf16"):
            self._emit("cvt.f32.bf16", registers)
        else:
            self._emit("cvt.pair" if pair else "cvt", registers, [TYPES[to.removesuffix("x2")], TYPES[source], *flags])

    def _compare(self, parts: list[str], operands: list[str]) -> None:
        results = [self.reg(r) if r != "_" else -1 for r in operands[0].split("|")]
        combine = next((k for k, p in enumerate(("and", "or", "xor")) if p in parts[2:-1]), 0)
        with_, negated = -1, False
        if len(operands) > 3:
            with_, negated = self.reg(operands[3].lstrip("!")), operands[3].startswith("!")
        registers = [results[0], *map(self.reg, operands[1:3]), results[1] if len(results) > 1 else -1, with_]
        self._emit(f"setp.{parts[-1]}", registers, [COMPARISONS[parts[1]], combine, negated, "ftz" in parts])

    def _select(self, parts: list[str], operands: list[str]) -> None:
        self._emit("selp", [self.reg(o) for o in operands], [8 * BYTES[parts[-1]]])

    def _shuffle(self, parts: list[str], operands: list[str]) -> None:
        results = [self.reg(r) for r in operands[0].split("|")]
        registers = [results[0], *map(self.reg, operands[1:5]), *results[1:]]
        self._emit("shfl", registers, [("up", "down", "bfly", "idx").index(parts[2])], control=Control.CONVERGE)

    def _elect(self, parts: list[str], operands: list[str]) -> None:
        registers = [*map(self.reg, operands[0].split("|")), -1, -1, self.reg(operands[1])]
        self._emit("elect", registers, control=Control.CONVERGE)

    def _reduce(self, parts: list[str], operands: list[str]) -> None:
        operation = ("add", "min", "max", "and", "or", "xor").index(parts[2])
        registers = [self.reg(operands[0]), self.reg(operands[1]), -1, -1, self.reg(operands[2])]
        self._emit("redux", registers, [operation, parts[-1] == "s32"], control=Control.CONVERGE)

    def _barrier(self, parts: list[str], operands: list[str]) -> None:
        registers = [self.reg(o) for o in operands]
        if "warp" in parts:
            self._emit("nop", [-1, -1, -1, -1, registers[0]], control=Control.CONVERGE)
        else:
            self._emit("nop", registers, ["arrive" in parts], control=Control.BARRIER)

    def _matrix_access(self, parts: list[str], operands: list[str]) -> None:
        write = parts[0] == "stmatrix"
        (register, offset), values = self.address(operands[not write]), self.regs(operands[write])
        self._emit(
            parts[0],
            [register],
            [len(values), "trans" in parts],
            immediate=offset,
            values=values,
            control=Control.CONVERGE,
        )

    def _mma(self, parts: list[str], operands: list[str]) -> None:
        shape, types = parts[3], parts[-4:]
        if types[0] != "f32" or types[-1] != "f32" or not shape.startswith("m16n8k"):
            raise UnsupportedError(shape)
        values = [r for o in operands for r in self.regs(o)]
        self._emit(
            "mma",
            modifiers=[("bf16", "f16", "tf32").index(types[1]), int(shape[6:])],
            values=values,
            control=Control.CONVERGE,
        )

    def _wgmma(self, parts: list[str], operands: list[str]) -> None:
        if parts[1] == "fence":
            return self._emit("nop")
        if parts[1] == "commit_group":
            return self._emit("wgmma.commit", control=Control.CONVERGE)
        if parts[1] == "wait_group":
            return self._emit("wgmma.wait", modifiers=[number(operands[0])], control=Control.CONVERGE)
        columns, in_registers = int(re.match(r"m64n(\d+)k", parts[4])[1]), operands[1].startswith("{")  # type: ignore[index]
        if parts[5] != "f32":
            raise UnsupportedError(parts[5])
        values = self.regs(operands[0]) + (self.regs(operands[1]) if in_registers else [])
        scales = [number(o) for o in operands[4:]] + [0, 0]
        transposed = [0, scales[2]] if in_registers else scales[2:4]
        modifiers = [columns, in_registers, ("bf16", "f16", "tf32").index(parts[-1]), *transposed, *scales[:2]]
        registers = [-1 if in_registers else self.reg(operands[1]), self.reg(operands[2]), self.reg(operands[3])]
        return self._emit("wgmma", registers, modifiers, values=values, control=Control.CONVERGE)

    def _mbarrier(self, parts: list[str], operands: list[str]) -> None:
        kind = parts[1]
        if kind in ("try_wait", "test_wait"):
            register, offset = self.address(operands[1])
            return self._emit(
                "nop", [self.reg(operands[0]), register, self.reg(operands[2])], immediate=offset, control=Control.WAIT
            )
        at = 1 if kind == "arrive" else 0  # behind the state, which nobody reads
        register, offset = self.address(operands[at])
        given = self.reg(operands[at + 1]) if len(operands) > at + 1 else -1
        if kind in ("init", "inval"):
            return self._emit(f"mbarrier.{kind}", [register, given], immediate=offset)
        return self._emit(
            "mbarrier.arrive", [register, given], [kind == "arrive", "expect_tx" in parts], immediate=offset
        )

    def _registers(self, parts: list[str], operands: list[str]) -> None:
        self._emit(
            "nop", modifiers=[1 if parts[1] == "inc" else 2], immediate=number(operands[0]), control=Control.WAIT
        )

    def _address_space(self, parts: list[str], operands: list[str]) -> None:
        self._emit("cvta", [self.reg(o) for o in operands], [self._space(parts), "to" in parts])

    def _plain(self, parts: list[str], operands: list[str]) -> None:
        if parts[0] == "createpolicy":  # a cache hint, that nobody reads
            return self._emit("mov", [self.reg(operands[0]), self.reg("0")], [64])
        return self._emit("nop", control=Control.TRAP if parts[0] == "trap" else Control.EXIT)

    _ENCODERS: ClassVar[dict[str, Callable[[Encoder, list[str], list[str]], None]]] = {
        "bra": _branch, "ld": _access, "ldu": _access, "st": _access, "atom": _atomic, "red": _atomic, "cp": _copy,
        "tensormap": _tensormap, "mov": _move, "cvt": _convert, "setp": _compare, "selp": _select, "shfl": _shuffle,
        "elect": _elect, "redux": _reduce, "bar": _barrier, "barrier": _barrier, "mma": _mma,
        "ldmatrix": _matrix_access, "stmatrix": _matrix_access, "wgmma": _wgmma, "mbarrier": _mbarrier,
        "setmaxnreg": _registers, "cvta": _address_space,
        "ret": _plain, "exit": _plain, "trap": _plain, "createpolicy": _plain,
    }  # fmt: skip
