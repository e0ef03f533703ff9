import json
import threading
from collections import defaultdict

import numpy as np
import pytest

from data.config import DataConfig
from data.held_out import held_out_batches
from data.loader import Loader
from data.packing import ARRAYS
from data.sources import open_sources
from data.stream import Windows
from text.tokenizer import Bytes, train_bpe

SEQ, BATCH, WINDOW = 32, 4, 3000


def config(*sources, **changes) -> DataConfig:
    return DataConfig(sources=tuple(map(str, sources)), seq=SEQ, batch=BATCH, **changes)


def loader(run, *, rows=range(BATCH), seed=1, window=WINDOW, tokenizer=None, splits=None):
    splits = splits or open_sources(run)
    return Loader(run, tokenizer or Bytes(), splits, seed=seed, rows=rows, window=window)


def batches(run, count, **kwargs):
    with loader(run, **kwargs) as made:
        return [next(made) for _ in range(count)]


def assert_same(a, b):
    assert a.samples == b.samples
    for name in ARRAYS:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def targets_of(found) -> dict:
    """{(source, epoch, document): [(first, ids of targets), ...]} of the batches `found`."""
    pieces = defaultdict(list)
    for batch in found:
        for r, row in enumerate(batch.samples):
            for k, (*document, first) in enumerate(row):
                own = batch.arrays["segments"][r] == k + 1
                positions = batch.arrays["positions"][r, own]
                np.testing.assert_array_equal(positions, np.arange(own.sum()))
                pieces[tuple(document)].append((first, batch.arrays["targets"][r, own].tolist()))
    return pieces


def test_every_token_of_every_document_is_a_target_exactly_once_per_epoch(corpus):
    run = config(corpus)
    (part,) = open_sources(run)
    found = targets_of(batches(run, 700))
    epochs = {epoch for _, epoch, _ in found}
    assert {0, 1, 2} <= epochs
    for epoch in sorted(epochs)[:-2]:  # the last ones are not over yet
        for i in part.train.tolist():
            ids = []
            for first, targets in sorted(found[0, epoch, i]):
                assert first == len(ids)
                ids += targets
            assert ids == [*part.source.text(i).encode(), Bytes.end]


def test_inputs_are_the_targets_one_step_later_and_begin_with_the_end(corpus):
    for batch in batches(config(corpus), 40):
        arrays = batch.arrays
        within = arrays["segments"][:, 1:] == arrays["segments"][:, :-1]
        within &= arrays["segments"][:, 1:] > 0
        assert (arrays["inputs"][:, 1:] == arrays["targets"][:, :-1])[within].all()
        for r, row in enumerate(batch.samples):
            for k, sample in enumerate(row):
                at = np.argmax(arrays["segments"][r] == k + 1)
                assert (arrays["inputs"][r, at] == Bytes.end) == (sample[3] == 0)


def test_epochs_and_seeds_have_orders_of_their_own(corpus):
    run = config(corpus)
    order = defaultdict(list)
    for batch in batches(run, 400, window=10**5):
        for row in batch.samples:
            for _, epoch, document, _ in row:
                order[epoch].append(document)
    assert order[0] != order[1]
    assert batches(run, 1, seed=1)[0].samples != batches(run, 1, seed=2)[0].samples


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_do_not_depend_on_the_number_of_processes(corpus, processes):
    run = config(corpus)
    whole = batches(run, 60)
    each = BATCH // processes
    parts = [batches(run, 60, rows=range(k * each, (k + 1) * each)) for k in range(processes)]
    for step, batch in enumerate(whole):
        for name in ARRAYS:
            joined = np.concatenate([part[step].arrays[name] for part in parts])
            np.testing.assert_array_equal(joined, batch.arrays[name])
        assert sum((part[step].samples for part in parts), ()) == batch.samples


def test_rows_can_be_asked_for_in_any_order_and_twice(corpus):
    run = config(corpus)
    for a, b in zip(batches(run, 9), batches(run, 9, rows=[3, 0, 3]), strict=True):
        np.testing.assert_array_equal(a.arrays["inputs"][[3, 0, 3]], b.arrays["inputs"])


def test_a_restored_loader_goes_on_exactly(corpus):
    run = config(corpus)
    with loader(run) as whole:
        states, found = [whole.state()], []
        for _ in range(130):
            found.append(next(whole))
            states.append(json.loads(json.dumps(whole.state())))
    windows = [state["window"]["number"] for state in states]
    borders = [i for i in range(1, 129) if windows[i] != windows[i + 1]]
    assert len(borders) >= 3
    for start in {0, 1, 7, borders[0], borders[1] + 1, borders[2], borders[2] - 1}:
        with loader(run) as resumed:
            resumed.restore(states[start])
            assert resumed.state() == states[start]
            for expected in found[start : start + 25]:
                assert_same(next(resumed), expected)


def test_restoring_goes_back_after_reading_on(corpus):
    run = config(corpus)
    with loader(run) as made:
        next(made)
        state, expected = made.state(), [next(made) for _ in range(5)]
        for _ in range(50):
            next(made)
        made.restore(state)
        for batch in expected:
            assert_same(next(made), batch)


def test_the_state_is_small_and_belongs_to_the_last_batch_returned(corpus):
    with loader(config(corpus, corpus, weights=(1, 3))) as made:
        for step in range(1, 20):
            next(made)
            assert made.state()["step"] == step
        assert len(json.dumps(made.state())) < 400


