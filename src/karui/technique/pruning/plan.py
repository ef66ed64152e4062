"""From settings to counts: which groups lose how many units, told before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from karui.errors import SurgeryError, require
from karui.model import Analysis, coupled_groups
from karui.technique.pruning.scope import MapSize, Quota, Scope, check_patterns, judged, map_sizes, matches

if TYPE_CHECKING:
    from karui.model import Group, Model


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The groups of a model that may be cut, from the input on, and those left whole, with the reason.

    Settings:
        analysis: the model's coupled groups.
        sizes: the size of each layer's maps.
        groups: what may be cut; the sources of each are the weights that it is scored by.
        left: what is left whole, and why.
    """

    analysis: Analysis
    sizes: Mapping[str, MapSize]
    groups: tuple[Group, ...]
    left: tuple[tuple[Group, str], ...]


def candidates(model: Model, scope: Scope) -> Candidates:
    """What of the model the scope lets be cut.

    Raises:
        SettingError: the scope names a layer that is not there.
    """
    analysis, sizes, module = coupled_groups(model), map_sizes(model), model.module
    check_patterns(scope.skip, analysis.groups, "skip: layer")
    told = [(group, scope.refusal(group, module, sizes)) for group in analysis.groups]
    return Candidates(
        analysis=analysis,
        sizes=sizes,
        groups=tuple(judged(group, analysis, module, sizes) for group, reason in told if not reason),
        left=tuple((group, reason) for group, reason in told if reason),
    )


def shares(found: Candidates, quota: Quota) -> dict[str, float]:
    """The share asked of each group that may be cut.

    Raises:
        SettingError: `ratios` names a layer that is not there, or that is left whole (with the reason).
    """
    check_patterns(list(quota.ratios), found.analysis.groups, "ratios: layer")
    free = [found.analysis[group.name] for group in found.groups]
    for pattern in quota.ratios:
        whole = next((reason for group, reason in found.left if matches(group, pattern)), "")
        ok = not whole or any(matches(group, pattern) for group in free)
        require(ok, f"ratios names '{pattern}', which is left whole: {whole}.")
    return {group.name: quota.share(group) for group in free}


def named(model: Model, names: Collection[str]) -> tuple[Analysis, list[Group]]:
    """The model's coupled groups, and those of these names, each with the weights that it is scored by.

    Raises:
        SurgeryError: there is no group of a name.
    """
    analysis, sizes = coupled_groups(model), map_sizes(model)
    gone = sorted(set(names) - {group.name for group in analysis.groups})
    require(not gone, f"No group of units is called {gone}.", "plan tells what can be cut.", SurgeryError)
    chosen = [group for group in analysis.groups if group.name in names]
    return analysis, [judged(group, analysis, model.module, sizes) for group in chosen]


def remarks(model: Model, scope: Scope, quota: Quota) -> tuple[str, ...]:
    """One line for each group and each lock: how much is cut, or why nothing is. Reads the graph only."""
    found = candidates(model, scope)
    asked = shares(found, quota)
    counts = quota.counts(found.groups, asked)
    cut = [_line(group, counts) for group in found.groups]
    left = [f"{group.name}: {group.size} units, left whole: {reason}" for group, reason in found.left]
    locked = [f"{lock.name}: {lock.size} units, locked: {lock.reason}" for lock in found.analysis.locked]
    return (*cut, *left, *locked)


def _line(group: Group, counts: Mapping[str, int]) -> str:
    count = counts.get(group.name, 0)
    return f"{group.name}: {group.size} units, cut {count} ({100 * count / group.size:.0f} %)"
