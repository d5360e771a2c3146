"""Generate with Local Linear Attention in a model of Hugging Face's transformers: a tiny Llama with random weights.

Prompts of different lengths are padded on the left to one batch. The bytes that follow are those that follow each
prompt alone, whichever cache is used. Needs the `transformers` extra.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashlla.integrations.transformers import register, set_ridge

PROMPTS = ["Local Linear Attention fits a plane", "to the values", "of the keys near a query."]
NEW = 16


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register()
    config = LlamaConfig(
        vocab_size=256,  # bytes; 0 is none of any text, and stands for padding
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="lla",
    )
    model = set_ridge(LlamaForCausalLM(config)).to(device).eval()

    prompts = [torch.tensor(list(prompt.encode()), device=device) for prompt in PROMPTS]
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")  # (B, S)
    alone = [model.generate(p[None], max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist() for p in prompts]
    for cache in ("dynamic", "static"):
        generated = model.generate(
            batch, attention_mask=batch != 0, max_new_tokens=NEW, do_sample=False, cache_implementation=cache
        )
        assert generated[:, -NEW:].tolist() == alone, f"{cache} cache: the batch's bytes are not those of its prompts"
        print(f"{cache} cache, padded on the left: the same bytes as from each prompt alone")
    for prompt, new in zip(PROMPTS, alone):
        print(f"{prompt!r} -> {bytes(new)!r}")


if __name__ == "__main__":
    main()
