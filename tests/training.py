"""Small runs for tests: real text, a tiny model, in this process or through the command line."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from safetensors.numpy import load_file

from llmkit.recipe import load_recipe
from llmkit.report.console import make_reporter
from llmkit.report.run_log import read_metrics

STEPS = 20


def write_corpus(folder):
    """Forty documents of real text (docstrings and sources of the standard library), a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, module in enumerate((json, textwrap, subprocess, inspect)):
        source = inspect.getsource(module)
        for part in range(10):
            (folder / f"{number}-{part}.txt").write_text(
                source[part * 2000 : (part + 1) * 2000] or "more text\n"
            )
    return folder


def recipe(folder, name="tiny", **changes):
    """A recipe for a run of seconds, with dropout; `changes` are dotted keys with `__` for the dots."""
    made = {
        "llmkit": 1,
        "name": name,
        "seed": 7,
        "tokenize": {"vocab_size": 400},
        "pretrain": {
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "tie_word_embeddings": True,
                },
                "context": 32,
                "dropout": 0.1,
            },
            "data": {"name": "text", "files": str(write_corpus(folder / "corpus"))},
            "held_out": 0.1,
            "train": {
                "length": f"{STEPS} steps",
                "batch": "8 samples",
                "optim": {"lr": 1e-2, "warmup": "2 steps"},
            },
            "checkpoint": {"every": "5 steps", "keep": 10},
            "eval": {"every": "10 steps"},
            "prompts": ["def "],
            "sampling": {"max_new_tokens": 8},
        },
        "eval": {},
        "machine": {
            "device": "cpu",
            "precision": "fp32",
            "compile": False,
            "attention": "sdpa",
            "micro_batch": 8,
        },
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = made
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return made


def options(folder, **changes):
    from llmkit.run import Options

    return Options(runs=folder / "runs", quiet=True, **changes)


def pretrain(folder, name="tiny", *, fresh=False, **changes):
    """Train in this process; return the run folder."""
    from llmkit.run import pretrain as verb

    loaded = load_recipe(recipe(folder, name, **changes))
    return verb(loaded, options(folder, fresh=fresh), make_reporter(quiet=True)).folder


def command(folder, name="tiny", *words, env=None, **changes):
    """The command line of the same run, its recipe written to a file."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(recipe(folder, name, **changes)))
    return [sys.executable, "-m", "llmkit", "pretrain", str(path), "--runs", str(folder / "runs"), *words]


def start(words, **env):
    """Start a command in a process group of its own, its words captured."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def losses(folder, key="train/loss"):
    """Step -> loss, from the run's records."""
    return {record["step"]: record[key] for record in read_metrics(Path(folder)) if key in record}


def weights(folder):
    """The exported model's tensors."""
    return load_file(Path(folder) / "model" / "model.safetensors")


def same_bits(a, b):
    """Whether two sets of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
