"""Two nodes as two agents on this machine, with workers (without torch) that end in every way; and who is an agent."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_launch import ROOT, WORKER, runs, seen, wait_for

from llmkit.errors import RunError, UsageError
from llmkit.launch.network import Place, is_loopback, listen, parse_place
from llmkit.launch.node import Node, become_agent, find_node, parse_nodes
from llmkit.launch.wire import waits_of
from llmkit.launch.workplace import Card, meeting_env
from llmkit.launch.world import detect_world, first_host

AGENT = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from llmkit.errors import LlmkitError
    from llmkit.launch.crew import Limits
    from llmkit.launch.follower import follow
    from llmkit.launch.hub import Hub, Work
    from llmkit.launch.network import parse_place
    from llmkit.launch.node import Node, become_agent
    from llmkit.launch.wire import Waits
    from llmkit.launch.workplace import Card

    rank, folder, place, plan, worker, options = int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:8]
    options = {"least": 2, "restarts": 0, "meet_s": 30, "settings": {}, **json.loads(options)}
    program = [sys.executable, "-c", worker]
    node = Node(rank, options["least"], 2, parse_place(place, "--rendezvous"), "a test")
    card = Card("pretrain", options["settings"], {"torch": "2"}, "cpu", 1)
    waits = Waits(meet_s=options["meet_s"], last_call_s=0.3, say_s=0.3, silent_s=20, beat_s=0.2, see_s=5)
    limits = Limits(grace_s=0.5, lost_s=2.0)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    become_agent(node)
    try:
        if rank:
            comes_back = options["restarts"] > 0
            end = follow(node, card, program=program, tell=say, waits=waits, limits=limits, comes_back=comes_back)
            say(end.said)
            sys.exit(end.code)
        with Hub(node, card, folder, per_node=1, tell=say, waits=waits) as hub:
            argv = lambda count: [str(folder), plan]
            ending = hub.run(Work(argv, program, folder / "logs", options["restarts"]), limits=limits)
            if ending.code:
                error = RuntimeError(ending.reason)
                error.exit_code, error.message = ending.code, ending.reason
                raise error
    except RuntimeError as error:
        sys.exit(error.exit_code)
    except LlmkitError as error:
        say(error.message)
        sys.exit(int(error.exit_code))
    """
)


