"""See before starting whether a run fits, and what it costs: no hardware needed.

The real step is traced and counted, operation by operation, on the parts of arrays that one device
of the target holds; where the target's compiler is installed, it is compiled as well, and the
compiler's figure decides. "Does not fit" comes with the smallest change that makes it fit.

cuDNN's attention does not compile ahead of time, nor show its work. Where a GPU would use it, a
stand-in is counted and compiled that keeps what it keeps (q, k, v, output, log-sum-exp).

--search tries meshes, remat policies and micro-batches, by counting alone. The last tables say
which number formats the hardware calls for, if --accuracy may be paid. docs/plan.md.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
from absl import flags

import train
from configs import command
from configs.run import Run, check
from costs import precision, standin, targets
from costs.devices import measured_matmul_rate
from costs.flops import params
from costs.memory import human
from sharding import mesh as meshes
from text import tokenizer as tokenizers
from tools import parity
from training import plans, search
from training.plans import Plan
from training.search import Search

FLAGS = flags.FlagValues()
flags.DEFINE_string("target", None, f"One of: {targets.known()}", flag_values=FLAGS, required=True)
flags.DEFINE_string(
    "mesh", None, "As data=2,fsdp=4; default: the recipe's config.mesh", flag_values=FLAGS
)
flags.DEFINE_string(
    "family", None, "A family or a published size of one, in place of the recipe's model",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean("compile", True, "Ask the target's compiler, if it is here", flag_values=FLAGS)
flags.DEFINE_boolean(
    "search", False, "The ten best meshes, remats, micro-batches", flag_values=FLAGS
)
flags.DEFINE_boolean(
    "formats", True, "Count the step in other number formats too", flag_values=FLAGS
)
flags.DEFINE_float(
    "accuracy", 1.0, "The most that a format may cost, % of the loss or perplexity",
    lower_bound=0.0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean("json", False, "All figures as JSON, in the last line", flag_values=FLAGS)


# ---- what was asked ------------------------------------------------------------------------------


def wanted(run: Run, target: targets.Target) -> Run:
    """The run that the flags describe, its vocabulary resolved. ValueError if it cannot be."""
    if FLAGS.family:
        run = dataclasses.replace(run, model=parity.model_named(run.model, FLAGS.family))
    if FLAGS.mesh:
        run = dataclasses.replace(run, mesh=parity.mesh_named(FLAGS.mesh, target.count, "--mesh"))
    run = sized(run)
    if not FLAGS.search:  # which finds another mesh for a run that cannot be split as it is
        check(run, target.count)
    return run


def sized(run: Run) -> Run:
    """The run with as many tokens as its tokenizer has; one to be trained, as it is to have."""
    if run.model.vocab:
        return run
    kind, _, rest = run.data.tokenizer.partition(":")
    if kind == "bpe":
        size = int(rest.partition(":")[0])
    else:
        size = tokenizers.load(run.data.tokenizer, lambda: iter(())).size
    return dataclasses.replace(run, model=run.model.with_vocab(size))


def tracer(platform: str) -> plans.Trace:
    """What traces the step of a run, with the attention of this platform."""

    def trace(run: Run, devices: list[jax.Device]) -> tuple[train.Program, Any]:
        counted = devices[0].platform == "cpu"
        mesh = meshes.make(run.mesh, devices)
        with jax.set_mesh(mesh), standin.in_place(platform, counted=counted):
            built = train.build(run)
            step = built.jit(train.train_step, donate_argnums=0)
            return built, step.trace(built.state, built.batch())

    return trace


# ---- what is told --------------------------------------------------------------------------------


def head(plan: Plan) -> str:
    run, parts = plan.run, plan.run.optim.accumulate
    return (
        f"{run.name}: {params(run.model) / 1e6:,.4g} million parameters, {run.data.batch} rows of "
        f"{run.data.seq} tokens a step, {parts} micro-batch{'es' if parts > 1 else ''}, remat "
        f"{run.model.remat}, on {plan.target.name} as {parity.named(plan.sizes)}"
    )


def memory(plan: Plan) -> str:
    """The table of bytes, and the verdict."""
    usable = plan.target.usable
    rows = [[name, human(size), f"{size / plan.counted:.1%}"] for name, size in plan.parts.items()]
    share = f"{plan.counted / usable:.0%} of {human(usable)}"
    rows.append(["counted", human(plan.counted), share])
    if size := plan.compiled.get("bytes"):
        error = f"counted {plan.counted / size - 1:+.1%}"
        rows.append([f"compiled for {plan.target.name}", human(size), error])
    table = parity.table(["memory of a device", "bytes", ""], rows)
    words = ("fits", "of") if plan.fits else ("does not fit", "are more than")
    verdict = f"{words[0]}: {human(plan.bytes)} {words[1]} the {human(usable)} that a run can have"
    there = f"\nIn the host's memory, for each device: {human(plan.host)}" if plan.host else ""
    return f"{table}\nMost is alive at: {plan.at}{there}\n\n{verdict}"


def mended(plan: Plan, better: Plan | None) -> str:
    """The smallest change that makes it fit."""
    if better is None:
        return (
            "No mesh, remat policy, number of micro-batches or smaller batch was found with which "
            f"it does. The state and its gradients alone take {search.fewest(plan)} devices."
        )
    flags = " ".join(search.flags(better.run, plan.run, plan.target.count))
    return (
        f"The smallest change that makes it fit: {flags}\n"
        f"  {human(better.counted)} counted; {better.step * 1e3:.0f} ms a step, "
        f"{better.tokens_per_s:,.0f} tokens/s against {plan.tokens_per_s:,.0f}"
    )


def times(plan: Plan) -> str:
    """The table of seconds, and the prediction."""
    time, step = plan.time, plan.step
    rows = [
        [name, f"{1e3 * took:.4g}", f"{took / step:.1%}"]
        for name, took in (
            ("matmuls", time.matmul),
            ("attention", time.attention),
            ("bound by memory", time.memory),
            ("collectives that can hide", time.hides),
            ("collectives that cannot", time.waits),
            ("to the host and back", time.host),
        )
        if took or name != "to the host and back"
    ]
    lines = [parity.table(["time of a step", "ms", "share"], rows)]
    if time.talk:
        talk = [
            [kind, ",".join(axes), str(count), human(size), f"{1e3 * took:.4g}"]
            for (kind, axes), (took, count, size) in sorted(time.talk.items())
        ]
        lines.append(parity.table(["collective", "over", "times", "bytes", "ms"], talk))
    none, all_of_it = (f"{1e3 * time.step(share):.4g}" for share in (0.0, 1.0))
    lines.append(
        f"predicted: {1e3 * step:.4g} ms a step, {plan.tokens_per_s:,.0f} tokens/s, MFU "
        f"{plan.mfu:.1%}, with {plan.reached.hidden:.0%} of the collectives hidden that can; "
        f"{none} ms with none, {all_of_it} with all. {time.flops:.3g} FLOPs a device, "
        f"{plan.flops:.3g} of the model in all.\nRates: {plan.reached.source}."
    )
    return "\n\n".join(lines)


def choices(plan: Plan, searched: Search) -> dict[str, list[precision.Choice]]:
    """Which formats to train in, and to serve in."""
    model, sheet, most = plan.run.model, plan.target.sheet, FLAGS.accuracy
    if sheet is None:
        found = precision.on_a_cpu()
    else:
        base, others = searched.formats(plan.run)
        counted = {flags: one and (one.step, one.counted) for flags, one in others.items()}
        found = precision.training((base.step, base.counted), counted, most)
    return {"to train in": found, "to serve in": precision.serving(model, sheet, most)}


def formats(tables: dict[str, list[precision.Choice]]) -> str:
    """A table of each."""
    return "\n\n".join(
        parity.table(
            [name, "gains here", "costs in accuracy", "use"],
            [[c.name, c.gain, c.price, c.use] for c in found],
        )
        for name, found in tables.items()
    )


def ranking(best: list[Plan], tried: int) -> str:
    """The table of a search."""
    rows = [
        [
            parity.named(one.sizes), one.run.model.remat, str(one.run.optim.accumulate),
            human(one.counted), f"{1e3 * one.step:.0f}", f"{one.tokens_per_s:,.0f}",
            f"{one.mfu:.1%}", reason(one),
        ]
        for one in best
    ]  # fmt: skip
    title = ["mesh", "remat", "micro-batches", "memory", "ms", "tokens/s", "MFU", "because"]
    return f"{parity.table(title, rows)}\n{tried} were counted; the first is the fastest that fits."


def reason(plan: Plan) -> str:
    """What the time of a plan goes to besides matmuls and attention."""
    time, step = plan.time, plan.step
    talk = step - time.busy
    again = time.flops * plan.target.count / plan.flops - 1
    words = [f"fills {plan.bytes / plan.target.usable:.0%}"]
    if again > 0.02:
        words.append(f"computes {again:.0%} more than the model")
    if talk / step > 0.005:
        words.append(f"talks {talk / step:.0%} of the time")
    words.append(f"{time.memory / step:.0%} bound by memory")
    return ", ".join(words)


def as_json(
    plan: Plan,
    better: Plan | None,
    best: list[Plan],
    tables: dict[str, list[precision.Choice]],
) -> dict[str, Any]:
    def short(one: Plan) -> dict[str, Any]:
        return {
            "flags": search.flags(one.run, plan.run, plan.target.count),
            "bytes": one.counted,
            "step_s": one.step,
            "mfu": one.mfu,
        }

    return {
        "target": plan.target.name,
        "mesh": plan.sizes,
        "fits": plan.fits,
        "usable_bytes": plan.target.usable,
        "bytes": plan.parts | {"counted": plan.counted},
        "host_bytes": plan.host,
        "compiled": plan.compiled,
        "flops": {"device": plan.time.flops, "model": plan.flops},
        "seconds": {
            name: getattr(plan.time, name)
            for name in ("matmul", "attention", "memory", "hides", "waits", "host")
        },
        "collectives": [
            {"kind": kind, "axes": axes, "seconds": took, "times": count, "bytes": size}
            for (kind, axes), (took, count, size) in plan.time.talk.items()
        ],
        "step_s": plan.step,
        "tokens_per_s": plan.tokens_per_s,
        "mfu": plan.mfu,
        "smallest_change": better and short(better),
        "best": [short(one) for one in best],
        "formats": {
            name: [dataclasses.asdict(one) for one in found] for name, found in tables.items()
        },
    }


def asked(plan: Plan, attends: bool) -> str:
    """What the compiler did, if not what one would expect; "" else."""
    found = []
    if error := plan.compiled.get("error"):
        found.append(f"The compiler refuses it: {error.splitlines()[0]}")
    elif not plan.compiled:
        lacks = targets.missing(plan.target) or "as asked"
        found.append(f"Counted, not compiled: {lacks}.")
    if attends:
        found.append("Attention: a stand-in that keeps what cuDNN's keeps, which shows no work.")
    return "\n".join(found)


def say(text: str) -> None:
    """What takes time now, beside the output."""
    print(text, file=sys.stderr, flush=True)


def main(recipe: Run) -> int:
    """Count, compile, tell."""
    with command.user_input():
        target = targets.parse(FLAGS.target)
        plans.devices(target)
        run = wanted(recipe, target)
    rate = measured_matmul_rate(run.model.dtype) / target.count if target.platform == "cpu" else 0.0
    trace = tracer(target.platform)
    searched = Search(target, trace, rate)
    if FLAGS.search:
        say(f"trying meshes, remats, micro-batches: {searched.limit_s:.0f} s of CPU time")
    best, told = searched.best(run) if FLAGS.search else [], []
    if best and (refused := search.refused(run, target)):
        told.append(f"As it is, it cannot be split over {target.name}: {refused}\nSo this is with "
                    f"{' '.join(search.flags(best[0].run, run, target.count))}:")  # fmt: skip
        run = best[0].run
    with command.user_input():
        plan = searched.count(run)
    if FLAGS.compile and not FLAGS.search and not targets.missing(target):
        plan = plans.compile_for(plan, trace)
    if not plan.fits:
        say("it does not fit: looking for the smallest change that makes it fit")
    better = None if plan.fits else searched.smallest_change(run)
    told += [head(plan), memory(plan)]
    if not plan.fits:
        told.append(mended(plan, better))
    told += [asked(plan, plan.time.attention > 0), times(plan)]
    tables = choices(better or plan, searched) if FLAGS.formats else {}
    told.append(formats(tables))
    if FLAGS.search:
        told.append(ranking(best, searched.tried))
    print(*filter(None, told), sep="\n\n")
    if FLAGS.json:
        print(json.dumps(as_json(plan, better, best, tables)))
    return 0


if __name__ == "__main__":
    sys.exit(
        command.status(
            main,
            sys.argv[1:],
            recipe="configs/quickstart.py",
            examples=(
                "--config=configs/llama.py:8B --target=h100x8",
                "--config=configs/llama.py:8B --target=v5p-256 --mesh=fsdp=64,tensor=4 "
                "--config.data.batch=256",
                "--config=configs/llama.py:1B --target=h100x1 --search",
                "--family=mixtral --target=h200x8 --json",
            ),
            values=FLAGS,
        )
    )
