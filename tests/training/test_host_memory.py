"""A run of which a part lies in host memory: another place of the same state."""

import shutil

import pytest

from tests.tolerance import SAME

HOST = "--config.layout.host=optimizer,embedding,input,up"


@pytest.mark.slow
def test_a_save_goes_on_in_host_memory_as_on_the_device_and_back(finished, command_line, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.workdir, run)
    shutil.rmtree(run / "checkpoints" / "12")
    there = command_line(HOST, "--config.checkpoint.every=5", workdir=run)
    assert there.code == 0, there.err
    assert "restored   step 8" in there.out
    for ours, right in zip(there.rows().values(), finished.rows().values(), strict=True):
        assert ours["loss"] == pytest.approx(right["loss"], rel=SAME)
    shutil.rmtree(run / "checkpoints" / "12")
    back = command_line("--config.layout.host=", workdir=run)
    assert back.code == 0, back.err
    assert "restored   step 10" in back.out
    last, right = back.rows("eval_loss")[12], finished.rows("eval_loss")[12]
    assert last["eval_loss"] == pytest.approx(right["eval_loss"], rel=SAME)
