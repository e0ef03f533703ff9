"""Generation: greedy answers are the model's, matches and pass@k are those of their definitions."""

import itertools
import json

import numpy as np
import pytest

from evals import generation
from evals.generation import Generation, normalized, pass_at
from evals.scorer import Scorer
from evals.task import Settings
from evals.writer import Answer, Prompt, Writer, batches, space_between
from inference.sampling import Sampling
from tests.evals.tiny import CFG, log_softmax, tiny_scorer
from text.tokenizer import Bytes

PROBLEM = {
    "task_id": "Add/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "canonical_solution": "    return a + b\n",
}
ALLOWED = {"allow_code_execution": True, "memory": 512}


@pytest.fixture(scope="module")
def scorer():
    return tiny_scorer(batch=2)


def written(folder, *rows):
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def score(scorer, path, **settings):
    task = Generation("it", path, Settings(**settings))
    task.prepare(scorer)
    return task.run(scorer)


@pytest.fixture
def says(monkeypatch):
    """`says(texts)`: whatever the prompts, these are the answers, in turn."""

    def set_(*texts):
        def write(self, prompts):
            turn = itertools.cycle(texts)
            return [Answer(next(turn), "", 3, False) for _ in prompts]

        monkeypatch.setattr(Writer, "write", write)

    return set_


