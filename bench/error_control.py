"""Error feedback side by side on small problems, over the engine and in double precision, and a picture of distances and residuals. Exit 1 where a number is not as expected."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import report

PANELS = (("quadratics", None), ("least_squares", 0), ("least_squares", 10), ("least_squares", 100))


def parse():
    parser = argparse.ArgumentParser(prog="bench/run error_control", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two tables only, a quarter of a minute")
    parser.add_argument("--search", action="store_true", help="instead of all tables: the losses of the small network at every rate of the grid from which its rates come, a quarter of an hour")
    parser.add_argument("--json", metavar="FILE", type=report.new_file, help='writes {"command", "version", "machine", "rows"}')
    parser.add_argument("--plot", metavar="PNG", type=pathlib.Path, default=report.ROOT / "build" / "error_control.png", help="where the picture goes (default: %(default)s)")
    return parser.parse_args()


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(section, zeta, [row for row in rows if row["section"] == section and row.get("zeta") == zeta and "distance" in row]) for section, zeta in PANELS]
    panels = [panel for panel in panels if panel[2]]
    figure, axes = pyplot.subplots(2, len(panels), figsize=(4.2 * len(panels), 7), layout="constrained", squeeze=False, sharey="row")
    for column, (section, zeta, curves) in enumerate(panels):
        for row in curves:
            at = [i * row["every"] for i in range(len(row["distance"]))]
            for axis, values in ((axes[0][column], row["distance"]), (axes[1][column], row["residual"])):
                shown = [(x, y) for x, y in zip(at, values) if y is not None and 0 < y < 1e6]
                axis.semilogy([x for x, _ in shown], [y for _, y in shown], label=row["method"], linewidth=1)
        axes[0][column].set_title("three quadratics: |x|²" if section == "quadratics" else f"least squares, zeta = {zeta:g}: |grad f|²")
        axes[1][column].set(title="|residual| of rank 0", xlabel="step")
        axes[0][column].legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    args = parse()
    about = report.machine()
    program = pathlib.Path(os.environ["THINWIRE_BUILD"]) / "bench" / "thinwire_bench_error_control"
    if args.search:
        return subprocess.run([program, "--search"]).returncode
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.json"
        done = subprocess.run([program, "--json", file, *(["--quick"] if args.quick else [])])
        if not file.exists():
            return done.returncode or 1
        rows = json.loads(file.read_text())["rows"]
    plot(rows, args.plot)
    print(f"picture: {args.plot}")
    if args.json:
        curves = ("every", "distance", "residual")  # they are in the picture
        report.write(args.json, report.command_line(), about, [{key: value for key, value in row.items() if key not in curves} for row in rows])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
