"""Compares this implementation with recorded numbers of the reference implementation.

    python scripts/tools/check_parity.py --fixture tests/fixtures/bagel_tiny

Takes any folder of that form and compares what it holds: packing, VAE, forward, every gradient
norm, greedy decoding, every sampling case. Prints the largest error of each as a share of its
tolerance and exits 0 only if all are within.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.packer import Packer, PackerConfig, Sample, Segment, TextSegment, VaeSegment, VitSegment  # noqa: E402
from modeling.bagel.bagel import Bagel, FlowInputs  # noqa: E402
from modeling.bagel.context import Context  # noqa: E402
from modeling.bagel.generation import (  # noqa: E402
    ImageJob,
    SamplingConfig,
    TextConfig,
    decode_images,
    generate_text,
    sample_latents,
)
from modeling.bagel.losses import CrossEntropy  # noqa: E402
from modeling.batch import PackedBatch, SpecialTokens  # noqa: E402
from modeling.geometry import patchify, token_grid  # noqa: E402
from modeling.pretrained import load_pretrained  # noqa: E402

CE_WEIGHT = 0.25
MODES = ("causal", "full", "noise")


TRAINING_FILES = [
    "packing_samples.json",
    "packing_images.safetensors",
    "train_inputs.safetensors",
    "train_outputs.safetensors",
]


class Comparison:
    """Collects named comparisons; `share` is the largest error over its tolerance."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def close(
        self, name: str, found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-5
    ) -> None:
        if found.shape != expected.shape:
            self._report(name, f"shape {tuple(found.shape)}, not {tuple(expected.shape)}", False)
            return
        error = (found.double() - expected.double()).abs()
        share = (error / (atol + rtol * expected.double().abs())).max().item()
        largest = f"largest error {error.max().item():.2e}, {share:6.1%} of the tolerance"
        self._report(name, largest, share <= 1)

    def identical(self, name: str, found: Tensor, expected: Tensor) -> None:
        same = torch.equal(found, expected)
        self._report(name, "exact" if same else "differs", same)

    def equal(self, name: str, found: object, expected: object) -> None:
        same = found == expected
        self._report(name, "exact" if same else f"{found!r} is not {expected!r}"[:300], same)

    def _report(self, name: str, text: str, ok: bool) -> None:
        print(f"{'ok  ' if ok else 'FAIL'} {name:34s} {text}")
        if not ok:
            self.failed.append(name)


def special_tokens(vocab_size: int) -> SpecialTokens:
    """The record's special tokens: the last four of its vocabulary."""
    bos, eos, start, end = range(vocab_size - 4, vocab_size)
    return SpecialTokens(bos=bos, eos=eos, image_start=start, image_end=end)


def read_samples(folder: Path) -> list[Sample]:
    images = load_file(folder / "packing_images.safetensors")
    samples = []
    for i, plan in enumerate(json.loads((folder / "packing_samples.json").read_text())):
        texts, image_count = iter(plan["texts"]), 0
        segments: list[Segment] = []
        for part in plan["plan"]:
            end_label = part["special_token_label"] if part["special_token_loss"] else None
            common = {"droppable": part["enable_cfg"] == 1, "end_label": end_label}
            if part["type"] == "text":
                segments.append(TextSegment(ids=next(texts), answer=part["loss"] == 1, **common))
                continue
            image = images[f"sample{i}_image{image_count}"]
            image_count += 1
            if part["type"] == "vit_image":
                segments.append(VitSegment(image_pm1=image, **common))
            else:
                segments.append(VaeSegment(image_pm1=image, target=part["loss"] == 1, **common))
        samples.append(Sample(f"sample{i}", segments))
    return samples


def pack(model: Bagel, folder: Path) -> PackedBatch:
    config = PackerConfig(
        latent_stride=model.config.latent_stride,
        max_latent_size=model.config.max_latent_size,
        vit_patch_size=model.config.vit.patch_size,
        vit_max_num_patch_per_side=model.config.vit_max_num_patch_per_side,
        interpolate_pos=model.config.interpolate_pos,
        text_cond_dropout_prob=1.0,
        vae_cond_dropout_prob=1.0,
        vit_cond_dropout_prob=1.0,
    )
    packer = Packer(config, special_tokens(model.config.llm.vocab_size))
    for sample in read_samples(folder):
        packer.add(sample, torch.Generator().manual_seed(0))
    return packer.build()


