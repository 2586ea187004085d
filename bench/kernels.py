"""./bench/run kernels: every kernel beside memcpy and in-place axpy in the same repetitions, then beside torch's eager operations, and the hook beside plain DDP."""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import report

EAGER = ("dgc", "ef14", "ef14_sign")
HOOK = "hook_none"
HOOK_STEPS = 4  # steps per repetition: two processes on a shared machine need more of them than a kernel does


def eager_name(recursion):
    return f"{recursion}_eager" + ("" if recursion.endswith("_sign") else "/0.005")


def arguments():
    parser = argparse.ArgumentParser(prog="bench/run kernels", description="Every kernel beside memcpy, in-place axpy and torch's eager operations: medians "
                                     "of the ratios of paired repetitions, one thread.")  # fmt: skip
    parser.add_argument("--numel", type=int, default=32 << 20, help="elements of the arrays (default: 32 Mi)")
    parser.add_argument("--reps", type=int, default=11, help="repetitions (default: 11); fewer than 9 are noise")
    parser.add_argument("--isa", choices=("auto", "scalar", "avx2", "avx512"), default="auto", help="auto: the best that this CPU has")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only kernels whose <name>/<density> it finds (see --list)")
    parser.add_argument("--json", metavar="FILE", type=report.new_file, help='writes {"command", "version", "machine", "rows"}')
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args()
    if args.numel < 1 or args.reps < 1:
        parser.error("--numel and --reps are at least 1")
    try:
        re.compile(args.filter)
    except re.error as error:
        parser.error(f"--filter {args.filter} is not a regular expression: {error}")
    return args


def main():
    args = arguments()
    about = report.machine()
    program = pathlib.Path(os.environ["THINWIRE_BUILD"]) / "bench" / "thinwire_bench_kernels"
    options = [f"--numel={args.numel}", f"--reps={args.reps}", f"--isa={args.isa}"]
    options += [f"--filter={args.filter}"] if args.filter else []  # CLI11 takes the word after an empty --filter= for its value
    if args.list:
        sys.stdout.flush()
        done = subprocess.run([program, *options, "--list"])
        for name in [*map(eager_name, EAGER), HOOK]:
            if re.search(args.filter, name):
                print(name)
        return done.returncode
    report.warn_if_loaded()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.json"
        done = subprocess.run([program, *options, "--json", file])
        if done.returncode != 0:
            return done.returncode
        rows = json.loads(file.read_text())["rows"]

    chosen = [name for name in EAGER if re.search(args.filter, eager_name(name))]
    if chosen:
        import eager  # torch is slow to import and not needed for the rest

        print("\nBeside torch's eager operations (one thread; top-k's threshold given to them; sign: a DeepSpeed-style worker step)")
        lines = []
        cpus = os.sched_getaffinity(0)
        for name in chosen:
            (ours, theirs), faster = eager.measure(name, args.numel, args.reps, args.isa)
            os.sched_setaffinity(0, cpus)  # it was pinned, and what starts later inherits
            rows += [ours | {"paired_time": None}, theirs | {"paired_time": faster}]
            for row in (ours, theirs):
                lines.append([row["kernel"], row["isa"] or "-", "-" if row["density"] is None else f"{row['density'] * 100:.3f}", f"{row['seconds_median'] * 1e3:.2f}",
                              f"{row['ratio_memcpy']:.2f}", f"{faster:.1f}x" if row is ours else ""])  # fmt: skip
        print(report.table(["kernel", "isa", "density%", "ms", "x memcpy", "faster than eager"], lines))
    if re.search(args.filter, HOOK):
        import hook_overhead

        print("\nThe hook with codec=none beside plain DDP (Gloo, two processes, 25 MB of gradients)")
        more, paired = hook_overhead.measure(HOOK_STEPS * args.reps)
        rows += [row | {"paired_time": x} for row, x in zip(more, paired)]
        lines = [[row["kernel"], f"{row['seconds_median'] * 1e3:.2f}", f"{row['seconds_min'] * 1e3:.2f}", f"{x:.3f}x"] for row, x in zip(more, paired)]
        print(report.table(["step", "ms", "ms best", "time to plain DDP"], lines))
    if args.json:
        report.write(args.json, report.command_line(), about, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
