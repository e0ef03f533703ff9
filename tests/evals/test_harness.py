"""lm-evaluation-harness takes our model for one of its own, and gets from it what it gets from
transformers: the same log-likelihoods, answers and figures.
"""

import json
import random

import pytest

from evals.choice import Choice
from evals.perplexity import Perplexity
from evals.task import Settings
from tests.evals.tiny import open_scorer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SEQ, CLOSE = 48, 1e-3  # nats, of sums over a row

WORDS = "red green blue house tree river stone cat dög bird".split()  # noqa: SIM905
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metric_list: [{metrics}]
"""


@pytest.fixture(scope="module", autouse=True)
def needed():
    for name in ("accelerate", "lm_eval"):
        pytest.importorskip(name)


def some_words(draw, least, most):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The paths of a local task of each kind, by kind, and of their data."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    data = folder / "data.jsonl"
    with data.open("w") as file:
        for _ in range(20):
            choices = [some_words(draw, 1, 4) for _ in range(4)]
            row = {"question": some_words(draw, 3, 30), "choices": choices}
            row |= {"answer": draw.randrange(4), "text": some_words(draw, 30, 90)}
            file.write(json.dumps(row) + "\n")
    metrics = {
        "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
        "loglikelihood_rolling": ("word_perplexity", "bits_per_byte"),
        "generate_until": ("exact_match",),
    }
    found = {"data": str(data)}
    for kind, names in metrics.items():
        choice, rolling = kind == "multiple_choice", kind == "loglikelihood_rolling"
        more = 'doc_to_choice: "{{choices}}"' if choice else ""
        if kind == "generate_until":
            more = 'generation_kwargs: {until: ["house"], max_gen_toks: 12}'
        spelled = YAML.format(
            name=f"tiny_{kind}",
            data=data,
            kind=kind,
            text="" if rolling else "{{question}}",
            target="{{answer}}" if choice else "{{text}}",
            more=more,
            metrics=", ".join(f"{{metric: {name}}}" for name in names),
        )
        path = folder / f"{kind}.yaml"
        path.write_text(spelled)
        found[kind] = str(path)
    return found


@pytest.fixture(scope="module", params=["no bos", "bos"])
def pretrained(request, tmp_path_factory):
    """A Hugging Face directory: a tiny random Llama, whose tokenizer adds a first token or not."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("pretrained")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    draw = random.Random(1)
    made.train_from_iterator([some_words(draw, 50, 90) for _ in range(50)], trainer)
    if request.param == "bos":
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(pretrained):
    return open_scorer(pretrained, batch=4)


@pytest.fixture(scope="module")
def theirs(pretrained):
    from lm_eval.models.huggingface import HFLM

    # Its cache mixes up continuations of one and of two tokens after the same inputs (0.4.13).
    how = {"max_length": SEQ, "batch_size": 3, "logits_cache": False}
    return HFLM(pretrained, dtype="float32", device="cpu", **how)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import datasets

    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"), raising=True
    )


def requests(kind, *args):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arg, i) for i, arg in enumerate(args)]


def pairs():
    """Contexts and continuations: empty, with spaces on either side, longer than the window."""
    draw = random.Random(2)
    found = [(some_words(draw, 1, 40), f" {some_words(draw, 1, 5)}") for _ in range(12)]
    return [
        *found,
        ("", "red green"),
        ("<s>", " red"),
        ("<s>red", " green"),
        ("red green ", "blue"),
        ("red green  ", " blue"),
        ("red\n", "\n blue"),
        ("dög", "dög"),
    ]


def test_loglikelihoods_are_those_of_transformers(scorer, theirs):
    from evals.harness import Harness

    ours = Harness(scorer, Settings(seq=SEQ)).loglikelihood(requests("loglikelihood", *pairs()))
    wanted = theirs.loglikelihood(requests("loglikelihood", *pairs()))
    for pair, (nats, greedy), (right, is_greedy) in zip(pairs(), ours, wanted, strict=True):
        assert nats == pytest.approx(right, abs=CLOSE), pair
        assert greedy == is_greedy, pair


