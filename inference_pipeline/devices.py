"""A model over several devices, for checkpoints that do not fit one GPU."""

import torch
from torch import nn

from modeling.bagel.bagel import Bagel


def spread(model: Bagel, max_memory: dict[int | str, str], home: torch.device | str) -> Bagel:
    """Decoder layers go where `max_memory` ({0: "40GiB", "cpu": "100GiB"}) has room for them.

    The model comes on the CPU. All but the layers, the cache too, moves to `home`, whose share of
    `max_memory` has to leave room for that; a layer gives its output back there. Layers on the CPU
    visit `home` when they run. Needs accelerate (extra `lora`); raises ValueError where the
    layers do not fit.
    """
    from accelerate import cpu_offload, infer_auto_device_map
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    decoder = model.language_model.model
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    model.to(home)
    decoder.layers = layers
    kinds = [type(layers[0]).__name__]  # never split
    places = infer_auto_device_map(layers, max_memory, no_split_module_classes=kinds)
    if "disk" in places.values():
        raise ValueError(f"{len(layers)} decoder layers do not fit max_memory={max_memory}")
    for name, layer in layers.named_children():
        place = places.get(name, places.get(""))
        if place == "cpu":
            cpu_offload(layer, execution_device=torch.device(home))
        else:
            add_hook_to_module(layer.to(place), AlignDevicesHook(place, io_same_device=True))
    return model
