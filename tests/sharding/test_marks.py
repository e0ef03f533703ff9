"""The reading test: wherever devices talk a comment says so, what over and how many bytes."""

import ast
import functools
import io
import re
import tokenize

import pytest

from tests.test_layout import HOUSE, TREES, package

NAMED = {"psum", "pmax", "pmin", "pmean", "all_gather", "ppermute", "all_to_all", "psum_scatter"}
NAMED |= {"ragged_all_to_all", "process_allgather", "sync_global_devices", "broadcast_one_to_all"}
# What may talk, as arrays lie: sums over a split dim, weights that meet activations.
UNNAMED = {"reshard", "pcast", "sum", "mean", "max", "norm", "auto_axes"}
UNNAMED |= {"project", "attend_ring", "out", "down"}
NEAR = 10  # lines between a mark and the last of what it is of
MARK = "# Devices talk"


@functools.cache
def marks(source):
    """Line of each mark's last comment line, and its text, of all its lines."""
    if MARK not in source:
        return {}
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }
    found = {}
    for line, text in comments.items():
        if text.startswith(MARK.lstrip("# ")):
            while line + 1 in comments:
                line += 1
                text += " " + comments[line]
            found[line] = text
    return found


def functions(tree):
    """(name, first line, last line), inner ones after those around them."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    spans = [(node.name, node.lineno, node.end_lineno) for node in found]
    return sorted(spans, key=lambda span: (span[1], -span[2]))


def around(spans, line):
    """The innermost function that a line stands in."""
    return next((span for span in reversed(spans) if span[1] <= line <= span[2]), None)


def names(tree):
    """(line, name) of whatever is named or read as an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.end_lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id


def silent(source):
    """The lines of collectives that no mark stands before."""
    if not re.search(rf"\b({'|'.join(NAMED)})\b", source):
        return []
    tree, told = ast.parse(source), marks(source)
    spans = functions(tree)
    return sorted(
        line
        for line, name in names(tree)
        if name in NAMED
        if not any(
            0 < line - mark <= NEAR and around(spans, line) == around(spans, mark) for mark in told
        )
    )


SOURCES = {
    name: path.read_text(encoding="utf-8")
    for name, path in HOUSE.items()
    if package(name) not in ("tests", "costs")
}


@pytest.fixture(scope="module")
def talkers():
    """Functions of the house with a mark: those that call them may have one too."""
    found = set()
    for name, source in SOURCES.items():
        if told := marks(source):
            spans = functions(TREES[name])
            found |= {around(spans, line)[0] for line in told}
    return found


def test_each_collective_is_marked():
    assert not {name: lines for name, source in SOURCES.items() if (lines := silent(source))}


def test_a_mark_says_over_which_axes_and_how_many_bytes():
    vague = [
        f"{name}: {text}"
        for name, source in SOURCES.items()
        for text in marks(source).values()
        if " over " not in text or "byte" not in text
    ]
    assert not vague


def test_marks_stand_where_devices_talk_only(talkers):
    speak = NAMED | UNNAMED | talkers
    idle = []
    for name, source in SOURCES.items():
        if told := marks(source):
            lines = {line for line, called in names(TREES[name]) if called in speak}
            near = [range(mark + 1, mark + 1 + NEAR) for mark in told]
            idle += [f"{name}, line {a[0]}" for a in near if not lines.intersection(a)]
    assert not idle


def test_a_collective_without_a_mark_is_found():
    source = "def f(x):\n  y = lax.psum(x, 'a')\n  return y\n"
    assert silent(source) == [2]
    marked = source.replace("  y", "  # Devices talk over a: x,\n  # its bytes.\n  y")
    assert silent(marked) == [] and list(marks(marked)) == [3]
    assert silent(marked + "g = lax.pmax\n") == [6]