def test_rolling_loglikelihoods_are_those_of_transformers(scorer, theirs):
    from evals.harness import Harness

    draw = random.Random(3)
    texts = [(some_words(draw, n, n),) for n in (1, 10, 40, 90, 200)]
    ours = Harness(scorer, Settings(seq=SEQ)).loglikelihood_rolling(requests("rolling", *texts))
    wanted = theirs.loglikelihood_rolling(requests("rolling", *texts))
    assert ours == pytest.approx(wanted, abs=CLOSE)


def test_greedy_answers_are_those_of_transformers(scorer, theirs):
    from evals.harness import Harness

    draw = random.Random(4)
    asked = {"until": ["house", "stone"], "max_gen_toks": 12, "do_sample": False}
    args = [(some_words(draw, 2, 60), asked) for _ in range(10)]
    ours = Harness(scorer, Settings(seq=SEQ)).generate_until(requests("generate_until", *args))
    assert ours == theirs.generate_until(requests("generate_until", *args))
    assert len(set(ours)) > 3


@pytest.mark.parametrize("kind", ["multiple_choice", "loglikelihood_rolling", "generate_until"])
def test_the_evaluator_finds_the_same_figures(scorer, theirs, tasks, kind):
    import lm_eval

    from evals.harness_task import HarnessTask, manager

    task = HarnessTask(f"lm_eval:{kind}", tasks[kind], Settings(seq=SEQ))
    task.prepare(scorer)
    found = task.run(scorer)
    wanted = lm_eval.simple_evaluate(
        model=theirs, tasks=[tasks[kind]], task_manager=manager(), log_samples=False
    )
    (row,) = wanted["results"].values()
    assert found.figures
    for name, figure in found.figures.items():
        assert figure.value == pytest.approx(row[f"{name},none"], rel=1e-4)
        error = row[f"{name}_stderr,none"]
        assert figure.stderr == (pytest.approx(error) if isinstance(error, float) else None)
    assert found.counts == {f"tiny_{kind}": 20}


def test_choice_finds_what_the_harness_finds(scorer, tasks):
    from evals.harness_task import HarnessTask

    results = []
    for made in (
        Choice("choice", tasks["data"], Settings(seq=SEQ)),
        HarnessTask("lm_eval", tasks["multiple_choice"], Settings(seq=SEQ)),
    ):
        made.prepare(scorer)
        results.append(made.run(scorer).figures)
    ours, theirs = results
    names = {"accuracy": "acc", "accuracy_per_character": "acc_norm"}
    for name, of_theirs in (names | {"accuracy_per_byte": "acc_bytes"}).items():
        assert ours[name].value == theirs[of_theirs].value
        assert ours[name].stderr == pytest.approx(theirs[of_theirs].stderr)


def test_perplexity_is_that_of_the_guide(scorer, theirs, tmp_path):
    import torch

    text = some_words(random.Random(5), 150, 150)
    (tmp_path / "a.txt").write_text(text)
    ids = theirs.tokenizer(text, return_tensors="pt").input_ids
    for seq, stride in ((32, 16), (32, 32), (40, 7)):
        nats = tokens = before = 0
        for start in range(0, ids.shape[1], stride):
            stop = min(start + seq, ids.shape[1])
            labels = ids[:, start:stop].clone()
            labels[:, : -(stop - before)] = -100
            with torch.no_grad():
                loss = theirs.model(ids[:, start:stop], labels=labels).loss
            count = int((labels[:, 1:] != -100).sum())
            nats, tokens, before = nats + float(loss) * count, tokens + count, stop
            if stop == ids.shape[1]:
                break
        task = Perplexity("it", str(tmp_path / "a.txt"), Settings(seq=seq, stride=stride))
        task.prepare(scorer)
        found = task.run(scorer)
        assert found.counts["tokens"] == tokens
        assert found.figures["nats_per_token"].value == pytest.approx(nats / tokens, rel=1e-5)


def test_a_task_that_does_not_exist_is_told():
    from evals.harness_task import HarnessTask

    with pytest.raises(ValueError, match="no task 'arc_eazy'; did you mean arc_easy"):
        HarnessTask("lm_eval:arc_eazy", "arc_eazy", Settings())


def test_a_task_file_that_is_wrong_is_told(tmp_path):
    from evals.harness_task import HarnessTask

    (tmp_path / "a.yaml").write_text("task: x\ndataset_path: json\nnonsense: [\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        HarnessTask("lm_eval:a", str(tmp_path / "a.yaml"), Settings())
