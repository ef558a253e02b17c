"""Local optimization: transforms that minimize the L_p norm of the merged weights, block by block, without data.

Large entries decide the step of a quantizer, and the L_p norm (p = 4) weighs them; the three terms are independent:
T_k: sum |k_proj'|^p + sum |q_proj'|^p over angles and scales of RoPE pairs,
T_v: sum |v_proj'|^p + sum |o_proj'|^p over a matrix per key/value head,
T_u: sum |up_proj'|^p + sum |down_proj'|^p over a scale per channel, with p = 2 where T_d follows.

``closed_form`` (default) solves T_k and T_u exactly and minimizes T_v by `optimize_value_mixing`; ``adamw`` is the
reference of the paper, which trains all parameters together by AdamW.

Source: FPTQuant (arXiv 2506.04985), local optimization; the closed forms are this project's own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.models.adapter import BlockView
from fptquant.models.architectures import view_model
from fptquant.stages.block_pool import map_blocks
from fptquant.stages.distributed import broadcast_, gathered, own, world_size
from fptquant.stages.merge_transforms import check_block_count
from fptquant.stages.optimize_value_mixing import optimize_value_mixing
from fptquant.stages.progress import Progress, quiet
from fptquant.transforms import BlockTransforms, ModelTransforms, QueryKeyRotation, UpScaling, ValueMixing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal["closed_form", "adamw", "none"]


@dataclass(frozen=True)
class LocalOptions:
    """How the local objective is minimized; the field names are those of configs.

    Raises:
        UserError: for an unknown method, or p != 4 with ``closed_form`` (T_k and T_v are solved for p = 4 only).
    """

    method: Method = "closed_form"
    p: float = 4.0
    steps: int = 200
    """AdamW steps for each block."""
    lr: float = 0.01
    value_steps: int = 100
    """At most so many steps for T_v; ``closed_form`` stops earlier once they gain little."""
    up_p: float | None = None
    """Exponent of T_u's term; None: 2 where T_d follows, else p."""

    def up_exponent(self, transforms: BlockTransforms) -> float:
        """T_u's exponent: ``up_p``, or what the transforms suggest.

        T_d mixes all entries of a row of down_proj, and of an activation, with signs: what is rounded then has the size
        of their Euclidean norms, and single large entries no longer count, hence p = 2.
        """
        if self.up_p is not None:
            return self.up_p
        return 2.0 if transforms.down_hadamard is not None else self.p

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UserError(f"local.method = {self.method!r} is not known; choose one of {', '.join(get_args(Method))}")
        if self.method == "closed_form" and self.p != 4:
            raise UserError(f"local.p = {self.p}: closed forms exist for p = 4; choose p = 4 or local.method = adamw")


@dataclass
class TermReport:
    """The objective of one transform in one block, before (as the transform started) and after."""

    before: float
    after: float
    seconds: float
    steps: int = 0
    condition_number: float | None = None
    """Largest condition number of T_v's matrices."""


@dataclass
class LocalReport:
    """What local optimization reached."""

    method: Method
    seconds: float = 0.0
    blocks: list[dict[str, TermReport]] = field(default_factory=list)
    """For each block, the terms by the name of their transform."""

    def as_dict(self) -> dict[str, Any]:
        """Method, seconds, and for each transform the totals over the blocks; fit for JSON."""
        names = dict.fromkeys(name for block in self.blocks for name in block)
        return {"method": self.method, "seconds": self.seconds, **{name: asdict(self.total(name)) for name in names}}

    def total(self, name: str) -> TermReport:
        """One transform's terms, added up over the blocks."""
        terms = [block[name] for block in self.blocks if name in block]
        conditions = [term.condition_number for term in terms if term.condition_number is not None]
        return TermReport(
            sum(term.before for term in terms),
            sum(term.after for term in terms),
            sum(term.seconds for term in terms),
            sum(term.steps for term in terms),
            max(conditions) if conditions else None,
        )


def query_key_loss(rotation: QueryKeyRotation, key: Tensor, query: Tensor, p: float = 4.0) -> Tensor:
    """T_k's term, float64: sum |k_proj'|^p + sum |q_proj'|^p, differentiable in the parameters."""
    angle, log_scale = rotation.angle, rotation.log_scale
    group = rotation.group(query.shape[0])
    return ops.lp_norm_query_key(key, angle, log_scale, p=p) + ops.lp_norm_query_key(
        query, angle, log_scale, group=group, inverse=True, p=p
    )


