"""A model from folders of Qwen2 and SigLIP computes what transformers does with them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from data.packer import Sample, TextSegment
from modeling.bagel.bagel import Bagel
from modeling.geometry import patchify, position_ids
from modeling.parts import open_parts
from modeling.pretrained import EMBEDDINGS, HEAD, CheckpointError, load_pretrained, write_json
from tests.helpers import LLM, TOKENS, VIT, image_pm1, pack, run_arguments, write_tokenizer
from tests.ranks import run_on_ranks
from train.build import build_trainer, open_model, start
from train.main_sr_pixel_loss import main

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {"max_latent_size": 8}
QWEN = {k: v for k, v in LLM.items() if k not in ("qk_norm", "layer_module")} | {"vocab_size": 512}
LAYERS, VIT_LAYERS = LLM["num_hidden_layers"], VIT["num_hidden_layers"]
GEN = "_moe_gen"


def spread(model: torch.nn.Module) -> Any:
    """Random weights everywhere, so that no tensor can stand for another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="session")
def parts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llm` (in shards), `tied`, `vit`, `siglip` (with the text side) and `vae`."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    for name, tie in (("llm", False), ("tied", True)):
        write_tokenizer(["Remove the noise.", "Mild noise."], root / name)
        qwen = spread(Qwen2ForCausalLM(Qwen2Config(**QWEN, tie_word_embeddings=tie)))
        qwen.save_pretrained(root / name, max_shard_size="50KB")
    spread(SiglipVisionModel(SiglipVisionConfig(**VIT))).save_pretrained(root / "vit")
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    both = SiglipModel(SiglipConfig(vision_config=VIT, text_config=text))
    spread(both).save_pretrained(root / "siglip")
    (root / "vae").mkdir()
    for name in ("ae.safetensors", "vae_config.json"):
        shutil.copyfile(checkpoint / name, root / "vae" / name)
    return root


@pytest.fixture
def own(parts: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(parts, tmp_path / "parts")


def opened(
    root: Path,
    llm: str = "llm",
    vit: str = "vit",
    seed: int = 5,
    copy: bool = True,
    headers_only: bool = False,
    **changes: Any,
) -> tuple[Bagel, dict[str, Tensor], str]:
    folders = root / llm, root / vit, root / "vae"
    return open_parts(*folders, SIZES | changes, seed, copy, headers_only)


def filled(model: Bagel, tensors: dict[str, Tensor]) -> Bagel:
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(tensors, strict=True)
    return model


def failure(root: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(root, **options)
    return str(caught.value)


def edit(file: Path, **tensors: Tensor | None) -> None:
    """Replaces tensors; None removes one."""
    content = {k.replace(".", "__"): v for k, v in load_file(file).items()} | tensors
    kept = {k.replace("__", "."): v for k, v in content.items() if v is not None}
    save_file(kept, file, {"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize("llm", ["llm", "tied"])
@pytest.mark.parametrize("layer", ["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", None])
def test_text_is_that_of_qwen2(parts, llm, layer):
    changes = {"layer_module": layer} if layer else {}
    model = filled(*opened(parts, llm, qk_norm=False, **changes)[:2])
    oracle = Qwen2ForCausalLM.from_pretrained(parts / llm)
    assert (parts / llm / "model.safetensors.index.json").exists()
    texts = [[7, 3, 9, 9, 1, 0, 33], [5, 5]]
    batch = pack(model.config, *(Sample(str(ids), [TextSegment(ids=ids)]) for ids in texts))
    logits = model.language_model.lm_head(model.hidden_states(batch, None))
    for ids, part in zip(texts, logits.split(batch.sample_lens), strict=True):
        alone = torch.tensor([[TOKENS.bos, *ids, TOKENS.eos]])
        torch.testing.assert_close(part, oracle(alone).logits[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("select", [-1, -2])
@pytest.mark.parametrize("vit", ["vit", "siglip"])
def test_images_are_those_of_siglip(parts, vit, select):
    model = filled(*opened(parts, vit=vit, vit_select_layer=select)[:2])
    oracle = SiglipVisionModel.from_pretrained(parts / vit).eval()
    images = [image_pm1(112, 112, seed) for seed in (1, 2)]
    patches = torch.cat([patchify(image, 14) for image in images])
    features = model.vit_model(patches, position_ids(8, 8, 8).repeat(2), (64, 64))
    states = oracle(torch.stack(images), output_hidden_states=True).hidden_states
    expected = oracle.post_layernorm(states[select]).flatten(0, 1)
    torch.testing.assert_close(features, expected, **CLOSE)


def test_what_no_file_has(parts):
    model, tensors, _ = opened(parts)
    assert tensors.keys() == model.state_dict().keys()
    assert all(p.is_meta for p in model.parameters())
    gen = [name for name in tensors if GEN in name]
    assert len(gen) == LAYERS * 14 + 1
    assert all(torch.equal(tensors[n], tensors[n.replace(GEN, "")]) for n in gen)
    ones = [n for n in tensors if re.search(r"[qk]_norm", n)]
    assert len(ones) == 4 * LAYERS and all((tensors[n] == 1).all() for n in ones)
    zeros = ["llm2vae.weight", "llm2vae.bias", "vae2llm.bias", "connector.fc1.bias"]
    assert not any(tensors[n].any() for n in zeros)
    random = ["connector.fc1.weight", "connector.fc2.weight", "vae2llm.weight"]
    for name in [*random, "time_embedder.mlp.0.weight", "time_embedder.mlp.2.weight"]:
        assert tensors[name].std() == pytest.approx(0.02, rel=0.2)
    whole = Bagel(model.config).state_dict()
    for table in ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"):
        assert torch.equal(tensors[table], whole[table])


def test_a_seed_is_a_model(parts):
    first, again, other = (opened(parts, seed=seed)[1] for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {
        *("connector.fc1.weight", "connector.fc2.weight", "vae2llm.weight"),
        *("time_embedder.mlp.0.weight", "time_embedder.mlp.2.weight"),
    }
    apart = opened(parts, copy=False)[1]
    up = "language_model.model.layers.0.mlp{}.up_proj.weight"
    assert apart[up.format(GEN)].std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(apart[up.format("")], first[up.format("")])
    assert not torch.equal(apart[up.format(GEN)], apart[up.format(GEN).replace("0", "1")])
    assert (apart[f"language_model.model.norm{GEN}.weight"] == 1).all()


def test_rotary_positions(parts):
    model, tensors, report = opened(parts, vit_rope=True)
    whole = Bagel(model.config).state_dict()
    for name in ("cos_h", "sin_h", "cos_w", "sin_w"):
        table = f"vit_model.vision_model.rope.{name}"
        assert torch.equal(tensors[table], whole[table])
    place = "vit_model.vision_model.embeddings.position_embedding.weight"
    assert f"{place}: 1 tensors NOT USED, from {parts}/vit" in report


def test_the_report_names_every_tensor_once(parts):
    model, tensors, report = opened(parts, vit="siglip")
    vit_layer, llm_layer = "vit_model.vision_model.encoder.layers", "language_model.model.layers"
    in_text = len([n for n in load_file(parts / "siglip" / "model.safetensors") if "text_" in n])
    lines = [
        f"language_model: {12 * LAYERS + 3} tensors from {parts}/llm",
        f"vit_model: {16 * (VIT_LAYERS - 1) + 5} tensors from {parts}/siglip",
        f"{vit_layer}.{VIT_LAYERS - 1}: 16 tensors NOT USED, from {parts}/siglip",
        f"vit_model.vision_model.head: 11 tensors NOT USED, from {parts}/siglip",
        f"vit_model.vision_model.text_model: {in_text} tensors NOT USED, from {parts}/siglip",
        f"vit_model.vision_model.logit_scale: 1 tensors NOT USED, from {parts}/siglip",
        f"vae: {len(load_file(parts / 'vae' / 'ae.safetensors'))} tensors from {parts}/vae",
        f"language_model: {14 * LAYERS + 1} tensors from the understanding expert",
        f"{llm_layer}.*.self_attn.q_norm.weight: {LAYERS} tensors NEW, ones",
        "llm2vae.weight: 1 tensors NEW, zeros",
        "connector.fc1.weight: 1 tensors NEW, normal with deviation 0.02",
        "latent_pos_embed: 1 tensors computed",
    ]
    told = report.splitlines()
    assert told[0] == "model assembled from parts, new tensors with seed 5:"
    assert {f"  {line}" for line in lines} <= set(told)
    used = [line for line in told[1:] if "NOT USED" not in line]
    assert sum(int(re.search(r": (\d+) tensors", n)[1]) for n in used) == len(tensors)


@pytest.mark.parametrize("changes", [{}, {"copy": False}, {"vit_rope": True}, {"llm": "tied"}])
def test_headers_tell_the_same(parts, changes):
    _, tensors, report = opened(parts, **changes)
    model, headers, same = opened(parts, headers_only=True, **changes)
    assert same == report and all(tensor.is_meta for tensor in headers.values())
    assert {n: t.shape for n, t in headers.items()} == {n: t.shape for n, t in tensors.items()}


def test_tied_embeddings(parts):
    """A shared head starts a head of its own, unless it is to be shared here too."""
    model, tensors, report = opened(parts, "tied")
    assert not model.config.llm.tie_word_embeddings
    assert torch.equal(tensors[HEAD], tensors[EMBEDDINGS])
    assert "language_model: 1 tensors from the embedding" in report
    shared, tensors, _ = opened(parts, "tied", tie_word_embeddings=True)
    assert shared.language_model.lm_head.weight is shared.language_model.model.embed_tokens.weight
    assert tensors[HEAD] is tensors[EMBEDDINGS]
    message = failure(parts, tie_word_embeddings=True)
    assert f"unexpected {HEAD} (512, 32) [check --tie_word_embeddings]" in message


def test_an_autoencoder_beside_other_weights(own):
    for file in (own / "vae").iterdir():
        shutil.copyfile(file, own / "vit" / file.name)
    first, second = (
        open_parts(own / "llm", own / "vit", own / vae, SIZES, 5) for vae in ("vae", "vit")
    )
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_vision_model_that_is_linear_already(own):
    file, name = own / "vit" / "model.safetensors", "embeddings__patch_embedding__weight"
    expected = opened(own)[1]
    patch = "vit_model.vision_model.embeddings.patch_embedding.weight"
    edit(file, **{name: expected[patch]})
    assert torch.equal(opened(own)[1][patch], expected[patch])


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("post_layernorm__bias", None, "missing vit_model.vision_model.post_layernorm.bias (24,) "),
        ("post_layernorm__bias", torch.zeros(9), "post_layernorm.bias: checkpoint (9,), model (24"),
        ("stranger", torch.zeros(9), "unexpected vit_model.vision_model.stranger (9,) [check --mo"),
        (
            "encoder__layers__3__layer_norm1__bias",
            torch.zeros(24),
            "unexpected vit_model.vision_model.encoder.layers.3.layer_norm1.bias (24,) [check "
            "--vit_select_layer",
        ),
        ("encoder__layers__1__mlp__fc1__bias", None, "encoder.layers.1.mlp.fc1.bias (40,) [check"),
    ],
)
def test_tensors_of_siglip_that_do_not_fit(own, name, tensor, expected):
    edit(own / "vit" / "model.safetensors", **{name: tensor})
    message = failure(own)
    assert expected in message and f"{own}/vit" in message and "--vit_" in message


def test_tensors_of_qwen2_that_do_not_fit(own):
    index = json.loads((own / "llm" / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.self_attn.k_proj.bias"
    edit(own / "llm" / index[name], **{name.replace(".", "__"): None})
    message = failure(own)
    assert f"missing language_model.{name} (16,) [check --model_path (or --llm_path)" in message
    assert failure(own, headers_only=True) == message
    (own / "llm" / index[name]).unlink()
    assert f"{index[name]} not found" in failure(own) and "Check --llm_path" in failure(own)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vit_patch_size": 7}, "(24, 588), model (24, 147) [check --vit_patch_size"),
        (
            {"vit_max_num_patch_per_side": 70},
            "--vit_max_num_patch_per_side 70: that of --vit_path is",
        ),
        ({"llm": "vit"}, "vit/config.json is missing or not of qwen2 (model_type=siglip_vision"),
        ({"vit": "llm"}, "--vit_path: "),
        ({"llm": "nowhere"}, "nowhere/config.json is missing or not of qwen2 (model_type=None)"),
    ],
)
def test_folders_and_sizes_that_contradict(parts, changes, expected):
    assert expected in failure(parts, **changes)


def test_an_autoencoder_that_does_not_fit(own):
    config = json.loads((own / "vae" / "vae_config.json").read_text())
    write_json(own / "vae" / "vae_config.json", config | {"z_channels": 8})
    assert "misshapen vae.decoder.conv_in.weight" in failure(own)
    (own / "vae" / "vae_config.json").unlink()
    assert opened(own)[0].config.vae.z_channels == 4
    (own / "vae" / "ae.safetensors").unlink()
    assert "ae.safetensors: unreadable" in failure(own)


def arguments(root: Path, mixture: Path, run: Path, **changes: Any) -> Any:
    given = {"llm_path": root / "llm", "vit_path": root / "vit", "finetune_from_hf": False}
    return run_arguments(root / "vae", mixture, run, **(given | SIZES | changes))


def test_a_run_from_parts(parts, mixture, tmp_path, capsys):
    args = arguments(parts, mixture, tmp_path, total_steps=1, vit_patch_size=14)
    trainer = build_trainer(args)
    assert f"tensors from {parts}/llm" in capsys.readouterr().out
    first = trainer.model.state_dict()
    expected = opened(parts, seed=args.training.global_seed)[1]
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    trainer.fit()
    saved, report = load_pretrained(tmp_path / "0000001", "model")
    assert report.share == 1.0 and (tmp_path / "0000001" / "tokenizer.json").exists()
    state = saved.state_dict()
    moved = [name for name in expected if not torch.equal(state[name], expected[name])]
    gen = f"language_model.model.norm{GEN}.weight"
    # Through a zero projection nothing has reached the copy yet, which is a weight of its own.
    assert gen.replace(GEN, "") in moved and "llm2vae.weight" in moved and gen not in moved
    assert build_trainer(args).step == 1
    assert "resumed from" in capsys.readouterr().out


def on_rank(rank: int, root: Path, mixture: Path, run: Path) -> list[dict[str, Tensor]]:
    """The weights that the ranks hold together."""
    found = []
    for case in ({}, {"llm_path": root / "tied", "tie_word_embeddings": True}):
        backend = build_trainer(arguments(root, mixture, run / f"{len(found)}", **case)).backend
        found.append({name: backend.full(name).clone() for name in backend.sizes})
    return found


def test_two_ranks_start_alike(parts, mixture, tmp_path):
    expected = on_rank(0, parts, mixture, tmp_path)
    for found in run_on_ranks(2, on_rank, tmp_path, parts, mixture, tmp_path):
        for state, right in zip(found, expected, strict=True):
            assert state.keys() == right.keys()
            assert [name for name in right if not torch.equal(state[name], right[name])] == []


def test_a_dry_run_of_parts(parts, mixture, tmp_path, capsys):
    args = arguments(parts, mixture, tmp_path, dry_run=True)
    argv = [f"--{name}={value}" for name, value in args.flat().items() if name in args.sources]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    report = opened(parts, seed=args.training.global_seed)[2]
    assert report in capsys.readouterr().out


def test_where_a_run_from_parts_starts(parts, checkpoint, mixture, tmp_path):
    args = arguments(parts, mixture, tmp_path)
    assert start(args, None) == (parts / "llm", "parts")
    assert start(args, tmp_path / "0000001") == (tmp_path / "0000001", "model")
    with_adapters = arguments(parts, mixture, tmp_path, lora_rank=2)
    assert start(with_adapters, tmp_path / "0000001") == (parts / "llm", "parts")
    resumed = arguments(parts, mixture, tmp_path, resume_from=checkpoint, resume_model_only=True)
    assert start(resumed, None) == (checkpoint, "model")


def test_a_damaged_autoencoder(parts, checkpoint, mixture, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "whole")
    args = arguments(parts, mixture, tmp_path / "run", model_path=folder)
    assert open_model(args, *start(args, None))[0].config.vae.z_channels == 4
    content = bytearray((folder / "ae.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "ae.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ae.safetensors is damaged"):
        open_model(args, *start(args, None))


def test_special_tokens_outside_of_the_vocabulary(own, mixture, tmp_path):
    qwen = Qwen2ForCausalLM(Qwen2Config(**QWEN | {"vocab_size": 260}))
    qwen.save_pretrained(own / "small")
    write_tokenizer(["Remove the noise.", "Mild noise."], own / "small")
    args = arguments(own, mixture, tmp_path, llm_path=own / "small")
    with pytest.raises(ValueError, match=r"<\|im_start\|> \(\d+\), .* vocabulary of 260"):
        build_trainer(args)
