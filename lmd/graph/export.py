"""`lmd export`: a model and its codec as ONNX graphs, one file of weights and one manifest.

    lmd export --source arc --out graphs
    lmd export --source arc --out graphs --block-frames 48 12   # static shapes, too

The graphs refer to `weights.safetensors` by offset, so what is trained is stored once. The manifest
is where a runtime learns every dimension. Each graph is run beside PyTorch before it counts.
"""

import io
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lmd.codec.base import Codec
from lmd.codec.spectral import SpectralCodec
from lmd.config import Preset, check_block, to_dict
from lmd.errors import LmdError
from lmd.graph import CODEC, FORMAT, MANIFEST, OPSET, WEIGHTS
from lmd.graph.runtime import CompiledGraph
from lmd.model.dit import frame_positions
from lmd.model.kv_cache import KeyValues
from lmd.model.live_model import LiveModel
from lmd.model.weights import fingerprint
from lmd.outputs import file_sha256
from lmd.rng import normal
from lmd.stream.block import LiveDenoiser

TOLERANCE = 1e-4  # of an exported graph, as a share of the largest output; measured: 7e-6
BATCH, FRAMES, PAST = 2, 40, 24  # while tracing: unlike one another, and no special case


class Traced(nn.Module):
    """A function of tensors that computes with the weights of `owner`."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function returns, as a tuple."""
        found = self.function(*inputs)
        return (found,) if isinstance(found, Tensor) else tuple(found)


@dataclass(frozen=True)
class Graph:
    """One graph to be exported.

    Attributes:
        module: what is traced.
        inputs: examples by name, in the order of the function's arguments.
        dynamic: by input, the dimensions that may differ at run time.
        outputs: names.
        weights: whose weights it has: `model` or `codec`.
    """

    module: Traced
    inputs: dict[str, Tensor]
    dynamic: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    weights: str = "model"


def transformer_graph(
    model: LiveModel, n_text: int, batch: int, n_frames: int, n_past: int
) -> Graph:
    """The pass that everything of playing is; see `LiveModel.run`."""
    c = model.config
    heads = (c.depth, batch, c.n_heads)
    shapes = {
        "noisy": (batch, c.latent_dim, n_frames),
        "known": (batch, c.latent_dim, n_frames),
        "keep_mask": (batch, 1, n_frames),
        "t": (batch,),
        "global_cond": (batch, c.global_dim),
        "text_keys": (*heads, n_text, c.head_dim),
        "text_values": (*heads, n_text, c.head_dim),
        "past_keys": (*heads, n_past, c.head_dim),
        "past_values": (*heads, n_past, c.head_dim),
    }
    inputs = {name: normal(shape, 0, f"export {name}") for name, shape in shapes.items()}
    inputs["t"] = inputs["t"].sigmoid()
    inputs["keep_mask"] = (inputs["keep_mask"] > 0).float()
    inputs["positions"] = frame_positions(n_frames, n_past + 1)
    inputs["attn_mask"] = torch.ones(n_frames + 1, n_past + n_frames + 1, dtype=torch.bool)
    dynamic = dict.fromkeys(("noisy", "known", "keep_mask"), (0, 2))
    dynamic |= {"t": (0,), "global_cond": (0,), "text_keys": (1,), "text_values": (1,)}
    dynamic |= {"past_keys": (1, 3), "past_values": (1, 3), "positions": (0,), "attn_mask": (0, 1)}
    if c.n_controls:
        inputs["controls"] = normal((batch, c.n_controls, n_frames), 0, "export controls")
        dynamic["controls"] = (0, 2)

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        *frames, text_k, text_v, past_k, past_v, positions, mask = given[:11]
        text, past = KeyValues(text_k, text_v), KeyValues(past_k, past_v)
        velocity, fresh = model.run(*frames, text, past, positions, mask, *given[11:])
        return velocity, *KeyValues.stack(fresh)

    return Graph(Traced(model, run), inputs, dynamic, ("velocity", "keys", "values"))


