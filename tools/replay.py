"""Repeat on one device the step of a run that was not finite, and name where it begins.

BUNDLE is the file RUN/bundles/STEP.json that the run wrote. The state is that of the newest save
before the step (or the run's beginning); the steps between are repeated as well, with the same
batches, in as many micro-batches as the run had devices with rows of their own. Of a run on one
device all of it is bit by bit the same; of others sums are in another order.

Exit code 0 if the step is not finite here either, 1 if it is.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

import train
from checkpoint import store
from checkpoint.pretrained import open_pretrained
from configs import command
from configs.run import Run, check_split, from_json
from sharding import mesh as meshes
from sharding import runtime
from sharding.mesh import MeshConfig
from text import tokenizer as tokenizers
from training.bundle import Bundle
from training.health import reason
from training.second_pass import SecondPass
from training.text import Text, open_text

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "checkpoints", None, "The folder of the run's saves, if it has moved", flag_values=FLAGS
)


def on_one_device(bundle: Bundle) -> Run:
    """The run of a bundle with the rows of each device as a micro-batch."""
    run = bundle.run
    sizes = run.mesh.sizes(bundle.devices)
    names = run.layout.batch
    names = (names,) if isinstance(names, str) else names or ()
    parts = run.optim.accumulate * math.prod(sizes[name] for name in names)
    run = dataclasses.replace(
        run, mesh=MeshConfig(data=1), optim=dataclasses.replace(run.optim, accumulate=parts)
    )
    check_split(run, 1)
    return run


def saved_before(bundle: Bundle, folder: str | None) -> store.Saved | None:
    """The save to begin from, verified; None: the run's own beginning."""
    path, found = Path(folder or bundle.checkpoints), []
    if bundle.state or folder:
        found = [saved for saved in store.Saved.all(path) if saved.step < bundle.step]
        if not found:
            raise ValueError(
                f"{path} holds no save from before step {bundle.step} any more (there was step "
                f"{bundle.state}); checkpoint.keep and checkpoint.keep_every keep more"
            )
    elif bundle.origin and "@" in bundle.origin:
        found = store.candidates(bundle.origin)
    if found:
        found[0].verify()
        return found[0]
    return None


def begin(bundle: Bundle, saved: store.Saved | None) -> tuple[train.Program, Text, Any]:
    """The program, its text and the state, on the mesh in use."""
    weights = None
    if saved is None and bundle.origin:
        weights = open_pretrained(bundle.origin)
    tokenizer = weights and weights.tokenizer
    if saved:
        tokenizer = tokenizers.from_json(json.dumps(saved.json("tokenizer")))
    run, text = open_text(on_one_device(bundle), tokenizer, jax.sharding.get_mesh())
    program = train.build(run)
    if weights:
        return program, text, program.begin(weights.params(program.state.params))
    if saved is None:
        return program, text, program.fresh()
    note = saved.json("run")
    before = from_json(note["run"])
    if (before.data, before.seed) == (run.data, run.seed):
        text.loader.restore(note["data"])
    return program, text, saved.restore(program.state)


def replay(bundle: Bundle, folder: str | None) -> bool:
    """Whether the step is skipped here too."""
    with command.user_input():
        saved = saved_before(bundle, folder)
        program, text, state = begin(bundle, saved)
    start = saved.step if saved else 0
    print(f"recorded   step {bundle.step}: {bundle.why}; {bundle.first or 'nothing named'}")
    print(f"from       {saved.folder if saved else 'the beginning'}, {bundle.step - start} steps")
    with text.loader:
        step = program.compile()
        for number in range(start + 1, bundle.step + 1):
            batch = next(text.loader)
            if number == bundle.step:
                told(batch.samples, bundle)
                rows = program.place(batch.arrays)
                state, metrics = step(state, rows)
                break
            state, _ = step(state, program.place(batch.arrays))
    metrics = jax.device_get(metrics)
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not int(metrics["in_row"]):
        print(f"replayed   step {bundle.step} is finite here: loss {loss:g}, gradient {norm:g}")
        return False
    why = reason(loss, norm, float(metrics.get("spike", 0)))
    first = SecondPass(program).first_bad(state.params, rows)
    print(f"replayed   step {bundle.step}: {why}; {first}")
    return True


def told(samples: Any, bundle: Bundle) -> None:
    """Say whether these are the samples that the bundle holds, which may be a part of the rows."""
    found = {tuple(piece) for row in samples for piece in row}
    recorded = {tuple(piece) for row in bundle.samples for piece in row}
    words = "those of the bundle" if recorded <= found else "others than the bundle's: data changed"
    print(f"samples    {words}")


def main() -> int:
    """Read the flags, repeat the step."""
    if "--help" in sys.argv:
        print(__doc__ + FLAGS.module_help(sys.modules[__name__]))
        return 0
    with command.user_input():
        try:
            given = FLAGS(sys.argv)[1:]
        except flags.Error as error:
            raise ValueError(str(error)) from None
        if len(given) != 1:
            raise ValueError("write one bundle: python -m tools.replay RUN/bundles/STEP.json")
        bundle = Bundle.read(Path(given[0]))
    runtime.prepare()
    with jax.set_mesh(meshes.make(MeshConfig(data=1), jax.devices()[:1])):
        return 0 if replay(bundle, FLAGS.checkpoints) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except command.Exit as error:
        print(f"replay: error: {error}", file=sys.stderr)
        sys.exit(error.code)
