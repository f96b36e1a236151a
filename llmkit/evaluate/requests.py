"""How likely a model finds continuations of contexts: many at a time, and nothing computed twice.

What lm-evaluation-harness asks as `loglikelihood`, by the same rules: a context that is too long loses its beginning,
blanks at its end belong to the continuation, an empty one is the token that begins texts. Requests that begin alike
stand in one line (`branches.py`), and the output layer is computed only where a token of a continuation is told.

Shape suffixes: B lines, T tokens of a line, N places at which something is told, P tokens that are told, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from llmkit.errors import DataError, RunError, UsageError
from llmkit.evaluate.branches import Line, lay_out
from llmkit.models.attention import kernels_of
from llmkit.models.build import max_length, set_attention
from llmkit.models.heads import Scores, causal_scores, choose_heads

_UNKNOWN_LENGTH = 2048
_NO_LIMIT = 10**9
"""A tokenizer whose length is larger has none."""
_PLACES_AT_ONCE = 256
_BATCH_TOKENS = {"cpu": 512}
_BATCH_TOKENS_ELSEWHERE = 16384
"""On a processor more only costs memory; measured with 256 to 2,048 on SmolLM2-135M."""
_TOLERANCE = 1e-3
_LOOKED_AT = 16


@dataclass(frozen=True)
class Request:
    """What is asked: how likely is this continuation of that context?

    Attributes:
        context: Token ids, at least one.
        continuation: Token ids, at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a model says of a request.

    Attributes:
        loglikelihood: log p(continuation | context), in nats.
        greedy: Whether the model, taking the likeliest token each time, would have written the continuation.
    """

    loglikelihood: float
    greedy: bool


class Scorer:
    """A model that is asked how likely continuations are.

    Args:
        model: A causal or an encoder-decoder language model.
        tokenizer: Its tokenizer, for its length where the configuration tells none.
        device: `cpu`, `cuda` or `mps`.
        bf16: Weights and products in bfloat16; log-probabilities are always made in float32.
        batch_tokens: Tokens computed together, padding counted; by default as it suits the device.
        share: Compute what requests begin with alike only once, where the model can do so; False: never.
        longest: Tokens that the model reads at most; by default its own length.

    Raises:
        UsageError: The model is of another kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        device: str = "cpu",
        bf16: bool = False,
        batch_tokens: int | None = None,
        share: bool = True,
        longest: int | None = None,
    ) -> None:
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        if model.get_output_embeddings() is None and not hasattr(model, "lm_head"):
            raise UsageError(
                f"{type(model).__name__} does not say how likely texts are",
                hint="give a causal or an encoder-decoder language model",
            )
        self.longest = longest or longest_input(model, tokenizer)
        self.batch_tokens = batch_tokens or _BATCH_TOKENS.get(device, _BATCH_TOKENS_ELSEWHERE)
        if kernels_of(model):
            set_attention(model, "sdpa")
        model.eval()
        model.to(device)
        choose_heads(model, "seq2seq" if self.encoder_decoder else "causal")
        self.shares = share and not self.encoder_decoder and _takes_branches(model)
        self.model = model.to(torch.bfloat16) if bf16 else model

    @torch.inference_mode()
    def score(
        self, requests: Sequence[Request], done: Callable[[int], object] = lambda _: None
    ) -> list[Answer]:
        """What the model says of each request.

        Args:
            requests: In any order; the answers come in the same.
            done: Told how many requests have been answered since it was told last.

        Raises:
            DataError: A continuation is empty, or longer than what the model reads.
            RunError: The model gives NaN or infinity.
        """
        for request in requests:
            _check(request, self.longest)
        answers: dict[int, Answer] = {}
        for found in (self._of_pairs if self.encoder_decoder else self._of_lines)(requests):
            answers |= found
            done(len(found))
        return [answers[number] for number in range(len(requests))]

    def _of_lines(self, requests: Sequence[Request]) -> Iterator[dict[int, Answer]]:
        # The last token of a continuation is told and never read.
        paths = [(one.context + one.continuation)[-(self.longest + 1) :][:-1] for one in requests]
        window = getattr(self.model.config, "sliding_window", None)
        fits = window is None or max(map(len, paths), default=0) <= window
        lines = lay_out(paths, [len(one.continuation) for one in requests], share=self.shares and fits)
        for some in _batches(lines, self.batch_tokens):
            yield self._of_batch(some, requests)

    def _of_batch(self, lines: Sequence[Line], requests: Sequence[Request]) -> dict[int, Answer]:
        inputs = _inputs(lines, self.model.device)
        scores = causal_scores(self.model, *inputs)
        width = inputs[0].shape[1]
        asked = [
            (number, [row * width + place for place in places])
            for row, line in enumerate(lines)
            for number, places in line.places.items()
        ]
        return _answers(scores, asked, requests)

    def _of_pairs(self, requests: Sequence[Request]) -> Iterator[dict[int, Answer]]:
        """Each context goes through the encoder once, and all its continuations with it."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            by_context.setdefault(request.context[-self.longest :], []).append(number)
        for some in _batches([_Context(*one) for one in by_context.items()], self.batch_tokens):
            yield self._of_contexts(some, requests)

    def _of_contexts(self, contexts: "Sequence[_Context]", requests: Sequence[Request]) -> dict[int, Answer]:
        config, device = self.model.config, self.model.device
        ids_BT = _padded([one.ids for one in contexts], device)
        mask_BT = _padded([[1] * len(one.ids) for one in contexts], device)
        encoded_BTH = self.model.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        numbers = [number for one in contexts for number in one.numbers]
        rows = torch.tensor(
            [row for row, one in enumerate(contexts) for _ in one.numbers], device=device
        )  # of each request, its context's
        written = [requests[number].continuation for number in numbers]
        output = self.model(
            encoder_outputs=(encoded_BTH[rows],),
            attention_mask=mask_BT[rows],
            decoder_input_ids=_padded(
                [(config.decoder_start_token_id, *ids[:-1]) for ids in written], device
            ),
            use_cache=False,
        )
        width = output.logits.shape[1]
        asked = [
            (number, list(range(row * width, row * width + len(ids))))
            for row, (number, ids) in enumerate(zip(numbers, written, strict=True))
        ]
        return _answers(Scores(output.logits.flatten(0, 1)), asked, requests)


@dataclass(frozen=True)
class _Context:
    """What an encoder reads, and the requests that ask about it."""

    ids: tuple[int, ...]
    numbers: list[int]
    branched: bool = False


def longest_input(model: PreTrainedModel, tokenizer: Any) -> int:
    """How many tokens a model reads at most: by its configuration, else its tokenizer, else 2,048."""
    own = max_length(model.config)
    if own is not None:
        return own
    said = getattr(tokenizer, "model_max_length", None)
    return int(said) if said is not None and said < _NO_LIMIT else _UNKNOWN_LENGTH


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], *, encoder_decoder: bool = False
) -> list[Request]:
    """Contexts and continuations as token ids, parted where the harness parts them.

    Args:
        tokenizer: The model's.
        pairs: Contexts, which may be empty, and continuations.
        encoder_decoder: Whether the two are read apart from each other.

    Raises:
        DataError: The tokenizer finds no token in a continuation.
    """
    moved = [_moved(*pair) for pair in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    context_ids = dict(zip(contexts, _encode(tokenizer, contexts), strict=True))
    apart = [continuation for context, continuation in moved if encoder_decoder or not context]
    apart_ids = iter(_plain(tokenizer, apart))
    joined = [context + continuation for context, continuation in moved if context and not encoder_decoder]
    joined_ids = iter(_encode(tokenizer, joined))
    requests = []
    for context, continuation in moved:
        if context and not encoder_decoder:
            before = context_ids[context]
            request = Request(before, next(joined_ids)[len(before) :])
        else:
            request = _after(context_ids.get(context) or (prefix_of(tokenizer),), next(apart_ids))
        if not request.continuation:
            raise DataError(
                f"{continuation!r} after {context[-40:]!r} adds no token",
                hint="the tokenizer joins it with what stands before; take the row out",
            )
        requests.append(request)
    return requests


def rolling_requests(ids: Sequence[int], prefix: int, longest: int) -> list[Request]:
    """A long text as requests that together tell each of its tokens once, each from as much as fits before it.

    Args:
        ids: The text.
        prefix: The token that begins texts.
        longest: Tokens that the model reads at most.
    """
    first = min(longest, len(ids))
    requests = [Request((prefix,), tuple(ids[:first]))] if ids else []
    for start in range(first, len(ids), longest):
        end = min(start + longest, len(ids))
        requests.append(Request(tuple(ids[end - longest - 1 : start]), tuple(ids[start:end])))
    return requests


def prefix_of(tokenizer: Any) -> int:
    """The token that begins a text: the tokenizer's own, else that which ends one.

    Raises:
        UsageError: It has neither.
    """
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise UsageError(
        "the tokenizer has no token that begins or ends a text, so an empty context cannot be asked about",
        hint="give each row a context",
    )


def _moved(context: str, continuation: str) -> tuple[str, str]:
    """Blanks at the end of a context go to the continuation, where tokenizers have them."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _after(context: tuple[int, ...], continuation: tuple[int, ...]) -> Request:
    """A continuation that brings the token that begins texts has its context in itself."""
    if len(context) == 1 and len(continuation) > 1 and context == continuation[:1]:
        return Request(context, continuation[1:])
    return Request(context, continuation)


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """With the tokens that frame texts, unless a text spells the first of them itself."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    spelled = tokenizer.decode([start]) if start is not None else ""
    own = [bool(spelled) and text.startswith(spelled) for text in texts]
    plain = iter(_plain(tokenizer, [text for text, bare in zip(texts, own, strict=True) if bare]))
    framed = iter(_ids(tokenizer, [text for text, bare in zip(texts, own, strict=True) if not bare]))
    return [next(plain) if bare else next(framed) for bare in own]


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    return _ids(tokenizer, texts, add_special_tokens=False)


def _ids(tokenizer: Any, texts: Sequence[str], **more: Any) -> list[tuple[int, ...]]:
    if not texts:
        return []
    return [tuple(ids) for ids in tokenizer(list(texts), verbose=False, **more)["input_ids"]]


def _check(request: Request, longest: int) -> None:
    if not request.context or not request.continuation:
        raise DataError("a request has no context or no continuation", hint="each has at least one token")
    if len(request.continuation) > longest:
        raise DataError(
            f"a continuation has {len(request.continuation):,} tokens, and the model reads {longest:,}",
            hint="shorten it, or give a model that reads more",
        )


def _batches(lines: Iterable[Any], batch_tokens: int) -> Iterator[list[Any]]:
    """Lines of like length together, the longest first, those with branches apart from those without."""
    batch: list[Any] = []
    for line in sorted(lines, key=lambda one: (one.branched, -len(one.ids))):
        full = batch and len(batch[0].ids) * (len(batch) + 1) > batch_tokens
        if batch and (full or batch[0].branched != line.branched):
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def _inputs(lines: Sequence[Line], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Ids [B, T], filled up on the right; and where texts part, positions and who sees whom.

    Without branches there is nothing to say: each token sees those before it, and what fills a line up comes after.
    """
    ids_BT = _padded([line.ids for line in lines], device)
    if not lines[0].branched:
        return (ids_BT,)
    places_T = torch.arange(ids_BT.shape[1], device=device)
    # What fills up sees itself alone: a row of a mask that hides everything would give NaN.
    ends_BT = torch.maximum(_padded([line.ends for line in lines], device), places_T + 1)
    seen_BTT = (places_T <= places_T[:, None]) & (places_T[:, None] < ends_BT[:, None, :])
    positions_BT = _padded([line.depths for line in lines], device)
    return ids_BT, positions_BT, seen_BTT[:, None]


