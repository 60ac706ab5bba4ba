"""Floating point operations of a forward pass, and the share of them that meets a nonzero weight."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all, nonzero) parameters; a tied parameter counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)


def count_flops(model: PreTrainedModel, input_ids: Tensor) -> tuple[int, int]:
    """(FLOPs, nonzero FLOPs) of one forward pass over input_ids, int64 [batch, length], logits of all positions.

    torch's counter: 2 per multiply-add of every matrix product, attention's as well (without use of causality), the
    expert products of mixtures too, which torch leaves out. A product's nonzero FLOPs are its FLOPs times the share of
    nonzeros in its weight: theoretical, what a kernel that skips every zero would be left with.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    skipped = 0.0

    def product(first: int):  # type: ignore[no-untyped-def]  # the counter's own calling convention
        """Formula for an operator whose two factors are its arguments `first` and `first + 1`."""

        def flops(*operands: Tensor, out_val: Tensor, **_: object) -> int:
            nonlocal skipped
            left, right = operands[first : first + 2]
            total = 2 * out_val.numel() * left.shape[-1]
            for factor in (left, right):
                if factor.untyped_storage().data_ptr() in weights:
                    skipped += total * (1 - int(factor.count_nonzero()) / factor.numel())
            return total

        flops._get_raw = True  # type: ignore[attr-defined]  # the counter hands over tensors instead of shapes
        return flops

    operators = torch.ops.aten
    formulas = {operators.mm: 0, operators.bmm: 0, operators.addmm: 1, operators.baddbmm: 1, operators._grouped_mm: 0}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        formulas[torch.ops.transformers.grouped_mm_fallback] = 0
    mapping = {operator: product(first) for operator, first in formulas.items()}
    # The fused attention kernels of the CPU are unknown to the counter; the plain one is made of matrix products.
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
    ):
        model(input_ids=input_ids, use_cache=False)
    total = counter.get_total_flops()
    return total, round(total - skipped)
