"""The text of a PTX kernel: parameters, declarations, statements, and operands as numbered registers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
BYTES = {f"{kind}{bits}": size for kind in "usbf" for bits, size in SIZES.items()} | {"bf16": 2, "pred": 1}
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
SPECIAL += ["%laneid", "%warpid", "%cluster_ctarank", "%lanemask_lt", "%lanemask_eq"]


class UnsupportedError(Exception):
    """PTX that the emulator does not know."""


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int


def opcode_of(statement: str) -> str:
    """Without its guard: "add.s32"."""
    words = statement.split()
    return words[1 if words[0].startswith("@") else 0].rstrip(";")


def number(text: str) -> int:
    """An integer literal of PTX: decimal, 0x, 0 for octal, U at the end."""
    digits = text.lstrip("-").rstrip("U")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8) if octal else int(digits, 0)
    return -value if text.startswith("-") else value


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def closing(text: str, at: int, pair: str) -> int:
    """Where the bracket that is open before `at` closes."""
    depth = 1
    while depth:
        depth += (text[at] == pair[0]) - (text[at] == pair[1])
        at += 1
    return at - 1


@dataclass
class Statement:
    text: str
    line: int
    scope: tuple[str, ...]  # the braces around it, the innermost first


class Body:
    """A kernel's parameters, statements and declarations; operands become registers, constants among them."""

    def __init__(self, parameters: str, body: str, first_line: int, outside: dict[str, int], shared: Any) -> None:
        """outside: addresses of the module's variables; shared: its arrays there, (alignment, name, bytes)."""
        self.declared: set[str] = set()  # registers
        self.registers: dict[str, int] = {}
        self.constants: dict[int, int] = {}
        self.specials: dict[int, int] = {}
        self.count = 0  # of registers, constants and specials
        self.labels: dict[str, int] = {}
        self.symbols = dict(outside)  # addresses: of parameters, shared and local memory too
        self.static_shared = self.local_bytes = 0
        self.parameters = self._parameters(parameters)
        for align, symbol, size in shared:
            self._allocate_shared(int(align), symbol, int(size or 0))
        self.statements = self._statements(body, first_line)
        self.statement = Statement("ret", 0, ("",))  # the one whose operands are read

    def _parameters(self, declared: str) -> list[Parameter]:
        found, offset = [], 0
        for text in split(declared):
            array = re.match(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text)
            if array:
                align, name, size = int(array[1]), array[2], int(array[3])
            else:
                words = text.split()
                name, align = words[-1], BYTES[words[1].lstrip(".")]
                size = align
            offset = -(-offset // align) * align
            self.symbols[name] = offset
            found.append(Parameter(name, offset, size))
            offset += size
        return found

    def _allocate_shared(self, align: int, symbol: str, size: int) -> None:
        self.static_shared = -(-self.static_shared // align) * align
        self.symbols[symbol] = self.static_shared
        self.static_shared += size

    def _statements(self, body: str, first_line: int) -> list[Statement]:
        """The body's statements; declarations and labels are taken in on the way."""
        found: list[Statement] = []
        scope, scopes, line, at = ("",), 0, first_line, 0
        token = re.compile(r"\s+|;|[{}]|([\w$.%]+)\s*:(?!:)|\.(?:loc|file|pragma)\b[^\n;]*|[^;]+(?=;)")
        while at < len(body):
            match = token.match(body, at)
            assert match is not None
            text, label, at = match[0], match[1], match.end()
            if text == "{":
                scopes += 1
                scope = (f"@{scopes}", *scope)
            elif text == "}":
                scope = scope[1:]
            elif label:
                self.labels[label + scope[0]] = len(found)
            elif not text.strip(" \n\t;") or text.split()[0] in (".loc", ".file", ".pragma"):
                pass
            elif text.startswith("."):
                self._declare(re.sub(r"\s+", " ", text), scope[0])
            else:
                found.append(Statement(re.sub(r"\s+", " ", text).strip(), line, scope))
            line += text.count("\n")
        return found

    def _declare(self, text: str, scope: str) -> None:
        if registers := re.match(r"\.reg \.\w+ (.*)", text):
            for item in split(registers[1]):
                many = re.match(r"([%\w$]+)<(\d+)>", item)
                self.declared.update(f"{many[1]}{k}" for k in range(int(many[2]))) if many else self.declared.add(
                    item + scope
                )
        elif memory := re.match(r"\.(shared|local) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?", text):
            where, align, kind, symbol, count = memory.groups()
            size = BYTES[kind] * int(count or 1)
            if where == "shared":
                self._allocate_shared(int(align or 4), symbol, size)
            else:
                self.symbols[symbol] = -(-self.local_bytes // 16) * 16
                self.local_bytes = self.symbols[symbol] + -(-size // 16) * 16

    # Operands become registers, constants among them.

    def _new(self, table: dict[Any, int], key: Any) -> int:
        if key not in table:
            table[key] = self.count
            self.count += 1
        return table[key]

    def reg(self, text: str) -> int:
        for scope in self.statement.scope:
            if text + scope in self.declared:
                return self._new(self.registers, text + scope)
        if text == "_":
            return self._new(self.registers, "_")
        if text in SPECIAL:
            return self._new(self.specials, SPECIAL.index(text))
        if re.match(r"0[fFdD][0-9a-fA-F]{8,}$", text):
            return self._new(self.constants, int(text[2:], 16))
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return self._new(self.constants, number(text) % 2**64)
        if text in self.symbols:
            return self._new(self.constants, self.symbols[text])
        if text.startswith("%clock") or text == "%globaltimer":
            return self._new(self.constants, 0)
        raise UnsupportedError(f"operand {text}")

    def regs(self, text: str) -> list[int]:
        """Of a vector, or of one register; -1 for what is dropped."""
        items = split(text[1:-1]) if text.startswith("{") else [text]
        return [-1 if item == "_" else self.reg(item) for item in items]

    def address(self, text: str) -> tuple[int, int]:
        """Register and offset of "[%rd1 + 16]"."""
        match = re.match(r"\[\s*([%\w$.]+?)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if not match:
            raise UnsupportedError(f"address {text}")
        return self.reg(match[1]), number(match[2] or "0")
