"""Checkpoint folders: exact round trips, and errors that say what is wrong and what to change."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling import pretrained
from modeling.bagel.bagel import Bagel
from modeling.bagel.context import Context
from modeling.bagel.generation import TextConfig, generate_text
from modeling.pretrained import (
    CheckpointError,
    load_architecture,
    load_pretrained,
    read_config,
    save_pretrained,
    verify_manifest,
)
from tests.helpers import (
    LLM,
    TOKENS,
    image_pm1,
    next_velocity,
    pack,
    restoration,
    tiny_config,
    tiny_model,
)

TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
EMBED = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the shared checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object], file: str = "model") -> None:
    """Edits the tensors of a file, and drops the manifest that would notice."""
    tensors = load_file(folder / f"{file}.safetensors")
    edit(tensors)
    save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    (folder / "manifest.json").unlink(missing_ok=True)


def failure(folder: Path, weights: str = "model", **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder, weights, **options)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names that only one holds, or whose dtype or any bit differs."""
    return sorted(a.keys() ^ b.keys()) + [
        k for k in a.keys() & b.keys() if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])
    ]


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config({"qk_norm": False, "layer_module": "Qwen2MoEDecoderLayer"}, vit_rope=True),
        tiny_config({"qk_norm": False, "layer_module": "Qwen2DecoderLayer"}, interpolate_pos=True),
        tiny_config(vit=None, timestep_shift=3.0),
        tiny_config(vae=None, vit_select_layer=-1),
    ],
    ids=["mot", "moe_rope", "dense_interpolate", "no_vit", "no_vae"],
)
def test_round_trip_is_exact(config, tmp_path):
    model = tiny_model(config)
    save_pretrained(model, tmp_path, {"model": model.state_dict()})
    loaded, report = load_pretrained(tmp_path, "model")
    assert different(loaded.state_dict(), model.state_dict()) == []
    for name in ("timestep_shift", "interpolate_pos", "vit_rope", "vit_select_layer", "qk_norm"):
        assert getattr(loaded.config, name) == getattr(config, name)
    assert (report.share, report.recomputed) == (1.0, ())
    assert report.tensors == len(model.state_dict())
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if n.startswith("vae."))


def test_ema_and_model_are_not_confused(checkpoint):
    raw, _ = load_pretrained(checkpoint, "model")
    ema, report = load_pretrained(checkpoint, "ema")
    assert torch.equal(ema.llm2vae.weight, 0.5 * raw.llm2vae.weight)
    assert different(ema.vae.state_dict(), raw.vae.state_dict()) == []
    assert str(report).startswith(f"loaded EMA weights from {checkpoint} (ema.safetensors, ae.")


def test_sharded_round_trip(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 50_000)
    save_pretrained(model, tmp_path, {"model": model.state_dict()})
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("vae.")}
    assert len(shards) > 3 and not (tmp_path / "model.safetensors").exists()
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["weight_map"].keys() == own.keys()
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in own.values())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 50_000
    assert different(load_pretrained(tmp_path, "model")[0].state_dict(), model.state_dict()) == []
    shards[1].unlink()
    assert f"{shards[1].name} not found" in failure(tmp_path)


def test_saving_again_replaces_what_was_there(tmp_path, monkeypatch):
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "SHARD_BYTES", 50_000)
        save_pretrained(old, tmp_path, {"model": old.state_dict()})
    save_pretrained(new, tmp_path, {"model": new.state_dict()})
    assert different(load_pretrained(tmp_path, "model")[0].state_dict(), new.state_dict()) == []


def test_saving_leaves_other_files_alone(tmp_path):
    model = tiny_model()
    others = [tmp_path / f"{stem}_bf16.safetensors" for stem in ("model", "ema")]
    for file in others:
        file.write_bytes(b"another tool's")
    save_pretrained(model, tmp_path, {"model": model.state_dict(), "ema": model.state_dict()})
    assert [file.exists() and file.read_bytes() for file in others] == [b"another tool's"] * 2


