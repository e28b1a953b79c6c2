"""MIP-IN for sequential networks a second time: NumPy, float64, loops, straight from the paper's section 4."""

from itertools import product

import numpy as np


def regress(x, s, ridge, scale="relative"):
    """Equation 6 for rows x (rows, dx) and s (rows, ds): weight (dx, ds) and bias (dx,)."""
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
        cross = s_centred.T @ x_centred / rows
        weight = np.linalg.solve(covariance + ridge * unit * np.eye(s.shape[1]), cross).T
    return weight, x_mean - weight @ s_mean


def regress_jointly(x, shared, own, ridge):
    """Each feature of x (rows, dx) alone, on ``shared`` (rows, ds) and on its own column of each of ``own``, all at once.

    The ridge is relative to the mean variance of the shared, and of its own, signals. Returns the coefficients, feature by
    feature those of the shared signals and then its own, and the biases.
    """
    rows, weights = len(x), []
    for feature in range(x.shape[1]):
        columns = [o[:, feature] for o in own]
        design = np.column_stack([shared, *columns])
        centred = design - design.mean(axis=0)
        units = [shared.var(axis=0).mean() if shared.size else 0] * shared.shape[1] + [
            np.var(columns, axis=1).mean()
        ] * len(own)
        gram = centred.T @ centred / rows + ridge * np.diag(units)
        weights.append(
            np.linalg.solve(gram, centred.T @ (x[:, feature] - x[:, feature].mean()) / rows)
        )
    weights = np.stack(weights)
    means = np.stack(
        [np.append(shared.mean(axis=0), [o[:, f].mean() for o in own]) for f in range(x.shape[1])]
    )
    return weights, x.mean(axis=0) - (weights * means).sum(axis=1)


def apply_jointly(weights, shared, own):
    """The features without their biases."""
    ds = shared.shape[1]
    return shared @ weights[:, :ds].T + sum(o * weights[:, ds + j] for j, o in enumerate(own))


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def partners(x_grid, y_grid, kernel, stride, padding, dilation, transposed=False):
    """For each position of x and each tap of the kernel the position of y that the tap connects it to, or -1.

    A convolution reads x at ``y · stride − padding + tap · dilation``; a transposed one writes y at
    ``x · stride − padding + tap · dilation``.
    """
    table = np.full((int(np.prod(x_grid)), int(np.prod(kernel))), -1)
    near, far = (x_grid, y_grid) if transposed else (y_grid, x_grid)
    for position in product(*map(range, near)):
        for tap in product(*map(range, kernel)):
            other = [
                p * s - o + t * d
                for p, s, o, t, d in zip(position, stride, padding, tap, dilation, strict=True)
            ]
            if all(0 <= o < size for o, size in zip(other, far, strict=True)):
                x_at, y_at = (position, other) if transposed else (other, position)
                table[np.ravel_multi_index(x_at, x_grid), np.ravel_multi_index(tap, kernel)] = (
                    np.ravel_multi_index(y_at, y_grid)
                )
    return table


def patches(y, table):
    """Rows (n · positions of x, channels · taps): what of y (n, channels, ...) each tap connects a position of x to."""
    n, channels = y.shape[:2]
    flat = y.reshape(n, channels, -1)
    rows = np.zeros((n, len(table), channels, table.shape[1]))
    for position, taps in enumerate(table):
        for tap, partner in enumerate(taps):
            if partner >= 0:
                rows[:, position, :, tap] = flat[:, :, partner]
    return rows.reshape(n * len(table), -1)


def fit_kernel(x, s, table, groups, ridge, scale="relative"):
    """Equation 7 by its normal equations, one regression a group: every element of x on the patch of s that can reach it."""
    kernels = []
    for x_group, s_group in zip(
        np.split(x, groups, axis=1), np.split(s, groups, axis=1), strict=True
    ):
        rows = np.moveaxis(x_group, 1, -1).reshape(-1, x_group.shape[1])
        kernels.append(regress(rows, patches(s_group, table), ridge, scale))
    return kernels


def apply_kernel(s, table, kernels, shape, biases=True):
    parts = []
    for s_group, (weight, bias) in zip(np.split(s, len(kernels), axis=1), kernels, strict=True):
        rows = patches(s_group, table) @ weight.T + (bias if biases else 0)
        parts.append(np.moveaxis(rows.reshape(len(s), *shape[2:], -1), -1, 1))
    return np.concatenate(parts, axis=1)


