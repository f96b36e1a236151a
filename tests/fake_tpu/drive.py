"""Train the tiny recipe on the stand-in for a TPU, in a process of its own: `drive.py FOLDER NAME CHANGES SEEN`.

CHANGES are those of `training.recipe`, as JSON; what the stand-in has seen of each step is written to SEEN.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import training

import llmkit.hardware.detect
import llmkit.run.training
from llmkit.errors import LlmkitError
from llmkit.hardware.tpu import Chips
from llmkit.train import loop, watching

CHIPS = Chips("v5e", 1)
llmkit.hardware.detect.query_tpus = llmkit.run.training.query_tpus = lambda *_: CHIPS
watching.measure_peak_flops = lambda *_: 1e12  # its matrices would keep a processor busy for a minute
_advance = loop.advance


def advance(run, state, clock):
    import torch

    assert {p.device.type for p in run.core.parameters()} == {"tpu"}
    torch.tpu.seen.step()  # what was there before the step
    before = len(torch.tpu.seen.steps)
    state = _advance(run, state, clock)
    torch.tpu.seen.step()
    STEPS.append(torch.tpu.seen.steps[before])
    return state


STEPS: list[dict] = []
loop.advance = advance


def main(folder: str, name: str, changes: str, seen: str) -> int:
    wanted = {"machine__device": "tpu", **json.loads(changes)}
    try:
        training.pretrain(Path(folder), name, **wanted)
    except LlmkitError as error:
        print(f"{type(error).__name__}: {error}\n{error.hint}", file=sys.stderr)  # noqa: T201 - for the test
        return int(error.exit_code)
    finally:
        Path(seen).write_text(json.dumps(STEPS))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
