"""What a process holds between micro-batches: its own share of weights and gradients, in fp32, and no more."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from layouts import FSDP2, LLAMA
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import together

from llmkit.objectives.base import LossModule
from llmkit.train.parallel import distribute


class Squares:
    """An objective that needs no targets."""

    def loss(self, model, batch, criterion):
        return model(batch["targets"]).logits.float().square().mean()


def made(bf16):
    torch.manual_seed(1)
    fields = {key: value for key, value in LLAMA.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**fields, vocab_size=20, max_position_embeddings=16))
    return LossModule(model, Squares(), bf16=bf16)


def rows(number):
    return {"targets": (torch.arange(8)[None] * (number + 3)) % 20}


def _two_micro_batches(rank, bf16):
    """Held bytes of gradients after the first of two, and how far both are from those of one process."""
    core, plain = made(bf16), made(bf16)
    distribute(core, SimpleNamespace(layout=FSDP2, offload=False), torch.device("cpu"))
    gathered = {}
    block = core.model.model.layers[0]
    block.mlp.register_forward_pre_hook(lambda module, _: gathered.update(dtype=module.up_proj.weight.dtype))
    with core.no_sync():
        core(rows(rank)).backward()
    held = sum(p.grad.to_local().nbytes for p in core.parameters())
    whole = sum(4 * p.numel() for p in plain.parameters())
    core(rows(2 + rank)).backward()
    for number in range(4):
        (plain(rows(number)) / 2).backward()  # FSDP takes the mean of two processes
    apart = max(
        float((mine.grad.full_tensor() - theirs.grad).abs().max() / theirs.grad.abs().max())
        for mine, theirs in zip(core.parameters(), plain.parameters(), strict=True)
    )
    kinds = {p.dtype for p in core.parameters()} | {p.grad.dtype for p in core.parameters()}
    shares = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(shares, torch.tensor([float(held)]))
    return sum(map(float, shares)), whole, apart, gathered["dtype"], kinds


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_shared_out_after_every_micro_batch(tmp_path, bf16):
    work = functools.partial(_two_micro_batches, bf16=bf16)
    for held, whole, apart, gathered, kinds in together(tmp_path, 2, work):
        assert held == whole, "both processes together hold each gradient once"
        assert apart < (0.05 if bf16 else 1e-5)
        assert gathered == (torch.bfloat16 if bf16 else torch.float32)
        assert kinds == {torch.float32}