def recorded_times(batch: PackedBatch, packed_timesteps: Tensor) -> PackedBatch:
    """The batch with the record's times; they are per token there, per image here."""
    firsts = torch.tensor((0, *batch.vae.lens)).cumsum(0)[:-1]
    logits = tuple(packed_timesteps[firsts].tolist())
    return dataclasses.replace(batch, vae=dataclasses.replace(batch.vae, time_logits=logits))


def check_packing(compare: Comparison, batch: PackedBatch, inputs: dict[str, Tensor]) -> None:
    target = batch.vae.target_tokens()
    found = {
        "sample_lens": list(batch.sample_lens),
        "split_lens": list(batch.split_lens),
        "attn_modes": [MODES.index(m) for m in batch.attn_modes],
        "packed_position_ids": batch.position_ids.tolist(),
        "packed_text_ids": batch.text.ids.tolist(),
        "packed_text_indexes": batch.text.indexes.tolist(),
        "packed_label_ids": batch.labels.ids.tolist(),
        "ce_loss_indexes": batch.labels.indexes.tolist(),
        "packed_vit_position_ids": batch.vit.position_ids.tolist(),
        "packed_vit_token_indexes": batch.vit.indexes.tolist(),
        "vit_token_seqlens": list(batch.vit.lens),
        "packed_latent_position_ids": batch.vae.position_ids.tolist(),
        "packed_vae_token_indexes": batch.vae.indexes.tolist(),
        "mse_loss_indexes": batch.vae.indexes[target].tolist(),
        "latent_shapes": [list(grid) for grid in batch.vae.grids],
    }
    for name, value in found.items():
        compare.equal(f"packing {name}", value, inputs[name].tolist())
    compare.identical("packing packed_vit_tokens", batch.vit.patches, inputs["packed_vit_tokens"])
    per_image = inputs["packed_timesteps"].split(list(batch.vae.lens))
    varying = [i for i, times in enumerate(per_image) if len(times.unique()) > 1]
    compare.equal("packing images with one time each", varying, [])
    per_token = torch.tensor(batch.vae.time_logits).repeat_interleave(torch.tensor(batch.vae.lens))
    compare.equal(
        "packing which images are targets",
        (per_token == -torch.inf).tolist(),
        (inputs["packed_timesteps"] == -torch.inf).tolist(),
    )
    for i, image in enumerate(batch.vae.images):
        padded = inputs["padded_images"][i, :, : image.shape[1], : image.shape[2]]
        compare.identical(f"packing image {i}", image, padded)


def check_training(compare: Comparison, model: Bagel, folder: Path, has_vae: bool) -> None:
    inputs = load_file(folder / "train_inputs.safetensors")
    outputs = load_file(folder / "train_outputs.safetensors")
    batch = pack(model, folder)
    check_packing(compare, batch, inputs)
    batch = recorded_times(batch, inputs["packed_timesteps"])
    patch = model.config.latent_patch_size
    recorded = [
        latent[:, : h * patch, : w * patch]
        for latent, (h, w) in zip(inputs["padded_latent"], batch.vae.grids, strict=True)
    ]
    if has_vae:
        encoded = model.encode_images(batch.vae.images)
        for i, (found, expected) in enumerate(zip(encoded, recorded, strict=True)):
            compare.close(f"latent {i} encoded at its own size", found, expected)
    z0 = torch.cat([patchify(latent, patch) for latent in recorded])
    out = model.step_outputs(batch, FlowInputs(z0=z0, noise=inputs["noise"]))
    ce = CrossEntropy().per_token(out)
    mse = (out.velocity_pred - out.velocity_true).square()
    compare.close("last_hidden_state", out.hidden, outputs["last_hidden_state"])
    compare.close("ce per token", ce, outputs["ce"])
    compare.close("mse per element", mse, outputs["mse"])
    loss = CE_WEIGHT * ce.mean() + mse.mean()
    compare.close("loss", loss.reshape(1), outputs["loss"])
    loss.backward()
    norms = folder / "train_grad_norms.json"
    if norms.exists():
        check_gradients(compare, model, json.loads(norms.read_text()))
    else:
        print(f"skipped gradient norms: no {norms.name}")


