"""The rows that operations are said to have are those that they depend on: other rows change nothing there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.serving.labels import NONE, Label
from randlora.serving.tracking import RowTracking

WEIGHT, TABLE = torch.randn(4, 4), torch.rand(4)
SQUARE = torch.eye(4) * 3 + torch.rand(4, 4)

OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: torch.where(x > 0, F.gelu(x) * TABLE, F.hardswish(x - 1)),
    "reduced": lambda x: [x.sum(1), x.mean(), x.amax(0, keepdim=True), x.var(-1), x.logsumexp(2), x.norm(dim=1)],
    "softmax": lambda x: [x.softmax(d) for d in range(3)] + [x.cumsum(1), F.log_softmax(x, -1)],
    "views": lambda x: [x.transpose(0, 2), x.flatten(0, 1), x.flatten(), x.unsqueeze(1), x[:, 1], x[1:], x.mT, x[None]],
    "splits": lambda x: [*x.split(1, 0), *x.chunk(2, 1), *x.unbind(2)],
    "parts": lambda x: [x.diagonal(), x.unfold(1, 2, 1), x.expand(2, -1, -1, -1), F.pad(x, (1, 1, 1, 0, 2, 0))],
    "moved": lambda x: [x.flip(0), x.roll(1, 1), x.repeat(2, 1, 1), x.repeat_interleave(2, 1)],
    "joined": lambda x: [torch.cat([x, x.flip(0)]), torch.cat([x, TABLE.expand(4, 4, 4)], 1), torch.stack([x, x], 1)],
    "products": lambda x: [x @ WEIGHT, WEIGHT @ x, x @ x.mT, F.linear(x, WEIGHT, TABLE)],
    "einsum": lambda x: torch.einsum("abc,adc->abd", x, x),
    "mixed with one": lambda x: [torch.cat([x.mean(0, keepdim=True), x[:1]]).sum(0), x.flip(1)],
    "solved": lambda x: [torch.linalg.solve_triangular(SQUARE.triu(), x, upper=True), torch.cdist(x, WEIGHT)],
    "norms": lambda x: [F.layer_norm(x, (4,)), F.layer_norm(x, (4, 4)), F.group_norm(x, 2), F.instance_norm(x)],
    "batch norm": lambda x: [F.batch_norm(x, None, None, training=True), F.batch_norm(x, TABLE, TABLE + 1)],
    "convolved": lambda x: [F.conv1d(x, torch.ones(2, 4, 3)), F.conv2d(x[:, None], torch.ones(2, 1, 2, 2))],
    "images": lambda x: [F.max_pool1d(x, 2), F.interpolate(x, 8), F.avg_pool1d(x, 2), F.unfold(x[:, None], 2)],
    "halved": lambda x: [F.glu(x, 1), F.glu(x, 0)],
    "indexed": lambda x: [x[[2, 0]], x[[1, 1], [0, 3]], x[:, [2, 2]], x[:, :, torch.tensor([[0, 1]])]],
    "chosen": lambda x: [x[torch.tensor([True, False, True, True])], x.index_select(2, torch.tensor([0, 1]))],
    "gathered": lambda x: [
        x.gather(0, torch.tensor([1, 0, 3, 2]).view(4, 1, 1).expand(4, 4, 4)),
        x.gather(1, torch.zeros(4, 4, 4).long()),
    ],
    "written": lambda x: [
        torch.zeros(6, 4, 4).index_add_(0, torch.tensor([5, 0, 0, 2]), x),
        torch.zeros(4, 9).index_copy(1, torch.arange(4), x[0]),
        torch.zeros(4, 4, 4).index_put((torch.tensor([1, 2]), torch.tensor([0, 0])), x[:2, 0]),
        torch.zeros(4, 5, 4).scatter(1, torch.ones(4, 4, 4).long(), x),
        torch.zeros(8, 4).index_add_(0, torch.arange(4), x[1]),
    ],
    "into parts": lambda x: [_into(x, 0), _into(x, 1), _into(x[:, :, 0], 1), _into(x[2:], 0)],
    "attention": lambda x: [
        F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        F.scaled_dot_product_attention(x[None], x.flip(0)[None], x[None]),
        F.scaled_dot_product_attention(x, x[:1], x[:1]),
    ],
    "others": lambda x: [torch.fft.fft(x).real, x.triu(), F.dropout(x, 0.5), x.masked_fill(TABLE > 2, 0)],
    "same": lambda x: [x.clone().relu_().add_(x), x.to(torch.float64)],
}


def _into(x: Tensor, dim: int) -> Tensor:
    found = torch.zeros(*(size + 1 for size in x.shape))
    part = found.narrow(dim, 1, x.shape[dim])
    for other in range(x.dim()):
        if other != dim:
            part = part.narrow(other, 0, x.shape[other])
    part.copy_(x)
    return found


def followed(operation: Callable[[Tensor], Any], x: Tensor, axis: int) -> list[tuple[Tensor, Label | None]]:
    given, tracking = x.clone(), RowTracking()
    tracking.set(given, Label(torch.arange(4).view(*[1] * axis, -1, *[1] * (x.dim() - axis - 1))))
    torch.manual_seed(0)
    with tracking:
        found = operation(given)
    return [(each, tracking.label(each)) for each in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_other_rows_change(operation: str, mode: Any) -> None:
    run, x, known = OPERATIONS[operation], torch.rand(4, 4, 4), 0
    for axis in range(3):
        with mode():
            before = followed(run, x, axis)
            for row in (0, 2):
                other = x.clone()
                other.select(axis, row).add_(1 + torch.rand(4, 4))
                for (was, label), (now, _) in zip(before, followed(run, other, axis), strict=True):
                    rows = torch.full((1,) * was.dim(), NONE) if label is None else label.rows
                    is_other = ((rows >= NONE) & (rows != row)).expand(was.shape)
                    assert not bool((is_other & (was - now).abs().gt(1e-6)).any()), (axis, row, rows.shape)
                    known += label is not None and not label.is_mixed
    assert known > 0, "nothing is known"


def test_an_operation_that_is_not_known_makes_rows_unknown() -> None:
    ((_, label),) = followed(torch.linalg.matrix_exp, torch.rand(4, 4, 4), 0)
    assert label is not None
    assert label.is_mixed
    assert "matrix_exp" in label.why
