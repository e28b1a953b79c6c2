"""MIP-IN for sequential networks once more, to be read: NumPy, float64, loops, from section 4.

The package is tested against this module. Read :class:`Oracle` first, it is algorithm 1. Each layer
has ``forward``, ``back`` for the way of the signal, and ``fit`` where it learns an inverse.

Symbols: x features below a layer, y features above it, s source signal above it; n examples,
dx and ds features of x and s.
"""

from itertools import product

import numpy as np


class Oracle:
    """Algorithm 1 for a list of layers and one class.

    Args:
        layers: Layers from the input to the output, see :func:`from_torch`.
        ridge: λ of equation 6.
        scale: The unit of λ, see :func:`regress`.
    """

    def __init__(self, layers, ridge=1e-3, scale="relative"):
        self.layers, self.ridge, self.scale, self.inverses = layers, ridge, scale, {}

    def features(self, x):
        """Return the features at every depth, the input's first."""
        features = [np.asarray(x, dtype=np.float64)]
        for layer in self.layers:
            features.append(layer.forward(features[-1]))
        return features

    def fit(self, x, target):
        """Learn the inverses of all layers for the class ``target`` from the examples x."""
        self.inverses = {}
        self._descend(self.features(x), target, learn=True)
        return self

    def signals(self, x, target, *, biases=True, seed=None, local=True):
        """Return the signal at every depth, the input's first.

        Args:
            x: Examples (n, ...).
            target: The class.
            biases: Whether inverses add their biases. S with them, A without.
            seed: The value at the output to start from instead of the class's own.
            local: Whether masks and switches of the examples apply (equations 8 and 9).
        """
        return self._descend(self.features(x), target, biases=biases, seed=seed, local=local)

    def _descend(self, features, target, *, learn=False, biases=True, seed=None, local=True):
        # algorithm 1, line 1: S_L is Y_c at the class and 0 elsewhere
        s = np.zeros_like(features[-1])
        s[:, target] = features[-1][:, target] if seed is None else seed
        signals = [s]
        for depth, layer in reversed(list(enumerate(self.layers))):
            x, y = features[depth], features[depth + 1]
            # eq. 5: the inverse of a layer is learned from X below it and S above it
            if learn and hasattr(layer, "fit"):
                self.inverses[depth] = layer.fit(x, s, self.ridge, self.scale)
            inverse = self.inverses.get(depth)
            s = layer.back(s, x, y, inverse=inverse, biases=biases, local=local)
            signals.append(s)
        return signals[::-1]


def from_torch(model):
    """Return the layers of a ``torch.nn.Sequential``."""
    layers = {
        "Linear": Dense, "Conv2d": Conv2d, "ReLU": ReLU, "MaxPool2d": MaxPool2d, "Flatten": Flatten
    }  # fmt: skip
    return [layers[type(module).__name__](module) for module in model]


# ------------------------------------------------------------------------------------------ layers


class Dense:
    """y = x Wᵀ + b, inverted by equation 6."""

    def __init__(self, module):
        self.weight, self.bias = parameters(module)

    def forward(self, x):
        return x @ self.weight.T + self.bias

    def fit(self, x, s, ridge, scale):
        return regress(x, s, ridge, scale)

    def back(self, s, x, y, *, inverse, biases, local):
        weight, bias = inverse
        return s @ weight.T + (bias if biases else 0)


class Conv2d:
    """A convolution, inverted by a transposed convolution with a new kernel (equation 7)."""

    def __init__(self, module):
        self.weight, self.bias = parameters(module)
        self.groups, self.stride, self.dilation = module.groups, module.stride, module.dilation
        self.kernel, self.same = module.kernel_size, module.padding == "same"
        same = [(d * (k - 1)) // 2 for d, k in zip(self.dilation, self.kernel, strict=True)]
        self.padding = same if self.same else module.padding

    def grid(self, x):
        """Return the height and width of y."""
        if self.same:
            return x.shape[2:]
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)

    def table(self, x):
        return partners(
            x.shape[2:], self.grid(x), self.kernel, self.stride, self.padding, self.dilation
        )

    def forward(self, x):
        outputs = len(self.weight)
        y = np.zeros((len(x), outputs, int(np.prod(self.grid(x)))))
        per_x, per_y = x.shape[1] // self.groups, outputs // self.groups  # channels of a group
        x_flat = x.reshape(*x.shape[:2], -1)
        weight = self.weight.reshape(*self.weight.shape[:2], -1)
        for position, taps in enumerate(self.table(x)):
            for tap, partner in enumerate(taps):
                for g in range(self.groups if partner >= 0 else 0):
                    out, own = (slice(g * per, (g + 1) * per) for per in (per_y, per_x))
                    y[:, out, partner] += x_flat[:, own, position] @ weight[out, :, tap].T
        return y.reshape(len(x), -1, *self.grid(x)) + self.bias[:, None, None]

    def fit(self, x, s, ridge, scale):
        return fit_kernel(x, s, self.table(x), self.groups, ridge, scale=scale)

    def back(self, s, x, y, *, inverse, biases, local):
        return apply_kernel(s, self.table(x), inverse, x.shape, biases)


