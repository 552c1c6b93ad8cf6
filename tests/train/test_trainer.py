"""Whole runs on a tiny model: determinism, exact resumption, and stops that leave no trace."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling.bagel.losses import LossSet, PixelTerm, SSIMTerm, StepOutputs, VelocityMSE
from modeling.batch import PackedBatch
from modeling.pretrained import CheckpointError, load_pretrained, save_pretrained
from tests.helpers import (
    pack,
    restoration,
    run_arguments,
    tiny_config,
    tiny_model,
    write_mixture,
    write_pairs,
)
from train.build import build_trainer, open_model, resume_folder, start
from train.checkpoint import step_folders
from train.guard import NonFiniteError
from train.main_sr_pixel_loss import main
from train.metrics import Metrics
from train.trainer import Trainer

PIXEL_SPACE = {
    "pixel_loss_weight": 0.5,
    "pixel_loss_max_t": 1.0,
    "ssim_loss_weight": 0.5,
    "ssim_loss_max_t": 1.0,
}
MEASURED = ("tokens_per_s", "tokens_per_s_per_gpu", "step_s", "data_wait_share", "mfu", "memory_gb")
"""Names of a log line that depend on the machine, not on the run."""
SAVED = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "trainer_state.json")


def hashes(folder: Path) -> dict[str, str]:
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in SAVED}


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


@pytest.fixture(scope="module")
def finished(checkpoint, mixture, tmp_path_factory) -> Path:
    """Four uninterrupted steps with every loss term, saved after steps 2 and 4."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    build_trainer(run_arguments(checkpoint, mixture, run, save_every=2, **PIXEL_SPACE)).fit()
    return run


def test_a_run_leaves_what_it_promises(finished):
    assert [f.name for f in step_folders(finished)] == ["0000002", "0000004"]
    lines = logged(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        assert line["mse_weighted"] == pytest.approx(line["mse"], rel=1e-5)
        assert line["pixel_weighted"] == pytest.approx(0.5 * line["pixel"], rel=1e-5)
        assert 0 < line["tokens"] <= 300
    model, report = load_pretrained(finished / "0000004", "ema")
    assert report.share == 1.0 and model.config.timestep_shift == 1.5
    arguments = json.loads((finished / "0000004" / "training_args.json").read_text())
    assert arguments["arguments"]["pixel_loss_weight"] == 0.5


def test_two_runs_are_the_same_to_the_bit(finished, checkpoint, mixture, tmp_path):
    build_trainer(run_arguments(checkpoint, mixture, tmp_path, **PIXEL_SPACE)).fit()
    assert hashes(tmp_path / "0000004") == hashes(finished / "0000004")
    assert logged(tmp_path) == logged(finished)


def test_stopping_and_resuming_changes_no_bit(finished, checkpoint, mixture, tmp_path, capsys):
    shutil.copytree(finished / "0000002", tmp_path / "0000002")
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **PIXEL_SPACE))
    assert (
        trainer.step == 2
        and f"resumed from {tmp_path}/0000002 at step 2" in capsys.readouterr().out
    )
    trainer.fit()
    assert hashes(tmp_path / "0000004") == hashes(finished / "0000004")
    assert logged(tmp_path) == logged(finished)[2:]


def test_resuming_from_a_named_folder(finished, checkpoint, mixture, tmp_path):
    common = {"resume_from": finished / "0000002", **PIXEL_SPACE}
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **common))
    assert trainer.step == 2
    trainer.fit()
    assert hashes(tmp_path / "0000004") == hashes(finished / "0000004")


def test_the_ema_of_a_run_is_its_formula(checkpoint, mixture, tmp_path):
    build_trainer(run_arguments(checkpoint, mixture, tmp_path, total_steps=2, save_every=1)).fit()
    folders = checkpoint, tmp_path / "0000001", tmp_path / "0000002"
    w0, w1, w2 = (load_pretrained(folder, "model")[0].state_dict() for folder in folders)
    for name, average in load_pretrained(folders[-1], "ema")[0].state_dict().items():
        expected = 0.9 * (0.9 * w0[name] + 0.1 * w1[name]) + 0.1 * w2[name]
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-6)
    assert (w2["llm2vae.weight"] - w0["llm2vae.weight"]).abs().mean() > 5e-4


