"""GPT-2: learned positions, LayerNorm, biases everywhere."""

from dataclasses import replace

from model.config import Arch, Attention, Embeddings, Head, ModelConfig, Norm, Rope
from model.families.family import PLAIN_CURVES, Family, Key

ARCH = Arch(
    norm=Norm("layer", eps=1e-5, bias=True),
    rope=Rope(theta=0.0),
    attention=Attention(qkv_bias=True, out_bias=True),
    head=Head(tied=True),
    embeddings=Embeddings(positions=1024),
    activation="gelu",
    mlp_bias=True,
)
SMALL = ModelConfig(
    layers=12, embed=768, heads=12, kv_heads=12, head_dim=64, mlp=3072, vocab=50257, arch=ARCH
)

FAMILY = Family(
    name="gpt2",
    published="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    architectures={"GPT2LMHeadModel": "language", "GPT2Model": "none"},
    arch=ARCH,
    keys={
        "vocab_size": "vocab",
        "n_embd": "embed",
        "n_inner": "mlp",
        "n_layer": "layers",
        "n_head": "heads",
        "n_positions": "arch.embeddings.positions",
        "activation_function": Key(("arch.activation",), PLAIN_CURVES),
        "layer_norm_epsilon": "arch.norm.eps",
        "tie_word_embeddings": "arch.head.tied",
    },
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_inner": None,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    names={  # its matrices lie as [in, out]
        "transformer.wte.weight": "embedding.table",
        "transformer.wpe.weight": "positions.table",
        "transformer.h.{}.ln_1.weight": "block.norm1.scale",
        "transformer.h.{}.ln_1.bias": "block.norm1.bias",
        "transformer.h.{}.attn.c_attn.weight": "block.attention.qkv.weight[q,k,v].T",
        "transformer.h.{}.attn.c_attn.bias": "block.attention.qkv.bias[q,k,v]",
        "transformer.h.{}.attn.c_proj.weight": "block.attention.out.weight.T",
        "transformer.h.{}.attn.c_proj.bias": "block.attention.out.bias",
        "transformer.h.{}.ln_2.weight": "block.norm2.scale",
        "transformer.h.{}.ln_2.bias": "block.norm2.bias",
        "transformer.h.{}.mlp.c_fc.weight": "block.mlp.up.weight.T",
        "transformer.h.{}.mlp.c_fc.bias": "block.mlp.up.bias",
        "transformer.h.{}.mlp.c_proj.weight": "block.mlp.down.weight.T",
        "transformer.h.{}.mlp.c_proj.bias": "block.mlp.down.bias",
        "transformer.ln_f.weight": "norm.scale",
        "transformer.ln_f.bias": "norm.bias",
    },
    heads={"language": {"lm_head.weight": "head.table"}},
    copies={"lm_head.weight": "transformer.wte.weight"},
    prefix="transformer.",
    ignored=("*.attn.bias", "*.attn.masked_bias"),  # the causal mask, stored by old releases
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    spellings={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    gguf="gpt2",
    sizes={  # config.json of openai-community/NAME and distilbert/distilgpt2
        "gpt2": SMALL,
        "gpt2-medium": replace(SMALL, layers=24, embed=1024, heads=16, kv_heads=16, mlp=4096),
        "gpt2-large": replace(SMALL, layers=36, embed=1280, heads=20, kv_heads=20, mlp=5120),
        "gpt2-xl": replace(SMALL, layers=48, embed=1600, heads=25, kv_heads=25, mlp=6400),
        "distilgpt2": replace(SMALL, layers=6),
    },
)
