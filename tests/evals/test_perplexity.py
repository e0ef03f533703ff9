"""Perplexity: windows as the Hugging Face guide has them, sums as a whole softmax gives them."""

import dataclasses
import json
import math

import numpy as np
import pytest

from data import shards
from data.config import DataConfig
from data.sources import open_sources
from evals.perplexity import Perplexity, bytes_of, figures, windows
from evals.task import Settings, mean, ratio
from model.config import Arch, Attention, Embeddings, Head, Rope
from tests.evals.tiny import CFG, log_softmax, tiny_scorer
from text.tokenizer import Bytes

TEXTS = ["The first text.", "A second one, with a few more words in it: ä, ö.", "x" * 70]


@pytest.fixture(scope="module")
def scorer():
    return tiny_scorer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A JSONL file of TEXTS, and a file of the second alone."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (folder / "one.txt").write_text(TEXTS[1])
    return folder


def score(scorer, source, **settings):
    task = Perplexity("it", str(source), Settings(**settings))
    task.prepare(scorer)
    return task.run(scorer)


def guide(tokens, seq, stride):
    """The targets that the guide's loop leaves for the loss, by window: (start, target) pairs."""
    found, before = [], 0
    for start in range(0, tokens, stride):
        stop = min(start + seq, tokens)
        masked = stop - start - (stop - before)
        # The loss shifts labels by one, so that a window's first token is never a target.
        found += [(start, i) for i in range(start + max(masked, 1), stop)]
        before = stop
        if stop == tokens:
            break
    return found


@pytest.mark.parametrize("seq, stride", [(8, 8), (8, 4), (8, 1), (8, 7), (2, 1), (2, 2), (5, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 16, 17, 40])
def test_windows_score_what_the_guide_scores(tokens, seq, stride):
    ours = [
        (start, i)
        for start, stop, scored in windows(tokens, seq, stride)
        for i in range(stop - scored, stop)
    ]
    assert ours == guide(tokens, seq, stride)
    targets = [i for _, i in ours]
    assert len(set(targets)) == len(targets)
    if stride < seq:
        assert targets == list(range(1, tokens))
        assert all(i - start >= min(seq - stride, i) for start, i in ours)


@pytest.mark.parametrize("stride", [64, 16, 1])
def test_nats_are_those_of_the_whole_softmax(scorer, corpus, stride):
    ids = list(TEXTS[1].encode())
    total = 0.0
    for start, i in guide(len(ids), 24, min(stride, 24)):
        total -= log_softmax(scorer, ids[start:i])[-1][ids[i]]
    result = score(scorer, corpus / "one.txt", seq=24, stride=min(stride, 24))
    tokens = result.counts["tokens"]
    assert result.figures["nats_per_token"].value * tokens == pytest.approx(total, rel=1e-5)
    assert result.counts["windows"] == len(list(windows(len(ids), 24, min(stride, 24))))


def test_the_figures_of_documents_add_up(scorer, corpus, tmp_path):
    together = score(scorer, corpus / "all.jsonl", seq=32)
    nats = bytes_ = tokens = 0
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
        alone = score(scorer, tmp_path / f"{number}.txt", seq=32)
        nats += alone.figures["nats_per_token"].value * alone.counts["tokens"]
        bytes_, tokens = bytes_ + alone.counts["bytes"], tokens + alone.counts["tokens"]
    assert together.counts["documents"] == 3
    assert (together.counts["bytes"], together.counts["tokens"]) == (bytes_, tokens)
    found = {name: figure.value for name, figure in together.figures.items()}
    assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_in_a_window_as_long_as_the_document_the_stride_changes_nothing(scorer, corpus):
    whole = score(scorer, corpus / "one.txt", seq=128)
    for stride in (1, 60, 128):
        assert score(scorer, corpus / "one.txt", seq=128, stride=stride).figures == whole.figures


def test_where_nothing_begins_a_document_its_first_token_is_free(scorer, corpus):
    result = score(scorer, corpus / "all.jsonl", seq=128)
    size = sum(len(text.encode()) for text in TEXTS)
    assert result.counts["bytes"] == size - 3
    assert result.counts["tokens"] == size - 3
    ours = tiny_scorer(prefix=(256,))
    result = score(ours, corpus / "all.jsonl", seq=128)
    assert (result.counts["bytes"], result.counts["tokens"]) == (size, size)
    ids = [256, *TEXTS[0].encode()]
    first = score(ours, corpus / "all.jsonl", seq=128, limit=1)
    logprobs = log_softmax(ours, ids)[np.arange(len(ids) - 1), ids[1:]]
    assert first.figures["nats_per_token"].value == pytest.approx(-logprobs.mean(), rel=1e-5)
    assert first.counts["documents"] == 1


def test_windows_side_by_side_leave_out_the_bytes_of_their_first_tokens(scorer, corpus):
    result = score(scorer, corpus / "one.txt", seq=10, stride=10)
    ids = Bytes().prompt(TEXTS[1])
    assert result.counts["tokens"] == len(ids) - result.counts["windows"]
    assert result.counts["bytes"] == result.counts["tokens"]


def test_bytes_of_a_token_are_its_own():
    assert [bytes_of(i, Bytes()) for i in (65, 195, 256)] == [1, 1, 0]


def test_a_prepared_source_scores_as_its_text_does(corpus, tmp_path):
    scorer = tiny_scorer(prefix=(256,))
    config = DataConfig(sources=(str(corpus / "all.jsonl"),), held_out=0)
    shards.write(tmp_path / "shards", open_sources(config), Bytes(), config)
    text = score(scorer, corpus / "all.jsonl", seq=32)
    tokens = score(scorer, tmp_path / "shards", seq=32)
    assert text.figures == tokens.figures
    assert text.counts == tokens.counts
    other = dataclasses.replace(config, sources=(str(corpus / "one.txt"),))
    shards.write(tmp_path / "other", open_sources(other), Other(), other)
    with pytest.raises(ValueError, match="other"):
        score(scorer, tmp_path / "other", seq=32)


class Other(Bytes):
    """A tokenizer that is not Bytes."""

    digest = "of another"


def test_held_out_documents_are_those_of_training(scorer, corpus):
    (split,) = open_sources(DataConfig(sources=(str(corpus / "all.jsonl"),), held_out=0.3))
    size = sum(len(split.source.text(i).encode()) for i in split.held_out)
    result = score(scorer, corpus / "all.jsonl", seq=128, held_out=0.3)
    assert result.counts["documents"] == len(split.held_out) < 3
    assert result.counts["bytes"] == size - len(split.held_out)


def test_standard_errors_are_over_documents_or_over_the_windows_of_one():
    nats, tokens = np.array([3.0, 5.0, 2.0, 9.0]), np.array([2, 2, 1, 3])
    several = figures(nats, tokens, np.array([7, 9]), np.array([0, 0, 1, 1]))
    assert several["nats_per_token"] == ratio([8, 11], [4, 4])
    assert several["bits_per_byte"] == ratio(np.array([8, 11]) / math.log(2), [7, 9])
    one = figures(nats, tokens, np.array([16]), np.zeros(4, int))
    assert one["nats_per_token"] == ratio(nats, tokens)
    assert one["bits_per_byte"].value == pytest.approx(19 / math.log(2) / 16)
    error = one["nats_per_token"].stderr * one["perplexity"].value
    assert one["perplexity"].stderr == pytest.approx(error)
    assert (
        figures(nats[:1], tokens[:1], np.array([4]), np.zeros(1, int))["perplexity"].stderr is None
    )


def test_the_standard_error_is_the_spread_over_draws_of_the_documents():
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 200, 400)
    nats = tokens * draw.normal(3, 0.5, 400)
    again = [draw.integers(0, 400, 400) for _ in range(2000)]
    spread = np.std([nats[which].sum() / tokens[which].sum() for which in again])
    assert ratio(nats, tokens).stderr == pytest.approx(spread, rel=0.05)
    same = ratio(nats, np.full(400, 2.0))
    assert same.stderr == pytest.approx(mean(nats / 2).stderr)


