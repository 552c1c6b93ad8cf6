"""Arguments -> objects, in one visible order."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.config import load_mixture
from data.loader import LoaderConfig, PackedLoader
from data.packer import PackerConfig
from data.tokenizer import SPECIAL, Tokenizer
from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import CrossEntropy, LossSet, PixelTerm, SSIMTerm, Term, VelocityMSE
from modeling.parts import open_parts
from modeling.pretrained import (
    MANIFEST,
    SETTINGS,
    VAE_FILE,
    LoadReport,
    Weights,
    load_architecture,
    open_pretrained,
    read_json,
    weight_files,
)

from .adapters import BASE, add_adapters, initial_adapters, require_base
from .arguments import RunArguments, TrainingArguments
from .backends import make_backend
from .checkpoint import load_state, newest_good, step_folders, takes_optimizer, verify
from .distributed import all_reduce, local_device, rank, world_size
from .ema import EMA
from .freezing import parameter_lines
from .guard import Guard
from .optim import apply_freeze_plan
from .telemetry import Telemetry
from .trainer import Trainer
from .validation import Validation, first_pairs, metric_names

Start = Weights | Literal["parts", "random"]
Check = Callable[..., None]
"""As `checkpoint.verify`."""


def build_trainer(args: RunArguments) -> Trainer:
    """The run, resumed where it stopped if it has a checkpoint and `auto_resume` is on."""
    training = args.training
    device = local_device(training.device)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    folder = resume_folder(training)
    source, weights = start(args, folder)
    # A folder that is resumed has been checked, every file of it.
    check = verify if source != folder else lambda *_: None
    model, tensors, report = open_model(args, source, weights, check)
    if rank() == 0:
        print(report, flush=True)
    weights_of_terms = configure(model, args)
    if args.model.lora_rank > 0:
        if folder is not None:
            require_base(folder, tensors, model, args.model)
        tensors = adapted(model, tensors) | initial_adapters(model, training.global_seed)
    if training.print_param_details and rank() == 0:
        print("\n".join(parameter_lines(model, args)), flush=True)
    backend = make_backend(model, tensors, training, device)
    trainer = Trainer(
        args=args,
        source=source,
        start=weights,
        backend=backend,
        loader=build_loader(args, model, source),
        ema=EMA(backend.masters, training.ema, backend.refresh),
        weights=weights_of_terms,
        telemetry=Telemetry(
            [term.name for term in model.losses.pixel_terms],
            training.pixel_space_unseen_steps,
            training.pixel_space_max_ratio,
        ),
        guard=Guard(
            training.max_nonfinite_steps, training.spike_sigma, training.spike_warmup_steps, device
        ),
    )
    if training.enable_validation and training.val_every:
        trainer.validation = build_validation(trainer)
    if folder is not None:
        load_state(folder, trainer)
        if rank() == 0:
            print(f"resumed from {folder} at step {trainer.step}", flush=True)
    return trainer


def configure(model: Bagel, args: RunArguments) -> dict[str, float]:
    """Gives a model on the meta device its adapters, freeze plan and losses.

    Returns the weight of every loss term. Raises ValueError when nothing is left to train.
    """
    training, lora = args.training, args.model.lora_rank > 0
    if model.config.vae is None:
        raise ValueError(f"--model_path={args.model.model_path}: {VAE_FILE} is needed to train")
    if lora:
        add_adapters(model, args.model)
    apply_freeze_plan(model, training, lora)
    terms = build_terms(training)
    model.losses = LossSet(
        tuple(term for term, _ in terms),
        chunk_size=training.pixel_loss_chunk_size,
        adaptive_chunk=training.pixel_loss_adaptive_chunk,
        balance=training.pixel_space_balance,
        all_reduce=all_reduce,
    )
    if model.losses.needs_image:
        model.vae.decoder.checkpoint_pixels = training.vae_checkpoint_pixels
    return {term.name: weight for term, weight in terms}


def resume_folder(args: TrainingArguments, check: Check = verify) -> Path | None:
    """The step folder whose state the run continues, its hashes checked by `check`.

    With `auto_resume` that is the newest good one of the run; else `resume_from`, unless that gives
    weights only. Raises ValueError when the two contradict each other, or the run would write into
    the folder of another one.
    """
    run = Path(args.checkpoint_dir)
    folders = step_folders(run)
    if folders and not args.auto_resume:
        raise ValueError(
            f"{run} already holds {folders[-1].name}: "
            "choose another checkpoint_dir or --auto_resume True"
        )
    if folders:
        wanted = args.resume_from and Path(args.resume_from).resolve()
        if wanted and wanted.parent == run.resolve() and wanted != folders[-1].resolve():
            raise ValueError(
                f"resume_from={args.resume_from} and auto_resume with the newer {folders[-1]} "
                "contradict each other: drop resume_from, or move the newer step folders away"
            )
        return newest_good(run, check)
    if args.resume_from is None or args.resume_model_only:
        return None
    folder = Path(args.resume_from)
    names = read_json(folder / MANIFEST)
    if names and "trainer_state.json" not in names:
        raise ValueError(
            f"resume_from={folder} is no step folder of a run; to start from its weights add "
            "--resume_model_only True"
        )
    check(folder, [n for n in names if takes_optimizer(folder, args) or "optimizer" not in n])
    return folder


def start(args: RunArguments, folder: Path | None) -> tuple[Path, Start]:
    """Where tokenizer and weights come from, and which; under adapters, those of their base, which
    the run began with."""
    training, model_path = args.training, args.model.model_path
    if folder is not None and not args.model.lora_rank:
        return folder, "model"
    if folder is not None:
        base, weights = read_json(folder / "trainer_state.json").get("base", ("", ""))
        if weights in ("ema", "model") and Path(base).is_dir():
            return Path(base), weights
        if rank() == 0:
            print(f"WARNING: the base of {folder}'s adapters is not in {base}/", flush=True)
    if training.resume_from is not None and training.resume_model_only:
        model_path = training.resume_from
    elif not training.finetune_from_hf:
        return Path(str(args.model.llm_path)), "parts"
    if model_path is None:
        raise ValueError(
            "--model_path is needed: a checkpoint folder. Random weights too take configs, "
            "tokenizer and autoencoder from it (--init_from_scratch True)"
        )
    if training.init_from_scratch:
        return Path(model_path), "random"
    return Path(model_path), "ema" if training.finetune_from_ema else "model"


def open_model(
    args: RunArguments,
    source: Path,
    weights: Start,
    check: Check = verify,
    headers_only: bool = False,
) -> tuple[Bagel, dict[str, Tensor], LoadReport | str]:
    """The model on the meta device, and the tensors that fill it; random only when asked for."""
    # Every setting of the model has an argument of its name; None keeps the checkpoint's value.
    values = args.flat() | {"qk_norm": args.model.llm_qk_norm}
    overrides = {name: values[name] for name in SETTINGS if values[name] is not None}
    if weights == "random":
        torch.manual_seed(args.training.global_seed)
        model = load_architecture(source, overrides)
        model.init_weights(args.training.copy_init_moe)
        report = f"RANDOM weights in the sizes of {source} (init_from_scratch)"
        tensors = model.state_dict()
        return model.to("meta"), tensors, report
    if weights == "parts":
        seed, copy = args.training.global_seed, args.training.copy_init_moe
        vae, vit = Path(str(args.model.model_path)), Path(str(args.model.vit_path))
        if (vae / MANIFEST).exists():
            check(vae, [VAE_FILE, *(p.name for p in vae.glob("vae_config.json"))])
        return open_parts(source, vit, vae, overrides, seed, copy, headers_only)
    files = weight_files(source, weights)
    if (source / MANIFEST).exists():
        check(source, [p.name for p in (*files, source / VAE_FILE, *source.glob("*_config.json"))])
    return open_pretrained(
        source, weights, overrides=overrides, verify=False, headers_only=headers_only
    )


def adapted(model: Bagel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that they have in a model with adapters."""
    plain = {name: name.replace(BASE, "") for name in model.state_dict()}
    return {name: tensors[known] for name, known in plain.items() if known in tensors}


