"""Files are whole or absent: a failure leaves the old one, and a full disk is one sentence."""

from __future__ import annotations

import errno
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from palcache.errors import CacheError, StorageError
from palcache.files import (
    check_space,
    holds_nothing,
    publish,
    read_json,
    remove_leftovers,
    storage_errors,
    sync_file,
    write_bytes,
    write_json,
    write_with,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_with_replaces_the_file_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert path.read_text() == "old"

    write_with(path, write)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["state"]


def test_write_with_makes_the_folders(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a/b/c.bin", b"\x00\xff")
    assert (tmp_path / "a/b/c.bin").read_bytes() == b"\x00\xff"


def test_what_a_killed_process_of_this_number_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".state.{os.getpid()}.tmp").write_text("left by kill -9")

    def write(temporary: Path) -> None:
        assert not temporary.exists()
        temporary.write_text("new")

    write_with(tmp_path / "state", write)
    assert (tmp_path / "state").read_text() == "new"
    assert names(tmp_path) == ["state"]


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt("a fault"), OSError(errno.EIO, "a fault")])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise error

    with pytest.raises(type(error), match="a fault"):
        write_with(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_storage_error(tmp_path: Path, code: int) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError, match=r"^The disk is full while writing .*state; free some space .* is kept\.$"):
        write_with(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state"]


def test_a_real_limit_is_a_storage_error(tmp_path: Path) -> None:
    """No simulation: the kernel refuses to let the file grow."""
    write_bytes(tmp_path / "state", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, hard))
    try:
        with pytest.raises(StorageError, match="The disk is full while writing"):
            write_bytes(tmp_path / "state", bytes(5_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "state").read_bytes() == b"old"
    assert names(tmp_path) == ["state"]


def test_a_rename_that_finds_the_disk_full_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "state", b"old")

    def replace(_path: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(StorageError, match="The disk is full while writing"):
        write_bytes(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"old"
    assert names(tmp_path) == ["state"]


def test_check_space_asks_and_leaves_nothing(tmp_path: Path) -> None:
    check_space(tmp_path / "new", 10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_999, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            check_space(tmp_path / "new", 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_check_space_asks_the_disk_where_blocks_cannot_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On macOS, for example."""
    monkeypatch.delattr(os, "posix_fallocate")
    check_space(tmp_path / "new", 1)
    with pytest.raises(OSError, match="No space left on device"):
        check_space(tmp_path / "new", 2**62)
    assert names(tmp_path) == []


def test_check_space_never_touches_a_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "state", b"old")
    with pytest.raises(FileExistsError, match="File exists"):
        check_space(tmp_path / "state", 1)
    assert (tmp_path / "state").read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_disk_that_cannot_be_written_is_a_storage_error(tmp_path: Path, code: int) -> None:
    expected = rf"state cannot be written \({os.strerror(code)}\); choose a folder you may write\."
    with pytest.raises(StorageError, match=expected), storage_errors(tmp_path / "state"):
        raise OSError(code, os.strerror(code))


def test_a_file_in_place_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/state cannot be written \(.+\); choose a folder"):
        write_bytes(tmp_path / "file/state", b"new")
    with pytest.raises(StorageError, match=r"file/sub/state cannot be written \(Not a directory\)"):
        write_bytes(tmp_path / "file/sub/state", b"new")


def test_a_folder_in_place_of_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(StorageError, match=r"state cannot be written \(Is a directory\)"):
        write_bytes(tmp_path / "state", b"new")
    assert names(tmp_path) == ["state"]


def test_other_errors_of_the_disk_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"), storage_errors(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_publish_syncs_the_bytes_then_renames_then_syncs_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only order in which a power cut leaves the old file or the whole new one."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(descriptor: int) -> None:
        done.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def logged_replace(path: Path, target: Path) -> Path:
        done.append(f"rename {path.name} to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    (tmp_path / "temporary").write_text("content")
    publish(tmp_path / "temporary", tmp_path / "final")
    assert done == ["fsync temporary", "rename temporary to final", f"fsync {tmp_path.name}"]


def test_files_are_closed_after_a_sync(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("content")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(7):
        sync_file(tmp_path / "state")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_json_round_trips_and_repeats_its_bytes(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"é": "🦔\x00"}}
    write_json(tmp_path / "one.json", value)
    write_json(tmp_path / "two.json", dict(reversed(value.items())))
    assert read_json(tmp_path / "one.json", "a state") == value
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert "é" in (tmp_path / "one.json").read_text(encoding="utf-8")


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "state.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "state.json", {"a": math.nan})
    assert read_json(tmp_path / "state.json", "a state") == {"a": 1}


def test_read_json_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"state\.json is missing, so this is not a palcache cache\."):
        read_json(tmp_path / "state.json", "a palcache cache")
    (tmp_path / "state.json").write_text('{"a": 1')
    with pytest.raises(CacheError, match=r"state\.json cannot be read as a palcache cache: .*line 1"):
        read_json(tmp_path / "state.json", "a palcache cache")
    (tmp_path / "state.json").write_bytes(b'"\xff"')
    with pytest.raises(CacheError, match=r"state\.json cannot be read as a palcache cache: .*utf-8"):
        read_json(tmp_path / "state.json", "a palcache cache")
    with pytest.raises(CacheError, match=r"cannot be read as a palcache cache: .*Is a directory"):
        read_json(tmp_path, "a palcache cache")


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine, dead, living = (f".metrics.json.{number}.tmp" for number in (os.getpid(), child.pid, os.getppid()))
    for name in (mine, dead, living, ".other.tmp"):
        (tmp_path / name).touch()
    assert holds_nothing(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([living, ".other.tmp"])
    (tmp_path / "logs").touch()
    assert not holds_nothing(tmp_path)
    assert holds_nothing(tmp_path, but=("logs",))
