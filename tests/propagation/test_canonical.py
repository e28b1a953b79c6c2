"""Ways of writing one network: copies, transpositions and stacks change neither A nor S."""

import copy

import pytest
import torch
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, check
from captum_mipin.errors import CaptureError
from captum_mipin.graph.capture import capture
from captum_mipin.propagation.runtime import Run
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.rules import MIPIN


def assert_alike_fitted_whole_and_alone(model, x, layer):
    """Check that a layer has the same A from inverses of the whole and of what is above it."""
    found = [
        LayerMIPINAttribution(model, inverse.fit(x, 0, progress=False), layer).attribute(x[:3], 0)
        for inverse in (InverseNetwork(model), InverseNetwork(model, layer=layer))
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def explained(model, x):
    model = model.double().eval()
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, [0, 1], progress=False))
    return model(x).detach(), mipin.attribute(x[:4], target=1), mipin.source_signal(x[:4], target=1)


def agree(one, other, x):
    for a, b in zip(explained(one, x), explained(other, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def block(respelled):
    """A residual block, what its convolution takes respelled."""
    torch.manual_seed(0)

    def run(m, x):
        h = F.relu(m["stem"](x))
        return m["head"](F.relu(h + m["b"](F.relu(m["a"](respelled(h))))).flatten(1))

    convolutions = {name: nn.Conv2d(3, 3, 3, padding=1) for name in ("stem", "a", "b")}
    return Function(run, **convolutions, head=nn.Linear(147, 3))


COPIES = {
    "clone": torch.clone,
    "view": lambda h: h.view(h.shape),
    "channels last": lambda h: h.contiguous(memory_format=torch.channels_last),
    "slice": lambda h: h[:, :],
    "dropout": F.dropout2d,
    "dtype": lambda h: h.to(torch.float64),
    "there and back": lambda h: h.clone()[:].contiguous(),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_make_no_difference(name):
    respelled = (lambda h: F.dropout2d(h, training=False)) if name == "dropout" else COPIES[name]
    agree(block(lambda h: h), block(respelled), normal(40, 3, 7, 7, dtype=torch.float64))


def test_copies_of_what_is_copied_already_make_no_difference():
    x = normal(40, 6, dtype=torch.float64)

    def model(copied):
        torch.manual_seed(0)

        def run(m, x):
            h = torch.relu(m["stem"](x))
            return m["head"](torch.relu(m["a"](copied(h)) + m["b"](copied(h)) + copied(h)))

        return Function(
            run, stem=nn.Linear(6, 5), a=nn.Linear(5, 5), b=nn.Linear(5, 5), head=nn.Linear(5, 3)
        )

    agree(model(lambda h: h), model(torch.clone), x)


USES = {
    "the signal twice": (lambda m, first, again: m["b"](first) + torch.relu(m["a"](again)), 3),
    "a gate and the signal": (
        lambda m, first, again: m["b"](torch.relu(m["a"](again)) * torch.sigmoid(first)),
        12,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_what_only_rearranges_is_done_once(name):
    use, width = USES[name]

    def model(once):
        torch.manual_seed(0)

        def run(m, x):
            h = torch.relu(m["stem"](x))
            first = h.flatten(1)
            return use(m, first, first if once else h.flatten(1))

        return Function(run, stem=nn.Conv1d(2, 3, 3), a=nn.Linear(12, width), b=nn.Linear(12, 3))

    agree(model(True), model(False), normal(60, 2, 6, dtype=torch.float64))


def test_dense_layers_along_another_dimension_stay_behind_its_transposition():
    def model(dense):
        torch.manual_seed(0)

        def run(m, x):
            h = torch.relu(m["stem"](x))
            y = (
                F.linear(h.transpose(1, 2), m["a"].weight[..., 0], m["a"].bias).transpose(1, 2)
                if dense
                else m["a"](h)
            )
            return m["head"](torch.relu(y).flatten(1))

        return Function(run, stem=nn.Conv1d(2, 3, 1), a=nn.Conv1d(3, 4, 1), head=nn.Linear(24, 3))

    agree(model(True), model(False), normal(60, 2, 6, dtype=torch.float64))


def by_hand(m, x):
    """``nn.MultiheadAttention`` of two heads, batch first, on x itself."""
    packed = F.linear(x, m["attention"].in_proj_weight, m["attention"].in_proj_bias)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in packed.chunk(3, -1))
    return m["attention"].out_proj(
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    )


def test_attention_beside_the_identity_whatever_the_order_of_dimensions():
    torch.manual_seed(0)
    attention, head, x = (
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.Linear(8, 3),
        normal(60, 5, 8, dtype=torch.float64),
    )
    layers = {"attention": attention, "head": head}
    module = Function(
        lambda m, x: m["head"]((x + m["attention"](x, x, x, need_weights=False)[0]).mean(1)),
        **layers,
    )
    agree(module, Function(lambda m, x: m["head"]((x + by_hand(m, x)).mean(1)), **layers), x)


@pytest.mark.parametrize("back", [True, False])
def test_transformers_with_the_sequence_or_the_batch_first(back):
    torch.manual_seed(0)
    first, head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)
    second = nn.TransformerEncoderLayer(8, 2, 16)
    second.load_state_dict(first.state_dict())

    def sequence_first(m, x):
        h = m["encoder"](x.transpose(0, 1))
        return m["head"](h.transpose(0, 1).mean(1) if back else h.mean(0))

    one = Function(lambda m, x: m["head"](m["encoder"](x).mean(1)), encoder=first, head=head)
    agree(
        one,
        Function(sequence_first, encoder=second, head=head),
        normal(60, 5, 8, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (nn.LSTM, True),
        pytest.param(nn.LSTM, False, marks=pytest.mark.full),
        pytest.param(nn.GRU, True, marks=pytest.mark.full),
        (nn.RNN, False),
    ],
)
def test_the_last_output_of_recurrent_networks_is_their_state(kind, first):
    if kind is nn.LSTM and torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 writes the state of an LSTM with one dimension more")
    torch.manual_seed(0)
    layers = {"recurrent": kind(6, 5, 2, batch_first=first), "head": nn.Linear(5, 3)}

    def by_output(m, x):
        output, _ = m["recurrent"](x if first else x.transpose(0, 1))
        return m["head"](output[:, -1] if first else output[-1])

    def by_state(m, x):
        _, state = m["recurrent"](x if first else x.transpose(0, 1))
        return m["head"]((state[0] if kind is nn.LSTM else state)[-1])

    x = normal(60, 4, 6, dtype=torch.float64)
    agree(Function(by_output, **layers), Function(by_state, **copy.deepcopy(layers)), x)


PICKED = {
    "stack": lambda g, h: torch.stack([g, h], 1)[:, 1],
    "stack, from the end": lambda g, h: torch.stack([h, g], -1)[..., -2],
    "cat": lambda g, h: torch.cat([g.unsqueeze(1), h.unsqueeze(1)], 1)[:, 1],
    "transposed": lambda g, h: torch.stack([g, h]).transpose(0, 1).select(1, 1),
}


@pytest.mark.parametrize("name", PICKED)
def test_what_is_stacked_only_to_pick_one_is_that_one(name):
    def model(pick):
        torch.manual_seed(0)

        def run(m, x):
            g = torch.tanh(m["stem"](x))
            return m["head"](pick(g, torch.tanh(m["layer"](g.flip(1)))))

        return Function(run, stem=nn.Linear(8, 6), layer=nn.Linear(6, 6), head=nn.Linear(6, 3))

    agree(model(lambda g, h: h), model(PICKED[name]), normal(60, 8, dtype=torch.float64))


def test_what_is_picked_with_the_rest_in_another_order_stays():
    torch.manual_seed(0)
    model = (
        Function(
            lambda m, x: m["head"](
                torch.stack([(g := torch.tanh(m["stem"](x))), g.flip(1)])
                .permute(2, 0, 1)
                .select(1, 1)
                .t()
            ),
            stem=nn.Linear(8, 6),
            head=nn.Linear(6, 3),
        )
        .double()
        .eval()
    )
    x = normal(6, 8, dtype=torch.float64)  # as many as features: shapes would not tell
    captured = capture(model, (x[:1],))
    surrogate = Surrogate(captured, MIPIN)
    torch.testing.assert_close(
        surrogate(Run(surrogate.steps), captured.values(model, (x,), ())).detach(),
        model(x).detach(),
    )


def test_what_is_picked_twice_is_one_tensor():
    def model(stacked):
        torch.manual_seed(0)

        def run(m, x):
            g = torch.tanh(m["stem"](x))
            h = torch.tanh(m["layer"](g.flip(1)))
            both = torch.stack([g, h])
            a, b = (both[1], both[1]) if stacked else (h, h)
            return m["head"](torch.relu(m["a"](a)) + b)

        return Function(
            run,
            stem=nn.Linear(8, 6),
            layer=nn.Linear(6, 6),
            a=nn.Linear(6, 6),
            head=nn.Linear(6, 3),
        )

    agree(model(False), model(True), normal(60, 8, dtype=torch.float64))


def test_a_layer_that_transposes_can_be_explained_by_an_inverse_of_the_whole():
    class Transposes(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2)

    torch.manual_seed(0)
    model = (
        Function(
            lambda m, x: m["head"](
                (lambda h: torch.relu(m["a"](h)) + torch.tanh(m["b"](h)))(
                    m["layer"](m["stem"](x))
                ).flatten(1)
            ),
            stem=nn.Conv2d(2, 3, 1),
            layer=Transposes(),
            a=nn.Linear(5, 5),
            b=nn.Linear(5, 5),
            head=nn.Linear(60, 3),
        )
        .double()
        .eval()
    )
    x, layer = normal(40, 2, 4, 5, dtype=torch.float64), model.layers["layer"]
    assert_alike_fitted_whole_and_alone(model, x, layer)


def test_a_layer_that_only_what_is_dropped_depends_on_is_refused():
    torch.manual_seed(0)
    model = Function(
        lambda m, x: m["head"](
            torch.stack([torch.tanh(m["side"](x)), torch.tanh(m["layer"](x))])[1]
        ),
        side=nn.Linear(4, 4),
        layer=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    ).eval()
    with pytest.raises(CaptureError, match="does not depend on"):
        InverseNetwork(model, layer=model.layers["side"]).fit(normal(40, 4), progress=False)


@pytest.mark.parametrize("made", [torch.stack, torch.cat])
def test_parts_of_another_dtype_are_not_picked(made):
    """What is stacked with floats becomes a float: True + True > 1.5."""

    def model(stacked):
        torch.manual_seed(0)

        def run(m, x):
            h = torch.tanh(m["stem"](x))
            gate = h > 0
            if stacked:
                parts = [gate.unsqueeze(1), torch.zeros_like(h).unsqueeze(1)]
                gate = made(parts, 1)[:, 0]
                gate = (gate[:, 0] if made is torch.stack else gate) * 2 > 1.5
            return m["head"](torch.where(gate, h, 0.1 * h))

        return Function(run, stem=nn.Linear(6, 5), head=nn.Linear(5, 3))

    agree(model(False), model(True), normal(60, 6, dtype=torch.float64))
    mixed = (
        Function(
            lambda m, x: m["head"](
                torch.stack([(h := torch.tanh(m["stem"](x))).float(), h], 1)[:, 0]
            ),
            stem=nn.Linear(6, 5),
            head=nn.Linear(5, 3),
        )
        .double()
        .eval()
    )
    x = normal(60, 6, dtype=torch.float64)
    captured = capture(mixed, (x[:1],))
    surrogate = Surrogate(captured, MIPIN)
    found = surrogate(Run(surrogate.steps), captured.values(mixed, (x,), ()))
    torch.testing.assert_close(found, mixed(x).detach())


def test_strings_that_began_empty():
    def model(empty):
        torch.manual_seed(0)
        first = [torch.empty(0, dtype=torch.float64)] * empty
        return Function(
            lambda m, x: m["head"](torch.cat([*first, torch.tanh(m["stem"](x))[:, None]], 1)[:, 0]),
            stem=nn.Linear(6, 5),
            head=nn.Linear(5, 3),
        )

    agree(model(0), model(1), normal(60, 6, dtype=torch.float64))


def test_transpositions_of_one_tensor_are_one_in_any_order_and_spelling():
    def model(*transposed):
        torch.manual_seed(0)
        spellings = (
            lambda h: h.transpose(1, 2),
            lambda h: h.permute(0, 2, 1, 3),
            lambda h: h.transpose(-2, -3),
        )
        a, b, c = (spellings[index] for index in transposed)

        def run(m, x):
            h = torch.relu(m["stem"](x))
            return m["head"](
                (
                    torch.relu(m["a"](a(h))) + torch.tanh(m["b"](b(h))) + torch.relu(m["c"](c(h)))
                ).mean((1, 2))
            )

        layers = {"a": nn.Linear(5, 5), "b": nn.Conv2d(4, 4, 1), "c": nn.Conv2d(4, 4, 3, padding=1)}
        return Function(run, stem=nn.Conv2d(2, 3, 1), **layers, head=nn.Linear(5, 3))

    x = normal(40, 2, 4, 5, dtype=torch.float64)
    agree(model(0, 0, 0), model(0, 1, 2), x)


LAYERS = {
    "two users": lambda m, c: torch.relu(m["a"](c)) + c,
    "a copy of it": lambda m, c: torch.relu(m["a"](c.clone())) + c.clone() + torch.tanh(c),
    "transposed": lambda m, c: torch.relu(m["a"](c.flip(1))) + m["b"](c),
}


@pytest.mark.parametrize(
    ("name", "respelled"),
    zip(
        LAYERS,
        [torch.clone, lambda h: h.unsqueeze(1).flatten(1), lambda h: torch.stack([h, -h])[0]],
        strict=True,
    ),
)
def test_layers_that_only_spell_can_be_explained_by_an_inverse_of_the_whole(name, respelled):
    class Spells(nn.Module):
        def forward(self, x):
            return respelled(x)

    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}
    model = (
        Function(
            lambda m, x: m["head"](LAYERS[name](m, m["layer"](torch.tanh(m["stem"](x))))),
            stem=nn.Linear(6, 5),
            layer=Spells(),
            **layers,
            head=nn.Linear(5, 3),
        )
        .double()
        .eval()
    )
    x, layer = normal(60, 6, dtype=torch.float64), model.layers["layer"]
    assert_alike_fitted_whole_and_alone(model, x, layer)


class Copy(nn.Module):
    def forward(self, x):
        return x.clone()


def test_a_layer_that_makes_a_copy_can_be_explained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Copy(), nn.Linear(5, 3)).eval()
    x = normal(50, 6)
    mipin = LayerMIPINAttribution(
        model, InverseNetwork(model, layer=model[2]).fit(x, 0, progress=False)
    )
    whole = LayerMIPINAttribution(model, InverseNetwork(model).fit(x, 0, progress=False), model[1])
    torch.testing.assert_close(mipin.attribute(x[:3], 0), whole.attribute(x[:3], 0))


def test_no_copies_are_left_in_the_surrogate_and_all_in_the_report():
    model = block(torch.clone).eval()
    captured = capture(model, (normal(1, 3, 7, 7),))
    assert "clone" not in Surrogate(captured, MIPIN).code
    assert "aten.clone" in str(check(model, normal(1, 3, 7, 7)))


def test_the_report_is_of_the_operations_of_the_model():
    model = Function(
        lambda m, x: m["head"](m["body"](x.transpose(0, 1)).mean(0)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )
    assert "permute" not in str(check(model.eval(), normal(2, 5, 4)))