def sliding_windows(size, kernel, stride, padding, dilation=1, ceil_mode=False):
    """The indices, inside one axis of the input, of each window of a pooling."""
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
    return [list(range(i * size // count, -(-(i + 1) * size // count))) for i in range(count)]


def window_table(axes):
    """(output position, input positions) of each window, from the windows of each axis."""
    for output in product(*(range(len(axis)) for axis in axes)):
        yield output, list(product(*(axis[i] for axis, i in zip(axes, output, strict=True))))


def max_pool(x, axes):
    y = np.empty((*x.shape[:2], *map(len, axes)))
    for output, inputs in window_table(axes):
        y[(..., *output)] = np.max([x[(..., *i)] for i in inputs], axis=0)
    return y


def max_unpool(s, x, axes, local=True):
    """Equation 8; an element that several windows answer for gets the mean of their signals."""
    total, count = np.zeros(x.shape), np.zeros(x.shape)
    for output, inputs in window_table(axes):
        first = np.argmax([x[(..., *i)] for i in inputs], axis=0)
        for k, i in enumerate(inputs):
            here = first == k if local else np.ones(first.shape, dtype=bool)
            total[(..., *i)] += here * s[(..., *output)]
            count[(..., *i)] += here
    return np.divide(total, count, out=np.zeros(x.shape), where=count > 0)


class Dense:
    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def forward(self, x):
        return x @ self.weight.T + self.bias

    def fit(self, x, s, ridge, scale):
        return regress(x, s, ridge, scale)

    def back(self, s, x, y, inverse, biases, local):
        weight, bias = inverse
        return s @ weight.T + (bias if biases else 0)


class Conv2d:
    def __init__(self, weight, bias, stride, padding, dilation, groups):
        self.weight, self.bias, self.groups = weight, bias, groups
        self.kernel, self.stride, self.dilation = weight.shape[2:], stride, dilation
        same = [(d * (k - 1)) // 2 for d, k in zip(dilation, self.kernel, strict=True)]
        self.same, self.padding = padding == "same", same if padding == "same" else padding

    def grid(self, x):
        if self.same:
            return x.shape[2:]
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)

    def table(self, x):
        return partners(
            x.shape[2:], self.grid(x), self.kernel, self.stride, self.padding, self.dilation
        )

    def forward(self, x):
        y = np.zeros((len(x), len(self.weight), int(np.prod(self.grid(x)))))
        x_flat, per_x, per_y = (
            x.reshape(*x.shape[:2], -1),
            x.shape[1] // self.groups,
            len(self.weight) // self.groups,
        )
        weight = self.weight.reshape(*self.weight.shape[:2], -1)
        for position, taps in enumerate(self.table(x)):
            for tap, partner in enumerate(taps):
                for g in range(self.groups if partner >= 0 else 0):
                    out = slice(g * per_y, (g + 1) * per_y)
                    y[:, out, partner] += (
                        x_flat[:, g * per_x : (g + 1) * per_x, position] @ weight[out, :, tap].T
                    )
        return y.reshape(len(x), -1, *self.grid(x)) + self.bias[:, None, None]

    def fit(self, x, s, ridge, scale):
        return fit_kernel(x, s, self.table(x), self.groups, ridge, scale)

    def back(self, s, x, y, inverse, biases, local):
        return apply_kernel(s, self.table(x), inverse, x.shape, biases)


class ReLU:
    def forward(self, x):
        return np.maximum(x, 0)

    def back(self, s, x, y, inverse, biases, local):
        return s * (y != 0) if local else s


class MaxPool2d:
    def __init__(self, kernel, stride, padding, dilation, ceil_mode):
        self.geometry = list(zip(kernel, stride, padding, dilation, strict=True))
        self.ceil_mode = ceil_mode

    def axes(self, x):
        return [
            sliding_windows(size, *axis, self.ceil_mode)
            for size, axis in zip(x.shape[2:], self.geometry, strict=True)
        ]

    def forward(self, x):
        return max_pool(x, self.axes(x))

    def back(self, s, x, y, inverse, biases, local):
        return max_unpool(s, x, self.axes(x), local)


class Flatten:
    def forward(self, x):
        return x.reshape(len(x), -1)

    def back(self, s, x, y, inverse, biases, local):
        return s.reshape(x.shape)


class Oracle:
    """Algorithm 1 for a list of layers and one class."""

    def __init__(self, layers, ridge=1e-3, scale="relative"):
        self.layers, self.ridge, self.scale, self.inverses = layers, ridge, scale, {}

    def features(self, x):
        features = [np.asarray(x, dtype=np.float64)]
        for layer in self.layers:
            features.append(layer.forward(features[-1]))
        return features

    def fit(self, x, target):
        self.inverses = {}
        self._descend(self.features(x), target, learn=True)
        return self

    def signals(self, x, target, *, biases=True, seed=None, local=True):
        """The signal at every depth, the input's first; S with biases, A without, B of a zero seed."""
        return self._descend(self.features(x), target, biases=biases, seed=seed, local=local)

    def _descend(self, features, target, *, learn=False, biases=True, seed=None, local=True):
        s = np.zeros_like(features[-1])
        s[:, target] = features[-1][:, target] if seed is None else seed
        signals = [s]
        for depth, layer in reversed(list(enumerate(self.layers))):
            x, y = features[depth], features[depth + 1]
            if learn and hasattr(layer, "fit"):
                self.inverses[depth] = layer.fit(x, s, self.ridge, self.scale)
            s = layer.back(s, x, y, self.inverses.get(depth), biases, local)
            signals.append(s)
        return signals[::-1]


def from_torch(model):
    """The layers of a ``torch.nn.Sequential``."""
    return [_layer(module) for module in model]


def _layer(module):
    kind = type(module).__name__
    if kind in ("Linear", "Conv2d"):
        weight = module.weight.detach().double().numpy()
        bias = (
            np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy()
        )
        if kind == "Linear":
            return Dense(weight, bias)
        return Conv2d(weight, bias, module.stride, module.padding, module.dilation, module.groups)
    if kind == "MaxPool2d":
        geometry = (
            pair(g) for g in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        return MaxPool2d(*geometry, module.ceil_mode)
    return {"ReLU": ReLU, "Flatten": Flatten}[kind]()
