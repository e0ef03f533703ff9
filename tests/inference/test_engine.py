"""The engine: what a cache gives is what the whole text gives, alone, in a batch, on any mesh."""

import contextlib

import jax
import numpy as np
import pytest

from inference import engine as engines
from inference.engine import Result, passes
from inference.sampling import Sampling
from model.config import Arch, Attention, Embeddings, Head, Rope
from tests.inference.tiny import CFG, chain, engine_of, full_logits, spelled
from tests.marks import mostly_slow
from tests.meshes import hybrid
from tests.model.test_decoder import MODELS, config

CAUSAL = [name for name in MODELS if config(name).arch.head.kind == "language"]
PROMPTS = ([5, 6, 7, 8, 9, 10, 11, 12, 13], [3], [40, 41], [9, 8, 7, 6, 5])


@pytest.fixture(scope="module")
def engine():
    return engine_of(apart=True)


def new_ids(engine, prompts, sampling=engines.GREEDY, **how):
    how = {"max_tokens": 6, "ignore_eos": True, **how}
    return [result.new_ids for result in engine.generate(prompts, sampling, **how).run()]


@contextlib.contextmanager
def compilations():
    """A list that grows with each program that XLA compiles."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


KINDS = [*((name, True) for name in CAUSAL), ("llama", False), ("gemma2", False)]


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ("llama", True), ("gemma2", False)))
def test_every_id_is_what_the_whole_text_says(kind):
    name, apart = kind
    engine = engine_of(config(name), apart=apart)
    prompt = [3, 1, 4]
    (found,) = new_ids(engine, [prompt], max_tokens=5)
    z = full_logits(engine, prompt + found)
    assert found == z[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.0, top_p=0.9, repetition_penalty=1.2, seed=4)]
)
def test_a_batch_gives_each_row_what_it_gives_alone(engine, sampling):
    together = new_ids(engine, PROMPTS, sampling)
    assert together == [new_ids(engine, [prompt], sampling)[0] for prompt in PROMPTS]
    assert len({tuple(ids) for ids in together}) > 1


def test_rows_with_settings_of_their_own_share_a_batch(engine):
    settings = [Sampling(), Sampling(2.0, seed=1), Sampling(2.0, seed=1, stream=1), Sampling()]
    together = new_ids(engine, [PROMPTS[0]] * 4, settings)
    alone = [new_ids(engine, [PROMPTS[0]], setting)[0] for setting in settings]
    assert together == alone
    assert together[0] == together[3]
    assert len({tuple(ids) for ids in together}) == 3


@pytest.mark.parametrize("sizes", mostly_slow([(2, 2, 2), (1, 1, 2)], (2, 2, 2)))
def test_a_mesh_generates_what_one_device_generates(engine, sizes):
    split = engine_of(mesh=hybrid(*sizes), apart=True)
    for prompts in (PROMPTS, PROMPTS[:1]):
        for sampling in (Sampling(), Sampling(1.0, seed=2)):
            assert new_ids(split, prompts, sampling) == new_ids(engine, prompts, sampling)


def test_a_prompt_in_passes_is_the_prompt_in_one(engine, monkeypatch):
    prompts = [list(range(60, 160)), list(range(30)), [7]]
    whole = new_ids(engine, prompts)
    monkeypatch.setattr(engines, "LONGEST", 64)
    assert passes(99) == [64, 64]
    assert new_ids(engine, prompts) == whole


@pytest.mark.slow
def test_windows_shorter_than_the_prompt_and_the_text():
    cfg = config("gemma2")
    engine = engine_of(cfg)
    prompt = np.random.default_rng(3).integers(0, 32, 21).tolist()
    (found,) = new_ids(engine, [prompt], max_tokens=20)
    z = full_logits(engine, prompt + found)
    assert found == z[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.slow
def test_several_steps_a_call_change_nothing(engine):
    several = engine_of(apart=True, steps=4)
    for most in (1, 4, 6):
        wanted = new_ids(engine, PROMPTS, max_tokens=most)
        assert new_ids(several, PROMPTS, max_tokens=most) == wanted


@pytest.mark.slow
def test_bfloat16_generates_too():
    cfg = CFG.__class__(**{**vars(CFG), "dtype": "bfloat16", "param_dtype": "bfloat16"})
    assert all(len(ids) == 6 for ids in new_ids(engine_of(cfg), PROMPTS))


def test_ids_past_the_tokenizer_are_never_drawn(engine):
    found = new_ids(engine, PROMPTS, Sampling(50.0), max_tokens=60)
    assert 200 < max(map(max, found)) < engine.tokenizer.size == 257 < CFG.vocab


def test_prompts_of_a_bucket_compile_two_programs_and_growing_texts_none():
    engine = engine_of(apart=True)
    with compilations() as found:
        new_ids(engine, [list(range(9))], max_tokens=100)
        assert len(found) == 2  # the prompt, and a step
        for length in (1, 5, 17):
            new_ids(engine, [list(range(length))], max_tokens=100)
        new_ids(engine, [[1, 2]], Sampling(0.9, 5, 0.8, 0.1, 1.3, seed=7), max_tokens=100)
        new_ids(engine, [[1, 2]], max_tokens=90)  # the same cache
        assert len(found) == 2
        new_ids(engine, [list(range(18))], max_tokens=90)
        assert len(found) == 3  # twice as long a pass, and the same step
    assert engine.compiled_s > 0


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [(0, [16]), (1, [16]), (16, [16]), (17, [32]), (256, [256]), (257, [256, 16]),
     (384, [256, 128]), (385, [512]), (513, [512, 16]), (769, [1024]), (1024, [1024]),
     (1025, [1024, 16]), (2560, [1024, 1024, 512])],
)  # fmt: skip
def test_a_prompt_goes_through_passes_of_few_lengths(tokens, lengths):
    assert passes(tokens) == lengths


@pytest.fixture(scope="module")
def letters():
    """An engine that says the alphabet."""
    return chain(spelled("abcdefghijklmnopqrstuvw$xyz"))


def result(engine, prompt, **how):
    return engine.generate([[ord(c) for c in prompt]], **{"max_tokens": 9, **how}).run()[0]


def test_a_row_ends_with_the_end_and_other_rows_go_on(letters):
    ended, cut = letters.generate([[ord("u")], [ord("a")]], max_tokens=5).run()
    assert (ended.new_ids, ended.text, ended.finish_reason) == ([118, 119, 256], "vw", "eos")
    assert (cut.text, cut.finish_reason) == ("bcdef", "length")
    assert cut.prompt_ids == [97]


def test_an_ignored_end_is_an_id_like_others(letters):
    found = result(letters, "v", ignore_eos=True, max_tokens=4)
    assert (found.new_ids, found.text) == ([119, 256, 120, 121], "wxy")
    assert found.finish_reason == "length"


def test_the_last_id_can_be_the_end(letters):
    assert result(letters, "v", max_tokens=2).finish_reason == "eos"
    assert result(letters, "v", max_tokens=1).finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        (["de"], "bc", 4),  # over two tokens
        (["d"], "bc", 3),
        (["xyz", "cd", "cde"], "b", 3),
        (["abc"], "bcdefghij", 9),  # the prompt does not count
        (["jk"], "bcdefghij", 9),  # begun, and never held back for ever
    ],
)
def test_a_stop_string_ends_a_row_before_it(letters, stop, text, count):
    found = result(letters, "a", stop=stop)
    assert (found.text, len(found.new_ids)) == (text, count)
    assert found.finish_reason == ("length" if count == 9 else "stop")


@pytest.mark.parametrize("steps", [1, 3])
def test_the_text_comes_in_pieces_that_hold_all_of_it(letters, steps):
    engine = letters if steps == 1 else chain(spelled("abcdefghijk"), steps=steps)
    generation = engine.generate([[97], [99]], max_tokens=6, stop=["gh"])
    pieces = list(generation)
    assert [(piece.row, piece.id) for piece in pieces[:4]] == [(0, 98), (1, 100), (0, 99), (1, 101)]
    for row, found in enumerate(generation.results):
        own = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in own) == found.text
        assert [piece.id for piece in own] == found.new_ids
    assert generation.results[0].text == "bcdefg"  # "g" might have begun the stop string
    assert generation.results[1].text == "def"


def test_rates_are_of_what_was_done(engine):
    generation = engine.generate([PROMPTS[0], PROMPTS[1]], max_tokens=6, ignore_eos=True)
    found = generation.run()
    assert generation.prefill.tokens == len(PROMPTS[0]) - 1
    assert generation.decode.tokens == 10  # the first of each is not timed
    for each in found:
        assert isinstance(each, Result)
        assert each.prefill_tokens_per_s > 0 and each.decode_tokens_per_s > 0


def test_a_dialogue_goes_on_from_its_cache(engine):
    first = engine.generate([PROMPTS[0]], max_tokens=6, ignore_eos=True)
    said = PROMPTS[0] + first.run()[0].new_ids
    asked = [*said, 100, 101, 102]
    second = engine.generate([asked], max_tokens=4, ignore_eos=True, held=first.held)
    assert second.run()[0].new_ids == new_ids(engine, [asked], max_tokens=4)[0]
    # All but the last id of the first answer is there, and the last of the question is not yet due.
    assert second.prefill.tokens == len(asked) - len(said)
    # A cache grows where it has to.
    long = [*asked, *range(120)]
    third = engine.generate([long], max_tokens=60, ignore_eos=True, held=second.held)
    assert third.run()[0].new_ids == new_ids(engine, [long], max_tokens=60)[0]
    assert third.prefill.tokens == 119


@pytest.mark.parametrize("asked", [[5, 6, 7, 99, 98], [1, 2], PROMPTS[0]])
def test_a_cache_serves_the_ids_that_both_texts_begin_with(engine, asked):
    first = engine.generate([PROMPTS[0]], max_tokens=6, ignore_eos=True)
    first.run()
    second = engine.generate([asked], max_tokens=5, ignore_eos=True, held=first.held)
    assert second.run()[0].new_ids == new_ids(engine, [asked], max_tokens=5)[0]


LEARNED = CFG.__class__(
    **{**vars(CFG), "arch": Arch(rope=Rope(0), embeddings=Embeddings(positions=12))}
)


@pytest.mark.parametrize(
    ("prompts", "most", "message"),
    [
        ([], 5, "no prompts"),
        ([[1], []], 5, "the prompt has no tokens"),
        ([[384]], 5, "id 384 must be 0 to 383"),
        ([[-1]], 5, "id -1 must be 0 to 383"),
        ([[1]], 0, "max_tokens=0 must be at least 1"),
        ([[1] * 10], 3, "of 10 tokens and max_tokens=3 .* 12 positions .*: max_tokens=2 at most"),
        ([[1] * 12], 1, "12 positions .*: shorten the prompt"),
    ],
)
def test_an_impossible_prompt_says_what_is_wrong(prompts, most, message):
    with pytest.raises(ValueError, match=message):
        engine_of(LEARNED).generate(prompts, max_tokens=most)


def test_an_empty_stop_string_is_refused(engine):
    with pytest.raises(ValueError, match="empty stop string"):
        engine.generate([[1]], max_tokens=1, stop=[""])


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (Arch(head=Head("pooler")), "has a head for 'pooler'"),
        (Arch(attention=Attention(causal=False)), "reads text in both directions"),
    ],
)
def test_an_encoder_does_not_generate(arch, message):
    with pytest.raises(ValueError, match=message):
        engine_of(CFG.__class__(**{**vars(CFG), "arch": arch}))
