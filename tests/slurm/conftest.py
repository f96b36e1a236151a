"""One cluster for all tests of this folder; without Slurm they say why they are skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, slurm, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two virtual nodes of a real Slurm on this machine."""
    if reason := why_not():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm") / "cluster") as found:
        yield found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a recipe whose training takes long enough to be interrupted."""
    lines = [
        f"the {n} small cats sat on mat {n * 7 % 50} and looked at {n * 13 % 90} birds" for n in range(400)
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "my.yaml").write_text(RECIPE)
    return tmp_path


RECIPE = """\
llmkit: 1
name: my
tokenize: {vocab_size: 300}
pretrain:
  model: {preset: gpt-tiny, context: 32}
  data: {files: text.txt, documents: line}
  held_out: 5%
  train: {length: 60 steps, batch: 4 samples}
  checkpoint: {every: 5 steps}
  eval: {every: 60 steps}
machine: {compile: false, attention: eager}
"""
