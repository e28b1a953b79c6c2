"""The passes that rewrite a marked graph into the graph of a surrogate.

The passes detach recorded values, move constant operations to the front, and replace each operation
with a ``Recorded`` or ``Learned`` rule by a step. If ``Draft.joint`` is True, they add a fork
where several users send a signal to a tensor. They also add one where the scale of the signal must
be learned.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import fx

from captum_mipin.errors import CaptureError
from captum_mipin.graph.marks import inherit, mark, marks
from captum_mipin.graph.nodes import argument, is_size, nodes_in, operation
from captum_mipin.propagation.draft import (
    Draft,
    carrying_users,
    is_tensor,
    occurrences,
    redirect,
)
from captum_mipin.propagation.runtime import Step, passed, source, step
from captum_mipin.rules import MIPIN, Fork, Learned, Passes, Recorded, table
from captum_mipin.rules.linear import TOGETHER


def cut_recordings(draft: Draft) -> None:
    """Detach a tensor that gets a signal wherever it is used for gates or attention weights.

    Without this, autograd would send a signal to the tensor from these uses as well.
    """
    graph = draft.graph
    for node in list(graph.nodes):
        known = marks(node)
        part = node.target is operator.getitem and known.recorded and marks(node.args[0]).signal
        if not part and not (known.signal and is_tensor(node)):
            continue
        spared = {
            user: draft.carriers(user) if user in carrying_users(node) else ()
            for user in node.users
            if not is_size(user)
        }
        steered = [
            user
            for user, positions in spared.items()
            if occurrences(user, node) > _count([user.args[at] for at in positions], node)
        ]
        if not steered:
            continue
        # All gates use one detached copy; arguments that get a signal use the tensor itself.
        with graph.inserting_after(node):
            cut = graph.call_function(torch.ops.aten.detach.default, (node,))
        inherit(cut, node, signal=False)
        for user in steered:
            user.args = tuple(
                value if at in spared[user] else _swapped(value, node, cut)
                for at, value in enumerate(user.args)
            )
            user.kwargs = _swapped(user.kwargs, node, cut)


def _count(arguments: Any, node: fx.Node) -> int:
    return nodes_in(arguments).count(node)


def _swapped(argument: Any, old: fx.Node, new: fx.Node) -> Any:
    return fx.map_arg(argument, lambda n: new if n is old else n)


def move_constants_first(draft: Draft) -> None:
    """Move constant operations, such as the normalisation of weights, behind the placeholders.

    Constant means: computed from parameters and buffers alone.
    """
    last = _last_constant(draft.graph)
    for node in list(draft.graph.nodes):
        if node.op != "call_function" or marks(node).depends:
            continue
        if all(n.op == "placeholder" or marks(n).constant for n in node.all_input_nodes):
            mark(node, constant=True)
            last.append(node)
            last = node


def _last_constant(graph: fx.Graph) -> fx.Node:
    last: fx.Node = [n for n in graph.nodes if n.op == "placeholder" or marks(n).constant][-1]
    return last


def place_steps(draft: Draft) -> None:
    """Replace operations by steps whose backward pass is their rule, and add forks.

    A fork is an operation that passes one tensor on to several branches. In the backward pass it
    gets the signals of all branches.

    Raises:
        CaptureError: The signal at an explained node does not have the units of its value, and
            ``draft.calibrate`` is False.
    """
    graph, starts = draft.graph, draft.starts
    last = _last_constant(graph)
    with graph.inserting_before(next(iter(graph.nodes))):
        run = graph.placeholder("run")
    # If the table has no learned rules (as for LRP), scales are not learned either.
    learns = any(isinstance(rule, Learned) for rule in draft.rules.values())
    unscaled = [node for node in starts if learns and _lacks_scale(draft, node)]
    if unscaled and not draft.calibrate:
        raise CaptureError(
            f"the signal at {marks(starts[0]).key} is known only up to a factor, because a sum, a "
            "scale or a batch norm follows it; expected a layer before an operation with weights. "
            "Fit InverseNetwork(model, layer=...) at this module, which learns the factor, or name "
            "a module closer to the output."
        )
    for node in list(graph.nodes):
        if node._erased or node.op == "output" or not marks(node).signal:
            continue
        if node in starts:
            # The backward pass ends here: users that send a signal take a new leaf tensor, all
            # other users keep the original.
            users = carrying_users(node)
            with graph.inserting_after(last if node.op == "placeholder" else node):
                result = graph.call_function(source, (run, starts.index(node), node))
            inherit(result, node)
            redirect(node, repeat(result), users)
            _fork(draft, run, result, node in unscaled)
        elif is_tensor(node) or not isinstance(draft.rule(node), Passes):
            _fork(draft, run, _replaced(draft, run, node))
    graph.eliminate_dead_code()
    graph.lint()


def _lacks_scale(draft: Draft, node: fx.Node) -> bool:
    """Return True if the signal at a node does not have the units of the node's value.

    This is so if the operations behind the node change the scale of the signal, and no learned
    inverse between them and the node restores it.
    """
    while True:
        users = carrying_users(node)
        if len(users) != 1 or users[0].op == "output":
            return len(users) < 2
        node = users[0]
        rule = draft.rule(node)
        if isinstance(rule, Learned):
            return False
        if rule is not None and not rule.restores:  # for example a sum: each term gets all of S
            return True


def _replaced(draft: Draft, run: fx.Node, node: fx.Node) -> fx.Node:
    """Replace an operation by its step and return the step.

    An operation whose rule passes the signal on is not replaced; its node is returned.

    Args:
        draft: The draft, whose graph and steps are changed.
        run: The placeholder of the run.
        node: The operation.
    """
    graph, rule, key = draft.graph, draft.rule(node), marks(node).key
    if node.target is operator.getitem:
        return node
    # A registered operation may have no autograd formula; ``passed`` checks this when it runs.
    if isinstance(rule, Passes) and str(node.target) in table().keys() - MIPIN.keys():
        target: Any = node.target
        node.target, node.args = passed, (run, key, target, *node.args)
    if not isinstance(rule, (Recorded, Learned)):
        return node
    assert callable(node.target)  # for mypy: it is an operation
    carriers = rule.carriers(node)
    carried: Any = tuple(node.args[at] for at in carriers)
    others = [value for at, value in enumerate(node.args) if at not in carriers]
    several = isinstance(rule, Recorded) and rule.several
    runs = partial(_placed, node.target, carriers) if several or carriers[0] else node.target
    assert key not in draft.steps  # two steps of one key would run the same operation
    draft.steps[key] = Step(key, rule, runs, marks(node).layout)
    with graph.inserting_after(node):
        new = graph.call_function(
            step, (run, key, carried if several else carried[0], *others), dict(node.kwargs)
        )
    inherit(new, node)
    for user in list(node.users):
        if user.target is operator.getitem:  # a step returns only the operation's first output
            user.replace_all_uses_with(new)
            graph.erase_node(user)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _placed(
    operation: Callable[..., Any], positions: Sequence[int], x: Any, *others: Any, **named: Any
) -> Any:
    """Run an operation on arguments that are given in two groups.

    Args:
        operation: The operation.
        positions: Positions of the arguments that carry signal.
        x: The argument that carries signal; a tuple if there are several.
        others: The other positional arguments, in their order.
        named: The arguments by name.
    """
    arguments, carried = list(others), x if isinstance(x, tuple) else (x,)
    for at, part in sorted(zip(positions, carried, strict=True), key=lambda pair: pair[0]):
        arguments.insert(at, part)
    return operation(*arguments, **named)


def _fork(draft: Draft, run: fx.Node, node: fx.Node, unscaled: bool = False) -> None:
    """Add a :class:`Fork` behind a tensor with several branches, or with a scale to be learned.

    Args:
        draft: The draft, whose graph and steps are changed.
        run: The placeholder of the run.
        node: The node of the tensor.
        unscaled: Whether the scale of the signal at the tensor must be learned.
    """
    graph, known, users = draft.graph, marks(node), carrying_users(node)
    count = sum(occurrences(user, node) for user in users)
    if not is_tensor(node) or not (unscaled or (count > 1 and draft.joint)):
        return
    together = _together(node, users) if count > 1 else []
    rules = [draft.rule(user) for user in together]
    fork = Fork(
        tuple(user.target for user in together if callable(user.target)),
        tuple(rule.inverter for rule in rules if isinstance(rule, Learned)),
        count - len(together),
        known.channels,
    )
    # x ≈ g(S of the operations with weights) + Σ a ⊙ S, the sum over the branches without weights
    key = f"{known.key}/fork"
    draft.steps[key] = Step(key, fork.rule, fork, known.layout)
    # The fork runs the operations with weights itself, so their users take the fork's outputs.
    calls = [(user.args[1:], dict(user.kwargs)) for user in together]
    with graph.inserting_after(node):
        forked = graph.call_function(step, (run, key, node, *calls))
    parts: list[fx.Node] = []
    for index in reversed(range(count)):
        with graph.inserting_after(forked):
            parts.insert(0, graph.call_function(operator.getitem, (forked, index)))
        inherit(parts[0], node)
    plain = [user for user in users if user not in together]
    redirect(node, iter(parts[len(together) :]), plain)
    for user, part in zip(together, parts, strict=False):
        inherit(part, user)
        user.replace_all_uses_with(part)
        graph.erase_node(user)
        _fork(draft, run, part)  # the operation's result may feed several branches as well


def _together(node: fx.Node, users: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the users of a node that have weights and that one regression can invert together."""
    learned: list[fx.Node] = []
    for user in users:
        rule = MIPIN.get(str(user.target))
        others = [n for n in user.all_input_nodes if n is not node]
        if (
            isinstance(rule, Learned)
            and rule.inverter in TOGETHER
            and user.args[0] is node
            and occurrences(user, node) == 1
            and not any(marks(n).depends for n in others)
        ):
            learned.append(user)
    # One regression inverts only dense layers, or only convolutions with the same number of groups.
    # Take the kind that occurs most often.
    kinds = [("conv" in operation(user), argument(user, 6, "groups", 1)) for user in learned]
    most = max(kinds, key=lambda kind: (kinds.count(kind), kind[0], -kind[1]), default=None)
    return [user for user, kind in zip(learned, kinds, strict=True) if kind == most]
