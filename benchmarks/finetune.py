"""`llmkit finetune` against Hugging Face `Trainer`: rows per CPU second for the same work.

    python -m benchmarks.finetune [--rounds 3] [--steps 48] [--threads 1] [--task sft|cls] [--json] [--smoke]

Every contender is a process of its own, which trains the same model from the same weights with the same AdamW on the
same rows, 32 a step, and prints one JSON line. `trainer` takes the rows in llmkit's order and fills each batch up to
its longest row, as Trainer's collators do; `trainer-grouped` sorts rows by length (`group_by_length`), which is another
order. Lengths are log-normal, 192 tokens on average and 1,024 at most, as conversations are. Ratios are taken within a
round. The benchmark fails when works differ: a first loss that is not equal, or a mean loss that is not close.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.pretrain import Clock, spread

FIRST_LOSS_BAND = 0.002
MEAN_LOSS_BAND = 0.05
CONTENDERS = ("trainer", "trainer-grouped", "llmkit")
BATCH = 32


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    inner_size: int = 704
    vocab_size: int = 8192
    mean: float = 192.0
    longest: int = 1024
    lr: float = 3e-4
    adapter: dict[str, Any] | None = None
    machine: dict[str, Any] = field(
        default_factory=lambda: {"device": "cpu", "processes": 1, "precision": "fp32"}
    )

    def recipe(self, folder: Path, task: str, steps: int) -> dict[str, Any]:
        optim = {"lr": self.lr, "warmup": "never", "schedule": "constant", "weight_decay": 0.0}
        return {
            "llmkit": 1,
            "name": f"bench-{task}",
            "finetune": {
                "task": task,
                "model": {"name": str(folder / "start"), "context": self.longest},
                "data": {"files": str(folder / "rows.jsonl")},
                "validation": {"files": str(folder / "few.jsonl")},
                "train": {"length": f"{steps} steps", "batch": f"{BATCH} samples", "optim": optim},
                "checkpoint": {"every": "never"},
                "eval": {"every": "never"},
                **({"adapter": self.adapter} if self.adapter else {}),
            },
            "machine": self.machine,
        }


SMOKE = Work(hidden_size=64, layers=2, heads=2, inner_size=128, vocab_size=1024, mean=48.0, longest=256)


def prepare(folder: Path, work: Work, task: str, steps: int) -> None:
    """A tokenizer, a model with new weights, rows of many lengths; and for Trainer the rows as llmkit encodes them."""
    from llmkit.recipe import load_recipe
    from llmkit.report.console import make_reporter
    from llmkit.run import Options, tokenize

    reporter = make_reporter(quiet=True)
    text = {
        "llmkit": 1,
        "name": "text",
        "tokenize": {
            "vocab_size": work.vocab_size,
            "chat_template": "chatml",
            "data": {"files": "stdlib:docs"},
        },
    }
    made = tokenize(load_recipe(text), Options(runs=folder / "runs", quiet=True), reporter).folder
    make_model(folder, made / "tokenizer", work, task)
    make_rows(folder, work, task, BATCH * steps)
    reporter.close()
    encode_rows(folder, work, task, steps)


def make_model(folder: Path, tokenizer: Path, work: Work, task: str) -> None:
    import torch
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    shape = {
        "vocab_size": len(words),
        "hidden_size": work.hidden_size,
        "num_hidden_layers": work.layers,
        "num_attention_heads": work.heads,
        "intermediate_size": work.inner_size,
        "max_position_embeddings": work.longest,
        "pad_token_id": words.pad_token_id,
    }
    torch.manual_seed(0)
    if task == "sft":
        config: Any = transformers.LlamaConfig(**shape, eos_token_id=words.eos_token_id)
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4
        )
        model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder / "start")
    words.save_pretrained(folder / "start")


def make_rows(folder: Path, work: Work, task: str, count: int) -> None:
    import numpy as np
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(folder / "start")
    from llmkit.data.sources import read_documents
    from llmkit.recipe.schema import Source

    text = "\n".join(d.text for d in read_documents(Source(files=["stdlib:docs"]), base=Path.cwd()))
    ids = words(text[: 8 * count * int(work.mean)], add_special_tokens=False)["input_ids"]
    draw, at, rows = np.random.default_rng(0), 0, []
    for number in range(count + 8):
        length = int(np.clip(draw.lognormal(np.log(work.mean) - 0.32, 0.8), 16, work.longest - 24))
        piece = words.decode(ids[at : at + length])
        at = (at + length) % (len(ids) - work.longest)
        half = len(piece) // 4 or 1
        if task == "sft":
            rows.append({"prompt": piece[:half] or "a", "completion": piece[half:] or "b"})
        else:
            rows.append({"text": piece or "a", "label": f"class {number % 4}"})
    for name, part in (("rows", rows[:count]), ("few", rows[count:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def encode_rows(folder: Path, work: Work, task: str, steps: int) -> None:
    """What llmkit learns from, row by row in its own order."""
    from llmkit.data.order import RowOrder
    from llmkit.data.samples import Samples
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.objectives.base import Material
    from llmkit.objectives.make import make_task
    from llmkit.recipe import load_recipe
    from llmkit.report.console import make_reporter
    from llmkit.run import Options
    from llmkit.run.rows import prepare_rows

    loaded = load_recipe(work.recipe(folder, task, steps))
    made = prepare_rows(loaded, Options(runs=folder / "runs", quiet=True), make_reporter(quiet=True))
    section = loaded.recipe.finetune
    assert section is not None
    rows = Samples(made.folder, "train")
    material = Material(load_tokenizer(made.tokenizer), made.context, made.labels, facts=made.facts)
    objective = make_task(section, material)
    _, numbers = RowOrder([len(rows)], None, loaded.recipe.seed).locate(range(steps * BATCH))
    encoded = []
    for number in numbers.tolist():
        example = objective.encode({**rows[number], "seed": 0})
        ids, targets = example["input_ids"].tolist(), example["targets"].tolist()
        if task == "sft":  # transformers shifts labels itself
            more = targets[-1:] if targets[-1] != -100 else []  # else nothing is learned there
            encoded.append({"input_ids": [*ids, *more], "labels": [-100, *targets][: len(ids) + len(more)]})
        else:
            encoded.append({"input_ids": ids, "label": targets[0]})
    (folder / "encoded.json").write_text(json.dumps(encoded))


def run_llmkit(folder: Path, work: Work, task: str, steps: int) -> Clock:
    from llmkit.recipe import load_recipe
    from llmkit.report.console import make_reporter
    from llmkit.run import Options, finetune
    from llmkit.train import loop

    clock, train_step = Clock(), loop.train_step

    def watched(run: Any, step: int, micro_batches: Any, counts: Any) -> Any:
        clock.tick()
        outcome = train_step(run, step, micro_batches, counts)
        clock.losses.append(float(outcome.loss))
        if len(clock.losses) == steps:
            clock.tick()
        return outcome

    loop.train_step = watched
    reporter = make_reporter(quiet=True)
    loaded = load_recipe(work.recipe(folder, task, steps))
    finetune(loaded, Options(runs=folder / "runs", fresh=True, quiet=True, self_check=False), reporter)
    reporter.close()
    return clock


def run_trainer(
    folder: Path,
    work: Work,
    task: str,
    steps: int,
    *,
    grouped: bool,
    wrap: Callable[[Any], Any] = lambda model: model,
    **options: Any,
) -> Clock:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    words = transformers.AutoTokenizer.from_pretrained(folder / "start")
    rows = json.loads((folder / "encoded.json").read_text())
    if task == "sft":
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
        collator: Any = transformers.DataCollatorForSeq2Seq(words)
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder / "start", dtype=torch.float32
        )
        collator = transformers.DataCollatorWithPadding(words)
    clock = Clock()

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == steps:
                clock.tick()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    common = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "group_by_length" if grouped else "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = transformers.Trainer(
        model=wrap(model),
        args=transformers.TrainingArguments(**{**common, **options}),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[Watch()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock


def contend(name: str, folder: Path, work: Work, task: str, steps: int) -> dict[str, Any]:
    """Run a contender in this process; return what it took."""
    import resource

    clock = (
        run_llmkit(folder, work, task, steps)
        if name == "llmkit"
        else run_trainer(folder, work, task, steps, grouped=name == "trainer-grouped")
    )
    cpu = [b - a for a, b in pairwise(clock.cpu)]
    assert len(cpu) == len(clock.losses) == steps, (len(cpu), len(clock.losses), steps)
    return {
        "contender": name,
        "cpu_s": round(sum(cpu), 3),
        "rows_per_cpu_s": round(BATCH * steps / sum(cpu), 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_loss": clock.losses[0],
        "mean_loss": statistics.mean(clock.losses),
    }


def in_process(name: str, folder: Path, task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender (or `prepare`) in a fresh process; its JSON line."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.finetune", "--contender", name, "--folder", str(folder)]
    command += ["--task", task, "--steps", str(arguments.steps), *(["--smoke"] if arguments.smoke else [])]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False, cwd=root)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_same_work(results: dict[str, dict[str, Any]]) -> None:
    """Raise SystemExit when the works of a round differ."""
    reference = results["trainer"]
    for name, result in results.items():
        off = abs(result["first_loss"] / reference["first_loss"] - 1)
        if name != "trainer-grouped" and off > FIRST_LOSS_BAND:
            raise SystemExit(f"not the same work: the first loss of {name} is off by {off:.2%}")
        off = abs(result["mean_loss"] / reference["mean_loss"] - 1)
        if off > MEAN_LOSS_BAND:
            raise SystemExit(f"not the same work: the mean loss of {name} is off by {off:.2%}")


def summarise(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Per contender: rows per CPU second, and ratios taken within each round."""
    return {
        name: {
            "rows_per_cpu_s": spread([r[name]["rows_per_cpu_s"] for r in rounds]),
            "peak_bytes": statistics.median(r[name]["peak_bytes"] for r in rounds),
            "mean_loss": rounds[-1][name]["mean_loss"],
            **{
                f"speed_vs_{base}": spread([r[base]["cpu_s"] / r[name]["cpu_s"] for r in rounds])
                for base in CONTENDERS[:2]
            },
        }
        for name in CONTENDERS
    }


