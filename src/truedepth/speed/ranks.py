"""Runs one function in several processes that communicate with torch.distributed."""

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
    """Check the device of several ranks: they run on GPUs if the machine has any, else on the CPU.

    Raises:
        TruedepthError: There are several ranks, and `device` is of the other kind.
    """
    own = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks > 1 and device.type != own:
        raise TruedepthError(
            f"Several ranks run on {own} on this machine, not on {device}; give --device {own}."
        )


def possible_ranks(most: int, device: torch.device) -> int:
    """The ranks that a device's machine can run at a time, each on a GPU or core of its own."""
    if device.type == "cuda":
        return min(most, torch.cuda.device_count())
    alone = device.type != "cpu" or torch.cuda.is_available()
    return 1 if alone else min(most, len(os.sched_getaffinity(0)))


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    first: Callable[[int], object] | None = None,
) -> Any:
    """Run `function(*arguments)` in every rank, and return the first rank's result.

    Args:
        ranks: Number of processes; each gets its own GPU, or without GPUs its share of the cores.
        function: A function at the top level of a module, as it is pickled by name.
        arguments: Arguments that can be pickled.
        first: What every rank calls with its number before it connects to the others.

    Raises:
        TruedepthError: There are fewer GPUs than ranks; or a rank failed or was killed. The other
            ranks are then stopped, and the message is that of the rank that failed first.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        raise TruedepthError(
            f"{ranks} ranks need one GPU each, but this machine has {torch.cuda.device_count()};"
            " lower --tp."
        )
    with tempfile.TemporaryDirectory() as directory:
        try:
            spawn(  # type: ignore[no-untyped-call]
                _rank, (ranks, Path(directory), function, arguments, first), nprocs=ranks
            )
        except ProcessException as error:
            # When one rank is gone, the others fail too, perhaps before its end is noticed: the
            # earliest message is the cause. A killed rank leaves no message, so then those of the
            # others are not the cause.
            said = sorted(Path(directory).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            if not said or isinstance(error, ProcessExitedException):
                raise TruedepthError(f"Rank {error.error_index}: {error}".strip(), 1) from error
            reason, exit_code = json.loads(said[0].read_text())
            raise TruedepthError(reason.strip(), exit_code) from error
        return pickle.loads(Path(directory, "result").read_bytes())


def _rank(
    rank: int,
    ranks: int,
    directory: Path,
    function: Callable[..., Any],
    arguments: Any,
    first: Callable[[int], object] | None,
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    gpus = torch.cuda.is_available()
    try:
        if gpus:
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
        if first is not None:
            first(rank)
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
