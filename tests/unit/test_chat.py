"""Conversations as ids: equal to `apply_chat_template`, what serving gives before every turn, and what is learned.

The templates are small ones of our own that do what the known families do.
"""

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizing import train_bpe
from transformers import AutoTokenizer

from llmkit.data.chat import (
    NotExactError,
    Template,
    chosen_template,
    conversations_of,
    padding_id,
    tokens_to_add,
)
from llmkit.data.tokenizers.special import CHATML
from llmkit.errors import DataError, UsageError

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>")

CHATML_DEFAULT = (  # SmolLM2, Qwen2: a system text of its own where there is none
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # Llama 3's first: blanks are trimmed, and the assistant's header comes at the end whether asked for or not
    "{% for m in messages %}{% set said = '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set said = '<s>' + said %}{% endif %}{{ said }}{% endfor %}"
    "{{ '<|head|>assistant<|/head|>\n\n' }}"
)
MODEL = (  # Gemma: no system, another name for the assistant, strict turns
    "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + (first if loop.first else '') }}"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
THINKING = (  # Qwen3: the reasoning of earlier turns is left out, an empty one is put into the last
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{% if '</think>' in m['content'] %}"
    "{% set said = m['content'] %}{% else %}{% set said = '<think>\n\n</think>\n\n' + said %}{% endif %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if quick %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
INST = (  # Mistral
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + '</s>' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}"
    "USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml-default": (CHATML_DEFAULT, "<|im_end|>"),
    "headers": (HEADERS, "<|eot|>"),
    "model": (MODEL, "<|im_end|>"),
    "thinking": (THINKING, "<|im_end|>"),
    "inst": (INST, "</s>"),
    "zephyr": (ZEPHYR, "</s>"),
    "vicuna": (VICUNA, "</s>"),
}
SYSTEM = [{"role": "system", "content": "Answer briefly."}]
TEXTS = [
    f"{i}: Where is it? In the house, not far.\n\nIt is\n\n\nthere, number two or two. 从前。 USER: x ASSISTANT: y"
    for i in range(40)
]


@cache
def tokenizer() -> Any:
    with TemporaryDirectory() as folder:
        from pathlib import Path

        train_bpe(TEXTS, vocab_size=600, folder=Path(folder), special_tokens=SPECIALS)
        return AutoTokenizer.from_pretrained(folder)


def turns(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(said)
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def chat(family: str, **options: Any) -> Any:
    return conversations_of(tokenizer(), FAMILIES[family][0], **options)


def whole(family: str, messages: Any, **options: Any) -> list[int]:
    return tokenizer().apply_chat_template(
        messages, chat_template=FAMILIES[family][0], tokenize=True, return_dict=False, **options
    )


def learned(encoded: Any) -> list[str]:
    """What is learned, stretch by stretch."""
    stretches: list[list[int]] = []
    for i, (number, is_learned) in enumerate(
        zip(encoded.ids.tolist(), encoded.learned.tolist(), strict=True)
    ):
        if is_learned:
            if not i or not encoded.learned[i - 1]:
                stretches.append([])
            stretches[-1].append(number)
    return [tokenizer().decode(ids) for ids in stretches]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_is_learned_with_its_end_and_nothing_else(family: str) -> None:
    messages = [*SYSTEM, *turns("Where?", "In the house.", "Far?", "Not far.\n\nThere.", "So?", "It is.")]
    if family == "inst":
        messages = messages[1:]
    found = chat(family).encode(messages)
    stop = FAMILIES[family][1]
    blank = " " if family in ("inst", "vicuna") else ""
    thought = "<think>\n\n</think>\n\n" if family == "thinking" else ""
    assert found.ids.tolist() == whole(family, messages)
    assert learned(found) == [
        f"{blank}In the house.{stop}",
        f"{blank}Not far.\n\nThere.{stop}",
        f"{blank}{thought}It is.{stop}",
    ]
    assert [tokenizer().decode([stop]) for stop in chat(family).stops] == [stop]


SAID = st.text(alphabet="ab .\n<>|从:", min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4))
def test_before_every_learned_turn_stands_what_serving_gives(
    family: str, said: list[tuple[str, str]]
) -> None:
    """Whatever is said: ids are compared with transformers' own, never with ours."""
    messages = turns(*(text for pair in said for text in pair))
    found = chat(family).encode(messages)
    starts = [i for i in range(1, len(found.ids)) if found.learned[i] and not found.learned[i - 1]]
    prompts = [
        whole(family, messages[:number], add_generation_prompt=True) for number in range(1, len(messages), 2)
    ]
    assert len(starts) + found.passed_over == len(prompts)
    for start in starts:
        assert found.ids[:start].tolist() in prompts
    ends = [i for i in range(len(found.ids)) if found.learned[i] and not found.learned[i + 1 : i + 2].any()]
    assert {tokenizer().decode([found.ids[i]]) for i in ends} <= {FAMILIES[family][1]}
    assert tokenizer().decode(found.ids) == tokenizer().decode(whole(family, messages))


def test_only_the_last_turn_where_that_is_wanted() -> None:
    messages = turns("Where?", "There.", "Far?", "No.", "and a question without an answer")
    found = chat("chatml", learn="last").encode(messages)
    assert learned(found) == ["No.<|im_end|>"]
    assert found.ids.tolist() == whole("chatml", messages[:4])
    assert found.num_targets == len(tokenizer()("No.")["input_ids"]) + 1


def test_a_message_of_weight_0_is_not_learned() -> None:
    messages = turns("Where?", "There.", "Far?", "No.")
    assert learned(chat("chatml").encode([messages[0], {**messages[1], "weight": 0}, *messages[2:]])) == [
        "No.<|im_end|>"
    ]


def test_reasoning_is_learned_in_the_last_turn_and_was_never_in_the_others() -> None:
    messages = turns("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    found = chat("thinking").encode(messages)
    assert learned(found) == ["b<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"]


def test_a_prompt_that_opens_a_thought_only_fits_the_last_turn() -> None:
    """Served without thinking, earlier turns have no empty thought before them in the template, so no mask is right."""
    template = FAMILIES["thinking"][0]
    with pytest.raises(UsageError, match=r"`learn: all` cannot be.*message 2") as error:
        conversations_of(tokenizer(), template, options={"quick": True})
    assert "learn: last" in str(error.value)
    last = conversations_of(tokenizer(), template, options={"quick": True}, learn="last")
    assert learned(last.encode(turns("a", "b", "c", "d"))) == ["d<|im_end|>"]


def test_what_melts_into_the_prompt_is_encoded_as_serving_has_it_or_passed_over() -> None:
    """Line breaks after the prompt's line break are one token in the whole text, which no serving makes."""
    messages = turns("Where?", "\n\nThere.", "Far?", "\n\nNo.")
    merged = tokenizer()("\n\n\n")["input_ids"]
    assert len(merged) == 1
    found = chat("chatml").encode(messages)
    assert found.passed_over == 1
    assert learned(found) == ["\n\nNo.<|im_end|>"]
    prompt = whole("chatml", messages[:3], add_generation_prompt=True)
    start = int(found.learned.argmax())
    assert found.ids[:start].tolist() == prompt
    assert found.ids[start:].tolist() == tokenizer()("\n\nNo.<|im_end|>\n")["input_ids"]
    assert tokenizer().decode(found.ids) == tokenizer().decode(whole("chatml", messages))


def test_a_template_that_marks_no_end_is_refused() -> None:
    with pytest.raises(UsageError, match="never learn to stop"):
        conversations_of(tokenizer(), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def test_a_template_that_ends_only_the_last_turn_teaches_only_that() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
        "{% if loop.last and not add_generation_prompt %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(UsageError, match="does not end this turn"):
        conversations_of(tokenizer(), template)
    found = conversations_of(tokenizer(), template, learn="last").encode(turns("a", "b", "c", "d"))
    assert learned(found) == [" d\n</s>"]


def test_a_prompt_that_ends_with_a_blank_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(UsageError, match=r"one token with the first of an answer(.|\n)*learn: last"):
        conversations_of(tokenizer(), template)
    messages = turns("Where?", "two", "Far?", "two")
    found = conversations_of(tokenizer(), template, learn="last").encode(messages)
    prompt = tokenizer()("user: Where?</s>assistant: two</s>user: Far?</s>assistant: ")["input_ids"]
    assert found.ids.tolist() == [*prompt, *tokenizer()("two</s>")["input_ids"]]
    assert learned(found) == ["two</s>"]


def test_a_template_that_changes_what_was_said_before_is_told() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ loop.length }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    with pytest.raises(UsageError, match=r"in serving, '<\|im_start\|>1one<\|im_end\|>"):
        conversations_of(tokenizer(), template)
    with pytest.raises(UsageError, match="learn: last"):
        conversations_of(tokenizer(), template, learn="last")


def test_tools_and_calls_that_a_template_does_not_know_are_errors() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {}}}],
    }
    with pytest.raises(DataError, match="leaves out the tools"):
        chat("chatml").encode(turns("a", "b"), [tool])
    with pytest.raises(DataError, match=r"message 2 .* the tools that it calls"):
        chat("chatml").encode([*turns("Rain?"), call])
    with pytest.raises(
        DataError, match=r"message 1 \(system\).*leaves out what it says \('Answer briefly.'\)"
    ):
        chat("inst").encode([*SYSTEM, *turns("a", "b")])


