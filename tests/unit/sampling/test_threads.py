"""Several decodes on one model at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.evaluation_mode import evaluation_mode

VOCABULARY = 10


def test_the_mode_comes_back_when_the_last_decode_ends(scripted_model):
    model = scripted_model(lambda ids, mask: torch.zeros(*ids.shape, VOCABULARY)).train()
    model.dropout.eval()
    first, second = evaluation_mode(model), evaluation_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (model.training, model.dropout.training) == (False, False)
    second.__exit__(None, None, None)
    assert (model.training, model.dropout.training) == (True, False)


def test_threads_get_the_answers_they_get_alone(scripted_model):
    def script(input_ids, attention_mask):
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        return torch.randn(*input_ids.shape, VOCABULARY, generator=generator)

    model = scripted_model(script).train()
    prompts = [torch.arange(1, 2 + length) for length in range(4)]
    lengths = (2, 4, 6, 8)  # so that decodes end while others run
    configs = [SamplingConfig(max_new_tokens=n, temperature=1.0) for n in lengths]
    alone = [
        decode(model, [prompt], config) for prompt, config in zip(prompts, configs, strict=True)
    ]
    model.calls.clear()
    together = threading.Barrier(len(prompts))

    def run(job):
        prompt, config = job
        started = []

        def wait(step):
            if not started:
                started.append(together.wait(timeout=30))

        return decode(model, [prompt], config, on_step=wait)

    with ThreadPoolExecutor(len(prompts)) as pool:
        outputs = list(pool.map(run, zip(prompts, configs, strict=True)))
    for output, expected in zip(outputs, alone, strict=True):
        assert torch.equal(output.canvas, expected.canvas)
    assert not any(call.training or call.has_grad for call in model.calls)
    assert model.training
