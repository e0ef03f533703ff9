import itertools
import random

import pytest
from tokenizers import AddedToken

from tests.text import small
from text import pretrained, sentencepiece
from text.kinds import Published
from text.sentencepiece import BPE, CONTROL, NORMAL, UNKNOWN, Model, Piece


def opened(data, scheme="always", added=None):
    return Published(sentencepiece.convert(sentencepiece.read(data), scheme, added or {})[0])


def by_definition(model, text):
    """SentencePiece's BPE: merge the neighbours whose union has the best score, the first such."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    parts = list("▁" * model.dummy_prefix + text.replace(" ", "▁")) if text else []
    while True:
        unions = [(scores.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        unions = [union for union in unions if union[0] is not None]
        if not unions:
            break
        at = -max(unions)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    spelled = [[p] if p in scores else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [ids[piece] for pieces in spelled for piece in pieces]


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_the_definition(prefix):
    data = small.sentencepiece(prefix=prefix)
    model, made = sentencepiece.read(data), opened(data)
    rng = random.Random(0)
    texts = ["".join(rng.choices("the world Hl\n日q", k=rng.randint(1, 30))) for _ in range(300)]
    for text in [*small.TEXTS, *texts]:
        ids = made.encode([text])[0].tolist()
        assert ids == by_definition(model, text), text
        assert made.decode(ids) == text


def test_what_a_model_says_of_itself_is_read():
    model = sentencepiece.read(
        small.sentencepiece(control=("<unk>", "<bos>", "<eos>"), prefix=False)
    )
    assert (model.type, model.bos, model.eos, model.byte_fallback) == (BPE, "<bos>", "<eos>", True)
    assert (model.dummy_prefix, model.extra_spaces, model.charsmap) == (False, False, b"")
    assert model.pieces[0] == Piece("<unk>", 0.0, UNKNOWN)
    assert model.pieces[1] == Piece("<bos>", 0.0, CONTROL)
    assert model.pieces[-1] == Piece("\t", -float(len(small.PIECES) - 1), NORMAL)


def test_control_pieces_are_special_and_cannot_be_written_in_a_document():
    pieces = ("<", ">", "s>", "<s", *small.PIECES)
    made = opened(small.sentencepiece(pieces=pieces))
    assert made.prompt("<s>")[0] == 1 and 1 not in made.encode(["<s>"])[0]
    assert made.decode(made.prompt("<s>Hello</s>")) == "Hello"
    assert (made.end, made.decode(made.encode(["a<s>"])[0])) == (2, "a<s>")


def test_user_defined_pieces_come_before_all_others():
    data = small.sentencepiece(user=("<mark>", "wor"))
    made = opened(data)
    ids = {piece.text: i for i, piece in enumerate(sentencepiece.read(data).pieces)}
    assert ids["<mark>"] in made.encode(["a<mark>b"])[0]
    assert ids["wor"] in made.encode(["the world"])[0]
    assert made.decode(made.encode(["the world<mark> x"])[0]).replace(" ", "") == "theworld<mark>x"
    spaces = opened(small.sentencepiece(user=("▁▁▁",), prefix=False))  # Gemma's runs of spaces
    assert len(spaces.encode(["   "])[0]) == 1
    assert spaces.decode(spaces.encode(["a   b"])[0]) == "a   b"


def test_the_dummy_prefix_follows_the_scheme():
    data = small.sentencepiece()
    first, always, never = (opened(data, scheme) for scheme in ("first", "always", "never"))
    hello = always.prompt("Hello")
    assert len(hello) == 1 and first.prompt("Hello") == hello
    assert always.prompt("<s>Hello") == [1, *hello] != first.prompt("<s>Hello")
    assert never.prompt(" Hello") == hello != never.prompt("Hello")
    # With a space before it there are two of them; transformers' "first" keeps one.
    assert always.decode(always.prompt(" Hello")) == " Hello"
    assert first.prompt(" Hello") == hello


def test_added_tokens_take_the_place_of_pieces_or_new_ids(tmp_path):
    size = len(sentencepiece.read(small.sentencepiece()).pieces)
    small.write(
        tmp_path,
        tokenizer_model=small.sentencepiece(user=("<unused0>", "<mark>")),
        tokenizer_config_json={
            "bos_token": "<s>",
            "add_bos_token": True,
            "legacy": False,
            "added_tokens_decoder": {
                "259": small.special("<|user|>"),
                str(size + 1): small.special("<|end|>"),
                str(size + 2): small.special("<more>", special=False),
            },
            "eos_token": "<|end|>",
        },
    )
    made = pretrained.open_folder(tmp_path)
    assert made.size == size + 3
    assert made.prompt("<|user|><|end|><more>") == [1, 259, size + 1, size + 2]
    assert made.decode([1, 259, size + 1, size + 2]) == "<more>"
    assert made.ends == (2, size + 1)
    assert made.specials == {"bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>"}
    assert "<unused0>" not in made.files()["tokenizer.json"]
    again = pretrained.from_json(made.to_json())
    assert again.prompt("Hello <|user|>") == made.prompt("Hello <|user|>")


def test_extra_spaces_are_removed_where_the_model_says_so():
    letters = [Piece(c, -float(i), NORMAL) for i, c in enumerate("▁abc")]
    model = Model([Piece("<unk>", 0.0, UNKNOWN), *letters], type=BPE)
    made = Published(sentencepiece.convert(model, "always", {})[0])
    assert made.prompt("  a  b ") == made.prompt("a b") == [1, 2, 1, 3]
    assert made.prompt("   ") == []


def test_a_unigram_takes_the_likeliest_pieces():
    scores = {"▁": -3.0, "a": -3.0, "b": -3.0, "▁a": -4.0, "ab": -4.5, "▁ab": -8.0, "aab": -20.0}
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(text, score, NORMAL) for text, score in scores.items()]
    made = sentencepiece.convert(Model(pieces, extra_spaces=False), "always", {})[0]
    made = Published(made)
    names = ["<unk>", "</s>", *scores]
    assert [names[i] for i in made.prompt("ab")] == ["▁a", "b"]
    assert [names[i] for i in made.prompt("aab")] == ["▁a", "ab"]
    assert [names[i] for i in made.prompt("a b")] == ["▁a", "▁", "b"]
    assert made.decode(made.prompt("a b")) == "a b"


def test_every_shortened_or_changed_model_is_read_or_refused():
    whole = small.sentencepiece(pieces=small.PIECES[:6])
    rng = random.Random(0)
    damaged = [whole[:size] for size in range(0, len(whole), 97)]
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        try:
            model = sentencepiece.read(data)
        except ValueError as error:
            assert str(error).startswith("tokenizer.model is no SentencePiece model: ")
            refused += 1
        else:
            assert 0 < len(model.pieces) <= len(whole)
    assert 30 < refused < len(damaged)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "a field of .* bytes where 0 are left"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a number without an end"),
        (b"\x0b", "a field of kind 3"),
        (b"\x08\x01", "no SentencePiece model"),
        (b"\x0a\x05\x15\x00\x00\x80\x7f", "score inf"),
        (b"\x0a\x03\x0a\x01\xff", "can't decode"),
        (b"\x0a\x03\x0a\x01a" * 2, "the same piece twice"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x04", "neither unigram nor BPE"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(data, message):
    with pytest.raises(ValueError, match=message):
        sentencepiece.read(data)


def test_added_tokens_of_a_unigram_come_after_its_pieces():
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("a", -1.0, NORMAL), Piece("<x>", 0.0, CONTROL)]
    added = {2: AddedToken("<y>", special=True), 3: AddedToken("<z>", special=True)}
    made = Published(sentencepiece.convert(Model(pieces, dummy_prefix=False), "never", added)[0])
    assert made.prompt("a<y><z>") == [1, 2, 3]
