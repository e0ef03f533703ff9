"""BERT and MiniLM: encoders with norms after each sum, positions and token types learned."""

from dataclasses import replace

from model.config import Arch, Attention, Embeddings, Head, ModelConfig, Norm, Rope
from model.families.family import PLAIN_CURVES, Family, Key

KEYS = {
    "vocab_size": "vocab",
    "hidden_size": "embed",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "hidden_act": Key(("arch.activation",), PLAIN_CURVES),
    "layer_norm_eps": "arch.norm.eps",
    "max_position_embeddings": "arch.embeddings.positions",
    "type_vocab_size": "arch.embeddings.types",
    "tie_word_embeddings": "arch.head.tied",
}
NAMES = {
    "bert.embeddings.word_embeddings.weight": "embedding.table",
    "bert.embeddings.position_embeddings.weight": "positions.table",
    "bert.embeddings.token_type_embeddings.weight": "types.table",
    "bert.embeddings.LayerNorm.weight": "embedding_norm.scale",
    "bert.embeddings.LayerNorm.bias": "embedding_norm.bias",
    "bert.encoder.layer.{}.attention.self.query.weight": "block.attention.qkv.weight[q]",
    "bert.encoder.layer.{}.attention.self.key.weight": "block.attention.qkv.weight[k]",
    "bert.encoder.layer.{}.attention.self.value.weight": "block.attention.qkv.weight[v]",
    "bert.encoder.layer.{}.attention.self.query.bias": "block.attention.qkv.bias[q]",
    "bert.encoder.layer.{}.attention.self.key.bias": "block.attention.qkv.bias[k]",
    "bert.encoder.layer.{}.attention.self.value.bias": "block.attention.qkv.bias[v]",
    "bert.encoder.layer.{}.attention.output.dense.weight": "block.attention.out.weight",
    "bert.encoder.layer.{}.attention.output.dense.bias": "block.attention.out.bias",
    "bert.encoder.layer.{}.attention.output.LayerNorm.weight": "block.norm1.scale",
    "bert.encoder.layer.{}.attention.output.LayerNorm.bias": "block.norm1.bias",
    "bert.encoder.layer.{}.intermediate.dense.weight": "block.mlp.up.weight",
    "bert.encoder.layer.{}.intermediate.dense.bias": "block.mlp.up.bias",
    "bert.encoder.layer.{}.output.dense.weight": "block.mlp.down.weight",
    "bert.encoder.layer.{}.output.dense.bias": "block.mlp.down.bias",
    "bert.encoder.layer.{}.output.LayerNorm.weight": "block.norm2.scale",
    "bert.encoder.layer.{}.output.LayerNorm.bias": "block.norm2.bias",
}
POOLER = {
    "bert.pooler.dense.weight": "head.dense.weight",
    "bert.pooler.dense.bias": "head.dense.bias",
}
IGNORED = ("*embeddings.position_ids", "*embeddings.token_type_ids")  # 0, 1, 2 ... and zeros
ONLY = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}

ARCH = Arch(
    norm=Norm("layer", eps=1e-12, bias=True, placement="post"),
    rope=Rope(theta=0.0),
    attention=Attention(causal=False, qkv_bias=True, out_bias=True),
    head=Head("masked", tied=True),
    embeddings=Embeddings(positions=512, types=2, norm=True),
    activation="gelu_erf",
    mlp_bias=True,
)
POOLED = replace(ARCH, head=Head("pooler"))
BASE = ModelConfig(
    layers=12, embed=768, heads=12, kv_heads=12, head_dim=64, mlp=3072, vocab=30522, arch=ARCH
)
LARGE = replace(BASE, layers=24, embed=1024, heads=16, kv_heads=16, mlp=4096)
MINILM = replace(BASE, layers=6, embed=384, head_dim=32, mlp=1536, arch=POOLED)

FAMILY = Family(
    name="bert",
    published="Devlin et al. 2018, arXiv:1810.04805; MiniLM: Wang et al. 2020, arXiv:2002.10957",
    architectures={
        "BertForMaskedLM": "masked",
        "BertForPreTraining": "masked",
        "BertForSequenceClassification": "classifier",
        "BertModel": "pooler",
    },
    arch=ARCH,
    keys=KEYS,
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "tie_word_embeddings": True,
    },
    names=NAMES,
    heads={
        "masked": {
            "cls.predictions.transform.dense.weight": "head.dense.weight",
            "cls.predictions.transform.dense.bias": "head.dense.bias",
            "cls.predictions.transform.LayerNorm.weight": "head.norm.scale",
            "cls.predictions.transform.LayerNorm.bias": "head.norm.bias",
            "cls.predictions.bias": "head.bias",
            "cls.predictions.decoder.weight": "head.table",
            "cls.predictions.decoder.bias": "head.bias",
        },
        "classifier": {
            **POOLER,
            "classifier.weight": "head.classifier.weight",
            "classifier.bias": "head.classifier.bias",
        },
        "pooler": POOLER,
    },
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    prefix="bert.",
    ignored=(*IGNORED, "cls.seq_relationship.*"),
    aliases={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    only=ONLY,
    gguf="bert",
    sizes={  # config.json of google-bert/NAME and sentence-transformers/NAME
        "bert-base-uncased": BASE,
        "bert-base-cased": replace(BASE, vocab=28996),
        "bert-large-uncased": LARGE,
        "bert-large-cased": replace(LARGE, vocab=28996),
        "all-MiniLM-L6-v2": MINILM,
        "all-MiniLM-L12-v2": replace(MINILM, layers=12),
    },
)
