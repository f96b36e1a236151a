"""Tokenizers: learn a byte-level BPE, load any tokenizer by name or folder, encode documents fast.

What is learnt is an ordinary tokenizer: plain `AutoTokenizer.from_pretrained(folder)` loads it and gives the
same ids.
"""

import hashlib
import heapq
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmkit.data.split import document_hash
from llmkit.errors import DataError, MissingError, RecipeError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

BATCH_CHARS = 1_000_000
"""Text handed to the encoder at once: enough to keep its threads busy, little enough to stay small."""

_HELD_OUT_CHARS = 2_000_000

# Qwen2's pattern, kept to the letter: letters of any script with at most one sign before them (so Han runs
# stay whole between punctuation marks and BPE finds the words in them), digits one by one (a small vocabulary
# has better uses than 1,110 numbers), and llama.cpp knows it, as `qwen2`.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(
    documents: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    sample_bytes: int = 100_000_000,
    folder: Path,
    held_out_below: int = 0,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Learn a byte-level BPE tokenizer and write it into `folder` as AutoTokenizer loads it.

    It learns from a sample that does not depend on the documents' order: documents in the order of a hash of
    their text, as many as fit into `sample_bytes`.

    Args:
        documents: All documents; read once, in bounded memory.
        vocab_size: Entries wanted, special tokens included.
        special_tokens: Further special tokens, after `<|endoftext|>` (end and beginning) and `<|pad|>`.
        sample_bytes: UTF-8 bytes of the sample.
        folder: An existing folder for its files, such as one that `durable.write_folder` gave.
        held_out_below: Documents whose split hash is below this (`split.find_threshold`) are not learnt from
            and serve to measure.
        max_length: The longest input of the model it is made for, if known.

    Returns:
        The figures of `report.json`: `documents`, `bytes`, `chars` learnt from, `vocab_size`,
        `asked_vocab_size`, `seconds`, `note` (empty unless something differs from what was asked), and of the
        held-out text (of the sample where nothing is held out; `measured_on` says which) `bytes_per_token`,
        `chars_per_token`, `round_trip`.

    Raises:
        RecipeError: `vocab_size` is smaller than the byte alphabet and the special tokens.
        DataError: There is no text.
    """
    started = time.perf_counter()
    specials = list(dict.fromkeys([END_OF_TEXT, PAD, *special_tokens]))
    _refuse_small_vocabulary(vocab_size, specials)
    sample, held_out = _choose(documents, sample_bytes, held_out_below)
    tokenizer = _new_bpe()
    tokenizer.train_from_iterator(sample, _trainer(vocab_size, specials))
    _save(tokenizer, specials, folder, max_length)
    made = tokenizer.get_vocab_size()
    return {
        "documents": len(sample),
        "bytes": sum(_num_bytes(text) for text in sample),
        "chars": sum(map(len, sample)),
        "asked_vocab_size": vocab_size,
        "vocab_size": made,
        "note": "" if made == vocab_size else _small_text_note(made, vocab_size),
        "measured_on": "held-out documents" if held_out else "the sample",
        **_measure(load_tokenizer(str(folder)), held_out or sample),
        "seconds": round(time.perf_counter() - started, 3),
    }


def load_tokenizer(name_or_folder: str) -> Any:
    """A tokenizer by folder or Hub name, through AutoTokenizer; never runs code that comes with it.

    Raises:
        MissingError: The folder does not exist, or the Hub cannot be reached and holds no copy here.
        DataError: What is there is no tokenizer we can load.
    """
    from transformers import AutoTokenizer

    folder = Path(name_or_folder).expanduser()
    is_folder = folder.is_dir()
    if not is_folder and (folder.is_absolute() or name_or_folder.startswith((".", "~")) or folder.exists()):
        raise MissingError(
            f"tokenizer {name_or_folder!r}: no such folder",
            hint="make it with `llmkit tokenize RECIPE`, or name another folder or a tokenizer on the Hub",
        )
    where = str(folder) if is_folder else name_or_folder
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except ImportError as error:
        raise MissingError(f"tokenizer {name_or_folder!r} needs a package: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_loaded(name_or_folder, is_folder, error) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files into an existing folder, such as one that `durable.write_folder` gave."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    # transformers 5 renamed the class and still reads the old name, which other programs know.
    if config.get("tokenizer_class") == "TokenizersBackend":
        path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def eos_id(tokenizer: Any) -> int:
    """The id that ends a document.

    Raises:
        DataError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, "
            "so a model could never learn to stop",
            hint='add `"eos_token": "..."` (a token of its vocabulary) to its tokenizer_config.json',
        )
    return int(tokenizer.eos_token_id)


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The ids a model's configuration needs: `bos_token_id`, `eos_token_id` and `pad_token_id`, those there are."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides the tokenizer's ids: vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        # Truncation and padding are a caller's passing wishes, not part of the tokenizer.
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    content = json.dumps([rules, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def token_dtype(tokenizer: Any) -> type[np.uint16] | type[np.uint32]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if _largest_id(tokenizer) < 2**16 else np.uint32


def encode_documents(
    texts: Iterable[str], tokenizer: Any, *, batch_chars: int = BATCH_CHARS
) -> Iterator[tuple[str, npt.NDArray[np.unsignedinteger]]]:
    """Each text with its ids (uint16 or uint32), in order, nothing added.

    Text that spells a special token, such as `<|endoftext|>` in a web page, is encoded as the text it is.
    """
    dtype = token_dtype(tokenizer)
    for batch in _batches(texts, batch_chars):
        for text, ids in zip(batch, _encode_batch(batch, tokenizer), strict=True):
            yield text, np.asarray(ids, dtype=dtype)


def _encode_batch(batch: list[str], tokenizer: Any) -> Iterator[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        yield from tokenizer(batch, **options)["input_ids"]
        return
    # A copy of the settings, put back afterwards: the caller's tokenizer is left as it was given.
    before = (backend.encode_special_tokens, backend.truncation, backend.padding)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
    finally:
        _restore(backend, *before)
    for encoding in encodings:
        yield encoding.ids


def _restore(
    backend: Any, specials: bool, truncation: dict[str, Any] | None, padding: dict[str, Any] | None
) -> None:
    backend.encode_special_tokens = specials
    if truncation:
        backend.enable_truncation(**truncation)
    if padding:
        backend.enable_padding(**padding)


def _batches(texts: Iterable[str], batch_chars: int) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= batch_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _largest_id(tokenizer: Any) -> int:
    # Ids may have holes, and added tokens may lie beyond the vocabulary's count.
    return max(len(tokenizer) - 1, *tokenizer.get_vocab().values())


def _choose(documents: Iterable[str], sample_bytes: int, held_out_below: int) -> tuple[list[str], list[str]]:
    """The documents to learn from and those to measure on, both independent of the order they come in."""
    learn = _SmallestHashes(sample_bytes, "tokenizer")
    measure = _SmallestHashes(_HELD_OUT_CHARS, "measure")
    for text in documents:
        (measure if document_hash(text) < held_out_below else learn).add(text)
    if not learn.texts():
        raise DataError(
            "no text to learn a tokenizer from", hint="check `tokenize.data`, or lower `held_out`"
        )
    return learn.texts(), measure.texts()


class _SmallestHashes:
    """Keeps the documents with the smallest hashes, as many as fit into `limit` bytes.

    The result is the longest beginning of all documents sorted by hash that fits. Once a document was
    refused, so is every one with a larger hash: else a small late one could slip in, and the order would
    matter.
    """

    def __init__(self, limit: int, purpose: str) -> None:
        self._limit = limit
        self._purpose = purpose
        self._heap: list[tuple[int, str]] = []
        self._total = 0
        self._refused_from = 2**64

    def add(self, text: str) -> None:
        text = _clip(text, self._limit)
        hashed = document_hash(text, self._purpose)
        if hashed >= self._refused_from:
            return
        heapq.heappush(self._heap, (-hashed, text))
        self._total += _num_bytes(text)
        while self._total > self._limit:
            largest, gone = heapq.heappop(self._heap)
            self._refused_from = -largest
            self._total -= _num_bytes(gone)

    def texts(self) -> list[str]:
        return [text for _, text in sorted(self._heap, reverse=True)]


def _clip(text: str, limit: int) -> str:
    """The text's beginning that fits into `limit` bytes."""
    if len(text) * 4 <= limit or _num_bytes(text) <= limit:
        return text
    return text.encode()[:limit].decode(errors="ignore")


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _refuse_small_vocabulary(vocab_size: int, specials: Sequence[str]) -> None:
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise RecipeError(
            f"vocab_size {vocab_size} is smaller than the byte alphabet: 256 bytes and "
            f"{len(specials)} special tokens need {smallest}",
            hint="use `vocab_size: 8k`, or more for more text",
        )


def _small_text_note(made: int, asked: int) -> str:
    return (
        f"the text holds {made:,} entries worth learning, fewer than the {asked:,} asked for: made {made:,}"
    )


def _new_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _trainer(vocab_size: int, specials: Sequence[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _save(tokenizer: Tokenizer, specials: Sequence[str], folder: Path, max_length: int | None) -> None:
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any] = {} if max_length is None else {"model_max_length": max_length}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(specials[2:]),
        clean_up_tokenization_spaces=False,
        **options,
    )
    save_tokenizer(wrapped, folder)


def _measure(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    num_tokens, exact = 0, True
    for text, ids in encode_documents(texts, tokenizer):
        num_tokens += len(ids)
        exact = exact and tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    return {
        "bytes_per_token": round(sum(map(_num_bytes, texts)) / max(num_tokens, 1), 4),
        "chars_per_token": round(sum(map(len, texts)) / max(num_tokens, 1), 4),
        "round_trip": exact,
    }


def _not_loaded(name: str, is_folder: bool, error: Exception) -> DataError | MissingError:
    if is_folder:
        return DataError(
            f"{name}: no tokenizer that can be loaded is in this folder ({_first_line(error)})",
            hint="it should hold tokenizer.json and tokenizer_config.json",
        )
    if isinstance(error, OSError):
        return MissingError(
            f"tokenizer {name!r} is neither a folder here nor to be had from the Hub ({_first_line(error)})",
            hint=f"where there is network: hf download {name}",
        )
    return DataError(f"tokenizer {name!r} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
