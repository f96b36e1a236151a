"""What a person types to see what a model can do."""

import shlex
from collections.abc import Sequence

from llmkit.registry import ModelKind, goal_of

GAP = "[MASK]"


def try_trained(objective: str, word: str, prompts: Sequence[str] = ()) -> str:
    """The command for a model that was trained so; one that answers is asked a question where the recipe has none.

    Args:
        objective: An objective or a task.
        word: The run or model folder.
        prompts: The recipe's.
    """
    goal = goal_of(objective)
    if objective == "seq2seq":  # by the task's own frame and prefix, whatever the model
        return shlex.join(["llmkit", "predict", word, *(prompts or ["a text of yours"])[:1]])
    return try_command(goal.model, word, prompts or (["What can you do?"] if goal.chats else []))


def try_command(kind: ModelKind, word: str, prompts: Sequence[str] = ()) -> str:
    """The command for a model of this kind.

    Args:
        kind: What the model does.
        word: The run or model folder.
        prompts: The recipe's.
    """
    if kind in ("sequence", "tokens"):
        return shlex.join(["llmkit", "predict", word, *(prompts or ["a text of yours"])[:1]])
    if kind in ("detector", "encoder", "answers"):
        return shlex.join(["llmkit", "eval", word])
    if kind in ("masked", "pairs"):
        text = next((prompt for prompt in prompts if GAP in prompt), f"the {GAP} of")
        return shlex.join(["llmkit", "fill", word, text])
    return shlex.join(["llmkit", "generate", word, *(prompts or ["Once"])[:1], "-n", "3"])
