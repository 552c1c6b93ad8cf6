"""Names and shapes of the released BAGEL-7B-MoT, built without memory on the meta device."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, SiglipVisionConfig

from modeling.autoencoder import VAE_PREFIX, AutoencoderConfig
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.pretrained import CheckpointError, read_config
from tests.helpers import FIXTURES

LLM = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
VIT = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
VAE = {"ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 16}
MOT = {"qk_norm": True, "layer_module": "Qwen2MoTDecoderLayer"}
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def released() -> Shapes:
    record = json.loads((FIXTURES / "bagel_7b_mot_keys.json").read_text())
    parts = {"": record["model"], VAE_PREFIX: record["vae"]}
    return {prefix + k: tuple(s) for prefix, part in parts.items() for k, s in part.items()}


def write_released_configs(folder: Path, **llm: object) -> None:
    (folder / "llm_config.json").write_text(json.dumps({"model_type": "qwen2", **LLM, **llm}))
    (folder / "vit_config.json").write_text(json.dumps(VIT))


def built(config: BagelConfig) -> Shapes:
    with torch.device("meta"):
        model = Bagel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_every_name_and_shape(released):
    config = BagelConfig(
        llm=Qwen2Config(**LLM, **MOT),
        vit=SiglipVisionConfig(**VIT),
        vae=AutoencoderConfig(**VAE),
        max_latent_size=64,
        vit_max_num_patch_per_side=70,
        vit_select_layer=-2,
    )
    assert built(config) == released
    assert sum(not name.startswith(VAE_PREFIX) for name in released) == 1223
    assert sum(name.startswith(VAE_PREFIX) for name in released) == 244


def test_sizes_are_inferred_from_shapes_alone(released, tmp_path):
    write_released_configs(tmp_path)
    config = read_config(tmp_path, released)
    assert built(config) == released
    assert (config.qk_norm, config.layer_module) == (True, "Qwen2MoTDecoderLayer")
    assert (config.max_latent_size, config.vit_max_num_patch_per_side) == (64, 70)
    assert (config.latent_patch_size, config.patch_latent_dim, config.latent_stride) == (2, 64, 16)
    assert (config.vit_rope, config.vit_layers, config.head_dim) == (False, 26, 128)
    assert config.vae == AutoencoderConfig(**VAE)


@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        (r"q_norm|k_norm", {"qk_norm": False}),
        ("position_embedding", {"vit_rope": True}),
        ("_moe_gen", {"layer_module": "Qwen2DecoderLayer"}),
        ("(proj|q_norm|k_norm|layernorm)_moe_gen", {"layer_module": "Qwen2MoEDecoderLayer"}),
    ],
)
def test_absent_tensors_say_how_the_model_is_built(released, tmp_path, dropped, expected):
    write_released_configs(tmp_path)
    rest = {name: shape for name, shape in released.items() if not re.search(dropped, name)}
    config = read_config(tmp_path, rest)
    assert {key: getattr(config, key) for key in expected} == expected


def test_a_value_given_wins_over_the_inferred_one(released, tmp_path):
    write_released_configs(tmp_path, qk_norm=False)
    assert read_config(tmp_path, released).qk_norm is False
    config = read_config(tmp_path, released, {"qk_norm": True, "max_latent_size": 32})
    assert (config.qk_norm, config.max_latent_size) == (True, 32)


def test_configs_that_cannot_be_read(released, tmp_path):
    with pytest.raises(CheckpointError, match=r"llm_config.json not found"):
        read_config(tmp_path, released)
    write_released_configs(tmp_path)
    (tmp_path / "bagel_config.json").write_text('{"max_latent_sise": 64}')
    with pytest.raises(CheckpointError, match="max_latent_sise"):
        read_config(tmp_path, released)