def test_the_hash_tells_texts_and_settings_apart(scorer, corpus):
    hashes = {
        score(scorer, corpus / name, **settings).hash
        for name, settings in [
            ("one.txt", {"seq": 64}),
            ("one.txt", {"seq": 32}),
            ("one.txt", {"seq": 64, "stride": 8}),
            ("all.jsonl", {"seq": 64}),
        ]
    }
    assert len(hashes) == 4
    assert score(scorer, corpus / "one.txt", seq=64).hash in hashes


ENCODER = dataclasses.replace(CFG, arch=Arch(attention=Attention(causal=False), head=Head("none")))
LEARNED = dataclasses.replace(
    CFG, arch=Arch(rope=Rope(theta=0), embeddings=Embeddings(positions=50))
)


def test_learned_positions_bound_the_window(corpus):
    scorer = tiny_scorer(LEARNED)
    result = score(scorer, corpus / "one.txt")
    assert result.settings["seq"] == 50
    assert math.isfinite(result.figures["nats_per_token"].value)
    with pytest.raises(ValueError, match="seq=51 is more than the 50 positions that it learned"):
        score(scorer, corpus / "one.txt", seq=51)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stride": 40, "seq": 32}, "stride=40 would leave out tokens: at most seq=32"),
        ({"seq": 1}, "seq=1 leaves no token to predict"),
        ({"seq": -1}, "seq=-1 must be at least 0"),
        ({"held_out": 1.0}, "held_out=1.0 must be at least 0 and below 1"),
        ({"field": "body"}, "no field 'body', but 'text'"),
    ],
)
def test_wrong_settings_are_told(scorer, corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        score(scorer, corpus / "all.jsonl", **settings)


def test_an_encoder_has_no_perplexity(corpus):
    with pytest.raises(ValueError, match=r"needs a causal language model.*no pseudo-likelihood"):
        score(tiny_scorer(ENCODER), corpus / "one.txt")


def test_a_source_without_a_second_token_is_told(scorer, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no document has a second token"):
        score(scorer, tmp_path / "a.txt")
