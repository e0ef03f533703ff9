"""Text from ids as they come: each piece of it as soon as no later id can change it."""

import codecs

from text.kinds import Tokenizer


class Stream:
    """The texts that `push` and `finish` give, joined, are `decode` of all ids.

    What an id adds is found from the one before it, so its cost does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []  # the last ids whose text is out, which decide on spaces
        self._bytes: list[int] = []  # a run of byte pieces, decoded as a whole when it ends

    def push(self, i: int) -> str:
        """The text that is certain with one more id, maybe none."""
        spelled = self._tokenizer.spell(i)
        if self._tokenizer.joins_bytes:
            return self._utf8.decode(spelled)
        if spelled is None:
            text = self._after([*self._bytes, i])
            self._before, self._bytes = [i], []
            return text
        if spelled:
            # One byte too many turns the whole run into signs of damage, so none of it is certain.
            self._bytes.append(i)
        return ""

    def finish(self) -> str:
        """The rest, when no more ids come."""
        text = self._after(self._bytes) if self._bytes else ""
        self._bytes = []
        return text + self._utf8.decode(b"", final=True)

    def _after(self, ids: list[int]) -> str:
        """What `ids` add to the text of the ids before."""
        start = len(self._tokenizer.decode(self._before))
        return self._tokenizer.decode([*self._before, *ids])[start:]
