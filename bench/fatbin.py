"""Shrinks a CUDA extension to the machine code of one architecture.

A ``.nv_fatbin`` section is a row of containers, each a 16-byte header and then entries, one per
architecture. Containers keep their place, since code points at them; inside each, the entries that
are kept move to the front and zeros fill the rest, which compress to nothing.
"""

from __future__ import annotations

import struct

_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, header size, size of all entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, header size, payload size
_ARCH_OFFSET = 28
_CUBIN = 2


def prune(image: bytes, arch: int) -> tuple[bytes, int]:
    """Drops the device code of every other architecture from an ELF image.

    A container without the architecture keeps its smallest entry: it stays well formed, and its
    kernels, which then cannot run, are reported by CUDA at launch.

    Args:
        image: A shared library, 64-bit little-endian ELF.
        arch: Compute capability as in ``sm_90``: 90.

    Returns:
        The image, of the same length, and how many containers hold code for ``arch``; an image
        without device code stays as it is.
    """
    out = bytearray(image)
    start, size = _section(image, b".nv_fatbin")
    position, end, kept = start, start + size, 0
    while position < end:
        magic, version, header_size, total = _CONTAINER.unpack_from(image, position)
        if magic != _MAGIC:
            position += 8
            continue
        first = position + header_size
        entries = _entries(image, first, first + total)
        wanted = [entry for kind, sm, entry in entries if (kind, sm) == (_CUBIN, arch)]
        kept += bool(wanted)
        body = b"".join(wanted or [min((entry for *_, entry in entries), key=len)])
        _CONTAINER.pack_into(out, position, magic, version, header_size, len(body))
        out[first : first + total] = body.ljust(total, b"\0")
        position = first + total
    return bytes(out), kept


def _entries(image: bytes, position: int, end: int) -> list[tuple[int, int, bytes]]:
    entries = []
    while position < end:
        kind, _, header_size, payload_size = _ENTRY.unpack_from(image, position)
        (arch,) = struct.unpack_from("<I", image, position + _ARCH_OFFSET)
        after = position + header_size + payload_size
        entries.append((kind, arch, image[position:after]))
        position = after
    return entries


def _section(image: bytes, name: bytes) -> tuple[int, int]:
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    for name_offset, _, _, _, offset, size in headers:
        if image.startswith(name + b"\0", names + name_offset):
            return offset, size
    return 0, 0
