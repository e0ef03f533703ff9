"""report.html: one page that needs nothing else, whatever the rows are."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from monitor.curves import Series, chart, thin, ticks
from monitor.metrics import TRAIN
from monitor.report import write

VOID = {"meta"}


def train_row(step, loss=3.0):
    row = dict.fromkeys(TRAIN, 0.5)
    return row | {"step": step, "loss": loss, "tokens": 1000 * step, "peak_mem_bytes": 2**30}


def page(tmp_path, rows, run=None, sample="", facts=None):
    write(tmp_path / "report.html", run or {"name": "tiny"}, rows, sample, facts)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert_balanced(text)
    for svg in re.findall("<svg.*?</svg>", text):
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg
    return text


def assert_balanced(text):
    open_tags = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in VOID:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Parser().feed(text)
    assert open_tags == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [train_row(1)],
        [train_row(7), train_row(8)],
        [train_row(1, None), train_row(2, None)],
        [train_row(1), train_row(2, None), train_row(3), train_row(4, None)],
        [{"step": 0, "eval_loss": None, "eval_bits_per_byte": None}],
        [{"step": 3, "loss": 1.0}],
        [train_row(1, 1e30), train_row(2, 1e-30)],
        [train_row(step, 0.0) for step in range(5)],
    ],
)
def test_any_rows_make_a_page(tmp_path, rows):
    assert "<h1>tiny</h1>" in page(tmp_path, rows)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    rows = [train_row(1), {"step": 1, "eval_loss": 2.0, "eval_bits_per_byte": 1.0}]
    text = page(tmp_path, rows, sample="https://example.org")
    for part in ("<script", "<link", "<img", "src=", "href=", "url(", "@import"):
        assert part not in text


def test_what_others_wrote_is_shown_and_not_read_as_html(tmp_path):
    evil = "<script>alert(1)</script>&\x00\x1b\ud800"
    text = page(
        tmp_path, [], run={"name": evil, "a": {evil: evil}}, sample=evil, facts={evil: evil}
    )
    assert "<script" not in text and "\x00" not in text and "\x1b" not in text
    # The name is title, heading and row; then key and value of a row and a fact, and the sample.
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") == 3 + 2 + 2 + 1


def test_the_figures_of_the_whole_run_stand_at_the_top(tmp_path):
    rows = [train_row(10), train_row(20, 2.5)]
    rows += [{"step": 20, "eval_loss": 2.625, "eval_bits_per_byte": 1.875}]
    text = page(tmp_path, rows, facts={"Hardware": "one laptop"})
    tiles = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)<small>", text))
    assert tiles == {
        "Held-out loss": "2.625",
        "Held-out": "1.875",
        "Training loss": "2.500",
        "Tokens": "20.0k",
        "Time": "0:10",  # 20 steps of half a second
        "Speed": "0",
        "MFU": "50.0 %",
        "Peak memory": "1.00",
        "Goodput": "50.0 %",
    }
    assert "Hardware <b>one laptop</b>" in text


def test_the_run_is_a_table_of_dotted_fields(tmp_path):
    run = {"name": "tiny", "optim": {"lr": 3e-4}, "data": {"sources": ("a", "b")}}
    text = page(tmp_path, [], run=run)
    assert "<tr><td>optim.lr</td><td>0.0003</td></tr>" in text
    assert "<tr><td>data.sources</td><td>a, b</td></tr>" in text


def test_a_long_run_makes_a_small_page_that_keeps_its_spike(tmp_path):
    rows = [train_row(step, 99.0 if step == 12_345 else 3.0) for step in range(1, 20_001)]
    assert len(page(tmp_path, rows)) < 150_000
    kept = thin([(row["step"], row["loss"]) for row in rows], 1000)
    assert (12_345, 99.0) in kept and len(kept) <= 1000


def test_thinning_keeps_order_and_gaps():
    points = [(i, None if 500 <= i < 900 else float(i % 7)) for i in range(5000)]
    kept = thin(points, 300)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept) and len(kept) <= 300
    assert any(y is None for _, y in kept)


def test_a_lone_point_is_drawn():
    svg = chart([Series("loss", [(1, 2.0), (2, None), (3, 2.0), (4, 2.5)], "a")], str)
    assert svg.count("<circle") == 1 and svg.count("L") == 1


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.31, 8.7), (5, 5), (0, 0), (-3, 4e9), (1e-9, 2e-9), (3, 3 + 1e-13)]
)
def test_ticks_enclose_the_range_in_few_round_steps(low, high):
    marks = ticks(low, high, 5)
    slack = 1e-6 * (high - low) + 1e-12
    assert marks[0] <= low + slack and marks[-1] >= high - slack
    assert 2 <= len(marks) <= 8 and marks == sorted(set(marks))
