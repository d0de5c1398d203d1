"""Dream's `diffusion_generate`, against a literal transcription of what it does.

Source: generation_utils.py of Dream-org/Dream-v0-Instruct-7B. Random choices there come from the
global generator; the transcription takes the same uniform numbers as the library instead. It never
says the mask token, which the official code leaves possible. Dream has no batch of prompts of
different lengths, so prompts are decoded one by one.
"""

import pytest
import torch
from torch import Tensor

from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode, decode_steps
from memdlm.sampling.token_choice import row_draws
from memdlm.sampling.unmasking import transfer_schedule, transfer_steps
from tests.families import MASK, VOCABULARY

POLICIES = {
    "origin": "independent",
    "maskgit_plus": "low_confidence",
    "topk_margin": "margin",
    "entropy": "entropy",
}
NUM_NEW = 12


def top_p_logits(logits: Tensor, top_p: float) -> Tensor:
    ordered, indices = torch.sort(logits, descending=True)
    removed = torch.cumsum(ordered.softmax(-1), dim=-1) > top_p
    removed[..., 1:] = removed[..., :-1].clone()
    removed[..., 0] = False
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices, removed)
    return logits.masked_fill(mask, torch.finfo(logits.dtype).min)


def top_k_logits(logits: Tensor, top_k: int) -> Tensor:
    removed = logits < torch.topk(logits, top_k)[0][..., -1, None]
    return logits.masked_fill(removed, torch.finfo(logits.dtype).min)


def sample_tokens(logits, uniform, alg, temperature, top_p, top_k):
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None:
        logits = top_p_logits(logits, top_p)
    if top_k is not None:
        logits = top_k_logits(logits, top_k)
    probs = logits.softmax(-1)
    if temperature > 0:
        # A draw from Categorical(probs), by the race of exponential clocks.
        x0 = (probs.double() / -torch.log(uniform)).argmax(-1)
        confidence = probs.gather(-1, x0[:, None])[:, 0]
    else:
        confidence, x0 = probs.max(-1)
    if alg == "topk_margin":
        ordered = probs.sort(dim=-1, descending=True)[0]
        confidence = ordered[:, 0] - ordered[:, 1]
    if alg == "entropy":
        confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
    return confidence, x0


def diffusion_generate(model, prompt, steps, alg, eps, temperature, top_p, top_k, draw):
    x = torch.cat([prompt, torch.full((NUM_NEW,), MASK)])
    start = len(prompt)
    timesteps = torch.linspace(1, eps, steps + 1)
    history, forwards = [], 0
    for i in range(steps):
        before = x.clone()
        masked = x == MASK
        slots = masked[start:]
        if not slots.any():
            break
        with torch.no_grad():
            logits = model(x[None]).logits[0][masked]  # this model already aligns them
        logits[:, MASK] = torch.finfo(logits.dtype).min
        t, s = timesteps[i], timesteps[i + 1]
        # The library does not run steps that commit nothing, so its draws count the others.
        uniform = draw(0, "token_choice", forwards, (NUM_NEW, VOCABULARY))[slots]
        confidence, x0 = sample_tokens(logits, uniform, alg, temperature, top_p, top_k)
        if alg == "origin":
            p_transfer = 1 - s / t if i < steps - 1 else 1
            moved = draw(0, "unmasking", i, (NUM_NEW,))[slots] < p_transfer
            x[masked] = torch.where(moved, x0, MASK)
        else:
            count = int(masked.sum() * (1 - s / t)) if i < steps - 1 else int(masked.sum())
            full = torch.full(x.shape, -torch.inf)
            full[masked] = confidence
            filled = x.clone()
            filled[masked] = x0
            # topk, which leaves open which of two equals it takes; the library takes the left one.
            index = full.argsort(descending=True, stable=True)[:count]
            x[index] = filled[index]
        if not torch.equal(x, before):
            history.append(x.clone())
            forwards += 1
    return torch.stack(history)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(0.0, None, None), (0.7, None, None), (1.0, 0.6, None), (1.0, None, 3), (0.0, None, 5)],
)
@pytest.mark.parametrize("alg", POLICIES)
def test_decodes_of_the_official_code(build_model, alg, temperature, top_p, top_k):
    model = build_model("dream").eval()
    model.lm_head.weight.data *= 4  # sharp enough that top-p keeps few tokens
    for steps, eps, seed in ((12, 1e-3, 0), (5, 1e-3, 1), (20, 0.1, 2)):
        prompt = torch.arange(seed + 1, seed + 6)
        draw = row_draws([seed])
        golden = diffusion_generate(model, prompt, steps, alg, eps, temperature, top_p, top_k, draw)
        config = SamplingConfig(
            max_new_tokens=NUM_NEW,
            num_unmasking_steps=steps,
            step_schedule="dream",
            schedule_epsilon=eps,
            policy=POLICIES[alg],
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            confidence_source="sampling",
            stop_at_eos=False,
            suppress_tokens=(MASK,),
        )
        canvases = [step.canvas[0] for step in decode_steps(model, [prompt], config, draw=draw)]
        assert torch.equal(torch.stack(canvases), golden)


def test_counts_are_cut_off_and_the_last_step_takes_the_rest():
    # 1 - s / t at times 1, 0.75025, 0.5005, 0.25075, 0.001 is 0.24975, 0.33289, 0.499, 0.996.
    assert transfer_schedule(10, 4, "dream") == [2, 2, 2, 4]
    assert transfer_schedule(3, 5, "dream") == [0, 0, 0, 1, 2]
    assert transfer_schedule(4, 1, "dream") == [4]


@pytest.mark.parametrize("kind", ["even", "linear", "cosine", "dream"])
def test_independent_slots_follow_the_schedule_on_average(kind):
    num_slots, num_steps = 20_000, 4
    draw = row_draws([0])
    uniform = torch.stack([draw(0, "unmasking", step, (num_slots,)) for step in range(num_steps)])
    shares = transfer_steps(uniform, kind, 1e-3).bincount(minlength=num_steps) / num_slots
    expected = torch.tensor(
        transfer_schedule(num_slots, num_steps, "linear" if kind == "even" else kind)
    )
    # Five standard deviations of a share over 20,000 draws.
    torch.testing.assert_close(shares, expected / num_slots, atol=5 * 0.5 / 141, rtol=0)


def test_slots_are_drawn_by_softmax_of_confidence_over_its_temperature(scripted_model):
    probabilities = torch.tensor([0.8, 0.5, 0.3])

    def script(input_ids, attention_mask):
        rest = (1 - probabilities) / 9
        table = rest[:, None].expand(3, 10).clone()
        table[:, 0] = probabilities
        logits = torch.zeros(*input_ids.shape, 10)
        logits[:, 1:] = table.log()
        return logits

    rows = 1000
    config = SamplingConfig(max_new_tokens=3, confidence_temperature=0.25, stop_at_eos=False)
    prompts = [torch.tensor([6])] * rows
    output = decode(scripted_model(script), prompts, config, draw=row_draws(range(rows)))
    first = output.unmask_step[:, 1:] == 0
    expected = (probabilities / 0.25).softmax(0)
    torch.testing.assert_close(first.float().mean(0), expected, atol=5 * 0.5 / rows**0.5, rtol=0)