def test_which_folder_a_run_continues_from(finished, checkpoint, mixture, tmp_path):
    def folder(run: Path, **changes: object) -> Path | None:
        return resume_folder(run_arguments(checkpoint, mixture, run, **changes).training)

    assert folder(finished) == finished / "0000004"
    assert folder(tmp_path / "new") is None
    elsewhere = finished / "0000002"
    assert folder(tmp_path / "new", resume_from=elsewhere) == elsewhere
    assert folder(tmp_path / "new", resume_from=elsewhere, resume_model_only=True) is None
    with pytest.raises(ValueError, match="already holds 0000004"):
        folder(finished, auto_resume=False)
    # A requeued run goes on with its own state, not with that of its start.
    own = shutil.copytree(finished / "0000002", tmp_path / "own" / "0000002").parent
    assert folder(own, resume_from=finished / "0000004") == own / "0000002"
    with pytest.raises(ValueError, match="contradict each other: drop resume_from"):
        folder(finished, resume_from=finished / "0000002")
    with pytest.raises(ValueError, match="is no step folder of a run; .* --resume_model_only True"):
        folder(tmp_path / "new", resume_from=checkpoint)


def test_a_damaged_checkpoint_is_not_resumed(finished, checkpoint, mixture, tmp_path):
    for name in ("optimizer.safetensors", "trainer_state.json"):
        run = tmp_path / name
        shutil.copytree(finished / "0000002", run / "0000002")
        content = bytearray((run / "0000002" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (run / "0000002" / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is damaged: sha256"):
            build_trainer(run_arguments(checkpoint, mixture, run))


def test_an_incomplete_folder_is_not_resumed(finished, checkpoint, mixture, tmp_path):
    folder = shutil.copytree(finished / "0000002", tmp_path / "x" / "0000002")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json"):
        build_trainer(run_arguments(checkpoint, mixture, tmp_path, resume_from=folder))


def test_resuming_with_other_trained_weights_is_refused(finished, checkpoint, mixture, tmp_path):
    """Their optimizer state is not in the folder, or would be dropped without a word."""
    shutil.copytree(finished / "0000002", tmp_path / "0000002")
    with pytest.raises(ValueError, match=r"vit_model\..*resume_model_optimizer False"):
        build_trainer(run_arguments(checkpoint, mixture, tmp_path, freeze_vit=True))
    settings = {"freeze_vit": True, "resume_model_optimizer": False}
    elsewhere = {"resume_from": tmp_path / "0000002", **settings}
    (tmp_path / "0000002" / "optimizer.safetensors").unlink()  # is not read
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path / "new", **elsewhere))
    assert trainer.step == 2 and trainer.backend.steps() == 0


@pytest.mark.parametrize("flag", ["resume_model_optimizer=False", "resume_model_only=True"])
def test_a_run_goes_on_with_its_optimizer_however_it_was_started(
    finished, checkpoint, mixture, tmp_path, flag
):
    """The launchers say once and for all from what a run starts; queued again it has to go on."""
    shutil.copytree(finished / "0000002", tmp_path / "0000002")
    name, value = flag.split("=")
    args = run_arguments(checkpoint, mixture, tmp_path, **PIXEL_SPACE, **{name: value})
    build_trainer(args).fit()
    assert hashes(tmp_path / "0000004") == hashes(finished / "0000004")


@pytest.mark.parametrize("args", [{"visual_und": False}, {"vit_cond_dropout_prob": 1}])
def test_weights_that_have_had_no_gradient_yet_do_not_hinder(checkpoint, mixture, tmp_path, args):
    """The head without answers, the vision side without its images."""
    settings = {"total_steps": 2, "save_every": 1} | args
    build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings)).fit()
    expected = hashes(tmp_path / "0000002")
    shutil.rmtree(tmp_path / "0000002")
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings))
    assert trainer.step == 1
    trainer.fit()
    assert hashes(tmp_path / "0000002") == expected


def test_tied_embeddings_resume(mixture, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "tied")
    model = tiny_model(tiny_config({"vocab_size": 512, "tie_word_embeddings": True}))
    save_pretrained(model, folder, {"model": model.state_dict()})
    args = run_arguments(folder, mixture, tmp_path / "run", total_steps=2, save_every=1)
    build_trainer(args).fit()
    expected = hashes(tmp_path / "run" / "0000002")
    shutil.rmtree(tmp_path / "run" / "0000002")
    trainer = build_trainer(args)
    assert trainer.step == 1
    trainer.fit()
    assert hashes(tmp_path / "run" / "0000002") == expected


