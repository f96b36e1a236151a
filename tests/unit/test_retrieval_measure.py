"""`task: retrieval`: what is read, found and answered from, against hand-worked ranks and the metrics' own code."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tuning
from test_generation_measure import asked, lines
from transformers import AutoModel

from llmkit.errors import DataError, MissingError, UsageError
from llmkit.evaluate import retrieval
from llmkit.evaluate.passages import holds, read_collection
from llmkit.evaluate.retrieval import NOT_FOUND, Encoder, Manner, first_rank, manner_of, ranks_of, search
from llmkit.metrics.retrieval import ranks_by_cosine, retrieval_metrics, unit
from llmkit.run.measure.asked import Subject
from llmkit.run.measure.retrieval import measure

PASSAGES = [
    "The red cat lives in Oslo and sleeps all day.",
    "A green bird sings in Rome.",
    "Black horses run near Paris.",
    "White fish swim in Vienna.",
]


def bert():
    return Path(tuning.model("bert"))


def random_vectors(number, seed, width=16):
    return unit(np.random.default_rng(seed).normal(size=(number, width))).astype(np.float32)


# --- search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["numpy", "faiss"])
def test_search_finds_the_nearest_in_their_order(index, monkeypatch):
    if index == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(retrieval, "_CELLS", 3 * 50)  # three queries at a time
    queries_QD, passages_MD = random_vectors(10, 1), random_vectors(50, 2)
    ids_QK, cosines_QK = search(queries_QD, passages_MD, index=index, depth=7)
    cosines_QM = queries_QD.astype(np.float64) @ passages_MD.astype(np.float64).T
    expected_QK = np.argsort(-cosines_QM, axis=1)[:, :7]
    assert (ids_QK == expected_QK).all()
    np.testing.assert_allclose(cosines_QK, np.take_along_axis(cosines_QM, expected_QK, axis=1), atol=1e-6)


def test_both_searches_order_equal_passages_alike():
    pytest.importorskip("faiss")
    queries_QD = random_vectors(4, 1)
    passages_MD = np.repeat(random_vectors(9, 2), 3, axis=0)
    found = [search(queries_QD, passages_MD, index=index, depth=27)[0] for index in ("numpy", "faiss")]
    assert (found[0] == found[1]).all()


def test_faiss_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingError, match="faiss") as caught:
        search(random_vectors(1, 1), random_vectors(2, 2), index="faiss")
    assert caught.value.hint.startswith("pip install 'llmkit[faiss]'")


def test_ranks_are_those_of_the_metrics_over_all_passages():
    queries_QD, passages_MD = random_vectors(30, 3), random_vectors(40, 4)
    relevant = [[number, (7 * number) % 40] for number in range(30)]
    ids_QK, cosines_QK = search(queries_QD, passages_MD)
    found = [ranks_of(*three) for three in zip(ids_QK, cosines_QK, relevant, strict=True)]
    expected = ranks_by_cosine(queries_QD, passages_MD, relevant)
    assert [ranks.tolist() for ranks in found] == [ranks.tolist() for ranks in expected]


def test_a_wrong_passage_that_is_as_near_stands_before_the_right_one():
    ids, cosines = np.array([4, 0, 2, 9]), np.array([0.9, 0.9, 0.5, 0.1])
    assert ranks_of(ids, cosines, [4]).tolist() == [2]
    assert ranks_of(ids, cosines, [2, 4]).tolist() == [2, 3]
    assert ranks_of(ids, cosines, [9, 77]).tolist() == [4, NOT_FOUND]
    assert retrieval_metrics([ranks_of(ids, cosines, [77])])["recall_at_10"] == 0


def test_of_passages_as_near_those_without_an_answer_stand_first():
    ids, cosines = np.array([4, 0, 2, 9, 5]), np.array([0.9, 0.9, 0.9, 0.5, 0.1])
    ranks = [first_rank(ids, cosines, right.__contains__).tolist() for right in ({4}, {4, 2}, {5, 9}, {7})]
    assert ranks == [[3], [2], [4], [NOT_FOUND]]


# --- vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_are_pooled_by_the_manner_and_prefixed(pooling):
    made = Encoder(bert(), Manner(pooling, max_length=64), device="cpu").vectors(PASSAGES, "query: ")
    model, tokenizer = AutoModel.from_pretrained(bert()).eval(), tuning.tokenizer_of("bert")
    for text, vector in zip(PASSAGES, made, strict=True):
        with torch.no_grad():
            hidden_TD = model(**tokenizer("query: " + text, return_tensors="pt")).last_hidden_state[0]
        pooled = {"mean": hidden_TD.mean(0), "cls": hidden_TD[0], "last": hidden_TD[-1]}[pooling]
        np.testing.assert_allclose(vector, (pooled / pooled.norm()).numpy(), atol=1e-5)


def test_vectors_are_kept_and_a_damaged_copy_is_made_anew(tmp_path, monkeypatch):
    encoder = Encoder(bert(), Manner(max_length=8), device="cpu")
    first, was_kept = encoder.kept_vectors(PASSAGES, "", tmp_path)
    assert (was_kept, encoder.num_cut) == (False, 4)
    encoder.num_cut = 0
    again, was_kept = encoder.kept_vectors(PASSAGES, "", tmp_path)
    assert (was_kept, encoder.num_cut) == (True, 4)
    assert (first == again).all()
    assert not encoder.kept_vectors(PASSAGES, "passage: ", tmp_path)[1]
    assert not encoder.kept_vectors(PASSAGES[:3], "", tmp_path)[1]
    (kept,) = (
        path for path in tmp_path.rglob("vectors.npy") if encoder.address(PASSAGES, "")[:32] in str(path)
    )
    content = bytearray(kept.read_bytes())
    content[-3] ^= 1
    kept.write_bytes(content)
    anew, was_kept = encoder.kept_vectors(PASSAGES, "", tmp_path)
    assert not was_kept
    assert (first == anew).all()


def test_vectors_are_made_anew_where_a_file_that_decides_them_is_another(tmp_path):
    for path in bert().iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "code").mkdir()

    def address(trusted=False):
        encoder = Encoder(tmp_path, Manner(max_length=8), device="cpu", trusted=trusted)
        encoder._tokenizer.vocab_files_names = {
            "vocab_file": "pieces.dat"
        }  # as tokenizers of other kinds have it
        return encoder.address(PASSAGES, "")

    seen = {address()}
    deciding = ("added_tokens.json", "vocab.txt", "special_tokens_map.json", "sentencepiece.bpe.model",
                "source.spm", "pieces.dat", "tokenizer_config.json", "model.safetensors.index.json")  # fmt: skip
    for number, name in enumerate(deciding):
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        index = {"weight_map": {}, "metadata": {}} if "index" in name else {}
        (tmp_path / name).write_text(json.dumps(index) if kept is None else kept.decode() + " ")
        seen.add(address())
        assert len(seen) == number + 2, name
    for name in ("report.json", "code/modeling.py"):
        (tmp_path / name).write_text("{}")
        assert address() in seen, name
    by_code = address(trusted=True)
    (tmp_path / "code" / "modeling.py").write_text("[]")
    assert address(trusted=True) != by_code


def test_the_manner_is_read_from_what_sentence_transformers_writes(tmp_path):
    assert manner_of(bert()) == Manner("mean", "", "", 64, known=False)
    for path in bert().iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    }
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (tmp_path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "q: ", "document": "d: "}}'
    )
    assert manner_of(tmp_path) == Manner("cls", "q: ", "d: ", 32, known=True)
    assert manner_of(tmp_path, pooling="last").pooling == "last"
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(UsageError, match="pass through a Dense"):
        manner_of(tmp_path)


# --- reading --------------------------------------------------------------------------------------------------


def test_passages_by_name_and_copies_of_a_text(tmp_path):
    corpus = [{"id": "a", "text": "one"}, {"id": 7, "text": "two"}, {"id": "c", "text": "one"}]
    rows = [
        {"question": "q1", "positive": "c"},
        {"question": "q2", "positive_id": None, "positive": [7, "a"]},
    ]
    found = read_collection(lines(tmp_path, rows), lines(tmp_path, corpus, "c.jsonl"), tmp_path)
    assert (found.passages, found.names, found.right) == (["one", "two"], ["a", "7"], "named")
    assert [query.relevant for query in found.queries] == [(0,), (1, 0)]


def test_without_a_corpus_the_texts_that_rows_name_are_searched(tmp_path):
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": text,
                        "qas": [{"id": "1", "question": "q", "answers": [{"text": text[:3]}]}] * 2,
                    }
                    for text in PASSAGES
                ]
            }
        ]
    }
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad))
    found = read_collection(lines(tmp_path, []).model_copy(update={"files": [str(path)]}), None, tmp_path)
    assert found.passages == PASSAGES
    assert [query.relevant for query in found.queries] == [(0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,)]
    assert found.queries[2].answers == ("A g",)


def test_wrong_names_are_told_with_place_and_nearest(tmp_path):
    corpus = lines(tmp_path, [{"id": "oslo", "text": "one"}, {"id": "rome", "text": "two"}], "c.jsonl")
    rows = [{"question": "a", "positive": "rome"}, {"question": "b", "positive": "osla"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: there is no passage .osla.") as caught:
        read_collection(lines(tmp_path, rows), corpus, tmp_path)
    assert caught.value.hint == "did you mean 'oslo'?"
    with pytest.raises(UsageError, match=r"rows\.jsonl:1: the question names no passage"):
        read_collection(lines(tmp_path, [{"question": "a", "answers": ["x"]}]), None, tmp_path)
    rows = [
        {"question": text, "positive": name, "answers": ["o"]}
        for text, name in (("a", "rome"), ("b", "osla"))
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: there is no passage .osla.") as caught:
        read_collection(lines(tmp_path, rows), corpus, tmp_path)
    assert caught.value.hint.startswith("did you mean 'oslo'? Or let what holds an answer be right")
    by_answers = lines(tmp_path, rows).model_copy(update={"columns": {"positive": "NONE"}})
    found = read_collection(by_answers, corpus, tmp_path)
    assert (found.right, [query.relevant for query in found.queries]) == ("answers", [(), ()])
    rows[1]["positive"] = None
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the question names no passage, and others do"):
        read_collection(lines(tmp_path, rows), corpus, tmp_path)
    twice = lines(tmp_path, [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "d.jsonl")
    with pytest.raises(DataError, match=r"d\.jsonl:2: there is another passage with the name 'a'"):
        read_collection(lines(tmp_path, [{"question": "a", "positive": "a"}]), twice, tmp_path)
    with pytest.raises(DataError, match="which column is 'text'"):
        read_collection(
            lines(tmp_path, [{"question": "a", "positive": "a"}]),
            lines(tmp_path, [{"x": "y"}], "e.jsonl"),
            tmp_path,
        )


@pytest.mark.parametrize(
    ("passage", "answer", "is_there"),
    [
        ("He lives in Oslo, Norway.", "oslo", True),
        ("He lives in Oslonia.", "oslo", False),
        ("It cost the 5.000 kroner", "5000", True),
        ("他住在北京市。", "北京", True),
        ("他住在 北 京 市", "北京", True),
        ("他住在上海", "北京", False),
        ("a the an", "the", True),
    ],
)
def test_an_answer_stands_in_a_passage(passage, answer, is_there):
    assert holds(passage, answer) is is_there


# --- the whole ------------------------------------------------------------------------------------------------

QUESTIONS = [
    ("Where does the cat live?", 0, "Oslo"),
    ("What sings in Rome?", 1, "green bird"),
    ("horses?", 2, "Paris"),
]


def measured(tmp_path, rows, place=None, **settings):
    corpus = lines(
        tmp_path, [{"id": str(n), "text": text} for n, text in enumerate(PASSAGES)], "corpus.jsonl"
    )
    made = {"corpus": corpus.files, "top": [1, 2], **settings}
    section = {"task": "retrieval", "labelled": lines(tmp_path, rows), "retrieval": made}
    section["generation"] = {"max_new_tokens": 5}
    return measure(Subject("bert", place or bert()), asked(tmp_path, section))


def named():
    return [{"question": text, "positive": str(number)} for text, number, _ in QUESTIONS]


def test_figures_are_those_of_the_metrics(tmp_path):
    found = measured(tmp_path, named() * 4)
    encoder = Encoder(bert(), Manner(max_length=64), device="cpu")
    vectors = [encoder.vectors(texts, "") for texts in ([text for text, *_ in QUESTIONS * 4], PASSAGES)]
    ranks = ranks_by_cosine(*vectors, [[number] for _, number, _ in QUESTIONS * 4])
    expected = retrieval_metrics(ranks, (1, 2, 10))
    assert set(found.figures) == {"recall_at_1", "recall_at_2", "mrr", "ndcg_at_10"}
    for name, value in found.figures.items():
        assert value == pytest.approx(expected[name], abs=1e-12), name
    assert [line["rank"] for line in found.predictions] == [int(own[0]) for own in ranks]
    assert found.intervals(seed=1, resamples=20)["mrr"].value == found.figures["mrr"]
    assert any("nothing says how this model's vectors are made" in said for said in found.warnings)
    assert measured(tmp_path, named() * 4).figures == found.figures


def test_what_holds_an_answer_is_right_where_no_passage_is_named(tmp_path):
    by_name = measured(tmp_path, named())
    found = measured(tmp_path, [{"question": text, "answers": [answer]} for text, _, answer in QUESTIONS])
    assert found.settings["right"] == "answers"
    assert found.figures["mrr"] == by_name.figures["mrr"]
    lost = measured(tmp_path, [{"question": "x", "answers": ["Berlin"]}])
    assert lost.figures["mrr"] < 1e-12
    assert lost.predictions[0]["rank"] is None
    assert any("1 questions found no passage" in said for said in lost.warnings)


def test_a_model_with_one_vector_for_all_texts_finds_nothing_and_it_is_told(tmp_path):
    model = AutoModel.from_pretrained(bert())
    last = model.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.linspace(-1, 1, len(last.bias)))
    model.save_pretrained(tmp_path / "dead")
    tuning.tokenizer_of("bert").save_pretrained(tmp_path / "dead")
    by_answer = [{"question": text, "answers": [answer]} for text, _, answer in QUESTIONS]
    for rows in (by_answer, named()):
        found = measured(tmp_path, rows, tmp_path / "dead")
        assert (found.figures["recall_at_1"], found.figures["mrr"]) == (0, 1 / len(PASSAGES))
        for name in ("passages", "questions"):
            assert f"all {name} have the same vector: the model tells none from another" in found.warnings
    assert not any("same vector" in said for said in measured(tmp_path, by_answer).warnings)


def test_a_reader_answers_from_what_was_found(tmp_path):
    rows = [{"question": text, "answers": [answer]} for text, _, answer in QUESTIONS]
    prompt = "{passages} Q: {question} A:"
    reader = {"reader": tuning.model("llama"), "passages": 2, "prompt": prompt}
    found = measured(tmp_path, rows, **reader)
    assert found.best == "f1"
    assert {"mrr", "recall_at_1", "exact_match", "f1"} <= set(found.figures)
    from llmkit.metrics.answers import answer_metrics

    texts = [line["prediction"] for line in found.predictions]
    assert found.figures["f1"] == answer_metrics(texts, [row["answers"] for row in rows])["f1"]
    assert found.items.right == [False] * 3
    assert found.settings["prompt"] == prompt
    with pytest.raises(UsageError, match="does not say where the question go"):
        measured(tmp_path, rows, **{**reader, "prompt": "{passages}"})
    with pytest.raises(UsageError, match="does not write"):
        measured(tmp_path, rows, **{**reader, "reader": tuning.model("bert")})


def test_a_reader_gets_the_nearest_passages_that_fit():
    from llmkit.run.measure.retrieval import _fitting

    tokenizer = tuning.tokenizer_of("llama")
    whole, left_out = _fitting("{passages}|{question}", ["one", "two"], "{passages}?", tokenizer, 1000)
    assert (whole, left_out) == ("one\n\ntwo|{passages}?", 0)
    room = len(tokenizer(whole)["input_ids"]) - 1
    assert _fitting("{passages}|{question}", ["one", "two"], "{passages}?", tokenizer, room) == (
        "one|{passages}?",
        1,
    )


def test_rows_are_taken_evenly_and_the_address_is_of_both_files(tmp_path):
    found = measured(tmp_path, named())
    corpus = [{"id": str(n), "text": text + "!"} for n, text in enumerate(PASSAGES)]
    section = {"retrieval": {"corpus": lines(tmp_path, corpus, "other.jsonl").files}, "rows": 2}
    again = asked(tmp_path, {"task": "retrieval", "labelled": lines(tmp_path, named()), **section})
    other = measure(Subject("bert", bert()), replace(again, seed=3))
    assert other.data != found.data
    assert [line["input"] for line in other.predictions] == [QUESTIONS[0][0], QUESTIONS[1][0]]
