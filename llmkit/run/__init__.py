"""The verbs: from a recipe to artefacts. Each finds what is done, makes what is missing, says what is next."""

import os
from typing import Any

from llmkit.errors import UsageError
from llmkit.launch.world import detect_world
from llmkit.recipe import Loaded
from llmkit.report.console import Reporter
from llmkit.run.compression import compress, outline_compression
from llmkit.run.evaluate import evaluate
from llmkit.run.evaluate_outline import outline_evaluation
from llmkit.run.finetune import finetune, plan_finetune
from llmkit.run.folders import Options, Result, find_model, placed
from llmkit.run.generate import generate
from llmkit.run.planning import outline, plan, plan_without_text
from llmkit.run.pretrain import pretrain
from llmkit.run.tokenize import tokenize, tokenizer_of
from llmkit.run.variants import run_variants
from llmkit.train.places import check_teacher

__all__ = [
    "Options",
    "Result",
    "compress",
    "evaluate",
    "find_model",
    "finetune",
    "generate",
    "outline",
    "outline_compression",
    "outline_evaluation",
    "plan",
    "plan_finetune",
    "plan_without_text",
    "pretrain",
    "run_all",
    "tokenize",
    "tokenizer_of",
]


def run_all(loaded: Loaded, options: Options, reporter: Reporter) -> Result:
    """Do all that the recipe holds, in order; of a recipe with variants, all that each of them holds.

    Raises:
        UsageError: It holds nothing to do.
    """
    if loaded.variants:
        return run_variants(loaded, options, reporter, run_all)
    loaded = placed(loaded)
    recipe = loaded.recipe
    done: dict[str, Result] = {}
    world = detect_world(os.environ)
    if recipe.pretrain is not None and recipe.pretrain.distil is not None:
        check_teacher(recipe.pretrain.distil.teacher, recipe.pretrain.objective)  # before any text is read
    first = (
        world is None or world.rank == 0
    )  # the others meet it in training, where shards and tokenizer are found
    if recipe.tokenize is not None and first:
        done["tokenize"] = tokenize(loaded, options, reporter)
    if recipe.pretrain is not None:
        done["pretrain"] = pretrain(loaded, options, reporter)
    if recipe.finetune is not None:
        done["finetune"] = finetune(loaded, options, reporter)
    if recipe.eval is not None and first:
        done["eval"] = evaluate(None, loaded, options, reporter, alone=True)
        for name, *figures in done["eval"].table[1:]:
            reporter.note(f"{name} {' '.join(figures)}")
    if recipe.compress is not None and first:
        done["compress"] = compress(None, loaded, options, reporter)
        for name, *figures in done["compress"].table[1:]:
            reporter.note(f"{name} {' '.join(figures)}")
    if not done and first:
        raise UsageError("the recipe has no section to run", hint="`llmkit init gpt` shows a whole one")
    summary: dict[str, Any] = {verb: result.summary for verb, result in done.items()}
    last = done.get("finetune") or done.get("pretrain") or next(reversed(done.values()), None)
    failed = next((result.failed for result in done.values() if result.failed is not None), None)
    return Result(options.runs / recipe.name, summary, last.next_command if last else "", failed=failed)
