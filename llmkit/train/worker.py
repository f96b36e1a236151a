"""A worker process that `llmkit` started: `python -m llmkit.train.worker JOB.json`."""

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from llmkit.errors import LlmkitError, LostWorkerError, RunError, refused_by_system
from llmkit.launch.crew import LOST_PEER
from llmkit.launch.follower import DEADLINE
from llmkit.report.console import make_reporter
from llmkit.train.job import Job
from llmkit.train.pretrain import pretrain


def main(path: str) -> int:
    """Do one process's part of the job; return its exit code. Only rank 0 shows progress.

    Every error is told here and becomes an exit code: one that went through the interpreter's shutdown would end the
    process so late that its peers, who fail on the lost connection, would be blamed.
    """
    job = Job.load(Path(path))
    if DEADLINE in os.environ:  # the clocks of two machines count from different moments
        job = replace(job, deadline=float(os.environ[DEADLINE]))
    first = os.environ.get("RANK", "0") == "0"
    reporter = make_reporter(json=job.face["json"], quiet=job.face["quiet"] or not first)
    try:
        pretrain(job, reporter)
    except Exception as error:  # none is swallowed: each ends this process, with words
        known = _foreseen(error)
        reporter.error(known)
        return LOST_PEER if isinstance(known, LostWorkerError) else int(known.exit_code)
    finally:
        reporter.close()
    return 0


def _foreseen(error: Exception) -> LlmkitError:
    """`error` itself when it is ours, else its words; of a bug also where it happened."""
    if isinstance(error, LlmkitError):
        return error
    if (
        isinstance(error, OSError) and error.strerror
    ):  # without its words it is a library's own, which is a bug
        return refused_by_system(error, hint="Once that is mended, the newest checkpoint resumes.")
    text = "".join(traceback.format_exception(error)).rstrip()
    return RunError(
        f"{type(error).__name__}: {error}", hint=f"This is a bug in llmkit. It happened here:\n{text}"
    )


if __name__ == "__main__":
    # No interpreter shutdown for a failed rank: it could wait for peers in a collective for ever.
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(0)
