"""Registers and stack of a kernel, read off its cubin (an ELF file) without any tool. Entry point: `resources`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_REGISTERS, _FRAME = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE: (symbol, value) pairs in .nv.info


class Resources(NamedTuple):
    """What a thread of the kernel uses: registers, and bytes of stack (where spilled registers go)."""

    regs: int
    stack: int


def resources(cubin: bytes, name: str) -> Resources:
    """The resources of the kernel `name`."""
    sections = {s: (offset, size) for s, offset, size in _sections(cubin)}
    symbol = _symbol(cubin, sections, name)
    found = {
        code: value for code, owner, value in _attributes(cubin, *sections[".nv.info"]) if owner == symbol
    }
    return Resources(found[_REGISTERS], found.get(_FRAME, 0))


def _sections(elf: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each section."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    width, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * width) for i in range(count)]
    text = headers[names][4]
    for name, _, _, _, offset, size in headers:
        yield elf[text + name : elf.index(b"\0", text + name)].decode(), offset, size


def _symbol(elf: bytes, sections: dict[str, tuple[int, int]], name: str) -> int:
    """The number of a symbol."""
    (table, size), (text, _) = sections[".symtab"], sections[".strtab"]
    for i in range(size // 24):
        (start,) = struct.unpack_from("<I", elf, table + 24 * i)
        if elf[text + start : elf.index(b"\0", text + start)].decode() == name:
            return i
    raise KeyError(name)


def _attributes(elf: bytes, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Code, symbol and value of each attribute that is such a pair (format 4, 8 bytes)."""
    end = offset + size
    while offset < end:
        form, code, length = struct.unpack_from("<BBH", elf, offset)
        if form == 4:
            if length == 8:
                yield (code, *struct.unpack_from("<II", elf, offset + 4))
            offset += length
        offset += 4
