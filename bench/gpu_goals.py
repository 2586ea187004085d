"""What a run of tests/run_gpu reached beside what is aimed at: one table from the files that its parts have left in its output folder.

    python bench/gpu_goals.py OUT
"""

import json
import pathlib
import sys

import report


def read(folder: pathlib.Path, name: str) -> dict:
    """{} where the part did not run, or was ended while it wrote."""
    try:
        return json.loads((folder / name).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def reached(folder: pathlib.Path) -> list[tuple[str, str, float, float | None]]:
    """(what, "at least" or "at most", the goal, the number or None where the run has none)."""
    kernels = read(folder, "kernels-cuda.json")
    rows, pairs = kernels.get("rows", []), {pair["pair"]: pair["ratio"] for pair in kernels.get("pairs", [])}
    eager, hook = read(folder, "eager.json"), {row["kernel"]: row["time_to_plain"] for row in read(folder, "hook.json").get("rows", [])}

    def copy(kernel: str, density: float | None = None) -> float | None:
        """x device-to-device copy, of the row whose density is near, or that has none."""
        near = [row for row in rows if row["kernel"] == kernel and (row["density"] is None if density is None else abs((row["density"] or 0) - density) < density / 2)]
        return near[0]["ratio_memcpy"] if near else None

    out = []
    for recursion in ("dgc", "ef14", "econtrol"):
        for density in (0.001, 0.01, 0.08):
            out.append((f"{recursion}_topk_sampled, {density:.1%}, x copy", "at least", 0.85, copy(f"{recursion}_topk_sampled", density)))
    for recursion in ("dgc", "ef14"):
        out.append((f"{recursion}_topk_sampled, bf16 gradients, 1 %, x copy", "at least", 0.80, copy(f"{recursion}_topk_sampled_bf16grad", 0.01)))
    out.append(("decode of 8 payloads, 1 %, x copy", "at least", 0.67, copy("decode_topk_8", 0.01)))
    for kernel in ("ef14_sign", "econtrol_sign_512"):
        out.append((f"{kernel}, x copy", "at least", 0.85, copy(kernel)))
    out.append(("ordered against unordered selection, time", "at most", 1.10, pairs.get("ordered against unordered selection")))
    out.append(("161 ResNet-50 layers against one array, time", "at most", 1.30, pairs.get("161 ResNet-50 layers against one array")))
    out.append(("torch.topk by exact selection, time", "at least", 4.0, eager.get("topk_to_exact")))
    out.append(("exact selection by the fused EF14 step, time", "at most", 3.0, eager.get("exact_to_fused")))
    out.append(("torch's eager 1-bit step by ef14_sign, time", "at least", 4.0, eager.get("eager_to_ef14_sign")))
    out.append(("hook with codec=none by plain DDP, time", "at most", 1.10, hook.get("hook_none")))
    return out


def verdict(direction: str, goal: float, number: float | None) -> str:
    if number is None:
        return "not measured"
    return "met" if (number >= goal if direction == "at least" else number <= goal) else "MISSED"


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    lines = [[what, f"{direction} {goal:.2f}", "-" if number is None else f"{number:.2f}", verdict(direction, goal, number)] for what, direction, goal, number in reached(pathlib.Path(sys.argv[1]))]
    print(report.table(["goal", "wanted", "reached", ""], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
