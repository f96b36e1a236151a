"""The exported model's README.md: a model card as the Hub reads it; what is unknown is left out."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.durable import write_file
from llmkit.recipe.architectures import OWN
from llmkit.registry import ModelKind
from llmkit.report.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_value,
    one_line,
    visible,
)
from llmkit.report.results import index_line, result_of
from llmkit.report.trying import GAP, try_command

Facts = Mapping[str, Any]
_METRICS = (
    ("eval_loss", "loss (nats per token)"),
    ("perplexity", "perplexity (per token)"),
    ("bits_per_byte", "bits per byte"),
)


def write_model_card(model_folder: Path, facts: Facts) -> str:
    """Write `README.md` into the exported model's folder.

    Args:
        model_folder: Where the model is; the card must be there before the folder's manifest is made.
        facts: What `report.collect` gives (`name`, `headline`, `plan`, `data`, `samples`, ...), and,
            all optional: `language` (as `en`; a list is fine), `license` (left out when unknown), `base_model`,
            `tags`, `run` (the run folder as a person would type it).

    Returns:
        The card's text.
    """
    parts = (
        _front_matter(facts),
        f"# {_plain(facts.get('name') or model_folder.name)}",
        _opening(facts),
        _usage(facts),
        _data(facts.get("data") or {}),
        _training(facts),
        _evaluation(facts),
        _example(facts),
        _limits(facts),
    )
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_file(model_folder / "README.md", text.encode("utf-8", "replace"))
    return text


def _front_matter(facts: Facts) -> str:
    """The YAML head. Values are JSON strings, which YAML reads as text: the language `no` stays Norwegian."""
    languages = facts.get("language") or []
    languages = [languages] if isinstance(languages, str) else list(languages)
    tags = ["llmkit", *(facts.get("tags") or [])]
    head: dict[str, str | list[str]] = {
        # The Hub knows languages without their region or script.
        "language": list(dict.fromkeys(str(code).split("-")[0].lower() for code in languages)),
        "license": str(facts.get("license") or ""),
        "library_name": "llmkit" if _is_own(facts) else "transformers",
        "pipeline_tag": _PIPELINES[facts.get("model_kind") or "causal"],
        "base_model": str(facts.get("base_model") or ""),
        "tags": list(dict.fromkeys(map(str, tags))),
    }
    if head["license"] in ("other", "unknown"):
        head["license"] = ""
    lines = [line for key, value in head.items() if value for line in _yaml(key, value)]
    result = result_of({**facts, "pipeline": head["pipeline_tag"]})
    if result is not None and head["pipeline_tag"]:
        lines.append(index_line(str(facts.get("name") or "model"), [result]))
    return "\n".join(["---", *lines, "---"])


def _yaml(key: str, value: str | Sequence[str]) -> list[str]:
    if isinstance(value, str):
        return [f"{key}: {json.dumps(value, ensure_ascii=False)}"]
    return [f"{key}:", *(f"- {json.dumps(item, ensure_ascii=False)}" for item in value)]


def _opening(facts: Facts) -> str:
    plan = facts.get("plan") or {}
    size = f" with {format_count(plan['num_parameters'])} parameters" if plan.get("num_parameters") else ""
    context = f" It reads up to {plan['context']:,} tokens." if isinstance(plan.get("context"), int) else ""
    start = f", trained on from {_code(facts['base_model'])}" if facts.get("base_model") else ""
    return f"A language model{size}{start}, made with llmkit. {_DOES[facts.get('model_kind') or 'causal']}{context}"


def _usage(facts: Facts) -> str:
    run = str(facts.get("run") or "")
    kind: ModelKind = facts.get("model_kind") or "causal"
    folder = f"{run.rstrip('/')}/model" if run else "path/to/this/folder"
    prompts = [str(s["prompt"]) for s in facts.get("samples") or [] if s.get("prompt")]
    lines = _PYTHON[kind](folder, (prompts or ["Once"])[0])
    if _is_own(facts):
        lines = ("import llmkit  # makes the architecture known to transformers", *lines)
    python = "\n".join(lines)
    shell = visible(try_command(kind, run or folder, prompts[:1]).removesuffix(" -n 3"))
    needs = (
        "The architecture is llmkit's own: only programs that import llmkit can read it.\n\n"
        if _is_own(facts)
        else ""
    )
    return f"## How to use\n\n{needs}{_fenced(python, 'python')}\n\nor\n\n{_fenced(shell, 'sh')}"


def _is_own(facts: Facts) -> bool:
    """Whether the architecture is one that transformers has from llmkit."""
    return str((facts.get("model") or {}).get("model_type")) in {own["model_type"] for own in OWN.values()}


def _writing(folder: str, prompt: str, auto_class: str = "AutoModelForCausalLM") -> tuple[str, ...]:
    return (
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f"folder = {folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto_class}.from_pretrained(folder)",
        f'inputs = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)',
        "outputs = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=0.8)",
        "print(tokenizer.decode(outputs[0], skip_special_tokens=True))",
    )


def _answering(folder: str, prompt: str) -> tuple[str, ...]:
    return _writing(folder, prompt, "AutoModelForSeq2SeqLM")


def _filling(folder: str, prompt: str) -> tuple[str, ...]:
    return (
        "from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline",
        "",
        f"folder = {folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForMaskedLM.from_pretrained(folder)",
        'fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)',
        f"text = {prompt!r}",
        f'print(fill(text.replace("{GAP}", tokenizer.mask_token)))',
    )


def _detecting(folder: str, prompt: str) -> tuple[str, ...]:
    return (
        "from transformers import AutoModelForPreTraining, AutoTokenizer",
        "",
        f"folder = {folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForPreTraining.from_pretrained(folder)",
        f'inputs = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)',
        "print(model(**inputs).logits.sigmoid())  # of each token: the probability that it was replaced",
    )


def _judging(pipeline: str, auto_class: str) -> Callable[[str, str], tuple[str, ...]]:
    """Code that loads a model with a head for a task into transformers' pipeline for it."""

    def lines(folder: str, prompt: str) -> tuple[str, ...]:
        asks = pipeline == "question-answering"
        call = f'question="Who?", context={prompt!r}' if asks else repr(prompt)
        return (
            f"from transformers import {auto_class}, AutoTokenizer, pipeline",
            "",
            f"folder = {folder!r}",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = {auto_class}.from_pretrained(folder)",
            f'judge = pipeline("{pipeline}", model=model, tokenizer=tokenizer)',
            f"print(judge({call}))",
        )

    return lines


