"""Choice: borders, likelihoods and accuracies, each against its definition."""

import json

import numpy as np
import pytest

from evals.choice import Choice, pair
from evals.task import Settings
from tests.evals.tiny import CFG, log_softmax, tiny_scorer
from text.tokenizer import train_bpe

ROWS = [
    {"question": "What is it?", "choices": ["a dog", "a very large cat", "no"], "answer": 1},
    {"context": "Roses are ", "choices": ["red", "violet", "äöü", "red"], "answer": "C"},
    {"context": "", "choices": ["yes", "no"], "answer": "A"},
    {"context": "Say A, B, C or D:", "choices": ["A", "B", "C", "D"], "answer": 0},
]


@pytest.fixture(scope="module")
def scorer():
    return tiny_scorer(batch=4)


def questions(folder, *rows):
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def score(scorer, path, **settings):
    task = Choice("it", path, Settings(**settings))
    task.prepare(scorer)
    return task.run(scorer)


def likelihoods(scorer, row):
    """Nats of each choice of a row after its context, of bytes, which have one border only."""
    context = row.get("context", row.get("question"))
    before = list(context.rstrip().encode()) or [256]
    spaces = context[len(context.rstrip()) :]
    found = []
    for choice in row["choices"]:
        ids = [*before, *f"{spaces} {choice}".encode()]
        logprobs = log_softmax(scorer, ids)[np.arange(len(before) - 1, len(ids) - 1)]
        found.append(logprobs[np.arange(len(ids) - len(before)), ids[len(before) :]].sum())
    return np.array(found)


def test_accuracies_are_those_of_the_definitions(scorer, tmp_path):
    result = score(scorer, questions(tmp_path, *ROWS))
    answers = [1, 2, 0, 0]
    right = {"accuracy": [], "accuracy_per_character": [], "accuracy_per_byte": []}
    for row, answer in zip(ROWS, answers, strict=True):
        nats = likelihoods(scorer, row)
        characters = [len(choice) for choice in row["choices"]]
        sizes = [len(choice.encode()) for choice in row["choices"]]
        right["accuracy"].append(nats.argmax() == answer)
        right["accuracy_per_character"].append((nats / characters).argmax() == answer)
        right["accuracy_per_byte"].append((nats / sizes).argmax() == answer)
    for name, each in right.items():
        figure = result.figures[name]
        assert figure.value == np.mean(each)
        p = np.mean(each)
        assert figure.stderr == pytest.approx(np.sqrt(p * (1 - p) / 3))
    assert result.counts["questions"] == 4
    assert result.counts["choices"] == 13
    assert not result.notes


def test_the_likeliest_choice_is_the_answer_whichever_it_is(scorer, tmp_path):
    """Labels made from the likelihoods are found again, and others never."""
    rows = [{**row, "answer": int(likelihoods(scorer, row).argmax())} for row in ROWS]
    assert score(scorer, questions(tmp_path, *rows)).figures["accuracy"].value == 1
    wrong = [{**row, "answer": (row["answer"] + 1) % len(row["choices"])} for row in rows]
    assert score(scorer, questions(tmp_path, *wrong)).figures["accuracy"].value == 0


def test_a_letter_and_an_index_say_the_same(scorer, tmp_path):
    by_index = score(scorer, questions(tmp_path, {**ROWS[0], "answer": 2}))
    by_letter = score(scorer, questions(tmp_path, {**ROWS[0], "answer": "C"}))
    assert by_index.figures == by_letter.figures


@pytest.fixture(scope="module")
def words():
    """A scorer whose tokenizer has words with the space before them."""
    tokenizer = train_bpe(["the cat sat on the mat; the hat sat"] * 50, 300)
    return tiny_scorer(tokenizer=tokenizer)


def tail(scorer, context, continuation):
    row, _ = pair(scorer, context, continuation, 2048)
    return scorer.tokenizer.decode(row.ids), scorer.tokenizer.decode(row.ids[-row.scored :])


def test_the_choice_is_what_the_whole_has_beyond_the_context(words):
    assert tail(words, "on the", " mat") == ("on the mat", " mat")
    assert tail(words, "on the ", "mat") == ("on the mat", " mat")
    assert tail(words, "on the  ", " mat")[1].endswith("mat")
    assert tail(words, "on the\n", " mat")[1] == "\n mat"


