"""Write the tables of README.md and docs/ from the results files: python benchmarks/tables.py."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from common import RESULTS, pages, read, show

NETWORKS = {
    "mlp-mnist": ("MLP, MNIST", "10.1 / 2.6"),
    "cnn-mnist": ("CNN, MNIST", "16.5 / 2.3"),
    "cnn-cifar10": ("CNN, CIFAR-10", "21.1 / 10.6"),
}


def _pair(row: dict[str, Any], suffix: str = "") -> str:
    names = f"APC %{suffix}", f"positive APC %{suffix}"
    return " / ".join(f"{row[name]:.1f}" for name in names if name in row)


def _fitted_on(result: dict[str, Any], most: bool) -> tuple[int, list[dict[str, Any]]]:
    """Return the rows of the fits on the most training images, or on the fewest."""
    count = (max if most else min)(row["fit images"] for row in result["rows"])
    return count, [row for row in result["rows"] if row["fit images"] == count]


def completeness() -> str:
    """Return APC / positive APC of S, for every network and seed, fitted on all training images."""
    rows = []
    for name, (title, paper) in NETWORKS.items():
        result = read(f"completeness-{name}")
        count, full = _fitted_on(result, most=True)
        for seed, accuracy in enumerate(result["settings"]["test accuracy"]):
            found = {row["signal"]: row for row in full if row["seed"] == seed}
            rows.append(
                {
                    "network (test accuracy)": f"{title}, seed {seed} ({100 * accuracy:.1f} %)",
                    "fitted on": f"{count:,}",
                    "paper": paper,
                    "**S**": f"**{_pair(found['S'])}**",
                    "S, correct images": _pair(found["S"], " (correct)"),
                    "S, predicted class": _pair(found["S"], " (predicted)"),
                    "S, median": f"{found['S']['median error %']:.1f}",
                    "S, input masked": _pair(found["S, input masked"]),
                    "mask only": _pair(found["mask only"]),
                    "shuffled output": _pair(found["shuffled output"]),
                    "mean image": _pair(found["mean image"]),
                }
            )
    return show(rows)


def controls() -> str:
    """Return APC / positive APC of S and of the controls of the own class, on correct images."""
    rows = []
    for name, (title, _) in NETWORKS.items():
        count, few = _fitted_on(read(f"completeness-{name}"), most=False)
        found = {
            row["signal"]: row
            for row in reversed(few)
            if row["fitted on"] == "all classes" and row["ridge"] == 1e-3
        }
        columns = {
            "**S**": "S",
            "mask only, mean of the class": "mask only, mean of the class",
            "shuffled within the class": "shuffled output within the class",
            "mean image of the class": "mean image of the class",
        }
        cells = {column: _pair(found[signal], " (correct)") for column, signal in columns.items()}
        rows.append({"network": title, "fitted on": f"{count:,}", **cells})
    return show(rows)


def variants() -> str:
    """Return APC / positive APC of S with other options, on correct images."""
    rows = []
    for name, (title, _) in NETWORKS.items():
        count, few = _fitted_on(read(f"completeness-{name}"), most=False)
        row: dict[str, Any] = {"network": title, "fitted on": f"{count:,}"}
        for variant in (r for r in few if r["signal"] == "S"):
            label = f"λ = {variant['ridge']:g}, {variant['ridge scale']}"
            row["own class only" if variant["fitted on"] == "own class" else label] = _pair(
                variant, " (correct)"
            )
        rows.append(row)
    return show(rows)


def layers() -> str:
    """Return APC of S and of its controls at each block of a residual network.

    A cell says: all images / those classified rightly / median.
    """
    found: dict[str, dict[str, str]] = {}
    names = {
        ("joint", "S"): "**S**",
        ("joint", "shuffled output"): "shuffled within the class",
        ("joint", "mean"): "mean features",
        ("sum", "S"): 'S, `forks="sum"`',
        ("", "true features"): "from true features",
    }
    measured = "S: logit ÷ the image's", "S: variance explained"
    for row in read("completeness-layers-resnet20")["rows"]:
        name = names[row["forks"], row["signal"]]
        cells = found.setdefault(row["layer"], dict.fromkeys((*names.values(), *measured), ""))
        cells[name] = " / ".join(
            f"{row[key]:.0f}" for key in ("APC %", "APC % (correct)", "median error %")
        )
        if name == "**S**":
            cells |= zip(
                measured,
                (f"{row[key]:.2f}" for key in ("logit ratio", "explained variance")),
                strict=True,
            )
    return show(
        [
            {"S at": layer if layer == "input" else f"`{layer}`", **cells}
            for layer, cells in found.items()
        ]
    )


def speed() -> str:
    """Return every ratio that was measured."""
    rows = [
        {
            "": f"`attribute`, {row['network']}, {row['input']}, {row['targets']} target"
            + "s" * (row["targets"] == "mixed"),
            "time": f"{row['ratio']:.2f} × Saliency",
        }
        for row in read("speed-attribute")["rows"]
    ]
    exact, *descents = read("speed-sgd")["rows"]
    for sgd in descents:
        percent = [100 * row["unexplained, conv 1"] for row in (sgd, exact)]
        errors = f"{percent[0]:.2f} % unexplained, exact {percent[1]:.2f} %"
        what = f'`solver="sgd"`, {sgd["epochs"]} epochs, CNN, {exact["images"]} images ({errors})'
        rows.append({"": what, "time": f"{sgd['ratio']:.0f} × exact"})
    return show(rows)


def invariance() -> str:
    """Return what each method makes of the spellings; those with the same answers share a row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    methods: list[str] = []
    for row in read("invariance")["rows"]:
        spelling, *methods = row
        groups.setdefault(tuple(_differs(row[method]) for method in methods), []).append(
            f"`{row[spelling]}`"
        )
    rows = [
        {"written with": ", ".join(names), **dict(zip(methods, cells, strict=True))}
        for cells, names in groups.items()
    ]
    return show(rows)


