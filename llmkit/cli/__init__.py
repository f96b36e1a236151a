"""The command line: parse, call, print; nothing heavy is imported before a command needs it.

`main` is the one place where an error becomes a message and an exit code.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llmkit.cli.app import app
from llmkit.cli.failures import complain
from llmkit.cli.output import close_quietly
from llmkit.errors import CtrlCError, ExitCode, InterruptedRunError
from llmkit.launch.signals import NOTED, STOP_SIGNALS

_GOES_ON = "The same command goes on from there."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after `llmkit`; by default those of this process.
    """
    _set_torch_up()
    NOTED.clear()
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = words[: words.index("--")] if "--" in words else words
    try:
        code = app(words, prog_name="llmkit", standalone_mode=False)
        sys.stdout.flush()
        if code == ExitCode.CTRL_C:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else ExitCode.DONE
    except BrokenPipeError:  # the reader of a pipe has enough: `llmkit recipe schema | head`
        close_quietly(sys.stdout)
        return ExitCode.DONE
    except KeyboardInterrupt:
        stopped = CtrlCError("stopped by Ctrl-C; what was complete is kept", hint=_GOES_ON)
        return complain(stopped, as_json="--json" in flags)
    except Exception as error:
        if "--debug" in flags:
            traceback.print_exc()
        return complain(error, as_json="--json" in flags)


def _stop(number: int, frame: object) -> NoReturn:
    """What a request to stop does while nothing better is set up: training saves first, the rest only leaves."""
    NOTED.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise InterruptedRunError(
        f"stopped by {signal.Signals(number).name}; what was complete is kept",
        hint=_GOES_ON,
    )


def _set_torch_up() -> None:
    """Defaults that torch reads when it starts, for this process and its workers; what is set already stays."""
    # Waiting threads spin briefly and then give the processor away. With OpenMP's default, two threads were
    # measured four times slower when one core was busy with something else; on a quiet machine both are equal.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Compiled code is kept with the user's other caches; torch's own default is a temporary folder.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "llmkit" / "inductor"))
