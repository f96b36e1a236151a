"""Timing models: what is asked of whom and in which order, by clocks that count; no test looks at real time."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import tuning
from training import options
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from llmkit import registry
from llmkit.errors import MissingError, RunError, UsageError
from llmkit.evaluate import speed, speed_worker
from llmkit.evaluate.speed import Call, Cell, Contender, Timed, time_models
from llmkit.evaluate.speed_worker import TimedModel, batch_ids
from llmkit.recipe.evaluation import Speed
from llmkit.recipe.schema import Eval
from llmkit.report.console import make_reporter
from llmkit.run.measure.asked import Asked, Subject
from llmkit.run.measure.speed import measure

FACTS = {"kind": "encoder", "writes": False, "longest": 512, "num_parameters": 5, "file_bytes": 20}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Fake:
    """A model whose calls take what a list says, the last time for ever."""

    def __init__(self, word, log, seconds, facts=FACTS, first_s=None):
        self.word, self.log, self.seconds, self.facts, self.first_s = word, log, list(seconds), facts, first_s

    def ask(self, request):
        if request["do"] == "load":
            return self.facts
        if request["do"] == "memory":
            return {"memory_bytes": 7}
        self.log.append((self.word, request["batch"], request["length"]))
        taken = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return {"seconds": taken, "first_s": self.first_s}


def run(settings, **seconds):
    """Time fakes by name; also what they were asked."""
    log = []
    fakes = {name: Fake(name, log, taken) for name, taken in seconds.items()}

    @contextmanager
    def start(contender, device):
        yield fakes[contender.word]

    return time_models([Contender(name, Path(name)) for name in fakes], settings, start=start), log


# --- who is asked, and when


def test_models_are_asked_in_turn_and_each_round_begins_with_another():
    _, log = run(Speed(batch=[2], length=[16], rounds=3), a=[1.0], b=[1.0], c=[1.0])
    warm, rounds = log[:6], log[6:]
    assert [word for word, *_ in warm] == ["a", "a", "b", "b", "c", "c"]
    assert [word for word, *_ in rounds] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {sizes for _, *sizes in map(tuple, log) for sizes in [tuple(sizes)]} == {(2, 16)}


def test_what_warms_up_does_not_count():
    (timed,), _ = run(Speed(batch=[1], length=[8], rounds=4), a=[100.0, 50.0, 1.0])
    (rounds,) = timed.rounds.values()
    assert [[call.seconds for call in calls] for calls in rounds] == [[1.0]] * 4


def test_a_short_call_is_made_often_enough_to_be_a_median_of_many():
    (fast, slow), _ = run(Speed(batch=[1], length=[8], rounds=2), fast=[0.001], slow=[0.1])
    assert [len(calls) for calls in next(iter(fast.rounds.values()))] == [speed.MOST_CALLS] * 2
    assert [len(calls) for calls in next(iter(slow.rounds.values()))] == [2, 2]  # of 0.25 s


def test_every_batch_with_every_length_is_timed():
    (timed,), _ = run(Speed(batch=[1, 4], length=[8, 32], rounds=2, new_tokens=3), a=[1.0])
    assert list(timed.rounds) == [Cell(1, 8, 3), Cell(1, 32, 3), Cell(4, 8, 3), Cell(4, 32, 3)]


def test_a_length_that_was_asked_for_and_does_not_fit_is_refused_and_a_default_is_cut():
    models = [("long", {**FACTS, "longest": None}), ("short", {**FACTS, "longest": 64})]
    with pytest.raises(UsageError, match="short: it has room for 64") as told:
        speed.cells_of(Speed(length=[32, 100]), models)
    assert told.value.hint == "speed.length: 64"
    assert {cell.length for cell in speed.cells_of(Speed(), models)} == {64}
    writer = {**FACTS, "kind": "causal", "writes": True, "longest": 64}
    assert {cell.length for cell in speed.cells_of(Speed(new_tokens=10), [("w", writer)])} == {54}
    with pytest.raises(UsageError, match="more than the model has room for"):
        speed.cells_of(Speed(new_tokens=64), [("w", writer)])


# --- what is made of the times


WRITER = {**FACTS, "kind": "causal", "writes": True, "memory_bytes": 9}
LATENCY, WORK = Cell(1, 10, 5), Cell(4, 10, 5)


def written():
    """Hand-made times: three rounds of two calls each."""
    waits = [
        [Call(1.0, 0.2), Call(2.0, 0.4)],
        [Call(3.0, 0.6), Call(4.0, 0.8)],
        [Call(5.0, 1.0), Call(6.0, 1.2)],
    ]
    work = [[Call(2.0, 1.0), Call(2.0, 1.0)]] * 3
    return Timed("w", WRITER, {LATENCY: waits, WORK: work})


def test_figures_by_hand():
    found = speed.figures_of(written(), LATENCY, WORK)
    assert found == pytest.approx(
        {
            "latency_ms_p50": 3500,
            "latency_ms_p95": 5750,  # of 1..6 s: between the fifth and the sixth, at 0.95 * 5 = 4.75
            "first_token_ms_p50": 700,
            "first_token_ms_p95": 1150,
            "rows_per_s": 2.0,  # 4 rows in 2 s
            "tokens_per_s": 40.0,  # 4 rows of 10 tokens in 1 s
            "decode_tokens_per_s": 16.0,  # 4 rows of 4 more tokens in 1 s
            "memory_bytes": 9,
            "num_parameters": 5,
            "file_bytes": 20,
        }
    )
    assert set(found) == set(registry.EVALUATIONS["speed"].metrics)
    lower = {name for name in found if registry.lower_is_better(name)}
    assert found.keys() - lower == {"rows_per_s", "tokens_per_s", "decode_tokens_per_s"}


def test_figures_of_chosen_rounds():
    assert speed.figures_of(written(), LATENCY, WORK, [0, 0])["latency_ms_p50"] == 1500
    assert speed.figures_of(written(), LATENCY, WORK, [2])["latency_ms_p50"] == 5500


def test_a_row_says_what_was_timed():
    row = speed.row_of(written(), LATENCY)
    assert {key: row[key] for key in ("model", "batch", "length", "new_tokens", "calls")} == {
        "model": "w",
        "batch": 1,
        "length": 10,
        "new_tokens": 5,
        "calls": 6,
    }
    assert (row["latency_ms_low"], row["latency_ms_high"]) == (1500, 5500)
    reader = Timed("r", {**FACTS, "memory_bytes": 9}, {LATENCY: [[Call(1.0)]]})
    row = speed.row_of(reader, LATENCY)
    assert not [key for key in row if "first" in key or "decode" in key or "new" in key]
    assert row["tokens_per_s"] == 10


def test_what_slows_a_round_down_slows_both_and_leaves_the_ratio():
    disturbed = [1.0, 7.0, 2.0]
    fast = [[Call(0.5 * slow), Call(0.9 * slow)] for slow in disturbed]
    late = [[Call(2.0 * slow), Call(1.0 * slow)] for slow in disturbed]
    a, b = Timed("a", FACTS, {LATENCY: fast}), Timed("b", FACTS, {LATENCY: late})
    (line,) = speed.ratios(a, b)
    assert {key: line[key] for key in ("model", "against", "times_as_fast", "low", "high")} == {
        "model": "a",
        "against": "b",
        "times_as_fast": 2.0,
        "low": 2.0,
        "high": 2.0,
    }
    assert speed.ratios(b, a)[0]["times_as_fast"] == 0.5
    with pytest.raises(ValueError, match="in turn"):
        speed.ratios(a, Timed("c", FACTS, {WORK: fast}))
    assert "differ by up to 300%" in speed.restless(a)  # (4.9 - 0.7) / 1.4
    assert speed.restless(Timed("calm", FACTS, {LATENCY: [[Call(1.0)], [Call(1.2)]]})) == ""


# --- the model


class Counting:
    """A clock that goes on by one each time it is looked at."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def models():
    """One of each kind, as small as can be, by name."""
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=50, max_position_embeddings=32, **SMALL)
    gpt2 = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    bart = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return {
        "encoder": (BertModel(bert), "encoder"),
        "answers": (BertForQuestionAnswering(bert), "answers"),
        "sequence": (GPT2ForSequenceClassification(gpt2), "sequence"),
        "bart": (BartForSequenceClassification(bart), "sequence"),
        "gpt2": (GPT2LMHeadModel(gpt2), "causal"),
        "llama": (LlamaForCausalLM(LlamaConfig(vocab_size=50, eos_token_id=2, **SMALL)), "causal"),
        "t5": (T5ForConditionalGeneration(t5), "seq2seq"),
    }


