"""config.json of published models, both ways: a Family and a ModelConfig.

Reads the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`), and
writes the former, which both read. A value with which we would compute something else than the
model that was trained is a ValueError: the key, its value, and what there is.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import Head, Init, ModelConfig, Moe, Rope, Scaling
from model.families import FAMILIES, by_architecture
from model.families.family import Family, Key
from model.precision import Precision

Config = Mapping[str, Any]

MOST = 1 << 26  # of any size: far beyond published models
MOST_LAYERS, MOST_EXPERTS = 4096, 4096
FULL, WINDOWED = "full_attention", "sliding_attention"  # of layer_types
# Kind of scaling, which is its rope_type but for "none", and its keys: field.
SCALINGS = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "trained",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "trained",
        "attention_factor": "magnitude",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
    },
}
# Of every family: key -> the values that we can compute.
ONLY = {"quantization_config": (None,), "partial_rotary_factor": (None, 1.0)}
# What a changed config must not keep of its original: other ways to say what is written.
STALE = ("rope_parameters", "rope_scaling", "sliding_window_pattern", "_sliding_window_pattern")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_config(config: Config) -> tuple[Family, ModelConfig]:
    """The family of a config.json and the sizes that it says, with its dtype for everything.

    float16 is read as float32. ValueError for an architecture of no family, and for a value that
    is wrong or that our model cannot compute.
    """
    family, kind = _family(config)
    given = _own(family, config)
    for key, allowed in {**ONLY, **family.only}.items():
        if key in given and given[key] not in allowed:
            supported = " or ".join(map(repr, allowed))
            raise ValueError(f"{key}={given[key]!r} is not supported, only {supported}")
    given = {**family.defaults, **given}
    values: dict[str, Any] = {"arch.head.kind": kind}
    for key, rule in _rules(family):
        for path in rule.fields:
            values[path] = _read(key, given[key], rule, path, values)
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_dim", _head_dim(values))
    if kind not in ("language", "masked"):
        values["arch.head.tied"] = False
    if kind == "classifier":
        values["arch.head.labels"] = _labels(given)
    for path, most in (("layers", MOST_LAYERS), ("arch.moe.experts", MOST_EXPERTS)):
        if values.get(path, 0) > most:
            raise ValueError(f"{path}={values[path]} is more than {most}")
    if "sliding_window" in family.defaults:
        values["arch.attention.windows"] = _windows(family, given, values["layers"])
    if "rope_theta" in family.defaults:
        values["arch.rope"] = _rope(family, given)
    dtype = str(given.get("dtype") or given.get("torch_dtype")).removeprefix("torch.")
    values["dtype"] = values["param_dtype"] = dtype if dtype == "bfloat16" else "float32"
    return family, _with(ModelConfig(arch=family.arch), values)


def write_config(family: Family, cfg: ModelConfig, original: Config | None = None) -> dict:
    """The config.json from which `transformers` builds this model, with `cfg.param_dtype`.

    `original` is what the model was imported with: what it says beyond our sizes stays, and if
    none of these changed, its spelling too. Without it the special tokens are null, and
    `max_position_embeddings`, which our sizes do not hold, is left to `transformers`.
    ValueError if the family cannot say what the model is.
    """
    written = _written(family, cfg)
    differences = _differences(_read_back(written), cfg)
    if differences:
        raise ValueError(f"{family.name} cannot say {', '.join(differences)}")
    if original is None:
        config = {**dict.fromkeys(TOKENS), **written}
    else:
        own = _own(family, original, spelled=False)
        same = not _differences(_read_back(original), cfg)
        kept = {key: own[key] for key in own if same or key not in (*STALE, *family.spellings)}
        named = {key: written[key] for key in ("architectures", "model_type")}
        config = {**kept, **(named if same else written)}
    config[("torch_dtype", "dtype")["dtype" in config]] = cfg.param_dtype
    return config


def family_of(cfg: ModelConfig) -> Family:
    """The family that a model of our own can be exported as.

    ValueError says which values stand in the way of the nearest one.
    """
    found = {}
    for family in FAMILIES:
        said = _read_back(_written(family, cfg))
        differences = _differences(said, cfg)
        if not differences:
            return family
        found[family.name] = isinstance(said, ValueError), len(differences), differences
    name, (*_, differences) = min(found.items(), key=lambda item: item[1])
    raise ValueError(f"no family has {', '.join(differences)}; without, this is a {name}")


def _family(config: Config) -> tuple[Family, str]:
    """The family, and its kind of head."""
    names, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list):
        raise ValueError(f"architectures={names!r} must be a list")
    if names:
        family = by_architecture(str(names[0]))
        if model_type not in (None, family.name, family.outer):
            raise ValueError(
                f"model_type={model_type!r} must be {family.name!r} where architectures={names!r}"
            )
        return family, family.architectures[names[0]]
    for family in FAMILIES:
        if model_type and model_type in (family.name, family.outer):
            return family, next(iter(family.architectures.values()))
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"model_type={model_type!r} is none of {known}")


def _own(family: Family, config: Config, *, spelled: bool = True) -> dict:
    """What config.json says of this model, out of what it says of a larger one."""
    inner = config.get(family.inner)
    if isinstance(inner, Mapping):
        tied = config.get("tie_word_embeddings", True)
        shared = {key: config[key] for key in (*TOKENS, "dtype", "torch_dtype") if key in config}
        config = {**shared, **inner, "tie_word_embeddings": tied}
    if not spelled:
        return dict(config)
    return {family.spellings.get(key, key): value for key, value in config.items()} | {
        key: value for key, value in config.items() if key not in family.spellings
    }


def _rules(family: Family) -> list[tuple[str, Key]]:
    return [
        (key, rule if isinstance(rule, Key) else Key((rule,))) for key, rule in family.keys.items()
    ]


def _read(key: str, value: Any, rule: Key, path: str, values: Config) -> Any:
    """The value of a field; `values` has those of the keys before."""
    if value is None:
        match path:
            case "kv_heads":
                return values["heads"]
            case "head_dim":
                return _head_dim(values)
            case "mlp":
                return 4 * values["embed"]
            case "arch.attention.softcap" | "arch.head.softcap":
                return 0.0
    if rule.values is not None:
        if not isinstance(value, str) or value not in rule.values:
            known = ", ".join(rule.values)
            raise ValueError(f"{key}={value!r} is not supported: {known} are")
        return rule.values[value]
    if isinstance(_get(ModelConfig(), path), bool):
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r} must be true or false")
        return value
    if isinstance(_get(ModelConfig(), path), int):
        return _whole(key, value, 1 - rule.plus) + rule.plus
    return _number(key, value) ** rule.power


def _whole(key: str, value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MOST:
        raise ValueError(f"{key}={value!r} must be a whole number, {least} to {MOST}")
    return value


def _object(key: str, given: Config) -> Config:
    """The object that is a key's value; empty without the key."""
    value = given.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={value!r} must be an object")
    return value


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise ValueError(f"{key}={value!r} must be a number above 0")
    return float(value)