def build_terms(args: TrainingArguments) -> list[tuple[Term, float]]:
    """Loss terms with a weight above 0. One rule: a pixel-space term needs the VAE decoder."""
    power = 1 if args.pixel_loss_type == "l1" else 2
    terms: list[tuple[Term, float]] = [
        (CrossEntropy(), args.ce_weight if args.visual_und else 0.0),
        (VelocityMSE(), args.mse_weight if args.visual_gen else 0.0),
        (PixelTerm(power, args.pixel_loss_max_t), args.pixel_loss_weight),
        (
            SSIMTerm(
                args.ssim_loss_max_t,
                args.ssim_window_size,
                args.ssim_grad_scale,
                args.ssim_grad_clamp,
                args.ssim_compile,
            ),
            args.ssim_loss_weight,
        ),
    ]
    active = [(term, weight) for term, weight in terms if weight > 0]
    if not active:
        raise ValueError("every loss weight is 0: there is nothing to train")
    return active


def build_loader(args: RunArguments, model: Bagel, source: Path) -> PackedLoader:
    """This rank's batches. Raises ValueError without a mixture."""
    data = args.data
    if data.dataset_config_file is None:
        raise ValueError("--dataset_config_file is needed: a YAML data mixture")
    loader = LoaderConfig(**{f.name: getattr(data, f.name) for f in fields(LoaderConfig)})
    mixture = load_mixture(data.dataset_config_file, data.data_root)
    packer = packer_config(args, model)
    tokenizer, rows = Tokenizer(source), model.config.llm.vocab_size
    ids = zip(SPECIAL, tokenizer.qwen2.convert_tokens_to_ids([*SPECIAL]), strict=True)
    if outside := [f"{token} ({i})" for token, i in ids if i >= rows]:
        raise ValueError(f"{source}: {', '.join(outside)} outside of a vocabulary of {rows}")
    return PackedLoader(mixture, loader, packer, tokenizer, rank(), world_size())


