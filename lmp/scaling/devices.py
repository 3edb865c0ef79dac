"""What the planner assumes of devices and their links: one table, printed with every plan, replaced by calibration.

Peaks, memory and bandwidths are the vendors' (dense, without sparsity; links per device and direction). The rates are
shares of the peak that trained models of this shape reach: linear maps 0.57 of it on Hopper (about 560 of 989), fused
attention 0.46 with 128 channels a head and 0.37 with fewer, forward and backward together (cuDNN's kernels, from the
figures of Shah et al., "FlashAttention-3", 2024).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace

from lmp.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device, and what connects it.

    Attributes:
        name: as given.
        gib: its memory.
        usable: share of it that a run can have; the rest is the driver's, the kernels' and the allocator's.
        bf16_tflops, fp32_tflops: dense peaks.
        dense_rate: share of the peak that linear maps reach.
        attention_rate, narrow_attention_rate: the same of attention, with 128 channels a head, and with fewer.
        memory_gbps: reading and writing its memory.
        link_gbps: to another device of its node, one direction.
        network_gbps: to a device of another node, one direction.
        host_gbps: to the memory of the host.
        host_gib: host memory for each device.
        cuda: whether the packed attention kernels run on it.
    """

    name: str
    gib: float
    usable: float
    bf16_tflops: float
    fp32_tflops: float
    dense_rate: float
    attention_rate: float
    narrow_attention_rate: float
    memory_gbps: float
    link_gbps: float
    network_gbps: float
    host_gbps: float
    host_gib: float
    cuda: bool = True

    def peak(self, *, bf16: bool) -> float:
        """Operations a second."""
        return (self.bf16_tflops if bf16 else self.fp32_tflops) * 1e12

    @property
    def limit(self) -> float:
        """Bytes that a run can have."""
        return self.gib * self.usable * GIB

    def assumptions(self) -> dict[str, float | str | bool]:
        return asdict(self)


H200 = Device(
    name="h200",
    gib=140.4,
    usable=0.95,
    bf16_tflops=989.0,
    fp32_tflops=67.0,
    dense_rate=0.57,
    attention_rate=0.46,
    narrow_attention_rate=0.37,
    memory_gbps=4300.0,
    link_gbps=400.0,
    network_gbps=45.0,
    host_gbps=50.0,
    host_gib=200.0,
)
DEVICES = {
    "h200": H200,
    "h100": replace(H200, name="h100", gib=79.6, usable=0.94, memory_gbps=2900.0),
    "a100": replace(
        H200,
        name="a100",
        gib=79.3,
        usable=0.94,
        bf16_tflops=312.0,
        fp32_tflops=19.5,
        dense_rate=0.60,
        attention_rate=0.50,
        narrow_attention_rate=0.45,
        memory_gbps=1700.0,
        link_gbps=250.0,
        network_gbps=22.0,
        host_gbps=24.0,
    ),
}


def known_device(name: str) -> Device | None:
    """The device of the table that a card's own name (as "NVIDIA H200") tells of, or None."""
    return next((device for device in DEVICES.values() if device.name in name.lower()), None)


def find_device(spec: str, *, per_node: int) -> Device:
    """The device called `spec`: a name of the table, "cpu" (this machine), or NAME:GiB:TFLOPS:GBps.

    Args:
        spec: of the last form GiB is the memory, TFLOPS the dense peak and GBps the link between devices; the rest is
            as for the h200, its memory's and its network's speed in proportion.
        per_node: processes that share a node.

    Raises:
        UserError: no such device.
    """
    if spec in DEVICES:
        return DEVICES[spec]
    if spec == "cpu":
        return _this_machine(per_node)
    parts = spec.split(":")
    try:
        name, (gib, tflops, gbps) = parts[0], (float(part) for part in parts[1:])
        known = bool(name) and min(gib, tflops, gbps) > 0
    except ValueError:
        known = False
    if not known:
        raise UserError(
            f"--gpu {spec}: no such device", remedy=f"give one of {', '.join(DEVICES)}, cpu, or NAME:GiB:TFLOPS:GBps"
        )
    speed = tflops / H200.bf16_tflops
    return replace(
        H200,
        name=name,
        gib=gib,
        bf16_tflops=tflops,
        fp32_tflops=H200.fp32_tflops * speed,
        memory_gbps=H200.memory_gbps * speed,
        link_gbps=gbps,
        network_gbps=min(gbps, H200.network_gbps),
    )


def _this_machine(per_node: int) -> Device:
    """A share of this machine's cores and memory."""
    import psutil

    cores = (os.cpu_count() or 1) / per_node
    memory = psutil.virtual_memory().total / GIB / per_node
    return Device(
        name="cpu",
        gib=memory,
        usable=0.8,
        bf16_tflops=0.1 * cores,
        fp32_tflops=0.1 * cores,
        dense_rate=0.9,
        attention_rate=0.7,
        narrow_attention_rate=0.7,
        memory_gbps=10.0 * cores,
        link_gbps=2.0,
        network_gbps=1.0,
        host_gbps=10.0,
        host_gib=memory,
        cuda=False,
    )
