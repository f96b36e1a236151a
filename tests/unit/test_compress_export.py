"""Exports: what another runtime says is what the model says; what it cannot say is refused."""

import inspect
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils.generic import ModelOutput
from tuning import model as tiny
from tuning import tokenizer_of

from llmkit.compress import export, gguf_export
from llmkit.compress.alike import compare, probes_of
from llmkit.compress.export import apply
from llmkit.compress.gguf_words import words_of
from llmkit.compress.given import Given
from llmkit.compress.torch_export import trace
from llmkit.errors import MissingError, RunError, UsageError
from llmkit.evaluate.speed_worker import Server
from llmkit.models.heads import causal_scores
from llmkit.models.runtime_model import RuntimeModel
from llmkit.models.runtimes import load_runtime, runtime_of
from llmkit.objectives.base import TARGETS, Loss, LossModule, cross_entropy
from llmkit.recipe.compression import Step

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


class Predicts:
    """The next token's loss, as far as an export asks for it."""

    sums = ()

    def loss(self, model, batch, criterion=cross_entropy):
        return Loss(
            {TARGETS: criterion(causal_scores(model, batch["input_ids"]), batch["targets"].flatten())}
        )


def noisy(model, seed=0):
    """The model with weights so large that what is wrong shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.15)
    return model.eval()


def decoder(family, tokenizer=None, **more):
    size = {"vocab_size": len(tokenizer or tokenizer_of("llama"))}
    if family == "gpt2":
        return noisy(GPT2LMHeadModel(GPT2Config(**size, n_embd=64, n_layer=2, n_head=4, n_positions=128)))
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**size, **GROUPED, tie_word_embeddings=True)),
        "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**size, **GROUPED, attention_bias=True)),
        "llama-scaled": lambda: LlamaForCausalLM(
            LlamaConfig(**size, **GROUPED, head_dim=32, rope_parameters=SCALED)
        ),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**size, **GROUPED)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**size, **GROUPED, head_dim=32)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**size, **GROUPED, sliding_window=8)),
    }
    return noisy(made[family]())


def given_of(model, batches=(), place=None):
    return Given(
        LossModule(model, Predicts(), bf16=False), batches, Path(place or tiny("llama")), 0, lambda line: None
    )


def step(to, kind="auto"):
    return Step(method="export", to=to, type=kind)


def texts(model, rows=2, length=24):
    torch.manual_seed(5)
    return torch.randint(3, model.config.vocab_size, (rows, length))


def batch_of(ids_BT):
    targets_BT = ids_BT.roll(-1, 1)
    return {"input_ids": ids_BT, "targets": targets_BT, TARGETS: torch.tensor(targets_BT.numel())}


@torch.no_grad()
def logits(model, ids_BT, **more):
    return model(input_ids=ids_BT, **more).logits


# --- GGUF


@pytest.mark.parametrize("family", ["llama", "llama-biased", "llama-scaled", "qwen2", "qwen3", "gpt2"])
def test_llama_cpp_says_what_the_model_says(family, tmp_path):
    pytest.importorskip("llama_cpp")
    model = decoder(family)
    ids_BT = texts(model)
    expected = logits(model, ids_BT)
    made = apply(given_of(model, [batch_of(ids_BT)]), step("gguf", "f32"))
    made.write(tmp_path)
    other = load_runtime(tmp_path)
    found = logits(other, ids_BT)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()  # what was read is kept in float16
    assert made.facts["difference"]["same_choice"] > 0.95
    assert made.facts["loss_after"] == pytest.approx(made.facts["loss_before"], abs=1e-3)
    for each in (model, other):
        each.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, do_sample=False)
    generated = model.generate(ids_BT, max_new_tokens=6)
    assert torch.equal(other.generate(ids_BT, max_new_tokens=6), generated)
    other.close()


def test_padding_on_the_right_is_not_read_and_other_padding_is_refused(tmp_path):
    pytest.importorskip("llama_cpp")
    model = decoder("qwen3")
    apply(given_of(model), step("gguf", "f32")).write(tmp_path)
    other = load_runtime(tmp_path)
    ids_BT = texts(model, length=10)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = 0
    found = logits(other, ids_BT, attention_mask=mask_BT)
    assert torch.allclose(found[1, :6], logits(other, ids_BT[1:, :6])[0], atol=1e-5)
    assert not found[1, 6:].any()
    with pytest.raises(UsageError, match="filled up on the right"):
        logits(other, ids_BT, attention_mask=mask_BT.flip(1))
    with pytest.raises(UsageError, match="takes no positions"):
        logits(other, ids_BT, position_ids=torch.arange(5, 15).expand_as(ids_BT))
    # Documents in one row do not see each other: each is as it is alone.
    positions_BT = torch.cat([torch.arange(4), torch.arange(6)]).expand_as(ids_BT).clone()
    positions_BT[1] = torch.cat([torch.arange(7), torch.arange(2), torch.arange(1)])
    found = logits(other, ids_BT, position_ids=positions_BT)
    assert found.shape == (2, 10, model.config.vocab_size)
    for row, first, end in ((0, 0, 4), (0, 4, 10), (1, 0, 7), (1, 7, 9), (1, 9, 10)):
        expected = logits(model, ids_BT[row : row + 1, first:end])[0]
        assert (found[row, first:end] - expected).abs().max() < 0.01 * expected.abs().max()


def blocks(row, bits):
    """The formats' rule, by hand: 32 numbers share a scale in float16."""
    found = []
    for block in np.asarray(row, dtype=np.float32).reshape(-1, 32):
        if bits == 8:
            scale = np.abs(block).max() / np.float32(127)
            codes = np.array([math.floor(abs(v / scale) + 0.5) * (1 if v > 0 else -1) for v in block])
        else:
            extreme = block[np.abs(block).argmax()]
            scale = extreme / np.float32(-8)
            codes = np.clip(np.trunc(block / scale + 8.5), 0, 15) - 8
        found += list(np.float32(np.float16(scale)) * codes.astype(np.float32))
    return torch.tensor(np.array(found, dtype=np.float32))


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8), ("q4_0", 4)])
def test_the_model_that_was_made_has_the_weights_that_the_file_has(kind, bits, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = decoder("llama")
    before = model.model.layers[1].mlp.up_proj.weight[3].detach().clone()
    made = apply(given_of(model), step("gguf", kind))
    made.write(tmp_path)
    after = made.model.model.layers[1].mlp.up_proj.weight[3]
    assert torch.equal(after, blocks(before, bits))
    stored = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    one = stored["blk.1.ffn_up.weight"]
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type))[3], after)
    assert one.tensor_type.name == kind.upper()
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"  # of output layers four bits are too few
    assert "output.weight" not in stored  # tied
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight
    assert made.facts["stored"] == {
        "Q8_0": 1 if bits == 4 else 15,
        **({"Q4_0": 14} if bits == 4 else {}),
        "F32": 5,
    }


