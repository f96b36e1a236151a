"""Two nodes, an agent and a process each: the same numbers as two processes of one machine, and saved when asked to."""

import signal
import socket
import subprocess
import time

import pytest
from training import command, losses, same_bits, start, weights

from llmkit.durable import verify_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_two(folder, name, *words, **changes):
    """Both agents' processes."""
    place = ["--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", "--processes", "2", *words]
    return [start(command(folder, name, *place, "--node-rank", str(rank), **changes)) for rank in (0, 1)]


def ends(agents, limit_s=900):
    said = [agent.communicate(timeout=limit_s)[1] for agent in agents]
    return [agent.returncode for agent in agents], "\n".join(said)


def run_of(folder, name):
    return folder / "runs" / name / "pretrain"


SMALL = {"machine__micro_batch": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two processes of one machine, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        command(folder, "tiny", "--processes", "2", **SMALL), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return run_of(folder, "tiny")


def test_two_nodes_are_two_processes(tmp_path, whole):
    codes, said = ends(on_two(tmp_path, "tiny", **SMALL))
    assert codes == [0, 0], said
    run = run_of(tmp_path, "tiny")
    assert losses(run) == losses(whole)
    assert same_bits(weights(run), weights(whole))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_node_saves_and_the_same_commands_go_on_to_the_same_bits(tmp_path, whole, rank):
    agents = on_two(tmp_path, "tiny", **SMALL)
    run = run_of(tmp_path, "tiny")
    end = time.monotonic() + 900
    while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < 3:
        assert time.monotonic() < end
        time.sleep(0.05)
    agents[rank].send_signal(signal.SIGTERM)
    codes, said = ends(agents)
    assert codes == [75, 75], said
    newest = max((run / "checkpoints").glob("step_*"))
    verify_folder(newest)
    codes, said = ends(on_two(tmp_path, "tiny", **SMALL))
    assert codes == [0, 0], said
    assert same_bits(weights(run), weights(whole))


def test_a_node_with_another_recipe_ends_both(tmp_path):
    place = ["--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", "--processes", "2"]
    agents = [
        start(command(tmp_path, f"tiny{rank}", *place, "--node-rank", str(rank), seed=rank + 1))
        for rank in (0, 1)
    ]
    codes, said = ends(agents)
    assert codes == [1, 1], said
    assert "another recipe" in said
    assert "seed 2 there, 1 on node 0" in said
