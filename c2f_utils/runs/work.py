"""How long a stage takes at most: the tokens it generates and reads, over speeds measured on this machine.

An upper bound by two simplifications: every answer reaches its limit, and every limit is its law's largest. Loading,
merging and drawing are left out; on a GPU they are minutes. Needs no torch.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import read_json, write_json
from c2f_utils.settings.config import PAIR_ANSWER_TOKENS, Coarse, Settings, trained_controls
from c2f_utils.settings.laws import Law, make_law
from c2f_utils.settings.task_suites import wanted

FILE = "speeds.json"  # in the folder of 01
NORMALISING_PROMPTS = 256  # answers of the base on which 02 normalises the reward


@dataclass(frozen=True)
class Speeds:
    """What 01 measured with the base model: tokens per second answered and read, mean tokens of a prompt and of a
    preference pair's two sequences."""

    generated: float
    read: float
    prompt_tokens: float
    pair_tokens: float

    def save(self, folder: Path) -> None:
        """Write `speeds.json`; no result, since no second run measures the same."""
        write_json(Path(folder) / FILE, {name: round(value, 1) for name, value in asdict(self).items()})


def known(folder: Path) -> Speeds | None:
    """The speeds that a finished 01 in this folder measured; None where it did not, or another version did."""
    try:
        found = read_json(Path(folder) / FILE)
        return Speeds(**{item.name: float(found[item.name]) for item in fields(Speeds)})
    except (C2FError, KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Work:
    """Tokens that are answered one by one, and tokens that a model reads at once, in training once per pass."""

    generated: float = 0.0
    read: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.generated + other.generated, self.read + other.read)

    def __mul__(self, times: float) -> "Work":
        return Work(self.generated * times, self.read * times)

    def seconds(self, speeds: Speeds) -> float:
        return self.generated / speeds.generated + self.read / speeds.read


def of_stage(stage: str, settings: Settings, speeds: Speeds) -> Work | None:
    """What a stage works through at most; None for one that no model limits."""
    makers = {
        "02_reward_model": _reward, "03_coarse_rlhf": _coarse, "04_length_schedules": _schedules,
        "05_instruction_model": _instruct, "06_residue_merging": _merging, "07_evaluation": _evaluation,
    }  # fmt: skip
    return makers[stage](settings, speeds) if stage in makers else None


def _training_passes(settings: Settings) -> int:
    """Forward passes that a training step costs: the backward pass costs one with adapters and two without, and
    recomputed activations one more."""
    return (2 if settings.models.lora else 3) + settings.models.gradient_checkpointing


def _answered(count: float, limit: float, speeds: Speeds, models: int = 1) -> Work:
    """Answers that the reward model reads afterwards; `models` run side by side for each token."""
    return Work(count * limit * models, count * (speeds.prompt_tokens + limit))


def _reward(settings: Settings, speeds: Speeds) -> Work:
    reward, coarse = settings.reward, settings.coarse
    pairs = reward.pairs + reward.held_out_pairs
    sampled = 2 * pairs * reward.base_share * PAIR_ANSWER_TOKENS if settings.embedded else 0.0
    steps = reward.max_steps * reward.pairs_per_step or reward.pairs * reward.epochs
    trained = 0 if settings.models.reward else min(steps, reward.pairs * reward.epochs) * reward.members
    read = speeds.pair_tokens * (trained * _training_passes(settings) + reward.held_out_pairs * reward.members)
    return Work(sampled, read) + _answered(NORMALISING_PROMPTS, coarse.evaluation_tokens, speeds)


def _coarse(settings: Settings, speeds: Speeds) -> Work:
    final = _answered(settings.data.test_prompts, settings.evaluation.max_tokens, speeds)
    return _rlhf(settings, settings.coarse, settings.coarse.law, speeds) + final


