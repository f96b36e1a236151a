"""The door under kill -9, refusals of the system, short writes and loss of power, at each of its calls."""

import json
import os
import re
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest
from injection import (
    CHANGING,
    KILLS,
    REFUSALS,
    Event,
    Fault,
    Recorder,
    failing,
    in_child,
    losses,
    read_strace,
    under_strace,
    without_strace,
)

from llmkit.durable import (
    calls,
    foreign_write,
    open_log,
    remove_folder,
    scratch_folder,
    sweep,
    sweep_beside,
    verify_folder,
    write_file,
    write_folder,
    write_json,
    write_new_file,
)
from llmkit.errors import CorruptError, LlmkitError, RunError


def content(version: int, size: int = 5000) -> dict[str, bytes]:
    """The files of a version; each version has one that no other has."""
    return {
        "a.bin": bytes([version]) * size,
        f"only-in-{version}.txt": b"x",
        "sub/b.bin": bytes([version, 0]) * size,
    }


def save(folder: Path, version: int, size: int = 5000) -> None:
    """Publish a version, by the door's own writing and by that of a library."""
    with write_folder(folder, facts={"version": version}) as temporary:
        (temporary / "sub").mkdir()
        for name, data in content(version, size).items():
            with foreign_write(temporary / name):
                (temporary / name).write_bytes(data)
        write_json(temporary / "state.json", {"version": version})


def version_in(folder: Path, size: int = 5000) -> int:
    """The version that is there, every byte of it; 0 when nothing is."""
    if not os.path.lexists(folder):
        return 0
    version: int = verify_folder(folder)["version"]
    wanted = content(version, size)
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == {*wanted, "state.json", "manifest.json"}
    assert all((folder / name).read_bytes() == data for name, data in wanted.items())
    assert json.loads((folder / "state.json").read_bytes()) == {"version": version}
    return version


def check_next_writer(folder: Path) -> None:
    """Whatever a fault left, the next writer sweeps it and saves."""
    sweep(folder.parent)
    assert os.listdir(folder.parent) == [folder.name], "the old one is never lost"
    assert version_in(folder) in (1, 2)
    save(folder, 3)
    assert version_in(folder) == 3
    assert os.listdir(folder.parent) == [folder.name]


def recorded(work) -> list[Event]:
    recorder = Recorder()
    with failing(recorder):
        work()
    return recorder.events


def each_call(work) -> range:
    """The numbers of the door's calls in `work`."""
    counter = Fault("EIO", 0)
    with failing(counter):
        work()
    return range(1, counter.seen + 1)


@pytest.fixture
def tmp_path(in_memory):
    return in_memory


@pytest.fixture
def place(tmp_path):
    """A folder that holds version 1, and a function that puts it back to that."""
    parent = tmp_path / "runs"

    def reset() -> Path:
        shutil.rmtree(parent, ignore_errors=True)
        save(parent / "x", 1)
        return parent / "x"

    return reset


@pytest.fixture(params=["exchange", "two renames"])
def replacing(request, monkeypatch):
    """How a folder is replaced: in one call, or as on a file system that lacks it."""
    if request.param == "two renames":
        monkeypatch.setattr(calls, "_renameat2", lambda: None)
    return request.param


@pytest.mark.parametrize("how", KILLS)
def test_killed_at_every_call_old_or_new_is_whole(place, replacing, how):
    folder = place()
    numbers = each_call(lambda: save(folder, 2))
    assert len(numbers) > 20
    seen, died = [], 0
    for at in numbers:
        place()
        code = in_child(lambda: save(folder, 2), Fault(how, at))
        assert code in (-9, 0)
        died += code == -9
        if code == -9:
            seen.append(version_in(folder))
        check_next_writer(folder)
    # Only writes and removals have a middle, and a call that the system does not offer has no end.
    assert died > 4 if how == "kill-middle" else died >= len(numbers) - 1
    if how != "kill-middle":
        assert {1, 2} <= set(seen)
        assert seen == sorted(seen, key=lambda version: (version == 2, version == 0))
        assert (0 in seen) == (replacing == "two renames")


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("how", REFUSALS)
def test_refused_at_every_call_old_or_new_is_whole_and_the_error_is_clear(place, replacing, how, lasting):
    folder = place()
    for at in each_call(lambda: save(folder, 2)):
        place()
        code = in_child(lambda: save(folder, 2), Fault(how, at, lasting))
        version = version_in(folder)
        assert version in ((1, 2) if replacing == "exchange" or not lasting else (0, 1, 2))
        assert code == 1 or version == 2
        check_next_writer(folder)


def test_a_refusal_says_what_to_do(tmp_path):
    for how, words in (("ENOSPC", "no space left"), ("EIO", "input/output error"), ("EFBIG", "ulimit -f")):
        with failing(Fault(how, 4)), pytest.raises(RunError) as caught:
            save(tmp_path / "x", 1)
        assert words in str(caught.value)
        assert str(tmp_path / "x") in str(caught.value)
        assert os.listdir(tmp_path) == []


