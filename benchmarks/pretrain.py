"""`llmkit pretrain` against Hugging Face `Trainer` as run_clm.py uses it: CPU seconds and memory for the same work.

    python -m benchmarks.pretrain [--rounds 5] [--steps 8] [--threads 1] [--json] [--smoke]

Every contender is a process of its own, which trains the same llama from the same weights on the same rows in the
same order with the same AdamW, and prints one JSON line. Each round runs all of them, in rotating order, and ratios
are taken within a round, so that a machine that others use too treats all alike. The benchmark fails when works
differ: first losses that are not equal, last losses that are not close. The first steps (compiling, warming up) are
reported apart.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

# Of one loss to another: at the first step both come from the same weights, but Trainer leaves the last target of each
# row out (511 of 512), and bf16 rounds; at the last step such differences have grown.
FIRST_LOSS_BAND = {"fp32": 0.002, "bf16": 0.005}
LAST_LOSS_BAND = {"fp32": 0.01, "bf16": 0.02}
WARMUP_STEPS = 2
CONTENDERS = ("trainer", "trainer-best", "llmkit", "llmkit-fp32", "llmkit-not-compiled")
BASELINES = ("trainer", "trainer-best")


@dataclass(frozen=True)
class Work:
    """What every contender does."""

    vocab_size: int = 16_384
    hidden_size: int = 384
    layers: int = 8
    heads: int = 6
    inner_size: int = 1024
    rows: int = 8
    context: int = 512
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)

    def recipe(self, steps: int) -> dict[str, Any]:
        model = {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.inner_size,
            "tie_word_embeddings": True,
        }
        # Weight decay is off: which weights it spares is a custom, not work.
        optim = {
            "lr": self.lr,
            "betas": list(self.betas),
            "warmup": "never",
            "schedule": "constant",
            "weight_decay": 0.0,
        }
        return {
            "llmkit": 1,
            "name": "bench",
            "tokenize": {"vocab_size": self.vocab_size},
            "pretrain": {
                "model": {"config": model, "context": self.context},
                "data": {"name": "stdlib", "files": "stdlib:docs"},
                "held_out": 0.0,
                "train": {"length": f"{steps} steps", "batch": f"{self.rows} samples", "optim": optim},
                "checkpoint": {"every": "never"},
                "eval": {"every": "never"},
            },
        }


SMOKE = Work(vocab_size=1024, hidden_size=64, layers=2, heads=2, inner_size=128, rows=4, context=128)


@dataclass
class Clock:
    """CPU and wall time at the start of each step and at the end of the last, and each step's loss."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def tick(self) -> None:
        times = os.times()
        self.cpu.append(times.user + times.system + times.children_user + times.children_system)
        self.wall.append(time.perf_counter())


# --- contenders: each in a process of its own ------------------------------------------------------------------------


def run_llmkit(folder: Path, work: Work, steps: int, machine: dict[str, Any]) -> tuple[Clock, dict[str, Any]]:
    """`llmkit pretrain` itself; only its `train_step` is watched."""
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
    made = pretrain(folder, work, steps, machine)
    plan = json.loads((made / "plan.json").read_text())
    return clock, {name: plan[name] for name in ("precision", "compile", "attention", "micro_batch_size")}


def pretrain(folder: Path, work: Work, steps: int, machine: dict[str, Any]) -> Path:
    """Run the verb on this work; return its run folder."""
    from llmkit.recipe import load_recipe
    from llmkit.report.console import make_reporter
    from llmkit.run import Options
    from llmkit.run import pretrain as verb

    loaded = load_recipe({**work.recipe(steps), "machine": {"device": "cpu", "processes": 1, **machine}})
    reporter = make_reporter(quiet=True)
    try:
        return verb(loaded, Options(runs=folder / "runs", fresh=True, quiet=True), reporter).folder
    finally:
        reporter.close()


