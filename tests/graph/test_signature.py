"""What a graph holds for: signatures of calls, and examples taken from them."""

import torch

from captum_mipin.graph.signature import Signature, first_example


def test_signatures_tell_shapes_dtypes_and_further_arguments_apart_but_not_batches() -> None:
    x = torch.ones(2, 3)
    same = Signature.of((x,), ())
    assert Signature.of((torch.zeros(5, 3),), ()) == same
    assert Signature.from_json(same.to_json()) == same
    others = [
        ((torch.ones(2, 4),), ()),
        ((x.double(),), ()),
        ((x,), (1,)),
        ((x,), (2,)),
        ((x,), (None,)),
        ((x, x), ()),
        ((x,), (x,)),
    ]
    assert len({same, *(Signature.of(*other) for other in others)}) == len(others) + 1


def test_the_first_example_is_zeros_and_its_own_further_arguments() -> None:
    x, scale = torch.randn(4, 3), torch.arange(4.0)
    (zeros,), (first, k) = first_example((x,), (scale, 7), False)
    assert torch.equal(zeros, torch.zeros(1, 3))
    assert torch.equal(first, torch.zeros(1))
    assert k == 7
