"""Processes that trained together end, however the last collective's memory is let go of."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel

from llmkit.train.devices import leave

rank, folder, rounds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
for number in range(rounds):
    meeting = f"file://{folder}/meeting-{number}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    model(torch.ones(8, 64)).sum().backward()
    leave()
    del model  # takes the group's last owner along
"""


def test_leaving_never_waits_for_itself(tmp_path):
    """Without the last collective kept alive, two processes in a loop stood still within seconds."""
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path), "200"], cwd=Path(__file__).parents[2])
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.wait(timeout=150) == 0
    finally:
        for process in processes:
            process.kill()
