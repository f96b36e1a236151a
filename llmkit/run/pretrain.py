"""`llmkit pretrain`: prepare the data once, plan, then train here or in worker processes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import write_file, write_json
from llmkit.errors import (
    LlmkitError,
    RecipeError,
    UsageError,
)
from llmkit.hardware import detect_hardware
from llmkit.launch.world import World, check_world, detect_world
from llmkit.plan import Plan, layout_of
from llmkit.plan.communication import identity_of
from llmkit.recipe import Loaded, resolved_yaml
from llmkit.recipe.objectives import RowLayout, other_sections
from llmkit.recipe.resolved import without_secrets
from llmkit.recipe.schema import Optim, Pretrain, Recipe, tokenize_of
from llmkit.registry import goal_of
from llmkit.report.console import Reporter
from llmkit.report.trying import try_command
from llmkit.run.export_check import check_exports, refuse_ahead
from llmkit.run.folders import Options, Result, anchored, leave_record, locked, placed, report_of, run_folder
from llmkit.run.planning import plan as plan_ahead
from llmkit.run.planning import plan_run
from llmkit.run.teacher_cache import cache_folder, check_cache
from llmkit.run.tokenize import corpora, find_tokenizer
from llmkit.run.training import (
    KILL_AT,
    as_begun,
    begun_identity,
    clear,
    flat,
    for_nodes,
    is_trained,
    refuse_another_run,
    report_end,
    train_job,
    warn_of_full_disk,
)
from llmkit.train.places import check_teacher, teacher_weights

if TYPE_CHECKING:
    from llmkit.data.corpus import Corpus
    from llmkit.data.shards import TokenShards
    from llmkit.train.job import Job

_UNLIKE = object()


def pretrain(loaded: Loaded, options: Options, reporter: Reporter, *, verb: str = "pretrain") -> Result:
    """Train the recipe's model, going on from the newest checkpoint; when it is trained already, say so.

    Args:
        loaded: The recipe.
        options: As for every verb.
        reporter: Told what happens.
        verb: The folder of the run that it goes to.

    Raises:
        UsageError: The recipe has no `pretrain` section, or its numbers do not fit together.
        InterruptedRunError: A signal stopped it; the same command goes on.
        RunError: It failed; the newest checkpoint is whole.
    """
    loaded = placed(loaded)
    recipe = loaded.recipe
    if recipe.pretrain is None:
        raise UsageError("the recipe has no `pretrain` section", hint="`llmkit init gpt` shows one")
    folder = run_folder(loaded, options, verb)
    world = detect_world(os.environ)
    if recipe.pretrain.distil is not None:
        check_teacher(recipe.pretrain.distil.teacher, recipe.pretrain.objective)
        check_cache(recipe.pretrain.distil, "pretrain")
    refuse_ahead(recipe.pretrain, verb)
    if world is None:
        plan_ahead(loaded, options)  # what cannot fit is told before anything is read
    first = world is None or world.rank == 0
    with locked(folder, world):
        if options.fresh and first:
            clear(folder)
        job, shards = prepare_job(loaded, options, reporter, folder, world)
        if is_trained(folder, job):
            reporter.note(f"{folder} is trained already; --fresh trains it anew")
        else:
            refuse_another_run(folder, job)
            if first:
                check_exports(job, reporter)
                _leave_plan(folder, loaded, job, shards, reporter)
            try:
                train_job(
                    job,
                    reporter,
                    world,
                    options,
                    lambda count: prepare_job(*for_nodes(loaded, options, count), reporter, folder, None)[0],
                )
            except LlmkitError as error:
                if first:
                    report_end(folder, options, error)
                raise
    report = report_of(folder)
    summary = {
        "model": str(folder / "model"),
        "metrics": report["final"],
        "headline": report["headline"],
        "report": str(folder / "report.html"),
    }
    kind = goal_of(recipe.pretrain.objective).model
    return Result(folder, summary, try_command(kind, str(folder.parent), recipe.pretrain.prompts))


def prepare_job(
    loaded: Loaded, options: Options, reporter: Reporter, folder: Path, world: World | None
) -> "tuple[Job, list[TokenShards]]":
    """Everything decided: tokenizer, shards, plan, identity. Nothing in the run folder is touched."""
    from llmkit.data.prepare import data_facts
    from llmkit.data.tokenizers import fingerprint, load_tokenizer
    from llmkit.train.job import Job

    # Starting training over does not mean reading the text again.
    text, text_for_tokenizer = corpora(loaded, replace(options, fresh=False), reporter)
    name, figures = find_tokenizer(loaded, text_for_tokenizer, reporter)
    tokenizer = load_tokenizer(name)
    shards = text.shards(tokenizer)
    hardware = detect_hardware(loaded.recipe.machine)
    facts = data_facts(shards)
    plan = plan_run(
        loaded,
        options,
        hardware,
        facts,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        world=world,
    )
    plan = as_begun(plan, folder, loaded)
    if world is not None:
        check_world(world, plan.world_size)
    assert loaded.recipe.pretrain is not None
    weights = _weights(text, shards, plan, layout_of(loaded.recipe.pretrain), reporter)
    job = Job(
        recipe=without_secrets(loaded),
        plan=plan.to_dict(),
        folder=str(folder),
        tokenizer=name,
        tokenizer_figures=figures,
        shards=[str(shard.folder) for shard in shards],
        weights=weights,
        identity=_identity(loaded, plan, fingerprint(tokenizer), shards, weights, begun_identity(folder)),
        teacher_cache=cache_folder(
            loaded.recipe.pretrain,
            plan,
            options,
            {
                "text": [[shard.folder.name, shard.split("train").num_tokens] for shard in shards],
                "tokenizer": fingerprint(tokenizer),
                "language": loaded.recipe.language,
                "weights": weights,
            },
            loaded.recipe.seed,
        ),
        command=options.command,
        face={"json": options.json, "quiet": options.quiet},
        deadline=options.deadline,
        self_check=options.self_check,
        kill_at=int(os.environ[KILL_AT]) if KILL_AT in os.environ else None,
    )
    return job, shards


def _weights(
    text: "Corpus", shards: "Sequence[TokenShards]", plan: Plan, layout: RowLayout, reporter: Reporter
) -> list[float] | None:
    """The sources' weights, lowered where a source would be read more than `max_epochs` times over.

    What they come to is told: each source's share of the rows, and how often it is read.

    Raises:
        RecipeError: The sources have too little text for that, or the run's length cannot be counted.
    """
    from llmkit.data.order import capped_weights
    from llmkit.data.rows import Rows

    caps = [source.max_epochs for source in text.sources]
    weights = text.weights
    if weights is None:
        return None
    if plan.num_steps is None and any(caps):
        raise RecipeError(
            "`max_epochs` needs a run whose rows can be counted beforehand",
            hint="give `train.length` in tokens, steps or epochs",
        )
    if plan.num_steps is None:
        return weights
    sizes = Rows([shard.split("train") for shard in shards], layout.stride, overlap=layout.overlap).sizes
    rows = plan.num_steps * plan.rows_per_step
    if any(caps):
        weights = capped_weights(sizes, weights, caps, rows)
    for shard, size, weight in zip(shards, sizes, weights, strict=True):
        share = weight / sum(weights)
        reporter.note(f"{shard.name}: {share:.1%} of the rows, read {share * rows / size:.3g} times over")
    return weights


def _leave_plan(
    folder: Path, loaded: Loaded, job: "Job", shards: "Sequence[TokenShards]", reporter: Reporter
) -> None:
    """Leave what was decided in the run folder: only now, when it is known to be this run's."""
    from llmkit.data.prepare import data_card, publish_tokenizer

    plan = job.checked_plan()
    leave_record(folder, loaded)
    if "found" in job.tokenizer_figures:  # made by this recipe
        publish_tokenizer(Path(job.tokenizer), folder.parent / "tokenize" / "tokenizer")
    write_json(folder / "data.json", data_card(shards))
    write_json(folder / "plan.json", plan.to_dict())
    write_file(folder / "resolved.yaml", resolved_yaml(anchored(loaded), plan.choices))
    for note in plan.notes:
        reporter.note(note)
    warn_of_full_disk(folder, job, plan, reporter)


