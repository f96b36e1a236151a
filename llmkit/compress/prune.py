"""Pruning: single weights, whole layers, attention heads, or channels of feed-forward layers.

All but the first leave a smaller model of the same architecture. What stays of the layer that read heads or channels is
fitted by least squares, so that it gives what it gave with all of them as nearly as it can.

Shape suffixes: O outputs, I inputs of a linear layer, K inputs that stay, G those that go, U units.

**Source**: which layers: Men et al., "ShortGPT", 2024, section 3; channels and heads: Muralidharan et al., "Compact
Language Models via Pruning and Knowledge Distillation" (Minitron), NeurIPS 2024, section 2; the repair: He et al.,
"Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from llmkit.compress.calibrate import Read, check_any, reads_of, walk
from llmkit.compress.families import family_of
from llmkit.compress.given import Given, Made
from llmkit.compress.importance import by_activation, by_gradient, by_magnitude, influences
from llmkit.compress.structure import (
    Site,
    block_names,
    check_plain,
    feed_sites,
    head_sites,
    spread,
    weight_of,
    with_channels,
    with_head_count,
    with_heads,
    with_layers,
)
from llmkit.errors import UsageError
from llmkit.models.names import matches, near_names
from llmkit.recipe.compression import Step

_ROUND = 32
"""Wide layers keep a multiple of so many channels: kernels like it, and so do weights in groups."""
_WIDE = 256


def apply(given: Given, step: Step) -> Made:
    """Take out what matters least.

    Args:
        given: The model, and what it learned from.
        step: What goes, how much of it, and how that is chosen.

    Raises:
        UsageError: The architecture has no such parts, they cannot be fewer, or nothing would go.
    """
    if step.what in (None, "weights"):
        from llmkit.compress import sparsify

        return sparsify.apply(given, step)
    check_plain(given.model)
    before = given.model.num_parameters()
    model, facts = _METHODS[str(step.what)](given, step)
    warnings = facts.pop("warnings", [])
    after = model.num_parameters()
    return Made(
        model,
        {
            "what": step.what,
            **facts,
            "num_parameters": after,
            "num_parameters_before": before,
            "share_of_parameters": 1 - after / before,
        },
        warnings=warnings,
    )


def _layers(given: Given, step: Step) -> tuple[PreTrainedModel, dict[str, Any]]:
    names = block_names(given.model)
    family = family_of(given.model.config)
    found = influences(given.core, given.batches)
    fixed = stays(given.model, step.keep or (), first=family.pinned)
    kept = []
    for side, scores in enumerate(found):
        num = number_left(len(scores), step.share or 0, "layers")
        free = [number for number in range(len(scores)) if names[side][number] not in fixed]
        num_gone = len(scores) - num
        if num_gone > len(free):
            raise UsageError(
                f"prune: {num_gone} of {len(scores)} layers are to go, and {len(scores) - len(free)} must stay",
                hint="take a smaller `share`" + (", or fewer patterns in `keep`" if step.keep else ""),
            )
        gone = sorted(free, key=lambda number: (scores[number], number))[:num_gone]
        kept.append([number for number in range(len(scores)) if number not in gone])
    facts = {
        "by": "influence",
        "kept": kept,
        "gone": [sorted({*range(len(s))} - {*k}) for s, k in zip(found, kept, strict=True)],
        "influence": [[round(score, 6) for score in scores] for scores in found],
    }
    given.told(f"layers that go: {_listed(facts['gone'])}")
    return with_layers(given.model, kept), facts


def stays(model: PreTrainedModel, patterns: Sequence[str], *, first: bool) -> set[str]:
    """The names of the blocks that must stay.

    Args:
        model: The model.
        patterns: A block stays that has a module which one of them means.
        first: Whether the first of each list does, too.

    Raises:
        UsageError: A pattern means none.
    """
    blocks = [name for side in block_names(model) for name in side]
    found = {side[0] for side in block_names(model)} if first else set()
    for pattern in patterns:
        modules = [n for n, _ in model.named_modules() if any(_within(n, block) for block in blocks)]
        meant = {block for block in blocks for n in modules if _within(n, block) and matches(pattern, n)}
        if not meant:
            raise UsageError(
                f"compress.steps: keep: {pattern!r} matches no layer",
                hint=f"near names: {', '.join(near_names(pattern, modules))}",
            )
        found |= meant
    return found


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def whole_number(count: int, left: float) -> int:
    """The nearest number of `count` channels, heads or layers that may stay; of two the larger."""
    multiple = _multiple_of(count)
    return multiple * math.floor(left / multiple + 0.5 + 1e-9)


def _multiple_of(count: int) -> int:
    return _ROUND if count >= _WIDE and count % _ROUND == 0 else 1


def number_left(count: int, share: float, what: str) -> int:
    """How many of `count` stay when a share goes; at least one stays and at least one goes.

    Raises:
        UsageError: The share comes to none, or to all.
    """
    left, multiple = whole_number(count, count * (1 - share)), _multiple_of(count)
    if 0 < left < count:
        return left
    amount = "none" if left >= count else "all"
    least, most = multiple / count, (count - multiple) / count
    raise UsageError(
        f"prune: share: {share:.3g} of {count} {what} is {amount} of them",
        hint=f"between {100 * least:.3g}% and {100 * most:.3g}%"
        if count > multiple
        else f"it has one of the {what} only",
    )


def _channels(given: Given, step: Step) -> tuple[PreTrainedModel, dict[str, Any]]:
    _refuse_keep(step, "channels")
    return fewer_channels(given, step.share or 0, by=step.by or "auto", damping=step.damping or 0.01)


def fewer_channels(
    given: Given, share: float, *, by: str, damping: float
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with fewer channels in its feed-forward layers, and what was done.

    Args:
        given: The model, and what it learned from; it is changed.
        share: How much goes.
        by: What matters least: `auto`, `activation`, `gradient` or `magnitude`.
        damping: Of the least squares: added to the diagonal, as a share of its mean.
    """
    sites = feed_sites(given.model)
    left = {site.name: number_left(site.num_units, share, "channels") for site in sites}
    kept, facts = _chosen(given, sites, left, by=by, damping=damping)
    first = sites[0]
    facts["channels"] = [first.num_units, left[first.name]]
    return with_channels(given.model, kept), facts