def _differs(cell: float | str) -> str:
    """Return a relative difference in words, or "refused" for an error."""
    return (
        "refused"
        if isinstance(cell, str)
        else "same"
        if cell <= 1e-6
        else f"differs by {100 * cell:.0f} %"
    )


def localization() -> str:
    """Return the grid pointing game: one table a network, one block of columns a layer."""
    tables = []
    for title, result in _mosaics().items():
        lines: dict[str, dict[str, Any]] = {}
        for row in result["rows"]:
            line = lines.setdefault(row["method"], {"method": row["method"]})
            for grid in ("2x2", "3x3"):
                line[f"{_place(row)} {grid}"] = (
                    f"{row[grid]:.2f} ({row[f'{grid}, positive logit']:.2f})"
                )
        settings = result["settings"]
        about = f"{len(settings['classes'])} classes, {settings['mosaics']} mosaics, "
        about += f"fitted on {settings['fit']} images"
        about += f", confidence {settings['confidence']}" if settings["confidence"] != 0.99 else ""
        tables.append(f"**{title}**, {about}:\n\n{show(list(lines.values()))}")
    return "\n\n".join(tables)


#: Network of the mosaics -> its name in tables.
_NETWORKS = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "mobilenet_v2": "MobileNetV2",
    "squeezenet1_0": "SqueezeNet 1.0",
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
}


def mosaics() -> str:
    """Return a summary of the grid pointing game: MIP-IN, and the best of its peers by kind."""
    kinds = {
        "best gradient method": (
            "Saliency",
            "Input×Gradient",
            "Integrated Gradients",
            "Guided Backprop",
            "Grad-CAM",
        ),
        "best of LRP and excitation backprop": (
            "LRP-ε",
            "LRP-γ",
            "Excitation backprop, contrastive",
        ),
    }
    own = {
        "MIP-IN": "MIP-IN, shares, joint",
        "× gradient": "MIP-IN, shares, joint, × gradient",
        "evidence": "MIP-IN, evidence",
        "evidence × gradient": "MIP-IN, evidence, × gradient",
    }
    rows = []
    for title, result in _mosaics().items():
        for layer in ("input", "middle", "last"):
            found = {row["method"]: row for row in result["rows"] if row["layer"] == layer}
            groups = {
                name: [found[method]] if method in found else [] for name, method in own.items()
            }
            groups |= {
                kind: [found[name] for name in names if name in found]
                for kind, names in kinds.items()
            }
            cells = {
                name: " / ".join(
                    f"{max(row[grid] for row in group):.2f}" for grid in ("2x2", "3x3")
                )
                if group
                else ""
                for name, group in groups.items()
            }
            rows.append({"network": title, "at": _place(next(iter(found.values()))), **cells})
    return show(rows)


def contrast() -> str:
    """Return the mosaics of MIP-IN's contrast, beside contrastive excitation backprop."""
    columns = {
        "MIP-IN, A × gradient": "A × gradient",
        "MIP-IN, evidence × gradient": "evidence × gradient",
        "gradient of the contrast × feature": "gradient of the contrast × feature",
        "MIP-IN, contrast": "contrast",
        "MIP-IN, contrast × gradient": "**contrast × gradient**",
        "Excitation backprop, contrastive": "excitation backprop, contrastive",
    }
    rows = []
    for name, title in _NETWORKS.items():
        if not (RESULTS / f"contrast-{name}.json").exists():
            continue
        result = read(f"contrast-{name}")
        for layer in ("input", "middle", "last"):
            found = {row["method"]: row for row in result["rows"] if row["layer"] == layer}
            own = found["MIP-IN, contrast × gradient"]
            rows.append(
                {
                    "network (mosaics)": f"{title} ({result['settings']['mosaics']})",
                    "at": _place(own),
                    **{
                        label: " / ".join(f"{found[method][n]:.2f}" for n in ("2x2", "3x3"))
                        for method, label in columns.items()
                    },
                    "less excitation backprop": " / ".join(
                        f"{own[f'{n} away']:+.3f} ± {own[f'{n} error']:.3f}" for n in ("2x2", "3x3")
                    ),
                }
            )
    return show(rows)


#: Titles of the transformers, and the sizes of their mosaics.
_TRANSFORMERS = {
    "vit-cifar10": ("ViT", ("2x2", "3x3")),
    "cct-cifar10": ("Compact", ("2x2", "3x3")),
    "minilm": ("MiniLM", ("2", "3")),
}


