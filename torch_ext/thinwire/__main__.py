"""The command line: ``thinwire`` or ``python -m thinwire``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ._extension import VERSION, native
from .config import Config
from .dense_rule import all_dense
from .errors import ArgumentError, ConfigError, Error
from .info import build_info, machine
from .replay import Replay, replay

_EXIT = "exit codes: 0 well, 1 something failed, 2 a wrong command line, configuration or file"


def main(argv: Sequence[str] | None = None) -> int:
    """@returns the exit code: 0, 1 or 2."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=False)
    try:
        rows = arguments.run(arguments, console)
        if arguments.json:
            outcome = {"command": arguments.verb, "version": VERSION, "machine": machine(), "rows": rows}
            arguments.json.write_text(json.dumps(outcome, indent=1) + "\n")
    except (ConfigError, ArgumentError, _Refused) as error:
        print(f"thinwire {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except (Error, OSError) as error:
        print(f"thinwire {arguments.verb}: {error}", file=sys.stderr)
        return 1
    return 0


class _Refused(Exception):
    """An argument that is no configuration was wrong."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="thinwire",
        description="Communication compression for distributed training.",
        epilog=_EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"thinwire {VERSION}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, help_: str, epilog: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=help_, description=help_ + ".", epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.add_argument("--json", metavar="FILE", type=_new_file, help="write {command, version, machine, rows} there as well")
        made.set_defaults(run=run)
        return made

    grammar = "CONFIG is " + native.grammar_help() + "\n" + _EXIT
    verb("info", _info, "what this build is and what it found", _EXIT)
    check = verb("check", _check, "print a configuration in full, the bytes it will send and what they cost", grammar)
    check.add_argument("config", metavar="CONFIG")
    check.add_argument(
        "--numel",
        type=lambda text: _count(text, 2**60),
        default=1 << 20,
        metavar="N",
        help="elements of a tensor of two dimensions (default %(default)s)",
    )
    check.add_argument("--world", type=lambda text: _count(text, 2**20), default=8, metavar="W", help="ranks (default %(default)s)")
    rerun = verb("replay", _replay, "run a configuration over recorded gradients, ranks as threads", _REPLAY_FILE + grammar)
    rerun.add_argument("config", metavar="CONFIG")
    rerun.add_argument("file", metavar="FILE", help="gradients: .safetensors or .npz")
    rerun.add_argument("--plot", metavar="PNG", type=_new_picture, help="draw bytes and norms per step")
    return parser


_REPLAY_FILE = "FILE holds one array per parameter, name -> (steps, world, *shape), all fp32, all bf16 or all fp16:\n  numpy.savez('gradients.npz', **arrays)\n\n"


def _new_file(text: str) -> Path:
    """A file that can be written when the work is done."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: it needs a folder that exists and may be written to")
    return path


def _new_picture(text: str) -> Path:
    if Path(text).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text}: a picture ends in .png, .svg or .pdf")
    return _new_file(text)


