"""`llmkit compress`: what methods leave of a model, what that costs, and how fast it is against weights in bf16.

    python -m benchmarks.compress [--decoder FOLDER] [--encoder RUN] [--kinds decoder,encoder] [--rounds 5]
                                  [--method M ...] [--threads 1] [--json] [--smoke]

Without `--decoder` and `--encoder` models of usual shapes are made with random weights (SmolLM2-135M's, and MiniLM's
with a head for four classes): times do not depend on what weights say, and the columns of quality then say nothing.
Every method is one `llmkit compress` command. Its CPU seconds hold all that the command does: loading, solving,
writing, running exports in their own runtime, and measuring before and after. Then all models are timed in turn, each
alone in a process, with one row: reading 128 tokens, and of decoders writing 32 more. Ratios are taken within a round
against the model in bf16; float32 is a row of its own, for a processor without instructions for bf16 is slower so.
A method whose command fails is told, the others are measured, and the exit code is 1.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.finetune import Work, make_model, make_rows
from benchmarks.pretrain import spread

if TYPE_CHECKING:
    from llmkit.evaluate.speed import Call, Timed

METHODS = {
    "decoder": (
        "int8",
        "int4,solver=rtn",
        "int4,solver=gptq",
        "prune,what=layers,share=25%",
        "prune,what=channels,share=25%",
        "gguf",
        "gguf,type=q4_0",
        "onnx",
    ),
    "encoder": ("int8", "prune,what=layers,share=50%", "onnx", "onnx,type=int8"),
}
WIDE = {"decoder": "sft", "encoder": "cls"}
SHAPES = {
    "decoder": Work(hidden_size=576, layers=30, heads=9, inner_size=1536, vocab_size=8192, lr=1e-4),
    "encoder": Work(hidden_size=384, layers=6, heads=12, inner_size=1536, vocab_size=8192, lr=1e-4),
}
SMALL = Work(
    hidden_size=64, layers=4, heads=2, inner_size=128, vocab_size=1024, mean=48.0, longest=256, lr=1e-4
)
SMALL_METHODS = {"decoder": ("int8", "prune,what=layers,share=25%"), "encoder": ("onnx",)}
BASELINE = "bf16"


@dataclass(frozen=True)
class Asked:
    """How the benchmark is run."""

    rounds: int
    threads: int
    smoke: bool
    methods: Sequence[str] = ()

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }


def prepare(folder: Path, kind: str, asked: Asked) -> str:
    """A model of a usual shape with random weights: its folder, or of an encoder a run that ended after two steps."""
    from llmkit.recipe import load_recipe
    from llmkit.report.console import make_reporter
    from llmkit.run import Options, finetune, tokenize

    work = SMALL if asked.smoke else SHAPES[kind]
    runs, reporter = folder / "runs", make_reporter(quiet=True)
    options = Options(runs=runs, quiet=True, self_check=False)
    text = {"vocab_size": work.vocab_size, "chat_template": "chatml", "data": {"files": "stdlib:docs"}}
    made = tokenize(load_recipe({"llmkit": 1, "name": "text", "tokenize": text}), options, reporter).folder
    make_model(folder, made / "tokenizer", work, WIDE[kind])
    if kind == "encoder":
        make_rows(folder, work, "cls", 256)
        finetune(load_recipe(work.recipe(folder, "cls", 2)), options, reporter)
    reporter.close()
    return str(folder / "start" if kind == "decoder" else runs / "bench-cls")


def squeeze(model: str, kind: str, method: str, folder: Path, asked: Asked) -> dict[str, Any]:
    """Run one command; its last model, and the CPU seconds that it took; or how it `failed`."""
    command = [sys.executable, "-W", "ignore", "-m", "llmkit", "compress", model, "--method", method]
    command += ["--runs", str(folder / "runs"), "--json", "--fresh", "compress.speed=null"]
    if (Path(model) / "config.json").is_file():  # no run, so nothing says what it learned from
        command += ["--learn", "stdlib:", "--data", "stdlib:docs"]
        command += ["compress.learn.0.limit=300KB", "compress.data.0.limit=40KB"]
        command += ["compress.calibration.rows=16", "compress.calibration.tokens=512"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, env=asked.environment, capture_output=True, text=True, check=False, cwd=folder
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        return {"failed": f"{kind}: {method} failed with exit code {done.returncode}\n{done.stderr[-3000:]}"}
    chain = json.loads(done.stdout)["chain"]
    first, last = chain[0], chain[-1]
    return {
        "folder": last["folder"],
        "first": first["folder"],
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "file_bytes": last["file_bytes"],
        "first_bytes": first["file_bytes"],
        "nats": last["paired"].get("nll_difference"),
        "nats_error": last["paired"].get("error"),
    }


def time_all(made: Mapping[str, dict[str, Any]], kind: str, asked: Asked) -> dict[str, "Timed"]:
    """All models in turn, the first in bf16 and in fp32."""
    from llmkit.evaluate.speed import Contender, time_models
    from llmkit.recipe.evaluation import Speed
    from llmkit.registry import TASKS

    first = Path(next(iter(made.values()))["first"])
    what = TASKS["cls"].model if kind == "encoder" else None
    contenders = [
        Contender(BASELINE, first, half=True, kind=what),
        Contender("fp32", first, kind=what),
        *(
            Contender(method, Path(one["folder"]), half=not is_exported(method), kind=what)
            for method, one in made.items()
        ),
    ]
    settings = Speed(batch=[1], length=[32 if asked.smoke else 128], new_tokens=32, rounds=asked.rounds)
    return {timed.word: timed for timed in time_models(contenders, settings)}


def is_exported(method: str) -> bool:
    return method.startswith(("onnx", "gguf"))


def reading_s(calls: Sequence["Call"]) -> float:
    """Until the rows were read, of the call that was disturbed least."""
    return min(call.seconds if call.first_s is None else call.first_s for call in calls)


def writing_s(calls: Sequence["Call"]) -> float | None:
    """From then on until all was written; None of models that write nothing."""
    found = [call.seconds - call.first_s for call in calls if call.first_s is not None]
    return min(found) if found else None


def summarise(timed: Mapping[str, "Timed"], made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Per model: size and quality as its command said them, and how many times as fast as the baseline it is."""
    table: dict[str, Any] = {}
    (baseline,) = timed[BASELINE].rounds.values()
    for name, one in timed.items():
        (rounds,) = one.rounds.values()
        row: dict[str, Any] = {"read": compared(baseline, rounds, reading_s)}
        if timed[BASELINE].facts["writes"] and one.facts["writes"]:
            row["write"] = compared(baseline, rounds, writing_s)
        if name in made:
            facts = made[name]
            row |= {key: facts[key] for key in ("cpu_s", "nats", "nats_error")}
            row["size"] = facts["file_bytes"] / facts["first_bytes"]
        table[name] = row
    return table


