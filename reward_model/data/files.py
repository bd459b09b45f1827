"""Open data files as text, whatever their compression and encoding; damage and other encodings are named."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from datasets.table import pa as pyarrow

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
_UNDECODED = re.compile("[\udc80-\udcff]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a]")
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)


class DataError(ValueError):
    """A source that cannot be read; the message has reason and remedy."""


def data_suffix(path: Path) -> str:
    """The suffix that says how a file is laid out: `.jsonl` of `train.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return suffixes[-2] if len(suffixes) == 2 and suffixes[-1] in COMPRESSIONS else suffixes[-1] if suffixes else ""


@contextmanager
def open_text(path: Path, name: str, *, newline: str | None) -> Iterator[IO[str]]:
    """Context manager: the text of a file, decompressed, without its byte order mark.

    Bytes that are no UTF-8 come out as lone surrogates, for `encoding_problem` to find in the line that holds them.

    Args:
        path: The file.
        name: Its name, for messages.
        newline: As of `open`.

    Raises:
        DataError: The file is damaged, or is UTF-16 without a byte order mark.
    """
    try:
        with _decompressed(path) as stream:
            start = stream.peek(4)[:512]
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
            if encoding == "utf-8":
                _check_width(start, name)
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            with io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline) as text:
                yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: its byte order mark says {error.encoding}, but it holds bytes that are none ({error.reason}): "
            "the file is damaged. Write it again, as UTF-8."
        ) from error
    except _DAMAGE as error:
        raise DataError(
            f"{name} cannot be read to its end: {' '.join(str(error).split()) or type(error).__name__:.200}. The file "
            "is damaged or cut off; fetch or write it again."
        ) from error


def encoding_problem(text: str) -> str:
    """What is wrong with the bytes that `text` was decoded from by `open_text`; "" if they are UTF-8."""
    found = _UNDECODED.search(text)
    if found is None:
        return ""
    guess = (
        "is the file binary?"
        if _CONTROL.search(text)
        else "the file looks like Latin-1 or Windows-1252. Convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
    )
    return f"not UTF-8 text (byte 0x{ord(found[0]) - 0xDC00:02x} at character {found.start()}): {guess}"


def _decompressed(path: Path) -> io.BufferedReader:
    with path.open("rb") as file:
        start = file.read(6)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if kind == ".zst":
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if kind:
        return io.BufferedReader(cast(io.RawIOBase, openers[kind](path, "rb")))
    return path.open("rb")


def _check_width(start: bytes, name: str) -> None:
    """Raise if every second byte is zero: UTF-16 that does not say so."""
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros = start[first::2]
        if len(zeros) > 3 and zeros.count(0) > 0.6 * len(zeros):
            raise DataError(
                f"{name} looks like {encoding} without a byte order mark. Convert it: iconv -f {encoding} -t UTF-8 OLD "
                "> NEW."
            )
