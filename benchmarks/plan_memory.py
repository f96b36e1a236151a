"""What a plan says of memory against what a run held: one process a cell, whole runs of a few steps on CPU.

    python -m benchmarks.plan_memory [--cells narrow-fp32,wide-bf16,...] [--limit 0.1]

Each cell is `llmkit pretrain` or `llmkit finetune` of a few steps in a process of its own, with the model, context,
micro-batch, precision, attention and share of weights that its name says; the peak of its resident memory (what the
kernel counted, `ru_maxrss`) is compared with `memory.total` of the plan that the run itself made. Prints one JSON line
a cell and a table; fails when a cell is further off than `--limit`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
"""About 30 M weights."""
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
DEEP = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 6}


def _text(
    model: dict[str, int], context: int, micro: int, *, vocab: int = 4000, **machine: Any
) -> dict[str, Any]:
    return {"model": model, "context": context, "micro_batch": micro, "vocab": vocab, "machine": machine}


def _rows(
    model: dict[str, int], context: int, micro: int, task: dict[str, Any], **machine: Any
) -> dict[str, Any]:
    return {**_text(model, context, micro, **machine), "task": task}


_LORA = {"method": "lora", "rank": 8}
_SFT = {"task": "sft", "chat_template": "none", "sft": {"pack": True}}

CELLS: dict[str, dict[str, Any]] = {
    "narrow-fp32": _text(NARROW, 256, 8),
    "narrow-fp32-long": _text(NARROW, 1024, 4),
    "narrow-bf16": _text(NARROW, 256, 16, precision="bf16"),
    "narrow-eager": _text(NARROW, 512, 4, attention="eager"),
    "narrow-eager-bf16": _text(NARROW, 512, 8, attention="eager", precision="bf16"),
    "narrow-large-vocabulary": _text(NARROW, 256, 8, vocab=32000),
    "wide-fp32": _text(WIDE, 256, 4),
    "wide-bf16": _text(WIDE, 256, 8, precision="bf16"),
    "wide-bf16-recomputed": _text(WIDE, 512, 8, precision="bf16", recompute="full"),
    "wide-fp32-selective": _text(WIDE, 512, 4, recompute="selective"),
    "wide-copied": _text(WIDE, 256, 4, background_save=True),
    "deep-fp32": _text(DEEP, 512, 4),
    "deep-bf16": _text(DEEP, 512, 8, precision="bf16"),
    "deep-adafactor": {**_text(DEEP, 256, 4), "optim": {"name": "adafactor"}},
    "tuned-cls": _rows(WIDE, 256, 8, {"task": "cls"}),
    "tuned-cls-bf16": _rows(WIDE, 256, 16, {"task": "cls"}, precision="bf16"),
    "tuned-sft": _rows(WIDE, 256, 8, {**_SFT, "sft": {"pack": False}}),
    "tuned-sft-packed": _rows(WIDE, 256, 8, _SFT),
    "tuned-sft-packed-bf16": _rows(WIDE, 256, 16, _SFT, precision="bf16"),
    "tuned-lora": _rows(WIDE, 256, 16, {**_SFT, "adapter": _LORA}),
    "tuned-lora-bf16": _rows(DEEP, 256, 16, {**_SFT, "adapter": _LORA}, precision="bf16"),
}


MOST_OF_ROWS = 0.40
"""How much too much a plan of fine-tuning may be: it counts micro-batches as full as they may be."""


def main(arguments: list[str] | None = None) -> int:
    """Measure; 0 when every cell was as planned."""
    parser = argparse.ArgumentParser(description="Planned memory against measured memory.")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--limit", type=float, default=0.10)
    given = parser.parse_args(arguments)
    names = given.cells.split(",")
    unknown = sorted(set(names) - set(CELLS))
    if unknown:
        parser.error(f"no such cells: {', '.join(unknown)}; known: {', '.join(CELLS)}")
    with tempfile.TemporaryDirectory() as temporary:
        rows = [measure(name, CELLS[name], Path(temporary)) for name in names]
    print("\n".join(table(rows)))
    return int(not all(is_as_planned(row, given.limit) for row in rows))


MOST_OF_EAGER = 0.16
"""How far off a plan may be with eager attention: peaks of the same run differ by a fifth."""


def is_as_planned(row: dict[str, Any], limit: float = 0.10) -> bool:
    """Whether a plan was near enough: where rows have many lengths it may be too much, but not too little."""
    cell = CELLS[row["cell"]]
    limit = max(limit, MOST_OF_EAGER) if cell["machine"].get("attention") == "eager" else limit
    return bool(-limit < row["off"] < (MOST_OF_ROWS if "task" in cell else limit))


def measure(name: str, cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a few steps in a process of its own; return what was planned and what was held."""
    if "task" in cell:
        report = _run("finetune", tuning_of(name, cell, folder), folder)
    else:
        report = _run("pretrain", recipe_of(name, cell, _corpus(folder)), folder)
    memory, peak = report["plan"]["memory"], report["headline"]["peak_memory_bytes"]
    row = {
        "cell": name,
        "planned": memory["total"],
        "measured": peak,
        "off": memory["total"] / peak - 1,
        "terms": memory,
    }
    print(json.dumps(row), flush=True)
    return row


