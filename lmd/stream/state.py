"""Where a stream is: a value that can be kept, saved, loaded and gone on from."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmd.codec.base import DecodeState
from lmd.errors import LmdError
from lmd.model.kv_cache import Memory
from lmd.shapes import Latents

STATE_FORMAT = "lmd-stream-state-4"
CODECS_OWN = ("decode.overhang", "decode.running")  # lie where the codec computes


@dataclass(frozen=True)
class StreamState:
    """Where a stream is.

    Attributes:
        context: the latest latents, `[batch, latent, context frame]`; zeros are silence.
        index: of the next block.
        n_frames: the number of the next block's first frame; its noise depends on that.
        n_samples: samples handed out so far.
        memory: keys and values for the next block, valid for `memory_key`.
        memory_key: (prompt, guided, regime, block_frames) that the memory was made with.
        decode: what the streamed decode carries.
    """

    context: Latents
    index: int = 0
    n_frames: int = 0
    n_samples: int = 0
    memory: Memory | None = None
    memory_key: tuple = ()
    decode: DecodeState = field(default_factory=DecodeState)

    def save(self, path: str | Path, weights: Mapping[str, str], text: str) -> None:
        """Write everything to a safetensors file; see `Streamer.save_state`.

        Args:
            path: where to.
            weights: the SHA-256 of what made the state, by part.
            text: the text encoder's class and size.

        Raises:
            LmdError: the file cannot be written.
        """
        tensors = {"context": self.context}
        if self.memory is not None:
            tensors |= {f"memory.{name}": t for name, t in self.memory.tensors().items()}
        header = {
            "format": STATE_FORMAT,
            "weights": dict(weights),
            "text": text,
            "index": self.index,
            "n_frames": self.n_frames,
            "n_samples": self.n_samples,
            "memory_key": self.memory_key,
            "decode": _describe(self.decode, "decode", tensors),
        }
        # Tensors may be views of one another; a file holds every one for itself.
        packed = {
            name: t.detach().clone(memory_format=torch.contiguous_format)
            for name, t in tensors.items()
        }
        try:
            save_file(packed, path, metadata={"lmd": json.dumps(header)})
        except (SafetensorError, OSError) as error:
            raise LmdError(
                f"{path}: {error}", "a file that can be written", "Choose another place."
            ) from error

    @classmethod
    def load(
        cls,
        path: str | Path,
        context_shape: tuple[int, int],
        weights: Mapping[str, str],
        devices: tuple[torch.device, torch.device],
        text: str,
        running: Any = None,
    ) -> "StreamState":
        """Read a state back; see `Streamer.load_state`.

        Args:
            path: what `save` wrote.
            context_shape: (latent channels, context frames) that the model expects.
            weights: the SHA-256 of what is to go on from the state, by part.
            devices: of the model and of the codec.
            text: the text encoder's class and size; keys of another one's tokens are let go.
            running: a fresh streaming state of the codec, or None if it has none.

        Raises:
            LmdError: not such a file, or made with another model or codec.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("lmd", "{}"))
                tensors = {
                    name: file.get_tensor(name).to(devices[name.startswith(CODECS_OWN)])
                    for name in file.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError) as error:
            raise LmdError(
                f"{path}: {error}", "a saved stream state", "Save it again with save_state."
            ) from error
        _check_header(header, path, weights)
        found = tuple(tensors["context"].shape[1:])
        if found != context_shape:
            raise LmdError(
                f"{path}: context {found}",
                f"{context_shape} (latent channels, frames)",
                "Load it with the window that it was saved with.",
            )
        memory = {k[len("memory.") :]: v for k, v in tensors.items() if k.startswith("memory.")}
        if header.get("text") != text:
            memory = {}
        pattern = DecodeState(running=running)
        return cls(
            context=tensors["context"],
            index=header["index"],
            n_frames=header["n_frames"],
            n_samples=header["n_samples"],
            memory=Memory.from_tensors(memory) if memory else None,
            memory_key=_rebuild(header["memory_key"], None, tensors),
            decode=_rebuild(header["decode"], pattern, tensors),
        )


def _check_header(header: dict[str, Any], path: str | Path, weights: Mapping[str, str]) -> None:
    """Refuse a file of another kind or version, and a state that other weights made."""
    if header.get("format") != STATE_FORMAT:
        raise LmdError(
            f"{path}: format {header.get('format')!r}",
            f"format {STATE_FORMAT!r}, which says what weights it was made with",
            "Make the state again and write it with save_state.",
        )
    for part, expected in weights.items():
        found = header["weights"].get(part, "none")
        if found != expected:
            raise LmdError(
                f"{path}: a state of the {part} with SHA-256 {found[:12]}…",
                f"{expected[:12]}…, the {part} that is loaded",
                f"Load it with the {part} that it was saved with, in the same precision.",
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
    parts = {
        name: _rebuild(part, getattr(pattern, name, None), tensors)
        for name, part in described["fields"].items()
    }
    return type(pattern)(**parts)