def test_saving_casts_only_the_model(tmp_path):
    model = tiny_model()
    save_pretrained(model, tmp_path, {"model": model.state_dict()}, dtype=torch.bfloat16)
    loaded, _ = load_pretrained(tmp_path, "model")
    assert (loaded.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(loaded.llm2vae.weight, model.llm2vae.weight.bfloat16())
    assert torch.equal(loaded.vae.decoder.conv_in.weight, model.vae.decoder.conv_in.weight)
    as_float, _ = load_pretrained(tmp_path, "model", dtype=torch.float32)
    assert (as_float.dtype, as_float.vae.dtype) == (torch.float32, torch.float32)


def test_loading_casts_only_the_model(checkpoint):
    loaded, _ = load_pretrained(checkpoint, "model", dtype=torch.bfloat16)
    vae = load_file(checkpoint / "ae.safetensors")
    assert loaded.dtype == loaded.latent_pos_embed.pos_embed.dtype == torch.bfloat16
    assert different(loaded.vae.state_dict(), vae) == []


def test_files_carry_the_metadata_that_transformers_wants(checkpoint):
    for name in ("model", "ema", "ae"):
        with safe_open(checkpoint / f"{name}.safetensors", framework="pt") as archive:
            assert archive.metadata() == {"format": "pt"}


def test_missing_tensor_is_named(folder):
    name = "language_model.model.layers.1.self_attn.k_norm.weight"
    change(folder, lambda tensors: tensors.pop(name))
    message = failure(folder)
    assert f"missing {name} (8,) [check --llm_qk_norm]" in message
    total = len(tiny_model(tiny_config()).state_dict())
    assert f"{total - 1} of {total} tensors fit" in message


def test_unexpected_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.update(stranger=torch.zeros(2, 3)))
    assert "unexpected stranger (2, 3) [check --model_path (or --llm_path): conf" in failure(folder)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"max_latent_size": 4},
            "misshapen latent_pos_embed.pos_embed: checkpoint (64, 32), model (16, 32) "
            "[check --max_latent_size]",
        ),
        (
            {"vit_max_num_patch_per_side": 5},
            "misshapen vit_pos_embed.pos_embed: checkpoint (64, 32), model (25, 32) "
            "[check --vit_max_num_patch_per_side",
        ),
        (
            {"latent_patch_size": 1},
            "misshapen vae2llm.weight: checkpoint (32, 16), model (32, 4) "
            "[check --latent_patch_size]",
        ),
        ({"layer_module": "Qwen2DecoderLayer"}, "_moe_gen.weight (32, 32) [check --layer_module]"),
        (
            {"vit_patch_size": 7},
            "patch_embedding.weight: checkpoint (24, 588), model (24, 147) [check --vit_patch",
        ),
        ({"tie_word_embeddings": True}, f"unexpected {HEAD} (512, 32) [check --tie_word_embed"),
        ({"qk_norm": False}, "q_norm.weight (8,) [check --llm_qk_norm]"),
        ({"vit_rope": True}, "position_embedding.weight (64, 24) [check --vit_max"),
        ({"vit_rope": True}, "missing vit_model.vision_model.rope.cos_h (64, 6) [check --vit_max"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(checkpoint, overrides, expected):
    assert expected in failure(checkpoint, overrides=overrides)


def test_a_setting_that_no_tensor_betrays_has_to_agree(checkpoint):
    for key, value in (("connector_act", "relu"), ("interpolate_pos", True)):
        with pytest.raises(CheckpointError, match=rf"{key} is .*\[check --{key}\]"):
            load_pretrained(checkpoint, "model", overrides={key: value})
    with pytest.raises(ValueError, match="connector_act 'foo' is no activation"):
        dataclasses.replace(tiny_config(), connector_act="foo")


def test_another_model_size_is_named(folder):
    config = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    (folder / "manifest.json").unlink()
    message = failure(folder)
    assert f"misshapen {EMBED}: checkpoint (512, 32), model (512, 48)" in message
    assert "[check --model_path (or --llm_path): configuration of another model size?]" in message
    assert re.search(r"and \d+ more", message)


def test_a_deeper_vit_names_the_layer_and_the_flag(folder):
    layer = "vit_model.vision_model.encoder.layers.{}.layer_norm1.weight"

    def deepen(tensors: dict[str, Tensor]) -> None:
        tensors[layer.format(2)] = tensors[layer.format(1)].clone()

    change(folder, deepen)
    assert f"unexpected {layer.format(2)} (24,) [check --vit_select_layer" in failure(folder)


def test_a_shallower_vit_names_the_layer_and_the_flag(checkpoint):
    message = failure(checkpoint, overrides={"vit_select_layer": -1})
    assert "missing vit_model.vision_model.encoder.layers.2." in message
    assert "--vit_select_layer" in message


@pytest.mark.parametrize(("weights", "other"), [("ema", "model"), ("model", "ema")])
def test_absent_weights_list_the_files_there(folder, weights, other):
    (folder / f"{weights}.safetensors").unlink()
    message = failure(folder, weights)
    assert f"{weights}.safetensors not found" in message
    assert f"{other}.safetensors" in message and "llm_config.json" in message
    assert "training reads model.safetensors, or by --finetune_from_ema True" in message
    assert load_pretrained(folder, other)[1].weights == other


def test_no_such_folder(tmp_path):
    assert "no such folder" in failure(tmp_path / "nowhere")


def test_absent_autoencoder_is_named(folder):
    (folder / "ae.safetensors").unlink()
    assert "ae.safetensors" in failure(folder)


def test_absent_position_tables_are_recomputed_and_reported(folder, checkpoint):
    change(folder, lambda tensors: [tensors.pop(name) for name in TABLES])
    model, report = load_pretrained(folder, "model")
    expected = tiny_model(tiny_config())
    expected.init_weights()
    for name in TABLES:
        assert torch.equal(model.state_dict()[name], expected.state_dict()[name])
    whole = load_pretrained(checkpoint, "model")[1]
    assert report.recomputed == TABLES
    assert report.tensors == whole.tensors - 2 and report.share == report.tensors / whole.tensors
    assert "recomputed latent_pos_embed.pos_embed, vit_pos_embed.pos_embed" in str(report)


@pytest.mark.parametrize("name", ["model.safetensors", "ae.safetensors", "llm_config.json"])
def test_one_flipped_bit_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    place = len(content) - 5 if name != "llm_config.json" else content.index(b"1000.0") + 1
    content[place] ^= 1  # a rope_theta of 1100: still JSON, and another model
    (folder / name).write_bytes(content)
    assert re.search(rf"{name} is damaged: sha256 [0-9a-f]{{64}}", failure(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("manifest", [True, False])
def test_truncated_file_is_named(folder, name, manifest):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    if not manifest:
        (folder / "manifest.json").unlink()
    assert str(folder / name) in failure(folder)


def test_manifest_names_every_file_and_must_be_there(folder):
    files = {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert json.loads((folder / "manifest.json").read_text()).keys() == files
    verify_manifest(folder)
    (folder / "vit_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vit_config.json is named in manifest.json"):
        verify_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json"):
        verify_manifest(folder)


def test_tied_embeddings_stay_tied(tmp_path):
    config = tiny_config({"tie_word_embeddings": True})
    model = tiny_model(config)
    save_pretrained(model, tmp_path, {"model": model.state_dict()})
    saved = load_file(tmp_path / "model.safetensors")
    assert EMBED in saved and HEAD not in saved
    loaded, report = load_pretrained(tmp_path, "model")
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight
    assert different(loaded.state_dict(), model.state_dict()) == []
    assert report.parameters == sum(p.numel() for p in model.parameters())
    message = failure(tmp_path, overrides={"tie_word_embeddings": False})
    assert f"missing {HEAD} (64, 32) [check --tie_word_embeddings]" in message
    whole = saved | {HEAD: saved[EMBED].clone()}
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "manifest.json").unlink()
    untied, _ = load_pretrained(tmp_path, "model", overrides={"tie_word_embeddings": False})
    assert different(untied.state_dict(), model.state_dict()) == []
    assert f"unexpected {HEAD} (64, 32) [check --tie_word_embeddings]" in failure(tmp_path)


@pytest.mark.parametrize("agrees", [{"vit_patch_size": 14}, {"tie_word_embeddings": False}])
def test_a_setting_that_agrees_changes_nothing(checkpoint, agrees):
    plain, given = (load_pretrained(checkpoint, "model", overrides=o)[0] for o in ({}, agrees))
    assert given.config.vit.to_dict() == plain.config.vit.to_dict()
    assert given.config.llm.to_dict() == plain.config.llm.to_dict()
    assert different(given.state_dict(), plain.state_dict()) == []


def test_untied_heads_may_not_be_missing(folder):
    change(folder, lambda tensors: tensors.pop(HEAD))
    assert f"missing {HEAD} (512, 32)" in failure(folder)


def test_sizes_of_a_folder_without_our_files(folder):
    for name in ("bagel_config.json", "vae_config.json", "manifest.json"):
        (folder / name).unlink()
    llm = json.loads((folder / "llm_config.json").read_text())
    released = {k: v for k, v in llm.items() if k not in ("qk_norm", "layer_module")}
    (folder / "llm_config.json").write_text(json.dumps(released))
    model, report = load_pretrained(folder, "model", overrides={"timestep_shift": 1.5})
    expected = tiny_config()
    for field in dataclasses.fields(expected):
        if field.name not in ("llm", "vit"):
            assert getattr(model.config, field.name) == getattr(expected, field.name), field.name
    assert (model.config.qk_norm, model.config.layer_module) == (True, LLM["layer_module"])
    assert report.share == 1.0


def test_architecture_alone_takes_the_autoencoder_and_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "ema.safetensors").unlink()
    model = load_architecture(folder)
    model.init_weights()
    state, vae = model.state_dict(), load_file(folder / "ae.safetensors")
    assert different({k[4:]: v for k, v in state.items() if k.startswith("vae.")}, vae) == []
    assert torch.count_nonzero(state["llm2vae.weight"]) == 0
    gen = [k for k in state if "_moe_gen" in k]
    assert len(gen) == 2 * 14 + 1
    assert all(torch.equal(state[k], state[k.replace("_moe_gen", "")]) for k in gen)
    assert 0.015 < state[EMBED].std() < 0.025


def test_architecture_does_not_guess_the_layers(folder):
    """Without weights nothing says which layers a released folder has."""
    llm = json.loads((folder / "llm_config.json").read_text())
    released = {k: v for k, v in llm.items() if k not in ("qk_norm", "layer_module")}
    (folder / "llm_config.json").write_text(json.dumps(released))
    with pytest.raises(CheckpointError, match="layer_module"):
        load_architecture(folder)
    model = load_architecture(folder, {"layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True})
    assert model.config.layer_module == "Qwen2MoTDecoderLayer"


def test_unknown_keys_of_the_autoencoder_are_named(folder):
    config = json.loads((folder / "vae_config.json").read_text())
    config["shift_facter"] = config.pop("shift_factor")
    (folder / "vae_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="shift_facter"):
        read_config(folder, {})


def fixed(n: int, temperature: float) -> TextConfig:
    return TextConfig(max_new_tokens=n, temperature=temperature, stop_at_eos=False)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_vocabulary_is_never_sampled(temperature):
    model = tiny_model()
    boost = torch.zeros(64)
    boost[40:] = 1e4
    model.language_model.lm_head.register_forward_hook(lambda m, i, logits: logits + boost)
    context = Context(model, TOKENS)
    context.add_text([1, 2])
    generator = torch.Generator().manual_seed(0)
    ids = generate_text(context, 40, fixed(20, temperature), generator)
    assert len(ids) == 20 and max(ids) < 40
    context = Context(model, TOKENS)
    unlimited = generate_text(context, 64, fixed(3, temperature), generator)
    assert min(unlimited) >= 40


@torch.no_grad()
def test_generated_text_leaves_bos_ids_eos_in_the_context():
    model = tiny_model()
    for limit, forced in ((4, None), (4, TOKENS.eos), (0, None)):
        context, by_hand = Context(model, TOKENS), Context(model, TOKENS)
        head = model.language_model.lm_head
        if forced is not None:
            boost = torch.nn.functional.one_hot(torch.tensor(forced), 64) * 1e4
            handle = head.register_forward_hook(lambda m, i, logits, b=boost: logits + b)
        ids = generate_text(
            context, 60 if forced is None else 64, TextConfig(max_new_tokens=limit)
        )  # 61 is eos
        if forced is not None:
            handle.remove()
        assert len(ids) == (limit if forced is None else 0)
        by_hand.add_text(ids)
        assert context.cache.length == by_hand.cache.length == context.position
        after = [c.append_ids([9]) for c in (context, by_hand)]
        torch.testing.assert_close(*after, rtol=1e-4, atol=1e-5)


def answers(model: Bagel, dtype: torch.dtype) -> dict[str, Tensor]:
    """What every path of the model says to inputs of a dtype."""
    samples = (restoration("a"), restoration("b", size=(16, 16)))
    batch = pack(model.config, *samples, times={"a": 0.4, "b": 0.7})
    cast = batch.map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t)
    out = model.step_outputs(cast)
    found = {"hidden": out.hidden, "velocity": out.velocity_pred}
    found |= {name: term.sum for name, term in model.losses(out).items()}
    context = Context(model, TOKENS)
    context.add_vae_image(image_pm1(16, 24, 3).to(dtype))
    context.add_vit_image(image_pm1(28, 28, 4).to(dtype))
    context.add_text([5, 6])
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = context.latent_position_ids((4, 6))
    found["cached velocity"] = next_velocity(context, x, 0.5, ids)
    found["logits"] = model.language_model.lm_head(context.append_ids([7]))
    text = generate_text(context, 60, TextConfig(max_new_tokens=3))
    assert len(text) <= 3 and all(0 <= i < 60 for i in text)
    return found


@torch.no_grad()
def test_mixed_dtypes_give_the_same_answers(tmp_path):
    model = tiny_model()
    save_pretrained(model, tmp_path, {"model": model.state_dict()})
    expected = answers(model, torch.float32)
    in_bfloat16 = load_pretrained(tmp_path, "model", dtype=torch.bfloat16)[0]
    found = {
        "bfloat16 inputs": answers(model, torch.bfloat16),
        "bfloat16 weights": answers(in_bfloat16, torch.float32),
        "both": answers(in_bfloat16, torch.bfloat16),
        "bfloat16 autoencoder too": answers(tiny_model().bfloat16(), torch.float32),
    }
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = answers(model, torch.float32)
        found["autocast, bfloat16 inputs"] = answers(model, torch.bfloat16)
    for case, answer in found.items():
        for name, value in answer.items():
            error = (value.float() - expected[name]).norm() / expected[name].norm()
            assert error < 0.05, (case, name, error)
