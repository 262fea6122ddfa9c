"""Executes PTX, as nvcc emits it for the kernels, with numpy: a second opinion on the device's half
of ptx.cuh, which the SIMT executor never sees.

All threads of a block are the elements of arrays; a step runs one basic block for the threads whose
program counter is the lowest. Global memory is a set of buffers at the executor's addresses. Every
access is checked for bounds and alignment; races are the executor's business. cp.async copies at
once. An instruction that is not known here is an error.

Semantics: PTX ISA. Floating point as IEEE 754 says, approximations correctly rounded with
subnormals flushed, sums of mma in double precision and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Action = Callable[["Block", Array], None]  # executes one instruction for a mask of threads
Reader = Callable[["Block"], Array]  # an operand's value in all threads

TYPES: dict[str, np.dtype] = {
    **{f"{letter}8": np.dtype(np.uint8) for letter in "bu"},
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}
SHARED_WINDOW = 1 << 48  # where generic addresses of shared memory begin
PARAMETER_ROOM = 4096  # bytes from one kernel parameter to the next
RUNNING, AT_BARRIER, FOR_WARP = range(3)  # what a thread waits for
LANES = 32


class PtxError(Exception):
    """PTX that cannot be executed, or that does something forbidden."""


@dataclass
class Instruction:
    predicate: str | None
    negated: bool
    opcode: str
    operands: list[str]

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)};"


@dataclass
class Entry:
    """One kernel."""

    name: str
    parameters: list[str]
    instructions: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, np.dtype]  # names, or prefixes for numbered ones
    steps: list[Action | None] = field(default_factory=list)
    starts: set[int] = field(default_factory=set)  # where basic blocks begin


def parse(text: str) -> dict[str, Entry]:
    """All entries of a PTX file, by mangled name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    entries = {}
    for match in re.finditer(r"\.entry\s+(\S+?)\s*\((.*?)\)", text, re.DOTALL):
        begin = text.index("{", match.end())
        depth, end = 1, begin + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        parameters = re.findall(r"(\w+)(?:\[\d+\])?\s*(?:,|$)", match[2])
        entries[match[1]] = _parse_body(match[1], parameters, text[begin + 1 : end - 1])
    return entries


def _parse_body(name: str, parameters: list[str], body: str) -> Entry:
    entry = Entry(name, parameters, [], {}, {})
    position = 0
    while True:
        # Braces at the beginning of a statement are scopes.
        position += len(body[position:]) - len(body[position:].lstrip(" \t\r\n{}"))
        if position >= len(body):
            return entry
        if label := re.compile(r"([$\w]+):").match(body, position):
            entry.labels[label[1]] = len(entry.instructions)
            position = label.end()
            continue
        if directive := re.compile(r"\.(loc|file|pragma)\b[^\n]*").match(body, position):
            position = directive.end()
            continue
        end = body.index(";", position)
        statement = " ".join(body[position:end].split())
        position = end + 1
        if statement.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", statement).groups()
            for register in names.split(","):
                prefix = register.strip().split("<")[0]
                entry.registers[prefix] = _storage(TYPES[kind])
        elif statement.startswith("."):
            raise PtxError(f"unknown directive: {statement}")
        else:
            entry.instructions.append(_parse_instruction(statement))


def _parse_instruction(statement: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%\w]+) )?(\S+)\s*(.*)", statement)
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4])
    return Instruction(match[2], match[1] == "!", match[3], operands)


def _storage(kind: np.dtype) -> np.dtype:
    """Registers hold bits."""
    return kind if kind.kind == "b" else np.dtype(f"u{kind.itemsize}")


def split_vector(operand: str) -> list[str]:
    return [item.strip() for item in operand.strip("{}").split(",")]


# ---- arithmetic on arrays


def widen_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def widen_f16(bits: Array) -> Array:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def round_bf16(values: Array) -> Array:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint32)


def round_f16(values: Array) -> Array:
    bits = values.astype(np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), 0x7FFF, bits).astype(np.uint32)


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded to odd: a second rounding to fewer bits is then right."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    rest = total - product  # the part of the sum that came from c, then what was lost
    lost = (product - (total - rest)) + (c - rest)
    even = total.view(np.uint64) & np.uint64(1) == 0
    adjust = even & (lost != 0) & np.isfinite(total) & np.isfinite(lost)
    return np.where(adjust, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)


def flush(values: Array) -> Array:
    values = values.astype(np.float32)
    return np.where(
        np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values
    )


def truncating_divide(x: Array, y: Array) -> Array:
    quotient = x // np.where(y == 0, 1, y).astype(y.dtype)
    if x.dtype.kind == "u":
        return quotient
    inexact = quotient * y != x
    return quotient + (inexact & ((x < 0) != (y < 0)))


def multiply_high(x: Array, y: Array) -> Array:
    bits = x.dtype.itemsize * 8
    if bits == 64:
        product = x.astype(object) * y.astype(object)
        return np.array([int(p) >> 64 for p in product], dtype=object).astype(x.dtype)
    wide = np.int64 if x.dtype.kind == "i" else np.uint64
    return (x.astype(wide) * y.astype(wide) >> np.array(bits, wide)).astype(x.dtype)