def build_validation(trainer: Trainer) -> Validation:
    """Packs and pairs of `val_dataset_config_file`, the same on every rank and at every step."""
    args, training, model = trainer.args, trainer.args.training, trainer.model
    mixture = load_mixture(Path(str(training.val_dataset_config_file)), args.data.data_root)
    tokenizer = Tokenizer(trainer.source)
    values = {f.name: getattr(args.data, f.name) for f in fields(LoaderConfig)}
    loader = LoaderConfig(**values | {"num_workers": 0})
    pairs = first_pairs(mixture, tokenizer, training.val_images)
    packer = replace(
        packer_config(args, model),
        text_cond_dropout_prob=0.0,
        vae_cond_dropout_prob=0.0,
        vit_cond_dropout_prob=0.0,
    )
    return Validation(
        model=model,
        packs=PackedLoader(mixture, loader, packer, tokenizer),
        pairs=pairs,
        weights=trainer.weights,
        run_folder=trainer.run,
        device=trainer.backend.device,
        steps=training.val_steps,
        num_timesteps=training.val_num_timesteps,
        seed=training.global_seed,
        bf16=trainer.backend.autocasts,
        best_metrics=metric_names(training.best_metrics, trainer.weights, pairs),
    )


def packer_config(args: RunArguments, model: Bagel) -> PackerConfig:
    data, config = args.data, model.config
    gates = [term.max_t for term in model.losses.pixel_terms]
    return PackerConfig(
        latent_stride=config.latent_stride,
        max_latent_size=config.max_latent_size,
        vit_patch_size=config.vit_patch,
        vit_max_num_patch_per_side=config.vit_max_num_patch_per_side,
        interpolate_pos=config.interpolate_pos,
        text_cond_dropout_prob=args.model.text_cond_dropout_prob,
        vae_cond_dropout_prob=args.model.vae_cond_dropout_prob,
        vit_cond_dropout_prob=args.model.vit_cond_dropout_prob,
        full_noise_fraction=data.full_noise_fraction,
        low_t_fraction=args.training.pixel_space_t_fraction,
        low_t_max=max(gates, default=1.0),
        timestep_shift=config.timestep_shift,
        ce_loss_reweighting=args.training.ce_loss_reweighting,
    )
