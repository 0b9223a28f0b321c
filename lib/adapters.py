"""Policies that share one network: LoRA adapters, by peft (Eq. 6, and --lora-rank)."""

import os

from lib.files import UserError
from lib.models import load, training_of
from lib.parts import LORA, put_adapter


def add_lora(net, rank):
    """Freezes net and gives it a trainable LoRA adapter, "theta", on the attention's projections (script). The adapter
    starts at 0, so that net is still the reference."""
    from peft import LoraConfig  # here, because full fine-tuning does not need peft

    net.requires_grad_(False)
    projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=projections), "theta")


def with_adapter(net, *names):
    """net as a function that runs with this adapter, or with none, as the reference. Afterwards "theta" is on again."""
    layers = []  # found at the first call, when all adapters are loaded; net.set_adapter would search them each time

    def forward(*args, **kwargs):
        if not layers:
            layers.extend(m for m in net.modules() if hasattr(m, "_active_adapter"))
        for layer in layers:
            layer._active_adapter = list(names)
        try:
            return net(*args, **kwargs)
        finally:
            for layer in layers:
                layer._active_adapter = [name for name in net.peft_config if name == "theta"]
    return forward


def load_policy(path, role, base, model):
    """The winner or loser of Eq. 6: an adapter, which goes into the frozen network `base`, or a model's network. Raises
    UserError if it does not fit the model."""
    adapter = os.path.join(path, LORA)
    if not os.path.isfile(adapter):
        other = load(path, text=False)
        kinds = [(type(m.pipe).__name__, m.latent_shape, m.latent_scale, m.prediction_type,
                  m.net_name == "unet" and m.net.config.cross_attention_dim) for m in (other, model)]
        if kinds[0] != kinds[1]:
            raise UserError(f"--{role} {path} is a model of another kind: {kinds[0]}, not {kinds[1]}.")
        return other.net.to(model.device).requires_grad_(False)
    predicts = training_of(path, "prediction_type")
    if predicts not in (None, model.prediction_type):  # None: other programs' adapters do not say
        raise UserError(f"--{role} {path} is an adapter that predicts {predicts}, not {model.prediction_type}.")
    put_adapter(model, base, path, role, f"--{role} ")
    base.set_adapter([name for name in base.peft_config if name == "theta"])
    policy = with_adapter(base, role)
    policy.files = [adapter]
    return policy
