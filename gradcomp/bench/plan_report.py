"""What ``gradcomp plan`` prints, and its advice, from the one result that ``--json`` prints as it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradcomp.bench.plan_methods import Bench, Mixture, Prediction

__all__ = ["advice", "checked_table", "report"]

_SEVERAL = 1.3  # bandwidths of pairs that differ by more are shown as a matrix


def advice(bench: Bench, predictions: Sequence[Prediction], mixture: Mixture) -> list[str]:
    """What to use and why, in sentences."""
    best, found = mixture.prediction, mixture.prediction.forecast
    method = best.method
    lines = [
        f"Use {method.compressor} with exchange {method.exchange}: {_ms(best.step_s)} a step, "
        f"{best.step_s / found.compute_s:.2f} times computing alone ({_ms(found.compute_s)})."
    ]
    dense = min((p for p in predictions if p.method.compressor == "none"), key=lambda p: p.step_s, default=None)
    if dense is not None and method.compressor == "none":
        lines.append(
            f"Dense wins: the link carries its {_mb(dense.forecast.sent_bytes)} in "
            f"{_ms(sum(bucket.wire_s for bucket in dense.forecast.buckets))}, of which training waits for "
            f"{_ms(dense.forecast.exposed_s)}; nothing that compresses is more than 3 % faster."
        )
    elif dense is not None:
        lines.append(
            f"Dense takes {_ms(dense.step_s)}, {dense.step_s / best.step_s:.1f} times as long: it sends "
            f"{_mb(dense.forecast.sent_bytes)} a rank instead of {_mb(found.sent_bytes)}."
        )
        ratio = 4 * sum(row.numel for row in best.plan.table) / max(_once(bench, best), 1.0)
        half = bench.world_size / 2
        if method.exchange in ("auto", "all_gather") and ratio < half:
            lines.append(
                f"A packet is {ratio:.1f} times smaller than the gradients, less than N/2 = {half:g}: sent to every "
                "other rank it is more than a dense ring sends, so what can be is added up on its way."
            )
    if mixture.rules is not None:
        count = sum(bucket.compressor == "none" for bucket in mixture.buckets)
        lines.append(f"{count} of {len(mixture.buckets)} buckets may go dense for nothing: their exchange is hidden.")
    waits = max(found.step_s - found.compute_s, 0.0)
    if waits > 0.1 * found.compute_s:
        work = sum(bucket.encode_s + bucket.decode_s for bucket in found.buckets)
        lines.append(
            f"Of what is left above computing, {_ms(waits)}, compressing and adding up are {_ms(work)} of core time; "
            f"the link is busy for {_ms(sum(bucket.wire_s for bucket in found.buckets))}."
        )
    return lines


def _once(bench: Bench, prediction: Prediction) -> float:
    return sum(bench.cost_of(piece.codec).nbytes(piece) for pieces in prediction.plan.pieces for piece in pieces)


def report(result: Mapping[str, Any]) -> str:
    """The whole of it, as text."""
    profile, link = result["profile"], result["link"]
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters, {result['world_size']} ranks, "
        f"{profile['cores']:.2f} cores a rank",
        f"computing alone   {profile['compute_ms']:.1f} ms (forward {profile['forward_ms']:.1f}, backward "
        f"{profile['backward_ms']:.1f}, optimizer {profile['optimizer_ms']:.1f} ms of core time)",
        f"link              {link['mbit_per_s']:,.1f} Mbit/s a rank to all others, {link['latency_ms']:.3f} ms one "
        f"way, {link['cpu_ns_per_byte']:.2f} ns of a core a byte",
    ]
    if profile["thread_cores"] < 1:
        lines.append(
            f"other programs     leave a thread {profile['thread_cores']:.0%} of a core: times are longer by that"
        )
    lines += _matrix(result.get("pairs"))
    lines += ["", *_methods(result["methods"])]
    for name, why in result["refused"].items():
        lines.append(f"not to be had: {name}: {why}")
    lines += ["", f"{'bucket':>6} {'ready ms':>9} {'sent MB':>9} {'wire ms':>9} {'waits ms':>9}  through"]
    for i, row in enumerate(result["buckets"]):
        lines.append(
            f"{i:6} {row['ready_ms']:9.1f} {row['sent_mb']:9.3f} {row['wire_ms']:9.1f} {row['exposed_ms']:9.1f}  "
            f"{row['compressor']}: {row['why']}"
        )
    lines += ["", *result["advice"], "", "    " + result["use"]]
    return "\n".join(lines)


def checked_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Forecast and measured side by side, for one or several rates, with the median of the errors."""
    lines = [
        f"{'rate':10} {'compressor':26} {'exchange':11} {'forecast':>9} {'measured':>9} {'error':>7} "
        f"{'compute':>9} {'measured':>9} {'error then':>10}"
    ]
    errors, then = [], []
    for result in results:
        for row in result["methods"]:
            if "measured_ms" not in row:
                continue
            errors.append(abs(row["error"]))
            then.append(abs(row["error_then"]))
            lines.append(
                f"{result.get('rate', ''):10} {row['compressor']:26} {row['exchange']:11} {row['step_ms']:9.1f} "
                f"{row['measured_ms']:9.1f} {row['error']:+7.1%} {result['profile']['compute_ms']:9.1f} "
                f"{row['measured_compute_ms']:9.1f} {row['error_then']:+10.1%}"
            )
    if errors:
        lines.append(
            f"median error {statistics.median(errors):.1%} of {len(errors)} points, at most {max(errors):.1%}; for the "
            f"cores that were left while each was measured {statistics.median(then):.1%}, {max(then):.1%}"
        )
    return "\n".join(lines)


def _methods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{'compressor':26} {'exchange':11} {'step ms':>9} {'x compute':>9} {'sent MB':>9} {'exposed ms':>10} "
        f"{'core ms':>8}"
    ]
    lines += [
        f"{row['compressor']:26} {row['exchange']:11} {row['step_ms']:9.1f} {row['times_compute']:9.2f} "
        f"{row['sent_mb']:9.3f} {row['exposed_ms']:10.1f} {row['core_ms']:8.1f}"
        for row in rows
    ]
    return lines


def _matrix(pairs: Mapping[str, Any] | None) -> list[str]:
    if pairs is None:
        return []
    rates = [rate for row in pairs["bytes_per_s"] for rate in row if rate]
    if max(rates) < _SEVERAL * min(rates):
        return [f"one pair alone    {8e-6 * statistics.median(rates):,.1f} Mbit/s, all about alike"]
    cells = [[f"{8e-6 * rate:9.1f}" if rate else f"{'-':>9}" for rate in row] for row in pairs["bytes_per_s"]]
    return ["Mbit/s of one pair alone; rows send, columns receive:", *("  " + " ".join(row) for row in cells)]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.2f} MB"
