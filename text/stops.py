"""Stop strings: a text that comes in pieces ends before the first of them."""

from collections.abc import Sequence


class Stops:
    """Holds back text that may be the beginning of a stop string.

    `found` is the stop string that ended the text, None until then: the one that is complete
    first, of several the longest. How the text is cut into pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]):
        if not all(stops):
            raise ValueError("an empty stop string would end every text before it begins")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string; "" once one is found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = self._open(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _open(self, text: str) -> int:
        """How many last characters may be the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