def spoiled(batch: PackedBatch) -> PackedBatch:
    """One clean image holds a NaN."""
    images = [image.clone() for image in batch.vae.images]
    images[-1][0, 0, 0] = torch.nan
    return dataclasses.replace(batch, vae=dataclasses.replace(batch.vae, images=tuple(images)))


def assert_untouched(trainer: Trainer, checkpoint: Path) -> None:
    start = load_pretrained(checkpoint, "model")[0].state_dict()
    assert all(torch.equal(v, start[k]) for k, v in trainer.model.state_dict().items())
    with trainer.ema.swapped():
        assert all(torch.equal(v, start[k]) for k, v in trainer.model.state_dict().items())
    for state in trainer.backend.optimizer.state.values():
        assert not any(value.any() for value in state.values())
    assert trainer.backend.steps() == 0


def test_steps_that_are_not_finite_move_nothing_and_end_the_run(checkpoint, mixture, tmp_path):
    args = run_arguments(checkpoint, mixture, tmp_path, max_nonfinite_steps=2)
    trainer = build_trainer(args)
    batch = spoiled(trainer.loader.next_batch())
    with Metrics(tmp_path / "m.jsonl", 0, 1) as metrics:
        trainer.train_step(iter([batch]), metrics)
        assert trainer.guard.end_window() == {"nonfinite_steps": 1, "spikes": 0}
        trainer.step = 1
        trainer.train_step(iter([batch]), metrics)
    assert_untouched(trainer, checkpoint)
    with pytest.raises(NonFiniteError, match="max_nonfinite_steps=2 in a row") as caught:
        trainer.guard.end_window()
    said, guilty = str(caught.value), batch.vae.names[-1]
    assert re.search(rf"step 2, rank 0: gradient norm, (ce, )?mse, mse of image {guilty}", said)


class Unbounded(VelocityMSE):
    """Infinite, with a gradient of zero."""

    def total(self, out: StepOutputs) -> Tensor:
        return out.velocity_pred.detach().sum() * math.inf + super().total(out)


def test_an_infinite_loss_with_a_finite_gradient_stops_too(checkpoint, mixture, tmp_path):
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path))
    trainer.model.losses = LossSet((Unbounded(),))
    with Metrics(tmp_path / "m.jsonl", 0, 1) as metrics:
        trainer.train_step(iter(trainer.loader), metrics)
    assert trainer.guard.end_window()["nonfinite_steps"] == 1
    assert_untouched(trainer, checkpoint)


def test_a_batch_without_any_term_is_an_error_that_says_so(checkpoint, tmp_path):
    """Understanding alone, and no record has an answer."""
    write_pairs(tmp_path / "pairs", 2, answers=False)
    mixture = write_mixture(tmp_path / "mixture.yaml", tmp_path / "pairs")
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path / "r", visual_gen=False))
    with pytest.raises(ValueError, match=r"nothing to train on.*\bce\b"):
        trainer.fit()


def fixed(batch: PackedBatch) -> Iterator[PackedBatch]:
    while True:
        yield batch


def test_losses_are_divided_by_their_counts(checkpoint, mixture, tmp_path):
    """Also a count below 1, which weights of answers can have."""
    args = run_arguments(checkpoint, mixture, tmp_path, ce_weight=0.25, lr=1e-9)
    trainer = build_trainer(args)
    batch = pack(trainer.model.config, restoration("a"), times={"a": 0.5})
    labels = dataclasses.replace(
        batch.labels, weights=0.125 * batch.labels.weights, total_weight=0.125 * 3
    )
    found = []
    for case in (batch, dataclasses.replace(batch, labels=labels)):
        with Metrics(tmp_path / "m.jsonl", 0, 1) as metrics:
            trainer.train_step(fixed(case), metrics)
            found.append(metrics.log(1))
    terms = trainer.model(batch)
    ce, mse = ((terms[n].sum / terms[n].count).item() for n in ("ce", "mse"))
    for line in found:
        assert line["ce"] == pytest.approx(ce, rel=1e-4)
        assert line["ce_weighted"] == pytest.approx(0.25 * ce, rel=1e-4)
        assert line["mse_weighted"] == pytest.approx(mse, rel=1e-4)
    assert found[0]["total_norm"] == pytest.approx(found[1]["total_norm"], rel=1e-3)


