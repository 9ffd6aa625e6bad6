"""The analytic cost of an update, and that every case runs."""

import dataclasses

import pytest

import iql_bst
import morse
import td3_bc
import td3_bst
from benchmarks import end_to_end, throughput
from common import datasets


def test_operations_of_a_network_by_hand():
    # 2 B (m n) summed over the layers 3-5-2; inputs' gradient without the first layer.
    assert throughput.net(7, 3, 5, 2) == (350, 350, 140)


@pytest.mark.parametrize(
    ("method", "config", "mflop"),
    [  # the hopper's shape; counted operation by operation in a study of peers
        ("TD3+BC", td3_bc.Config(hidden_dims=(256, 256)), 403.8),
        (
            "TD3-BST",
            td3_bst.Config(hidden_dims=(256, 256), supervisor_gradient=True),
            403.8 + 69.3,
        ),
        (  # the Morse network's forward pass alone, every second update
            "TD3-BST",
            td3_bst.Config(hidden_dims=(256, 256), supervisor_gradient=False),
            403.8 + 256 * (14 * 256 + 2 * 256 * 256 + 256 * 3) / 1e6,
        ),
        ("IQL", dataclasses.replace(iql_bst.Config(), policy_step="awr"), 524.3),
        ("Morse", morse.Config(), 412.4),
    ],
)
def test_an_updates_cost(method, config, mflop):
    found = throughput.flops(method, 11, 3, config) / 1e6
    assert found == pytest.approx(mflop, rel=0.005)


def test_a_share_of_the_peak_is_taken_round_by_round():
    case = throughput.Case("a", lambda: None, 2e6, 1.5, [9, 2, 2, 4], [9, 1, 2, 4])
    product = throughput.Case("b", lambda: None, 4e9, 0, [9, 1, 1, 1], [9, 1, 2, 4])
    row = throughput.row_of(case, product, 100, on_cpu=True)
    assert row["updates_per_second"] == 50  # 100 updates in 2, 2 and 4 seconds
    assert row["updates_per_core_second"] == 50  # in 1, 2 and 4 core-seconds
    assert row["spread"] == 1.5  # 100 to 25, over 50
    # 2e6 * 100 / x over 4e9 / x in each round, slow or not
    assert row["of_peak"] == pytest.approx(0.05)
    assert throughput.row_of(case, product, 100, on_cpu=False)["of_peak"] == 0.025


def test_cases_are_measured():
    options = throughput.Options(
        methods=("TD3+BC", "IQL-BST", "Morse"),
        shapes=("hopper",),
        num_updates=4,
        rounds=1,
        num_transitions=300,
    )
    rows = throughput.measure(1, options)
    names = ["TD3+BC hopper", "IQL-BST hopper", "Morse hopper"]
    assert [row["case"] for row in rows] == names
    assert all(row["of_peak"] > 0 and row["compile_seconds"] > 0 for row in rows)
    assert "TD3+BC hopper | 1 |" in throughput.table(rows)


PROGRAM = """
%fused (a: f32[2]) -> f32[2] {
  ROOT %b = f32[2]{0} add(%a, %a)
}

%command_buffer (p: f32[2]) -> (f32[2], f32[2]) {
  %p = f32[2]{0} parameter(0)
  %fusion.1 = f32[2]{0} fusion(%p), kind=kLoop, calls=%fused
  %gemm = (f32[2]{0}, s8[8]{0}) custom-call(%p), custom_call_target="__cublas$gemm"
  ROOT %t = (f32[2]{0}, f32[2]{0}) tuple(%fusion.1, %fusion.1)
}

%short_body (q: f32[2]) -> f32[2] {
  ROOT %copy = f32[2]{0} copy(%q)
}

%body (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  %call = (f32[2]{0}, f32[2]{0}) call(%q), to_apply=%command_buffer
  %r = f32[2]{0} get-tuple-element(%call), index=0
  ROOT %fusion.2 = f32[2]{0} fusion(%r), kind=kInput, calls=%fused
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %first = f32[2]{0} while(%x), condition=%c, body=%short_body
  ROOT %loop = f32[2]{0} while(%first), condition=%condition, body=%body
}
"""


def test_kernels_of_the_longest_loop_are_counted():
    # In the command buffer a fusion and a product, then a fusion; no tuples.
    assert throughput.kernels(PROGRAM) == 3


@pytest.mark.parametrize(
    "wrong", [{"cores": -1}, {"shapes": ("walker",)}, {"num_updates": 3}, {"rounds": 0}]
)
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        throughput.Options(**wrong)


def test_a_runs_time_is_accounted_for(tmp_path):
    options = end_to_end.Options(script="td3_bc", num_updates=4, num_morse_updates=0)
    end_to_end.write_dataset(tmp_path / "own.npz", 3000)
    data = datasets.load(str(tmp_path / "own.npz"))
    assert (data.num_transitions, data.episode_lengths.tolist()) == (3000, [1000] * 3)
    row = end_to_end.run(options, ["--dataset", str(tmp_path / "own.npz")], 1, tmp_path)
    assert sum(row["stages"].values()) == pytest.approx(row["total"])
    assert row["stages"]["training"] > 0
    assert row["stages"]["import, end"] > 0
    assert row["us_per_update"] == 1e6 * row["stages"]["training"] / 4
    table = end_to_end.table([dict(dataset="random") | row])
    assert "| random | 3,000 | 1 |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_run_that_fails_is_told(tmp_path):
    options = end_to_end.Options(num_updates=4)
    with pytest.raises(SystemExit, match="There is no file"):
        end_to_end.run(options, ["--dataset", str(tmp_path / "no.npz")], 1, tmp_path)