def test_short_writes_are_gone_on_with(place):
    folder = place()
    with failing(Fault("short", 1)):
        save(folder, 2)
        write_file(folder.parent / "file", "text " * 20)
    assert version_in(folder) == 2
    assert (folder.parent / "file").read_text() == "text " * 20


def test_a_system_that_writes_nothing_is_an_error_not_a_loop(tmp_path):
    with (
        failing(lambda call: 0 if call.name == "write" else None),
        pytest.raises(RunError, match="input/output"),
    ):
        write_file(tmp_path / "x", "text")


@pytest.mark.parametrize("how", [*KILLS, *REFUSALS])
@pytest.mark.parametrize("write", [write_file, write_new_file])
def test_a_file_is_old_or_new(tmp_path, write, how):
    path, texts = tmp_path / "in" / "x.json", {None: None, "old": "old" * 50}
    if write is write_new_file:
        del texts["old"]
    for old in texts.values():

        def put_back(old=old) -> None:
            shutil.rmtree(tmp_path / "in", ignore_errors=True)
            if old is not None:
                write_file(path, old)

        put_back()
        for at in each_call(lambda: write(path, "new" * 50)):
            put_back()
            in_child(lambda: write(path, "new" * 50), Fault(how, at))
            assert (path.read_text() if path.exists() else None) in (old, "new" * 50)
            sweep(path.parent)
            assert not path.parent.exists() or os.listdir(path.parent) in ([], ["x.json"])


def test_a_new_file_never_replaces_another(tmp_path, replacing):
    write_new_file(tmp_path / "x", "first")
    with pytest.raises(FileExistsError):
        write_new_file(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("how", KILLS)
def test_a_removal_that_is_killed_leaves_all_or_nothing_to_see(place, how):
    folder = place()
    for at in each_call(lambda: remove_folder(folder)):
        place()
        in_child(lambda: remove_folder(folder), Fault(how, at))
        version = version_in(folder)
        assert version in (0, 1)
        sweep(folder.parent)
        assert version_in(folder) == version, "what was removed does not come back"
        assert len(os.listdir(folder.parent)) == version


def rotate(parent: Path, step: int) -> None:
    """A save with rotation: the new one first, then the old one goes."""
    save(parent / f"step_{step}", step)
    for old in sorted(parent.glob("step_*"))[:-1]:
        remove_folder(old)


@pytest.mark.parametrize("how", [*KILLS, *REFUSALS])
def test_rotation_keeps_the_old_one_until_the_new_one_is_whole(tmp_path, how):
    parent = tmp_path / "checkpoints"

    def place() -> None:
        shutil.rmtree(parent, ignore_errors=True)
        save(parent / "step_1", 1)

    place()
    for at in each_call(lambda: rotate(parent, 2)):
        place()
        in_child(lambda: rotate(parent, 2), Fault(how, at, lasting=True))
        versions = [version_in(path) for path in parent.glob("step_*")]
        assert versions
        assert set(versions) <= {1, 2}
        sweep(parent)
        rotate(parent, 3)
        assert os.listdir(parent) == ["step_3"]


def test_a_full_disk(small_disk):
    folder = small_disk / "x"
    save(folder, 1, size=400_000)
    assert in_child(lambda: save(folder, 2, size=2_000_000)) == 1
    assert version_in(folder, size=400_000) == 1
    assert os.listdir(small_disk) == ["x"]
    save(folder, 2, size=500_000)  # there is room for one more of these
    assert version_in(folder, size=500_000) == 2


def test_a_limit_on_the_size_of_files(tmp_path, capfd):
    folder = tmp_path / "x"
    save(folder, 1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(folder, 2, size=200_000)

    assert in_child(limited) == 1, capfd.readouterr().err
    assert version_in(folder) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, replacing):
    save(tmp_path / "elsewhere", 1)
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "x", 2)
    assert (version_in(tmp_path / "elsewhere"), version_in(tmp_path / "x")) == (1, 2)
    assert not (tmp_path / "x").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "x"]


def test_names_with_brackets_are_swept_too(tmp_path):
    (tmp_path / ".a[1].tmp-host-7").mkdir()
    (tmp_path / ".a[1].json.tmp-host-7").touch()
    sweep_beside(tmp_path / "a[1]")
    sweep_beside(tmp_path / "a[1].json")
    assert os.listdir(tmp_path) == []


def test_scratch_of_the_killed_goes_and_that_of_the_living_stays(tmp_path):
    def killed() -> None:
        with scratch_folder(tmp_path) as folder:
            (folder / "half").write_bytes(b"1")
            os.kill(os.getpid(), 9)

    assert in_child(killed) == -9
    assert len(os.listdir(tmp_path)) == 1
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        assert first.is_dir()
        assert len(os.listdir(tmp_path)) == 2
        assert second.is_dir()
    assert os.listdir(tmp_path) == []


