"""SmolLM2-135M-Instruct through generate.py: the published greedy tokens, and its speed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import ROOT
from tests import assets

pytestmark = pytest.mark.assets

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "smollm2_135m_instruct_q4_1.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
READ, MATMUL = 0.6, 0.5  # shares of the machine's rates: 2 cores, with nothing else on them
TRANSFORMERS = 1.5  # times its decode rate
ROUNDS = 3

MACHINE = """
import json, time, jax, jax.numpy as jnp
def rate(work, f, *args):
    f(*args).block_until_ready()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        f(*args).block_until_ready()
        times.append(time.perf_counter() - start)
    return work / min(times)
weights, a = jnp.ones((134_515_008,)), jnp.ones((2048, 2048))
reads = rate(1, jax.jit(jnp.sum), weights)
print(json.dumps([reads, rate(2 * 2048**3, jax.jit(jnp.matmul), a, a)]))
"""


def run(*args):
    """The objects that a command prints, in a process with what a user's shell has."""
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, check=True, capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def generate(*args):
    common = (f"--checkpoint={assets.smollm2()}", "--json", "--ignore_eos", "--dtype=float32")
    return run("generate.py", *common, *args)


def test_the_greedy_tokens_are_the_published_ones_alone_and_in_a_batch(tmp_path):
    prompts = [json.dumps({"prompt": case["prompt"]}) for case in CASES]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    batch = generate(f"--batch_file={tmp_path / 'prompts.jsonl'}", "--max_tokens=30")
    alone = [generate(f"--prompt={case['prompt']}", "--max_tokens=30")[0] for case in CASES]
    for found in (batch, alone):
        for case, row in zip(CASES, found, strict=True):
            assert row["prompt_ids"] == case["input_ids"]
            assert row["new_ids"] == case["greedy_ids"]
            assert row["finish_reason"] == "length"


@pytest.mark.slow
def test_it_decodes_and_reads_prompts_near_the_machines_rates():
    """In one round of three: whoever else is on the machine makes the others slower."""
    matmuls = 2 * (134_515_008 - 49_152 * 576)  # FLOPs of a token; the last one's head aside
    decode, prefill, before = [], [], run("-c", MACHINE)[0]
    for _ in range(ROUNDS):
        (found,) = generate("--prompt=word" + " word" * 512, "--max_tokens=64")
        after = run("-c", MACHINE)[0]
        reads, flops = map(min, zip(before, after, strict=True))
        assert len(found["prompt_ids"]) == 513
        decode.append(found["decode_tokens_per_s"] / reads)
        prefill.append(found["prefill_tokens_per_s"] * matmuls / flops)
        before = after
        if max(decode) >= READ and max(prefill) >= MATMUL:
            return
    pytest.fail(f"shares of the rate of reading {decode}, of matmuls {prefill}")


@pytest.mark.slow
@pytest.mark.parity
def test_it_decodes_faster_than_transformers():
    """In one round of three, as above."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    path = assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ids = torch.tensor([CASES[0]["input_ids"]])

    def theirs(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=2
        )
        return tokens / (time.perf_counter() - start)

    theirs(8)
    both = []
    for _ in range(ROUNDS):
        (found,) = generate(f"--prompt={CASES[0]['prompt']}", "--max_tokens=64")
        both.append((found["decode_tokens_per_s"], theirs(64)))
        ours, best = (max(rates) for rates in zip(*both, strict=True))
        if ours >= TRANSFORMERS * best:
            return
    pytest.fail(f"ours and theirs: {both}")
