"""Initial folder of the tiny model: configs, tokenizer, the trained autoencoder, random weights.

python -m scripts.tiny.init --vae build/tiny/vae --out build/tiny/init
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, SiglipVisionConfig

from data.tokenizer import Tokenizer
from modeling.autoencoder import AutoencoderConfig
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.pretrained import VAE_FILE, save_pretrained
from scripts.tiny.make_pairs import BLUR, INSTRUCTIONS, NOISE
from scripts.tiny.tokenizer import VOCABULARY, write_tokenizer

LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1_000_000.0,
    "initializer_range": 0.05,
    "qk_norm": True,
    "layer_module": "Qwen2MoTDecoderLayer",
}
VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 224,
    "patch_size": 14,
}


def align_queries_and_keys(model: Bagel) -> None:
    """Keys start as copies of queries, so that attention starts as similarity.

    Tokens of one place in the degraded and in the restored image carry the same position and then
    can find each other from the first step.
    """
    size = model.config.head_dim
    groups = model.config.llm.num_attention_heads // model.config.llm.num_key_value_heads
    for layer in model.language_model.model.layers:
        for suffix in layer.suffixes:
            query = layer.self_attn.get_submodule(f"q_proj{suffix}").weight
            key = layer.self_attn.get_submodule(f"k_proj{suffix}").weight
            heads = query.detach().reshape(-1, groups, size, query.shape[1])
            key.data.copy_(heads[:, 0].reshape(key.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    write_tokenizer([*NOISE.values(), *BLUR.values(), *INSTRUCTIONS.values()], args.out)
    if Tokenizer(args.out).size > VOCABULARY:
        raise ValueError(f"the tokenizer outgrows the vocabulary of {VOCABULARY}")
    vae = json.loads((args.vae / "vae_config.json").read_text())
    vae.pop("downsample")
    config = BagelConfig(
        llm=Qwen2Config(**LLM),
        vit=SiglipVisionConfig(**VIT),
        vae=AutoencoderConfig(**vae),
        max_latent_size=16,
        vit_max_num_patch_per_side=16,
        timestep_shift=2.0,
    )
    model = Bagel(config)
    model.vae.load_state_dict(load_file(args.vae / VAE_FILE))
    model.init_weights(copy_init_moe=True)
    align_queries_and_keys(model)
    save_pretrained(model, args.out, {"model": model.state_dict()}, tokenizer_from=args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
