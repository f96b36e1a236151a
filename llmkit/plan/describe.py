"""A plan in words, for `llmkit plan`, `--dry-run` and the report."""

from collections.abc import Mapping
from typing import Any

from llmkit.hardware import Hardware
from llmkit.plan.plan import Plan
from llmkit.plan.sharing import words_of

HEADINGS = ("on", "processes", "shared as", "recompute", "rows at a time", "memory", "time", "cost")


def summary(plan: Plan, hardware: Hardware | None) -> tuple[str, ...]:
    """A plan in one line, for `HEADINGS` without the first."""
    used = bytes_text(plan.memory.total)
    if hardware is not None:
        full = plan.memory.total > hardware.memory_bytes
        used += f" of {bytes_text(hardware.memory_bytes)}" + (" (too much)" if full else "")
    time = cost = "unknown"
    if plan.seconds_low is not None and plan.seconds_high is not None:
        time = f"{seconds_text(plan.seconds_low)} to {seconds_text(plan.seconds_high)}"
    if plan.cost is not None:
        cost = f"{dollars_text(plan.cost[0])} to {dollars_text(plan.cost[1])}"
    rows = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps}"
    return str(plan.world_size), words_of(plan.layout), plan.recompute, rows, used, time, cost


def describe(plan: Plan, hardware: Hardware | None = None) -> list[tuple[str, str, str]]:
    """The plan as (section, key, text) in reading order; what was chosen for the machine says why.

    Args:
        plan: The plan.
        hardware: What it is for, where that was named: its memory is then told.
    """
    return [
        *_machine(plan),
        *_model(plan),
        *_batch(plan),
        *_length(plan),
        *_time(plan),
        *_data(plan),
        *_memory(plan, hardware),
        *_disk(plan),
        *_cache(plan),
        *(("notes", str(number), note) for number, note in enumerate(plan.notes, 1)),
    ]


def _machine(plan: Plan) -> list[tuple[str, str, str]]:
    settings = {
        "device": plan.device,
        "processes": str(plan.world_size) + (f" on {plan.nodes} machines" if plan.nodes > 1 else ""),
        **_shared(plan),
        "precision": plan.precision,
        "compile": "yes" if plan.compile else "no",
        "background_save": "yes" if plan.background_save else "no, training waits for it",
        "attention": plan.attention if plan.attention != "auto" else "auto (probed at the start of the run)",
    }
    return [("machine", key.replace("_", " "), text + _why(plan, key)) for key, text in settings.items()]


def _shared(plan: Plan) -> dict[str, str]:
    """Who shares what, where there is anything to share or to compute again."""
    told = {"parallel": words_of(plan.layout)} if plan.world_size > 1 else {}
    if plan.recompute != "none":
        told["recompute"] = plan.recompute
    if plan.offload:
        told["offload"] = "shards wait in the host's memory"
    return told


def _why(plan: Plan, setting: str) -> str:
    chosen = plan.choices.get(f"machine.{setting}")
    return f" ({chosen[1]})" if chosen else ""


def _model(plan: Plan) -> list[tuple[str, str, str]]:
    return [
        ("model", "parameters", f"{plan.num_parameters:,} ({short(plan.num_parameters)})"),
        *_learning(plan),
        ("model", "vocabulary", f"{plan.vocab_size:,}"),
        ("model", "context", f"{plan.context:,} tokens"),
        ("model", "FLOPs", _flops(plan)),
    ]


def _flops(plan: Plan) -> str:
    """Of a token and of the run; what is computed again is not counted, as in most published figures."""
    each = f"{short(plan.flops_per_token)} a token"
    if plan.num_steps is None:
        return each
    return f"{each}, {plan.flops_per_token * plan.num_steps * plan.tokens_per_step:.3g} in all"


