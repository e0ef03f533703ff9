"""Setting fields from text and JSON, held against every field that a Run has."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from configs import fields
from configs.run import Run, from_json, to_json
from data.config import DataConfig
from model.config import DTYPES, KERNELS, MLPS, NORMS, REMATS
from model.precision import FORMATS, ROUNDINGS, SCALINGS
from optim.config import OPTIMIZERS, SCHEDULES
from sharding import schedule
from sharding.layout import MeshAxis

LEAVES = list(fields.leaves(Run()))
PATHS = [path for path, _, _ in LEAVES]
# What must be set as well before a field can be anything but its default.
NEEDS = {
    "model.arch.norm.bias": {"model.arch.norm.kind": "layer"},
    "model.arch.embeddings.first": {"model.arch.embeddings.positions": "8"},
    "model.precision.attention.rounding": {"model.precision.attention.wgrad": "int8"},
    "model.precision.mlp.rounding": {"model.precision.mlp.wgrad": "int8"},
    "model.precision.head.rounding": {"model.precision.head.wgrad": "int8"},
    "model.precision.experts.rounding": {"model.precision.experts.dgrad": "int8"},
    "model.precision.attention.scaling": {"model.precision.attention.wgrad": "fp8"},
    "model.precision.mlp.scaling": {"model.precision.mlp.wgrad": "fp8"},
    "pipeline.repeats": {"pipeline.schedule": "interleaved"},
}
# Their kind of layer shares its fields with others, which have more than one value of this one.
ALONE = ("model.precision.head.scaling", "model.precision.experts.scaling")
TEXTS = ("other", "relu", "all", "linear", "sandwich", "masked")
TEXTS += (
    *DTYPES,
    *FORMATS,
    *ROUNDINGS,
    *SCALINGS,
    *KERNELS,
    *MLPS,
    *NORMS,
    *REMATS,
    *OPTIMIZERS,
    *SCHEDULES,
    *schedule.SCHEDULES,
)


def get(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def candidates(kind, value):
    """Values of a field's type; at least one of them is valid and not `value`."""
    if kind is bool:
        return [not value]
    if kind is int:
        return [value + 1, value * 2, 2]
    if kind is float:
        return [value + 0.125, 0.3125, 1e-30]
    if kind is str:
        return TEXTS
    if kind == MeshAxis:
        return [None, "data", "tensor", ("fsdp", "data")]
    return {
        tuple[int, ...]: [(1024, 1024, 0)],
        tuple[float, ...]: [(0.1,), (0.1, 1e-7)],
        tuple[str, ...]: [("a/b.txt", "c d"), ("stdlib", "x"), ("optimizer", "mid")],
    }[kind]


def changed(path, kind, value):
    """A Run in which `path` alone, besides what it needs, is not the default; and its value."""
    for other in candidates(kind, value):
        texts = {path: fields.spell(other), **NEEDS.get(path, {})}
        try:
            run = fields.override(Run(), texts)
        except ValueError:
            continue
        if get(run, path) != value:
            return run, other
    raise AssertionError(f"no candidate for {path}")


@pytest.mark.parametrize(("path", "kind", "value"), LEAVES, ids=PATHS)
def test_every_field_is_set_by_text_alone_and_survives_json(path, kind, value):
    if path in ALONE:
        with pytest.raises(AssertionError, match="no candidate"):
            changed(path, kind, value)
        return
    run, other = changed(path, kind, value)
    assert get(run, path) == other
    assert type(get(run, path)) is type(other)
    differing = [p for p, _, v in fields.leaves(run) if v != get(Run(), p)]
    assert set(differing) == {path, *NEEDS.get(path, {})}
    back = from_json(json.loads(json.dumps(to_json(run))))
    assert back == run
    assert hash(back) == hash(run)


@pytest.mark.parametrize(("path", "kind", "value"), LEAVES, ids=PATHS)
def test_the_spelling_of_every_default_is_read_back_exactly(path, kind, value):
    if value == "":  # the one value that only JSON and recipes can give
        return
    assert fields.parse(kind, fields.spell(value)) == value
    assert fields.override(Run(), {path: fields.spell(value)}) == Run()


@pytest.mark.parametrize(("path", "kind", "value"), LEAVES, ids=PATHS)
def test_every_field_refuses_json_of_a_wrong_type(path, kind, value):
    wrong = {int: [True, 1.5, "1", None, []], float: [True, "1", None, float("inf")]}
    wrong |= {bool: [1, "true", None], str: [1, None, ["a"]], MeshAxis: [1, True, [1], {}]}
    for bad in wrong.get(kind, ["a", 1, None, [None], [True], [[]]]):
        data = to_json(Run())
        *groups, name = path.split(".")
        inner = data
        for group in groups:
            inner = inner[group]
        inner[name] = bad
        with pytest.raises(ValueError, match="must be") as caught:
            from_json(data)
        assert str(caught.value).startswith(path)


def test_every_field_has_a_default_so_that_a_partial_json_is_enough():
    assert from_json({}) == Run()
    assert from_json({"model": {"arch": {}}}) == Run()
    assert from_json({"steps": 7, "model": {"layers": 3}}).model.layers == 3


