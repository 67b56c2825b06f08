"""Weights split among processes (FSDP2), so that a model may be larger than one device's memory.

Each process keeps its part of every weight, of its moving average and of the optimizer's state.
"""

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lmd.model.live_model import LiveModel


class Sharding(ModelParallelStrategy):
    """Lightning's strategy for `shard`, with checkpoints of one file.

    That can be renamed into place, and any number of processes can go on from it.
    """

    def __init__(self, n_processes: int, backend: str) -> None:
        super().__init__(n_processes, 1, False, backend)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's state, with that of weights no step has used yet: loading asks for every one."""
        state = super().optimizer_state(optimizer)
        if self.global_rank == 0:
            for index, weight in enumerate(self.model.parameters()):
                if weight.requires_grad and index not in state["state"]:
                    nothing = torch.zeros(weight.shape)
                    fresh = {"step": torch.tensor(0.0), "exp_avg": nothing, "exp_avg_sq": nothing}
                    state["state"][index] = fresh
        return state


def shard(module: nn.Module, model: LiveModel, average: LiveModel, mesh: DeviceMesh) -> None:
    """Split a model and its average, in place, among the processes of a mesh.

    The model is gathered block by block while `module.training_step` runs; cross-attention on its
    own, because its text keys are computed before the blocks run. The average never computes, so it
    is one piece.
    """
    for block in model.dit.blocks:
        register_fsdp_forward_method(fully_shard(block.cross_attn, mesh=mesh), "key_value")
        fully_shard(block, mesh=mesh)
    fully_shard(average, mesh=mesh)
    register_fsdp_forward_method(fully_shard(module, mesh=mesh), "training_step")


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, gathered where they are split: then every process has to ask."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
