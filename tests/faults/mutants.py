"""Reads damaged files of one kind, one after the other, and ends with the first that does harm.

python -m tests.faults.mutants KIND COUNT SEED FOLDER [FIRST]   # FIRST: number of the first one

Harm is anything but a result or a ValueError or OSError that names the file; more address space
than twice the file and 100 MB; more than a second of computing.
"""

import random
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from checkpoint.gguf import Gguf
from checkpoint.names import Names
from checkpoint.pretrained import open_pretrained
from checkpoint.safetensors import Safetensors
from tests.checkpoint import folders, gguf_models
from tests.checkpoint.gguf_files import packed
from tests.text import small, test_gguf
from text import tokenizer

SPARE, SECONDS = 100_000_000, 1.0
NUMBERS = (b"-1", b"0", b"1e9", b"1e999", b"99999999999999999999", b"4294967296", b"null", b"NaN")
INTEGERS = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def safetensors(folder: Path) -> tuple[Path, Callable[[], object]]:
    folders.write(folder)

    def read() -> None:
        found = Safetensors(folder)
        for name in found.tensors:
            found.read(name)
        open_pretrained(str(folder))

    return folder / "model.safetensors", read


def gguf(folder: Path) -> tuple[Path, Callable[[], object]]:
    file = folder / "model.gguf"
    words = test_gguf.byte_level("gpt-2")
    cfg = gguf_models.cfg_of("llama", sizes={"vocab": words.get_vocab_size()})
    tensors = gguf_models.drawn(Names(gguf_models.BY_NAME["llama"], cfg).foreign())
    said = gguf_models.said("llama", cfg) | test_gguf.metadata_of(words, "gpt-2")
    file.write_bytes(packed(said, gguf_models.stored(tensors, cfg, "llama", "llama")))

    def read() -> None:
        found = Gguf(file)
        for name in found.tensors:
            found.read(name)
        open_pretrained(str(file))

    return file, read


def tokenizer_json(folder: Path) -> tuple[Path, Callable[[], object]]:
    small.byte_level(first="<|im_start|>").save(str(folder / "tokenizer.json"))

    def read() -> None:
        found = tokenizer.load(str(folder), list)
        found.decode(found.prompt("hello world <|im_end|> \U0001f600"))

    return folder / "tokenizer.json", read


def config_json(folder: Path) -> tuple[Path, Callable[[], object]]:
    folders.write(folder)
    return folder / "config.json", lambda: open_pretrained(str(folder))


KINDS = {made.__name__: made for made in (safetensors, gguf, tokenizer_json, config_json)}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to three kinds of damage."""
    for _ in range(draw.randint(1, 3)):
        data = damaged(data, draw) or b"?"
    return data


def damaged(data: bytes, draw: random.Random) -> bytes:
    at, kind = draw.randrange(len(data)), draw.randrange(9)
    if draw.random() < 0.5:
        at = min(at, draw.randrange(600))  # where headers are
    if kind == 0:
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + draw.choice((1, 2, 8, 100)) :]
    if kind == 2:
        return data[:at] + data[max(at - draw.choice((1, 9, 200)), 0) :]  # said twice
    if kind == 3:
        return data[:at]
    if kind == 4:
        size = draw.choice((4, 8))
        number = draw.choice(INTEGERS) % 2 ** (8 * size)
        return data[:at] + number.to_bytes(size, "little") + data[at + size :]
    if kind == 5:
        return data[:at] + draw.choice((b"[", b'{"a":', b"(")) * 20_000 + data[at:]
    found = list(re.finditer(rb"\d+" if kind < 8 else rb'"[^"]*"', data[:100_000]))
    if not found:
        return data[:-1]
    start, stop = draw.choice(found).span()
    return data[:start] + draw.choice((*NUMBERS, draw.choice(found)[0])) + data[stop:]


def harm(read: Callable[[], object], name: str, size: int) -> str:
    """What reading did that it must not; "" if nothing."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * size + SPARE, most))
    begin, text = time.process_time(), None
    try:
        read()
    except (ValueError, OSError) as error:
        text = str(error)
    except BaseException:
        return traceback.format_exc()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if time.process_time() - begin > SECONDS:
        return f"took {time.process_time() - begin:.1f} s"
    if text is not None and name not in text:
        return f"a message that does not name {name}: {text[:3000]}"
    return ""


def main(kind: str, count: str, seed: str, folder: str, first: str = "0") -> int:
    file, read = KINDS[kind](Path(folder))
    good = file.read_bytes()
    for _ in range(3):
        read()
    for number in range(int(first), int(first) + int(count)):
        data = mutated(good, random.Random(f"{kind} {seed} {number}"))
        file.write_bytes(data)
        print(number, flush=True)  # of what kills the process, the last line tells
        wrong = harm(read, Path(folder).name, len(data))
        if wrong:
            print(f"number {number}: {wrong}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
