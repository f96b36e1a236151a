"""torchrun, really run: its two processes end with the bits of the two that llmkit starts itself.

`accelerate launch` starts its processes by torch's agent too; without GPUs it starts one alone, whatever it is told.
"""

import pytest
from layouts import plan_of
from test_nodes import SMALL, free_port, on_one, run_of
from training import command, losses, same_bits, start, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def test_torchruns_two_processes_are_ours(tmp_path):
    on_one(command(tmp_path, "whole", **SMALL))
    python, *words = command(tmp_path, "theirs", **SMALL)
    started = start([python, "-m", *TORCHRUN, str(free_port()), *words])
    said = "\n".join(started.communicate(timeout=900))
    assert started.returncode == 0, said
    run, whole = run_of(tmp_path, "theirs"), run_of(tmp_path, "whole")
    assert plan_of(run)["world_size"] == 2
    assert losses(run) == losses(whole)
    assert same_bits(weights(run), weights(whole))