def test_rows_that_fall_into_no_blocks_are_stored_in_sixteen_bits(tmp_path):
    pytest.importorskip("gguf")
    config = LlamaConfig(**{**GROUPED, "intermediate_size": 72}, vocab_size=len(tokenizer_of("llama")))
    made = apply(given_of(noisy(LlamaForCausalLM(config))), step("gguf"))
    assert made.facts["stored"]["F16"] == 2  # the layers down: their rows have 72 numbers
    assert made.facts["type"] == "q8_0"


def broken_layout(monkeypatch):
    monkeypatch.setattr(gguf_export, "_laid", lambda value, tensor: np.ascontiguousarray(value))
    monkeypatch.setattr(gguf_export, "_unlaid", lambda value, tensor: np.ascontiguousarray(value))


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
def test_what_llama_cpp_says_otherwise_is_an_error(kind, monkeypatch, tmp_path):
    pytest.importorskip("llama_cpp")
    broken_layout(monkeypatch)
    monkeypatch.setattr(export.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunError, match=r"llama\.cpp differs by"):
        apply(given_of(decoder("llama")), step("gguf", kind))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("wrong", ["positions", "norms", "scaling", "heads", "layers"])
def test_settings_that_llama_cpp_is_told_wrongly_are_an_error(wrong, kind, monkeypatch):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    family = "llama"
    if wrong == "positions":
        real = gguf.GGUFWriter.add_rope_freq_base
        monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda self, base: real(self, base / 10))
    elif wrong == "norms":
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "add_layer_norm_rms_eps",
            lambda self, eps: self.add_float32("llama.attention.layer_norm_rms_epsilon", 0.1),
        )
    elif wrong == "scaling":
        family = "llama-scaled"
        monkeypatch.setattr(gguf_export, "_rope_factors", lambda config: None)
    elif wrong == "heads":
        monkeypatch.setattr(
            gguf_export,
            "_heads_of",
            lambda source, config: 2 if source.endswith(("q_proj.weight", "k_proj.weight")) else 0,
        )
    else:
        real_block = gguf.GGUFWriter.add_block_count
        monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", lambda self, count: real_block(self, 1))
    with pytest.raises(RunError, match=r"llama\.cpp (differs|diverges|does not take)"):
        apply(given_of(decoder(family)), step("gguf", kind))