def run_trainer(
    folder: Path, work: Work, steps: int, options: dict[str, Any]
) -> tuple[Clock, dict[str, Any]]:
    """Trainer as run_clm.py sets it up: rows with their ids as labels, default collator, default settings."""
    import numpy as np
    import torch
    import transformers
    from datasets import Dataset

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    rows = np.load(folder / "rows.npy").tolist()
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
        "per_device_train_batch_size": work.rows,
        "max_steps": steps,
        "learning_rate": work.lr,
        "adam_beta1": work.betas[0],
        "adam_beta2": work.betas[1],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = transformers.TrainingArguments(**{**common, **options})
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        data_collator=transformers.default_data_collator,
        callbacks=[Watch()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    precision = "bf16" if options.get("bf16") else "fp32"
    return clock, {"precision": precision, "compile": bool(options.get("torch_compile"))}


def prepare(folder: Path, work: Work, steps: int) -> None:
    """Tokenizer and shards, and for Trainer the rows and the weights that llmkit begins with."""
    import numpy as np
    import torch

    from llmkit.recipe import load_recipe
    from llmkit.report.console import make_reporter
    from llmkit.run import Options, tokenize
    from llmkit.train import loop

    reporter = make_reporter(quiet=True)
    tokenize(load_recipe(work.recipe(steps)), Options(runs=folder / "runs", quiet=True), reporter)
    reporter.close()
    rows: list[Any] = []

    def recorded(run: Any, step: int, micro_batches: Any, counts: Any) -> Any:
        if step == 0:
            run.core.model.save_pretrained(folder / "start")
        rows.extend(batch["input_ids"].numpy() for _, batch in micro_batches)
        return loop.Outcome(torch.ones(()), torch.ones(()), torch.ones(()), skipped=False)

    loop.train_step = recorded
    pretrain(folder, work, steps, {"precision": "fp32", "compile": False, "attention": "sdpa"})
    np.save(folder / "rows.npy", np.concatenate(rows))


def contend(name: str, folder: Path, work: Work, steps: int) -> dict[str, Any]:
    """Run a contender in this process; return what it took."""
    import resource

    from llmkit.hardware import detect_cpu

    bf16 = detect_cpu().bf16
    contenders: dict[str, Callable[[], tuple[Clock, dict[str, Any]]]] = {
        "trainer": lambda: run_trainer(folder, work, steps, {}),
        "trainer-best": lambda: run_trainer(folder, work, steps, {"bf16": bf16, "torch_compile": True}),
        "llmkit": lambda: run_llmkit(folder, work, steps, {"compile": True}),
        "llmkit-fp32": lambda: run_llmkit(folder, work, steps, {"compile": True, "precision": "fp32"}),
        "llmkit-not-compiled": lambda: run_llmkit(folder, work, steps, {"compile": False}),
    }
    clock, facts = contenders[name]()
    cpu, wall = ([b - a for a, b in pairwise(t)] for t in (clock.cpu, clock.wall))
    assert len(cpu) == len(clock.losses) == steps, (len(cpu), len(clock.losses), steps)
    return {
        "contender": name,
        "cpu_s": round(statistics.median(cpu[WARMUP_STEPS:]), 4),
        "wall_s": round(statistics.median(wall[WARMUP_STEPS:]), 4),
        "before_cpu_s": round(clock.cpu[WARMUP_STEPS], 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
        "tokens": work.rows * work.context,
        **facts,
    }


# --- the benchmark ---------------------------------------------------------------------------------------------------


def in_process(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender (or `prepare`) in a fresh process; its JSON line."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Compile in the process itself, so that its clock sees it, with a cache that begins empty and is kept.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / name),
    }
    command = [sys.executable, "-m", "benchmarks.pretrain", "--contender", name, "--folder", str(folder)]
    command += ["--steps", str(arguments.steps), *(["--smoke"] if arguments.smoke else [])]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_same_work(results: Sequence[dict[str, Any]]) -> None:
    """Raise SystemExit when a contender did not begin where the first did, or ended elsewhere."""
    reference = results[0]
    for result in results[1:]:
        precision = "bf16" if "bf16" in (result["precision"], reference["precision"]) else "fp32"
        bands = {"first_loss": FIRST_LOSS_BAND[precision], "last_loss": LAST_LOSS_BAND[precision]}
        for key, band in bands.items():
            if abs(result[key] / reference[key] - 1) > band or result["tokens"] != reference["tokens"]:
                raise SystemExit(
                    f"not the same work: {key} of {result['contender']} is {result[key]:.4f}, of "
                    f"{reference['contender']} {reference[key]:.4f}"
                )
        if not result["last_loss"] < result["first_loss"]:
            raise SystemExit(f"{result['contender']} did not learn: {result['last_loss']:.4f}")


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
    }


def summarise(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Per contender: median and range over the rounds, and ratios taken within each round."""
    table: dict[str, Any] = {}
    for name in rounds[0]:
        mine = [a_round[name] for a_round in rounds]
        row: dict[str, Any] = {key: spread([r[key] for r in mine]) for key in ("cpu_s", "wall_s")}
        row["tokens_per_cpu_s"] = round(mine[0]["tokens"] / row["cpu_s"]["median"])
        row["peak_bytes"] = statistics.median(r["peak_bytes"] for r in mine)
        row["before_cpu_s"] = {"cold": mine[0]["before_cpu_s"], "kept": mine[-1]["before_cpu_s"]}
        row["last_loss"] = mine[-1]["last_loss"]
        row["settings"] = {k: mine[-1][k] for k in ("precision", "compile", "attention") if k in mine[-1]}
        for baseline in BASELINES:
            if baseline in rounds[0]:
                row[f"speed_vs_{baseline}"] = spread(
                    [r[baseline]["cpu_s"] / r[name]["cpu_s"] for r in rounds]
                )
                row[f"peak_vs_{baseline}"] = spread(
                    [r[name]["peak_bytes"] / r[baseline]["peak_bytes"] for r in rounds]
                )
        table[name] = row
    return table


def print_table(summary: dict[str, Any]) -> None:
    machine = summary["machine"]
    print(f"{machine['processor']}, bf16 in hardware: {'yes' if machine['bf16'] else 'no'}, ", end="")
    print(f"{summary['threads']} thread(s), {summary['rounds']} rounds of {summary['steps']} steps")
    print("medians; in brackets the range over the rounds\n")
    print(
        f"{'':20} {'CPU s/step':>20} {'x trainer':>18} {'x trainer-best':>18} {'peak GB':>8} {'before, CPU s':>15}"
    )
    for name, row in summary["contenders"].items():
        cells = [_cell(row["cpu_s"]), *(_cell(row.get(f"speed_vs_{b}")) for b in BASELINES)]
        before = f"{row['before_cpu_s']['cold']:.0f} / {row['before_cpu_s']['kept']:.0f}"
        print(
            f"{name:20} {cells[0]:>20} {cells[1]:>18} {cells[2]:>18} {row['peak_bytes'] / 1e9:8.2f} {before:>15}"
        )
    print(
        "\nbefore: from the start of the process to the first measured step, first round / last (kept cache)"
    )


def _cell(value: dict[str, float] | None) -> str:
    return f"{value['median']:.2f} [{value['low']:.2f}-{value['high']:.2f}]" if value else "-"


def chosen(asked: str, *, bf16: bool) -> list[str]:
    """The contenders to run; without bf16 `llmkit` and `llmkit-fp32` would be the same, so it runs once."""
    names = asked.split(",") if asked else list(CONTENDERS)
    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        raise SystemExit(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    return names if bf16 or asked else [name for name in names if name != "llmkit-fp32"]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds; progress goes to stderr."""
    from llmkit.hardware import detect_cpu

    processor = detect_cpu()
    names = chosen(arguments.contenders, bf16=processor.bf16)
    in_process("prepare", folder, arguments)
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(arguments.rounds):
        shift = number % len(names)
        results = {n: in_process(n, folder, arguments) for n in names[shift:] + names[:shift]}
        check_same_work([results[n] for n in names])
        rounds.append({n: results[n] for n in names})
        line = ", ".join(f"{n} {results[n]['cpu_s']:.2f}" for n in names)
        print(f"round {number + 1} of {arguments.rounds}, CPU s a step: {line}", file=sys.stderr, flush=True)
    return {
        "machine": {
            "processor": processor.device_name,
            "cores": processor.cores,
            "bf16": processor.bf16,
            "system": platform.platform(),
        },
        "versions": _versions(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "steps": arguments.steps - WARMUP_STEPS,
        "contenders": summarise(rounds),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("llmkit", "torch", "transformers", "accelerate")}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default 5)")
    parser.add_argument("--steps", type=int, help="measured steps in each run (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender (default 1)")
    parser.add_argument("--contenders", default="", help=f"comma-separated, of {', '.join(CONTENDERS)}")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round: does it work at all?")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/.bench"), help="where it works; removed first"
    )
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.contender:
        return parsed
    if parsed.smoke and not parsed.contenders:
        parsed.contenders = "trainer,llmkit-not-compiled"
    parsed.rounds = parsed.rounds or (1 if parsed.smoke else 5)
    parsed.steps = (parsed.steps or (3 if parsed.smoke else 8)) + WARMUP_STEPS
    return parsed


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    folder = arguments.folder.resolve()
    if arguments.contender:
        work = SMOKE if arguments.smoke else Work()
        if arguments.contender == "prepare":
            prepare(folder, work, arguments.steps)
            print("{}")
        else:
            print(json.dumps(contend(arguments.contender, folder, work, arguments.steps)))
        return 0
    folder = folder / "pretrain"  # only what this benchmark made is removed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    summary = measure(arguments, folder)
    print(json.dumps(summary, indent=2)) if arguments.json else print_table(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
