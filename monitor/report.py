"""report.html: one page that tells how a run went. It loads nothing and runs no script."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from monitor.curves import Point, Series, chart
from monitor.progress import clock, count

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))

Row = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #16191d; --quiet: #626b76;
  --rule: #dfe3e8; --a: #2563c9; --b: #d2571b; }
@media (prefers-color-scheme: dark) { :root { --paper: #111418; --card: #1a1e24; --ink: #e7eaee;
  --quiet: #98a2ae; --rule: #2d333c; --a: #6ea4f7; --b: #f0935c; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 48px }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 36px 0 10px }
.facts { color: var(--quiet); margin: 6px 0 22px; overflow-wrap: anywhere }
.facts b { color: var(--ink); font-weight: 600 }
.facts span { margin-right: 18px; display: inline-block }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(4, 1fr); margin: 0 }
.tiles div { background: var(--card); border-radius: 8px; padding: 11px 14px }
.tiles dt { color: var(--quiet); font-size: 13px }
.tiles dd { margin: 0; font-size: 22px; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums }
.tiles small { display: block; color: var(--quiet); font-size: 12px; font-weight: 400 }
.charts { display: grid; gap: 18px; grid-template-columns: 1fr 1fr; margin-top: 26px }
figure { margin: 0; min-width: 0; background: var(--card); border-radius: 8px;
  padding: 14px 14px 6px }
figure.wide { grid-column: 1 / -1 }
figcaption { font-weight: 600; margin-bottom: 6px }
figcaption span { color: var(--quiet); font-weight: 400; font-size: 13px; margin-left: 12px;
  font-variant-numeric: tabular-nums; white-space: nowrap }
figcaption i { display: inline-block; width: 11px; height: 3px; border-radius: 2px;
  vertical-align: middle; margin-right: 6px; background: currentColor }
.a { color: var(--a) } .b { color: var(--b) }
svg { display: block; width: 100%; height: auto }
.narrow { display: none }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums }
.y { text-anchor: end; dominant-baseline: middle }
.x, .last { text-anchor: middle; dominant-baseline: hanging } .last { text-anchor: end }
.grid { stroke: var(--rule); stroke-width: 1 }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round; vector-effect: non-scaling-stroke }
circle { fill: currentColor }
.nothing { color: var(--quiet); margin: 24px 0 }
pre { background: var(--card); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
summary { cursor: pointer; font-size: 17px; font-weight: 600; margin: 36px 0 10px }
table { border-collapse: collapse; width: 100%; font-size: 14px }
td { border-top: 1px solid var(--rule); padding: 4px 10px 4px 0; vertical-align: top;
  overflow-wrap: anywhere }
td:first-child { color: var(--quiet); width: 40% }
@media (max-width: 640px) {
  main { padding: 20px 12px 36px } .charts { grid-template-columns: 1fr }
  .tiles { grid-template-columns: 1fr 1fr } svg text { font-size: 15px }
  .broad { display: none } .narrow { display: block } }
"""


def write(
    path: str | Path,
    run: Mapping[str, Any],
    rows: Sequence[Row],
    sample: str = "",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the page of a run to `path`, atomically.

    `run` is the resolved run as nested dicts, `rows` those of its metrics.jsonl. `facts` stand
    under the title, by label: hardware, parameters, command.
    """
    train = [row for row in rows if "loss" in row]
    held = [row for row in rows if "eval_loss" in row]
    title = _text(run.get("name") or "run")
    body = [
        f"<h1>{title}</h1>",
        '<p class="facts">',
        *(
            f"<span>{_text(label)} <b>{_text(fact)}</b></span> "
            for label, fact in (facts or {}).items()
        ),
        "</p>",
        _tiles(train, held),
        '<div class="charts">',
        *_charts(train, held),
        "</div>",
        f"<h2>Sample</h2><pre>{_text(sample)}</pre>" if sample else "",
        "<details><summary>The run, resolved</summary><table>",
        *(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in _flat(run)),
        "</table></details>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )
    path = Path(path)
    new = path.with_name(path.name + ".tmp")
    new.write_text(page, encoding="utf-8", errors="replace")
    new.replace(path)


def _tiles(train: Sequence[Row], held: Sequence[Row]) -> str:
    """The figures that a reader looks for first."""
    tiles = []
    if held:
        tiles.append(("Held-out loss", _number(held[-1].get("eval_loss")), "nats per token"))
        tiles.append(("Held-out", _number(held[-1].get("eval_bits_per_byte")), "bits per byte"))
    if train:
        last = train[-1]
        tiles.append(("Training loss", _number(last.get("loss")), f"at step {last['step']:,}"))
        tiles.append(("Tokens", count(last.get("tokens") or 0), "without padding"))
        tiles.append(("Time", clock(_seconds(train)), "in steps"))
        speed, mfu, matmul = (
            _median(train, key) for key in ("tokens_per_s", "mfu", "matmul_fraction")
        )
        tiles.append(("Speed", count(speed or 0), "tokens/s, median"))
        rate = "" if matmul is None else f"{100 * matmul:.1f} % of the matmul rate"
        if mfu is not None:
            tiles.append(("MFU", f"{100 * mfu:.1f} %", rate))
        elif matmul is not None:
            tiles.append(("Model FLOP/s", f"{100 * matmul:.1f} %", "of the matmul rate"))
        peak = max(row.get("peak_mem_bytes") or 0 for row in train)
        tiles.append(("Peak memory", f"{peak / 2**30:.2f}", "GiB"))
        if last.get("goodput") is not None:
            tiles.append(("Goodput", f"{100 * last['goodput']:.1f} %", "of the time in steps"))
    cells = (f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _charts(train: Sequence[Row], held: Sequence[Row]) -> Iterator[str]:
    loss = [Series("training", _points(train, "loss"), "a")]
    if held:
        loss.append(Series("held-out", _points(held, "eval_loss"), "b", dots=True))
    names = "".join(f'<span><i class="{one.style}"></i>{one.name}</span>' for one in loss)
    broad, narrow = chart(loss, _tick, width=956, height=330), chart(loss, _tick, height=300)
    yield f'<figure class="wide"><figcaption>Loss, nats per token{names}</figcaption>'
    yield f'<div class="broad">{broad}</div><div class="narrow">{narrow}</div></figure>'
    for title, key, scale in (
        ("Speed, tokens/s", "tokens_per_s", 1),
        ("Peak memory, GiB", "peak_mem_bytes", 1 / 2**30),
        ("Gradient norm", "grad_norm", 1),
        ("Learning rate", "lr", 1),
    ):
        svg = chart([Series(key, _points(train, key, scale), "a")], _tick, from_zero=True)
        yield f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def _points(rows: Sequence[Row], key: str, scale: float = 1.0) -> list[Point]:
    values = ((row["step"], row.get(key)) for row in rows)
    return [(step, None if value is None else scale * value) for step, value in values]


def _seconds(train: Sequence[Row]) -> float:
    """The time that steps took: each row's for the steps since the row before."""
    before, total = 0, 0.0
    for row in train:
        total += (row["step"] - before) * (row.get("step_s") or 0.0)
        before = row["step"]
    return total


def _median(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return median(values) if values else None


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, list | tuple):
            yield before + key, ", ".join(map(str, value))
        else:
            yield before + key, value


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _tick(value: float) -> str:
    size, unit = next((pair for pair in UNITS if abs(value) >= pair[0]), (1, ""))
    return f"{value / size:.4g}{unit}"


def _text(value: Any) -> str:
    """`value` as text for HTML; control characters, which HTML does not allow, become U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", str(value)))
