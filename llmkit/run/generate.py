"""`llmkit generate`: text from a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.durable import read_manifest
from llmkit.errors import CorruptError, UsageError
from llmkit.recipe.schema import Sampling
from llmkit.report.console import Reporter
from llmkit.run.folders import find_model


def generate(
    word: str,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    runs: Path,
    reporter: Reporter,
    chat: bool | None = None,
    system: str = "",
    adapters: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Continue each prompt `samples` times; a chat model is asked it, by the template that it learned with.

    Args:
        word: A run, its name, or a model folder.
        prompts: Texts to go on from.
        sampling: How to draw.
        samples: Continuations of each prompt.
        seed: The same seed draws the same texts.
        runs: The folder of run folders.
        reporter: Told what does not fit.
        chat: Whether prompts are questions; None: where the model has a chat template, unless a run of llmkit trained
            it on text alone.
        system: What the system says to a chat model before the question.
        adapters: Runs with adapters for this model, `=WEIGHT` behind each or not; it computes with all of them.

    Returns:
        For each continuation `prompt`, `text`, `num_tokens`, `finished` and `chat`.

    Raises:
        UsageError: The model does not write text, or does not chat and is asked to.
        MissingError: There is no such model.
    """
    from llmkit.evaluate.chat import asked
    from llmkit.evaluate.generate import generate as write

    place, model, tokenizer = _load(word, adapters, runs)
    chats = _chats(place, tokenizer, chat, system)
    given = asked(tokenizer, prompts, system=system) if chats else prompts
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    written = write(model, tokenizer, [text for text in given for _ in range(samples)], sampling, seed=seed)
    longest = max((one.num_tokens for one in written if not one.finished), default=sampling.max_new_tokens)
    if longest < sampling.max_new_tokens:
        reporter.warn(
            f"the model's length has room for {longest} new tokens here, not {sampling.max_new_tokens}"
        )
    for prompt, one in zip(prompts, written[::samples], strict=True):
        if one.prompt_cut:
            reporter.warn(
                f"the prompt {prompt[:30]!r}... is longer than the model reads: "
                f"its first {one.prompt_cut} tokens were left out"
            )
    return [
        {
            "prompt": prompt,
            "text": one.text,
            "num_tokens": one.num_tokens,
            "finished": one.finished,
            "chat": chats,
        }
        for prompt, one in zip(repeated, written, strict=True)
    ]


def _load(word: str, adapters: Sequence[str], runs: Path) -> tuple[Path, Any, Any]:
    """A model, or one that computes with adapters, and its tokenizer; and where that is.

    Raises:
        UsageError: It does not write text, or the adapters are not for it.
        MissingError: There is no such model.
    """
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.model import load_model
    from llmkit.models.build import kind_of
    from llmkit.run.adapters import choose_adapters, load_adapted

    place = find_model(word, runs, adapters=not adapters)
    is_adapter = (place / "adapter_config.json").is_file() and not (place / "config.json").is_file()
    chosen = choose_adapters([str(place)] if is_adapter else adapters, runs)
    base = chosen[0].base if is_adapter else str(place)
    if kind_of(base) not in ("causal", "seq2seq"):
        raise UsageError(
            f"{place}: this model does not write text",
            hint=f"a model that fills gaps: llmkit fill {place} TEXT",
        )
    if not chosen:
        return place, load_model(place), load_tokenizer(str(place))
    made = load_adapted(chosen, base=base)
    return chosen[0].place, made.model, made.tokenizer


def _chats(place: Path, tokenizer: Any, wanted: bool | None, system: str) -> bool:
    """Whether the model is to be asked by its chat template.

    Raises:
        UsageError: It is, and has none.
    """
    if wanted is False and system:
        raise UsageError("--system is for a chat, and --raw is none", hint="leave one of them out")
    has_template = bool(tokenizer.chat_template)
    if not has_template and (wanted or system):
        raise UsageError(
            f"{place}: the tokenizer has no chat template",
            hint="leave --chat and --system out: the model goes on",
        )
    if wanted is None and not system:
        return has_template and not _learned_text_alone(place)
    return wanted is not False


def _learned_text_alone(place: Path) -> bool:
    """Whether a run of llmkit made the model, on text; its tokenizer may have a template for later."""
    try:
        identity = read_manifest(place).get("identity", {})
    except CorruptError:
        return False
    return "pretrain.objective" in identity
