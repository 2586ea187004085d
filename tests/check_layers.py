#!/usr/bin/env python3
"""The dependency direction of the house, over every #include and every Python import; prints file:line of each offence and exits 1.

    check_layers.py [ROOT]        checks a tree (default: this repository)
    check_layers.py --self-test   checks that each rule catches an offence

torch_ext -> collectives -> compressors/core and torch_ext -> compressors/* (of the transports it knows NCCL's); a codec family sees compressors/core, compressors/feedback and itself;
only compressors/registry.cpp sees all families; bench, tests and launch may include everything. No cycles, no grab-bag names, no #ifdef of optional
parts: an optional part is a file that CMake picks, or its no_*.cpp twin. A .cpp that no CMakeLists.txt names is built by nobody and reported too.
"""

import ast
import pathlib
import re
import sys
import tempfile

CODE = ("compressors", "collectives", "torch_ext", "tests", "bench", "launch")
FREE = ("tests", "bench", "launch")
OWN_CONDITIONS = ("tests/", "bench/", "launch/", "collectives/mpi/", "collectives/nccl/")  # an optional part may ask for its library's version
GRAB_BAG = re.compile(r"(^|_)(utils?|commons?|misc|helpers?)($|_)")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b(.*)")
OPTIONAL = re.compile(r"\b(?:THINWIRE_|HAVE_|WITH_|USE_)\w*|\b__AVX\w*|\b\w*(?:MPI|NCCL)\w*")
FOREIGN = {  # outside libraries, and who may include them beside tests, bench and launch
    re.compile(r"^(torch|ATen|c10|pybind11|caffe2)/|^Python\.h$"): ("torch_ext/",),
    re.compile(r"^mpi(-ext)?\.h$"): ("collectives/mpi/",),
    re.compile(r"^nccl\.h$"): ("collectives/nccl/", "torch_ext/"),
}


def layer(path):
    """compressors/topk/topk.cpp -> compressors/topk, collectives/mpi/mpi.cpp -> collectives/mpi, torch_ext/src/hook.cpp -> torch_ext."""
    parts = path.split("/")
    if parts[0] in ("compressors", "collectives") and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0]


def allowed(path, target):
    here, there = layer(path), layer(target)
    if here in FREE:
        return True
    if here == "torch_ext":
        return there in ("torch_ext", "collectives", "collectives/nccl") or there.startswith("compressors/")
    if here == "compressors":  # files of no family: the registry
        return path == "compressors/registry.cpp" and there.startswith("compressors/")
    if here == "compressors/core":
        return there == "compressors/core"
    if here.startswith("compressors/"):
        return there in ("compressors/core", "compressors/feedback", here)
    if here == "collectives":
        return there in ("compressors/core", "collectives")
    return there in ("compressors/core", "collectives", here)  # a transport


def check_include(root, path, number, bracket, target, graph):
    if bracket == "<":
        for pattern, owners in FOREIGN.items():
            if pattern.search(target) and not path.startswith(owners + tuple(f"{free}/" for free in FREE)):
                yield f"{path}:{number}: {layer(path)} may not include <{target}>"
        return
    if target.startswith("thinwire/"):  # written by CMake
        return
    if not (root / target).is_file():
        yield f'{path}:{number}: "{target}" does not name a file from the root of the repository'
        return
    graph.setdefault(path, {})[target] = number
    if not allowed(path, target):
        yield f"{path}:{number}: {layer(path)} may not include {layer(target)}/"


def check_cpp(root, path, text, graph):
    for number, line in enumerate(text.splitlines(), 1):
        if include := INCLUDE.match(line):
            yield from check_include(root, path, number, include[1], include[2], graph)
        elif path.startswith(OWN_CONDITIONS):
            continue
        elif (condition := CONDITION.match(line)) and (word := OPTIONAL.search(condition[1])):
            yield f"{path}:{number}: {word[0]} decides by preprocessor; make it a file that CMake picks, or its no_*.cpp twin"


