"""What a trace is summed up to."""

import pytest

from costs import trace


def test_communication_counts_where_nothing_hides_it():
    events = [
        ("nvjet_sm90_tst_256x128", 0, 100),
        ("ncclDevKernel_AllGather_RING_LL", 50, 130),  # 50 beside the matmul, 30 alone
        ("loop_multiply_fusion_3", 150, 170),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 170, 200),
        ("memcpy128", 195, 205),
    ]
    found = trace.summed([(name, a * 1e6, b * 1e6) for name, a, b in events], runs=1)
    assert found.kinds == pytest.approx(
        {"matmul": 0.1, "communication": 0.03, "attention": 0.03, "memory-bound": 0.02,
         "copy": 0.01}
    )  # fmt: skip
    assert found.hidden == pytest.approx(0.05)
    assert found.idle == pytest.approx(0.02)  # between 130 and 150
    assert found.span == pytest.approx(0.205)
    assert found.kernels[0] == ("nvjet_sm90_tst_256x128", pytest.approx(0.1), 1)


def test_figures_are_of_one_run():
    events = [("gemm", 0, 10e6), ("gemm", 20e6, 30e6)]
    found = trace.summed(events, runs=2)
    assert found.kinds == {"matmul": pytest.approx(0.01)}
    assert (found.span, found.kernels[0][2]) == (pytest.approx(0.015), 1)


@pytest.mark.parametrize(
    ("spans", "covered"), [([], 0), ([(0, 2), (1, 3)], 3), ([(5, 6), (0, 2), (0, 9)], 9)]
)
def test_what_spans_cover(spans, covered):
    assert trace.length(spans) == covered