@pytest.mark.parametrize("name", ["encoder", "answers", "sequence", "bart", "gpt2", "llama", "t5"])
def test_a_model_of_each_kind_is_timed(name, monkeypatch):
    model, kind = models()[name]
    model.eval()
    wrote = []
    if kind in speed_worker.WRITES:
        plain = model.generate
        monkeypatch.setattr(
            model, "generate", lambda **words: wrote.append(plain(**words)) or wrote[-1], raising=False
        )
    times = TimedModel(model, kind, clock=Counting()).time(batch=3, length=6, new_tokens=4)
    if kind in speed_worker.WRITES:
        # Looked at when it starts, when the first token is there, and when all is done.
        assert (times.first_s, times.seconds) == (1.0, 2.0)
        given = 1 if kind == "seq2seq" else 6
        assert [ids.shape for ids in wrote] == [(3, given + 4)]
    else:
        assert (times.first_s, times.seconds) == (None, 1.0)


def test_a_model_writes_on_after_an_end_of_text():
    model, _ = models()["llama"]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are as likely: the first, which is the end of text here
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    wrote = []
    plain = model.generate
    model.generate = lambda **words: wrote.append(plain(**words)) or wrote[-1]
    TimedModel(model.eval(), "causal", clock=Counting()).time(2, 5, 7)
    assert wrote[0].shape == (2, 12)


