#!/usr/bin/env python3
"""Compiles each public header of the core alone: whoever includes one needs no other before it.

check_headers.py --compiler CXX [--without FOLDER] [--part HEADER] [--jobs N] INCLUDE_FOLDER...    exits 1 naming the headers that do not stand alone
"""

import argparse
import concurrent.futures
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-ffp-contract=off"]


def compile_alone(compiler, folders, header):
    # Twice, through a file of its own: a missing #pragma once shows too.
    text = f'#include "{header}"\n' * 2 + "int main() {}\n"
    command = [compiler, *FLAGS, f"-I{ROOT}", *(part for folder in folders for part in ("-isystem", folder)), "-x", "c++", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        return f"{header}:1: does not compile alone\n" + "\n".join(done.stderr.strip().splitlines()[:6])
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--without", action="append", default=[], help="a folder whose library this build lacks")
    parser.add_argument("--part", action="append", default=[], help="a header that is a piece of its includers, not installed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("folders", nargs="*")
    options = parser.parse_args()
    headers = [h.relative_to(ROOT).as_posix() for top in ("compressors", "collectives") for h in sorted((ROOT / top).rglob("*.hpp"))]
    left_out = [h for h in headers if any(h.startswith(folder + "/") for folder in options.without)]
    headers = [h for h in headers if h not in left_out + options.part]
    if not headers:
        sys.exit(f"no headers under {ROOT}")
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        failures = [f for f in pool.map(lambda h: compile_alone(options.compiler, options.folders, h), headers) if f]
    print("\n".join(failures + [f"{h}: left out, this build lacks its library" for h in left_out]
                    + [f"headers: {len(headers) - len(failures)} of {len(headers)} compile alone"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
