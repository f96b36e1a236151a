"""No command that only reads, checks or plans may import torch and friends; `--help` starts at once."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "datasets", "accelerate", "pandas", "pyarrow")

# Runs one command in a fresh interpreter, then says which heavy modules it left behind.
PROBE = """
import json, sys
from llmkit.cli import main
code = main(sys.argv[2:])
heavy = sorted(name for name in sys.argv[1].split(",") if name in sys.modules)
print(json.dumps({"code": code, "heavy": heavy}), file=open("probe.json", "w"))
"""


def probe(words: list[str], folder: Path, heavy: tuple[str, ...] = HEAVY) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(heavy), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "probe.json").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["recipe", "check", "tiny.yaml"],
        ["recipe", "show", "tiny.yaml"],
        ["recipe", "schema"],
        ["recipe", "explain", "pretrain.train.length"],
        ["plan", "tiny.yaml"],
        ["plan", "--model", "llama-3.1-70b", "--on", "64xH100,v5p-128"],
        ["run", "tiny.yaml", "--dry-run"],
        ["init", "gpt", "-"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(words: list[str], tiny_project: Path) -> None:
    assert probe(words, tiny_project) == {"code": 0, "heavy": []}


def test_the_probe_sees_an_import(tmp_path: Path) -> None:
    """The check above can fail: the same probe finds a module that every command does import."""
    assert probe(["--help"], tmp_path, heavy=("typer", "torch"))["heavy"] == ["typer"]


def test_a_module_of_the_light_half_imports_nothing_heavy() -> None:
    light = ["cli", "run", "launch", "report", "plan", "recipe", "hardware", "registry", "durable", "errors"]
    code = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module("llmkit." + name)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_starts_at_once() -> None:
    """0.5 s of CPU is the promise and about 0.2 s the fact; 1 s leaves room for slow and busy machines."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "llmkit", "--help"], stdout=subprocess.DEVNULL, check=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_rich_is_not_imported_in_a_pipe(tmp_path: Path) -> None:
    assert probe(["--help"], tmp_path, heavy=("rich",))["heavy"] == []
