"""`eval.harness`: tasks of lm-evaluation-harness on a model of ours."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from llmkit.errors import MissingError, UsageError
from llmkit.evaluate.measurement import Items, Measurement
from llmkit.metrics.inputs import Floats, Integers
from llmkit.recipe.evaluation import Harness
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.measure.choice import told

_MOST_WARNINGS = 10
_MEANS: Sequence[Callable[[float], float]] = (lambda mean: mean, lambda mean: math.exp(-mean))
"""What figures are made of means: themselves; of log-probabilities, perplexity."""
_BEST = ("acc", "exact_match", "f1")
"""Of a task's figures, the one that tells a better model: the first of these that it has, else its first."""


def measure(subject: Subject, asked: Asked) -> Measurement:
    """Ask a model tasks of lm-evaluation-harness.

    Raises:
        MissingError: The harness is not installed, or a task's data are out of reach.
        UsageError: There is no such task, or the model is of another kind.
        DataError: A task file is wrong.
    """
    if find_spec("lm_eval") is None:
        raise MissingError("these tasks need the package lm-eval", hint='pip install "llmkit[harness]"')
    settings = asked.section.harness
    assert settings is not None
    asked.reporter.phase("eval", "lm-evaluation-harness")
    from llmkit.evaluate.harness import ask, find_tasks, rows_of

    manager, names = find_tasks(settings.tasks, _folder(settings, asked.base))
    model = _model(subject, asked, settings)
    results, said = ask(
        model,
        manager,
        names,
        shots=settings.shots,
        limit=settings.limit,
        chat=settings.chat,
        resamples=asked.section.resamples,
    )
    samples = results.pop("samples", {})
    rows = rows_of(results)
    named = {_name(row): row["value"] for row in rows}
    return Measurement(
        subject=subject.word,
        model=str(subject.place),
        task="harness",
        data=_address(samples),
        figures=named,
        shown=tuple(named),
        best=_best(rows),
        items=_items(samples, rows),
        tables={"tasks": rows},
        settings=_settings(settings, results, subject.precision),
        predictions=[_prediction(task, one) for task in samples for one in samples[task]],
        warnings=[*_cut(model.num_cut, model.num_asked, model.max_length), *said[:_MOST_WARNINGS]],
        files={"harness.json": _plain(results)},
        directions=_directions(results, rows),
    )


def _folder(settings: Harness, base: Path) -> Path | None:
    """The user's task files: from the current folder, else the recipe's."""
    if settings.include is None:
        return None
    here = Path(settings.include)
    return here if here.exists() or here.is_absolute() else base / here


def _model(subject: Subject, asked: Asked, settings: Harness) -> Any:
    from transformers import AutoTokenizer

    from llmkit.evaluate.harness import HarnessModel
    from llmkit.evaluate.model import load_model
    from llmkit.models.build import kind_of

    kind = kind_of(str(subject.place))
    if kind not in ("causal", "seq2seq"):
        raise UsageError(
            f"{subject.place}: the harness asks language models, and this is of the kind `{kind}`",
            hint="give a causal or an encoder-decoder language model",
        )
    return HarnessModel(
        load_model(subject.place, trusted=subject.trust_remote_code),
        AutoTokenizer.from_pretrained(subject.place, trust_remote_code=subject.trust_remote_code),
        device=asked.device,
        native=settings.backend == "native",
        bf16=subject.precision == "bf16",
        told=told(asked, None),
    )


def _cut(num_cut: int, num_asked: int, longest: int) -> list[str]:
    said = f"{num_cut:,} of {num_asked:,} requests do not fit the model's {longest:,} tokens; their beginnings were cut"
    return [said] if num_cut else []


def _name(row: Mapping[str, Any]) -> str:
    """`arc_easy/acc`, and the filter behind it where there is one."""
    return "/".join([row["task"], row["metric"], *([row["filter"]] if "filter" in row else [])])


def _directions(
    results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Literal["higher", "lower"]]:
    """Which way each figure is better, where the harness says so."""
    found: dict[str, Literal["higher", "lower"]] = {}
    for row in rows:
        higher = results.get("higher_is_better", {}).get(row["task"], {}).get(row["metric"])
        if isinstance(higher, bool):
            found[_name(row)] = "higher" if higher else "lower"
    return found


def _best(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    first = [row for row in rows if row["task"] == rows[0]["task"]]
    order = [row for metric in _BEST for row in first if row["metric"] == metric]
    return _name((order or first)[0])


def _items(samples: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Items | None:
    """The questions, for figures that are means of what each question gives; others have the harness's error alone."""
    import numpy as np

    keys = [f"{task}:{one['doc_hash']}:{one['filter']}" for task in samples for one in samples[task]]
    columns: dict[str, tuple[Floats, Callable[[float], float]]] = {}
    for row in rows:
        values_N = np.array(
            [
                _value(one, row) if task == row["task"] else np.nan
                for task in samples
                for one in samples[task]
            ],
            dtype=np.float64,
        )
        given = values_N[~np.isnan(values_N)]
        # Which of them it is, the harness does not say: the one that gives its figure.
        made = [
            of for of in _MEANS if len(given) and np.isclose(of(float(given.mean())), row["value"], rtol=1e-9)
        ]
        if made:
            columns[_name(row)] = values_N, made[0]
    if not columns:
        return None

    def figures(drawn: Integers) -> Mapping[str, float]:
        found = {}
        for name, (values_N, of) in columns.items():
            some = values_N[drawn]
            some = some[~np.isnan(some)]
            if len(some):  # a draw may hold no question of a small task; its figures then have no interval
                found[name] = of(float(some.mean()))
        return found

    return Items(keys, figures)


def _value(one: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """What a question gives to a figure; NaN where it has no part in it."""
    value = one.get(row["metric"])
    if one["filter"] != row.get("filter", "none") or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _prediction(task: str, one: Mapping[str, Any]) -> dict[str, Any]:
    """One question, as the harness kept it."""
    said = one.get("filtered_resps")
    line = {
        "place": f"{task}:{one['doc_id']}",
        "input": _plain(one.get("arguments")),
        "target": one.get("target"),
    }
    figures = {name: one[name] for name in one.get("metrics", []) if name in one}
    return _plain({**line, "prediction": said, "score": figures, "filter": one.get("filter")})


def _settings(settings: Harness, results: Mapping[str, Any], precision: str) -> dict[str, Any]:
    return {
        **settings.model_dump(),
        "precision": precision,
        "versions": _plain(results.get("versions", {})),
        "num_shots": _plain(results.get("n-shot", {})),
        "lm_eval": results.get("lm_eval_version", ""),
    }


def _address(samples: Mapping[str, Any]) -> str:
    """What was asked: the hashes that the harness gives its documents."""
    hashes = [[task, *(one["doc_hash"] for one in samples[task])] for task in sorted(samples)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    """As JSON holds it; numpy's numbers as numbers, and what else is no JSON as the text that names it."""
    return json.loads(json.dumps(value, default=_as_json, ensure_ascii=False))


def _as_json(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else str(value)
