"""What an all-reduce takes on the wires of common machines, where it cannot be measured."""

from __future__ import annotations

from dataclasses import dataclass

from truedepth.errors import TruedepthError


@dataclass(frozen=True)
class Link:
    """A wire between ranks, in the terms of a ring: 2(N - 1) steps for N ranks."""

    name: str
    base: float
    """Seconds that an all-reduce takes however short it is."""

    step: float
    """Seconds that every step of it adds."""

    bandwidth: float
    """Bytes a second in one direction."""

    source: str
    """Of these figures."""

    def all_reduce(self, size: int, ranks: int) -> float:
        """Seconds for so many bytes over so many ranks."""
        steps = 2 * (ranks - 1)
        return self.base + steps * (self.step + size / ranks / self.bandwidth)


_NCCL = "NCCL's own model of a ring with its low-latency protocol, src/graph/tuning.cc"
_GLOO = "263 µs for small messages over 4 hosts by TCP, gloo's README"

LINKS = {
    link.name: link
    for link in (
        # Two H100 take 6 µs with CUDA graphs: github.com/NVIDIA/nccl/issues/1259
        Link("nvlink", 6.6e-6, 0.6e-6, 450e9, f"{_NCCL}; NVLink 4"),
        Link("pcie5", 6.6e-6, 1.0e-6, 63e9, f"{_NCCL}; PCIe 5.0 x16"),
        Link("pcie4", 6.6e-6, 1.0e-6, 31.5e9, f"{_NCCL}; PCIe 4.0 x16"),
        Link(
            "infiniband",
            6.6e-6,
            6.2e-6,
            25e9,
            "19 µs between two hosts on HDR, github.com/NVIDIA/nccl-tests/issues/150",
        ),
        Link("40gbe", 0.0, 44e-6, 5e9, _GLOO),
        Link("10gbe", 0.0, 44e-6, 1.25e9, f"{_GLOO}, for 40 Gb/s"),
    )
}


def parse_link(text: str) -> Link:
    """A name of `LINKS`, or microseconds and GB/s: `30,12.5`.

    Raises:
        TruedepthError: It is neither.
    """
    if text in LINKS:
        return LINKS[text]
    try:
        latency, bandwidth = map(float, text.split(","))
    except ValueError:
        latency = bandwidth = 0.0
    if not (latency >= 0 and bandwidth > 0):
        raise TruedepthError(
            f"A link is one of {', '.join(LINKS)}, or an all-reduce's latency in microseconds and"
            f" the bandwidth in GB/s as 30,12.5, not {text!r}."
        )
    return Link(text, latency * 1e-6, 0.0, bandwidth * 1e9, "given")
