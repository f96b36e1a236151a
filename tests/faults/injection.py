"""Faults at the door's own calls, and what a trace of them says about a loss of power.

`Fault` ends the process, raises the system's error or cuts a write at the n-th call that changes the disk, in this
process, in a forked child (`in_child`) or in any Python child of a command (`environment`).
"""

import ctypes
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from llmkit.durable import calls
from llmkit.errors import LlmkitError

KILLS = ("kill-before", "kill-middle", "kill-after")
REFUSALS = ("ENOSPC", "EIO")
_ARMED = Path(__file__).parent / "armed"
_VARIABLE = "LLMKIT_TEST_FAULT"
_ALLOW_TRACER = 0x59616D61  # PR_SET_PTRACER: a process that is no ancestor may attach


@dataclass
class Fault:
    """What happens at call `at` (from 1).

    `how`: a kill before, in the middle of or after it; an error in its place; or `short`, which cuts this write and
    all later ones to three bytes, as the system may at any time. `lasting`: an error stays from there on.
    """

    how: str
    at: int
    lasting: bool = False
    seen: int = 0

    def __call__(self, call: calls.Call) -> int | None:
        if call.when == "before":
            self.seen += 1
        is_here = self.seen == self.at
        if self.how.startswith("kill"):
            return self._kill(call) if is_here else None
        if call.when == "after" or not (is_here or (self.seen > self.at and self.is_lasting)):
            return None
        if self.how == "short":
            return 3 if call.name == "write" else None
        number = getattr(errno, self.how)
        raise OSError(number, os.strerror(number), str(call.path))

    @property
    def is_lasting(self) -> bool:
        return self.lasting or self.how == "short"

    def _kill(self, call: calls.Call) -> int | None:
        if self.how == "kill-middle" and call.when == "before":
            if call.name == "write":
                return 3
            if call.name == "rmtree":
                first = next(path for path in sorted(call.path.rglob("*")) if path.is_file())
                first.unlink()
                _end()
            return None
        if self.how == "kill-middle" and call.name == "foreign":
            _tear(call.path)
        if call.when == self.how.removeprefix("kill-") or (
            self.how == "kill-middle" and call.when == "after" and call.name in ("write", "foreign")
        ):
            _end()
        return None


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _tear(path: Path) -> None:
    """Leave half of a file, as a library's own write that was cut short does."""
    if path.is_dir():
        path = max((inside for inside in path.rglob("*") if inside.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


@contextmanager
def failing(fault: Callable[[calls.Call], int | None]) -> Iterator[None]:
    """Let the door's calls of this process pass through `fault`."""
    calls.fail_point = fault
    try:
        yield
    finally:
        calls.fail_point = None


def in_child(work: Callable[[], object], fault: Callable[[calls.Call], int | None] | None = None) -> int:
    """Do `work` in a forked child: 0, 1 after a clear error, 99 after any other one, or minus the signal it died of."""
    child = os.fork()
    if child == 0:
        calls.fail_point = fault
        os._exit(_code_of(work))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def environment(how: str, at: int, *, rank: int = 0, lasting: bool = False, path: str = "") -> dict[str, str]:
    """Variables under which the worker `rank` of a command meets a fault at its call `at`.

    Args:
        path: Count only calls on paths that hold this text, such as `checkpoints`.
    """
    wanted = {"fault": asdict(Fault(how, at, lasting)), "rank": rank, "path": path}
    return {_VARIABLE: json.dumps(wanted), "PYTHONPATH": str(_ARMED)}


def arm_from_environment() -> None:
    """Called in every Python process under `environment`: arm the one of that rank."""
    wanted = json.loads(os.environ[_VARIABLE])
    if os.environ.get("RANK", "0") != str(wanted["rank"]):
        return
    fault = Fault(**wanted["fault"])
    calls.fail_point = lambda call: fault(call) if wanted["path"] in str(call.path) else None


# --- what a loss of power leaves ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something done to the disk: `write` (also: made, or its mode changed), `mkdir`, `fsync`, `rename`, `exchange`
    or `remove`.
    """

    what: str
    path: str
    target: str = ""


class Recorder:
    """A fail point that lets everything pass and keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, call: calls.Call) -> None:
        names = {
            "open": "write",
            "chmod": "write",
            "foreign": "write",
            "unlink": "remove",
            "rmtree": "remove",
        }
        if call.when == "after":
            what = names.get(call.name, call.name)
            self.events.append(Event(what, str(call.path), str(call.target or "")))


def losses(events: Iterable[Event]) -> list[str]:
    """What a loss of power could tear, if the disk holds for certain only what was fsynced.

    Checked: what is renamed into place is on the disk first, each file and each folder of it, and its manifest was
    written last; the new name is on the disk before what it replaced is removed; in the end everything is, but for
    locks, which are empty or say who holds them.
    """
    disk = _Disk()
    for event in events:
        disk.see(event)
    left = {*disk.content, *disk.names}
    return disk.found + [
        f"{path}: never brought to the disk" for path in sorted(left) if path[-5:] != ".lock"
    ]


class _Disk:
    def __init__(self) -> None:
        self.content: set[str] = set()  # files whose bytes may be in memory alone
        self.names: dict[str, str] = {}  # names that may be in memory alone -> the folder they stand in
        self.replaced: set[str] = set()  # what was published and now waits for removal
        self.last: dict[str, str] = {}  # folder -> what was last written in it
        self.found: list[str] = []

    def see(self, event: Event) -> None:
        getattr(self, f"_{event.what}")(event)

    def _write(self, event: Event) -> None:
        self.content.add(event.path)
        self._name(event.path)
        self.last[os.path.dirname(event.path)] = event.path

    def _mkdir(self, event: Event) -> None:
        self._name(event.path)

    def _name(self, path: str) -> None:
        self.names[path] = os.path.dirname(path)

    def _fsync(self, event: Event) -> None:
        self.content.discard(event.path)
        self.names = {name: folder for name, folder in self.names.items() if folder != event.path}

    def _rename(self, event: Event) -> None:
        if ".tmp-" in os.path.dirname(event.target):  # nothing of this folder is published yet
            self._carry(event)
            return
        self._check_whole(event)
        self._move(event.path, event.target)
        self._name(event.target)
        if os.path.basename(event.target).startswith("."):  # moved away
            self.replaced.add(event.target)
        self.last[os.path.dirname(event.target)] = event.target

    def _carry(self, event: Event) -> None:
        is_open = event.path in self.content
        self._forget(event.path)
        self._name(event.target)
        self.content |= {event.target} if is_open else set()
        self.last[os.path.dirname(event.target)] = event.target

    def _exchange(self, event: Event) -> None:
        self._check_whole(event)
        self._move(event.path, event.target)
        self._name(event.target)
        self.replaced.add(event.path)

    def _remove(self, event: Event) -> None:
        for old in (one for one in self.replaced if _is_in(event.path, one)):
            waiting = [name for name, folder in self.names.items() if folder == os.path.dirname(old)]
            if waiting:
                self.found.append(f"{event.path}: removed before {waiting[0]} is on the disk")
        self._forget(event.path)

    def _check_whole(self, event: Event) -> None:
        for path in sorted(self.content | set(self.names)):
            if path == event.path and path not in self.content:
                continue  # its own name is what changes now
            if _is_in(path, event.path):
                self.found.append(f"{event.target}: published while {path} may be in memory alone")
        manifest = f"{event.path}/manifest.json"
        last = self.last.get(event.path, manifest)
        if last != manifest:
            self.found.append(f"{event.target}: {last} was written after the manifest")

    def _move(self, source: str, target: str) -> None:
        self._forget(source)
        self.replaced.discard(target)

    def _forget(self, path: str) -> None:
        self.content = {one for one in self.content if not _is_in(one, path)}
        self.names = {name: folder for name, folder in self.names.items() if not _is_in(name, path)}
        self.replaced.discard(path)


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


# --- strace, the independent witness ------------------------------------------------------------------------

CHANGING = (
    "openat,open,creat,mkdir,mkdirat,write,pwrite64,writev,ftruncate,fsync,fdatasync,chmod,fchmod,fchmodat,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat,rmdir"
)
"""System calls that change the disk."""


def without_strace() -> str:
    """Why strace cannot be used here; empty when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt install strace)"
    try:
        under_strace(lambda: None)
    except CannotTraceError as error:
        return f"strace may not trace here: {error}"
    return ""


class CannotTraceError(Exception):
    """strace ended before it had attached."""


def under_strace(work: Callable[[], object], *options: str) -> int:
    """Do `work` in a forked child, traced from its first call on; return as `in_child` does.

    strace counts the calls of `inject=...:when=` from there.
    """
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_ALLOW_TRACER, -1, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(_code_of(work))
    os.waitpid(child, os.WUNTRACED)
    command = ["strace", "-f", "-q", "-p", str(child), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as tracer:
        try:
            _wait_for_tracer(child, tracer)
        except CannotTraceError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        os.kill(child, signal.SIGCONT)
        status = os.waitpid(child, 0)[1]
        tracer.communicate(timeout=60)
    return os.waitstatus_to_exitcode(status)


def _code_of(work: Callable[[], object]) -> int:
    try:
        work()
    except LlmkitError:
        return 1
    except BaseException as error:
        sys.stderr.write(f"not a clear error: {error!r}\n")
        sys.stderr.flush()
        return 99
    return 0


def _wait_for_tracer(child: int, tracer: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > end:
            tracer.kill()
            raise CannotTraceError(tracer.communicate()[1].strip()[:200])
        time.sleep(0.002)


def read_strace(text: str) -> list[Event]:
    """The events in the output of `strace -f -y -e trace=CHANGING`; calls that failed are left out."""
    events = []
    for line in _whole_lines(text):
        found = re.match(r"(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)\) += (-?\d+)", line)
        if found and int(found[3]) >= 0:
            events += _events_of(found[1], found[2])
    return events


def _whole_lines(text: str) -> Iterator[str]:
    """Lines with `<unfinished ...>` joined with where they go on."""
    waiting: dict[str, str] = {}
    for line in text.splitlines():
        thread = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            waiting[thread] = line.removesuffix("<unfinished ...>")
        elif resumed := re.search(r"<\.\.\. \w+ resumed>(.*)", line):
            yield waiting.pop(thread) + resumed[1]
        else:
            yield line


def _events_of(call: str, words: str) -> list[Event]:
    open_file = re.match(r"\d+<([^>]*)>", words)
    paths = _paths(words)
    match call:
        case "open" | "openat" | "creat":
            makes = call == "creat" or "O_CREAT" in words or "O_TRUNC" in words
            return [Event("write", paths[0])] if makes else []
        case "write" | "pwrite64" | "writev" | "ftruncate" | "fchmod":
            is_file = open_file is not None and open_file[1].startswith("/")
            return [Event("write", open_file[1])] if is_file and open_file is not None else []
        case "fsync" | "fdatasync":
            return [Event("fsync", open_file[1])] if open_file else []
        case "chmod" | "fchmodat":
            return [Event("write", paths[0])]
        case "mkdir" | "mkdirat":
            return [Event("mkdir", paths[0])]
        case "unlink" | "unlinkat" | "rmdir":
            return [Event("remove", paths[0])]
        case "link" | "linkat":
            return [Event("rename", paths[0], paths[1])]
    return [Event("exchange" if "RENAME_EXCHANGE" in words else "rename", paths[0], paths[1])]


def _paths(words: str) -> list[str]:
    """The names among a call's arguments, each joined with the folder before it."""
    found = []
    for folder, name in re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"([^"]*)"', words):
        found.append(os.path.normpath(os.path.join(folder, name)))
    return found
