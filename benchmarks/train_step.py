"""Training step (forward + backward) of the packed MoT decoder against the scatter formulation.

    python benchmarks/train_step.py [--threads 1] [--rounds 11]

The peer is the layer as the released code describes it, written anew on the same weights: tensors
of full length; each expert gathers its tokens by index lists and scatters its results into new
zeros; key heads are copied; norms and rope are single operations in float32; every sample's dense
mask is 3-D ("as it is": SDPA takes its unfused path) or 4-D ("flash mask"). Loss and gradients are
compared first. Speeds are ratios to "as it is" in float32. The bf16 target counts only where a
single linear is faster in bf16. Times and memory are taken as `benchmarks/measure.py` says.
Exit code 1: a target was missed.
"""

import argparse
import itertools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, SiglipVisionConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import median_seconds, peak_bytes  # noqa: E402
from modeling.attention import PackedAttention, split_mask  # noqa: E402
from modeling.bagel.config import BagelConfig  # noqa: E402
from modeling.bagel.modeling_utils import MLPConnector  # noqa: E402
from modeling.bagel.qwen2_navit import GEN, ExpertOrder, Qwen2Model  # noqa: E402
from modeling.bagel.siglip_navit import SiglipNavitModel  # noqa: E402

LATENTS, VIT, TEXT, SAMPLES = 160, 98, 46, 4
LAYOUT = (
    (LATENTS + 2, "full", True),
    (VIT + 2, "full", False),
    (TEXT, "causal", False),
    (LATENTS + 2, "noise", True),
)
"""Splits of a restoration sample: tokens, mode, whether those between start and end are latents."""
LLM = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "qk_norm": True,
    "layer_module": "Qwen2MoTDecoderLayer",
}
VIT_CONFIG = SiglipVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=224,
    patch_size=14,
)
"""3/4 of the decoder's width and 2/3 of its layers, as in the golden model."""
AS_IS, FLASH = "as it is", "flash mask"
FASTER = (  # run, base, times faster
    ("ours", AS_IS, 1.25),
    ("ours", FLASH, 1.1),
    ("ours, bf16", AS_IS, 1.7),
    ("with ViT, both frozen", "with ViT", 1.3),
)
ERROR, GROWTH = 1e-5, 1.1


class Pack:
    """A pack of equal restoration samples: what both decoders need to know, and its loss."""

    def __init__(self, samples: int) -> None:
        lens, modes, latents = zip(*LAYOUT, strict=True)
        is_gen, position_ids, position = [], [], 0
        for n, mode, generated in LAYOUT:
            is_gen += [generated and 0 < i < n - 1 for i in range(n)]
            position_ids += [position + i * (mode == "causal") for i in range(n)]
            position = position_ids[-1] + 1
        self.layout = [sum(lens)] * samples, lens * samples, modes * samples
        self.mask = split_mask(lens, modes, "cpu")
        self.position_ids = torch.tensor(position_ids * samples)
        gen = torch.tensor(is_gen * samples)
        self.gen, self.und = gen.nonzero()[:, 0], (~gen).nonzero()[:, 0]
        self.gen_splits = [i for i, (_, _, gen) in enumerate(LAYOUT * samples) if gen]
        first = [sum(lens[:1]) + 1 + i * sum(lens) for i in range(samples)]
        self.vit = torch.cat([torch.arange(VIT) + place for place in first])
        self.patches = torch.randn(len(self.vit), 3 * VIT_CONFIG.patch_size**2)
        self.patch_ids = torch.arange(VIT).repeat(samples)
        self.x, self.target = torch.randn(2, len(gen), LLM["hidden_size"]).unbind()

    def loss(self, hidden: Tensor) -> Tensor:
        return F.mse_loss(hidden.float(), self.target)


def ours(model: Qwen2Model, pack: Pack, x: Tensor | None = None) -> Tensor:
    tokens = ExpertOrder.of(len(pack.x), pack.gen, pack.x.device)
    learned = pack.gen_splits if model.freeze_und else None
    attention = PackedAttention(*pack.layout, "cpu", learned=learned)
    return model(pack.x if x is None else x, pack.position_ids, tokens, attention)


