"""How the rows of the output of torch's operations follow from the rows of their inputs.

An operation without a rule here makes the rows of its output unknown, unless all of its inputs depend on one row and
no other. If a layer needs unknown rows, it raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora.serving.labels import (
    MIXED,
    NONE,
    Label,
    fits,
    marked,
    merged,
    merged_along,
    nothing,
    reshaped,
    shrunk,
    tensors_of,
    unknown,
)

MOST = 1 << 22  # for how many entries rows are written out, where operations take single entries


@dataclass
class Call:
    """One call of an operation."""

    name: str  # such as "aten::sum"
    func: Any  # the overload
    given: dict[str, Any]  # the arguments by name, with the defaults
    output: Any
    label: Callable[[Any], Label | None]  # of a tensor; None if it depends on no row
    has_read: bool  # whether Python has read values of the batch before

    @property
    def values(self) -> list[Any]:
        """The arguments by position."""
        return [*self.given.values()]

    @property
    def first(self) -> Tensor:
        """The first tensor that it was given."""
        return next(value for value in self.values if isinstance(value, Tensor))

    def of(self, value: Any) -> Label:
        """Return the label of a tensor, even if it depends on no row."""
        label = self.label(value)
        return nothing(value.dim()) if label is None else label

    def again(self, x: Tensor) -> Any:
        """Return the result of the operation for a different first argument."""
        _, *others = self.given
        return self.func(x, **{name: self.given[name] for name in others})


Labels = Label | Sequence[Label | None] | None
Rule = Callable[[Call], Labels]


def labels_of(call: Call) -> Labels:
    """Return the label of the output of a call, or a label for each output."""
    rule = RULES.get(call.name, RULES.get(call.name.rstrip("_")))  # in place or not
    if rule := rule or next((rule for names, rule in PATTERNS.items() if re.search(names, call.name)), None):
        return rule(call)
    if torch.Tag.pointwise in getattr(call.func, "tags", ()):
        return _pointwise(call)
    first = next(iter(call.given.values()), None)
    alias = call.func._schema.arguments[0].alias_info if isinstance(first, Tensor) else None
    return _unknown(call) if alias is None or alias.is_write else _view(call)


def _padded(label: Label, dims: int) -> Label:
    """Return a label with as many dimensions as its tensor has after broadcasting."""
    return label._replace(rows=label.rows[(None,) * (dims - label.rows.dim())])


def _unknown(call: Call) -> Label:
    """Return the one row that all inputs depend on, whatever the operation does with them, or an unknown one."""
    labels = [label for each in tensors_of(call.values) if (label := call.label(each)) is not None]
    dims = tensors_of(call.output)[0].dim()
    if not labels or any(label.rows.numel() != 1 for label in labels):
        return unknown(dims, call.name)
    return merged([label._replace(rows=label.rows.reshape((1,) * dims)) for label in labels])


def _nothing(call: Call) -> None:  # noqa: ARG001
    return None


def _same(call: Call) -> Label | None:
    return call.label(call.first)


def _together(labels: Sequence[Label], dims: int) -> Label:
    """Return the label of an output of some dimensions, each entry of which is computed from one of each tensor."""
    known = [label for label in labels if not label.is_none]
    return _padded(merged(known), dims) if known else nothing(dims)


def _pointwise(call: Call) -> Label:
    return _together([*map(call.of, tensors_of(call.values))], tensors_of(call.output)[0].dim())


def _copied(call: Call) -> Label | None:
    label = call.label(call.given.get("src", call.given.get("value")))
    return call.label(call.first) if label is None else _padded(label, call.first.dim())


def _view(call: Call) -> Labels:
    """Return the labels of views, by viewing rows that take no memory."""
    x, label = call.first, call.of(call.first)
    if call.name in RESHAPES:
        return label._replace(rows=reshaped(label.rows, x.shape, tensors_of(call.output)[0].shape))
    rows = label.rows.expand(x.shape)
    if call.name == "aten::as_strided":
        if x.numel() > MOST or not x.is_contiguous() or x.storage_offset():
            return _unknown(call)
        rows = rows.contiguous()
    if call.name in ("aten::view_as_real", "aten::view_as_complex"):
        rows = rows.unsqueeze(-1) if call.name.endswith("real") else rows[..., 0]
        return label._replace(rows=shrunk(rows))
    if any(isinstance(value, Tensor) for value in call.values[1:]):
        return _unknown(call)
    found = [label._replace(rows=shrunk(view)) for view in tensors_of(call.again(rows))]
    if call.has_read and call.name in CHOICES:  # the values that Python has read may have chosen them
        return [each._replace(by_values=each.by_values or each.rows.numel() != label.rows.numel()) for each in found]
    return found


def _dims(call: Call) -> list[int]:
    dims, count = call.given.get("dim"), call.first.dim()
    if (normalized := call.given.get("normalized_shape")) is not None:
        return [*range(count - len(normalized), count)]
    if dims is None or dims == []:
        return [*range(count)]
    return [dim % count for dim in ([dims] if isinstance(dims, int) else dims)] if count else []


def _along(call: Call) -> Label:
    """Return the rows where each entry is computed from all along some dimensions, as a sum, softmax, norm or sort."""
    x, dims = call.first, _dims(call)
    label = merged_along(call.of(x), dims)
    if tensors_of(call.output)[0].dim() == x.dim():
        return label
    kept = [size for dim, size in enumerate(label.rows.shape) if dim not in dims]
    return label._replace(rows=label.rows.reshape(kept))


def _batch_normalized(call: Call) -> Label | None:
    """Return the rows after batch normalization, which mixes them in training."""
    trains = call.given.get("training", call.given.get("train", "no_training" not in call.name))
    if not trains:
        return _same(call)
    return merged_along(call.of(call.first), [dim for dim in range(call.first.dim()) if dim != 1])


def _by_example(call: Call) -> Label:
    """Return the rows of convolutions and pools, whose batch is the first dimension."""
    x, output = call.first, tensors_of(call.output)[0]
    if x.dim() != {"aten::im2col": 4, "aten::col2im": 3}.get(call.name, output.dim()):
        return _unknown(call)
    label = merged_along(call.of(x), range(1, x.dim()))
    label = label._replace(rows=label.rows.reshape(-1, *[1] * (output.dim() - 1)))
    weights = [each for each in tensors_of(call.values)[1:] if call.label(each)]
    others = [merged_along(call.of(each), range(each.dim())) for each in weights]
    return merged([label, *(each._replace(rows=each.rows.flatten()) for each in others)])


def _by_last_dimension(call: Call) -> Label:
    """Return the rows of products with weights that are quantized, or grouped, and of inputs quantized for these."""
    x, output = call.first, tensors_of(call.output)[0]
    if output.dim() != x.dim() or output.shape[:-1] != x.shape[:-1]:
        return _unknown(call)
    return merged_along(call.of(x), [x.dim() - 1])


def _product(call: Call) -> Label:
    """Return the rows of products of matrices, or of batches of them, perhaps with a tensor that is added."""
    *more, first, second = tensors_of(call.values)[:3]
    left = merged_along(call.of(first), [first.dim() - 1])
    right = merged_along(call.of(second), [max(second.dim() - 2, 0)])
    if second.dim() == 1:
        left = left._replace(rows=left.rows.squeeze(-1))
    return _together([left, right, *map(call.of, more)], call.output.dim())


def _solved(call: Call) -> Label:
    """Return the rows of solutions X of A X = B, or X A = B, for batches of matrices."""
    matrices = [merged_along(call.of(each), [each.dim() - 2, each.dim() - 1]) for each in tensors_of(call.values)[:2]]
    return _together(matrices, tensors_of(call.output)[0].dim())


def _attention(call: Call) -> Label:
    """Return the rows of attention: (..., heads, tokens, features) each, perhaps with a mask."""
    query, key, value, *more = tensors_of(call.values)
    mask = [each for each in more if each is call.given.get("attn_bias", call.given.get("attn_mask"))]
    labels = [
        merged_along(call.of(query), [query.dim() - 1]),
        *(merged_along(call.of(each), [each.dim() - 2, each.dim() - 1]) for each in (key, value)),
        *(merged_along(call.of(each), [each.dim() - 1]) for each in mask),
    ]
    if not all(label.is_none or label.rows.dim() < 3 or fits(label.rows, query.shape) for label in labels):
        return _unknown(call)  # fewer heads of keys than of queries, whose rows differ
    return _together(labels, query.dim())


def _repeated(call: Call) -> Label:
    label, repeats = _padded(call.of(call.first), len(call.given["repeats"])), call.given["repeats"]
    own = [times if size > 1 else 1 for times, size in zip(repeats, label.rows.shape, strict=True)]
    return label._replace(rows=label.rows.repeat(own))


def _moved(call: Call) -> Label:
    """Return the rows of what is turned around along some dimensions."""
    label = call.of(call.first)
    is_flat = not call.given["dims"]  # entries roll from row to row
    return label._replace(rows=shrunk(call.again(label.rows.expand(call.first.shape) if is_flat else label.rows)))


def _put_around(call: Call) -> Label:
    label, pad = call.of(call.first), call.given["pad"]
    own: list[int] = []
    for index, dim in enumerate(range(label.rows.dim() - 1, label.rows.dim() - 1 - len(pad) // 2, -1)):
        own += pad[2 * index : 2 * index + 2] if label.rows.shape[dim] > 1 else [0, 0]
    return label._replace(rows=torch.nn.functional.pad(label.rows, own, value=NONE) if any(own) else label.rows)


def _joined(call: Call) -> Label | None:
    """Return the rows of tensors side by side; what depends on no row belongs to the rows that it is put beside."""
    tensors = [each for each in call.given["tensors"] if each.dim() != 1 or each.numel()]
    labels, is_stacked = [call.of(each) for each in tensors], call.name == "aten::stack"
    dim = call.given["dim"] % (tensors[0].dim() + is_stacked)
    sizes = [1 if is_stacked else each.shape[dim] for each in tensors]
    if is_stacked:
        labels = [label._replace(rows=label.rows.unsqueeze(dim)) for label in labels]
    known = [label for label in labels if not label.is_none]
    if not known:
        return None
    if all(label.rows.shape[dim] == 1 for label in known):
        together = merged(known)
        if together.rows.numel() > 1 and not together.is_mixed:
            return together
    ends = torch.broadcast_shapes(*(label.rows.narrow(dim, 0, 1).shape for label in labels if label.rows.shape[dim]))
    each = [(label.rows, size) for label, size in zip(labels, sizes, strict=True) if size]
    parts = [rows.expand(*ends[:dim], size, *ends[dim + 1 :]) for rows, size in each]
    return marked(known, shrunk(torch.cat(parts, dim)))


def _indices(call: Call) -> tuple[list[Tensor | None], list[Label | None]]:
    """Return the indices that a call has, with one for each dimension that a mask covers, and their labels."""
    given = call.given
    if "indices" in given:
        found = [*given["indices"]]
    elif call.name == "aten::masked_select":
        found = [given["mask"]]
    else:
        found = [None] * (given["dim"] % max(call.first.dim(), 1)) + [given["index"]]
    indices: list[Tensor | None] = []
    labels: list[Label | None] = []
    for each in found:
        label = call.label(each)
        if each is not None and each.dtype in (torch.bool, torch.uint8):
            by_values = None if label is None else unknown(1, call.name)
            indices += each.detach().to("cpu").nonzero(as_tuple=True)
            labels += [by_values] * each.dim()
        else:
            indices.append(None if each is None else each.detach().to("cpu").long())
            labels.append(label)
    return indices, labels


def _taken(call: Call) -> Label | None:
    """Return the rows of entries that are taken by their indices."""
    if call.name == "aten::masked_select" and call.given["mask"].shape != call.first.shape:  # one broadcasts the other
        return _unknown(call)
    indices, labels = _indices(call)
    chosen = _of_indices(call, indices, labels)
    if (label := call.label(call.first)) is None:
        return chosen
    found = _taken_rows(label, indices, labels, has_read=call.has_read)
    return found if found.by_values or chosen is None else merged([found, chosen])


def _taken_rows(label: Label, indices: list[Tensor | None], of_indices: list[Label | None], *, has_read: bool) -> Label:
    rows, by_values, own = label.rows, label.by_values, list[Any]()
    for size, index, of_index in zip(rows.shape, indices, of_indices, strict=False):
        own.append(slice(None) if index is None else index if size > 1 else torch.zeros_like(index))
        by_values |= size > 1 and index is not None and (has_read or of_index is not None)
    return label._replace(rows=shrunk(rows[tuple(own)]), by_values=by_values)


def _of_indices(call: Call, indices: list[Tensor | None], labels: list[Label | None]) -> Label | None:
    """Return the rows of entries of a table, which are the rows of the indices."""
    known = [label for label in labels if label is not None]
    if not known:
        return None
    together = _padded(merged(known), max(index.dim() for index in indices if index is not None))
    where = [dim for dim, index in enumerate(indices) if index is not None]
    before = where[0] if where == [*range(where[0], where[-1] + 1)] else 0
    after = call.output.dim() - before - together.rows.dim()
    if after < 0:
        return _unknown(call)
    return together._replace(rows=together.rows.view(*[1] * before, *together.rows.shape, *[1] * after))


def _looked_up(call: Call) -> Label | None:
    label = call.label(call.given["indices"])
    if call.label(call.given["weight"]) is not None:
        return _unknown(call)
    return None if label is None else label._replace(rows=label.rows.unsqueeze(-1))


def _gathered(call: Call) -> Label | None:
    x, index = call.first, call.given["index"]
    label, of_index = call.label(x), call.label(index)
    if label is None or not x.dim():
        return of_index
    dim = call.given["dim"] % x.dim()
    rows = label.rows
    for other, size in enumerate(index.shape):
        if other != dim and rows.shape[other] > size:
            rows = rows.narrow(other, 0, size)
    if rows.shape[dim] == 1:
        return label._replace(rows=rows)
    if index.numel() > MOST:
        return _unknown(call)
    sizes = [size if other != dim else x.shape[dim] for other, size in enumerate(index.shape)]
    found = rows.expand(sizes).gather(dim, index.detach().to("cpu").long())
    return label._replace(rows=shrunk(found), by_values=label.by_values or of_index is not None)


def _put(call: Call) -> Label | None:
    """Return the rows of a tensor into which others are written, or added, at some indices."""
    x, source = call.first, call.given.get("values", call.given.get("source"))
    was, of_source = call.of(x), call.label(source) if isinstance(source, Tensor) else None
    indices, labels = _indices(call)
    adds = bool(call.given.get("accumulate")) or "index_add" in call.name
    if of_source is None:
        return call.label(x) if not any(labels) else _put_by_mask(call)
    at = _taken_rows(was, indices, labels, has_read=call.has_read)
    probe = torch.empty((), device="meta").expand(x.shape)
    shape = probe[tuple(slice(None) if index is None else index.to("meta") for index in indices)].shape
    new = _padded(of_source, len(shape))
    if not fits(new.rows, shape):
        return _unknown(call)
    both = merged([at, new._replace(by_values=True)] if adds else [new])
    taken = [dim for dim, index in enumerate(indices) if index is not None]
    rest = [dim for dim in range(x.dim()) if dim not in taken]
    before = taken[0] if taken == [*range(taken[0], taken[-1] + 1)] else 0  # dimensions of the entries come there
    place = {dim: dim if position < before else position + len(shape) - len(rest) for position, dim in enumerate(rest)}
    sizes = [both.rows.shape[place[dim]] if dim in place else 1 for dim in range(x.dim())]
    among = [size for position, size in enumerate(both.rows.shape) if position not in place.values()]
    has_rows_around = any(size > 1 for size in sizes) and all(was.rows.shape[dim] == 1 for dim in taken)
    if has_rows_around and all(size == 1 for size in among):
        return merged([was, both._replace(rows=both.rows.reshape(sizes))])  # what is around belongs to them too
    sizes = [max(was.rows.shape[dim], sizes[dim]) if dim in place else x.shape[dim] for dim in range(x.dim())]
    if torch.Size(sizes).numel() > MOST:
        return _unknown(call)
    rows, where = was.rows.expand(sizes).clone(), tuple(slice(None) if index is None else index for index in indices)
    values = both.rows.expand(rows[where].shape)
    rows[where] = values
    lost = rows[where] != values  # several rows were written into one place
    if bool(lost.any()):
        places = torch.arange(rows.numel(), device="cpu").view(rows.shape)[where]
        rows.view(-1)[places[lost]] = MIXED
    found = marked([was, both], shrunk(rows))
    return found._replace(by_values=found.by_values or any(label is not None for label in labels))


def _put_by_mask(call: Call) -> Label:
    """Return the rows of a tensor into which values of no row are written where a mask says so."""
    x, indices = call.first, call.given.get("indices", ())
    where = [dim for dim, index in enumerate(indices) if index is not None]
    mask = indices[where[0]] if len(where) == 1 else None
    if mask is None or mask.dtype not in (torch.bool, torch.uint8):
        return _unknown(call)
    label, after = call.of(mask), x.dim() - where[0] - mask.dim()
    of_mask = label._replace(rows=label.rows.view(*[1] * where[0], *label.rows.shape, *[1] * after))
    return _together([call.of(x), of_mask], x.dim())


def _written_along(call: Call) -> Label:
    """Return the rows of a tensor into which others are written along one dimension, where no row changes along it."""
    x, dim = call.first, call.given["dim"] % max(call.first.dim(), 1)
    parts = [call.of(each) for name in ("index", "src") if isinstance(each := call.given.get(name), Tensor)]
    labels = [label for label in (call.of(x), *parts) if not label.is_none]
    if not labels:
        return nothing(x.dim())
    if any(label.rows.shape[dim] > 1 or not fits(label.rows, x.shape) for label in labels):
        return _unknown(call)
    label = merged(labels)  # what is around belongs to the rows if there are several
    return label if label.rows.numel() > 1 or not call.of(x).is_none else _unknown(call)


RESHAPES = frozenset(f"aten::{name}" for name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten"))

CHOICES = frozenset(f"aten::{name}" for name in ("slice", "select", "split", "split_with_sizes", "unbind", "narrow"))

NAMES: dict[Rule, str] = {
    _same: (
        "clone _to_copy native_dropout bernoulli tril triu bucketize lift_fresh lift_fresh_copy zero exponential "
        "normal_ uniform _native_batch_norm_legit_no_training"
    ),
    _pointwise: "where masked_fill log_sigmoid_forward _prelu_kernel rsub complex polar clamp isin hardswish",
    _nothing: (
        "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty "
        "new_full new_empty_strided _local_scalar_dense equal _assert_async _assert_tensor_metadata _assert_scalar"
    ),
    _copied: "copy fill",
    _view: "_unsafe_view unsafe_split unsafe_split_with_sizes",
    _along: (
        "sum mean amax amin max min argmax argmin var std var_mean std_mean norm linalg_vector_norm prod any all "
        "logsumexp count_nonzero aminmax _softmax _log_softmax _safe_softmax native_layer_norm _fused_rms_norm cumsum "
        "cumprod logcumsumexp sort topk glu _fft_c2c _fft_r2c _fft_c2r"
    ),
    _batch_normalized: "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit",
    _by_example: "im2col col2im",
    _product: "mm bmm mv dot addmm baddbmm addmv _addmm_activation _int_mm",
    _solved: "linalg_solve_triangular linalg_inv_ex _linalg_solve_ex",
    _repeated: "repeat",
    _moved: "flip roll",
    _put_around: "constant_pad_nd",
    _joined: "cat stack",
    _taken: "index _unsafe_index index_select masked_select",
    _looked_up: "embedding",
    _gathered: "gather",
    _put: "index_put _index_put_impl _unsafe_index_put index_add index_copy",
    _written_along: "scatter scatter_add scatter_reduce",
    _by_last_dimension: "_grouped_mm",
}
"""The operations that each rule is for. A name without ``_`` at the end is for the operation in place too."""

PATTERNS: dict[str, Rule] = {
    "_scaled_dot_product|^flex_attention$": _attention,
    "^bitsandbytes::": _by_last_dimension,
    "convolution(?!_backward)|(max|avg)_pool[123]d(?!.*backward)|_pad[123]d$|native_group_norm$": _by_example,
    "upsample_(?!.*backward)|max_unpool[23]d|grid_sampler_[23]d$|(pixel|channel)_(un)?shuffle$": _by_example,
}
"""The rules of operations that have many names."""

RULES = {f"aten::{name}": rule for rule, names in NAMES.items() for name in names.split()}
