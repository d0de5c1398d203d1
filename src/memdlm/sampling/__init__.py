"""Decoding for masked diffusion language models: from prompts to tokens, knowing nothing of memory.

    config            SamplingConfig: every setting of a decode, validated (with checks)
    canvas            prompts of different lengths -> canvas, attention mask, slots
    block_plan        the blocks of every row, and how many slots each step commits
    token_choice      logits -> the token each slot would take
    unmasking         which slots to commit in a step, and how many
    end_of_text       where a response ends, by its tokens or by a caller who reads them
    masked_decoding   LLaDA's and Dream's masked decoding over those above
    block_decoding    LLaDA2.x's: blocks, token editing, exact cache (with block_causal and
                      block_progress)
    decoding          decode() and decode_steps(), by the one of the two that model and config want
    approximate_cache prefix and dual caches for masked decoding (with cached_forward)
    logits_source     how a decode asks the model: by whole forwards, or as the caches above
    remaining_rows    the rows that are not done, of which forwards are made
    decoders          which of the two a model and a config ask for
    streaming         decode_stream(): tokens as they become final

Import from the modules: this file stays empty so that reading a config does not load torch.
"""
