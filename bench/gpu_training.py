"""quickstart's network trained on one GPU by DDP over NCCL, dense and compressed: with one rank, and with two where NCCL takes two on one GPU. Rows as quickstart's.
It needs neither rich nor matplotlib. Exit status 77: there is no data (--data, Debian's dataset-fashion-mnist or scikit-learn)."""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))
import quickstart
from options import add_training_options, learning_rate, number

import report

CONFIG = "dgc:density=0.01,warmup_steps=10 exchange=gather"  # auto would send densely where there is one rank
NO_DATA = 77
MOST_BELOW_DENSE = 0.03  # a fraction, after the first epoch
ENOUGH_STEPS = 400  # fewer, as with --subset or the digits, say nothing about accuracy


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu_training.py", description=__doc__)
    parser.add_argument("--world", type=number(int, 1, 8), action="append", metavar="N", help="ranks; may be repeated; default 1 and 2")
    parser.add_argument("--config", default=CONFIG, metavar="CONFIG", help=f"what to compare with dense training; default {CONFIG}")
    parser.add_argument("--json", type=report.new_file, metavar="FILE", help="write the rows")
    add_training_options(parser)
    parser.set_defaults(epochs=1, device="cuda")
    options = parser.parse_args()
    options.world = options.world or [1, 2]
    return options


def train(options: argparse.Namespace, world: int, config: str) -> quickstart.Run:
    import ranks

    run = quickstart.Run(config or "dense", config)
    options.share_gpus = options.device == "cuda" and world > 1
    with ranks.Ranks(world, quickstart.command_of_a_rank(options, config), silence_s=options.timeout + 60) as processes:
        for _, word in processes.events():
            run.take(word)
    if not run.rows:
        raise ranks.RankError("the ranks ended without a result")
    return run


def main() -> int:
    options = arguments()
    import torch

    import data as datasets
    import ranks

    try:
        datasets.load(options.data)
    except datasets.DataError as error:
        print(error)
        return NO_DATA
    rows, failed = [], []
    for world in options.world:
        accuracies = []
        for config in ("", options.config):
            try:
                run = train(options, world, config)
            except ranks.RankError as error:
                if world > 1 and "Duplicate GPU" in str(error):
                    print(f"{world} ranks: left out, this NCCL takes no two ranks on one GPU")
                    break
                print(error, file=sys.stderr)
                return 1
            row = run.rows[-1]
            rows += [one | {"full_config": run.full_config, "data": run.source, "device": options.device} for one in run.rows]
            accuracies.append(row["accuracy"])
            print(f"{world} ranks, {run.label}: accuracy {row['accuracy']:.2%}, loss {row['loss']:.4f}, {row['seconds']:.1f} s, {row['steps']} steps, "
                  f"{row['payload_bytes'] / 1e6:.1f} MB of payload, fingerprint {row['fingerprint']}", flush=True)  # fmt: skip
        if len(accuracies) == 2 and row["steps"] >= ENOUGH_STEPS and accuracies[0] - accuracies[1] > MOST_BELOW_DENSE:
            failed.append(f"{world} ranks: {accuracies[0] - accuracies[1]:.2%} below dense, allowed are {MOST_BELOW_DENSE:.0%}")
    if options.json:
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
        about = report.machine(torch=torch.__version__.partition("+")[0], link=None, batch=options.batch, lr=learning_rate(options, adam=False), gpu=gpu)
        report.write(options.json, report.script_line(), about, rows)
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
