"""Tables and charts, from the CSV files alone: `python -m benchmarks report FOLDER`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from .chart import Line, Panel, chart
from .results import COLUMNS, LOSS_COLUMNS, RATIO_COLUMNS, Row, Table

GRIDS = ("forward", "backward")
# Pseudo-providers of the decode suite: the machine's own rates.
LIMITS = ("copy", "gemm")
_BLOCK = "<!-- benchmarks:{0} -->", "<!-- /benchmarks:{0} -->"


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _mask(row: Row) -> str:
    return "causal" if row["causal"] == "1" else "full"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first two columns are words, the others numbers."""
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def _provenance(rows: list[Row]) -> str:
    """Where and when the numbers were measured."""
    versions = _unique(
        f"{r['device']}, driver {r['driver'] or '-'}, torch {r['torch']}, "
        f"Triton {r['triton'] or '-'}, commit {r['commit']}, {r['date']}"
        for r in rows
    )
    return "Measured on " + "; ".join(versions) + "."


def _find(ratios: list[Row], row: Row, kind: str, **more: str) -> list[Row]:
    """The ratio rows of one kind on the measurement that `row` is of."""
    wanted = {k: row[k] for k in ("suite", "case", "direction", "dtype", "provider")} | more
    return [r for r in ratios if r["kind"] == kind and all(r[k] == v for k, v in wanted.items())]


def grid_table(rows: list[Row]) -> str:
    """TFLOP/s: a line for each dtype, head dim, mask and provider, a column for each length."""
    seqlens = sorted({int(row["seqlen"]) for row in rows})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in sorted(rows, key=lambda r: (r["dtype"], int(r["head_dim"]), r["causal"])):
        what = f"{row['dtype']}, D {row['head_dim']}, {_mask(row)}"
        cells = lines.setdefault((what, row["provider"]), {})
        cells[int(row["seqlen"])] = f"{float(row['tflops']):.0f}"
    return _table(
        ["TFLOP/s", "provider", *map(str, seqlens)],
        [[*key, *(cells.get(n, "-") for n in seqlens)] for key, cells in lines.items()],
    )


def grid_means(ratios: list[Row]) -> list[list[str]]:
    """Geometric means of the speed over each peer: by head dim and mask, then over all."""
    speeds = [row for row in ratios if row["kind"] == "speed"]
    lines = []
    for provider, versus in dict.fromkeys((r["provider"], r["versus"]) for r in speeds):
        pair = [r for r in speeds if (r["provider"], r["versus"]) == (provider, versus)]
        for dtype in _unique(r["dtype"] for r in pair):
            typed = [r for r in pair if r["dtype"] == dtype]
            cells = [
                geometric_mean(float(r["value"]) for r in typed if (r["head_dim"], r["causal"]) == (dim, causal))
                for dim in ("64", "128", "256")
                for causal in ("0", "1")
            ]
            mean = geometric_mean(float(r["value"]) for r in typed)
            shown = ["-" if math.isnan(cell) else f"{cell:.2f}" for cell in cells]
            lines.append([f"{provider} ({dtype})", versus, *shown, f"{mean:.3f}", str(len(typed))])
    return lines


def grid_means_table(ratios: list[Row]) -> str:
    columns = [f"{dim} {mask}" for dim in (64, 128, 256) for mask in ("full", "causal")]
    return _table(["speed", "over", *columns, "all", "cases"], grid_means(ratios))


def train_table(rows: list[Row]) -> str:
    """A training step: time, the same over ours, tokens a second, peak memory, and the share of a matrix product's rate
    that the model's own operations reach, where that rate was measured beside it."""
    lines = []
    for case in _unique(row["case"] for row in rows):
        steps = {row["provider"]: row for row in rows if row["case"] == case}
        ours, rate = steps.get("torch_flash2"), steps.pop("matmul", None)
        batch = re.search(r"-b(\d+)-", case)
        for name, row in steps.items():
            ms = float(row["ms"])
            over = f"{ms / float(ours['ms']):.2f}" if ours is not None else "-"
            tokens = int(row["seqlen"]) * (int(batch[1]) if batch else 1) / ms * 1e3
            share = f"{float(row['tflops']) / float(rate['tflops']):.3f}" if rate is not None else "-"
            lines.append([case, name, f"{ms:.1f}", over, f"{tokens:,.0f}", share, f"{float(row['peak_mib']):,.0f}"])
    return _table(["step", "attention", "ms", "x ours", "tokens/s", "MFU", "peak MiB"], lines)


def loss_lines(rows: list[Row]) -> dict[str, list[float]]:
    """The losses of each run by step."""
    lines: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda r: int(r["step"])):
        lines.setdefault(row["provider"], []).append(float(row["loss"]))
    return lines


