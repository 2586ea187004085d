"""Runs every kernel once at a small size and checks that its rows are what README and scripts rely on:  python bench/check_rows.py PROGRAM [cuda]"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile

KEYS = {"kernel", "isa", "backend", "numel", "density", "bytes_per_element", "seconds_median", "seconds_min", "gb_per_s", "ratio_memcpy", "ratio_axpy"}
PAIRED = {"cpu": {"paired_time"}, "cuda": set()}
EXPECTED = {"dgc_topk_sampled", "ef14_topk_sampled", "econtrol_topk_sampled", "none_topk_sampled", "dgc_topk_exact", "decode_topk_8", "ef14_sign", "ef14_sign_512", "ef14_sign_tensor", "averaged_ef14_sign",
            "econtrol_sign_512", "none_sign", "decode_sign_8"}
ALONE = {"cpu": {"memcpy", "axpy", "none_norms", "dgc_dense", "ef14_look", "ef21_topk_sampled"}, "cuda": {"dgc_topk_sampled_bf16grad", "ef14_topk_sampled_unordered", "ef14_topk_sampled_u32"}}
ISA = {"cpu": ("scalar", "avx2", "avx512", None), "cuda": (None,)}
BYTES = {"ef14_sign": 12.125 + 4 / 1024, "ef14_sign_512": 12.125 + 4 / 512, "averaged_ef14_sign": 16.125 + 4 / 1024, "none_sign": 4.125 + 4 / 1024, "econtrol_sign_512": 20.125 + 4 / 512, "decode_sign_8": 5 + 32 / 1024}
NUMEL = 70001  # one block of 64 Ki and a ragged second one


def main():
    backend = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.json"
        subprocess.run([sys.argv[1], f"--numel={NUMEL}", "--reps=2", "--json", file], check=True)
        rows = json.loads(file.read_text())["rows"]
    wrong = []
    for row in rows:
        if set(row) != KEYS | PAIRED[backend]:
            wrong.append(f"{row.get('kernel')}: keys {sorted(set(row) ^ (KEYS | PAIRED[backend]))} are missing or unknown")
            continue
        numbers = [row[key] for key in KEYS - {"kernel", "isa", "backend", "density"} - ({"ratio_axpy"} if backend == "cuda" else set())]
        if not all(math.isfinite(x) and x > 0 for x in numbers) or row["seconds_min"] > row["seconds_median"]:
            wrong.append(f"{row['kernel']}: {row}")
        if row["backend"] != backend or row["isa"] not in ISA[backend] or row["numel"] != NUMEL:
            wrong.append(f"{row['kernel']}: {row}")
        if row["kernel"] in BYTES and not math.isclose(row["bytes_per_element"], BYTES[row["kernel"]]):
            wrong.append(f"{row['kernel']}: {row['bytes_per_element']} bytes per element")
        if ("topk" in row["kernel"]) != (row["density"] is not None):
            wrong.append(f"{row['kernel']}: density {row['density']}")
    wrong += [f"{name}: no row" for name in sorted((EXPECTED | ALONE[backend]) - {row["kernel"] for row in rows})]
    print("\n".join(wrong) or f"{len(rows)} rows are as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
