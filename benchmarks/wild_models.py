"""The models of :mod:`wild`: small members of the families that people bring, random weights.

Each family is a function without arguments that returns a :class:`Sample`. Packages are imported
only by the families that need them.
"""

import importlib
import importlib.metadata
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from common import RESULTS, read
from torch import Tensor, nn

COUNT = 32
SIZES = (128, 112)  # of images, tried before a model's own size
HUGE = 60_000_000  # parameters


@dataclass(frozen=True)
class Sample:
    """A model, 32 inputs and what ``attribute`` needs to be told.

    Attributes:
        model: The network in evaluation mode.
        inputs: Tensors (32, ...).
        output: The output that holds the scores, for models that return several.
        embedding: The layer to explain where the inputs are integers.
        target: The class, or (class, row, column).
        name: The name of the model, where it is not that of its class.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    output: Any = None
    embedding: nn.Module | None = None
    target: Any = 0
    name: str = ""


Family = Callable[[], Sample]


def noise(*shape: int) -> tuple[Tensor, ...]:
    """Return one batch of normal noise (32, *shape)."""
    return (torch.randn(COUNT, *shape),)


def tokens(vocabulary: int, length: int = 12) -> tuple[Tensor, ...]:
    """Return a batch of tokens (32, length), none of them among the first ten (padding, end...)."""
    return (torch.randint(10, vocabulary, (COUNT, length)),)


def timm_families() -> Iterator[tuple[str, Family]]:
    """Return for each module of ``timm.models`` its member with the fewest parameters."""
    timm = importlib.import_module("timm")

    def parameters(name: str) -> float:
        try:
            return _parameters(_without_memory(name))
        except (RuntimeError, NotImplementedError, ValueError):  # needs memory to be built
            return math.inf

    def family(module: str) -> Sample:
        known = {row["family"]: row["model"].split()[0] for row in _rows() if "model" in row}
        names = timm.list_models(module=module)
        member = known.get(module, "")
        return timm_sample(member if member in names else min(names, key=parameters))

    for module in timm.models.list_modules():
        yield module, partial(family, module)


def _rows() -> list[dict[str, Any]]:
    """Return the rows of the last run for timm; its choice of the smallest members is kept."""
    version = importlib.metadata.version("timm")
    rows: list[dict[str, Any]] = read("wild")["rows"] if (RESULTS / "wild.json").exists() else []
    return [row for row in rows if (row["package"], row.get("version")) == ("timm", version)]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _without_memory(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return importlib.import_module("timm").create_model(name, **options).eval()


def timm_sample(name: str) -> Sample:
    """Return a model of timm, for the smallest images that it takes, of two blocks if it is huge.

    Whether it takes them is seen on the meta device, which costs no time and no memory.
    """
    timm = importlib.import_module("timm")
    default = timm.get_pretrained_cfg(name).input_size
    depths: list[dict[str, Any]] = [{}]
    if _parameters(_without_memory(name)) > HUGE:
        depths = [{"depth": 2}, {}]
    for depth, size in itertools.product(depths, SIZES):
        for image in ({"img_size": size}, {}):
            try:
                with torch.device("meta"):
                    _without_memory(name, **depth, **image)(torch.empty(2, 3, size, size))
            except Exception:  # it has no such option, or takes no such images
                continue
            model = timm.create_model(name, **depth, **image).eval()
            said = "".join(f" {key}={value}" for key, value in depth.items())
            return Sample(model, noise(3, size, size), name=f"{name}{said} {size} px")
    return Sample(timm.create_model(name).eval(), noise(*default), name=f"{name} {default[-1]} px")


#: Fields of a configuration of transformers → their small values, set where a model has the field.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "hidden_dim": 64, "d_kv": 8, "d_ff": 64, "d_inner": 64, "d_head": 8, "vocab_size": 99,
    "pad_token_id": 0, "image_size": 64, "num_mel_bins": 16, "max_length": 32,
}  # fmt: skip
IMAGES = (
    "beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2",
    "efficientnet", "focalnet", "hiera", "ijepa", "levit", "mobilenet_v1", "mobilenet_v2",
    "mobilevit", "mobilevitv2", "poolformer", "pvt", "pvt_v2", "regnet", "resnet", "segformer",
    "siglip", "swiftformer", "swin", "swinv2", "textnet", "vit", "vit_msn",
)  # fmt: skip
TEXTS = (
    "albert", "bart", "bert", "bloom", "camembert", "convbert", "deberta", "deberta-v2",
    "distilbert", "electra", "esm", "falcon", "fnet", "funnel", "gemma", "gpt2", "gpt_neo",
    "gpt_neox", "llama", "longformer", "mistral", "mobilebert", "modernbert", "mpnet", "opt", "phi",
    "qwen2", "qwen3", "roberta", "t5", "xlm-roberta", "xlnet",
)  # fmt: skip
SOUNDS = (
    "audio-spectrogram-transformer", "data2vec-audio", "hubert", "sew", "unispeech",
    "unispeech-sat", "wav2vec2", "wavlm", "whisper",
)  # fmt: skip
VIDEOS = ("timesformer",)


def transformers_model(kind: str, task: str) -> Any:
    """Return a model of transformers from a small configuration, or the default one if it fails."""
    transformers = importlib.import_module("transformers")
    auto = getattr(transformers, f"AutoModelFor{task}Classification")

    def build(fields: dict[str, Any]) -> Any:
        default = transformers.AutoConfig.for_model(kind)
        known = {name: value for name, value in fields.items() if hasattr(default, name)}
        config = transformers.AutoConfig.for_model(kind, **known)
        choices = auto._model_mapping[type(config)]
        if isinstance(choices, tuple):  # as with and without a teacher
            config.architectures = [choices[0].__name__]
        if getattr(config, "pad_token_id", 0) is None:
            config.pad_token_id = 0
        if kind == "t5":
            config.decoder_start_token_id = 0
        return auto.from_config(config).eval()

    def runs(fields: dict[str, Any]) -> bool:
        try:
            model = build(fields)
            with torch.no_grad():
                model(*(x[:2] for x in transformers_inputs(model, task)))
        except Exception:  # fields that do not fit each other
            return False
        return True

    if kind == "efficientnet":  # B0; the default is B7
        return build({"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280,
                      "image_size": 64})  # fmt: skip
    few = {"num_hidden_layers": 2, "encoder_layers": 2, "pad_token_id": 0}
    return build(next((fields for fields in (SMALL, few) if runs(fields)), {}))


def transformers_inputs(model: Any, task: str) -> tuple[Tensor, ...]:
    """Return a batch that the model takes as its first input."""
    config = model.config
    if task == "Sequence":
        (texts,) = tokens(config.vocab_size)
        if config.model_type in ("bart", "t5"):  # they read the score where a text ends
            texts[:, -1] = config.eos_token_id
        return (texts,)
    if task == "Image":
        size = getattr(config, "image_size", 224)
        size = size if isinstance(size, int) else size[0]
        return noise(getattr(config, "num_channels", 3), size, size)
    if task == "Video":
        return noise(config.num_frames, config.num_channels, config.image_size, config.image_size)
    if config.model_type == "audio-spectrogram-transformer":
        return noise(config.max_length, config.num_mel_bins)
    if config.model_type == "whisper":
        return noise(config.num_mel_bins, 2 * config.max_source_positions)
    return noise(4000)


def first_embedding(model: Any, texts: Tensor) -> nn.Module:
    """Return the module that is called first with the weights of a model's input embedding.

    An encoder and a decoder share these weights, and each has a module of its own for them.
    """
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module))
        for module in model.modules()
        if getattr(module, "weight", None) is model.get_input_embeddings().weight
    ]
    with torch.no_grad():
        model(texts)
    for hook in hooks:
        hook.remove()
    return called[0]


def transformers_families() -> Iterator[tuple[str, Family]]:
    """Return classifiers of images, texts, sounds and films of transformers."""

    def family(kind: str, task: str) -> Sample:
        model = transformers_model(kind, task)
        inputs = transformers_inputs(model, task)
        embedding = first_embedding(model, inputs[0][:2]) if task == "Sequence" else None
        return Sample(model, inputs, "logits", embedding)

    tasks = {"Image": IMAGES, "Sequence": TEXTS, "Audio": SOUNDS, "Video": VIDEOS}
    for task, kinds in tasks.items():
        for kind in kinds:
            yield kind, partial(family, kind, task)


def built(
    module: str, name: str, shape: tuple[int, ...], target: Any = 0, **options: Any
) -> Sample:
    """Return the model ``module.name(**options)`` and noise of a shape."""
    model = getattr(importlib.import_module(module), name)(**options)
    return Sample(model.eval(), noise(*shape), target=target)


def _braindecode() -> Iterator[tuple[str, Family]]:
    names = (
        "ATCNet", "AttentionBaseNet", "BDTCN", "BIOT", "CTNet", "ContraWR", "Deep4Net",
        "EEGConformer", "EEGInceptionERP", "EEGInceptionMI", "EEGITNet", "EEGNet", "EEGNeX",
        "EEGSimpleConv", "EEGTCNet", "FBCNet", "FBLightConvNet", "FBMSNet", "HybridNet", "IFNet",
        "Labram", "MSVTNet", "SCCNet", "SPARCNet", "ShallowFBCSPNet", "SincShallowNet", "SyncNet",
        "TIDNet", "TSception",
    )  # fmt: skip
    options = {"n_chans": 22, "n_times": 1000, "n_outputs": 4, "sfreq": 250}
    for name in names:
        channels = 128 if name == "Labram" else 22  # it takes all electrodes that it knows
        shape, sized = (channels, 1000), options | {"n_chans": channels}
        target = (0, 200) if name == "HybridNet" else 0  # it returns the scores of many times
        yield name, partial(built, "braindecode.models", name, shape, target, **sized)


def _monai() -> Iterator[tuple[str, Family]]:
    nets = partial(built, "monai.networks.nets")
    pixel = (1, 8, 8)
    volume = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
    plane = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
    unet = {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 1}
    yield "DenseNet121 2-D", partial(nets, "DenseNet121", (1, 64, 64), **plane)
    yield "DenseNet121 3-D", partial(nets, "DenseNet121", (1, 32, 32, 32), **volume)
    yield (
        "EfficientNetBN",
        partial(
            nets, "EfficientNetBN", (3, 64, 64), model_name="efficientnet-b0", pretrained=False
        ),
    )
    yield (
        "SEResNet50",
        partial(nets, "SEResNet50", (1, 64, 64), spatial_dims=2, in_channels=1, num_classes=3),
    )
    resnet = {
        "block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 8, 8, 8],
        "n_input_channels": 1, "num_classes": 3,
    }  # fmt: skip
    yield "ResNet 3-D", partial(nets, "ResNet", (1, 32, 32, 32), **resnet)
    yield "ViT 3-D", lambda: replace(nets(
        "ViT", (1, 32, 32, 32), in_channels=1, img_size=(32, 32, 32), patch_size=(8, 8, 8),
        hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4, classification=True, num_classes=3,
    ), output=0)  # fmt: skip
    yield "UNet 2-D", partial(nets, "UNet", (1, 32, 32), pixel, **plane, **unet)
    yield "UNet 3-D", partial(nets, "UNet", (1, 16, 16, 16), (1, 8, 8, 8), **volume, **unet)
    yield (
        "AttentionUnet",
        partial(
            nets, "AttentionUnet", (1, 32, 32), pixel, **plane, channels=(4, 8, 16), strides=(2, 2)
        ),
    )
    yield "SegResNet", partial(nets, "SegResNet", (1, 32, 32), pixel, **plane, init_filters=8)
    yield (
        "BasicUNet",
        partial(nets, "BasicUNet", (1, 32, 32), pixel, **plane, features=(4, 4, 8, 8, 16, 4)),
    )
    swin = {"feature_size": 12, "use_checkpoint": False}
    yield "SwinUNETR", partial(nets, "SwinUNETR", (1, 64, 64), pixel, **plane, **swin)


def _torchvision() -> Iterator[tuple[str, Family]]:
    def family(name: str) -> Sample:
        module = importlib.import_module("torchvision.models.segmentation")
        model = getattr(module, name)(weights=None, weights_backbone=None, num_classes=3)
        return Sample(model.eval(), noise(3, 64, 64), "out", target=(1, 32, 32))

    for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"):
        yield name, partial(family, name)


def _segmentation() -> Iterator[tuple[str, Family]]:
    options = {"encoder_weights": None, "classes": 3}
    for name in ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "Linknet",
                 "MAnet", "PAN", "UPerNet", "Segformer"):  # fmt: skip
        shape, pixel = (3, 128, 128) if name == "PAN" else (3, 64, 64), (1, 8, 8)
        encoder = "resnet18"
        yield name, partial(
            built, "segmentation_models_pytorch", name, shape, pixel, encoder_name=encoder,
            **options,
        )  # fmt: skip


def _vit_pytorch() -> Iterator[tuple[str, Family]]:
    size = {"image_size": 64, "num_classes": 10}
    small = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
    patches = {"patch_size": 16}
    vit = partial(built, shape=(3, 64, 64))
    for module, name, options in (
        ("vit", "ViT", small | patches),
        ("simple_vit", "SimpleViT", small | patches),
        ("deepvit", "DeepViT", small | patches),
        ("vit_for_small_dataset", "ViT", small | patches),
        ("parallel_vit", "ViT", small | patches),
        ("learnable_memory_vit", "ViT", small | patches),
        ("vit_with_patch_merger", "ViT", small | patches),
        ("simple_vit_with_qk_norm", "SimpleViT", small | patches),
        ("simple_vit_with_register_tokens", "SimpleViT", small | patches),
        ("simple_vit_with_value_residual", "SimpleViT", small | patches),
        ("cait", "CaiT", small | patches | {"cls_depth": 1}),
        ("rvt", "RvT", small | patches),
        ("t2t", "T2TViT", {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}),
        ("cct", "CCT", {
            "img_size": (64, 64), "embedding_dim": 32, "num_layers": 2, "num_heads": 4,
            "mlp_ratio": 2.0, "n_conv_layers": 2,
        }),
        ("levit", "LeViT", {
            "stages": 2, "dim": (32, 64), "depth": 1, "heads": (2, 4), "mlp_mult": 2,
        }),
        ("cvt", "CvT", {
            "s1_emb_dim": 16, "s2_emb_dim": 16, "s2_heads": 2, "s3_emb_dim": 16, "s3_heads": 2,
            "s3_depth": 1,
        }),
        ("twins_svt", "TwinsSVT", {
            "s1_emb_dim": 16, "s2_emb_dim": 16, "s3_emb_dim": 16, "s4_emb_dim": 16,
            "s1_local_patch_size": 4, "s2_local_patch_size": 4, "s3_local_patch_size": 4,
            "s4_local_patch_size": 2, "s1_global_k": 2, "s2_global_k": 2, "s3_global_k": 2,
            "s4_global_k": 2,
        }),
        ("nest", "NesT", {"dim": 32, "heads": 2, "patch_size": 4, "num_hierarchies": 3,
                          "block_repeats": (1, 1, 1)}),
        ("xcit", "XCiT", small | patches | {"cls_depth": 1}),
        ("na_vit", "NaViT", small | patches),
    ):  # fmt: skip
        sized = {} if module in ("cvt", "twins_svt", "cct") else {"image_size": 64}
        options = {"num_classes": size["num_classes"]} | sized | options
        yield f"{module}.{name}", partial(vit, f"vit_pytorch.{module}", name, **options)


def _pytorchcv() -> Iterator[tuple[str, Family]]:
    def family(name: str, size: int) -> Sample:
        model = importlib.import_module("pytorchcv.model_provider").get_model(name)
        output = 0 if name.startswith("nts") else None
        return Sample(model.eval(), noise(3, size, size), output)

    for name in (
        "airnet50_1x64d_r2", "bagnet9", "condensenet74_c4_g4", "diracnet18v2", "dla34", "dpn68",
        "fbnet_cb", "ibn_resnet50", "igcv3_w1", "isqrtcovresnet18", "menet108_8x1_g3", "ntsnet_cub",
        "octresnet10_ad2", "peleenet", "polynet", "rir_cifar10", "ror3_56_cifar10", "selecsls42b",
        "shakeshakeresnet20_2x16d_cifar10", "sknet50", "vovnet27s", "wrn20_10_1bit_cifar10",
        "xdensenet40_2_k24_bc_cifar10",
    ):  # fmt: skip
        size = 32 if "cifar10" in name else {"ntsnet_cub": 448, "polynet": 331}.get(name, 224)
        yield name, partial(family, name, size)


class _Graph(nn.Module):
    """Two graph convolutions on a fixed graph of eight nodes, the batch as first dimension."""

    def __init__(self, convolution: str, edges: Tensor) -> None:
        super().__init__()
        layers = importlib.import_module("torch_geometric.nn")
        make = getattr(layers, convolution)
        self.dense = convolution.startswith("Dense")
        # a graph that does not change is normalised at the first call alone
        named = {"cached": True} if convolution == "GCNConv" else {}
        self.one, self.two = (
            (make(nn.Linear(4, 8)), make(nn.Linear(8, 3)))
            if convolution == "GINConv"
            else (make(4, 8, **named), make(8, 3, **named))
        )
        adjacency = torch.zeros(8, 8).index_put((edges[0], edges[1]), torch.tensor(1.0))
        self.register_buffer("edges", adjacency if self.dense else edges)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x, self.edges).relu()
        scores: Tensor = self.two(hidden, self.edges).mean(1)
        return scores


def _graphs() -> Iterator[tuple[str, Family]]:
    def family(convolution: str) -> Sample:
        ring = torch.arange(8)
        edges = torch.stack((torch.cat((ring, ring)), torch.cat(((ring + 1) % 8, (ring + 7) % 8))))
        model, inputs = _Graph(convolution, edges).eval(), noise(8, 4)
        model(*inputs)
        return Sample(model, inputs)

    for name in ("GCNConv", "SAGEConv", "GINConv", "DenseGCNConv"):
        yield name, partial(family, name)


def _spiking() -> Sample:
    snntorch = importlib.import_module("snntorch")

    class Spiking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 20), nn.Linear(20, 3)
            self.first, self.second = snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.9)

        def forward(self, x: Tensor) -> Tensor:
            potential, other = self.first.init_leaky(), self.second.init_leaky()
            scores = []
            for _ in range(4):
                spikes, potential = self.first(self.one(x), potential)
                _, other = self.second(self.two(spikes), other)
                scores.append(other)
            return torch.stack(scores).mean(0)

    return Sample(Spiking().eval(), noise(16))


class _Scattering(nn.Module):
    """A scattering transform and one dense layer."""

    def __init__(self) -> None:
        super().__init__()
        scattering = importlib.import_module("kymatio.torch").Scattering2D
        self.scattering = scattering(J=2, shape=(32, 32))
        self.head = nn.Linear(81 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.scattering(x).flatten(1))
        return scores


class _Speaker(nn.Module):
    """ECAPA-TDNN and a dense layer on its embedding."""

    def __init__(self) -> None:
        super().__init__()
        module = importlib.import_module("speechbrain.lobes.models.ECAPA_TDNN")
        self.body = module.ECAPA_TDNN(
            20, channels=[32, 32, 32, 32, 96], attention_channels=16, lin_neurons=24
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x)[:, 0])
        return scores


class _Tabular(nn.Module):
    """A network of rtdl on numbers alone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(x, None)
        return scores


