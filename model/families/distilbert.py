"""DistilBERT: half of BERT's layers, without token types."""

from dataclasses import replace

from model.config import Embeddings, Head
from model.families import bert
from model.families.family import PLAIN_CURVES, Family, Key

ARCH = replace(
    bert.ARCH,
    embeddings=Embeddings(positions=512, norm=True),
    head=Head("masked", tied=True, curve="relu"),
)
BASE = replace(bert.BASE, layers=6, arch=ARCH)

FAMILY = Family(
    name="distilbert",
    published="Sanh et al. 2019, arXiv:1910.01108",
    architectures={
        "DistilBertForMaskedLM": "masked",
        "DistilBertForSequenceClassification": "classifier",
        "DistilBertModel": "none",
    },
    arch=ARCH,
    keys={
        "vocab_size": "vocab",
        "dim": "embed",
        "hidden_dim": "mlp",
        "n_layers": "layers",
        "n_heads": "heads",
        "activation": Key(("arch.activation",), PLAIN_CURVES),
        "max_position_embeddings": "arch.embeddings.positions",
        "tie_word_embeddings": "arch.head.tied",
    },
    defaults={
        "vocab_size": 30522,
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "activation": "gelu",
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    names={
        "distilbert.embeddings.word_embeddings.weight": "embedding.table",
        "distilbert.embeddings.position_embeddings.weight": "positions.table",
        "distilbert.embeddings.LayerNorm.weight": "embedding_norm.scale",
        "distilbert.embeddings.LayerNorm.bias": "embedding_norm.bias",
        "distilbert.transformer.layer.{}.attention.q_lin.weight": "block.attention.qkv.weight[q]",
        "distilbert.transformer.layer.{}.attention.k_lin.weight": "block.attention.qkv.weight[k]",
        "distilbert.transformer.layer.{}.attention.v_lin.weight": "block.attention.qkv.weight[v]",
        "distilbert.transformer.layer.{}.attention.q_lin.bias": "block.attention.qkv.bias[q]",
        "distilbert.transformer.layer.{}.attention.k_lin.bias": "block.attention.qkv.bias[k]",
        "distilbert.transformer.layer.{}.attention.v_lin.bias": "block.attention.qkv.bias[v]",
        "distilbert.transformer.layer.{}.attention.out_lin.weight": "block.attention.out.weight",
        "distilbert.transformer.layer.{}.attention.out_lin.bias": "block.attention.out.bias",
        "distilbert.transformer.layer.{}.sa_layer_norm.weight": "block.norm1.scale",
        "distilbert.transformer.layer.{}.sa_layer_norm.bias": "block.norm1.bias",
        "distilbert.transformer.layer.{}.ffn.lin1.weight": "block.mlp.up.weight",
        "distilbert.transformer.layer.{}.ffn.lin1.bias": "block.mlp.up.bias",
        "distilbert.transformer.layer.{}.ffn.lin2.weight": "block.mlp.down.weight",
        "distilbert.transformer.layer.{}.ffn.lin2.bias": "block.mlp.down.bias",
        "distilbert.transformer.layer.{}.output_layer_norm.weight": "block.norm2.scale",
        "distilbert.transformer.layer.{}.output_layer_norm.bias": "block.norm2.bias",
    },
    heads={
        "masked": {
            "vocab_transform.weight": "head.dense.weight",
            "vocab_transform.bias": "head.dense.bias",
            "vocab_layer_norm.weight": "head.norm.scale",
            "vocab_layer_norm.bias": "head.norm.bias",
            "vocab_projector.weight": "head.table",
            "vocab_projector.bias": "head.bias",
        },
        "classifier": {
            "pre_classifier.weight": "head.dense.weight",
            "pre_classifier.bias": "head.dense.bias",
            "classifier.weight": "head.classifier.weight",
            "classifier.bias": "head.classifier.bias",
        },
    },
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    prefix="distilbert.",
    ignored=bert.IGNORED,
    aliases=bert.FAMILY.aliases,
    sizes={  # config.json of distilbert/NAME
        "distilbert-base-uncased": BASE,
        "distilbert-base-cased": replace(BASE, vocab=28996),
    },
)
