"""Durable writes: complete or absent, hashed, damage named, one writer."""

import errno
import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from llmkit.durable import (
    RunLock,
    make_folders,
    open_log,
    read_manifest,
    remove_file,
    remove_folder,
    sweep,
    sync_log,
    verify_folder,
    write_file,
    write_folder,
)
from llmkit.errors import CorruptError, RunError


def make(folder: Path, content: bytes = b"abc" * 100) -> Path:
    with write_folder(folder, facts={"step": 3}) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a.bin").write_bytes(content)
        (temporary / "sub" / "b.bin").write_bytes(b"b")
    return folder


def test_a_folder_appears_whole_and_verifies(tmp_path):
    manifest = verify_folder(make(tmp_path / "x"))
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}
    assert manifest["files"]["a.bin"]["bytes"] == 300
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_failing_block_leaves_the_old_folder_and_nothing_else(tmp_path):
    make(tmp_path / "x")

    def fail_halfway():
        with write_folder(tmp_path / "x") as temporary:
            (temporary / "a.bin").write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    verify_folder(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_replacing_a_folder(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "x", b"new")
    assert (tmp_path / "x" / "a.bin").read_bytes() == b"new"
    verify_folder(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["a.bin", "sub/b.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove"])
def test_every_damage_to_every_file_is_found_and_named(tmp_path, name, damage):
    path = make(tmp_path / "x") / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "flip":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "grow":
        path.write_bytes(content + b"1")
    else:
        path.unlink()
    with pytest.raises(CorruptError, match=Path(name).name.replace(".", r"\.")):
        verify_folder(tmp_path / "x")


def test_a_manifest_edited_to_fit_damaged_content_is_found(tmp_path):
    folder = make(tmp_path / "x")
    manifest = read_manifest(folder)
    manifest["step"] = 4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match="own hash"):
        verify_folder(folder)


def test_files_honour_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with write_folder(tmp_path / "x") as temporary:
            (temporary / "private").touch(mode=0o600)
        write_file(tmp_path / "y", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "x" / "private").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "y").stat().st_mode & 0o777 == 0o640


def test_the_umask_is_read_without_changing_it_for_other_threads(tmp_path, monkeypatch):
    def refuse(mask):
        raise AssertionError("os.umask is of the whole process")

    monkeypatch.setattr(os, "umask", refuse)
    make(tmp_path / "x")


def test_a_folder_killed_between_two_renames_gets_its_name_back(tmp_path):
    make(tmp_path / "x-1")
    (tmp_path / "x-1").rename(tmp_path / ".x-1.kept-a-host-7")
    make(tmp_path / "y", b"new")
    make(tmp_path / ".y.kept-a-host-7", b"old")
    sweep(tmp_path)
    verify_folder(tmp_path / "x-1")
    assert (tmp_path / "y" / "a.bin").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-1", "y"]


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deep" / "x"):
        with pytest.raises(RunError, match="a file stands where a folder is needed"):
            write_file(path, "text")
        with pytest.raises(RunError, match="a file stands where a folder is needed"):
            make(path)
        with pytest.raises(RunError, match="a file stands where a folder is needed"), RunLock(path):
            pass
    with pytest.raises(NotADirectoryError):
        make_folders(tmp_path / "file")


def test_a_removal_that_fails_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        remove_folder(tmp_path / "x")
    remove_file(tmp_path / "x")  # what is not there is removed
    write_file(tmp_path / "x", "text")
    remove_file(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_log_is_there_before_its_first_line_and_goes_on(tmp_path):
    for line in ("one\n", "two \ud800\n"):
        with open_log(tmp_path / "log") as log:
            assert (tmp_path / "log").is_file()
            log.write(line)
            sync_log(log)
            assert (tmp_path / "log").read_text().endswith(line.replace("\ud800", r"\ud800"))
    assert (tmp_path / "log").read_text() == "one\ntwo \\ud800\n"


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match="does not lock files"), RunLock(tmp_path):
        pass


def test_sweep_removes_what_a_killed_writer_left_and_only_that(tmp_path):
    make(tmp_path / "x")
    (tmp_path / ".x.tmp-123").mkdir()
    (tmp_path / ".x.old-123").mkdir()
    (tmp_path / ".y.json.tmp-7").touch()
    (tmp_path / ".hidden").touch()
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "x"]


def hold(folder, held, done):
    with RunLock(folder):
        held.set()
        done.wait(20)


def test_a_second_writer_is_refused_and_told_who_holds_the_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, held, done))
    holder.start()
    assert held.wait(20)
    with pytest.raises(RunError, match=f"pid {holder.pid}"), RunLock(tmp_path):
        pass
    holder.kill()  # the kernel frees the lock of a dead process
    holder.join()
    with RunLock(tmp_path):
        pass
