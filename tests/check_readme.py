#!/usr/bin/env python3
"""Runs what README.md shows: its commands, its Python and its C++ fragment, its links. Of launch/README.md it checks that the files it names are there.

check_readme.py --prefix FOLDER    FOLDER: an installed thinwire (cmake --install), which the C++ fragment is built against

A command runs as it stands, with the options of SHORTER appended where a whole run would be long. A command that is new
in README runs as it stands, so a long one needs a line there.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHORTER = {
    "./launch/quickstart": ["--epochs", "1", "--subset", "2000", "--output", "{scratch}", "--json", "{scratch}/quickstart.json"],
    "mpirun -np 2 build/launch/thinwire_train --config dgc:density=0.01": ["--epochs", "1", "--subset", "2000"],
    "./tests/run": ["--help"],
    "./bench/run": ["--help"],
}
STARTS = ("./", "torchrun ", "mpirun ", "build/", "thinwire ")
FRAGMENT = """
#include <cstdio>
#include <vector>
{includes}
int main(int argc, char** argv) {{
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  {{
    std::vector<float> weights(1024 * 1024 + 1024, 1.0f), grad(weights.size());
    const int steps = 3;
    auto backward = [](const std::vector<float>& w, std::vector<float>& g) {{ g = w; }};
    auto update = [](std::vector<float>& w, const std::vector<float>& g) {{ for (std::size_t i = 0; i < w.size(); ++i) w[i] -= 0.1f * g[i]; }};
{body}
    std::printf("step %d, w[last] %.3f\\n", int(reducer.step()), double(weights.back()));
  }}
  MPI_Finalize();
}}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(fragment LANGUAGES CXX)
find_package(thinwire REQUIRED)
add_executable(fragment fragment.cpp)
target_link_libraries(fragment PRIVATE thinwire::collectives)
"""
PREAMBLE = """
import os, torch
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, model, loss = 0, torch.nn.Linear(256, 256), torch.nn.MSELoss()
loader = [(torch.randn(4, 256), torch.randn(4, 256)) for _ in range(3)]
"""


def run(command, **more):
    shown = " ".join(map(str, command))
    environment = {**os.environ, "PATH": f"{ROOT / 'build' / 'bin'}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", **more.pop("env", {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL, env=environment, **more)
    if done.returncode != 0:
        raise RuntimeError(f"{shown}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    print(f"ok    {shown}", flush=True)
    return done


def commands(text):
    fenced = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line.strip() and not line.startswith("#")]
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    concrete = [span for span in inline if span.startswith(STARTS) and " " in span and not re.search(r"\b[A-Z]{4,}\b", span)]
    return list(dict.fromkeys(fenced + concrete))


def missing_files(name):
    """What a page of this clone names in its commands, code spans and links and what is not there, now that setup has built."""
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    links = {link: page.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)}
    words = " ".join(re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))).split()
    folders = [entry.name for entry in ROOT.iterdir() if entry.is_dir() and not entry.name.startswith(".") and entry.name != "out"] + ["."]  # out: what runs write
    paths = {word: ROOT / word for word in words if "/" in word and word.split("/")[0] in folders}
    return [f"{name}: no such file: {word}" for word, path in (links | paths).items() if not path.exists()]


def run_command(command, scratch):
    for start, options in SHORTER.items():
        if command.startswith(start):
            command = " ".join([command] + [option.format(scratch=scratch) for option in options])
            break
    run(["bash", "-c", command], cwd=ROOT)


def run_python(code, scratch):
    file = scratch / "fragment.py"
    file.write_text(PREAMBLE + code + "\nassert state.step == 3\ndist.destroy_process_group()\n")
    run([sys.executable, file], cwd=scratch)


def run_cpp(code, prefix, scratch):
    includes = "\n".join(line for line in code.splitlines() if line.startswith("#include"))
    body = "\n".join("    " + line for line in code.splitlines() if not line.startswith("#include"))
    (scratch / "fragment.cpp").write_text(FRAGMENT.format(includes=includes, body=body))
    (scratch / "CMakeLists.txt").write_text(PROJECT)
    run(["cmake", "-G", "Ninja", "-S", scratch, "-B", scratch / "build", f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release"])
    run(["cmake", "--build", scratch / "build"])
    done = run(["mpirun", "-np", "2", scratch / "build" / "fragment"])
    if "step 3, w[last] 0.729" not in done.stdout:  # 0.9^3: a mean of equal gradients is the gradient
        raise RuntimeError(f"the C++ fragment printed {done.stdout!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", required=True, type=pathlib.Path)
    options = parser.parse_args()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    failures = missing_files("README.md") + missing_files("launch/README.md")
    missing = len(failures)
    python = re.findall(r"```python\n(.*?)```", text, re.S)
    cpp = re.findall(r"```cpp\n(.*?)```", text, re.S)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(run_command, (command, folder)) for command in commands(text)]
        for number, code in enumerate(python + cpp):
            scratch = pathlib.Path(folder) / str(number)
            scratch.mkdir()
            jobs.append((run_python, (code, scratch)) if code in python else (run_cpp, (code, options.prefix, scratch)))
        for job, arguments in jobs:
            try:
                job(*arguments)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failures.append(str(error))
    print("\n".join(failures + [f"README: {len(jobs) - len(failures) + missing} of {len(jobs)} commands and fragments ran" if jobs else "README shows nothing that runs"]))
    return 1 if failures or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