def compare(name: str, x: Array, y: Array) -> Array:
    if len(name) == 3 and name.endswith("u") and x.dtype.kind == "f":
        return compare(name[:2], x, y) | np.isnan(x) | np.isnan(y)
    operations = {
        **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "lo": np.less},
        **{"gt": np.greater, "ge": np.greater_equal, "ls": np.less_equal},
        **{"hi": np.greater, "hs": np.greater_equal},
    }
    if name == "ne":
        unordered = (np.isnan(x) | np.isnan(y)) if x.dtype.kind == "f" else False
        return (x != y) & ~np.asarray(unordered)
    if name not in operations:
        raise PtxError(f"unknown comparison: {name}")
    return operations[name](x, y)


def shift(x: Array, by: Array, left: bool) -> Array:
    bits = x.dtype.itemsize * 8
    clamped = np.minimum(by, bits - 1).astype(x.dtype)
    result = x << clamped if left else x >> clamped
    fill = 0 if left or x.dtype.kind == "u" else np.where(x < 0, -1, 0)
    return np.where(by >= bits, fill, result).astype(x.dtype)


def lookup3(x: Array, y: Array, z: Array, table: int) -> Array:
    result = np.zeros_like(x)
    for row in range(8):
        if table >> row & 1:
            result |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
    return result


def permute_bytes(x: Array, y: Array, selector: Array) -> Array:
    source = np.stack([x, y], 1).view(np.uint8)
    result = np.zeros((len(x), 4), np.uint8)
    for byte in range(4):
        which = selector >> np.uint32(4 * byte)
        picked = source[np.arange(len(x)), which & 7]
        sign = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
        result[:, byte] = np.where(which & 8, sign, picked)
    return result.view(np.uint32)[:, 0]


def dot4(x: Array, y: Array, z: Array, kinds: Sequence[str]) -> Array:
    wide = [
        v[:, None].view(np.int8 if kind == "s32" else np.uint8).astype(np.int64)
        for v, kind in zip((x, y), kinds, strict=True)
    ]
    return ((wide[0] * wide[1]).sum(1) + z.view(np.int32)).astype(np.uint64).astype(np.uint32)


def count_bits(x: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(x)[:, None].view(np.uint8), axis=1).sum(
        1, dtype=np.uint32
    )


def highest_bit(x: Array) -> Array:
    """Position of the highest set bit, -1 for zero."""
    return np.array([int(v).bit_length() - 1 for v in x], np.int64)


def float_to_int(x: Array, kind: np.dtype) -> Array:
    limits = np.iinfo(kind)
    wide = np.where(np.isnan(x), 0, x.astype(np.float64))
    low = wide <= float(limits.min)
    high = wide >= float(limits.max)
    inside = np.where(low | high, 0, wide).astype(kind)
    return np.where(low, limits.min, np.where(high, limits.max, inside)).astype(kind)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
APPROXIMATIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}
INTEGER_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "div": truncating_divide,
    "rem": lambda x, y: x - truncating_divide(x, y) * y,
}
FLOAT_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
}
REDUCTIONS: dict[str, Callable[[Array], object]] = {
    "add": lambda v: v.sum(dtype=v.dtype),
    "min": np.min,
    "max": np.max,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}
ATOMICS: dict[str, Callable[[object, object], object]] = {
    "add": lambda old, v: old + v,
    "min": min,
    "max": max,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "exch": lambda _, v: v,
    "inc": lambda old, v: 0 if old >= v else old + 1,
}


# ---- fragments: (row, column) of element i of a lane, PTX ISA "Matrix Fragments for mma..."


