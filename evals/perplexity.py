"""Perplexity: what a model pays for text, in nats per token and bits per byte.

Windows are those of the Hugging Face guide "Perplexity of fixed-length models". A window of `seq`
tokens begins every `stride` tokens and scores what no window before it has scored, so that each
token is scored once, with at least `seq - stride` tokens before it in the window (where the
document has them). The first token of a window has nothing to be told from and is not scored there:
with `stride` below `seq` that is the document's first token alone.

A document begins with what the tokenizer's own file puts at the beginning of a prompt; of a model
that was trained here, with the end token, as in training. Where nothing is put there, the first
token is not scored and its bytes do not count.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.config import DataConfig
from data.documents import Source
from data.sources import open_sources
from evals.scorer import Row, Scorer
from evals.task import Figure, Result, Settings, Task, digest, needs_decoder, ratio
from text.tokenizer import Tokenizer

WHOLE = 1 << 40  # tokens of a row for which data.sources cuts no document into sections


def windows(tokens: int, seq: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, scored) of each window: it scores its last `scored` tokens."""
    done = 0
    for start in range(0, tokens, stride):
        stop = min(start + seq, tokens)
        yield start, stop, min(stop - done, stop - start - 1)
        done = stop
        if stop == tokens:
            return


@dataclass(frozen=True)
class Document:
    """A document of a source."""

    source: Source
    index: int

    def ids(self, scorer: Scorer) -> np.ndarray:
        """Its tokens, int32, with what begins a document."""
        if self.source.has_text:
            return np.asarray(scorer.document(self.source.text(self.index)), np.int32)
        (ids,) = self.source.sequences([self.index], scorer.tokenizer)
        return np.concatenate([np.asarray(scorer.document(""), np.int32), ids[1:-1]])

    @property
    def bytes(self) -> int:
        return int(self.source.sizes[self.index])


class Perplexity(Task):
    """What the model pays for the documents of a source of `data.sources`."""

    def __init__(self, name: str, spec: str, settings: Settings):
        self.name, self.settings = name, settings
        config = DataConfig(
            sources=(spec,), held_out=settings.held_out, field=settings.field, seq=WHOLE
        )
        (split,) = open_sources(config)
        chosen = split.held_out if settings.held_out else split.train
        chosen = chosen[: settings.limit] if settings.limit else chosen
        self.documents = [Document(split.source, int(i)) for i in chosen]
        self.bad = split.source.bad.count
        self.content = hashlib.sha256(
            split.source.sizes[chosen].tobytes() + split.source.hashes[chosen].tobytes()
        ).digest()

    def prepare(self, scorer: Scorer) -> None:
        needs_decoder(self.name, scorer)
        seq = self.settings.window(scorer.model.cfg)
        stride = self.settings.stride or max(seq // 2, 1)
        if stride > seq:
            raise ValueError(f"stride={stride} would leave out tokens: at most seq={seq}")
        self.documents[0].source.check(scorer.tokenizer)
        self.used = {"seq": seq, "stride": stride, "limit": self.settings.limit}
        self.rows: list[Row] = []
        self.owners: list[int] = []  # the document of each row
        self.sizes: list[int] = []  # bytes of each document that its windows score
        for number, document in enumerate(self.documents):
            ids, size = document.ids(scorer), document.bytes
            for start, stop, scored in windows(len(ids), seq, stride):
                if scored:
                    self.rows.append(Row(ids[start:stop], scored))
                    self.owners.append(number)
                if start == 0 or stride == seq:  # nobody scores the window's first token
                    size -= bytes_of(ids[start], scorer.tokenizer)
            self.sizes.append(size)
        if not self.rows:
            raise ValueError(f"{self.name}: no document has a second token to predict")

    def run(self, scorer: Scorer) -> Result:
        nats = np.array([-scored.total for scored in scorer.score(self.rows)])
        tokens = np.array([row.scored for row in self.rows])
        sizes = np.array(self.sizes)
        return Result(
            self.name,
            digest(self.content, {"task": "perplexity", **self.used}),
            figures(nats, tokens, sizes, np.array(self.owners)),
            {
                "documents": len(self.documents),
                "tokens": int(tokens.sum()),
                "bytes": int(sizes.sum()),
                "windows": len(self.rows),
            },
            self.used,
            (f"{self.bad} bad rows of the source were left out",) if self.bad else (),
        )


def bytes_of(i: int, tokenizer: Tokenizer) -> int:
    """Bytes of text that a token stands for, as near as it can be told apart from its text."""
    spelled = tokenizer.spell(int(i))
    return len(tokenizer.decode([i]).encode() if spelled is None else spelled)


def figures(
    nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray, owners: np.ndarray
) -> dict[str, Figure]:
    """The figures of windows with these nats and tokens, of documents with these bytes.

    `owners` is the document of each window. Standard errors are over documents; of a lone
    document over its windows, as if those were independent, and bytes fall to windows by tokens.
    """
    if len(sizes) > 1:
        nats, tokens = (np.bincount(owners, what, len(sizes)) for what in (nats, tokens))
    else:
        sizes = sizes.sum() * tokens / tokens.sum()
    per_token, per_byte = ratio(nats, tokens), ratio(nats / math.log(2), sizes)
    value = math.exp(min(per_token.value, 700.0))  # 1e304: what a float still holds
    error = None if per_token.stderr is None else value * per_token.stderr
    return {
        "nats_per_token": per_token,
        "bits_per_byte": per_byte,
        "perplexity": Figure(value, error),
    }
