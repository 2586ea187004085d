"""Writes a results folder's README.md from the JSON files in it:  python bench/report_results.py bench/results/<cpu>-<date>"""

import argparse
import json
import pathlib
import statistics


def percent(x):
    return "–" if x is None else f"{x * 100:.3g} %"


def number(x, digits=2):
    return "–" if x is None else f"{x:.{digits}f}"


def kernel_table(rows):
    yield "| kernel | isa | elements | density | bytes/element | ms | GB/s | x memcpy | x axpy | time, paired |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        cells = [f"`{row['kernel']}`", row["isa"] or "–", f"{row['numel']:,}", percent(row["density"]), number(row["bytes_per_element"]),
                 number(row["seconds_median"] * 1e3), number(row["gb_per_s"], 1), number(row["ratio_memcpy"]), number(row["ratio_axpy"]),
                 number(row.get("paired_time"), 3)]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def training_table(rows):
    """The last epoch of each run; the mean over seeds where there are several."""
    runs = {}
    for row in rows:
        key = (row.get("method", row["config"]), row["world"])
        seeds = runs.setdefault(key, {})
        if row["epoch"] >= seeds.get(row.get("seed", 0), row)["epoch"]:
            seeds[row.get("seed", 0)] = row
    yield "| config | ranks | steps | seeds | accuracy | loss | payload bytes | dense bytes | s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (name, world), seeds in runs.items():
        last = list(seeds.values())
        config = last[0]["config"] if name == last[0]["config"] else f"{name}`: `{last[0]['config']}"
        mean = {name: statistics.mean(row[name] for row in last) for name in ("accuracy", "loss", "payload_bytes", "dense_bytes", "seconds")}
        yield (f"| `{config}` | {world} | {last[0]['steps']} | {len(last)} | {mean['accuracy'] * 100:.2f} % | {mean['loss']:.4f} | "
               f"{mean['payload_bytes'] / 1e6:,.1f} MB | {mean['dense_bytes'] / 1e6:,.1f} MB | {mean['seconds']:.1f} |")  # fmt: skip


def step_table(rows):
    """`./bench/run training`: medians over the turns, beside compute alone and dense on the same link."""
    yield "| link | config | ranks | ms a step | least | x compute alone | dense / it | payload MB | on the link MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        same = {other["config"]: other["seconds_median"] for other in rows if other["link"] == row["link"]}
        sent = row["interface_bytes_per_step"]
        cells = [row["link"], f"`{row['config']}`", row["world"], number(row["seconds_median"] * 1e3, 1), number(row["seconds_min"] * 1e3, 1),
                 number(row["seconds_median"] / same["compute alone"]), number(same["dense"] / row["seconds_median"]),
                 number(row["payload_bytes_per_step"] / 1e6, 3), "–" if sent is None else number(sent / 1e6, 3)]  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"


def problem_table(rows):
    """`./bench/run error_control`: one table for all problems; what a row is about beside its method stands in front."""
    again = any("once_more" in row for row in rows)  # the reference, stopped where the engine is
    yield "| problem | method | reference |" + (" once more |" if again else "") + " engine |"
    yield "|---|---|---|" + ("---|" if again else "") + "---|"
    for row in rows:
        numbers = [f"{key} {row[key]:g}" for key in ("zeta", "kappa", "world", "eta", "density", "rate") if row.get(key) is not None]
        about = [row["section"]] + numbers + ([row["optimizer"]] if "optimizer" in row else [])
        if "loss" in row:
            engine = f"loss {number(row['loss'], 4)}, accuracy {percent(row['accuracy'])}"
        elif "zeta_0" in row:
            engine = " / ".join(row[f"zeta_{zeta}"] for zeta in (0, 10, 100)) + " at zeta 0 / 10 / 100"
        else:
            engine = row.get("engine")
        cells = [", ".join(about), row.get("method", "EControl auto"), row.get("reference"), *([row.get("once_more")] if again else []), engine]
        yield "| " + " | ".join("–" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def section(path):
    data = json.loads(path.read_text())
    machine, rows = data["machine"], data["rows"]
    yield f"## {path.stem}"
    yield ""
    yield f"`{data['command']}` · version {data['version']}, commit {machine.get('commit', '?')}, {machine.get('date', '?')} · load before the run {machine.get('load', '?')}"
    yield ""
    if rows and "section" in rows[0]:
        yield from problem_table(rows)
    elif rows and "kernel" in rows[0]:
        yield from kernel_table(rows)
    elif rows and "link" in rows[0]:
        yield from step_table(rows)
    elif rows and {"config", "epoch", "accuracy"} <= set(rows[0]):
        yield from training_table(rows)
    elif rows:
        yield "| " + " | ".join(rows[0]) + " |"
        yield "|" + "---|" * len(rows[0])
        for row in rows:
            yield "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()) + " |"
    yield ""


def main():
    parser = argparse.ArgumentParser(prog="bench/report_results.py", description="Writes a results folder's README.md from the JSON files in it.")
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    files = sorted(folder.glob("*.json"))
    if not files:
        parser.error(f"{folder} holds no JSON file")
    machine = json.loads(files[0].read_text())["machine"]
    lines = [f"# {machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB, {', '.join(machine['isas'])}", "",
             "Written by `bench/report_results.py` from the JSON files beside this one. How to read the columns: docs/performance.md.", ""]  # fmt: skip
    for file in files:
        lines += section(file)
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")
    print(folder / "README.md")


if __name__ == "__main__":
    main()
