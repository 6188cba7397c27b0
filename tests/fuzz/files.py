"""An input of several files as a zip archive; ``@link/``, ``@pipe/`` and ``@folder/`` begin names of other things."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.torture.faults import fast_disk

Files = dict[str, bytes]

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"

LINK, PIPE, FOLDER = "@link/", "@pipe/", "@folder/"
LINKED = (b"/dev/zero", b"/dev/null", b"/dev/full")  # and names without a slash, so that nothing else can be reached


def pack(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def unpack(data: bytes) -> Files | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {info.filename: archive.read(info) for info in archive.infolist() if info.file_size < 2**20}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError, zlib.error):
        return None


def packed(directory: Path) -> bytes:
    files = (path for path in directory.rglob("*") if path.is_file())
    return pack({path.relative_to(directory).as_posix(): path.read_bytes() for path in files})


@contextmanager
def laid_out(files: Mapping[str, bytes]) -> Iterator[Path]:
    with fast_disk() as root:
        for entry, content in files.items():
            kind = next((kind for kind in (LINK, PIPE, FOLDER) if entry.startswith(kind)), "")
            parts = entry.removeprefix(kind).split("/")
            if not {"", ".", ".."} & {*parts}:
                with suppress(OSError, ValueError):  # a name that no file can have, or that is taken
                    _make(root.joinpath(*parts), kind, content)
        yield root


def _make(path: Path, kind: str, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == LINK:
        if content in LINKED or (content and b"/" not in content):
            path.symlink_to(os.fsdecode(content))
    elif kind == PIPE:
        os.mkfifo(path)
    elif kind == FOLDER:
        path.mkdir(exist_ok=True)
    elif not path.is_symlink() and (path.is_file() or not path.exists()):
        path.write_bytes(content)


def tree(root: Path) -> dict[str, bytes | str]:
    """Return everything below a directory: the bytes of files, and the kinds of all else. Nothing is followed."""
    found: dict[str, bytes | str] = {}
    for path in root.rglob("*"):
        if path.is_symlink():
            what: bytes | str = f"link to {path.readlink()}"
        else:
            what = path.read_bytes() if path.is_file() else "folder" if path.is_dir() else "special"
        found[str(path.relative_to(root))] = what
    return found
