"""Rows of `dpo`: a prompt and two answers, the better one known; or one answer that is good or bad (KTO).

**Source**: Rafailov et al. 2023, "Direct Preference Optimization", section 3; whole dialogues: Bai et al. 2022,
"Training a Helpful and Harmless Assistant", section 2; one answer: Ethayarajh et al. 2024, "KTO", section 4.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.data.places import Fault
from llmkit.data.records.form import Form, average, refused, require, unknown_form
from llmkit.data.records.names import NAMES
from llmkit.data.records.pairs import without_end
from llmkit.data.records.record import Fields, Record, Roles, Row, columns_of, text_of
from llmkit.data.records.turns import Turn, check_order, keys_of, turns_of
from llmkit.data.tables import short
from llmkit.recipe.labelled import Labelled

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_SPEAKS = {"Human": "user", "Assistant": "assistant"}
WORDS = {
    "preference": "preferences: a prompt, a chosen and a rejected answer",
    "sharegpt": "preferences in ShareGPT's form",
    "dialogues": "preferences: whole dialogues, chosen and rejected",
    "kto": "answers that are good or bad (KTO)",
}


def recognise_dpo(sample: Sequence[Record], data: Labelled) -> Form:
    """The form of rows with preferences.

    Raises:
        DataError: They are of none that is known.
    """
    roles = Roles(columns_of(sample), data.columns, NAMES["dpo"])
    form = data.form if data.form != "auto" else _form_of(sample, roles)
    needed = {"kto": ("prompt", "label"), "dialogues": ("chosen", "rejected")}
    require(roles, needed.get(form, ("prompt", "chosen", "rejected")), "dpo", sample, data.form)
    counts: Counter[str] = Counter()
    reader = _Reader(roles, data.columns, counts)
    row = {"kto": reader.judged, "dialogues": reader.dialogues}.get(form, reader.preferred)

    def said(rows: Sequence[Row]) -> str:
        turns = sum(turn["role"] == "user" for made in rows for turn in made["prompt"])
        good = sum(made.get("label", False) for made in rows)
        judged = f", {good:,} of {len(rows):,} good" if form == "kto" else ""
        return f"read as {WORDS[form]}, {average(turns, len(rows))} turns on average{judged}"

    return Form(form, row, said, counts)


def _form_of(sample: Sequence[Record], roles: Roles) -> str:
    if roles.has("chosen", "rejected"):
        if not roles.has("prompt"):
            return "dialogues"
        keys = keys_of(roles.get(sample[0].fields, "prompt"), {})
        return "sharegpt" if keys is not None and keys.role == "from" else "preference"
    if roles.has("prompt", "label"):
        return "kto"
    lacking = next((role for role in ("prompt", "chosen", "rejected") if not roles.has(role)), "")
    raise unknown_form("dpo", sample, lacking if roles.has("chosen") or roles.has("rejected") else "")


class _Reader:
    """Makes rows canonical.

    Args:
        roles: Which column is what.
        asked: The recipe's `columns`.
        counts: What is met on the way.
    """

    def __init__(self, roles: Roles, asked: Mapping[str, str], counts: Counter[str]) -> None:
        self.roles, self.asked, self.counts = roles, asked, counts

    def preferred(self, fields: Fields) -> Row:
        """A prompt and two answers, each a text, a turn or turns; those that hold the prompt are cut after it."""
        prompt = self._system(fields, self._turns(fields, "prompt", "user"))
        chosen, rejected = (self._turns(fields, role, "assistant") for role in ("chosen", "rejected"))
        if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
            shared, chosen, rejected = _parted(chosen, rejected)
            prompt = shared if len(shared) >= len(prompt) else prompt
        return _checked(prompt, chosen, rejected)

    def dialogues(self, fields: Fields) -> Row:
        """Two whole dialogues: what they share is the prompt."""
        chosen, rejected = (self._dialogue(fields, role) for role in ("chosen", "rejected"))
        shared, chosen, rejected = _parted(chosen, rejected)
        return _checked(self._system(fields, shared), chosen, rejected)

    def judged(self, fields: Fields) -> Row:
        """A prompt, an answer, and whether it is good; the answer may be the last turn of the prompt's column."""
        prompt = self._system(fields, self._turns(fields, "prompt", "user"))
        if self.roles.get(fields, "completion") is not None:
            completion = self._turns(fields, "completion", "assistant")
        else:
            prompt, completion = prompt[:-1], prompt[-1:]
        check_order([*prompt, *completion])
        _check_sides(prompt, completion)
        label = _truth(self.roles.value(fields, "label"), self.roles.column("label"))
        return {"prompt": prompt, "completion": completion, "label": label}

    def _turns(self, fields: Fields, role: str, speaker: str) -> list[Turn]:
        value, column = self.roles.value(fields, role), self.roles.column(role)
        if isinstance(value, dict):
            value = [value]
        keys = keys_of(value, self.asked)
        if isinstance(value, list) and keys is not None:
            turns = turns_of(value, column, keys)
        else:
            turns = [{"role": speaker, "content": text_of(value, column, role)}]
        if turns[-1]["role"] == "assistant" and turns[-1]["content"]:
            turns[-1]["content"] = without_end(turns[-1]["content"], self.counts)
        return turns

    def _dialogue(self, fields: Fields, role: str) -> list[Turn]:
        value = self.roles.value(fields, role)
        if not isinstance(value, str):
            return self._turns(fields, role, "assistant")
        return _spoken(text_of(value, self.roles.column(role), role), self.roles.column(role))

    def _system(self, fields: Fields, turns: list[Turn]) -> list[Turn]:
        value = self.roles.get(fields, "system")
        if value is None or value == "" or (turns[:1] and turns[0]["role"] == "system"):
            return turns
        return [{"role": "system", "content": text_of(value, self.roles.column("system"), "system")}, *turns]