def _heads(given: Given, step: Step) -> tuple[PreTrainedModel, dict[str, Any]]:
    _refuse_keep(step, "heads")
    sites = head_sites(given.model)
    units = sites[0].num_units
    left = number_left(units, step.share or 0, "groups of heads that share keys and values")
    _check_heads(given.model, units, left)
    numbers = {site.name: left for site in sites}
    kept, facts = _chosen(given, sites, numbers, by=step.by or "auto", damping=step.damping or 0.01)
    facts["groups"] = [units, left]
    return with_heads(given.model, kept), facts


def _check_heads(model: PreTrainedModel, units: int, left: int) -> None:
    """Refuse a number of heads that the architecture cannot have, with those that it can."""
    able = []
    for number in range(1, units):
        try:
            with_head_count(model.config, number)
        except UsageError:
            continue
        able.append(f"{100 * (1 - number / units):.3g}%")
    try:
        with_head_count(model.config, left)
    except UsageError as error:
        hint = f"shares that can be: {', '.join(able)}" if able else "take `what: channels`"
        raise UsageError(f"prune: {error.message}", hint=hint) from error


def _refuse_keep(step: Step, what: str) -> None:
    if step.keep:
        raise UsageError(
            f"compress.steps: keep: {step.keep[0]!r}: all layers have as many {what}, so none can stay as it is",
            hint="leave `keep` out, or take `what: weights` or `what: layers`",
        )


_METHODS: Mapping[str, Callable[[Given, Step], tuple[PreTrainedModel, dict[str, Any]]]] = {
    "layers": _layers,
    "heads": _heads,
    "channels": _channels,
}