def _learning(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.num_trained is None or plan.num_trained == plan.num_parameters:
        return []
    return [("model", "learn", f"{plan.num_trained:,} ({short(plan.num_trained)})")]


def _batch(plan: Plan) -> list[tuple[str, str, str]]:
    readers = plan.layout.data_size
    processes = "1 process" if readers == 1 else f"{readers} processes"
    if plan.layout.readers > 1:
        processes = f"{readers} groups of {plan.layout.readers} processes"
    rows = "row" if plan.micro_batch_size == 1 else "rows"
    split = f"{plan.micro_batch_size} {rows} x {plan.gradient_accumulation_steps} accumulated x {processes}"
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
    return lines


def _time(plan: Plan) -> list[tuple[str, str, str]]:
    """How long, what a step's time goes to, and what it costs."""
    lines = []
    if plan.seconds_low is not None and plan.seconds_high is not None and plan.length_seconds is None:
        spread = f"{seconds_text(plan.seconds_low)} to {seconds_text(plan.seconds_high)} (a rough estimate)"
        lines.append(("time", "in all", spread))
    names = {
        "compute": "arithmetic of a step",
        "gradients": "gradients sent",
        "gathers": "weights gathered",
        "layers": "layers joined",
        "optimizer": "optimizer's memory moved",
    }
    if len(plan.step_seconds) > 1:
        lines += [
            ("time", names[part], _range(*plan.step_seconds[part]))
            for part in names
            if part in plan.step_seconds
        ]
    if plan.cost is not None:
        lines.append(
            ("time", "cost", f"{dollars_text(plan.cost[0])} to {dollars_text(plan.cost[1])}" + _price(plan))
        )
    return lines


def _price(plan: Plan) -> str:
    """What an hour was taken to cost."""
    if plan.price is None:
        return ""
    low, high = plan.price
    if low == high:
        return f" (at ${low:g} an hour of a device)"
    return f" (if an hour of a device is ${low:g} to ${high:g}, assumed as of mid-2025; --price takes yours)"


def _range(low: float, high: float) -> str:
    return f"{low:.3g} s" if low == high else f"{low:.3g} to {high:.3g} s"


def _data(plan: Plan) -> list[tuple[str, str, str]]:
    """What is known of what is learned from."""
    if plan.rows:
        return _rows(plan.rows)
    if not plan.data:
        return []
    tokens, about = plan.data["tokens"], "" if plan.data["exact"] else "about "
    lines = [("data", "tokens", f"{about}{short(tokens)}")]
    if plan.data["documents"]:
        lines.append(("data", "documents", f"{plan.data['documents']:,}"))
    if plan.data["held_out_tokens"]:
        lines.append(("data", "held out", f"{about}{short(plan.data['held_out_tokens'])} tokens"))
    learned = plan.data.get("targets_per_row")
    if learned:
        lines.append(
            ("data", "learned", f"at most {learned:,} tokens of a row ({learned / plan.context:.1%})")
        )
    return lines


def _rows(rows: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    lines = []
    for part, name in (("train", "rows to learn from"), ("held_out", "rows held out")):
        facts = rows.get(part) or {}
        if not facts.get("num_rows"):
            continue
        words = [f"{facts['num_rows']:,}", f"{facts['num_tokens']:,} tokens"]
        if facts.get("num_targets"):
            words.append(f"{facts['num_targets'] / facts['num_tokens']:.1%} of them learned")
        if facts.get("longest"):
            words.append(f"the longest {facts['longest']:,}")
        if facts.get("num_cut"):
            words.append(f"{facts['num_cut']:,} cut short ({facts['num_cut'] / facts['num_rows']:.1%})")
        lines.append(("data", name, ", ".join(words)))
    return lines


def _interval(plan: Plan, key: str) -> str:
    steps: int | None = getattr(plan, key)
    if steps is None:
        return f"{plan.deferred[key]} (in steps once the speed is measured)"
    if key == "warmup_steps":
        return f"{steps:,} step{'' if steps == 1 else 's'}"
    return f"every {steps:,} step{'' if steps == 1 else 's'}, and at the end" if steps else "at the end"


_TERMS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "buffers": "buffers to send from",
    "teacher": "models that do not learn",
    "process": "process",
    "heap": "freed but kept",
    "copy": "copy to save from",
    "total": "total",
}


def _memory(plan: Plan, hardware: Hardware | None) -> list[tuple[str, str, str]]:
    memory = plan.memory
    sizes = {term: getattr(memory, term) for term in _TERMS}
    said = {"activations": _policies(plan)}
    lines = [
        ("memory", _TERMS[term], bytes_text(size) + said.get(term, ""))
        for term, size in sizes.items()
        if size
    ]
    if hardware is not None:
        short_of = ", too little" if memory.total > hardware.memory_bytes else ""
        lines.append(("memory", "of a device", bytes_text(hardware.memory_bytes) + short_of))
    if memory.host:
        lines.append(("memory", "on the host instead", bytes_text(memory.host)))
    return lines


def _policies(plan: Plan) -> str:
    """With which attention activations are counted, and how many there would be with other policies."""
    if len(plan.activations) < 2:
        return ""
    others = [f"{how} {bytes_text(size)}" for how, size in plan.activations.items() if how != plan.recompute]
    return f" (recompute: {plan.recompute}; {', '.join(others)})"


def _disk(plan: Plan) -> list[tuple[str, str, str]]:
    lines = [("disk", "a checkpoint", bytes_text(plan.checkpoint_bytes))]
    if plan.disk_bytes:
        lines.append(
            ("disk", "checkpoints at a time", f"at most {bytes_text(plan.disk_bytes['checkpoints'])}")
        )
        lines.append(("disk", "the model", bytes_text(plan.disk_bytes["model"])))
    return lines


def _cache(plan: Plan) -> list[tuple[str, str, str]]:
    cache = plan.teacher_cache
    if not cache:
        return []
    every = "rows" if cache["by"] == "row" else "rows, each time that one comes"
    kept = f"{cache['top_k']:,} of {cache['outputs']:,} outputs, {cache['num_keys']:,} {every}"
    return [("disk", "the teacher's cache", f"about {bytes_text(cache['bytes'])} ({kept})")]


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


def dollars_text(dollars: float) -> str:
    """Dollars for reading: 12,121.3 -> $12,100."""
    digits = max(0, len(str(int(dollars))) - 3)
    return f"${round(dollars, -digits):,.0f}" if dollars >= 10 else f"${dollars:.2f}"


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
