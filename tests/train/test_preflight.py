"""Dry runs: a page whose numbers are counted here by hand, and all that is wrong in one go."""

import json
import os
import re
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from transformers import Qwen2Tokenizer

from modeling.autoencoder import AutoencoderConfig
from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import LossSet, PixelTerm, VelocityMSE
from modeling.pretrained import open_pretrained
from tests.helpers import (
    pack,
    restoration,
    run_arguments,
    tiny_config,
    tiny_model,
    write_mixture,
    write_pairs,
)
from tests.ranks import run_on_ranks
from tests.train.test_freezing import step
from train.arguments import TrainingArguments, parse_arguments
from train.backends import MOMENTS
from train.build import build_trainer, configure
from train.freezing import FreezingCheck
from train.main_sr_pixel_loss import main
from train.memory import static_memory, step_memory
from train.preflight import PACKS
from train.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny" / "checkpoint"
SMALL_PACKS = {"expected_num_tokens": 100, "max_num_tokens": 300, "max_num_tokens_per_sample": 200}
SIZES = {"image_stride": 8, "max_image_size": 24, "min_image_size": 16}
"""Of images that the shipped tiny model takes."""


@pytest.fixture
def one_size(tmp_path) -> Path:
    """A mixture whose samples all have 16 x 16 pixels and the same texts."""
    write_pairs(tmp_path / "pairs", 1)
    line = (tmp_path / "pairs" / "train.jsonl").read_text()
    (tmp_path / "pairs" / "train.jsonl").write_text(7 * line)
    return write_mixture(tmp_path / "m.yaml", tmp_path / "pairs", image_transform_args=SIZES)


@pytest.fixture
def page(capsys, monkeypatch):
    """Exit code and page of a dry run, which must change no file of the folder it is given."""
    monkeypatch.chdir(ROOT)

    def run(folder: Path, **arguments: object) -> tuple[int, str]:
        before = files(folder)
        values = {"device": "cpu", "checkpoint_dir": folder / "run"} | arguments
        with pytest.raises(SystemExit) as ended:
            main(["--dry_run", *(f"--{name}={value}" for name, value in values.items())])
        assert files(folder) == before
        return ended.value.code, re.sub(" +", " ", capsys.readouterr().out)

    return run


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}


def test_numbers_of_the_demo(page, one_size):
    code, text = page(
        one_size.parent,
        config="configs/tiny/demo.yaml",
        dataset_config_file=one_size,
        pixel_space_t_fraction=0.5,
        full_noise_fraction=0.5,
        gradient_accumulation_steps=3,
        num_replicate=2,
        num_shard=4,
    )
    assert code == 0 and "WRONG" not in text
    assert f"{one_size.parent}/run: a new run" in text
    shapes = {}
    for file in ("ema", "ae"):
        with safe_open(TINY / f"{file}.safetensors", "numpy") as opened:
            shapes |= {(file, n): opened.get_slice(n).get_shape() for n in opened.keys()}  # noqa: SIM118
    fixed = [s for (_, n), s in shapes.items() if n.endswith("pos_embed.pos_embed")]
    own = {n: prod(s) for (_, n), s in shapes.items() if not n.endswith("pos_embed.pos_embed")}
    vae = sum(prod(s) for (file, _), s in shapes.items() if file == "ae")
    llm, vit = (sum(n for k, n in own.items() if k.startswith(p)) for p in ("language_", "vit_"))
    assert len(fixed) == 2
    total = sum(prod(s) for s in shapes.values()) - sum(map(prod, fixed))
    assert f"{len(shapes)} tensors, {total:,} parameters, 100.0%" in text
    assert f"{llm:,} trained, language_model, lr 0.0003" in text
    assert f"{total - llm - vit - vae:,} trained, other, lr 0.0003" in text
    assert f"{vae:,} frozen by freeze_vae" in text and f"{vit:,} frozen by freeze_vit" in text
    assert "0.25 x ce, 1 x mse, 0.1 x ssim" in text
    assert "fsdp: 2 (replicate) x 4 (shard) = 8\n this is one process: the run needs a" in text
    assert "7 records, 100.0% of the samples: pairs" in text
    words = Qwen2Tokenizer.from_pretrained(TINY)
    prompt, answer = (len(words.encode(text)) for text in ("Remove it.", "Mild."))
    # Two latent grids of 2 x 2, one of ViT patches of 2 x 2, two texts, each with start and end.
    sample = 3 * (2 * 2 + 2) + (prompt + 2) + (answer + 2)
    samples = ceil(3200 / sample)
    tokens, all_samples = samples * sample, PACKS * samples
    assert f"tokens a pack: {tokens:.1f} ({tokens} to {tokens})" in text
    assert f"samples a pack: {samples:.1f} ({samples} to {samples})" in text
    assert f"{tokens / 3200:.1%} of expected_num_tokens, {tokens / 4096:.1%} of max" in text
    answers = all_samples * (answer + 1)
    assert f"{answers} answer tokens in {all_samples} samples, the longest of {sample}" in text
    assert "0 samples dropped" in text
    seen = re.search(rf"{all_samples} target images, (\d+) with t < 0.1 \(ssim\)", text)
    assert seen is not None and abs(int(seen[1]) / all_samples - 0.5) < 0.05
    assert f"{tokens * 8 * 3:,} tokens in 24 packs" in text
    assert f"{7 / (samples * 8 * 3):.4g} steps" in text