def compared(base: Sequence[Any], own: Sequence[Any], of: Any) -> dict[str, float]:
    return spread([of(theirs) / of(ours) for theirs, ours in zip(base, own, strict=True)])


def print_table(kind: str, table: Mapping[str, Mapping[str, Any]]) -> None:
    print(
        f"{kind}: size against the model's file, nats a target lost, CPU seconds of the command, times as fast as bf16"
    )
    for name, row in table.items():
        if "failed" in row:
            print(f"  {name:30} failed: see above")
            continue
        size = f"{row['size']:6.1%}" if "size" in row else " " * 6
        nats = " " * 16
        if row.get("nats") is not None:
            nats = f"{row['nats']:+.4f} ± {row['nats_error']:.4f}"
        cpu = f"{row['cpu_s']:6.0f} s" if "cpu_s" in row else " " * 8
        print(f"  {name:30} {size}  {nats:17} {cpu}  {_ratio('reading', row['read'])}", end="")
        print(f"  {_ratio('writing', row['write'])}" if "write" in row else "")


def _ratio(word: str, one: Mapping[str, float]) -> str:
    return f"{word} {one['median']:5.2f} x [{one['low']:.2f}-{one['high']:.2f}]"


def contest(kind: str, model: str | None, asked: Asked) -> dict[str, Any]:
    """All methods on one model."""
    methods = asked.methods or (SMALL_METHODS[kind] if asked.smoke else METHODS[kind])
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as place:
        folder = Path(place)
        found = str(Path(model).absolute()) if model else prepare(folder, kind, asked)
        made = {method: squeeze(found, kind, method, folder, asked) for method in methods}
        failed = {method: facts for method, facts in made.items() if "failed" in facts}
        for facts in failed.values():
            print(facts["failed"], file=sys.stderr)
        made = {method: facts for method, facts in made.items() if method not in failed}
        if not made:
            raise SystemExit(f"{kind}: no method could be measured")
        return summarise(time_all(made, kind, asked), made) | failed


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", help="a causal model's folder")
    parser.add_argument("--encoder", help="a run of llmkit finetune --task cls")
    parser.add_argument("--kinds", default="decoder,encoder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--method", action="append", default=[], help="only this one; may stand several times"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args(words)


def main() -> None:
    words = parse()
    asked = Asked(words.rounds, words.threads, words.smoke, words.method)
    os.environ.update(asked.environment)
    table = {}
    for kind in words.kinds.split(","):
        if kind not in METHODS:
            raise SystemExit(f"--kinds {kind}: must be of {', '.join(METHODS)}")
        table[kind] = contest(kind, getattr(words, kind), asked)
        if not words.json:
            print_table(kind, table[kind])
    if words.json:
        print(json.dumps(table))
    if any("failed" in row for rows in table.values() for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
