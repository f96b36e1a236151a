"""Where a run happened: `environment.json`, with secrets masked."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llmkit.durable import write_json
from llmkit.recipe.credentials import masked
from llmkit.report.formatting import jsonable

MASK = "***"
_PACKAGES = (
    "llmkit", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy",
    "pydantic", "ruamel.yaml", "rich", "typer",
)  # fmt: skip
_SECRET_WORDS = {"secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_SECRET_LAST_WORDS = {"token", "key", "auth"}
# Settings of tokenizers end in `token` too and are no secrets; `tokens` never is one.
_TOKENIZER_WORDS = {"bos", "cls", "eos", "mask", "pad", "sep", "special", "unk"}
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def is_secret_name(name: str) -> bool:
    """Whether a flag, setting or environment variable of this name holds a secret."""
    words = re.split(r"[-_.]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip("-")).lower())
    ends = words[-1] in _SECRET_LAST_WORDS and not _TOKENIZER_WORDS.intersection(words)
    return ends or bool(_SECRET_WORDS.intersection(words))


def mask_text(text: str) -> str:
    """`text` with all that has a known secret's form, passwords and signatures in URLs too, replaced by `***`."""
    return masked(_SECRET_VALUE.sub(MASK, text), MASK)


def mask_command(words: Sequence[str]) -> list[str]:
    """A command line without secrets: `--token X`, `--token=X`, `API_KEY=X` and known forms of secrets."""
    masked: list[str] = []
    hide_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        if hide_next and not word.startswith("--"):
            masked.append(MASK)
        elif equals and is_secret_name(name):
            masked.append(f"{name}={MASK}")
        else:
            masked.append(mask_text(word))
        hide_next = not equals and word.startswith("-") and is_secret_name(word)
    return masked


def write_environment(folder: Path, extra: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Write `folder/environment.json`: machine, versions, commit, command, `extra`; secrets masked."""
    facts = {**describe_environment(), **(extra or {})}
    clean = _masked(jsonable(facts))
    write_json(folder / "environment.json", clean)
    return clean


def describe_environment() -> dict[str, Any]:
    """What `environment.json` holds, without importing any of the packages it names."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": _cores(),
        "memory_bytes": _memory_bytes(),
        "packages": _versions(),
        "git_commit": _git_commit(Path.cwd()),
        "command": mask_command([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _masked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _masked(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, name) for item in value]
    if isinstance(value, str):
        return MASK if name and is_secret_name(name) else mask_text(value)
    return value


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # an optional one, or llmkit run from a bare checkout
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _cores() -> int:
    """Cores this process may use, which a container or a job may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system without these names
        return None


def _git_commit(folder: Path) -> str | None:
    """The commit of the current folder's repository, with `+changes` when files differ from it."""
    head = _git(folder, "rev-parse", "HEAD")
    if not head:
        return None
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a repository too big to wait for
        return None
    return done.stdout.strip() if done.returncode == 0 else None