def _run(verb: str, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report of a run in a process of its own."""
    name = recipe["name"]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "llmkit", verb, str(path), "--runs", str(folder / "runs"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "CI": "1"})
    if done.returncode:
        raise RuntimeError(f"{name}: exit {done.returncode}\n{done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads((folder / "runs" / name / verb / "report.json").read_text())
    return report


def tuning_of(name: str, cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe of a cell that fine-tunes: three steps of several micro-batches, of a model trained for one step."""
    base = f"base-{cell['model']['num_hidden_layers']}"
    if not (folder / "runs" / base).is_dir():
        first = recipe_of(
            base, {**_text(cell["model"], cell["context"], 1), "vocab": cell["vocab"]}, _corpus(folder)
        )
        first["pretrain"]["train"]["length"] = "1 steps"
        _run("pretrain", first, folder)
    micro, task = cell["micro_batch"], cell["task"]
    return {
        "llmkit": 1,
        "name": name,
        "finetune": {
            **task,
            "model": {"name": str(folder / "runs" / base), "context": cell["context"]},
            "data": {"files": str(_labelled(folder))},
            "held_out": 0.1,
            "train": {"length": "3 steps", "batch": f"{8 * micro} samples", "optim": {"warmup": "1 steps"}},
            "eval": {"every": "never"},
        },
        "machine": {**_machine(cell), "micro_batch": micro},
    }


def _labelled(folder: Path) -> Path:
    """Rows of 30 to 250 tokens, with a label and with an answer."""
    place = folder / "rows.jsonl"
    if not place.is_file():
        draw = random.Random(1)
        words = _corpus(folder).read_text().split()[:20_000]
        rows = [
            {
                "text": " ".join(draw.choices(words, k=draw.randint(10, 60))),
                "label": draw.choice(["a", "b"]),
                "prompt": " ".join(draw.choices(words, k=draw.randint(5, 20))),
                "completion": " ".join(draw.choices(words, k=draw.randint(5, 40))),
            }
            for _ in range(600)
        ]
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def recipe_of(name: str, cell: dict[str, Any], corpus: Path) -> dict[str, Any]:
    """The recipe of a cell: two micro-batches a step, three steps."""
    model = {"model_type": "llama", "tie_word_embeddings": True, **cell["model"]}
    return {
        "llmkit": 1,
        "name": name,
        "tokenize": {"vocab_size": cell["vocab"], "data": {"name": "text", "files": str(corpus)}},
        "pretrain": {
            "model": {"config": model, "context": cell["context"]},
            "train": {
                "length": "3 steps",
                "batch": f"{2 * cell['micro_batch']} samples",
                "optim": {"warmup": "1 steps", **cell.get("optim", {})},
            },
            "eval": {"every": "never"},
            "held_out": 0.02,
        },
        "machine": {**_machine(cell), "micro_batch": cell["micro_batch"]},
    }


def _machine(cell: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": "cpu",
        "processes": 1,
        "precision": "fp32",
        "attention": "sdpa",
        "background_save": False,
        "compile": False,
        **cell["machine"],
    }


def _corpus(folder: Path) -> Path:
    """Words that a tokenizer of any size can be learnt from."""
    place = folder / "text.txt"
    if not place.is_file():
        draw = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(draw.choices(letters, k=draw.randint(3, 9))) for _ in range(40_000)]
        lines = (" ".join(draw.choices(words, k=12)) for _ in range(12_000))
        place.write_text("\n\n".join(lines))
    return place


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows for a page of the documentation."""
    head = ["| run | planned | measured | off |", "|---|--:|--:|--:|"]
    each = (
        f"| {row['cell']} | {row['planned'] / 1e6:,.0f} MB | {row['measured'] / 1e6:,.0f} MB | {row['off']:+.1%} |"
        for row in rows
    )
    return [*head, *each]


if __name__ == "__main__":
    sys.exit(main())
