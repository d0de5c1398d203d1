"""The speed benchmark: its counts, its oracle, and what a MemDLM step may cost."""

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.speed import experts
from benchmarks.speed import train as cli
from benchmarks.speed.expert_layer import PARTS, ExpertLayer, Shape, choose
from benchmarks.speed.flops import count_flops, grouped_mm_flops
from benchmarks.speed.measuring import median_ratio, peak_bytes, time_interleaved
from benchmarks.speed.naive import naive_memdlm_step
from benchmarks.speed.workload import Case, Workload
from memdlm.backbones import LLaDAConfig, LLaDAForMaskedLM, LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.diffusion import CleanBatch, ObjectiveConfig, corrupt, get_schedule
from memdlm.memory import MemoryConfig
from memdlm.memory.trajectories import TrajectoryRequest, build_trajectory
from memdlm.training.outer_step import OuterStep, lay_out_step

CPU, META = torch.device("cpu"), torch.device("meta")
LENGTH, MASK = 24, 63
SCALE = 0.1  # of the initial weights: large enough for a memory to matter


def tiny(family):
    torch.manual_seed(0)
    tokens = dict(vocab_size=64, mask_token_id=MASK, pad_token_id=62, eos_token_id=62)
    if family == "dense":
        sizes = dict(d_model=32, n_layers=4, n_heads=2, mlp_hidden_size=48)
        return LLaDAForMaskedLM(LLaDAConfig(**sizes, **tokens, init_std=SCALE))
    sizes = dict(hidden_size=32, expert_intermediate_size=16, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=2, num_experts=4, num_experts_per_tok=2)
    return LLaDAMoEForMaskedLM(LLaDAMoEConfig(**sizes, **tokens, initializer_range=SCALE))