class ReLU:
    """The forward mask of equation 9; without ``local`` the signal passes as it is."""

    def __init__(self, module=None):
        pass

    def forward(self, x):
        return np.maximum(x, 0)

    def back(self, s, x, y, *, inverse, biases, local):
        # eq. 9: S = S ⊙ 1[Y ≠ 0]
        return s * (y != 0) if local else s


class MaxPool2d:
    """The switches of equation 8."""

    def __init__(self, module):
        geometry = module.kernel_size, module.stride, module.padding, module.dilation
        self.geometry = list(zip(*map(pair, geometry), strict=True))
        self.ceil_mode = module.ceil_mode

    def axes(self, x):
        return [
            sliding_windows(size, *axis, ceil_mode=self.ceil_mode)
            for size, axis in zip(x.shape[2:], self.geometry, strict=True)
        ]

    def forward(self, x):
        return max_pool(x, self.axes(x))

    def back(self, s, x, y, *, inverse, biases, local):
        return max_unpool(s, x, self.axes(x), local)


class Flatten:
    def __init__(self, module=None):
        pass

    def forward(self, x):
        return x.reshape(len(x), -1)

    def back(self, s, x, y, *, inverse, biases, local):
        return s.reshape(x.shape)


def parameters(module):
    """Return weight and bias in float64; zeros where there is no bias."""
    weight = module.weight.detach().double().numpy()
    bias = module.bias
    return weight, np.zeros(len(weight)) if bias is None else bias.detach().double().numpy()


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


# -------------------------------------------------------------------------------------- regression


def regress(x, s, ridge, scale="relative"):
    """Solve equation 6 for rows x (rows, dx) and s (rows, ds).

    Args:
        x: What is predicted.
        s: The signals that predict it.
        ridge: λ; with 0 the solution of least norm.
        scale: The unit of λ: the mean variance of the signals that vary ("relative"), 1 ("mean"),
            or 1 / rows ("sum").

    Returns:
        Weight (dx, ds) and bias (dx,).
    """
    x_mean, s_mean = x.mean(axis=0), s.mean(axis=0)
    x_centred, s_centred = x - x_mean, s - s_mean
    if ridge == 0:
        weight = np.linalg.lstsq(s_centred, x_centred, rcond=1e-12)[0].T
    else:
        rows = len(x)
        covariance = s_centred.T @ s_centred / rows
        varies = np.ptp(s, axis=0) > 0
        relative = np.diag(covariance)[varies].mean() if varies.any() else 1.0
        unit = {"relative": relative, "mean": 1.0, "sum": 1.0 / rows}[scale]
        # eq. 6: W = cov(X, S) (cov(S, S) + λI)^-1
        cross = s_centred.T @ x_centred / rows
        weight = np.linalg.solve(covariance + ridge * unit * np.eye(s.shape[1]), cross).T
    # eq. 6: b = E X − W E S
    return weight, x_mean - weight @ s_mean


def regress_jointly(x, shared, own, ridge):
    """Solve one regression for each feature of x, on shared signals and on signals of its own.

    λ is relative to the mean variance of the shared signals, and to that of the own signals.

    Args:
        x: Features (rows, dx).
        shared: Signals (rows, ds) that predict every feature.
        own: Signals (rows, dx), one from each branch; column i predicts feature i alone.
        ridge: λ.

    Returns:
        Coefficients (dx, ds + branches), the shared ones first, and biases (dx,).
    """
    rows, weights = len(x), []
    for feature in range(x.shape[1]):
        columns = [o[:, feature] for o in own]
        design = np.column_stack([shared, *columns])
        centred = design - design.mean(axis=0)
        shared_unit = shared.var(axis=0).mean() if shared.size else 0
        units = [shared_unit] * shared.shape[1] + [np.var(columns, axis=1).mean()] * len(own)
        gram = centred.T @ centred / rows + ridge * np.diag(units)
        cross = centred.T @ (x[:, feature] - x[:, feature].mean()) / rows
        weights.append(np.linalg.solve(gram, cross))
    weights = np.stack(weights)
    own_means = (
        np.append(shared.mean(axis=0), [o[:, f].mean() for o in own]) for f in range(x.shape[1])
    )
    return weights, x.mean(axis=0) - (weights * np.stack(list(own_means))).sum(axis=1)


def apply_jointly(weights, shared, own):
    """Return the features (rows, dx) that :func:`regress_jointly` predicts, without the biases."""
    ds = shared.shape[1]
    return shared @ weights[:, :ds].T + sum(o * weights[:, ds + j] for j, o in enumerate(own))