class WithViT(nn.Module):
    """The decoder behind a ViT and its connector, whose features are rows of its input."""

    def __init__(self, freeze: bool) -> None:
        super().__init__()
        self.decoder = build(freeze_und=freeze)
        self.vit = SiglipNavitModel(VIT_CONFIG, VIT_CONFIG.num_hidden_layers, rope=False)
        width = VIT_CONFIG.hidden_size
        self.connector = MLPConnector(width, LLM["hidden_size"], "gelu_pytorch_tanh")
        for part in (self.vit, self.connector):
            part.requires_grad_(not freeze)

    def forward(self, pack: Pack) -> Tensor:
        features = self.vit(pack.patches, pack.patch_ids, [VIT] * (len(pack.vit) // VIT))
        x = pack.x.index_copy(0, pack.vit, self.connector(features))
        return ours(self.decoder, pack, x)


class ScatteredDecoder(ABC):
    """The decoder's layers in the scatter formulation, on the weights of `model`."""

    und: Tensor
    """int64 places of the understanding tokens."""
    gen: Tensor
    """int64 places of the generation tokens."""

    def __init__(self, model: Qwen2Model) -> None:
        self.model = model
        self.eps = model.get_submodule("norm").eps
        self.weights = dict(model.named_parameters())

    def each(self, run: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """Gathers every expert's tokens, runs them, and scatters into new zeros."""
        out = None
        for suffix, index in (("", self.und), (GEN, self.gen)):
            part = run(suffix, x[index])
            out = part.new_zeros(len(x), *part.shape[1:]) if out is None else out
            out[index] = part
        return out

    def linear(self, name: str) -> Callable[[str, Tensor], Tensor]:
        def run(suffix: str, x: Tensor) -> Tensor:
            weight = self.weights[f"{name}{suffix}.weight"]
            return F.linear(x, weight, self.weights.get(f"{name}{suffix}.bias"))

        return run

    def norm(self, name: str) -> Callable[[str, Tensor], Tensor]:
        def run(suffix: str, x: Tensor) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weights[f"{name}{suffix}.weight"] * wide.to(x.dtype)

        return run

    def mlp(self, name: str) -> Callable[[str, Tensor], Tensor]:
        def run(suffix: str, x: Tensor) -> Tensor:
            gate, up, down = (
                self.linear(f"{name}{suffix}.{part}_proj") for part in ("gate", "up", "down")
            )
            return down("", F.silu(gate("", x)) * up("", x))

        return run

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x.float()
        a, b = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)

    def heads(self, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """(S, heads, E) queries, keys and values."""
        q, k, v = (
            self.each(self.linear(f"{name}.{part}_proj"), x).unflatten(1, (-1, self.model.head_dim))
            for part in "qkv"
        )
        q, k = (
            self.rope(self.each(self.norm(f"{name}.{part}_norm"), y), cos, sin)
            for part, y in (("q", q), ("k", k))
        )
        return q, k, v

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, flash: bool) -> Tensor:
        """(S, Hq, E) of one sample; key heads are copied."""
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = mask.to(q.dtype).expand(len(q), -1, -1)
        if flash:
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None])[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(0, 1)

    @abstractmethod
    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(S, Hq, E) of layer `name`."""

    def run(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """(S, d) input embeddings -> (S, d) after the final norms."""
        exponent = torch.arange(0, self.model.head_dim, 2) / self.model.head_dim
        angle = position_ids[:, None] / self.model.rope_theta**exponent
        angle = torch.cat([angle, angle], dim=-1)[:, None]
        cos, sin = angle.cos(), angle.sin()
        for i in range(len(self.model.layers)):
            layer = f"layers.{i}."
            normed = self.each(self.norm(layer + "input_layernorm"), x)
            attention = layer + "self_attn"
            attended = self.attend(attention, *self.heads(attention, normed, cos, sin)).flatten(1)
            x = x + self.each(self.linear(attention + ".o_proj"), attended)
            normed = self.each(self.norm(layer + "post_attention_layernorm"), x)
            x = x + self.each(self.mlp(layer + "mlp"), normed)
        return self.each(self.norm("norm"), x)


class Scattered(ScatteredDecoder):
    """All samples of a pack, each with its dense mask."""

    def __init__(self, model: Qwen2Model, pack: Pack, flash: bool) -> None:
        super().__init__(model)
        self.und, self.gen, self.pack, self.flash = pack.und, pack.gen, pack, flash
        self.mask = torch.zeros(pack.mask.shape).masked_fill(~pack.mask, float("-inf"))

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        samples = zip(*(y.split(self.pack.layout[0]) for y in (q, k, v)), strict=True)
        return torch.cat([self.sdpa(*sample, self.mask, self.flash) for sample in samples])

    def __call__(self) -> Tensor:
        return self.run(self.pack.x, self.pack.position_ids)


def build(freeze_und: bool = False) -> Qwen2Model:
    """Random weights, the same every time."""
    llm = Qwen2Config(**LLM)
    torch.manual_seed(0)
    config = BagelConfig(llm=llm, vit=None, vae=None, freeze_und=freeze_und)
    model = Qwen2Model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            parameter.normal_(offset, 0.02 + 0.08 * offset)
    return model


def step(
    model: nn.Module, pack: Pack, forward: Callable[[], Tensor], bf16: bool = False
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = forward()
        loss = pack.loss(hidden)
        loss.backward()
        return loss.detach()

    return run


def differences(model: Qwen2Model, runs: dict[str, Callable[[], Tensor]]) -> Iterator[str]:
    """Prints how far the runs are apart; yields what is above the bound."""
    found = {}
    for name, run in runs.items():
        loss = run()
        found[name] = loss, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    for a, b in itertools.combinations(found, 2):
        (loss, grads), (other_loss, other_grads) = found[a], found[b]
        same = grads.keys() == other_grads.keys()
        worst = max(((g - other_grads[k]).norm() / g.norm()).item() for k, g in grads.items())
        of_loss = (abs(loss - other_loss) / loss).item()
        print(f"{a} | {b}: loss {of_loss:.1e}, worst of {len(grads)} gradients {worst:.1e}")
        if not same or max(worst, of_loss) > ERROR:
            yield f"{a} and {b} differ by {max(worst, of_loss):.1e} > {ERROR}"


def bf16_gain(arguments: argparse.Namespace) -> float:
    """How much faster the MLP's matrix product runs in bf16 than in float32 on this machine."""
    rows, inner = len(LAYOUT) * SAMPLES * LATENTS, LLM["intermediate_size"]
    x, weight = torch.randn(rows, LLM["hidden_size"]), torch.randn(inner, LLM["hidden_size"])
    halves = x.bfloat16(), weight.bfloat16()
    runs = {"fp32": lambda: F.linear(x, weight), "bf16": lambda: F.linear(*halves)}
    seconds, _ = median_seconds(runs, arguments.rounds, arguments.threads)
    info = Path("/proc/cpuinfo")
    known = info.read_text().split() if info.exists() else []
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in known]
    gain = seconds["fp32"] / seconds["bf16"]
    print(
        f"bf16 instructions: {', '.join(found) or 'none'}; a linear is {gain:.2f}x as fast in bf16"
    )
    return gain