def batch_of(rows):
    """Rows whose responses differ in length, so that packing has something to get wrong."""
    clean = torch.randint(0, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    starts = torch.arange(rows)[:, None] * 4 + 6
    maskable = torch.arange(LENGTH)[None, :] >= starts
    return CleanBatch(clean, maskable, torch.zeros_like(maskable))


def test_flops_of_grouped_products_count_every_row_once():
    assert grouped_mm_flops((10, 3), (4, 3, 5)) == 2 * 10 * 3 * 5
    assert grouped_mm_flops((3, 10), (10, 5)) == 2 * 3 * 10 * 5
    assert grouped_mm_flops((4, 3, 7), (7, 5)) == 2 * 3 * 7 * 5
    assert grouped_mm_flops((4, 3, 7), (4, 7, 5)) == 2 * 4 * 3 * 7 * 5


@pytest.mark.parametrize("trains_weight", [False, True])
def test_a_grouped_layer_counts_its_products_in_both_directions(trains_weight):
    inputs = torch.empty(48, 16, device=META, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(4, 8, 16, device=META, dtype=torch.bfloat16, requires_grad=trains_weight)
    ends = torch.empty(4, device=META, dtype=torch.int32)

    def run():
        outputs = torch.nn.functional.grouped_mm(inputs, weight.transpose(1, 2), offs=ends)
        outputs.backward(torch.empty_like(outputs))

    assert count_flops(run) == (3 if trains_weight else 2) * 2 * 48 * 16 * 8


@pytest.mark.parametrize("needs_grad", [False, True])
def test_attention_is_counted_in_both_directions(needs_grad):
    shape = (2, 4, 32, 8)  # batch, heads, tokens, width
    q, k, v = (
        torch.empty(shape, device=META, dtype=torch.bfloat16, requires_grad=needs_grad)
        for _ in range(3)
    )

    def run():
        outputs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        if needs_grad:
            outputs.backward(torch.empty_like(outputs))

    forward = 2 * (2 * 2 * 4 * 32 * 32 * 8)
    assert count_flops(run) == forward * (3 if needs_grad else 1)


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_a_whole_mdlm_step_counts_what_a_hand_computes(family):
    case = Case(family=family, tuning="full", length=256, response=0.25)
    workload = Workload.build(case, META, torch.bfloat16)
    supervised = int(workload.draw(has_memory=False).anchor.masked.sum())
    length, width, layers, vocabulary = 256, 256, 8, 16384

    def feed_forward(tokens):
        if family == "dense":
            return 2 * tokens * 3 * width * 768
        return 2 * tokens * (width * 8 + 2 * 3 * width * 128)  # router, two experts of width 128

    def layer(tokens):  # keys and values are those of all tokens
        projections = 2 * (length + tokens) * 2 * width * width
        return projections + 2 * (2 * tokens * length * width) + feed_forward(tokens)

    forward = (layers - 1) * layer(length) + layer(supervised) + 2 * supervised * width * vocabulary
    # Backward costs each product twice more: one for its input, one for its weight.
    assert count_flops(lambda: workload.run("mdlm")) == 3 * forward


@pytest.mark.parametrize("mask_ratio", [0.05, 0.5, 1.0])
def test_a_memdlm_step_at_real_shapes_costs_no_more_than_promised(mask_ratio):
    flops = cli.flops_of(replace(cli.REQUIRED_CASE, mask_ratio=mask_ratio))
    assert flops["memdlm"] <= 1.70 * flops["mdlm"]
    assert flops["memdlm"] <= 0.60 * flops["naive"]


@pytest.mark.parametrize("sharing", ["batch", "sequence"])
@pytest.mark.parametrize("family", ["dense", "moe"])
@pytest.mark.parametrize("num_steps", [2, 3])
def test_the_naive_step_gives_the_same_losses_gradients_and_memory(family, sharing, num_steps):
    model = tiny(family)
    memory = MemoryConfig(sharing=sharing, rank=4, alpha=8, layer_fraction=0.5, num_steps=num_steps)
    batch, objective, indices = batch_of(3), ObjectiveConfig(), (5, 0, 0, 0)
    t = torch.tensor([0.3, 0.6, 0.9])
    draws = torch.Generator().manual_seed(2)
    anchor = corrupt(batch, t, get_schedule("linear"), MASK, draws)
    trajectory = build_trajectory(TrajectoryRequest(batch, anchor, t, memory, MASK, draws))

    naive = naive_memdlm_step(model, batch, anchor, t, trajectory, objective, memory, indices)
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    step = OuterStep(model, memory)
    plan = lay_out_step(batch, anchor, t, trajectory, objective, memory, indices)
    ours = step.forward(model, plan)
    ours.loss.backward()
    step.release()

    assert ours.inner is not None and ours.fast_weights is not None
    torch.testing.assert_close(ours.loss.detach(), naive.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours.inner.losses.sum(dim=1), torch.stack(naive.inner_losses), rtol=1e-5, atol=0
    )
    for name, tensor in naive.fast_weights.tensors.items():
        assert (ours.fast_weights.tensors[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    for name, weight in model.named_parameters():
        assert weight.grad is not None and expected[name] is not None, name
        assert expected[name].norm() > 0, name
        assert (weight.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_the_memory_makes_a_difference_to_the_compared_loss():
    """Equal losses would prove little if the memory never reached the outer pass."""
    case = Case(family="moe", length=64, response=0.5, tuning="full")
    workload = Workload(tiny("moe"), batch_of(2), case)
    assert abs(float(workload.run("memdlm") - workload.run("mdlm"))) > 1e-3
    torch.testing.assert_close(workload.run("memdlm"), workload.run("naive"), rtol=1e-5, atol=0)


def test_the_naive_step_refuses_settings_it_does_not_cover():
    with pytest.raises(ValueError, match=r"memory\.loss: the naive oracle covers"):
        naive_memdlm_step(
            tiny("dense"),
            batch_of(1),
            **dict.fromkeys(("anchor", "t", "trajectory")),
            objective=ObjectiveConfig(),
            memory=MemoryConfig(loss="kl"),
            seed_indices=(0, 0, 0, 0),
        )


def test_peak_bytes_counts_what_is_held_at_the_same_time():
    kept = torch.ones(1000)

    def run():
        first = torch.ones(250_000)  # 1 MB
        second = first * 2  # 2 MB held
        del first
        third = second + 1  # 2 MB held again
        return kept, third

    assert peak_bytes(run, CPU) == pytest.approx(2_000_000, rel=1e-3)


def test_peak_bytes_sees_allocations_of_the_backward_pass():
    inputs = torch.ones(250_000, requires_grad=True)
    assert peak_bytes(lambda: (inputs * 2).sum().backward(), CPU) >= 1_000_000


def test_timed_runs_take_turns_and_the_first_round_is_not_counted():
    order = []
    seconds = time_interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU
    )
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0


def test_the_command_prints_a_table_and_one_json_line_and_stores_it(capsys, tmp_path):
    path = tmp_path / "new" / "result.json"
    options = "--family dense --length 64 --response 0.5 --repeats 1 --json-out"
    cli.main([*options.split(), str(path)])
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(path.read_text())
    assert "naive MemDLM" in out
    (result,) = record["results"]
    assert result["case"]["length"] == 64
    for key in ("flops", "seconds", "peak_bytes"):
        assert all(result[key][name] > 0 for name in ("mdlm", "memdlm", "naive"))
        assert result[f"{key}_ratio"].keys() == {"mdlm", "naive"}
    assert result["flops_ratio"]["naive"] < 1
    assert record["versions"]["torch"] == torch.__version__
    assert "holds" not in out and "MISSED" not in out  # the goals are for a tenth of the tokens


def test_goals_are_checked_at_every_measured_length_and_mfu_is_a_share_of_the_peak(capsys):
    options = "--family moe --length 40 60 --repeats 1 --peak-tflops 2"
    cli.main(options.split())
    out = capsys.readouterr().out
    first, second = json.loads(out.splitlines()[-1])["results"]
    assert [result["case"]["length"] for result in (first, second)] == [40, 60]
    for name, share in first["mfu"].items():
        assert share == pytest.approx(first["flops"][name] / first["seconds"][name] / 2e12)
    assert "MFU" in out
    for length in (40, 60):
        (line,) = [line for line in out.splitlines() if f"moe small, {length} tokens: " in line]
        assert line.count("holds") + line.count("MISSED") == 3
    missed = dict(first, seconds_ratio={"mdlm": 1.8, "naive": 0.5}, peak_bytes_ratio={"mdlm": 1.0})
    line = cli.goals(missed)
    assert line.count("MISSED") == 1 and "seconds / mdlm 1.80 (at most 1.70: MISSED)" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "64", "0"], "--length: must be at least 1"),
        (["--repeats", "0"], "--repeats: must be at least 1"),
        (["--response", "1.5"], r"--response: must be in \(0, 1\]"),
        (["--family", "mamba"], "invalid choice"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


FEW = Shape(num_experts=6, top_k=2, rows=3, length=10, width=16, inner=12)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("variant", experts.VARIANTS)
def test_the_benchmark_of_the_experts_notices_a_wrong_factor(parts, variant):
    layer = ExpertLayer(FEW, parts, CPU, torch.float32)
    assert experts.compare(layer).value <= experts.TOLERANCE
    for name, stacked in layer.stacked.items():
        factors = stacked if variant == "grouped" else layer.single[name][0]
        factors.data *= 1.001
        assert experts.compare(layer).value > experts.TOLERANCE, name
        factors.data /= 1.001


def test_uneven_routing_prefers_the_first_expert_and_leaves_out_the_last():
    chosen = choose(replace(FEW, length=500), torch.Generator().manual_seed(0))
    assert chosen.shape == (3, 500, 2)
    assert (chosen[..., 0] != chosen[..., 1]).all()
    counts = chosen.flatten().bincount(minlength=6)
    assert counts[-1] == 0 and (counts[:-1].diff() < 0).all()
    even = choose(replace(FEW, length=500, routing="even"), torch.Generator().manual_seed(0))
    assert even.flatten().bincount(minlength=6).min() > 400


def test_the_benchmark_of_the_experts_prints_a_table_and_stores_one_json_line(capsys, tmp_path):
    path = tmp_path / "new" / "experts.json"
    options = "--num-experts 6 --rows 2 --length 8 --width 16 --inner 12 --repeats 2 --json-out"
    experts.main([*options.split(), str(path)])
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(path.read_text())
    assert record["benchmark"] == "speed/experts" and record["versions"]["torch"]
    assert [result["parts"] for result in record["results"]] == list(PARTS)
    for result in record["results"]:
        assert result["difference"]["value"] <= experts.TOLERANCE
        assert len(result["seconds_all"]["loop"]) == 2
        assert result["seconds_ratio"] > 0 and result["peak_bytes_ratio"] > 0
        assert result["load"]["num_idle"] >= 1
        assert result["parts"] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0"], "--length: must be at least 1"),
        (["--routing", "odd"], "invalid choice"),
        (["--num-experts", "4", "--top-k", "4"], "--top-k: 4 of 4 experts are too many"),
    ],
)
def test_bad_options_of_the_experts_end_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        experts.parse(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
