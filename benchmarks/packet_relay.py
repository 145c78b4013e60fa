"""Carries packets between two TUN devices and holds every one for the time given.

    python packet_relay.py DESCRIPTOR DESCRIPTOR SECONDS

The descriptors are open devices, inherited. Imports nothing but the standard library, so that it
starts at once and stays small. Runs ahead of other processes where it may, because a packet that
waits for the processor is late. Ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections import deque
from contextlib import suppress

LONGEST = 1 << 16
"""Bytes of the longest packet."""

PR_SET_PDEATHSIG = 1
"""Linux' number of what makes a process end with its parent."""


def relay(one: int, other: int, delay: float) -> None:
    """Carry packets until the process is killed."""
    waiting: deque[tuple[float, int, bytes]] = deque()  # in order, as all wait for equally long
    across = {one: other, other: one}
    while True:
        left = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        for device in select.select([one, other], [], [], left)[0]:
            packet = os.read(device, LONGEST)
            waiting.append((time.perf_counter() + delay, across[device], packet))
        while waiting and waiting[0][0] <= time.perf_counter():
            _, device, packet = waiting.popleft()
            with suppress(OSError):  # a device that is not up yet or no more drops packets
                os.write(device, packet)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):  # also wakes it in time: timers of such processes have no slack
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
