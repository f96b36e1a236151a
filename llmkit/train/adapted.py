"""The export of a model with an adapter: the adapter itself, then the whole model with it in its weights, compared.

Shape suffixes: B rows, T positions, N predictions, C classes or tokens, L labels of a row, D numbers of a state.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmkit.models.adapter_files import save_adapter
from llmkit.models.merging import merge_adapters
from llmkit.objectives.base import Batch, LossModule
from llmkit.recipe.schema import Finetune

_MOST_ROWS, _MOST_PREDICTIONS = 8, 512
_READ = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def export_adapter(
    folder: Path,
    core: LossModule,
    section: Finetune,
    batch: Batch,
    *,
    facts: Mapping[str, object],
    companion: Callable[[Path], object],
) -> dict[str, Any]:
    """Write the adapter in PEFT's form, and merge it into the model where the recipe wants that.

    Args:
        folder: Where the adapter goes.
        core: Model and task; afterwards the model is a plain one if it was merged.
        section: The recipe's; it has an adapter.
        batch: Real rows, on the device, on which the merged model is compared.
        facts: Entries of the manifest.
        companion: Writes what travels along, such as the tokenizer.

    Returns:
        What the report says of it.

    Raises:
        GateError: The merged model predicts otherwise; the adapter is written all the same.
    """
    spec, model = section.adapter, core.model
    assert spec is not None
    save_adapter(folder, model, name=spec.name, facts={**facts, "kind": "adapter"}, companions=[companion])
    told: dict[str, Any] = {"method": spec.method, "rank": spec.rank, "merged": spec.merge}
    if spec.merge:
        training = core.training
        core.eval()
        read = what_is_read(core, batch)
        told["merged_kl"] = merge_adapters(
            model,
            lambda: predictions(model, read, several=section.task == "cls" and section.cls.multiple),
            max_kl=spec.max_kl,
            classes=chooses(model),
        )
        core.train(training)
    return told


def what_is_read(core: LossModule, batch: Batch) -> dict[str, torch.Tensor]:
    """What the task has the model read of a batch: the arguments of a call of the whole model, of some rows at most.

    Whatever the task makes of a batch, the body is called with it: that is listened to.
    """
    model, found = core.model, dict[str, torch.Tensor]()
    sides = [(model.base_model, "")]
    if model.config.is_encoder_decoder:
        sides = [(model.get_encoder(), ""), (model.get_decoder(), "decoder_")]
    with torch.no_grad(), _listening(sides, found):
        core.objective.loss(model, batch)
    return {name: value[:_MOST_ROWS] for name, value in found.items()}


@contextmanager
def _listening(sides: list[tuple[nn.Module, str]], found: dict[str, torch.Tensor]) -> Iterator[None]:
    """While this lasts, the first call of each module leaves its arguments in `found`.

    Nothing of a later one does: a task that also writes calls the model again, with other places and other rows.
    """
    heard: set[str] = set()
    with ExitStack() as stack:
        for module, prefix in sides:
            signature = inspect.signature(module.forward)

            def note(
                _: nn.Module,
                given: Any,
                named: Any,
                signature: inspect.Signature = signature,
                prefix: str = prefix,
            ) -> None:
                if prefix in heard:
                    return
                heard.add(prefix)
                arguments = signature.bind(*given, **named).arguments
                names = _READ if not prefix else ("input_ids",)
                for name in names:
                    value = arguments.get(name, arguments.get("kwargs", {}).get(name))
                    if isinstance(value, torch.Tensor):
                        found[prefix + name] = value

            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield


def predictions(model: PreTrainedModel, read: Mapping[str, torch.Tensor], *, several: bool) -> torch.Tensor:
    """What a model says: logits [N, C], or values [N, D]; of where answers stand, [N, T].

    Args:
        model: In evaluation mode.
        read: Of `what_is_read`.
        several: Whether each of L labels applies or not by itself: then logits [N * L, 2].
    """
    output = model(**read)
    if "start_logits" in output:
        return torch.cat([output.start_logits, output.end_logits])
    values = output.logits if "logits" in output else output.last_hidden_state
    if several:
        return torch.stack([values.flatten(), torch.zeros_like(values).flatten()], dim=1)
    if values.ndim == 3:
        values = _of_real_positions(values, read)
    return values[:: max(1, len(values) // _MOST_PREDICTIONS)]


def _of_real_positions(values_BTC: torch.Tensor, read: Mapping[str, torch.Tensor]) -> torch.Tensor:
    mask = read.get("attention_mask")
    if mask is None or mask.shape != values_BTC.shape[:2]:
        return values_BTC.flatten(0, 1)
    return values_BTC[mask.bool()]


def chooses(model: PreTrainedModel) -> bool:
    """Whether a model chooses from several answers; a bare body gives states, and a number is no choice."""
    return model.base_model is not model and not (
        type(model).__name__.endswith("ForSequenceClassification")
        and model.config.problem_type == "regression"
    )