def test_gradients_are_clipped_to_their_norm(checkpoint, mixture, tmp_path):
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, max_grad_norm=0.01))
    with Metrics(tmp_path / "m.jsonl", 0, 1) as metrics:
        trainer.train_step(iter(trainer.loader), metrics)
        line = metrics.log(1)
    assert line["total_norm"] > 0.1
    # After one step AdamW's first moment is (1 - beta1) times the gradient.
    moments = [state["exp_avg"].flatten() for state in trainer.backend.optimizer.state.values()]
    assert torch.cat(moments).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_weights_that_look_untrained_are_shouted_about(checkpoint, mixture, tmp_path, capsys):
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, total_steps=1))
    with torch.no_grad():
        trainer.model.language_model.lm_head.weight.zero_()
    trainer.fit()
    out = " ".join(capsys.readouterr().out.split())
    assert "first cross-entropy is 6.24; random weights give 6.24" in out
    assert "THE WEIGHTS LOOK UNTRAINED" in out


def test_weights_are_never_invented(checkpoint, mixture, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "c")
    (folder / "model.safetensors").unlink()
    args = run_arguments(folder, mixture, tmp_path / "run")
    told = r"model.safetensors not found; there is \['ae.*training reads model.safetensors, or by "
    with pytest.raises(CheckpointError, match=told):
        build_trainer(args)
    assert build_trainer(run_arguments(folder, mixture, tmp_path, finetune_from_ema=True))
    (folder / "ema.safetensors").unlink()
    random = run_arguments(folder, mixture, tmp_path, init_from_scratch=True)
    model, _, report = open_model(random, folder, "random")
    assert report == f"RANDOM weights in the sizes of {folder} (init_from_scratch)"
    assert torch.count_nonzero(build_trainer(random).model.llm2vae.weight) == 0
    step_folder = shutil.copytree(checkpoint, tmp_path / "run2" / "0000002")
    (step_folder / "trainer_state.json").write_text("{}")
    anew = run_arguments(step_folder, mixture, tmp_path, init_from_scratch=True)
    assert start(anew, None) == (step_folder, "random")
    assert torch.count_nonzero(build_trainer(anew).model.llm2vae.weight) == 0
    args.model.model_path = None
    with pytest.raises(ValueError, match="--model_path is needed.*init_from_scratch"):
        build_trainer(args)
    args.model.model_path, args.data.dataset_config_file = str(checkpoint), None
    with pytest.raises(ValueError, match="--dataset_config_file is needed"):
        build_trainer(args)


def test_a_size_that_contradicts_the_checkpoint(checkpoint, mixture, tmp_path):
    args = run_arguments(checkpoint, mixture, tmp_path, llm_qk_norm=False)
    with pytest.raises(CheckpointError, match="--llm_qk_norm"):
        build_trainer(args)
    args = run_arguments(checkpoint, mixture, tmp_path, timestep_shift=4.0, vit_select_layer=-2)
    assert build_trainer(args).model.config.timestep_shift == 4.0


def test_the_entry_point(checkpoint, mixture, tmp_path, capsys):
    args = run_arguments(checkpoint, mixture, tmp_path / "run", total_steps=1)
    main([f"--{name}={value}" for name, value in args.flat().items() if name in args.sources])
    assert [f.name for f in step_folders(tmp_path / "run")] == ["0000001"]
    saved = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert saved["sources"]["lr"] == "command line" and saved["arguments"] == args.flat()
    out = capsys.readouterr().out
    assert "loaded MODEL weights from" in out and "total_steps" in out