def test_a_special_token_in_a_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"message 1 \(user\) spells the special token '<\|im_end\|>'"):
        chat("chatml").encode(turns("what is <|im_end|>?", "b"))


def test_a_conversation_without_an_answer_or_in_a_wrong_order_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        chat("chatml").encode(turns("a"))
    with pytest.raises(DataError, match=r"user, user, assistant: roles must alternate"):
        chat("model").encode([*turns("a"), *turns("b", "c")])


def test_the_earliest_turns_go_first_and_the_system_stays() -> None:
    said = turns("Where?", "There.", "Far?", "No.", "So?", "It is.")
    last = [*SYSTEM, *said[2:]]
    full = chat("chatml").encode([*SYSTEM, *said])
    limit = len(whole("chatml", last))
    found = chat("chatml", max_length=limit).encode([*SYSTEM, *said])
    assert found.ids.tolist() == whole("chatml", last)
    assert learned(found) == ["No.<|im_end|>", "It is.<|im_end|>"]
    assert found.cut == len(full.ids) - limit
    short = chat("chatml", max_length=12).encode([*SYSTEM, *said])
    assert short.ids.tolist() == whole("chatml", [*SYSTEM, *said[4:]])[:12]
    assert short.cut == len(full.ids) - 12


def test_too_long_can_be_dropped_or_an_error() -> None:
    messages = turns("Where?", "There.")
    size = len(whole("chatml", messages))
    cut = chat("chatml", max_length=size - 3).encode(messages)
    assert (cut.num_targets > 0, len(cut.ids), cut.cut) == (True, size - 3, 3)
    found = chat("chatml", max_length=size - 3, too_long="drop").encode(messages)
    assert (found.num_targets, len(found.ids), found.cut) == (0, size - 3, 3)
    with pytest.raises(DataError, match=f"{size} tokens, {size - 10} more than the 10"):
        chat("chatml", max_length=10, too_long="error").encode(messages)


