"""Hardware by name, for a plan of machines that are not this one: `8xH100`, `2x8xH100`, `v5e-8`, `cpu:16`."""

import re
from collections.abc import Iterable

from llmkit.errors import UsageError
from llmkit.hardware.kinds import Hardware
from llmkit.hardware.table import ACCELERATORS, GB, TPUS, Accelerator, TpuKind
from llmkit.registry import nearest

CORES_PER_DEVICE = 8
"""Processor cores that a rented GPU or TPU chip usually comes with."""

CPU_MEMORY_PER_CORE = 4 * GB
"""Memory that a rented processor core usually comes with."""

MOST_IN_ONE = 8
"""GPUs that a machine usually has at most: `64xH100` is 8 machines."""

MOST = 100_000
"""Devices and machines that a name may ask for at most: more is a slip of the finger."""

EXAMPLES = "8xH100, 2x8xH100 (machines x GPUs), A100-40GB, v5e-8, cpu:16, cpu:16:64GB"

_PARTS = re.compile(
    r"(?:(?P<nodes>[0-9]+)x)?(?:(?P<count>[0-9]+)x)?(?P<name>[A-Za-z0-9][A-Za-z0-9 _.:-]*)", re.ASCII
)
_CPU = re.compile(r"cpu(?::(?P<cores>[0-9]+)(?::(?P<memory>[0-9]+)GB)?)?", re.ASCII | re.IGNORECASE)
_TPU = re.compile(
    r"(?:tpu[- ]?)?(?P<kind>v[0-9][a-z]*)(?:litepod)?-(?P<size>[0-9]+)", re.ASCII | re.IGNORECASE
)


def split_names(words: Iterable[str]) -> list[str]:
    """`--on A,B --on C` -> A, B, C, each once."""
    return list(dict.fromkeys(name.strip() for word in words for name in word.split(",") if name.strip()))


def named_hardware(text: str) -> Hardware:
    """The hardware of a name.

    Args:
        text: `[[MACHINES x] DEVICES x] NAME`; of a TPU an accelerator type, whose number counts as Google's does (chips
            of v5e and v6e, TensorCores of v4 and v5p); of processors `cpu`, `cpu:CORES` or `cpu:CORES:MEMORY`.

    Raises:
        UsageError: There is no such thing; the message has the nearest name.
    """
    parts = _PARTS.fullmatch(text.strip())
    if parts is None:
        raise UsageError(
            f"--on {text!r} is not of the form NAME, 8xNAME or 2x8xNAME", hint=f"for example {EXAMPLES}"
        )
    # One number counts devices, two count machines and their devices.
    nodes, count = parts["nodes"], parts["count"]
    if count is None:
        nodes, count = None, nodes
    numbers = [_number(text, word) for word in (nodes or "1", count or "1")]
    machines = numbers[0] if nodes is not None else None
    name = parts["name"]
    if name.lower().startswith("cpu"):
        return _processor(text, name, machines=numbers[0] * numbers[1])
    tpu = _TPU.fullmatch(name)
    if tpu is not None:
        return _slice(text, tpu["kind"].lower(), _number(text, tpu["size"]), slices=numbers[0] * numbers[1])
    return _gpus(text.strip(), name, nodes=machines, count=numbers[1])


def _number(text: str, word: str) -> int:
    number = int(word) if len(word) <= len(str(MOST)) else MOST + 1
    if not 1 <= number <= MOST:
        raise UsageError(
            f"--on {text!r}: {word} is not a number from 1 to {MOST:,}", hint=f"for example {EXAMPLES}"
        )
    return number


def _gpus(text: str, name: str, *, nodes: int | None, count: int) -> Hardware:
    row = _BY_NAME.get(_plain(name))
    if row is None:
        raise _unknown(text, name)
    notes: tuple[str, ...] = ()
    if nodes is None:
        nodes, count = _machines(text, name, count)
        if nodes > 1:
            notes = (f"{text} is taken as {nodes} machines with {count} each; 1x{text} is one machine",)
    return Hardware(
        device="cuda",
        num_devices=count,
        device_name=f"NVIDIA {row.names[0].replace('-', ' ')}",
        memory_bytes=row.memory_bytes,
        cores=CORES_PER_DEVICE * count,
        bf16=row.bf16_flops is not None,
        peak_flops=row.bf16_flops or row.fp32_flops,
        fp8=row.fp8_flops is not None,
        nodes=nodes,
        memory_bandwidth=row.memory_bandwidth,
        link=row.link,
        network=row.network,
        price=row.price,
        notes=notes,
    )