def _embedding(folder: str, prompt: str) -> tuple[str, ...]:
    return (
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f"folder = {folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModel.from_pretrained(folder)",
        f'inputs = tokenizer([{prompt!r}, "another"], padding=True, return_tensors="pt")',
        'seen = inputs["attention_mask"].unsqueeze(-1)',
        "vectors = (model(**inputs).last_hidden_state * seen).sum(1) / seen.sum(1)",
        "vectors = vectors / vectors.norm(dim=1, keepdim=True)",
        "print(vectors @ vectors.T)",
    )


_PYTHON: Mapping[str, Callable[[str, str], tuple[str, ...]]] = {
    "causal": _writing,
    "seq2seq": _answering,
    "masked": _filling,
    "pairs": _filling,
    "detector": _detecting,
    "sequence": _judging("text-classification", "AutoModelForSequenceClassification"),
    "tokens": _judging("token-classification", "AutoModelForTokenClassification"),
    "answers": _judging("question-answering", "AutoModelForQuestionAnswering"),
    "encoder": _embedding,
}
_PIPELINES = {
    "causal": "text-generation",
    "seq2seq": "text2text-generation",
    "masked": "fill-mask",
    "pairs": "fill-mask",
    "detector": "",
    "sequence": "text-classification",
    "tokens": "token-classification",
    "answers": "question-answering",
    "encoder": "sentence-similarity",
}
_DOES = {
    "causal": "It continues text.",
    "seq2seq": "It writes a text to a text.",
    "masked": "It fills the gaps of a text.",
    "pairs": "It fills the gaps of a text, and says whether one text goes on from another.",
    "detector": "It finds the tokens of a text that were replaced.",
    "sequence": "It judges a text, or a pair of texts.",
    "tokens": "It gives each word of a text a tag.",
    "answers": "It finds where a text answers a question.",
    "encoder": "It turns texts into vectors that are near where the texts belong together.",
}
"""By the kind of model."""


