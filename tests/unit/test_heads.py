"""Scores made in chunks equal the model's own logits, and where they would not, its own are taken."""

import pytest
import torch
from adapting import scrambled
from torch.nn import functional
from transformers import AutoConfig

from llmkit.models.adapters import inject_adapter
from llmkit.models.build import AUTO_CLASSES
from llmkit.models.heads import causal_scores, choose_heads, masked_scores, seq2seq_scores
from llmkit.recipe.parts import Adapter

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
BART = {
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 50}
MODELS = [
    ("causal", "llama", SMALL, True),
    ("causal", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}, True),
    ("causal", "granite", {**SMALL, "logits_scaling": 8.0}, False),
    ("causal", "mamba", {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, True),
    ("masked", "bert", SMALL, True),
    ("pairs", "bert", SMALL, True),
    ("masked", "roberta", SMALL, True),
    ("masked", "modernbert", {**SMALL, "cls_token_id": 1, "sep_token_id": 2}, True),
    ("masked", "electra", {**SMALL, "embedding_size": 16}, True),
    ("masked", "distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}, False),
    ("seq2seq", "t5", {**T5, "decoder_start_token_id": 0}, True),
    ("seq2seq", "t5", {**T5, "decoder_start_token_id": 0, "tie_word_embeddings": False}, True),
    ("seq2seq", "bart", {**BART, "decoder_start_token_id": 2}, True),
]


def made(kind, model_type, fields):
    torch.manual_seed(0)
    model = AUTO_CLASSES[kind].from_config(AutoConfig.for_model(model_type, **IDS, **fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # zero biases would hide that one is left out
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model.train()


@pytest.mark.parametrize(("kind", "model_type", "fields", "in_chunks"), MODELS)
def test_scores_give_the_loss_of_transformers(kind, model_type, fields, in_chunks):
    model = made(kind, model_type, fields)
    assert choose_heads(model, kind) is in_chunks
    assert model.training
    model.eval()
    ids = torch.randint(3, 50, (2, 12))
    targets = torch.randint(3, 50, (2, 12))
    targets[0, 5:9] = -100
    if kind == "seq2seq":
        scores = seq2seq_scores(model, ids, targets)
        own = model(input_ids=ids, labels=targets).loss * 20
    elif kind == "causal":
        scores = causal_scores(model, ids)
        logits = model(input_ids=ids).logits
        own = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    else:
        scores, _ = masked_scores(model, input_ids=ids)
        output = model(input_ids=ids)
        logits = output.logits if "logits" in output else output.prediction_logits
        own = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert float(scores.nll(targets.flatten())) == pytest.approx(float(own), rel=1e-5)
    likeliest = scores.logits().argmax(1)
    learned = targets.flatten() != -100
    assert int(scores.num_correct(targets.flatten())) == int((likeliest == targets.flatten())[learned].sum())


@pytest.mark.parametrize(("kind", "family", "layer"), [("causal", "llama", "q_proj"), ("seq2seq", "t5", "q")])
@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_with_an_adapter_gives_the_loss_of_transformers_and_learns(kind, family, layer, tied):
    fields = T5 | {"decoder_start_token_id": 0} if family == "t5" else SMALL
    model = made(kind, family, {**fields, "tie_word_embeddings": tied})
    inject_adapter(model, Adapter(method="lora", rank=2, targets=f"lm_head|{layer}"), seed=1)
    scrambled(model)
    assert not choose_heads(model, kind)
    model.eval()
    ids, targets = torch.randint(3, 50, (2, 2, 12))
    if kind == "seq2seq":
        scores, own = seq2seq_scores(model, ids, targets), model(input_ids=ids, labels=targets).loss * 24
    else:
        scores, logits = causal_scores(model, ids), model(input_ids=ids).logits
        own = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = scores.nll(targets.flatten())
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert any("lm_head" in name for name in grads)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_a_cap_that_small_logits_do_not_touch_is_noticed_on_a_new_model():
    model = made(
        "causal",
        "gemma2",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 30.0},
    )
    model.eval()
    logits = model(input_ids=torch.arange(10)[None]).logits
    assert logits.abs().max() < 3, "so the cap of 30 changes next to nothing yet"
    assert not choose_heads(model, "causal")
