"""Recipe x hardware = numbers, without torch: see `make` for the decisions, `plan` for their result."""

from llmkit.plan.batch import PlanError, rows_of_batch
from llmkit.plan.describe import describe
from llmkit.plan.estimate import flops_per_token
from llmkit.plan.families import counts_from_padding, shape_of_config, shape_of_preset, with_lengths
from llmkit.plan.fit import check_fit, check_vectors, known_kinds
from llmkit.plan.make import make_plan
from llmkit.plan.memory import Memory, training_memory
from llmkit.plan.plan import DataFacts, Plan, SourceFacts
from llmkit.plan.presets import PRESETS, architecture_fields, model_fields, preset_fields
from llmkit.plan.rows import layout_of
from llmkit.plan.shape import ModelShape

__all__ = [
    "PRESETS",
    "DataFacts",
    "Memory",
    "ModelShape",
    "Plan",
    "PlanError",
    "SourceFacts",
    "architecture_fields",
    "check_fit",
    "check_vectors",
    "counts_from_padding",
    "describe",
    "flops_per_token",
    "known_kinds",
    "layout_of",
    "make_plan",
    "model_fields",
    "preset_fields",
    "rows_of_batch",
    "shape_of_config",
    "shape_of_preset",
    "training_memory",
    "with_lengths",
]
