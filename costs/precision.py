"""Which number format a step calls for on given hardware, and what each is known to cost."""

from dataclasses import dataclass

from costs.devices import Datasheet
from costs.roofline import Time

NOT_MEASURED = "not measured (LOG.md)"
PRICES = {"int8": "four losses within 3e-4, a long run not measured (LOG.md)"}
GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """A format of the matmuls, or a smaller form of the state."""

    name: str
    gain: str
    price: str  # in accuracy
    use: bool


def choices(
    sheet: Datasheet | None,
    time: Time,
    step: float,
    dtype: str,
    state: dict[str, int],
    rounded: str = "",
    moments: str = "float32",
) -> list[Choice]:
    """What there is, what it gains at most here, what it costs.

    `dtype`: of the run's matmuls; `state`: bytes of a device by component; `rounded`: the preset to
    which the run rounds their operands; `moments`: how it keeps Adam's.
    """
    if sheet is None:  # a CPU: LOG.md, "Quickstart: the step on CPU"
        faster = "the faster on a CPU: 109 to 205 GFLOP/s against 97 to 154 in bfloat16"
        slower = "slower on a CPU"
        return [
            Choice("float32 matmuls", faster, "none: the reference", True),
            Choice("bfloat16 matmuls", slower, "rounding of each product's operands", False),
        ]
    base = "the base" if dtype == "bfloat16" else "twice the rate of float32 by TF32"
    found = [
        Choice("bfloat16 matmuls, float32 weights and moments", base, "what others add to", True)
    ]
    for name, rate in (("int8", sheet.int8), ("fp8", sheet.fp8)):
        saved = time.matmul * (1 - sheet.peak(rounded) / rate) if rate else 0.0
        gain = f"at most {saved / step:.0%} of the step" if saved else "no faster here"
        chosen = name == rounded and rate > 0
        gain = "in the times above" if chosen else gain
        found.append(
            Choice(f"--config.precision={name}", gain, PRICES.get(name, NOT_MEASURED), chosen)
        )
    weights, kept, gradients = (
        state.get(name, 0) for name in ("parameters", "optimizer", "gradients")
    )
    half = f"{(weights + gradients) / 2 / GIB:.1f} GiB of a device: two bytes for four"
    byte = f"about {0.74 * kept / GIB:.1f} GiB of a device: a byte and scales for four"
    byte = "in the bytes above" if moments == "int8" else byte
    one = f"about {kept / 2 / GIB:.1f} GiB of a device: one moment in place of Adam's two"
    short = "within 0.3 % of a short run's loss (LOG.md); rounds by chance"
    return [
        *found,
        Choice("--config.model.param_dtype=bfloat16", half, short, False),
        Choice("--config.optim.moments=int8", byte, short, moments == "int8"),
        Choice("--config.optim.name=adafactor or lion", one, NOT_MEASURED, False),
    ]
