"""LoRA (arXiv 2106.09685) through peft: a few weights learn, so a laptop can fine-tune.

The input-add projection is trained whole: a base has never used it.
"""

from torch import Tensor, nn

from lmd.model.live_model import LiveModel
from lmd.training.sharding import whole_state

TARGETS = ("to_qkv", "to_q", "to_kv", "to_out", "to_gated")
ADAPTER = "default"


def add_lora(model: LiveModel, rank: int) -> LiveModel:
    """The same model with low-rank updates on every attention and feed-forward layer; only these
    and the input-add projection learn.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, seldom needed

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS))
    model = inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    model.dit.to_input_add.requires_grad_(True)
    return model


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights under their ordinary names, low-rank updates added in; the model stays as is.

    Where the model is sharded, every process has to ask.
    """
    whole = whole_state(model)
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in whole.items()
        if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):  # peft's LoraLayer
            down, up = (whole[f"{name}.lora_{which}.{ADAPTER}.weight"] for which in "AB")
            state[f"{name}.weight"] = state[f"{name}.weight"] + layer.scaling[ADAPTER] * up @ down
    return state
