"""Packs a folder of peers into a few files that travel with the tree, and restores it."""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
from pathlib import Path

ARCHIVES = Path(__file__).resolve().parents[2] / ".peers"
PART_BYTES = 56 * 2**20
# Folders of an archive that hold no package by their own name.
CUDA_HEADERS = "cuda_headers"
TRITONMOE = "tritonmoe"


def default_folder() -> Path:
    """Returns where peers are unpacked to when nothing else is asked for."""
    return Path(tempfile.gettempdir()) / "tilewise-peers"


def pack(folder: Path, name: str, archives: Path = ARCHIVES) -> list[Path]:
    """Writes ``name.tar.xz.part0``, ``.part1``, ... of at most ``PART_BYTES`` each."""
    archives.mkdir(parents=True, exist_ok=True)
    for old in archives.glob(f"{name}.tar.xz.part*"):
        old.unlink()
    whole = archives / f"{name}.tar.xz"
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**26},
    ]
    with (
        lzma.open(whole, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(folder).as_posix(), filter=_anonymous)
    parts = []
    with whole.open("rb") as stream:
        while data := stream.read(PART_BYTES):
            parts.append(archives / f"{whole.name}.part{len(parts)}")
            parts[-1].write_bytes(data)
    whole.unlink()
    return parts


def unpack(folder: Path, archives: Path = ARCHIVES) -> list[str]:
    """Restores every archive into ``folder``.

    Returns:
        The names of the archives.

    Raises:
        FileNotFoundError: There is no archive; ``python -m bench.prepare_peers`` makes them.
    """
    names = sorted({part.name.partition(".")[0] for part in archives.glob("*.tar.xz.part*")})
    if not names:
        raise FileNotFoundError(f"no archive in {archives}; run python -m bench.prepare_peers")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        parts = len(list(archives.glob(f"{name}.tar.xz.part*")))
        whole = b"".join((archives / f"{name}.tar.xz.part{i}").read_bytes() for i in range(parts))
        with tarfile.open(fileobj=io.BytesIO(whole), mode="r:xz") as tar:
            # Python 3.10 and 3.11 know the filter since late patches only.
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder, **safe)  # type: ignore[arg-type]
    return names


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