def check_python(path, text):
    if not path.startswith("torch_ext/"):
        return
    for node in ast.walk(ast.parse(text, path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in FREE:
                yield f"{path}:{node.lineno}: torch_ext may not import {name}"


def check_cycles(graph):
    done, trail = set(), []

    def visit(path):
        if path in trail:
            ring = trail[trail.index(path):] + [path]
            yield f"{ring[-2]}:{graph[ring[-2]][path]}: includes in a circle: {' -> '.join(ring)}"
        elif path not in done:
            trail.append(path)
            for target in graph.get(path, {}):
                yield from visit(target)
            trail.pop()
            done.add(path)

    for path in sorted(graph):
        yield from visit(path)


def check_built(root, path):
    stem = re.compile(rf"\b{re.escape(pathlib.PurePosixPath(path).stem)}\b")
    lists = [root / folder / "CMakeLists.txt" for folder in pathlib.PurePosixPath(path).parents]
    if not any(stem.search(file.read_text(encoding="utf-8")) for file in lists if file.is_file()):
        yield f"{path}:1: no CMakeLists.txt names this file"


def check(root):
    graph, found = {}, []
    for top in CODE + ("cmake", "docs"):
        for file in sorted((root / top).rglob("*")):
            path = file.relative_to(root).as_posix()
            if "__pycache__" in path or not file.is_file():
                continue
            for part in pathlib.PurePosixPath(path).parts:
                if GRAB_BAG.search(part.split(".")[0].lower()):
                    found.append(f"{path}:1: '{part}' says nothing about what is inside; name it for that")
            if file.suffix in (".cpp", ".hpp", ".cu", ".cuh", ".h"):
                found += check_cpp(root, path, file.read_text(encoding="utf-8"), graph)
                if file.suffix in (".cpp", ".cu"):
                    found += check_built(root, path)
            elif file.suffix == ".py":
                found += check_python(path, file.read_text(encoding="utf-8"))
    return found + list(check_cycles(graph))


OFFENCES = {  # file -> (text, what the report must say)
    "collectives/zz.hpp": ('#include "compressors/sign/sign.hpp"\n', "collectives/zz.hpp:1: collectives may not include compressors/sign/"),
    "compressors/sign/a.cpp": ('\n#include "compressors/topk/topk.hpp"\n', "compressors/sign/a.cpp:2: compressors/sign may not include compressors/topk/"),
    "compressors/core/b.cpp": ('#include "compressors/feedback/f.hpp"\n', "compressors/core/b.cpp:1: compressors/core may not include"),
    "compressors/topk/c.cpp": ('#include "collectives/zz.hpp"\n', "compressors/topk/c.cpp:1: compressors/topk may not include collectives/"),
    "collectives/mpi/d.cpp": ('#include "collectives/loopback/l.hpp"\n', "collectives/mpi/d.cpp:1: collectives/mpi may not include"),
    "collectives/e.cpp": ("#include <torch/torch.h>\n", "collectives/e.cpp:1: collectives may not include <torch/torch.h>"),
    "compressors/core/g.hpp": ('#include "compressors/core/h.hpp"\n', "includes in a circle"),
    "compressors/core/h.hpp": ('#include "compressors/core/g.hpp"\n', "compressors/core/g.hpp -> compressors/core/h.hpp"),
    "compressors/core/i.cpp": ('#include "h.hpp"\n', "compressors/core/i.cpp:1: \"h.hpp\" does not name"),
    "collectives/j.cpp": ("#ifdef THINWIRE_WITH_MPI\n#endif\n", "collectives/j.cpp:1: THINWIRE_WITH_MPI decides"),
    "tests/test_forgotten.cpp": ("", "tests/test_forgotten.cpp:1: no CMakeLists.txt names this file"),
    "bench/string_utils.py": ("", "bench/string_utils.py:1: 'string_utils.py'"),
    "torch_ext/thinwire/k.py": ("import os\nfrom bench.run import main\n", "torch_ext/thinwire/k.py:2: torch_ext may not import bench.run"),
}
HARMLESS = {
    "compressors/sign/sign.hpp": '#include "compressors/feedback/f.hpp"\n',
    "compressors/topk/topk.hpp": "#ifdef __CUDACC__\n#endif\n",
    "compressors/feedback/f.hpp": '#include "compressors/core/k.hpp"\n',
    "compressors/core/k.hpp": "#include <vector>\n",
    "compressors/registry.cpp": '#include "compressors/sign/sign.hpp"\n#include "compressors/topk/topk.hpp"\n',
    "collectives/loopback/l.hpp": '#include "compressors/core/k.hpp"\n',
    "collectives/mpi/m.cpp": "#include <mpi.h>\n",
    "torch_ext/src/n.cpp": '#include <torch/extension.h>\n#include "collectives/zz.hpp"\n#include "compressors/topk/topk.hpp"\n',
    "tests/CMakeLists.txt": "add_executable(o o.cpp)\n",
    "CMakeLists.txt": "registry m n\n",
    "tests/o.cpp": '#include "compressors/topk/topk.hpp"\n#include <mpi.h>\n',
}


def self_test():
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for path, text in [(p, t[0]) for p, t in OFFENCES.items()] + list(HARMLESS.items()):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        report = check(root)
    missed = [f"not caught: {want}" for _, want in OFFENCES.values() if not any(want in line for line in report)]
    return missed + [f"wrongly reported: {line}" for line in report if line.split(":")[0] in HARMLESS]


def main():
    if sys.argv[1:] == ["--self-test"]:
        found, what = self_test(), f"{len(OFFENCES)} offences caught"
    else:
        root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent.parent
        found, what = check(root), "every include points downwards"
    print("\n".join(found) or f"layers: {what}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