def _chosen(
    given: Given, sites: Sequence[Site], left: Mapping[str, int], *, by: str, damping: float
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The units that stay, by site, and what was done; the layers that read them are repaired.

    Where rows to look at are given, blocks are treated in their order, each as it is behind those treated before. The
    units that go have no weights in `out` afterwards, so the model computes already what the smaller one will.

    Args:
        given: The model, and what it learned from.
        sites: Where the units are.
        left: How many stay, by site.
        by: What matters least.
        damping: Of the repair.
    """
    by = "activation" if by == "auto" else by
    if by != "magnitude":
        check_any(given.batches)
    places = {site.name: site for site in sites}
    scores = _joined(sites, _scores(given, sites, by))
    kept: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    warnings: list[str] = []

    def treat(reads: Mapping[str, Read]) -> None:
        for name, read in reads.items():
            site = places[name]
            own_U = scores[name] if name in scores else by_activation(site, read.gram_II, read.count)
            kept[name] = _best(own_U, left[name])
            errors[name] = repair(site, read, kept[name], damping=damping)

    if given.batches:
        warnings = walk(given.core, given.batches, list(places), treat)
    for name, site in places.items():
        if name not in kept:  # nothing was looked at, or nothing of that reached it
            kept[name] = _best(scores[name] if name in scores else by_magnitude(site), left[name])
    facts: dict[str, Any] = {"by": by, "repaired": bool(errors), "warnings": warnings}
    return kept, {**facts, **({"errors": errors} if errors else {})}


def _scores(given: Given, sites: Sequence[Site], by: str) -> dict[str, torch.Tensor]:
    """How much units matter, where that is known before the blocks are treated."""
    if by == "magnitude":
        return {site.name: by_magnitude(site) for site in sites}
    if by == "gradient":
        return by_gradient(given.core, given.batches, sites)
    joint = {site.name: site for site in sites if site.joint}
    if not joint:
        return {}
    # All blocks' units must be known before those of one can go.
    reads = reads_of(given.core, given.batches, list(joint))
    return {name: by_activation(joint[name], read.gram_II, read.count) for name, read in reads.items()}


def _joined(sites: Sequence[Site], scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scores, with those of sites whose units go together replaced by their sums, each site's adding up to one."""
    found = dict(scores)
    for joint in {site.joint for site in sites if site.joint and site.name in scores}:
        names = [site.name for site in sites if site.joint == joint and site.name in scores]
        parts = [scores[name] / scores[name].sum().clamp(min=1e-30) for name in names]
        found |= dict.fromkeys(names, torch.stack(parts).sum(0))
    return found


def _best(scores_U: torch.Tensor, count: int) -> torch.Tensor:
    """The numbers of the units that matter most, in their order; of equals the first."""
    order_U = scores_U.argsort(descending=True, stable=True)
    return order_U[:count].sort().values


def repair(site: Site, read: Read, kept_U: torch.Tensor, *, damping: float) -> float:
    """Take units out of the layer that reads them, and have the others make up for them.

    Args:
        site: The layer; its weights of the units that go become zero.
        read: What it reads.
        kept_U: The units that stay.
        damping: See `repaired`.

    Returns:
        How much of its output is lost: the square of the difference, as a share of the square of the output.
    """
    weight_OI, bias = weight_of(site.out), site.out.bias
    gram = read.gram_II  # on the host
    own = wide = weight_OI.detach().double().to(gram.device)
    index = spread(kept_U, site.width)
    if bias is not None:  # an input that is always one, which stays
        gram = _with_constant(read)
        wide = torch.cat([wide, bias.detach().double().to(wide.device)[:, None]], 1)
        index = torch.cat([index, torch.tensor([len(gram) - 1])])
    made = torch.zeros_like(wide)
    made[:, index] = repaired(wide, gram, index, damping=damping)
    lost = _energy(made - wide, gram) / max(_energy(own, read.gram_II), 1e-30)
    with torch.no_grad():
        if bias is not None:
            bias.copy_(made[:, -1])
            made = made[:, :-1]
        weight_OI.copy_(made)
    return lost


def _energy(weight_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    """The sum over positions of the square of what a layer gives."""
    return float(torch.einsum("oi,ij,oj->", weight_OI, gram_II, weight_OI))


def _with_constant(read: Read) -> torch.Tensor:
    """The outer products of the input with a one behind it."""
    edge = read.sum_I[:, None]
    corner = torch.full((1, 1), float(read.count), dtype=torch.float64)
    return torch.cat([torch.cat([read.gram_II, edge], 1), torch.cat([edge.T, corner], 1)])


def repaired(
    weight_OI: torch.Tensor, gram_II: torch.Tensor, kept_K: torch.Tensor, *, damping: float
) -> torch.Tensor:
    """The weights [O, K] of the inputs that stay, with which the outputs change least.

    Args:
        weight_OI: A linear layer's weight.
        gram_II: The sum over positions of the outer product of its input with itself.
        kept_K: The inputs that stay.
        damping: Added to the diagonal, as a share of its mean, in solving for what the weights change by.
    """
    is_gone_I = torch.ones(len(gram_II), dtype=torch.bool)
    is_gone_I[kept_K] = False
    gone_G = is_gone_I.nonzero().squeeze(1)
    wide_OI, gram = weight_OI.double(), gram_II.double()
    gram_KK = gram[kept_K][:, kept_K]
    ridge = damping * float(gram_KK.diagonal().mean())
    gram_KK = gram_KK + (ridge or 1.0) * torch.eye(len(kept_K), dtype=torch.float64)
    share_KG = torch.linalg.solve(gram_KK, gram[kept_K][:, gone_G])
    return wide_OI[:, kept_K] + wide_OI[:, gone_G] @ share_KG.T


def _listed(gone: Sequence[Sequence[int]]) -> str:
    return "; ".join(", ".join(map(str, numbers)) for numbers in gone)
