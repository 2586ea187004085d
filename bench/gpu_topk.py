"""Exact selection at 1 % beside torch.topk on as many magnitudes, and beside the fused EF14 step: rows of thinwire_bench_kernels_cuda, and torch's time here.

    python bench/gpu_topk.py KERNELS.json --json FILE
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

DENSITY = 0.01


def row_of(rows: list[dict], kernel: str) -> dict:
    """The one whose density came closest to 1 %."""
    found = [row for row in rows if row["kernel"] == kernel and row["density"]]
    if not found:
        sys.exit(f"gpu_topk: there is no row {kernel}; thinwire_bench_kernels_cuda --json without --filter writes it")
    return min(found, key=lambda row: abs(row["density"] - DENSITY))


def seconds_of(torch, device: str, numel: int, repetitions: int) -> float:
    """The median. The magnitudes are there before the clock starts: a copy of the message that our exact selection does without."""
    magnitudes = torch.randn(numel, device=device).abs_()
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for repetition in range(repetitions + 2):
        settle()
        start = time.perf_counter()
        torch.topk(magnitudes, max(1, round(numel * DENSITY)), sorted=False)
        settle()
        if repetition >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_topk.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=pathlib.Path, metavar="KERNELS.json", help="what thinwire_bench_kernels_cuda --json has written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where torch.topk runs; cpu shows no more than that this program works")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the two ratios")
    options = parser.parse_args()
    try:
        rows = json.loads(options.kernels.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"gpu_topk: {options.kernels} is not what thinwire_bench_kernels_cuda --json writes: {error!r}")
    exact, fused = row_of(rows, "none_topk_exact"), row_of(rows, "ef14_topk_sampled")
    import torch

    topk = seconds_of(torch, options.device, exact["numel"], options.reps)
    result = {"topk_seconds": topk, "topk_to_exact": topk / exact["seconds_median"], "exact_to_fused": exact["seconds_median"] / fused["seconds_median"]}
    print(f"torch.topk {topk * 1e3:.3f} ms, exact {exact['seconds_median'] * 1e3:.3f} ms: {result['topk_to_exact']:.1f} x faster; "
          f"{result['exact_to_fused']:.2f} x the fused EF14 step")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