def test_telemetry_of_a_step(checkpoint, mixture, tmp_path, capsys, monkeypatch):
    """Norm and largest element of each weighted term's gradient at the velocity, by autograd."""
    monkeypatch.setenv("SSIM_LOSS_DEBUG", "1")
    settings = {"mse_weight": 2.0, "ssim_grad_clamp": 0.5, "pixel_space_max_ratio": 1e-6}
    args = run_arguments(checkpoint, mixture, tmp_path, **PIXEL_SPACE, **settings)
    trainer = build_trainer(args)
    times = {"a": 0.1, "b": 0.5, "c": 1.0}
    batch = pack(trainer.model.config, *(restoration(n) for n in times), times=times)
    out = trainer.model.step_outputs(batch)
    velocity = out.velocity_pred.detach().requires_grad_()
    terms = trainer.model.losses(dataclasses.replace(out, velocity_pred=velocity))
    with Metrics(tmp_path / "m.jsonl", 0, 1) as metrics:
        trainer.train_step(iter([batch]), metrics)
        line = metrics.log(1)
    trainer.telemetry.end_window(line)
    norms = {}
    for name, weight in {"mse": 2.0, "pixel": 0.5, "ssim": 0.5}.items():
        total = weight * terms[name].sum / terms[name].count
        (gradient,) = torch.autograd.grad(total, velocity, retain_graph=True)
        norms[name] = gradient.norm().item()
        assert line[f"{name}_grad_norm"] == pytest.approx(norms[name], rel=1e-4)
        assert line[f"{name}_grad_max"] == pytest.approx(gradient.abs().max().item(), rel=1e-4)
    assert line["ssim_grad_ratio"] == pytest.approx(norms["ssim"] / norms["mse"], rel=1e-4)
    # t = 1 is outside of both gates.
    assert (line["ssim_images"], line["ssim_share"]) == (2, pytest.approx(2 / 3))
    printed = capsys.readouterr().out.splitlines()
    shares = [image.clamped_share.item() for image in terms["ssim"].images]
    assert line["ssim_clamped"] == pytest.approx(sum(shares) / 2) and line["ssim_clamped"] > 0
    lines = [text for text in printed if text.startswith("SSIM_LOSS_DEBUG")]
    assert len(lines) == 2 and not any("PIXEL_LOSS_DEBUG" in text for text in printed)
    for text, image in zip(lines, terms["ssim"].images, strict=True):
        t, ssim = image.image.t, 1 - image.loss.item()
        start = f"SSIM_LOSS_DEBUG step 1 rank 0 {image.image.name} 16x24 t {t:.4f} gate {1 - t:.4f}"
        assert text.startswith(f"{start} ssim {ssim:.6f} grad_norm ")
        assert float(text.split("clamped ")[1].rstrip("%")) > 0
    warnings = [text for text in printed if "times that of mse" in text]
    assert [w.split()[2] for w in warnings] == ["pixel", "ssim"]


def test_a_term_that_sees_no_image_is_warned_of(checkpoint, mixture, tmp_path, capsys):
    settings = {"ssim_loss_weight": 0.1, "ssim_loss_max_t": 0.1, "pixel_space_unseen_steps": 2}
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings))
    late, early = (
        pack(trainer.model.config, restoration("a"), times={"a": t}) for t in (0.9, 0.05)
    )
    shown = []
    for batch in (late, late, late, early, late, late):
        with Metrics(tmp_path / "m.jsonl", 0, 1) as metrics:
            trainer.train_step(iter([batch]), metrics)
            shown.append("ssim_grad_ratio" in metrics.log(1))
    printed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WARNING: ssim")]
    assert len(printed) == 2 and "has seen no image for 2 steps" in printed[0]
    assert shown == [False, False, False, True, False, False]


def test_looking_changes_nothing_and_a_stop_inside_a_log_window_neither(
    checkpoint, mixture, tmp_path, monkeypatch
):
    """Two terms, every image gated: the weights after 4 steps, to the bit."""

    def run(name: str, *stops: int, **settings: object) -> dict[str, str]:
        for stop in stops:
            values = {"total_steps": stop, "save_every": 4, **PIXEL_SPACE, **settings}
            trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path / name, **values))
            trainer.fit()
        return hashes(tmp_path / name / "0000004")

    expected = run("plain", 4, log_every=4)
    assert run("stopped", 3, 4, log_every=4) == expected
    assert run("looked_at", 4, log_every=1) == expected
    monkeypatch.setenv("SSIM_LOSS_DEBUG", "1")
    assert run("debugged", 4, log_every=4) == expected


def test_the_unseen_steps_of_a_term_are_resumed(checkpoint, mixture, tmp_path):
    settings = {"ssim_loss_weight": 0.1, "ssim_loss_max_t": 1e-6, "total_steps": 3}
    build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings)).fit()
    resumed = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings))
    assert resumed.telemetry.steps_without == {"ssim": 3}