def loss_table(rows: list[Row]) -> str:
    """Losses in nats a byte: where each run ended, and how far it was from stock attention's, on average over steps."""
    runs = loss_lines(rows)
    base = runs.get("sdpa", next(iter(runs.values())))
    lines = [
        [
            rows[0]["case"], name, str(len(losses)), f"{losses[0]:.4f}",
            f"{statistics.mean(losses[-20:]):.4f}",
            f"{statistics.mean(abs(a - b) for a, b in zip(losses, base, strict=True)):.5f}",
        ]
        for name, losses in runs.items()
    ]  # fmt: skip
    return _table(["run", "attention", "steps", "first loss", "last 20", "from sdpa"], lines)


def loss_chart(rows: list[Row]) -> str:
    """Every run's losses over the steps, means of ten."""
    panel: list[Line] = []
    for name, losses in loss_lines(rows).items():
        tens = [losses[i : i + 10] for i in range(0, len(losses), 10)]
        panel.append((name, [(10.0 * i + len(ten), statistics.mean(ten)) for i, ten in enumerate(tens)]))
    title = f"{rows[0]['case']}, {rows[0]['device']}"
    return chart(title, "loss in nats a byte", [("steps", panel)])


def context_parallel_table(rows: list[Row]) -> str:
    """Forward and backward over several GPUs, and how many times as fast as on one with the same kernels."""
    # A case is one run, its rows on one GPU too.
    alone = {(row["case"], row["provider"]): float(row["ms"]) for row in rows}
    lines = []
    for row in rows:
        over = alone[row["case"], row["provider"].partition(" ")[0] + " x1"] / float(row["ms"])
        lines.append([row["case"], row["provider"], f"{float(row['ms']):.1f}", row["tflops"], f"{over:.2f}"])
    return _table(["case", "kernels, GPUs, rotation", "ms", "TFLOP/s", "x one"], lines)


def feature_table(rows: list[Row], ratios: list[Row]) -> str:
    """One line for each case and provider, forward and backward beside each other."""
    lines = []
    for case, provider in dict.fromkeys((r["case"], r["provider"]) for r in rows):
        cells = []
        for direction in GRIDS:
            found = [r for r in rows if (r["case"], r["provider"], r["direction"]) == (case, provider, direction)]
            if not found:
                cells += ["-"] * 3
                continue
            cost = _find(ratios, found[0], "cost")
            speed = [
                r
                for ours in _unique(r["provider"] for r in rows if r["provider"] != provider)
                if ours.startswith("torch_flash2")
                for r in _find(ratios, found[0] | {"provider": ours}, "speed", versus=provider)
            ]
            cells.append(f"{float(found[0]['ms']):.3f}")
            cells.append(f"{float(cost[0]['value']):.2f}" if cost else "-")
            cells.append(f"{float(speed[0]['value']):.2f}" if speed else "-")
        lines.append([case, provider, *cells])
    header = ["case", "provider"]
    for direction in GRIDS:
        header += [f"{direction} ms", "x base", "speed"]
    legend = "x base: time over that without the feature; speed: how many times as fast ours is."
    return f"{_table(header, lines)}\n\n{legend}"


def model_table(rows: list[Row], ratios: list[Row]) -> str:
    """One line for each case and direction: every provider's time, and our speed over the fastest peer that ran it."""
    providers = _unique(row["provider"] for row in rows)
    lines = []
    for case, dtype, direction in dict.fromkeys((r["case"], r["dtype"], r["direction"]) for r in rows):
        found = {r["provider"]: r for r in rows if (r["case"], r["dtype"], r["direction"]) == (case, dtype, direction)}
        times = {name: float(row["ms"]) for name, row in found.items()}
        peers = {name: ms for name, ms in times.items() if not name.startswith("torch_flash2")}
        fastest = min(peers, key=lambda name: peers[name], default="-")
        ours = next((row for name, row in found.items() if name not in peers), None)
        speed = [] if ours is None else _find(ratios, ours, "speed", versus=fastest)
        over = "{value} ({low}..{high})".format_map(speed[0]) if speed else "-"
        shown = [f"{times[name]:.3f}" if name in times else "-" for name in providers]
        lines.append([case, f"{direction}, {dtype}", *shown, fastest, over])
    return _table(["case", "ms", *providers, "fastest peer", "speed over it"], lines)


def error_table(ratios: list[Row]) -> str:
    """Relative errors against float64 of the fp32 cases; empty where there are none."""
    errors = [r for r in ratios if r["kind"] == "error" and r["dtype"] == "fp32"]
    if not errors:
        return ""
    names = _unique(r["versus"] for r in errors)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in errors:
        cells = lines.setdefault((f"{row['case']} {row['direction']}", row["provider"]), {})
        cells[row["versus"]] = row["value"]
    return _table(
        ["relative error", "provider", *names],
        [[*key, *(cells.get(name, "-") for name in names)] for key, cells in lines.items()],
    )


