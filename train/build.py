"""Arguments -> objects, in one visible order."""

from dataclasses import fields
from pathlib import Path

import torch

from data.config import load_mixture
from data.loader import LoaderConfig, PackedLoader
from data.packer import PackerConfig
from data.tokenizer import Tokenizer
from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import CrossEntropy, LossSet, PixelTerm, SSIMTerm, Term, VelocityMSE
from modeling.pretrained import SETTINGS, LoadReport, Weights, load_architecture, load_pretrained

from .arguments import RunArguments, TrainingArguments
from .checkpoint import step_folders
from .distributed import all_reduce, rank, world_size
from .ema import EMA
from .optim import apply_freeze_plan, build_optimizer, build_schedule
from .telemetry import Telemetry
from .trainer import Trainer


def build_trainer(args: RunArguments) -> Trainer:
    """The run, resumed where it stopped if it has a checkpoint and `auto_resume` is on."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.training.device == "auto" else args.training.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU here")
    torch.manual_seed(args.training.global_seed)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model, report = build_model(args)
    print(report, flush=True)
    model.to(device)
    apply_freeze_plan(model, args.training)
    terms = build_terms(args.training)
    model.losses = LossSet(
        tuple(term for term, _ in terms),
        chunk_size=args.training.pixel_loss_chunk_size,
        adaptive_chunk=args.training.pixel_loss_adaptive_chunk,
        balance=args.training.pixel_space_balance,
        all_reduce=all_reduce,
    )
    if model.losses.needs_image:
        model.vae.decoder.checkpoint_pixels = args.training.vae_checkpoint_pixels
    optimizer = build_optimizer(model, args.training)
    trainer = Trainer(
        args=args,
        model=model,
        loader=build_loader(args, model),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, args.training),
        ema=EMA(model, args.training.ema),
        weights={term.name: weight for term, weight in terms},
        telemetry=Telemetry(
            [term.name for term in model.losses.pixel_terms],
            args.training.pixel_space_unseen_steps,
            args.training.pixel_space_max_ratio,
        ),
        device=device,
    )
    if (folder := resume_folder(args.training)) is not None:
        trainer.resume(folder)
        print(f"resumed from {folder} at step {trainer.step}", flush=True)
    return trainer


def build_model(args: RunArguments) -> tuple[Bagel, LoadReport | str]:
    """Loads `model_path` strictly in float32; random weights only when asked for."""
    training, path = args.training, args.model.model_path
    if path is None:
        raise ValueError(
            "--model_path is needed: a checkpoint folder. Random weights too take configs, "
            "tokenizer and autoencoder from it (--init_from_scratch True)"
        )
    # Every setting of the model has an argument of its name; None keeps the checkpoint's value.
    values = {name.removeprefix("llm_"): value for name, value in args.flat().items()}
    overrides = {name: values[name] for name in SETTINGS if values[name] is not None}
    if training.init_from_scratch:
        model = load_architecture(path, overrides)
        model.init_weights(training.copy_init_moe)
        return model, f"RANDOM weights in the sizes of {path} (init_from_scratch)"
    weights: Weights = "ema" if training.finetune_from_ema else "model"
    return load_pretrained(path, weights, overrides=overrides, dtype=torch.float32)


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


def build_loader(args: RunArguments, model: Bagel) -> PackedLoader:
    data, config = args.data, model.config
    if data.dataset_config_file is None or args.model.model_path is None:
        raise ValueError("--dataset_config_file is needed: a YAML data mixture")
    gates = [term.max_t for term in model.losses.pixel_terms]
    packer = PackerConfig(
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
    )
    loader = LoaderConfig(**{f.name: getattr(data, f.name) for f in fields(LoaderConfig)})
    mixture = load_mixture(data.dataset_config_file, data.data_root)
    tokenizer = Tokenizer(args.model.model_path)
    return PackedLoader(mixture, loader, packer, tokenizer, rank(), world_size())


def resume_folder(args: TrainingArguments) -> Path | None:
    """`resume_from`, or with `auto_resume` the newest complete step folder of the run."""
    folders = step_folders(Path(args.checkpoint_dir))
    if args.resume_from is not None:
        if args.auto_resume and folders:
            raise ValueError(
                f"resume_from={args.resume_from} and auto_resume with {folders[-1]} contradict "
                "each other: drop one"
            )
        return Path(args.resume_from)
    if folders and not args.auto_resume:
        raise ValueError(
            f"{args.checkpoint_dir} already holds {folders[-1].name}: "
            "choose another checkpoint_dir or --auto_resume True"
        )
    return folders[-1] if folders else None
