"""A model over several devices, for checkpoints that do not fit one GPU."""

from modeling.bagel.bagel import Bagel


def spread(model: Bagel, max_memory: dict[int | str, str]) -> Bagel:
    """Decoder layers go where `max_memory` ({0: "40GiB", "cpu": "100GiB"}) has room for them.

    All else, the cache too, stays on the model's own device; a layer gives its output back there.
    Layers on the CPU visit that device when they run. Needs accelerate (extra `lora`); raises
    ValueError where the layers do not fit.
    """
    from accelerate import cpu_offload, infer_auto_device_map
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layers, home = model.language_model.model.layers, model.device
    kinds = [type(layers[0]).__name__]
    # A layer is never split, and the first device keeps what is not a layer.
    places = infer_auto_device_map(layers, max_memory, no_split_module_classes=kinds)
    if "disk" in places.values():
        raise ValueError(f"{len(layers)} decoder layers do not fit max_memory={max_memory}")
    for name, layer in layers.named_children():
        place = places.get(name, places.get(""))
        if place == "cpu":
            cpu_offload(layer, execution_device=home)
        else:
            add_hook_to_module(layer.to(place), AlignDevicesHook(place, io_same_device=True))
    return model
