"""What is looked at while a run trains: figures of held-out rows, samples, speed and memory."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule

from llmkit.evaluate.complete import complete
from llmkit.evaluate.judge import judge
from llmkit.evaluate.predict import predict
from llmkit.evaluate.split import sum_over
from llmkit.models.host import on_host_or_here
from llmkit.models.peak import measure_peak_flops
from llmkit.objectives.base import Batch, Judges, LossModule
from llmkit.plan import Plan
from llmkit.recipe.schema import Finetune, Section
from llmkit.registry import goal_of
from llmkit.train.accelerators import peak_memory_bytes
from llmkit.train.build import Data, Feed
from llmkit.train.job import Job
from llmkit.train.parallel import adding_up
from llmkit.train.samples import SampleData, SampleFeed
from llmkit.train.state import mix_seed

_SAMPLING = 1 << 40  # keeps the seeds of samples apart from those of micro-batches
_ROWS_COMPARED = 8


def evaluate(
    core: LossModule,
    feed: Feed | SampleFeed,
    data: Data | SampleData,
    accelerator: Accelerator,
    rows: int | None,
    between: Callable[[], object],
    section: Section,
) -> dict[str, float]:
    """Figures on `rows` held-out rows (None: all), named `eval/...`; every process calls it."""
    found: dict[int, Any] = {}
    reduce = adding_up(lambda sums: accelerator.reduce(sums, "sum"), feed.speaks)
    spare = feed.largest() if isinstance(core, FSDPModule) else None
    sums = sum_over(core, feed.held_out(rows), reduce, between, found, spare)
    if not sums["num_targets"]:
        return {}  # `held_out: 0`
    if isinstance(data, Data) and "bits_per_byte" in goal_of(section.objective).metrics:
        sums["num_bytes"] = sums["num_targets"] * data.bytes_per_token
    figures = core.objective.summarise(sums)
    if isinstance(data, SampleData) and isinstance(core.objective, Judges):
        figures |= judge(core.objective, data.held_out, _from_all(accelerator, found))
    return {f"eval/{name}": value for name, value in figures.items()}


def _from_all(accelerator: Accelerator, found: dict[int, Any]) -> dict[int, Any]:
    """What was found of rows by any process."""
    if accelerator.num_processes == 1:
        return found
    return dict(gather_object(list(found.items())))


def sample(core: LossModule, data: Data | SampleData, job: Job, step: int) -> list[tuple[str, str]]:
    """Each prompt of the recipe and what the model makes of it: a text, or what a task predicts as JSON."""
    section = job.section()
    seed = mix_seed(job.seed, _SAMPLING, step)
    kind = goal_of(section.objective).model
    answers = (
        isinstance(section, Finetune)
        and section.task == "seq2seq"
        and not core.model.config.is_encoder_decoder
    )
    if isinstance(data, SampleData) and (answers or kind not in ("causal", "seq2seq")):
        rows = [{"text": prompt, "tokens": prompt.split()} for prompt in section.prompts]
        said = predict(core, rows)
        return [
            (prompt, str(one["text"]) if answers else json.dumps(one, ensure_ascii=False))
            for prompt, one in zip(section.prompts, said, strict=False)
        ]
    chat = goal_of(section.objective).chats and bool(data.tokenizer.chat_template)
    model = on_host_or_here(core.model)  # a text grows token by token
    return complete(model, kind, data.tokenizer, section.prompts, section.sampling, seed=seed, chat=chat)


def speed_watcher(plan: Plan, device: torch.device) -> Callable[[float], Mapping[str, float]]:
    """Tokens per second -> model FLOPs utilisation of the measured peak, and memory."""
    peak = measure_peak_flops(device, torch.float32 if plan.precision == "fp32" else torch.bfloat16)

    def watch(tokens_per_s: float) -> Mapping[str, float]:
        mfu = tokens_per_s * plan.flops_per_token / (peak * plan.world_size)
        memory = peak_memory_bytes(device)
        return {"mfu": round(mfu, 4), **({} if memory is None else {"memory_bytes": memory})}

    return watch


def some_rows(feed: Feed | SampleFeed) -> Batch:
    """A few rows of this process, held out or else the longest to learn from, to compare models on."""
    batch = next(feed.held_out(_ROWS_COMPARED), None)
    return feed.largest() if batch is None else batch