def test_the_state_of_another_corpus_is_refused(corpus, tmp_path):
    with loader(config(corpus)) as made:
        state = made.state()
    (corpus / "more.txt").write_text("another document")
    with (
        loader(config(corpus)) as made,
        pytest.raises(ValueError, match="not the data that the run was trained on"),
    ):
        made.restore(state)


def test_a_mixture_follows_its_weights_within_a_document(corpus, tmp_path):
    lines = tmp_path / "lines"
    lines.mkdir()
    for i in range(10):
        (lines / f"{i}.txt").write_text(f"{i}" * 50)
    splits = open_sources(config(corpus, lines))
    windows = iter(Windows(splits, (1, 3), Bytes(), SEQ, seed=0, tokens=WINDOW))
    found = np.zeros(2)
    for _ in range(20):
        window = next(windows)
        for (source, _, _), ids in zip(window.samples, window.sequences, strict=True):
            found[source] += len(ids) - 1
            assert abs(found[0] - found.sum() / 4) <= max(splits[0].source.sizes) + 1
        assert window.after["tokens"] == found.tolist()


def test_the_batches_hold_every_source(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("z" * 3000)
    found = targets_of(batches(config(corpus, other, weights=(1, 3)), 100))
    assert {source for source, _, _ in found} == {0, 1}


def test_a_source_of_weight_zero_is_only_evaluated(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("z" * 3000)
    run = config(corpus, other, weights=(1, 0))
    found = batches(run, 60)
    assert {sample[0] for batch in found for row in batch.samples for sample in row} == {0}
    held = held_out_batches(run, Bytes(), open_sources(run), bytes=10**6, rows=range(BATCH))
    assert any((batch["targets"] == ord("z")).any() for batch in held.batches)


def test_without_weights_all_documents_are_one_stream(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("z" * 3000)
    run = config(corpus, other, held_out=0)
    found = targets_of(batches(run, 400))
    first = {(source, document) for source, epoch, document in found if epoch == 0}
    assert first == {(0, i) for i in range(40)} | {(1, 0)}


@pytest.mark.parametrize("text", ["x", "one tiny document", "line\n" * 40])
def test_a_tiny_corpus_fills_its_rows(text, tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text(text)
    with loader(config(path, held_out=0), window=None) as made:
        for _ in range(100):
            next(made)
        assert made.waste < 0.02


def test_padding_stays_under_two_per_cent_with_the_first_windows(corpus):
    with loader(config(corpus), window=None) as made:
        for _ in range(1500):
            next(made)
        assert made.state()["window"]["number"] >= 1
        assert made.waste < 0.02


def test_no_thread_outlives_the_loader(corpus):
    before = set(threading.enumerate())
    made = loader(config(corpus))
    next(made)
    assert made.waited_s > 0
    assert set(threading.enumerate()) > before
    made.close()
    made.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="closed"):
        next(made)


def test_a_failure_in_the_background_is_raised_by_next(corpus):
    run = config(corpus)
    splits = open_sources(run)
    for path in corpus.iterdir():
        path.unlink()
    with loader(run, splits=splits) as made, pytest.raises(FileNotFoundError, match=r"\.txt"):
        next(made)


def test_rows_outside_of_the_batch_are_refused(corpus):
    with pytest.raises(ValueError, match=r"rows=\[4\] must lie in 0 to 3"):
        loader(config(corpus), rows=[4])


def held(run, size=10**6, tokenizer=None, rows=range(BATCH)):
    return held_out_batches(run, tokenizer or Bytes(), open_sources(run), bytes=size, rows=rows)


def test_held_out_batches_cover_the_held_out_documents_once(corpus):
    run = config(corpus, held_out=0.3)
    (part,) = open_sources(run)
    found = held(run)
    texts = [part.source.text(i).encode() for i in part.held_out]
    assert found.bytes == sum(map(len, texts)) and found.documents == len(texts) > 2
    ids = np.concatenate([b["targets"][b["segments"] > 0] for b in found.batches])
    expected = [*b"".join(texts), *[Bytes.end] * len(texts)]
    assert sorted(ids.tolist()) == sorted(expected)
    assert all(array.shape == (BATCH, SEQ) for b in found.batches for array in b.values())


def test_held_out_bytes_are_the_same_for_any_tokenizer(corpus):
    run = config(corpus, held_out=0.3)
    words = train_bpe([path.read_text() for path in corpus.iterdir()], 300)
    for size in (1, 100, 777, 1500):
        a, b = held(run, size), held(run, size, words)
        assert size - 3 <= a.bytes <= size and a.bytes == b.bytes
        for found, tokenizer in ((a, Bytes()), (b, words)):
            targets = [batch["targets"][batch["segments"] > 0] for batch in found.batches]
            assert len(tokenizer.decode(np.concatenate(targets)).encode()) == found.bytes


def test_processes_share_the_held_out_rows(corpus):
    run = config(corpus, held_out=0.3)
    whole, parts = held(run), [held(run, rows=[k]) for k in range(BATCH)]
    for step, batch in enumerate(whole.batches):
        for name in ARRAYS:
            joined = np.concatenate([part.batches[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])
    assert {part.bytes for part in parts} == {whole.bytes}


def test_nothing_held_out_is_no_batch(corpus):
    assert held(config(corpus, held_out=0)).batches == ()
