"""Runs: the way from one stage to those it builds on.

A stage finds its parents in its own run, else in the latest run with equal profile and seed, and says so. Stages
talk to each other through run directories (`stage.py`) only. Needs no torch.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils import weights
from c2f_utils.errors import C2FError, problems
from c2f_utils.runs import provenance
from c2f_utils.runs.registry import kind_of, latest, stages
from c2f_utils.runs.stage import ALWAYS_REDONE, OF_NO_RUN, WEIGHTS, Stage, run_folder

if TYPE_CHECKING:
    from c2f_utils.settings.config import Settings

# What each stage is made from. A missing one is refused before work starts; a changed one makes the stage another
# stage.
PARENTS: dict[str, tuple[str, ...]] = {
    "00_environment_and_data": (),
    "01_base_model": (),
    "02_reward_model": ("01_base_model",),
    "03_coarse_rlhf": ("01_base_model", "02_reward_model"),
    "04_length_schedules": ("01_base_model", "02_reward_model", "03_coarse_rlhf"),
    "05_instruction_model": ("01_base_model",),
    "06_residue_merging": (
        "01_base_model", "02_reward_model", "03_coarse_rlhf", "04_length_schedules", "05_instruction_model",
    ),
    "07_evaluation": (
        "01_base_model", "02_reward_model", "03_coarse_rlhf", "05_instruction_model", "06_residue_merging",
    ),
    "08_report": (),  # reports what is there and names what is missing
    "09_studies": (),  # draws what is committed with the project
}  # fmt: skip

# Which stages read a model that the settings name or, for two of them, an earlier stage makes. All stages of one run
# must mean the same weights by it.
_MADE_BY = {"base": "01_base_model", "instruct": "05_instruction_model"}
READING = "tokenizer, chat template or generation config of models."  # begins the names of inputs of that kind
_READ = {
    "base": tuple(PARENTS)[1:8],
    "instruct": tuple(PARENTS)[5:8],
    "reward": ("02_reward_model", "03_coarse_rlhf", "04_length_schedules", "06_residue_merging", "07_evaluation"),
}


@dataclass
class Run:
    """One run: settings, thread count and device, and the way to its stages and to those it builds on."""

    settings: "Settings"
    threads: int = 1
    device: str = "cpu"
    here: Stage | None = None  # the stage a notebook works on
    _found: dict[str, Stage] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        return self.settings.run_id

    @property
    def dir(self) -> Path:
        """Folder of the run."""
        return run_folder(self.id)

    @property
    def report(self) -> Path:
        """Folder of the run's report, beside its stages."""
        return self.dir / "report"

    def stage(self, name: str) -> Stage:
        """A stage of this run, begun or not; raises C2FError for a name that is no stage."""
        if name not in PARENTS:
            raise C2FError(f"there is no stage {name!r}; expected one of {', '.join(PARENTS)}")
        return Stage(self.dir / name, self.settings)

    def parent(self, name: str) -> Stage:
        """The finished stage `name` to build on.

        This run's, else the one used before, else the latest with equal profile and seed. A stage of another run is
        printed and recorded. Raises C2FError that names the notebook to run first.
        """
        found = self._find(name, self.here.name if self.here else None)
        if self.here and self.here.config():
            self.here.add_input(name, found.fingerprint())
        return found

    def inputs(self, stage: str, expected: Collection[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
        """Fingerprints of a stage's parents, and the runs they come from, both by name.

        Parents in `expected`, which are about to be made, are left out. Raises C2FError naming every missing one.
        """
        missing, fingerprints, origins = [], {}, {}
        for role, readers in _READ.items():
            if stage not in readers:
                continue
            if found := self.weights(role, stage, expected):
                fingerprints[f"{WEIGHTS}{role}"] = found
            source = getattr(self.settings.models, role)
            if source and (found := weights.reading(source)):
                fingerprints[f"{READING}{role}"] = found
        for name in PARENTS[stage]:
            if name in expected:
                continue
            try:
                found = self._find(name, stage)
            except C2FError as error:
                missing.append(str(error))
            else:
                fingerprints[name], origins[name] = found.fingerprint(), found.run_id
        missing += self._lacks_a_law(stage, expected)
        if missing:
            raise problems(f"{stage} lacks earlier stages:", missing)
        return fingerprints, origins

    def weights(self, role: str, stage: str | None, expected: Collection[str] = ()) -> str | None:
        """Identity of the weights that `stage` means by a role: of the model that the settings name, else of the one
        that 01 (base) or 05 (instruct) made; None where it is not known yet."""
        if source := getattr(self.settings.models, role):
            revision = getattr(self.settings.models, f"{role}_revision")
            return weights.identity(f"{source}@{revision}" if revision else source)
        maker = _MADE_BY.get(role)
        if maker in (None, stage, *expected):
            return None
        try:
            found = self._find(maker, stage)
        except C2FError:  # said where the stage itself is asked for
            return None
        made = found.models().get("model")
        return f"sha256:{made.get('sha256') or weights.digest(found.dir / 'model')}" if made is not None else None

    def refuse_foreign(self, stage: Stage, role: str, identity: str | None) -> None:
        """Raise C2FError if a finished stage was made with other weights of this role."""
        known = stage.provenance().get("inputs", {}).get(f"{WEIGHTS}{role}")
        if None in (known, identity) or known == identity:
            return
        named = f"models.{role}" if getattr(self.settings.models, role) else _MADE_BY[role]
        raise C2FError(
            f"{stage.name} of run {stage.run_id!r} was made with other weights of {named} ({weights.short(known)} "
            f"there, {weights.short(identity)} here): put those back (a hub model's commit goes into "
            f"models.{role}_revision), choose another run_id, or delete {stage.dir} and make it again: c2f run "
            f"{stage.name[:2]} --profile {self.settings.profile} --seed {self.settings.seed} --run-id {self.id}"
        )

    def use_weights(self, role: str, identity: str) -> None:
        """Record the weights that this run's stage loads; C2FError if it, or a stage it builds on, had others."""
        for stage in self._found.values():
            self.refuse_foreign(stage, role, identity)
        self.here.add_input(f"{WEIGHTS}{role}", identity)

    def use_reading(self, role: str, digest: str) -> None:
        """Record what a model of the user's own is read with (`weights.reading`); C2FError if it was something else for
        this run's stage, or for one it builds on."""
        name = f"{READING}{role}"
        for stage in self._found.values():
            if stage.provenance().get("inputs", {}).get(name) not in (None, digest):
                raise C2FError(
                    f"{stage.name} of run {stage.run_id!r} was made with another {name}: put the former files back, "
                    "choose another run_id, or make that stage again with overwrite=True (--overwrite)"
                )
        self.here.add_input(name, digest)

    def _lacks_a_law(self, stage: str, expected: Collection[str]) -> list[str]:
        """06's control `fixed_long_residue` is made of the actor that 04 trained under its law `fixed_long`."""
        name, control, schedules = "04_length_schedules", "fixed_long_residue", self.settings.schedules.model_dump()
        if stage != "06_residue_merging" or control not in self.settings.merge.controls:
            return []
        if name in self._found and name not in expected:
            schedules = self._found[name].config()["settings"].get("schedules", schedules)
        if "fixed_long" in schedules["laws"] or (self.settings.study and "fixed_long" in schedules["study_laws"]):
            return []
        rest = [other for other in self.settings.merge.controls if other != control]
        return [
            f"{name} has no law 'fixed_long' (schedules.laws), of whose actor merge.controls' {control} is made: keep "
            f"that law, or set merge.controls to {rest}"
        ]

    def refuse_mixture(self, stage: str) -> None:
        """Raise C2FError if the run already holds finished stages of another profile or seed.

        00 and 09, which are about no run, may be run anywhere.
        """
        asked = self.settings.profile, self.settings.seed
        made = [kind_of(item) for item in stages(self.id) if item.done and item.name not in ALWAYS_REDONE]
        found = next((kind for kind in made if kind != asked), None)
        if found and stage not in OF_NO_RUN:
            flags = zip(("--profile", "--seed"), found, asked, strict=True)
            advice = " ".join(f"{flag} {there}" for flag, there, here in flags if there != here)
            raise C2FError(
                f"run {self.id!r} holds profile {found[0]}, seed {found[1]}; {stage} asks for {asked[0]}, seed "
                f"{asked[1]}: add {advice} (in a notebook: in its first cell) or choose another run_id (--run-id)"
            )

    def _find(self, name: str, user: str | None) -> Stage:
        if name in self._found:
            return self._found[name]
        before = self.stage(user).provenance().get("parents", {}).get(name) if user else None
        own = (Stage(run_folder(run_id) / name) for run_id in (self.id, before) if run_id)
        kind, wanted = (self.settings.profile, self.settings.seed), self.settings.for_stage(name)
        made = [role for role, maker in _MADE_BY.items() if maker == name and not getattr(self.settings.models, role)]
        read = [role for role, readers in _READ.items() if name in readers and role not in made]
        meant = {role: self.weights(role, user) for role in read}
        found = next((item for item in own if item.done and kind_of(item) == kind), None)
        found = found or latest(name, *kind, wanted, meant) or latest(name, *kind, wanted)
        for role, identity in meant.items():
            if found:
                self.refuse_foreign(found, role, identity)
        if found is None:
            state = Stage(self.dir / name).state()
            there = f"it is {state} in run {self.id!r}" if state else f"run {self.id!r} has none"
            flags = f"--profile {kind[0]} --seed {kind[1]} --run-id {self.id}"
            raise C2FError(
                f"no finished {name} for profile {kind[0]!r} and seed {kind[1]} ({there}, nor has any other run); "
                f"run notebooks/{name}.ipynb first: c2f run {name[:2]} {flags}"
            )
        changed = provenance.differences(self.settings.recorded(found.config()["settings"], name), wanted)
        if found.run_id != self.id or changed:
            print(f"{name}: from run {found.run_id!r}" + (f", made with {'; '.join(changed)}" if changed else ""))
        self._found[name] = found
        return found
