"""Makes the artefacts of a chain, each of the one before; a step with recovery in its stages, each trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.durable import remove_folder
from llmkit.recipe.compression import Recover, Step
from llmkit.registry import METHODS, load
from llmkit.report.console import Reporter
from llmkit.run.compression.artefacts import Artefact, begin, finished, leave, next_address
from llmkit.run.compression.material import Material
from llmkit.run.compression.recover import recover
from llmkit.run.folders import Options

if TYPE_CHECKING:
    from llmkit.compress.given import Made


@dataclass(frozen=True)
class Chain:
    """Makes the artefacts of a chain, one from the other.

    Attributes:
        folder: Where they go.
        material: The first model, and what it was made from.
        options: As for every verb.
        reporter: Told what happens.
    """

    folder: Path
    material: Material
    options: Options
    reporter: Reporter

    def make(self, steps: Sequence[Step]) -> list[Artefact]:
        """The first model and what the steps make of it, one after the other."""
        subject = self.material.subject
        found = [begin(subject.word, subject.place)]
        sparse = False
        for number, step in enumerate(steps, 1):
            sparse = sparse or (step.method == "prune" and step.what == "weights")
            found.append(self._step(found[-1], step, self.folder / f"{number}-{step.method}", sparse=sparse))
        return found

    def _step(self, parent: Artefact, step: Step, folder: Path, *, sparse: bool) -> Artefact:
        address = next_address(parent, step, self.material.beside(step))
        done = None if self.options.fresh else finished(folder, address)
        if done is not None:
            self.reporter.note(f"{folder} is made already")
            _clear_way(folder)  # a kill may have come before
            return done
        if self.options.fresh:
            for path in folder.parent.glob(f"{folder.name}.*"):
                remove_folder(path)
        self.reporter.phase("compress", f"{folder.name} of {parent.place}")
        if step.recover is None:
            return self._apply(parent, step, folder, address)
        return self._recovered(parent, step, step.recover, folder, address, sparse=sparse)

    def _apply(self, parent: Artefact, step: Step, folder: Path, address: str) -> Artefact:
        """Do a step without recovery."""
        return leave(folder, parent, address, step, self._made(parent, step))

    def _made(self, parent: Artefact, step: Step) -> "Made":
        """What a step makes of a model; nothing is written."""
        from llmkit.compress.given import Given

        core = self.material.core(parent.place)
        given = Given(
            core,
            self.material.batches(core, step),
            parent.place,
            self.material.asked.seed,
            self.reporter.note,
        )
        made: Made = load(METHODS[step.method].code)(given, step)
        return made

    def _recovered(
        self, parent: Artefact, step: Step, settings: Recover, folder: Path, address: str, *, sparse: bool
    ) -> Artefact:
        """Do a step in its stages, each followed by training; what was trained is the artefact."""
        current, facts = parent, list[dict[str, Any]]()
        stages = step.stages or 1
        for stage in range(1, stages + 1):
            part = stage_of(step, stage, stages, facts[-1] if facts else None)
            if part is None:
                continue
            mark = f".{stage}" if stages > 1 else ""
            cut = folder.with_name(f"{folder.name}{mark}.before")
            cut_address = next_address(current, part, self.material.beside(part))
            made = finished(cut, cut_address) or self._apply(current, part, cut, cut_address)
            facts.append(over_stages([*facts[-1:], made.facts or {}]))
            said = {"recover": settings.model_dump(mode="json"), "sparse": sparse, "first": self._first()}
            way = next_address(made, part, said)
            trained = recover(
                folder.with_name(f"{folder.name}{mark}.recover-{way[:6]}"),
                made.place,
                part,
                settings,
                self.material,
                self.options,
                self.reporter,
                sparse=sparse,
            )
            current = replace(made, place=trained, address=way)
        last = {**facts[-1], "recovered": True, "stages": stages}
        made = self._finish(parent, current, step, folder, address, last)
        _clear_way(folder)
        return made

    def _first(self) -> str:
        """The model that the chain begins with: it teaches."""
        return str(self.material.subject.place.absolute())

    def _finish(
        self,
        parent: Artefact,
        trained: Artefact,
        step: Step,
        folder: Path,
        address: str,
        facts: dict[str, Any],
    ) -> Artefact:
        """The artefact of what was trained: rounded again where it was trained as rounded, else as it is."""
        from llmkit.compress.given import Made

        if step.method == "quantize":
            rounded = step.model_copy(update={"recover": None, "solver": "rtn", "smooth": 0.0})
            made = self._made(trained, rounded)
            made = replace(made, facts={**facts, **made.facts}, warnings=[*trained.warnings, *made.warnings])
        else:
            model = self.material.core(trained.place).model
            made = Made(model, facts, warnings=trained.warnings, standard=trained.standard)
        return leave(folder, parent, address, step, made)


def _clear_way(folder: Path) -> None:
    """Of what led to an artefact leave the reports, and no models."""
    for path in folder.parent.glob(f"{folder.name}.*"):
        for name in ("model", "checkpoints"):
            if (path / name).is_dir():
                remove_folder(path / name)


def stage_of(step: Step, stage: int, stages: int, before: Mapping[str, Any] | None = None) -> Step | None:
    """A part of a step whose share grows: of weights the share in all so far, of structure that of what is left.

    Args:
        step: The step.
        stage: Which part, from 1 on.
        stages: How many there are.
        before: What the method said of the part before, counted from the first on: parts are whole, so that what is
            left is not what the share says.

    Returns:
        None where this part comes to nothing.
    """
    share, whole = step.share, {"recover": None, "stages": 1}
    if stages == 1 or share is None:
        return step.model_copy(update=whole)
    if step.what == "weights":
        return step.model_copy(update={**whole, "share": share * stage / stages})
    left, wanted = 1 - share * (stage - 1) / stages, 1 - share * stage / stages
    if before is not None:
        from llmkit.compress.prune import whole_number

        count, now = _counted(before)
        if whole_number(now, wanted * count) >= now:
            return None
        left = now / count
    return step.model_copy(update={**whole, "share": 1 - wanted / left})


def _counted(facts: Mapping[str, Any]) -> tuple[int, int]:
    """How many parts of its kind the model had, and has."""
    if "gone" in facts:
        kept, gone = len(facts["kept"][0]), len(facts["gone"][0])
        return kept + gone, kept
    before, after = facts["channels"] if "channels" in facts else facts["groups"]
    return int(before), int(after)


def over_stages(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a method says of its last stage, with what it was made from, and what went, counted from the first on."""
    first, found = stages[0], dict(stages[-1])
    if len(stages) == 1:
        return found
    if "num_parameters_before" in first:
        found["num_parameters_before"] = first["num_parameters_before"]
        found["share_of_parameters"] = 1 - found["num_parameters"] / first["num_parameters_before"]
    for name in ("channels", "groups"):
        if name in first:
            found[name] = [first[name][0], found[name][1]]
    if "gone" in first:
        kept = first["kept"]
        for later in stages[1:]:
            kept = [
                [before[number] for number in numbers]
                for before, numbers in zip(kept, later["kept"], strict=True)
            ]
        depths = [len(some) + len(others) for some, others in zip(first["kept"], first["gone"], strict=True)]
        found |= {
            "kept": kept,
            "gone": [sorted({*range(depth)} - {*some}) for depth, some in zip(depths, kept, strict=True)],
            "influence": first["influence"],
        }
    return found
