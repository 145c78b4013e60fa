"""Two network namespaces of this machine, joined by a link with a rate and a delay.

Packets leave a namespace through a token bucket (`tc tbf`) of the link's rate. A delay comes from
netem where the kernel has it; elsewhere the link is two TUN devices, and `packet_relay.py` carries
packets between them and holds each for so long. Names hold the process's id, and namespaces, what
runs in them, and the relay are gone when the link is left, whatever happens.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from truedepth.errors import TruedepthError

DEVICE = "wire"
"""The name of the link's end in each namespace."""

ADDRESSES, NETWORK = ("10.199.7.1", "10.199.7.2"), "10.199.7.0/30"
CONGESTION = "cubic"
"""TCP's congestion control: Linux' default, whatever this machine's is."""

MTU = 9000
"""Bytes of the largest packet: jumbo frames, as such networks are run."""

BURST_SECONDS = 80e-6
"""What the token bucket lets through at once, in seconds of the link's rate. Too small, and timers
are what is measured; too large, and messages pass without having been shaped."""

LONGEST_QUEUE = 8 << 20
"""Bytes that wait in front of the token bucket; no message here is longer, so none is dropped."""

_UNITS = {"mbit": 1e6, "gbit": 1e9, "us": 1e-6, "ms": 1e-3}
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class NotAllowedError(TruedepthError):
    """There can be no network namespaces on this machine, or for this user."""


@dataclass(frozen=True)
class Shape:
    """What a link is like, in both directions alike."""

    text: str
    """As it was given: `10gbit`, `500us`, `1gbit+100us`."""

    rate: float | None
    """Bits per second; None for no limit."""

    delay: float
    """Seconds that every packet is held, in each direction."""

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `10gbit`, `500us` or `1gbit+100us`.

        Raises:
            TruedepthError: The text is something else.
        """
        rate, delay = None, 0.0
        for word in text.split("+"):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)(mbit|gbit|us|ms)", word)
            if match is None or float(match[1]) == 0:
                raise TruedepthError(
                    f"A link has a rate, a delay or both, such as 10gbit, 500us or 1gbit+100us; not"
                    f" {text!r}."
                )
            value = float(match[1]) * _UNITS[match[2]]
            if match[2].endswith("bit"):
                rate = value
            else:
                delay = value
        return cls(text, rate, delay)

    @property
    def burst(self) -> int:
        """Bytes that may leave at once: two packets at least."""
        return max(2 * (MTU + 100), round(BURST_SECONDS * (self.rate or 0) / 8))

    def queue(self, netem: bool) -> list[str]:
        """The words behind `tc qdisc add dev wire root`; none if packets leave as they come."""
        delay = ["netem", "delay", f"{self.delay * 1e6:g}us", "limit", "100000"]
        if netem and self.delay:
            return delay + (["rate", f"{self.rate:.0f}bit"] if self.rate else [])
        if not self.rate:
            return []
        bucket = ["rate", f"{self.rate:.0f}bit", "burst", f"{self.burst}"]
        return ["tbf", *bucket, "limit", f"{LONGEST_QUEUE}"]


def commands(shape: Shape, namespaces: tuple[str, str], netem: bool, relayed: bool) -> list[str]:
    """The commands that join two namespaces, in order, words separated by spaces.

    Args:
        shape: The link.
        namespaces: Their names; they exist.
        netem: Whether delays come from netem.
        relayed: Whether the two devices are there already, as ends of a relay.
    """
    one, other = namespaces
    found = []
    if not relayed:
        found += [f"ip link add {DEVICE} netns {one} type veth peer name {DEVICE} netns {other}"]
    for namespace, address in zip(namespaces, ADDRESSES, strict=True):
        found += [
            f"ip -n {namespace} addr add {address}/30 dev {DEVICE}",
            f"ip -n {namespace} link set {DEVICE} mtu {MTU} up",
            f"ip -n {namespace} link set lo up",
            f"ip -n {namespace} route replace {NETWORK} dev {DEVICE} src {address}"
            f" congctl {CONGESTION}",
        ]
        if not relayed:  # packets as on a wire, not the 64 kB that a veth pair would pass on whole
            found += [f"ip -n {namespace} link set {DEVICE} gso_max_size {shape.burst // 2}"]
        if queue := shape.queue(netem):
            found += [f"tc -n {namespace} qdisc add dev {DEVICE} root {' '.join(queue)}"]
    return found


@contextmanager
def shaped(shape: Shape) -> Iterator[tuple[str, str]]:
    """Two namespaces joined by such a link, by name, for as long as the context lasts.

    Raises:
        NotAllowedError: There can be no namespaces here.
        TruedepthError: A command failed.
    """
    if not (shutil.which("ip") and shutil.which("tc")):
        raise NotAllowedError("There are no commands ip and tc here (iproute2).")
    one, other = (f"truedepth-{os.getpid()}-{side}" for side in "ab")
    relay: subprocess.Popen[bytes] | None = None
    try:
        for name in (one, other):
            _make(name)
        netem = bool(shape.delay) and _has_netem(one)
        relayed = bool(shape.delay) and not netem
        if relayed:
            relay = _relay(shape.delay, (one, other))
        for line in commands(shape, (one, other), netem, relayed):
            _run(*line.split())
        yield one, other
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for name in (one, other):
            _remove(name)


def enter(namespaces: tuple[str, str], rank: int) -> None:
    """Move this process, a rank that has no connections yet, into its namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespaces[rank]).open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespaces[rank]}")
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE


def _relay(delay: float, namespaces: tuple[str, str]) -> subprocess.Popen[bytes]:
    """Two TUN devices, one in each namespace, and what carries packets between them."""
    files = []
    try:
        for side, namespace in zip("ab", namespaces, strict=True):
            file = os.open("/dev/net/tun", os.O_RDWR)
            files.append(file)
            name = f"td{os.getpid()}{side}"
            fcntl.ioctl(
                file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
            )
            _run(*f"ip link set {name} netns {namespace} name {DEVICE}".split())
        script = Path(__file__).with_name("packet_relay.py")
        words = [sys.executable, "-I", "-S", str(script), *map(str, files), str(delay)]
        return subprocess.Popen(words, pass_fds=files)
    finally:
        for file in files:
            os.close(file)


def _has_netem(namespace: str) -> bool:
    """Whether the kernel delays packets by itself; tried on a device that nothing uses."""
    words = f"tc -n {namespace} qdisc add dev lo root netem delay 1us"
    if subprocess.run(words.split(), capture_output=True).returncode:
        return False
    _run(*f"tc -n {namespace} qdisc del dev lo root".split())
    return True


def _make(namespace: str) -> None:
    found = subprocess.run(["ip", "netns", "add", namespace], capture_output=True, text=True)
    if found.returncode:
        raise NotAllowedError(f"No network namespaces can be made here: {found.stderr.strip()}")


def _remove(namespace: str) -> None:
    """End what still runs in a namespace, and remove it, if it is there."""
    words = ["ip", "netns", "pids", namespace]
    inside = subprocess.run(words, capture_output=True, text=True).stdout.split()
    for each in inside:
        with suppress(ProcessLookupError):
            os.kill(int(each), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _run(*words: str) -> None:
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        raise TruedepthError(f"{' '.join(words)}: {found.stderr.strip()}")
