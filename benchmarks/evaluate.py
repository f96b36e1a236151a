"""`llmkit eval --task choice` against lm-evaluation-harness: CPU seconds for the same questions to the same model.

    python -m benchmarks.evaluate --model FOLDER --data FOLDER [--questions 40] [--rounds 3] [--batch 1,4,8,16]
                                  [--precision fp32,bf16] [--threads 1] [--json]

`--data` is a folder of files such as `arc_easy.jsonl`, with rows of `query, choices, gold` or `context, continuation`;
without it and `--model` a tiny model is asked made-up questions, which shows that all works and nothing about speed.
Every contender is a process of its own: the harness once for each batch size, and llmkit. Timed is what begins with
the questions' texts and ends with their log-probabilities, so neither loading the model nor reading the files.
Contenders take turns; a ratio is taken within a round, against the harness at the batch size that was best for the
task. The benchmark fails where accuracies differ, or log-probabilities in fp32 by more than 1e-4.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pretrain import spread

BOUND = 1e-4
TASKS = ("arc_easy", "piqa", "boolq", "lambada_openai")
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
CONTINUATION = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{continuation}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def prepare(folder: Path, data: Path | None, questions: int) -> list[str]:
    """A slice of each file, and the task file that the harness reads it by; the names of the tasks."""
    made = []
    for name in TASKS:
        rows = made_up(name, questions) if data is None else read(data / f"{name}.jsonl", questions)
        if not rows:
            continue
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        form = CONTINUATION if "context" in rows[0] else CHOICE
        (folder / f"{name}.yaml").write_text(form.format(name=f"bench_{name}", file=file))
        made.append(name)
    if not made:
        raise SystemExit(f"{data}: none of {', '.join(f'{name}.jsonl' for name in TASKS)} is there")
    return made


def read(path: Path, questions: int) -> list[dict[str, Any]]:
    """The first rows of a file; questions end as the harness's own tasks end them."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(questions), lines, strict=False)]
    return [{**row, "query": row["query"].strip() + "\nAnswer:"} if "query" in row else row for row in rows]


def made_up(name: str, questions: int) -> list[dict[str, Any]]:
    animals, cities = ("cat", "dog", "bird", "horse", "fish"), ["Oslo", "Rome", "Paris", "Vienna"]
    if name == "lambada_openai":
        return [
            {"context": f"the {animals[n % 5]} number {n} lives", "continuation": "in"}
            for n in range(questions)
        ]
    return [
        {"query": f"Where does the {animals[n % 5]} number {n} live?", "choices": cities, "gold": n % 4}
        for n in range(questions)
    ]


def make_model(folder: Path) -> None:
    """A tiny model, for a run that shows only that all works."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rules = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": len(alphabet)}, merges=[]))
    rules.pre_tokenizer, rules.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<|endoftext|>")  # noqa: S106
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


@contextlib.contextmanager
def clock(found: dict[str, Any]) -> Iterator[None]:
    started = time.process_time()
    yield
    found["cpu_s"] = time.process_time() - started


def ask_llmkit(model: Path, folder: Path, tasks: Sequence[str], precision: str) -> dict[str, Any]:
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.choices import outcome_of, pairs_of, read_questions
    from llmkit.evaluate.model import load_model
    from llmkit.evaluate.requests import Scorer, encode_pairs
    from llmkit.recipe.labelled import Labelled

    tokenizer = load_tokenizer(str(model))
    scorer = Scorer(load_model(model), tokenizer, bf16=precision == "bf16")
    results = {}
    for name in tasks:
        found: dict[str, Any] = {}
        questions = read_questions(Labelled(files=[str(folder / f"{name}.jsonl")]), folder)
        pairs = pairs_of(questions, " ")
        with clock(found):
            answers = scorer.score(encode_pairs(tokenizer, pairs))
        outcome = outcome_of(questions, answers)
        found["accuracy"] = float(outcome.right_N.mean())
        found["likely"] = [answer.loglikelihood for answer in answers]
        results[name] = found
    return results


def ask_harness(
    model: Path, folder: Path, tasks: Sequence[str], precision: str, batch_size: int
) -> dict[str, Any]:
    import logging

    import torch
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.disable(logging.WARNING)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    found: dict[str, Any] = {}

    class Timed(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with clock(found):
                return super().loglikelihood(requests, disable_tqdm=True)

        def get_model_info(self) -> dict[str, Any]:
            return {}  # its own asks the Hub

    words = transformers.AutoTokenizer.from_pretrained(model)
    asked = Timed(pretrained=network, tokenizer=words, batch_size=batch_size, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = {}
    for name in tasks:
        made = simple_evaluate(
            model=asked, tasks=[f"bench_{name}"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        samples = sorted(made["samples"][f"bench_{name}"], key=lambda one: one["doc_id"])
        results[name] = {
            **found,
            "accuracy": made["results"][f"bench_{name}"]["acc,none"],
            "likely": [float(answer[0]) for one in samples for answer in one["filtered_resps"]],
        }
    return results


def contend(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a contender in this process; what it found, by task."""
    who, precision = arguments.contender.split(":")
    tasks = [name for name in TASKS if (arguments.folder / f"{name}.jsonl").is_file()]
    if who == "llmkit":
        results = ask_llmkit(arguments.model, arguments.folder, tasks, precision)
    else:
        results = ask_harness(
            arguments.model, arguments.folder, tasks, precision, int(who.removeprefix("harness-"))
        )
    return {"tasks": results}