@pytest.fixture(autouse=True)
def _test_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_TEST_ROOT", ROOT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Nodes:
    """Two agents, to be ended."""

    def __init__(self, folder: Path, plan: dict[str, object], **options: object) -> None:
        self.folder, self.plan, self.options = folder, plan, options
        self.port = free_port()
        self.agents: dict[int, subprocess.Popen[str]] = {}

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents.values():
            agent.kill()
            agent.communicate()

    def start(self, rank: int, **options: object) -> None:
        words = [ROOT, str(rank), str(self.folder), f"127.0.0.1:{self.port}", json.dumps(self.plan), WORKER]
        options = {**self.options, **options}
        self.agents[rank] = subprocess.Popen(
            [sys.executable, "-c", AGENT, *words, json.dumps(options)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def both(self) -> "Nodes":
        self.start(0)
        self.start(1)
        return self

    def wait_until_up(self) -> None:
        wait_for(lambda: (self.folder / "up0").exists() and (self.folder / "up1").exists())

    def end(self, rank: int) -> tuple[int, str]:
        _, said = self.agents[rank].communicate(timeout=60)
        return self.agents[rank].returncode, said

    def ends(self) -> tuple[tuple[int, int], str, str]:
        (first, said), (second, said_there) = self.end(0), self.end(1)
        return (first, second), said, said_there


@pytest.mark.parametrize(
    ("plan", "code"),
    [({"*": 0}, 0), ({"0": 0, "1": 2}, 2), ({"0": "plain", "1": 7}, 7), ({"0": "plain", "1": "kill"}, 1)],
)
def test_the_exit_code_is_that_of_the_whole_run_on_every_node(
    tmp_path: Path, plan: dict[str, object], code: int
) -> None:
    with Nodes(tmp_path, plan).both() as nodes:
        codes, said, said_there = nodes.ends()
    assert codes == (code, code), said + said_there
    if code:
        assert "worker 1 (pid" in said
        assert "on node 1" in said


def test_workers_of_two_nodes_are_one_world(tmp_path: Path) -> None:
    with Nodes(tmp_path, {"*": 0}).both() as nodes:
        codes, said, said_there = nodes.ends()
    first, second = seen(tmp_path, 0), seen(tmp_path, 1)
    assert codes == (0, 0), said + said_there
    assert (first["RANK"], first["LOCAL_RANK"], first["WORLD_SIZE"]) == ("0", "0", "2")
    assert (second["RANK"], second["LOCAL_RANK"], second["LOCAL_WORLD_SIZE"]) == ("1", "0", "1")
    assert first["LLMKIT_RENDEZVOUS"] == second["LLMKIT_RENDEZVOUS"]
    assert first["LLMKIT_RENDEZVOUS"].startswith("tcp://127.0.0.1:")
    assert first["GLOO_SOCKET_IFNAME"] == second["NCCL_SOCKET_IFNAME"] == "lo"
    assert "LLMKIT_LISTENING" in first
    assert "LLMKIT_LISTENING" not in second


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_agent_lets_all_workers_save(
    tmp_path: Path, number: int, code: int, rank: int
) -> None:
    with Nodes(tmp_path, {"*": "stop"}).both() as nodes:
        nodes.wait_until_up()
        nodes.agents[rank].send_signal(number)
        codes, said, said_there = nodes.ends()
    assert codes == (code, code), said + said_there
    assert {(tmp_path / f"saved{n}").read_text() for n in (0, 1)} == {signal.Signals(number).name}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_agent_takes_its_worker_along_and_ends_the_other(tmp_path: Path, rank: int) -> None:
    with Nodes(tmp_path, {"*": "plain"}).both() as nodes:
        nodes.wait_until_up()
        nodes.agents[rank].kill()
        code, said = nodes.end(1 - rank)
    assert code == 1
    assert ("node 1 was lost" if rank else "the connection to node 0 was lost") in said
    wait_for(lambda: not any(runs(seen(tmp_path, n)["pid"]) for n in (0, 1)))


def test_both_nodes_start_again_after_a_crash(tmp_path: Path) -> None:
    plan = {"1@0": "kill", "0@0": "plain", "*": 0}
    with Nodes(tmp_path, plan, restarts=1).both() as nodes:
        codes, said, said_there = nodes.ends()
    assert codes == (0, 0), said + said_there
    assert "restart 1 of 1" in said
    assert {seen(tmp_path, n)["LLMKIT_RESTART"] for n in (0, 1)} == {"1"}


def test_what_is_left_goes_on_where_one_node_is_enough(tmp_path: Path) -> None:
    plan = {"0@0": "plain", "1": "plain", "*": 0}
    with Nodes(tmp_path, plan, restarts=1, least=1).both() as nodes:
        nodes.wait_until_up()
        nodes.agents[1].kill()
        code, said = nodes.end(0)
    assert code == 0, said
    assert "node 1 was lost" in said
    assert seen(tmp_path, 0)["WORLD_SIZE"] == "1"


def test_a_node_that_comes_back_takes_part_again(tmp_path: Path) -> None:
    with Nodes(tmp_path, {"*@0": 0, "0@0": "plain", "1@0": "plain", "*": 0}, restarts=1).both() as nodes:
        nodes.wait_until_up()
        nodes.agents[1].kill()
        nodes.agents[1].communicate()
        nodes.start(1)
        codes, said, said_there = nodes.ends()
    assert codes == (0, 0), said + said_there
    assert seen(tmp_path, 1)["WORLD_SIZE"] == "2"


def test_a_node_that_never_comes_is_named(tmp_path: Path) -> None:
    with Nodes(tmp_path, {"*": 0}, meet_s=1) as nodes:
        nodes.start(0)
        code, said = nodes.end(0)
    assert code == 1
    assert "1 of 2 nodes came in 1 s; missing: node 1" in said
    with Nodes(tmp_path, {"*": 0}, meet_s=1) as nodes:
        nodes.start(1)
        code, said = nodes.end(1)
    assert code == 1
    assert "node 0 was not met at 127.0.0.1" in said


def test_a_node_with_another_recipe_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    with Nodes(tmp_path, {"*": 0}) as nodes:
        nodes.start(0, settings={"seed": 1})
        nodes.start(1, settings={"seed": 2})
        codes, said, said_there = nodes.ends()
    assert codes == (1, 1)
    assert "another recipe: seed 2 there, 1 on node 0" in said
    assert "another recipe: seed 2 there, 1 on node 0" in said_there
    assert not (tmp_path / "up0").exists(), "nothing was started"


def test_strangers_are_sent_away(tmp_path: Path) -> None:
    with Nodes(tmp_path, {"*": 0}) as nodes:
        nodes.start(0)
        wait_for(lambda: can_connect(nodes.port))
        with socket.create_connection(("127.0.0.1", nodes.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            time.sleep(0.3)
        nodes.start(1)
        codes, said, said_there = nodes.ends()
    assert codes == (0, 0), said + said_there
    assert "was sent away" in said


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port} of 127.0.0.1 is taken by") as caught:
            listen(Place("127.0.0.1", port), ["127.0.0.1"])
    assert "--rendezvous" in caught.value.hint


def test_only_node_0s_own_addresses_will_do() -> None:
    with pytest.raises(RunError, match="is not this machine"):
        listen(Place("node0", 29400), ["203.0.113.7"])
    with pytest.raises(RunError, match="which no other node can reach"):
        listen(Place("myself", 29400), ["127.0.1.1"])
    assert is_loopback("127.0.1.1")
    assert not is_loopback("10.0.0.1")


def test_places() -> None:
    assert parse_place("node0:29400", "x") == Place("node0", 29400)
    assert str(parse_place("[fd00::7]:29400", "x")) == "[fd00::7]:29400"
    for text in ("node0", ":29400", "node0:", "fd00::7:29400", "node0:x"):
        with pytest.raises(UsageError, match="is not HOST:PORT"):
            parse_place(text, "--rendezvous")
    for text in ("node0:0", "node0:70000"):
        with pytest.raises(UsageError, match=f"'{text}': ports go from 1 to 65535"):
            parse_place(text, "--rendezvous")


def test_numbers_of_nodes() -> None:
    assert (parse_nodes("2"), parse_nodes("1:4")) == ((2, 2), (1, 4))
    for text in ("0", "2:1", "two", "-1", "1:2:3", ""):
        with pytest.raises(UsageError):
            parse_nodes(text)


def test_workers_without_a_route_of_ours_are_left_to_find_one() -> None:
    env = meeting_env(Place("10.9.8.7", 1234), "abc", ours="203.0.113.9")
    assert env == {
        "MASTER_ADDR": "10.9.8.7",
        "MASTER_PORT": "1234",
        "LLMKIT_RENDEZVOUS": "tcp://10.9.8.7:1234/abc",
    }


STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "no-such-host-of-ours[3-4]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3",
}
SHARED = {**STEP, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
JOBSET = {"JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "job-0.svc", "MASTER_PORT": "29400"}
PYTORCHJOB = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "w-0", "PET_MASTER_PORT": "23456"}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("env", "said", "agent"),
    [
        ({}, {}, None),
        ({}, {"nodes": 2, "rank": 1, "meeting": "a:9"}, (1, 2, "a:9")),
        (STEP, {"nodes": 2}, (1, 2, "10.0.0.3:19077")),
        (STEP, {"nodes": 2, "meeting": "10.0.0.9:9"}, (1, 2, "10.0.0.9:9")),
        (STEP, {}, None),  # one task a process
        (STEP, {"gpus": 8}, (1, 2, "10.0.0.3:19077")),
        (STEP, {"processes": 4}, (1, 2, "10.0.0.3:19077")),
        (STEP, {"processes": 2, "gpus": 8}, None),
        (SHARED, {"nodes": 2}, None),
        ({key: STEP[key] for key in STEP if "STEP" not in key}, {}, None),  # a batch script's own shell
        (JOBSET, {}, None),
        (JOBSET, {"nodes": 2}, (1, 2, "job-0.svc:29400")),
        (PYTORCHJOB, {}, (1, 2, "w-0:23456")),
        (MPIRUN, {}, None),
        (MPIRUN, {"nodes": 2, "meeting": "a:9"}, (1, 2, "a:9")),
        (TORCHRUN, {}, None),
        (TORCHRUN, {"nodes": 2}, None),  # accelerate launch sets the same
        ({"RANK": "1", "WORLD_SIZE": "2"}, {"nodes": 2, "meeting": "a:9"}, (1, 2, "a:9")),
    ],
)
def test_who_is_an_agent(env: dict[str, str], said: dict[str, object], agent: object) -> None:
    number = int(said.get("nodes", 1))
    node = find_node(
        (number, number),
        rank=said.get("rank"),
        meeting=said.get("meeting"),
        processes=said.get("processes"),
        num_devices=lambda: int(said.get("gpus", 1)),
        said="nodes" in said,
        env=env,
    )
    assert (node and (node.rank, node.most, str(node.meeting))) == agent


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"nodes": 2}, "missing: --node-rank and --rendezvous"),
        ({"nodes": 2, "rank": 0}, "missing: --rendezvous"),
        ({"nodes": 2, "rank": 2, "meeting": "a:9"}, "node rank 2 of 2 nodes"),
        ({"nodes": 1, "rank": 0}, "--node-rank is for several nodes"),
        ({"nodes": 2, "rank": 0, "meeting": "a"}, "is not HOST:PORT"),
    ],
)
def test_half_a_place_is_an_error(said: dict[str, object], says: str) -> None:
    nodes = (int(said["nodes"]),) * 2
    with pytest.raises(UsageError, match=says):
        find_node(nodes, rank=said.get("rank"), meeting=said.get("meeting"), env={})


