"""Complex values: Fourier transforms and what networks do with them, against real numbers."""

import re

import numpy as np
import pytest
import torch
from designs import aside
from every_method import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import LRP, InverseNetwork, MIPINAttribution, check
from captum_mipin.errors import CaptureError, UnsupportedOperationError
from captum_mipin.methods import Deconvnet, GuidedBackprop, LayerPropagation
from captum_mipin.methods.gradients import Gradient

FFT, WIDE = torch.fft, torch.float64
FILTER = torch.randn(7, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
WINDOW = torch.hann_window(6, dtype=WIDE)


def dft(h, n):
    """The first coefficients of the transform of real numbers, by NumPy's complex exponentials."""
    k, t = np.arange(n // 2 + 1)[:, None], np.arange(n)
    waves = np.exp(-2j * np.pi * k * t / n)
    weight = torch.from_numpy(np.concatenate([waves.real, waves.imag]))
    return F.linear(h, torch.where(weight.abs() < 1e-9, 0, weight))  # sin π is not quite 0


def lengths(parts):
    return torch.stack(parts, -1).norm(dim=-1)


def assigned(h):
    z = FFT.rfft(h)
    some = torch.zeros(len(h), 7, dtype=z.dtype)
    some[:, :3] = z[:, :3] * FILTER[:3]
    return FFT.irfft(some)


def stft(h, **options):
    return torch.stft(h, 6, hop_length=2, return_complex=True, **options)


#: What networks do with 12 values; each result is real.
USES = {
    "amplitudes": lambda h: FFT.rfft(h).abs(),
    "power": lambda h: FFT.rfft(h).abs() ** 2,
    "power by the conjugate": lambda h: (FFT.rfft(h) * FFT.rfft(h).conj()).real,
    "both parts": lambda h: torch.view_as_real(FFT.rfft(h)),
    "a filter": lambda h: FFT.irfft(FFT.rfft(h) * FILTER, n=12),
    "a convolution": lambda h: FFT.irfft(
        FFT.rfft(h, n=20) * FFT.rfft(torch.arange(9, dtype=WIDE), n=20), n=20
    ),
    "an odd number of values": lambda h: FFT.irfft(FFT.rfft(h, n=15), n=9),
    "an envelope": lambda h: FFT.ifft(FFT.fft(h) * torch.arange(12)).abs(),
    "two dimensions": lambda h: FFT.irfft2(FFT.rfft2(h.view(-1, 3, 4)) * 2),
    "two complex dimensions": lambda h: torch.view_as_real(
        FFT.fft2(h.view(-1, 3, 4), norm="forward")
    ),
    "several dimensions": lambda h: (
        FFT.ifftn(FFT.fftn(h.view(-1, 3, 4), dim=(1, 2), norm="ortho"), s=(4, 2), dim=(1, 2)).real
    ),
    "mixed tokens": lambda h: FFT.fft(FFT.fft(h.view(-1, 3, 4), dim=-1), dim=-2).real,
    "some coefficients": assigned,
    "weights for coefficients": lambda h: FFT.irfft(
        torch.einsum("bik,iok->bok", FFT.rfft(h.view(-1, 3, 4)), FILTER[:6].view(3, 2, 1)), n=4
    ),
    "a matrix": lambda h: (torch.complex(h[:, :4], h[:, 4:8]) @ FILTER[:4].diag()).abs(),
    "a rotation": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 6, 2)) * torch.polar(torch.ones(6, dtype=WIDE), WINDOW)
    ),
    "a ratio": lambda h: (FFT.rfft(h) / (1 + 2j) / FILTER).imag,
    "sums with real values": lambda h: (h[:, :7] - FFT.rfft(h) + h[:, 5:]).abs(),
    "sums with constants": lambda h: (1 - FFT.rfft(h) + 2j).abs(),
    "made of two parts": lambda h: (h[:, :6] + 1j * h[:, 6:]).abs(),
    "times a complex number": lambda h: ((2 + 0j) * h * 1j).imag + (h * 1j).imag,
    "from a complex number": lambda h: torch.view_as_real((2j - h) * (1 - 2j) - (1 - 2j) * 2j),
    "divided by a complex constant": lambda h: (h[:, :7] / FILTER).imag,
    "an autocorrelation": lambda h: FFT.irfft(FFT.rfft(h).abs().square()),
    "padded": lambda h: FFT.ifft(F.pad(FFT.fft(h), (1, 1))).abs(),
    "joined": lambda h: torch.cat([FFT.rfft(h), 1j * FFT.rfft(h)], 1).abs(),
    "split": lambda h: (FFT.fft(h).chunk(2, 1)[0] - FFT.fft(h).unbind(1)[3][:, None]).abs(),
    "shifted": lambda h: FFT.ifftshift(FFT.fftshift(FFT.fft(h), 1).roll(1, 1), 1).real,
    "converted": lambda h: (h.to(torch.complex128) * 1j).imag,
    "short times": lambda h: stft(h, window=WINDOW).abs(),
    "short times of a narrow window": lambda h: torch.view_as_real(
        stft(h, win_length=4, window=WINDOW[:4], center=False, normalized=True, onesided=False)
    ),
    "what is silent": lambda h: FFT.rfft(torch.relu(h) * 0).abs() + h[:, :7],
}