def _machines(text: str, name: str, count: int) -> tuple[int, int]:
    """Machines and GPUs of each, where only the number of GPUs is said."""
    if count <= MOST_IN_ONE:
        return 1, count
    if count % MOST_IN_ONE:
        each = next(number for number in range(MOST_IN_ONE, 0, -1) if count % number == 0)
        machines = f" or {count // each}x{each}x{name}" if each > 1 else ""
        raise UsageError(
            f"--on {text!r}: machines usually have at most {MOST_IN_ONE} GPUs, and {count} are no multiple of that",
            hint=f"say how many machines there are: --on 1x{count}x{name}{machines}",
        )
    return count // MOST_IN_ONE, MOST_IN_ONE


def _slice(text: str, name: str, size: int, *, slices: int) -> Hardware:
    """A TPU slice; several are joined by the data centre's network, which is not told here."""
    kind = next((each for each in TPUS if each.name == name), None)
    if kind is None:
        raise _unknown(text, name)
    if slices > 1:
        raise UsageError(
            f"--on {text!r}: several slices are not planned",
            hint=f"one larger slice: {_larger(kind, size * slices)}",
        )
    hosts, chips = _hosts(text, kind, size)
    return Hardware(
        device="tpu",
        num_devices=chips,
        device_name=f"TPU {kind.name}",
        memory_bytes=kind.chip.memory_bytes,
        cores=CORES_PER_DEVICE * chips,
        bf16=True,
        peak_flops=kind.chip.bf16_flops,
        nodes=hosts,
        memory_bandwidth=kind.chip.memory_bandwidth,
        link=kind.chip.link,
        network=kind.chip.link * chips,
        price=kind.chip.price,
    )


def _hosts(text: str, kind: TpuKind, size: int) -> tuple[int, int]:
    """Machines of a slice, and chips of each."""
    chips, rest = divmod(size, kind.cores_per_chip)
    if rest or chips not in kind.slices:
        raise UsageError(
            f"--on {text!r}: there is no {kind.name} slice of {size}", hint=f"--on {_larger(kind, size)}"
        )
    if chips <= kind.most_on_one_host:
        return 1, chips
    return chips // kind.chips_per_host, kind.chips_per_host


def _larger(kind: TpuKind, size: int) -> str:
    """The smallest slice with so many chips or cores, or the largest there is."""
    sizes = [chips * kind.cores_per_chip for chips in kind.slices]
    return f"{kind.name}-{next((each for each in sizes if each >= size), sizes[-1])}"


def _processor(text: str, name: str, *, machines: int) -> Hardware:
    found = _CPU.fullmatch(name)
    if found is None or machines > 1:
        raise UsageError(
            f"--on {text!r}: one processor is cpu, cpu:CORES or cpu:CORES:MEMORY",
            hint="--on cpu:16 or --on cpu:16:64GB",
        )
    if found["cores"] is None:
        from llmkit.hardware.detect import detect_cpu

        return detect_cpu()
    cores = _number(text, found["cores"])
    memory = _number(text, found["memory"]) * GB if found["memory"] else cores * CPU_MEMORY_PER_CORE
    return Hardware(
        device="cpu",
        num_devices=1,
        device_name=f"a processor with {cores} cores",
        memory_bytes=memory,
        cores=cores,
        bf16=True,
        peak_flops=None,
        nodes=1,
        notes=("a server processor that multiplies bf16 in hardware is assumed",),
    )


def _plain(name: str) -> str:
    """How names are compared: without case, spaces, dashes and the maker."""
    return re.sub(r"^(nvidia|geforce)", "", re.sub(r"[ _-]", "", name.lower()))


_BY_NAME: dict[str, Accelerator] = {_plain(name): row for row in ACCELERATORS for name in row.names}


def known_names() -> list[str]:
    """What `--on` knows by name."""
    gpus = [row.names[0] for row in ACCELERATORS if row.names]
    return [*gpus, *(f"{kind.name}-8" for kind in TPUS), "cpu"]


def _unknown(text: str, name: str) -> UsageError:
    turned = re.fullmatch(r"(.+?)[x:*](\d+)", name)
    if turned and _plain(turned[1]) in _BY_NAME:  # others write the number behind the name
        return UsageError(
            f"--on {text!r}: the number stands before the name", hint=f"--on {turned[2]}x{turned[1]}"
        )
    guess = nearest(name, [*known_names(), *(each for row in ACCELERATORS for each in row.names)])
    hint = f"did you mean {guess}? " if guess else ""
    return UsageError(
        f"--on {text!r}: no accelerator {name!r} is known", hint=f"{hint}known: {', '.join(known_names())}"
    )
