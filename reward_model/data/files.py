"""Open data files as text, whatever their compression and encoding."""

import bz2
import codecs
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
def open_text(path: Path, name: str, *, newline: str | None, encoding: str | None = None) -> Iterator[IO[str]]:
    """Context manager: the text of a file, decompressed, without its byte order mark.

    Bytes that are not of the encoding come out as lone surrogates, for `encoding_problem` to find in the line that
    holds them.

    Args:
        encoding: Encoding of the file; None: what its byte order mark says, or UTF-8.

    Raises:
        DataError: The file is damaged, is UTF-16 without a byte order mark, or begins with the mark of another encoding
            than `encoding`.
    """
    try:
        with _decompressed(path) as stream:
            start = stream.peek(4)[:512]
            chosen = _encoding(start, name, encoding)
            errors = "strict" if chosen.startswith(("utf-16", "utf-32")) else "surrogateescape"
            with io.TextIOWrapper(stream, encoding=chosen, errors=errors, newline=newline) as text:
                yield text
    except UnicodeDecodeError as error:
        said = f"encoding={encoding}" if encoding else f"its byte order mark says {error.encoding}"
        raise DataError(
            f"{name}: {said}, but it holds bytes that are none ({error.reason}): the file is damaged, or has another "
            "encoding. Choose it with --encoding, or write the file again, as UTF-8."
        ) from error
    except _DAMAGE as error:
        raise DataError(
            f"{name} cannot be read to its end: its compressed bytes are damaged or cut off, and the rows behind would "
            "be lost. Fetch it or write it again."
        ) from error


def encoding_problem(text: str, encoding: str | None) -> str:
    """What is wrong with the bytes that `text` was decoded from by `open_text`; "" if nothing is."""
    found = _UNDECODED.search(text)
    if found is None:
        return ""
    place = f"(byte 0x{ord(found[0]) - 0xDC00:02x} at character {found.start()})"
    if encoding is not None:
        return f"not {encoding} text {place}: the file has another encoding. Choose it with --encoding."
    guess = (
        "is the file binary, or has it an encoding such as utf-16? Name it: --encoding utf-16-le."
        if _CONTROL.search(text)
        else "the file looks like Latin-1 or Windows-1252, or has an encoding such as gbk or shift_jis. Name it: "
        "--encoding cp1252; or convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
    )
    return f"not UTF-8 text {place}: {guess}"


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


def _encoding(start: bytes, name: str, wanted: str | None) -> str:
    """The encoding of a file that begins with `start`: the one that is wanted, or that of its mark, or UTF-8."""
    marked = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if wanted is not None:
        try:
            known = codecs.lookup(wanted).name
            io.TextIOWrapper(io.BytesIO(), encoding=known)
        except LookupError:  # also of codecs that make no text, such as base64
            raise DataError(f"encoding={wanted!r} is unknown. Python's names are: utf-8, cp1252, gbk, ...") from None
        if marked is not None and not known.startswith(marked.removesuffix("-sig")):
            raise DataError(
                f"{name} begins with the byte order mark of {marked}, but encoding={wanted}: its texts would be "
                "garbled. Leave the encoding out."
            )
        return marked or known
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):  # every second byte is zero
        zeros = start[first::2]
        if marked is None and len(zeros) > 3 and zeros.count(0) > 0.6 * len(zeros):
            raise DataError(
                f"{name} looks like {encoding} without a byte order mark. Name it: --encoding {encoding.lower()}; or "
                f"convert it: iconv -f {encoding} -t UTF-8 OLD > NEW."
            )
    return marked or "utf-8"