def test_without_a_template_prompt_and_answer_are_joined_and_the_end_is_learned() -> None:
    plain = conversations_of(tokenizer(), None)
    found = plain.encode(turns("Where?\n", "\nThere."))
    prompt, answer = (tokenizer()(text)["input_ids"] for text in ("Where?\n", "\nThere."))
    assert found.ids.tolist() == [*prompt, *answer, tokenizer().eos_token_id]
    assert found.learned.tolist() == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert plain.prompt_ids(turns("Where?\n")) == prompt
    with pytest.raises(
        DataError, match="one prompt and one answer; this one has the roles system, user, assistant"
    ):
        plain.encode([*SYSTEM, *turns("a", "b")])


class Bare:
    """A tokenizer without a template, a padding token and an end."""

    chat_template = None
    name_or_path = "bare"
    eos_token_id = None
    pad_token_id = None

    def get_vocab(self) -> dict[str, int]:
        return {"<|im_end|>": 0}


def test_a_tokenizer_without_a_template_is_offered_one(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no chat template.*\n.*chatml \(it adds <\|im_start\|>\)"):
        chosen_template(Bare(), None, tmp_path)
    with pytest.raises(UsageError, match="no chat template"):
        Template(Bare())
    with pytest.raises(UsageError, match="no end token"):
        conversations_of(Bare(), None)
    assert chosen_template(Bare(), "none", tmp_path) is None
    assert chosen_template(Bare(), "chatml", tmp_path) == CHATML
    (tmp_path / "own.jinja").write_text(ZEPHYR)
    assert chosen_template(Bare(), "own.jinja", tmp_path) == ZEPHYR
    assert tokens_to_add(Bare(), CHATML) == ["<|im_start|>"]
    assert tokens_to_add(tokenizer(), CHATML) == []
    assert tokens_to_add(Bare(), ZEPHYR) == []


def test_the_padding_of_a_tokenizer_that_has_none() -> None:
    bare = Bare()
    assert padding_id(bare) == 0
    bare.eos_token_id = 7
    assert padding_id(bare) == 7
    assert padding_id(tokenizer()) == tokenizer().pad_token_id


def test_not_exact_is_an_error_of_the_data() -> None:
    assert issubclass(NotExactError, DataError)
