"""The export: a standard checkpoint folder that `from_pretrained` reads, published whole or not at all."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from llmkit.durable import foreign_write, write_folder
from llmkit.models.host import on_host_or_here


def save_model(
    folder: Path,
    model: PreTrainedModel,
    *,
    facts: Mapping[str, object],
    companions: Sequence[Callable[[Path], object]] = (),
) -> None:
    """Write weights (safetensors) and configuration to `folder`, and what travels along.

    Args:
        folder: The model folder; an older one is replaced when the new one is complete.
        model: Saved with the generation cache on, whatever training used: without it, generation is eight times
            slower.
        facts: Entries of the manifest.
        companions: Each writes its files, such as the tokenizer's, into the folder it is given.
    """
    model = on_host_or_here(model)  # which tensors share memory is only known of those on the host
    config = model.config
    model.config = copy.deepcopy(config)
    model.config.use_cache = True
    try:
        with write_folder(folder, facts=facts) as temporary:
            with foreign_write(temporary):
                model.save_pretrained(temporary)
            for write in companions:
                write(temporary)
    finally:
        model.config = config
