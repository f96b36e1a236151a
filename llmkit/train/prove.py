"""Proofs on the user's own model and data before hours are spent: seconds, most of them for writing the model once.

What they look for would otherwise go wrong in silence: a model that learns nothing, or never learns to stop; documents
that see each other; an architecture whose training is not what it exports; a checkpoint that loses a tensor.

Shape suffixes: B rows of a micro-batch, T positions of a row.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmkit.data.loader import seeded_rows
from llmkit.data.order import RowOrder
from llmkit.data.rows import Row, Rows
from llmkit.data.seeds import row_seed
from llmkit.data.tokenizers import special_ids
from llmkit.durable import scratch_folder
from llmkit.errors import DataError, RunError, UsageError
from llmkit.models.adapter_files import adapter_tensors, fill_adapter, save_adapter
from llmkit.models.adapters import adapter_names
from llmkit.models.attention import kernels_of
from llmkit.models.build import align, check_loaded, max_length
from llmkit.models.host import on_host_or_here
from llmkit.models.rounded import plain, roundings, set_rounding
from llmkit.models.save import save_model
from llmkit.objectives.base import NOT_LEARNED, TARGETS, Batch, Example, LossModule
from llmkit.registry import Goal
from llmkit.train.checkpoint import Checkpoints, model_tensors
from llmkit.train.state import TrainState

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ROWS_LOOKED_AT = 256
"""Rows of the first steps, over all devices, that are looked at for targets and document ends."""
_ISOLATED_ROWS = 2
_PACKED_ROWS = 4
_TOKENS = 24
_TOLERANCE = 1e-3
_VISIBLE = 1e-6
"""An influence under this share of the loss cannot be told from rounding. What documents do to each other is exactly 0
where they are masked from each other."""
_NOT_SAVED = "its code does not save all that it computes with; choose another architecture"
_LEAK_RATIO = 0.05
"""With experts, what documents may do to each other, as a share of what they do when nothing keeps them apart: tokens
of several documents go through a kernel together there, and each expert's share of them changes how it rounds."""


def self_check(
    module: nn.Module,
    core: LossModule,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    goal: Goal,
    isolate: bool,
    compiled_rows: int | None,
    folder: Path | None,
) -> list[str]:
    """Every proof that this model and these rows allow; every process calls it with the same rows.

    Weights, gradients and modes are afterwards what they were.

    Args:
        module: Model and objective as they will be trained: wrapped, compiled, in the run's precision and attention.
        core: The same without wrapping.
        rows: The run's first, from `first_rows`.
        tokenizer: The run's.
        goal: What is known of the objective.
        isolate: Whether documents in a row are kept apart.
        compiled_rows: The number of rows that `module` is compiled for, lest it be compiled again; None: it is not.
        folder: Where to try saving, in a temporary folder: the run folder; None on all processes but the first.

    Returns:
        What was found, as short sentences.

    Raises:
        DataError: The model would learn nothing from these rows, or never learn to end a text.
        UsageError: The architecture does not keep documents in a row apart.
        RunError: The model does not come back from disk as it was.
    """
    seen = rows if isolate or goal.positions else [_without_positions(row) for row in rows]
    examples = [core.objective.encode(row) for row in seen]
    found = [prove_targets(examples)]
    if goal.learns_end:
        found.append(prove_end_of_text(rows, examples, tokenizer))
    if isolate:
        prove_isolation(core.model)
        found.append(prove_isolation_of(module, core, examples, compiled_rows))
    if folder is not None:
        found.append(prove_saving(core, folder))
    return found


def check_task(
    core: LossModule, examples: Sequence[Example], *, learned: int, isolate: bool, folder: Path | None
) -> list[str]:
    """Every proof that a task on labelled rows allows; weights, gradients and modes are afterwards what they were.

    Args:
        core: Model and task.
        examples: Of the run's first micro-batch.
        learned: Targets of the whole first step, over all processes.
        isolate: Whether rows stand in one line, and must not see each other.
        folder: As `self_check` takes it.

    Raises:
        DataError: These rows teach nothing.
        UsageError: Rows in one line see each other.
        RunError: The model does not come back from disk as it was.
    """
    found = []
    if not learned:
        raise DataError(
            "the rows of the first step have not one target: the model would learn nothing from them",
            hint="look at what is learned: llmkit show RECIPE --sample 3",
        )
    found.append(f"{learned:,} targets in the first step")
    if isolate:
        found.append(prove_packing(core, examples))
    if folder is not None:
        found.append(prove_saving(core, folder))
    return found


