"""Tiny models of several architectures for tests of adapters and freezing; nothing is fetched."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def llama(layers=2, tied=False, **changes):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **sizes, vocab_size=40, num_hidden_layers=layers, tie_word_embeddings=tied, pad_token_id=0, **changes
    )
    return LlamaForCausalLM(config).eval()


def bert(layers=2, **changes):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_labels": 3}
    config = BertConfig(
        **sizes, vocab_size=40, num_hidden_layers=layers, max_position_embeddings=16, **changes
    )
    return BertForSequenceClassification(config).eval()


def t5(layers=2):
    torch.manual_seed(3)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    config = T5Config(
        **sizes, vocab_size=40, num_layers=layers, num_decoder_layers=layers + 1, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def gpt2():
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()


MODELS = {"llama": llama, "bert": bert, "t5": t5, "gpt2": gpt2}


def ids(rows=3, width=7):
    return torch.randint(1, 40, (rows, width), generator=torch.Generator().manual_seed(5))


def logits(model):
    """What the model says of the same rows, in evaluation mode."""
    model.eval()
    more = {"decoder_input_ids": ids(width=4)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids(), **more).logits


def scrambled(model, *, only="lora_"):
    """The same model with other values in what learns by that name: an adapter that was trained."""
    chance = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name and p.requires_grad:
                p.add_(torch.randn(p.shape, generator=chance) * 0.3)
    return model