def check_gradients(compare: Comparison, model: Bagel, expected: dict[str, float]) -> None:
    norms = {
        name: 0.0 if p.grad is None else p.grad.norm().item()
        for name, p in model.named_parameters()
        if not name.startswith("vae.")
    }
    compare.equal("gradients: parameter names", sorted(norms), sorted(expected))
    names = sorted(set(norms) & set(expected))
    compare.close(
        f"gradient norms of {len(names)} parameters",
        torch.tensor([norms[n] for n in names]),
        torch.tensor([expected[n] for n in names]),
        rtol=1e-3,
        atol=1e-6,
    )


@torch.no_grad()
def check_vae(compare: Comparison, model: Bagel, folder: Path) -> None:
    record = load_file(folder / "vae.safetensors")
    compare.close("vae decode", model.vae.decode(record["z"]), record["decoded"])
    compare.close("vae encode", model.vae.encode(record["x"]), record["encoded_mean"])


@torch.no_grad()
def check_inference(compare: Comparison, model: Bagel, folder: Path) -> None:
    record = load_file(folder / "inference.safetensors")
    args = json.loads((folder / "inference_args.json").read_text())
    tokens = special_tokens(model.config.llm.vocab_size)
    prompt = record["prompt_ids"].tolist()

    def context(*parts: str) -> Context:
        new = Context(model, tokens)
        for part in parts:
            if part == "prompt":
                new.add_text(prompt)
            elif part == "vae":
                new.add_vae_image(record["image_vae"])
            else:
                new.add_vit_image(record["image_vit"])
        return new

    expected_ids = record["understanding_greedy_ids"].tolist()
    fixed = TextConfig(max_new_tokens=len(expected_ids) - 1, stop_at_eos=False)
    ids = generate_text(context("vit", "prompt"), model.config.llm.vocab_size, fixed)
    compare.equal("greedy ids", [tokens.bos, *ids], expected_ids)

    grid = token_grid(args["image_shape"], model.config.latent_stride)
    contexts = context("vae", "vit", "prompt"), context("vae", "vit"), context("prompt")
    common = {
        "num_timesteps": args["num_timesteps"],
        "timestep_shift": args["timestep_shift"],
        "cfg_interval": tuple(args["cfg_interval"]),
        "cfg_renorm_min": args["cfg_renorm_min"],
    }
    for name in sorted(record):
        if name.startswith("latent_") and name.removeprefix("latent_") not in args["cases"]:
            print(f"skipped {name}: no such case in inference_args.json")
    jobs = {
        case: ImageJob(
            contexts[0],
            record["init_noise"],
            grid,
            SamplingConfig(**(common | settings)),
            *contexts[1:],
        )
        for case, settings in args["cases"].items()
    }
    together = sample_latents(list(jobs.values()))
    for (case, job), batched in zip(jobs.items(), together, strict=True):
        (alone,) = sample_latents([job])
        compare.close(f"latent {case}", alone, record[f"latent_{case}"])
        compare.close(f"latent {case}, all cases in one batch", batched, record[f"latent_{case}"])
        if case == "nocfg":
            (image,) = decode_images(model, [alone], [grid])
            compare.close("image nocfg", image[None], record["image_nocfg"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fixture", type=Path, required=True)
    folder = parser.parse_args().fixture
    has_vae = (folder / "ae.safetensors").exists()
    model, report = load_pretrained(folder, weights="ema", autoencoder=has_vae)
    print(report)
    compare = Comparison()
    parts: dict[str, tuple[list[str], Callable[[], None]]] = {
        "vae": (["ae.safetensors", "vae.safetensors"], lambda: check_vae(compare, model, folder)),
        "training": (TRAINING_FILES, lambda: check_training(compare, model, folder, has_vae)),
        "inference": (
            ["ae.safetensors", "inference.safetensors", "inference_args.json"],
            lambda: check_inference(compare, model, folder),
        ),
    }
    compared = 0
    for name, (files, check) in parts.items():
        absent = [file for file in files if not (folder / file).exists()]
        if absent:
            print(f"skipped {name}: no {', '.join(absent)}")
        else:
            check()
            compared += 1
    if not compared:
        print(f"{folder}: nothing to compare")
        return 1
    print(f"{folder}: {len(compare.failed)} failed {compare.failed if compare.failed else ''}")
    return 1 if compare.failed else 0


if __name__ == "__main__":
    sys.exit(main())
