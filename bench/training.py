"""DDP step times on hosts behind slow links: compute alone, dense, torch's bf16 and PowerSGD hooks, ours. The hosts are network namespaces of this machine
(launch/cluster, needs root); --link none measures processes that share the machine's own interface.
"""

import argparse
import contextlib
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))
import data as datasets
import ranks
import report
from options import number

OURS = ("codec=topk:density=0.01,wire=bf16 feedback=ef14", "codec=topk:density=0.01,wire=bf16,select=exact feedback=ef14", "dgc:density=0.01", "dgc:density=0.001")
OTHERS = ("compute alone", "dense", "bf16_compress_hook", "powerSGD_hook:rank=4")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="bench/run training", description=__doc__)
    parser.add_argument("--link", action="append", metavar="RATE", help="rate of every host's link, such as 1gbit; may be repeated; default 1gbit")
    parser.add_argument("--config", action="append", metavar="CONFIG", help=f"ours; may be repeated; default: {'; '.join(OURS)}")
    parser.add_argument("--world", type=number(int, 1, 64), default=4, metavar="N", help="hosts; default 4")
    parser.add_argument("--width", type=number(int, 8), default=1024, metavar="W", help="of the linear layers; default 1024")
    parser.add_argument("--layers", type=number(int, 2), default=6, metavar="L", help="default 6: 5.01 M parameters")
    parser.add_argument("--batch", type=number(int, 1), default=32, metavar="B", help="images per rank and step; default 32")
    parser.add_argument("--bucket-mb", type=number(float, 0.01), default=4, metavar="MB", help="DDP's buckets, default 4 (PowerSGD has one: with several it aborts over Gloo)")
    parser.add_argument("--bucket-view", action=argparse.BooleanOptionalAction, default=True,
                        help="DDP with gradient_as_bucket_view, for every variant: gradients are not copied back from the buckets; default yes")
    parser.add_argument("--rounds", type=number(int, 1), default=11, metavar="R", help="turns of every variant; the median over them counts; default 11")
    parser.add_argument("--block", type=number(int, 1), default=4, metavar="S", help="steps of a turn; default 4")
    parser.add_argument("--data", metavar="DIR", help="folder with the four idx files")
    parser.add_argument("--timeout", type=number(float, 1), default=120, metavar="S", help="seconds after which a silent peer is an error; default 120")
    parser.add_argument("--json", metavar="FILE", type=report.new_file)
    parser.add_argument("--output", metavar="DIR", type=pathlib.Path, default=ROOT / "out" / "training", help="where the picture goes; default out/training")
    options = parser.parse_args(arguments)
    options.link, options.config = options.link or ["1gbit"], options.config or list(OURS)
    return options


def measure(link, options):
    """All rows of one link."""
    names = ("width", "layers", "batch", "bucket_mb", "bucket_view", "rounds", "block", "data", "timeout")
    choice = {name: getattr(options, name) for name in names} | {"variants": [*OTHERS, *options.config]}
    command = [sys.executable, str(ROOT / "bench" / "training_rank.py"), json.dumps(choice)]
    rows = []
    with contextlib.ExitStack() as stack:
        cluster = None if link == "none" else stack.enter_context(ranks.Cluster(options.world, link))
        processes = stack.enter_context(ranks.Ranks(options.world, command, cluster, silence_s=600))
        for _, word in processes.events():
            if word["event"] == "start":
                print(f"link {link}, {options.world} hosts, {word['parameters']:,} parameters, batch {options.batch}, buckets of {options.bucket_mb:g} MB, {word['source']}", flush=True)
            elif word["event"] == "round" and sys.stderr.isatty():
                print(f"\rround {word['done']}/{options.rounds} ", end="", file=sys.stderr, flush=True)
            elif word["event"] == "row":
                rows.append(word["row"] | {"link": link})
    return rows


def show(rows):
    compute, dense = rows[0]["seconds_median"], rows[1]["seconds_median"]
    lines = []
    for row in rows:
        sent = row["interface_bytes_per_step"]
        lines.append((row["config"], f"{row['seconds_median'] * 1e3:.1f}", f"{row['seconds_min'] * 1e3:.1f}", f"{row['seconds_median'] / compute:.2f}",
                      f"{dense / row['seconds_median']:.2f}", f"{row['payload_bytes_per_step'] / 1e6:.3f}", "-" if sent is None else f"{sent / 1e6:.3f}"))
    print(report.table(("", "ms a step", "least", "x compute", "dense / it", "payload MB", "on the link MB"), lines), flush=True)


def plot(groups, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(groups), 1, figsize=(9, 1 + 2.6 * len(groups)), layout="constrained", squeeze=False)
    for axis, rows in zip(axes[:, 0], groups):
        names = [row["config"].replace(" feedback", "\nfeedback") for row in rows]
        times = [row["seconds_median"] * 1e3 for row in rows]
        ours = [row["config"] not in OTHERS for row in rows]
        bars = axis.barh(names, times, color=["tab:orange" if mine else "tab:gray" for mine in ours])
        axis.bar_label(bars, [f"{time:.0f} ms" for time in times], padding=3, fontsize=8)
        axis.axvline(times[0], color="black", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(f"one DDP step, {rows[0]['world']} hosts, links of {rows[0]['link']} (dotted: compute alone)", fontsize=10)
        axis.set_xlim(0, max(times) * 1.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    options = parse(sys.argv[1:])
    import thinwire

    try:
        for config in options.config:
            thinwire.Config.parse(config)
        about = report.machine(links=options.link, batch=options.batch, bucket_mb=options.bucket_mb, bucket_view=options.bucket_view, rounds=options.rounds, block=options.block)
        report.warn_if_loaded()
        groups = []
        for link in options.link:
            groups.append(measure(link, options))
            show(groups[-1])
        picture = options.output / "training.png"
        plot(groups, picture)
        print(f"picture: {picture}")
        if options.json:
            report.write(options.json, report.command_line(), about, [row for rows in groups for row in rows])
    except (thinwire.ConfigError, datasets.DataError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    except (ranks.RankError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("training: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