def prove_packing(core: LossModule, examples: Sequence[Example]) -> str:
    """Rows in one line have the losses that each of them has alone.

    Raises:
        UsageError: They do not: the architecture lets them see each other.
    """
    some = list(examples[:_PACKED_ROWS])
    device = core.model.device
    with torch.no_grad(), _evaluating(core.model):
        packed = float(core.objective.loss(core.model, _on(device, core.objective.collate(some))).total)
        alone = sum(
            float(core.objective.loss(core.model, _on(device, core.objective.collate([one]))).total)
            for one in some
        )
    off = abs(packed - alone) / max(abs(alone), 1e-30)
    if off > _TOLERANCE:
        raise UsageError(
            f"{core.model.config.model_type}: rows in one line have another loss ({packed:.5g}) than each alone "
            f"({alone:.5g}): they see each other",
            hint="finetune.sft.pack=false, or another architecture, such as llama or qwen3",
        )
    return f"{len(some)} rows in one line have the loss that each has alone, to {max(off, 1e-8):.0e}"


def first_rows(rows: Rows, order: RowOrder, num_rows: int, *, other: bool = False) -> list[Row]:
    """The `num_rows` rows that a run takes first, with `positions` and `seed`; the same on every process.

    Args:
        rows: The training rows.
        order: Which comes when.
        num_rows: How many.
        other: Whether they come with text of another document; see `MicroBatches`.
    """
    seeds = [row_seed(order.seed, at) for at in range(num_rows)]
    return seeded_rows(rows, *order.locate(np.arange(num_rows)), seeds, isolate=True, other=other)


def prove_targets(examples: Sequence[Example]) -> str:
    """Something is learned from these examples.

    Raises:
        DataError: Not one position is a target.
    """
    positions = sum(len(example["targets"]) for example in examples)
    learned = sum(int((example["targets"] != NOT_LEARNED).sum()) for example in examples)
    if not learned:
        raise DataError(
            f"the first {len(examples):,} rows have {positions:,} positions and not one target: "
            "the model would learn nothing from them",
            hint="look at the data: with `isolate_documents`, a document of one token has no target",
        )
    return f"{learned / positions:.1%} of the positions are learned"


def prove_end_of_text(rows: Sequence[Row], examples: Sequence[Example], tokenizer: Any) -> str:
    """Where documents end, the model learns to say so.

    Args:
        rows: With `positions`.
        examples: What the objective makes of them.
        tokenizer: Its `eos_token_id` ends each document.

    Raises:
        DataError: Documents end, but not by that token, or that token is nowhere a target.
    """
    end = tokenizer.eos_token_id
    ends = [_document_ends(row) for row in rows]
    total = sum(map(len, ends))
    if not total:
        return f"no document ends in the first {len(rows):,} rows, so whether its end is learned was not seen"
    marked = sum(int((row["ids"][at] == end).sum()) for row, at in zip(rows, ends, strict=True))
    if not marked:
        raise DataError(
            f"{total:,} documents end in the first {len(rows):,} rows, none by the tokenizer's end of text "
            f"({tokenizer.eos_token!r}, id {end}): the model would never learn to stop",
            hint="tokenize again with this tokenizer: llmkit tokenize RECIPE --fresh",
        )
    targets = [int((example["targets"] == end).sum()) for example in examples]
    learned = sum(min(count, len(at)) for count, at in zip(targets, ends, strict=True))
    if not learned:
        raise DataError(
            f"{total:,} documents end in the first {len(rows):,} rows, but end of text "
            f"({tokenizer.eos_token!r}, id {end}) is nowhere a target: the model would never learn to stop",
            hint=_why_no_end(end, special_ids(tokenizer)),
        )
    return f"the end of {learned:,} of {total:,} documents is learned"


def prove_isolation(model: PreTrainedModel) -> None:
    """With positions that restart, the second document's hidden states do not depend on the first's tokens.

    Raises:
        UsageError: They do: the architecture does not isolate documents by their positions.
    """
    ids = _some_ids(model)
    length = ids.shape[1]
    half = length // 2
    positions = (torch.arange(length, device=ids.device) % half).unsqueeze(0)
    other = ids.clone()
    other[:, :half] = ids[:, :half].flip(1)
    with torch.no_grad(), _evaluating(model):
        one, two = (
            model.base_model(input_ids=i, position_ids=positions, use_cache=False).last_hidden_state
            for i in (ids, other)
        )
    if _distance(one[:, half:], two[:, half:]) > _TOLERANCE:
        raise _not_isolated(model, "")


