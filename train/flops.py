"""Model FLOPs of a batch and the peaks they are held against, for the utilisation (MFU)."""

from itertools import accumulate

import torch

from modeling.bagel.config import BagelConfig
from modeling.bagel.modeling_utils import TIME_FREQUENCIES
from modeling.batch import PackedBatch

PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L20": 119.5,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX A6000": 154.8,
}
"""Dense bfloat16 peak by a part of the device's name; the first that fits holds (vendor sheets)."""
FORWARD, TRAINED = 2, 6
"""FLOPs per weight and token: of a forward pass, and with both gradients."""


def peak_flops(device: torch.device, peak_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device: the override, else the table's; None where neither says."""
    if peak_tflops is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak_tflops = next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)
    return None if peak_tflops is None else peak_tflops * 1e12


def flops_per_batch(config: BagelConfig, batch: PackedBatch, freeze_vit: bool = False) -> float:
    """FLOPs of forward and backward that the model needs, however they are computed.

    A token goes through one expert. Recomputed activations and the autoencoder do not count; a
    query counts with every key of its sample up to the end of its split, masked or not. Parts
    without gradient (`freeze_und`, `freeze_vit`) count forward only; otherwise frozen weights count
    as trained.
    """
    llm, d, vae, vit = config.llm, config.llm.hidden_size, batch.vae, config.vit
    heads, width = llm.num_attention_heads, config.head_dim
    projections = d * width * (2 * heads + 2 * llm.num_key_value_heads)
    per_token = llm.num_hidden_layers * (projections + 3 * d * llm.intermediate_size)
    num_gen = len(vae.indexes) if vae is not None else 0
    of_und = FORWARD if config.freeze_und else TRAINED
    flops = per_token * (of_und * (batch.num_tokens - num_gen) + TRAINED * num_gen)
    flops += TRAINED * llm.num_hidden_layers * 2 * heads * width * _pairs(batch)
    if batch.labels is not None:
        flops += TRAINED * len(batch.labels.ids) * d * llm.vocab_size
    if vae is not None:
        into = config.patch_latent_dim + 2 * TIME_FREQUENCIES + d
        flops += TRAINED * d * (num_gen * into + vae.num_target_tokens * config.patch_latent_dim)
    if batch.vit is not None and vit is not None:
        of_vit = FORWARD if freeze_vit or config.freeze_und else TRAINED
        v, patches = vit.hidden_size, len(batch.vit.indexes)
        layer = 4 * v * v + 2 * v * vit.intermediate_size
        weights = vit.num_channels * vit.patch_size**2 * v + config.vit_layers * layer
        pairs = sum(n * n for n in batch.vit.lens)
        flops += of_vit * (weights * patches + config.vit_layers * 2 * v * pairs)
        flops += of_und * patches * (v * d + d * d)
    return float(flops)


def batch_totals(config: BagelConfig, batch: PackedBatch, freeze_vit: bool) -> dict[str, float]:
    """What a batch adds to the totals of a step, by the names of the log."""
    return {
        "tokens": batch.num_tokens,
        "model_flops": flops_per_batch(config, batch, freeze_vit),
        "total_ce_tokens": 0 if batch.labels is None else len(batch.labels.ids),
        "total_mse_tokens": 0 if batch.vae is None else batch.vae.num_target_tokens,
    }


def _pairs(batch: PackedBatch) -> int:
    """Queries times the keys up to the end of their split, over all samples."""
    ends, pairs, start = set(accumulate(batch.sample_lens)), 0, 0
    for length, end in zip(batch.split_lens, accumulate(batch.split_lens), strict=True):
        pairs += length * (end - start)
        if end in ends:
            start = end
    return pairs
