"""What a torch.profiler trace says of calls that make the host wait for a GPU, and of copies to the host."""

from __future__ import annotations

from collections import Counter

# By these the host waits, or may: an allocation or its end synchronises, and a copy that is not asynchronous waits.
WAITS = {
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpy2D", "cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost",
    "cudaFreeHost", "cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyDtoH_v2",
}  # fmt: skip


def waits_and_copies(trace: dict) -> Counter[str]:
    """Of an exported Chrome trace: waits by the call's name, and "copies to the host"."""
    counts: Counter[str] = Counter()
    for event in trace["traceEvents"]:
        category, name = event.get("cat", ""), event.get("name", "")
        if category in ("cuda_runtime", "cuda_driver") and name.split("_v")[0] in {wait.split("_v")[0] for wait in WAITS}:
            counts[name] += 1
        if category == "gpu_memcpy" and "DtoH" in name:
            counts["copies to the host"] += 1
    return counts


def kernels(trace: dict) -> int:
    return sum(event.get("cat") == "kernel" for event in trace["traceEvents"])
