"""DataConfig: which documents a run reads and how rows are made of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Documents, tokenizer and the shape of a batch."""

    sources: tuple[str, ...] = ("stdlib",)  # "stdlib", files, directories, globs
    weights: tuple[float, ...] = ()  # share of the tokens per source; empty: by size
    tokenizer: str = "bytes"  # "bytes", "bpe:SIZE[:lines]" trained on the sources, a tokenizer.json
    held_out: float = 0.01  # share of the documents kept for evaluation, by hash of their content
    batch: int = 8  # rows per step, over all devices
    seq: int = 256  # tokens per row
    documents: int = 0  # most of a row; 0: any. A bound lets GPUs use flash attention
    across: bool = False  # tokens see the documents before theirs in the row, as one document
    field: str = "text"  # of JSONL and Parquet rows
    bad_rows: float = 0.01  # the run stops once more than this share of a source is unreadable

    def __post_init__(self):
        if not self.sources or not all(self.sources):
            raise ValueError(f"sources={self.sources} names no source; try 'stdlib' or a path")
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"{len(self.weights)} weights for {len(self.sources)} sources")
        if self.weights and (min(self.weights) < 0 or not sum(self.weights) > 0):
            raise ValueError(f"weights={self.weights} must not be negative and must not all be 0")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be at least 0 and below 1")
        if not 0 <= self.bad_rows <= 1:
            raise ValueError(f"bad_rows={self.bad_rows} must be a share between 0 and 1")
        if self.documents < 0:
            raise ValueError(f"documents={self.documents} must be at least 1, or 0 for any number")
        for name in ("batch", "seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
