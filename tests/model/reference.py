"""The formulas of the model in float64 NumPy, one token and one head at a time.

Shapes: B rows, T tokens, N query heads, K kv heads, H head size, D embed, F hidden, V vocabulary.
"""

import numpy as np


def rope(x_TNH, positions_T, theta):
    """Su et al. 2021, in complex numbers: pair i turns by position * theta^(-2i / H)."""
    half = x_TNH.shape[-1] // 2
    z_TNh = x_TNH[..., :half] + 1j * x_TNH[..., half:]
    turn_Th = np.exp(1j * np.outer(positions_T, theta ** (-np.arange(half) / half)))
    z_TNh = z_TNh * turn_Th[:, None]
    return np.concatenate([z_TNh.real, z_TNh.imag], axis=-1)


def rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps):
    x = x - np.mean(x, axis=-1, keepdims=True)
    return rms_norm(x, scale, eps) + bias


def attention(q_TNH, k_TKH, v_TKH, segments_T, *, scale, window=0, softcap=0.0):
    """One row, one token and one head at a time, over the list of what the token may see."""
    out_TNH, groups = np.zeros_like(q_TNH), q_TNH.shape[1] // k_TKH.shape[1]
    for t, n in np.ndindex(q_TNH.shape[:2]):
        seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t]]
        seen = [s for s in seen if not window or t - s < window]
        z = k_TKH[seen, n // groups] @ q_TNH[t, n] * scale
        z = softcap * np.tanh(z / softcap) if softcap else z
        weights = np.exp(z - z.max())
        out_TNH[t, n] = weights / weights.sum() @ v_TKH[seen, n // groups]
    return out_TNH


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """Hendrycks & Gimpel 2016, with the tanh that GPT-2 uses."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


CURVES = {
    "swiglu": silu,
    "geglu": gelu,
    "gelu": gelu,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def mlp(x_TD, weights, activation):
    """`weights`: up or gate_up, down, each with `weight` and, or not, `bias`."""

    def linear(name, x, part=()):
        weight, bias = weights[name]["weight"][part], weights[name].get("bias")
        return x @ weight.T + (0 if bias is None else bias[part])

    curve = CURVES[activation]
    if "gate_up" in weights:
        return linear("down", curve(linear("gate_up", x_TD, 0)) * linear("gate_up", x_TD, 1))
    return linear("down", curve(linear("up", x_TD)))


def loss(logits_NV, targets_N, weights_N, z_loss=0.0):
    """(sum of weight * (nats + z_loss log(Z)^2), sum of weight * nats)."""
    total = nats = 0.0
    for z, target, weight in zip(logits_NV, targets_N, weights_N, strict=True):
        log_Z = np.log(np.sum(np.exp(z - z.max()))) + z.max()
        nats += weight * (log_Z - z[target])
        total += weight * (log_Z - z[target] + z_loss * log_Z**2)
    return total, nats


def logits(params, cfg, ids_T, positions_T, segments_T):
    """[T, V] of one row: a whole decoder with the parameters of ours."""
    arch = cfg.arch

    def norm(x, weights):
        if arch.norm.kind == "rms":
            return rms_norm(x, weights["scale"], arch.norm.eps)
        return layer_norm(x, weights["scale"], weights.get("bias", 0), arch.norm.eps)

    def attend(x_TD, weights, window):
        kv_groups = np.einsum("TD,KJHD->TKJH", x_TD, weights["qkv"]["weight"])
        kv_groups = kv_groups + weights["qkv"].get("bias", 0)
        q_TNH = kv_groups[:, :, :-2].reshape(len(x_TD), cfg.heads, cfg.head_dim)
        k_TKH, v_TKH = kv_groups[:, :, -2], kv_groups[:, :, -1]
        if arch.attention.qk_norm:
            q_TNH = rms_norm(q_TNH, weights["q_norm"]["scale"], arch.norm.eps)
            k_TKH = rms_norm(k_TKH, weights["k_norm"]["scale"], arch.norm.eps)
        theta = (window and arch.rope.local_theta) or arch.rope.theta
        o_TNH = attention(
            rope(q_TNH, positions_T, theta),
            rope(k_TKH, positions_T, theta),
            v_TKH,
            segments_T,
            scale=arch.attention.scale or cfg.head_dim**-0.5,
            window=window,
            softcap=arch.attention.softcap,
        )
        flat = weights["out"]["weight"].reshape(cfg.embed, -1)
        return o_TNH.reshape(len(x_TD), -1) @ flat.T + weights["out"].get("bias", 0)

    x_TD = params["embedding"]["table"][ids_T] * (cfg.embed**0.5 if arch.embed_scale else 1)
    for i, weights in enumerate(layers(params, cfg)):
        window = arch.attention.windows[i % len(arch.attention.windows)]
        x_TD = x_TD + attend(norm(x_TD, weights["norm1"]), weights["attention"], window)
        x_TD = x_TD + mlp(norm(x_TD, weights["norm2"]), weights["mlp"], arch.activation)
    table = params["embedding" if arch.head.tied else "head"]["table"]
    z_TV = norm(x_TD, params["norm"]) @ table.T
    return arch.head.softcap * np.tanh(z_TV / arch.head.softcap) if arch.head.softcap else z_TV


def layers(params, cfg):
    """The weights of each layer, in the order in which they are applied."""
    places = len(params["blocks"])
    repeats = cfg.layers // places
    for i in range(cfg.layers):
        if i // places < repeats:
            yield at(params["blocks"][i % places], i // places)
        else:
            yield params["rest"][i % places]


def at(tree, i):
    """Layer i of a stack of weights."""
    return {k: at(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
