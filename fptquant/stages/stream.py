"""Calibrates models larger than memory: one block at a time is read, transformed, given its ranges, written and forgotten.

What flows from block to block are the hidden states of the calibration windows (with S_n the running scale too). They lie
in a file, and one window is in memory at a time. The stages are those of `fptquant.stages.calibrate.calibrate`, and so is
the result, bit for bit: every block sees the same numbers in the same order.

Memory beyond PyTorch and the libraries: one block in the dtype of the config, and the working space of a stage on it
(local optimization: about ten float32 copies of v_proj and o_proj; merging: a float64 copy of one weight, by rows); the
rows of the embedding that the calibration windows use; one window's activations; T_r's matrix. The embedding and
``lm_head`` are worked on by 2,048 rows.

After each part everything needed to go on is in the folder beside the output, so that a run which is killed loses one
block at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from fptquant.config.schema import Config
from fptquant.config.training import TRAINING_STAGES
from fptquant.data.text import Text
from fptquant.diagnostics import diagnostics
from fptquant.errors import UserError
from fptquant.files import replace_file
from fptquant.fingerprint import tensors_digest
from fptquant.float32_products import fast_float32_products
from fptquant.models.adapter import model_sizes
from fptquant.models.architectures import view_model
from fptquant.models.folders import MERGED, TRANSFORMED
from fptquant.models.instrument import get_context, instrument_for, range_tensors
from fptquant.models.loading import check_finite_weight, load_tokenizer, local_folder
from fptquant.models.prefix import fill_prefix_, model_prefixes, prefix_off
from fptquant.models.saving import QUANTIZERS, CalibrationResult, save_description
from fptquant.models.shards import Checkpoint, ShardWriter, join_shards, read_rows, read_tensor, write_index, write_shard
from fptquant.models.streaming import (
    PartialDecoder,
    PartState,
    check_checkpoint,
    empty_,
    fill_,
    meta_model,
    put_parameter_,
)
from fptquant.quantizers.quantizer import Quantizer
from fptquant.reports.progress import Progress
from fptquant.reports.unfinished_run import CHECKPOINT, lasting_run_folder, stream_description
from fptquant.stages.calibrate import calibration_windows, check_model
from fptquant.stages.find_prefix import check_prefix, resolve_prefix, with_prefix
from fptquant.stages.fuse_norms import fuse_block_, scale_columns_
from fptquant.stages.merge_transforms import merge_block_
from fptquant.stages.optimize_local import LocalOptions, LocalReport, TermReport, optimize_blocks_
from fptquant.stages.positions import with_positions
from fptquant.stages.progress import Progress as ProgressCallback
from fptquant.stages.set_ranges import observe_windows_, set_weight_ranges_
from fptquant.stages.stream_prefix import StreamedLook
from fptquant.stages.stream_state import StreamState
from fptquant.transforms import TransformOptions, build_transforms

ROWS_AT_ONCE = 2048
"""Rows of the embedding and ``lm_head`` that are in memory at once."""

STATE = f"{CHECKPOINT}.json"
"""What is finished (`StreamState`)."""
HIDDEN, SCALE = "hidden", "running_scale"
"""Tensors of the file that carries states from part to part: [windows, window, H] and [windows, window, 1]."""


@fast_float32_products
def calibrate_streamed(
    model: str | Path,
    config: Config,
    output: str | Path,
    *,
    text: str | Text | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: ProgressCallback | None = None,
) -> Path:
    """Calibrates the model of a folder block by block, and writes what `CalibrationResult.save` would write.

    Finished blocks lie in ``NAME.partial`` beside ``output`` (`fptquant.reports.unfinished_run`), where the run goes on if it
    was interrupted.

    Args:
        model: a folder in the model library's format, a name on the hub, or ``smollm2-135m``.
        resume: go on with the unfinished run of this output.
        device: where the one block is worked on.
        progress: called as ``progress(done, total, description)``; a progress bar by default.

    Raises:
        UserError: as `fptquant.calibrate`, for what needs the whole model at once, such as a learned residual rotation, and
            on ``resume`` if there is no unfinished run, or its config, model files, calibration text or versions are others.
            NaN or infinity in a weight is found when its block is read.

    Example:
        >>> out = calibrate_streamed("models/large", load_config("fptquant-local"), "runs/large")  # doctest: +SKIP
    """
    from fptquant.reports.experiment import DTYPES

    _check_streamable(config)
    folder = local_folder(model)
    stream = _prepare(folder, config, DTYPES[config.dtype], torch.device(device), text)
    description = {**stream_description(config), f"{CHECKPOINT}/inputs.yaml": _inputs(folder, stream)}
    lasting, needed = (MERGED, TRANSFORMED), _needed_bytes(stream)
    with (
        lasting_run_folder(
            output, description, overwrite=overwrite, resume=resume, lasting=lasting, needed_bytes=needed
        ) as partial,
        nullcontext(progress) if progress is not None else Progress() as bars,
    ):
        _Run(_with_quantizers(stream, partial, bars), partial).all_parts(bars)
    return Path(output)


def _check_streamable(config: Config) -> None:
    rotation = config.transforms.residual_rotation
    if rotation is not None and rotation.learn:
        raise UserError(
            "transforms.residual_rotation.learn = true looks at all weights in every step, which streaming never holds at once; "
            "set transforms.residual_rotation.learn=false, or calibrate in memory"
        )
    if config.transforms.block_rotation is not None:
        raise UserError(
            "transforms.block_rotation looks at the activations of the whole model; leave it out, or calibrate in memory"
        )
    if config.smoothing is not None:
        raise UserError("smoothing looks at the activations of the whole model; set smoothing=null, or calibrate in memory")
    if config.rounds:
        raise UserError(
            f"rounding.method = {config.rounding.method}{' with clip' * config.rounding.clip} is not possible with streaming; set "
            "rounding={}, or calibrate in memory"
        )
    for key in TRAINING_STAGES:
        if getattr(config, key) is not None:
            raise UserError(f"{key} needs the whole model in memory; set {key}=null, or run without streaming")


def _needed_bytes(stream: _Stream) -> int:
    """Disk space: the weights with a head of their own, states before and after a part, ranges and the rest."""
    view = view_model(stream.result.model)
    weights = sum(parameter.numel() for parameter in view.model.parameters()) + view.embedding.weight.numel() * stream.tied
    return int(1.05 * stream.dtype.itemsize * (weights + 2 * stream.windows.numel() * view.hidden_size)) + 5_000_000


@dataclass
class _Stream:
    """A model of which nothing is loaded yet, and what will be done to it."""

    config: Config
    source: Checkpoint
    result: CalibrationResult
    """The model on the meta device, its tokenizer and its transforms; the metrics are filled in at the end."""
    windows: Tensor
    dtype: torch.dtype
    device: torch.device
    tied: bool


def _prepare(folder: Path, config: Config, dtype: torch.dtype, device: torch.device, text: str | Text | None) -> _Stream:
    """Checks everything that can be known without reading weights."""
    model = meta_model(folder, dtype, device)
    view, source = view_model(model), Checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    check_model(model, config)
    config = with_positions(model, config)
    transforms = build_transforms(model_sizes(view), TransformOptions.of(config.transforms), seed=config.seed).to(device)
    tied = check_checkpoint(view, source)
    windows = calibration_windows(model, tokenizer, config, text)
    check_prefix(model, tokenizer, config, {"calibration.window": windows.shape[1]})
    result = CalibrationResult(model, tokenizer, config, transforms)
    return _Stream(config, source, result, windows, dtype, device, tied)


def _with_quantizers(stream: _Stream, folder: Path, progress: ProgressCallback) -> _Stream:
    """The same with the prefix as token ids, which the folder may know already, and with quantizers in its model."""
    model, config, known = stream.result.model, stream.config, folder / CHECKPOINT / "prefix.json"
    if known.is_file():
        found = json.loads(known.read_text(encoding="utf-8"))
        config, report = with_prefix(config, found["ids"]), found["report"]
    else:
        look = StreamedLook(stream.source, stream.dtype, stream.device)
        config, report = resolve_prefix(model, stream.result.tokenizer, config, stream.windows, look=look, progress=progress)
        replace_file(known, json.dumps({"ids": config.quantization.prefix, "report": report}).encode())
    instrument_for(model, config, stream.result.transforms)
    if config.norm_gains == "fused":
        model.config.tie_word_embeddings = False
    return replace(stream, config=config, result=replace(stream.result, config=config, metrics=report))


def _inputs(folder: Path, stream: _Stream) -> str:
    """What a half-finished run must have in common with this one besides its config, for its parts to be of use; as YAML."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".model", ".txt"))
    known = {
        "files": {path.name: f"{path.stat().st_size} bytes, modified {path.stat().st_mtime_ns}" for path in files},
        "windows": tensors_digest(stream.windows),
        "device": stream.device.type,
        "versions": {name: value for name, value in diagnostics().items() if name in ("fptquant", "versions")},
    }
    return yaml.safe_dump(known)


