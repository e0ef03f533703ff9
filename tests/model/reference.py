"""The formulas of the model in float64 NumPy, one token and one head at a time.

Shapes: B rows, T tokens, N query heads, K kv heads, H head size, D embed, F hidden, V vocabulary.
"""

import math

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


def scaled(theta_h, scaling):
    """Frequencies of a stretched RoPE, one pair at a time."""
    out = []
    for i, f in enumerate(theta_h):
        wave, H = 2 * np.pi / f, 2 * len(theta_h)
        if scaling.kind == "linear":
            f = f / scaling.factor
        if scaling.kind == "llama3" and wave > scaling.trained / scaling.low:
            f = f / scaling.factor
        elif scaling.kind == "llama3" and wave > scaling.trained / scaling.high:
            s = (scaling.trained / wave - scaling.low) / (scaling.high - scaling.low)
            f = (1 - s) * f / scaling.factor + s * f
        if scaling.kind == "yarn":
            base = theta_h[1] ** (-H / 2)

            def pair(turns, base=base, H=H):
                return H * np.log(scaling.trained / (2 * np.pi * turns)) / (2 * np.log(base))

            low = max(np.floor(pair(scaling.beta_fast)), 0)
            high = min(np.ceil(pair(scaling.beta_slow)), H - 1)
            s = np.clip((i - low) / (high - low), 0, 1)
            f = s * f / scaling.factor + (1 - s) * f
        out.append(f)
    return np.array(out)


def attention(q_TNH, k_TKH, v_TKH, segments_T, *, scale, window=0, softcap=0.0, causal=True):
    """One row, one token and one head at a time, over the list of what the token may see."""
    out_TNH, groups = np.zeros_like(q_TNH), q_TNH.shape[1] // k_TKH.shape[1]
    for t, n in np.ndindex(q_TNH.shape[:2]):
        seen = [s for s in range(len(segments_T)) if segments_T[s] == segments_T[t]]
        seen = [s for s in seen if not causal or s <= t]
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


