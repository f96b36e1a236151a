"""What a model says of each position, by kind of model, so that no objective need know an architecture.

Where a model's logits are a linear layer of what its body computes, they are made in chunks and for targets only
(`cross_entropy.py`). That is so for the causal models and for the families in `_BEFORE_THE_HEAD`; `choose_heads` looks
whether it is true of the model at hand, and any other model's own logits are taken, which is always right and costs
memory.

Shape suffixes: B rows, T positions, S positions of an encoder, N = B*T positions in a line, H hidden size, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmkit.models.cross_entropy import NOT_LEARNED, linear_cross_entropy, linear_nll, nll_of_logits

if TYPE_CHECKING:  # loader workers import objectives, which import this, and transformers takes seconds
    from transformers import PretrainedConfig, PreTrainedModel

_OWN_LOGITS = "llmkit_own_logits"
_TOLERANCE = 1e-3
_LOOKED_AT = 24
_LARGE = 1000.0

_BEFORE_THE_HEAD: Mapping[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "bert": lambda model, hidden: model.cls.predictions.transform(hidden),
    "roberta": lambda model, hidden: model.lm_head.layer_norm(functional.gelu(model.lm_head.dense(hidden))),
    "modernbert": lambda model, hidden: model.head(hidden),
    "electra": lambda model, hidden: model.generator_predictions(hidden),
}
"""What stands between the body of a masked language model and its output layer, by model type."""


@dataclass(frozen=True)
class Scores:
    """What a model says of N positions.

    Attributes:
        features_NH: What the output layer reads; where `weight_VH` is None, the logits themselves.
        weight_VH: The output layer.
        bias_V: Its bias, if it has one.
        sparse: Whether few of the positions are targets.
        num_targets: How many are, on the host; None: not known there.
    """

    features_NH: torch.Tensor
    weight_VH: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None
    sparse: bool = False
    num_targets: torch.Tensor | None = None

    def nll(
        self, targets_N: torch.Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> torch.Tensor:
        """The sum of -log p(target) over the positions that have one, in nats.

        Args:
            targets_N: Token ids, or `NOT_LEARNED`.
            label_smoothing: The share of each target's probability that is spread evenly over the vocabulary.
            z_loss: Adds so many times the square of each target's log-normaliser.
        """
        if self.weight_VH is None:
            return nll_of_logits(self.features_NH, targets_N, label_smoothing=label_smoothing, z_loss=z_loss)
        return linear_cross_entropy(
            self.features_NH,
            self.weight_VH,
            targets_N,
            bias=self.bias_V,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            gather=True if self.sparse else None,
            num_targets=self.num_targets,
        )

    @torch.no_grad()
    def each(self, targets_N: torch.Tensor) -> torch.Tensor:
        """-log p(target) of each position [N] in nats, 0 where there is none; `nll` is their sum."""
        if self.weight_VH is None:
            wide_NV = self.features_NH.float()
            return functional.cross_entropy(wide_NV, targets_N, ignore_index=NOT_LEARNED, reduction="none")
        gather = True if self.sparse else None
        return linear_nll(self.features_NH, self.weight_VH, targets_N, bias=self.bias_V, gather=gather)

    def log_probs(self, targets_N: torch.Tensor) -> torch.Tensor:
        """The log-probability of each position's target [N] in nats, 0 where there is none; gradients go through it.

        Logits are made in chunks and for targets only, and made again in the backward pass instead of being kept.
        """
        index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
        parts = [
            checkpoint(self._log_probs_at, part, targets_N[part], use_reentrant=False)
            for part in index.split(_ROWS_AT_ONCE)
        ]
        nothing_N = torch.zeros(len(targets_N), dtype=torch.float32, device=targets_N.device)
        if not len(index):  # still a function of all weights, for processes wait for each other's gradients
            return nothing_N + 0 * self.logits(index.new_zeros(1)).sum()
        return nothing_N.index_put((index,), torch.cat(parts))

    def _log_probs_at(self, index: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -functional.cross_entropy(self.logits(index).float(), targets, reduction="none")

    def logits(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """The logits [N, V] of all positions, or of those that `index` holds."""
        features = self.features_NH if index is None else self.features_NH[index]
        return (
            features if self.weight_VH is None else functional.linear(features, self.weight_VH, self.bias_V)
        )

    @torch.no_grad()
    def num_correct(self, targets_N: torch.Tensor) -> torch.Tensor:
        """How many targets are the likeliest token."""
        index = (targets_N != NOT_LEARNED).nonzero().squeeze(1)
        counts = [
            (self.logits(part).argmax(1) == targets_N[part]).sum() for part in index.split(_ROWS_AT_ONCE)
        ]
        return sum(counts, torch.zeros((), dtype=torch.int64, device=targets_N.device))


_ROWS_AT_ONCE = 512


def causal_scores(
    model: "PreTrainedModel",
    input_ids_BT: torch.Tensor,
    position_ids_BT: torch.Tensor | None = None,
    seen_B1TT: torch.Tensor | None = None,
) -> Scores:
    """What a causal model says of the token after each of `input_ids_BT`.

    Args:
        model: A causal language model.
        input_ids_BT: Token ids.
        position_ids_BT: Positions that restart where a document begins: it does not see those before it.
        seen_B1TT: Which tokens each token sees; where it is given, positions say nothing about that.
    """
    seen: Any = seen_B1TT
    if seen is None and input_ids_BT.device.type != "cpu":
        from llmkit.models.attention import documents_mask, whole_rows_mask  # with transformers; see above

        seen = whole_rows_mask(model, input_ids_BT)
        if seen is None and position_ids_BT is not None:
            seen = documents_mask(model, position_ids_BT)
    given = {"position_ids": position_ids_BT, "attention_mask": seen}
    positions = {name: value for name, value in given.items() if value is not None}
    if _gives_own_logits(model):
        logits_BTV = model(input_ids=input_ids_BT, use_cache=False, **positions).logits
        return Scores(logits_BTV.flatten(0, 1))
    hidden_BTH = model.base_model(input_ids=input_ids_BT, use_cache=False, **positions).last_hidden_state
    return _scores(model, hidden_BTH)


def masked_scores(
    model: "PreTrainedModel", *, num_targets: torch.Tensor | None = None, **inputs: torch.Tensor | None
) -> tuple[Scores, Any]:
    """What a model that fills gaps says of each position, and what its body gave.

    Args:
        model: A masked language model, or one with further heads.
        num_targets: How many positions have a target, on the host: then a GPU need not be asked.
        inputs: `input_ids`, `attention_mask`, `token_type_ids` [B, T]; what is None is left out.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    if _gives_own_logits(model):
        output = model(**given)
        logits_BTV = output.logits if "logits" in output else output.prediction_logits
        return Scores(logits_BTV.flatten(0, 1)), output
    body = model.base_model(**given)
    hidden_BTH = _BEFORE_THE_HEAD[model.config.model_type](model, body.last_hidden_state)
    return replace(_scores(model, hidden_BTH, sparse=True), num_targets=num_targets), body