class _Run:
    """Works on the parts of a model, one after the other, in a folder that may hold some of them already."""

    def __init__(self, stream: _Stream, folder: Path) -> None:
        self.stream, self.config, self.folder, self.work = stream, stream.config, folder, folder / CHECKPOINT
        self.view = view_model(stream.result.model)
        self.transforms = stream.result.transforms
        rotation = self.transforms.residual_rotation
        self.rotation = None if rotation is None else rotation.frozen()
        self.fused = stream.config.norm_gains == "fused"
        self.decoder = PartialDecoder(stream.result.model, get_context(stream.result.model))
        self.weights = folder / (MERGED if stream.result.fully_mergeable else TRANSFORMED)
        self.weights.mkdir(exist_ok=True)
        self.state = StreamState.load(self.work / STATE)
        for index in range(min(self.state.next, self.view.num_layers)):
            if self.transforms.block(index).state_dict():
                self.transforms.block(index).load_state_dict(load_file(self.work / f"transforms-{index}.safetensors"))
        prefixes = model_prefixes(stream.result.model)
        for index, prefix in enumerate(prefixes[: max(0, self.state.next)]):
            prefix.load_state_dict(load_file(self.work / f"prefix-{index}.safetensors", str(stream.device)))

    @property
    def last(self) -> int:
        """The part of the final norm and ``lm_head``."""
        return self.view.num_layers

    def all_parts(self, progress: ProgressCallback) -> None:
        """Does what is left to do, and completes the folder."""
        parts = self.last + 2
        for part in range(self.state.next, self.last + 1):
            progress(part + 1, parts, "calibrating part by part")
            if part == -1:
                self._embedding()
            elif part < self.last:
                self._block(part)
            else:
                self._head()
            self.state.next = part + 1
            self.state.save(self.work / STATE)
            (self.work / f"states-{part}.safetensors").unlink(missing_ok=True)
        progress(parts, parts, "calibrating part by part")
        self._complete()

    def _name(self, part: str) -> str:
        return f"{getattr(self.view.adapter, part)}.weight"

    def _shard(self, part: int) -> str:
        return f"model-{part + 2:05}-of-{self.last + 2:05}.safetensors"

    def _rows(self, name: str, gain: Tensor | None, side: str) -> Iterator[Tensor]:
        """The embedding or ``lm_head``, transformed, by rows."""
        for piece in self.stream.source.rows(name, ROWS_AT_ONCE):
            rows = piece.to(self.stream.device, self.stream.dtype, copy=True)
            check_finite_weight(name, rows)
            if gain is not None:
                scale_columns_(rows, gain)
            yield rows if self.rotation is None else self.rotation.merge_into(rows, side)

    @torch.no_grad()
    def _embedding(self) -> None:
        name, module, path = self._name("embedding"), self.view.embedding, self.weights / self._shard(-1)
        with self.state.stage("embedding and head"), ShardWriter(path, {name: self._layout(module.weight)}) as writer:
            for rows in self._rows(name, None, "embedding"):
                writer.write(rows)
        put_parameter_(module, "weight", read_tensor(path, name))  # of which the windows touch some rows
        self._prefix(-1, torch.device("cpu"))
        self._flow(-1, module, torch.device("cpu"))
        self._release(-1, module)

    @torch.no_grad()
    def _head(self) -> None:
        stream, norm, head = self.stream, self.view.final_norm, self._name("lm_head")
        fill_(norm, self.view.adapter.final_norm + ".", stream.source, stream.dtype, stream.device)
        weight = norm.weight
        assert isinstance(weight, Tensor)
        gain = weight.clone() if self.fused else None
        if self.fused:
            weight.fill_(1.0)
        layout = {self._name("final_norm"): self._layout(weight)}
        if self.fused or not stream.tied:
            layout[head] = self._layout(self.view.lm_head.weight)
        with self.state.stage("embedding and head"), ShardWriter(self.weights / self._shard(self.last), layout) as writer:
            writer.write(weight)
            if head in layout:
                for rows in self._rows(self._name("embedding") if stream.tied else head, gain, "read"):
                    writer.write(rows)
        self._flow(self.last, norm, stream.device)
        self._release(self.last, norm)

    @torch.no_grad()
    def _block(self, index: int) -> None:
        stream, state = self.stream, self.state
        block, layer = self.view.blocks[index], self.view.layers[index]
        prefix = f"{self.view.adapter.layers}.{index}."
        with state.stage("read"):
            fill_(layer, prefix, stream.source, stream.dtype, stream.device)
        if self.fused:
            with state.stage("fuse norms"):
                fuse_block_(block)
        if self.rotation is not None:
            with state.stage("merge the residual rotation"):
                merge_block_(block, [self.rotation])
        local = self.config.local
        if local.method != "none":
            with state.stage("local optimization"):
                options = LocalOptions(local.method, local.p, local.steps, local.lr, local.value_steps, local.up_p)
                report = optimize_blocks_([block], self.transforms, options)
                state.local[index:] = [{name: asdict(term) for name, term in report.blocks[0].items()}]
        with state.stage("merge the transforms"):
            merge_block_(block, self.transforms.block(index).of_linears())
        self._prefix(index, stream.device)
        with state.stage("weight ranges"):
            set_weight_ranges_(layer)
        self._flow(index, layer, stream.device)
        with state.stage("write"):
            write_shard(self.weights / self._shard(index), {prefix + name: value for name, value in layer.named_parameters()})
            if transforms := self.transforms.block(index).state_dict():
                write_shard(self.work / f"transforms-{index}.safetensors", transforms)
        self._release(index, layer)

    def _layout(self, weight: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.stream.dtype, tuple(weight.shape)

    def _prefix(self, part: int, device: torch.device) -> None:
        """The prefix through one part: its keys and values stay with the block, its state goes on to the next part."""
        ids, before = self.config.quantization.prefix, self.work / f"prefix-states-{part}.safetensors"
        if not isinstance(ids, list):
            return
        state = None if part == -1 else PartState(**load_file(before, str(device)))
        cache = DynamicCache()
        model = self.stream.result.model
        with prefix_off(model), get_context(model).teacher(), self.decoder.only(part):
            found = self.decoder.run(torch.tensor([ids], device=device), state, cache)
        states = {name: value for name, value in asdict(found).items() if value is not None}
        write_shard(self.work / f"prefix-states-{part + 1}.safetensors", states)
        if 0 <= part < self.last:
            frequencies = self.view.get("rotary").inv_freq
            assert isinstance(frequencies, Tensor)
            prefix = model_prefixes(self.stream.result.model)[part]
            fill_prefix_(prefix, cache.layers[part], frequencies)
            write_shard(self.work / f"prefix-{part}.safetensors", dict(prefix.named_buffers()))

    def _flow(self, part: int, module: nn.Module, device: torch.device) -> None:
        """Sets the activation ranges of one part, and stores what the next one reads."""
        windows, count = self.stream.windows, len(self.stream.windows)
        if not count:
            return
        scaled = self.transforms.residual_scaling is not None and 0 <= part < self.last
        layout = {HIDDEN: (self.stream.dtype, (*windows.shape, self.view.hidden_size))}
        if scaled:
            layout[SCALE] = (torch.promote_types(self.stream.dtype, torch.float32), (*windows.shape, 1))
        scales: list[Tensor] = []
        stored = 0
        with (
            self.state.stage("activation ranges"),
            self.decoder.only(part),
            ShardWriter(self.work / f"states-{part + 1}.safetensors", layout) as writer,
        ):

            def run(index: int) -> None:
                nonlocal stored
                first = [self.config.calibration.first_position(index)]
                state = self.decoder.run(windows[index][None].to(device), self._state(part, index, device), first=first)
                if index == stored:  # in the first pass
                    stored += 1
                    writer.write(state.hidden)
                    scales.extend([] if state.running_scale is None else [state.running_scale])

            observe_windows_(module, run, count, at_least_once=True)
            for scale in scales:
                writer.write(scale)

    def _state(self, part: int, window: int, device: torch.device) -> PartState | None:
        if part == -1:
            return None
        path = self.work / f"states-{part}.safetensors"
        scaled = self.transforms.residual_scaling is not None and part > 0
        names = (HIDDEN, SCALE) if scaled else (HIDDEN,)
        return PartState(*(read_rows(path, name, window, window + 1).to(device) for name in names))

    def _release(self, part: int, module: nn.Module) -> None:
        """Writes the ranges of a part, and frees its memory."""
        write_shard(self.work / f"ranges-{part}.safetensors", range_tensors(module))
        empty_(module)
        for quantizer in module.modules():
            if isinstance(quantizer, Quantizer):
                quantizer.scale = quantizer.zero_point = None

    def _complete(self) -> None:
        write_index(self.weights, [self._shard(part) for part in range(-1, self.last + 1)])
        join_shards([self.work / f"ranges-{part}.safetensors" for part in range(-1, self.last + 1)], self.folder / QUANTIZERS)
        result, state = self.stream.result, self.state
        result.metrics.update(
            seconds=sum(state.seconds.values()), stages=state.seconds, calibration_tokens=self.stream.windows.numel(), streamed=True
        )
        if state.local:
            blocks = [{name: TermReport(**term) for name, term in block.items()} for block in state.local]
            report = LocalReport(self.config.local.method, state.seconds["local optimization"], blocks)
            result.metrics["local"] = report.as_dict()
        save_description(result, self.folder)