def greedy(scorer, prompt, count):
    """By the full forward, one id after the other; ids of no byte are never drawn."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(log_softmax(scorer, ids)[-1][: Bytes.size].argmax()))
    return ids[len(prompt) :]


def test_answers_are_what_the_full_forward_says_step_by_step(scorer):
    texts = ["A prompt", "Another, longer one", "x"]
    prompts = [Prompt(scorer.document(text), 6) for text in texts]
    for text, answer in zip(texts, Writer(scorer).write(prompts), strict=True):
        ids = greedy(scorer, scorer.document(text), 6)
        ids = ids[: ids.index(256)] if 256 in ids else ids
        assert answer.text == Bytes().decode(ids)
        assert answer.cut == (answer.tokens == 6 and len(ids) == 6)


def test_right_answers_made_from_the_model_match_and_others_do_not(scorer, tmp_path):
    ids = greedy(scorer, b"Say:", 5)
    text = Bytes().decode(ids[: ids.index(256)] if 256 in ids else ids)
    right = {"prompt": "Say:", "answer": ["other", f" {text}\n"]}
    wrong = {"prompt": "Say:", "answer": text + "q"}
    result = score(scorer, written(tmp_path, right, wrong, wrong), max_tokens=5)
    assert result.figures["exact_match"].value == pytest.approx(1 / 3)
    assert result.figures["exact_match"].stderr == pytest.approx(1 / 3)
    assert result.counts["prompts"] == result.counts["samples"] == 3


def test_stop_texts_end_an_answer(scorer):
    prompt = scorer.document("A prompt")
    whole = Writer(scorer).write([Prompt(prompt, 6)])[0].text
    stop = whole[-2:]
    stopped = Writer(scorer).write([Prompt(prompt, 6, (stop,))])[0]
    assert (stopped.text, stopped.cut) == (whole[: whole.find(stop)], False)


def test_draws_depend_on_the_seed_and_not_on_the_batch(scorer):
    ids = [list(b"abcdef"[: 2 + i % 4]) for i in range(4)]

    def drawn(writer, seed):
        prompts = [Prompt(one, 6, (), Sampling(1.0, seed=seed)) for one in ids]
        return [answer.text for answer in writer.write(prompts)]

    alone, together = Writer(tiny_scorer(batch=1)), Writer(scorer)
    found = drawn(alone, 0)
    assert found == drawn(together, 0) != drawn(together, 1)
    assert len(set(found)) > 2


def test_prompts_that_end_alike_go_together_longest_first():
    prompts = [Prompt([0] * n, most, stop) for n, most, stop in
               [(3, 8, ()), (9, 8, ()), (4, 8, ("a",)), (5, 8, ()), (1, 9, ())]]  # fmt: skip
    assert batches(prompts, 2) == [[1, 3], [0], [2], [4]]


def test_new_parameters_write_other_answers(scorer):
    writer, prompt = Writer(scorer), Prompt(list(b"A prompt"), 6)
    before, kept = writer.write([prompt]), scorer.params
    scorer.params = tiny_scorer(CFG).params
    assert writer.write([prompt]) == before
    scorer.params = {**kept, "norm": {"scale": -kept["norm"]["scale"]}}
    assert writer.write([prompt]) != before
    scorer.params = kept


@pytest.mark.parametrize(
    "text, right",
    [
        ("The  Cat.", "cat"),
        ("an apple, a day", "apple day"),
        ("  42 ", "42"),
        ("theory", "theory"),
        ("", ""),
    ],
)
def test_normalized_leaves_case_punctuation_articles_and_spaces_out(text, right):
    assert normalized(text) == right


@pytest.mark.parametrize("samples, passed", [(1, 0), (1, 1), (5, 2), (6, 6), (6, 5), (7, 0)])
def test_pass_at_k_is_the_share_of_all_ways_to_take_k(samples, passed):
    answers = [i < passed for i in range(samples)]
    for k in range(1, samples + 1):
        ways = [any(taken) for taken in itertools.combinations(answers, k)]
        assert pass_at(k, samples, passed) == pytest.approx(np.mean(ways))


def test_a_program_that_solves_the_problem_passes(scorer, tmp_path, says):
    says(PROBLEM["canonical_solution"])
    result = score(scorer, written(tmp_path, PROBLEM), **ALLOWED)
    assert result.figures["pass@1"].value == 1
    assert any("confined by" in note for note in result.notes)
    says("    return a - b\n")
    assert score(scorer, written(tmp_path, PROBLEM), **ALLOWED).figures["pass@1"].value == 0


def test_pass_at_k_is_of_the_samples_of_each_problem(scorer, tmp_path, says):
    says("    return a + b\n", "    return a\n", "    return b\n", "    return None\n")
    path = written(tmp_path, PROBLEM, PROBLEM)
    result = score(scorer, path, samples=10, temperature=1.0, **ALLOWED)
    of_first, of_second = 3, 2  # of 10 each, every fourth of 20 passes
    assert result.figures["pass@1"].value == pytest.approx((of_first + of_second) / 20)
    assert result.figures["pass@10"].value == 1
    assert "pass@100" not in result.figures
    assert result.counts["samples"] == 20


def test_a_test_without_an_entry_point_runs_as_it_is(scorer, tmp_path, says):
    says("x = 4\n")
    rows = [{"prompt": "# Set x to 4.\n", "test": f"assert x == {n}"} for n in (4, 5)]
    assert score(scorer, written(tmp_path, *rows), **ALLOWED).figures["pass@1"].value == 0.5


def test_programs_end_where_the_next_thing_begins(tmp_path, scorer):
    task = Generation("it", written(tmp_path, PROBLEM), Settings(**ALLOWED))
    task.prepare(scorer)
    assert task.prompts[0].stop == generation.AFTER_A_FUNCTION
    own = Generation("it", written(tmp_path, {**PROBLEM, "stop": ["END"]}), Settings(**ALLOWED))
    own.prepare(scorer)
    assert own.prompts[0].stop == ("END",)


def test_no_program_runs_unless_that_is_allowed(tmp_path):
    with pytest.raises(ValueError, match=r"runs programs that the model writes.*--allow_code"):
        Generation("it", written(tmp_path, PROBLEM), Settings())


GOOD = {"prompt": "P", "answer": "A"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"answer": "A"}, "no field 'prompt', but 'answer'"),
        ({"prompt": "P"}, "no field 'answer' or 'test', but 'prompt'"),
        ({"prompt": 1, "answer": "A"}, "'prompt' is a number, it must be a text"),
        ({"prompt": "", "answer": "A"}, "'prompt' is empty"),
        ({"prompt": "P", "answer": 4}, "'answer' is a number"),
        ({"prompt": "P", "answer": []}, "'answer' has 0 texts"),
        ({"prompt": "P", "answer": ["a", 1]}, "'answer' must be a list of texts"),
        ({"prompt": "P", "test": 1}, "'test' is a number"),
        ({"prompt": "P", "test": "", "entry_point": "f()"}, "'entry_point' is 'f()'"),
        ({**GOOD, "stop": "x"}, "'stop' must be a list of texts"),
        ({**GOOD, "stop": ["x", ""]}, "'stop' holds an empty text"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: ") as error:
        Generation("it", written(tmp_path, GOOD, row), Settings(**ALLOWED))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"samples": 2}, "samples=2 need a temperature"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"timeout": 0.0}, "timeout=0.0 must be above 0"),
        ({"memory": 10}, "memory=10 must be at least 64"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_rows_of_two_kinds_are_told(tmp_path):
    with pytest.raises(ValueError, match="mixes rows with 'test' and rows with 'answer'"):
        Generation("it", written(tmp_path, GOOD, PROBLEM), Settings(**ALLOWED))
    with pytest.raises(ValueError, match="programs to complete"):
        Generation("it", written(tmp_path, PROBLEM), Settings(chat=True, **ALLOWED))


def test_a_chat_needs_a_template(tmp_path, scorer):
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: .*no chat template"):
        score(scorer, written(tmp_path, GOOD), chat=True)


class Pieces(Bytes):
    """Bytes, of which decoding leaves out a space at the beginning."""

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


class Chatty(Bytes):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"


def test_a_chat_is_put_as_the_template_does(tmp_path):
    task = Generation("it", written(tmp_path, GOOD), Settings(chat=True))
    task.prepare(tiny_scorer(tokenizer=Chatty()))
    assert Bytes().decode(task.prompts[0].ids) == "<user>P<answer>"


def test_the_space_that_decoding_leaves_out_is_found():
    assert space_between(Pieces(), ord("a"), list(b" b")) == " "
    assert space_between(Pieces(), ord("a"), list(b"b")) == ""
    assert space_between(Bytes(), ord("a"), list(b" b")) == ""
    assert space_between(Pieces(), ord("a"), []) == ""


def test_a_prompt_that_the_model_has_no_room_for_is_told_with_its_line(tmp_path):
    from tests.evals.test_perplexity import LEARNED

    small: Scorer = tiny_scorer(LEARNED)
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: a prompt of 60 tokens"):
        score(small, written(tmp_path, GOOD, {"prompt": "a" * 60, "answer": ""}), max_tokens=4)