def pair_logits(model: "PreTrainedModel", output: Any) -> torch.Tensor:
    """[B, 2]: what a model says of whether the second text of each row goes on from the first, or not.

    Args:
        model: Of the kind `pairs`.
        output: What `masked_scores` gave of its body.
    """
    if "seq_relationship_logits" in output:
        logits_B2: torch.Tensor = output.seq_relationship_logits
        return logits_B2
    return model.cls.seq_relationship(output.pooler_output)


def seq2seq_scores(
    model: "PreTrainedModel",
    input_ids_BS: torch.Tensor,
    targets_BT: torch.Tensor,
    *,
    attention_mask_BS: torch.Tensor | None = None,
) -> Scores:
    """What an encoder-decoder says of each of its targets, given those before it.

    Args:
        model: A sequence-to-sequence language model.
        input_ids_BS: What the encoder reads.
        targets_BT: What the decoder is to write; it reads the same one position later, after its start token, with
            padding where there is no target.
        attention_mask_BS: 0 where the encoder's input is filled up; None: nowhere.
    """
    decoder_ids_BT = _shifted(targets_BT, model.config)
    if _gives_own_logits(model):
        logits_BTV = model(
            input_ids=input_ids_BS,
            attention_mask=attention_mask_BS,
            decoder_input_ids=decoder_ids_BT,
            use_cache=False,
        ).logits
        return Scores(logits_BTV.flatten(0, 1))
    encoded = model.get_encoder()(input_ids=input_ids_BS, attention_mask=attention_mask_BS)
    hidden_BTH = model.get_decoder()(
        input_ids=decoder_ids_BT,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=attention_mask_BS,
        use_cache=False,
    ).last_hidden_state
    if getattr(model.config, "scale_decoder_outputs", False):  # T5 with a tied output layer
        hidden_BTH = hidden_BTH * model.config.d_model**-0.5
    return _scores(model, hidden_BTH)


