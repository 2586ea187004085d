"""Rows of thinwire_bench_kernels_cuda beside what torch's own operations need for as many elements, measured here: exact selection at 1 % beside torch.topk on as
many magnitudes (and, per element, beside the fused EF14 step), ef14_sign beside a DeepSpeed-style 1-bit step as a sequence of operations.

    python bench/gpu_eager.py KERNELS.json --json FILE
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import report

DENSITY = 0.01


def row_of(rows: list[dict], kernel: str) -> dict:
    """The one without a density, or whose density came closest to 1 %."""
    found = [row for row in rows if row["kernel"] == kernel]
    if not found:
        sys.exit(f"gpu_eager: there is no row {kernel}; thinwire_bench_kernels_cuda --json without --filter writes it")
    return min(found, key=lambda row: abs((row["density"] or DENSITY) - DENSITY))


def clock_of(torch, device: str):
    """A function that runs a step and says how many seconds the device was at it."""

    def on_gpu(step) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def on_cpu(step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return on_gpu if device == "cuda" else on_cpu


def median_seconds(clock, step, repetitions: int) -> float:
    for _ in range(2):  # the first ones pay for their memory
        step()
    return statistics.median(clock(step) for _ in range(repetitions))


def topk_step(torch, device: str, numel: int):
    """The magnitudes are there before the clock starts: a copy of the message that our exact selection does without."""
    magnitudes = torch.randn(numel, device=device).abs_()
    return lambda: torch.topk(magnitudes, max(1, round(numel * DENSITY)), sorted=False)


def sign_step(torch, device: str, numel: int):
    import eager

    numel -= numel % 8  # what packs them takes whole bytes
    grad, residual = torch.randn(numel, device=device), torch.zeros(numel, device=device)
    return lambda: eager.eager_ef14_sign(grad, None, residual, None, eager.packed_by_torch)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_eager.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", type=pathlib.Path, metavar="KERNELS.json", help="what thinwire_bench_kernels_cuda --json has written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where torch runs; cpu shows no more than that this program works")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--json", type=report.new_file, metavar="FILE", help="write torch's times and the ratios")
    options = parser.parse_args()
    try:
        rows = json.loads(options.kernels.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"gpu_eager: {options.kernels} is not what thinwire_bench_kernels_cuda --json writes: {error!r}")
    exact, fused, sign = row_of(rows, "none_topk_exact"), row_of(rows, "ef14_topk_sampled"), row_of(rows, "ef14_sign")
    import torch

    clock = clock_of(torch, options.device)
    topk = median_seconds(clock, topk_step(torch, options.device, exact["numel"]), options.reps)
    steps = median_seconds(clock, sign_step(torch, options.device, sign["numel"]), options.reps)
    exact_to_fused = exact["seconds_median"] / exact["numel"] / (fused["seconds_median"] / fused["numel"])  # the fused step's row may have more elements
    result = {"topk_seconds": topk, "topk_to_exact": topk / exact["seconds_median"], "exact_to_fused": exact_to_fused,
              "eager_sign_seconds": steps, "eager_to_ef14_sign": steps / sign["seconds_median"]}  # fmt: skip
    print(f"torch.topk {topk * 1e3:.3f} ms, exact {exact['seconds_median'] * 1e3:.3f} ms: {result['topk_to_exact']:.1f} x faster; "
          f"{result['exact_to_fused']:.2f} x the fused EF14 step")  # fmt: skip
    print(f"torch's 1-bit step {steps * 1e3:.3f} ms, ef14_sign {sign['seconds_median'] * 1e3:.3f} ms: {result['eager_to_ef14_sign']:.1f} x faster")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
