"""Text to ids, by the fastest encoder that gives the very ids of the tokenizer.

`tokenizers`, the library that defines the ids, is always right. `gigatoken` encodes byte-level BPE many times faster;
it is used only after it gave the same ids on texts made to be difficult and on a sample of the corpus itself, and each
part compares some more documents while it encodes.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from llmkit.data.tokenizers.encoding import encode_to
from llmkit.errors import DataError, UsageError

Ids = npt.NDArray[np.unsignedinteger[Any]]
EncodeOne = Callable[[bytes | str], Ids]

PROOF_CHARS = 300_000
"""How much of the corpus is encoded by both before the fast encoder is trusted."""

CHOICE = "LLMKIT_ENCODER"
_NAMES = ("gigatoken", "tokenizers")
_LONGEST_COMPARED = 4000

_DIFFICULT = (
    "",
    " ",
    "\n",
    "a",
    "  leading and trailing  ",
    "tabs\tand\r\nline ends\r\rand\n\n\nmore \n \n",
    "don't DON'T we'LL I'M they'Re 'tis '' ' ",
    "0 12 345 6789 3.14159 1e-10 0x1F ½ ² Ⅷ ٣٤ ๓ 一二三",
    "naïve café e\u0301 A\u030a ﬁ ß İstanbul ıi ǅ",
    "中文，没有空格。“引号”……——《书》 ABC混合123 \u3000全角ＡＢＣ１２３",
    "日本語テキスト ｶﾀｶﾅ 한국어 텍스트 ไทย ภาษาไทย हिन्दी עברית العربية",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈🇨🇳👍🏽 ✂️ ☃",
    "zero\u200bwidth\ufeffmarks\u2060and\u00adsoft\u202ebidi\u202c",
    "\x00\x01\x02\x1f\x7f\x80\x9f\u2028\u2029\x85\x0b\x0c",
    "\ufffd\uffff\U0010ffff\ue000\U000f0000 \U0001d54f𝕏 𠀀𪛖𫝀",
    "<|endoftext|><|pad|> [UNK] [MASK] ## ##a <0x41> ▁ Ġ </s> <s>",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment\n\n\n",
    "https://example.org/path?q=a%20b&c=d#e user@example.org C:\\dir\\file",
    "=" * 200 + "-" * 200 + " " * 200 + "\n" * 50 + "!?" * 50,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 8,
    "的" * 300 + "。" * 100,
)


@dataclass(frozen=True)
class Verdict:
    """Which encoder is used, and why.

    Attributes:
        encoder: `gigatoken` or `tokenizers`.
        version: Of that package.
        reason: Why not a faster one; empty when the fastest is used.
        compared_documents: Documents of the corpus that both encoded.
        compared_bytes: Their UTF-8 bytes.
    """

    encoder: str
    version: str
    reason: str = ""
    compared_documents: int = 0
    compared_bytes: int = 0


def prove(tokenizer: Any, sample: Iterable[str]) -> Verdict:
    """Choose the encoder: the fast one where it gives the same ids on difficult texts and on the sample.

    The environment variable LLMKIT_ENCODER pins one of the two, for comparisons; the proof is asked of it all the same.

    Args:
        tokenizer: What `tokenizers.load_tokenizer` or `open_tokenizer` gives.
        sample: Texts of the corpus, about `PROOF_CHARS` characters of them.

    Raises:
        UsageError: LLMKIT_ENCODER names no encoder, or one that does not give the tokenizer's ids.
    """
    asked = os.environ.get(CHOICE, "")
    if asked and asked not in _NAMES:
        raise UsageError(
            f"{CHOICE}={asked}: there is no such encoder", hint=f"one of {', '.join(_NAMES)}, or unset it"
        )
    if asked == "tokenizers":
        return _slow(f"{CHOICE}=tokenizers asks for it")
    verdict = _try_fast(tokenizer, sample)
    if asked and verdict.encoder != asked:
        raise UsageError(f"{CHOICE}={asked}: {verdict.reason}", hint=f"unset {CHOICE}")
    return verdict


class CheckedEncoder:
    """The chosen encoder, with the reference beside it: of each batch some documents are encoded by both.

    Args:
        tokenizer: The tokenizer.
        name: The encoder that was proved.
        share: The share of the text to compare, 0..1; of each batch at least the beginning of one document is.
    """

    def __init__(self, tokenizer: Any, name: str, share: float = 0.002) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._share = share
        self._fast = _fast_encoder(tokenizer) if name == "gigatoken" else None

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of every text.

        Raises:
            DataError: The fast encoder gave other ids for a document that was compared.
        """
        if self._fast is None:
            return _reference_batch(self._tokenizer, texts)
        self._compare(self._fast, texts)
        return [*map(self._fast, texts)]

    def _compare(self, fast: EncodeOne, texts: Sequence[str]) -> None:
        """Encode some texts by both, or their beginnings; at least one of each batch."""
        room = self._share * sum(map(len, texts))
        chosen: list[str] = []
        # Short documents first: more of them can be compared for the same time.
        for text in sorted(texts, key=lambda text: (len(text), text)):
            chosen.append(text[:_LONGEST_COMPARED])
            room -= len(chosen[-1])
            if room <= 0:
                break
        for text, ids in zip(chosen, _reference_batch(self._tokenizer, chosen), strict=True):
            if not np.array_equal(fast(text), ids):
                raise DataError(
                    f"the fast encoder {self._name} gives other ids than the tokenizer for {text[:80]!r}",
                    hint=f"run it with {CHOICE}=tokenizers, and report the text",
                )


def _slow(reason: str, documents: int = 0, size: int = 0) -> Verdict:
    return Verdict("tokenizers", version("tokenizers"), reason, documents, size)


def _try_fast(tokenizer: Any, sample: Iterable[str]) -> Verdict:
    try:
        fast = _fast_encoder(tokenizer)
    except ImportError:
        return _slow("gigatoken is not installed: pip install 'llmkit[fast]'")
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        return _slow(f"gigatoken does not know this kind of tokenizer ({str(error).splitlines()[0][:100]})")
    texts = [*_DIFFICULT, *sample]
    documents = len(texts) - len(_DIFFICULT)
    size = sum(len(text.encode()) for text in texts[len(_DIFFICULT) :])
    for text, expected in zip(texts, _reference_batch(tokenizer, texts), strict=True):
        if not np.array_equal(fast(text), expected):
            return _slow(f"gigatoken gives other ids for {text[:60]!r}", documents, size)
    return Verdict("gigatoken", version("gigatoken"), "", documents, size)


def _fast_encoder(tokenizer: Any) -> EncodeOne:
    """The rules of the tokenizer in gigatoken, without its added tokens, so that none is found in text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("a tokenizer written in Python")
    return _fast_from(backend.to_str())


@lru_cache(maxsize=2)
def _fast_from(written: str) -> EncodeOne:
    rules = json.loads(written)
    ordinary = [token["content"] for token in rules["added_tokens"] if not token["special"]]
    if rules["model"]["type"] != "BPE":
        raise ValueError(f"model {rules['model']['type']}")
    if ordinary:
        raise ValueError(f"{len(ordinary)} added tokens that are not special, such as {ordinary[0]!r}")
    rules |= {"added_tokens": [], "truncation": None, "padding": None}
    gigatoken = import_module("gigatoken")
    encode: EncodeOne = gigatoken.Tokenizer.from_json(json.dumps(rules)).backend.encode
    return encode


def _reference_batch(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    return [ids for _, ids in encode_to(np.uint32, texts, tokenizer)]