def in_process(name: str, folder: Path, model: Path, threads: int) -> dict[str, Any]:
    """One contender in a fresh process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.evaluate", "--contender", name]
    command += ["--folder", str(folder), "--model", str(model)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with exit code {done.returncode}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarise(rounds: Sequence[Mapping[str, Any]], precision: str, ours: str, task: str) -> dict[str, Any]:
    """One task: CPU seconds, ratios within rounds, and how far the answers lie apart."""
    theirs = [name for name in rounds[0] if name.startswith("harness") and name.endswith(precision)]
    seconds = {name: [one[name]["tasks"][task]["cpu_s"] for one in rounds] for name in (*theirs, ours)}
    best = min(theirs, key=lambda name: sorted(seconds[name])[len(rounds) // 2])
    last = rounds[-1]
    expected, found = last[best]["tasks"][task], last[ours]["tasks"][task]
    apart = max(abs(one - other) for one, other in zip(expected["likely"], found["likely"], strict=True))
    return {
        "harness": best.split(":")[0],
        "harness_cpu_s": spread(seconds[best]),
        "llmkit_cpu_s": spread(seconds[ours]),
        "ratio": spread([a / b for a, b in zip(seconds[best], seconds[ours], strict=True)]),
        "accuracy": (expected["accuracy"], found["accuracy"]),
        "largest_difference": apart,
        "requests": len(found["likely"]),
    }


def check(table: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise SystemExit where fp32 answers differ."""
    for task, row in table.items():
        theirs, ours = row["accuracy"]
        if theirs != ours:
            raise SystemExit(f"{task}: accuracy {theirs} by the harness, {ours} by llmkit")
        if row["largest_difference"] > BOUND:
            raise SystemExit(f"{task}: log-probabilities differ by {row['largest_difference']:.1e}")


def print_table(title: str, table: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"{title}: CPU seconds; ratios with their range over the rounds")
    for task, row in table.items():
        ratio, (theirs, ours) = row["ratio"], row["accuracy"]
        print(
            f"  {task:15} {row['requests']:5} requests   {row['harness']} {row['harness_cpu_s']['median']:7.2f}   "
            f"llmkit {row['llmkit_cpu_s']['median']:7.2f}   {ratio['median']:.2f} x "
            f"[{ratio['low']:.2f}-{ratio['high']:.2f}]   accuracy {theirs:.4f} {ours:.4f}   "
            f"largest difference {row['largest_difference']:.1e}"
        )
    both = [sum(row[f"{who}_cpu_s"]["median"] for row in table.values()) for who in ("harness", "llmkit")]
    print(f"  all: {both[0]:.2f} and {both[1]:.2f}: {both[0] / both[1]:.2f} x")


def compete(arguments: argparse.Namespace, folder: Path) -> None:
    model = arguments.model
    if model is None:
        model = folder / "model"
        make_model(model)
    tasks = prepare(folder, arguments.data, arguments.questions)
    precisions = arguments.precision.split(",")
    names = [f"harness-{size}:{one}" for one in precisions for size in arguments.batch.split(",")]
    names += [f"llmkit:{one}" for one in precisions]
    rounds = []
    for number in range(arguments.rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        rounds.append(
            {name: in_process(name, folder, model.absolute(), arguments.threads) for name in turned}
        )
    tables = {
        one: {task: summarise(rounds, one, f"llmkit:{one}", task) for task in tasks} for one in precisions
    }
    if arguments.json:
        print(json.dumps(tables))
    else:
        for one, table in tables.items():
            print_table(one, table)
    if "fp32" in tables:
        check(tables["fp32"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", default="1,4,8,16")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.contender:
        with contextlib.redirect_stdout(sys.stderr):
            found = contend(arguments)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as place:
        compete(arguments, Path(place))


if __name__ == "__main__":
    main()
