"""What a terminal shows of a run: what it is about to do, and its numbers; of several splits, their mean."""

from typing import Any

import numpy as np

from gradmix.eval.detectors import PRIMARY
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData


def describe(config: Config, data: OpenSetData) -> str:
    """One paragraph on what is about to happen."""
    known = len(data.classes)
    unknown = int((data.test.labels < 0).sum()) if known else 0
    others = f"{len(data.unknown)} unknown"
    if config.data.unknown_root is not None:
        others = f"unknown: {config.data.unknown_root}"
    lines = [
        f"{config.data.name}: {len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test images"
        + (f" ({unknown} of unknown classes)" if unknown else ""),
    ]
    if known:
        shown = ", ".join(data.classes[:10]) + (", ..." if known > 10 else "")
        lines.append(f"{known} known classes: {shown}; {others}")
    if data.empty:
        lines.append(f"without images, left out: {', '.join(data.empty)}")
    lines += data.notes
    if data.bad:
        lines.append(f"{len(data.bad)} image files can't be read and are left out: bad_images.json")
    lines.append(
        f"{config.method.name} with mix={config.mix.name}, {config.encoder}, "
        f"{config.epochs} epochs, batch {config.batch_size}"
    )
    return "\n".join(lines)


def over_splits(results: list[dict]) -> dict:
    """Mean and sample standard deviation of every number that all splits have; what else is the same in all of them."""
    first = results[0]
    numbers = [
        key
        for key, value in first.items()
        # the ends of an interval over one split's images; their mean would be the interval of nothing
        if isinstance(value, float | int) and all(key in r for r in results) and not key.endswith(("_low", "_high"))
    ]
    summary: dict = {"splits": len(results)}
    for key in numbers:
        values = [r[key] for r in results]
        summary[key] = float(np.mean(values))
        if len(values) > 1:
            summary[f"{key}/std"] = float(np.std(values, ddof=1))
    others = {
        key: value
        for key, value in first.items()
        if not isinstance(value, float | int) and all(r.get(key) == value for r in results)
    }
    return summary | others


def table(result: dict[str, Any]) -> str:
    """What a person wants to see first, as text."""
    lines = []
    spread = {key.removesuffix("/std"): value for key, value in result.items() if key.endswith("/std")}

    def cell(key: str) -> str:
        if key not in result:
            return "-"
        text = f"{100 * result[key]:.2f}"
        if key in spread:
            return f"{text} ± {100 * spread[key]:.2f}"
        if f"{key}_std" in result:
            return f"{text} ± {100 * result[f'{key}_std']:.2f}"
        if f"{key}_low" in result:
            return f"{text} [{100 * result[f'{key}_low']:.1f}, {100 * result[f'{key}_high']:.1f}]"
        return text

    if "knn/top1" in result:
        lines += ["", "known classes, accuracy %"]
        further = {
            key: key.removesuffix("/top1").replace("few_labels/", "linear, few: ").replace("knn/", "kNN, ")
            for key in result
            if key.startswith(("knn/k=", "few_labels/")) and key.endswith("/top1")
        }
        for label, key in (
            ("kNN", "knn/top1"),
            *((label, key) for key, label in further.items() if key.startswith("knn/")),
            ("linear, cached", "linear/top1"),
            ("linear, augmented", "linear_augmented/top1"),
            ("fine-tuned", "finetune/top1"),
            *((label, key) for key, label in further.items() if key.startswith("few_labels/")),
            ("kNN on raw pixels", "knn_pixels/top1"),
        ):
            if key in result or key.startswith(("knn/", "linear/")):
                lines.append(f"  {label:<20}{cell(key):>16}")
        lines += [f"  {result[key]}" for key in result if key.startswith("protocol/")]
    keys = [key.split("/")[1] for key in result if key.startswith("osr/") and key.endswith("/auroc")]
    if keys:
        columns = ("auroc", "aupr", "fpr95", "fpr95_known", "oscr", "closed_set_accuracy")
        titles = ("AUROC", "AUPR", "FPR95", "FPR95 known", "OSCR", "closed set")
        rows = {key: [cell(f"osr/{key}/{column}") for column in columns] for key in keys}
        widths = [max(13, 2 + max(len(row[i]) for row in rows.values())) for i in range(len(columns))]

        def line(label: str, cells) -> str:
            return f"  {label:<20}" + "".join(f"{text:>{width}}" for text, width in zip(cells, widths, strict=True))

        lines += ["", "unknown against known classes, %", line("", titles)]
        lines += [line("deep_knn on pixels" if key == "pixels" else key, row) for key, row in rows.items()]
        lines += [
            "",
            "  FPR95: known images flagged when 95 % of the unknown are caught; FPR95 known: unknown images accepted",
            "  when 95 % of the known are. Both, lower is better.",
        ]
        if f"osr/{PRIMARY}/auroc_low" in result:
            lines[-1] += " [low, high]: 95 % interval, bootstrap over the test images."
    for what, why in result.get("skipped", {}).items():
        lines.append(f"  not measured: {what} ({why})")
    return "\n".join(lines)