def _head_dim(values: Config) -> int:
    embed, heads = values["embed"], values["heads"]
    if not heads or embed % heads:
        raise ValueError(f"embed={embed} must be a multiple of heads={heads}")
    return embed // heads


def _labels(given: Config) -> int:
    named = given.get("id2label")
    if isinstance(named, Mapping) and named:
        return len(named)
    return _whole("num_labels", given.get("num_labels", 2), 1)


def _windows(family: Family, given: Config, layers: int) -> tuple[int, ...]:
    """The shortest pattern of windows; 0: none."""
    window = given["sliding_window"]
    window = 0 if window is None else _whole("sliding_window", window)
    types = given["layer_types"] if "layer_types" in family.defaults else None
    if not given.get("use_sliding_window", True):
        windowed = [False] * layers
    elif types is not None:
        known = isinstance(types, list) and all(each in (FULL, WINDOWED) for each in types)
        if not known or len(types) != layers:
            raise ValueError(f"layer_types={types!r} must be {layers} of {FULL}, {WINDOWED}")
        windowed = [each == WINDOWED for each in types]
    elif "sliding_window_pattern" in given:
        pattern = _whole("sliding_window_pattern", given["sliding_window_pattern"], 1)
        windowed = [(layer + 1) % pattern > 0 for layer in range(layers)]
    else:
        first = _whole("max_window_layers", given.get("max_window_layers", 0))
        windowed = [layer >= first for layer in range(layers)]
    return _shortest(tuple(window if each else 0 for each in windowed))


