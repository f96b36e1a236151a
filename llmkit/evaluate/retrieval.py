"""Texts as vectors by a model, kept from one call to the next, and the search for the nearest.

Shape suffixes: N texts, D dimensions, Q queries, M passages, K found passages.

**Source**: Reimers and Gurevych, "Sentence-BERT", 2019, section 3 (pooling); Douze et al., "The Faiss library", 2024.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llmkit.durable import hash_file, verify_folder, write_file, write_folder
from llmkit.errors import CorruptError, MissingError, UsageError
from llmkit.metrics.inputs import Floats, Integers
from llmkit.models.tasks import build_task_model, longest_input
from llmkit.objectives.base import LossModule, Material
from llmkit.objectives.embed import Embedding
from llmkit.objectives.texts import CUT, pad_id
from llmkit.recipe.tasks import Embeddings

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Pooling = Literal["mean", "cls", "last"]

DEPTH = 1000
"""Passages that are kept of each search; one that lies deeper counts as not found."""
NOT_FOUND = 2**62
"""The rank of what was not found."""

_SLACK = 1e-6
"""Cosines closer than this are equal: in float32 they differ by that much with the order of the sums."""
_CELLS = 2**24
_TOKENS_AT_ONCE = 4096
_LONGEST = 512
_VERSION = 1
_POOLINGS: Mapping[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_UNDERSTOOD = ("Transformer", "Pooling", "Normalize")
_KINDS_OF_FILES = (".safetensors", ".txt", ".model", ".spm", ".bpe", ".tiktoken", ".index.json")
_NAMES_OF_FILES = (
    "config.json", "adapter_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip


@dataclass(frozen=True)
class Manner:
    """How a model's vectors are made.

    Attributes:
        pooling: Of which tokens' vectors a text's is.
        query_prefix: What stands before each query.
        passage_prefix: What stands before each passage.
        max_length: Tokens that are read of a text.
        known: Whether the model's folder says how; else it is the usual way.
    """

    pooling: Pooling = "mean"
    query_prefix: str = ""
    passage_prefix: str = ""
    max_length: int = _LONGEST
    known: bool = False


def manner_of(folder: Path, *, pooling: Pooling | None = None, trusted: bool = False) -> Manner:
    """How a model's vectors are made, as its folder says in the files of sentence-transformers; our runs write them.

    Args:
        folder: The model's.
        pooling: Instead of what the folder says.
        trusted: Code that comes with the model may run.

    Raises:
        UsageError: They are made in a way that is not known here.
    """
    longest = longest_input(str(folder), trusted=trusted) or _LONGEST
    modules = _json(folder / "modules.json") or []
    for module in modules:
        kind = str(module["type"]).rpartition(".")[2]
        if kind not in _UNDERSTOOD:
            raise UsageError(
                f"{folder}: the model's vectors pass through a {kind}, which is not known here",
                hint=f"give a model of {', '.join(_UNDERSTOOD)} alone",
            )
    said = _json(folder / "1_Pooling" / "config.json")
    if said is None:
        return Manner(pooling or "mean", max_length=min(longest, _LONGEST), known=pooling is not None)
    prompts = (_json(folder / "config_sentence_transformers.json") or {}).get("prompts") or {}
    limit = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length") or longest
    return Manner(
        pooling or _pooling_of(said, folder),
        str(prompts.get("query", "")),
        str(prompts.get("document", prompts.get("passage", ""))),
        min(int(limit), longest),
        known=True,
    )


def _pooling_of(said: Mapping[str, Any], folder: Path) -> Pooling:
    chosen = [name for name, is_on in said.items() if name.startswith("pooling_mode_") and is_on is True]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise UsageError(
            f"{folder}: the model pools by {', '.join(chosen) or 'nothing'}, which is not known here",
            hint="eval.retrieval.pooling=mean, if that is near enough",
        )
    return _POOLINGS[chosen[0]]


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.is_file() else None


class Encoder:
    """A model that makes vectors.

    Args:
        folder: The model's.
        manner: How its vectors are made.
        device: `cpu`, `cuda` or `mps`.
        bf16: Matrix products in bfloat16.
        trusted: Code that comes with the model may run.

    Raises:
        MissingError: There is no such model.
        UsageError: It makes no vectors.
    """

    def __init__(
        self, folder: Path, manner: Manner, *, device: str, bf16: bool = False, trusted: bool = False
    ) -> None:
        from llmkit.data.tokenizers import load_tokenizer

        self.manner = manner
        self.num_cut = 0
        self._folder, self._device, self._bf16, self._trusted = folder, device, bf16, trusted
        self._tokenizer = load_tokenizer(str(folder))
        model, new = build_task_model(
            str(folder), "encoder", pad_token_id=pad_id(self._tokenizer), trusted=trusted
        )
        missing = [name for name in new if "pooler." not in name]  # no vector is made by one
        if missing:
            raise UsageError(
                f"{folder}: weights are missing: {', '.join(missing[:5])}",
                hint="give a model that was trained to make vectors",
            )
        self._model = model.to(device).eval()

    def vectors(
        self, texts: Sequence[str], prefix: str, *, told: Callable[[int], None] | None = None
    ) -> Vectors:
        """[N, D] at length 1.

        Args:
            texts: What is read.
            prefix: What stands before each.
            told: Told how many were read, batch after batch.
        """
        material = Material(self._tokenizer, self.manner.max_length)
        objective: Any = Embedding(self._settings(prefix), material)
        core = LossModule(self._model, objective, bf16=self._bf16).eval()
        examples = [core.objective.encode({"text": text}) for text in texts]
        self.num_cut = sum(int(example[CUT]) > 0 for example in examples)
        lengths = [int(example["lengths"][0]) for example in examples]
        found: dict[int, Any] = {}
        for rows in _batches(lengths):
            batch = core.objective.collate([{**examples[row]} for row in rows])
            with torch.inference_mode():
                said = core({name: tensor.to(self._device) for name, tensor in batch.items()}).found
            found |= {row: one[0] for row, one in zip(rows, said, strict=True)}
            if told is not None:
                told(len(rows))
        return np.stack([found[row] for row in range(len(texts))]).astype(np.float32)

    def _settings(self, prefix: str) -> Embeddings:
        return Embeddings(pooling=self.manner.pooling, anchor_prefix=prefix)

    def address(self, texts: Sequence[str], prefix: str) -> str:
        """What decides the vectors: the model's files, how they are made, the texts."""
        files = [[str(path.relative_to(self._folder)), hash_file(path)] for path in self._files()]
        content = [
            _VERSION, files, asdict(self.manner), self._bf16, prefix,
            hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _files(self) -> list[Path]:
        """The files of the folder that decide the vectors; reports of a run beside them do not."""
        read = {*_NAMES_OF_FILES, *self._tokenizer.vocab_files_names.values()}
        files = {
            path
            for path in self._folder.iterdir()
            if path.name in read or path.name.startswith("tokenizer") or path.name.endswith(_KINDS_OF_FILES)
        }
        code = self._folder.rglob("*.py") if self._trusted else ()
        return sorted(path for path in files.union(code) if path.is_file())

    def kept_vectors(
        self, texts: Sequence[str], prefix: str, cache: Path, *, told: Callable[[int], None] | None = None
    ) -> tuple[Vectors, bool]:
        """As `vectors`, computed once for a model and texts; and whether they were there already.

        Args:
            texts: What is read.
            prefix: What stands before each.
            cache: The folder that they are kept in; a damaged copy in it is made anew.
            told: As for `vectors`.
        """
        folder = cache / "vectors" / self.address(texts, prefix)[:32]
        if folder.is_dir():
            with suppress(CorruptError):  # what is damaged can be computed again
                self.num_cut = int(verify_folder(folder)["num_cut"])
                return np.load(folder / "vectors.npy", allow_pickle=False), True
        made = self.vectors(texts, prefix, told=told)
        content = io.BytesIO()
        np.lib.format.write_array(content, made, allow_pickle=False)
        with write_folder(folder, facts={"num_cut": self.num_cut}) as temporary:
            write_file(temporary / "vectors.npy", content.getvalue())
        return made, False


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Texts of about one length together, the longest first."""
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if room == 0:
            room = max(1, _TOKENS_AT_ONCE // max(1, lengths[row]))
            batches.append([])
        batches[-1].append(row)
        room -= 1
    return batches


def search(
    queries_QD: Vectors,
    passages_MD: Vectors,
    *,
    index: Literal["numpy", "faiss"] = "numpy",
    depth: int = DEPTH,
) -> tuple[Integers, Floats]:
    """The nearest passages of each query, [Q, K], and their cosines [Q, K], the nearest first; of equal ones the first.

    Args:
        queries_QD: Vectors at length 1.
        passages_MD: Likewise.
        index: What searches.
        depth: K, unless there are fewer passages.

    Raises:
        MissingError: faiss is asked for and not installed.
    """
    depth = min(depth, len(passages_MD))
    find = _by_faiss if index == "faiss" else _by_numpy
    ids_QK, cosines_QK = find(queries_QD, passages_MD, depth)
    order_QK = np.lexsort((ids_QK, -cosines_QK), axis=1)
    return (
        np.take_along_axis(ids_QK, order_QK, axis=1).astype(np.int64),
        np.take_along_axis(cosines_QK, order_QK, axis=1).astype(np.float64),
    )


def _by_numpy(queries_QD: Vectors, passages_MD: Vectors, depth: int) -> tuple[Any, Any]:
    found: list[tuple[Any, Any]] = []
    chunk = max(1, _CELLS // max(1, len(passages_MD)))
    for start in range(0, len(queries_QD), chunk):
        cosines_QM = queries_QD[start : start + chunk] @ passages_MD.T
        ids_QK = np.argpartition(-cosines_QM, depth - 1, axis=1)[:, :depth]
        found.append((ids_QK, np.take_along_axis(cosines_QM, ids_QK, axis=1)))
    return np.concatenate([ids for ids, _ in found]), np.concatenate([cosines for _, cosines in found])


def _by_faiss(queries_QD: Vectors, passages_MD: Vectors, depth: int) -> tuple[Any, Any]:
    try:
        import faiss
    except ImportError as error:
        raise MissingError(
            f"`index: faiss` needs faiss ({error})",
            hint="pip install 'llmkit[faiss]', or eval.retrieval.index=numpy",
        ) from error
    index = faiss.IndexFlatIP(passages_MD.shape[1])
    index.add(np.ascontiguousarray(passages_MD))
    cosines_QK, ids_QK = index.search(np.ascontiguousarray(queries_QD), depth)
    return ids_QK, cosines_QK


def ranks_of(ids_K: Integers, cosines_K: Floats, relevant: Sequence[int]) -> Integers:
    """The ranks of what belongs to a query, from 1, rising; a wrong passage that is as near stands before it.

    Args:
        ids_K: The passages found, the nearest first.
        cosines_K: How near they are.
        relevant: Numbers of the query's passages.
    """
    is_own_K = np.isin(ids_K, np.asarray(relevant))
    best = -np.sort(-cosines_K[is_own_K])
    before = (cosines_K[~is_own_K][None, :] >= best[:, None] - _SLACK).sum(axis=1)
    ranks = before + np.arange(1, len(best) + 1)
    lost = len(set(relevant)) - len(best)
    return np.concatenate([ranks, np.full(lost, NOT_FOUND)]).astype(np.int64)


def first_rank(ids_K: Integers, cosines_K: Floats, is_right: Callable[[int], bool]) -> Integers:
    """The rank of the nearest passage that is right, [1]; a wrong one that is as near stands before it.

    Args:
        ids_K: The passages found, the nearest first.
        cosines_K: How near they are.
        is_right: Asked of each until one is right, and then of those that are as near.
    """
    at = next((place for place, number in enumerate(ids_K.tolist()) if is_right(number)), None)
    if at is None:
        return np.array([NOT_FOUND])
    as_near = ids_K[at:][cosines_K[at:] >= cosines_K[at] - _SLACK].tolist()
    return ranks_of(ids_K, cosines_K, [number for number in as_near if is_right(number)])[:1]


def all_equal(vectors_ND: Vectors) -> bool:
    """Whether every vector is the same: such a model finds nothing."""
    return bool(np.ptp(vectors_ND, axis=0).max() <= _SLACK)
