"""What every benchmark writes: one JSON object, and tables for people."""

import argparse
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def new_file(text):
    """An argparse type: a file that can be written at the end of a long run, refused at its beginning if not."""
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: it needs a folder that exists and may be written to")
    return path


def version():
    return re.search(r"project\(thinwire VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)


def commit():
    """As bench/run found it when it started, so that a long run names the tree that it measured."""
    if "THINWIRE_COMMIT" in os.environ:
        return os.environ["THINWIRE_COMMIT"]
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def cpu_model():
    """The model name; virtual machines hide it, so family and model stand beside it."""
    fields = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']} model {fields['model']})" if "model" in fields else name


def instruction_sets():
    words = set(re.search(r"^flags\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text() + "\nflags : \n", re.M).group(1).split())
    return ["scalar"] + [name for name, flag in (("avx2", "avx2"), ("avx512", "avx512bw")) if flag in words]


def machine(**more):
    """`load`: runnable processes on average over the last minute before this run; a number near 0 means that nothing else ran."""
    memory = int(re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text()).group(1))
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "isas": instruction_sets(),
        "memory_gib": round(memory / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),
        **more,
    }


def write(path, command, about, rows):
    text = json.dumps({"command": command, "version": version(), "machine": about, "rows": rows}, indent=1)
    pathlib.Path(path).write_text(text + "\n")


def command_line():
    return shlex.join(["./bench/run", pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]])


def script_line():
    """Of a measurement that bench/run does not start: it would set up a machine that tests/run_gpu takes as it is."""
    return shlex.join(["python", f"bench/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]])


def table(headers, rows):
    """Text columns, the first one left, the others right."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def warn_if_loaded():
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"note: the load of this machine was {load:.1f} before this run; paired ratios move by 5 to 15 % then", flush=True)