def test_an_agent_is_no_worker_of_who_started_it() -> None:
    env = {**STEP, **TORCHRUN, **MPIRUN, "PATH": "/bin"}
    become_agent(Node(1, 2, 2, Place("a", 9), "srun"), env)
    assert detect_world(env) is None
    assert not {"RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(env)
    assert (env["LLMKIT_NODE"], env["PATH"]) == ("1/2", "/bin")


def test_first_hosts() -> None:
    assert [first_host(text) for text in ("rack[03-07,12]x,other", "a,b", "n1", "")] == [
        "rack03x",
        "a",
        "n1",
        "",
    ]


def test_cards_tell_in_what_they_differ() -> None:
    card = Card("pretrain", {"a": 1}, {"torch": "2.13"}, "cpu", 2)
    assert card.differs_from(card.to_dict()) == ""
    other = Card("pretrain", {"a": 1}, {"torch": "2.12"}, "cpu", 2).to_dict()
    assert card.differs_from(other) == "another version of torch '2.12' there, '2.13' on node 0"
    other = Card("pretrain", {"a": 1}, {"torch": "2.13"}, "cpu", 1).to_dict()
    assert card.differs_from(other) == "workers of a node are 1 there, 2 on node 0"


def test_waits_can_be_set() -> None:
    assert waits_of({}).meet_s == 600
    assert waits_of({"LLMKIT_NODES_WAIT": "5", "LLMKIT_NODES_SILENCE": "4"}).last_call_s == 5
    assert waits_of({"LLMKIT_NODES_SILENCE": "4"}).beat_s == pytest.approx(0.8)
    with pytest.raises(UsageError, match="LLMKIT_NODES_WAIT: 'soon' is not a number of seconds"):
        waits_of({"LLMKIT_NODES_WAIT": "soon"})