def print_table(task: str, table: dict[str, Any]) -> None:
    print(f"{task}: rows per CPU second; ratios with their range over the rounds")
    for name, row in table.items():
        plain, grouped = (row[f"speed_vs_{base}"] for base in CONTENDERS[:2])
        print(
            f"  {name:16} {row['rows_per_cpu_s']['median']:8.1f}   {plain['median']:.2f} x trainer "
            f"[{plain['low']:.2f}-{plain['high']:.2f}]   {grouped['median']:.2f} x grouped "
            f"[{grouped['low']:.2f}-{grouped['high']:.2f}]   {row['peak_bytes'] / 1e9:.2f} GB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--task", choices=("sft", "cls"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--contender")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    work = SMOKE if arguments.smoke else Work()
    if arguments.contender == "prepare":
        prepare(arguments.folder, work, arguments.task, arguments.steps)
        print("{}")
        return
    if arguments.contender:
        print(
            json.dumps(contend(arguments.contender, arguments.folder, work, arguments.task, arguments.steps))
        )
        return
    import tempfile

    found = {}
    for task in [arguments.task] if arguments.task else ["sft", "cls"]:
        with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as place:
            in_process("prepare", Path(place), task, arguments)
            rounds = []
            for number in range(arguments.rounds):
                turned = CONTENDERS[number % 3 :] + CONTENDERS[: number % 3]
                rounds.append({name: in_process(name, Path(place), task, arguments) for name in turned})
                check_same_work(rounds[-1])
            found[task] = summarise(rounds)
        if not arguments.json:
            print_table(task, found[task])
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