def test_matrix_products_in_bfloat16():
    model, kind = models()["encoder"]
    seen = []
    dense = model.encoder.layer[0].intermediate.dense
    dense.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    for bf16 in (False, True):
        TimedModel(model, kind, bf16=bf16).time(1, 4, 1)
    assert seen == [torch.float32, torch.bfloat16]


def test_ids_are_the_same_each_time_from_all_over_and_never_one_with_a_meaning():
    ids = batch_ids(7, 13, 50, frozenset({5, 49}))
    assert ids.shape == (7, 13)
    assert torch.equal(ids, batch_ids(7, 13, 50, frozenset({5, 49})))
    assert set(ids.flatten().tolist()) == set(range(3, 50)) - {5, 49}
    assert batch_ids(1, 4, 2).max() < 2


def test_of_several_formats_one_counts(tmp_path):
    for name, size in {"model-1.safetensors": 10, "model-2.safetensors": 20, "model.onnx": 400}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert speed_worker.weight_bytes(tmp_path) == 30
    assert speed_worker.weight_bytes(tmp_path / "none") == 0


def test_the_high_water_mark_rises_with_what_is_taken_and_stays_up():
    before = speed_worker.high_water_bytes()
    now = np.zeros(0)
    while speed_worker.high_water_bytes() < before + 2**25:  # it may have been higher some time ago
        now = np.ones(len(now) + 2**22)
        assert now.nbytes < 2**33
    high = speed_worker.high_water_bytes()
    del now
    assert speed_worker.high_water_bytes() > high - 2**24


# --- the process


def test_a_process_answers_says_what_is_wrong_and_is_missed_when_it_dies(tmp_path):
    folder = Path(tuning.model("llama"))
    with speed.worker(Contender("tiny", folder), "cpu") as model:
        with pytest.raises(MissingError, match="no model that can be loaded"):
            model.ask(
                {"do": "load", "folder": str(tmp_path), "device": "cpu", "bf16": False, "trusted": False}
            )
        facts = model.ask(
            {"do": "load", "folder": str(folder), "device": "cpu", "bf16": False, "trusted": False}
        )
        parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(folder).parameters())
        size = (folder / "model.safetensors").stat().st_size
        assert facts == {
            "kind": "causal",
            "writes": True,
            "longest": 128,
            "num_parameters": parameters,
            "file_bytes": size,
        }
        times = model.ask({"do": "time", "batch": 2, "length": 8, "new_tokens": 3})
        assert 0 < times["first_s"] < times["seconds"]
        assert 0 < model.ask({"do": "memory"})["memory_bytes"] < 2**30
        model._process.kill()
        with pytest.raises(RunError, match=r"tiny: .* ended with signal 9"):
            model.ask({"do": "time", "batch": 2, "length": 8, "new_tokens": 3})
    assert model._process.returncode == -9


