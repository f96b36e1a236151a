"""`task: generation`: what is read, what is written and how it is counted, against the libraries' own figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
import tuning
from rouge_score.rouge_scorer import RougeScorer
from training import options
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llmkit.errors import DataError, UsageError
from llmkit.evaluate import answering
from llmkit.evaluate.answering import inputs_of, write_all
from llmkit.evaluate.generate import generate
from llmkit.evaluate.prompts import Prompt, read_prompts
from llmkit.metrics.answers import answer_metrics
from llmkit.metrics.repetition import distinct, repetition
from llmkit.metrics.written import written_rows
from llmkit.recipe.evaluation import Generation
from llmkit.recipe.labelled import Labelled
from llmkit.recipe.schema import Eval, Sampling
from llmkit.report.console import make_reporter
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.measure.generation import measure

TEXTS = ["the cat sat on the mat", "a dog a dog a dog a dog", "", "Oslo is the capital of Norway"]
REFERENCES = [
    ["the cat sat on a mat", "a cat was on the mat"],
    ["the dog barks"],
    ["nothing"],
    ["Oslo is the capital of Norway"],
]
CHINESE = ["今天天气很好", "我喜欢北京"]
CHINESE_REFERENCES = [["今天的天气很好"], ["我喜欢上海"]]


def lines(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Labelled(files=[str(path)])


def asked(folder, section, language="en", seed=1):
    return Asked(
        section=Eval(**section),
        base=folder,
        language=language,
        seed=seed,
        device="cpu",
        options=options(folder),
        reporter=make_reporter(quiet=True),
    )


# --- counting -------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_libraries():
    found = written_rows(TEXTS, REFERENCES, language="en").all_figures()
    streams = [[row[place] if place < len(row) else None for row in REFERENCES] for place in range(2)]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, streams).score, abs=1e-9)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(TEXTS, streams).score, abs=1e-9)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in some)
            for text, some in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert found[name] == pytest.approx(np.mean(best), abs=1e-9)
    answers = answer_metrics(TEXTS, REFERENCES)
    assert (found["exact_match"], found["f1"]) == (answers["exact_match"], answers["f1"])
    assert found["distinct_2"] == distinct(TEXTS, 2)
    assert found["repetition"] == repetition(TEXTS)


@pytest.mark.parametrize("rows", [[0], [3, 3, 1], [2, 0, 0, 1, 3]])
def test_figures_of_some_rows_are_those_of_these_rows_measured_alone(rows):
    some = written_rows(TEXTS, REFERENCES, language="en").figures(np.array(rows))
    alone = written_rows([TEXTS[n] for n in rows], [REFERENCES[n] for n in rows], language="en").all_figures()
    assert "distinct_1" not in some
    for name, value in some.items():
        assert value == pytest.approx(alone[name], abs=1e-9), name


def test_chinese_is_counted_by_characters_whatever_the_recipe_says():
    counted = written_rows(CHINESE, CHINESE_REFERENCES, language="en")
    found = counted.all_figures()
    expected = sacrebleu.corpus_bleu(CHINESE, [[row[0] for row in CHINESE_REFERENCES]], tokenize="zh")
    assert found["bleu"] == pytest.approx(expected.score, abs=1e-9)
    assert "tok:zh" in counted.settings["bleu_signature"]
    # 6 of 6 and 7 characters in order, 3 of 5 and 5: by hand.
    assert found["rougeL"] == pytest.approx((12 / 13 + 6 / 10) / 2)
    assert counted.settings["answer_rules"] == "cmrc"


def test_chinese_cut_at_spaces_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match="Han") as caught:
        written_rows(CHINESE, CHINESE_REFERENCES, language="zh", bleu_tokenizer="13a")
    assert caught.value.hint.startswith("eval.generation.bleu_tokenizer=zh")


def test_english_of_a_chinese_recipe_is_counted_as_english():
    counted = written_rows(TEXTS, REFERENCES, language="zh")
    assert counted.settings["counted_as"] == "en"
    assert counted.all_figures() == written_rows(TEXTS, REFERENCES, language="en").all_figures()


def test_without_references_only_variety_is_counted():
    counted = written_rows(TEXTS, None, language="en")
    assert set(counted.all_figures()) == {"repetition", "distinct_1", "distinct_2"}
    assert counted.right_N is None


# --- reading --------------------------------------------------------------------------------------------------


def test_prompts_and_references_in_their_usual_names(tmp_path):
    rows = [
        {"question": "Who?", "answers": ["Ann", "Ann Lee", "Ann"]},
        {"question": "Where?", "answers": {"text": ["Oslo"], "answer_start": [3]}},
    ]
    found, _ = read_prompts(lines(tmp_path, rows), tmp_path)
    assert [prompt.text for prompt in found] == ["Who?", "Where?"]
    assert [prompt.references for prompt in found] == [("Ann", "Ann Lee"), ("Oslo",)]
    assert found[1].place.endswith("rows.jsonl:2")


def test_the_last_turn_of_a_conversation_is_its_reference(tmp_path):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    (found,), num_left_out = read_prompts(lines(tmp_path, rows), tmp_path)
    assert [turn["content"] for turn in found.messages] == ["Hi", "Hello", "Bye"]
    assert (found.text, found.references, num_left_out) == ("Bye", ("See you",), 0)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def calling(last):
    """A conversation whose assistant calls a tool, and then says something, or nothing."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asks = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    answer = [{"role": "tool", "content": "dry"}, {"role": "assistant", "content": last}] if last else []
    return {"messages": [*asks, *answer], "tools": TOOLS}


