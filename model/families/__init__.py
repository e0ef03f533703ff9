"""The families of published models that load into the one Transformer: a file of data each."""

from model.families import (
    bert,
    distilbert,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
)
from model.families.family import Family

FAMILIES = tuple(
    module.FAMILY
    for module in (
        llama,
        mistral,
        qwen2,
        qwen3,
        qwen3_moe,
        gemma,
        gemma2,
        gemma3,
        olmo2,
        mixtral,
        phi3,
        gpt2,
        bert,
        roberta,
        distilbert,
    )
)


def by_architecture(name: str) -> Family:
    """The family of an entry of config.json's `architectures`; ValueError lists the known ones."""
    for family in FAMILIES:
        if name in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ValueError(f"architecture {name!r} is none of {known}")
