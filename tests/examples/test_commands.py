"""Every command of examples/ and of docs/clusters.md is one that train.py takes."""

import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

import train
from configs import arguments, load
from configs.run import check

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DEVICES = {"slurm.sh": 16, "tpu_vm.sh": 16, "ssh.sh": 2, "train.py": 2}  # as their texts say


def parsed(args: list[str]):
    """The Run and the other flags of `train.py ARGS`."""
    command, *args = args
    assert command == "train.py"
    own = tuple(flag.name for flag in flags.FLAGS.flags_by_module_dict()[train.__name__])
    with flagsaver.flagsaver():
        given = arguments.parse(args, arguments.Known(flags.FLAGS, own))
        values = {name: flags.FLAGS[name].value for name in own}
    return load.load(given.source, given.overrides), values


def commands() -> list[tuple[str, str]]:
    """(script, arguments) of each command that a text shows."""
    scripts = [path.read_text() for path in sorted(EXAMPLES.glob("*.sh"))]
    guide = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    shown = [line for text in scripts for line in re.findall(r"(?m)^#   (.*)$", text)]
    shown += re.findall(r"`([^`\n]+)`", guide) + re.findall(r"(?m)^python .*$", guide)
    found = []
    for line in shown:
        begin = re.match(r"(?:\w+=\S+ |sbatch )*(?:examples/|python )([a-z_]+\.(?:sh|py)) ", line)
        if begin:
            words = shlex.split(line[begin.end() :], comments=True)
            if "--" in words:
                words = words[words.index("--") + 1 :]
            found.append((begin[1], shlex.join(words)))
    return found


@pytest.mark.parametrize(("name", "args"), commands())
def test_the_command_is_taken_and_its_run_fits_the_devices(name, args):
    run, given = parsed(["train.py", *shlex.split(args)])
    assert given["workdir"].startswith(("/shared/", "/mnt/"))  # which all processes mount
    check(run, DEVICES[name])


def test_every_script_is_shown_in_its_own_text_and_in_the_guide():
    names = [name for name, _ in commands()]
    scripts = {path.name for path in EXAMPLES.glob("*.sh")}
    assert {name for name in names if names.count(name) == 2} == scripts
    assert "examples/jobset.yaml" in (ROOT / "docs" / "clusters.md").read_text()


def test_the_guide_tells_the_flags_and_their_defaults():
    text = (ROOT / "docs" / "clusters.md").read_text()
    for name, default in (("heartbeat", "60"), ("step_timeout", "1800")):
        assert f"`--{name}`" in text and default in text
        assert flags.FLAGS[name].default == float(default)
