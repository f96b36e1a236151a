"""The usual script for a task, on Hugging Face `Trainer`: what `llmkit finetune` is compared with in docs/results.md.

    python -m benchmarks.examples cls --model M --train train.csv --test test.csv [--epochs 3] [--seed 0] [--lr 5e-5]
    python -m benchmarks.examples tag --model M --train train.conll --test test.conll

Set up as transformers' example scripts are: dynamic padding, AdamW, linear schedule. Prints a JSON line: the metric on
the test rows, CPU seconds of training, samples per CPU second. Rows are read by llmkit, so both see the same.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def rows_of(path: str, task: str) -> Any:
    from llmkit.data.records import read_rows
    from llmkit.recipe.labelled import Labelled

    return read_rows(Labelled(files=[path]), task, base=Path.cwd(), training=False)


def classes(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, Any, Any, Any]:
    import numpy as np
    import transformers

    train, test = rows_of(arguments.train, "cls"), rows_of(arguments.test, "cls")
    number = {label: i for i, label in enumerate(train.labels)}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(number)
    )

    def encoded(rows: Any) -> list[dict[str, Any]]:
        return [
            {**tokenizer(row["text"], truncation=True), "label": number[row["label"]]} for row in rows.rows
        ]

    def measure(predictions: Any) -> dict[str, float]:
        return {"accuracy": float((np.argmax(predictions.predictions, 1) == predictions.label_ids).mean())}

    collator = transformers.DataCollatorWithPadding(tokenizer)
    return model, encoded(train), encoded(test), collator, measure


def tags(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any, Any, Any, Any]:
    import transformers

    from llmkit.metrics.entities import entity_metrics

    train, test = rows_of(arguments.train, "tag"), rows_of(arguments.test, "tag")
    labels = list(train.labels)
    number = {label: i for i, label in enumerate(labels)}
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        arguments.model, num_labels=len(number)
    )

    def encoded(rows: Any) -> list[dict[str, Any]]:
        found = []
        for row in rows.rows:
            one = tokenizer(row["tokens"], is_split_into_words=True, truncation=True)
            words, before, targets = one.word_ids(), None, []
            for word in words:
                new = word is not None and word != before
                targets.append(number.get(row["tags"][word], 0) if new else -100)
                before = word
            found.append({**one, "labels": targets})
        return found

    def measure(predictions: Any) -> dict[str, float]:
        said, true = [], []
        for scores, targets in zip(predictions.predictions, predictions.label_ids, strict=True):
            kept = targets != -100
            said.append([labels[i] for i in scores.argmax(1)[kept]])
            true.append([labels[i] for i in targets[kept]])
        return {"f1": entity_metrics(true, said)["f1"]}

    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    return model, encoded(train), encoded(test), collator, measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("cls", "tag"))
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--folder", default="runs/trainer")
    arguments = parser.parse_args()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(arguments.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.model_max_length = min(tokenizer.model_max_length, 512)
    make = {"cls": classes, "tag": tags}[arguments.task]
    model, train, test, collator, measure = make(arguments, tokenizer)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=arguments.folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.lr,
            weight_decay=0.01,
            warmup_steps=0.06,
            seed=arguments.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        ),
        train_dataset=train,
        data_collator=collator,
        compute_metrics=measure,
    )
    start = time.process_time()
    trainer.train()
    cpu = time.process_time() - start
    found = trainer.evaluate(test)
    figures = {name.removeprefix("eval_"): value for name, value in found.items() if isinstance(value, float)}
    print(
        json.dumps(
            {
                "task": arguments.task,
                "seed": arguments.seed,
                **{name: round(value, 4) for name, value in figures.items() if "per_second" not in name},
                "cpu_s": round(cpu, 1),
                "samples_per_cpu_s": round(len(train) * arguments.epochs / cpu, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
