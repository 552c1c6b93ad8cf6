"""Bytes on one GPU, from a model on the meta device. What a run keeps is exact; what a step needs
is an estimate.

Not counted: the encoder's pass without gradients, gradients and work space inside a layer,
DeepSpeed's buckets, and what the libraries take for themselves.
"""

from collections.abc import Iterable, Sequence
from math import ceil

from torch import Tensor

from modeling.autoencoder import VAE_PREFIX, AutoencoderConfig
from modeling.bagel.bagel import Bagel
from modeling.bagel.losses import CE_CHUNK_TOKENS
from modeling.bagel.pixel_space import ADAPTIVE_CHUNKS
from modeling.batch import PackedBatch

from .arguments import TrainingArguments
from .backends import MOMENTS, blocks

OFFLOADED = ("weights", "gradients", "moments", "EMA")
"""What `cpu_offload` keeps in host memory."""
FP32, BF16 = 4, 2
MAPS = 8
"""Of the decoder, for a residual block: six, and two for what lies between blocks."""


def static_memory(model: Bagel, args: TrainingArguments, kind: str, shard: int) -> dict[str, int]:
    """Bytes that stay from step to step on the rank that has most, `shard` ranks sharing a model.

    Without sharding and with FSDP everything is float32, and every weight is cut along its first
    dimension. ZeRO cuts the trained weights end to end: masters, moments and EMA, from stage 2 on
    the gradients, with stage 3 also the weights; with `bf16` it keeps bfloat16 weights and
    gradients beside the float32 masters. The autoencoder and buffers are whole everywhere.
    """
    named = list(model.named_parameters())
    own = [p for name, p in named if not name.startswith(VAE_PREFIX)]
    trained = [p for p in own if p.requires_grad]
    whole = {
        "autoencoder": sum(p.nbytes for name, p in named if name.startswith(VAE_PREFIX)),
        "buffers": sum(buffer.nbytes for buffer in model.buffers()),
    }
    if kind != "deepspeed":
        part = FP32 * _rows(trained, shard)
        kept = {"weights": FP32 * _rows(own, shard), "gradients": part}
        return kept | {"moments": len(MOMENTS) * part, "EMA": part} | whole
    width, all_own, all_trained = _width(args), _numel(own), _numel(trained)
    part = ceil(all_trained / shard)
    return {
        "weights": width * (ceil(all_own / shard) if args.zero_stage == 3 else all_own),
        "masters": FP32 * part,
        "gradients": width * (part if args.zero_stage >= 2 else all_trained),
        "moments": len(MOMENTS) * FP32 * part,
        "EMA": FP32 * part,
    } | whole


def step_memory(
    model: Bagel, args: TrainingArguments, kind: str, batch: PackedBatch
) -> dict[str, int]:
    """Estimated bytes that a micro-batch needs beside `static_memory`.

    gathered weights: of FSDP and ZeRO 3 the two largest blocks (one in use, one on its way), with
    SHARD_GRAD_OP all, with what FSDP never frees, and a block's gradient before and after it
    becomes float32; without sharding the copies of autocast.
    activations: `_decoder_layer` bytes a token and layer; of a trained ViT nine of its hidden sizes
    and two of its MLP's; when recomputed, a layer's input instead, and one layer in full.
    `freeze_und` stores those of generation tokens only.
    logits: a chunk's scores in the dtype of the weights, in float32, and their gradient.
    pixel-space decoder: see `_decoded`, for the largest target image.
    """
    config, llm, vae, width = model.config, model.config.llm, batch.vae, _width(args)
    again = args.activation_checkpointing
    tokens = len(vae.indexes) if config.freeze_und and vae is not None else batch.num_tokens
    inner, between = tokens * _decoder_layer(model, width), tokens * llm.hidden_size * width
    stored = _layers(inner, between, llm.num_hidden_layers, again)
    if (
        config.vit is not None
        and batch.vit is not None
        and not (args.freeze_vit or args.freeze_und)
    ):
        hidden = width * len(batch.vit.patches) * config.vit.hidden_size
        wide = width * len(batch.vit.patches) * config.vit.intermediate_size
        stored += _layers(9 * hidden + 2 * wide, hidden, config.vit_layers, again)
    needed = {"gathered weights": _gathered(model, args, kind), "activations": stored}
    if batch.labels is not None and args.ce_weight > 0:
        answers = min(len(batch.labels.ids), CE_CHUNK_TOKENS)
        needed["logits"] = answers * llm.vocab_size * (width + 2 * FP32)
    if model.losses.needs_image and vae is not None and config.vae is not None:
        images = zip(vae.images, vae.is_target, strict=True)
        sizes = [image.shape[-2] * image.shape[-1] for image, target in images if target]
        decoded = [_decoded(config.vae, args, size, len(sizes)) for size in sizes]
        needed["pixel-space decoder"] = max(decoded, default=0)
    return needed