def _rlhf(settings: Settings, coarse: Coarse, law: Law, speeds: Speeds, evaluated: bool = True) -> Work:
    limit = make_law(law).largest
    tokens = coarse.prompts * (speeds.prompt_tokens + limit)
    networks = 2 if coarse.critic == "separate" else 1
    ours = settings.models.dtype == "float32" and coarse.engine != "vllm"
    recomputed = coarse.old_logps == "recomputed" or (coarse.old_logps == "auto" and not ours)
    judged = 1 + networks + recomputed  # reward model, reference and critic, old policy where it is read again
    improved = coarse.epochs * networks * _training_passes(settings)
    iteration = Work(coarse.prompts * limit, tokens * (judged + improved))
    evaluations = evaluated * (coarse.iterations // coarse.evaluate_every + 1)
    curve = _answered(coarse.evaluation_prompts, coarse.evaluation_tokens, speeds)
    return iteration * coarse.iterations + curve * evaluations


def _schedules(settings: Settings, speeds: Speeds) -> Work:
    schedules, total = settings.schedules, Work()
    laws = {**schedules.laws, **(schedules.study_laws if settings.study else {})}
    runs = [(law, schedules.credit.get(name)) for name, law in laws.items()]
    if settings.study:
        runs += [(entry.law, entry) for entry in schedules.critic_free.values()]
    for law, changes in runs:
        iterations = (changes and changes.iterations) or settings.coarse.iterations
        coarse = settings.coarse.model_copy(update={"iterations": iterations})
        total += _rlhf(settings, coarse, law, speeds)
        total += _answered(settings.data.test_prompts, settings.evaluation.max_tokens, speeds)
    return total * (len(schedules.study_seeds) if settings.study else 1)


def _instruct(settings: Settings, speeds: Speeds) -> Work:
    trained = settings.instruct.tokens * 3.0 if settings.embedded else 0.0
    return Work(0.0, trained) + _answered(settings.data.validation_prompts, settings.evaluation.max_tokens, speeds)


def _merging(settings: Settings, speeds: Speeds) -> Work:
    merge, sections = settings.merge, settings.merge.sections
    grid = len(merge.coefficients)
    parts = 2 * (4 + 3)  # with and without each of four blocks of layers and three kinds of module
    rounds = {"layers": parts, "depths": 4, "averages": 4, "roundings": 3, "proxies": 0, "label_free": 3 * grid}
    rounds = sum(count for name, count in rounds.items() if name in sections) + grid * (1 + len(merge.other_operators))
    controls = dict.fromkeys(("interpolation", "coarse_interpolation", "fixed_long_residue", "distilled_merge"), grid)
    rounds += sum((controls | {"random_residue": 1}).get(c, 0) for c in merge.controls)
    rounds += 1 + 3 + 1  # the reference of all differences, the parents, the Fine Actor
    each = settings.data.validation_prompts, settings.evaluation.max_tokens, speeds
    total = _answered(*each) * rounds + _answered(*each, models=3) * (2 * ("proxies" in sections))
    # Those that sample as many tokens as RLHF, and less is read of them, count as RLHF.
    trained = len(trained_controls(merge.controls))
    return total + _rlhf(settings, settings.coarse, settings.coarse.law, speeds, evaluated=False) * trained


def _evaluation(settings: Settings, speeds: Speeds) -> Work:
    models = 4 + 1 + len(settings.merge.controls)  # the roles, a recipe, controls
    forced = len(settings.forced_models)
    each = _answered(settings.data.test_prompts, settings.evaluation.max_tokens, speeds)
    total = each * ((models + forced) * len(settings.evaluation.decodings))
    if "embedded" in wanted(settings.tasks, settings.embedded):
        count = min(settings.tasks.problems, settings.data.test_prompts)
        total += Work(count * settings.evaluation.max_tokens, 5 * count * speeds.prompt_tokens) * models  # 4 choices
    return total + _judging(settings, speeds) * models


def _judging(settings: Settings, speeds: Speeds) -> Work:
    """Two turns of every question per model, and a share in the training of a held-out reward model."""
    judge = settings.judge
    if judge.name == "none":
        return Work()
    answered = _answered(2 * judge.questions, judge.max_tokens or settings.evaluation.max_tokens, speeds)
    trained = judge.pairs * _training_passes(settings) if judge.name == "reward" else 0
    models = 4 + 1 + len(settings.merge.controls)
    return answered + Work(0.0, trained * speeds.pair_tokens / models)
