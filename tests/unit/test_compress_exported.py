"""Exports within chains and searches, and files of them in processes that know nothing of llmkit."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import tuning
from training import options, pretrain
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from llmkit.cli import main
from llmkit.compress.export import apply
from llmkit.compress.given import Given
from llmkit.errors import MissingError, RecipeError, UsageError
from llmkit.models.runtimes import load_runtime
from llmkit.objectives.base import LossModule
from llmkit.recipe import load_recipe
from llmkit.recipe.compression import Step, Target
from llmkit.report.console import make_reporter
from llmkit.run import compress
from llmkit.run.compression.search import ladder

searching = sys.modules["llmkit.run.compression.search"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def run(folder):
    return pretrain(folder, pretrain__checkpoint__every="never", pretrain__eval__every="never")


def compressed(folder, word, **section):
    loaded = load_recipe({"llmkit": 1, "name": "c", "compress": {"speed": None, **section}})
    return compress(str(word), loaded, options(folder), make_reporter(quiet=True))


def export(to, kind="auto"):
    return Step(method="export", to=to, type=kind)


def test_ladders_end_with_exports_and_nothing_follows_one():
    for target in (Target(size=0.5), Target(latency=0.5), Target(size=0.5, latency=0.5)):
        rungs = ladder(target)
        assert list(rungs)[-3:] == ["onnx-int8", "gguf-q8_0", "gguf-q4_0"]
        for steps in rungs.values():
            assert all(step.method != "export" for step in steps[:-1])


def test_a_search_tries_exports_and_measures_what_their_runtime_says(folder, run, monkeypatch):
    pytest.importorskip("llama_cpp")

    def missing():
        raise MissingError("`to: onnx` needs onnx (no module)", hint='pip install "llmkit[onnx]"')

    monkeypatch.setattr("llmkit.compress.onnx_export.need_onnx", missing)
    names = ("onnx-int8", "gguf-q8_0", "gguf-q4_0")
    monkeypatch.setattr(searching, "ladder", lambda target: {name: ladder(target)[name] for name in names})
    found = compressed(folder, "tiny", target={"size": "85%"})
    onnx, eight, four = found.summary["tried"]
    assert onnx["error"] == "`to: onnx` needs onnx (no module)"
    assert not onnx["reached"]
    # Measured by the code of `eval`, in llama.cpp: near the model's own figure, and not the same.
    before = found.summary["before"]["perplexity"]
    assert eight["figure"] == pytest.approx(before, rel=0.02)
    assert eight["figure"] != before
    assert abs(four["figure"] - before) > abs(eight["figure"] - before)
    assert four["size_ratio"] < eight["size_ratio"] < 1
    assert eight["chosen"] != four["chosen"]
    best = eight if eight["chosen"] else four
    assert found.summary["model"] == best["folder"]
    assert json.loads((found.folder / "chain.json").read_text())["model"].endswith("1-export/model")
    row = found.summary["chain"][-1]
    assert row["figures"]["perplexity"] == best["figure"]
    assert row["paired"]["num_targets"] > 0


def test_an_export_that_is_not_the_model_is_passed_over(folder, run, monkeypatch):
    pytest.importorskip("llama_cpp")
    from llmkit.compress import gguf_export

    real = gguf_export._laid
    monkeypatch.setattr(gguf_export, "_laid", lambda value, tensor: real(value, tensor)[::-1].copy())
    monkeypatch.setattr(searching, "ladder", lambda target: {"gguf": [export("gguf", "f32")]})
    with pytest.raises(
        UsageError, match=r"nothing that could be tried fits the model \(gguf: .* does not hold"
    ):
        compressed(folder, "tiny", target={"size": "84%"})


@pytest.mark.parametrize(
    ("to", "hint"), [("onnx", "`type: int8`"), ("gguf", "`type: q8_0`"), ("bf16", "q4_0")]
)
def test_what_is_quantised_is_not_exported_and_that_is_said_when_the_recipe_is_read(to, hint):
    import jsonschema

    from llmkit.recipe.published import json_schema

    steps = [{"method": "prune", "share": "20%"}, {"method": "quantize"}, {"method": "export", "to": to}]
    document = {"llmkit": 1, "name": "c", "compress": {"steps": steps}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(document)
    (problem,) = caught.value.problems
    assert "`export` after `quantize`" in problem
    assert hint in problem
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not validator.is_valid(document)
    del steps[1]
    load_recipe(document)
    assert validator.is_valid(document)


# --- in processes that cannot import llmkit


def alone(code, *words):
    """What such a process says."""
    guard = "import sys\nsys.modules['llmkit'] = None\n"
    made = subprocess.run(
        [sys.executable, "-P", "-c", guard + textwrap.dedent(code), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout.splitlines()[-1])


def loud():
    """A small llama whose weights are so large that what is wrong shows."""
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tuning.tokenizer_of("llama")),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.randn_like(value) * 0.15)
    return made.eval()


def exported(model, step, folder, place=None):
    core = LossModule(model, None, bf16=False)
    given = Given(core, (), Path(place or tuning.model("llama")), 0, lambda line: None)
    made = apply(given, step)
    made.write(folder)
    return made


@torch.no_grad()
def said(model, ids, **more):
    return model(input_ids=torch.tensor(ids), **more).logits


TEXT = "It's 12 words: 中文，测试 <|im_end|>\n  two"


@pytest.mark.parametrize(("kind", "most"), [("f32", 0.01), ("q8_0", 0.1)])
def test_llama_cpp_alone_reads_text_and_says_what_the_model_says(kind, most, tmp_path):
    pytest.importorskip("llama_cpp")
    model = loud()
    made = exported(model, export("gguf", kind), tmp_path)
    ids = tuning.tokenizer_of("llama")(TEXT)["input_ids"]
    read, found = alone(
        """
        import json, sys, llama_cpp
        model = llama_cpp.Llama(sys.argv[1], n_ctx=128, logits_all=True, verbose=False)
        ids = model.tokenize(sys.argv[2].encode(), add_bos=True, special=True)
        model.eval(ids)
        print(json.dumps([ids, model.scores[:len(ids)].tolist()]))
        """,
        tmp_path / "model.gguf",
        TEXT,
    )
    assert read == ids
    # Against the model itself, so rounding is in it.
    gap, expected = torch.tensor(found) - said(model, [ids])[0], said(made.model, [ids])[0]
    spread = expected - expected.mean(1, keepdim=True)
    assert float(gap.square().mean().sqrt() / spread.square().mean().sqrt()) < most


def test_a_reader_of_the_format_alone_finds_the_weights(tmp_path):
    pytest.importorskip("gguf")
    model = loud()
    exported(model, export("gguf", "f32"), tmp_path)
    found = alone(
        """
        import json, sys, gguf
        tensors = {one.name: one for one in gguf.GGUFReader(sys.argv[1]).tensors}
        read = lambda name: gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).tolist()
        print(json.dumps([read("blk.1.ffn_up.weight"), read("blk.0.attn_q.weight"), sorted(tensors)]))
        """,
        tmp_path / "model.gguf",
    )
    assert torch.equal(torch.tensor(found[0]), model.model.layers[1].mlp.up_proj.weight)
    # llama.cpp turns neighbours: rows 0 and 8 of a head of 16 come to stand beside each other.
    query = model.model.layers[0].self_attn.q_proj.weight
    turned = [head * 16 + row for head in range(4) for pair in range(8) for row in (pair, pair + 8)]
    assert torch.equal(torch.tensor(found[1]), query[turned])
    assert "output.weight" not in found[2]


@pytest.mark.slow
def test_onnxruntime_alone_says_what_a_decoder_says_with_rows_filled_on_both_sides(tmp_path):
    pytest.importorskip("onnxruntime")
    model = loud()
    exported(model, export("onnx"), tmp_path)
    ids = [[5, 6, 7, 8, 9], [9, 8, 7, 3, 4]]
    masks = [[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]]
    found = alone(
        """
        import json, sys, numpy, onnxruntime
        session = onnxruntime.InferenceSession(sys.argv[1])
        ids, masks = json.loads(sys.argv[2])
        run = lambda mask: session.run(["logits"], {"input_ids": numpy.array(ids), "attention_mask": numpy.array(mask)})
        print(json.dumps([run(mask)[0].tolist() for mask in masks]))
        """,
        tmp_path / "model.onnx",
        json.dumps([ids, masks]),
    )
    for mask, logits in zip(masks, found, strict=True):
        read = torch.tensor(mask).bool()
        expected = said(model, ids, attention_mask=torch.tensor(mask))
        assert (torch.tensor(logits) - expected)[read].abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("to", ["bf16", "fp16"])
def test_plain_transformers_alone_loads_sixteen_bits(to, tmp_path):
    model = loud()
    made = exported(model, export(to), tmp_path)
    ids = [[5, 6, 7, 8, 9]]
    dtype, found = alone(
        """
        import json, sys, torch
        from transformers import AutoModelForCausalLM
        kept = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").dtype
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
        with torch.no_grad():
            print(json.dumps([str(kept), model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()]))
        """,
        tmp_path,
        json.dumps(ids),
    )
    assert dtype == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[to]
    assert torch.equal(torch.tensor(found), said(made.model, ids))  # what is measured is what is stored
    assert 0 < (torch.tensor(found) - said(model, ids)).abs().max() < 0.5


# --- exported models write


def test_an_exported_model_writes_as_the_model_does(tmp_path):
    pytest.importorskip("llama_cpp")
    model = loud()
    exported(model, export("gguf", "f32"), tmp_path)
    other = load_runtime(tmp_path)
    torch.manual_seed(5)
    ids = torch.randint(3, model.config.vocab_size, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # a shorter text is filled up on the left
    for each in (model, other):
        each.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, do_sample=False)
    given = {"attention_mask": mask, "max_new_tokens": 8}
    plain = model.generate(ids, **given)
    assert torch.equal(other.generate(ids, use_cache=True, **given), plain)
    assert torch.equal(other.generate(ids, num_beams=3, **given), model.generate(ids, num_beams=3, **given))
    end = {"eos_token_id": [int(plain[1, 14]), 1]}
    assert torch.equal(other.generate(ids, **given, **end), model.generate(ids, **given, **end))
    with pytest.raises(UsageError, match="filled up on the left"):
        other.generate(ids, attention_mask=mask.flip(1), max_new_tokens=2)
    # What was read is read once: of two tokens the second is decoded alone.
    decoded = []
    real = other._decode
    other._decode = lambda ids, first, every: (
        decoded.append((len(ids[0]), first)) or real(ids, first, every=every)
    )
    other.generate(ids[1:], max_new_tokens=3)
    assert decoded == [(12, 0), (1, 12), (1, 13)]
    other.close()


def test_a_person_lets_an_exported_model_write(folder, run, capsys):
    pytest.importorskip("llama_cpp")
    found = compressed(folder, "tiny", steps=[{"method": "export", "to": "gguf", "type": "f32"}])
    place = json.loads((found.folder / "chain.json").read_text())["model"]
    words = ["--runs", str(folder / "runs"), "--temperature", "0", "--max-new-tokens", "8"]
    written = []
    for model in ("tiny", found.folder / place):
        assert main(["generate", str(model), "def ", *words]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_in_onnxruntime_says_and_writes_what_the_model_does(family, tmp_path):
    pytest.importorskip("onnxruntime")
    sizes = {
        "vocab_size": 700,
        "d_model": 32,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(3)
    if family == "t5":
        made = T5Config(**sizes, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        model = T5ForConditionalGeneration(made)
    else:
        sides = {
            f"{side}_{what}": number
            for side in ("encoder", "decoder")
            for what, number in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
        }
        made = BartConfig(**sizes, **sides, max_position_embeddings=64, forced_eos_token_id=None)
        model = BartForConditionalGeneration(made)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.15)
    model.eval()
    attention = model.config._attn_implementation
    facts = exported(model, export("onnx"), tmp_path, tuning.model("t5")).facts
    assert facts["difference"]["largest_difference"] <= facts["bound"]["largest_difference"] < 0.05
    assert model.config._attn_implementation == attention
    other = load_runtime(tmp_path)
    ids = torch.randint(3, 700, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    starts = torch.randint(3, 700, (3, 4))
    expected = said(model, ids.tolist(), attention_mask=mask, decoder_input_ids=starts)
    found = said(other, ids.tolist(), attention_mask=mask, decoder_input_ids=starts)
    assert (found - expected).abs().max() < 1e-3 * float(expected.abs().max())
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(other.generate(ids, **given), model.generate(ids, **given))
    assert torch.equal(other.generate(ids, num_beams=2, **given), model.generate(ids, num_beams=2, **given))
