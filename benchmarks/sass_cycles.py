"""How many cycles the loop of a Triton kernel takes on a GPU that is not at hand: its machine code, simulated.

A kernel is compiled for a compute capability (Triton brings ptxas and cuobjdump), its largest loop is taken from the
machine code, and the warps of as many programs as fit on a multiprocessor run it on four schedulers: in order, with the
stall counts and scoreboards that the code carries, and pipes for tensor cores, special functions, float64, integers and
shared memory. Not modelled: bank conflicts, bandwidth and misses of the memory, launches. Figures rank variants of one
kernel; as times they are rough (a fifth to a quarter either way), and never stand beside measured ones unmarked.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels.launch import Launch


class Card(NamedTuple):
    """GHz; GB/s of its memory; cycles of a tensor-core step (m16n8k16) for a scheduler; of a float64 instruction, and
    whether one pipe serves the whole multiprocessor; of an integer and of a float32 one; latency of the L2;
    multiprocessors, bytes of shared memory and warps of one. From vendor documents and published microbenchmarks."""

    ghz: float
    memory: float
    tensor: float
    float64: float
    shared_float64: bool
    integer: float
    float32: float
    l2: int
    multiprocessors: int
    shared: int
    warps: int


CARDS = {
    80: Card(1.41, 2039, 8, 4, False, 2, 2, 220, 108, 163 << 10, 64),
    86: Card(1.71, 600, 32, 16, True, 2, 1, 230, 80, 99 << 10, 48),
    89: Card(2.0, 717, 16, 16, True, 2, 1, 270, 76, 99 << 10, 48),
    90: Card(1.755, 3350, 6.4, 2, False, 2, 1, 270, 132, 227 << 10, 64),
}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
MOST_PROGRAMS, LEAST_LOOP = 4, 0x600  # programs simulated at once; bytes of code from which on a loop counts
GIVE_UP = 3_000_000  # cycles
SCHEDULERS = 4

# Instructions by how their names begin: pipe, cycles it is busy (None: see `issue`), latency (None: in the code).
MEMORY = {"LDSM": 33, "LDSTS": 30, "LDS": 30, "STS": 20, "STL": 20, "SHFL": 24, "LDL": 33, "STG": 20}
FLOAT32 = ("FFMA", "FADD", "FMUL", "FSEL", "FMNMX", "FSETP", "HFMA", "HADD", "HMUL", "FSET", "FSWZADD")
CONVERT = ("F2FP", "I2F", "F2I", "FRND", "I2FP")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A compiled kernel: registers and spilled bytes of a thread, bytes of shared memory, machine code."""

    registers: int
    spilled: int
    shared: int
    sass: str

    def resident(self, card: Card, warps: int) -> int:
        """Programs that fit on one multiprocessor."""
        by_registers = 65536 // ((self.registers + 7) // 8 * 8 * 32 * warps)
        return max(1, min(by_registers, card.shared // (self.shared + 1024), card.warps // warps))


class Instruction(NamedTuple):
    """Its words, and of its control word: cycles to stall, the scoreboards that it sets when it has written and when it
    has read (7: none), and those that it waits for."""

    address: int
    text: str
    stall: int
    write: int
    read: int
    wait: int

    @property
    def name(self) -> str:
        words = self.text.split()
        return words[1] if self.text.startswith("@") else words[0]


def compiled(launch: Launch, capability: int) -> Machine:
    """A launch's kernel for a capability, its arguments typed as Triton types them; tensors may be on meta."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        aligned = special and isinstance(value, int) and value % 16 == 0
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if aligned:
            attributes[position,] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = next(path for name, path in made.metadata_group.items() if name.endswith(".cubin"))

    def dump(option: str) -> str:
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", dump("-res-usage"))
    assert usage is not None
    return Machine(int(usage[1]), int(usage[2]) + int(usage[3]), made.metadata.shared, dump("-sass"))


def parsed(sass: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`, two lines each; the control word is in the second."""
    code, pending = [], None
    for line in sass.splitlines():
        first = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/", line)
        if first:
            pending = (int(first[1], 16), first[2].strip())
            continue
        second = re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)
        if second and pending:
            word = int(second[1], 16) >> 41
            code.append(Instruction(*pending, word & 15, word >> 5 & 7, word >> 8 & 7, word >> 11 & 63))
            pending = None
    return code


def backward_branches(code: list[Instruction]) -> list[tuple[int, int]]:
    """The first and the last address of every loop, the longest first."""
    spans = []
    for one in code:
        branch = re.search(r"BRA(?:\.\w+)*.*?(0x[0-9a-f]+)$", one.text)
        if branch and one.address > int(branch[1], 16):
            spans.append((int(branch[1], 16), one.address))
    return sorted(spans, key=lambda span: span[0] - span[1])


def largest_loop(code: list[Instruction], trips: int = 1) -> tuple[list[Instruction], list[Instruction]]:
    """The program with every loop run once, and the body of its longest loop; the longest loop within that is written
    out `trips` times in both. Raises ValueError where there is none."""
    spans = backward_branches(code)
    if not spans or spans[0][1] - spans[0][0] <= LEAST_LOOP:
        raise ValueError("the kernel has no loop")
    start, end = spans[0]
    inner = [span for span in spans[1:] if start <= span[0] and span[1] <= end]
    if trips > 1 and inner:
        first, last = inner[0]
        again = [one for one in code if first <= one.address <= last] * (trips - 1)
        place = next(index for index, one in enumerate(code) if one.address > last)
        code = [*code[:place], *again, *code[place:]]
    return once(code), [one for one in code if start <= one.address <= end]


def once(code: list[Instruction]) -> list[Instruction]:
    """All up to the end of the program."""
    return list(itertools.takewhile(lambda one: one.text != "EXIT", code))


def timing(name: str, card: Card) -> tuple[str, float, float | None]:
    """Pipe, cycles it is busy, and latency (None: in the code) of an instruction."""
    wide = 4 if "128" in name else 2 if "64" in name else 1
    if name.startswith("HMMA"):
        return "tensor", card.tensor, None
    if group := re.match(r"HGMMA\.64x(\d+)x16", name):
        return "tensor", 64 * int(group[1]) * 16 * 2 / 4096, None
    if name.startswith("MUFU"):
        return "special", 8, 24
    if name.startswith(("DADD", "DMUL", "DFMA", "DSETP")) or (name.startswith(("F2F", "DMNMX")) and "64" in name):
        return "float64", card.float64, 50 if card.shared_float64 else 16
    if name.startswith("LDGSTS"):
        return "memory", 4, 30
    if name.startswith("LDG"):
        return "memory", max(2, wide), card.l2
    for beginning, latency in MEMORY.items():
        if name.startswith(beginning):
            busy = {"LDSM": 4 if ".4" in name else 2, "SHFL": 2, "STG": max(2, wide)}.get(beginning, wide)
            return "memory", busy, latency
    if name.startswith(("LDC", "S2R", "ULDC", "R2UR")):
        return "other", 1, 20
    if name.startswith(FLOAT32):
        return "float32", card.float32, None
    if name.startswith(CONVERT):
        return "convert", 2, None
    return "integer", 1 if name.startswith("U") else card.integer, None


class Warp:
    """Where a warp is, and what it waits for."""

    def __init__(self) -> None:
        self.place, self.turn, self.ready, self.blocked = 0, 0, 0.0, False
        self.scoreboards = [0.0] * 6
        self.copies: list[float] = []  # when each group of asynchronous copies is there
        self.copied = self.products = 0.0
        self.ends: list[float] = []


class Multiprocessor:
    """Programs of `warps` warps each that run a loop's body `iterations` times."""

    def __init__(self, body: list[Instruction], card: Card, warps: int, programs: int, iterations: int) -> None:
        self.body, self.card, self.per_program, self.iterations = body, card, warps, iterations
        self.times = [timing(one.name, card) for one in body]
        self.warps = [Warp() for _ in range(warps * programs)]
        self.pipes: list[dict[str, float]] = [collections.defaultdict(float) for _ in range(SCHEDULERS)]
        self.shared: dict[str, float] = collections.defaultdict(float)  # pipes of the whole multiprocessor
        self.waiting: dict[int, list[Warp]] = collections.defaultdict(list)

    def run(self) -> list[float]:
        """When all warps have done each iteration, in cycles."""
        queues = [list(range(number, len(self.warps), SCHEDULERS)) for number in range(SCHEDULERS)]
        last, now = [-1] * SCHEDULERS, 0.0
        while any(warp.turn < self.iterations for warp in self.warps):
            for number, queue in enumerate(queues):
                # The one that issued last goes first, as long as it can.
                for index in sorted(queue, key=last[number].__ne__):
                    if self.issued(index, number, now):
                        last[number] = index
                        break
            now += 1
            if now > GIVE_UP:
                raise RuntimeError("the simulation does not end")
        return [max(warp.ends[turn] for warp in self.warps) for turn in range(self.iterations)]

    def issued(self, index: int, number: int, now: float) -> bool:
        """Issues a warp's next instruction, if it may."""
        warp = self.warps[index]
        if warp.turn >= self.iterations or warp.blocked or warp.ready > now:
            return False
        one, (pipe, busy, latency) = self.body[warp.place], self.times[warp.place]
        if any(one.wait >> bit & 1 and warp.scoreboards[bit] > now for bit in range(6)):
            return False
        if not self.free(pipe, number, now) or not arrived(one, warp, now):
            return False
        start = self.occupy(pipe, number, now, busy)
        if one.write != 7:
            done = start + (6 if latency is None else latency)
            warp.scoreboards[one.write] = max(warp.scoreboards[one.write], done)
        if one.read != 7:
            warp.scoreboards[one.read] = max(warp.scoreboards[one.read], start + busy + 8)
        self.note(one, warp, now, busy)
        warp.ready = now + max(1, one.stall)
        warp.place += 1
        if one.name.startswith("BAR.SYNC"):
            self.meet(index, now)
        if warp.place == len(self.body):
            warp.turn, warp.place = warp.turn + 1, 0
            warp.ends.append(now)
            warp.ready = max(warp.ready, now + 12)
        return True

    def free(self, pipe: str, number: int, now: float) -> bool:
        if pipe == "memory":
            return self.shared[pipe] <= now + 16  # a queue before the port
        if pipe == "float64" and self.card.shared_float64:
            return self.shared[pipe] <= now
        return self.pipes[number][pipe] <= now

    def occupy(self, pipe: str, number: int, now: float, busy: float) -> float:
        """Takes the pipe; when the instruction begins in it."""
        start = max(self.shared[pipe], now) if pipe == "memory" else now
        if pipe == "memory" or (pipe == "float64" and self.card.shared_float64):
            self.shared[pipe] = start + busy
        else:
            self.pipes[number][pipe] = now + busy
        return start

    def note(self, one: Instruction, warp: Warp, now: float, busy: float) -> None:
        """What still runs after the instruction: products of a warp group, asynchronous copies."""
        if one.name.startswith("HGMMA"):
            warp.products = max(warp.products, now + 30) + busy
        elif one.name.startswith("LDGDEPBAR"):
            warp.copies = [*warp.copies, warp.copied][-16:]
        elif one.name.startswith("LDGSTS"):
            warp.copied = max(warp.copied, now + self.card.l2 + 20)

    def meet(self, index: int, now: float) -> None:
        """A barrier: the program's warps leave it together."""
        program = index // self.per_program
        self.waiting[program].append(self.warps[index])
        self.warps[index].blocked = True
        if len(self.waiting[program]) == self.per_program:
            for warp in self.waiting.pop(program):
                warp.blocked, warp.ready = False, max(warp.ready, now + 12)


def arrived(one: Instruction, warp: Warp, now: float) -> bool:
    """Whether what the instruction waits for beside scoreboards is there."""
    if "WARPGROUP.DEPBAR" in one.text:
        return warp.products <= now
    if one.name.startswith("DEPBAR") and (left := re.search(r"SB0, 0x([0-9a-f]+)", one.text)):
        keep = int(left[1], 16)
        needed = warp.copies[:-keep] if keep else warp.copies
        return max(needed, default=0.0) <= now
    return True


class Cycles(NamedTuple):
    """Of a program with its loop run once, and of each further time through it."""

    first: float
    further: float


def simulated(machine: Machine, card: Card, warps: int, trips: int = 1) -> dict[int, Cycles]:
    """By programs on a multiprocessor: one, and as many as fit. `trips`: of the loop within the longest."""
    code = parsed(machine.sass)
    try:
        whole, body = largest_loop(code, trips)
    except ValueError:
        whole, body = once(code), []
    found = {}
    for count in sorted({1, min(MOST_PROGRAMS, machine.resident(card, warps))}):
        first = Multiprocessor(whole, card, warps, count, 1).run()[-1]
        ends = Multiprocessor(body, card, warps, count, 4).run() if body else [0.0, 0.0]
        found[count] = Cycles(first, ends[-1] - ends[-2])
    return found
