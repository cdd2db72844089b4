"""Read the disassembly of a kernel: opcodes, loops, instructions by class."""

import collections
import re
import sys

CLASS_OF_OPCODE = {
    "MUFU": ("MUFU",),
    "LDG/STG": ("LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "RED"),
    "LDS/STS": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "LDL/STL": ("LDL", "STL"),
    "LDC": ("LDC", "ULDC", "LDCU"),
    "SHFL": ("SHFL",),
    "BAR": ("BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "MEMBAR"),
    "branch": ("BRA", "BRX", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT", "YIELD", "BMOV", "WARPGROUP"),
}
REST = "FMA/ALU"
HARMLESS = {"LDC", "VIADD", "IADD3", "MOV", "NOP"}
"""Opcodes that read no memory which a kernel could write: constants and registers."""


def before_wait(opcodes: list[str]) -> list[str]:
    """Return the instructions that a kernel issues before it waits for the kernels before it."""
    return opcodes[: opcodes.index("ACQBULK")]


def read_listing(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the opcodes of a disassembly, and the first and last index of each loop without a loop inside."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*?);", line):
            target = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            if instruction[1] == "BRA" and target and labels.get(target[1], sys.maxsize) < len(opcodes):
                jumps.append((labels[target[1]], len(opcodes)))
            opcodes.append(instruction[1])
    inside = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]  # noqa: E731
    return opcodes, [loop for loop in jumps if not any(inside(other, loop) for other in jumps)]


def count(opcodes: list[str]) -> dict[str, int]:
    """Return the number of instructions in total and by class, without padding."""
    class_of = {opcode: name for name, members in CLASS_OF_OPCODE.items() for opcode in members}
    counts = collections.Counter(class_of.get(opcode, REST) for opcode in opcodes if opcode != "NOP")
    return {"total": counts.total(), **{name: counts[name] for name in (REST, *CLASS_OF_OPCODE) if counts[name]}}