def test_what_ends_an_answer_is_known_to_llama_cpp(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, end = decoder("llama"), 7
    model.generation_config.eos_token_id = [tokenizer_of("llama").eos_token_id, end]
    apply(given_of(model), step("gguf")).write(tmp_path)
    words = load_runtime(tmp_path)._words
    ends = [number for number in range(40) if llama_cpp.llama_vocab_is_eog(words, number)]
    assert set(ends) >= {tokenizer_of("llama").eos_token_id, end}


def test_without_llama_cpp_the_file_is_read_back(monkeypatch, tmp_path):
    pytest.importorskip("gguf")

    def missing():
        raise MissingError("no llama.cpp", hint="")

    monkeypatch.setattr(export, "need_llama_cpp", missing)
    model = decoder("llama")
    ids_BT = texts(model)
    made = apply(given_of(model, [batch_of(ids_BT)]), step("gguf"))
    assert "not run" in made.warnings[0]
    assert made.facts["runtime"] is None
    assert 0 < made.facts["difference"]["kl"] < 0.05
    assert made.facts["loss_after"] != made.facts["loss_before"]
    real = gguf_export._laid
    monkeypatch.setattr(gguf_export, "_laid", lambda value, tensor: real(value, tensor)[::-1].copy())
    with pytest.raises(RunError, match=r"does not hold model\."):
        apply(given_of(model), step("gguf"))


def test_the_file_has_the_tokenizer_and_the_chat_template(tmp_path):
    gguf = pytest.importorskip("gguf")
    tokenizer = tokenizer_of("llama")
    apply(given_of(decoder("llama")), step("gguf")).write(tmp_path)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields

    def value(name):
        return fields[name].contents()

    assert value("tokenizer.chat_template") == tokenizer.chat_template
    assert value("tokenizer.ggml.pre") == "gpt-2"
    tokens = value("tokenizer.ggml.tokens")
    assert tokens == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = value("tokenizer.ggml.token_type")
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == 3] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert value("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert value("llama.attention.head_count_kv") == 2


def test_llama_cpp_reads_the_tokens_that_the_model_learned(tmp_path):
    pytest.importorskip("llama_cpp")
    tokenizer = tokenizer_of("llama")
    apply(given_of(decoder("llama")), step("gguf")).write(tmp_path)
    other = load_runtime(tmp_path)
    for text in (inspect.getsource(json), "déjà vu 日本語\n\n\t 12345 <|im_start|>user\nIt's<|im_end|>"):
        assert other.tokenize(text) == tokenizer(text)["input_ids"]


def test_other_tokens_are_an_error(monkeypatch):
    pytest.importorskip("llama_cpp")

    def planted(tokenizer, size):
        words = words_of(tokenizer, size)
        words.merges.reverse()
        return words

    monkeypatch.setattr(export, "words_of", planted)
    with pytest.raises(RunError, match="other tokens: token"):
        apply(given_of(decoder("llama")), step("gguf"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"type": "WordPiece"}}, "its algorithm is WordPiece"),
        ({"normalizer": {"type": "Lowercase"}}, r"changes text first \(Lowercase\)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts text by 'Whitespace'"),
    ],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(change, said):
    class Backend:
        def to_str(self):
            known = json.loads(tokenizer_of("llama").backend_tokenizer.to_str())
            for name, value in change.items():
                known[name] = {**(known[name] or {}), **value} if name == "model" else value
            return json.dumps(known)

    class Changed:
        backend_tokenizer = Backend()

        def __getattr__(self, name):
            return getattr(tokenizer_of("llama"), name)

        def __call__(self, *args, **more):
            return tokenizer_of("llama")(*args, **more)

    with pytest.raises(UsageError, match=said):
        words_of(Changed(), 2000)


