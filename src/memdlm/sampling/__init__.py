"""Decoding for masked diffusion language models: from prompts to tokens, knowing nothing of memory.

    config            SamplingConfig: every setting of a decode, validated
    canvas            prompts of different lengths -> canvas, attention mask, slots
    token_choice      logits -> the token each slot would take
    unmasking         which slots to commit in a step, and how many
    masked_decoding   decode(): LLaDA's masked decoding over the four above

Import from the modules: this file stays empty so that reading a config does not load torch.
"""
