"""Exported graphs, run by OpenVINO: a model and a codec that play what PyTorch would.

Values stay values: keys and values go in and come out, nothing is kept between two calls. Inputs
are passed without a copy; outputs are copied, since the runtime writes them into the same memory
the next time.
"""

import json
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmd.checkpoint import build_codec
from lmd.codec.base import Codec
from lmd.codec.spectral import SpectralCodec
from lmd.config import DiTConfig, Preset, from_dict
from lmd.errors import LmdError
from lmd.graph import FORMAT, MANIFEST, OPSET, WEIGHTS
from lmd.model.kv_cache import KeyValues
from lmd.model.live_model import Passes
from lmd.model.rotary import RotaryEmbedding
from lmd.outputs import file_sha256

AGAIN = "Export it again: lmd export --source SOURCE --out FOLDER."
MIN_WEIGHTS = 1 << 14  # matrices smaller than this stay in float32 with `int8`


class CompiledGraph:
    """One graph, ready to run from any thread.

    Args:
        path: of an ONNX file that `lmd export` wrote.
        precision: one of `PRECISIONS`. The choice is never left to the runtime.
        described: what a manifest says of its inputs, to be held against the file.

    Raises:
        LmdError: a file that the runtime cannot read, or other inputs than described.
    """

    def __init__(
        self, path: Path, precision: str = "float32", described: dict[str, Any] | None = None
    ) -> None:
        core = ov.Core()
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise LmdError(
                f"{path}: {str(error).strip().splitlines()[-1]}",
                f"a graph of opset {OPSET} with its weights beside it",
                AGAIN,
            ) from error
        found = {
            port.any_name: [d.get_length() if d.is_static else None for d in port.partial_shape]
            for port in model.inputs
        }
        if described is not None and found != {k: v["shape"] for k, v in described.items()}:
            raise LmdError(f"{path} with inputs {found}", f"what {MANIFEST} beside it lists", AGAIN)
        if precision == "int8":
            compress_weights(model)
        self.compiled = core.compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            },
        )
        self.local = threading.local()

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """Run once: tensors by name in, the outputs in their order out."""
        if not hasattr(self.local, "request"):
            self.local.request = self.compiled.create_infer_request()
        request, arrays = self.local.request, {k: v.contiguous() for k, v in inputs.items()}
        for name, tensor in arrays.items():
            request.set_tensor(name, ov.Tensor(tensor.numpy(), shared_memory=True))
        request.infer()
        n_outputs = len(self.compiled.outputs)
        outputs = (request.get_output_tensor(index).data for index in range(n_outputs))
        return [torch.from_numpy(array.copy()) for array in outputs]


