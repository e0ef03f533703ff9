"""Classification: the class of the largest logit, however texts are batched."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from evals.classify import Classify
from evals.task import Settings
from model.config import Arch, Attention, Embeddings, Head, Rope
from tests.evals.tiny import CFG, full_forward, open_scorer, tiny_scorer

ENCODER = dataclasses.replace(
    CFG,
    arch=Arch(
        attention=Attention(causal=False),
        rope=Rope(theta=0),
        embeddings=Embeddings(positions=40, types=2, norm=True),
        head=Head("classifier", labels=3),
    ),
)
TEXTS = [("good", None), ("a bad film, all in all", None), ("one", "and two"), ("x" * 39, None)]


@pytest.fixture(scope="module")
def scorer():
    return tiny_scorer(ENCODER, batch=2)


def written(folder, *rows):
    path = folder / "texts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def score(scorer, path, **settings):
    task = Classify("it", path, Settings(**settings))
    task.prepare(scorer)
    return task.run(scorer)


def classes(scorer):
    """The class of each of TEXTS, alone and without padding."""
    found = []
    with jax.set_mesh(scorer.model.mesh):
        for text, other in TEXTS:
            ids, types = scorer.tokenizer.pair(text, other or "")
            rows = (ids, range(len(ids)), [1] * len(ids), types)
            placed = (scorer.model.place(np.array([row], np.int32)) for row in rows)
            logits = full_forward(scorer.model.graph)(scorer.params, *placed)
            found.append(int(logits[0].argmax()))
    return found


def test_accuracy_is_of_the_largest_logit_of_each_text_alone(scorer, tmp_path):
    right = classes(scorer)
    rows = [
        {"text": text, "label": label} | ({"text_pair": other} if other else {})
        for (text, other), label in zip(TEXTS, right, strict=True)
    ]
    assert score(scorer, written(tmp_path, *rows)).figures["accuracy"].value == 1
    rows[1]["label"] = (rows[1]["label"] + 1) % 3
    result = score(scorer, written(tmp_path, *rows))
    assert result.figures["accuracy"].value == 0.75
    assert result.counts["texts"] == 4
    assert not result.notes


def test_a_long_text_loses_its_end_and_that_is_told(scorer, tmp_path):
    path = written(tmp_path, {"text": "a" * 50, "label": 0}, {"text": "b", "label": 0})
    assert score(scorer, path).notes == ("1 of 2 texts lost their end",)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a"}, "no field 'label'"),
        ({"text": "a", "label": "good"}, "'label' is a text, it must be the number of a class"),
        ({"text": "a", "label": -1}, "'label' is -1"),
        ({"text": "a", "label": 3}, "'label' is 3, and the model has classes 0 to 2"),
        ({"text": 1, "label": 0}, "'text' is a number"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(scorer, tmp_path, row, message):
    with pytest.raises(ValueError, match=r"texts.jsonl:2: ") as error:
        score(scorer, written(tmp_path, {"text": "a", "label": 0}, row))
    assert message in str(error.value)


def test_a_model_without_a_classifier_is_told(tmp_path):
    with pytest.raises(ValueError, match="needs a model with a classifier, not 'language' head"):
        score(tiny_scorer(), written(tmp_path, {"text": "a", "label": 0}))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_classes_are_those_of_transformers(tmp_path):
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
            num_labels=4,
            initializer_range=1.0,
        )
    ).eval()
    for made in (tokenizer, model):
        made.save_pretrained(tmp_path)
    draw, rows = np.random.default_rng(0), []
    for i in range(24):
        texts = [" ".join(draw.choice(list("abcdefghij"), draw.integers(1, 15))) for _ in "ab"]
        one = tokenizer(texts[0], *texts[1 : 1 + i % 2], return_tensors="pt")
        with torch.no_grad():
            label = int(model(**one).logits.argmax())
        row = {"text": texts[0], "label": label}
        rows.append(row | ({"text_pair": texts[1]} if i % 2 else {}))
    assert len({row["label"] for row in rows}) > 1
    scorer = open_scorer(tmp_path, batch=4)
    assert score(scorer, written(tmp_path, *rows)).figures["accuracy"].value == 1