def memory_table(rows: list[Row]) -> str:
    """Peak memory of a forward and a backward over the length; an estimate is marked as one."""
    seqlens = sorted({int(row["seqlen"]) for row in rows})
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        provider, _, estimate = row["provider"].partition(":estimate")
        shown = f"{float(row['peak_mib']):,.0f}" if row["peak_mib"] else "-"
        if row["provider"].endswith(":estimate"):
            shown = f"({shown})"
        lines.setdefault(provider, {})[int(row["seqlen"])] = shown
    return _table(
        ["MiB", "", *map(str, seqlens)],
        [[name, "", *(cells.get(n, "-") for n in seqlens)] for name, cells in lines.items()],
    )


def decode_table(rows: list[Row], ratios: list[Row]) -> str:
    """Bytes of keys and values a second, beside the copy bandwidth of the same run and the speed over each peer."""
    lines = []
    for row in rows:
        if row["provider"] == "gemm":
            continue
        speeds = [f"{r['value']} {r['versus']}" for r in _find(ratios, row, "speed") if r["versus"] not in LIMITS]
        us = f"{1e3 * float(row['ms']):.1f}"
        tflops = f"{float(row['tflops']):.0f}" if row["provider"] not in LIMITS else "-"
        shown = "; ".join(speeds) if row["provider"].startswith("torch_flash2") else ""
        lines.append([row["case"], row["provider"], us, f"{float(row['gbps']):.0f}", tflops, shown])
    return _table(["case", "provider", "us", "GB/s", "TFLOP/s", "speed over"], lines)


