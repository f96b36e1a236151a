"""A function on every rank of a small world, each forked from this process; what they return comes back."""

import os
import pickle
import traceback

import torch
import torch.distributed as dist

LIMIT_S = 120


def together(folder, size, work):
    """`work(rank)` on `size` ranks that meet by gloo; their results by rank."""
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    ids = [_start(folder, rank, size, meeting, work) for rank in range(size)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in ids]
    assert not any(codes), [(folder / f"rank-{rank}.txt").read_text() for rank in range(size) if codes[rank]]
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in range(size)]


def _start(folder, rank, size, meeting, work):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(work(rank)))
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"rank-{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)
