"""The time of an all-reduce on common links, for machines where it cannot be measured."""

from __future__ import annotations

from dataclasses import dataclass

from truedepth.errors import TruedepthError


@dataclass(frozen=True)
class Link:
    """A link between ranks; an all-reduce over N ranks is a ring of 2(N - 1) steps."""

    name: str
    base: float
    """Seconds of every all-reduce, whatever its size and the number of ranks."""

    step: float
    """Seconds that every step of the ring adds."""

    bandwidth: float
    """Bytes per second in one direction."""

    source: str
    """Where these figures come from."""

    def all_reduce(self, size: int, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes over `ranks` ranks."""
        steps = 2 * (ranks - 1)
        return self.base + steps * (self.step + size / ranks / self.bandwidth)


_NCCL = "NCCL's own model of a ring with its low-latency protocol, src/graph/tuning.cc"
_GLOO = "263 µs for small messages over 4 hosts by TCP, gloo's README"

LINKS = {
    link.name: link
    for link in (
        # Two H100s take 6 µs with CUDA graphs: github.com/NVIDIA/nccl/issues/1259
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
    """Read a link: a name of `LINKS`, or microseconds and GB/s, such as `30,12.5`.

    Raises:
        TruedepthError: The text is neither.
    """
    if text in LINKS:
        return LINKS[text]
    try:
        latency, bandwidth = map(float, text.split(","))
    except ValueError:
        latency = bandwidth = 0.0
    if not (latency >= 0 and bandwidth > 0):
        raise TruedepthError(
            f"A link is one of {', '.join(LINKS)}, or the latency of an all-reduce in microseconds"
            f" and the bandwidth in GB/s, such as 30,12.5; not {text!r}."
        )
    return Link(text, latency * 1e-6, 0.0, bandwidth * 1e9, "given")
