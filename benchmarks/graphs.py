"""What the GPU itself takes: phases captured in CUDA graphs and replayed.

Called from Python, a small layer costs what its launches cost the host. A graph holds no host: its
replay is as fast as the GPU. A phase is captured for several sets of inputs one after another, so
that none is read from the cache that its last replay left, and so that the launch of the graph
itself is shared.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightshare_kernels._cases import Case, Inputs, Maker, Workload

PHASES = ("forward", "both")
COLD = 160 << 20  # bytes that one replay should touch: three times the L2 cache of an H100
MOST_COPIES = 16
LEAST_SAMPLE = 2e-3  # seconds of one sample
WARM_UP = 3
Summary = Callable[[list[float]], dict[str, float]]


@dataclass
class Captured:
    """The graphs of one side of a comparison, by phase, and seconds per workload in each round."""

    name: str
    graphs: dict[str, torch.cuda.CUDAGraph]
    works: list[Workload]  # these and grads own what the graphs read
    grads: list[list[Tensor]]
    repeats: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})


def copies_for(inputs: Inputs) -> int:
    """How many sets of inputs one graph goes through."""
    size = sum(t.untyped_storage().nbytes() for t in tensors_in(inputs))
    return max(1, min(MOST_COPIES, math.ceil(COLD / max(size, 1))))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of inputs, in modules, lists and dicts as well."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def outputs_of(work: Workload) -> list[Tensor]:
    """The outputs of one forward pass, as a list."""
    y = work.forward()
    return list(y) if isinstance(y, list | tuple) else [y]


def forward(work: Workload, grads: list[Tensor]) -> None:
    """One forward pass that a backward pass could follow."""
    outputs_of(work)


def both(work: Workload, grads: list[Tensor]) -> None:
    """A training step: forward, backward into fresh gradients, and dropping those."""
    if work.step is not None:
        work.step()
    else:
        torch.autograd.backward(outputs_of(work), grads)
    for leaf in work.leaves:
        leaf.grad = None


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Warm up on a stream of its own, as autograd wants it, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def waits_for_the_host(run: Callable[[], None]) -> None:
    """Raise RuntimeError where a run synchronises: a capture that fails spoils all that follow."""
    run()  # what is made once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradient(y: Tensor) -> Tensor:
    """A random gradient, by a generator of its own: capture holds the common one's state."""
    generator = torch.Generator(y.device).manual_seed(0)
    return torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)


def captured(name: str, works: list[Workload]) -> Captured:
    """Both phases of one side; raises RuntimeError where a phase waits for the host."""
    grads = [[gradient(y) for y in outputs_of(work)] for work in works]
    graphs = {}
    waits_for_the_host(lambda: both(works[0], grads[0]))
    for phase, function in (("forward", forward), ("both", both)):

        def run(function=function) -> None:
            for work, own in zip(works, grads, strict=True):
                function(work, own)

        graphs[phase] = capture(run)
    return Captured(name, graphs, works, grads)


def seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Mean time of a replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def measure(
    case: Case, inputs: Inputs, dtype: torch.dtype, rounds: int, deadline: float, summary: Summary
) -> dict:
    """Times on the GPU alone of ours and of every baseline that can be captured.

    Returns:
        ``copies`` of the inputs in a graph, ``variants`` (ms by phase), ``ratios`` (baseline / ours
        of medians, by phase) and ``failed``: why a variant has eager times only.
    """
    sets = [inputs]
    sets += [case.inputs(Maker(dtype, "cuda", seed)) for seed in range(1, copies_for(inputs))]
    makers = {"ours": case.workload, **case.baselines}
    found, failed = [], {}
    for name, make in makers.items():
        try:
            found.append(captured(name, [make(own) for own in sets]))
        except RuntimeError as error:  # CUDA's are, too
            failed[name] = str(error).strip().splitlines()[0][:200]
            torch.cuda.synchronize()
            gc.collect()
    for side in found:
        for phase, graph in side.graphs.items():
            once = min(seconds(graph, 1) for _ in range(3))
            side.repeats[phase] = max(1, min(200, math.ceil(LEAST_SAMPLE / max(once, 1e-6))))
    for number in range(rounds):
        if number >= 3 and time.monotonic() > deadline:
            break
        turn = number % max(len(found), 1)
        for side in found[turn:] + found[:turn]:
            for phase, graph in side.graphs.items():
                lap = seconds(graph, side.repeats[phase])
                side.samples[phase].append(lap / len(side.works))
    return {"copies": len(sets), **table(found, summary), "failed": failed}


def table(found: list[Captured], summary: Summary) -> dict:
    """Times of each side, and ratios where ours was captured."""
    medians = {s.name: {p: statistics.median(s.samples[p]) for p in PHASES} for s in found}
    for times in medians.values():
        times["backward"] = max(times["both"] - times["forward"], 1e-9)
    ours = medians.get("ours")
    ratios = {
        name: {phase: round(times[phase] / ours[phase], 4) for phase in times}
        for name, times in medians.items()
        if ours is not None and name != "ours"
    }
    variants = {s.name: {p: summary(s.samples[p]) for p in PHASES} for s in found}
    return {"variants": variants, "ratios": ratios}
