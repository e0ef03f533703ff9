"""Which number formats a model calls for on given hardware, and what each is known to cost."""

from dataclasses import dataclass

from costs.devices import Datasheet
from costs.flops import matmul_params, params
from costs.memory import human
from model.config import ModelConfig


@dataclass(frozen=True)
class Price:
    """What a format costs in accuracy, as measured (LOG.md)."""

    percent: float | None  # of the held-out loss, or perplexity; None: not measured
    words: str

    def use(self, gains: str, most: float) -> str:
        """Whether to use what has this price: for what it gains, at most so many percent."""
        if not gains:
            return "no: nothing gained"
        if self.percent is None:
            return "no: not measured"
        return f"yes{gains}" if self.percent <= most else f"no: costs more than {most:g} %"


@dataclass(frozen=True)
class Choice:
    """A format of matmuls, of the state, or of weights that are served."""

    name: str
    gain: str
    price: str
    use: str


NONE = Price(None, "not measured")
SHORT = "in 120 steps of the quickstart"
# Of training, by the flags that ask for it. The quickstart over 120 and 490 steps, two seeds; 124M
# over 105 M tokens, of two seeds the one that ran with the wgrad of today.
INT8, FP8 = "--config.precision=int8", "--config.precision=fp8"
HEAD = f"{INT8} --config.precision.head=int8"
WEIGHTS, MOMENTS = "--config.model.param_dtype=bfloat16", "--config.optim.moments=int8"
TRAINING = {
    INT8: Price(0.0, "-0.1 % over 105 M tokens of 124M, one seed"),
    HEAD: Price(1.1, f"+1.1 % {SHORT}"),
    FP8: Price(0.0, f"none {SHORT}; no long run"),
    MOMENTS: Price(0.0, "none in 150 steps of the quickstart"),
    f"{WEIGHTS} {MOMENTS}": Price(0.3, "-0.1 to +0.3 % over the quickstart"),
}
# Of weights that are served: bits of a Linear's, with the scale and zero of a group but without the
# scale of an output, and perplexity of SmolLM2-135M-Instruct. Tables have 8 bits in all of them.
SERVING = {
    "w8": (8.0, Price(0.41, "+0.41 % perplexity of SmolLM2-135M")),
    "w8a8": (8.0, Price(0.98, "+0.98 % perplexity of SmolLM2-135M")),
    "fp8": (8.0, NONE),
    "w4g64": (4.75, Price(4.8, "+4.8 % perplexity of SmolLM2-135M")),
}


def training(
    base: tuple[float, int], counted: dict[str, tuple[float, int] | None], most: float
) -> list[Choice]:
    """What each format of `counted` gains over bfloat16 matmuls and a float32 state, `base`.

    Both as (seconds a step, bytes of a device); None: the hardware has no faster matmuls of it.
    `most`: percent that a format may cost.
    """
    seconds, held = base
    found = [Choice("bfloat16 matmuls, float32 state", told(base), "the base", "the base")]
    for flags, one in counted.items():
        price, gain, gains = TRAINING[flags], "no faster here", ""
        if one:
            times, holds = one[0] / seconds, one[1] / held
            gain = f"{told(one)}: {times - 1:+.0%}, {holds - 1:+.0%}"
            short = ", where memory is short" if holds < 0.98 else ""
            gains = ", for its speed" if times < 0.98 else short
        found.append(Choice(flags, gain, price.words, price.use(gains, most)))
    return found


def told(one: tuple[float, int]) -> str:
    """Seconds and bytes, in words."""
    return f"{1e3 * one[0]:.4g} ms, {human(one[1])}"


def on_a_cpu() -> list[Choice]:
    """Of training; LOG.md, "Quickstart: the step on CPU"."""
    faster = "the faster on a CPU: 109 to 205 GFLOP/s against 97 to 154 in bfloat16"
    return [
        Choice("float32 matmuls", faster, "the base", "yes"),
        Choice("bfloat16 matmuls", "slower on a CPU", NONE.words, NONE.use("", 0)),
    ]


def serving(model: ModelConfig, sheet: Datasheet | None, most: float) -> list[Choice]:
    """What each scheme of `tools.compress` makes of a model's weights, served on one device.

    A row that is decoded by itself reads all weights that a token meets for each token, so that
    many tokens/s are a bound. `most`: percent that a scheme may cost.
    """
    tables = model.vocab * model.embed * (1 if model.arch.head.tied else 2)
    linear = params(model) - tables
    met = matmul_params(model) - model.vocab * model.embed  # of one token, layers alone

    def row(name: str, bits: float, rest: float, price: Price, use: str) -> Choice:
        size = (linear * bits + tables * rest) / 8
        gain = f"weights of {human(size)}"
        if sheet and model.arch.attention.causal:
            read = (met * bits + model.vocab * model.embed * rest) / 8
            gain += f", at most {sheet.bandwidth / read:,.0f} tokens/s of one row"
        return Choice(name, gain, price.words, use)

    found = [row("bfloat16", 16, 16, Price(0.0, "the base"), "the base")]
    for name, (bits, price) in SERVING.items():
        found.append(row(f"--scheme={name}", bits, 8, price, price.use(", for its bytes", most)))
    return found