def model_graphs(model: LiveModel, chosen: Preset) -> dict[str, Graph]:
    """The model's graphs by name, with dimensions left open."""
    n_text = chosen.text.n_tokens + 1
    tokens = {"tokens": normal((BATCH, n_text, chosen.dit.text_dim), 0, "export tokens")}
    seconds = {"seconds": torch.tensor([1.0, 9.0])}
    text, length = Traced(model, model.text_keys), Traced(model, model.seconds)
    return {
        "transformer": transformer_graph(model, n_text, BATCH, FRAMES, PAST),
        "text": Graph(text, tokens, {"tokens": (0,)}, ("keys", "values")),
        "seconds": Graph(length, seconds, {"seconds": (0,)}, ("embed",)),
    }


def static_graphs(model: LiveModel, chosen: Preset, block_frames: int) -> dict[str, Graph]:
    """The passes of one block length with every dimension fixed, for runtimes that want it so."""
    n_text, s, o = chosen.text.n_tokens + 1, chosen.window.context_frames, block_frames
    sizes = {"context": (s, 0), "step": (o, s), "fused_step": (2 * o, s)}
    made = {}
    for name, (n_frames, n_past) in sizes.items():
        graph = transformer_graph(model, n_text, 1, n_frames, n_past)
        made[name if name == "context" else f"{name}_{o}"] = replace(graph, dynamic={})
    return made


def codec_graphs(codec: SpectralCodec) -> dict[str, Graph]:
    """The graphs of the spectral codec; phases and STFTs stay outside."""
    decoder, c = codec.decoder, codec.config
    blocks = (*decoder.blocks, *decoder.step_blocks)
    widths = [c.latent_dim, *(block.norm.weight.numel() for block in blocks)]
    names = [f"past_{i}" for i in range(len(widths))]
    inputs = {"latents": normal((BATCH, c.latent_dim, 12), 0, "export latents")}
    inputs["end"] = torch.zeros(BATCH, 2, 1)
    for name, reach, width in zip(names, decoder.reaches, widths, strict=True):
        inputs[name] = normal((BATCH, reach, width), 0, f"export {name}")
    dynamic = {"latents": (0, 2), "end": (0, 1)} | dict.fromkeys(names, (0,))
    outputs = ("level", "advance", *(f"seen_{i}" for i in range(len(widths))))
    bands = (BATCH, 12, c.n_bands * c.hops_per_frame)
    levels = {"features": normal(bands, 0, "export levels") * 20 - 40}
    encode = Traced(codec, codec.encoder.from_features)
    decode = Traced(codec, decoder.network)
    return {
        "decoder": Graph(decode, inputs, dynamic, outputs, "codec"),
        "encoder": Graph(encode, levels, {"features": (0, 1)}, ("latents",), "codec"),
    }