# ------------------------------------------------------------------------------------ convolutions


def partners(x_grid, y_grid, kernel, *geometry, transposed=False):
    """Return the position of y that each tap of a kernel connects to each position of x.

    A convolution reads x at ``y · stride − padding + tap · dilation``; a transposed one writes y at
    ``x · stride − padding + tap · dilation``.

    Args:
        x_grid: Height and width of x.
        y_grid: Height and width of y.
        kernel: Height and width of the kernel.
        geometry: Stride, padding and dilation, each for height and width.
        transposed: Whether the convolution is a transposed one.

    Returns:
        (positions of x, taps), flattened positions of y; -1 where a tap connects to none.
    """
    table = np.full((int(np.prod(x_grid)), int(np.prod(kernel))), -1)
    near, far = (x_grid, y_grid) if transposed else (y_grid, x_grid)
    for position in product(*map(range, near)):
        for tap in product(*map(range, kernel)):
            other = [
                p * s - o + t * d for p, s, o, d, t in zip(position, *geometry, tap, strict=True)
            ]
            if all(0 <= o < size for o, size in zip(other, far, strict=True)):
                x_at, y_at = (position, other) if transposed else (other, position)
                x_index, tap_index = (
                    np.ravel_multi_index(x_at, x_grid),
                    np.ravel_multi_index(tap, kernel),
                )
                table[x_index, tap_index] = np.ravel_multi_index(y_at, y_grid)
    return table


def patches(y, table):
    """Return what the taps connect to each position of x, from y (n, channels, ...).

    Returns:
        Rows (n · positions of x, channels · taps); 0 where a tap connects to nothing.
    """
    n, channels = y.shape[:2]
    flat = y.reshape(n, channels, -1)
    rows = np.zeros((n, len(table), channels, table.shape[1]))
    for position, taps in enumerate(table):
        for tap, partner in enumerate(taps):
            if partner >= 0:
                rows[:, position, :, tap] = flat[:, :, partner]
    return rows.reshape(n * len(table), -1)


def fit_kernel(x, s, table, groups, ridge, *, scale="relative"):
    """Solve equation 7 by its normal equations, one regression a group.

    Every element of x is predicted from the patch of s that the kernel connects it to.
    """
    kernels = []
    pairs = zip(np.split(x, groups, axis=1), np.split(s, groups, axis=1), strict=True)
    for x_group, s_group in pairs:
        rows = np.moveaxis(x_group, 1, -1).reshape(-1, x_group.shape[1])
        kernels.append(regress(rows, patches(s_group, table), ridge, scale))
    return kernels


def apply_kernel(s, table, kernels, shape, biases=True):
    """Return g ∗ s (equation 7), of the shape of x."""
    parts = []
    for s_group, (weight, bias) in zip(np.split(s, len(kernels), axis=1), kernels, strict=True):
        rows = patches(s_group, table) @ weight.T + (bias if biases else 0)
        parts.append(np.moveaxis(rows.reshape(len(s), *shape[2:], -1), -1, 1))
    return np.concatenate(parts, axis=1)


# ----------------------------------------------------------------------------------------- pooling


def sliding_windows(size, kernel, stride, padding, dilation=1, *, ceil_mode=False):
    """Return the indices, inside one axis of the input, of each window of a pooling."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    starts = [i * stride - padding for i in range(count)]
    return [
        [j for j in range(start, start + dilation * kernel, dilation) if 0 <= j < size]
        for start in starts
    ]


def adaptive_windows(size, count):
    """Return the indices of each window of an adaptive pooling, along one axis."""
    return [list(range(i * size // count, -(-(i + 1) * size // count))) for i in range(count)]


def window_table(axes):
    """Yield the output position and the input positions of each window, from those of each axis."""
    for output in product(*(range(len(axis)) for axis in axes)):
        yield output, list(product(*(axis[i] for axis, i in zip(axes, output, strict=True))))


def max_pool(x, axes):
    y = np.empty((*x.shape[:2], *map(len, axes)))
    for output, inputs in window_table(axes):
        y[(..., *output)] = np.max([x[(..., *i)] for i in inputs], axis=0)
    return y


def max_unpool(s, x, axes, local=True):
    """Send s back to the maxima of x; without ``local`` to all of each window.

    An element that several windows send to gets the mean of their signals.
    """
    total, count = np.zeros(x.shape), np.zeros(x.shape)
    for output, inputs in window_table(axes):
        first = np.argmax([x[(..., *i)] for i in inputs], axis=0)
        for k, i in enumerate(inputs):
            # eq. 8: S ⊙ switch, where the switch is 1 at the first maximum of the window
            switch = first == k if local else np.ones(first.shape, dtype=bool)
            total[(..., *i)] += switch * s[(..., *output)]
            count[(..., *i)] += switch
    return np.divide(total, count, out=np.zeros(x.shape), where=count > 0)