def prove_isolation_of(
    module: nn.Module, core: LossModule, examples: Sequence[Example], compiled_rows: int | None = None
) -> str:
    """In real rows, every second document's loss does not depend on the tokens of those between.

    Judged by the very pass that is trained: its precision, attention, compiled form and dropout. The measure is what
    the same tokens do to that loss when positions run through, so that documents see each other.

    Args:
        module: As `self_check` takes it.
        core: The same without wrapping.
        examples: Of rows with `positions`; those in which most documents meet are used.
        compiled_rows: The number of rows that `module` is compiled for; None: it is not.

    Raises:
        UsageError: It does.
    """
    num_rows = compiled_rows or _ISOLATED_ROWS
    busiest = sorted(examples, key=lambda example: -len(_starts(example)))[:num_rows]
    if not busiest or not len(_starts(busiest[0])):
        return f"no two documents share one of {len(examples):,} rows, so isolation was not seen on them"
    filled = [busiest[i % len(busiest)] for i in range(num_rows)]
    batch = _on(core.model.device, core.objective.collate(filled))
    measured_BT = _every_second_document(batch["position_ids"])
    through_T = torch.arange(measured_BT.shape[1], device=measured_BT.device)
    together = {**batch, "position_ids": through_T.expand_as(measured_BT).contiguous()}
    with torch.set_grad_enabled(
        compiled_rows is not None
    ):  # else it would be compiled again, without gradient
        leak, all_of_it = (_influence(module, each, measured_BT) for each in (batch, together))
    if leak > max(_VISIBLE, _LEAK_RATIO * all_of_it if _has_experts(core.model) else 0.0):
        raise _not_isolated(
            core.model,
            f": in the run's own rows, other documents' tokens change a document's loss by {leak:.1e} of itself, "
            f"and by {all_of_it:.1e} when nothing keeps them apart",
        )
    if all_of_it <= _VISIBLE:
        return "what documents could do to each other is too small to be seen in these rows"
    return "documents in a row do not see each other"


def prove_saving(core: LossModule, folder: Path) -> str:
    """Written as a checkpoint, and as the export, and read back, what is trained is the same to the last bit.

    Each is read into a model that was built anew: a checkpoint's tensors into one with other values everywhere, the
    export by plain `from_pretrained`. Of a model that learns in parts the rest stays as it is, for a checkpoint does
    not hold it; and of one with adapters these are what is exported (what it is with them in its weights is compared
    when they are put there).

    Args:
        core: On the device and with the attention that it is trained with.
        folder: Where there is room for the model; a temporary folder is made there and removed again.

    Raises:
        RunError: A tensor or the logits differ; names the first.
        UsageError: Tensors are missing in the export, or left over.
    """
    model = on_host_or_here(core.model)
    with _as_stored(model):
        wanted = _Looks.of(model)
        export = (
            ("the adapter", _through_adapters) if adapter_names(model) else ("the export", _through_export)
        )
        for what, restore in (("a checkpoint", _through_checkpoint), export):
            with scratch_folder(folder) as place:
                wanted.compare(_Looks.of(restore(model, place)), f"{model.config.model_type}: {what}")
    for name, part in core.parts.items():
        with scratch_folder(folder) as place:
            tensors = model_tensors(_through_checkpoint(part, place))
            _compare_tensors(model_tensors(part), tensors, f"{name}: a checkpoint")
    return f"saved and read back, all {len(wanted.tensors):,} tensors and the logits are the same"


