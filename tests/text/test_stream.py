import random

import numpy as np
import pytest
import tokenizers

from tests.text import small
from text import sentencepiece
from text.kinds import Bytes, Published
from text.stops import Stops
from text.stream import Stream


def of_pieces(prefix=True, scheme="always"):
    model = sentencepiece.read(small.sentencepiece(prefix=prefix))
    return Published(sentencepiece.convert(model, scheme, {})[0])


KINDS = {
    "bytes": Bytes(),
    "byte-level": Published(small.byte_level()),
    "sentencepiece": of_pieces(),
    "sentencepiece, first": of_pieces(scheme="first"),
    "sentencepiece, no prefix": of_pieces(prefix=False),
    "word pieces": Published(small.word_piece()),
}
every_kind = pytest.mark.parametrize("made", KINDS.values(), ids=KINDS)


def parts(made, ids):
    stream = Stream(made)
    return [*(stream.push(i) for i in ids), stream.finish()]


@every_kind
def test_the_parts_of_a_text_joined_are_the_text(made):
    for text in small.TEXTS:
        for ids in (made.prompt(text), made.encode([text])[0].tolist()):
            assert "".join(parts(made, ids)) == made.decode(ids)


@every_kind
def test_the_parts_of_random_ids_joined_are_their_text(made):
    """Also broken UTF-8, special tokens anywhere, and ids past the vocabulary."""
    rng = random.Random(0)
    for _ in range(400):
        ids = [rng.randrange(made.size + 2) for _ in range(rng.randrange(12))]
        assert "".join(parts(made, ids)) == made.decode(ids), ids


@pytest.mark.parametrize("made", [KINDS["sentencepiece"], KINDS["bytes"], KINDS["byte-level"]])
def test_the_parts_of_random_bytes_joined_are_their_text(made):
    """Where single bytes are ids, they are most of what goes wrong."""
    ids = [i for i in range(made.size) if made.spell(i) is not None and len(made.spell(i)) == 1]
    assert len(ids) >= 256
    by_byte = {made.spell(i)[0]: i for i in ids}
    letters = [*"aé日😀".encode(), 0xFF, 0xC3, 0xE6, 0xF0, 0x80]
    rng = random.Random(1)
    word = made.prompt("Hello")[-1]
    for _ in range(1000):
        chosen = [by_byte[rng.choice(letters)] for _ in range(rng.randrange(10))]
        chosen.insert(rng.randrange(len(chosen) + 1), word)
        assert "".join(parts(made, chosen)) == made.decode(chosen)


def test_text_comes_as_soon_as_it_is_certain():
    made = KINDS["bytes"]
    assert parts(made, "aé😀".encode()) == ["a", "", "é", "", "", "", "😀", ""]
    assert parts(made, "😀".encode()[:3]) == ["", "", "", "�"]
    assert parts(made, [0xC3, ord("a"), 256, 300]) == ["", "�a", "", "", ""]
    made = KINDS["sentencepiece"]
    ids = made.prompt("Hello the world")
    assert parts(made, ids) == ["Hello", " the", " world", ""]
    made = KINDS["word pieces"]
    assert parts(made, made.prompt("the foxs, it is.")) == [
        *("", "the", " fox", "s", ",", " it", " is", ".", "", "")
    ]


def test_a_run_of_byte_pieces_waits_for_its_end():
    """SentencePiece decodes é C3 A9 FF as three signs of damage, so é is not certain before."""
    made = KINDS["sentencepiece"]
    byte = {made.spell(i): i for i in range(made.size) if made.spell(i)}
    run = [byte[b"\xc3"], byte[b"\xa9"]]
    word = made.prompt("the")[-1]
    assert parts(made, [*run, word]) == ["", "", "é the", ""]
    assert parts(made, [*run, byte[b"\xff"], word]) == ["", "", "", "��� the", ""]
    assert parts(made, [word, *run]) == ["the", "", "", "é"]


@every_kind
def test_the_cost_of_a_token_does_not_grow_with_the_text(made, monkeypatch):
    """Counted in the ids that are decoded."""
    seen = []
    whole = type(made).decode

    def counted(self, ids):
        seen.append(len(ids))
        return whole(self, ids)

    monkeypatch.setattr(type(made), "decode", counted)
    ids = made.prompt("the world 😀 ")
    parts(made, ids * 200)
    assert sum(seen) <= 4 * len(ids) * 200
    assert max(seen, default=0) <= 2 * len(ids)


def test_a_decoder_without_spaces_of_its_own_joins_by_them():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
    made = Published(made)
    assert parts(made, [0, 1, 2, 0]) == ["a", " b", " </s>", " a", ""]
    assert made.decode([0, 1, 2, 0]) == "a b </s> a"


def stopped(stops, pieces):
    """What comes out of a text in pieces, and what ended it."""
    made = Stops(stops)
    return "".join([*map(made.push, pieces), made.finish()]), made.found


def first_complete(stops, text):
    """The same by looking at every beginning of the text."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_stop_strings_end_a_text_however_it_is_cut():
    rng = random.Random(2)
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 5)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert stopped(stops, pieces) == first_complete(stops, text), (stops, pieces)


def test_only_what_may_begin_a_stop_string_is_held_back():
    made = Stops(["\nUser:", "</s>"])
    assert made.push("Hello\nUs") == "Hello"
    assert made.push("ually") == "\nUsually"
    assert made.push(" <") == " "
    assert (made.push("/s> more"), made.found) == ("", "</s>")
    assert (made.push("and more"), made.finish()) == ("", "")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="an empty stop string"):
        Stops(["end", ""])


def test_spelled_bytes_of_a_byte_level_vocabulary_are_those_of_its_decoder():
    made = KINDS["byte-level"]
    for i in range(made.size):
        assert made.spell(i).decode(errors="replace") == made.decode([i])
    assert made.spell(made.size) == b""
    assert np.all([made.spell(i) == b"" for i in made.ends])