def test_a_token_across_the_border_is_scored_as_lm_eval_scores_it(words):
    """The whole is cut where the context alone would end, in tokens, whatever it merges into."""
    before, whole = words.document("on th"), words.document("on the mat; the hat")
    assert whole[: len(before)] != before
    row, _ = pair(words, "on th", "e mat; the hat", 2048)
    assert list(row.ids) == whole
    assert row.scored == len(whole) - len(before)


def test_a_choice_that_merges_into_its_context_whole_is_told(words, tmp_path):
    with pytest.raises(ValueError, match=r"questions.jsonl:1: 'e' adds no token to its context"):
        score(
            words,
            questions(tmp_path, {"context": "th", "choices": ["e", "x"], "answer": 0}),
            delimiter="",
        )


def test_without_a_context_a_choice_follows_the_end(words):
    row, whole = pair(words, "", " mat", 2048)
    assert row.ids[0] == words.tokenizer.end
    assert words.tokenizer.decode(row.ids[1:]) == " mat"
    assert (row.scored, whole) == (len(row.ids) - 1, True)


def test_a_long_context_loses_its_beginning_and_that_is_told(scorer, tmp_path):
    long = {"context": "a" * 90, "choices": ["bb", "c"], "answer": 0}
    result = score(scorer, questions(tmp_path, long, ROWS[3]), seq=40)
    assert result.notes == ("2 of 6 rows lost the beginning of their context",)
    row, whole = pair(scorer, "a" * 90, " bb", 40)
    assert (len(row.ids), row.scored, whole) == (41, 3, False)
    row, _ = pair(scorer, "ab", "c" * 90, 40)
    assert (len(row.ids), row.scored) == (41, 40)


def test_the_delimiter_stands_between_question_and_choice(scorer, tmp_path):
    path = questions(tmp_path, ROWS[0])
    before = score(scorer, path, delimiter="\nAnswer: ")
    written = {**ROWS[0], "choices": [f"\nAnswer: {choice}" for choice in ROWS[0]["choices"]]}
    after = score(scorer, questions(tmp_path, written), delimiter="")
    assert before.counts == after.counts
    assert before.figures["accuracy"] == after.figures["accuracy"]
    assert before.hash != after.hash


GOOD = {"question": "Q", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    "row, message",
    [
        ({**GOOD, "answer": 2}, "'answer' is 2, it must be an index from 0 to 1, or a letter"),
        ({**GOOD, "answer": -1}, "'answer' is -1"),
        ({**GOOD, "answer": "E"}, "'answer' is 'E'"),
        ({**GOOD, "answer": "b"}, "'answer' is 'b'"),
        ({**GOOD, "answer": True}, "'answer' is true or false"),
        ({**GOOD, "answer": 1.5}, "'answer' is a number"),
        ({**GOOD, "answer": None}, "'answer' is null"),
        ({**GOOD, "choices": ["a"]}, "'choices' has 1 texts, at least 2 are needed"),
        ({**GOOD, "choices": "ab"}, "'choices' must be a list of texts, this is a text"),
        ({**GOOD, "choices": ["a", 2]}, "'choices' must be a list of texts"),
        ({**GOOD, "choices": ["a", ""]}, "choice 1 is empty"),
        ({"choices": ["a", "b"], "answer": 0}, "no field 'context' or 'question', but 'choices'"),
        ({"question": 3, **{k: GOOD[k] for k in ("choices", "answer")}}, "'question' is a number"),
        ({"question": "Q", "choices": ["a", "b"]}, "no field 'answer'"),
        ([1, 2], "a JSON object is wanted, this is a list"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"questions.jsonl:2: ") as error:
        Choice("it", questions(tmp_path, GOOD, row), Settings())
    assert message in str(error.value)


def test_a_wrong_file_is_told(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('\n{"question": 1\n')
    with pytest.raises(ValueError, match=r"questions.jsonl:2: this is no JSON"):
        Choice("it", str(path), Settings())
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="has no row"):
        Choice("it", str(path), Settings())
    with pytest.raises(FileNotFoundError):
        Choice("it", str(tmp_path / "absent.jsonl"), Settings())
    (tmp_path / "damaged.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        Choice("it", str(tmp_path / "damaged.jsonl.gz"), Settings())


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path, scorer):
    path = questions(tmp_path, GOOD, GOOD, {"broken": 1})
    assert score(scorer, path, limit=2).counts["questions"] == 2


def test_choices_that_share_a_context_cost_one_row(tmp_path):
    told = []
    scorer = tiny_scorer(CFG, batch=1, each=lambda done, rows: told.append((done, rows)))
    score(scorer, questions(tmp_path, ROWS[3]), delimiter="")
    assert told == [(0, 4)]
