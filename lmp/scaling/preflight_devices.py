"""Checks that compute: products, copies and all-reduces, each in a process of its own that may fail or hang.

The parent never touches a device, so that it can fork: torch is imported once on each node.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmp.scaling.preflight import Finding, Floors

_TIMEOUT_SECONDS = 90.0
_SIDE = {"cpu": 512, "cuda": 4096}
_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


class ChildError(RuntimeError):
    """A child process raised, died or hung; the message tells which."""


def in_children(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call `function` once for each tuple of arguments, at the same time, each call in a forked process.

    Returns:
        what each call returned, or a ChildError in its place.
    """
    context = multiprocessing.get_context("fork")
    children = []
    for arguments in calls:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, function, arguments), daemon=True)
        child.start()
        theirs.close()
        children.append((child, ours))
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    results: list[Any] = []
    for child, pipe in children:
        if not wait([pipe], max(0.0, deadline - time.monotonic())):
            results.append(ChildError(f"no result within {_TIMEOUT_SECONDS:.0f} s"))
        else:
            try:
                results.append(pipe.recv())
            except EOFError:
                child.join(5)
                results.append(ChildError(f"the process died, exit code {child.exitcode}"))
    for child, _ in children:
        child.kill()
        child.join()
    return results


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments)
    except BaseException as error:
        told = str(error).splitlines()
        result = ChildError(f"{type(error).__name__}: {told[0] if told else traceback.format_exc().splitlines()[-1]}")
    pipe.send(result)
    pipe.close()
    os._exit(0)  # no destructor of a broken process group may hang here


def device_of(index: int) -> torch.device:
    """The GPU of that number, or the CPU where there is none."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def look(floors: Floors, *, gpus_asked: int, ranks: int) -> list[Finding]:
    """GPUs there, products and copies on every device, and the all-reduce among the node's ranks."""
    (seen,) = in_children(_gpus, [()])
    if isinstance(seen, ChildError):
        return [Finding("gpus", False, str(seen))]
    findings = [_count(seen, gpus_asked if floors.gpus < 0 else int(floors.gpus))]
    findings += [_memory(index, floors, *gpu) for index, gpu in enumerate(seen)]
    for index, result in enumerate(in_children(exercise, [(index,) for index in range(max(1, len(seen)))])):
        findings.append(_exercised(index, result, floors))
    members = len(seen) or ranks
    if members > 1 and all(finding.fit for finding in findings):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        results = in_children(all_reduce, [("127.0.0.1", store.port, "node", r, members, r) for r in range(members)])
        floor = floors.allreduce_gbs if seen else floors.cpu_allreduce_gbs
        findings.append(bandwidth_finding("allreduce", results, members, floor))
    return findings


def _gpus() -> list[tuple[str, int, int]]:
    """Name, free and whole bytes of each GPU."""
    if not torch.cuda.is_available():
        return []
    return [
        (torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index))
        for index in range(torch.cuda.device_count())
    ]


def _count(seen: list[tuple[str, int, int]], asked: int) -> Finding:
    names = ", ".join(sorted({name for name, *_ in seen}))
    return Finding("gpus", len(seen) >= asked, f"{len(seen)} of {asked} asked for{names and f', {names}'}")


def _memory(index: int, floors: Floors, name: str, free: int, whole: int) -> Finding:
    gib = whole / 2**30
    facts = f"GPU {index}: {free / whole:.0%} of {gib:.1f} GiB free"
    if free / whole < floors.gpu_free:
        return Finding("gpu-memory", False, f"{facts}, needs {floors.gpu_free:.0%}: somebody else uses it")
    return Finding("gpu-memory", gib >= floors.gpu_gib, f"{facts}, needs {floors.gpu_gib:g} GiB")


