"""Every attention kernel gives the same logits, and keeps packed documents apart when asked to."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmkit.errors import UsageError
from llmkit.models import attention
from llmkit.models.attention import (
    IMPLEMENTATIONS,
    choose_attention,
    document_sdpa_attention,
    use_attention,
)

VOCAB, LENGTH = 97, 300
DOCUMENTS = [[70, 180, 50], [LENGTH]]
CONFIGS = {
    "llama": {"num_key_value_heads": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 32},
}


def make_model(kind="llama", **fields):
    shape = {"hidden_size": 32, "num_hidden_layers": 2} if kind != "gpt2" else {}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, max_position_embeddings=LENGTH, **shape, **CONFIGS.get(kind, {}), **fields
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # large weights, so that attention matters
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_rows():
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (len(DOCUMENTS), LENGTH))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS])
    return ids, positions


@torch.no_grad()
def logits_alone(model, ids):
    """Each document by itself through transformers' eager attention."""
    model.set_attn_implementation("eager")
    rows = [
        torch.cat([model(input_ids=part[None]).logits[0] for part in row.split(lengths)])
        for row, lengths in zip(ids, DOCUMENTS, strict=True)
    ]
    return torch.stack(rows)


@torch.no_grad()
def logits_packed(model, ids, positions=None):
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_documents_are_as_if_alone(kind, name):
    model = make_model(kind)
    ids, positions = make_rows()
    alone = logits_alone(model, ids)
    use_attention(model, name, isolate=True)
    assert (logits_packed(model, ids, positions) - alone).abs().max() < 1e-5
    # The test can fail: without isolation they see each other.
    use_attention(model, name, isolate=False)
    assert (logits_packed(model, ids) - alone).abs().max() > 0.1


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("isolate", [True, False])
def test_compiled_models_isolate_too(name, isolate):
    torch._dynamo.reset()
    model = make_model()
    ids, positions = make_rows()
    alone = logits_alone(model, ids)
    use_attention(model, name, isolate=isolate)
    compiled = torch.compile(model.base_model, backend="aot_eager", dynamic=False, fullgraph=True)
    given = {"position_ids": positions} if isolate else {}
    with torch.no_grad():
        packed = model.lm_head(compiled(input_ids=ids, use_cache=False, **given).last_hidden_state)
    difference = (packed - alone).abs().max()
    assert difference < 1e-5 if isolate else difference > 0.1


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("isolate", [True, False])
def test_gradients_equal_eager(name, isolate):
    model = make_model()
    ids, positions = make_rows()
    given = {"position_ids": positions} if isolate else {}

    def gradient():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False, **given).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model.set_attn_implementation("eager")
    expected = gradient()
    use_attention(model, name, isolate=isolate)
    assert (gradient() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("isolate", [True, False])
def test_generation_with_padding_and_cache(name, isolate):
    model = make_model()
    ids = make_rows()[0][:, :40]
    padding = torch.ones_like(ids)
    padding[0, :13] = 0
    options = {"attention_mask": padding, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, **options)
    use_attention(model, name, isolate=isolate)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("isolate", [True, False])
def test_a_sliding_window_is_respected(name, isolate):
    model = make_model("mistral", sliding_window=16, **CONFIGS["llama"])
    ids, positions = make_rows()
    given = positions if isolate else None
    model.set_attn_implementation("eager")
    expected = logits_packed(model, ids, given)
    use_attention(model, name, isolate=isolate)
    assert (logits_packed(model, ids, given) - expected).abs().max() < 1e-5
    model.config.sliding_window = None
    assert (logits_packed(model, ids, given) - expected).abs().max() > 0.01


def test_dropout_is_applied_in_training_only():
    model = make_model(attention_dropout=0.5)
    ids, _ = make_rows()
    use_attention(model, "compiled", isolate=False)
    quiet = logits_packed(model, ids)
    assert torch.equal(logits_packed(model, ids), quiet)
    model.train()
    torch.manual_seed(0)
    noisy = logits_packed(model, ids)
    assert (noisy - quiet).abs().max() > 0.1
    torch.manual_seed(0)
    assert torch.equal(logits_packed(model, ids), noisy)


def test_the_choice_is_not_written_into_the_model(tmp_path):
    model = make_model()
    use_attention(model, "compiled", isolate=True)
    model.save_pretrained(tmp_path)
    assert "compiled" not in (tmp_path / "config.json").read_text()


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match="llama cannot use the attention kernel 'flash'"):
        use_attention(make_model(), "flash", isolate=False)


@pytest.mark.parametrize("isolate", [True, False])
def test_the_probe_takes_the_fastest(isolate):
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "seq_len": 128, "head_dim": 16}
    name, why, seconds = choose_attention(
        device="cpu", dtype=torch.float32, compiled=False, isolate=isolate, **shape
    )
    assert name == min(seconds, key=seconds.get)
    assert all(s > 0 for s in seconds.values())
    assert "2 x 128" in why


def test_the_probe_respects_memory_and_the_device():
    shape = {"batch": 8, "heads": 16, "kv_heads": 16, "head_dim": 64, "dtype": torch.float32}
    name, why, seconds = choose_attention(device="cpu", compiled=True, isolate=False, seq_len=8192, **shape)
    assert (name, seconds) == ("sdpa", {})
    assert "MiB a layer" in why
    assert choose_attention(device="cuda", compiled=True, isolate=False, seq_len=512, **shape)[0] == "sdpa"


def test_in_half_precision_lengths_are_rounded_up_and_nothing_else_changes(monkeypatch):
    """oneDNN keeps kernels for every length; what is read beyond a document is seen by none of it."""
    seen = []

    def watched(module, query, key, value, *more, **options):
        seen.append(query.shape[2])
        return sdpa_attention_forward(module, query, key, value, *more, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    module = torch.nn.Module()
    module.is_causal, module.training = True, False
    torch.manual_seed(2)
    _, positions = make_rows()
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        states = [torch.randn(2, 4, LENGTH, 8).to(dtype).requires_grad_() for _ in range(3)]
        mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)  # says only that rows are packed
        found, _ = document_sdpa_attention(module, *states, mask, position_ids=positions)
        (found.float() * torch.arange(LENGTH)[:, None, None] / LENGTH).sum().backward()
        grads[dtype] = [found, *(state.grad for state in states)]
    assert seen == [70, 180, 50, LENGTH, 96, 192, 50, LENGTH]  # the last of a row ends with it
    for exact, half in zip(*grads.values(), strict=True):
        assert (exact - half.float()).abs().max() < 0.05 * exact.abs().max()