# --- the measurement


def asked(tmp_path, others, **settings):
    section = Eval(speed=Speed(**settings))
    reporter = make_reporter(quiet=True)
    return Asked(section, tmp_path, "en", 1, "cpu", options(tmp_path), reporter, others=others)


def test_models_of_one_command_are_timed_once_and_in_turn(tmp_path, monkeypatch):
    done = []

    def fake(contenders, settings, *, device, told):
        done.append([(one.word, one.bf16) for one in contenders])
        calls = {"a": 1.0, "b": 4.0}
        cells = [Cell(batch, 8, 2) for batch in settings.batch]
        facts = {**FACTS, "memory_bytes": 9}
        return [
            Timed(
                c.word,
                facts,
                {cell: [[Call(calls[c.word] * r)] for r in range(1, settings.rounds + 1)] for cell in cells},
            )
            for c in contenders
        ]

    monkeypatch.setattr(speed, "time_models", fake)
    a, b = Subject("a", tmp_path / "a", precision="bf16"), Subject("b", tmp_path / "b")
    first = measure(a, asked(tmp_path, [b], batch=[1, 8], rounds=3))
    second = measure(b, asked(tmp_path, [a], batch=[1, 8], rounds=3))
    assert done == [[("a", True), ("b", False)]]
    assert (first.figures["latency_ms_p50"], second.figures["latency_ms_p50"]) == (2000, 8000)
    assert first.figures["rows_per_s"] == 8 / 2  # of the larger batch
    assert first.settings["latency_of"] == {"batch": 1, "length": 8}
    assert first.settings["throughput_of"] == {"batch": 8, "length": 8}
    assert (first.settings["precision"], second.settings["precision"]) == ("bf16", "fp32")
    assert [row["batch"] for row in first.tables["speed"]] == [1, 8]
    assert [row["times_as_fast"] for row in second.tables["speed_ratios"]] == [0.25, 0.25]
    assert first.best == "latency_ms_p50"
    assert first.best in first.figures
    assert set(first.shown) == set(first.figures)
    assert (first.items, second.items) == (None, None)  # of three rounds nothing can be said
    # The same command again times again.
    measure(a, asked(tmp_path, [b], batch=[1, 8], rounds=3))
    assert len(done) == 2
    # And another one does not get what was left of it.
    measure(b, asked(tmp_path, [a], batch=[1], rounds=3))
    assert len(done) == 3


def test_of_enough_rounds_there_are_intervals_and_comparisons(tmp_path, monkeypatch):
    def fake(contenders, settings, *, device, told):
        facts, slow = {**FACTS, "memory_bytes": 9}, {"a": 1.0, "b": 4.0}
        return [
            Timed(c.word, facts, {LATENCY: [[Call(slow[c.word] * r)] for r in range(1, 12)]})
            for c in contenders
        ]

    monkeypatch.setattr(speed, "time_models", fake)
    a, b = Subject("a", tmp_path / "a"), Subject("b", tmp_path / "b")
    first, second = measure(a, asked(tmp_path, [b], rounds=11)), measure(b, asked(tmp_path, [a], rounds=11))
    interval = first.intervals(seed=1, resamples=50)["latency_ms_p50"]
    assert interval.low < interval.value == 6000 < interval.high
    compared = first.compare(second, seed=1, resamples=50)["latency_ms_p50"]
    assert compared.difference.value == 18000
    assert compared.difference.low > 0
    assert "memory_bytes" not in first.intervals(seed=1, resamples=50)
