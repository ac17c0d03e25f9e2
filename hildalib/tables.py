"""Gradients of large tables made where they lie: that of an output head whose rows are worked on in chunks, and of an embedding tied to it.

Autograd makes each contribution to a gradient as a tensor of the weight's size and adds it afterwards. At 151,936 x 1,024 one is 311 MB in bfloat16,
and a chunk, the sum over chunks and the embedding are three. Entry point: `in_place`.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Lookup(torch.autograd.Function):
    """Embeddings whose backward adds rows to the gradient that the table has by then from its use as output head."""

    @staticmethod
    def forward(ctx, ids: Tensor, anchor: Tensor, holder: list[nn.Embedding]) -> Tensor:
        ctx.embedding, = holder  # in a list, or autograd would keep the head's part waiting for this one
        ctx.save_for_backward(ids)
        return F.embedding(ids, ctx.embedding.weight.detach())

    @staticmethod
    def backward(ctx, grad: Tensor):
        (ids,), table, pad = ctx.saved_tensors, ctx.embedding.weight, ctx.embedding.padding_idx
        grad = grad if pad is None else grad.masked_fill((ids == pad)[..., None], 0.0)  # a padding row does not learn
        _gradient_of(table).index_add_(0, ids.flatten(), grad.flatten(0, -2).to(table))
        return None, None, None


class _Product(torch.autograd.Function):
    """Logits whose backward adds to the gradient of the head's weights."""

    @staticmethod
    def forward(ctx, hidden: Tensor, holder: list[nn.Linear]) -> Tensor:
        ctx.head, = holder
        ctx.save_for_backward(hidden)
        return F.linear(hidden, ctx.head.weight.detach())

    @staticmethod
    def backward(ctx, grad: Tensor):
        (hidden,), weight = ctx.saved_tensors, ctx.head.weight
        _gradient_of(weight).addmm_(grad.flatten(0, -2).t().to(weight), hidden.flatten(0, -2).to(weight))
        return (grad @ weight.to(grad)).to(hidden), None


def _gradient_of(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextlib.contextmanager
def in_place(model):
    """Within, `layout.in_chunks` adds what each chunk says of the head's weights to their gradient at once, and so does a tied embedding what it
    says of its rows; after `backward` the gradients are those that autograd sums.

    For one process: DDP and FSDP send a gradient on when autograd hands it over. Without effect on frozen tables, and on heads with a bias.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or not head.weight.requires_grad:
        yield
        return
    tied = type(embedding) is nn.Embedding and embedding.weight is head.weight
    head.product = lambda hidden: _Product.apply(hidden, [head])
    if tied:
        anchor = torch.zeros((), requires_grad=True, device=embedding.weight.device)  # what makes autograd call the backward
        embedding.forward = lambda ids: _Lookup.apply(ids, anchor, [embedding])
    try:
        yield
    finally:
        del head.product
        if tied:
            del embedding.forward
