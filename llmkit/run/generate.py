"""`llmkit generate`: text from a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
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
) -> list[dict[str, Any]]:
    """Continue each prompt `samples` times.

    Args:
        word: A run, its name, or a model folder.
        prompts: Texts to go on from.
        sampling: How to draw.
        samples: Continuations of each prompt.
        seed: The same seed draws the same texts.
        runs: The folder of run folders.
        reporter: Told what does not fit.

    Returns:
        For each continuation `prompt`, `text`, `num_tokens` and `finished`.

    Raises:
        UsageError: The model does not write text.
        MissingError: There is no such model.
    """
    from llmkit.data.tokenizers import load_tokenizer
    from llmkit.evaluate.generate import generate as write
    from llmkit.evaluate.model import load_model
    from llmkit.models.build import kind_of

    place = find_model(word, runs)
    if kind_of(str(place)) not in ("causal", "seq2seq"):
        raise UsageError(
            f"{place}: this model does not write text",
            hint=f"a model that fills gaps: llmkit fill {place} TEXT",
        )
    model, tokenizer = load_model(place), load_tokenizer(str(place))
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    written = write(model, tokenizer, repeated, sampling, seed=seed)
    longest = max((one.num_tokens for one in written if not one.finished), default=sampling.max_new_tokens)
    if longest < sampling.max_new_tokens:
        reporter.warn(
            f"the model's length has room for {longest} new tokens here, not {sampling.max_new_tokens}"
        )
    for one in written[::samples]:
        if one.prompt_cut:
            reporter.warn(
                f"the prompt {one.prompt[:30]!r}... is longer than the model reads: "
                f"its first {one.prompt_cut} tokens were left out"
            )
    return [
        {"prompt": one.prompt, "text": one.text, "num_tokens": one.num_tokens, "finished": one.finished}
        for one in written
    ]