def fragment(operand: str, depth: int) -> tuple[Array, Array]:
    """Rows and columns [32, elements] of A, B (rows first) or the accumulator."""
    lane = np.arange(LANES)[:, None]
    group, inside = lane // 4, lane % 4
    per_register = {16: 2, 32: 4}[depth]
    if operand == "C":
        i = np.arange(4)[None]
        return group + 8 * (i // 2), inside * 2 + i % 2
    i = np.arange(per_register * (4 if operand == "A" else 2))[None]
    word = i // per_register
    if operand == "A":
        return (
            group + 8 * (word % 2),
            inside * per_register + i % per_register + depth // 2 * (word // 2),
        )
    return inside * per_register + i % per_register + depth // 2 * word, group + 0 * i


# ---- memory


class Memory:
    """Global memory: buffers by address."""

    def __init__(self, buffers: Mapping[int, bytes]) -> None:
        self.bases = np.array(sorted(buffers), np.int64)
        self.sizes = np.array([len(buffers[base]) for base in sorted(buffers)], np.int64)
        self.data = [
            np.frombuffer(buffers[base].ljust(-(-len(buffers[base]) // 16) * 16), np.uint8).copy()
            for base in sorted(buffers)
        ]

    def contents(self) -> dict[int, bytes]:
        rows = zip(self.bases, self.sizes, self.data, strict=True)
        return {int(base): data[:size].tobytes() for base, size, data in rows}

    def locate(self, addresses: Array, width: int) -> list[tuple[Array, Array, Array]]:
        """(data, which of the addresses, offsets in data) for every buffer that is touched."""
        which = np.searchsorted(self.bases, addresses, side="right") - 1
        offsets = addresses - self.bases[np.maximum(which, 0)]
        bad = (which < 0) | (offsets + width > self.sizes[np.maximum(which, 0)])
        if bad.any():
            raise PtxError(f"{width} bytes at {int(addresses[bad][0]):#x}: in no buffer")
        return [
            (self.data[buffer], np.nonzero(which == buffer)[0], offsets[which == buffer])
            for buffer in np.unique(which)
        ]


class Block:
    """State of the running block."""

    def __init__(
        self,
        entry: Entry,
        memory: Memory,
        block: tuple[int, int, int],
        special: dict[str, int],
        shared_bytes: int,
        arguments: Sequence[bytes],
    ) -> None:
        threads = block[0] * block[1] * block[2]
        self.entry, self.memory, self.threads = entry, memory, threads
        laid_out = b"".join(argument.ljust(PARAMETER_ROOM, b"\xff") for argument in arguments)
        self.parameters = np.frombuffer(laid_out, np.uint8)
        thread = np.arange(threads, dtype=np.uint32)
        self.special = {
            "%tid.x": thread % block[0],
            "%tid.y": thread // block[0] % block[1],
            "%tid.z": thread // (block[0] * block[1]),
            "%laneid": thread % LANES,
            **{name: np.full(threads, value, np.uint32) for name, value in special.items()},
        }
        self.shared = np.full(-(-shared_bytes // 16) * 16, 0xFF, np.uint8)
        self.shared_bytes = shared_bytes
        self.registers: dict[str, Array] = {}
        self.pc = np.zeros(threads, np.int64)
        self.waiting = np.full(threads, RUNNING)
        self.arrived: dict[int, int] = {}  # at each barrier
        self.waiters: dict[int, list[int]] = {}  # those of them that wait

    def read(self, register: str) -> Array:
        value = self.registers.get(register)
        if value is None:
            kind = self.entry.registers.get(register)
            if kind is None:
                kind = self.entry.registers[register.rstrip("0123456789")]
            value = self.registers[register] = np.zeros(self.threads, kind)
        return value

    def write(self, register: str, value: Array, active: Array) -> None:
        """Stores bits; narrower values are extended as their type says."""
        if register == "_":
            return
        old = self.read(register)
        if value.dtype != old.dtype:
            if value.dtype.itemsize < old.dtype.itemsize:
                value = value.astype(old.dtype)
            elif value.dtype.itemsize > old.dtype.itemsize:
                raise PtxError(f"{register} has {old.dtype}, too narrow for {value.dtype}")
            else:
                value = value.view(old.dtype)
        self.registers[register] = value if active.all() else np.where(active, value, old)

    def _places(self, addresses: Array, width: int, space: str) -> list[tuple[Array, Array, Array]]:
        if (addresses % width).any():
            raise PtxError(f"{int(addresses[addresses % width != 0][0]):#x}: misaligned by {width}")
        in_window = addresses >= SHARED_WINDOW
        if space == "generic" and in_window.any():
            if not in_window.all():
                raise PtxError("generic addresses of shared and of global memory in one access")
            addresses, space = addresses - SHARED_WINDOW, "shared"
        if space not in ("shared", "param"):
            return self.memory.locate(addresses, width)
        data, limit = self.shared, self.shared_bytes
        if space == "param":
            data, limit = self.parameters, len(self.parameters)
        bad = (addresses < 0) | (addresses + width > limit)
        if bad.any():
            raise PtxError(f"{space} offset {int(addresses[bad][0])} of {limit}")
        return [(data, np.arange(len(addresses)), addresses)]

    def load(self, addresses: Array, width: int, space: str) -> Array:
        """Bytes [accesses, width]."""
        result = np.zeros((len(addresses), width), np.uint8)
        for data, which, offsets in self._places(addresses, width, space):
            result[which] = data.reshape(-1, width)[offsets // width]
        return result

    def store(self, addresses: Array, values: Array, space: str) -> None:
        width = values.shape[1]
        for data, which, offsets in self._places(addresses, width, space):
            data.reshape(-1, width)[offsets // width] = values[which]


# ---- from instructions to actions


class Compiler:
    """Turns the instructions of an entry into actions."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def compile(self) -> None:
        instructions = self.entry.instructions
        starts = {0, *self.entry.labels.values()}
        for i, instruction in enumerate(instructions):
            root = instruction.opcode.split(".")[0]
            if root in ("bra", "ret", "exit", "bar"):
                starts.add(i + 1)
            if self.meets(instruction):
                starts.update((i, i + 1))
            if root in ("bra", "ret", "exit") or self.meets(instruction):
                self.entry.steps.append(None)
            else:
                self.entry.steps.append(self.action(instruction))
        self.entry.starts = {start for start in starts if start < len(instructions)}

    @staticmethod
    def meets(instruction: Instruction) -> bool:
        """Whether threads wait for each other here."""
        opcode = instruction.opcode
        return opcode.startswith(
            ("bar.", "shfl.", "vote.", "redux.", "mma.", "ldmatrix.", "barrier.")
        )

    # operands

    def reader(self, operand: str, kind: np.dtype) -> Reader:
        size = kind.itemsize
        if re.match(r"-?\d", operand):
            if operand.startswith(("0f", "0F", "0d", "0D")):  # the bits of a float or double
                return self._constant(int(operand[2:], 16), kind)
            return self._constant(int(operand.rstrip("U"), 0), kind)
        if operand.startswith("%") and operand in SPECIAL_REGISTERS:
            return lambda block: block.special[operand].astype(kind)
        if {operand, operand.rstrip("0123456789")} & self.entry.registers.keys():

            def read(block: Block) -> Array:
                bits = block.read(operand)
                if bits.dtype == kind:
                    return bits
                if bits.dtype.itemsize == size:
                    return bits.view(kind)
                if bits.dtype.itemsize > size:  # st.u8 of a 16-bit register, cvt of its lower part
                    return bits.astype(f"u{size}").view(kind)
                raise PtxError(f"{operand} has {bits.dtype}, expected {kind}")

            return read
        if "shared_memory" in operand:
            return self._constant(0, kind)
        if operand in self.entry.parameters:
            return self._constant(self.entry.parameters.index(operand) * PARAMETER_ROOM, kind)
        raise PtxError(f"unknown operand: {operand}")

    @staticmethod
    def _constant(value: int, kind: np.dtype) -> Reader:
        if kind.kind == "b":
            return lambda block: np.full(block.threads, value != 0)
        bits = np.array(value & (1 << 8 * kind.itemsize) - 1, f"u{kind.itemsize}").view(kind)
        return lambda block: np.full(block.threads, bits, kind)

    def address(self, operand: str) -> Reader:
        match = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand)
        if match is None:
            raise PtxError(f"unknown address: {operand}")
        base, offset = match[1], int(match[2] or 0)
        if base.startswith("%"):
            return lambda block: block.read(base).astype(np.int64) + offset
        start = self.reader(base, np.dtype(np.int64))
        return lambda block: start(block) + offset

    # one instruction

    def action(self, instruction: Instruction) -> Action:
        try:
            operation = self.operation(instruction)
        except (KeyError, IndexError) as error:
            raise PtxError(f"unknown instruction: {instruction}") from error
        if instruction.predicate is None:
            return operation
        predicate, negated = instruction.predicate, instruction.negated

        def guarded(block: Block, active: Array) -> None:
            taken = block.read(predicate)
            operation(block, active & (~taken if negated else taken))

        return guarded

    def operation(self, instruction: Instruction) -> Action:
        opcode, operands = instruction.opcode, instruction.operands
        parts = opcode.split(".")
        root, last = parts[0], parts[-1]
        if opcode.startswith(("cp.async.commit_group", "cp.async.wait", "membar", "fence")):
            return lambda block, active: None
        if opcode.startswith("cp.async."):
            return self.copy_async(operands)
        if root in ("ld", "st"):
            return self.memory_access(parts, operands)
        if root in ("atom", "red"):
            return self.atomic(parts, operands)
        if root == "mov" and "{" in "".join(operands):
            return self.move_vector(last, operands)
        if root == "cvta":
            return self.convert_address(parts, operands)
        return self.elementwise(parts, operands, instruction)

    def elementwise(
        self, parts: list[str], operands: list[str], instruction: Instruction
    ) -> Action:
        value, target = self.value(parts, operands, instruction), operands[0]

        def execute(block: Block, active: Array) -> None:
            block.write(target, value(block), active)

        return execute

    def value(self, parts: list[str], operands: list[str], instruction: Instruction) -> Reader:
        """What an instruction without side effects computes."""
        root, last = parts[0], parts[-1]
        unknown = PtxError(f"unknown instruction: {instruction}")
        middle = set(parts[1:-1])

        def inputs(*kinds: str) -> list[Reader]:
            return [self.reader(o, TYPES[k]) for o, k in zip(operands[1:], kinds, strict=True)]

        if root == "cvt":
            return self.conversion(parts, operands, unknown)
        if last in ("bf16x2", "f16x2") and root == "fma" and parts[1:-1] == ["rn"]:
            a, b, c = inputs("b32", "b32", "b32")
            widen, narrow = (widen_bf16, round_bf16) if last == "bf16x2" else (widen_f16, round_f16)

            def fma_pairs(block: Block) -> Array:
                words = [operand(block) for operand in (a, b, c)]
                low, high = (
                    narrow(fma_to_odd_f32(*(widen(w >> np.uint32(s) & 0xFFFF) for w in words)))
                    for s in (0, 16)
                )
                return low | high << np.uint32(16)

            return fma_pairs
        if root == "dp4a":
            a, b, c = inputs("b32", "b32", "b32")
            return lambda block: dot4(a(block), b(block), c(block), parts[1:])
        kind = TYPES.get(last)
        if kind is None:
            raise unknown
        is_float = kind.kind == "f"
        if root == "mov" and len(parts) == 2:
            (a,) = inputs(last)
            return a
        if root == "setp" and len(parts) == 3:
            a, b = inputs(last, last)
            return lambda block: compare(parts[1], a(block), b(block))
        if root == "selp" and len(parts) == 2:
            a, b, p = inputs(last, last, "pred")
            return lambda block: np.where(p(block), a(block), b(block))
        if root == "lop3":
            a, b, c = inputs("b32", "b32", "b32", "b32")[:3]
            table = int(operands[4], 0)
            return lambda block: lookup3(a(block), b(block), c(block), table)
        if root == "prmt" and len(parts) == 2:
            a, b, c = inputs("b32", "b32", "b32")
            return lambda block: permute_bytes(a(block), b(block), c(block))
        if root in ("shl", "shr") and len(parts) == 2:
            a, b = inputs(last, "u32")
            return lambda block: shift(a(block), b(block), root == "shl")
        if root == "bfi":
            a, b, p, n = inputs(last, last, "u32", "u32")

            def insert(block: Block) -> Array:
                start, length = p(block), n(block)
                ones = shift(np.full(block.threads, ~np.array(0, kind)), length, left=True)
                mask = shift(~ones, start, left=True)
                return (b(block) & ~mask) | (shift(a(block), start, left=True) & mask)

            return insert
        if root == "bfe" and kind.kind == "u":
            a, p, n = inputs(last, "u32", "u32")

            def extract(block: Block) -> Array:
                ones = shift(np.full(block.threads, ~np.array(0, kind)), n(block), left=True)
                return shift(a(block), p(block), left=False) & ~ones

            return extract
        if root == "popc":
            (a,) = inputs(last)
            return lambda block: count_bits(a(block))
        if root == "clz" and last == "b32":
            (a,) = inputs(last)
            return lambda block: (31 - highest_bit(a(block))).astype(np.uint32)
        if root == "bfind" and last == "u32":
            (a,) = inputs(last)
            shiftamt = "shiftamt" in middle

            def find(block: Block) -> Array:
                top = highest_bit(a(block))
                return np.where(top < 0, -1, 31 - top if shiftamt else top).astype(np.uint32)

            return find
        if root == "brev" and last == "b32":
            (a,) = inputs(last)
            return lambda block: np.array(
                [int(f"{int(v):032b}"[::-1], 2) for v in a(block)], np.uint32
            )
        if root in ("mul", "mad") and not is_float:
            return self.multiply(parts, inputs, kind, unknown)
        if root == "fma" and is_float and parts[1:-1] == ["rn"] and last == "f32":
            a, b, c = inputs(last, last, last)
            return lambda block: fma_to_odd(a(block), b(block), c(block)).astype(np.float32)
        if root == "not":
            (a,) = inputs(last)
            return lambda block: ~a(block)
        if root == "neg":
            (a,) = inputs(last)
            return lambda block: -a(block)
        if root == "abs":
            (a,) = inputs(last)
            return lambda block: np.abs(a(block))
        if root in APPROXIMATIONS and last == "f32" and middle <= {"approx", "ftz", "rn"}:
            (a,) = inputs(last)
            function = APPROXIMATIONS[root]
            if "ftz" in middle:
                return lambda block: flush(function(flush(a(block)).astype(np.float64)))
            return lambda block: function(a(block).astype(np.float64)).astype(np.float32)
        if is_float and root in FLOAT_BINARY and middle <= {"rn", "full"}:
            a, b = inputs(last, last)
            float_function = FLOAT_BINARY[root]
            return lambda block: float_function(a(block), b(block))
        if not is_float and root in INTEGER_BINARY and not middle:
            a, b = inputs(last, last)
            function = INTEGER_BINARY[root]
            if kind.kind == "b" and root not in ("and", "or", "xor"):
                raise unknown
            return lambda block: function(a(block), b(block))
        raise unknown

    @staticmethod
    def multiply(
        parts: list[str],
        inputs: Callable[..., list[Reader]],
        kind: np.dtype,
        unknown: PtxError,
    ) -> Reader:
        form, last, adds = parts[1], parts[-1], parts[0] == "mad"
        if len(parts) != 3 or form not in ("lo", "hi", "wide"):
            raise unknown
        wide = np.dtype(f"{kind.kind}{kind.itemsize * 2}") if form == "wide" else kind
        third = f"{'s' if kind.kind == 'i' else 'u'}{wide.itemsize * 8}"
        a, b, *c = inputs(last, last, *([third] if adds else []))

        def execute(block: Block) -> Array:
            x, y = a(block), b(block)
            product = multiply_high(x, y) if form == "hi" else x.astype(wide) * y.astype(wide)
            return product + c[0](block) if adds else product

        return execute

    def conversion(self, parts: list[str], operands: list[str], unknown: PtxError) -> Reader:
        modifiers, to, source = parts[1:-2], parts[-2], parts[-1]
        if to in ("bf16x2", "f16x2") and source == "f32" and modifiers == ["rn"]:
            high, low = (self.reader(operand, TYPES["f32"]) for operand in operands[1:])
            narrow = round_bf16 if to == "bf16x2" else round_f16
            return lambda block: narrow(low(block)) | narrow(high(block)) << np.uint32(16)
        if to in ("bf16", "f16") and source == "f32" and modifiers == ["rn"]:
            a = self.reader(operands[1], TYPES["f32"])
            narrow = round_bf16 if to == "bf16" else round_f16
            return lambda block: narrow(a(block)).astype(np.uint16)
        if source == "f16" and to == "f32" and not modifiers:
            a = self.reader(operands[1], TYPES["b16"])
            return lambda block: widen_f16(a(block))
        if to not in TYPES or source not in TYPES:
            raise unknown
        target, origin = TYPES[to], TYPES[source]
        a = self.reader(operands[1], origin)
        if origin.kind == "f" and target.kind in "iu":
            if len(modifiers) != 1 or modifiers[0] not in ROUNDINGS:
                raise unknown
            rounding = ROUNDINGS[modifiers[0]]
            return lambda block: float_to_int(rounding(a(block)), target)
        if modifiers not in ([], ["rn"]):
            raise unknown
        return lambda block: a(block).astype(target)

    def convert_address(self, parts: list[str], operands: list[str]) -> Action:
        """Only shared memory has a window of its own among the generic addresses."""
        a = self.reader(operands[1], TYPES["u64"])
        to, space = "to" in parts, "shared" in parts
        delta = np.uint64(SHARED_WINDOW if space else 0)

        def execute(block: Block, active: Array) -> None:
            value = a(block)
            block.write(operands[0], value - delta if to else value + delta, active)

        return execute

    def move_vector(self, last: str, operands: list[str]) -> Action:
        target, source = operands
        kind = TYPES[last]
        if target.startswith("{"):  # unpack
            names, value = split_vector(target), self.reader(source, _storage(kind))
            element = np.dtype(f"u{kind.itemsize // len(names)}")

            def unpack(block: Block, active: Array) -> None:
                parts = np.ascontiguousarray(value(block))[:, None].view(element)
                for i, name in enumerate(names):
                    block.write(name, np.ascontiguousarray(parts[:, i]), active)

            return unpack
        names = split_vector(source)
        element = np.dtype(f"u{kind.itemsize // len(names)}")
        values = [self.reader(name, element) for name in names]

        def pack(block: Block, active: Array) -> None:
            parts = np.stack([value(block) for value in values], 1)
            block.write(target, np.ascontiguousarray(parts).view(_storage(kind))[:, 0], active)

        return pack

    # memory

    def memory_access(self, parts: list[str], operands: list[str]) -> Action:
        kind = TYPES[parts[-1]]
        vector = next((int(part[1]) for part in parts if re.fullmatch(r"v[248]", part)), 1)
        known = {"global", "shared", "param", "nc", "volatile", "relaxed", "gpu", "L1::no_allocate"}
        known |= {"v2", "v4", "const", "weak", "cs", "cg", "ca", "acquire", "release"}
        if not set(parts[1:-1]) <= known:
            raise PtxError(f"unknown instruction: {'.'.join(parts)}")
        space = next((p for p in parts if p in ("global", "shared", "param")), "generic")
        width = kind.itemsize * vector
        if parts[0] == "ld":
            names, address = split_vector(operands[0]), self.address(operands[1])

            def load(block: Block, active: Array) -> None:
                which = np.nonzero(active)[0]
                loaded = np.zeros((block.threads, vector), kind)
                if len(which):
                    loaded[which] = block.load(address(block)[which], width, space).view(kind)
                for i, name in enumerate(names):
                    block.write(name, np.ascontiguousarray(loaded[:, i]), active)

            return load
        address = self.address(operands[0])
        values = [self.reader(name, _storage(kind)) for name in split_vector(operands[1])]

        def store(block: Block, active: Array) -> None:
            which = np.nonzero(active)[0]
            data = np.stack([value(block) for value in values], 1)[which]
            block.store(address(block)[which], np.ascontiguousarray(data).view(np.uint8), space)

        return store

    def copy_async(self, operands: list[str]) -> Action:
        to, source = self.address(operands[0]), self.address(operands[1])
        width = int(operands[2])
        size = self.reader(operands[3], TYPES["u32"]) if len(operands) > 3 else None

        def copy(block: Block, active: Array) -> None:
            sizes = size(block) if size else np.full(block.threads, width, np.uint32)
            if not np.isin(sizes[active], (0, width)).all():
                raise PtxError(f"cp.async of a part of {width} bytes")
            data = np.zeros((block.threads, width), np.uint8)
            reads = np.nonzero(active & (sizes > 0))[0]
            if len(reads):
                data[reads] = block.load(source(block)[reads], width, "global")
            which = np.nonzero(active)[0]
            block.store(to(block)[which], data[which], "shared")

        return copy

    def atomic(self, parts: list[str], operands: list[str]) -> Action:
        kind = TYPES[parts[-1]]
        returns = parts[0] == "atom"
        name = next(part for part in parts[1:] if part in {*ATOMICS, "cas"})
        space = "shared" if "shared" in parts else "global" if "global" in parts else "generic"
        target = operands[0] if returns else "_"
        rest = operands[1:] if returns else operands
        address = self.address(rest[0])
        values = [self.reader(operand, kind) for operand in rest[1:]]

        def execute(block: Block, active: Array) -> None:
            old = np.zeros(block.threads, kind)
            arguments = [value(block) for value in values]
            places = address(block)
            for thread in np.nonzero(active)[0]:
                place = places[thread : thread + 1]
                before = block.load(place, kind.itemsize, space).view(kind)[0, 0]
                if name == "cas":
                    expected, desired = (argument[thread] for argument in arguments)
                    after = desired if before == expected else before
                else:
                    after = ATOMICS[name](before, arguments[0][thread])
                block.store(place, np.array([[after]], kind).view(np.uint8), space)
                old[thread] = before
            block.write(target, old, active)

        return execute


def fma_to_odd_f32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float32, rounded to odd."""
    exact = fma_to_odd(a, b, c)
    nearest = exact.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    toward = np.where(np.abs(back) > np.abs(exact), bits - np.uint32(1), bits + np.uint32(1))
    odd = (back == exact) | np.isnan(exact) | (bits & 1 == 1)
    return np.where(odd, bits, toward).astype(np.uint32).view(np.float32)


SPECIAL_REGISTERS = {
    f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
} | {"%laneid"}


# ---- operations of a warp


def execute_meeting(block: Block, instruction: Instruction, warps: Array) -> None:
    """Executes a warp-wide instruction for the given warps, all of whose lanes take part."""
    compiler = Compiler(block.entry)
    parts, operands = instruction.opcode.split("."), instruction.operands
    active = np.isin(np.arange(block.threads) // LANES, warps)
    if parts[0] == "mma":
        _mma(block, compiler, parts, operands, active)
    else:
        _ldmatrix(block, compiler, parts, operands, active)


def _mma(
    block: Block, compiler: Compiler, parts: list[str], operands: list[str], active: Array
) -> None:
    shapes = {
        "m16n8k16.row.col.f32.bf16.bf16.f32": (16, "bf16"),
        "m16n8k16.row.col.f32.f16.f16.f32": (16, "f16"),
        "m16n8k32.row.col.s32.s8.s8.s32": (32, "s8"),
    }
    name = ".".join(parts[3:])
    if parts[:3] != ["mma", "sync", "aligned"] or name not in shapes:
        raise PtxError(f"unknown instruction: {'.'.join(parts)}")
    depth, kind = shapes[name]

    def matrix(operand: str, which: str, shape: tuple[int, int]) -> Array:
        words = [
            compiler.reader(r, TYPES["b32"])(block)[active].reshape(-1, LANES)
            for r in split_vector(operand)
        ]
        registers = np.ascontiguousarray(np.stack(words, 2))
        if which == "C":
            elements = registers.view(np.int32 if kind == "s8" else np.float32)
        elif kind == "s8":
            elements = registers.view(np.int8)
        else:
            elements = (widen_bf16 if kind == "bf16" else widen_f16)(registers.view(np.uint16))
        wide = elements.astype(np.int64 if kind == "s8" else np.float64)
        result = np.zeros((len(wide), *shape), wide.dtype)
        rows, cols = fragment(which, depth)
        result[:, rows, cols] = wide
        return result

    a = matrix(operands[1], "A", (16, depth))
    b = matrix(operands[2], "B", (depth, 8))
    c = matrix(operands[3], "C", (16, 8))
    d = a @ b + c
    rows, cols = fragment("C", depth)
    elements = d[:, rows, cols]
    if kind == "s8":
        bits = elements.astype(np.uint64).astype(np.uint32)
    else:
        bits = elements.astype(np.float32).view(np.uint32)
    for i, register in enumerate(split_vector(operands[0])):
        value = np.zeros(block.threads, np.uint32)
        value[active] = bits[:, :, i].ravel()
        block.write(register, value, active)


def _ldmatrix(
    block: Block, compiler: Compiler, parts: list[str], operands: list[str], active: Array
) -> None:
    trans = "trans" in parts
    expected = [
        "ldmatrix",
        "sync",
        "aligned",
        "m8n8",
        parts[4],
        *["trans"] * trans,
        "shared",
        "b16",
    ]
    if parts != expected:
        raise PtxError(f"unknown instruction: {'.'.join(parts)}")
    registers = split_vector(operands[0])
    addresses = compiler.address(operands[1])(block)[active].reshape(-1, LANES)
    count = int(parts[4][1])
    rows = block.load(addresses[:, : 8 * count].ravel(), 16, "shared").view(np.uint16)
    matrices = rows.reshape(len(addresses), count, 8, 8)
    if trans:
        matrices = matrices.swapaxes(2, 3)
    words = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(addresses), count, LANES)
    for i, register in enumerate(registers):
        value = np.zeros(block.threads, np.uint32)
        value[active] = words[:, i].ravel()
        block.write(register, value, active)


def execute_exchange(block: Block, instruction: Instruction, lanes: Array) -> None:
    """shfl, vote and redux for the lanes (of one warp) that its mask names."""
    compiler = Compiler(block.entry)
    parts, operands = instruction.opcode.split("."), instruction.operands
    active = np.zeros(block.threads, bool)
    active[lanes] = True
    result = np.zeros(block.threads, np.uint32)
    unknown = PtxError(f"unknown instruction: {instruction}")
    if parts[0] == "shfl" and parts[-1] == "b32":
        value, by, clamp = (compiler.reader(o, TYPES["u32"])(block) for o in operands[1:4])
        for thread in lanes:
            lane, c = thread % LANES, int(clamp[thread])
            segment, bound = c >> 8 & 31, c & 31
            low, high = lane & segment, lane & segment | bound & ~segment
            offset = int(by[thread])
            modes = {
                "up": (lane - offset, lambda j, h=high: j >= h),
                "down": (lane + offset, lambda j, h=high: j <= h),
                "bfly": (lane ^ offset, lambda j, h=high: j <= h),
                "idx": (low | offset & ~segment & 31, lambda j, h=high: j <= h),
            }
            source, valid = modes[parts[2]]
            source = source if valid(source) else lane
            origin = thread - lane + source
            if origin not in lanes:
                raise PtxError(f"{instruction}: lane {lane} reads absent lane {source}")
            result[thread] = value[origin]
    elif parts[0] == "vote" and parts[2] in ("ballot", "any", "all"):
        name = operands[1]
        negated = name.startswith("!")
        predicate = block.read(name.lstrip("!"))[lanes] ^ negated
        if parts[2] == "ballot":
            result[lanes] = int(sum(1 << int(lane % LANES) for lane in lanes[predicate]))
        else:
            value = predicate.any() if parts[2] == "any" else predicate.all()
            block.write(operands[0], np.full(block.threads, value), active)
            return
    elif parts[0] == "redux":
        kind = TYPES[parts[-1]]
        values = compiler.reader(operands[1], kind)(block)[lanes]
        result[lanes] = np.asarray(REDUCTIONS[parts[2]](values), kind).view(np.uint32)
    else:
        raise unknown
    block.write(operands[0].split("|")[0], result, active)


# ---- running


def _meet(block: Block, position: int, arrived: Array) -> None:
    """Threads `arrived` (indices) stand at an instruction that others must reach, too."""
    instruction = block.entry.instructions[position]
    if instruction.predicate is not None:
        raise PtxError(f"predicated: {instruction}")
    root = instruction.opcode.split(".")[0]
    if instruction.opcode in ("bar.sync", "bar.arrive"):
        _arrive(block, instruction, position, arrived)
        return
    if root in ("mma", "ldmatrix"):
        member = np.full(block.threads, 0xFFFFFFFF, np.uint32)
    elif root in ("shfl", "vote", "redux") or instruction.opcode == "bar.warp.sync":
        compiler = Compiler(block.entry)
        member = compiler.reader(instruction.operands[-1], TYPES["u32"])(block)
    else:
        raise PtxError(f"unknown instruction: {instruction}")
    ready = (block.pc == position) & (block.waiting != AT_BARRIER)
    complete_warps = []
    for warp in np.unique(arrived // LANES):
        threads = np.arange(warp * LANES, min((warp + 1) * LANES, block.threads))
        here = threads[ready[threads]]
        while len(here):
            mask = int(member[here[0]])
            lanes = threads[(mask >> (threads % LANES) & 1) == 1]
            group = here[member[here] == mask]
            here = here[member[here] != mask]
            if not np.array_equal(group, lanes):
                block.waiting[group] = FOR_WARP
                continue
            if root in ("mma", "ldmatrix"):
                if len(lanes) != LANES:
                    raise PtxError(f"partial warp: {instruction}")
                complete_warps.append(warp)
            elif instruction.opcode != "bar.warp.sync":
                execute_exchange(block, instruction, lanes)
            block.waiting[lanes] = RUNNING
            block.pc[lanes] = position + 1
    if complete_warps:
        execute_meeting(block, instruction, np.array(complete_warps))


def _arrive(block: Block, instruction: Instruction, position: int, arrived: Array) -> None:
    compiler = Compiler(block.entry)
    ids = compiler.reader(instruction.operands[0], TYPES["u32"])(block)
    counts = np.full(block.threads, block.threads, np.uint32)
    if len(instruction.operands) > 1:
        counts = compiler.reader(instruction.operands[1], TYPES["u32"])(block)
    waits = instruction.opcode == "bar.sync"
    for thread in arrived:
        barrier = int(ids[thread])
        block.pc[thread] = position + 1
        block.arrived[barrier] = block.arrived.get(barrier, 0) + 1
        if waits:
            block.waiting[thread] = AT_BARRIER
            block.waiters.setdefault(barrier, []).append(int(thread))
        if block.arrived[barrier] == counts[thread]:
            block.waiting[block.waiters.pop(barrier, [])] = RUNNING
            block.arrived[barrier] = 0


def _run_block(block: Block) -> None:
    entry = block.entry
    end = len(entry.instructions)
    while True:
        runnable = (block.waiting == RUNNING) & (block.pc < end)
        if not runnable.any():
            stuck = np.nonzero(block.waiting != RUNNING)[0]
            if len(stuck):
                where = entry.instructions[min(int(block.pc[stuck[0]]), end - 1)]
                raise PtxError(f"deadlock: {len(stuck)} threads wait, the first at {where}")
            return
        position = int(block.pc[runnable].min())
        active = runnable & (block.pc == position)
        if Compiler.meets(entry.instructions[position]):
            _meet(block, position, np.nonzero(active)[0])
            continue
        while True:
            action, instruction = entry.steps[position], entry.instructions[position]
            if action is None:
                break
            try:
                action(block, active)
            except PtxError as error:
                raise PtxError(f"{instruction} {error}") from error
            position += 1
            if position in entry.starts or position >= end:
                break
        if position < end and action is None:
            _leave(block, instruction, position, active)
        else:
            block.pc[active] = position


def _leave(block: Block, instruction: Instruction, position: int, active: Array) -> None:
    """bra and ret."""
    taken = active
    if instruction.predicate is not None:
        predicate = block.read(instruction.predicate)
        taken = active & (~predicate if instruction.negated else predicate)
    block.pc[active] = position + 1
    if instruction.opcode.startswith("bra"):
        block.pc[taken] = block.entry.labels[instruction.operands[0]]
    else:
        block.pc[taken] = len(block.entry.instructions)


def run(
    entry: Entry,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    arguments: Sequence[bytes],
    memory: Memory,
) -> None:
    """Executes a launch: all blocks, in order. Raises PtxError."""
    if not entry.steps:
        Compiler(entry).compile()
    if len(arguments) != len(entry.parameters):
        raise PtxError(f"{len(arguments)} arguments, expected {len(entry.parameters)}")
    sizes = {f"%ntid.{axis}": n for axis, n in zip("xyz", block, strict=True)}
    sizes |= {f"%nctaid.{axis}": n for axis, n in zip("xyz", grid, strict=True)}
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    place = {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
                    _run_block(Block(entry, memory, block, sizes | place, shared_bytes, arguments))