def compress_weights(model: ov.Model) -> None:
    """Matrices as int8, one scale per output; products then quantise their inputs as well."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        weights = node.get_data()
        if weights.ndim != 2 or weights.size < MIN_WEIGHTS:
            continue
        scale = np.maximum(np.abs(weights).max(axis=1, keepdims=True), 1e-12) / 127
        whole = np.rint(weights / scale).astype(np.int8)
        restored = op.multiply(op.convert(op.constant(whole), "f32"), op.constant(scale))
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(restored.output(0))


class GraphModel(Passes):
    """A `LiveModel` whose passes run as graphs.

    Args:
        folder: what `lmd export` wrote.
        precision: one of `PRECISIONS`.
        manifest: of that folder.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, precision: str, manifest: dict[str, Any]) -> None:
        self.config: DiTConfig = from_dict(Preset, manifest["preset"]).dit
        self.fingerprint = manifest["fingerprint"]
        self.transformer, self.text, self._seconds = (
            CompiledGraph(folder / graph["file"], precision, graph["inputs"])
            for graph in (manifest["graphs"][name] for name in ("transformer", "text", "seconds"))
        )
        self.rope = RotaryEmbedding(self.config.rope_dim, self.config.rope_base)
        with safe_open(folder / WEIGHTS, "pt") as file:
            self.rope.inv_freq = file.get_tensor("model.dit.rope.inv_freq")

    def seconds(self, length: Tensor) -> Tensor:
        """See `SecondsEmbedder`."""
        return self._seconds(seconds=length)[0]

    def text_keys(self, tokens: Tensor) -> KeyValues:
        """See `LiveModel.text_keys`."""
        return KeyValues(*self.text(tokens=tokens))

    def run(
        self,
        noisy: Tensor,
        known: Tensor | None,
        keep_mask: Tensor | None,
        t: Tensor,
        global_cond: Tensor,
        text: KeyValues,
        past: KeyValues | None,
        positions: Tensor,
        attn_mask: Tensor | None,
        controls: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """See `LiveModel.run`."""
        if known is None or keep_mask is None:
            known, keep_mask = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
        if past is None:
            past = text.frames(0, 0)
        n_tokens, n_past = len(positions), past.keys.shape[-2]
        if attn_mask is None:
            attn_mask = torch.ones(n_tokens, n_past + n_tokens, dtype=torch.bool)
        further = {}
        if self.config.n_controls:
            blank = noisy.new_zeros(len(noisy), self.config.n_controls, noisy.shape[-1])
            further["controls"] = blank if controls is None else controls
        velocity, *fresh = self.transformer(
            noisy=noisy,
            known=known,
            keep_mask=keep_mask,
            t=t,
            global_cond=global_cond,
            text_keys=text.keys,
            text_values=text.values,
            past_keys=past.keys,
            past_values=past.values,
            positions=positions,
            attn_mask=attn_mask,
            **further,
        )
        return velocity, KeyValues(*fresh)


class Loaded(NamedTuple):
    """What an exported folder holds, ready to play."""

    preset: Preset
    model: GraphModel
    codec: Codec | None  # None where it was not exported: Stable Audio's plays in PyTorch
    source: str  # of the weights


def load_graphs(folder: Path, precision: str) -> Loaded:
    """Sizes, model and codec of an exported folder.

    Raises:
        LmdError: see `read_manifest`.
    """
    manifest = read_manifest(folder)
    chosen = from_dict(Preset, manifest["preset"])
    model = GraphModel(folder, precision, manifest)
    if "decoder" not in manifest["graphs"]:
        return Loaded(chosen, model, None, manifest["source"])
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if name.startswith("codec.")]  # noqa: SIM118
        tensors = {name.removeprefix("codec."): file.get_tensor(name) for name in names}
    codec = build_codec(chosen.codec, tensors, folder / WEIGHTS)
    play_graph(codec, folder, manifest["graphs"]["decoder"])
    return Loaded(chosen, model, codec, manifest["source"])


def play_graph(codec: SpectralCodec, folder: Path, graph: dict[str, Any]) -> None:
    """Let the codec's decoder network run as a graph, in float32, in place."""
    compiled = CompiledGraph(folder / graph["file"], "float32", graph["inputs"])
    n_past = len(codec.decoder.reaches)

    def network(latents: Tensor, end: Tensor, *past: Tensor) -> list[Tensor]:
        named = {f"past_{index}": past[index] for index in range(n_past)}
        return compiled(latents=latents, end=end, **named)

    codec.decoder.graph = network


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder, once it fits the files beside it.

    Raises:
        LmdError: not such a folder, another format, a graph that is missing, or weights that are
            not those that were exported.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if found != FORMAT or manifest["opset"] != OPSET:
            what = f"{path}: format {found!r}, opset {manifest['opset']}"
            raise LmdError(what, f"{FORMAT!r}, opset {OPSET}", AGAIN)
        missing = [
            graph["file"]
            for graph in manifest["graphs"].values()
            if not (folder / graph["file"]).is_file()
        ]
        if missing:
            raise LmdError(f"{folder} without {', '.join(missing)}", "every graph it lists", AGAIN)
        for graph in manifest["graphs"].values():
            if file_sha256(folder / graph["file"]) != graph["sha256"]:
                expected = f"a graph of opset {OPSET}, as exported: SHA-256 {graph['sha256'][:12]}…"
                raise LmdError(f"{folder / graph['file']}, changed since", expected, AGAIN)
        digest = file_sha256(folder / WEIGHTS)
        if digest != manifest["weights"]["sha256"]:
            what = f"{folder / WEIGHTS} with SHA-256 {digest[:12]}…"
            raise LmdError(what, f"{manifest['weights']['sha256'][:12]}…, as exported", AGAIN)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LmdError(f"{path}: {error}", "a folder that lmd export wrote", AGAIN) from error
    return manifest
