"""Tensors: the named arrays of foreign files, as checkpoints in other formats hold them."""

import abc
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """What a file says of one tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # "F32", "F16", "BF16", ... as safetensors names them, or GGUF's kind, as "Q4_K"


class Tensors(abc.ABC):
    """The tensors of one file or of several.

    Opening checks every size against the files, and reads no values. ValueError from then on
    means that a file changed.
    """

    tensors: dict[str, Tensor]  # in file order

    @abc.abstractmethod
    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Part of a tensor's first dim, in an array of its own.

        BF16 comes as ml_dtypes.bfloat16, quantized kinds as float32. Threads may read at one
        time. KeyError for a name that is not in `tensors`.
        """

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """All of a tensor, as `rows` gives it."""