def compare(arguments: argparse.Namespace) -> list[str]:
    """One pack, all implementations; returns the targets that were missed."""
    pack, model, frozen = Pack(SAMPLES), build(), build(freeze_und=True)
    with_vit, frozen_vit = WithViT(freeze=False), WithViT(freeze=True)
    has_bf16 = bf16_gain(arguments) > 1
    print(f"{len(pack.und)} und + {len(pack.gen)} gen tokens, {SAMPLES} samples")
    as_is, flash = (Scattered(model, pack, f) for f in (False, True))
    runs = {
        AS_IS: step(model, pack, as_is),
        FLASH: step(model, pack, flash),
        "ours": step(model, pack, lambda: ours(model, pack)),
        "ours, und frozen": step(frozen, pack, lambda: ours(frozen, pack)),
    }
    missed = list(differences(model, {name: runs[name] for name in (AS_IS, FLASH, "ours")}))
    runs |= {
        f"{FLASH}, bf16": step(model, pack, flash, bf16=True),
        "ours, bf16": step(model, pack, lambda: ours(model, pack), bf16=True),
        "ours, und frozen, bf16": step(frozen, pack, lambda: ours(frozen, pack), bf16=True),
        "with ViT": step(with_vit, pack, lambda: with_vit(pack)),
        "with ViT, both frozen": step(frozen_vit, pack, lambda: frozen_vit(pack)),
    }
    seconds, how = median_seconds(runs, arguments.rounds, arguments.threads)
    print(f"\n{how}\n{'':26}{'ms':>8}{'tokens/s':>10}{'speed':>8}{'MB':>8}")
    for name, second in seconds.items():
        for module in (model, frozen, with_vit, frozen_vit):
            module.zero_grad()
        speed, peak = seconds[AS_IS] / second, peak_bytes(runs[name]) / 1e6
        print(f"{name:26}{1e3 * second:8.0f}{len(pack.x) / second:10.0f}{speed:7.2f}x{peak:8.0f}")
    print()
    for name, base, target in FASTER:
        speed = seconds[base] / seconds[name]
        verdict = "PASS" if speed >= target else "FAIL"
        if verdict == "FAIL" and "bf16" in name and not has_bf16:
            verdict = "not applicable, bf16 is not faster on this machine:"
        if verdict == "FAIL":
            missed.append(f"{name} / {base}: {speed:.2f}x < {target}x")
        print(f"{verdict} {name} against {base}: {speed:.2f}x, target {target}x")
    return missed


def linearity(arguments: argparse.Namespace) -> list[str]:
    """The cost per sample of packs of several sizes, against the smallest pack's."""
    model = build()
    packs = {str(n): Pack(n) for n in (1, 2, 4)}
    runs = {n: step(model, p, lambda p=p: ours(model, p)) for n, p in packs.items()}
    seconds, how = median_seconds(runs, arguments.rounds, arguments.threads)
    each = {n: second / int(n) for n, second in seconds.items()}
    print(f"\nCost per sample, {how}")
    missed = []
    for n, second in each.items():
        ratio = second / each["1"]
        print(f"{n} packed: {1e3 * second:.0f} ms, {ratio:.2f} of one alone")
        if ratio > GROWTH:
            missed.append(f"a sample among {n} costs {ratio:.2f} times what one alone does")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    missed = [*compare(arguments), *linearity(arguments)]
    print("\n" + ("\n".join(["Targets missed:", *missed]) if missed else "All targets met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