def refusals(ratios: list[Row]) -> list[str]:
    """Who could not run what, and why: one line for each reason."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in ratios:
        if row["kind"] == "refused":
            where = f"{row['case']} {row['direction']}"
            lines.setdefault((row["provider"], row["note"]), []).append(where)
    return [
        f"{who} on {', '.join(cases[:2])}" + (f" and {len(cases) - 2} more" if len(cases) > 2 else "") + f": {why}"
        for (who, why), cases in lines.items()
    ]


def console(rows: list[Row], ratios: list[Row]) -> str:
    """All of a run in a few thousand characters: the means last."""
    if any(row["suite"] == "models" for row in rows):
        return "\n".join([model_table(rows, ratios), *(f"not run: {line}" for line in refusals(ratios))])
    lines: list[str] = []
    for case, direction in dict.fromkeys((r["case"], r["direction"]) for r in rows):
        cells = []
        for row in rows:
            if (row["case"], row["direction"]) != (case, direction):
                continue
            shown = f"{row['provider']} {float(row['ms'] or 0):.3f}ms"
            shown += f" {float(row['tflops'] or 0):.0f}TF"
            shown += f" {float(row['gbps'] or 0):.0f}GB/s" if row["suite"] == "decode" else ""
            shown += f" {row['peak_mib']}MiB" if row["suite"] == "memory" else ""
            shown += "".join(f" cost {r['value']}" for r in _find(ratios, row, "cost"))
            for speed in _find(ratios, row, "speed"):
                shown += f" x{speed['value']}[{speed['low']},{speed['high']}]/{speed['versus']}"
            if row["dtype"] == "fp32":
                shown += "".join(f" {r['versus']}:{r['value']}" for r in _find(ratios, row, "error"))
            cells.append(shown)
        lines.append(f"{case} {direction}: " + " | ".join(cells))
    lines += [f"not run: {line}" for line in refusals(ratios)]
    if {row["suite"] for row in rows} & set(GRIDS):
        lines.append("geometric means of speed: D 64 full, causal, D 128 .., D 256 .., all, cases")
        lines += [f"{who} / {versus}: {' '.join(cells)}" for who, versus, *cells in grid_means(ratios)]
    return "\n".join(lines)


def charts(rows: list[Row], matrix: list[Row]) -> dict[str, str]:
    """An SVG for each dtype and head dim of a grid: TFLOP/s over the length, full and causal, a line for each provider.

    Where the rate of a matrix product was measured for the dtype on the same device, it is a dashed line.
    """
    drawn = {}
    for dtype, dim in dict.fromkeys((r["dtype"], r["head_dim"]) for r in rows):
        panels: list[Panel] = []
        for causal, name in (("0", "full"), ("1", "causal")):
            lines: dict[str, Line] = {}
            for row in rows:
                if (row["dtype"], row["head_dim"], row["causal"]) == (dtype, dim, causal):
                    line = lines.setdefault(row["provider"], (row["provider"], []))
                    line[1].append((float(row["seqlen"]), float(row["tflops"])))
            if lines:
                panels.append((name, list(lines.values())))
        suite = rows[0]["suite"]
        title = f"{suite}, {dtype}, head dim {dim}, {rows[0]['device']}"
        rate = [float(r["tflops"]) for r in matrix if (r["dtype"], r["device"]) == (dtype, rows[0]["device"])]
        ceiling = (f"matrix product: {rate[-1]:.0f}", rate[-1]) if rate else None
        drawn[f"{suite}_{dtype}_d{dim}.svg"] = chart(title, "TFLOP/s over the sequence length", panels, ceiling)
    return drawn


def sections(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Markdown by the name of a README block, and SVG by file name.

    Raises:
        ValueError: the folder has no results.
    """
    texts: dict[str, str] = {}
    drawings: dict[str, str] = {}
    matrix = _read(folder / "matrix.csv", COLUMNS)
    for path in sorted(folder.glob("*.csv")):
        # sdpa.csv has columns of its own, for policy.json.
        if path.stem.endswith("_ratios") or path.stem in ("matrix", "sdpa"):
            continue
        if path.stem == "loss":
            losses = _read(path, LOSS_COLUMNS)
            texts[path.stem] = f"{loss_table(losses)}\n\n{_provenance(losses)}"
            drawings["loss.svg"] = loss_chart(losses)
            continue
        rows, ratios = _read(path, COLUMNS), _read(folder / f"{path.stem}_ratios.csv", RATIO_COLUMNS)
        if not rows:
            continue
        source = _provenance(rows)
        if path.stem in GRIDS:
            texts[path.stem] = f"{grid_table(rows)}\n\n{source}"
            texts[f"{path.stem}-ratios"] = f"{grid_means_table(ratios)}\n\n{source}"
            drawings |= charts(rows, matrix)
        elif path.stem == "train":
            texts[path.stem] = f"{train_table(rows)}\n\n{source}"
        elif path.stem == "kvcache":
            lines = [[row["case"], row["provider"], f"{float(row['ms']):.3f}", row["gbps"]] for row in rows]
            texts[path.stem] = f"{_table(['step', 'provider', 'ms', 'GB/s'], lines)}\n\n{source}"
        elif path.stem == "few":
            lines = [[row["case"], row["provider"], f"{1e3 * float(row['ms']):.1f}", row["tflops"]] for row in rows]
            texts[path.stem] = f"{_table(['rows of keys', 'provider', 'us', 'TFLOP/s'], lines)}\n\n{source}"
        elif path.stem == "context_parallel":
            texts[path.stem] = f"{context_parallel_table(rows)}\n\n{source}"
        elif path.stem == "memory":
            texts[path.stem] = f"{memory_table(rows)}\n\nIn parentheses: computed, it was not run. {source}"
        elif path.stem == "models":
            texts[path.stem] = f"{model_table(rows, ratios)}\n\n{source}"
        elif path.stem == "decode":
            texts[path.stem] = f"{decode_table(rows, ratios)}\n\n{source}"
        else:
            tables = filter(None, (feature_table(rows, ratios), error_table(ratios)))
            texts[path.stem] = "\n\n".join([*tables, source])
        if refused := refusals(ratios):
            texts[f"{path.stem}-refused"] = "\n".join(f"- {line}" for line in refused)
    if not texts:
        raise ValueError(f"{folder} has no results: run `python -m benchmarks --suite ...` first")
    return texts, drawings


def _read(path: Path, columns: tuple[str, ...]) -> list[Row]:
    return Table(path, columns).rows() if path.exists() else []


def fill(readme: str, texts: dict[str, str]) -> str:
    """The text with each <!-- benchmarks:NAME --> block's content replaced.

    Raises:
        ValueError: a block names no table, or does not end.
    """
    for name in re.findall(r"<!-- benchmarks:(\S+) -->", readme):
        start, end = (mark.format(name) for mark in _BLOCK)
        if name not in texts:
            raise ValueError(f"{start} names no table; there are {', '.join(texts)}")
        before, _, rest = readme.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{start} has no {end}")
        readme = f"{before}{start}\n{texts[name]}\n{end}{after}"
    return readme


def write(folder: Path, readme: Path | None) -> None:
    """Write report.md and the SVGs into the folder, and fill the README's blocks."""
    texts, drawings = sections(folder)
    parts = ["# Measurements", "Made by `python -m benchmarks report` from the CSV files here."]
    for name, text in texts.items():
        parts += [f"## {name}", text]
        parts += [f"![{file}]({file})" for file in drawings if re.match(rf"{name}[_.]", file)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    for file, drawing in drawings.items():
        (folder / file).write_text(drawing)
    if readme is not None:
        readme.write_text(fill(readme.read_text(), texts))
    print(f"wrote {folder / 'report.md'} and {len(drawings)} charts")
