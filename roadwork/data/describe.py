"""A folder of shards in words: what a person wants to know before training on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def describe(manifest: dict[str, Any]) -> str:
    """The manifest as text of a screen or two."""
    return "\n".join(
        line for part in (_records(manifest), _splits(manifest), _weights(manifest), _audits(manifest)) for line in part
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _records(manifest: dict[str, Any]) -> Iterator[str]:
    total = sum(line["bytes"] for line in manifest["shards"])
    yield (
        f"{len(manifest['shards'])} shards, {total / 2**20:.1f} MiB, views of {manifest['view_size']} px, "
        f"schema version {manifest['schema_version']}"
    )
    if "records" not in manifest:
        yield "index rebuilt from the tars alone: source, audits and coverage are not known"
        return
    records, source = manifest["records"], manifest["source"]
    yield f"source {source['spec']}: {records['read']} rows = {records['used']} used + {records['rejected']} rejected"
    if left_out := source.get("rows_left_out"):
        yield f"  A SAMPLE by --max-photos: {left_out} further rows were left out, also of a published test split"
    yield f"  used as they are {records['used_as_they_are']}, repaired {records['used_repaired']}"
    for title, counts in (("repairs", manifest["repairs"]), ("rejected", manifest["rejected_reasons"])):
        if counts:
            yield f"  {title}: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    if source["extra_columns_ignored"]:
        yield "  extra columns, ignored: " + ", ".join(source["extra_columns_ignored"])


def _splits(manifest: dict[str, Any]) -> Iterator[str]:
    yield f"{'split':8} {'photos':>8} {'shards':>7} {'groups':>7} {'positive':>9} {'prior':>6} {'GPS':>8} {'masks':>8}"
    for name, facts in manifest.get("splits", {}).items():
        yield (
            f"{name:8} {facts['photos']:>8} {facts['shards']:>7} {facts['groups']:>7} {facts['positive']:>9} "
            f"{_share(facts['prior']):>6} {facts['with_coordinate']:>8} {facts['with_masks']:>8}"
        )


def _weights(manifest: dict[str, Any]) -> Iterator[str]:
    target = manifest.get("target")
    if target is None:
        return
    words = target["kind"]
    if target["kind"] == "cities":
        words = "cities " + ", ".join(target["cities"])
    elif target["kind"] == "file":
        words = f"file {target['file']}"
    if target["transductive"]:
        words += f" (TRANSDUCTIVE: {_from_test(target)})"
    yield f"target: {words}; {target['points']} points, {len(manifest['clusters'])} clusters"
    brackets = manifest["brackets"]
    yield f"brackets: {brackets['weights']} at up to {brackets['max_km']} km; class balance {manifest['class_balance']}"
    if manifest.get("reweighted"):
        yield "reweighted after the build: the index holds the weights, the tars those of the build"
    prior = manifest["class_prior"]
    yield f"class prior of train: photos {_share(prior['photos'])}, draws {_share(prior['draws'])}"
    goal, before, after = manifest["coverage_targets"], manifest["coverage_unweighted"], manifest["coverage"]
    if after["mean_km"] is None:
        why = "no target" if not manifest["clusters"] else "no training photo has a usable coordinate"
        yield f"coverage: {why}"
        return
    yield f"coverage of the draws: {'':8} {'photos':>8} {'draws':>8} {'target':>8}"
    for name in ("within_50_km", "within_100_km", "mean_km"):
        yield f"  {name:29} {before[name]:>8.3f} {after[name]:>8.3f} {goal[name]:>8.3f}"
    size = f"{after['effective_sample_size']:.0f} of {after['photos']}"
    yield f"  effective sample size {size}; targets met: {after['targets_met']}"


def _from_test(target: dict[str, Any]) -> str:
    if target["kind"] == "file":
        return f"{target['share_from_test']:.1%} of its points are places of the test split alone"
    return f"coordinates of the test split for {', '.join(target.get('cities_from_test', []))}"


def _audits(manifest: dict[str, Any]) -> Iterator[str]:
    leaks = manifest.get("leak_audit")
    if leaks is None:
        return
    yield f"leak audit on {leaks['rows']} training photos (area under the curve by group; 0.5 is chance):"
    yield f"  {'field':18} {'missing':>8} {'by value':>9} {'by absence':>11}"
    for name, facts in leaks["fields"].items():
        scores = [_share((facts[kind] or {}).get("auc")) for kind in ("value", "missing")]
        yield f"  {name:18} {_share(facts['missing_share']):>8} {scores[0]:>9} {scores[1]:>11}"
    yield f"  visible together   {'':8} {_share((leaks['visible_together'] or {}).get('auc')):>9}"
    yield "  LEAKS: " + (", ".join(leaks["leaks"]) or "none")
    copies = manifest["near_duplicates"]
    between = ", ".join(f"{name} {count}" for name, count in copies["across_splits"].items()) or "none"
    yield f"near-duplicates across splits ({copies['method']}): {between}"
    near = manifest["neighbours"]["near_a_test_photo"]
    yield f"within 100 m of a test photo: train {near['train']}, val {near['val']}"
    yield f"groups in two splits: {len(manifest['groups_in_two_splits'])}"
