"""A tokenizer as llama.cpp has it: a byte-level BPE, whose way to cut text is one of those that llama.cpp knows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.data.tokenizers.patterns import RUNS
from llmkit.errors import UsageError

_THREES = RUNS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CUTS: Mapping[tuple[str, bool], str] = {
    ("words", False): "gpt-2",
    ("digits words", False): "smollm",
    (RUNS, False): "qwen2",
    (_THREES, True): "llama-bpe",
    (_THREES, False): "smaug-bpe",
}
"""How text is cut, and whether whole words skip the merges -> llama.cpp's name for it."""

NORMAL, CONTROL, OWN, UNUSED = 1, 3, 4, 5
"""Kinds of entries: a piece of text; a mark; a text that is never cut; nothing."""


@dataclass(frozen=True)
class Words:
    """What llama.cpp is told of a tokenizer.

    Attributes:
        pre: Its name for how text is cut.
        entries: All entries in the order of their ids; the bytes of pieces are written as GPT-2 does.
        kinds: What each is.
        merges: Pairs, joined by a blank, the first to be merged first.
        special: Ids by role: `bos`, `eos`, `unk`, `pad`.
        begins: Texts begin with `bos`.
        ends: They end with `eos`.
        template: How conversations become text; empty where nothing says it.
        composes: Text is brought to NFC first, which llama.cpp does not do.
    """

    pre: str
    entries: list[str]
    kinds: list[int]
    merges: list[str]
    special: Mapping[str, int]
    begins: bool
    ends: bool
    template: str
    composes: bool


def words_of(tokenizer: Any, size: int) -> Words:
    """A tokenizer in llama.cpp's terms.

    Args:
        tokenizer: That of transformers.
        size: Rows of the model's embeddings; entries that the tokenizer does not have get names of their own.

    Raises:
        UsageError: llama.cpp has nothing like it.
    """
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    model = known["model"]
    if model["type"] != "BPE":
        raise _unlike(f"its algorithm is {model['type']}")
    texts = {number: text for text, number in model["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for entry in known["added_tokens"]:
        texts[entry["id"]] = entry["content"]
        kinds[entry["id"]] = CONTROL if entry["special"] else OWN
    if max(texts) >= size:
        raise UsageError(
            f"to: gguf: the tokenizer's entry {max(texts):,} has no place among the model's {size:,} embeddings",
            hint="the tokenizer does not belong to this model",
        )
    begins, ends = _frame(tokenizer)
    roles = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Words(
        pre=_CUTS[_cuts(known)],
        entries=[texts.get(number, f"[PAD{number}]") for number in range(size)],
        kinds=[kinds.get(number, UNUSED) for number in range(size)],
        merges=merges,
        special={name: number for name, number in roles.items() if isinstance(number, int)},
        begins=begins,
        ends=ends,
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else "",
        composes=_composes(known["normalizer"]),
    )


def _cuts(known: Mapping[str, Any]) -> tuple[str, bool]:
    """How a tokenizer cuts text, as a key of `_CUTS`."""
    cutter = known["pre_tokenizer"] or {"type": "none"}
    steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    words = " ".join(filter(None, map(_step, steps)))
    found = (words, bool(known["model"].get("ignore_merges")))
    if found not in _CUTS:
        raise _unlike(f"it cuts text by {words[:80]!r}")
    return found


def _step(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", step["pattern"]))
    return str(step["type"])


def _composes(form: Mapping[str, Any] | None) -> bool:
    """Whether text is brought to NFC; any other change of text is refused."""
    steps = [] if form is None else form.get("normalizers", [form])
    others = [step["type"] for step in steps if step["type"] != "NFC"]
    if others:
        raise _unlike(f"it changes text first ({', '.join(others)})")
    return bool(steps)


def _frame(tokenizer: Any) -> tuple[bool, bool]:
    """Whether `bos` stands before a text, and `eos` behind it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins, ends = whole[:1] == [tokenizer.bos_token_id], whole[-1:] == [tokenizer.eos_token_id]
    if whole != [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
        raise _unlike("it puts more around a text than its beginning and its end")
    return begins, ends


def _unlike(why: str) -> UsageError:
    return UsageError(
        f"to: gguf: llama.cpp has no tokenizer like this model's: {why}",
        hint="what works: byte-level BPE cut as GPT-2, SmolLM, Qwen2, Llama 3 and llmkit's own do, unchanged or in NFC",
    )
