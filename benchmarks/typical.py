"""The example of ``compare`` in README: that of ``make demo``, with typical crops.

    python benchmarks/typical.py

``make demo`` fits on random crops of the photographs that it explains. MIP-IN is fitted on the
crops of five seeds; the typical seed is that with the median of insertion less deletion. Its whole
comparison is written down, and ``demo_photographs.SEED`` is this seed.
"""

import time
from typing import Any

import demo_photographs as demo
import pretrained
import torch
from common import parser_of, show, write

from captum_mipin import compare, for_photographs

SEEDS = 5


def main() -> None:
    parser_of(__doc__).parse_args()
    images = demo.photographs(None)
    model, normalise = pretrained.efficientnet_lite0()
    pictures = torch.stack([demo.whole(image) for image in images[: demo.SHOWN]])
    x, rows = normalise(pictures), list[dict[str, Any]]()
    with torch.no_grad():
        targets = model(x).argmax(1)
    for seed in range(SEEDS):
        fitted = normalise(demo.to_fit(images, seed))
        mipin = for_photographs(
            model, fitted, targets.unique().tolist(), batch_size=16, progress=False
        )
        (own,) = compare(
            {mipin.picked: mipin}, x, targets, model=model, metrics=demo.METRICS, controls=False,
            progress=False,
        ).rows  # fmt: skip
        scores = {metric: result.mean for metric, result in own.results.items()}
        rows.append(
            {"seed": seed, **scores, "difference": scores["insertion"] - scores["deletion"]}
        )
        print(f"{time.process_time():.0f} s {rows[-1]}", flush=True)
    typical = sorted(rows, key=lambda row: row["difference"])[SEEDS // 2]["seed"]
    fitted = normalise(demo.to_fit(images, typical))
    found, _ = demo.compared(model, fitted, x, pictures, demo.imagenet())
    write(
        "typical", rows, network="EfficientNet-Lite0", seed=typical, photographs=len(x),
        fitted=len(fitted), table=found.table().splitlines(), comparison=found.to_dict()["rows"],
    )  # fmt: skip
    print(f"{show(rows)}\n\nseed {typical}\n{found}")


if __name__ == "__main__":
    main()
