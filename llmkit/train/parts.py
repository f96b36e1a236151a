"""What one process trains and what it reads: model and objective, rows by the plan, a teacher's words."""

from accelerate import Accelerator
from transformers import PreTrainedModel

from llmkit.data.taught import TaughtStore
from llmkit.launch.signals import StopSignal
from llmkit.models.attention import use_attention
from llmkit.models.build import left_out
from llmkit.models.rounded import roundings
from llmkit.objectives.base import LossModule
from llmkit.objectives.taught import Taught
from llmkit.plan import Plan
from llmkit.recipe.schema import Finetune, Pretrain, Section
from llmkit.report.console import Reporter
from llmkit.train.build import (
    Data,
    Feed,
    build_core,
    build_task_core,
    find_teacher,
    make_order,
    teacher_store,
)
from llmkit.train.job import Job
from llmkit.train.parallel import gather
from llmkit.train.samples import SampleData, SampleFeed
from llmkit.train.teaching import Asking, teach
from llmkit.train.vectors import begin_as_recipe_says


def build_core_of(job: Job, plan: Plan, data: Data | SampleData, reporter: Reporter) -> LossModule:
    """Model and objective; what is new or left out of a model that was loaded is told."""
    section = job.section()
    if isinstance(data, SampleData):
        core, new = build_task_core(job, plan, data)
        if new:
            reporter.note(f"{section.model.name}: a new head for {section.objective}: {', '.join(new)}")
        _tell_rounding(core, reporter)
        return core
    core = build_core(job, plan, data.tokenizer)
    spare = left_out(core.model)
    if spare:
        reporter.note(
            f"{section.model.name}: heads that {section.objective} does without are left out: {', '.join(spare)}"
        )
    for line in begin_as_recipe_says(core.model, section.model.embeddings, data.tokenizer, job.shards):
        reporter.note(line)
    _tell_rounding(core, reporter)
    return core


def gathered(
    core: LossModule, job: Job, plan: Plan, data: Data | SampleData, accelerator: Accelerator
) -> LossModule:
    """On the first process a sharded model, whole and on the host; every process takes part in gathering it."""
    whole: LossModule | None = None
    if accelerator.is_main_process:
        whole = (
            build_task_core(job, plan, data)[0]
            if isinstance(data, SampleData)
            else build_core(job, plan, data.tokenizer)
        )
    gather(core, whole)
    return whole or core


def _tell_rounding(core: LossModule, reporter: Reporter) -> None:
    """Say that what is measured while training is not what is exported."""
    found = [one.grid for one in roundings(core.model).values() if one.grid is not None]
    if found:
        reporter.note(
            f"{len(found):,} linear layers compute with weights rounded to {found[0].bits} bits, in evaluations "
            "too; the exported weights are not rounded"
        )


def feed_of(
    data: Data | SampleData,
    core: LossModule,
    plan: Plan,
    section: Section,
    accelerator: Accelerator,
    taught: TaughtStore | None = None,
) -> Feed | SampleFeed:
    """What of the data this process reads, step by step, by the plan."""
    if isinstance(data, SampleData):
        assert isinstance(section, Finetune)
        return SampleFeed(data, core.objective, plan, section, accelerator, taught)
    assert isinstance(section, Pretrain)
    return Feed(data, core.objective, plan, section, accelerator, taught)


def taught_before(
    job: Job,
    plan: Plan,
    core: LossModule,
    data: Data | SampleData,
    accelerator: Accelerator,
    reporter: Reporter,
    stop: StopSignal,
) -> TaughtStore | None:
    """What the teacher says of all rows of the run, on disk; None where it is asked at every step, or there is none."""
    store = teacher_store(job, plan)
    if store is None:
        return None
    assert isinstance(core.objective, Taught)
    section, material = job.section(), data.material if isinstance(data, SampleData) else None

    def load() -> PreTrainedModel:
        teacher = find_teacher(job, data.tokenizer, material)
        use_attention(teacher, "sdpa", isolate=isolates(section, plan))
        return teacher

    batches = feed_of(data, core, plan, section, accelerator).batches(make_order(job, data))
    asking = Asking(store, core.objective, batches, plan.precision != "fp32", stop.asked)
    teach(asking, load, accelerator, reporter, num_bytes=plan.teacher_cache["bytes"])
    return store


def isolates(section: Section, plan: Plan) -> bool:
    """Whether what stands in one line is kept apart: documents where the recipe says so, packed rows always."""
    return section.isolate_documents if isinstance(section, Pretrain) else plan.packed