def test_answers_that_call_tools_and_say_nothing_are_left_out(tmp_path):
    (found,), num_left_out = read_prompts(
        lines(tmp_path, [calling(""), calling("No rain"), calling("")]), tmp_path
    )
    assert (found.place.endswith(":2"), found.references, num_left_out) == (True, ("No rain",), 2)
    assert found.tools == tuple(TOOLS)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the last answer has no text .* \(2 rows\)"):
        read_prompts(lines(tmp_path, [calling("")] * 2), tmp_path)


def test_a_prompt_has_its_tools_in_the_template_or_is_refused(tmp_path):
    (prompt,), _ = read_prompts(lines(tmp_path, [calling("No rain")]), tmp_path)
    tokenizer = tuning.tokenizer_of("llama")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the model's chat template leaves out the tools"):
        inputs_of(tokenizer, [prompt], chat=True)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + tuning.CHATML
    )
    (given,) = inputs_of(tokenizer, [prompt], chat=True)
    assert given.startswith("[weather]<|im_start|>user\nRain?")
    assert given.endswith("dry<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.chat_template = None
    asked_once = Prompt("a:1", "Rain?", prompt.messages[:1], ("No",), prompt.tools)
    with pytest.raises(UsageError, match="a:1 is a conversation with tools"):
        inputs_of(tokenizer, [asked_once], chat=True)


def test_rows_that_cannot_be_used_are_named(tmp_path):
    mixed = [{"prompt": "a", "reference": "b"}, {"prompt": "c"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 1 of 2 rows have no reference"):
        read_prompts(lines(tmp_path, mixed), tmp_path)
    with pytest.raises(DataError, match=r"which column is 'prompt'; the columns are ask") as caught:
        read_prompts(lines(tmp_path, [{"ask": "a"}]), tmp_path)
    assert "eval.labelled.columns.prompt=" in caught.value.hint
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'prompt' is empty"):
        read_prompts(lines(tmp_path, [{"prompt": " "}]), tmp_path)
    with pytest.raises(UsageError, match="`promt` is no role"):
        read_prompts(Labelled(files=["x"], columns={"promt": "a"}), tmp_path)


# --- writing --------------------------------------------------------------------------------------------------

PROMPTS = ["The cat", "import json", "A green bird in Rome said to the", "Oslo"]


def model_and_tokenizer(family="llama"):
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return kind.from_pretrained(tuning.model(family)).eval(), tuning.tokenizer_of(family)


def written(settings, prompts=PROMPTS, family="llama", seed=5):
    model, tokenizer = model_and_tokenizer(family)
    found = write_all(model, tokenizer, prompts, settings, seed=seed, keys=prompts)
    return [one.text for one in found]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_writes_what_each_row_writes_alone(family, beams):
    model, tokenizer = model_and_tokenizer(family)
    found = written(Generation(max_new_tokens=8, beams=beams), family=family)
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=family == "t5")["input_ids"]
        more = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id, **more
            )
        expected = output[0] if family == "t5" else output[0, ids.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_what_is_drawn_depends_on_seed_and_row_alone():
    settings = Generation(max_new_tokens=8, temperature=1.0, top_p=0.95)
    together = written(settings)
    assert together == [written(settings, [prompt])[0] for prompt in PROMPTS]
    assert together == written(settings, PROMPTS[::-1])[::-1]
    assert together != written(settings, seed=6)


def test_tokens_are_drawn_by_their_probabilities():
    model, tokenizer = model_and_tokenizer()
    prompts, keys = ["The cat"] * 1500, [str(number) for number in range(1500)]
    settings = Generation(max_new_tokens=1, temperature=0.7, top_k=4)
    found = write_all(model, tokenizer, prompts, settings, seed=1, keys=keys)
    ids = tokenizer("The cat", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        likely = (model(ids).logits[0, -1] / 0.7).topk(4)
    counts = [
        sum(one.text == tokenizer.decode([number]).strip() for one in found) for number in likely.indices
    ]
    assert sum(counts) == 1500
    expected = likely.values.softmax(0).numpy() * 1500
    assert ((np.array(counts) - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees: p = 0.001


def test_a_text_that_ends_it_is_left_out():
    plain = written(Generation(max_new_tokens=8))[0]
    mark = plain[len(plain) // 2 :][:2]
    model, tokenizer = model_and_tokenizer()
    (one, other) = write_all(
        model, tokenizer, PROMPTS[:2], Generation(max_new_tokens=8, stop=[mark]), seed=1, keys=PROMPTS[:2]
    )
    assert one.text == plain[: plain.index(mark)].strip()
    assert one.finished
    assert one.num_tokens < 8
    assert mark not in other.text


def long_and_short(tokenizer, *lengths):
    """Prompts of so many tokens."""
    ids = tokenizer("The cat sat on the mat and sang. " * 20, add_special_tokens=False)["input_ids"]
    made = [tokenizer.decode(ids[:length]) for length in lengths]
    assert [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in made] == list(lengths)
    return made


@pytest.mark.parametrize(
    "decoding", [{}, {"beams": 2}, {"temperature": 1.0}, {"stop": ["never written"]}], ids=str
)
def test_what_is_written_does_not_depend_on_the_batch(decoding, monkeypatch):
    model, tokenizer = model_and_tokenizer()
    model.config.max_position_embeddings = 32
    prompts = long_and_short(tokenizer, 3, 22, 5, 20, 22, 40)
    settings = Generation(max_new_tokens=24, **decoding)
    keys = [str(number) for number in range(len(prompts))]
    together = write_all(model, tokenizer, prompts, settings, seed=3, keys=keys)
    rooms = [24, 10, 24, 12, 10, 8]  # the last is cut, so that it leaves a quarter
    assert [one.room for one in together] == rooms
    assert [one.num_tokens for one in together] == rooms, "none ends by itself"
    assert [one.cut for one in together] == [0, 0, 0, 0, 0, 16]
    monkeypatch.setattr(answering, "_MOST_ROWS", 1)
    assert write_all(model, tokenizer, prompts, settings, seed=3, keys=keys) == together


def test_a_short_prompt_beside_a_long_one_may_write_as_much_as_alone():
    model, tokenizer = model_and_tokenizer()
    model.config.max_position_embeddings = 32
    prompts = long_and_short(tokenizer, 3, 22, 5)
    greedy = Sampling(max_new_tokens=24, temperature=0)
    together = generate(model, tokenizer, prompts, greedy, seed=1)
    assert [one.num_tokens for one in together] == [24, 10, 24]
    assert together == [generate(model, tokenizer, [prompt], greedy, seed=1)[0] for prompt in prompts]


def test_beams_are_not_drawn():
    with pytest.raises(UsageError, match="beams: 2"):
        written(Generation(beams=2, temperature=0.5))


def test_conversations_go_through_the_template_to_the_last_turn():
    tokenizer = tuning.tokenizer_of("llama")
    turns = tuple(
        {"role": role, "content": text}
        for role, text in (("user", "Hi"), ("assistant", "Yes"), ("user", "B"))
    )
    given = inputs_of(tokenizer, [Prompt("a:1", "B", turns), Prompt("a:2", "Plain")], chat=True)
    assert given[0] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nB<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert given[1] == "<|im_start|>user\nPlain<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(DataError, match="a:3: the text spells the special token"):
        inputs_of(tokenizer, [Prompt("a:3", "x<|im_end|>")], chat=True)


# --- the whole ------------------------------------------------------------------------------------------------


def subject(family="llama"):
    return Subject(family, Path(tuning.model(family)))


def test_measuring_a_model_that_writes(tmp_path):
    rows = lines(tmp_path, [{"prompt": text, "reference": "the cat"} for text in PROMPTS * 3])
    section = {"task": "generation", "labelled": rows, "generation": {"max_new_tokens": 6, "chat": False}}
    found = measure(subject(), asked(tmp_path, section))
    texts = [line["prediction"] for line in found.predictions]
    assert texts == written(Generation(max_new_tokens=6)) * 3
    expected = written_rows(texts, [["the cat"]] * 12, language="en").all_figures()
    assert dict(found.figures) == expected
    assert found.settings["max_new_tokens"] == 6
    assert found.settings["chat"] is False
    assert found.intervals(seed=1, resamples=20)["chrf"].value == found.figures["chrf"]
    assert found.compare(found, seed=1, resamples=20)["f1"].p == 1.0
    assert found.tables["written"]["mean_tokens"] == np.mean(
        [line["num_tokens"] for line in found.predictions]
    )


def test_models_that_do_not_write_and_missing_rows_are_refused(tmp_path):
    rows = lines(tmp_path, [{"prompt": "a"}])
    with pytest.raises(UsageError, match="does not write"):
        measure(subject("bert"), asked(tmp_path, {"task": "generation", "labelled": rows}))
    with pytest.raises(UsageError, match="nothing says what to ask"):
        measure(subject(), asked(tmp_path, {"task": "generation"}))


def test_texts_that_all_are_cut_off_or_the_same_are_told(tmp_path):
    rows = lines(tmp_path, [{"prompt": "The cat"}] * 3)
    found = measure(subject(), asked(tmp_path, {"labelled": rows, "generation": {"max_new_tokens": 3}}))
    assert any("3 of 3 texts were cut off at 3 tokens" in said for said in found.warnings)
    assert any("all 3 texts are the same" in said for said in found.warnings)
    assert found.best == "repetition"
    assert len(set(found.items.keys)) == 3


def test_answers_without_text_and_prompts_with_less_room_are_told(tmp_path):
    talk = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "the cat"}]
    bare = {key: value for key, value in calling("").items() if key != "tools"}
    rows = lines(tmp_path, [bare, {"messages": talk}])
    section = {"task": "generation", "labelled": rows, "generation": {"max_new_tokens": 4}}
    found = measure(subject(), asked(tmp_path, section))
    assert (found.settings["num_rows"], len(found.predictions)) == (1, 1)
    assert any("1 of 2 conversations were left out" in said for said in found.warnings)
    assert not any("leave less room" in said for said in found.warnings)
    long, short = long_and_short(tuning.tokenizer_of("llama"), 90, 4)
    section["labelled"] = lines(tmp_path, [{"prompt": long}, {"prompt": short}], "long.jsonl")
    section["generation"] |= {"max_new_tokens": 40, "chat": False}
    found = measure(subject(), asked(tmp_path, section))
    assert any(
        "1 of 2 prompts leave less room" in said and "the least: 38" in said for said in found.warnings
    )
    assert [line["num_tokens"] for line in found.predictions] == [38, 40]