def _data(data: Facts) -> str:
    sources = [s for s in data.get("sources") or data.get("per_source") or [] if isinstance(s, dict)]
    if not sources:
        return ""
    rows = [
        (_plain(s.get("name", "")), *(_known(s, key) for key in ("num_documents", "num_tokens", "num_bytes")))
        for s in sources
    ]
    held_out = data.get("num_held_out_tokens")
    note = f"\n\nHeld out for evaluation: {held_out:,} tokens, by document." if held_out else ""
    return "## Training data\n\n" + _table(("source", "documents", "tokens", "text"), rows) + note


def _training(facts: Facts) -> str:
    top, plan = facts.get("headline") or {}, facts.get("plan") or {}
    versions = (facts.get("environment") or {}).get("packages") or {}
    known = {
        "tokens seen": f"{top['num_tokens']:,.0f}" if "num_tokens" in top else None,
        "optimizer steps": f"{top['num_steps']:,.0f}" if "num_steps" in top else None,
        "tokens a step": f"{plan['tokens_per_step']:,}" if plan.get("tokens_per_step") else None,
        "precision": plan.get("precision"),
        "device": plan.get("device_name") or plan.get("device"),
        "time": format_duration(top["seconds"]) if "seconds" in top else None,
        "peak memory": format_bytes(top["peak_memory_bytes"]) if "peak_memory_bytes" in top else None,
        "software": ", ".join(f"{name} {version}" for name, version in list(versions.items())[:4]),
    }
    rows = [(name, _plain(value)) for name, value in known.items() if value]
    return "## Training\n\n" + _table(("", ""), rows) if rows else ""


def _evaluation(facts: Facts) -> str:
    top = facts.get("headline") or {}
    rows = [(name, format_value(key, top[key])) for key, name in _METRICS if key in top]
    if not rows:
        return ""
    where = (
        "Measured on held-out documents of the training data's own sources, so for text of that kind only."
    )
    return "## Evaluation\n\n" + _table(("metric", "value"), rows) + f"\n\n{where}"


def _example(facts: Facts) -> str:
    samples = facts.get("samples") or []
    if not samples:
        return ""
    prompt, text = (str(samples[-1].get(key, "")) for key in ("prompt", "text"))
    if facts.get("model_kind") in ("masked", "pairs"):
        shown = _fenced(f"{visible(prompt)}\n{visible(text)}", "text")
        return f"## Sample\n\nThe gaps, filled by the model.\n\n{shown}"
    shown = _fenced(visible(prompt + text), "text")
    return f"## Sample\n\nWritten by the model; the prompt comes first.\n\n{shown}"


def _limits(facts: Facts) -> str:
    size = (facts.get("plan") or {}).get("num_parameters") or 0
    small = " It is small: expect form before sense." if 0 < size < 10**9 else ""
    return (
        "## Limits\n\nThe model repeats what its training text holds, errors and prejudices included, and "
        f"states falsehoods as readily as facts.{small} It was not trained to follow instructions or to be "
        "safe, and nothing beyond the figures above was measured."
    )


def _known(source: Facts, key: str) -> str:
    return format_value(key, source[key]) if source.get(key) is not None else "unknown"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: object) -> str:
    """Any text as Markdown that shows it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", one_line(str(value)))


def _code(value: object) -> str:
    return "`" + one_line(str(value)).replace("`", "'") + "`"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in `text`."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
