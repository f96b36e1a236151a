"""What every test can rely on: no network, one thread, no settings of the user; and llmkit as a process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    TPU_SKIP_MDS_QUERY="1",
    PYTHONUTF8="1",
)
for name in (
    "LLMKIT_RUNS",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
):
    os.environ.pop(name, None)

Llmkit = Callable[..., subprocess.CompletedProcess[str]]

TINY_RECIPE = """\
llmkit: 1
name: tiny
tokenize: {vocab_size: 400}
pretrain:
  model: {preset: gpt-tiny, context: 32}
  data: {files: text.txt, documents: line}
  held_out: 5%
  train: {length: 4 steps, batch: 4 samples}
  eval: {every: 2 steps}
  prompts: ["the "]
  sampling: {max_new_tokens: 4}
eval: {}
machine: {compile: false}
"""


@pytest.fixture(scope="session")
def llmkit() -> Llmkit:
    """`llmkit("run", "x.yaml", cwd=...)`: a process of its own, as a person's shell starts it.

    `text` is its stdin, `env` adds to the environment; stdout and stderr are pipes and kept apart.
    """

    def call(
        *words: str, cwd: Path, text: str = "", env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmkit", *words],
            cwd=cwd,
            input=text,
            env=os.environ | (env or {}),
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )

    return call


def write_tiny_project(folder: Path) -> Path:
    """`tiny.yaml` and the 400 lines that it learns from; the whole run takes seconds."""
    lines = [
        f"the {n} small cats sat on mat {n * 7 % 50} and looked at {n * 13 % 90} birds" for n in range(400)
    ]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def tiny_project(tmp_path: Path) -> Path:
    """A fresh folder with a recipe that trains in seconds."""
    return write_tiny_project(tmp_path)
