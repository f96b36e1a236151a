"""Texts as vectors: those that belong together are near to each other.

An anchor (a question, say) is compared with all documents of the whole step, its own being the right one. Documents
that are the same text as its own, that belong to an equal anchor, or that are the anchor's own text, are no wrong ones.
Pairs with a score are instead compared with their scores.

The comparison needs all vectors of the step at once, and not all fit in memory with their gradients. So they are first
computed without; the loss over all of them gives the gradient of each vector; then each micro-batch is computed again
and takes its vectors' gradients from there. What is learned is that of the whole step in one piece, to rounding.

Shape suffixes: B rows, N rows of the whole step, M documents, T positions, D dimensions.

**Source**: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, section 2.3
(InfoNCE); Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply", 2017, section 4.4 (the
others of a batch as wrong answers); Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", 2021, section 3 (gradients of vectors first); Reimers and Gurevych, "Sentence-BERT", 2019, section 3 (mean
pooling, cosine); Su, "CoSENT", 2022 (the order of scores).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from llmkit.durable import make_folders, write_json
from llmkit.errors import DataError, UsageError
from llmkit.models.heads import Scores
from llmkit.objectives.base import (
    NOT_LEARNED,
    TARGETS,
    Batch,
    Criterion,
    Example,
    Loss,
    Material,
    cross_entropy,
    padded,
)
from llmkit.objectives.detail import Detail
from llmkit.objectives.retrieval import pair_detail, pair_figures, score_figures, scored_detail
from llmkit.objectives.texts import CUT, encode_texts, pad_id
from llmkit.recipe.schema import Finetune
from llmkit.recipe.tasks import Embeddings

if TYPE_CHECKING:  # loader workers import objectives, and this takes them seconds
    from transformers import PreTrainedModel

SHARPNESS = 20.0
"""What CoSENT multiplies differences of cosines by."""
_SIDES = ("anchor", "document")
_SETTLED = "settled_"


def build(section: Finetune, material: Material) -> "Embedding":
    """The task as the recipe wants it.

    Raises:
        UsageError: Labels are to be smoothed, and there are none.
    """
    if section.train.label_smoothing or section.train.z_loss:
        raise UsageError(
            "`embed` compares vectors: it has no labels to smooth and no normaliser to hold",
            hint="leave `train.label_smoothing` and `train.z_loss` out; `embed.temperature` softens the comparison",
        )
    return Embedding(section.embed, material)


class Embedding:
    """The mean over rows of -log p(the row's document | its anchor, all documents of the step).

    Of scored pairs CoSENT or the mean squared difference of cosine and score.
    """

    sums = ()

    def __init__(self, settings: Embeddings, material: Material) -> None:
        self._settings = settings
        self._tokenizer = material.tokenizer
        self._max_length = material.max_length
        self._is_scored = material.facts.get("form") == "scored"
        self.looks_ahead = not (self._is_scored and settings.scored == "cosine")

    def prepare(self, model: "PreTrainedModel") -> None:
        """Leave alone what the vectors do not depend on: a head over the first token, a decoder."""
        used = {id(parameter) for parameter in _body(model).parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) not in used or "pooler." in name:
                parameter.requires_grad_(False)

    def encode(self, row: Mapping[str, Any]) -> Example:
        """All texts of a row in a line: `input_ids`, the `lengths` of each, its `keys`, which equal texts share.

        The first is the anchor, the second its document, then come wrong ones. `targets` [1] says that it is learned;
        `score` [1] is there where the pair has one.

        Args:
            row: `anchor`, `positive`, and `negatives` or a `score`; or a plain `text`.

        Raises:
            DataError: The cosine is to be the score, and the score is none.
        """
        documents = [row["positive"], *row.get("negatives", ())] if "positive" in row else []
        texts = [
            self._settings.anchor_prefix + row.get("anchor", row.get("text")),
            *(self._settings.document_prefix + document for document in documents),
        ]
        made = [encode_texts(self._tokenizer, text, None, self._max_length) for text in texts]
        plain = [row.get("anchor", row.get("text")), *documents]
        example = {
            "input_ids": np.concatenate([one["input_ids"] for one in made]),
            "lengths": np.array([len(one["input_ids"]) for one in made]),
            "keys": np.array([_key(text) for text in plain]),
            "targets": np.array([0 if documents else NOT_LEARNED]),
            CUT: np.asarray(sum(int(one[CUT]) for one in made)),
        }
        return {**example, "score": self._score(row)} if "score" in row else example

    def _score(self, row: Mapping[str, Any]) -> Any:
        score = float(row["score"])
        if self._settings.scored == "cosine" and abs(score) > 1:
            raise DataError(
                f"the score is {score:g}, and no cosine is: they lie between -1 and 1",
                hint="finetune.embed.scored=cosent learns the order of the scores alone, or divide them",
            )
        return np.array([score])

    def size(self, example: Example) -> int:
        """Tokens of all texts of a row, each as long as the longest."""
        return len(example["lengths"]) * int(example["lengths"].max())

    def extents(self, example: Example) -> dict[str, int]:
        """The length of the anchor and of the longest document, and how many documents there are."""
        anchor, *documents = example["lengths"].tolist()
        return {"anchor": anchor, "document": max(documents, default=0), "num_documents": len(documents)}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack anchors to `anchor_ids` [B, T] and documents to `document_ids` [M, T], each with its mask.

        `targets` [B]; `positive` [B], the place of each row's document; `owner` [M], the row of each document.
        """
        texts = [np.split(example["input_ids"], np.cumsum(example["lengths"])[:-1]) for example in examples]
        counts = [len(some) - 1 for some in texts]
        batch = {
            **self._stacked("anchor", [some[0] for some in texts]),
            **self._stacked("document", [one for some in texts for one in some[1:]]),
            "anchor_keys": torch.tensor([int(example["keys"][0]) for example in examples]),
            "document_keys": torch.tensor([int(key) for example in examples for key in example["keys"][1:]]),
            "owner": torch.repeat_interleave(torch.tensor(counts)),
            "positive": torch.tensor([0, *np.cumsum(counts)[:-1].tolist()]),
            "targets": torch.from_numpy(np.concatenate([example["targets"] for example in examples])),
        }
        if "score" in examples[0]:
            batch["score"] = torch.tensor([float(example["score"][0]) for example in examples])
        batch[TARGETS] = (batch["targets"] != NOT_LEARNED).sum()
        return batch

    def _stacked(self, side: str, texts: Sequence[Any]) -> dict[str, torch.Tensor]:
        if not texts:  # texts that are only to be read
            return {}
        rows = [{"ids": ids, "mask": np.ones_like(ids)} for ids in texts]
        stacked = padded(rows, {"ids": pad_id(self._tokenizer), "mask": 0})
        return {f"{side}_{name}": tensor for name, tensor in stacked.items()}

    def loss(self, model: "PreTrainedModel", batch: Batch, criterion: Criterion = cross_entropy) -> Loss:
        """In training the sum over rows; where `settle` looked at the whole step, with the gradient that it found.

        In an evaluation the vectors: the loss there is over all of its rows, whatever its batches; see `measure`.
        """
        seen = self.glimpse(model, batch)
        if not model.training:
            total = torch.zeros((), device=seen["anchor"].device)
            return Loss({TARGETS: total}, found=_of_rows(seen, batch))
        if f"{_SETTLED}loss" not in batch:
            return Loss({TARGETS: sum(self._compare([seen], criterion), seen["anchor"].new_zeros(()))})
        # Its gradient is that of the whole step's loss, its value that of these rows' share.
        toward = sum((seen[side] * batch[_SETTLED + side]).sum() for side in _SIDES)
        assert isinstance(toward, torch.Tensor)
        return Loss({TARGETS: batch[f"{_SETTLED}loss"] + toward - toward.detach()})

    def glimpse(self, model: "PreTrainedModel", batch: Batch) -> dict[str, torch.Tensor]:
        """The vectors of a micro-batch, `anchor` [B, D] and `document` [M, D], and what the comparison goes by."""
        names = ("anchor_keys", "document_keys", "owner", "positive", "targets", "score")
        vectors = {
            side: self._vectors(model, batch[f"{side}_ids"], batch[f"{side}_mask"])
            for side in _SIDES
            if f"{side}_ids" in batch
        }
        return {**vectors, **{name: batch[name] for name in names if name in batch}}

    def _vectors(self, model: "PreTrainedModel", ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """[B, D] at length 1, in float32."""
        body = _body(model)
        more = {"use_cache": False} if body is model and hasattr(model.config, "use_cache") else {}
        hidden_BTD = body(input_ids=ids_BT, attention_mask=mask_BT, **more).last_hidden_state.float()
        if self._settings.pooling == "mean":
            weight_BT1 = mask_BT.unsqueeze(2).to(hidden_BTD.dtype)
            pooled_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)
        elif self._settings.pooling == "cls":
            pooled_BD = hidden_BTD[:, 0]
        else:
            last_B = mask_BT.sum(1) - 1
            pooled_BD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        return functional.normalize(pooled_BD, dim=1)

    def settle(
        self, seen: Sequence[Mapping[str, torch.Tensor]], criterion: Criterion
    ) -> list[dict[str, torch.Tensor]]:
        """The loss of each micro-batch's rows, and the gradient of the whole step's loss for each vector.

        Args:
            seen: What `glimpse` gave of all micro-batches of a step.
            criterion: Makes a loss of scores and targets.
        """
        leaves = [{**one, **{side: one[side].detach().requires_grad_() for side in _SIDES}} for one in seen]
        with torch.enable_grad():
            losses = self._compare(leaves, criterion)
            torch.stack(losses).sum().backward()
        return [
            {
                f"{_SETTLED}loss": loss.detach(),
                **{_SETTLED + side: _gradient(one[side]) for side in _SIDES},
            }
            for one, loss in zip(leaves, losses, strict=True)
        ]

    def _compare(
        self, seen: Sequence[Mapping[str, torch.Tensor]], criterion: Criterion
    ) -> list[torch.Tensor]:
        """The sum of the losses of each micro-batch's rows, all of them compared."""
        if self._is_scored:
            return _with_scores(seen, self._settings.scored)
        learned = [one["targets"] != NOT_LEARNED for one in seen]
        documents_MD = torch.cat([one["document"] for one in seen])
        keys_M = torch.cat([one["document_keys"] for one in seen])
        # Rows that only fill up a process are nobody's wrong answers either.
        is_one_M = torch.cat([mine[one["owner"]] for mine, one in zip(learned, seen, strict=True)])
        place, losses = 0, []
        right = _right_keys(seen)
        for one, mine in zip(seen, learned, strict=True):
            own_B = one["positive"] + place
            apart_BM = is_one_M & ~_same(one, keys_M, right)
            apart_BM[torch.arange(len(own_B), device=own_B.device), own_B] = True
            cosines_BM = one["anchor"] @ documents_MD.T / self._settings.temperature
            targets_B = own_B.masked_fill(~mine, NOT_LEARNED)
            losses.append(criterion(Scores(cosines_BM.masked_fill(~apart_BM, -torch.inf)), targets_B))
            place += len(one["document"])
        return losses

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The number of rows; the loss is measured over all of them together."""
        return {TARGETS: sums[TARGETS]}

    def measure(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> dict[str, float]:
        """Of pairs: the loss over all rows, and how well anchors find their documents among all. See `retrieval`.

        Of scored pairs: the loss, and Spearman's correlation of cosines and scores.
        """
        if self._is_scored:
            return score_figures(rows, found, self._settings.scored, SHARPNESS)
        return pair_figures(rows, found, self._settings.temperature)

    def detail(self, rows: Sequence[Mapping[str, Any]], found: Sequence[Any]) -> Detail:
        """Of pairs the anchors whose document is found last; of scored ones those whose cosine is most out of place."""
        if self._is_scored:
            return scored_detail(rows, found, self._settings.scored)
        return pair_detail(rows, found, self._settings.temperature)

    def predict(self, row: Mapping[str, Any], found: Any) -> dict[str, Any]:
        """A text's vector; of a pair also the cosine."""
        vectors = np.asarray(found)
        more = {"cosine": float(vectors[0] @ vectors[1])} if len(vectors) > 1 else {}
        return {**more, "vector": [round(float(number), 6) for number in vectors[0]]}

    def accompany(self, folder: Path) -> None:
        """Say how vectors are made of what the model gives, as sentence-transformers reads it."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width = next(config[name] for name in ("hidden_size", "d_model", "n_embd") if name in config)
        kinds = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
        modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        for name in ("1_Pooling", "2_Normalize"):
            make_folders(folder / name)
        pooling = {f"pooling_mode_{kind}": name == self._settings.pooling for name, kind in kinds.items()}
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling})
        write_json(folder / "2_Normalize" / "config.json", {})
        write_json(
            folder / "modules.json",
            [
                {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for n, (kind, path) in enumerate(modules.items())
            ],
        )
        write_json(
            folder / "sentence_bert_config.json",
            {"max_seq_length": self._max_length, "do_lower_case": False},
        )
        prompts = {"query": self._settings.anchor_prefix, "document": self._settings.document_prefix}
        write_json(folder / "config_sentence_transformers.json", {"prompts": prompts})


def _body(model: "PreTrainedModel") -> Any:
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _of_rows(seen: Mapping[str, torch.Tensor], batch: Batch) -> list[Any]:
    """The vectors of each row [1 + K, D]: of its anchor and its documents."""
    anchors = seen["anchor"].cpu().numpy()
    if "document" not in seen:
        return [anchor[None] for anchor in anchors]
    documents, owner = seen["document"].cpu().numpy(), batch["owner"].cpu().numpy()
    return [np.concatenate([anchor[None], documents[owner == n]]) for n, anchor in enumerate(anchors)]


def _right_keys(seen: Sequence[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] each: the key of every anchor, and that of its document; of a row that only fills up, the anchor's own."""
    anchors_N = torch.cat([one["anchor_keys"] for one in seen])
    documents_N = torch.cat([one["document_keys"][one["positive"]] for one in seen])
    learned_N = torch.cat([one["targets"] for one in seen]) != NOT_LEARNED
    return anchors_N, documents_N.where(learned_N, anchors_N)


def _same(
    one: Mapping[str, torch.Tensor], keys_M: torch.Tensor, right: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """[B, M]: documents that are no wrong answers to an anchor: its own text, or right for it in any row."""
    mine_B1 = one["anchor_keys"].unsqueeze(1)
    anchors_N, documents_N = right
    # In the place of documents of other anchors its own key, which is found anyway: so no GPU is asked for numbers.
    right_BN = documents_N.where(anchors_N == mine_B1, mine_B1).sort(1).values
    keys_BM = keys_M.expand(len(mine_B1), -1).contiguous()
    place_BM = torch.searchsorted(right_BN, keys_BM).clamp_(max=len(documents_N) - 1)
    return (keys_M == mine_B1) | (right_BN.gather(1, place_BM) == keys_M)


def _with_scores(seen: Sequence[Mapping[str, torch.Tensor]], kind: str) -> list[torch.Tensor]:
    cosines = [(one["anchor"] * one["document"]).sum(1) for one in seen]
    learned = [one["targets"] != NOT_LEARNED for one in seen]
    scores = [one["score"].to(cosines[0].dtype) for one in seen]
    if kind == "cosine":
        return [
            (cosine - score).square()[mine].sum()
            for cosine, score, mine in zip(cosines, scores, learned, strict=True)
        ]
    whole = cosent(torch.cat(cosines)[torch.cat(learned)], torch.cat(scores)[torch.cat(learned)])
    return [whole * mine.sum() for mine in learned]  # of N rows each has one Nth: their mean is the whole


def cosent(cosines_N: torch.Tensor, scores_N: torch.Tensor) -> torch.Tensor:
    """log(1 + the sum of exp(20 (cosine j - cosine i)) over all i, j where the score of i is above that of j)."""
    above_NN = scores_N.unsqueeze(1) > scores_N.unsqueeze(0)
    gaps_NN = SHARPNESS * (cosines_N.unsqueeze(0) - cosines_N.unsqueeze(1))
    wrong = gaps_NN[above_NN]
    return torch.logsumexp(torch.cat([wrong, wrong.new_zeros(1)]), 0)
