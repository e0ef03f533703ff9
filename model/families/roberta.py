"""RoBERTa: BERT with positions that begin after the padding's, and heads of its own."""

from dataclasses import replace

from model.config import Embeddings, Norm
from model.families import bert
from model.families.family import Family, Key

ARCH = replace(
    bert.ARCH,
    norm=Norm("layer", eps=1e-5, bias=True, placement="post"),
    embeddings=Embeddings(positions=514, first=2, types=1, norm=True),
)
BASE = replace(bert.BASE, vocab=50265, arch=ARCH)

FAMILY = Family(
    name="roberta",
    published="Liu et al. 2019, arXiv:1907.11692",
    architectures={
        "RobertaForMaskedLM": "masked",
        "RobertaForSequenceClassification": "classifier",
        "RobertaModel": "pooler",
    },
    arch=ARCH,
    keys={
        **bert.KEYS,
        # The head's curve is this one whatever config.json says.
        "hidden_act": Key(("arch.activation",), {"gelu": "gelu_erf"}),
        "pad_token_id": Key(("arch.embeddings.first",), plus=1),
    },
    defaults={
        **bert.FAMILY.defaults,
        "vocab_size": 50265,
        "pad_token_id": 1,
    },
    names={name.replace("bert.", "roberta.", 1): slot for name, slot in bert.NAMES.items()},
    heads={
        "masked": {
            "lm_head.dense.weight": "head.dense.weight",
            "lm_head.dense.bias": "head.dense.bias",
            "lm_head.layer_norm.weight": "head.norm.scale",
            "lm_head.layer_norm.bias": "head.norm.bias",
            "lm_head.bias": "head.bias",
            "lm_head.decoder.weight": "head.table",
            "lm_head.decoder.bias": "head.bias",
        },
        "classifier": {
            "classifier.dense.weight": "head.dense.weight",
            "classifier.dense.bias": "head.dense.bias",
            "classifier.out_proj.weight": "head.classifier.weight",
            "classifier.out_proj.bias": "head.classifier.bias",
        },
        "pooler": {
            "roberta.pooler.dense.weight": "head.dense.weight",
            "roberta.pooler.dense.bias": "head.dense.bias",
        },
    },
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    prefix="roberta.",
    ignored=bert.IGNORED,
    aliases=bert.FAMILY.aliases,
    only=bert.ONLY,
    sizes={  # config.json of FacebookAI/NAME and distilbert/distilroberta-base
        "roberta-base": BASE,
        "roberta-large": replace(bert.LARGE, vocab=50265, arch=ARCH),
        "distilroberta-base": replace(BASE, layers=6),
    },
)