def _spoken(text: str, column: str) -> list[Turn]:
    """A dialogue as one text, in which `Human:` and `Assistant:` begin the turns.

    Raises:
        Fault: It does not begin so, or somebody says nothing.
    """
    parts = _SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        hint = (
            "write `\\n\\nHuman: ...\\n\\nAssistant: ...`, or turns, or give the prompt a column of its own"
        )
        raise refused("no dialogue", f"column {column!r} is no dialogue: {short(text)}", hint, text)
    return [
        {"role": _SPEAKS[speaker], "content": text_of(said.strip(), column, column)}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _parted(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """What two dialogues share at their beginning, up to a turn that an assistant answers, and their rests."""
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        same += 1
    same = min(same, len(chosen) - 1, len(rejected) - 1)
    while same > 0 and chosen[same]["role"] != "assistant":
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def _checked(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> Row:
    """The row, if all follows in order and the answers differ.

    Raises:
        Fault: It does not.
    """
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_sides(prompt, answer, side)
        check_order([*prompt, *answer], f"prompt and {side}")
    if chosen == rejected:
        hint = "repair or remove the row; `on_error: skip` leaves such rows out"
        raise refused("equal answers", "chosen and rejected are the same", hint, chosen[-1]["content"])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _check_sides(prompt: Sequence[Turn], answer: Sequence[Turn], side: str = "completion") -> None:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise _wrong_end("the prompt does not end with the user's turn", "a prompt ends with a question")
    if not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
        raise _wrong_end(f"{side} is not what the assistant says", "an answer begins and ends with its turn")


def _wrong_end(what: str, hint: str) -> Fault:
    return refused("wrong order of roles", what, f"{hint}; `on_error: skip` leaves such rows out")


_TRUE = ("true", "1", "1.0", "+1", "yes", "good", "up", "thumbs up", "thumbs_up", "like", "desirable", "👍")
_FALSE = (
    "false", "0", "0.0", "-1", "-1.0", "no", "bad", "down", "thumbs down", "thumbs_down", "dislike", "undesirable",
    "👎",
)  # fmt: skip


def _truth(value: Any, column: str) -> bool:
    """Whether an answer is good: `true`, 1, a thumb up, or so written."""
    said = str(value).strip().lower().rstrip("\N{VARIATION SELECTOR-16}")
    found = True if said in _TRUE else False if said in _FALSE else None
    if found is None:
        hint = "write `true` or `false`; `on_error: skip` leaves such rows out"
        raise refused("no label", f"column {column!r} holds {short(value)}, not true or false", hint, value)
    return found