def export(
    model: LiveModel,
    codec: Codec,
    chosen: Preset,
    out: Path,
    *,
    block_frames: tuple[int, ...] = (),
    source: str = "",
    codec_file: Path | None = None,
) -> dict[str, Any]:
    """Write graphs, weights and manifest into a new folder, or over one that `export` wrote.

    Args:
        model: float32, on the CPU.
        codec: its codec. Only the spectral codec becomes graphs; Stable Audio's plays in PyTorch,
            from a copy of its file.
        chosen: the sizes.
        out: the folder; it appears when everything in it is whole and checked.
        block_frames: block lengths for which graphs with static shapes are wanted as well.
        source: where the weights come from, for the manifest.
        codec_file: the file that the codec was loaded from.

    Returns:
        The manifest.

    Raises:
        LmdError: a folder that is not ours or cannot be written, a block length that the context
            does not hold, or a graph that does not compute what PyTorch does.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise LmdError(f"{out}, which holds other files", "a new folder", "Choose another place.")
    graphs = model_graphs(model, chosen)
    if isinstance(codec, SpectralCodec):
        graphs |= codec_graphs(codec)
    for o in block_frames:
        check_block(chosen.window.context_frames, o)
        graphs |= static_graphs(model, chosen, o)
    began, partial = time.perf_counter(), out.with_name(f".{out.name}.{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        named = {f"model.{k}": t.float() for k, t in model.state_dict().items()}
        if isinstance(codec, SpectralCodec):
            named |= {f"codec.{k}": t for k, t in codec.state_dict().items()}
        elif codec_file is not None:
            shutil.copy(codec_file, partial / CODEC)
        save_file({k: t.contiguous() for k, t in named.items()}, partial / WEIGHTS)
        offsets = tensor_offsets(partial / WEIGHTS)
        described = {}
        for name, graph in tqdm(graphs.items(), desc="exporting", file=sys.stderr):
            write_graph(graph, partial / f"{name}.onnx", offsets)
            described[name] = {
                "file": f"{name}.onnx",
                "sha256": file_sha256(partial / f"{name}.onnx"),
                "inputs": {k: shape_of(k, v, graph) for k, v in graph.inputs.items()},
                "outputs": list(graph.outputs),
                "max_difference": largest_difference(graph, partial / f"{name}.onnx"),
            }
        manifest = {
            "format": FORMAT,
            "source": source,
            "preset": to_dict(chosen),
            "sample_rate": chosen.codec.sample_rate,
            "block_frames": list(block_frames),
            "precision": "float32",
            "opset": OPSET,
            "weights": {"file": WEIGHTS, "sha256": file_sha256(partial / WEIGHTS)},
            "fingerprint": fingerprint(LiveDenoiser(model)),
            "graphs": described,
            "seconds": time.perf_counter() - began,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise LmdError(
            f"{out}: {error.strerror or error}", "a folder that can be written", "Choose another."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def write_graph(graph: Graph, path: Path, offsets: dict[str, tuple[int, int]]) -> None:
    """One ONNX file whose trained weights are places in the file of weights."""
    import onnx_ir as ir

    free = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(graph.dynamic.get(name, ()), free) for name in graph.inputs)
    with torch.no_grad(), quiet():
        traced = torch.export.export(
            graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=(shapes,)
        )
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # which would store a weight again, transposed
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
        for name, value in program.model.graph.initializers.items():
            stored = name.replace("owner.", f"{graph.weights}.", 1)
            if stored in offsets:
                begin, length = offsets[stored]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, begin, length, value.dtype, shape=value.shape, name=name,
                    base_dir=path.parent,
                )  # fmt: skip
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where in the source each node comes from
        ir.save(program.model, path)


def tensor_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Where in a safetensors file every tensor's bytes begin, and how many they are."""
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_header))
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + n_header + a, b - a) for name, (a, b) in spans.items()}


def largest_difference(graph: Graph, path: Path) -> float:
    """Between the written graph and PyTorch, as a share of the largest output.

    Raises:
        LmdError: it is more than `TOLERANCE`.
    """
    with torch.no_grad():
        expected = graph.module(*graph.inputs.values())
    found = CompiledGraph(path)(**graph.inputs)
    difference = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )
    if not difference < TOLERANCE:
        raise LmdError(
            f"{path.name}: {difference:.1e} from what PyTorch computes",
            f"less than {TOLERANCE}",
            "Play with engine='torch', and report this with `lmd bench`'s first lines.",
        )
    return difference


def shape_of(name: str, example: Tensor, graph: Graph) -> dict[str, Any]:
    """Type and shape of an input; None where a dimension is open."""
    free = graph.dynamic.get(name, ())
    shape = [None if d in free else n for d, n in enumerate(example.shape)]
    return {"dtype": str(example.dtype).removeprefix("torch."), "shape": shape}


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's notes are for its makers."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