def test_two_overrides_that_are_valid_only_together_work_in_either_order():
    texts = {"model.heads": "6", "model.kv_heads": "3"}
    for order in (texts, dict(reversed(texts.items()))):
        model = fields.override(Run(), order).model
        assert (model.heads, model.kv_heads) == (6, 3)
    with pytest.raises(ValueError, match=r"^model: heads=6 must be a multiple of kv_heads=4$"):
        fields.override(Run(), {"model.heads": "6"})


def test_an_override_leaves_the_run_it_started_from_alone():
    run = Run()
    fields.override(run, {"model.arch.norm.eps": "1e-6"})
    assert run == Run()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "1_000", 1000),
        (int, "1e6", 1_000_000),
        (int, "-1", -1),
        (int, "2.5e3", 2500),
        (float, "3e-4", 3e-4),
        (float, "1", 1.0),
        (bool, "True", True),
        (bool, "no", False),
        (bool, "0", False),
        (tuple[int, ...], "", ()),
        (tuple[int, ...], "1024,1e3, 0", (1024, 1000, 0)),
        (tuple[str, ...], "a,b", ("a", "b")),
        (tuple[float, ...], ".5,1", (0.5, 1.0)),
        (MeshAxis, "none", None),
        (MeshAxis, "fsdp", "fsdp"),
        (MeshAxis, "data,fsdp", ("data", "fsdp")),
        (int | None, "None", None),
        (int | None, "3", 3),
    ],
)
def test_text_is_read_by_the_type_of_the_field(kind, text, value):
    assert fields.parse(kind, text) == value
    assert type(fields.parse(kind, text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "1.5"),
        (int, ""),
        (int, "true"),
        (int, "1e400"),
        (int, "nan"),
        (int, "9" * 5000),
        (int, str(2**60)),
        (float, "nan"),
        (float, "-inf"),
        (float, "1e999"),
        (float, "1,5"),
        (bool, "2"),
        (bool, ""),
        (str, ""),
        (tuple[int, ...], "1,,2"),
        (tuple[str, ...], "a,"),
        (tuple[float, ...], "0.5,inf"),
        (MeshAxis, ""),
        (MeshAxis, "data,"),
        (int | None, "nothing"),
    ],
)
def test_text_that_spells_no_value_of_the_type_is_refused(kind, text):
    with pytest.raises(ValueError, match=r"^must be "):
        fields.parse(kind, text)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "optim.lr"),
        ("model.lyers", "model.layers"),
        ("modle.layers", "model.layers"),
        ("modl.arch.nrm.eps", "model.arch.norm.eps"),
        ("model.norm.eps", "model.arch.norm.eps"),
        ("norm.eps", "model.arch.norm.eps"),
        ("model.lr", "optim.lr"),
        ("batch_size", "data.batch"),
        ("step", "steps"),
    ],
)
def test_the_nearest_field_is_the_one_that_was_meant(wrong, right):
    assert fields.nearest(Run, wrong) == right


@dataclass(frozen=True)
class Experts:
    count: int = 8
    top: int = 2

    def __post_init__(self):
        if self.top > self.count:
            raise ValueError(f"top={self.top} must be at most count={self.count}")


@dataclass(frozen=True)
class Layer:
    experts: Experts | None = None


@dataclass(frozen=True)
class Stack:
    layer: Layer = Layer()


def test_a_group_that_may_be_absent_is_made_by_setting_its_fields():
    stack = fields.override(Stack(), {"layer.experts.count": "1", "layer.experts.top": "1"})
    assert stack == Stack(Layer(Experts(1, 1)))
    assert fields.override(stack, {"layer.experts": "none"}) == Stack()
    for value in (stack, Stack()):
        assert fields.decode(Stack, json.loads(json.dumps(fields.encode(value)))) == value
    with pytest.raises(ValueError, match=r"^layer\.experts: top=2 must be at most count=1$"):
        fields.override(Stack(), {"layer.experts.count": "1"})
    for texts in (["layer.experts", "layer.experts.top"], ["layer.experts.top", "layer.experts"]):
        values = {path: "none" if path == "layer.experts" else "1" for path in texts}
        with pytest.raises(ValueError, match="cannot be set and be none as well"):
            fields.override(Stack(), values)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (dataclasses.replace(Run(), data=DataConfig(sources="books")), "data.sources='books'"),
        (dataclasses.replace(Run(), data=DataConfig(sources=["a"])), "must be a tuple, not a list"),
        (dataclasses.replace(Run(), steps=10.0), "steps=10.0 must be an integer"),
        (dataclasses.replace(Run(), model=None), "model=None must be a ModelConfig"),
        (dataclasses.replace(Run(), model={"layers": 2}), "must be a ModelConfig"),
    ],
)
def test_a_value_of_the_wrong_type_is_found_where_python_looks_away(run, message):
    fields.check_types(Run())
    with pytest.raises(ValueError, match="must be") as caught:
        fields.check_types(run)
    assert message in str(caught.value)


def test_many_overrides_at_once_reach_their_fields_and_no_other():
    groups = ("log", "eval", "checkpoint", "optim")
    some = [leaf for leaf in LEAVES if leaf[0].split(".")[0] in groups]
    some = [leaf for leaf in some if leaf[0] != "optim.name"]  # small moments need adamw
    wanted = {path: changed(path, kind, value)[1] for path, kind, value in some}
    run = fields.override(Run(), {path: fields.spell(value) for path, value in wanted.items()})
    for path, _, default in LEAVES:
        assert get(run, path) == wanted.get(path, default)
