"""A worker process that `llmkit` started: `python -m llmkit.train.worker JOB.json`."""

import os
import sys
from pathlib import Path

from llmkit.errors import LlmkitError, LostWorkerError
from llmkit.launch.crew import LOST_PEER
from llmkit.report.console import make_reporter
from llmkit.train.job import Job
from llmkit.train.pretrain import pretrain


def main(path: str) -> int:
    """Do one process's part of the job; return its exit code. Only rank 0 shows progress."""
    job = Job.load(Path(path))
    first = os.environ.get("RANK", "0") == "0"
    reporter = make_reporter(json=job.face["json"], quiet=job.face["quiet"] or not first)
    try:
        pretrain(job, reporter)
    except LlmkitError as error:
        reporter.error(error)
        return LOST_PEER if isinstance(error, LostWorkerError) else int(error.exit_code)
    finally:
        reporter.close()
    return 0


if __name__ == "__main__":
    # No interpreter shutdown for a failed rank: it could wait for peers in a collective for ever.
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(0)