def up_scaling_loss(scaling: UpScaling, up: Tensor, down: Tensor, p: float = 4.0) -> Tensor:
    """T_u's term, float64: sum |up_proj'|^p + sum |down_proj'|^p, differentiable in the parameter."""
    return ops.lp_norm_scale(up, row_log_scale=scaling.log_scale, p=p) + ops.lp_norm_scale(
        down, column_log_scale=-scaling.log_scale, p=p
    )


def heads_of_value(value: Tensor, output: Tensor, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """v_proj and o_proj by key/value head, float32 or wider.

    Shape: value [K * D, in], output [out, K * group * D]; returns [K, D, in] and [K, out * group, D].
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    by_head = output.reshape(output.shape[0], num_kv_heads, -1, head_dim).permute(1, 0, 2, 3).flatten(1, 2)
    return value.to(dtype).reshape(num_kv_heads, head_dim, -1), by_head.to(dtype).contiguous()


def value_loss(mixing: ValueMixing, values: Tensor, outputs: Tensor, p: float = 4.0) -> Tensor:
    """T_v's term, float64: sum |M V|^p + sum |O M^-1|^p, differentiable in the parameter (`heads_of_value`)."""
    matrix = mixing.matrix().to(values.dtype)
    merged = (matrix @ values, torch.linalg.solve(matrix, outputs, left=False))
    if p == 4:
        return sum((w.square().square().sum(dtype=torch.float64) for w in merged), torch.zeros((), dtype=torch.float64))
    return sum((w.abs().pow(p).sum(dtype=torch.float64) for w in merged), torch.zeros((), dtype=torch.float64))


@torch.no_grad()
def solve_query_key_(rotation: QueryKeyRotation, key: Tensor, query: Tensor) -> None:
    """Sets T_k's angles and scales to the minimum for p = 4: five moments for each pair, then one angle each."""
    key_moments = ops.query_key_moments(key, head_dim=rotation.head_dim)
    query_moments = ops.query_key_moments(query, head_dim=rotation.head_dim)
    summed = query_moments.reshape(rotation.num_kv_heads, -1, *query_moments.shape[1:]).sum(1)
    angle, log_scale = ops.solve_query_key(key_moments, summed)
    rotation.angle.copy_(angle)
    rotation.log_scale.copy_(log_scale)


@torch.no_grad()
def solve_up_scaling_(scaling: UpScaling, up: Tensor, down: Tensor, p: float = 4.0) -> TermReport:
    """Sets T_u's scales to the minimum of s^p A + s^-p B for each channel: s = (B / A)^(1 / (2p)).

    A is the sum of |.|^p over the channel's row of up_proj, B over its column of down_proj. Channels that one of them
    ignores (A or B zero) keep scale 1.
    """
    began = time.perf_counter()
    a, b = ops.scale_moments(up, p=p)[0], ops.scale_moments(down, p=p)[1]
    alive = (a > 0) & (b > 0)
    log_scale = torch.where(alive, (b.log() - a.log()) / (2 * p), torch.zeros_like(a))
    factor = (p * scaling.log_scale.double()).exp()
    before = float((a * factor + b / factor).sum())
    scaling.log_scale.copy_(log_scale)
    after = float(torch.where(alive, 2 * (a * b).sqrt(), a + b).sum())
    return TermReport(before, after, time.perf_counter() - began)


def _closed_form_(block: BlockView, transforms: BlockTransforms, options: LocalOptions) -> dict[str, TermReport]:
    report: dict[str, TermReport] = {}
    rotation, mixing, scaling = transforms.query_key_rotation, transforms.value_mixing, transforms.up_scaling
    if rotation is not None:
        began, key, query = time.perf_counter(), block.k_proj.weight, block.q_proj.weight
        before = float(query_key_loss(rotation, key, query))
        solve_query_key_(rotation, key, query)
        after = float(query_key_loss(rotation, key, query))
        report[rotation.name] = TermReport(before, after, time.perf_counter() - began)
    if mixing is not None:
        began = time.perf_counter()
        values, outputs = heads_of_value(block.v_proj.weight, block.o_proj.weight, mixing.num_kv_heads, mixing.head_dim)
        result = optimize_value_mixing(mixing.matrix(), values, outputs, constraint=mixing.constraint, steps=options.value_steps)
        mixing.set_matrix_(result.matrix)
        before, after = float(result.loss_before.sum()), float(result.loss_after.sum())
        condition = float(mixing.condition_numbers().max())
        report[mixing.name] = TermReport(before, after, time.perf_counter() - began, result.steps, condition)
    if scaling is not None:
        report[scaling.name] = solve_up_scaling_(
            scaling, block.up_proj.weight, block.down_proj.weight, options.up_exponent(transforms)
        )
    return report


def _adamw_(block: BlockView, transforms: BlockTransforms, options: LocalOptions) -> dict[str, TermReport]:
    """The reference: all parameters of the block together; seconds are those of the whole block."""
    rotation, mixing, scaling = transforms.query_key_rotation, transforms.value_mixing, transforms.up_scaling
    heads = None
    if mixing is not None:
        heads = heads_of_value(block.v_proj.weight, block.o_proj.weight, mixing.num_kv_heads, mixing.head_dim)

    def terms() -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if rotation is not None:
            losses[rotation.name] = query_key_loss(rotation, block.k_proj.weight, block.q_proj.weight, options.p)
        if mixing is not None and heads is not None:
            losses[mixing.name] = value_loss(mixing, *heads, options.p)
        if scaling is not None:
            up_p = options.up_exponent(transforms)
            losses[scaling.name] = up_scaling_loss(scaling, block.up_proj.weight, block.down_proj.weight, up_p)
        return losses

    began = time.perf_counter()
    parameters = [p for t in (rotation, mixing, scaling) if t is not None for p in t.parameters()]
    # No weight decay: it would pull towards the start and away from the minimum that is compared.
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    with torch.no_grad():
        before = {name: float(loss) for name, loss in terms().items()}
    with torch.enable_grad():
        for _ in range(options.steps):
            optimizer.zero_grad()
            torch.stack(list(terms().values())).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        after = {name: float(loss) for name, loss in terms().items()}
    seconds = time.perf_counter() - began
    condition = float(mixing.condition_numbers().max()) if mixing is not None else None
    return {
        name: TermReport(before[name], after[name], seconds, options.steps, condition if name == "value_mixing" else None)
        for name in before
    }


@torch.no_grad()
def optimize_block_(block: BlockView, transforms: BlockTransforms, options: LocalOptions) -> dict[str, TermReport]:
    """Optimizes the transforms of one block in place; the weights are only read. Terms by the name of the transform."""
    trained = (transforms.query_key_rotation, transforms.value_mixing, transforms.up_scaling)
    if options.method == "none" or not any(isinstance(t, nn.Module) for t in trained):
        return {}
    solve = _closed_form_ if options.method == "closed_form" else _adamw_
    return solve(block, transforms, options)


def optimize_local_(
    model: PreTrainedModel,
    transforms: ModelTransforms,
    *,
    method: Method = "closed_form",
    p: float = 4.0,
    steps: int = 200,
    lr: float = 0.01,
    value_steps: int = 100,
    up_p: float | None = None,
    progress: Progress = quiet,
) -> LocalReport:
    """Optimizes T_k, T_v and T_u of every block in place; the model is only read.

    Fold the norm gains first, and merge T_r: the objective is that of the weights which will be quantized (T_d, which
    is merged afterwards, is left out of it). Blocks are independent; each is worked on by one thread, so the memory
    needed is a few times the largest weight for each thread, and the result does not depend on their number. Several
    processes take turns at the blocks and exchange the results, which are those of one process. Nothing is random.

    Args:
        steps, lr: of AdamW, for each block (``adamw`` only).
        value_steps: at most so many steps for T_v; it stops earlier once they gain little (``closed_form`` only).
        up_p: exponent of T_u's term; None: 2 where T_d follows, else p.

    Raises:
        UserError: as `LocalOptions`, or if the model has another number of blocks than the transforms.
    """
    options = LocalOptions(method, p, steps, lr, value_steps, up_p)
    blocks = view_model(model).blocks
    check_block_count(len(blocks), transforms)
    return _exchange_(transforms, optimize_blocks_(own(blocks), transforms, options, progress=progress))


def _exchange_(transforms: ModelTransforms, report: LocalReport) -> LocalReport:
    """Gives every process what each has found for its share of the blocks, bit for bit."""
    reports, processes = gathered(report.blocks), world_size()
    for index in range(len(transforms.blocks)):
        block = transforms.block(index)
        broadcast_([*block.parameters(), *block.buffers()], source=index % processes)
    blocks = [reports[index % processes][index // processes] for index in range(sum(map(len, reports)))]
    return replace(report, blocks=blocks)


def optimize_blocks_(
    blocks: Sequence[BlockView], transforms: ModelTransforms, options: LocalOptions, *, progress: Progress = quiet
) -> LocalReport:
    """`optimize_local_` for some blocks of a model."""
    began = time.perf_counter()
    report = LocalReport(options.method)
    results = map_blocks(lambda block: optimize_block_(block, transforms.block(block.index), options), blocks)
    for done, terms in enumerate(results, start=1):
        report.blocks.append(terms)
        progress(done, len(blocks), "optimizing the transforms of each block")
    report.seconds = time.perf_counter() - began
    return report