@contextmanager
def _as_stored(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts a model that rounds its weights computes with them as they are, for these are saved."""
    found = roundings(model)
    plain(model)
    try:
        yield
    finally:
        for name, rounding in found.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            set_rounding(layer, rounding)


@dataclass(frozen=True)
class _Looks:
    """What a model is, from outside: its tensors and its logits on a few tokens."""

    tensors: Mapping[str, torch.Tensor]
    logits: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_Looks":
        ids = _some_ids(model)
        end = model.config.eos_token_id
        if model.config.is_encoder_decoder and isinstance(end, int):
            ids[:, -1] = end  # where heads of T5 and BART read what they make of a text
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        with torch.no_grad(), _evaluating(model):
            output = model(input_ids=ids, **more)
        names = ("logits", "prediction_logits", "start_logits", "last_hidden_state")
        return cls(_all_tensors(model), next(output[name] for name in names if name in output))

    def compare(self, other: "_Looks", what: str) -> None:
        _compare_tensors(self.tensors, other.tensors, what)
        if not _same_bits(self.logits, other.logits):
            by = _distance(self.logits, other.logits)
            raise RunError(f"{what}, read back, computes other logits (by {by:.1e})", hint=_NOT_SAVED)


def _compare_tensors(mine: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], what: str) -> None:
    if mine.keys() != other.keys():
        names = sorted(mine.keys() ^ other.keys())
        raise RunError(f"{what}, read back, has other tensors: {', '.join(names[:5])}", hint=_NOT_SAVED)
    for name, tensor in mine.items():
        if not _same_bits(tensor, other[name]):
            raise RunError(f"{what}, read back, has other values in {name}", hint=_NOT_SAVED)


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, learning or not, and saved buffers by name."""
    return {**model_tensors(model), **{name: p.detach() for name, p in model.named_parameters()}}


def _through_checkpoint(model: ModuleT, place: Path) -> ModuleT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        whole = all(p.requires_grad for p in model.parameters())
        anew = isinstance(model, PreTrainedModel) and whole and _is_tied_as_said(model)
        second = type(model)(copy.deepcopy(model.config)) if anew else copy.deepcopy(model)
        # Where a new model holds constants, such as ones in norms, a tensor that was not restored would not show.
        for tensor in model_tensors(second).values():
            tensor.copy_(_other_values(tensor))
    checkpoints = Checkpoints(place, identity={})
    on_host = {name: tensor.cpu() for name, tensor in model_tensors(model).items()}
    path = checkpoints.write(on_host, {}, TrainState())
    checkpoints.load(path, second, torch.optim.SGD(second.parameters()))
    return second.to(next(model.parameters()).device)


def _is_tied_as_said(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one where the configuration says so.

    Flan-T5's are two, and its configuration cannot say that: transformers goes by the files.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and words is not None and getattr(head, "weight", None) is words.weight
    return head is None or is_tied or not getattr(model.config, "tie_word_embeddings", False)


def _through_export(model: PreTrainedModel, place: Path) -> PreTrainedModel:
    folder = place / "model"
    save_model(folder, model, facts={})
    second, info = type(model).from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    check_loaded("the export, read back", info)
    if kernels_of(model):
        second.set_attn_implementation(
            model.config._attn_implementation
        )  # the same kernel, for the same rounding
    align(second)
    return second.to(model.device)


def _through_adapters(model: PreTrainedModel, place: Path) -> PreTrainedModel:
    second = copy.deepcopy(model)
    for name in adapter_names(model):
        for tensor in adapter_tensors(second, name).values():
            tensor.copy_(_other_values(tensor))
        save_adapter(place / name, model, name=name, facts={})
        fill_adapter(second, place / name, name)
    return second


def _other_values(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.randn_like(tensor)
    return ~tensor if tensor.dtype == torch.bool else tensor + 1


def _influence(module: nn.Module, batch: Batch, measured_BT: torch.Tensor) -> float:
    """What the tokens outside `measured_BT` do to the loss of those inside, as a share of that loss.

    The others are all set to one token, then all to another: hardly anything changes more.
    """
    totals = []
    for token in (0, 1):
        targets_BT = batch["targets"].where(measured_BT, NOT_LEARNED)
        changed = {
            **batch,
            "input_ids": batch["input_ids"].where(measured_BT, token),
            "targets": targets_BT,
            TARGETS: (targets_BT != NOT_LEARNED).sum().cpu(),
        }
        torch.manual_seed(0)  # the same dropout both times
        totals.append(float(module(changed).total.detach()))
    return abs(totals[0] - totals[1]) / max(abs(totals[0]), 1e-30)


def _has_experts(model: PreTrainedModel) -> bool:
    """Whether tokens may be sorted by experts, as architectures name what does that."""
    names = [*model.config.to_dict(), *(name for name, _ in model.named_modules())]
    return any("expert" in name or "moe" in name for name in names)


def _every_second_document(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """Where each row's second, fourth, ... document stands."""
    restarts_BT = functional.pad(position_ids_BT.diff(dim=1) != 1, (1, 0))
    return restarts_BT.cumsum(1) % 2 == 1


def _starts(row: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Where documents begin within a row (`positions`) or an example of one (`position_ids`), but for its first."""
    positions = row["positions"] if "positions" in row else row["position_ids"]
    return np.flatnonzero(positions[1:] == 0) + 1


def _document_ends(row: Row) -> npt.NDArray[np.int64]:
    """Where documents of more than one token end within the row: nothing comes before the end of a shorter one."""
    ends = _starts(row) - 1
    return ends[row["positions"][ends] > 0]


def _without_positions(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "positions"}


def _why_no_end(end: int, ids: Mapping[str, int]) -> str:
    if ids.get("pad_token_id") == end:
        return "pad_token is the same token, and padding is not learned: give the tokenizer a pad_token of its own"
    return "the objective leaves it out of its targets"


def _on(device: torch.device, batch: Batch) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _not_isolated(model: PreTrainedModel, how: str) -> UsageError:
    return UsageError(
        f"{model.config.model_type} does not keep documents in a row apart{how}",
        hint="pretrain.isolate_documents=false, or another architecture, such as llama, qwen3 or mistral",
    )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _some_ids(model: PreTrainedModel) -> torch.Tensor:
    """[1, T] with T even: as many as the model reads, and not more than it takes to see something."""
    size = model.get_input_embeddings().weight.shape[0]
    length = min(_TOKENS, max_length(model.config) or _TOKENS) // 2 * 2
    return ((torch.arange(length) * 7 + 3) % size).unsqueeze(0).to(model.device)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also of NaN, and a zero's sign."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the larger of 1 and the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