def _transformers() -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield title, sizes of the mosaics and results of each transformer."""
    for name, (title, sizes) in _TRANSFORMERS.items():
        if (RESULTS / f"transformers-{name}.json").exists():
            yield title, sizes, read(f"transformers-{name}")


def transformers() -> str:
    """Return the measures of each transformer's maps, and how complete S is on single inputs."""
    tables = []
    for title, sizes, result in _transformers():
        settings, rows = result["settings"], []
        for row in result["rows"]:
            if row["method"].startswith("MIP-IN") and row["method"] not in settings["readings"]:
                continue
            cells = {
                f"mosaics {n}": f"{row[f'{n} share']:.2f} ± {row[f'{n} error']:.2f} / "
                f"{row[f'{n} cell']:.2f}"
                for n in sizes
                if f"{n} share" in row
            }
            single = {
                key: f"{row[key]:.2f}"
                for key in ("insertion", "deletion", "class cosine", "random weights")
                if key in row
            }
            rows.append({"at": row["place"], "method": row["method"], **cells, **single})
        apc = ", ".join(f"{part} {value:.0f} %" for part, value in settings["apc"].items())
        count = settings.get("reported", settings["mosaics"])
        tables.append(
            f"**{title}**, {count} mosaics, fitted on {settings['fit']} mosaics. APC of "
            f"{settings['apc_n']} single inputs (fitted on {settings['apc_fit']}): {apc}."
            f"\n\n{show(rows)}"
        )
    return "\n\n".join(tables)


def transformer_readings() -> str:
    """Return the shares of all readings of MIP-IN on the first half of the smaller mosaics."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for title, (size, *_), result in _transformers():
        for row in result["rows"]:
            share, method = row.get(f"{size} share, first half"), row["method"]
            if method.startswith("MIP-IN") and share is not None:
                line = rows.setdefault((title, method), {"network": title, "reading": method})
                place = "input" if row["place"] == "embeddings" else row["place"]
                line[place] = f"{share:.2f}"
    return show(list(rows.values()))


def _place(row: dict[str, Any]) -> str:
    """Return where the maps of a row lie: "input", or "middle" or "last" with the module's name."""
    return f"{row['layer']}, `{row['path']}`" if row["path"] else str(row["layer"])


def _mosaics() -> dict[str, dict[str, Any]]:
    return {title: read(f"localization-{name}") for name, title in _NETWORKS.items()}


def zoo() -> str:
    """Return the costs of each of torchvision's networks."""
    rows = []
    for row in read("zoo")["rows"]:
        if "failed" in row or "refused" in row:
            rows.append({"network": row["network"], "time": row.get("failed") or row["refused"]})
            continue
        rows.append(
            {
                "network": row["network"],
                "time": f"{row['time / Saliency']:.2f} × Saliency",
                "time, 8 images": f"{row['time / Saliency, 8 images']:.2f} × Saliency",
                "memory": f"{row['memory / Saliency']:.2f} × Saliency",
                "R² held out": f"{row['R² held out']:.2f}" if "R² held out" in row else "",
            }
        )
    return show(rows)


def capture() -> str:
    """Return the cost of ``check`` beside that of torch's export alone."""
    return _networks(
        "speed-capture",
        {
            "`torch.export` alone": lambda row: f"{row['export s']:.1f} s",
            "`check`": lambda row: f"{row['check s'] / row['export s']:.2f} × that",
        },
    )