USUAL = aside(
    USES, "power", "an odd number of values", "two complex dimensions", "some coefficients",
    "several dimensions", "sums with real values", "made of two parts", "from a complex number",
    "an autocorrelation", "padded", "converted", "short times",
)  # fmt: skip


def network(use):
    torch.manual_seed(0)
    first, last = nn.Linear(6, 12, bias=False), nn.LazyLinear(3, bias=False)
    model = Function(lambda m, x: m["b"](use(m["a"](x)).flatten(1)), a=first, b=last)
    model = model.double().eval()
    model(normal(1, 6, dtype=WIDE))
    return model


@pytest.mark.parametrize("use", USUAL)
def test_gradients_equal_those_of_autograd(use):
    model, x = network(USES[use]), normal(5, 6, dtype=WIDE).requires_grad_()
    model(x)[:, 1].sum().backward()
    for method in (Gradient, GuidedBackprop, Deconvnet):
        if use != "what is silent" or method is Gradient:  # it has a rectifier
            torch.testing.assert_close(method(model).attribute(x.detach(), 1), x.grad)


@pytest.mark.parametrize("use", [name for name in USES if name != "sums with constants"])
def test_lrp_conserves_relevance(use):
    model, x = network(USES[use]), normal(5, 6, dtype=WIDE)
    relevance = LRP(model).attribute(x, 1).sum(1)
    torch.testing.assert_close(relevance, model(x)[:, 1].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", USUAL)
def test_mipin_explains_them(use):
    model, x = network(USES[use]), normal(60, 6, dtype=WIDE)
    assert not [row for row in check(model, x[:2]).rows if row.status == "refused"]
    inverse = InverseNetwork(model).fit(x, 1, progress=False)
    signal = MIPINAttribution(model, inverse).attribute(x[:5], 1)
    assert signal.isfinite().all() and signal.abs().max() > 0


def halves(h):
    z = dft(h, 12)
    return z[..., :7], z[..., 7:]


@pytest.mark.parametrize(
    ("spelled", "by_hand", "size"),
    [
        (lambda h: FFT.rfft(h).abs(), lambda h: lengths(halves(h)), 7),
        (lambda h: FFT.rfft(h).real, lambda h: halves(h)[0], 7),
        (lambda h: FFT.rfft(h).imag, lambda h: halves(h)[1], 7),
        (
            lambda h: torch.view_as_real(FFT.rfft(h)).flatten(1),
            lambda h: torch.stack(halves(h), -1).flatten(1),
            14,
        ),
        (
            lambda h: torch.hypot(h[:, :6], h[:, 6:]),
            lambda h: lengths((h[:, :6], h[:, 6:])),
            6,
        ),
    ],
    ids=["amplitudes", "real part", "imaginary part", "both parts", "hypot"],
)
def test_spelling_by_complex_and_by_real_numbers_does_not_matter(spelled, by_hand, size):
    torch.manual_seed(0)
    parts = {"a": nn.Linear(6, 12), "last": nn.Linear(size, 3)}
    runs = [lambda m, x, use=use: m["last"](use(m["a"](x))) for use in (spelled, by_hand)]
    alike(runs, normal(60, 6, dtype=WIDE), **parts)


def test_short_times_are_a_convolution():
    torch.manual_seed(0)
    parts = {"a": nn.Linear(6, 12), "last": nn.Linear(16, 3)}
    kernel = dft(torch.eye(6, dtype=WIDE), 6).T * WINDOW

    def spelled(m, x):
        return m["last"](stft(m["a"](x), window=WINDOW, center=False).abs().flatten(1))

    def by_hand(m, x):
        z = F.conv1d(m["a"](x)[:, None], kernel[:, None], stride=2)
        return m["last"](lengths((z[:, :4], z[:, 4:])).flatten(1))

    alike([spelled, by_hand], normal(60, 6, dtype=WIDE), **parts)


def test_a_reversed_difference_of_spectra_is_a_difference():
    parts = {"a": nn.Linear(6, 8), "last": nn.Linear(5, 2)}

    def reversed_(m, x):
        a = FFT.rfft(m["a"](x))
        return m["last"](torch.rsub(a, FFT.rfft(2 * x, 8), alpha=3).abs())

    def plain(m, x):
        return m["last"]((FFT.rfft(2 * x, 8) - 3 * FFT.rfft(m["a"](x))).abs())

    alike([reversed_, plain], normal(60, 6, dtype=WIDE), **parts)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda h: FFT.rfft(h).angle(), "aten.angle.default"),
        (lambda h: FFT.ifft(F.pad(FFT.fft(h), (1, 1), value=1.0)).abs(), "aten.pad.default"),
        (lambda h: stft(h, window=WINDOW + 0j).abs(), "aten.stft.default"),
        (
            lambda h: stft(
                h, window=WINDOW[:4], win_length=4, center=False, align_to_window=True
            ).abs(),
            "aten.stft.default",
        ),
        (lambda h: (FFT.rfft(h) ** 3).real, "aten.pow.Tensor_Scalar"),
        (lambda h: torch.istft(stft(h, window=WINDOW), 6, 2, window=WINDOW), "aten.istft.default"),
    ],
)
def test_an_operation_that_is_not_linear_is_named(use, name):
    model, x = network(use), normal(5, 6, dtype=WIDE)
    for explain in (lambda: LRP(model).attribute(x, 1), lambda: InverseNetwork(model).fit(x, 1)):
        with pytest.raises(UnsupportedOperationError, match=re.escape(name)):
            explain()


