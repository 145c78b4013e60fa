"""One function in several processes that talk to each other."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException, spawn

from truedepth.errors import TruedepthError


def check_accelerator(ranks: int, device: torch.device) -> None:
    """Several ranks run on the machine's GPUs where it has some, else on its CPU.

    Raises:
        TruedepthError: The device is another.
    """
    own = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks > 1 and device.type != own:
        raise TruedepthError(f"Ranks run on {own} here, not on {device}.")


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in the first of so many ranks.

    Args:
        ranks: Processes; each has its share of the processor's cores, or a GPU of its own.
        function: Of a module, for it is sent by name.
        arguments: Sent as pickles.

    Raises:
        TruedepthError: There are not so many GPUs; or one rank failed or was killed, the others are
            ended, and this is what it said.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        raise TruedepthError(
            f"{ranks} ranks need a GPU each, and there are {torch.cuda.device_count()}."
        )
    with tempfile.TemporaryDirectory() as directory:
        try:
            spawn(  # type: ignore[no-untyped-call]
                _rank, (ranks, Path(directory), function, arguments), nprocs=ranks
            )
        except ProcessException as error:
            # The others fail too once one is gone, and may be noticed before it; one that was
            # killed says nothing, and what they say then is not the cause.
            said = sorted(Path(directory).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            if not said or isinstance(error, ProcessExitedException):
                raise TruedepthError(f"Rank {error.error_index}: {error}".strip(), 1) from error
            reason, exit_code = json.loads(said[0].read_text())
            raise TruedepthError(reason.strip(), exit_code) from error
        return pickle.loads(Path(directory, "result").read_bytes())


def _rank(
    rank: int, ranks: int, directory: Path, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    gpus = torch.cuda.is_available()
    try:
        if gpus:
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            init_method=f"file://{directory}/store",
            rank=rank,
            world_size=ranks,
        )
        result = function(*arguments)
    except Exception as error:
        said = (f"Rank {rank}: {type(error).__name__}: {error}", 1)
        if isinstance(error, TruedepthError):
            said = (str(error), error.exit_code)
        (directory / f"error-{rank}").write_text(json.dumps(said))
        raise
    if rank == 0:
        (directory / "result").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
