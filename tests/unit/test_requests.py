"""Loglikelihoods of continuations: against one forward pass each, whatever is shared, padded or cut."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from tuning import model, tokenizer_of

from llmkit.errors import DataError, UsageError
from llmkit.evaluate.branches import lay_out
from llmkit.evaluate.choices import outcome_of, pairs_of, read_questions
from llmkit.evaluate.requests import (
    Answer,
    Request,
    Scorer,
    encode_pairs,
    longest_input,
    prefix_of,
    rolling_requests,
)
from llmkit.models.recurrent import RecurrentConfig, RecurrentForCausalLM
from llmkit.recipe.labelled import Labelled

BOUND = 2e-5


def causal(family):
    return AutoModelForCausalLM.from_pretrained(model(family), dtype=torch.float32).eval()


def requests_of(size, longest=40):
    """Contexts that are equal or begin alike, duplicates, single tokens, a continuation that goes on from another."""
    draw = torch.Generator().manual_seed(5)

    def ids(count):
        return tuple(torch.randint(size, (count,), generator=draw).tolist())

    shots, found = ids(12), []
    for _ in range(6):
        context = (*shots, *ids(5))
        found += [Request(context, ids(count)) for count in (1, 1, 3, 7)]
    one = Request(ids(9), ids(4))
    found += [one, one, Request(one.context, (*one.continuation, *ids(3))), Request(ids(1), ids(1))]
    found += [Request(ids(longest + 10), ids(6)), Request(ids(3), ids(longest))]
    return found


@torch.no_grad()
def alone(network, requests, longest):
    """Each request by a forward pass of its own, its beginning cut off where it is too long."""
    answers = []
    for request in requests:
        ids = torch.tensor([(request.context + request.continuation)[-(longest + 1) :]])
        logits = network(ids[:, :-1]).logits[0, -len(request.continuation) :].double()
        told = ids[0, -len(request.continuation) :]
        likely = logits.log_softmax(-1).gather(1, told[:, None]).sum()
        answers.append(Answer(float(likely), bool((logits.argmax(-1) == told).all())))
    return answers


def assert_same(found, expected):
    assert [one.greedy for one in found] == [one.greedy for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=BOUND)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_every_request_gets_what_it_gets_alone(family, share, batch_tokens):
    network = causal(family)
    requests = requests_of(network.config.vocab_size)
    expected = alone(network, requests, 40)
    scorer = Scorer(network, tokenizer_of(family), longest=40, share=share, batch_tokens=batch_tokens)
    assert scorer.shares is share
    assert_same(scorer.score(requests), expected)


def test_greedy_is_what_the_model_would_write():
    network = causal("llama")
    context = (5, 9, 31)
    wrote = network.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    wrote = tuple(wrote[0, 3:].tolist())
    scorer = Scorer(network, tokenizer_of("llama"))
    other = (*wrote[:3], (wrote[3] + 1) % 50)
    found = scorer.score([Request(context, wrote), Request(context, other)])
    assert [one.greedy for one in found] == [True, False]


def test_a_model_that_cannot_keep_branches_apart_is_asked_line_by_line():
    torch.manual_seed(0)
    network = RecurrentForCausalLM(RecurrentConfig(vocab_size=90, hidden_size=16, num_hidden_layers=1)).eval()
    requests = requests_of(90)
    expected = alone(network, requests, 40)
    scorer = Scorer(network, tokenizer_of("llama"), longest=40)
    assert not scorer.shares
    assert_same(scorer.score(requests), expected)


def test_a_sliding_window_is_kept():
    network = causal("llama")
    network.config.sliding_window = 8  # what models with one say; the branches' own mask would not know of it
    scorer = Scorer(network, tokenizer_of("llama"), longest=40)
    seen = []
    scorer._of_batch = lambda lines, _: (
        seen.extend(lines) or {n: Answer(0.0, False) for line in lines for n in line.places}
    )
    scorer.score(requests_of(network.config.vocab_size))
    assert seen
    assert not any(line.branched for line in seen)


def test_an_encoder_decoder_is_asked_too():
    network = AutoModelForSeq2SeqLM.from_pretrained(model("t5"), dtype=torch.float32).eval()
    size = network.config.vocab_size
    requests = [one for one in requests_of(size) if len(one.context) <= 40]
    expected = []
    with torch.no_grad():
        for one in requests:
            labels = torch.tensor([one.continuation])
            logits = network(input_ids=torch.tensor([one.context]), labels=labels).logits[0].double()
            likely = logits.log_softmax(-1).gather(1, labels[0][:, None]).sum()
            expected.append(Answer(float(likely), bool((logits.argmax(-1) == labels[0]).all())))
    for batch_tokens in (1, 50, 10_000):
        scorer = Scorer(network, tokenizer_of("t5"), longest=40, batch_tokens=batch_tokens)
        assert_same(scorer.score(requests), expected)


def test_bf16_is_near():
    network = causal("llama")
    requests = requests_of(network.config.vocab_size)
    expected = alone(network, requests, 40)
    found = Scorer(network, tokenizer_of("llama"), longest=40, bf16=True).score(requests)
    assert network.dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, rel=0.01)


def test_shared_beginnings_stand_once():
    paths = [(1, 2, 3, 4), (1, 2, 3, 5, 6), (1, 2, 3, 4), (1, 2, 3, 4, 7), (9, 9)]
    shared, other = lay_out(paths, [1, 2, 1, 1, 2])
    assert shared.ids == [1, 2, 3, 4, 7, 5, 6]
    assert shared.depths == [0, 1, 2, 3, 4, 3, 4]
    assert shared.ends == [7, 7, 7, 5, 5, 7, 7]
    assert shared.places == {0: [3], 2: [3], 3: [4], 1: [5, 6]}
    assert shared.branched
    assert other.ids == [9, 9]
    assert not other.branched


def test_a_line_of_branches_has_an_end():
    paths = [(1, 2, 3, 4, number) for number in range(5, 25)]
    assert len(lay_out(paths, [1] * 20)) == 1
    lines = lay_out(paths, [1] * 20, most=10)
    assert len(lines) > 1
    assert all(len(line.ids) <= 10 for line in lines)
    assert sorted(number for line in lines for number in line.places) == list(range(20))
    assert len(lay_out(paths, [1] * 20, share=False)) == 20


def test_bad_requests_are_refused():
    scorer = Scorer(causal("llama"), tokenizer_of("llama"), longest=8)
    with pytest.raises(DataError, match="9 tokens, and the model reads 8"):
        scorer.score([Request((1,), (2,) * 9)])
    with pytest.raises(DataError, match="no continuation"):
        scorer.score([Request((1,), ())])


def test_blanks_before_a_continuation_belong_to_it():
    tokenizer = tokenizer_of("llama")
    spaced, plain = encode_pairs(tokenizer, [("the red cat ", "lives"), ("the red cat", " lives")])
    assert spaced == plain
    assert tokenizer.decode(plain.continuation) == " lives"
    assert tokenizer.decode(plain.context) == "the red cat"


def test_an_empty_context_is_the_token_that_begins_texts():
    tokenizer = tokenizer_of("llama")
    start = prefix_of(tokenizer)
    (request,) = encode_pairs(tokenizer, [("", "the cat")])
    assert request.context == (start,)
    assert tokenizer.decode(request.continuation) == "the cat"
    (own,) = encode_pairs(tokenizer, [("", "<|endoftext|>the cat")])
    assert own == request  # it brings that token itself


def test_a_long_text_is_told_token_by_token():
    network = causal("llama")
    ids = [(number * 7) % 90 for number in range(23)]
    windows = rolling_requests(ids, 0, 8)
    told = [token for window in windows for token in window.continuation]
    assert told == ids
    assert all(len(one.context) + len(one.continuation) == 9 for one in windows[1:])
    assert [one.context[-1] for one in windows[1:]] == [ids[7], ids[15]]
    assert rolling_requests([], 0, 8) == []
    assert longest_input(network, tokenizer_of("llama")) == network.config.max_position_embeddings


# --- questions ------------------------------------------------------------------------------------------------------


def written(folder, *rows):
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Labelled(files=[str(path)])


GOOD = {"query": "Which is red?", "choices": ["grass", "blood"], "gold": 1}


def test_questions_are_read(tmp_path):
    rows = (GOOD, {**GOOD, "gold": "B"}, {**GOOD, "gold": "blood"}, {**GOOD, "gold": "1"})
    questions = read_questions(written(tmp_path, *rows), tmp_path)
    assert [question.gold for question in questions] == [1, 1, 1, 1]
    assert questions[0].options == ("grass", "blood")
    assert questions[0].key == questions[1].key


def test_columns_can_have_other_names(tmp_path):
    data = written(tmp_path, {"q": "Which is red?", "o": ["grass", "blood"], "a": 0})
    named = data.model_copy(update={"columns": {"query": "q", "choices": "o", "gold": "a"}})
    assert read_questions(named, tmp_path)[0].context == "Which is red?"
    wrong = data.model_copy(update={"columns": {"question": "q"}})
    with pytest.raises(UsageError, match="no role of a row of `choice`"):
        read_questions(wrong, tmp_path)


def test_a_table_can_hold_questions(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text('query,choices,gold\nWhich?,"[""a"", ""b""]",1\n')
    assert read_questions(Labelled(files=[str(path)]), tmp_path)[0].options == ("a", "b")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GOOD, "gold": 2}, "there are 2 choices"),
        ({**GOOD, "gold": -1}, "there are 2 choices"),
        ({**GOOD, "gold": None}, "there are 2 choices"),
        ({**GOOD, "choices": ["one"]}, "no list of two or more texts"),
        ({**GOOD, "choices": "one"}, "no list of two or more texts"),
        ({**GOOD, "choices": ["one", ""]}, "is empty"),
        ({**GOOD, "choices": ["one", "one"]}, "twice"),
        ({**GOOD, "query": 7}, "not text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    with pytest.raises(DataError, match=r"questions\.jsonl:2") as caught:
        read_questions(written(tmp_path, GOOD, row), tmp_path)
    assert said in caught.value.message
    skipping = written(tmp_path, GOOD, row).model_copy(update={"on_error": "skip"})
    assert len(read_questions(skipping, tmp_path)) == 1


def test_columns_that_tell_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match="the columns are text, label") as caught:
        read_questions(written(tmp_path, {"text": "a", "label": 1}), tmp_path)
    assert "eval.labelled.columns" in caught.value.hint


def test_what_stands_between_is_not_doubled(tmp_path):
    (question,) = read_questions(written(tmp_path, GOOD), tmp_path)
    assert pairs_of([question], " ")[0] == ("Which is red?", " grass")
    assert pairs_of([question], "")[0] == ("Which is red?", "grass")
    assert pairs_of([question], "\nAnswer: ")[0] == ("Which is red?\nAnswer:", " grass")
    (blank,) = read_questions(written(tmp_path, {**GOOD, "query": "Which?\n"}), tmp_path)
    assert pairs_of([blank], " ")[0] == ("Which?\n", "grass")


def test_answers_by_hand(tmp_path):
    """The likeliest; per character (2.0 against 1.5); per byte, where a Han character has three."""
    row = {"query": "?", "choices": ["ab", "abcd"], "gold": 1}
    han = {"query": "?", "choices": ["ab", "红"], "gold": 1}
    questions = read_questions(written(tmp_path, row, han), tmp_path)
    answers = [Answer(value, False) for value in (-4.0, -6.0, -4.0, -3.0)]
    found = outcome_of(questions, answers)
    assert found.chosen_N.tolist() == [0, 1]
    assert found.right_N.tolist() == [False, True]
    assert found.by_chars_N.tolist() == [True, False]  # -2.0 against -1.5; -2.0 against -3.0
    assert found.by_bytes_N.tolist() == [True, True]  # -2.0 against -1.0
    assert found.confidence_N.tolist() == pytest.approx([0.880797, 0.731059], abs=1e-6)


def test_a_continuation_is_right_when_the_model_would_write_it(tmp_path):
    rows = ({"context": "the red", "continuation": "cat"}, {"context": "the", "continuation": "dog"})
    questions = read_questions(written(tmp_path, *rows), tmp_path)
    found = outcome_of(questions, [Answer(-1.0, True), Answer(-2.0, False)])
    assert found.right_N.tolist() == [True, False]
    assert found.gold_N.tolist() == [-1.0, -2.0]