def _networks(name: str, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """Return a row a network of a results file: its input, and one function of the row a column."""
    rows = [
        {"network": row["network"], "input": row["input"]}
        | {title: cell(row) for title, cell in columns.items()}
        for row in read(name)["rows"]
    ]
    return show(rows)


def fresh() -> str:
    """Return the cost of a fresh object of a model that was captured before."""
    return _networks(
        "speed-fresh",
        {
            "first LRP object": lambda row: f"{1e3 * row['first s']:.0f} ms",
            "fresh object": lambda row: f"{1e3 * row['fresh s']:.0f} ms",
            "same object again": lambda row: f"{1e3 * row['same s']:.1f} ms",
        },
    )


def scale() -> str:
    """Return the fits of the head of VGG-19: many classes at once, or one after the other."""
    rows = []
    for row in read("scale")["rows"]:
        late = "further classes s" in row
        first = row.get("look s", 0.0) + row.get("first class s", 0.0)
        count = int(str(row["classes"]).split(",")[0])
        if late:
            taken = f"{first:.0f} s, then {row['further classes s'] / (count - 1):.1f} s a class"
        else:
            taken = (
                f"{row['fit s']:.0f} s"
                if "fit s" in row
                else f"{row['fit wall s']:.0f} s on the clock, machine busy"
            )
        rows.append(
            {
                "classes": row["classes"],
                "fit": taken,
                "peak beyond model and data": f"{row['beyond model and data GiB']:.1f} GiB",
                "file a class": "" if late else f"{row['file MB'] / count:.0f} MB",
            }
        )
    return show(rows)


def thousand() -> str:
    """Return the fits of all classes of a network, one after the other."""
    rows = []
    for path in sorted(RESULTS.glob("scale-mobilenet_v2-*.json")):
        (row,) = read(path.stem)["rows"]
        rows.append(
            {
                "inverse stops at": f"`{row['layer']}`",
                "images fitted on": row["fit images"],
                "classes": f"{row['classes']:,}",
                "look at the data": f"{row['look s']:.0f} s",
                "fit and explain all": f"{row['fit and explain s']:.0f} s",
                "of that, to explain": f"{row['explain again s'] * row['classes']:.0f} s",
                "activations kept": f"{row['kept MB']:.1f} MB",
                "inverse of a class": f"{row['inverse MB a class']:.2g} MB",
            }
        )
    return show(rows)


def fits() -> str:
    """Return the cost of whole fits beside a pass forward and beside an earlier commit."""
    rows = []
    for row in read("speed-networks")["rows"]:
        shown = {
            "network": row["network"],
            "classes": row["classes"],
            "fit": f"{row['fit s'] / row['forward s']:.1f} × forward",
            "limit": f"{row['limit s'] / row['forward s']:.1f} × forward",
            "peak": f"{row['peak GiB']:.1f} GiB",
        }
        if "base fit s" in row:
            shown["fit before"] = f"{row['base fit s'] / row['base forward s']:.1f} × forward"
            shown["peak before"] = f"{row['base peak GiB']:.1f} GiB"
        if "R² held out" in row:
            shown["R² held out"] = f"{row['R² held out']:.2f}"
        rows.append(shown)
    return show(rows)


def sampled() -> str:
    """Return convolutions fitted on some of their positions."""
    return show(
        [
            {
                "positions": row["positions"]
                if row["positions"] == "all"
                else f"{100 * row['positions']:.0f} %",
                "moments": f"{row['moments s']:.2f} s",
                "difference of S": f"{100 * row['difference of S']:.1f} %",
                "unexplained on test images": f"{row['test error']:.3f}",
            }
            for row in read("speed-positions")["rows"]
        ]
    )


def neighbours() -> str:
    """Return neighbourhood fits, from few neighbours to all, beside methods without a fit."""
    rows: list[dict[str, Any]] = []
    for row in read("neighbours")["rows"]:
        count = f"{row['neighbours']:,}" if "neighbours" in row else ""
        cells = {
            "method": row["method"],
            "k": count + (f", {row['photographs']} photographs" if row["part"] == "1000" else ""),
            "box accuracy, A": f"{row['box accuracy, A']:.2f} ± {row['standard error']:.2f}",
            **{
                name: f"{row[f'box accuracy, {name}']:.2f}"
                for name in ("A × feature", "S")
                if f"box accuracy, {name}" in row
            },
        }
        if "APC %" in row:
            cells["APC % (shuffled output)"] = (
                f"{row['APC %']:.1f} ({row['APC %, shuffled output']:.1f})"
            )
            cells["cosine of two classes"] = f"{row['cosine of two classes']:.2f}"
            cells["ms a photograph"] = (
                f"{1000 * row['s a photograph']:.0f} ({1000 * row['s of the processor']:.0f})"
            )
        rows.append(cells)
    return show(rows)


def bottlenecks() -> str:
    """Return information bottlenecks and their peers on photographs."""
    results = [read(name) for name in ("bottleneck-images", "bottleneck-input")]
    return show(
        [
            {
                "method": row["method"],
                "layer, reduction over channels": row["layer, reduction"],
                "images": result["settings"]["images"],
                "box accuracy": f"{row['box accuracy']:.2f} ± {row['standard error']:.2f}",
                "insertion": f"{row['insertion']:.2f}",
                "deletion": f"{row['deletion']:.3f}",
                "s an image": f"{row['s an image']:.2g}" if row["s an image"] >= 0.01 else "",
            }
            for result in results
            for row in result["rows"]
        ]
    )


def photographs() -> str:
    """Return the box accuracy of the map for photographs, and of the methods that come closest."""
    picked = {
        "SqueezeNet 1.0": ("squeezenet1_0", "features.11"),
        "MobileNetV2": ("mobilenet_v2", "features.13"),
        "EfficientNet-Lite0": ("efficientnet_lite0", "_blocks.10"),
        "dense head on SqueezeNet": ("head", "where the head begins"),
    }
    rows = []
    for title, (name, layer) in picked.items():
        chosen = [row for row in read(f"paper-boxes-{name}")["rows"] if row["chosen"]]
        known = {row["method"]: row for row in reversed(chosen) if row["where"] != "pixels"}
        if name == "head":
            known |= _dense()
        else:  # the setting of `for_photographs`
            assert known["MIP-IN"]["reading"] == "A × gradient, shares"
            assert known["MIP-IN"]["reduction"] == "sum_of_abs"
        cells = {
            "network": title,
            "picked layer": layer,
            "**MIP-IN**": _with_error(known["MIP-IN"]),
        }
        for method in ("LRP-γ", "LayerCAM", "Grad-CAM", "centre prior", "random"):
            cells[method] = _with_error(known[method])
        rows.append(cells)
    return show(rows)


def _dense() -> dict[str, dict[str, Any]]:
    """Return method -> the row of its setting on a dense head; "MIP-IN" is `for_photographs`."""
    rows = read("photographs-boxes-head")["rows"]
    found = {row["method"]: row for row in rows if row["chosen"]}
    return {**found, "MIP-IN": next(row for row in rows if row["default"])}


def photographs_head() -> str:
    """Return box accuracy on the dense head: all settings on the choosing half, then the figures.

    Of the reductions over channels, the best is shown.
    """
    rows, lines = read("photographs-boxes-head")["rows"], {}
    methods = list(dict.fromkeys(row["method"] for row in sorted(rows, key=lambda r: r["method"])))
    layers = {
        "10": "features.10",
        "11": "features.11",
        "12": "features.12",
        "13": "the head's input",
    }
    for layer, name in layers.items():
        lines[layer] = {"layer": f"{name}, choosing half"}
        for method in methods:
            own = (r for r in rows if (r["layer"], r["method"]) == (layer, method))
            lines[layer][method] = f"{max(row['choosing half'] for row in own):.2f}"
    last = {"layer": "chosen layer, other half", **dict.fromkeys(methods, "")}
    for row in _dense().values():
        last[row["method"]] = _with_error(row)
        if not row["default"]:
            less = f"{row['default less this']:+.2f} ± {row['its standard error']:.2f}"
            last[row["method"]] += f" ({less})"
    return show([*lines.values(), last])


def typical() -> str:
    """Return the output of ``compare`` with typical crops, as the demo prints it."""
    lines = read("typical")["settings"]["table"]
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


def which_map() -> str:
    """Return the table of questions and maps."""
    dense, pixels = _dense(), []
    mipin = dense["MIP-IN"]
    networks = "squeezenet1_0", "mobilenet_v2", "efficientnet_lite0"
    for name in networks:
        pixels.append(_chosen(name, "MIP-IN, whole network")["accuracy"])
        centre = _chosen(name, "centre prior")["accuracy"]
    head = f"{max(row['accuracy'] for row in dense.values()):.2f} against {mipin['accuracy']:.2f}"
    places = f"{min(pixels):.2f} to {max(pixels):.2f} against {centre:.2f}"
    found = [read(f"contrast-boxes-{name}")["rows"][0] for name in networks]
    boxes = ", ".join(
        f"{row['contrast × gradient']:.2f} against {row['A × gradient']:.2f}" for row in found
    )
    layer, whole = "LayerMIPINAttribution(model, inverse)", "MIPINAttribution(model, inverse)"
    answers = (
        (
            "Where is what the class was told by?",
            "`for_photographs(model, data).attribute(x, target)`",
            "for or against: it has no sign. On a dense head, LayerCAM finds objects better "
            f"({head})",
        ),
        (
            "Which places speak for the class, which against?",
            f"`{layer}.attribute(x, target, multiply_by_gradients=True)`",
            "what would change the score",
        ),
        (
            "Which of several objects?",
            "the same with `contrast=True` (networks that end in an average)",
            f"the whole of one object: boxes are found less well than without it ({boxes})",
        ),
        (
            "What do inputs with this score have in common?",
            f"`{whole}.attribute(x, target)`: A",
            "for or against: the sign of A says whether a feature is larger or smaller where the "
            "score is larger, and turns with the sign of the score",
        ),
        (
            "A sharp picture at the pixels?",
            "the same with `multiply_by_inputs=True`",
            "where: the photograph makes it sharp. At the pixels, MIP-IN finds objects hardly "
            f"better than a blob in the centre does ({places})",
        ),
        (
            "What of the input does the score depend on, what not?",
            "`.source_signal(x, target)`, `.distractor(x, target)`",
            "on convolutional networks, S is hardly better than its masks alone",
        ),
        (
            "What would change the score?",
            "no map of this package's inverse: `SmoothGrad`, occlusion",
            "",
        ),
    )
    columns = "question", "call", "what it cannot tell"
    return show([dict(zip(columns, answer, strict=True)) for answer in answers])


def _chosen(name: str, method: str = "MIP-IN") -> Any:
    """Return the row of a method's chosen setting on photographs with boxes."""
    rows = read(f"paper-boxes-{name}")["rows"]
    return next(row for row in rows if row["chosen"] and row["method"] == method)


def photographs_mosaics() -> str:
    """Return the mosaics of the map for photographs, and of its peers at their best settings."""
    rows = []
    for path in sorted(RESULTS.glob("photographs-mosaics-*.json")):
        result = read(path.stem)
        for size in dict.fromkeys(row["size"] for row in result["rows"]):
            known = [r for r in result["rows"] if r["size"] == size and "score" in r]
            (own,) = (row for row in known if row["default"])
            (best,) = (r for r in known if r["chosen"] and r["method"].startswith("MIP-IN"))
            cells = {
                "network, picked layer": f"{result['settings']['network']}, {own['layer']}",
                "mosaics": f"{own['mosaics']} of {size}",
                "of photographs": str(own["photographs"]),
                "**MIP-IN**": _score(own),
            }
            for method in ("Grad-CAM", "LRP-γ", "LayerCAM"):
                (peer,) = (row for row in known if row["chosen"] and row["method"] == method)
                less = f"{peer['default less this']:+.2f} ± {peer['its standard error']:.2f}"
                cells[method] = f"{_score(peer)}, {peer['layer']} ({less})"
            cells["MIP-IN's own best setting"] = (
                "the same" if best is own else
                f"{_score(best)}: {best['method'].partition(', ')[2]}, {best['reduction']}, "
                f"{best['layer']}"
            )  # fmt: skip
            rows.append(cells)
    return show(rows)


def photographs_fits() -> str:
    """Return the box accuracy of the map for photographs, by the number of photographs fitted."""
    rows = read("photographs-fits-squeezenet1_0")["rows"]
    cells = {"photographs fitted": "box accuracy, three sets"}
    for count in dict.fromkeys(row["fitted"] for row in rows):
        values = (row["accuracy"] for row in rows if row["fitted"] == count)
        cells[str(count)] = ", ".join(f"{value:.3f}" for value in values)
    return show([cells])


def _score(row: dict[str, Any]) -> str:
    """Return a score ± its standard error."""
    return f"{row['score']:.2f} ± {row['standard error']:.2f}"


def _with_error(row: dict[str, Any]) -> str:
    """Return an accuracy ± its standard error."""
    return f"{row['accuracy']:.2f} ± {row['standard error']:.2f}"


def bottlenecks_text() -> str:
    """Return information bottlenecks and their peers on passages of text."""
    return show(
        [
            {
                "method": row["method"],
                "insertion": f"{row['insertion']:.3f}",
                "deletion": f"{row['deletion']:.3f}",
                "s a passage": f"{row['s a passage']:.2g}" if row["s a passage"] >= 1e-3 else "",
            }
            for row in read("bottleneck-text")["rows"]
        ]
    )


def bottlenecks_speed() -> str:
    """Return sixteen images together and one by one, and what the presets cost and keep."""
    rows: list[dict[str, Any]] = [
        {
            "": f"IBA, {row['network']}, `{row['layer']}`",
            "s an image": f"{row['batch, s an image']:.2g}",
            "one by one": f"{row['one by one ÷ batch']:.1f} ×",
            "published loop": f"{row['published loop ÷ batch']:.1f} ×",
            "difference": f"{100 * row['difference']:.2g} %",
            "fast": f"{row['batch ÷ fast']:.1f} × faster",
            "rank correlation, fast": f"{row['rank, fast']:.2f}",
            "other noise": f"{row['rank, other noise']:.2f}",
        }
        for row in read("bottleneck-speed")["rows"]
    ]
    presets = read("bottleneck-presets")
    full, fast = presets["rows"]
    rows.append(
        {
            "": f"InputIBA, {presets['settings']['network']}, `{presets['settings']['layer']}`",
            "s an image": f"{full['s an image']:.2g}",
            "fast": f"{full['s an image'] / fast['s an image']:.1f} × faster",
            "rank correlation, fast": f"{fast['rank']:.2f}",
            "other noise": f"{full['rank, other noise']:.2f}",
        }
    )
    return show(rows)


def class_sensitivity() -> str:
    """Return cosines between the maps of two classes, for every network that was measured."""
    rows: list[dict[str, Any]] = []
    for path in sorted(RESULTS.glob("class-sensitivity-*.json")):
        result = read(path.stem)
        name = (
            f"{path.stem.removeprefix('class-sensitivity-')}, {result['settings']['images']} images"
        )
        for row in result["rows"]:
            cells = {
                key: value if isinstance(value, str) else f"{value:.2f}"
                for key, value in row.items()
            }
            rows.append({"network": name, **cells})
    return show(rows)


def speed_methods() -> str:
    """Return times of the methods beside MIP-IN ÷ Saliency."""
    rows = []
    for row in read("speed-methods")["rows"]:
        times = {whose: row.get(f"{whose} ÷ Saliency") for whose in ("ours", "Captum", "zennit")}
        shown = {whose: f"{time:.2f}" if time else "" for whose, time in times.items()}
        rows.append({"network": row["network"], "method": row["method"], **shown})
    return show(rows)


def speed_metrics() -> str:
    """Return the time of the loop that runs the network once a step and image ÷ the metric's."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in read("speed-metrics")["rows"]:
        images = f"{row['count']} " + f"of {row['images']}".replace("of random", "random")
        ran = f"{row['forwards, metric']} of {row['forwards, loop']}"
        about = {"network": row["network"], "images": images, "metric": row["metric"]}
        line = rows.setdefault(
            tuple(about.values()), about | {"steps": row["steps"], "inputs run": ran}
        )
        for clock in ("processor", "wall"):
            parts = "", "forwards alone ", "32 steps at most "
            times = [row[f"{part}times faster, least {clock}"] for part in parts]
            shown = [f"{value:.1f}" for value in times[: 3 if row["steps"] > 32 else 2]]
            cell = f"{row['threads']} thread{'s' * (row['threads'] > 1)}, {clock}"
            line[cell] = " / ".join(shown)
    return show(list(rows.values()))


PHOTOGRAPHS = {
    "head": "dense head",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "squeezenet1_0": "SqueezeNet 1.0",
    "mobilenet_v2": "MobileNetV2",
}


#: Table 2 of the paper: VGG19 / ResNet50.
PUBLISHED = {
    "Grads": ".345 / .368",
    "SmoothGrad": ".518 / .541",
    "LRP-ε": ".307 / .292",
    "Deep Taylor, as in iNNvestigate": ".427 / .441",
    "Deconvnet": ".226 / .263",
    "Guided Backprop": ".398 / .456",
    "PatternAttribution": ".499 / –",
    "Grad-CAM": ".486 / .512",
    "MIP-IN, ReLU after the mean": ".648 / .662",
}


def _boxes() -> dict[str, Any]:
    return {
        title: read(f"paper-boxes-{name}")
        for name, title in PHOTOGRAPHS.items()
        if _there(f"paper-boxes-{name}")
    }


def _there(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def _paper(result: dict[str, Any], reduction: str) -> dict[str, Any]:
    """Return MIP-IN as in section 6.1.2, at the last layer with positions.

    ``reduction`` says whether ReLU or the mean over channels comes first.
    """
    rows = [
        row
        for row in result["rows"]
        if row["method"] == "MIP-IN" and row["reading"] in ("A, shares", "A, all samples")
    ]
    return next(
        row
        for row in reversed(rows)
        if row["reduction"] == reduction and row["where"] != "all layers"
    )


def _accuracy(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.2f} ± {row['standard error']:.2f}"


def paper_boxes() -> str:
    """Return table 2: every method at the pixels and at the layer chosen for it, the best first."""
    lines: dict[str, dict[str, Any]] = {}
    behind: dict[str, list[float]] = {}
    for title, result in _boxes().items():
        rows = [
            row
            for row in result["rows"]
            if row["chosen"] and row["method"] != "MIP-IN, whole network"
        ]
        rows += [{**_paper(result, "relu_of_sum"), "method": "MIP-IN, ReLU after the mean"}]
        rows += [{**_paper(result, "sum_of_relu"), "method": "MIP-IN, ReLU before the mean"}]
        n = result["settings"]["n"]
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name]
            cell = ["–", "–"]
            for row in own:
                cell[row["where"] != "pixels"] = f"{row['accuracy']:.2f}" + "\\*" * (row["n"] < n)
            lines.setdefault(name, {})[f"{title}, n = {n}"] = " / ".join(cell)
            behind.setdefault(name, []).append(min(row["MIP-IN less this"] for row in own))
    order = sorted(lines, key=lambda name: sum(behind[name]) / len(behind[name]))
    names = {name: "**MIP-IN, chosen**" if name == "MIP-IN" else name for name in order}
    return show(
        [
            {
                "method": names[name],
                "paper: VGG19 / ResNet50": PUBLISHED.get(name, ""),
                **lines[name],
            }
            for name in order
        ]
    )


def paper_settings() -> str:
    """Return the setting chosen for MIP-IN, and its lead over the other methods."""
    lines = []
    for title, result in _boxes().items():
        shown = [row for row in result["rows"] if row["chosen"]]
        (own,) = [row for row in shown if row["method"] == "MIP-IN"]
        whole = [row for row in shown if row["method"] == "MIP-IN, whole network"]
        others = [row for row in shown if not row["method"].startswith(("MIP-IN", "pattern only"))]
        listed = [
            r
            for r in others
            if r["method"] == "Grad-CAM" or (r["where"] == "pixels" and r["method"] in PUBLISHED)
        ]
        lines.append(
            {
                "network": title,
                "chosen": f"{own['reading']}, {own['where']}, {own['reduction'].replace('_', ' ')}",
                "tries": sum(row["method"] == "MIP-IN" for row in result["rows"]),
                "choosing half": f"{own['choosing half']:.2f}",
                "reported half": _accuracy(own),
                "ahead of the paper's list": _ahead(listed),
                "ahead of all others": _ahead(others),
                "down to the pixels": f"{_accuracy(whole[0])}, n = {whole[0]['n']}"
                if whole
                else "",
            }
        )
    return show(lines)


def _ahead(rows: list[dict[str, Any]]) -> str:
    """Return the lead over the best of ``rows``, on the photographs that both were asked for."""
    best = min(rows, key=lambda row: row["MIP-IN less this"])
    ahead = f"{best['MIP-IN less this']:.2f} ± {best['its standard error']:.2f}"
    return f"{ahead} ({best['method']}, {best['where']}, n = {best['n']})"


def paper_perturbations() -> str:
    """Return insertion and deletion of the methods of table 2, the best first."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    scores: dict[tuple[str, str], list[float]] = {}
    for title, result in _boxes().items():
        for row in result["rows"]:
            if "insertion" in row:
                key = row["method"], "pixels" if row["where"] == "pixels" else "the layer chosen"
                line = lines.setdefault(key, {"method": key[0], "at": key[1]})
                line[f"{title}, n = {result['settings']['perturbed']}"] = (
                    f"{row['insertion']:.2f} / {row['deletion']:.3f}"
                )
                scores.setdefault(key, []).append(row["insertion"] - row["deletion"])
    return show(
        [lines[key] for key in sorted(lines, key=lambda key: -sum(scores[key]) / len(scores[key]))]
    )


def paper_maps() -> str:
    """Return all methods on the MLP: share on the ink, insertion and deletion.

    The share on the ink is that of the maps and of their absolute values.
    """
    lines: dict[str, dict[str, Any]] = {}
    for row in read("paper-maps")["rows"]:
        line = lines.setdefault(row["method"], {"method": row["method"]})
        which = "" if row["reduction"] == "sum" else ", absolute"
        line[f"on the ink{which}"] = f"{row['ink']:.2f}"
        if not which:
            line |= {"insertion": f"{row['insertion']:.3f}", "deletion": f"{row['deletion']:.3f}"}
    return show(list(lines.values()))


def paper_classes() -> str:
    """Return figure 9 and appendix B."""
    return show(
        [
            {
                "network and classes": f"{row['network']}, n = {row['n']}",
                "method": row["method"],
                "raw L2": f"{row['raw L2']:.3g}",
                **{
                    key: f"{row[key]:.3g}"
                    for key in ("normalised L2", "cosine", "SSIM")
                    if row.get(key) is not None
                },
            }
            for row in read("paper-classes")["rows"]
        ]
    )


def paper_randomization() -> str:
    """Return the similarity with the trained network's maps.

    It is averaged over layers, and that of the last layer alone stands beside it.
    """
    rows = []
    for row in read("paper-randomization")["rows"]:
        values = {key: row[key] for key in ("Spearman", "Spearman of absolute values", "SSIM")}
        cells = {
            key: "" if value is None or value != value else f"{value:.2f}"
            for key, value in values.items()
        }
        rows.append({"method": row["method"], **cells})
    return show(rows)


WILD = ("MIP-IN", "LRP", "Guided Backprop", "IBA")


def _by_package() -> dict[str, list[dict[str, Any]]]:
    """Return package → the rows of its families that could be built."""
    packages: dict[str, list[dict[str, Any]]] = {}
    for row in read("wild")["rows"]:
        if not row["check"].startswith("not built"):
            packages.setdefault(row["package"], []).append(row)
    return packages


def _verdict(row: dict[str, Any], method: str) -> str:
    """Return "works", "refused", "failed" or "" (not tried) for a method, or for the check."""
    if row["check"].startswith("failed"):
        return "failed"  # a family that took too long, say, in whatever part
    return str(row.get(method, "")).partition(":")[0].partition(" ")[0].replace("not", "")


def wild() -> str:
    """Return for each package how many models worked / were refused / failed with each method."""
    result, rows = read("wild"), []
    for package, found in _by_package().items():
        known = result["settings"]["families"][package]
        ratios = sorted(r["check s"] / r["export s"] for r in found if r.get("export s"))
        cells = {}
        for method in WILD:
            count = Counter(_verdict(row, method) for row in found)
            verdicts = [count[verdict] for verdict in ("works", "refused", "failed")]
            cells[method] = " / ".join(map(str, verdicts)) if any(verdicts) else "–"
        rows.append(
            {
                "package": f"{package} {found[0].get('version', '')}".strip(),
                "tried": f"{len(found)} of {known}",
                **cells,
                "capture ÷ export": f"{ratios[len(ratios) // 2]:.1f}" if ratios else "–",
            }
        )
    return show(rows)


def wild_refused() -> str:
    """Return the models that a method refused or failed on, with the reason."""
    rows = []
    for package, found in _by_package().items():
        for row in found:
            reasons: dict[str, list[str]] = {}
            for method in ("check", *WILD):
                if _verdict(row, method) in ("refused", "failed") and method in row:
                    reasons.setdefault(_short(row[method]), []).append(method)
            merged = {reason: names for reason, names in reasons.items() if names != ["check"]}
            for reason, names in (merged or reasons).items():
                named = ", ".join(name for name in names if name != "check") or "all"
                model = row.get("model", row["family"])
                rows.append({"package": package, "model": model, "method": named, "why": reason})
    return show(rows) if rows else "None."


def _short(verdict: str) -> str:
    """Return a verdict in one line: of several refused operations, the first one."""
    kind, _, reason = verdict.partition(": ")
    lines = [line.strip() for line in reason.splitlines()]
    if len(lines) > 1 and lines[0].startswith("no signal can be sent back"):
        lines = lines[1:]
    reason = lines[0].partition("; expected")[0] if lines else ""
    return f"{kind}: {reason[:240]}".replace("|", "\\|").replace("<", "&lt;")


def wild_models() -> str:
    """Return all models, folded: verdicts, and the seconds of the capture and of the export."""
    rows = [
        {
            "package": package,
            "family": row["family"],
            "model": row.get("model", ""),
            **{method: _verdict(row, method) for method in WILD},
            "capture s": row.get("check s", ""),
            "÷ export": row["check s"] / row["export s"] if row.get("export s") else "",
        }
        for package, found in _by_package().items()
        for row in found
    ]
    return f"<details><summary>All models</summary>\n\n{show(rows)}\n\n</details>"


def main() -> None:
    texts = {page: page.read_text() for page in pages()}
    own = (
        completeness,
        contrast,
        controls,
        variants,
        layers,
        localization,
        mosaics,
        invariance,
        class_sensitivity,
    )
    costs = (
        capture,
        fresh,
        speed,
        speed_methods,
        speed_metrics,
        zoo,
        neighbours,
        scale,
        thousand,
        fits,
        sampled,
    )
    paper = (
        paper_boxes,
        paper_settings,
        paper_perturbations,
        paper_maps,
        paper_classes,
        paper_randomization,
    )
    for table in (
        *own,
        *costs,
        *paper,
        bottlenecks,
        bottlenecks_text,
        bottlenecks_speed,
        photographs,
        photographs_mosaics,
        photographs_fits,
        photographs_head,
        typical,
        transformers,
        transformer_readings,
        which_map,
        wild,
        wild_refused,
        wild_models,
    ):
        begin, end = f"<!-- {table.__name__} -->\n", f"<!-- /{table.__name__} -->"
        places = [page for page, text in texts.items() if begin in text and end in text]
        if not places or (len(places) > 1 and table is not which_map):
            raise SystemExit(
                f"the table {table.__name__!r} has {len(places)} places on "
                f"{', '.join(page.name for page in texts)}"
            )
        for page in places:
            before, _, rest = texts[page].partition(begin)
            texts[page] = before + begin + "\n" + table() + "\n\n" + end + rest.partition(end)[2]
    for page, text in texts.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