def _shifted(targets_BT: torch.Tensor, config: "PretrainedConfig") -> torch.Tensor:
    """The decoder's input: its start token, then the targets but the last."""
    decoder_ids_BT = torch.full_like(targets_BT, config.decoder_start_token_id)
    decoder_ids_BT[:, 1:] = targets_BT[:, :-1].masked_fill(
        targets_BT[:, :-1] == NOT_LEARNED, config.pad_token_id
    )
    return decoder_ids_BT


def _scores(model: "PreTrainedModel", hidden_BTH: torch.Tensor, *, sparse: bool = False) -> Scores:
    head = model.get_output_embeddings()
    bias_V = (
        head.bias if head.bias is not None else getattr(model, "final_logits_bias", None)
    )  # BART's buffer
    return Scores(
        hidden_BTH.flatten(0, 1), head.weight, None if bias_V is None else bias_V.flatten(), sparse=sparse
    )


def _gives_own_logits(model: "PreTrainedModel") -> bool:
    return bool(getattr(model, _OWN_LOGITS, False))


def choose_heads(model: "PreTrainedModel", kind: str) -> bool:
    """Look whether the model's logits are its output layer of what its body computes; where not, take its own.

    Args:
        model: As it is trained, an adapter put in already: an output layer that has one is more than its weight.
        kind: `causal`, `masked`, `pairs`, `seq2seq` or `detector`.

    Returns:
        Whether logits are made in chunks from now on.
    """
    in_chunks = (
        kind != "detector"
        and _has_linear_head(model)
        and (kind not in ("masked", "pairs") or model.config.model_type in _BEFORE_THE_HEAD)
    )
    if in_chunks:
        setattr(model, _OWN_LOGITS, False)
        in_chunks = _agrees_with_own(model, kind)
    setattr(model, _OWN_LOGITS, not in_chunks)
    return in_chunks


def _has_linear_head(model: "PreTrainedModel") -> bool:
    """Whether the output layer is torch's own and nothing else: what wraps one computes more than by its weight."""
    head = model.get_output_embeddings()
    return isinstance(head, torch.nn.Linear) and not hasattr(head, "base_layer")


@torch.no_grad()
def _agrees_with_own(model: "PreTrainedModel", kind: str) -> bool:
    """Whether the chunked way gives the model's own logits, to rounding, on a few tokens.

    A new model's logits are small, and what caps large ones hardly touches them: so it is asked again with an output
    layer that gives numbers as large as a trained model's and larger.
    """
    size = model.get_input_embeddings().weight.shape[0]
    ids_1T = ((torch.arange(_LOOKED_AT) * 7 + 3) % size).unsqueeze(0).to(model.device)
    head = model.get_output_embeddings()
    with _evaluating(model):
        ours = _scores_on(model, kind, ids_1T)
        ours_NV = ours.logits()
        direct_NV = functional.linear(ours.features_NH, head.weight, head.bias)
        factor = _LARGE / float(direct_NV.abs().max().clamp(min=1e-6))
        own_NV = _own_logits(model, kind, ids_1T)
        hook = head.register_forward_hook(lambda _, __, logits: logits * factor)
        try:
            own_large_NV = _own_logits(model, kind, ids_1T)
        finally:
            hook.remove()
    return _close(ours_NV, own_NV) and _close(ours_NV + (factor - 1) * direct_NV, own_large_NV)


def _scores_on(model: "PreTrainedModel", kind: str, ids_1T: torch.Tensor) -> Scores:
    if kind == "seq2seq":
        return seq2seq_scores(model, ids_1T, ids_1T)
    if kind == "causal":
        return causal_scores(model, ids_1T)
    return masked_scores(model, input_ids=ids_1T)[0]


def _own_logits(model: "PreTrainedModel", kind: str, ids_1T: torch.Tensor) -> torch.Tensor:
    more: dict[str, Any] = {} if kind in ("masked", "pairs") else {"use_cache": False}
    if kind == "seq2seq":
        more["decoder_input_ids"] = _shifted(ids_1T, model.config)
    output = model(input_ids=ids_1T, **more)
    logits_1TV: torch.Tensor = output.logits if "logits" in output else output.prediction_logits
    return logits_1TV[0]


def _close(ours_NV: torch.Tensor, own_NV: torch.Tensor) -> bool:
    if ours_NV.shape != own_NV.shape:
        return False
    distance = (ours_NV - own_NV).abs().max() / own_NV.abs().max().clamp(min=1.0)
    return bool(distance <= _TOLERANCE)


@contextmanager
def _evaluating(model: "PreTrainedModel") -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