def exercise(index: int) -> tuple[float, float]:
    """A product and a copy on one device, both of which must be exact.

    Returns:
        operations a second of the product in bf16 (fp32 on a CPU), bytes a second to the device and back (0 on a CPU).

    Raises:
        ArithmeticError: a result is wrong.
    """
    device = device_of(index)
    n = _SIDE[device.type]
    generator = torch.Generator().manual_seed(index)
    # Small whole numbers: every sum is exact in fp32, whatever the kernel, so there is no tolerance.
    left, right = (torch.randint(-4, 5, (n, n), generator=generator).float() for _ in range(2))
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    on_device = left.to(device), right.to(device)
    first = on_device[0] @ on_device[1]
    _check_product(first.cpu(), left, right, generator)
    low = on_device if device.type == "cpu" else tuple(x.bfloat16() for x in on_device)
    product = low[0] @ low[1]
    if not torch.allclose(product.float(), first, rtol=2**-7, atol=1):
        raise ArithmeticError("a product in bf16 is wrong")
    rounds = 3 if device.type == "cpu" else 30
    _wait(device)
    began = time.perf_counter()
    products = [low[0] @ low[1] for _ in range(rounds)]
    _wait(device)
    rate = rounds * 2 * n**3 / (time.perf_counter() - began)
    if not all(torch.equal(again, product) for again in products):
        raise ArithmeticError("the same product has two results")
    return rate, 0.0 if device.type == "cpu" else _copy(device, generator)


def _check_product(product: Tensor, left: Tensor, right: Tensor, generator: torch.Generator) -> None:
    """Freivalds' test with 16 vectors in fp64, where all is exact: a wrong product passes once in 2^16."""
    vectors = torch.randint(0, 2, (len(left), 16), generator=generator).double() * 2 - 1
    if not torch.equal(product.double() @ vectors, left.double() @ (right.double() @ vectors)):
        raise ArithmeticError("a product of whole numbers is wrong")


def _copy(device: torch.device, generator: torch.Generator) -> float:
    sent = torch.randint(0, 256, (256 * 2**20,), dtype=torch.uint8, generator=generator).pin_memory()
    received = torch.empty_like(sent).pin_memory()
    received.copy_(sent.to(device, non_blocking=True))
    _wait(device)
    began = time.perf_counter()
    received.copy_(sent.to(device, non_blocking=True))
    _wait(device)
    seconds = time.perf_counter() - began
    if not torch.equal(sent, received):
        raise ArithmeticError("what went to the device and back has changed")
    return 2 * sent.numel() / seconds


def _exercised(index: int, result: Any, floors: Floors) -> Finding:
    if isinstance(result, ChildError):
        return Finding("compute", False, f"device {index}: {result}")
    rate, copied = result[0] / 1e12, result[1] / 1e9
    if not copied:
        return Finding("compute", True, f"CPU: products right, {rate:.2f} TFLOP/s in fp32")
    facts = f"GPU {index}: products right, {rate:.0f} TFLOP/s in bf16, copies {copied:.1f} GB/s"
    fit = rate >= floors.matmul_tflops and copied >= floors.copy_gbs
    return Finding("compute", fit, f"{facts}, needs {floors.matmul_tflops:g} and {floors.copy_gbs:g}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_reduce(address: str, port: int, name: str, rank: int, world_size: int, local: int) -> float:
    """As one rank of a group, sum a tensor several times. Collective.

    Args:
        address, port: of the store where the ranks meet.
        name: of this group in the store.
        rank, world_size: of this process in it.
        local: number of this process on its node, which is that of its GPU.

    Returns:
        bus bandwidth in bytes a second: 2 (n - 1) / n of the tensor's bytes over the time of a sum.

    Raises:
        ArithmeticError: the sum is wrong.
    """
    device = device_of(local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=_TIMEOUT_SECONDS / 2)
    store = dist.PrefixStore(name, dist.TCPStore(address, port, is_master=False, timeout=limit))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    x = torch.full((_BYTES[device.type] // 4,), float(rank + 1), device=device)
    dist.all_reduce(x)
    if not bool((x == world_size * (world_size + 1) / 2).all()):
        raise ArithmeticError("the sum over the ranks is wrong")
    x.zero_()
    seconds = []
    for _ in range(5):
        dist.barrier()
        _wait(device)
        began = time.perf_counter()
        dist.all_reduce(x)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    # Nobody may leave, taking its end of a connection along, before all are through.
    dist.barrier()
    return 2 * (world_size - 1) / world_size * x.numel() * 4 / min(seconds)


def bandwidth_finding(check: str, results: Sequence[Any], members: int, floor_gbs: float) -> Finding:
    """Hold the slowest rank's bandwidth against the floor; a rank that failed tells why."""
    failures = [result for result in results if isinstance(result, ChildError)]
    if failures:
        return Finding(check, False, f"over {members} ranks: {failures[0]}")
    slowest = min(results) / 1e9
    return Finding(check, slowest >= floor_gbs, f"{slowest:.2f} GB/s over {members} ranks, needs {floor_gbs:g}")
