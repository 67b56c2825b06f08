"""Where a stream is: a value that can be kept, saved, loaded and gone on from."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmd.cache import Memory
from lmd.codec import DecodeState
from lmd.errors import LmdError
from lmd.shapes import Latents

STATE_FORMAT = "lmd-stream-state-1"


@dataclass(frozen=True)
class StreamState:
    """Where a stream is.

    Attributes:
        context: the latest latents, `[batch, latent, context frame]`; zeros are silence.
        index: of the next block.
        n_samples: samples handed out so far.
        memory: keys and values for the next block, valid for `memory_key`.
        memory_key: (prompt, guided, regime, block_frames) that the memory was made with.
        decode: what the streamed decode carries.
    """

    context: Latents
    index: int = 0
    n_samples: int = 0
    memory: Memory | None = None
    memory_key: tuple = ()
    decode: DecodeState = field(default_factory=DecodeState)

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file; `Streamer.load_state` reads it."""
        tensors = {"context": self.context}
        if self.memory is not None:
            tensors |= {f"memory.{name}": t for name, t in self.memory.tensors().items()}
        header = {
            "format": STATE_FORMAT,
            "index": self.index,
            "n_samples": self.n_samples,
            "memory_key": self.memory_key,
            "decode": _describe(self.decode, "decode", tensors),
        }
        # Tensors may be views of one another; a file holds every one for itself.
        packed = {
            name: t.detach().clone(memory_format=torch.contiguous_format)
            for name, t in tensors.items()
        }
        save_file(packed, path, metadata={"lmd": json.dumps(header)})

    @classmethod
    def load(
        cls, path: str | Path, context_shape: tuple[int, int], running: Any = None
    ) -> "StreamState":
        """Read a state back.

        Args:
            path: what `save` wrote.
            context_shape: (latent channels, context frames) that the model expects.
            running: a fresh streaming state of the codec, or None if it has none.

        Raises:
            LmdError: not such a file, or made with a model or codec of another shape.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("lmd", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise LmdError(
                f"{path}: {error}", "a saved stream state", "Save it again with state.save(path)."
            ) from error
        found = tuple(tensors["context"].shape[1:]) if "context" in tensors else None
        if header.get("format") != STATE_FORMAT or found != context_shape:
            raise LmdError(
                f"{path}: format {header.get('format')!r}, context {found}",
                f"format {STATE_FORMAT!r}, context {context_shape}",
                "Load it with the model that it was saved with.",
            )
        memory = {k[len("memory.") :]: v for k, v in tensors.items() if k.startswith("memory.")}
        pattern = DecodeState(running=running)
        return cls(
            context=tensors["context"],
            index=header["index"],
            n_samples=header["n_samples"],
            memory=Memory.from_tensors(memory) if memory else None,
            memory_key=_rebuild(header["memory_key"], None, tensors),
            decode=_rebuild(header["decode"], pattern, tensors),
        )


def _describe(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON; its tensors go into `tensors` under names that the JSON holds."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"fields": {k: _describe(v, f"{name}.{k}", tensors) for k, v in parts.items()}}
    if isinstance(value, tuple | list):
        return [_describe(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
    return value


def _rebuild(described: Any, pattern: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_describe` described; `pattern` is a value whose dataclasses are to be restored."""
    if isinstance(described, list):
        return tuple(_rebuild(part, None, tensors) for part in described)
    if not isinstance(described, dict):
        return described
    if "tensor" in described:
        return tensors[described["tensor"]]
    if not dataclasses.is_dataclass(pattern):
        raise LmdError(
            "a state with a codec's streaming state",
            "a codec that streams in the same way",
            "Load it with the codec that it was saved with.",
        )
    parts = {
        name: _rebuild(part, getattr(pattern, name, None), tensors)
        for name, part in described["fields"].items()
    }
    return type(pattern)(**parts)