def test_a_tokenizer_of_ours_is_cut_as_qwen2_does():
    from llmkit.data.tokenizers.patterns import RUNS, byte_splitter

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.backend_tokenizer.pre_tokenizer = byte_splitter(RUNS)
    assert words_of(tokenizer, 2000).pre == "qwen2"


def test_architectures_without_an_exporter_are_refused():
    pytest.importorskip("gguf")
    bert = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=50))
    with pytest.raises(UsageError, match="predict the next token only"):
        apply(given_of(bert), step("gguf"))
    with pytest.raises(UsageError, match="a window of the text"):
        apply(given_of(decoder("mistral")), step("gguf"))
    model = decoder("llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(UsageError, match=r"knows no llama with `hidden_act: gelu`"):
        apply(given_of(model), step("gguf"))


# --- ONNX and torch


def run_alone(code, *words):
    """What a process says that cannot import llmkit."""
    guard = "import sys\nsys.modules['llmkit'] = None\n"
    made = subprocess.run(
        [sys.executable, "-P", "-c", guard + textwrap.dedent(code), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


def test_a_program_does_not_know_the_longer_rows_that_its_examples_were_cut_out_of():
    """Text's inputs are rows without their last token. Torch guards the whole row too, and then nothing can run it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, vocab_size=40)).eval()
    ids_BT = torch.randint(0, 40, (2, 13))[:, :-1]
    program = trace(model, "causal", {"input_ids": ids_BT, "attention_mask": torch.ones(2, 13).long()[:, 1:]})
    assert not [code for code in getattr(program, "_guards_code", []) if "_base" in code]
    found = program.run_decompositions().module()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    assert torch.allclose(found["logits"], model(input_ids=ids_BT).logits, atol=1e-5)


@pytest.mark.slow
def test_onnxruntime_alone_says_what_a_classifier_says(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    model = noisy(
        BertForSequenceClassification(
            BertConfig(**{**SIZES, "num_hidden_layers": 1}, vocab_size=700, num_labels=3)
        )
    )
    made = apply(given_of(model, place=tiny("bert")), step("onnx"))
    made.write(tmp_path)
    ids_BT = texts(model, rows=3, length=9)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    found = run_alone(
        """
        import json, sys, numpy, onnxruntime
        session = onnxruntime.InferenceSession(sys.argv[1])
        words = {name: numpy.array(value) for name, value in json.loads(sys.argv[2]).items()}
        print(json.dumps(session.run(["logits"], words)[0].tolist()))
        """,
        tmp_path / "model.onnx",
        json.dumps(
            {
                "input_ids": ids_BT.tolist(),
                "attention_mask": mask_BT.tolist(),
                "token_type_ids": torch.zeros_like(ids_BT).tolist(),
            }
        ),
    )
    expected = logits(model, ids_BT, attention_mask=mask_BT)
    assert torch.allclose(torch.tensor(found), expected, atol=1e-3)
    assert made.facts["difference"]["largest_difference"] <= made.facts["bound"]["largest_difference"]
    assert torch.allclose(logits(load_runtime(tmp_path), ids_BT, attention_mask=mask_BT), expected, atol=1e-3)
    assert made.facts["file_bytes"] == (tmp_path / "model.onnx").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "int8"])
@pytest.mark.parametrize("what", ["causal", "answers"])
def test_onnx_of_other_kinds(what, kind, tmp_path):
    pytest.importorskip("onnxruntime")
    if what == "causal":
        model, place = decoder("llama"), tiny("llama")
    else:
        model, place = noisy(BertForQuestionAnswering(BertConfig(**SIZES, vocab_size=700))), tiny("bert")
    ids_BT = texts(model)
    batches = [batch_of(ids_BT)] if what == "causal" else []
    made = apply(given_of(model, batches, place), step("onnx", kind))
    made.write(tmp_path)
    name = "logits" if what == "causal" else "end_logits"
    with torch.no_grad():
        gap = (load_runtime(tmp_path)(input_ids=ids_BT)[name] - model(input_ids=ids_BT)[name]).abs().max()
    if kind == "f32":
        assert gap < 1e-3
    else:
        assert 1e-6 < gap < 5
        assert made.facts["difference"]["largest_difference"] > 1e-6
        assert not list(tmp_path.glob("whole*"))
    if what == "causal":
        assert abs(made.facts["loss_after"] - made.facts["loss_before"]) < (1e-4 if kind == "f32" else 0.5)


@pytest.mark.slow
def test_torch_alone_runs_a_program(tmp_path):
    model = decoder("llama")
    apply(given_of(model), step("torch")).write(tmp_path)
    ids_BT = texts(model, rows=3, length=7)
    found = run_alone(
        """
        import json, sys, torch
        sys.modules["transformers"] = None
        run = torch.export.load(sys.argv[1]).module()
        ids = torch.tensor(json.loads(sys.argv[2]))
        with torch.no_grad():
            print(json.dumps(run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"].tolist()))
        """,
        tmp_path / "model.pt2",
        json.dumps(ids_BT.tolist()),
    )
    assert torch.allclose(torch.tensor(found), logits(model, ids_BT), atol=1e-4)


@pytest.mark.slow
def test_an_encoder_decoder_is_a_program_of_torch_and_what_onnx_cannot_say_is_refused(monkeypatch):
    pytest.importorskip("onnxruntime")
    config = T5Config(
        vocab_size=700, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    made = apply(given_of(model, place=tiny("t5")), step("torch"))
    assert made.facts["difference"]["largest_difference"] < 1e-4

    def never(*args, **more):
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", never)
    with pytest.raises(UsageError, match=r"t5 has no form in ONNX \(no such operator\)"):
        apply(given_of(model, place=tiny("t5")), step("onnx"))
    assert model.config._attn_implementation == "sdpa"


def test_an_exported_model_that_differs_is_an_error(monkeypatch, tmp_path):
    class Off(RuntimeModel):
        def run(self, inputs):
            return {"logits": logits(model, inputs["input_ids"]) + 0.01}

    model = decoder("llama")
    monkeypatch.setattr(export, "write_torch", lambda model, kind, inputs, file: file.write_bytes(b""))
    monkeypatch.setattr(export, "load_runtime", lambda folder: Off(folder, model.config))
    monkeypatch.setattr(export.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunError, match=r"model\.pt2 differs by 0\.01, over"):
        apply(given_of(model), step("torch"))
    assert not list(tmp_path.iterdir())


# --- 16 bits


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_of_sixteen_bits(to, dtype, tmp_path):
    model = decoder("llama")
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    made = apply(given_of(model), step(to))
    made.write(tmp_path)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert stored.dtype == dtype
    assert all(torch.equal(value, whole[name].to(dtype)) for name, value in stored.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids_BT = texts(model)
    assert torch.equal(logits(loaded, ids_BT), logits(made.model, ids_BT))
    assert not torch.equal(logits(model, ids_BT), logits(made.model, ids_BT))
    assert made.standard
    assert made.facts["file_bytes"] == pytest.approx(
        (tmp_path / "model.safetensors").stat().st_size, rel=0.05
    )


def test_numbers_that_float16_has_not_are_refused():
    model = decoder("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has numbers beyond"):
        apply(given_of(model), step("fp16"))
    apply(given_of(model), step("bf16"))


# --- what both have


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match="has no `type: int8`") as caught:
        apply(given_of(decoder("llama")), step("gguf", "int8"))
    assert "q8_0" in caught.value.hint
    model = decoder("llama")
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(UsageError, match="quantised already"):
        apply(given_of(model), step("onnx"))


class Says(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, input_ids, attention_mask):
        return ModelOutput(logits=self.rows)


def test_alike_by_hand():
    first = [[[math.log(3), 0.0], [0.0, 0.0]], [[2.0, 1.0], [50.0, 0.0]]]
    second = [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 99.0]]]
    probe = {"input_ids": torch.zeros(2, 2), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    found = compare(Says(first), Says(second), [probe], "causal")
    p = 1 / (1 + math.exp(-1))
    kl = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0, p * 1 - (1 - p) * 1]
    assert found.places == 3
    assert found.largest == pytest.approx(math.log(3))
    assert found.kl == pytest.approx(sum(kl) / 3, rel=1e-6)
    assert found.same == pytest.approx(2 / 3)
    spread = 2 * (math.log(3) / 2) ** 2 + 0 + 0.5
    assert found.relative == pytest.approx(((math.log(3) ** 2 + 2) / spread) ** 0.5, rel=1e-6)


def test_models_are_compared_on_what_was_learned_and_on_another_size():
    model = decoder("llama")
    ids_BT = texts(model, rows=3, length=10)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 4:] = 0
    first, second = probes_of(given_of(model, [{"input_ids": ids_BT, "attention_mask": mask_BT}]), "causal")
    assert torch.equal(first["input_ids"], ids_BT)
    assert torch.equal(first["attention_mask"], mask_BT)
    assert second["input_ids"].shape == (1, 5)
    made_up, _ = probes_of(given_of(model, [{"pixels": ids_BT}]), "causal")
    assert int(made_up["input_ids"].max()) < model.config.vocab_size


def test_an_exported_model_is_timed_as_another_is(tmp_path):
    pytest.importorskip("llama_cpp")
    model = decoder("llama")
    apply(given_of(model), step("gguf")).write(tmp_path)
    assert runtime_of(tmp_path) == "gguf"
    server = Server()
    facts = server.answer(
        {
            "do": "load",
            "folder": str(tmp_path),
            "device": "cpu",
            "bf16": False,
            "trusted": False,
            "kind": None,
        }
    )
    assert facts["writes"]
    assert facts["num_parameters"] == model.num_parameters()
    assert facts["file_bytes"] == (tmp_path / "model.gguf").stat().st_size
    times = server.answer({"do": "time", "batch": 2, "length": 8, "new_tokens": 4})
    assert 0 < times["first_s"] < times["seconds"]
    with pytest.raises(UsageError, match="timed on CPU"):
        Server().answer(
            {
                "do": "load",
                "folder": str(tmp_path),
                "device": "cuda",
                "bf16": False,
                "trusted": False,
                "kind": None,
            }
        )