def _others() -> Iterator[tuple[str, str, Family]]:
    rtdl = "rtdl_revisiting_models"
    yield (
        rtdl,
        "MLP",
        partial(built, rtdl, "MLP", (10,), d_in=10, d_out=3, n_blocks=2, d_block=32, dropout=0.1),
    )
    yield rtdl, "ResNet", partial(
        built, rtdl, "ResNet", (10,), d_in=10, d_out=3, n_blocks=2, d_block=32,
        d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0,
    )  # fmt: skip

    def transformer() -> Sample:
        make = importlib.import_module(rtdl).FTTransformer
        body = make(
            n_cont_features=10, cat_cardinalities=[], d_out=3, n_blocks=2, d_block=32,
            attention_n_heads=4, attention_dropout=0.0, ffn_d_hidden=None,
            ffn_d_hidden_multiplier=2.0, ffn_dropout=0.0, residual_dropout=0.0,
        )  # fmt: skip
        return Sample(_Tabular(body).eval(), noise(10))

    yield rtdl, "FTTransformer", transformer

    def tabnet(mask: str) -> Sample:
        make = importlib.import_module("pytorch_tabnet.tab_network").TabNet
        model = make(10, 3, mask_type=mask, group_attention_matrix=torch.eye(10))
        return Sample(model.eval(), noise(10), output=0)

    for mask in ("sparsemax", "entmax"):
        yield "pytorch-tabnet", mask, partial(tabnet, mask)
    yield "snntorch", "Leaky", _spiking
    yield (
        "pykan",
        "KAN",
        partial(built, "kan", "KAN", (4,), width=[4, 5, 3], grid=3, auto_save=False),
    )
    yield "kymatio", "Scattering2D", lambda: Sample(_Scattering().eval(), noise(1, 32, 32))
    yield "speechbrain", "ECAPA-TDNN", lambda: Sample(_Speaker().eval(), noise(60, 20))
    yield "efficientnet-pytorch", "efficientnet-b0", lambda: Sample(
        importlib.import_module("efficientnet_pytorch")
        .EfficientNet.from_name("efficientnet-b0").eval(), noise(3, 64, 64),
    )  # fmt: skip
    yield "torchxrayvision", "DenseNet", lambda: Sample(
        importlib.import_module("torchxrayvision").models.DenseNet(weights=None, num_classes=14)
        .eval(), noise(1, 224, 224),
    )  # fmt: skip


def families() -> Iterator[tuple[str, str, Family]]:
    """Return (package, family, function that builds a sample) of all families."""
    for package, group in (
        ("timm", timm_families), ("transformers", transformers_families),
        ("braindecode", _braindecode), ("monai", _monai),
        ("segmentation-models-pytorch", _segmentation), ("vit-pytorch", _vit_pytorch),
        ("torchvision", _torchvision), ("pytorchcv", _pytorchcv), ("torch-geometric", _graphs),
    ):  # fmt: skip
        for name, family in group():
            yield package, name, family
    yield from _others()