def _identity(
    loaded: Loaded,
    plan: Plan,
    tokenizer: str,
    shards: "Sequence[TokenShards]",
    weights: Sequence[float] | None,
    begun: Mapping[str, Any],
) -> dict[str, Any]:
    """What a resumed run must share with the saved one, by the recipe's own keys.

    A setting that `begun`, the identity of a run in this folder, does not know is left out where it is as it would be
    unwritten: the run was begun before there was such a setting, and nothing has changed.
    """
    recipe = loaded.recipe
    assert recipe.pretrain is not None
    settings = recipe.pretrain.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(
                (
                    "data",
                    "tokenizer",
                    "held_out",
                    "checkpoint",
                    "eval",
                    "prompts",
                    "sampling",
                    "export_check",
                ),
                True,
            ),
            **dict.fromkeys(other_sections(recipe.pretrain.objective), True),
            "train": {"bad_numbers", "max_skipped"},  # what may have to change to go on after a stop
        },
    )
    made_by = {}
    spec = tokenize_of(recipe)
    if spec is not None and recipe.pretrain.tokenizer is None:
        made_by = spec.model_dump(mode="json", exclude={"data", "held_out"})
    named = {**flat(settings, "pretrain"), **flat(made_by, "tokenize")}
    new = _as_unwritten(recipe, named).difference(begun) if begun else ()
    return {
        "seed": recipe.seed,
        **{key: loaded.expressions.get(key, value) for key, value in named.items() if key not in new},
        **identity_of(recipe.machine.communication),
        "rows per step": plan.rows_per_step,
        "text": [[shard.name, shard.folder.name] for shard in shards],
        "weights": weights,
        "tokenizer": tokenizer,
        **_files_of(recipe.pretrain),
    }


def _as_unwritten(recipe: Recipe, named: Mapping[str, Any]) -> set[str]:
    """The keys whose values are those that a setting has where the recipe says nothing."""
    assert recipe.pretrain is not None
    others = recipe.model_dump(mode="json", exclude_defaults=True)
    changed = {key for name in ("pretrain", "tokenize") for key in flat(others.get(name) or {}, name)}
    optim = recipe.pretrain.train.optim
    own = Optim.model_validate({"name": optim.name, "schedule": optim.schedule}).model_dump(mode="json")
    return {
        key
        for key, value in named.items()
        if key not in changed or own.get(key.removeprefix("pretrain.train.optim."), _UNLIKE) == value
    }


def _files_of(section: Pretrain) -> dict[str, str]:
    """What lies in files that the section names beside the text: hashes by what they are."""
    from llmkit.data.vectors import hash_of

    found = {}
    if section.distil is not None:
        found["teacher"] = teacher_weights(section.distil.teacher)
    if section.model.embeddings is not None:
        found["word vectors"] = hash_of(Path(section.model.embeddings))
    return found