def test_every_argument_of_the_losses_arrives(checkpoint, mixture, tmp_path):
    settings = {
        "pixel_loss_weight": 1.0,
        "pixel_loss_type": "l2",
        "pixel_loss_max_t": 0.25,
        "ssim_loss_weight": 2.0,
        "ssim_loss_max_t": 0.15,
        "ssim_window_size": 7,
        "ssim_grad_scale": 0.5,
        "ssim_grad_clamp": 3.0,
        "ssim_compile": True,
        "pixel_loss_chunk_size": 3,
        "pixel_loss_adaptive_chunk": False,
        "pixel_space_balance": 0.2,
        "pixel_space_t_fraction": 0.4,
        "vae_checkpoint_pixels": 77,
        "pixel_space_unseen_steps": 5,
        "pixel_space_max_ratio": 6.0,
    }
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **settings))
    losses, packer = trainer.model.losses, trainer.loader.packer_config
    assert losses.pixel_terms == [PixelTerm(2, 0.25), SSIMTerm(0.15, 7, 0.5, 3.0, True)]
    assert trainer.weights == {"ce": 1.0, "mse": 1.0, "pixel": 1.0, "ssim": 2.0}
    space = losses.pixel_space
    assert (space.chunk_size, space.adaptive_chunk, space.balance) == (3, False, 0.2)
    assert trainer.model.vae.decoder.checkpoint_pixels == 77
    assert (packer.low_t_fraction, packer.low_t_max) == (0.4, 0.25)
    assert (trainer.telemetry.unseen_steps, trainer.telemetry.most_ratio) == (5, 6.0)


def test_autocast_changes_no_pixel_space_loss(checkpoint, mixture, tmp_path):
    """From the same prediction: decoder and SSIM stay in float32 under autocast."""
    trainer = build_trainer(run_arguments(checkpoint, mixture, tmp_path, **PIXEL_SPACE))
    batch = pack(trainer.model.config, restoration("a"), times={"a": 0.1})
    found = []
    for enabled in (False, True):
        out = trainer.model.step_outputs(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = trainer.model.losses(out)
        found.append([terms[name].sum.item() for name in ("mse", "pixel", "ssim")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_two_terms_are_looked_at_once_in_a_log_window(checkpoint, mixture, tmp_path):
    """Each look costs a backward through the decoder; a single term's is free."""
    both = {**PIXEL_SPACE, "log_every": 3}
    for settings, expected in ((both, [1, 0, 0, 1]), ({"ssim_loss_weight": 1.0}, [1] * 4)):
        args = run_arguments(checkpoint, mixture, tmp_path / str(len(settings)), **settings)
        trainer = build_trainer(args)
        batch = pack(trainer.model.config, restoration("a"), times={"a": 0.05})
        looked = []
        for step in range(4):
            counts = trainer.global_counts([batch])
            looked.append(trainer.telemetry.begin_step(counts, dict.fromkeys(counts, 1.0)))
            if step == 2:
                trainer.telemetry.end_window({})
        assert looked == [bool(n) for n in expected]


def test_errors_of_a_run_are_one_line(checkpoint, mixture, tmp_path, monkeypatch):
    """Also those that show in the middle of it."""
    args = run_arguments(checkpoint, mixture, tmp_path / "run")
    words = [f"--{name}={value}" for name, value in args.flat().items() if name in args.sources]

    def failing(trainer: Trainer) -> None:
        raise NonFiniteError("step 3: nan")

    monkeypatch.setattr(Trainer, "fit", failing)
    with pytest.raises(SystemExit, match=r"^error: step 3: nan$"):
        main(words)
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(SystemExit, match=r"^error: .*bad.yaml: no YAML"):
        main([*words, f"--config={tmp_path}/bad.yaml"])
    with pytest.raises(SystemExit, match="attention_backend='foo' is neither sdpa nor flex"):
        main([*words, "--attention_backend=foo"])


def test_arguments_that_changed_since_a_checkpoint_are_told(
    finished, checkpoint, mixture, tmp_path, capsys
):
    common = {"resume_from": finished / "0000002", **PIXEL_SPACE}
    build_trainer(run_arguments(checkpoint, mixture, tmp_path, lr=0.5, num_workers=3, **common))
    told = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WARNING: resumed")]
    assert "WARNING: resumed with lr=0.5, saved with 0.001" in told
    assert "WARNING: resumed with num_workers=3, saved with 0" in told
    args = run_arguments(checkpoint, mixture, tmp_path, data_seed=7, **common)
    with pytest.raises(ValueError, match="data_seed: 42 -> 7. Set them back, or"):
        build_trainer(args)