def gelu_erf(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


CURVES = {
    "swiglu": silu,
    "geglu": gelu,
    "gelu": gelu,
    "gelu_erf": gelu_erf,
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


def experts(x_TD, weights, moe, activation):
    """Each token through each of its experts, one at a time."""
    out_TD = np.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        z_E = weights["router"]["weight"] @ x_D
        p_E = np.exp(z_E - z_E.max()) / np.exp(z_E - z_E.max()).sum()
        chosen = np.argsort(-p_E)[: moe.active]
        total = p_E[chosen].sum() if moe.normalize else 1
        for e in chosen:
            own = {name: {"weight": weights[name]["weight"][e]} for name in ("gate_up", "down")}
            out_TD[t] += p_E[e] / total * mlp(x_D[None], own, activation)[0]
    return out_TD


def loss(logits_NV, targets_N, weights_N, z_loss=0.0):
    """(sum of weight * (nats + z_loss log(Z)^2), sum of weight * nats)."""
    total = nats = 0.0
    for z, target, weight in zip(logits_NV, targets_N, weights_N, strict=True):
        log_Z = np.log(np.sum(np.exp(z - z.max()))) + z.max()
        nats += weight * (log_Z - z[target])
        total += weight * (log_Z - z[target] + z_loss * log_Z**2)
    return total, nats


def hidden(params, cfg, ids_T, positions_T, segments_T, types_T):
    """[T, D] of one row: a whole Transformer, without its head, with the parameters of ours."""
    arch = cfg.arch

    def norm(x, weights, kind=arch.norm.kind):
        scale = weights["scale"] + arch.norm.offset
        if kind == "rms":
            return rms_norm(x, scale, arch.norm.eps)
        return layer_norm(x, scale, weights.get("bias", 0), arch.norm.eps)

    def heads_norm(x_TNH, weights):
        if arch.attention.qk_norm == "head":
            return norm(x_TNH, weights, "rms")
        flat = {"scale": weights["scale"].reshape(-1)}
        return norm(x_TNH.reshape(len(x_TNH), -1), flat, "rms").reshape(x_TNH.shape)

    def turned(x_TNH, window):
        theta = (window and arch.rope.local_theta) or arch.rope.theta
        return rope(x_TNH, positions_T, theta) if theta else x_TNH

    def attend(x_TD, weights, window):
        kv_groups = np.einsum("TD,KJHD->TKJH", x_TD, weights["qkv"]["weight"])
        kv_groups = kv_groups + weights["qkv"].get("bias", 0)
        q_TNH = kv_groups[:, :, :-2].reshape(len(x_TD), cfg.heads, cfg.head_dim)
        k_TKH, v_TKH = kv_groups[:, :, -2], kv_groups[:, :, -1]
        if arch.attention.qk_norm != "none":
            q_TNH = heads_norm(q_TNH, weights["q_norm"])
            k_TKH = heads_norm(k_TKH, weights["k_norm"])
        o_TNH = attention(
            turned(q_TNH, window),
            turned(k_TKH, window),
            v_TKH,
            segments_T,
            scale=arch.attention.scale or cfg.head_dim**-0.5,
            window=window,
            softcap=arch.attention.softcap,
            causal=arch.attention.causal,
        )
        flat = weights["out"]["weight"].reshape(cfg.embed, -1)
        return o_TNH.reshape(len(x_TD), -1) @ flat.T + weights["out"].get("bias", 0)

    def feed_forward(x_TD, weights):
        if "router" in weights:
            return experts(x_TD, weights, arch.moe, arch.activation)
        return mlp(x_TD, weights, arch.activation)

    extra = arch.embeddings
    x_TD = params["embedding"]["table"][ids_T] * (cfg.embed**0.5 if extra.scale else 1)
    if extra.positions:
        x_TD = x_TD + params["positions"]["table"][positions_T + extra.first]
    if extra.types:
        x_TD = x_TD + params["types"]["table"][types_T]
    x_TD = norm(x_TD, params["embedding_norm"]) if extra.norm else x_TD
    for i, own in enumerate(layers(params, cfg)):
        window = arch.attention.windows[i % len(arch.attention.windows)]
        for n, branch in (
            ("1", lambda x, own=own, window=window: attend(x, own["attention"], window)),
            ("2", lambda x, own=own: feed_forward(x, own["mlp"])),
        ):
            match arch.norm.placement:
                case "pre":
                    x_TD = x_TD + branch(norm(x_TD, own["norm" + n]))
                case "post":
                    x_TD = norm(x_TD + branch(x_TD), own["norm" + n])
                case "output":
                    x_TD = x_TD + norm(branch(x_TD), own["post" + n])
                case "sandwich":
                    y_TD = branch(norm(x_TD, own["norm" + n]))
                    x_TD = x_TD + norm(y_TD, own["post" + n])
    return x_TD if arch.norm.placement == "post" else norm(x_TD, params["norm"])


def logits(params, cfg, ids_T, positions_T, segments_T, types_T=None):
    """What the head of one row says: [T, V], or of its first token [labels] or [D]."""
    arch, head = cfg.arch, cfg.arch.head
    types_T = np.zeros_like(ids_T) if types_T is None else types_T
    x_TD = hidden(params, cfg, ids_T, positions_T, segments_T, types_T)
    if head.kind == "none":
        return x_TD

    def dense(x, own):
        return x @ own["weight"].T + own["bias"]

    if head.kind in ("classifier", "pooler"):
        y_D = {"tanh": np.tanh, "relu": CURVES["relu"]}[head.curve](
            dense(x_TD[0], params["head"]["dense"])
        )
        return dense(y_D, params["head"]["classifier"]) if head.kind == "classifier" else y_D
    table = params["embedding" if head.tied else "head"]["table"]
    if head.kind == "masked":
        x_TD = CURVES[arch.activation](dense(x_TD, params["head"]["dense"]))
        own = params["head"]["norm"]
        x_TD = layer_norm(x_TD, own["scale"], own["bias"], arch.norm.eps)
        return x_TD @ table.T + params["head"]["bias"]
    z_TV = x_TD @ table.T
    return head.softcap * np.tanh(z_TV / head.softcap) if head.softcap else z_TV


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
