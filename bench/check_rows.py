"""Runs every kernel once at a small size and checks that its rows are what README and scripts rely on:  python bench/check_rows.py PROGRAM"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile

KEYS = {"kernel", "isa", "backend", "numel", "density", "bytes_per_element", "seconds_median", "seconds_min", "gb_per_s", "ratio_memcpy", "ratio_axpy"}
EXPECTED = {"memcpy", "axpy", "dgc_topk_sampled", "ef14_topk_sampled", "none_topk_sampled", "dgc_topk_exact", "decode_topk_8", "none_norms", "dgc_dense",
            "ef14_sign", "ef14_sign_512", "averaged_ef14_sign", "none_sign", "decode_sign_8"}
NUMEL = 70001  # one block of 64 Ki and a ragged second one


def main():
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.json"
        subprocess.run([sys.argv[1], f"--numel={NUMEL}", "--reps=2", "--json", file], check=True)
        rows = json.loads(file.read_text())["rows"]
    wrong = []
    for row in rows:
        if set(row) != KEYS:
            wrong.append(f"{row.get('kernel')}: keys {sorted(set(row) ^ KEYS)} are missing or unknown")
            continue
        numbers = [row[key] for key in KEYS - {"kernel", "isa", "backend", "density"}]
        if not all(math.isfinite(x) and x > 0 for x in numbers) or row["seconds_min"] > row["seconds_median"]:
            wrong.append(f"{row['kernel']}: {row}")
        if row["backend"] != "cpu" or row["isa"] not in ("scalar", "avx2", "avx512", None) or row["numel"] != NUMEL:
            wrong.append(f"{row['kernel']}: {row}")
        if ("topk" in row["kernel"]) != (row["density"] is not None):
            wrong.append(f"{row['kernel']}: density {row['density']}")
    wrong += [f"{name}: no row" for name in sorted(EXPECTED - {row["kernel"] for row in rows})]
    print("\n".join(wrong) or f"{len(rows)} rows are as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