def _shortest(windows: tuple[int, ...]) -> tuple[int, ...]:
    """The shortest pattern that repeats to these, whole or in part."""
    size = len(windows)
    return next(
        windows[:n] for n in range(1, size + 1) if (windows[:n] * -(-size // n))[:size] == windows
    )


def _rope(family: Family, given: Config) -> Rope:
    """RoPE, in either spelling; transformers 5 can say it for full and windowed layers apart."""
    said = _object("rope_parameters", given)
    apart = FULL in said or WINDOWED in said
    full, windowed = (_object(FULL, said), _object(WINDOWED, said)) if apart else (said, {})
    full = {**full, **_object("rope_scaling", given)}
    theta = _number("rope_theta", full.get("rope_theta", given["rope_theta"]))
    scaling = _scaling(family, full, given)
    local = given.get("rope_local_base_freq", 0.0)
    if windowed and windowed == full:  # stretched alike
        return Rope(theta, scaling=scaling)
    if windowed:
        local = windowed.get("rope_theta", local or theta)
        if _scaling(family, windowed, given).kind != "none":
            raise ValueError(f"rope_parameters={said!r} scales windowed layers")
    return Rope(theta, _number("rope_local_base_freq", local) if local else 0.0, scaling)


def _scaling(family: Family, said: Config, given: Config) -> Scaling:
    kind = said.get("rope_type", said.get("type", "default"))
    kind = "none" if kind == "default" else kind
    if kind not in family.scalings or said.get("partial_rotary_factor", 1.0) != 1.0:
        known = ", ".join(family.scalings).replace("none", "default")
        raise ValueError(
            f"RoPE of {dict(said)!r} is not supported: a {family.name} turns whole "
            f"heads, with rope_type {known}"
        )
    values = {}
    trained = "original_max_position_embeddings"
    length = given.get(trained, said.get(trained, given.get("max_position_embeddings")))
    for key, field in SCALINGS[kind].items():
        value = length if field == "trained" else said.get(key)
        if isinstance(getattr(Scaling(), field), bool):
            values[field] = value is not False
        elif value is not None:
            values[field] = _whole(key, value) if field == "trained" else _number(key, value)
        elif field == "factor":
            raise ValueError(f"RoPE of {dict(said)!r} lacks {key}")
    scales = said.get("mscale"), said.get("mscale_all_dim")
    if kind == "yarn" and "magnitude" not in values and all(scales):
        turns = math.log(max(values["factor"], 1.0))
        over, under = (0.1 * _number("mscale", scale) * turns + 1 for scale in scales)
        values["magnitude"] = over / under
    return Scaling(kind, **values)


def _written(family: Family, cfg: ModelConfig) -> dict:
    """What the family's keys say of the model, whether or not that is all of it."""
    arch, head = cfg.arch, cfg.arch.head
    named = [name for name, kind in family.architectures.items() if kind == head.kind]
    config: dict[str, Any] = {"architectures": named[:1], "model_type": family.name}
    for key, rule in _rules(family):
        config[key] = _write(cfg, rule, family.defaults[key])
    if head.kind not in ("language", "masked"):
        config.pop("tie_word_embeddings", None)
    if head.kind == "classifier":
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(head.labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(head.labels)}
    if "sliding_window" in family.defaults:
        windows = [cfg.window(layer) for layer in range(cfg.layers)]
        window = max(windows) or None
        if "layer_types" in family.defaults:
            config["layer_types"] = [WINDOWED if each else FULL for each in windows]
            window = window or family.defaults["sliding_window"]
        if "use_sliding_window" in family.defaults:
            config["use_sliding_window"] = any(windows)
        config["sliding_window"] = window
    if "rope_theta" in family.defaults:
        config["rope_theta"] = arch.rope.theta
        config["rope_scaling"] = _write_scaling(arch.rope.scaling)
        if "rope_local_base_freq" in family.defaults:
            config["rope_local_base_freq"] = arch.rope.local_theta or arch.rope.theta
    return config


def _write(cfg: ModelConfig, rule: Key, default: Any) -> Any:
    path = rule.fields[0]
    value = _get(cfg, path)
    if rule.values is not None:
        return next((theirs for theirs, ours in rule.values.items() if ours == value), default)
    if path == "arch.attention.scale":
        value = value or cfg.head_dim**-0.5
    if path.endswith("softcap"):
        return value or None
    if rule.power != 1:
        value = value ** (1 / rule.power)
        return round(value) if math.isclose(value, round(value)) else value
    return value - rule.plus if rule.plus else value


def _write_scaling(scaling: Scaling) -> dict | None:
    if scaling.kind == "none":
        return None
    values = {key: getattr(scaling, field) for key, field in SCALINGS[scaling.kind].items()}
    if not scaling.magnitude:
        values.pop("attention_factor", None)
    return {"rope_type": scaling.kind, **values}


def _read_back(config: Config) -> ModelConfig | ValueError:
    try:
        return read_config(config)[1]
    except ValueError as error:
        return error


def _differences(said: ModelConfig | ValueError, cfg: ModelConfig) -> list[str]:
    """The fields, with the values of `cfg`, in which both compute differently."""
    if isinstance(said, ValueError):
        return [str(said)]
    ours, theirs = (_flat(_computed(each)) for each in (cfg, said))
    return [
        f"{path}={value!r}"
        for path, value in ours.items()
        if value != theirs[path]
        and not (isinstance(value, float) and math.isclose(value, theirs[path]))
    ]


def _computed(cfg: ModelConfig) -> ModelConfig:
    """The config with one spelling for what is computed, and nothing of how it is trained."""
    arch, head, moe, rope = cfg.arch, cfg.arch.head, cfg.arch.moe, cfg.arch.rope
    windows = tuple(cfg.window(layer) for layer in range(cfg.layers))
    if not any(windows) or not rope.theta:
        rope = replace(rope, local_theta=0.0)
    elif rope.scaling.kind == "none":
        rope = replace(rope, local_theta=rope.local_theta or rope.theta)
    kind = rope.scaling.kind
    of_kind = {field: getattr(rope.scaling, field) for field in SCALINGS[kind].values()}
    own_head = Head(
        head.kind,
        tied=head.tied and head.kind in ("language", "masked"),
        labels=head.labels if head.kind == "classifier" else 1,
        curve=head.curve if head.kind in ("classifier", "pooler") else "tanh",
        softcap=head.softcap,
    )
    return replace(
        cfg,
        dtype="float32",
        param_dtype="float32",
        remat="none",
        unroll=1,
        precision=Precision(),
        arch=replace(
            arch,
            rope=replace(rope, scaling=Scaling(kind, **of_kind)),
            attention=replace(
                arch.attention, windows=windows, scale=arch.attention.scale or cfg.head_dim**-0.5
            ),
            head=own_head,
            moe=replace(moe, mlp=moe.mlp or cfg.mlp, balance=0.0, z_loss=0.0)
            if moe.experts
            else Moe(),
            init=Init(),
        ),
    )


def _get(cfg: ModelConfig, path: str) -> Any:
    for name in path.split("."):
        cfg = getattr(cfg, name)
    return cfg


def _with(config: Any, values: Config) -> Any:
    """The dataclass with the fields at these dotted paths replaced, all at once."""
    nested: dict[str, dict] = {}
    changed = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            changed[name] = value
    for name, inner in nested.items():
        changed[name] = _with(changed.get(name, getattr(config, name)), inner)
    return replace(config, **changed)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.is_dataclass(value)
        flat |= _flat(value, f"{prefix}{field.name}.") if inner else {prefix + field.name: value}
    return flat
