"""Utilities of the benchmarks: clocks, peak memory, and atomic writes of files."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from ultramem.errors import UltraMemError
from ultramem.files.whole_files import cannot_write, check_output, whole_file, write_text

DEFAULT_OUTPUT = Path("runs/benchmarks")
OUT_OF_MEMORY = math.inf
_PACKAGES = ("torch", "triton", "transformers", "ai2-olmo-core")


def benchmark_device(tiny: bool) -> torch.device:
    """The GPU, or the CPU for a tiny run.

    Raises:
        UltraMemError: there is no GPU.
    """
    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UltraMemError("this benchmark needs a CUDA GPU; use --tiny to try the script without one")
    return torch.device("cuda")


class Stopwatch:
    """Times a device's work, with CUDA events or the host's clock. Only reading the times waits for a GPU.

    Args:
        device: device to time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Record this moment in the device's work."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Milliseconds between consecutive marks."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [1e3 * (end - start) for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def median_ms(run: Callable[[int], object], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Median time of a run in milliseconds; `OUT_OF_MEMORY` if it does not fit.

    Runs do not wait for the GPU, so that the time to launch kernels counts only if it is longer.

    Args:
        run: function to time; gets the number of the repetition, to choose its input.
        device: device that it runs on.
        repeats: number of timed runs.
        warmup: number of runs before them.
    """
    try:
        for i in range(warmup):
            run(i)
        stopwatch = Stopwatch(device)
        stopwatch.mark()
        for i in range(repeats):
            run(i)
            stopwatch.mark()
        return statistics.median(stopwatch.intervals())
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY


def graphed_ms(run: Callable[[int], object], device: torch.device, repeats: int, rotations: int) -> float | None:
    """Median time of a run in milliseconds as a replayed CUDA graph, which hides the time to launch kernels.

    Args:
        run: as in `median_ms`; nothing in it may wait for the GPU.
        device: device that it runs on.
        repeats: number of timed replays.
        rotations: number of runs in the graph, each with its own input.

    Returns:
        None on a CPU, or if the run cannot be captured; `OUT_OF_MEMORY` if it does not fit.
    """
    if device.type == "cpu":
        return None
    free_memory()
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(0)
        torch.cuda.current_stream().wait_stream(stream)
        free_memory()
        with torch.cuda.graph(graph):
            for i in range(rotations):
                run(i)
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except RuntimeError as error:
        print(f"not captured as a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    return median_ms(lambda _: graph.replay(), device, repeats) / rotations


def kernel_times(run: Callable[[], object], device: torch.device, layers: int) -> list[tuple[str, float]]:
    """Names and mean times in microseconds of the kernels that one of a run's `layers` layers launches, in order.

    Layers launch the same kernels. None are found on a CPU.
    """
    if device.type == "cpu":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    count = len(events) // layers
    return [
        (events[place].name, statistics.mean(event.device_time for event in events[place::count]))
        for place in range(count)
    ]


def allocated_gb(device: torch.device) -> float:
    """Memory of tensors on a GPU, in 10⁹ bytes; 0 on a CPU."""
    return torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def peak_gb(device: torch.device) -> float:
    """Peak memory of tensors on a GPU since `reset_peak`, in 10⁹ bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def peak_reserved_gb(device: torch.device) -> float | None:
    """Peak memory that was reserved on a GPU since `reset_peak`, CUDA graphs' included, in 10⁹ bytes."""
    return torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Reset `peak_gb`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Free memory that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions of packages that matter for speed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"device": name, "versions": versions}


def number(value: float | None, digits: int = 2) -> str:
    """Format a number for a table; blank if nothing was measured."""
    if value is None or math.isnan(value):
        return ""
    return "out of memory" if value == OUT_OF_MEMORY else f"{value:,.{digits}f}"


def ratio(value: float | None, to: float | None) -> float | None:
    """`value / to` if both were measured."""
    if value is None or not to or math.isinf(value) or math.isinf(to):
        return None
    return value / to


def console() -> Console:
    """Console on standard output, wide enough for the tables if it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 150)


def check_outputs(directory: Path, *names: str) -> None:
    """Make a directory and find out, before long work, whether files in it can be written."""
    with cannot_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        check_output(directory / name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all; out of memory is written as a string."""
    write_text(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def write_plot(path: Path, figure: Figure) -> None:
    """Write a PNG file, completely or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return "out of memory" if value == OUT_OF_MEMORY else value
