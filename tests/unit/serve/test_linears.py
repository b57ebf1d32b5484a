"""Every kernel computes the product of the stored values, as closely as its arithmetic allows."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from llmos_cli.models.quantized import Int4Linear, Int8Linear, pack_nibbles, quantize_rows
from llmos_cli.serve.runner.linears import KINDS, Kernels, choose, fuse

COLUMNS = 96


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def int8(rows: int, *, bias: bool) -> tuple[Int8Linear, torch.Tensor]:
    module = Int8Linear(COLUMNS, rows, bias=bias, dtype=torch.float32)
    weight, scale = quantize_rows(numbers(rows, COLUMNS))
    module.weight.data, module.weight_scale = weight, scale
    if bias:
        module.bias = nn.Parameter(numbers(rows), requires_grad=False)
    return module, weight.float() * scale


def int4(rows: int, *, bias: bool, group: int = 32) -> tuple[Int4Linear, torch.Tensor]:
    module = Int4Linear(COLUMNS, rows, group=group, bias=bias, dtype=torch.float32)
    values = torch.randint(-8, 8, (rows, COLUMNS), dtype=torch.int8, generator=torch.Generator().manual_seed(rows))
    module.weight_packed.data = pack_nibbles(values)
    module.weight_scale = numbers(rows, COLUMNS // group).abs().bfloat16().float()
    if bias:
        module.bias = nn.Parameter(numbers(rows), requires_grad=False)
    return module, module.dense(torch.float32)


def check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, error: float) -> None:
    expected = functional.linear(x, weight, bias)
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "error"), [("dynamic", 2e-2), ("packed", 1e-2), ("dense", 1e-6)])
def test_int8(name: str, error: float, bias: bool, rows: int) -> None:
    parts = [int8(size, bias=bias) for size in (32, 16)]
    weight = torch.cat([dense for _, dense in parts])
    biases = torch.cat([module.bias for module, _ in parts]) if bias else None  # type: ignore[misc]
    linear = fuse([module for module, _ in parts], Kernels("fp32", int8=name))
    x = numbers(rows, COLUMNS)
    x[0] *= 1000  # a row's size must not cost the others their precision
    found = linear(x)
    for row in range(rows):
        check(found[row : row + 1], x[row : row + 1], weight, biases, error)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "error"), [("packed", 1e-2), ("dynamic", 2e-2), ("dense", 1e-6)])
def test_int4(name: str, error: float, bias: bool, rows: int) -> None:
    parts = [int4(size, bias=bias) for size in (32, 16)]
    weight = torch.cat([dense for _, dense in parts])
    biases = torch.cat([module.bias for module, _ in parts]) if bias else None  # type: ignore[misc]
    linear = fuse([module for module, _ in parts], Kernels("fp32", int4=name))
    x = numbers(rows, COLUMNS)
    check(linear(x), x, weight, biases, error)


def test_what_a_kernel_cannot_take_is_computed_another_way() -> None:
    module, weight = int4(24, bias=False)  # rows that are no multiple of 16
    x = numbers(5, COLUMNS)
    check(fuse([module], Kernels("fp32"))(x), x, weight, None, 1e-6)


def test_plain_layers_laid_together_are_in_memory_once() -> None:
    parts = [nn.Linear(COLUMNS, rows, bias=rows == 8) for rows in (8, 16)]
    weight = torch.cat([part.weight for part in parts]).detach()
    bias = torch.cat([parts[0].bias.detach(), torch.zeros(16)])
    x = numbers(4, COLUMNS)
    check(fuse(parts, Kernels("fp32"))(x), x, weight, bias, 1e-6)
    assert not [name for part in parts for name, _ in part.named_parameters()]


def test_layers_of_different_forms_run_side_by_side() -> None:
    plain = nn.Linear(COLUMNS, 8, bias=False)
    module, weight = int8(16, bias=False)
    x = numbers(4, COLUMNS)
    with torch.inference_mode():
        found = fuse([plain, module], Kernels("fp32"))(x)
    check(found, x, torch.cat((plain.weight.detach(), weight)), None, 1e-5)


def test_the_choice_is_one_of_what_there_is() -> None:
    chosen = choose((64, COLUMNS), forms=["dense", "int8", "int4"], dtype=torch.bfloat16)
    assert {chosen.int8, chosen.int4} <= {*KINDS}
    assert chosen.dtype in ("fp32", "bf16")
    assert choose((64, COLUMNS), forms=["dense"], dtype=torch.float32).dtype == "fp32"
