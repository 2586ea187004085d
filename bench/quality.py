"""./bench/run quality: does training with compression end where dense training ends? Exit 1 if a gate does not hold."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import report

EXPERIMENTS = {
    "teacher": "a perceptron that learns from a random one; 4 ranks as threads over the engine, every method; gates relative to dense",
    "fashion": "Fashion-MNIST by two DDP processes through launch/quickstart, 3 epochs; DGC at 1 % and .1 % within a point of dense",
}
FASHION = ("dgc:density=0.01", "dgc:density=0.001")
POINTS = 1.0  # by which the mean accuracy over the seeds may be below dense


def arguments():
    text = "experiments\n" + "\n".join(f"  {name:9} {what}" for name, what in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(prog="bench/run quality", description=__doc__.split(": ", 1)[1], epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=EXPERIMENTS, metavar="NAME", help="one experiment: " + ", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per method (default: 3)")
    parser.add_argument("--json", metavar="FILE", help='writes {"command", "version", "machine", "rows"}; a row has its seed')
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    return args


def teacher(seeds, folder):
    program = pathlib.Path(os.environ["THINWIRE_BUILD"]) / "bench" / "thinwire_bench_teacher"
    file = folder / "teacher.json"
    done = subprocess.run([program, f"--seeds={seeds}", "--json", file])
    if not file.exists():
        raise SystemExit(done.returncode or 1)
    return json.loads(file.read_text())["rows"], done.returncode == 0


def fashion(seeds, folder):
    rows = []
    for seed in range(seeds):
        file = folder / f"fashion-{seed}.json"
        command = [sys.executable, report.ROOT / "launch" / "quickstart.py", "--world=2", "--epochs=3", f"--seed={seed}", "--json", file, "--output", folder]
        for config in FASHION:
            command += ["--config", config]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(1)
        rows += [row | {"seed": seed} for row in json.loads(file.read_text())["rows"]]
    last = [row for row in rows if row["epoch"] == 3]
    means, lines = {}, []
    for config in ("codec=none", *FASHION):
        mine = [row for row in last if row["config"] == config]
        means[config] = statistics.mean(row["accuracy"] for row in mine)
        lines.append([config, len(mine), f"{means[config] * 100:.2f}", f"{(means['codec=none'] - means[config]) * 100:+.2f}",
                      f"{statistics.mean(row['dense_bytes'] / row['wire_bytes'] for row in mine):.1f}",
                      f"{statistics.mean(row['seconds'] for row in mine):.0f}"])  # fmt: skip
    print(report.table(["config", "seeds", "accuracy%", "points below dense", "factor", "s"], lines))
    violated = [config for config in FASHION if (means["codec=none"] - means[config]) * 100 > POINTS]
    for config in violated:
        print(f"gate violated: {config}: {means[config]:.2%} against {means['codec=none']:.2%} dense, allowed is {POINTS} point")
    return rows, not violated


def main():
    args = arguments()
    about = report.machine()
    rows, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        for name, run in (("teacher", teacher), ("fashion", fashion)):
            if args.only in (None, name):
                print(f"\n{name}: {EXPERIMENTS[name]}", flush=True)
                more, held = run(args.seeds, pathlib.Path(folder))
                rows += more
                good = good and held
    if args.json:
        report.write(args.json, report.command_line(), about, rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
