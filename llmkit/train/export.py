"""A model out of a checkpoint, in the form in which the end of a run would leave it."""

from pathlib import Path

from llmkit.errors import UsageError
from llmkit.objectives.base import LossModule
from llmkit.optim import averaged
from llmkit.plan import Plan
from llmkit.recipe.schema import Finetune
from llmkit.train.build import Data, build_core, build_optimizer, build_task_core, open_data
from llmkit.train.checkpoint import Checkpoints, verify
from llmkit.train.finish import finish
from llmkit.train.job import Job
from llmkit.train.samples import SampleData, open_samples
from llmkit.train.sharded import load_checkpoint


def export_checkpoint(job: Job, checkpoint: Path) -> None:
    """Leave the model of a checkpoint in `job.folder`, with the figures of none.

    Args:
        job: The run, as it was prepared, but for its folder.
        checkpoint: One of its checkpoints.

    Raises:
        CorruptError: It is damaged.
        RunError: It is of another recipe.
        UsageError: It holds an adapter, which only a whole run merges.
    """
    section, plan = job.section(), job.checked_plan()
    if isinstance(section, Finetune) and section.adapter is not None:
        raise UsageError(
            f"{checkpoint}: a checkpoint of an adapter holds no model", hint="measure the run when it is done"
        )
    verify(checkpoint)
    data = open_samples(job) if job.rows else open_data(job)
    core = _core(job, plan, data)
    optimizer = build_optimizer(core, section, plan, lambda line: None)
    checkpoints = Checkpoints(checkpoint.parent, job.identity)
    state = load_checkpoint(checkpoints, checkpoint, core.trained, optimizer)
    averaged(optimizer)(finish)(job, plan, core, data.tokenizer, state, {})


def _core(job: Job, plan: Plan, data: Data | SampleData) -> LossModule:
    if isinstance(data, SampleData):
        return build_task_core(job, plan, data)[0]
    return build_core(job, plan, data.tokenizer)
