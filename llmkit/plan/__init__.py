"""Recipe x hardware = numbers, without torch: see `make` for the decisions, `plan` for their result."""

from llmkit.plan.batch import PlanError, rows_of_batch
from llmkit.plan.describe import describe
from llmkit.plan.estimate import Memory, flops_per_token, training_memory
from llmkit.plan.make import make_plan
from llmkit.plan.plan import DataFacts, Plan, SourceFacts
from llmkit.plan.shape import PRESETS, ModelShape, preset_fields, shape_of_config, shape_of_preset

__all__ = [
    "PRESETS",
    "DataFacts",
    "Memory",
    "ModelShape",
    "Plan",
    "PlanError",
    "SourceFacts",
    "describe",
    "flops_per_token",
    "make_plan",
    "preset_fields",
    "rows_of_batch",
    "shape_of_config",
    "shape_of_preset",
    "training_memory",
]
