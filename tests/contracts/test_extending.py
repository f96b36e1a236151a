"""docs/extending.md, followed to the letter on a copy of the package: a further objective trains and resumes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training import recipe

import llmkit

ROOT = Path(__file__).resolve().parents[2]
T5 = {
    "preset": None,
    "config": {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 2,
    },
    "context": 32,
}


def insert(path, before, text):
    content = path.read_text()
    assert content.count(before) == 1, f"{path}: {before!r} is there {content.count(before)} times"
    path.write_text(content.replace(before, text + before))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder with a copy of llmkit that has one more objective, by the five steps."""
    folder = tmp_path_factory.mktemp("extended")
    package = folder / "llmkit"
    shutil.copytree(Path(llmkit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    file, settings, line = blocks
    (package / "objectives/shuffle.py").write_text(file)
    insert(package / "recipe/objectives.py", "\n\ndef tokens_for(", f"\n\n{settings}")
    schema = package / "recipe/schema.py"
    insert(
        schema,
        '    model: Model = Model()\n    """The network."""',
        '    shuffle: Shuffle = Shuffle()\n    """With `shuffle`."""\n',
    )
    insert(schema, '"clm", ', '"shuffle", ')
    insert(
        schema,
        "from llmkit.recipe.parts import",
        "from llmkit.recipe.objectives import Shuffle\n",
    )
    insert(package / "registry.py", '    "clm": Goal(', f"    {line}")
    return folder


def run(folder, tmp_path, *words, **changes):
    changes = {
        "pretrain__objective": "shuffle",
        "pretrain__model": T5,
        "pretrain__train__length": "6 steps",
        **changes,
    }
    path = tmp_path / "shuffle.json"
    path.write_text(json.dumps(recipe(tmp_path, "shuffle", **changes)))
    # -P would hide nothing here: the copy goes before what is installed.
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    full = [sys.executable, "-m", "llmkit", *words, str(path), "--runs", str(tmp_path / "runs")]
    if words[0] == "recipe":
        full = full[:-2]
    return subprocess.run(full, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)


def test_a_ninth_objective_trains(extended, tmp_path):
    done = run(extended, tmp_path, "pretrain")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs/shuffle/pretrain/report.json").read_text())
    assert report["status"] == "done"
    assert 0 < report["final"]["eval/loss"] < 10


def test_its_settings_are_checked_as_all_are(extended, tmp_path):
    wrong = run(extended, tmp_path, "recipe", "check", pretrain__shuffle={"windw": 3})
    assert wrong.returncode == 2
    assert "window" in wrong.stderr
    of_another = run(extended, tmp_path, "recipe", "check", pretrain__mlm={"ratio": 0.3})
    assert of_another.returncode == 2
    assert "mlm" in of_another.stderr


def test_a_decoder_does_not_fit_it(extended, tmp_path):
    llama = recipe(tmp_path)["pretrain"]["model"]
    refused = run(extended, tmp_path, "plan", pretrain__model=llama)
    assert refused.returncode == 2, refused.stderr
    assert "t5" in refused.stderr
