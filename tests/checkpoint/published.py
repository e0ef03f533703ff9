"""Tiny models of every family, made by `transformers`, in the ways that published ones differ.

Only tests marked `parity` may call it: it imports torch.
"""

import functools
import warnings

import numpy as np

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
DISTIL = {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4}
SPARSE = {"num_experts_per_tok": 2, "num_hidden_layers": 3}
GEMMA = {**DECODER, "head_dim": 16, "sliding_window": 3, "query_pre_attn_scalar": 20}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 1000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# What each model is called here -> (class of transformers, its config).
MODELS = {
    "llama2": ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 4}),
    "llama3": ("LlamaForCausalLM", {**DECODER, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-tied": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-biases": ("LlamaForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "LlamaForCausalLM",
        {**DECODER, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3}},
    ),
    "llama-trunk": ("LlamaModel", DECODER),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 3}),
    "mistral-full": ("MistralForCausalLM", {**DECODER, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "Qwen2ForCausalLM",
        {**DECODER, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2ForCausalLM", {**DECODER, "rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 16}),
    "qwen3-yarn": (
        "Qwen3ForCausalLM",
        {
            **DECODER,
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {
                **YARN,
                "attention_factor": 0.8,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
            },
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {
            **DECODER,
            **SPARSE,
            "head_dim": 16,
            "num_experts": 5,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-mixed": (
        "Qwen3MoeForCausalLM",
        {
            **DECODER,
            **SPARSE,
            "head_dim": 16,
            "num_experts": 5,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {**DECODER, **SPARSE, "num_local_experts": 5}),
    "gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "num_hidden_layers": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3-images": (
        "Gemma3ForConditionalGeneration",
        {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "olmo2": ("Olmo2ForCausalLM", DECODER),
    "phi3": ("Phi3ForCausalLM", {**DECODER, "sliding_window": 3}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32},
    ),
    "bert": ("BertModel", ENCODER),
    "bert-masked": ("BertForMaskedLM", ENCODER),
    "bert-untied": ("BertForMaskedLM", {**ENCODER, "tie_word_embeddings": False}),
    "bert-pretraining": ("BertForPreTraining", {**ENCODER, "hidden_act": "gelu_new"}),
    "bert-classifier": ("BertForSequenceClassification", {**ENCODER, "num_labels": 3}),
    "roberta": ("RobertaModel", {**ENCODER, "type_vocab_size": 1}),
    "roberta-masked": ("RobertaForMaskedLM", ENCODER),
    "roberta-classifier": ("RobertaForSequenceClassification", ENCODER),
    "distilbert": ("DistilBertModel", DISTIL),
    "distilbert-masked": ("DistilBertForMaskedLM", DISTIL),
    "distilbert-classifier": ("DistilBertForSequenceClassification", {**DISTIL, "num_labels": 5}),
}


@functools.cache
def library():
    """transformers and torch, imported with their warnings their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    return transformers, torch


def make(name):
    """A model of MODELS with weights that hide nothing: no norm is one, no bias zero."""
    transformers, torch = library()
    kind, values = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = getattr(transformers, kind)
        model = build(build.config_class(**values)).eval().float()
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    for path, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        if "norm" in path.lower() or "ln_" in path:
            centre = 0.0 if kind.startswith("Gemma") or path.endswith("bias") else 1.0
            weight.data = centre + 0.3 * noise
        elif weight.ndim == 1:
            weight.data = 0.3 * noise
        else:
            weight.data = noise * (weight.shape[-1] ** -0.5 if "embed" not in path else 0.5)
    return model


def load(folder, kind):
    """The model that transformers loads from a folder, which must hold it and nothing else."""
    transformers, torch = library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, found = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    wrong = {key: sorted(found[key]) for key in ("missing_keys", "unexpected_keys") if found[key]}
    assert not wrong, wrong
    return model.eval()


def run(model, ids, **inputs):
    """(logits or the like, hidden states: what goes into the layers, then after each)."""
    _, torch = library()
    inputs = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    with torch.no_grad():
        out = model(input_ids=torch.tensor(np.asarray(ids)), output_hidden_states=True, **inputs)
    hidden = [state.numpy() for state in out.hidden_states]
    for key in ("logits", "prediction_logits", "pooler_output", "last_hidden_state"):
        if out.get(key) is not None:
            return out[key].numpy(), hidden
    raise AssertionError(list(out))
