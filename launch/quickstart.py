"""Trains one network twice, dense and compressed, as DDP processes over Gloo, and shows what compression costs and saves. Started by launch/quickstart."""

import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "bench")]
from options import add_training_options, learning_rate, number
from report import new_file

DEFAULT_CONFIG = "dgc:density=0.01,warmup_steps=10"
EXAMPLES = """examples
  launch/quickstart                                    dense and DGC at 1 %, two processes, three epochs of Fashion-MNIST
  launch/quickstart --config dgc:density=0.001         another density; repeat --config to compare several
  launch/quickstart --config 'codec=topk:density=0.01,wire=bf16 feedback=ef14'
  launch/quickstart --config onebit_adam               1-bit Adam beside Adam; its variance is frozen after a quarter of the steps at the latest
  sudo launch/quickstart --link 1gbit --world 4        four hosts in network namespaces, joined by links of that rate
  launch/quickstart --epochs 1 --subset 6000           a minute's look
exit codes: 0 well, 1 something failed, 2 a wrong command line, configuration or data, 130 interrupted
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/quickstart", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", metavar="CONFIG", help=f"what to compare with dense training; may be repeated; default {DEFAULT_CONFIG}")
    parser.add_argument("--world", type=number(int, 1, 64), default=2, metavar="N", help="processes; default 2")
    add_training_options(parser)
    parser.add_argument("--link", metavar="RATE", help="one virtual host per process, links of this rate, such as 1gbit (needs root)")
    parser.add_argument("--json", metavar="FILE", type=new_file, help="write the results: one row per configuration and epoch")
    parser.add_argument("--output", metavar="DIR", type=pathlib.Path, default=ROOT / "out" / "quickstart", help="where the picture goes; default out/quickstart")
    options = parser.parse_args(arguments)
    options.config = options.config or [DEFAULT_CONFIG]
    if options.link and options.device != "cpu":
        parser.error("--link puts ranks on virtual hosts, which talk over Gloo: it goes with --device cpu")
    return options


def command_of_a_rank(options: argparse.Namespace, config: str) -> list[str]:
    command = [sys.executable, str(HERE / "train_rank.py"), "--events", "--config", config]
    if options.lr is not None:
        command += ["--lr", str(options.lr)]
    for name in ("optimizer", "epochs", "batch", "momentum", "beta2", "weight_decay", "seed", "subset", "timeout"):
        command += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    command += ["--device", options.device] + ["--share-gpus"] * options.share_gpus + ["--by-label"] * options.by_label
    return command + (["--data", options.data] if options.data else [])


class Run:
    """One training: what its ranks said of it."""

    def __init__(self, label: str, config: str) -> None:
        self.label, self.config = label, config
        self.full_config = config or "codec=none"
        self.losses: list[tuple[int, int, float]] = []  # (step, bytes that left rank 0 so far, its loss)
        self.tests: list[tuple[int, int, float]] = []  # (step, bytes, accuracy)
        self.rows: list[dict] = []

    def take(self, word: dict) -> None:
        kind = word.pop("event")
        if kind == "start":
            self.source, self.parameters, self.total = word["source"], word["parameters"], word["steps"]
            self.full_config = word["config"] or self.full_config
        elif kind == "step":
            self.losses.append((word["step"], word["wire_bytes"], word["loss"]))
        elif kind == "test":
            self.tests.append((word["step"], word["wire_bytes"], word["accuracy"]))
        elif kind == "epoch":
            self.tests.append((word["steps"], word["wire_bytes"], word["accuracy"]))
            self.rows.append({"config": self.config or "codec=none", "label": self.label, **word})


def run_all(options: argparse.Namespace, console) -> list[Run]:
    import contextlib

    import ranks
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    def warn(words: str) -> None:
        bar.console.print(f"{run.label}: warning: {words}", markup=False)

    runs = [Run("dense", "")] + [Run(config, config) for config in options.config]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(ranks.Cluster(options.world, options.link)) if options.link else None
        bar = stack.enter_context(Progress(*columns, console=console))
        tasks = [bar.add_task(run.label, total=None, note="", start=False) for run in runs]
        for run, task in zip(runs, tasks):
            bar.start_task(task)
            # An evaluation or an import is silent for a while; a stuck peer becomes an error of its rank after --timeout.
            with ranks.Ranks(options.world, command_of_a_rank(options, run.config), cluster, silence_s=options.timeout + 180, warn=warn) as processes:
                for _, word in processes.events():
                    kind = word["event"]
                    run.take(word)
                    if kind == "start":
                        bar.update(task, total=run.total)
                        if run is runs[0]:
                            where = f"{options.world} virtual hosts, links of {options.link}" if cluster else f"{options.world} processes"
                            bar.console.print(f"data: {run.source}, {word['images']} images · network: {run.parameters:,} parameters · {where} · "
                                              f"batch {options.batch} each · {run.total} steps")
                    elif kind == "step":
                        bar.update(task, completed=word["step"], note=f"loss {word['loss']:.3f}")
                    elif kind == "freeze":
                        bar.console.print(f"{run.label}: {word['words']}")
                    elif kind == "epoch":
                        bar.update(task, note=f"accuracy {word['accuracy']:.2%}")
                        if not console.is_terminal:  # a log has no bar to look at
                            print(f"{run.label}: epoch {word['epoch']}/{options.epochs}, loss {word['loss']:.4f}, accuracy {word['accuracy']:.2%}", flush=True)
            if not run.rows:
                raise ranks.RankError("the ranks ended without a result")
    return runs


def show(runs: list[Run], console) -> None:
    from rich.table import Table

    table = Table(title=f"after {runs[0].rows[-1]['epoch']} epochs, {runs[0].rows[-1]['steps']} steps")
    for name in ("", "accuracy", "loss", "sent per rank", "factor", "seconds"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for run in runs:
        row = run.rows[-1]
        factor = row["dense_bytes"] / row["wire_bytes"] if row["wire_bytes"] else 1
        table.add_row(run.label, f"{row['accuracy']:.2%}", f"{row['loss']:.4f}", f"{row['wire_bytes'] / 1e6:,.1f} MB", f"{factor:.1f} x", f"{row['seconds']:.1f}")
    console.print(table)
    for run in runs:
        if run.rows[-1]["freeze_reason"]:
            console.print(f"{run.label}: dense until the variance was frozen at step {run.rows[-1]['frozen_step']}: {run.rows[-1]['freeze_reason']}", style="dim")
    console.print("accuracy: on the test images · loss: mean over the last epoch · sent: bytes that left a rank, warm-up included · factor: dense bytes by sent bytes", style="dim")


def plot(runs: list[Run], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import numpy
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained", sharey="row")
    for run in runs:
        losses, tests = numpy.array(run.losses, dtype=float), numpy.array(run.tests, dtype=float)
        width = max(1, len(losses) // 60)
        smooth = numpy.convolve(losses[:, 2], numpy.ones(width) / width, "valid")
        for row, (at, y, mark) in enumerate(((losses[width - 1 :], smooth, None), (tests, tests[:, 2] * 100, "o"))):
            axes[row][0].plot(at[:, 0], y, label=run.label, marker=mark, markersize=3)
            axes[row][1].plot(at[:, 1] / 1e6, y, label=run.label, marker=mark, markersize=3)
    for row, name in enumerate(("training loss (running mean)", "test accuracy, %")):
        axes[row][0].set_ylabel(name)
        for column in (0, 1):
            axes[row][column].grid(alpha=0.3)
            axes[row][column].set_xlabel(("steps", "MB sent per rank")[column])
    if runs[0].tests[-1][1] > 0:  # one rank alone sends nothing
        for row in (0, 1):
            axes[row][1].set_xscale("log")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{runs[0].source}, {runs[0].rows[0]['world']} ranks")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class Refused(Exception):
    """What was asked for cannot be done, or not on this machine."""


def check_optimizer(options: argparse.Namespace, configs: list) -> None:
    """@raises Refused where a rank's `attach` would refuse, after the dense training."""
    for text, config in zip(options.config, configs):
        if config.target.startswith("momentum") and options.optimizer == "sgd":
            raise Refused(f"--config {text}: target=momentum puts Adam's momentum into the gradients: --optimizer sgd does not go with it")
        if config.feedback.startswith("dgc") and options.optimizer == "adam":
            raise Refused(f"--config {text}: feedback=dgc applies momentum in the hook: --optimizer adam does not go with it")


