"""torchrun and `accelerate launch`, really run: their two processes end with the bits of the two that llmkit starts.

`accelerate launch` starts its processes by torch's agent too; without GPUs one alone, unless it is told `--multi_gpu`.
"""

import pytest
from layouts import plan_of
from test_nodes import SMALL, free_port, on_one, run_of
from training import command, losses, same_bits, start, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
ACCELERATE += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    on_one(command(folder, "whole", **SMALL))
    return run_of(folder, "whole")


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_another_launchers_two_processes_are_ours(tmp_path, whole, launcher):
    python, *words = command(tmp_path, "theirs", **SMALL)
    started = start([python, "-m", *launcher, str(free_port()), *words])
    said = "\n".join(started.communicate(timeout=900))
    assert started.returncode == 0, said
    run = run_of(tmp_path, "theirs")
    assert plan_of(run)["world_size"] == 2
    assert losses(run) == losses(whole)
    assert same_bits(weights(run), weights(whole))