def _count(text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= (value := int(text)) <= most:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to {most}")
    return value


def _info(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    info = build_info()
    table = Table("what", "value", title=f"thinwire {VERSION}")
    for key, value in info.items():
        table.add_row(
            key.replace("_", " "), "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        )
    console.print(table)
    return [info]


def _print_warnings(config: Config, console: Console, more: Sequence[str] = ()) -> list[str]:
    warnings = [*native.config_warnings(config), *more]
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    return warnings


def _check(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    config, numel, world = Config.parse(arguments.config), arguments.numel, arguments.world
    unsent = all_dense(config, [numel], world) if numel >= config.min_numel else ""
    table = Table("slot", title="configuration")
    table.add_column("value", overflow="fold")  # all of it, however narrow the terminal
    for slot in str(config).split(" "):
        table.add_row(*slot.split("=", 1))
    console.print(table)
    warnings = _print_warnings(config, console, [unsent] if unsent else [])
    hints = [] if unsent else native.config_hints(config)  # what a config suits that does nothing is of no use
    for hint in hints:
        console.print(f"hint: {hint}", highlight=False)

    classes = [("tensor of two or more dimensions", numel)]
    small = min(numel, config.min_numel - 1)
    if small > 0 and not config.codec.startswith("none") and numel >= config.min_numel:
        classes.append(("bias, norm or small tensor", small))
    rows = []
    for name, count in classes:
        for stage in native.estimate(config, count, world):
            row = {"config": str(config), "world": world, "class": name, "numel": count, "warnings": warnings, "hints": hints, **stage}
            row["factor"] = stage["dense_bytes"] / stage["wire_bytes"] if stage["wire_bytes"] else 1.0
            row["seconds_1gbit"], row["dense_seconds_1gbit"] = stage["wire_bytes"] / 125e6, stage["dense_bytes"] / 125e6
            rows.append(row)
    for name, count in classes:
        table = Table(
            title=f"{name}: {count:,} fp32 elements, {world} ranks",
            caption="bytes per rank and step; ms: their time on a link of 1 Gbit/s, latency left out",
            padding=(0, 1) if console.width >= _WIDE else 0,
        )
        for column in ("step", "stage", "density", "payload", "sent", "factor", "ms", "dense ms"):
            table.add_column(column, justify="left" if column == "stage" else "right", overflow="fold", no_wrap=column != "stage")
        for row in (row for row in rows if row["class"] == name):
            table.add_row(
                "auto" if row["first_step"] is None else str(row["first_step"]),
                row["stage"],
                f"{row['density']:g}",
                _bytes(row["payload_bytes"]),
                _bytes(row["wire_bytes"]),
                f"{row['factor']:.1f}",
                _plain(1e3 * row["seconds_1gbit"]),
                _plain(1e3 * row["dense_seconds_1gbit"]),
            )
        console.print(table)
    return rows


_WIDE = 100
"""Columns of a terminal in which the table of `check` has room between its own."""


def _plain(value: float) -> str:
    """Three digits or more, and never an exponent."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def _replay(arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    config = Config.parse(arguments.config)
    for flag, target in (("--json", arguments.json), ("--plot", arguments.plot)):
        if target and target.exists() and Path(arguments.file).exists() and target.samefile(arguments.file):
            raise _Refused(f"{flag} {target} would overwrite the gradients")
    grads = _load(Path(arguments.file))
    _print_warnings(config, console)
    result = replay(config, grads)
    rows = _replay_rows(config, grads, result)
    table = Table(title=f"{arguments.file}: {len(rows)} steps, {rows[0]['world'] if rows else 0} ranks")
    for column in ("step", "payload B per rank", "gradient B", "received norm", "mean gradient norm"):
        table.add_column(column, justify="right")
    shown = rows if len(rows) <= 24 else rows[:12] + rows[-12:]
    for i, row in enumerate(shown):
        if len(rows) > 24 and i == 12:
            table.add_row("…", "", "", "", "")
        table.add_row(
            str(row["step"]),
            f"{row['payload_bytes']:,}",
            f"{row['gradient_bytes']:,}",
            f"{row['received_norm']:.6g}",
            f"{row['gradient_norm']:.6g}",
        )
    console.print(table)
    parameters = result.stats["parameters"]
    measures = [(key, name) for key, name in _MEASURES if any(key in p for p in parameters.values())]
    stats = Table(title="after the last step, rank 0")
    for column in ("parameter", "elements", "compressed", "kept", *(name for _, name in measures), "why not"):
        stats.add_column(column, justify="left" if column in ("parameter", "why not") else "right")
    for name, p in parameters.items():
        measured = (f"{p[key]:.6g}" if key in p else "-" for key, _ in measures)
        stats.add_row(name, f"{p['numel']:,}", "yes" if p["compressed"] else "no", f"{p['kept']:,}", *measured, p["reason"])
    console.print(stats)
    if result.stats["nonfinite_steps"]:
        console.print(f"steps with a gradient that is not finite, NaN on all ranks: {result.stats['nonfinite_steps']}", highlight=False)
    if arguments.plot:
        _plot(rows, str(config), arguments.plot)
        console.print(f"picture: {arguments.plot}")
    return rows


_MEASURES = (
    ("residual_norm", "residual norm"),
    ("server_residual_norm", "owner's residual norm"),
    ("measured_delta", "measured delta"),
    ("stale", "stale"),
    ("eta", "eta"),
    ("eta_cuts", "eta cuts"),
)
"""Keys of stats and their columns, of which a table has those that the configuration fills."""


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise _Refused(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise _Refused(f"{path}: reading it needs the package safetensors") from error
            return dict(load_file(str(path)))
        if path.suffix == ".npz":
            import numpy

            if not zipfile.is_zipfile(path):
                raise _Refused(f"{path}: not an .npz archive, which numpy.savez writes")
            with numpy.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except _Refused:
        raise
    except Exception as error:  # whatever the reader found: the file is not what its name says
        raise _Refused(f"{path}: {error}") from error
    raise _Refused(f"{path}: gradients come as .safetensors or .npz")


def _replay_rows(config: Config, grads: dict[str, torch.Tensor], result: Replay) -> list[dict[str, Any]]:
    steps, world = result.payload_bytes.shape
    gradient_bytes = sum(math.prod(t.shape[2:]) * t.element_size() for t in grads.values())
    rows = []
    for step in range(steps):
        received = math.sqrt(sum(float(t[step].double().square().sum()) for t in result.mean.values()))
        gradient = math.sqrt(sum(float(t[step].double().mean(dim=0).square().sum()) for t in grads.values()))
        rows.append(
            {
                "config": str(config),
                "world": world,
                "step": step,
                "payload_bytes": int(result.payload_bytes[step].max()),
                "gradient_bytes": gradient_bytes,
                "received_norm": received,
                "gradient_norm": gradient,
            }
        )
    return rows


def _plot(rows: list[dict[str, Any]], config: str, path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise _Refused("--plot needs the package matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    left.semilogy(steps, [row["gradient_bytes"] for row in rows], color="0.6", label="the gradients")
    left.semilogy(steps, [max(1, row["payload_bytes"]) for row in rows], label="handed to the transport")
    left.set(xlabel="step", ylabel="bytes per rank", title="bytes")
    right.plot(steps, [row["gradient_norm"] for row in rows], color="0.6", label="mean gradient")
    right.plot(steps, [row["received_norm"] for row in rows], label="received")
    right.set(xlabel="step", ylabel="L2 norm", title="norms")
    left.legend()
    right.legend()
    figure.suptitle(config, fontsize=7, wrap=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
