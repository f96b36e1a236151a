"""The proofs before training find what they are for, in architectures that have it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmkit.errors import UsageError
from llmkit.models.attention import use_attention
from llmkit.train.prove import prove_head, prove_isolation

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def model_of(model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL, **fields)
    return AutoModelForCausalLM.from_config(config)


def test_plain_heads_pass_and_the_mode_is_as_before():
    model = model_of("llama", intermediate_size=64).train()
    prove_head(model)
    assert model.training


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("granite", {"intermediate_size": 64, "logits_scaling": 8.0}),
        (
            "gemma2",
            {
                "intermediate_size": 64,
                "final_logit_softcapping": 0.1,
                "head_dim": 16,
                "num_key_value_heads": 2,
            },
        ),
    ],
)
def test_logits_changed_after_the_head_are_refused(model_type, fields):
    with pytest.raises(UsageError, match=f"{model_type} changes its logits"):
        prove_head(model_of(model_type, **fields))


@pytest.mark.parametrize("attention", ["sdpa", "compiled", "eager"])
def test_isolation_holds_where_positions_decide_it_and_not_without(attention):
    model = model_of("llama", intermediate_size=64)
    use_attention(model, attention, isolate=True)
    prove_isolation(model)
    if attention != "eager":
        use_attention(model, attention, isolate=False)
        with pytest.raises(UsageError, match="does not keep documents"):
            prove_isolation(model)


def test_an_architecture_without_restarting_positions_is_refused():
    model = model_of("opt", ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    use_attention(model, "sdpa", isolate=True)
    with pytest.raises(UsageError, match="opt does not keep documents"):
        prove_isolation(model)
