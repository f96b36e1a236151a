"""A plan in words, for `llmkit plan`, `--dry-run` and the report."""

from llmkit.plan.plan import Plan


def describe(plan: Plan) -> list[tuple[str, str, str]]:
    """The plan as (section, key, text) in reading order; what was chosen for the machine says why."""
    return [
        *_machine(plan),
        *_model(plan),
        *_batch(plan),
        *_length(plan),
        *_memory(plan),
        *_cache(plan),
        *(("notes", str(number), note) for number, note in enumerate(plan.notes, 1)),
    ]


def _machine(plan: Plan) -> list[tuple[str, str, str]]:
    settings = {
        "device": plan.device,
        "processes": str(plan.world_size),
        "precision": plan.precision,
        "compile": "yes" if plan.compile else "no",
        "background_save": "yes" if plan.background_save else "no, training waits for it",
        "attention": plan.attention if plan.attention != "auto" else "auto (probed at the start of the run)",
    }
    return [("machine", key.replace("_", " "), text + _why(plan, key)) for key, text in settings.items()]


def _why(plan: Plan, setting: str) -> str:
    chosen = plan.choices.get(f"machine.{setting}")
    return f" ({chosen[1]})" if chosen else ""


def _model(plan: Plan) -> list[tuple[str, str, str]]:
    return [
        ("model", "parameters", f"{plan.num_parameters:,} ({short(plan.num_parameters)})"),
        *_learning(plan),
        ("model", "vocabulary", f"{plan.vocab_size:,}"),
        ("model", "context", f"{plan.context:,} tokens"),
        ("model", "FLOPs per token", short(plan.flops_per_token)),
    ]


def _learning(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.num_trained is None or plan.num_trained == plan.num_parameters:
        return []
    return [("model", "learn", f"{plan.num_trained:,} ({short(plan.num_trained)})")]


def _batch(plan: Plan) -> list[tuple[str, str, str]]:
    processes = "1 process" if plan.world_size == 1 else f"{plan.world_size} processes"
    split = f"{plan.micro_batch_size} rows x {plan.gradient_accumulation_steps} accumulated x {processes}"
    return [
        ("batch", "step", f"{plan.rows_per_step:,} rows, {plan.tokens_per_step:,} tokens"),
        ("batch", "shared as", split + _why(plan, "micro_batch")),
    ]


def _length(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.num_steps is None:
        steps = f"as many as fit {seconds_text(plan.length_seconds or 0.0)}"
    else:
        tokens = short(plan.num_steps * plan.tokens_per_step)
        steps = f"{plan.num_steps:,} ({tokens} tokens, {plan.num_epochs:.2f} epochs)"
    lines = [("length", "steps", steps), ("length", "data", f"{plan.num_rows_per_epoch:,} rows a pass")]
    names = {"warmup_steps": "warm-up", "eval_every": "evaluation", "checkpoint_every": "checkpoint"}
    lines += [("length", name, _interval(plan, key)) for key, name in names.items()]
    if plan.keep_every != 0:
        lines.append(
            ("length", "kept for good", _interval(plan, "keep_every").removesuffix(", and at the end"))
        )
    if plan.seconds_low is not None and plan.seconds_high is not None and plan.length_seconds is None:
        spread = f"{seconds_text(plan.seconds_low)} to {seconds_text(plan.seconds_high)} (a rough estimate)"
        lines.append(("length", "time", spread))
    return lines


def _interval(plan: Plan, key: str) -> str:
    steps: int | None = getattr(plan, key)
    if steps is None:
        return f"{plan.deferred[key]} (in steps once the speed is measured)"
    if key == "warmup_steps":
        return f"{steps:,} step{'' if steps == 1 else 's'}"
    return f"every {steps:,} step{'' if steps == 1 else 's'}, and at the end" if steps else "at the end"


def _memory(plan: Plan) -> list[tuple[str, str, str]]:
    memory = plan.memory
    terms = ("weights", "gradients", "optimizer", "activations", "logits", "process", "copy", "total")
    names = {"copy": "copy to save from"}
    lines = [("memory", names.get(term, term), bytes_text(getattr(memory, term))) for term in terms]
    return [*lines, ("memory", "a checkpoint on disk", bytes_text(plan.checkpoint_bytes))]


def _cache(plan: Plan) -> list[tuple[str, str, str]]:
    cache = plan.teacher_cache
    if not cache:
        return []
    every = "rows" if cache["by"] == "row" else "rows, each time that one comes"
    kept = f"{cache['top_k']:,} of {cache['outputs']:,} outputs, {cache['num_keys']:,} {every}"
    return [("memory", "the teacher's cache on disk", f"about {bytes_text(cache['bytes'])} ({kept})")]


def short(number: float) -> str:
    """A number with three digits and a letter: 6,947,072 -> 6.95M."""
    for letter, power in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * power:
            digits = ",.0f" if number >= 1000 * power else ".3g"
            return f"{number / power:{digits}}{letter}"
    return f"{number:g}"


def bytes_text(count: int) -> str:
    """Bytes for reading: 12,345,678 -> 12.3 MB."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return f"{count} B"


def seconds_text(seconds: float) -> str:
    """A duration for reading, in the two largest units: 5,430 -> 1h30m."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    whole = round(seconds)
    for letter, size, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size}{letter}" + (f"{rest}{lower}" if rest else "")
    return f"{whole}s"