def main() -> int:
    options = parse(sys.argv[1:])
    import data as datasets
    import ranks
    import report
    import thinwire
    import torch
    from rich.console import Console

    console = Console(highlight=False)
    try:
        configs = [thinwire.Config.parse(config) for config in options.config]
        if options.optimizer == "auto":  # dense training by the same optimizer, so that one thing differs
            averaged = [config.target.startswith("momentum") for config in configs]
            if any(averaged) and not all(averaged):
                or_adam = "" if any(config.feedback.startswith("dgc") for config in configs) else ", or give --optimizer adam"  # which dgc does not take
                raise thinwire.ConfigError(f"configs with target=momentum train with Adam, the others with SGD: compare them in runs of their own{or_adam}")
            options.optimizer = "adam" if any(averaged) else "sgd"
        check_optimizer(options, configs)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise Refused("--device cuda: there is no GPU, or no driver for it, or this torch has no CUDA")
        datasets.epoch_steps(datasets.load(options.data), options.subset, options.world, options.batch)  # bad data is one message here, not one per rank
        runs = run_all(options, console)
        show(runs, console)
        picture = options.output / "quickstart.png"
        plot(runs, picture)
        console.print(f"picture: {picture}", soft_wrap=True)
        if options.json:
            about = report.machine(isa=thinwire.build_info()["isa"], torch=torch.__version__.partition("+")[0], link=options.link, batch=options.batch, optimizer=options.optimizer, lr=learning_rate(options, options.optimizer == "adam"))
            rows = [row | {"full_config": run.full_config, "data": run.source} for run in runs for row in run.rows]
            report.write(options.json, " ".join(["./launch/quickstart", *sys.argv[1:]]), about, rows)
            console.print(f"rows: {options.json}", soft_wrap=True)
    except (thinwire.ConfigError, datasets.DataError, Refused) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    except (ranks.RankError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