# --- loss of power ------------------------------------------------------------------------------------------


def write_plainly(folder: Path, version: int) -> None:
    with write_folder(folder) as temporary:
        (temporary / "sub").mkdir()
        for name in ("a.bin", "sub/b.bin"):
            with foreign_write(temporary / name):
                (temporary / name).write_bytes(bytes([version]) * 100)


def everything(parent: Path) -> list[list[Event]]:
    """The events of all that the door does: folders made, replaced and removed, files made, replaced and removed."""
    works = [
        lambda: write_plainly(parent / "deep" / "x", 1),
        lambda: write_plainly(parent / "deep" / "x", 2),
        lambda: write_file(parent / "file", "1"),
        lambda: write_file(parent / "file", "2"),
        lambda: write_new_file(parent / "new", "1"),
        lambda: open_log(parent / "log").close(),
        lambda: remove_folder(parent / "deep" / "x"),
    ]
    return [recorded(work) for work in works]


def test_a_loss_of_power_tears_nothing(tmp_path, replacing):
    traces = everything(tmp_path / replacing)
    assert [losses(events) for events in traces] == [[]] * len(traces)
    kinds = {event.what for events in traces for event in events}
    assert ("exchange" in kinds) == (replacing == "exchange")


def test_every_fsync_is_needed(tmp_path, replacing):
    """The check can fail: without any one of the door's fsyncs it finds something."""
    tried = 0
    for events in everything(tmp_path / replacing):
        for number, event in enumerate(events):
            if event.what == "fsync":
                tried += 1
                assert losses([*events[:number], *events[number + 1 :]]), f"not needed: {event}"
    assert tried > 20


@pytest.mark.parametrize("broken", ["no fsync", "renamed too early", "manifest first"])
def test_a_broken_door_is_found(tmp_path, monkeypatch, broken):
    from llmkit.durable import writing

    def manifest_first(temporary, facts):
        write_file(temporary / "manifest.json", "{}")
        complete(temporary, facts)
        (temporary / "late").touch()
        with foreign_write(temporary / "late"):
            pass
        calls.sync_path(temporary / "late")
        calls.sync_path(temporary)

    complete = writing._complete
    if broken == "no fsync":
        monkeypatch.setattr(calls, "sync_path", lambda path: None)
    elif broken == "renamed too early":
        monkeypatch.setattr(writing, "_complete", lambda temporary, facts: None)
    else:
        monkeypatch.setattr(writing, "_complete", manifest_first)
    assert losses(recorded(lambda: save(tmp_path / "x", 1)))


# --- strace, which knows nothing of the door's fail points ---------------------------------------------------


@pytest.fixture(scope="module")
def strace():
    reason = without_strace()
    if reason:
        pytest.skip(reason)


def traced(work, out: Path) -> str:
    assert under_strace(work, "-y", "-s", "4", "-e", f"trace={CHANGING}", "-o", str(out)) == 0
    return out.read_text()


def test_strace_sees_that_a_loss_of_power_tears_nothing(strace, tmp_path, tmp_path_factory, replacing):
    folder, out = tmp_path / "x", tmp_path_factory.mktemp("trace") / "trace"
    write_plainly(folder, 1)
    events = read_strace(traced(lambda: write_plainly(folder, 2), out))
    assert losses(events) == []
    # Every call of the door has passed a fail point, and every fail point stands for a call.
    told = recorded(lambda: write_plainly(folder, 3))
    for kind in ("fsync", "rename", "exchange"):
        assert sum(e.what == kind for e in events) == sum(e.what == kind for e in told), kind
    for number in [n for n, event in enumerate(events) if event.what == "fsync"]:
        assert losses([*events[:number], *events[number + 1 :]])


def test_killed_by_strace_at_every_call_old_or_new_is_whole(strace, place, tmp_path_factory):
    folder = place()
    text = traced(lambda: save(folder, 2), tmp_path_factory.mktemp("trace") / "trace")
    counts = Counter(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))
    assert counts["fsync"] > 8
    seen = set()
    for call, count in counts.items():
        for number in range(1, count + 1):
            place()
            inject = f"inject={call}:signal=KILL:when={number}"
            assert under_strace(lambda: save(folder, 2), "-e", f"trace={call}", "-e", inject) == -9
            seen.add(version_in(folder))
            check_next_writer(folder)
    assert seen == {1, 2}


def test_half_a_folder_is_not_taken_for_whole(tmp_path):
    """The oracle of this file can fail."""
    save(tmp_path / "x", 1)
    (tmp_path / "x" / "a.bin").write_bytes(b"")
    with pytest.raises(CorruptError):
        version_in(tmp_path / "x")
    save(tmp_path / "x", 1)
    with pytest.raises(LlmkitError), failing(Fault("EIO", 1)):
        save(tmp_path / "x", 2)