def _width(args: TrainingArguments) -> int:
    """Bytes of a number that the model computes with."""
    return BF16 if args.bf16 else FP32


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _rows(tensors: Sequence[Tensor], shard: int) -> int:
    """Numbers in the first of `shard` parts of each tensor, cut along its rows."""
    return sum(ceil(len(t) / shard) * (t.numel() // max(len(t), 1)) for t in tensors)


def _gathered(model: Bagel, args: TrainingArguments, kind: str) -> int:
    width = _width(args)
    own = _numel(p for n, p in model.named_parameters() if not n.startswith(VAE_PREFIX))
    if kind == "single":
        return width * _numel(p for p in model.parameters() if p.requires_grad) * args.bf16
    if kind == "deepspeed" and args.zero_stage < 3:
        return 0
    sizes = sorted((_numel(block.parameters()) for block in blocks(model)), reverse=True)
    embeddings = model.language_model.model.embed_tokens.weight.numel()
    kept = own - sum(sizes) - (0 if model.config.llm.tie_word_embeddings else embeddings)
    weights = own if args.sharding_strategy == "SHARD_GRAD_OP" else sum(sizes[:2]) + kept
    return width * weights + (width + FP32) * sizes[0]


def _layers(inner: int, between: int, layers: int, recomputed: bool) -> int:
    return inner + layers * between if recomputed else layers * inner


def _decoder_layer(model: Bagel, width: int) -> int:
    """Bytes a token leaves for backward in a decoder layer, hidden size d, f numbers in its MLP,
    q, k and v numbers in its heads.

    Two norms: 4 d in float32, then 2 d before and 2 d after the weight. Norms of q and k: the same
    once. Attention: q, k, v, its output, which is stored again in expert order. MLP: gate, its
    activation, up, and their product.
    """
    llm, head = model.config.llm, model.config.head_dim
    q, kv = llm.num_attention_heads * head, llm.num_key_value_heads * head
    norms = 2 * llm.hidden_size + (q + kv if model.config.qk_norm else 0)
    attention = 3 * q + 2 * kv
    linear = 2 * llm.hidden_size + attention + 4 * llm.intermediate_size
    return (FP32 + width) * norms + width * linear


def _decoded(config: AutoencoderConfig, args: TrainingArguments, pixels: int, most: int) -> int:
    """Bytes of decoding up to `most` images of one size with gradients: MAPS a residual block, as
    wide as its level; of recomputed levels one a block, and MAPS of one block."""
    images = args.pixel_loss_chunk_size
    if args.pixel_loss_adaptive_chunk:
        images = next(n for least, n in ADAPTIVE_CHUNKS if pixels >= least)
    recomputed = 2 if pixels >= args.vae_checkpoint_pixels else 0
    per_pixel = [width / 4**level for level, width in enumerate(config.widths)]
    kept = [1 if level < recomputed else MAPS for level in range(len(per_pixel))]
    maps = (config.num_res_blocks + 1) * sum(n * m for n, m in zip(kept, per_pixel, strict=True))
    again = MAPS * max(per_pixel[:recomputed], default=0.0)
    return ceil(min(images, most) * pixels * FP32 * (maps + again))