def test_a_transform_over_the_batch_is_refused():
    model = network(lambda h: FFT.fft2(h).real)
    with pytest.raises(UnsupportedOperationError, match="fft_fft2"):
        LRP(model).attribute(normal(5, 6, dtype=WIDE), 1)


class _Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x)


def test_complex_outputs_and_layers_are_refused_as_such():
    model = nn.Sequential(nn.Linear(4, 6), _Spectrum()).eval()
    with pytest.raises(CaptureError, match=r"the model's output has torch\.complex64 numbers"):
        LRP(model).attribute(torch.randn(2, 4), target=0)
    further = Function(lambda m, x: m["last"](m["spectrum"](x).abs()), spectrum=_Spectrum(),
                       last=nn.Linear(4, 3)).eval()  # fmt: skip
    method = LayerPropagation(LRP(further), further.layers["spectrum"])
    with pytest.raises(CaptureError, match=r"spectrum/fft_fft has torch\.complex64 numbers"):
        method.attribute(torch.randn(2, 4), target=0)


def test_a_norm_with_an_order_below_one_is_refused():
    model = network(lambda h: torch.linalg.vector_norm(h.view(-1, 3, 4), 0.5, dim=-1))
    with pytest.raises(UnsupportedOperationError, match=r"ord=0\.5, expected ord of at least 1"):
        LRP(model).attribute(normal(5, 6, dtype=WIDE), 1)


def test_a_long_transform_is_exact_in_float32():
    model = Function(lambda m, x: m["last"](FFT.rfft(x).abs()), last=nn.Linear(2001, 2)).eval()
    x = normal(3, 4000)
    maps = [Gradient(model.to(x.dtype)).attribute(x, 1) for x in (x, x.double())]
    torch.testing.assert_close(maps[0].double(), maps[1], rtol=0, atol=1e-5 * maps[1].abs().max())
