"""What processes on TPU chips find in their environment: its numbers, and torch_tpu's own where that is installed."""

import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version

import pytest

from llmkit.errors import UsageError
from llmkit.hardware.tpu import _KINDS
from llmkit.launch.tpu import _MESHES, ADDRESSES, SESSION, TOPOLOGY, launch_environment, mesh_of, parse_mesh


def sides(topology):
    x, y, z = parse_mesh(topology)
    return x * y * z


def test_a_mesh_has_as_many_chips_as_processes():
    for kind, meshes in _MESHES.items():
        for count in meshes:
            assert sides(mesh_of(f"TPU {kind}", count)) == count


@pytest.mark.parametrize(
    ("kind", "count", "fits"), [("v5e", 3, "1, 4, 8"), ("v4", 16, "1, 2, 4, 8"), ("v9", 4, "not known")]
)
def test_chips_that_cannot_be_parted_so_are_told(kind, count, fits):
    with pytest.raises(
        UsageError, match=f"{count} processes cannot share the chips of a machine with {kind}"
    ) as told:
        mesh_of(kind, count)
    assert fits in told.value.hint


@pytest.mark.parametrize(
    ("topology", "wanted"),
    [("2,2,1", (2, 2, 1)), ("4x4", (4, 4, 1)), ("2,2,1,2", (2, 2, 1)), ("8X", (8, 1, 1))],
)
def test_a_mesh_is_read(topology, wanted):
    assert parse_mesh(topology) == wanted


@pytest.mark.parametrize("topology", ["", "x", "2,two", "0x4", "-1x2", "²"])
def test_what_is_no_mesh_is_told(topology):
    with pytest.raises(UsageError, match="no sides of a mesh"):
        parse_mesh(topology)


def test_the_environment_of_one_machine():
    told = launch_environment("v5e", 4, {})
    assert set(told) == {ADDRESSES, TOPOLOGY, SESSION}
    assert told[TOPOLOGY] == "2,2,1"
    hosts, ports = zip(*(one.split(":") for one in told[ADDRESSES].split(",")), strict=True)
    assert set(hosts) == {"localhost"}
    assert len(set(ports)) == 4
    assert int(told[SESSION]) > 0


def test_what_is_said_already_stays():
    said = {TOPOLOGY: "1x2", ADDRESSES: "a:1,b:2", SESSION: "7"}
    assert launch_environment("v5e", 2, said) == said


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({TOPOLOGY: "2x4"}, "is 2x4, a mesh of 8 chips, and there are 4 processes"),
        ({ADDRESSES: "a:1"}, "has 1 addresses, and there are 4 processes"),
        ({TOPOLOGY: "big"}, "no sides of a mesh"),
    ],
)
def test_what_is_said_and_does_not_fit_is_told(said, match):
    with pytest.raises(UsageError, match=match):
        launch_environment("v5e", 4, said)


def installed():
    try:
        return bool(version("torch_tpu") and version("libtpu"))
    except PackageNotFoundError:
        return False


THEIRS = textwrap.dedent("""
    import json, os
    import torch_tpu
    from torch.tpu import distributed
    from torch_tpu._internal.utils import hardware

    tables = hardware._TOPOLOGY_BY_TPU_PCI_DEVICE_ID
    hardware._scan_pci_tpus = lambda: (8, tables["0x0063"])
    before = dict(os.environ)
    distributed.set_tpu_launch_env(nproc_per_node=4)
    told = {name: text for name, text in os.environ.items() if before.get(name) != text}
    print(json.dumps([told, {device: dict(meshes) for device, meshes in tables.items()}]))
""")


@pytest.mark.skipif(not installed(), reason='torch_tpu is not installed: pip install "llmkit[tpu]"')
def test_torch_tpu_says_the_same():
    env = {name: text for name, text in os.environ.items() if name not in (ADDRESSES, TOPOLOGY, SESSION)}
    done = subprocess.run(
        [sys.executable, "-c", THEIRS],
        env={**env, "TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    told, tables = json.loads(done.stdout.splitlines()[-1])
    ours = launch_environment("v5e", 4, {})
    assert set(told) == set(ours)
    assert told[TOPOLOGY] == ours[TOPOLOGY]
    assert [one.split(":")[0] for one in told[ADDRESSES].split(",")] == ["localhost"] * 4
    for device, kind in _KINDS.items():
        if kind in _MESHES:
            theirs = {int(count): mesh for count, mesh in tables[device].items()}
            assert theirs.items() >= _MESHES[kind].items(), kind
