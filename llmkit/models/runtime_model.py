"""What models of other runtimes have in common: they are asked as a transformers model is, and write as one does.

Documents that share a row without seeing each other are asked one by one; other positions than 0, 1, ... are refused.

Shape suffixes: B rows, D documents, T positions, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.utils.generic import ModelOutput

from llmkit.errors import UsageError


class RuntimeModel(nn.Module, GenerationMixin):
    """What all of them have: it is asked as a transformers model is, and writes as one does.

    Args:
        file: The model's file.
        config: That of the transformers model that it was made from.
    """

    main_input_name = "input_ids"
    base_model_prefix = "inside"
    _is_stateful = False
    _supports_attention_backend = False
    _supports_sdpa = False

    def __init__(self, file: Path, config: PretrainedConfig) -> None:
        super().__init__()
        self.file = file
        self.config = config
        self.generation_config = _writing_settings(file.parent, config)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def base_model(self) -> "RuntimeModel":
        """Itself: nothing inside can be asked alone."""
        return self

    def get_input_embeddings(self) -> None:
        """None: they are out of reach."""

    def get_output_embeddings(self) -> None:
        """None: the model's own logits are taken."""

    def get_experts_implementation(self) -> dict[str, str]:
        """None: what computes experts is the runtime's."""
        return {}

    def num_parameters(self) -> int:
        """How many numbers the file holds as weights."""
        raise NotImplementedError

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What the runtime makes of inputs [B, T]; by name."""
        raise NotImplementedError

    def last(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The logits [B, 1, V] of each row's last position."""
        return {"logits": self.run(inputs)["logits"][:, -1:]}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **more: torch.Tensor | None,
    ) -> ModelOutput:
        """As the transformers model's.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 where a row is filled up; None: nowhere.
            use_cache: Of no meaning here.
            logits_to_keep: 1: the logits of each row's last position only; 0: all.
            return_dict: Of no meaning here.
            more: `token_type_ids`, `decoder_input_ids`.

        Raises:
            UsageError: There is something that the file does not take.
        """
        given = {name: value for name, value in more.items() if value is not None}
        positions = given.pop("position_ids", None)
        if positions is not None and not _is_plain(positions):
            if attention_mask is not None or given or not _restart(positions):
                raise UsageError(
                    f"{self.file}: an exported model takes no positions, and these are not 0, 1, 2, ...",
                    hint="measure it on rows that are not packed",
                )
            return self._by_document(input_ids, positions.expand_as(input_ids))
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ask = self.last if logits_to_keep else self.run
        with torch.inference_mode():
            found = ask({"input_ids": input_ids, "attention_mask": mask_BT, **given})
        return ModelOutput(found)

    def _by_document(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> ModelOutput:
        """Documents that share a row do not see each other: each of them is asked alone, as many as rows at once."""
        starts = (positions_BT == 0).nonzero().tolist()
        rows, length = ids_BT.shape
        ends = [
            after if own == row else length
            for (row, _), (own, after) in zip(starts, [*starts[1:], [rows, 0]], strict=True)
        ]
        spans = sorted(
            ((row, first, end) for (row, first), end in zip(starts, ends, strict=True)),
            key=lambda span: span[1] - span[2],
        )
        whole: dict[str, torch.Tensor] = {}
        for number in range(0, len(spans), rows):
            some = spans[number : number + rows]
            width = max(end - first for _, first, end in some)
            alone_DT, mask_DT = ids_BT.new_zeros(len(some), width), ids_BT.new_zeros(len(some), width)
            for place, (row, first, end) in enumerate(some):
                alone_DT[place, : end - first] = ids_BT[row, first:end]
                mask_DT[place, : end - first] = 1
            for name, value in self.forward(alone_DT, mask_DT).items():
                into = whole.setdefault(name, value.new_zeros(rows, length, *value.shape[2:]))
                for place, (row, first, end) in enumerate(some):
                    into[row, first:end] = value[place, : end - first]
        return ModelOutput(whole)

    @torch.inference_mode()
    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **settings: Any
    ) -> torch.Tensor:
        """Write, by the code and the settings of transformers; nothing but the last logits is asked for each token.

        Args:
            input_ids: [B, T].
            attention_mask: 0 where a row is filled up: on the left where the model goes on from what it reads. Such
                rows are gone on from one by one, since exported models count positions from a row's first column.
            settings: As transformers has them.

        Returns:
            What a model reads and goes on with; of an encoder-decoder what it writes.
        """
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        settings["use_cache"] = False
        if self.config.is_encoder_decoder:
            # The encoder cannot be asked alone: in the place of what it makes of a text stands the text.
            settings["encoder_outputs"] = ModelOutput(last_hidden_state=input_ids)
        if self.config.is_encoder_decoder or bool(mask_BT.all()):
            written: torch.Tensor = super().generate(input_ids=input_ids, attention_mask=mask_BT, **settings)
            return written
        if not bool((mask_BT.diff(dim=1) >= 0).all()):
            raise UsageError(f"{self.file}: what is gone on from is filled up on the left")
        width, rows = input_ids.shape[1], []
        for row_T, mask_T in zip(input_ids, mask_BT.bool(), strict=True):
            alone_1T = row_T[None, mask_T]
            own: torch.Tensor = super().generate(
                input_ids=alone_1T, attention_mask=torch.ones_like(alone_1T), **settings
            )
            rows.append(torch.cat([row_T, own[0, alone_1T.shape[1] :]]))
        longest, pad = max(map(len, rows)), settings.get("pad_token_id")
        pad = self.generation_config.pad_token_id if pad is None else pad
        filled_BT = input_ids.new_full((len(rows), max(longest, width)), 0 if pad is None else int(pad))
        for number, row_T in enumerate(rows):
            filled_BT[number, : len(row_T)] = row_T
        return filled_BT

    def can_generate(self) -> bool:
        """Whatever gives logits can."""
        return True

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: Mapping[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What `forward` is given for the next token."""
        asked = {"input_ids": input_ids}
        if encoder_outputs is not None:
            asked = {"input_ids": encoder_outputs["last_hidden_state"], "decoder_input_ids": input_ids}
        return {**asked, "attention_mask": attention_mask, "logits_to_keep": 1}


def _writing_settings(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """How a model writes where nothing else is said."""
    said = folder / "generation_config.json"
    if said.is_file():
        found: GenerationConfig = GenerationConfig.from_dict(json.loads(said.read_bytes()))
        return found
    return GenerationConfig.from_model_config(config)


def _is_plain(positions_BT: torch.Tensor) -> bool:
    return bool((positions_BT == torch.arange(positions_BT.shape[-1], device=positions_BT.device)).all())


def _restart(positions_BT: torch.Tensor) -> bool:
    """Whether rows are documents one after the other, whose positions count from 0 in each."""
    goes_on = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    starts = positions_BT[:, 1:] == 0
    return bool((positions_BT[:, :1] == 0).all() and (goes_on | starts).all())


def check_taken(file: Path, inputs: Mapping[str, torch.Tensor], takes: Sequence[str]) -> None:
    """Whether a file takes what it is to be given.

    Raises:
        UsageError: It does not.
    """
    more = sorted(set(inputs) - set(takes))
    if more:
        raise UsageError(
            f"{file}: the exported model does not take {', '.join(more)}", hint=f"it takes {', '.join(takes)}"
        )