def test_all_that_is_wrong_is_told_together(page, tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_pairs(tmp_path / name, 2)
        with (tmp_path / name / "train.jsonl").open("a") as file:
            file.write("{}\n")
    mixture = write_mixture(tmp_path / "m.yaml", tmp_path / "a", tmp_path / "b")
    (tmp_path / "run" / "0000002").mkdir(parents=True)
    (tmp_path / "run" / "0000002" / "manifest.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    wrong = {
        "config": "configs/tiny/demo.yaml",
        "dataset_config_file": mixture,
        "auto_resume": False,
        "max_latent_size": 32,
        "num_shard": 3,
    }
    code, text = page(tmp_path, **wrong)
    assert code == 1
    told = text[text.index("WRONG") :]
    assert "num_replicate=1 x num_shard=3 is not the number of processes, 2" in told
    assert "already holds 0000002: choose another checkpoint_dir or --auto_resume True" in told
    misfit = "misshapen latent_pos_embed.pos_embed: checkpoint (256, 128), model (1024, 128)"
    assert f"{misfit} [check --max_latent_size]" in told
    for name in ("a", "b"):
        assert f"{tmp_path}/{name}/train.jsonl:3: " in told
    assert "run: refused, see below" in text and "10 packs" not in text
    code, text = page(tmp_path, **wrong | {"dataset_config_file": "nowhere.yaml"})
    assert code == 1 and "dataset_config_file=nowhere.yaml: there is no such file" in text
    monkeypatch.setenv("RANK", "1")
    assert page(tmp_path, **wrong) == (0, "")


def test_one_process_is_told_as_the_run_tells_it(page, tiny_pairs):
    given = {"config": "configs/tiny/demo.yaml", "dataset_config_file": tiny_pairs, **SMALL_PACKS}
    code, text = page(tiny_pairs.parent, **given, cpu_offload=True)
    assert code == 1 and "WRONG cpu_offload=True needs backend=fsdp in a single process" in text
    sizes = {"num_replicate": 2, "num_shard": 4, "sharding_strategy": "FULL_SHARD"}
    code, text = page(tiny_pairs.parent, **given, **sizes)
    assert code == 1 and "num_shard=4 is not the number of processes, 8, or not as shard" in text
    code, text = page(tiny_pairs.parent, **given)
    assert code == 0 and "single: 1 (replicate) x 1 (shard) = 1\n" in text
    assert "this is one process" not in text


def test_what_a_run_needs_beside_weights_and_data_is_looked_for(page, tmp_path):
    folder = tmp_path / "pairs"
    path = write_pairs(folder, 12)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[11]["output_img"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "file").write_text("")
    code, text = page(
        tmp_path,
        config="configs/tiny/demo.yaml",
        dataset_config_file=write_mixture(tmp_path / "m.yaml", folder, image_transform_args=SIZES),
        checkpoint_dir=tmp_path / "file" / "run",
        val_every=5,
        val_dataset_config_file="none.yaml",
        backend="deepspeed",
        ds_config_file="none.json",
    )
    told = text[text.index("WRONG") :]
    assert code == 1 and f"cannot write to {tmp_path}/file" in told
    assert "none.yaml: there is no such file" in told
    assert "ds_config_file=none.json: there is no such file" in told
    assert f"{path}:12: output_img must be a list of {{path}} (1 of 12 records are bad)" in told


def test_a_validation_that_could_not_begin_is_found(page, tmp_path):
    """Its images, its records, its file; and a folder of log lines that is a file."""
    folders = [tmp_path / name for name in ("pairs", "imageless", "bad")]
    for folder in folders:
        write_pairs(folder, 4)
    for image in (tmp_path / "imageless" / "images").iterdir():
        image.unlink()
    (tmp_path / "bad" / "train.jsonl").write_text("{}\n")
    sizes = {"image_transform_args": SIZES}
    mixture, imageless, bad = (write_mixture(f.with_suffix(".yaml"), f, **sizes) for f in folders)
    given = {"config": "configs/tiny/demo.yaml", "dataset_config_file": mixture, **SMALL_PACKS}
    given |= {"val_every": 5, "val_dataset_config_file": mixture}
    assert page(tmp_path, **given)[0] == 0
    for changes, message in (
        ({"val_dataset_config_file": imageless}, f"{tmp_path}/imageless/images/"),
        ({"val_dataset_config_file": bad}, f"{tmp_path}/bad/train.jsonl:1: "),
        ({"val_dataset_config_file": "/none"}, "val_dataset_config_file=/none: there is no such"),
        ({"results_dir": mixture}, f"results_dir={mixture}: cannot write to {mixture}"),
        ({"results_dir": mixture / "x"}, f"results_dir={mixture}/x: cannot write to {mixture}"),
    ):
        code, text = page(tmp_path, **given | changes)
        assert code == 1 and message in text[text.index("WRONG") :]
        assert " dataset_config_file=" not in text
    assert page(tmp_path, **given, results_dir=tmp_path / "new" / "folder")[0] == 0


def test_the_stage_of_a_ds_config_file_is_that_of_the_page(page, tiny_pairs, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    given = {"config": "configs/tiny/demo.yaml", "dataset_config_file": tiny_pairs}
    given |= {"backend": "deepspeed", **SMALL_PACKS}
    of_file = page(tmp_path, **given, ds_config_file=tmp_path / "ds.json")
    assert of_file == page(tmp_path, **given, zero_stage=3) != page(tmp_path, **given)
    assert "deepspeed, ZeRO 3: " in of_file[1]


def test_a_run_that_would_continue(page, checkpoint, mixture, tmp_path):
    """Its state is compared with what the arguments train now; large files are not hashed."""
    same = {"total_steps": 1, "freeze_vit": True, "hang_timeout": 0}
    run = run_arguments(checkpoint, mixture, tmp_path / "run", **same)
    build_trainer(run).fit()
    same = {name: run.flat()[name] for name in run.sources} | same
    code, text = page(tmp_path, **same)
    assert code == 0, text
    assert f"resumes from step 1 of {tmp_path}/run/0000001" in text
    assert "resumed with dry_run=True, saved with False" in text
    assert "sha256" not in text
    code, text = page(tmp_path, **same | {"freeze_vit": False, "lr": 0.5})
    assert code == 1 and "resumed with lr=0.5, saved with 0.001" in text
    assert "the optimizer state is not that of the trained weights: vit_model." in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.preflight.HASHED_BYTES", 10_000)
        weights = tmp_path / "run" / "0000001" / "model.safetensors"
        flipped = bytearray(weights.read_bytes())
        flipped[-1] ^= 1
        weights.write_bytes(flipped)
        code, text = page(tmp_path, **same)
        assert code == 0 and "sha256 not checked in a dry run: " in text
        assert "model.safetensors" in text
    assert page(tmp_path, **same)[0] == 1


def test_activations_and_logits_of_the_tiny_model_by_hand():
    config = tiny_config()
    batch = pack(config, restoration("a"), restoration("b", answer=None))
    model, tokens, patches = tiny_model(config), batch.num_tokens, len(batch.vit.patches)
    # 32 hidden, 48 in the MLP, 4 x 8 in queries, 2 x 8 in keys and in values.
    kept = 8 * (2 * 32 + 32 + 16) + 4 * (2 * 32 + 3 * 32 + 2 * 16 + 4 * 48)
    vit = 4 * (9 * 24 + 2 * 40)
    args = TrainingArguments()
    step = step_memory(model, args, "single", batch)
    assert step == {
        "gathered weights": 0,
        "activations": 2 * tokens * kept + 2 * patches * vit,
        "logits": 3 * 64 * (4 + 8),
    }
    args.activation_checkpointing = args.freeze_vit = True
    recomputed = step_memory(model, args, "single", batch)
    assert recomputed["activations"] == tokens * (kept + 2 * 32 * 4)
    args.bf16 = True
    half = step_memory(model, args, "fsdp", batch)
    bytes_of_one = 6 * (2 * 32 + 32 + 16) + 2 * (2 * 32 + 3 * 32 + 2 * 16 + 4 * 48)
    assert half["activations"] == tokens * (bytes_of_one + 2 * 32 * 2)
    layer = sum(p.numel() for p in model.language_model.model.layers[0].parameters())
    ends = model.language_model.model.norm.weight.numel() * 2 + 64 * 32
    others = (model.time_embedder, model.vae2llm, model.llm2vae, model.vit_model.vision_model)
    inner = sum(p.numel() for x in model.vit_model.layers() for p in x.parameters())
    kept = ends + sum(p.numel() for m in others for p in m.parameters()) - inner
    assert half["gathered weights"] == 2 * (2 * layer + kept) + (2 + 4) * layer


def test_activations_are_near_what_autograd_stores():
    """Counted by the tensors that it saves, in float32 without recomputation."""
    wide = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    deep = AutoencoderConfig(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4)
    model = tiny_model(tiny_config(wide, vae=deep))
    model.losses = LossSet((VelocityMSE(), PixelTerm(1, 1.0)), adaptive_chunk=False)
    batch = pack(model.config, *(restoration(name, size=(64, 96)) for name in "abcdefgh"))
    args = TrainingArguments(
        freeze_vit=True, pixel_loss_adaptive_chunk=False, pixel_loss_chunk_size=1
    )
    expected = step_memory(model, args, "single", batch)
    model.vit_model.requires_grad_(False)
    flow = model.flow_inputs(batch.vae)
    stored = saved_bytes(model, lambda: model.hidden_states(batch, flow))
    assert expected["activations"] == pytest.approx(stored, rel=0.2)
    latent = torch.randn(1, 4, 8, 12, requires_grad=True)
    decoded = saved_bytes(model, lambda: model.vae.decode(latent))
    assert expected["pixel-space decoder"] == pytest.approx(decoded, rel=0.2)


def saved_bytes(model: Bagel, run: Callable[[], Tensor]) -> int:
    """Of all storages that backward will read, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, UntypedStorage] = {}

    def pack_tensor(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in seen.values())


@pytest.fixture(scope="module")
def tiny_pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    write_pairs(folder / "pairs", 4)
    return write_mixture(folder / "m.yaml", folder / "pairs", image_transform_args=SIZES)


EXPERIMENTS = sorted([*ROOT.glob("configs/experiments/*.yaml"), *ROOT.glob("configs/tiny/*.yaml")])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.name)
def test_every_experiment(path, page, tiny_pairs):
    values = {"model_path": TINY, "dataset_config_file": tiny_pairs, **SMALL_PACKS}
    values |= {"max_latent_size": 16, "init_from_scratch": path.stem == "pretrain"}
    args = parse_arguments(["--config", str(path)])
    if args.training.resume_from is not None:
        values["resume_from"] = TINY
    code, text = page(tiny_pairs.parent, config=path, **values)
    assert code == 0, text
    kind = {"deepspeed": "deepspeed, ZeRO 2"}.get(args.training.backend, "single")
    assert f"{kind}: 1 (replicate) x 1 (shard) = 1" in text
    assert ("RANDOM" in text) is values["init_from_scratch"]
    assert ("ssim)" in text) is (args.training.ssim_loss_weight > 0)
    assert ("pixel)" in text) is (args.training.pixel_loss_weight > 0)


def kept_bytes(trainer: Trainer) -> dict[str, int]:
    """What this rank holds after a backward pass, by looking at the tensors."""
    backend, batch = trainer.backend, next(iter(trainer.loader))
    terms = backend.forward(batch)
    backend.backward(sum(term.sum for term in terms.values()), last=True)
    own = [p for n, p in backend.model.named_parameters() if not n.startswith("vae.")]
    states = backend.optimizer.state.values()
    grads = [local(p.grad) for p in own if p.requires_grad]
    return {
        "weights": sum(local(p).nbytes for p in own),
        "gradients": sum(grad.nbytes for grad in grads),
        "moments": sum(state[kind].nbytes for state in states for kind in MOMENTS),
        "EMA": sum(average.nbytes for average in trainer.ema.averages),
        "autoencoder": sum(p.nbytes for p in backend.model.vae.parameters()),
        "buffers": sum(buffer.nbytes for buffer in backend.model.buffers()),
    }


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zero_bytes(trainer: Trainer) -> dict[str, int]:
    states = trainer.backend.optimizer.state.values()
    return {
        "masters": sum(master.nbytes for master in trainer.backend.masters),
        "moments": sum(state[kind].nbytes for state in states for kind in MOMENTS),
        "EMA": sum(average.nbytes for average in trainer.ema.averages),
    }


SHARDED = (
    {"sharding_strategy": "FULL_SHARD", "freeze_vit": True},
    {"num_replicate": 2, "num_shard": 1},
    {"backend": "deepspeed", "zero_stage": 2, "bf16": True},
    {"backend": "deepspeed", "zero_stage": 3},
)


def on_a_rank(rank: int, checkpoint: Path, mixture: Path, folder: Path) -> list[dict[str, int]]:
    found = []
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    for i, changes in enumerate(SHARDED):
        trainer = build_trainer(run_arguments(checkpoint, mixture, folder / str(i), **changes))
        count = zero_bytes if trainer.args.training.backend == "deepspeed" else kept_bytes
        found.append(count(trainer))
        check = FreezingCheck(trainer.backend)
        step(trainer, folder / str(i))
        check.after_step()
        trainer.model.vae.decoder.conv_in.bias.data += 1e-3
        check.done, check.updates = False, -1.0
        with pytest.raises(ValueError, match=r"frozen, and moved: vae\.decoder\.conv_in\.bias$"):
            check.after_step()
    return found


def test_kept_memory_is_that_of_built_trainers(checkpoint, mixture, tmp_path):
    args = run_arguments(checkpoint, mixture, tmp_path / "run", freeze_vit=True)
    model, *_ = open_pretrained(checkpoint, "model")
    configure(model, args)
    expected = static_memory(model, args.training, "single", 1)
    assert kept_bytes(build_trainer(args)) == expected
    ranks = run_on_ranks(2, on_a_rank, tmp_path / "ranks", checkpoint, mixture, tmp_path)
    for changes, *found in zip(SHARDED, *ranks, strict=True):
        args = run_arguments(checkpoint, mixture, tmp_path / "run", **changes)
        model, *_ = open_pretrained(checkpoint, "model")
        configure(model, args)
        shard, kind = args.training.num_shard or 2, args.training.backend
        expected = static_memory(model, args.training, kind, shard)
        if kind == "deepspeed":
            # ZeRO fills its partitions up to a multiple of a few numbers.
            assert found[0] == pytest.approx({n: expected[n] for n in found[0]}, rel=1e-3)
        else:
            assert found[0] == expected
            assert all(found[1][name] <= size for name, size in expected.items())