def _answers(
    scores: Scores, asked: Sequence[tuple[int, Sequence[int]]], requests: Sequence[Request]
) -> dict[int, Answer]:
    """Add up what is said of each request's tokens, in float64.

    Args:
        scores: What the model says of each place.
        asked: Numbers of requests, and the places at which the tokens of their continuations are told.
        requests: All of them.
    """
    device = scores.features_NH.device
    places_P = torch.tensor([place for _, places in asked for place in places], device=device)
    targets_P = torch.tensor(
        [token for number, _ in asked for token in requests[number].continuation], device=device
    )
    log_probs_P, likeliest_P = _told(scores, places_P, targets_P)
    answers, start = {}, 0
    for number, places in asked:
        part = slice(start, start + len(places))
        start += len(places)
        answers[number] = Answer(float(log_probs_P[part].sum()), bool(likeliest_P[part].all()))
    return answers


def _told(
    scores: Scores, places_P: torch.Tensor, targets_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token its log-probability, in float64 on the host, and whether it is the likeliest."""
    places_N, which_P = torch.unique(places_P, return_inverse=True)
    log_probs_P = torch.zeros(len(places_P), dtype=torch.float32, device=places_P.device)
    likeliest_P = torch.zeros(len(places_P), dtype=torch.bool, device=places_P.device)
    for first in range(0, len(places_N), _PLACES_AT_ONCE):
        logits_NV = scores.logits(places_N[first : first + _PLACES_AT_ONCE]).float()
        here = (which_P >= first) & (which_P < first + len(logits_NV))
        rows, targets = which_P[here] - first, targets_P[here]
        # torch's own log_softmax, as the harness takes it: in float32 its sum over a large vocabulary is off by some
        # 1e-5 for each token, and so are both.
        log_probs_P[here] = logits_NV.log_softmax(dim=1)[rows, targets]
        likeliest_P[here] = logits_NV.argmax(dim=1)[rows] == targets
    if not bool(log_probs_P.isfinite().all()):
        raise RunError(
            "the model gives log-probabilities that are not finite",
            hint="its weights may be damaged, or it needs float32: machine.precision=fp32",
        )
    return log_probs_P.cpu().double(), likeliest_P.cpu()


@torch.inference_mode()
def _takes_branches(model: PreTrainedModel) -> bool:
    """Whether the model can keep branches of a line apart: asked on a few tokens, against one text a line.

    Models differ in what they do with positions and a mask of their own, and some ignore them in silence.
    """
    names = inspect.signature(model.base_model.forward).parameters
    if not kernels_of(model) or not {"position_ids", "attention_mask"} <= set(names):
        return False
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = [(7 * number + 3) % size for number in range(2 * _LOOKED_AT)]
    paths = [tuple(ids[:_LOOKED_AT]), (*ids[: _LOOKED_AT // 2], *ids[_LOOKED_AT:])]
    lines = lay_out(paths, list(map(len, paths)))
    assert len(lines) == 1
    assert lines[0].branched
    try:
        together_NV = causal_scores(model, *_inputs(lines, model.device)).logits()
    except (RuntimeError, ValueError, TypeError, IndexError):  # it takes no mask of this shape
        return False
    for number, path in enumerate(paths):
        alone_NV = causal_scores(model, _padded([path], model.device)).logits()
        distance = (together_NV[lines[0].places[number]] - alone_NV).abs().max()
        if not bool(distance <= _TOLERANCE * alone_NV.abs().max().clamp(min=1.0)):
            return False
    return True
