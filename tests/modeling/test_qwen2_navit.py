"""The decoder's layers alone: empty blocks, constant queries, compiled layers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from data.packer import Sample, TextSegment
from modeling.attention import PackedAttention
from modeling.bagel.bagel import Bagel
from modeling.bagel.qwen2_navit import GEN, MLP, ExpertOrder
from tests.helpers import pack, restoration, tiny_config, tiny_model


def layer_gradients(gen: list[int], num_tokens: int = 6) -> dict[str, torch.Tensor | None]:
    """Gradients of one layer's parameters after a causal sequence with `gen` generation tokens."""
    model = tiny_model(tiny_config(vit=None, vae=None)).language_model.model
    model.layers = model.layers[:1]
    tokens = ExpertOrder.of(num_tokens, torch.tensor(gen, dtype=torch.int64), torch.device("cpu"))
    attention = PackedAttention([num_tokens], [num_tokens], ["causal"], "cpu")
    out = model(torch.randn(num_tokens, 32), torch.arange(num_tokens), tokens, attention)
    out.square().sum().backward()
    return {name: p.grad for name, p in model.layers[0].named_parameters()}


@pytest.mark.parametrize(("gen", "empty"), [([], GEN), (list(range(6)), "")])
def test_an_empty_block_has_zero_gradients(gen, empty):
    gradients = layer_gradients(gen)
    of_empty = {k: g for k, g in gradients.items() if (GEN in k) == (empty == GEN)}
    assert len(of_empty) == len(gradients) // 2
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert (gradient.abs().max() == 0) == (name in of_empty), name


def test_frozen_und_takes_no_graph_and_changes_no_gradient_of_gen():
    """The gradients of gen through constant und tokens are those of detached und weights."""
    found = {}
    for freeze in (True, False):
        model = tiny_model(tiny_config(freeze_und=freeze))
        if not freeze:  # constant in another way: only gen keys and values carry gradients
            model.language_model.requires_grad_(False)
            for name, parameter in model.language_model.named_parameters():
                parameter.requires_grad_("layers.1" in name and GEN in name)
        model(pack(model.config, restoration("a"), restoration("b")))["mse"].sum.backward()
        found[freeze] = {k: p.grad for k, p in model.language_model.model.named_parameters()}
    last = [k for k in found[True] if "layers.1" in k and GEN in k]
    assert len(last) == 14
    for name in last:
        torch.testing.assert_close(found[True][name], found[False][name], rtol=1e-4, atol=1e-6)
    und = [g for k, g in found[True].items() if GEN not in k]
    assert all(g is None for g in und)


def test_frozen_und_without_images_leaves_zero_gradients():
    """Ranks that shard the weights reduce the same gradients, whatever their batches hold."""
    model = tiny_model(tiny_config(freeze_und=True))
    sample = Sample("text", [TextSegment(ids=[1, 2]), TextSegment(ids=[3], answer=True)])
    terms = model(pack(model.config, sample), complete=True)
    sum(term.sum for term in terms.values()).backward()
    for name, parameter in model.language_model.model.named_parameters():
        if GEN in name:
            assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


def test_swiglu_gradient():
    mlp = MLP(tiny_config().llm).double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, x)


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act 'gelu'"):
        MLP(tiny_config({"hidden_act": "gelu"}).llm)


def loss_and_gradients(model: Bagel, names: str) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    model.zero_grad()
    loss = model(pack(model.config, *map(restoration, names)))["mse"].sum
    loss.backward()
    return loss, [p.grad for p in model.language_model.model.layers.parameters()]


@pytest.mark.slow
def test_a_compiled_layer_computes_the_same():
    """Packs of other lengths are no reason to compile again."""
    plain, compiled = tiny_model(), tiny_model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled.language_model.model.layers[0].compile(dynamic=True, backend=counter)
    counts = []
    for names in ("ab", "cde"):
        loss, gradients = loss_and_gradients(plain, names)
        other_loss, other_gradients = loss_and_gradients(compiled, names)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
        for gradient, other in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0
